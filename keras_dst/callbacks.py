"""Callbacks for `fit`: sparse training, fine-tuning of clusters, backups and TensorBoard."""

from __future__ import annotations

import functools
import warnings

import keras

from keras_dst import _keras
from keras_dst._training.backup import BackupAndRestore
from keras_dst._training.drivers import Driver, drivers_of
from keras_dst._training.fit_patches import AtomicSave, active_fit
from keras_dst._training.metrics import direction_of_metric, worst_value
from keras_dst._training.tensorboard import SparsityTensorBoard
from keras_dst._utils.validation import check_boolean, check_integer
from keras_dst.clustering import KeepClusters
from keras_dst.optimizers import averages_weights

__all__ = ["BackupAndRestore", "KeepClusters", "SparseTraining", "SparsityTensorBoard"]


class SparseTraining(keras.callbacks.Callback):
    """Callback that updates the masks during `fit`, for every pruning method.

    The pruning schedule extends over all steps of the first `fit`, unless `epochs` is given. A
    later `fit` continues the schedule. The callback updates the masks between training steps. The
    progress bar and the history show a metric `sparsity`: the fraction of zeros among all weights
    that the method prunes. If a method learns its sparsity and has a target, the last step adjusts
    the masks to meet the target exactly. If training misses the target, a warning states the
    difference.

    Masks also apply to weights that other callbacks assign, such as the averages of
    `SwapEMAWeights`. At the end of training, `EarlyStopping(restore_best_weights=True)` may assign
    weights from an epoch before the target sparsity was reached. `SparseTraining` then prunes the
    weights again and issues a warning.

    While `fit` runs, `model.save` and `model.save_weights` are atomic: a killed process leaves
    either the complete old file or the complete new file.

    Put `SparseTraining` before Keras callbacks that save within an epoch.

    Args:
        epochs: Length of the schedule in epochs, for training that consists of several calls of
            `fit`. Defaults to None, which uses the number of epochs of the first `fit`.
        steps_per_epoch: Number of batches per epoch, for data of unknown length. Defaults to None,
            in which case the batches are counted in the first epoch.
        metric_at_target: Name of a metric, such as `"val_accuracy"`, whose values count only after
            the target sparsity is reached. The log `"val_accuracy_at_target"` contains the value of
            the metric once the target sparsity is reached. In earlier epochs, the log contains
            placeholder values, which are worse than any value of the metric and improve from epoch
            to epoch. Callbacks that monitor the `_at_target` log therefore keep only models that
            are sparse enough, and do not stop training too early. If the metric is measured on the
            training data, put `SparseTraining` first in the list of callbacks. Defaults to None.
        metric_mode: Direction in which `metric_at_target` improves, `"min"` or `"max"`. Defaults to
            None, in which case the metric in `compile` defines the direction.
        keep_memory: If True, training steps reuse freed memory, which the process returns to the
            system only after `fit`. The setting belongs to the C library and applies to the whole
            process. The setting has an effect only on Linux with glibc, and only if no environment
            variable such as MALLOC_TRIM_THRESHOLD_ is set. Defaults to False.

    Raises:
        ValueError: If an argument is out of range. `fit` raises a ValueError if no weight of the
            model is sparse, or if the length of training is unknown.

    Example:
        >>> model.fit(x, y, epochs=20, callbacks=[keras_dst.callbacks.SparseTraining()])

        Save the best of the models that reach the target sparsity:

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
        keep_memory: bool = False,
    ):
        super().__init__()
        if metric_mode not in (None, "min", "max"):
            raise ValueError(f"metric_mode must be 'min' or 'max'. Received: {metric_mode!r}")
        self.epochs = epochs if epochs is None else check_integer(epochs, "epochs")
        self.steps_per_epoch = steps_per_epoch
        if steps_per_epoch is not None:
            self.steps_per_epoch = check_integer(steps_per_epoch, "steps_per_epoch")
        if metric_at_target is not None and not (
            isinstance(metric_at_target, str) and metric_at_target
        ):
            raise ValueError(
                "metric_at_target must be the name of a metric, such as 'val_accuracy'. "
                f"Received: {metric_at_target!r}"
            )
        self.metric_at_target = metric_at_target
        self.metric_mode = metric_mode
        self.keep_memory = check_boolean(keep_memory, "keep_memory")
        self._drivers: list[Driver] = []
        self._begun = False

    def missed(self) -> list[str]:
        """Return one warning sentence for every target that the model currently misses.

        Example:
            >>> sparse = keras_dst.callbacks.SparseTraining()
            >>> model.fit(x, y, epochs=20, callbacks=[sparse])
            >>> sparse.missed()
            []
        """
        missed = [d for d in self._drivers if d.schedule and not d.is_at_target()]
        return [driver.outcome() for driver in missed]

    # -- hooks that Keras calls ------------------------------------------------------------------

    def on_train_begin(self, logs=None):
        self._drivers = drivers_of(self.model)
        if not self._drivers:
            raise ValueError(
                "SparseTraining expects a model with sparse layers or a SparseOptimizer. "
                f"Received '{self.model.name}', which has neither sparse layers nor a "
                "SparseOptimizer. Call keras_dst.sparsify(model, method), or compile with "
                "keras_dst.SparseOptimizer(optimizer, method)."
            )
        self._epoch_length = self.steps_per_epoch or self.params.get("steps")
        if self._epoch_length is None and (self.epochs or self.params.get("epochs", 1)) < 2:
            raise ValueError(
                "SparseTraining needs the number of steps of the training run. "
                "Received a single epoch and data of unknown length. Pass "
                "SparseTraining(steps_per_epoch=...)."
            )
        if self.metric_at_target and not all(driver.schedule for driver in self._drivers):
            raise ValueError(
                f"metric_at_target={self.metric_at_target!r} needs a target for every method. "
                f"Received: {[driver.method for driver in self._drivers]}. Pass a sparsity to "
                "every method, or do not pass metric_at_target."
            )
        self._begun = self._metric_seen = False
        self._patch_fit()

    def _patch_fit(self):
        self._fit = fit = active_fit(self.model)
        fit.keeps_memory = self.keep_memory
        for name in ("save", "save_weights"):
            fit.replace(self.model, name, functools.partial(AtomicSave, prepare=self._prepare_save))
        if self.metric_at_target and self.metric_at_target.startswith("val_"):
            # Add the `_at_target` metric to the logs of `evaluate`, so that callbacks which run
            # before this callback also see the metric.
            fit.replace(self.model, "evaluate", self._with_metric_at_target)
        if fit.history is not None:
            # EarlyStopping may restore other weights in its `on_train_end`. The `on_train_end` of
            # the `History` callback runs later, so the final weights are checked there.
            fit.replace(
                fit.history, "on_train_end", functools.partial(self._with_last_check, fit.history)
            )
        fit.guard_step(self._drivers)

    def on_epoch_begin(self, epoch, logs=None):
        if not self._begun:
            # `on_train_begin` is too early, because BackupAndRestore may restore the state in its
            # own `on_train_begin`.
            self._begin(epoch)
        self._reapply_masks()
        self._epoch = epoch
        self._epoch_start = self._batches
        self._fit.begin_epoch()

    def _begin(self, epoch):
        self._begun = True
        self._first_epoch = epoch
        self._batches = 0
        done = self._fit.skipped_batches
        self._length_known = self._epoch_length is not None
        if not self._length_known:
            self._epoch_length = self._stored_epoch_length(done)
        for driver in self._drivers:
            driver.begin(self._steps(self.epochs), self._steps(), self._epoch_length, done)
        self._measure()

    def on_train_batch_begin(self, batch, logs=None):
        self._fit.begin_step()

    def on_train_batch_end(self, batch, logs=None):
        self._batches = self._epoch_start + self._trained_in_epoch(batch)
        due = [d for d in self._drivers if d.is_due(self._batches)]
        if due:
            self._sync()
            for driver in due:
                driver.advance(self._batches)
            self._measure()
        self._write(logs)

    def on_test_batch_begin(self, batch, logs=None):
        if batch == 0 and self._begun:
            # SwapEMAWeights may have replaced the weights by averages in its `on_test_begin`.
            self._reapply_masks()

    def on_epoch_end(self, epoch, logs=None):
        if not self._length_known:
            self._length_known = True
            self._epoch_length = self._batches
            for driver in self._drivers:
                length = self._steps(self.epochs)
                driver.set_length(length, self._steps(), self._epoch_length, self._batches)
        self._reapply_masks()
        self._measure()
        self._write(logs)

    def on_train_end(self, logs=None):
        if not self._begun:
            if not any(driver.read_progress()[1] for driver in self._drivers):
                self._fit.end()  # `fit(epochs=0)` before any training must not prune the weights.
                return
            # `fit` ran no epoch, because BackupAndRestore has restored a finished training run.
            self._begin(self.params.get("epochs", 1))
        if self.metric_at_target and not self._metric_seen:
            warnings.warn(
                f"metric_at_target={self.metric_at_target!r} was missing in the logs of every "
                "epoch. If the metric is measured on validation data, pass validation_data to fit.",
                stacklevel=2,
            )
        if averages_weights(self.model.optimizer):
            # `fit` has overwritten the weights with their moving averages.
            self._reapply_masks()
        else:
            self._recover()
        for driver in self._drivers:
            driver.end(self._batches, warn_early=self.epochs is None)
        self._measure()
        if any(driver.in_steps for driver in self._drivers):
            # The compiled training step does not update the masks, because the callback updates
            # them. Compile a new training step, because the next `fit` may run without the
            # callback.
            self.model.train_function = None
        if self._fit.history is None:
            # In `fit`, the `History` callback ends the training run, but custom training loops have
            # no `History`.
            self._fit.end()

    # --------------------------------------------------------------------------------------------

    def _sync(self):
        """On JAX, copy the current weights of the running `fit` to the variables of the model."""
        _ = self.model

    def _steps(self, epochs=None):
        """Return the number of steps in `epochs` epochs, or in the current `fit` if `epochs` is
        None.

        Return None if the length of an epoch is unknown.
        """
        if self._epoch_length is None:
            return None
        if epochs is None:
            epochs = self.params.get("epochs", 1) - self._first_epoch
        return epochs * self._epoch_length

    def _trained_in_epoch(self, batch):
        """Return the number of batches that the current epoch has trained up to `batch`.

        If `steps_per_execution` does not divide the number of batches, Keras reports a last batch
        after the end of the data. With `fit(steps_per_epoch=...)` and data that repeat, Keras
        trains these additional batches.
        """
        steps = self.params.get("steps")
        if not steps or batch < steps:
            return batch + 1
        self._sync()
        for driver in self._drivers:
            if driver.trained_steps() > self._epoch_start + steps:
                return batch + 1
        return steps

    def _stored_epoch_length(self, done):
        """Return the number of batches per epoch that an unfinished training run has counted.

        Return None if the model does not continue a training run, or if the stored steps do not
        belong to the epoch at which `fit` begins.

        Args:
            done: Number of batches of the current epoch that were trained before an interruption.
        """
        epochs, past = self.epochs or self.params.get("epochs", 1), self._first_epoch
        for step, total in (driver.read_progress() for driver in self._drivers):
            if past and total and (step - done) * epochs == total * past:
                return total // epochs
        return None

    def _reapply_masks(self):
        """Apply the masks to weights that another callback may have assigned."""
        self._sync()
        for driver in self._drivers:
            driver.reapply_masks()

    def _prepare_save(self):
        """Apply the masks and store the current step before the model is saved."""
        self._reapply_masks()
        if self._begun:
            for driver in self._drivers:
                driver.store_step(self._batches)

    def _recover(self):
        """Prune the weights again if another callback assigned weights with a lower sparsity."""
        self._sync()
        for driver, reached in zip(self._drivers, self._reached):
            driver.recover(self._batches, reached)

    def _with_last_check(self, history, inner):
        """Return a replacement of `History.on_train_end` that also checks the final weights."""

        def on_train_end(logs=None):
            inner(logs)
            if self._begun:
                self._recover()
                self._measure()
                if logged := history.history.get("sparsity"):
                    logged[-1] = self._sparsity
            self._fit.end()

        return on_train_end

    def _measure(self):
        self._sync()
        measured = [driver.measure() for driver in self._drivers]
        kept = sum(count for count, _ in measured)
        self._sparsity = 1 - kept / sum(d.size for d in self._drivers)
        self._reached = [reached for _, reached in measured]
        self._at_target = self.metric_at_target is None or all(
            d.is_at_target(reached) for d, reached in zip(self._drivers, self._reached)
        )

    def _write(self, logs):
        if logs is None:
            return
        name = self.metric_at_target
        if name and logs and (name in logs or not name.startswith("val_")):
            self._write_at_target(logs, name)
        logs["sparsity"] = self._sparsity

    def _with_metric_at_target(self, evaluate):
        """Return a replacement of `evaluate` that adds the `_at_target` metric during `fit`."""

        def evaluate_with_metric(*arguments, **options):
            logs = evaluate(*arguments, **options)
            if _keras.is_validation(options) and isinstance(logs, dict):
                self._measure()
                self._write_at_target(logs, (self.metric_at_target or "").removeprefix("val_"))
            return logs

        return evaluate_with_metric

    def _write_at_target(self, logs, name):
        if name not in logs:
            raise ValueError(
                f"metric_at_target={self.metric_at_target!r} is not among the metrics. Expected "
                "one of: " + ", ".join(logs)
            )
        self._metric_seen = True
        mode = self.metric_mode or _mode(self.model, self.metric_at_target)
        logs[f"{name}_at_target"] = (
            logs[name] if self._at_target else worst_value(self._epoch, mode)
        )


def _mode(model, name) -> str:
    """Return `"min"` or `"max"`, the direction in which a metric improves."""
    name = name.removeprefix("val_")
    if mode := direction_of_metric(model, name):
        return mode
    raise ValueError(
        f"The direction in which the metric {name!r} improves is unknown. Pass "
        "SparseTraining(metric_mode='min'), or metric_mode='max'."
    )
