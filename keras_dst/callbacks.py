"""Callbacks for `fit`: `SparseTraining`, and the `BackupAndRestore` that goes with it.

`SparsityTensorBoard`, which watches them, is in `keras_dst.tensorboard`.
"""

from __future__ import annotations

import functools
import inspect
import warnings

import keras

from keras_dst import _keras
from keras_dst._backend import malloc
from keras_dst._training.backup import ActiveFit, BackupAndRestore
from keras_dst._training.drivers import Driver, drivers_of
from keras_dst._training.metrics import direction_of_metric, worst_value
from keras_dst._training.tensorboard import SparsityTensorBoard
from keras_dst._utils.files import save_in_place, save_whole
from keras_dst._utils.validation import check_integer

__all__ = ["BackupAndRestore", "SparseTraining", "SparsityTensorBoard"]


class SparseTraining(keras.callbacks.Callback):
    """Drives every method during `fit`: schedules, mask updates, the log, the last projection.

    Schedules are resolved from the epochs and steps of the first `fit`; a later `fit` goes on
    where that one ended. Masks and controllers are updated between steps, `sparsity` (of the
    weights under the method) is shown in the progress bar and kept in the history, the last step
    makes it exact, and a warning says by how much a target was missed. While it is at work, what
    `save` and `save_weights` write is whole or not there at all, and on Linux the process keeps
    memory that a step frees for the next one, unless variables such as MALLOC_TRIM_THRESHOLD_ say
    what it is to do.

    Put it before callbacks of Keras that save within an epoch.

    Args:
        epochs: epochs that the schedule takes, where they are not those of the first `fit`: for a
            training in several calls.
        steps_per_epoch: batches in an epoch, where `fit` cannot know before the first one ends.
        metric_at_target: a metric of which the best counts only at the target, such as
            `"val_accuracy"`. The
            log `"val_accuracy_at_target"` has its value once the target is reached. Before, it has
            one that is worse than any, and less so from epoch to epoch: whatever looks for the
            best, or waits for better, neither keeps nor stops at what is not sparse enough. A
            metric of the training itself needs this callback to come first.
        metric_mode: whether the best of it is the `"min"` or the `"max"`; by default what the
            metric itself says.

    Raises:
        ValueError: when training begins and there is nothing to drive, or its length is unknown.

    Example:
        >>> model.fit(x, y, epochs=20, callbacks=[keras_dst.callbacks.SparseTraining()])

        The best model at the target:

        >>> sparse = keras_dst.callbacks.SparseTraining(metric_at_target="val_accuracy")
        >>> best = keras.callbacks.ModelCheckpoint(
        ...     "best.keras", "val_accuracy_at_target", mode="max", save_best_only=True
        ... )
        >>> model.fit(x, y, validation_split=0.1, epochs=20, callbacks=[sparse, best])
    """

    def __init__(
        self,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        metric_at_target: str | None = None,
        metric_mode: str | None = None,
    ):
        super().__init__()
        if metric_mode not in (None, "min", "max"):
            raise ValueError(f"metric_mode must be 'min' or 'max'. Received: {metric_mode!r}")
        self.metric_at_target = metric_at_target
        self.metric_mode = metric_mode
        for name, value in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
            if value is not None:
                check_integer(value, name)
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self._drivers: list[Driver] = []
        self._begun = False

    def missed(self) -> list[str]:
        """What the training has not reached of its targets: a sentence for each of them.

        Example:
            >>> sparse = keras_dst.callbacks.SparseTraining()
            >>> model.fit(x, y, epochs=20, callbacks=[sparse])
            >>> sparse.missed()
            []
        """
        behind = [d for d in self._drivers if d.schedule and not d.is_at_target()]
        return [driver.outcome() for driver in behind]

    # -- Keras's hooks ---------------------------------------------------------------------------

    def on_train_begin(self, logs=None):
        self._drivers = drivers_of(self.model)
        if not self._drivers:
            raise ValueError(
                "SparseTraining found nothing to drive: no sparse layer and no SparseOptimizer. "
                "Call keras_dst.sparsify(model, method), or compile with "
                "keras_dst.SparseOptimizer(optimizer, method)."
            )
        self._epoch_length = self.steps_per_epoch or self.params.get("steps")
        if self._epoch_length is None and (self.epochs or self.params.get("epochs", 1)) < 2:
            raise ValueError(
                "The number of steps in the only epoch is unknown. "
                "Give SparseTraining(steps_per_epoch=...)."
            )
        if self.metric_at_target and not all(driver.schedule for driver in self._drivers):
            raise ValueError(
                f"metric_at_target={self.metric_at_target!r} needs a target, and one of the "
                f"methods has none: {[driver.method for driver in self._drivers]}"
            )
        self._begun = self._metric_seen = False
        save_whole(self.model)
        if self.metric_at_target and self.metric_at_target.startswith("val_"):
            # Not in on_epoch_end alone: here it is in the log for callbacks before this one, too.
            vars(self.model)["evaluate"] = _EvaluateWithTarget(self.model, self._write_validation)  # type: ignore[index]
        guard_step(self.model, self._drivers)
        malloc.keep()

    def on_epoch_begin(self, epoch, logs=None):
        if not self._begun:
            # Not in on_train_begin: BackupAndRestore may only just have restored the state.
            self._begin(epoch)
        self._epoch = epoch
        self._epoch_start = self._batches

    def _begin(self, epoch):
        self._begun = True
        self._first_epoch = epoch
        self._batches = 0
        done = getattr(self.model, "_initial_batch", 0)  # batches that are drawn and left out
        for driver in self._drivers:
            driver.begin(self._steps(self.epochs), self._steps(), self._epoch_length, done)
        self._measure()

    def on_train_batch_end(self, batch, logs=None):
        self._batches = self._epoch_start + batch + 1
        due = [d for d in self._drivers if d.is_due(self._batches)]
        if due:
            self._sync()
            for driver in due:
                driver.advance(self._batches)
            self._measure()
        self._write(logs)

    def on_epoch_end(self, epoch, logs=None):
        if self._epoch_length is None:
            self._epoch_length = self._batches
            for driver in self._drivers:
                length = self._steps(self.epochs)
                driver.set_length(length, self._steps(), self._epoch_length, self._batches)
        self._measure()
        self._write(logs)

    def on_train_end(self, logs=None):
        malloc.give_back()
        save_in_place(self.model)
        vars(self.model).pop("evaluate", None)  # type: ignore[attr-defined]
        if not self._begun:  # a backup of the last epoch was restored
            self._begin(self.params.get("epochs", 1))
        if self.metric_at_target and not self._metric_seen:
            warnings.warn(
                f"metric_at_target={self.metric_at_target!r} was in no log: fit without "
                "validation?",
                stacklevel=2,
            )
        for driver in self._drivers:
            driver.end(self._batches, warn_early=self.epochs is None)
        if any(driver.in_steps for driver in self._drivers):
            # Compiled for a step that leaves the masks to this callback; the next fit may do
            # without it.
            self.model.train_function = None

    # --------------------------------------------------------------------------------------------

    def _sync(self):
        """On JAX, hand the state of the running fit back to the variables."""
        _ = self.model

    def _steps(self, epochs=None):
        """Steps in so many epochs, or in this fit; None while that is unknown."""
        if self._epoch_length is None:
            return None
        if epochs is None:
            epochs = self.params.get("epochs", 1) - self._first_epoch
        return epochs * self._epoch_length

    def _measure(self):
        self._sync()
        kept = sum(d.kept() for d in self._drivers)
        self._log = 1 - kept / sum(d.size for d in self._drivers)
        self._at_target = self.metric_at_target is None or all(
            d.is_at_target() for d in self._drivers
        )

    def _write(self, logs):
        if logs is None:
            return
        if (
            self.metric_at_target
            and logs
            and (self.metric_at_target in logs or not self.metric_at_target.startswith("val_"))
        ):
            self._write_at_target(logs, self.metric_at_target)
        logs["sparsity"] = self._log

    def _write_validation(self, logs):
        self._measure()
        self._write_at_target(logs, (self.metric_at_target or "").removeprefix("val_"))

    def _write_at_target(self, logs, name):
        if name not in logs:
            raise ValueError(
                f"metric_at_target={self.metric_at_target!r} is none of the metrics: "
                + ", ".join(logs)
            )
        self._metric_seen = True
        mode = self.metric_mode or _mode(self.model, self.metric_at_target)
        logs[f"{name}_at_target"] = (
            logs[name] if self._at_target else worst_value(self._epoch, mode)
        )


class _EvaluateWithTarget:
    """What stands in for a model's `evaluate` while a fit calls it, and adds to its logs."""

    def __init__(self, model, write):
        self.inner = getattr(model.evaluate, "inner", model.evaluate)
        self.write, self.running = write, ActiveFit(model)

    def __call__(self, *args, **kwargs):
        logs = self.inner(*args, **kwargs)
        if self.running and isinstance(logs, dict):
            self.write(logs)
        return logs


def _mode(model, name) -> str:
    """Whether the best value of a metric is its `"min"` or its `"max"`, as the metric says."""
    name = name.removeprefix("val_")
    if mode := direction_of_metric(model, name):
        return mode
    raise ValueError(
        f"Whether the best {name!r} is the smallest or the largest is not known. "
        "Give SparseTraining(metric_mode='min') or 'max'."
    )


def guard_step(model, drivers):
    """Make the compiled step, which later fits use again, refuse to run without a driver."""
    if model.train_function is None:  # a training loop of the user's own
        return
    # What earlier fits left comes off, not what compiles the step: torch.compile wraps it, too.
    step = inspect.unwrap(model.train_function, stop=lambda f: not hasattr(f, "ours"))

    @functools.wraps(step, assigned=(), updated=())
    def guarded(*args, **kwargs):
        if idle := [d for d in drivers if d.schedule is not None and not d.active]:
            _keras.restore_jax_state(model, *args)
            callback = idle[0].method.driver
            raise ValueError(
                "This model was compiled for training with the "
                f"{callback.split('.')[-1]} callback. Fit with callbacks=[{callback}()]."
            )
        return step(*args, **kwargs)

    vars(guarded)["ours"] = True
    model.train_function = guarded
