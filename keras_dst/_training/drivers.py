"""Drivers, which apply the scheduled mask updates of a method between training steps."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_dst import _keras
from keras_dst._backend.devices import placed_like
from keras_dst._backend.jit import count_all_true, jit, separate_buffer
from keras_dst._reporting.flops import count_uses
from keras_dst._training.channels import Coupling, Follower, couple, mask_followers
from keras_dst._training.fit_patches import active_fit
from keras_dst._training.two_path import TwoPathLoss, check_rematerialization
from keras_dst._utils.clock import update_clock
from keras_dst.layers import Gate
from keras_dst.layers.base import SparseMixin
from keras_dst.layers.classes import frozen_layers_of, layouts_of
from keras_dst.masks import Layout, Pattern, masked
from keras_dst.methods import channels
from keras_dst.methods.base import (
    LayerMethod,
    Method,
    ScheduleState,
    State,
    TwoPathMethod,
    UnitMethod,
    UpdateMethod,
)
from keras_dst.optimizers import (
    SparseOptimizer,
    exclude_from_decay,
    optimizers_of,
    sparse_optimizers,
    tensors_of,
)
from keras_dst.surgery import check_model


def drivers_of(model) -> list[Driver]:
    """Return the drivers of a model: one driver for each method that prunes its weights."""
    found: list[Driver] = []
    groups: dict[LayerMethod, list[SparseMixin | Gate]] = {}
    # If a layer was frozen after the call of `sparsify`, its mask does not change.
    frozen = frozen_layers_of(model)
    for layer in _keras.flatten_layers(model):
        if id(layer) in frozen:
            continue
        if isinstance(layer, (SparseMixin, Gate)) and any(layer.masked_weights()):
            groups.setdefault(layer.method, []).append(layer)
    if sum(isinstance(method, TwoPathMethod) for method in groups) > 1:
        raise ValueError(
            f"Expected at most one method with two paths per model. Received: {list(groups)}"
        )
    for method, layers in groups.items():
        if method.driver != LayerMethod.driver:
            raise ValueError(
                f"{method!r} is updated by the {method.driver} callback. "
                f"Fit with callbacks=[{method.driver}()] instead of SparseTraining."
            )
        found.append(LayerDriver(model, layers))
    for optimizer in _built_sparse_optimizers(model):
        if not any(kernel.trainable for kernel in optimizer.kernels):
            continue
        found.append(OptimizerDriver(model, optimizer, _couple_optimizer(model, optimizer)))
    return found


def couple_channels(model, optimizer: SparseOptimizer | None = None) -> None:
    """Tell the optimizer which channels of a model are pruned together with `pattern="channel"`.

    The `SparseTraining` callback calls this function when `fit` begins. A training loop without
    `SparseTraining` calls this function before the first step. Without a call of `couple_channels`,
    the optimizer ranks the channels of each layer separately. Call `couple_channels` again after
    the last step, to set the moving means of removed channels to 0. On JAX, the optimizer step
    itself cannot set the moving means of BatchNormalization layers. `couple_channels` does not
    change frozen layers, because the other weights were trained with the values of these layers.

    The optimizer does not save which channels are pruned together, so call `couple_channels` again
    after the model is loaded.

    Args:
        model: Built Keras model.
        optimizer: `SparseOptimizer` that trains the model. The optimizer is built for the trainable
            variables of the model if it is not built yet. Defaults to None, which means all
            optimizers of the model.

    Raises:
        ValueError: If no channel can be pruned, or if the costs of the channels are not known.

    Example:
        >>> optimizer = keras_dst.SparseOptimizer("sgd", method)
        >>> keras_dst.couple_channels(model, optimizer)
    """
    check_model(model)
    if optimizer is not None and not isinstance(optimizer, SparseOptimizer):
        raise TypeError(f"Expected a keras_dst.SparseOptimizer. Received: {optimizer!r}")
    if optimizer is not None and not optimizer.built:
        with placed_like(model.trainable_variables[0]):
            optimizer.build(model.trainable_variables)
    optimizers = _built_sparse_optimizers(model) if optimizer is None else [optimizer]
    trained = {
        id(variable)
        for layer in _keras.flatten_layers(model)
        if layer.trainable
        for variable in _keras.non_trainable_variables_of(layer)
    }
    for each in optimizers:
        driver = OptimizerDriver(model, each, _couple_optimizer(model, each))
        driver.followers = [follower for follower in driver.followers if id(follower[0]) in trained]
        driver.mask_followers()


def _couple_optimizer(model, optimizer: SparseOptimizer) -> Coupling:
    """Tell an optimizer the axes of its weights, and which channels of the model are coupled."""
    known = layouts_of(model)
    pairs = list(zip(optimizer.kernels, optimizer.layouts))
    layouts = {id(kernel): known.get(id(kernel), layout) for kernel, layout in pairs}
    trained = [kernel for kernel, _ in pairs if kernel.trainable]
    found = couple(model, optimizer.method, trained, [layouts[id(k)] for k in trained])
    layouts.update(zip(map(id, trained), found.layouts))
    optimizer.set_layouts(list(layouts.values()), found.followers, model_known=True)
    return found


def _built_sparse_optimizers(model) -> list[SparseOptimizer]:
    """Return all SparseOptimizers of a model, which may have several optimizers."""
    optimizers = optimizers_of(model)
    found = [sparse for outer in optimizers for sparse in sparse_optimizers(outer)]
    compiled = getattr(model, "optimizer", None)
    if compiled is not None and compiled.built and not _keras.trained_variables_of(compiled):
        # When Keras loads an `.h5` file, it builds the optimizer for an empty list of variables.
        _keras.rebuild_optimizer(compiled, model.trainable_variables)
    # A custom train_step may use other optimizers than the optimizer passed to `compile`.
    if (
        compiled is not None
        and not compiled.built
        and (len(optimizers) == 1 or sparse_optimizers(compiled))
    ):
        with placed_like(model.trainable_variables[0]):
            compiled.build(model.trainable_variables)
    if unbuilt := [sparse.name for sparse in found if not sparse.built]:
        raise ValueError(
            "Expected every SparseOptimizer of the model to be built before training. Received "
            f"optimizers that are not built: {', '.join(unbuilt)}. Call "
            "optimizer.build(variables) with the variables that each optimizer trains, for "
            f"example in the `compile` of '{model.name}'."
        )
    for sparse in found:
        _check_kernels(model, sparse)
    return found


def _check_kernels(model, optimizer: SparseOptimizer) -> None:
    """Raise an error if `quantize` or LoRA replaced weights that an optimizer prunes."""
    present = {id(variable) for variable in model.variables}
    pairs = zip(optimizer.kernel_names, optimizer.kernels)
    if gone := [name for name, kernel in pairs if id(kernel) not in present]:
        raise ValueError(
            "Expected the weights that the SparseOptimizer prunes to be weights of "
            f"'{model.name}'. The model lacks: {', '.join(gone)}. `quantize` replaces weights: "
            "call keras_dst.strip(model) before model.quantize. If you have removed or "
            "replaced layers, compile the model and call keras_dst.sparsify again."
        )
    pruned = {id(kernel) for kernel in optimizer.kernels}
    for layer in _keras.flatten_layers(model):
        if getattr(layer, "lora_enabled", False) and any(id(v) in pruned for v in layer.weights):
            raise ValueError(
                "Expected no LoRA in a layer that the SparseOptimizer prunes. Received the "
                f"layer '{layer.name}', which has LoRA. Call keras_dst.strip(model) before "
                "enable_lora, and compile the model after it."
            )


def _optimizer_of(model, variables):
    """Return an optimizer of a model that trains at least one of the given variables.

    A model with its own `train_step` may have several optimizers, and each optimizer counts its own
    steps. If no optimizer is built yet, all step counters are 0, and the function returns an
    arbitrary optimizer of the model.
    """
    optimizers = optimizers_of(model)
    if not optimizers:
        raise ValueError(
            f"Expected '{model.name}' to have an optimizer, which counts the training steps. "
            "Received: no optimizer. Call model.compile(optimizer), or assign the optimizer to an "
            "attribute of the model, such as model.own_optimizer."
        )
    keys = {id(variable) for variable in variables}
    training = [
        each
        for each in optimizers
        if any(id(variable) in keys for variable in _keras.trained_variables_of(each))
    ]
    # Keras builds `model.optimizer` for all variables, even if a train_step does not use it.
    others = [each for each in training if each is not getattr(model, "optimizer", None)]
    return (others or training or optimizers)[0]


class PrunedWeight(NamedTuple):
    """Pruned weight, with its method and all other data that determine its mask."""

    name: str
    method: Method
    weight: Any
    state: State
    layout: Layout

    def mask(self) -> np.ndarray:
        """Return the current boolean mask."""
        weight, state = ops.convert_to_tensor(self.weight), tensors_of(self.state)
        return ops.convert_to_numpy(self.method.mask(weight, state, self.layout)).astype(bool)


def pruned_weights_of(model) -> list[PrunedWeight]:
    """Return every weight that the layers or the optimizers of a model prune."""
    optimizers = _built_sparse_optimizers(model)
    found = [
        PrunedWeight(weight.path, layer.method, weight, state, layout)
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, (SparseMixin, Gate))
        for layout, weight, state in layer.masked_weights()
    ]
    for optimizer in optimizers:
        for weight, state, layout in zip(optimizer.kernels, optimizer.states, optimizer.layouts):
            found.append(PrunedWeight(weight.path, optimizer.method, weight, state, layout))
    return found


@functools.lru_cache(maxsize=16)
def _compiled_functions(method, layouts, shapes):
    """Return two compiled functions of a method: one updates the masks, the other counts the kept
    weights. The compiled functions are cached for later fits."""

    @jit
    def update(weights, states, kept, now):
        return method.update(weights, states, layouts, kept, now)

    @jit
    def kept(weights, states):
        masks = [method.mask(*values) for values in zip(weights, states, layouts)]
        # A callback may have assigned nonzero values to pruned weights.
        if isinstance(method, UpdateMethod):
            masks = [ops.logical_or(m, w != 0) for m, w in zip(masks, weights)]
        # Stack the counts of all weights. If the host read each count separately, it would wait for
        # the device once per weight.
        counts = ops.stack([count_all_true(mask) for mask in masks])
        if not groups:
            return counts, None
        if method.learned:  # A channel is removed if all layers that compute the channel prune it.
            units = [channels.kept_units(*pair) for pair in zip(masks, layouts)]
            units = [ops.cast(unit, "float32") for unit in units]
            alive = channels.largest_of_units(units, layouts) > 0
            return counts, ops.concatenate([alive, ops.ones((1,), "bool")])
        return counts, channels.alive(masks, layouts)

    groups = channels.groups_of(layouts)
    return update, kept


class Driver:
    """Driver that updates the masks of one pruning method. A driver updates the masks and other
    states of all weights that the method prunes, at the steps of the method's schedule."""

    def __init__(self, model, method, weights, states, layouts, names):
        self.model, self.method = model, method
        self.weights, self.states = weights, states
        self.layouts, self.names = layouts, names
        self.shapes = [tuple(w.shape) for w in weights]
        self.size = sum(math.prod(shape) for shape in self.shapes)
        self.schedule = method.schedule
        self.total: int | None = None
        # Object that knows the steps of the mask updates, or None before the length of training is
        # known.
        self.clock: Any = None
        self._update, self._kept = _compiled_functions(method, tuple(layouts), tuple(self.shapes))
        # For each weight, the cost of one entry, such as its FLOPs. The target sparsity is a
        # fraction of the total cost. If `costs` is None, all entries have the same cost.
        self.costs: list[float] | None = None
        self.groups = channels.groups_of(layouts)
        self.followers: list[Follower] = []
        # True if a callback assigned nonzero values to pruned weights, and the new masks keep
        # exactly the nonzero weights.
        self.masks_assigned = False
        self.target_quantity = method.target_quantity
        if self.groups and not isinstance(method, UnitMethod):
            self.target_quantity = f"fraction of the {method.counted_in} removed"

    def read_progress(self) -> tuple[int, int]:
        """Return the last stored step and the stored length of the schedule in steps. Before
        training, the step and the length are 0."""
        raise NotImplementedError

    def write_progress(self, step: int, total: int) -> None:
        """Store the current step and the length of the schedule in steps."""
        raise NotImplementedError

    def trained_steps(self) -> int:
        """Return the number of steps that the optimizer has counted since `fit` began, or 0 for a
        method without a schedule."""
        return 0 if self.schedule is None else self.read_progress()[0] - self.start

    def store_step(self, batches: int) -> None:
        """Store the step that `fit` has reached after `batches` batches.

        The counters of the optimizer omit the steps that a `LossScaleOptimizer` has skipped.
        """
        if self.schedule is not None:
            self.write_progress(max(self.last, self.start + batches), self.total or 0)

    def assign_states(self, changes: list[State]) -> None:
        """Assign the new values of the states, such as masks, that a mask update has computed."""
        raise NotImplementedError

    def reapply_masks(self) -> None:
        """Apply the current masks to the weights again, after a callback assigned other values.

        In `OptimizerDriver`, this method masks the weights. In `LayerDriver`, this method only
        calls `mask_followers`, because sparse layers apply their masks in every forward pass.
        """

    def recover(self, batches: int, expected: float) -> None:
        """Prune the weights again, and warn, if a callback has assigned weights that are less
        sparse.

        Args:
            batches: Number of batches that the current `fit` has trained.
            expected: Sparsity that training had reached before the callback assigned the weights
                (the result of `reached()`).
        """
        assigned = self._assigned()
        self.reapply_masks()
        if self.schedule is None or assigned >= expected - self.tolerance:
            return
        self._prune(batches)
        warnings.warn(
            f"{self.method!r}: a callback assigned weights with {self.target_quantity} "
            f"{assigned:.4f} at the end of training, although training had reached "
            f"{expected:.4f}. keras_dst pruned these weights to {self.reached():.4f} without "
            "further training, which can reduce the accuracy. To restore the best weights at the "
            "target, pass metric_at_target='val_loss' (or another metric) to SparseTraining, and "
            "let EarlyStopping monitor 'val_loss_at_target'.",
            stacklevel=2,
        )

    def _assigned(self) -> float:
        """Return the sparsity of the current weights, which a callback may have assigned."""
        return self.reached()

    def _prune(self, batches: int) -> None:
        """Prune the weights to the sparsity that the schedule has after `batches` batches."""

    def measured_sparsity(self) -> float:
        """Return the current fraction of zeros among the weights that the forward pass uses."""
        flags = (ops.cast(ops.not_equal(w, 0), "float32") for w in self._effective_weights())
        nonzero = sum(float(ops.convert_to_numpy(ops.sum(f))) for f in flags)
        return 1 - nonzero / self.size

    def _effective_weights(self) -> Iterator[Any]:
        """Yield the values of all weights as the forward pass uses them, with masks applied."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------

    def begin(self, length: int | None, fit: int | None, epoch: int | None, done: int = 0) -> None:
        """Start the schedule, or continue it in a later `fit`.

        Args:
            length: Number of steps of the schedule, or None if unknown.
            fit: Number of steps that the current call of `fit` trains, or None if unknown.
            epoch: Number of steps in an epoch, or None if unknown.
            done: Number of steps of the current `fit` that were trained before an interruption.
                Defaults to 0.
        """
        self.set_active(True)
        self.projected = False
        self.clock = None
        if self.schedule is None:
            return
        step, total = self.read_progress()
        # In the first epoch on data of unknown length, a LayerDriver has not stored its step.
        self.last = max(step, done)
        self.start = self.last - done
        self.total = total or length
        self._plan(fit, epoch)
        self.write_progress(self.last, self.total or 0)
        # If training resumes at a step above 0, the masks are already up to date, because they were
        # updated before the interruption.
        if self.clock and self.last == 0 and not self.method.learned:
            self.advance(0)

    def set_length(self, length: int, fit: int, epoch: int, batches: int) -> None:
        """Set the length of an epoch, which becomes known after the first epoch.

        If the schedule begins in this `fit`, also set the length of the schedule.
        """
        if self.schedule is None:
            return
        # If `self.clock` is still None, no mask has been updated since `fit` started.
        late = self.clock is None
        if late:
            self.last = self.start
        self.total = self.total or length
        self._plan(fit, epoch)
        self.write_progress(self.start + batches, self.total)
        if late and not self.method.learned:
            self.advance(batches)

    def _plan(self, fit, epoch):
        self.fit_end = fit and self.start + fit
        if self.total and epoch:
            self.schedule = self.method.schedule_over(self.total / epoch)
        self.clock = update_clock(self.method, self.schedule, self.total, epoch)

    @property
    def in_steps(self) -> bool:
        """True if the schedule is given in steps, not in fractions of training. A schedule in steps
        does not need the length of training."""
        return self.schedule is not None and self.schedule.in_steps

    @property
    def needs_callback(self) -> bool:
        """True if only a callback can update the masks."""
        return self.schedule is not None

    def is_due(self, batches: int) -> bool:
        if self.clock is None:
            return False
        step = self.start + batches
        if step <= self.last:
            return False
        # If a method learns its masks, the masks are adapted to the exact target sparsity when the
        # schedule ends or when `fit` ends.
        ends = [end for end in (self.total, self.fit_end) if end and self.method.learned]
        return self.clock.is_due(self.last, step) or any(self.last < end <= step for end in ends)

    def advance(self, batches: int) -> None:
        """Update the masks to the sparsity that the schedule has after `batches` batches of
        `fit`."""
        step = self.last = self.start + batches
        # Methods that learn thresholds or scores receive the target sparsity of the next update, so
        # that training has time to reach the target.
        ahead = self.clock.period if self.method.learned else 0
        target = self.schedule.at(step + ahead, self.total)
        done = min(1.0, step / max(self.total or self.clock.last, 1))
        now = ScheduleState(
            ops.convert_to_tensor(step, "int32"),
            ops.convert_to_tensor(done, "float32"),
            ops.convert_to_tensor(target, "float32"),
        )
        self.assign_states(self._update(*self._values(), self._counts(target), now))
        self.mask_followers()
        final = self.schedule.sparsity
        if self.total is not None and step >= self.total and step in (self.total, self.fit_end):
            self.project()
        elif self.method.exact_from <= done < 1.0 and self.schedule.at(step, self.total) == final:
            self._assign_projection(final)

    def project(self) -> None:
        """Change the masks of a method that learns masks, so that the model meets its target
        exactly."""
        if not self.method.learned or self.schedule is None:
            return
        target, reached = self._target(), self.reached()
        # The change of the masks (the projection) costs little accuracy if it affects at most a
        # tenth of the kept weights.
        allowed = max(self.tolerance, 0.1 * (1 - target))
        if abs(reached - target) > allowed and not self.projected:
            warnings.warn(
                f"{self.method!r}: training had reached {self.target_quantity} {reached:.4f}, but "
                f"the target is {target:.3g}. After the last step, keras_dst changed the masks to "
                "meet the target, which can reduce the accuracy. Train longer, or change the "
                "weight of the penalty.",
                stacklevel=2,
            )
        self._assign_projection(self.schedule.sparsity)
        self.projected = True

    def _assign_projection(self, target: float) -> None:
        """Change the learned states, such as thresholds, so that the model meets the target
        sparsity exactly."""
        counts = self._counts(target)
        self.assign_states(self.method.project(*self._values(), self.layouts, counts))
        self.mask_followers()

    def end(self, batches: int, warn_early: bool) -> None:
        """End the fit, and warn if the target was missed."""
        self.set_active(False)
        if self.schedule is None:
            return
        step = self.start + batches
        total = self.total or 0
        self.write_progress(step, total)
        target, reached = self._target(), self.reached()
        if step < total:
            if warn_early and reached < target - self.tolerance:
                warnings.warn(
                    f"{self.method!r}: training ended after {step} of the {total} steps of its "
                    f"schedule, at {self.target_quantity} {reached:.4f}, but the target is "
                    f"{target:.3g}. Call fit again to continue.",
                    stacklevel=2,
                )
            return
        if abs(reached - target) > self.tolerance and self.method.learned:
            self.project()  # Keras has assigned averaged weights (EMA) after the last step.
            reached = self.reached()
        if self.masks_assigned and reached > target:
            return  # A callback assigned weights that are sparser than the target.
        if abs(reached - target) > self.tolerance:
            warnings.warn(self.outcome(), stacklevel=2)

    def outcome(self) -> str:
        """Return a sentence with the target sparsity and the sparsity that training has reached."""
        target, reached = self._target(), self.reached()
        return (
            f"{self.method!r} reached {self.target_quantity} {reached:.4f}, but the target is "
            f"{target:.3g}: missed by {abs(reached - target):.4f}."
        )

    def is_at_target(self, reached: float | None = None) -> bool:
        """Return whether the model has reached or exceeded its final target sparsity.

        Args:
            reached: Return value of `reached()`, if the caller has already called `reached()`.
                Defaults to None.
        """
        reached = self.reached() if reached is None else reached
        return reached >= self._target() - self.tolerance

    def _target(self) -> float:
        """Return the final target sparsity, a fraction of all weights or of their total cost."""
        final = self.schedule.sparsity
        if self.costs is not None or self.groups:
            return final
        counts = self.method.kept_counts(self.shapes, self.layouts, final, self.names)
        return 1 - float(sum(counts)) / self.size

    @property
    def tolerance(self) -> float:
        """Largest deviation from the target sparsity that causes no warning."""
        if self.groups:
            step = self.groups.rounding_step(self.method)
            return max(0.01, step) if self.method.learned else step
        if self.method.learned:
            return 0.01
        pattern = Pattern(self.method.pattern)
        groups = [math.prod(pattern.block(s, lay)) for s, lay in zip(self.shapes, self.layouts)]
        return max(0.001, max(groups) / self.size)

    def reached(self) -> float:
        """Return the current sparsity, as a fraction of all weights or of their total cost."""
        return self.measure()[1]

    def measure(self) -> tuple[float, float]:
        """Return the total number of entries that the masks keep, and the result of `reached()`.

        The count and the sparsity are computed from the same masks. If the method has no coupled
        channels, the host waits for the device only once.
        """
        found, alive = self._kept(*self._values())
        counts = ops.convert_to_numpy(found).tolist()
        if self.groups:
            kept = self.groups.counts(ops.convert_to_numpy(alive)[:-1])
            share = float(self.groups.kept_share(kept, self.method.counted_in))
            return sum(counts), 1 - share
        costs = self.costs or [1.0] * len(self.shapes)
        total = sum(c * math.prod(shape) for c, shape in zip(costs, self.shapes))
        return sum(counts), 1 - sum(c * k for c, k in zip(costs, counts)) / total

    def mask_followers(self) -> None:
        """Set the biases, scales, offsets and statistics of pruned channels to zero."""
        if not self.groups or not self.followers:
            return
        if self.method.followers_settled(*self._position()):
            _, alive = self._kept(*self._values())
            mask_followers(self.followers, alive)

    def _position(self) -> tuple[int, int]:
        """Return the current step and the number of steps of the schedule."""
        return self.last, self.total or (self.clock.last if self.clock else 0)

    def _values(self) -> tuple[list, list]:
        weights = [ops.convert_to_tensor(w) for w in self.weights]
        return weights, [tensors_of(s) for s in self.states]

    def _counts(self, target):
        counts = self.method.kept_counts(self.shapes, self.layouts, target, self.names)
        return ops.convert_to_tensor(counts, "int32")

    def set_active(self, active: bool) -> None:
        """Tell the layers or the optimizer whether a training callback updates their masks."""
        self.active: object = active_fit(self.model) if active else False


class LayerDriver(Driver):
    """Driver that updates the masks of all layers that share one method."""

    def __init__(self, model, layers: list[Any]):
        self.layers = layers
        weights = [weight for layer in layers for weight in layer.masked_weights()]
        method: LayerMethod = layers[0].method
        variables = [variable for _, variable, _ in weights]
        coupling = couple(model, method, variables, [layout for layout, _, _ in weights])
        if isinstance(method, UnitMethod):
            uses = count_uses(model) if method.needs_use_counts else {}
            method.bind_layers(layers, uses, coupling.layouts)
        super().__init__(
            model,
            method,
            variables,
            [state for _, _, state in weights],
            coupling.layouts,
            [variable.path for variable in variables],
        )
        if method.schedule is not None:
            self.followers = [*coupling.followers, *coupling.statistics]
        if isinstance(method, UnitMethod):
            costs = [method.cost_per_entry(state) for state in self.states]
            self.costs = [c for c in costs if c is not None] or None

    # The optimizer counts the steps, and its counter is part of every checkpoint. A sparse layer
    # stores its own step count and the value of the optimizer's counter at that step. When
    # `compile` resets the optimizer's counter, the layer therefore continues its own step count.

    def _iterations(self) -> int:
        optimizer = _optimizer_of(self.model, self.weights)
        while hasattr(optimizer, "inner_optimizer"):
            optimizer = optimizer.inner_optimizer
        return _int(_keras.step_counter_of(optimizer))

    def read_progress(self):
        # A layer that was frozen in an earlier `fit` has stored an earlier step, or none. The steps
        # of all layers are stacked, so that the host waits for the device only once.
        stored = ops.concatenate([ops.reshape(s["progress"], (1, -1)) for s in self.states])
        step, counter, total = max(
            ops.convert_to_numpy(stored).tolist(), key=lambda progress: (progress[2], progress[0])
        )
        return step + max(0, self._iterations() - counter) if total else 0, total

    def write_progress(self, step, total):
        # Read the step counter of the optimizer once for all weights, because each read makes the
        # host wait for the device.
        progress = np.array([step, self._iterations(), total], "int32")
        for state in self.states:
            state["progress"].assign(progress)

    def begin(self, length, fit, epoch, done=0):
        undecayed = [s[n] for s in self.states for n in self.method.undecayed if n in s]
        for optimizer in optimizers_of(self.model):
            exclude_from_decay(optimizer, undecayed)
        self._skipped = done
        super().begin(length, fit, epoch, done)

    def assign_states(self, changes):
        for state in self.states:
            # Free each new value right after its assignment, because all new values together would
            # need as much memory as the model.
            change = changes.pop(0)
            for name, value in change.items():
                state[name].assign(value)
            for name, source in self.method.snapshots.items():
                state[name].assign(separate_buffer(change[source]))

    def reapply_masks(self):
        self.mask_followers()

    def _effective_weights(self):
        for values in zip(*self._values(), self.layouts):
            yield masked(values[0], self.method.mask(*values))

    def set_active(self, active):
        super().set_active(active)
        for layer in self.layers:
            layer.driver_active = self.active
        if isinstance(self.method, TwoPathMethod) and active:
            check_rematerialization(self.model)
            takes_training = _keras.takes_training(self.model)
            fit, divergence = active_fit(self.model), self.method.path_divergence(self.states[0])
            fit.replace(
                self.model,
                "compute_loss",
                lambda inner: TwoPathLoss(
                    self.model, divergence, self._traced_on_both_paths, inner, takes_training
                ),
            )
            fit.replace(self.model, _keras.TAKES_TRAINING, lambda _: True)

    def _prune(self, batches):
        if self.total is None and not self.in_steps:
            return
        if not self.method.learned:
            self.advance(batches)
            return
        counts = self._counts(self.schedule.at(self.start + batches, self.total))
        self.assign_states(self.method.project(*self._values(), self.layouts, counts))

    def _traced_on_both_paths(self):
        for layer in self.layers:
            layer.traced_both_paths = True

    def _check_both_paths(self, batches):
        """Raise ValueError if a method that needs two paths was trained on the pruned path only."""
        trained, two_paths = batches > self._skipped, isinstance(self.method, TwoPathMethod)
        if two_paths and trained and not self.layers[0].traced_both_paths:
            raise ValueError(
                f"{self.method!r} trains two paths within compute_loss, but the train_step of "
                f"'{self.model.name}' does not call compute_loss. Call self.compute_loss(x=x, "
                "y=y, y_pred=y_pred, sample_weight=sample_weight, training=True) in train_step. If "
                "train_step cannot call compute_loss, use a method that trains a single path, such "
                "as DST."
            )

    def advance(self, batches):
        self._check_both_paths(batches)
        super().advance(batches)

    def end(self, batches, warn_early):
        super().end(batches, warn_early)
        self._check_both_paths(batches)


class OptimizerDriver(Driver):
    """Driver of a SparseOptimizer."""

    def __init__(self, model, optimizer: SparseOptimizer, coupling: Coupling):
        self.optimizer = optimizer
        super().__init__(model, optimizer.method, *optimizer.trained())
        # The optimizer itself masks the trainable biases, scales and offsets of pruned channels.
        self.followers = coupling.statistics

    def begin(self, length, fit, epoch, done=0):
        if length and not _int(self.optimizer.step):
            self.optimizer.set_training_length(length)
        super().begin(length, fit, epoch, done)

    @property
    def needs_callback(self):
        return super().needs_callback and not self.in_steps

    def _position(self):
        return self.optimizer.step, self.optimizer.total

    def read_progress(self):
        return _int(self.optimizer.step), _int(self.optimizer.total)

    def write_progress(self, step, total):
        self.optimizer.step.assign(step)
        self.optimizer.total.assign(total)

    def assign_states(self, changes):
        self.masks_assigned = False
        self.optimizer.update_masks(changes)

    def _values(self):
        return self.optimizer.weights_and_states()

    def reapply_masks(self):
        weights, states = self._values()
        masks, nonzero = [s["mask"] for s in states], [ops.not_equal(w, 0) for w in weights]
        if not any(_count(ops.logical_and(n, ops.logical_not(m))) for n, m in zip(nonzero, masks)):
            return
        kept = sum(map(_count, masks))
        if sum(map(_count, nonzero)) <= kept + self.tolerance * self.size:
            # The assigned weights contain enough zeros, but were trained with other masks. Weights
            # that RigL and SET have just grown are also zero, so the assigned weights may be
            # sparser than the masks.
            self.masks_assigned = True
            for state, mask in zip(self.states, nonzero):
                self.optimizer.assign(state["mask"], mask)
        self.optimizer.reapply_masks()

    def _assigned(self):
        return self.reached() if self.groups else self.measured_sparsity()

    def _effective_weights(self):
        yield from map(ops.convert_to_tensor, self.weights)

    def set_active(self, active):
        super().set_active(active)
        self.optimizer.driver_active = self.active


def _count(flags) -> int:
    return int(ops.sum(ops.cast(flags, "int32")))


def _int(counter) -> int:
    # With tf.distribute, a variable has one copy per replica, and `int(counter)` fails. The cast
    # returns a tensor, which `int` accepts.
    return int(ops.cast(counter, "int32"))
