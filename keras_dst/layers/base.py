"""What makes a Keras layer sparse: `SparseMixin`, and attributes that read a weight masked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import keras
from keras import ops

from keras_dst import _keras
from keras_dst._backend.devices import placed_like
from keras_dst.masks import KERNEL, Layout, masked
from keras_dst.methods.base import LayerMethod, Method, State, UnitMethod, describe

if TYPE_CHECKING:
    from keras import Layer as _Layer  # what the mixins are mixed into
else:
    _Layer = object


class SparseWeight:
    """Attribute of a sparse layer: reading gives the masked tensor, writing stores the variable.

    The raw variable is kept in the attribute's name with an underscore before it, where Keras's
    Dense, Conv, EinsumDense and Embedding have it as well.
    """

    def __init__(self, layout: Layout = KERNEL):
        self.layout = layout

    def __set_name__(self, owner, name):
        self.owner, self.name, self.slot = owner, name, f"_{name}"

    def raw(self, layer):
        """The variable under the mask, or None before the layer is built; sparse yet or not."""
        return layer.__dict__.get(self.slot, layer.__dict__.get(self.name))

    def layout_of(self, layer) -> Layout:
        """Axes of this weight in a layer."""
        return self.layout

    def __get__(self, layer, owner=None):
        if layer is None:
            return self
        value = getattr(super(self.owner, layer), self.name, self.raw(layer))
        if value is None:
            raise AttributeError(f"Build the layer before accessing `{self.name}`.")
        state = layer.__dict__.get("sparse_state", {}).get(self.name)
        if state is None:
            return value
        if self.name in layer.cached_weights:
            return layer.cached_weights[self.name]
        seen = layer.method.apply(ops.convert_to_tensor(value), state, self.layout_of(layer))
        return ops.cast(seen, layer.compute_dtype)

    def __set__(self, layer, value):
        setattr(layer, self.slot, value)


class SparseBias(SparseWeight):
    """The bias of a layer: masked by the units of its kernel, where the method prunes these whole.

    It has no state of its own, and its weights count as no weights under the method.
    """

    def __get__(self, layer, owner=None):
        if layer is None:
            return self
        bias = self.raw(layer)
        state = layer.__dict__.get("sparse_state", {}).get("kernel")
        if bias is None or state is None or not isinstance(layer.method, UnitMethod):
            return bias
        units = ops.reshape(layer.method.gate(state, type(layer).kernel.layout_of(layer)), (-1,))
        bias = ops.convert_to_tensor(bias)
        return ops.cast(bias * ops.cast(units, bias.dtype), layer.compute_dtype)


class EinsumWeight(SparseWeight):
    """The kernel of an `EinsumDense`, whose equation tells what its axes are."""

    def layout_of(self, layer):
        operands, output = layer.equation.replace(" ", "").split("->")
        inputs, kernel = operands.split(",")
        axes = range(-len(kernel), 0)
        return Layout(
            outputs=tuple(a for a in axes if kernel[a] in output and kernel[a] not in inputs),
            inputs=tuple(a for a in axes if kernel[a] not in output),
        )


class SparseMixin(_keras.BuildHook):
    """What makes a Keras layer sparse; comes before the stock class among the bases.

    Args:
        method: the method whose mask the layer's weights get, such as `methods.DST()`.
    """

    stock: type
    method: LayerMethod
    sparse_state: dict[str, State]
    cached_weights: Mapping[str, Any] = MappingProxyType(
        {}
    )  # what `SparseCellMixin` masks beforehand
    driver_active = False  # whether a SparseTraining callback is at work
    both_paths = False  # whether a training step has been traced on both paths

    def __init__(self, *args, method, **kwargs):
        super().__init__(*args, **kwargs)
        self.attach_method(check_method(method))

    def attach_method(self, method: LayerMethod) -> None:
        """Take on a method, before the weights exist or after (`sparsify`)."""
        self.method = method
        # Past Keras's tracking, which follows `add_weight` already.
        self.__dict__["sparse_state"] = {}
        for weight in self._masked_attributes():
            if weight.name in self.__dict__:  # set while the class was the stock one
                self.__dict__[weight.slot] = self.__dict__.pop(weight.name)
        if self.built:
            self._add_states()

    @classmethod
    def _masked_attributes(cls) -> list[SparseWeight]:
        found = {}
        for base in reversed(cls.__mro__):
            found.update({k: v for k, v in vars(base).items() if isinstance(v, SparseWeight)})
        return list(found.values())

    @classmethod
    def sparse_weights(cls) -> list[SparseWeight]:
        """The weights of this class that take a mask."""
        return [w for w in cls._masked_attributes() if not isinstance(w, SparseBias)]

    @classmethod
    def has_units(cls) -> bool:
        """Whether output units can be pruned whole, with their bias."""
        return any(isinstance(weight, SparseBias) for weight in cls._masked_attributes())

    def masked_weights(self) -> Iterator[tuple[Layout, Any, State]]:
        """Every weight that has a mask: its axes, its raw variable, its state."""
        for weight in self.sparse_weights():
            if weight.name in self.sparse_state:
                yield weight.layout_of(self), weight.raw(self), self.sparse_state[weight.name]

    def batch_mean(self, layout: Layout, state: State):
        """Mean over the batch of the gates of a weight; they are the same for every input."""
        return cast(UnitMethod, self.method).gate(state, layout)

    # The state comes after all stock weights, as in a layer that was built before it was made
    # sparse: optimizers are saved by the order of the weights.
    def after_build(self):
        self._add_states()

    def _add_states(self):
        for weight in self.sparse_weights():
            variable = weight.raw(self)
            if variable is None or weight.name in self.sparse_state:
                continue
            if "float" not in variable.dtype:  # quantised
                continue
            layout = weight.layout_of(self)
            if not self.method.applies_to(layout):
                continue
            # The mask is decided in the variable's own precision; the masked weight is cast.
            _keras.set_autocast(variable, False)
            with _keras.unlocked(self), placed_like(variable):
                self.sparse_state[weight.name] = self.method.build(
                    self, weight.name, variable, layout
                )
        if self.sparse_state:
            require_driver(self)

    def restore_stock(self) -> None:
        """Bake the masks into the weights as exact zeros and become the stock layer again."""
        for layout, variable, state in self.masked_weights():
            w = ops.convert_to_tensor(variable)
            mask = self.method.mask(w, state, layout)
            variable.assign(masked(w, mask))
            _keras.set_autocast(variable, True)
        for weight in self._masked_attributes():
            bias = weight.raw(self)
            if isinstance(weight, SparseBias) and bias is not None:
                bias.assign(ops.convert_to_tensor(getattr(self, weight.name)))
        for own in self.own_variables().values():
            _keras.untrack_variable(self, own)
        for variable in _keras.trainable_variables_of(self):
            if isinstance(variable.constraint, _Driven):
                variable.constraint = variable.constraint.inner
        for weight in self._masked_attributes():
            is_property = isinstance(getattr(self.stock, weight.name, None), property)
            if not is_property and weight.slot in self.__dict__:
                self.__dict__[weight.name] = self.__dict__.pop(weight.slot)
        del self.__dict__["method"], self.__dict__["sparse_state"]
        self.__class__ = self.stock

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"'{self.name}' is sparse: call keras_dst.strip(model) first, then enable_lora."
        )

    # -- saving ----------------------------------------------------------------------------------

    def get_config(self):
        method = keras.saving.serialize_keras_object(self.method)
        return {**super().get_config(), "method": method}

    # Keras saves a layer's weights by position, and some layers a fixed list of them. Ours go by
    # name beside them; what a dense layer's weights lack stays as it was.
    def save_own_variables(self, store):
        own = self.own_variables()
        with self._as_stock():
            super().save_own_variables(store)
        for name, variable in own.items():
            store[name] = variable

    def load_own_variables(self, store):
        own = self.own_variables()
        with self._as_stock():
            super().load_own_variables({k: store[k] for k in store.keys() if k not in own})
        for name, variable in own.items():
            if name in store.keys():
                variable.assign(store[name])

    def own_variables(self) -> dict[str, Any]:
        """The variables that the stock layer does not have, by name."""
        return {
            f"{name}_{key}": variable
            for name, state in self.sparse_state.items()
            for key, variable in state.items()
            if isinstance(variable, keras.Variable)
        }

    @contextlib.contextmanager
    def _as_stock(self):
        """For a while, only the stock layer's variables, and no masks over them."""
        own = {id(variable) for variable in self.own_variables().values()}
        state, self.__dict__["sparse_state"] = self.sparse_state, {}
        lists = (_keras.trainable_variables_of(self), _keras.non_trainable_variables_of(self))
        before = [list(variables) for variables in lists]
        for variables in lists:
            variables[:] = [v for v in variables if id(v) not in own]
        try:
            yield
        finally:
            self.__dict__["sparse_state"] = state
            for variables, old in zip(lists, before):
                variables[:] = old


class SparseCellMixin(SparseMixin):
    """What makes the cell of a recurrent layer sparse: masks once a sequence, not at every step.

    Keras asks a cell for its dropout before a sequence, outside of the loop, and lets it go after
    the last step; masked weights are held as long. A cell that is called by itself holds none.
    """

    calling = False

    def __call__(self, *args, **kwargs):
        self.__dict__["calling"] = True
        try:
            return super().__call__(*args, **kwargs)
        except BaseException:
            self._let_go()  # the sequence ends here
            raise
        finally:
            self.__dict__.pop("calling", None)

    def get_dropout_mask(self, step_input):
        if not self.calling:
            self._let_go()
            self.__dict__["cached_weights"] = {
                name: getattr(self, name) for name in self.sparse_state
            }
        return super().get_dropout_mask(step_input)

    def reset_dropout_mask(self):
        self._let_go()
        super().reset_dropout_mask()

    def _let_go(self) -> None:
        self.__dict__.pop("cached_weights", None)


def require_driver(layer) -> None:
    """Let an optimiser's step fail on this layer when its method's driver is not at work."""
    trained = [
        v for inner in _keras.flatten_layers(layer) for v in _keras.trainable_variables_of(inner)
    ]
    if layer.method.needs_driver and trained:
        smallest = min(trained, key=lambda v: math.prod(v.shape))
        if not isinstance(smallest.constraint, _Driven):
            smallest.constraint = _Driven(smallest.constraint, layer)


class _Driven(keras.constraints.Constraint):
    """Raises when an optimiser's step is traced while no driver is at work.

    The one place that is visited in every kind of training, and in nothing but training.
    """

    def __init__(self, inner, layer):
        self.inner, self.layer = inner, layer

    def __call__(self, value):
        if not self.layer.driver_active:
            method = self.layer.method
            raise ValueError(
                f"'{self.layer.name}' is under {method!r}, whose target the "
                f"{method.driver.split('.')[-1]} callback pursues. "
                f"Fit with callbacks=[{method.driver}()]."
            )
        return value if self.inner is None else self.inner(value)


def check_method(method) -> LayerMethod:
    """The method, deserialised where it is a config; raise unless it belongs into a layer."""
    if isinstance(method, dict):
        method = keras.saving.deserialize_keras_object(method)
    if isinstance(method, LayerMethod):
        return method
    if isinstance(method, Method):
        raise TypeError(
            f"{type(method).__name__} masks the update, not the forward pass. Compile the plain "
            f"model with keras_dst.SparseOptimizer(optimizer, {method!r}) instead."
        )
    raise TypeError(
        "Expected a method whose mask is part of the forward pass, such as "
        f"keras_dst.methods.DST(). Received: {describe(method)}"
    )
