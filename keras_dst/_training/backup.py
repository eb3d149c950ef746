"""`BackupAndRestore`: resume a training run that was killed."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib

import keras
import numpy as np
from keras import ops

from keras_dst import _keras
from keras_dst._backend.jit import set_torch_rng_state, torch_rng_state
from keras_dst._training.fit_patches import active_fit
from keras_dst._utils.files import atomic_write
from keras_dst._utils.validation import check_boolean, is_integer

_RECORD = "training.json"


class BackupAndRestore(keras.callbacks.Callback):
    """Callback with which a training run can be resumed exactly, no matter when it was killed.

    A resumed training run ends with the same weights as a run that was not killed. The callback
    differs from `keras.callbacks.BackupAndRestore` in four ways:

    * Backups are atomic. If the process is killed while a backup is written, the folder contains a
      complete backup: the previous or the new backup.
    * A backup stores the weights together with the epoch and the batch at which they were saved.
    * Training resumes with the batch that follows the backup. The batches before the backup are
      read from the data and skipped.
    * A backup holds the states of random number generators, such as the states of dropout layers.

    A backup is written after all callbacks have processed the epoch or the batch, regardless of the
    order of the callbacks.

    A resumed training run must read the data in the same order. Pass `shuffle=False` to `fit`, or
    use a data set whose order depends only on the epoch. The logs of a resumed epoch cover only the
    batches after the backup.

    Args:
        backup_dir: Folder of the backups. Use a separate folder for each training run.
        save_freq: `"epoch"`, or the number of batches between two backups. Defaults to `"epoch"`.
        delete_checkpoint: Whether the backup is deleted when training ends. Defaults to True.

    Raises:
        ValueError: If `save_freq` is out of range. `fit` raises a ValueError if the model has no
            weights to restore, or if a file in `backup_dir` cannot be read.

    Example:
        >>> backup = keras_dst.callbacks.BackupAndRestore("backup")
        >>> model.fit(x, y, shuffle=False, callbacks=[keras_dst.callbacks.SparseTraining(), backup])
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike,
        save_freq: int | str = "epoch",
        delete_checkpoint: bool = True,
    ):
        super().__init__()
        if save_freq != "epoch" and not is_integer(save_freq, minimum=1):
            raise ValueError(
                "save_freq must be 'epoch' or a whole number of batches >= 1. "
                f"Received: {save_freq!r}"
            )
        if backup_dir == "":
            raise ValueError("Expected backup_dir to be the path of a folder. Received: ''")
        self.backup_dir = pathlib.Path(backup_dir)
        self.save_freq = save_freq if save_freq == "epoch" else int(save_freq)
        self.delete_checkpoint = check_boolean(delete_checkpoint, "delete_checkpoint")

    def on_train_begin(self, logs=None):
        self._epoch = None  # The epoch and the batch that `fit` trains next.
        self._batch = 0
        self._since = 0  # Number of batches trained since the last backup.
        self._generator = None  # State of torch's random generator to restore.
        self._fit = active_fit(self.model)
        if (self.backup_dir / _RECORD).exists():
            self._restore()

    def on_epoch_begin(self, epoch, logs=None):
        # When a new epoch begins, all callbacks have processed the previous epoch.
        if self._epoch not in (None, epoch):
            self._batch = 0
            if self._is_due("epoch"):
                self._back_up(epoch, 0)
        self._epoch = epoch
        if self._fit.skipped_batches:
            self._fit.skip(self._fit.skipped_batches)
        else:
            self._restore_generator()

    def on_train_batch_begin(self, batch, logs=None):
        self._forget_start()
        if batch >= self._batch:
            self._restore_generator()
        if self._is_due("batch"):
            self._back_up(self._epoch, self._batch)

    def on_train_batch_end(self, batch, logs=None):
        self._since += max(0, batch + 1 - self._batch)
        self._batch = max(self._batch, batch + 1)

    def on_train_end(self, logs=None):
        self._forget_start()
        if not self.delete_checkpoint:
            self._back_up(self.params["epochs"], 0)
        elif self.backup_dir.exists():
            (self.backup_dir / _RECORD).unlink(missing_ok=True)
            self._clear()
            with contextlib.suppress(OSError):  # The backup folder may hold files of the user.
                self.backup_dir.rmdir()
        if not self._fit.is_patched:
            self._fit.end()

    # --------------------------------------------------------------------------------------------

    def _is_due(self, end: str) -> bool:
        if isinstance(self.save_freq, str):
            return end == "epoch"
        return self._since >= self.save_freq

    def _back_up(self, epoch, batch):
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        weights = self.backup_dir / f"backup-{epoch}-{batch}.weights.h5"
        with atomic_write(weights) as unfinished:
            self.model.save_weights(unfinished)
        seeds = [ops.convert_to_numpy(v).tolist() for v in _seeds(self.model)]
        record = {
            "epoch": epoch,
            "batch": batch,
            "weights": weights.name,
            "seeds": seeds,
            "generator": torch_rng_state(),
        }
        with atomic_write(self.backup_dir / _RECORD) as unfinished:
            unfinished.write_text(json.dumps(record))
        self._clear(keep=weights)
        self._since = 0

    def _clear(self, keep=None):
        """Delete older backups and unfinished files."""
        for pattern in ("*backup-*.weights.h5", f".*{_RECORD}"):
            for path in self.backup_dir.glob(pattern):
                if path != keep:
                    path.unlink(missing_ok=True)

    def _restore(self):
        model, path = self.model, self.backup_dir / _RECORD
        if not model.built:
            raise ValueError(
                f"Expected a built model, so that the backup in {self.backup_dir} can be "
                f"restored. Received '{model.name}', which has no weights yet. Give the model an "
                "Input, or call it once on data, before fit."
            )
        try:
            record = json.loads(path.read_text())
            weights = self.backup_dir / record["weights"]
            epoch, batch = int(record["epoch"]), int(record["batch"])
            seeds, self._generator = list(record["seeds"]), record["generator"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected {path} to be a file that BackupAndRestore wrote. Received: a file with "
                f"other content. Delete {self.backup_dir} to train from the beginning."
            ) from error
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        model.load_weights(weights)
        for variable, value in zip(_seeds(model), seeds):
            variable.assign(np.array(value, variable.dtype))
        self._epoch, self._batch = epoch, batch
        _keras.set_initial_epoch(model, epoch)
        self._fit.skipped_batches = batch

    def _restore_generator(self):
        """Restore the state of the torch generator before the first batch after the backup.

        `fit` itself draws random numbers before the first batch of an epoch. If the state were
        restored before the epoch, these random numbers would change the state again.
        """
        if self._generator is not None:
            set_torch_rng_state(self._generator)
            self._generator = None

    def _forget_start(self):
        """Forget the epoch at which `fit` resumed, because later calls of `fit` begin at another
        epoch."""
        _keras.set_initial_epoch(self.model, None)
        self._fit.skipped_batches = 0


def _seeds(model) -> list:
    """Return the seed states of layers such as Dropout. Keras does not save seed states."""
    known = {id(v) for v in [*model.weights, *model.metrics_variables]}
    return [v for v in model.variables if id(v) not in known]
