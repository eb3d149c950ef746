"""The optimiser that keeps weights sparse: any Keras optimiser inside, a method's mask around."""

from __future__ import annotations

import re
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
from keras_dst._utils.filters import Filters, is_prunable, select
from keras_dst.masks import KERNEL, Layout, masked
from keras_dst.methods.base import LayerMethod, Method, ScheduleState, State, UpdateMethod, describe


@keras.saving.register_keras_serializable("keras_dst")
class SparseOptimizer(keras.optimizers.Optimizer):
    """Wraps an optimiser so that the weights it trains are sparse, whatever the model.

    The layers stay plain Keras layers: masks and counters live here, and the pruned weights are
    exact zeros after every step. Masks are updated by the `SparseTraining` callback; where the
    method's schedule is given in steps, they are updated within the step when there is none.

    Args:
        inner_optimizer: any Keras optimiser or its name. Gradient clipping, weight decay, EMA and
            gradient accumulation are set there.
        method: a method whose mask is part of the update, such as `methods.Magnitude(0.9)`.
        filters: which weights: None for all kernels; a weight's path or a regular expression for
            whole paths, a list of them, or `callable(variable) -> bool`.

    Raises:
        TypeError: for a method of the other family, which `sparsify` takes.

    Example:
        >>> optimizer = keras_dst.SparseOptimizer("adam", keras_dst.methods.Magnitude(0.9))
        >>> model.compile(optimizer, "mse")
        >>> model.fit(x, y, callbacks=[keras_dst.callbacks.SparseTraining()])
    """

    def __init__(self, inner_optimizer, method: UpdateMethod, filters: Filters = None, name=None):
        super().__init__(learning_rate=0.0, name=name)
        if isinstance(inner_optimizer, Method):
            raise TypeError(
                "The optimiser comes first: SparseOptimizer(optimizer, method). "
                f"Received: {inner_optimizer!r} as the optimiser"
            )
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        if isinstance(inner_optimizer, (keras.optimizers.LossScaleOptimizer, SparseOptimizer)):
            raise ValueError(
                "Wrap the plain optimiser; LossScaleOptimizer goes around SparseOptimizer (compile "
                f"adds it under mixed_float16). Received: {type(inner_optimizer).__name__}"
            )
        self.inner_optimizer = inner_optimizer
        self.method = _check_method(method)
        self.filters = filters
        self.driven: object = False  # whether a SparseTraining callback is at work
        self.kernel_indices: list[int] = []
        self.kernel_names: list[str] = []
        self.states: list[State] = []
        # Axes of the kernels: from the shape alone, until SparseTraining tells from the layers.
        self.layouts: list[Layout] = []

    # -- state -----------------------------------------------------------------------------------

    def build(self, variables):
        # Model variables are kept by index alone: Keras would track them as the optimiser's own.
        variables = list(variables)
        chosen = [i for i, v in enumerate(variables) if is_prunable(v)]
        paths = [variables[i].path for i in chosen]
        selected = select([variables[i] for i in chosen], self.filters, [(path,) for path in paths])
        kernel_indices = [i for i, s in zip(chosen, selected) if s]
        if not kernel_indices:
            raise ValueError(
                "SparseOptimizer found no weight to prune among: "
                + ", ".join(v.path for v in variables)
            )
        kernels = [variables[i] for i in kernel_indices]
        check_distribution(self, kernels[0])
        states = []
        schedule = self.method.schedule
        in_steps = schedule is not None and schedule.in_steps
        steps = self.method.span(None)[1] if in_steps else None
        for kernel, extra in zip(kernels, self._wanted(kernels, steps)):
            states.append(self._add_state(kernel, {"mask": ("ones", "bool"), **extra}))
        # Steps done, and the length of the schedule as SparseTraining found it (0: not yet).
        self.step = self.add_variable((), "zeros", "int32", name="step")
        self.total = self.add_variable((), "zeros", "int32", name="total")
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)
        self.kernel_indices = kernel_indices
        self.kernel_names = [k.path for k in kernels]
        self.states = states
        self.layouts = [KERNEL if len(k.shape) > 1 else Layout(inputs=()) for k in kernels]

    def _wanted(self, kernels, steps=None):
        """What the method keeps of every weight, of types that the devices can handle."""
        return [
            {name: (initial, counter_dtype(k, dtype)) for name, (initial, dtype) in extra.items()}
            for k, extra in zip(kernels, self.method.init(kernels, steps))
        ]

    def _add_state(self, kernel, wanted) -> State:
        prefix = kernel.path.replace("/", "_")
        state = {}
        for name, (initial, dtype) in wanted.items():
            if initial == "value":
                initial = _copy_of(kernel)
            # Every replica computes the same, so that nothing need be aggregated.
            with placed_like(kernel):
                state[name] = self.add_variable(
                    kernel.shape, initial, dtype, name=f"{prefix}_{name}"
                )
        return state

    def expect(self, steps: int) -> None:
        """Before the first step: choose the types of the states for a training of this length.

        Keras builds an optimiser before anybody knows how long a training will be.
        """
        kernels, own = self.kernels, _keras.own_variables_of(self)
        for kernel, state, wanted in zip(kernels, self.states, self._wanted(kernels, steps)):
            for name, (initial, dtype) in wanted.items():
                if state[name].dtype != dtype:
                    place = next(i for i, v in enumerate(own) if v is state[name])
                    state.update(self._add_state(kernel, {name: (initial, dtype)}))
                    own[place] = own.pop()

    @property
    def kernels(self) -> list:
        """The variables that are pruned."""
        return [_keras.trained_variables_of(self)[i] for i in self.kernel_indices]

    @property
    def variables(self):
        return _keras.own_variables_of(self) + self.inner_optimizer.variables

    # -- the step --------------------------------------------------------------------------------

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(trainable_variables)
        variables = list(trainable_variables or _keras.trained_variables_of(self))
        grads, replicas = list(grads), 1
        if self.method.reads_gradients:
            grads, replicas = sum_over_replicas(grads)
        where = {id(v): i for i, v in enumerate(variables)}
        members = [
            (where[id(kernel)], kernel, state)
            for kernel, state in zip(self.kernels, self.states)
            if id(kernel) in where and grads[where[id(kernel)]] is not None
        ]
        kernels = [kernel for _, kernel, _ in members]
        states = [tensors(state) for _, _, state in members]
        before, kept_grads, carry = self.method.before(
            [ops.convert_to_tensor(k) for k in kernels],
            [ops.convert_to_tensor(grads[i]) for i, _, _ in members],
            states,
        )
        for (i, kernel, _), grad, value in zip(members, kept_grads, before):
            grads[i] = grad
            if self.method.moves_weights:
                self.assign(kernel, value)
        masks: list = [None] * len(grads)
        for (i, _, _), state in zip(members, states):
            masks[i] = state["mask"]
        grads = list(self.method.perturb(grads, masks, ops.convert_to_tensor(self.step)))
        if replicas > 1:  # whose gradients the inner optimiser adds up
            grads = [g if g is None else g / replicas for g in grads]
        self.inner_optimizer.apply(grads, variables)
        weights, changes = self.method.after(
            carry, [ops.convert_to_tensor(k) for k in kernels], states
        )
        for (_, kernel, state), value, change in zip(members, weights, changes):
            # The states first: on torch they may be views of the kernel.
            for name, new in change.items():
                self.assign(state[name], new)
            self.assign(kernel, value)
        self.step.assign(self.step + 1)
        if not self.driven:
            self._update_in_step()

    def _update_in_step(self):
        """Update the masks within the compiled step, for loops without a callback."""
        method, schedule = self.method, self.method.schedule
        if schedule is None:
            return
        first, last = method.span(None)
        every = method.frequency
        if not isinstance(every, int):
            raise ValueError(
                f"{method!r} updates its masks once an epoch, which only SparseTraining knows. "
                "Give frequency in steps, or fit with the callback."
            )
        events = {*range(first, last, every), *schedule.jumps(None), last}
        times = sorted({max(1, event) for event in events})
        shapes = [k.shape for k in self.kernels]
        targets = [schedule.at(time) for time in times]
        counts = [method.kept_counts(shapes, self.layouts, t, self.kernel_names) for t in targets]
        step = ops.convert_to_tensor(self.step)
        due = ops.equal(step, ops.convert_to_tensor(times, "int32"))
        now = ops.argmax(ops.cast(due, "int32"))
        kept = ops.take(ops.convert_to_tensor(np.stack(counts), "int32"), now, axis=0)
        now = ScheduleState(
            step,
            ops.minimum(ops.cast(step, "float32") / max(last, 1), 1.0),
            ops.take(ops.convert_to_tensor(targets, "float32"), now),
        )
        weights = [ops.convert_to_tensor(k) for k in self.kernels]
        states = [tensors(s) for s in self.states]

        def keep():
            if not method.grows:
                return [{"mask": s["mask"]} for s in states]
            return [{"mask": s["mask"], "grown": ops.zeros_like(s["mask"])} for s in states]

        # Assigned outside the branches: JAX cannot assign within them.
        changes = ops.cond(
            ops.any(due), lambda: method.update(weights, states, self.layouts, kept, now), keep
        )
        self.update_masks(changes)

    def update_masks(self, changes: list[State]) -> None:
        """Take over new states from `method.update`, and zero the weights that they prune."""
        for index, kernel, state, change in zip(
            self.kernel_indices, self.kernels, self.states, changes
        ):
            change = dict(change)
            grown = change.pop("grown", None)
            for name, new in change.items():
                self.assign(state[name], new)
            value = self.method.masked(ops.convert_to_tensor(kernel), tensors(state))
            if grown is not None:
                for slot in self._slots(index):
                    self.assign(slot, ops.where(grown, 0, ops.convert_to_tensor(slot)))
                value = ops.where(grown, 0, value)
            self.assign(kernel, value)

    def reapply_masks(self) -> None:
        """Set the pruned weights to zero again, after somebody assigned other values to weights.

        States that started as a copy of a weight, such as the dense weights of
        `Magnitude(revival=True)`, take the assigned values of the weights that are kept.
        """
        for kernel, state, wanted in zip(self.kernels, self.states, self._wanted(self.kernels)):
            value, mask = ops.convert_to_tensor(kernel), ops.convert_to_tensor(state["mask"])
            for name, (initial, _) in wanted.items():
                if initial == "value":
                    copy = ops.convert_to_tensor(state[name])
                    self.assign(state[name], ops.where(mask, ops.cast(value, copy.dtype), copy))
            self.assign(kernel, masked(value, mask))

    def _slots(self, index: int) -> list:
        """What the inner optimiser keeps for a variable: momentum and the like, of its shape."""
        variables = _keras.trained_variables_of(self)
        found = []
        for value in vars(self.inner_optimizer).values():
            if isinstance(value, dict):
                found.append(value.get(variables[index].path))
            elif isinstance(value, list) and len(value) == len(variables):
                found.append(value[index])
        return [
            slot
            for slot in found
            if isinstance(slot, keras.Variable)
            and slot is not variables[index]
            and slot.shape == variables[index].shape
        ]

    # -- the inner optimiser's part --------------------------------------------------------------

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        self.inner_optimizer.learning_rate = value

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(var_list)
        if not self.inner_optimizer.use_ema:
            return
        for kernel, state in zip(self.kernels, self.states):  # averages of the past, not yet masked
            mask = ops.convert_to_tensor(state["mask"])
            kernel.assign(masked(ops.convert_to_tensor(kernel), mask))

    def get_config(self):
        filters = self.filters
        if filters is not None and self.built:
            # What they chose: a file holds no code, and paths in it lack the name of the model.
            every = [v.path for v in _keras.trained_variables_of(self) if is_prunable(v)]
            filters = [_end_of(name, every) for name in self.kernel_names]
        elif callable(filters):
            raise ValueError(
                "filters is a callable, which is saved as the paths that it chose, and the "
                "optimiser is not built yet. Build it first, or give the paths."
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


def unwrap(optimizer) -> SparseOptimizer | None:
    """The SparseOptimizer in an optimiser, itself or inside loss scaling; None if there is none."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer if isinstance(optimizer, SparseOptimizer) else None


def _end_of(path: str, paths: list[str]) -> str:
    """A regular expression for the end of a path, from the layer on, that no other path has."""
    parts = path.split("/")
    for length in range(2, len(parts)):
        end = "/".join(parts[-length:])
        if sum(f"/{other}".endswith(f"/{end}") for other in paths) == 1:
            return f"(.*/)?{re.escape(end)}"
    return f"(.*/)?{re.escape(path)}"


def exclude_from_decay(optimizer, variables) -> None:
    """Exempt variables from weight decay in the innermost optimizer."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    _keras.exempt_from_decay(optimizer, variables)


def tensors(state: State) -> dict[str, Any]:
    """The values of a state's variables."""
    return {name: ops.convert_to_tensor(value) for name, value in state.items()}


def _copy_of(variable):
    return lambda shape, dtype=None: ops.copy(ops.cast(ops.convert_to_tensor(variable), dtype))


def _check_method(method) -> UpdateMethod:
    if isinstance(method, UpdateMethod):
        return method
    if isinstance(method, LayerMethod):
        raise TypeError(
            f"{type(method).__name__} masks the forward pass, not the update. Call "
            f"keras_dst.sparsify(model, {method!r}) and compile with the plain optimiser instead."
        )
    expected = "a method whose mask is part of the update, such as keras_dst.methods.Magnitude(0.9)"
    raise TypeError(f"Expected {expected}. Received: {describe(method)}")
