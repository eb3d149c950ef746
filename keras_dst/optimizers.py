"""`SparseOptimizer`: a Keras optimizer that keeps its trained weights sparse."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dst import _keras
from keras_dst._backend.devices import (
    check_distribution,
    counter_dtype,
    placed_like,
    sum_over_replicas,
)
from keras_dst._backend.guesses import with_guesses
from keras_dst._backend.jit import is_known_false, jit, mask_in_place, outside_torch_graph
from keras_dst._utils.clock import UpdateClock, update_clock
from keras_dst._utils.filters import Filters, check_filters, is_kernel, is_prunable, select
from keras_dst.masks import KERNEL, Layout, masked
from keras_dst.methods import channels
from keras_dst.methods.base import LayerMethod, Method, ScheduleState, State, UpdateMethod, describe


@keras.saving.register_keras_serializable("keras_dst")
class SparseOptimizer(keras.optimizers.Optimizer):
    """Optimizer wrapper that prunes the weights of any model.

    The layers of the model do not change. Masks and counters are variables of the
    `SparseOptimizer`. The pruned weights are exact zeros after every step. The `SparseTraining`
    callback updates the masks. Without the callback, the optimizer step updates the masks itself.
    Updates without the callback need a schedule that is given in steps.

    Attributes such as `learning_rate`, `weight_decay` and `clipnorm` are read from the inner
    optimizer and set on the inner optimizer.

    Without `SparseTraining`, weights that another callback assigns after the last step are not
    pruned again. Call `optimizer.reapply_masks()` to set the pruned weights to zero again.

    Args:
        inner_optimizer: A Keras optimizer, or the name of a Keras optimizer.
        method: Method whose mask is part of the optimizer step, such as `methods.Magnitude(0.9)`.
        filters: Weights to prune: the path of a weight, a regular expression for whole paths, or a
            list of both. `filters` can also be a function that receives a variable and returns a
            bool. Defaults to None, which prunes all kernels.
        name: Name of the optimizer. Defaults to None, which means a name that Keras generates.

    Raises:
        TypeError: If the method masks the forward pass. Pass a method that masks the forward pass
            to `sparsify`.

    Example:
        >>> optimizer = keras_dst.SparseOptimizer("adam", keras_dst.methods.Magnitude(0.9))
        >>> model.compile(optimizer, "mse")
        >>> model.fit(x, y, callbacks=[keras_dst.callbacks.SparseTraining()])
    """

    def __init__(self, inner_optimizer, method: UpdateMethod, filters: Filters = None, name=None):
        super().__init__(learning_rate=0.0, name=name)
        if isinstance(inner_optimizer, Method):
            raise TypeError(
                "Expected SparseOptimizer(optimizer, method), with the optimizer as the first "
                f"argument. Received: {inner_optimizer!r} as the optimizer"
            )
        if inner_optimizer is None:
            raise ValueError("Expected an optimizer, such as 'adam'. Received: None")
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        if isinstance(inner_optimizer, (keras.optimizers.LossScaleOptimizer, SparseOptimizer)):
            raise ValueError(
                "Expected an optimizer without loss scaling or masks. LossScaleOptimizer has to "
                "wrap SparseOptimizer. Under mixed_float16, compile adds the LossScaleOptimizer. "
                f"Received: {type(inner_optimizer).__name__}"
            )
        # Delete the default settings, the step counter and the learning rate that Keras gave to the
        # wrapper, so that `__getattr__` reads them from the inner optimizer.
        _keras.delete_counters(self)
        for attribute in list(vars(self)):
            if not attribute.startswith("_") and attribute not in ("name", "built"):
                delattr(self, attribute)
        self.method = _check_method(method)
        check_filters(filters)
        self.filters = filters
        self.driver_active: object = False  # True while SparseTraining updates the masks.
        self.kernel_indices: list[int] = []
        self.kernel_names: list[str] = []
        self.states: list[State] = []
        # At first, `layouts` contains default axes. Later, SparseTraining sets the axes that the
        # layers define.
        self.layouts: list[Layout] = []
        # One tuple per bias or normalization scale of coupled channels: the index of the variable,
        # its channel axis, and the channels along this axis.
        self._followers: list[tuple[int, int, np.ndarray]] = []
        self._scales = channels.Scales([], [])
        self.step: Any = None
        self.total: Any = None
        self._timetable: _Timetable | None = None
        self._planned: list[str] = []  # Paths of the kernels for which `_timetable` was computed.
        self._initial_update = True
        self.inner_optimizer = inner_optimizer

    # -- attributes that come from the inner optimizer -------------------------------------------

    def __getattr__(self, name):
        inner = vars(self).get("inner_optimizer")
        # TensorFlow stores tracking data in attributes that begin with `_self_`. `__getattr__` must
        # not return the tracking data of the inner optimizer.
        if inner is None or name.startswith(("__", "_self_")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inner, name)

    def __setattr__(self, name, value):
        inner = vars(self).get("inner_optimizer")
        own = name.startswith("_") or name in vars(self) or hasattr(type(self), name)
        if inner is None or own or not hasattr(inner, name):
            super().__setattr__(name, value)
        else:
            setattr(inner, name, value)

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        self.inner_optimizer.learning_rate = value

    @property
    def variables(self):
        return _keras.own_variables_of(self) + self.inner_optimizer.variables

    def set_weights(self, weights):
        weights, own = list(weights), _keras.own_variables_of(self)
        if self.built and len(weights) != len(self.variables):
            raise ValueError(
                f"Expected {len(self.variables)} arrays, one for every variable of the optimizer. "
                f"Received: {len(weights)}"
            )
        super().set_weights(weights[: len(own)])
        self.inner_optimizer.set_weights(weights[len(own) :])

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def update_step(self, gradient, variable, learning_rate):
        self.inner_optimizer.update_step(gradient, variable, learning_rate)

    def finalize_variable_values(self, var_list):
        # The inner optimizer may overwrite the weights, for example with their moving averages.
        self.inner_optimizer.finalize_variable_values(var_list)
        # Keras calls this function even after a failed training step, which leaves variables
        # without values.
        if not all(map(_keras.has_value, self.kernels)):
            return
        for kernel, state in zip(self.kernels, self.states):
            self.assign(kernel, masked(ops.convert_to_tensor(kernel), _mask_of(state)))
        self._mask_followers()

    # -- state -----------------------------------------------------------------------------------

    def build(self, variables):
        variables = list(variables)
        if self.built or not (variables or self._is_dense()):
            # When Keras loads an `.h5` file, it first builds the optimizer for an empty list of
            # variables. An optimizer without variables stays unbuilt until the first step.
            return
        # Store only the indices of model variables, because Keras would track stored variables as
        # variables of the optimizer.
        prunable = [i for i, v in enumerate(variables) if is_prunable(v)]
        paths = [_path_of(variables[i]) for i in prunable]
        filters = self.filters if prunable else None
        chosen = select([variables[i] for i in prunable], filters, [(path,) for path in paths])
        kernel_indices = [i for i, is_chosen in zip(prunable, chosen) if is_chosen]
        if not kernel_indices and not self._is_dense():
            raise ValueError(
                "SparseOptimizer found no weight to prune among: "
                f"{', '.join(map(_path_of, variables))}. Kernels of a quantized model, and of a "
                "model with LoRA, are not trained. Call keras_dst.strip(model) before you "
                "quantize it or enable LoRA, or load its file with compile=False."
            )
        kernels = [variables[i] for i in kernel_indices]
        if kernels:
            check_distribution(self, kernels[0])
        states = []
        schedule = self.method.schedule
        in_steps = schedule is not None and schedule.in_steps
        steps = self.method.span(None)[1] if in_steps else None
        for kernel, extra in zip(kernels, self._state_specs(kernels, steps)):
            states.append(self._add_state(kernel, {"mask": ("ones", "bool"), **extra}))
        # `step` is the number of finished training steps. `total` is the length of the schedule in
        # steps, or 0 until SparseTraining sets the length.
        self.step = self.add_variable((), "zeros", "int32", name="step")
        self.total = self.add_variable((), "zeros", "int32", name="total")
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        # Do not call `super().build`, because it would create moving averages and gradient
        # accumulators, which only the inner optimizer needs.
        _keras.set_trained_variables(self, variables)
        self.built: bool = True
        self.kernel_indices = kernel_indices
        self.kernel_names = [_path_of(k) for k in kernels]
        self.states = states
        self.set_layouts([KERNEL] * len(kernels))

    def set_layouts(
        self,
        layouts: list[Layout],
        followers: Sequence[tuple[Any, int, np.ndarray]] = (),
        model_known: bool = False,
    ) -> None:
        """Set the axes and the coupled channels of all kernels.

        Args:
            layouts: Axes and channels of all kernels.
            followers: Tuples `(variable, axis, index)` of the variables that are pruned together
                with channels. Examples are biases. `axis` is the channel axis of the variable.
                `index[i]` is the channel to which position i along this axis belongs. Entries of
                the variable that belong to no channel have the index -1. Defaults to no variables.
            model_known: True if `layouts` were read from the layers of a model, and False if
                `layouts` contain default axes. Defaults to False.
        """
        self.layouts = layouts
        self._model_known = model_known
        place = {id(v): i for i, v in enumerate(_keras.trained_variables_of(self))}
        self._followers = [(place[id(v)], axis, ids) for v, axis, ids in followers]
        gammas = [(place[id(v)], ids) for v, _, ids in followers if v.name == "gamma"]
        shapes = [tuple(kernel.shape) for kernel in self.kernels]
        gammas = gammas if self.method.reads_scales else []
        self._scales = channels.scales_of(shapes, layouts, gammas)
        self._initial_update = True
        self._timetable = None

    def _is_dense(self) -> bool:
        """Return whether the method never prunes any weight."""
        method = self.method
        target = method.schedule.sparsity if method.schedule else None
        return target == 0 and not isinstance(method.allocation, Mapping)

    def _state_specs(self, kernels, steps=None) -> list[dict[str, tuple[Any, str]]]:
        """Return the initial value of every state, and a dtype of the state that all devices
        support."""
        return [
            {name: (initial, counter_dtype(k, dtype)) for name, (initial, dtype) in specs.items()}
            for k, specs in zip(kernels, self.method.init(kernels, steps))
        ]

    def _add_state(self, kernel, specs) -> State:
        prefix = _path_of(kernel).replace("/", "_")
        state = {}
        for name, (initial, dtype) in specs.items():
            if initial == "value":
                initial = _copy_of(kernel)
            # Every replica of the model computes the same masks and counters, so the replicas need
            # not exchange them.
            with placed_like(kernel):
                state[name] = self.add_variable(
                    kernel.shape, initial, dtype, name=f"{prefix}_{name}"
                )
        return state

    def set_training_length(self, steps: int) -> None:
        """Before the first step, give the counters a dtype that fits the length of the training
        run.

        Keras builds an optimizer before the length of training is known.
        """
        kernels = self.kernels
        for kernel, state, specs in zip(kernels, self.states, self._state_specs(kernels, steps)):
            for name, (initial, dtype) in specs.items():
                if (old := state[name]).dtype != dtype:
                    state.update(self._add_state(kernel, {name: (initial, dtype)}))
                    *own, new = _keras.own_variables_of(self)
                    _keras.set_own_variables(self, [new if v is old else v for v in own])

    @property
    def kernels(self) -> list:
        """Variables that are pruned."""
        return [_keras.trained_variables_of(self)[i] for i in self.kernel_indices]

    def trained(self) -> tuple[list, list[State], list[Layout], list[str]]:
        """Return four lists: the kernels whose masks are updated, and their states, axes and paths.

        If a kernel was frozen after the optimizer was built, its mask does not change.
        """
        every = zip(self.kernels, self.states, self.layouts, self.kernel_names)
        found = [each for each in every if each[0].trainable]
        kernels, states, layouts, names = zip(*found) if found else ((), (), (), ())
        return list(kernels), list(states), list(layouts), list(names)

    # -- the step --------------------------------------------------------------------------------

    def apply(self, grads, trainable_variables=None):
        grads = list(grads)
        if not grads:
            return
        if not self.built and trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            with keras.name_scope(self.name, caller=self):
                self.build(trainable_variables)
        known = _keras.trained_variables_of(self)
        if trainable_variables is None and (not self.built or len(grads) != len(known)):
            self.inner_optimizer.apply(grads)  # This raises Keras's error.
        variables = list(known if trainable_variables is None else trainable_variables)
        replicas = 1
        if self.method.reads_gradients:
            grads, replicas = sum_over_replicas(grads)
        position = {id(variable): i for i, (_, variable) in enumerate(zip(grads, variables))}
        pruned = [
            (position[id(kernel)], kernel, state)
            for kernel, state in zip(self.kernels, self.states)
            if id(kernel) in position and grads[position[id(kernel)]] is not None
        ]
        kernels = [kernel for _, kernel, _ in pruned]
        states = [tensors_of(state) for _, _, state in pruned]
        before, kept_grads, carry = self.method.before(
            [ops.convert_to_tensor(k) for k in kernels],
            [ops.convert_to_tensor(grads[i], sparse=False) for i, _, _ in pruned],
            states,
        )
        masks: list = [None] * len(grads)
        for n, (i, kernel, _) in enumerate(pruned):
            grads[i], masks[i] = kept_grads[n], states[n]["mask"]
            if self.method.moves_weights:
                self.assign(kernel, before[n])
        step, total = map(ops.convert_to_tensor, (self.step, self.total))
        grads = list(self.method.perturb(grads, masks, step, total))
        if replicas > 1:  # The inner optimizer sums the gradients of all replicas.
            grads = [g if g is None else g / replicas for g in grads]
        self.inner_optimizer.apply(grads, variables)
        # Free the memory of the gradients before `after` creates masked weights.
        del grads, kept_grads
        weights, changes = self.method.after(
            carry, [ops.convert_to_tensor(k) for k in kernels], states
        )
        for (_, kernel, state), value, change in zip(pruned, weights, changes):
            # Assign the states before the kernel. On torch, the new value of a state may be a view
            # of the kernel.
            for name, new in change.items():
                self.assign(state[name], new)
            self.assign(kernel, value)
            self._mask_average(kernel, state)
        self.step.assign(ops.convert_to_tensor(self.step) + 1)
        if not self.driver_active and not self._is_dense():
            self._update_in_step()
        self._mask_followers()

    # -- mask updates ----------------------------------------------------------------------------

    def apply_initial_masks(self) -> None:
        """Prune the weights to the initial sparsity, before a custom training loop.

        When `fit` begins, the `SparseTraining` callback prunes the weights to the sparsity at step
        0. A custom training loop that does not call this function applies the first masks only
        after its first training step.

        Raises:
            ValueError: If the optimizer is not built, or if the schedule is not given in steps.

        Example:
            >>> optimizer.build(model.trainable_variables)
            >>> optimizer.apply_initial_masks()
        """
        if not self.built:
            raise ValueError(
                "Expected a built optimizer. Call optimizer.build(model.trainable_variables) first."
            )
        if self._is_dense() or int(ops.cast(self.step, "int32")):
            return
        method: Any = self.method
        kernels, _, layouts, names = self.trained()
        if not kernels:
            return
        self._known_timetable()
        self._check_channels()
        if (sparsity := method.schedule.at(0)) > 0:
            shapes = [tuple(k.shape) for k in kernels]
            kept = method.kept_counts(shapes, layouts, sparsity, names)
            kept = ops.convert_to_tensor(kept, "int32")
            now = ScheduleState(
                ops.convert_to_tensor(0, "int32"),
                ops.convert_to_tensor(0.0, "float32"),
                ops.convert_to_tensor(sparsity, "float32"),
            )
            update = jit(lambda w, s, kept, now: method.update(w, s, layouts, kept, now))
            self.update_masks(update(*self.weights_and_states(), kept, now))
        self._initial_update = False
        self._timetable = None

    def _known_timetable(self) -> _Timetable:
        """Return the step, the target sparsity and the number of kept weights of every mask update.

        `SparseTraining` does not need the timetable, so the timetable is computed at the first use.
        """
        method: Any = self.method
        schedule = method.schedule
        kernels, _, layouts, names = self.trained()
        # The names differ if layers have been frozen or unfrozen since the last step.
        if self._timetable is not None and self._planned == names:
            return self._timetable
        clock = update_clock(method, schedule) if schedule is not None else None
        if clock is None:
            if schedule is not None:
                schedule.span(None)  # Raises an error unless the schedule is given in steps.
            raise ValueError(
                f"{method!r} updates its masks once per epoch, but only SparseTraining knows the "
                "length of an epoch. Pass frequency as a number of steps, or fit with the callback."
            )
        targets = {step: schedule.at(step) for step in clock.steps()}
        if self._initial_update and targets[0] > 0 and 1 not in targets:
            # Without `apply_initial_masks`, the masks of step 0 are applied after the first
            # training step.
            targets[1] = targets[0]
        shapes = [tuple(k.shape) for k in kernels]
        steps = sorted(targets)
        kept = [method.kept_counts(shapes, layouts, targets[s], names) for s in steps]
        self._timetable = _Timetable(
            clock, np.array(steps, "int32"), np.array([targets[s] for s in steps]), np.stack(kept)
        )
        self._planned = names
        return self._timetable

    @outside_torch_graph
    def _update_in_step(self):
        """Update the masks within the optimizer step, for training loops without a callback."""
        method = self.method
        _, _, layouts, names = self.trained()
        if method.schedule is None or not names:
            return
        timetable = self._known_timetable()
        step = ops.convert_to_tensor(self.step)
        due, row = timetable.look_up(step)
        if is_known_false(due):
            return
        self._check_channels()
        kept = ops.take(ops.convert_to_tensor(timetable.kept, "int32"), row, axis=0)
        now = ScheduleState(
            step,
            ops.minimum(ops.cast(step, "float32") / max(timetable.clock.last, 1), 1.0),
            ops.take(ops.convert_to_tensor(timetable.targets, "float32"), row),
        )
        weights, states = self.weights_and_states()

        def keep():
            changes = [{"mask": s["mask"]} for s in states]
            if method.grows:
                changes = [{**c, "grown": ops.zeros_like(c["mask"])} for c in changes]
            if method.grows and channels.groups_of(self.layouts):
                changes = [{**c, "start": ops.zeros_like(c["mask"], "float32")} for c in changes]
            return changes

        # Variables are assigned outside of the branches, because JAX cannot assign variables within
        # a branch.
        update = with_guesses(lambda: method.update(weights, states, layouts, kept, now))
        changes = ops.cond(due, update, keep)
        self.update_masks(changes)

    def _check_channels(self) -> None:
        """Warn or raise an error if the method prunes channels but the optimizer does not know the
        model."""
        if self.method.pattern != "channel" or self._model_known:
            return
        fix = (
            "Call keras_dst.couple_channels(model, optimizer) before the first step, or fit with "
            "callbacks=[keras_dst.callbacks.SparseTraining()]."
        )
        if self.method.counted_in != "channels" or self.method.reads_scales:
            raise ValueError(
                f"{self.method!r} needs the model, which the optimizer does not know. {fix}"
            )
        self._model_known = True  # One warning is enough.
        warnings.warn(
            f"{self.method!r}: the optimizer does not know its model. The channels of each layer "
            "are therefore ranked separately, and `shrink` can remove only few channels. The "
            f"layers that compute the outputs of the model are pruned too. {fix}",
            stacklevel=2,
        )

    def weights_and_states(self) -> tuple[list, list]:
        """Return the current weights and states of the trained kernels, as tensors."""
        kernels, states, _, _ = self.trained()
        found = [tensors_of(s) for s in states]
        variables = _keras.trained_variables_of(self)
        scales = self._scales.read([variables[i] for i in self._scales.variables])
        by_kernel = dict(zip(map(id, self.kernels), scales))
        for kernel, state in zip(kernels, found):
            if (scale := by_kernel.get(id(kernel))) is not None:
                state["scale"] = scale
        return [ops.convert_to_tensor(k) for k in kernels], found

    def update_masks(self, changes: list[State]) -> None:
        """Assign the states that `method.update` returned, and set the pruned weights to zero."""
        averages = averages_weights(self)
        kernels, states, _, _ = self.trained()
        for kernel, state, change in zip(kernels, states, changes):
            change = dict(change)
            grown, start = change.pop("grown", None), change.pop("start", None)
            # Copy the mask, because on torch the assignments below change the mask in place.
            pruned = ops.logical_not(_mask_of(state)) if averages else None
            for name, new in change.items():
                self.assign(state[name], new)
            current = tensors_of(state)
            if grown is not None:
                not_grown = ops.logical_not(grown)
                current["mask"] = ops.logical_and(current["mask"], not_grown)
                for slot in self._slots(kernel):
                    self._mask(slot, not_grown)
            # Masking in place saves the memory of a second kernel.
            if type(self.method).masked is UpdateMethod.masked:
                self._mask(kernel, current["mask"])
            else:
                self.assign(kernel, self.method.masked(ops.convert_to_tensor(kernel), current))
            if start is not None:
                value = ops.convert_to_tensor(kernel)
                self.assign(kernel, ops.where(grown, ops.cast(start, value.dtype), value))
            # If a pruned weight is restored, its moving average starts at the current value of the
            # weight.
            if averages:
                value = ops.convert_to_tensor(kernel)
                self._mask_average(kernel, state, ops.where(pruned, value, 0))
        self._mask_followers()

    def _mask(self, variable, mask) -> None:
        """Set the entries of a variable to 0 where the mask is false."""
        if keras.backend.backend() == "torch":
            mask_in_place(variable.value, mask)
        else:
            self.assign(variable, masked(ops.convert_to_tensor(variable), mask))

    def _mask_followers(self) -> None:
        """Set the biases and scales of pruned channels to zero."""
        if not self._followers:
            return
        alive = channels.alive([_mask_of(state) for state in self.states], self.layouts)
        settled = self.method.followers_settled(
            *map(ops.convert_to_tensor, (self.step, self.total))
        )
        if settled is not True:
            alive = ops.logical_or(alive, ops.logical_not(settled))
        variables = _keras.trained_variables_of(self)
        followers = [(variables[index], axis, ids) for index, axis, ids in self._followers]
        for variable, mask in channels.masks_of_followers(followers, alive):
            for each in (variable, *self._averages_of(variable)):
                self.assign(each, masked(ops.convert_to_tensor(each), mask))

    def reapply_masks(self) -> None:
        """Set the pruned weights to zero again, after other code assigned values to the weights.

        Some methods, such as `Magnitude(revival=True)`, store a copy of the weights. This function
        also updates the kept weights in this copy.
        """
        for kernel, state, specs in zip(self.kernels, self.states, self._state_specs(self.kernels)):
            value, mask = ops.convert_to_tensor(kernel), _mask_of(state)
            for name, (initial, _) in specs.items():
                if initial == "value":
                    copy = ops.convert_to_tensor(state[name])
                    self.assign(state[name], ops.where(mask, ops.cast(value, copy.dtype), copy))
            self.assign(kernel, masked(value, mask))
        self._mask_followers()

    def _slots(self, kernel) -> list:
        """Return the slots of a kernel: inner optimizer variables with the shape of the kernel."""
        return [slot for leaf in leaf_optimizers(self) for slot in _keras.slots_of(leaf, kernel)]

    def _mask_average(self, kernel, state, added=None) -> None:
        """Mask the moving average of a kernel, because callbacks assign the average to the model.

        If the tensor `added` is given, this function adds `added` to the average before it applies
        the mask.
        """
        for average in self._averages_of(kernel):
            value = ops.convert_to_tensor(average)
            if added is not None:
                value = value + ops.cast(added, value.dtype)
            self.assign(average, masked(value, _mask_of(state)))

    def _averages_of(self, variable) -> list:
        """Return the exponential moving averages of a variable in the inner optimizers."""
        leaves = [leaf for leaf in leaf_optimizers(self) if leaf.use_ema]
        found = [_keras.moving_average_of(leaf, variable) for leaf in leaves]
        return [average for average in found if average is not None]

    # -- saving ----------------------------------------------------------------------------------

    def get_config(self):
        filters = self.filters
        if filters is not None and self.built:
            # Save the paths that the filter selected, because a file cannot hold a Python function.
            # The paths are joined to a single regular expression, because each expression in a list
            # has to match a weight. The path of a frozen weight would match no weight, because the
            # loaded optimizer does not train frozen layers.
            known = [_path_of(v) for v in _keras.trained_variables_of(self) if is_kernel(v)]
            chosen = "|".join(_suffix_pattern(name, known) for name in self.kernel_names)
            filters = [chosen] if chosen else []
        elif callable(filters):
            raise ValueError(
                "Expected a built optimizer, because the config stores the paths that the callable "
                "`filters` selects. Build the optimizer first, or pass a list of paths."
            )
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "method": keras.saving.serialize_keras_object(self.method),
            "filters": keras.saving.serialize_keras_object(filters),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        objects = {
            name: keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
            for name, value in config.items()
        }
        return cls(**objects)


class _Timetable:
    """Timetable of all mask updates, for a schedule that is given in steps.

    Attributes:
        clock: Object that computes the steps at which masks are updated.
        steps: Steps at which masks are updated, up to the end of the schedule.
        targets: Target sparsity at every step in `steps`.
        kept: Number of weights to keep at every step in `steps`.
    """

    def __init__(self, clock: UpdateClock, steps, targets, kept):
        self.clock, self.steps, self.targets, self.kept = clock, steps, targets, kept

    def look_up(self, step):
        """Return whether a mask update is due at a step, and the index of the latest mask update.

        Both returned values are tensors.
        """
        steps = ops.convert_to_tensor(self.steps)
        periodic = ops.equal(ops.mod(step - self.clock.first, self.clock.period), 0)
        due = ops.any(ops.equal(steps, step)) | ((step > self.clock.last) & periodic)
        return due, ops.maximum(ops.sum(ops.cast(steps <= step, "int32")) - 1, 0)


def sparse_optimizers(optimizer) -> list[SparseOptimizer]:
    """Return all SparseOptimizers in an optimizer, which may be a SparseOptimizer itself."""
    return [
        found for found in _keras.all_optimizers(optimizer) if isinstance(found, SparseOptimizer)
    ]


def leaf_optimizers(optimizer) -> list:
    """Return the innermost optimizers of an optimizer: those that wrap no other optimizer."""
    return [
        found for found in _keras.all_optimizers(optimizer) if not _keras.inner_optimizers(found)
    ]


def averages_weights(optimizer) -> bool:
    """Return whether an optimizer keeps moving averages that `fit` assigns to the weights at the
    end."""
    return optimizer is not None and any(leaf.use_ema for leaf in leaf_optimizers(optimizer))


def optimizers_of(model) -> list:
    """Return the optimizers in the attributes of a model, but not the optimizers that they wrap.

    A model with its own `train_step` may hold optimizers in attributes, lists and dicts.
    """
    found = list(_optimizers_in(vars(model)))
    nested = {
        id(inner) for outer in found for inner in _keras.all_optimizers(outer) if inner is not outer
    }
    return list({id(o): o for o in found if id(o) not in nested}.values())


def _optimizers_in(value) -> Iterator:
    if isinstance(value, keras.optimizers.Optimizer):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _optimizers_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _optimizers_in(item)


def without_masks(optimizer):
    """Return an optimizer in which all SparseOptimizers are replaced by their inner optimizers."""
    if isinstance(optimizer, SparseOptimizer):
        return optimizer.inner_optimizer
    if _keras.is_multi_optimizer(optimizer):
        _keras.replace_optimizers(optimizer, without_masks)
    elif inner := vars(optimizer).get("inner_optimizer"):
        optimizer.inner_optimizer = without_masks(inner)
    return optimizer


def remove_masks(model) -> None:
    """Replace all SparseOptimizers of a model by their inner optimizers.

    A model with its own `train_step` may hold optimizers in attributes, lists, tuples and dicts.
    """
    for name, value in list(vars(model).items()):
        if (stock := _without_masks_in(value)) is not value:
            setattr(model, name, stock)


def _without_masks_in(value):
    """Replace each SparseOptimizer in the value of a model attribute by its inner optimizer, and
    return the value."""
    if isinstance(value, keras.optimizers.Optimizer):
        return without_masks(value)
    if isinstance(value, (dict, list)):
        for place, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            if (stock := _without_masks_in(item)) is not item:
                value[place] = stock
    elif isinstance(value, tuple) and any(True for _ in _optimizers_in(value)):
        return getattr(value, "_make", type(value))(map(_without_masks_in, value))
    return value


def _path_of(variable) -> str:
    """Return the path of a variable, or the name of a `tf.Variable`, which has no path."""
    return getattr(variable, "path", variable.name)


def _suffix_pattern(path: str, paths: list[str]) -> str:
    """Return a regular expression that matches the end of `path`, but no other path in `paths`."""
    parts = path.split("/")
    for length in range(2, len(parts)):
        end = "/".join(parts[-length:])
        if sum(f"/{other}".endswith(f"/{end}") for other in paths) == 1:
            return f"(.*/)?{re.escape(end)}"
    return f"(.*/)?{re.escape(path)}"


def exclude_from_decay(optimizer, variables) -> None:
    """Exempt variables from weight decay in an optimizer, or in all of its inner optimizers."""
    for leaf in leaf_optimizers(optimizer):
        _keras.exempt_from_decay(leaf, variables)


def tensors_of(state: State) -> dict[str, Any]:
    """Return the current value of every variable in a state, as a dict with the same names."""
    return {name: ops.convert_to_tensor(value) for name, value in state.items()}


def _mask_of(state: State):
    return ops.convert_to_tensor(state["mask"])


def _copy_of(variable):
    return lambda shape, dtype=None: ops.copy(ops.cast(ops.convert_to_tensor(variable), dtype))


def _check_method(method) -> UpdateMethod:
    if isinstance(method, UpdateMethod):
        return method
    if isinstance(method, LayerMethod):
        raise TypeError(
            f"{type(method).__name__} masks the forward pass instead of the optimizer step. Call "
            f"keras_dst.sparsify(model, {method!r}) and compile with the plain optimizer instead."
        )
    raise TypeError(
        "Expected a method whose mask is part of the optimizer step, such as "
        f"keras_dst.methods.Magnitude(0.9). Received: {describe(method)}"
    )
