"""`SparsityTensorBoard`: write densities, changes of masks and learned states for TensorBoard."""

from __future__ import annotations

import collections
import os
import time
import weakref

import keras
import numpy as np
from keras import ops

from keras_dst._training.drivers import PrunedWeight, pruned_weights_of
from keras_dst._training.metrics import is_worst_value
from keras_dst._utils.validation import check_boolean, is_integer
from keras_dst.optimizers import tensors_of

_BINS = 64  # Number of bins in each histogram.


class SparsityTensorBoard(keras.callbacks.Callback):
    """Callback that writes density, mask changes and learned states for TensorBoard.

    The callback writes the following values for every pruned weight, where `<path>` is the weight's
    path:

    * `density/<path>`: Fraction of the weight's entries that the mask keeps. The single value
      `density` is the fraction of entries that all masks together keep.
    * `mask_changes/<path>`: Fraction of mask entries that have changed since the previous record,
      or since the first step of the current `fit`. `mask_changes` is the fraction of changed
      entries in all masks together.
    * `threshold/<path>` (DST), `flips/<path>` of the kept weights (FlipOut), `scores/<path>`
      (OptG), and `gate/<path>` (Consensus; a gate below 0.5 is closed). For an array, the callback
      writes a histogram of the finite values.

    At the end of an epoch, the callback also writes the logs of `fit` as `epoch/<name>`, because
    Keras's own TensorBoard callback needs TensorFlow. Put this callback after `SparseTraining` in
    the list of callbacks. If several processes train one model, pass the callback to one process
    only.

    Args:
        log_dir: Folder that `tensorboard --logdir` reads. A missing folder is created.
        update_freq: `"epoch"` writes at the end of every epoch, and TensorBoard shows the epoch as
            the step. An integer is the number of batches between two records, and TensorBoard then
            shows the number of optimizer iterations as the step. Defaults to `"epoch"`.
        histograms: Whether to write histograms. Defaults to True.

    Raises:
        ImportError: If tensorboardX is not installed.
        ValueError: If `update_freq` is out of range. `fit` raises a ValueError if the model has no
            sparse weight.

    Example:
        >>> board = keras_dst.callbacks.SparsityTensorBoard("logs/dst")
        >>> model.fit(x, y, epochs=20, callbacks=[keras_dst.callbacks.SparseTraining(), board])
    """

    def __init__(self, log_dir, update_freq: int | str = "epoch", histograms: bool = True):
        super().__init__()
        if update_freq != "epoch" and not is_integer(update_freq, minimum=1):
            raise ValueError(
                "update_freq must be 'epoch' or a whole number of batches >= 1. "
                f"Received: {update_freq!r}"
            )
        self.log_dir = os.fspath(log_dir)
        self.update_freq = update_freq if update_freq == "epoch" else int(update_freq)
        self.histograms = check_boolean(histograms, "histograms")
        _check_installed()

    def on_train_begin(self, logs=None):
        self._members = _by_name(pruned_weights_of(self.model))
        if not self._members:
            raise ValueError(
                "SparsityTensorBoard found no sparse weights. Call keras_dst.sparsify(model, "
                "method), or compile with keras_dst.SparseOptimizer(optimizer, method)."
            )
        self._masks: dict[str, np.ndarray] = {}
        self._batches = 0
        self._events = _Events(str(self.log_dir))

    def on_epoch_begin(self, epoch, logs=None):
        # The masks are read only here, because BackupAndRestore may restore them in
        # `on_train_begin`.
        if not self._masks:
            self._masks = self._read_masks()
        self._epoch_start = self._batches

    def on_train_batch_end(self, batch, logs=None):
        last, self._batches = self._batches, self._epoch_start + batch + 1
        every = self.update_freq
        if isinstance(every, int) and last // every != self._batches // every:
            self._write(self._iterations())
            self._events.file.flush()

    def on_epoch_end(self, epoch, logs=None):
        step = epoch
        if self.update_freq == "epoch":
            self._write(step)
        else:
            step = self._iterations()
        for name, value in (logs or {}).items():
            # Some metrics return a vector, such as one value per class.
            for i, entry in enumerate(np.ravel(value).tolist()):
                if not is_worst_value(entry):
                    title = f"epoch/{name}/{i}" if np.ndim(value) else f"epoch/{name}"
                    self._events.scalar(title, entry, step)
        self._events.file.flush()

    def on_train_end(self, logs=None):
        self._events.close()

    # --------------------------------------------------------------------------------------------

    def _iterations(self) -> int:
        _ = self.model  # On JAX, reading `self.model` copies the state of `fit` to the variables.
        return int(ops.convert_to_numpy(self.model.optimizer.iterations))

    def _read_masks(self) -> dict[str, np.ndarray]:
        _ = self.model
        return {name: member.mask() for name, member in self._members.items()}

    def _write(self, step: int) -> None:
        masks = self._read_masks()
        changes = {name: mask != self._masks[name] for name, mask in masks.items()}
        self._masks = masks
        for title, found in (("density", masks), ("mask_changes", changes)):
            for name, flags in found.items():
                self._events.scalar(f"{title}/{name}", flags.mean(), step)
            size = sum(flags.size for flags in found.values())
            total = sum(np.count_nonzero(flags) for flags in found.values())
            self._events.scalar(title, total / size, step)
        for name, member in self._members.items():
            for title, tensor in member.method.monitored(tensors_of(member.state)).items():
                self._write_values(f"{title}/{name}", ops.convert_to_numpy(tensor), step)

    def _write_values(self, tag: str, values: np.ndarray, step: int) -> None:
        if not values.shape:
            self._events.scalar(tag, float(values), step)
        elif self.histograms and np.isfinite(values).any():
            self._events.histogram(tag, values[np.isfinite(values)], step)


def _by_name(members: list[PrunedWeight]) -> dict[str, PrunedWeight]:
    """Return a dict that maps the path of each pruned weight to the weight.

    If several weights have the same path, a number is appended to the path of every weight except
    the first.
    """
    seen: collections.Counter[str] = collections.Counter()
    found = {}
    for member in members:
        count = seen[member.name]
        seen[member.name] += 1
        found[f"{member.name}_{count}" if count else member.name] = member
    return found


def _check_installed() -> None:
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "SparsityTensorBoard needs tensorboardX: pip install keras_dst[tensorboard]"
        ) from error


class _Events:
    """Event file to which every record is written immediately. If the process is killed, the file
    keeps all previous records."""

    def __init__(self, log_dir: str):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.record_writer import directory_check

        directory_check(log_dir)
        self.file = EventsWriter(f"{log_dir}/events", f".{time.time_ns()}")
        # The finalizer also closes the file if `fit` raises an exception.
        self.close = weakref.finalize(self, self.file.close)

    def scalar(self, tag: str, value: float, step: int) -> None:
        from tensorboardX.summary import scalar

        self._write(scalar(tag, value), step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        from tensorboardX.summary import histogram

        self._write(histogram(tag, values, _BINS), step)

    def _write(self, summary, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.file.write_event(Event(wall_time=time.time(), step=step, summary=summary))
