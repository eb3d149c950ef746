"""Mixin that makes a Keras layer sparse, and descriptors that return masked weights."""

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
    from keras import Layer as _Layer  # Type checkers treat the mixins as Keras layers.
else:
    _Layer = object


class SparseWeight:
    """Descriptor of a weight in a sparse layer: a read returns the masked tensor, and an assignment
    stores the variable.

    The variable is stored under the name of the attribute with a leading underscore. Keras's Dense,
    Conv, EinsumDense and Embedding layers also store their weights under a name with a leading
    underscore.
    """

    def __init__(self, layout: Layout = KERNEL):
        self.layout = layout

    def __set_name__(self, owner, name):
        self.owner, self.name, self.slot = owner, name, f"_{name}"

    def raw(self, layer):
        """Return the variable without its mask, or None before the layer is built."""
        return layer.__dict__.get(self.slot, layer.__dict__.get(self.name))

    def layout_of(self, layer) -> Layout:
        """Return the input and output axes of the weight in a given layer."""
        return self.layout

    def check(self, layer) -> None:
        """Raise ValueError if a built layer lacks a weight that the user has named."""

    def why_computed(self, layer) -> str | None:
        """Return the reason why no mask can be applied to the weight of a built layer, or None.

        If the stock class computes the weight from the variable, `strip` cannot write the masked
        weight into the variable.
        """
        variable = self.raw(layer)
        if variable is None or getattr(layer, self.name) is variable:
            return None
        return (
            f"{type(layer).__name__} computes `{self.name}` from a variable; prune the variable "
            "with a method that masks the weights in the optimizer step, such as Magnitude"
        )

    def masked(self, layer):
        """Return the masked weight, in the dtype of the variable."""
        value = getattr(super(self.owner, layer), self.name, self.raw(layer))
        if value is None:
            raise AttributeError(f"Build the layer before accessing `{self.name}`.")
        state = layer.__dict__.get("sparse_state", {}).get(self.name)
        if state is None:
            return value
        return layer.method.apply(ops.convert_to_tensor(value), state, self.layout_of(layer))

    def __get__(self, layer, owner=None):
        if layer is None:
            return self
        if self.name in layer.cached_weights:
            return layer.cached_weights[self.name]
        value = self.masked(layer)
        return value if isinstance(value, keras.Variable) else _keras.autocast(value)

    def __set__(self, layer, value):
        setattr(layer, self.slot, value)


class DeclaredWeight(SparseWeight):
    """Weight that a custom layer class names in its attribute `prunable_weights`."""

    def __set_name__(self, owner, name):
        super().__set_name__(owner, name)
        if not isinstance(getattr(owner.stock, name, None), property):
            # The custom layer may already use the name with one leading underscore.
            self.slot = f"_sparse_{name}"

    def check(self, layer):
        value = self.raw(layer)
        created = not {self.name, self.slot}.isdisjoint(vars(layer))
        if isinstance(value, keras.Variable) or (value is None and created):
            return
        found = [repr(k) for k, v in vars(layer).items() if isinstance(v, keras.Variable)]
        raise ValueError(
            f"{type(layer).__name__}.prunable_weights contains {self.name!r}, but the layer has no "
            "variable in an attribute of this name. Name some of these attributes: "
            f"{', '.join(found) or 'none'}."
        )


class SparseBias(SparseWeight):
    """Attribute that returns the bias of a sparse layer. The bias is masked if the method prunes
    whole units.

    The mask of the bias is computed from the mask of the kernel. Sparsity figures do not include
    biases.
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
        return bias * ops.cast(units, bias.dtype)


class EinsumWeight(SparseWeight):
    """Kernel of an `EinsumDense`. The layer's equation states which axes are inputs and outputs."""

    def layout_of(self, layer):
        operands, output = layer.equation.replace(" ", "").split("->")
        inputs, kernel = operands.split(",")
        axes = range(-len(kernel), 0)
        return Layout(
            outputs=tuple(a for a in axes if kernel[a] in output and kernel[a] not in inputs),
            inputs=tuple(a for a in axes if kernel[a] not in output),
        )


def register(cls):
    """Register a sparse class with Keras, and set its `__name__` to the name of its stock class.

    Keras registers the class under its original name, such as `SparseDense`. In a weights file,
    Keras names layers after `type(layer).__name__`. A sparse model can therefore load a weights
    file of the dense model.
    """
    cls = keras.saving.register_keras_serializable("keras_dst", cls.__name__)(cls)
    cls.__name__ = cls.stock.__name__
    return cls


class SparseMixin(_keras.BuildHook):
    """Mixin that makes a Keras layer sparse.

    Put the mixin before the stock class in the list of base classes.

    Args:
        method: Method that masks the weights of the layer, such as `methods.DST()`.
    """

    stock: type
    method: LayerMethod
    sparse_state: dict[str, State]
    # Masked weights that `SparseCellMixin` computes once for a whole sequence.
    cached_weights: Mapping[str, Any] = MappingProxyType({})
    driver_active = False  # True while a callback such as SparseTraining runs.
    traced_both_paths = False  # Whether a training step traced both paths of a TwoPathMethod.

    def __init__(self, *args, method, **kwargs):
        super().__init__(*args, **kwargs)
        self.attach_method(check_method(method))

    def attach_method(self, method: LayerMethod) -> None:
        """Set the method of the layer, before or after the layer is built."""
        self.method = method
        # Up to version 3.15, Keras sets an attribute `quantize` on every layer instance. The
        # attribute hides the method `quantize` of the class. Replace the attribute by
        # `_refuse_to_quantize`, which raises an error.
        self.__dict__["_stock_quantize"] = self.__dict__.get("quantize")
        self.__dict__["quantize"] = self._refuse_to_quantize
        # Keras must not track the nested dict, because `add_weight` already tracks the variables in
        # it.
        self.__dict__["sparse_state"] = {}
        for weight in self._masked_attributes():
            # In a built layer, the variable is an instance attribute with the name of the
            # `SparseWeight`. Rename this instance attribute to `weight.slot`.
            if weight.name in self.__dict__:
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
        """Return all `SparseWeight` attributes of the class, except the attributes of biases."""
        return [w for w in cls._masked_attributes() if not isinstance(w, SparseBias)]

    @classmethod
    def has_units(cls) -> bool:
        """Return whether a method can prune whole output units of the layer, including the
        biases."""
        return any(isinstance(weight, SparseBias) for weight in cls._masked_attributes())

    def masked_weights(self) -> Iterator[tuple[Layout, Any, State]]:
        """Yield the axes, the variable and the state of every weight that has a mask."""
        for weight in self.sparse_weights():
            if weight.name in self.sparse_state:
                yield weight.layout_of(self), weight.raw(self), self.sparse_state[weight.name]

    def batch_mean(self, layout: Layout, state: State):
        """Return the gates of the output units of a weight. The gates are equal for all inputs, so
        their mean over a batch is the same."""
        return cast(UnitMethod, self.method).gate(state, layout)

    # Create the mask variables after the weights of the Keras layer. The variables then have the
    # same order whether a layer becomes sparse before or after it is built. Optimizers save their
    # slots in the order of the variables.
    def after_build(self):
        # If `weights=` is passed, Keras's Embedding is already built in `__init__`, before
        # `attach_method` is called. In a layer that is already built, `attach_method` adds the mask
        # variables.
        if "sparse_state" in self.__dict__:
            self._add_states()

    def _add_states(self):
        for weight in self.sparse_weights():
            if weight.name in self.sparse_state:
                continue
            weight.check(self)
            variable = weight.raw(self)
            if variable is None:
                continue
            if "float" not in variable.dtype:  # The kernel is quantized.
                continue
            layout = weight.layout_of(self)
            if not self.method.applies_to(layout):
                continue
            if reason := weight.why_computed(self):
                raise ValueError(f"'{self.name}' cannot be sparse: {reason}.")
            # The mask is computed in the precision of the variable, and the masked weight is cast
            # afterwards.
            _keras.set_autocast(variable, False)
            with _keras.unlocked(self), placed_like(variable):
                self.sparse_state[weight.name] = self.method.build(
                    self, weight.name, variable, layout
                )
        if self.sparse_state:
            expose_variables(self)
            require_driver(self)

    def restore_stock(self) -> None:
        """Write the masked weights into the variables, and restore the stock Keras class."""
        for layout, variable, state in self.masked_weights():
            value = self.method.apply(ops.convert_to_tensor(variable), state, layout)
            variable.assign(_with_positive_zeros(value))
            _keras.set_autocast(variable, True)
        for weight in self._masked_attributes():
            bias = weight.raw(self)
            if isinstance(weight, SparseBias) and bias is not None:
                bias.assign(_with_positive_zeros(getattr(self, weight.name)))
        for name, variable in self.state_variables().items():
            _keras.remove_variable(self, name, variable)
        for variable in _trained_inside(self):
            constraint = variable.constraint
            if isinstance(constraint, _RequireDriver) and constraint.layer is self:
                variable.constraint = constraint.inner
        for weight in self._masked_attributes():
            is_property = isinstance(getattr(self.stock, weight.name, None), property)
            if not is_property and weight.slot in self.__dict__:
                self.__dict__[weight.name] = self.__dict__.pop(weight.slot)
        del self.__dict__["quantize"]
        if (quantize := self.__dict__.pop("_stock_quantize")) is not None:
            self.__dict__["quantize"] = quantize
        del self.__dict__["method"], self.__dict__["sparse_state"]
        self.__class__ = self.stock

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"'{self.name}' is sparse. Call keras_dst.strip(model) first, then enable_lora."
        )

    def _refuse_to_quantize(self, *args, **kwargs):
        # After a NotImplementedError, `Model.quantize` would skip the layer and not print the
        # message.
        raise ValueError(
            f"'{self.name}' is sparse. Call keras_dst.strip(model) first, then quantize."
        )

    # -- saving ----------------------------------------------------------------------------------

    def get_config(self):
        method = keras.saving.serialize_keras_object(self.method)
        return {**super().get_config(), "method": method}

    # Keras saves the weights of a layer by position. The variables of the method are saved by name,
    # next to the weights of the stock layer. If a file lacks the variables of the method, for
    # example because it stores a dense model, these variables keep their values. A newly created
    # mask keeps all weights.
    def save_own_variables(self, store):
        own = self.state_variables()
        with self.as_stock():
            super().save_own_variables(store)
        for name, variable in own.items():
            store[name] = variable

    def load_own_variables(self, store):
        own = self.state_variables()
        with self.as_stock():
            super().load_own_variables({k: store[k] for k in store.keys() if k not in own})
        for name, variable in own.items():
            if name in store.keys():
                variable.assign(store[name])

    def copy_stock_weights(self) -> None:
        """Copy the weights of the Keras layer to the variables of the method, if the loaded file
        stores a dense model."""

    def state_variables(self) -> dict[str, Any]:
        """Return a dict that maps names to the variables that the method created in the layer."""
        return {
            f"{name}_{key}": variable
            for name, state in self.sparse_state.items()
            for key, variable in state.items()
            if isinstance(variable, keras.Variable)
        }

    @contextlib.contextmanager
    def as_stock(self):
        """Hide the masks within this context, so that the layer has only the variables of its Keras
        class."""
        own = {id(variable) for variable in self.state_variables().values()}
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
    """Mixin for recurrent cells that masks the weights once per sequence instead of at every step.

    Keras requests the dropout mask of a cell before a sequence, and resets the dropout mask after
    the last step. The cell computes its masked weights when Keras requests the dropout mask, and
    deletes them when Keras resets the dropout mask. A cell that is called directly, without a
    sequence, does not cache masked weights.
    """

    _called_by_itself = False

    def __call__(self, *args, **kwargs):
        self.__dict__["_called_by_itself"] = True
        try:
            return super().__call__(*args, **kwargs)
        except BaseException:
            self._clear_cached_weights()  # After an error, Keras does not reset the dropout mask.
            raise
        finally:
            self.__dict__.pop("_called_by_itself", None)

    def get_dropout_mask(self, step_input):
        if not self._called_by_itself:
            self._clear_cached_weights()
            self.__dict__["cached_weights"] = {
                weight.name: ops.cast(weight.masked(self), self.compute_dtype)
                for weight in self.sparse_weights()
                if weight.name in self.sparse_state
            }
        return super().get_dropout_mask(step_input)

    def reset_dropout_mask(self):
        self._clear_cached_weights()
        super().reset_dropout_mask()

    def _clear_cached_weights(self) -> None:
        self.__dict__.pop("cached_weights", None)


def _with_positive_zeros(value):
    """Return a tensor in which every -0 is +0, because two kinds of zeros compress badly.

    The product of a negative weight and a mask of 0 is -0.
    """
    value = ops.convert_to_tensor(value)
    return masked(value, ops.not_equal(value, 0))


def expose_variables(layer) -> None:
    """Store the variables of the pruning method as attributes of the layer.

    TensorFlow's checkpoints and SavedModels store a variable only if it is an attribute of an
    object.
    """
    for name, state in layer.sparse_state.items():
        for key, variable in state.items():
            if isinstance(variable, keras.Variable):
                setattr(layer, f"{name}_{key}", variable)


def _trained_inside(layer) -> list:
    """Return the trainable variables of a layer and of its inner layers."""
    return [
        v for inner in _keras.flatten_layers(layer) for v in _keras.trainable_variables_of(inner)
    ]


def require_driver(layer) -> None:
    """Make optimizer steps raise an error if the callback of the layer's method is not running."""
    trained = _trained_inside(layer)
    if layer.method.needs_driver and trained:
        smallest = min(trained, key=lambda v: math.prod(v.shape))
        if not isinstance(smallest.constraint, _RequireDriver):
            smallest.constraint = _RequireDriver(smallest.constraint, layer)


class _RequireDriver(keras.constraints.Constraint):
    """Constraint that raises an error in an optimizer step if the method's callback is not running.

    Keras applies constraints in every optimizer step, in `fit` and in custom training loops, but
    not in inference.
    """

    def __init__(self, inner, layer):
        self.inner, self.layer = inner, layer

    def __call__(self, value):
        if not self.layer.driver_active:
            method = self.layer.method
            raise ValueError(
                f"'{self.layer.name}' has the method {method!r}, which needs the "
                f"{method.driver.split('.')[-1]} callback to reach its target. "
                f"Fit with callbacks=[{method.driver}()]."
            )
        return value if self.inner is None else self.inner(value)


def check_method(method) -> LayerMethod:
    """Return `method`, or deserialize it if it is a config.

    Raise TypeError if the result is not a method that masks the forward pass.
    """
    if isinstance(method, dict):
        method = keras.saving.deserialize_keras_object(method)
    if isinstance(method, LayerMethod):
        return method
    if isinstance(method, Method):
        raise TypeError(
            f"{type(method).__name__} masks the optimizer step instead of the forward pass, so it "
            "cannot be the method of a layer. Use the plain Keras layer, and compile the model "
            f"with keras_dst.SparseOptimizer(optimizer, {method!r})."
        )
    raise TypeError(
        "Expected a method that masks the forward pass, such as keras_dst.methods.DST(). "
        f"Received: {describe(method)}"
    )
