"""`UpdatePruningStep`: the callback that prunes a model during training."""

from __future__ import annotations

import functools
from typing import Any

import keras
from keras import ops

from keras_dst import _keras, masks
from keras_dst._backend.jit import jit
from keras_dst._training.drivers import LayerDriver
from keras_dst._training.fit_patches import active_fit
from keras_dst.layers.classes import frozen_layers_of
from keras_dst.methods.base import LayerMethod
from keras_dst.tfmot.pruning import is_pruned


class UpdatePruningStep(keras.callbacks.Callback):
    """Callback that updates the masks of pruned layers and sets masked weights to zero.

    If a layer is frozen after `prune_low_magnitude`, its masks and its weights do not change.

    In a custom training loop, compile the model, then call `set_model` and `on_train_begin` of the
    callback. Call `on_train_batch_begin` before every step, and `on_epoch_end` after every epoch.

    Raises:
        ValueError: When training begins, if the model has no pruned layer, all pruned layers are
            frozen, the model is not compiled, or `steps_per_execution` is above 1. With more than
            one step per execution, Keras does not call callbacks before every step.

    Example:
        >>> model.fit(x, y, epochs=2, callbacks=[keras_dst.tfmot.UpdatePruningStep()])
    """

    def on_train_begin(self, logs=None):
        pruned = [layer for layer in _keras.flatten_layers(self.model) if is_pruned(layer)]
        if not pruned:
            raise ValueError(
                f"UpdatePruningStep found no pruned layer in '{self.model.name}'. Call "
                "model = keras_dst.tfmot.prune_low_magnitude(model), and compile it."
            )
        groups: dict[LayerMethod, list[Any]] = {}
        frozen = frozen_layers_of(self.model)
        for layer in pruned:
            if id(layer) not in frozen:
                groups.setdefault(layer.method, []).append(layer)
        if not groups:
            raise ValueError(
                f"All pruned layers of '{self.model.name}' are frozen. Set trainable = True for "
                "these layers and compile the model, or fit without UpdatePruningStep."
            )
        if getattr(self.model, "optimizer", None) is None:
            raise ValueError(
                f"'{self.model.name}' has no optimizer that counts the steps. Compile the model."
            )
        if self.model.steps_per_execution != 1:
            raise ValueError(
                "UpdatePruningStep must be called before every step. Compile with "
                "steps_per_execution=1, or use keras_dst.SparseOptimizer. "
                f"Received: steps_per_execution={self.model.steps_per_execution}"
            )
        self._drivers = [_StepDriver(self.model, layers_) for layers_ in groups.values()]
        self._skipped_batches = 0
        self._fit = active_fit(self.model)
        self._fit.guard_step(self._drivers)

    def on_epoch_begin(self, epoch, logs=None):
        # If `fit` continues from a backup, it reads all batches of the epoch again, but trains only
        # on the batches after the backup.
        self._skipped_batches = self._fit.skipped_batches

    def on_train_batch_begin(self, batch, logs=None):
        self._fit.begin_step()
        if batch < self._skipped_batches:
            return
        # On JAX, the steps of `fit` do not update the variables of the model. When `self.model` is
        # read, Keras copies the current values to the variables.
        _ = self.model
        for driver in self._drivers:
            driver.before_step()

    def on_epoch_end(self, batch, logs=None):
        _ = self.model
        for driver in self._drivers:
            driver.apply_masks()
            driver.save_progress()

    def on_train_end(self, logs=None):
        for driver in self._drivers:
            driver.set_active(False)


class _StepDriver(LayerDriver):
    """Driver that updates the masks of all layers that share one `PruneLowMagnitude` method."""

    def __init__(self, model, layers_):
        super().__init__(model, layers_)
        self.schedule = self.method.pruning_schedule
        # The step count is read at the first step, not here, because another callback may restore a
        # backup before the first step.
        self.step: int | None = None
        self.set_active(True)

    def before_step(self):
        """Count a step, update the masks if an update is due, and set masked weights to zero."""
        if self.step is None:
            self.step, _ = self.read_progress()
            self.save_progress()
        self.step += 1
        if self.method.is_update(self.step):
            for weight, state in zip(self.weights, self.states):
                w = ops.convert_to_numpy(ops.cast(ops.convert_to_tensor(weight), "float32"))
                state["mask"].assign(self.method.new_mask(w, self.step))
        self.apply_masks()

    def apply_masks(self):
        """Set the pruned weights to zero again after an optimizer step."""
        weights, states = self._values()
        masked = _masked_weights()(weights, [state["mask"] for state in states])
        for weight, value in zip(self.weights, masked):
            weight.assign(value)

    def save_progress(self):
        """Store the step in the layers, so that the next `fit` continues to count from this
        step."""
        if self.step is not None:
            self.write_progress(self.step, 1)


@functools.cache
def _masked_weights():
    return jit(lambda weights, kept: [masks.masked(w, m) for w, m in zip(weights, kept)])
