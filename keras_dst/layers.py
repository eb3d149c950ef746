"""Keras's layers with a mask over their weights: `SparseDense` is `Dense` plus `sparsity=method`.

`sparsify` turns the layers of a built model into these, in place; they can be used by hand too.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import layers, ops

from keras_dst.masks import KERNEL, Layout
from keras_dst.methods.base import LayerMethod, Method, State
from keras_dst.methods.consensus import Consensus, binary
from keras_dst.paths import on_full_path

if TYPE_CHECKING:
    from keras import Layer as _Layer  # what the mixins are mixed into
else:
    _Layer = object


class SparseWeight:
    """Attribute of a sparse layer: reading gives the masked tensor, writing stores the variable.

    The raw variable is kept in the attribute's name with an underscore before it, where Keras's
    Dense, Conv and EinsumDense have it as well; what they make of it (LoRA) comes before the mask.
    """

    def __init__(self, layout: Layout = KERNEL):
        self.layout = layout

    def __set_name__(self, owner, name):
        self.owner, self.name, self.slot = owner, name, f"_{name}"

    def raw(self, layer):
        """The variable under the mask, or None before the layer is built."""
        return layer.__dict__.get(self.slot)

    def __get__(self, layer, owner=None):
        if layer is None:
            return self
        value = getattr(super(self.owner, layer), self.name, self.raw(layer))
        if value is None:
            raise AttributeError(f"Build the layer before accessing `{self.name}`.")
        state = layer.__dict__.get("sparse_state", {}).get(self.name)
        if state is None:
            return value
        masked = layer.sparsity.apply(ops.convert_to_tensor(value), state, self.layout)
        return ops.cast(masked, layer.compute_dtype)

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
        if bias is None or state is None or not layer.sparsity.prunes_units:
            return bias
        units = ops.reshape(layer.sparsity.gate(state, type(layer).kernel.layout), (-1,))
        bias = ops.convert_to_tensor(bias)
        return ops.cast(bias * ops.cast(units, bias.dtype), layer.compute_dtype)


class SparseMixin(_Layer):
    """What makes a Keras layer sparse; comes before the stock class among the bases.

    Args:
        sparsity: the method whose mask the layer's weights get, such as `methods.DST()`.
    """

    stock: type
    sparsity: LayerMethod
    sparse_state: dict[str, State]
    driven = False  # whether a SparseTraining callback is at work
    both_paths = False  # whether a training step has been traced on both paths

    def __init__(self, *args, sparsity, **kwargs):
        super().__init__(*args, **kwargs)
        self.adopt(check_method(sparsity))

    def adopt(self, method: LayerMethod) -> None:
        """Take on a method, before the weights exist or after (`sparsify`)."""
        self.sparsity = method
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

    def masked_weights(self) -> Iterator[tuple[SparseWeight, Any, State]]:
        """Every weight that has a mask: its attribute, its raw variable, its state."""
        for weight in self.sparse_weights():
            if weight.name in self.sparse_state:
                yield weight, weight.raw(self), self.sparse_state[weight.name]

    def batch_mean(self, weight: SparseWeight, state: State):
        """Mean over the batch of the gates of a weight; they are the same for every input."""
        return self.sparsity.gate(state, weight.layout)

    # What Keras calls once a layer is built, whatever the signature of its `build`. So the state
    # comes after all stock weights, as it does in a layer that was built before it was made
    # sparse: optimisers are saved by the order of the weights.
    def _lock_state(self):
        self._add_states()
        super()._lock_state()

    def _add_states(self):
        for weight in self.sparse_weights():
            variable = weight.raw(self)
            if variable is None or weight.name in self.sparse_state:
                continue
            if "float" not in variable.dtype:  # quantised
                continue
            # The mask is decided in the variable's own precision; the masked weight is cast.
            variable._autocast = False
            with self._unlocked():
                self.sparse_state[weight.name] = self.sparsity.build(
                    self, weight.name, variable, weight.layout
                )
        if self.sparse_state:
            _require_driver(self)

    @contextlib.contextmanager
    def _unlocked(self):
        self._tracker.unlock()
        try:
            with self._open_name_scope():
                yield
        finally:
            self._tracker.lock()

    def release(self) -> None:
        """Bake the masks into the weights as exact zeros and become the stock layer again."""
        for weight, variable, state in self.masked_weights():
            w = ops.convert_to_tensor(variable)
            mask = self.sparsity.mask(w, state, weight.layout)
            variable.assign(ops.where(mask, w, ops.zeros_like(w)))
            variable._autocast = True
        for weight in self._masked_attributes():
            bias = weight.raw(self)
            if isinstance(weight, SparseBias) and bias is not None:
                bias.assign(ops.convert_to_tensor(getattr(self, weight.name)))
        for own in self.own_variables().values():
            self._untrack_variable(own)
        for variable in self._trainable_variables:
            if isinstance(variable.constraint, _Driven):
                variable.constraint = variable.constraint.inner
        for weight in self._masked_attributes():
            is_property = isinstance(getattr(self.stock, weight.name, None), property)
            if not is_property and weight.slot in self.__dict__:
                self.__dict__[weight.name] = self.__dict__.pop(weight.slot)
        del self.__dict__["sparsity"], self.__dict__["sparse_state"]
        self.__class__ = self.stock

    # -- saving ----------------------------------------------------------------------------------

    def get_config(self):
        sparsity = keras.saving.serialize_keras_object(self.sparsity)
        return {**super().get_config(), "sparsity": sparsity}

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
        lists = (self._trainable_variables, self._non_trainable_variables)
        before = [list(variables) for variables in lists]
        for variables in lists:
            variables[:] = [v for v in variables if id(v) not in own]
        try:
            yield
        finally:
            self.__dict__["sparse_state"] = state
            for variables, old in zip(lists, before):
                variables[:] = old


def _require_driver(layer) -> None:
    """Let an optimiser's step fail on this layer when its method's driver is not at work."""
    trained = [v for inner in layer._flatten_layers() for v in inner._trainable_variables]
    if layer.sparsity.needs_driver and trained:
        smallest = min(trained, key=lambda v: math.prod(v.shape))
        if not isinstance(smallest.constraint, _Driven):
            smallest.constraint = _Driven(smallest.constraint, layer)


class _Driven(keras.constraints.Constraint):
    """Raises when an optimiser's step is traced while no SparseTraining is at work.

    The one place that is visited in every kind of training, and in nothing but training.
    """

    def __init__(self, inner, layer):
        self.inner, self.layer = inner, layer

    def __call__(self, value):
        if not self.layer.driven:
            raise ValueError(
                f"'{self.layer.name}' is under {self.layer.sparsity!r}, whose target the "
                "SparseTraining callback pursues. "
                "Fit with callbacks=[keras_dst.callbacks.SparseTraining()]."
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
        f"keras_dst.methods.DST(). Received: {method!r} of type {type(method).__name__}"
    )


# -- classes of the user's own -------------------------------------------------------------------


@keras.saving.register_keras_serializable("keras_dst")
class SparseSubclass(SparseMixin):
    """A user's subclass of a supported layer, made sparse; a file names the user's class."""

    def get_config(self):
        return {**super().get_config(), "stock_class": _name_of(self.stock)}

    @classmethod
    def from_config(cls, config):
        layer, config = _stock_instance(config, ("sparsity",))
        layer.__class__ = sparse_class(type(layer))
        layer.adopt(check_method(config["sparsity"]))
        return layer


@keras.saving.register_keras_serializable("keras_dst")
class SparseComposite(_Layer):
    """A layer or model that makes layers of its own, some of which are sparse.

    Its config rebuilds plain layers, so it carries the recipe: which of the layers inside, by
    their order, takes which method.
    """

    stock: type
    recipe: dict[str, Any]

    def get_config(self):
        own = {"stock_class": _name_of(self.stock), "recipe": self.__dict__["recipe"]}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config):
        layer, config = _stock_instance(config, ("recipe",))
        layer.__class__ = composite_class(type(layer))
        layer.__dict__["recipe"] = config["recipe"]
        return layer

    def build_from_config(self, config):
        super().build_from_config(config)
        inner = self._flatten_layers(include_self=False)
        for index, layer in enumerate(inner):
            if str(index) in self.recipe and not isinstance(layer, SparseMixin):
                make_sparse(layer, check_method(self.recipe[str(index)]))

    def remember(self) -> None:
        """Take down the methods of the sparse layers inside."""
        inner = self._flatten_layers(include_self=False)
        self.__dict__["recipe"] = {
            str(index): keras.saving.serialize_keras_object(layer.sparsity)
            for index, layer in enumerate(inner)
            if isinstance(layer, SparseMixin)
        }

    def release(self) -> None:
        """Become the stock class again."""
        del self.__dict__["recipe"]
        self.__class__ = self.stock


def sparse_class(stock: type) -> type[SparseMixin] | None:
    """The sparse class of a layer class: ours, or one made for a subclass of a supported layer."""
    for cls in SPARSE_LAYERS:
        if stock is cls.stock:
            return cls
        if issubclass(stock, cls.stock):
            return _derive((SparseSubclass, cls, stock))
    return None


def composite_class(stock: type) -> type:
    """The class that a layer of this class becomes when layers inside it are sparse."""
    return _derive((SparseComposite, stock))


@functools.cache
def _derive(bases: tuple[type, ...]) -> type:
    # One class per stock class, so that two layers of a class stay of one class. All of them are
    # saved under the name of the base, whose `from_config` finds the user's class.
    derived = type(f"Sparse{bases[-1].__name__}", bases, {"stock": bases[-1]})
    return keras.saving.register_keras_serializable("keras_dst", bases[0].__name__)(derived)


def _name_of(stock: type) -> str:
    return keras.saving.get_registered_name(stock)


def _stock_instance(config: dict, ours: tuple[str, ...]) -> tuple[Any, dict]:
    """A layer of the class that a config names, and what of the config is ours."""
    config = dict(config)
    own = {name: config.pop(name) for name in ours}
    name = config.pop("stock_class")
    stock = keras.saving.get_registered_object(name) or getattr(layers, name, None)
    if stock is None:
        raise TypeError(
            f"The file holds a sparse layer made from the class {name!r}, which is not known here. "
            "Import it, and decorate it with `@keras.saving.register_keras_serializable()`."
        )
    return stock.from_config(config), own


def make_sparse(layer, method: LayerMethod) -> None:
    """Turn a layer of a supported class, built or not, into its sparse class, in place."""
    layer.__class__ = sparse_class(type(layer))
    layer.adopt(method)


# -- the layers ----------------------------------------------------------------------------------

_register = keras.saving.register_keras_serializable("keras_dst")


@_register
class SparseDense(SparseMixin, layers.Dense):
    """`keras.layers.Dense` with a sparse kernel.

    Args:
        sparsity: the method, such as `methods.DST()`; all others as for `Dense`.

    Example:
        >>> keras_dst.layers.SparseDense(10, sparsity=keras_dst.methods.DST())
    """

    stock = layers.Dense
    kernel = SparseWeight()
    bias = SparseBias()


@_register
class SparseConv1D(SparseMixin, layers.Conv1D):
    """`keras.layers.Conv1D` with a sparse kernel: `sparsity=method`, all others as there."""

    stock = layers.Conv1D
    kernel = SparseWeight()
    bias = SparseBias()


@_register
class SparseConv2D(SparseMixin, layers.Conv2D):
    """`keras.layers.Conv2D` with a sparse kernel: `sparsity=method`, all others as there."""

    stock = layers.Conv2D
    kernel = SparseWeight()
    bias = SparseBias()


@_register
class SparseConv3D(SparseMixin, layers.Conv3D):
    """`keras.layers.Conv3D` with a sparse kernel: `sparsity=method`, all others as there."""

    stock = layers.Conv3D
    kernel = SparseWeight()
    bias = SparseBias()


@_register
class SparseDepthwiseConv2D(SparseMixin, layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with a sparse kernel; a unit is one channel's filter."""

    stock = layers.DepthwiseConv2D
    kernel = SparseWeight(Layout(outputs=(-2, -1), inputs=()))
    bias = SparseBias()


# -- gates ---------------------------------------------------------------------------------------


@_register
class Gate(layers.Layer):
    """Multiplies channels, or a whole residual branch, by gates that are open (1) or closed (0).

    The gates are trained by `methods.Consensus`, with the `SparseTraining` callback. In inference
    they are constants: the sign of the trained logits or, of a gating module, the consensus, which
    is whether the running mean of a gate is 0.5 or more. `strip` leaves a `keras.layers.Rescaling`
    by these constants.

    Args:
        axis: of the channels. Defaults to -1.
        structure: what a gate is of: `"channel"`, or `"branch"`, the whole tensor. A branch may be
            closed; of the channels one at least is open. Defaults to `"channel"`.
        dependent: whether a gating module decides for every input (global average pool, dense,
            batch norm, ReLU, dense, sigmoid), or a trainable logit for all. Defaults to False.
        units: of the gating module's first dense layer. Defaults to 16.
        momentum: of the running mean of the gating module's gates. Defaults to 0.9.
        cost: of a structure, in the unit of the method's other costs. Defaults to 1.
        sparsity: the method; gates and layers under equal methods share one budget. Defaults to
            None: `methods.Consensus()`.

    Call arguments:
        x: the tensor that is gated.
        context: what the gating module reads, channels on the same axis: the paper's reads the
            input of the layer whose output is gated. Defaults to None: `x`.

    Raises:
        ValueError: for another structure, or a cost that is not positive.
        TypeError: for another method than Consensus.

    Example:
        >>> y = keras.layers.Conv2D(8, 3, padding="same")(x)
        >>> x = x + keras_dst.layers.Gate(structure="branch", dependent=True)(y, context=x)

    Source: arXiv 2302.10798.
    """

    sparsity: Consensus
    driven = False

    def __init__(
        self,
        axis: int = -1,
        structure: str = "channel",
        dependent: bool = False,
        units: int = 16,
        momentum: float = 0.9,
        cost: float = 1.0,
        sparsity=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if structure not in ("channel", "branch"):
            raise ValueError(f"structure must be 'channel' or 'branch'. Received: {structure!r}")
        if not cost > 0:
            raise ValueError(f"cost must be a number > 0. Received: {cost!r}")
        self.axis = axis
        self.structure = structure
        self.dependent = dependent
        self.units = units
        self.momentum = momentum
        self.cost = cost
        method = check_method(Consensus() if sparsity is None else sparsity)
        if not isinstance(method, Consensus):
            raise TypeError(f"A Gate is trained by methods.Consensus. Received: {method!r}")
        self.sparsity = method
        # Past Keras's tracking, as in SparseMixin.
        self.__dict__["sparse_state"] = {}
        # Of a unit that has but one weight; a branch has no units of which one must stay open.
        self._weight = SparseWeight(Layout((-1,) if structure == "channel" else (), ()))

    def build(self, x_shape, context_shape=None):
        channels = self.structure == "channel"
        self._shape = tuple(
            n if i == self.axis % len(x_shape) else 1 for i, n in enumerate(x_shape)
        )
        self._shape = self._shape if channels else (1,) * len(x_shape)
        gates = (math.prod(self._shape),) if channels else ()
        if self.dependent:
            context_shape = context_shape or x_shape
            pooled = (None, context_shape[self.axis])
            # Gates are decided in float32, whatever the policy.
            self.hidden = layers.Dense(self.units, use_bias=False, dtype="float32", name="hidden")
            self.norm = layers.BatchNormalization(dtype="float32", name="norm")
            # Open to begin with.
            self.out = layers.Dense(
                math.prod(gates), "sigmoid", bias_initializer="ones", dtype="float32", name="out"
            )
            self.hidden.build(pooled)
            self.norm.build((None, self.units))
            self.out.build((None, self.units))
            pi = self.add_weight(
                name="mean",
                shape=gates,
                initializer="ones",
                trainable=False,
                aggregation="mean",
                autocast=False,
            )
        else:
            pi = self.add_weight(
                name="logit",
                shape=gates,
                autocast=False,
                initializer=keras.initializers.Constant(self.sparsity.start),
            )
        own = {"mean" if self.dependent else "logit": pi}
        self.sparse_state["gate"] = {**own, **self.sparsity.build_budget(self, "gate")}

    def _lock_state(self):
        if self.sparse_state:
            _require_driver(self)
        super()._lock_state()

    def call(self, x, context=None, training=False):
        state = self.sparse_state["gate"]
        if not self.dependent:
            z = self.sparsity.gate(state, self._weight.layout)
        elif training and self.trainable:
            z = self._module(x if context is None else context)
            mean = ops.reshape(ops.mean(z, axis=0), state["mean"].shape)
            # For the penalties, which are computed after this in the same trace.
            self.__dict__["_batch_mean"] = mean
            old = ops.convert_to_tensor(state["mean"])
            mean = ops.stop_gradient(mean)
            state["mean"].assign(self.momentum * old + (1 - self.momentum) * mean)
        else:
            z = ops.cast(self.is_open(), "float32")
        return x * ops.cast(ops.reshape(z, (-1, *self._shape[1:])), x.dtype)

    def _module(self, context):
        """z of the gating module, for every input."""
        context = ops.cast(context, "float32")
        places = {*range(1, len(context.shape))} - {self.axis % len(context.shape)}
        pooled = ops.mean(context, axis=tuple(places)) if places else context
        pi = self.out(ops.relu(self.norm(self.hidden(pooled), training=True)))
        return binary(pi, pi >= 0.5)

    def is_open(self):
        """Which gates are open in inference, boolean."""
        return self.sparsity.is_open(self.sparse_state["gate"], self._weight.layout)

    def masked_weights(self) -> Iterator[tuple[SparseWeight, Any, State]]:
        """As of a sparse layer; the gates count as its weights."""
        for state in self.sparse_state.values():
            yield self._weight, state["mean" if self.dependent else "logit"], state

    def batch_mean(self, weight: SparseWeight, state: State):
        """Mean over the batch of the gates, of the forward pass that this is called after."""
        if not self.dependent:
            return self.sparsity.gate(state, weight.layout)
        mean = self.__dict__.pop("_batch_mean", None)
        return ops.cast(self.is_open(), "float32") if mean is None else mean

    def release(self) -> None:
        """Become a stock layer that multiplies by the constants that the gates are in inference."""
        on = ops.convert_to_numpy(self.is_open()).astype("float32")
        scale = np.broadcast_to(on, self._shape).reshape(self._shape).tolist()
        stock = layers.Rescaling(scale, name=self.name, dtype=self.dtype_policy)
        stock.build(self._shape)
        nodes = self._inbound_nodes, self._outbound_nodes
        for node in nodes[0]:  # `Rescaling` reads no context
            node.arguments = type(node.arguments)(
                (*node.arguments.args, *node.arguments.kwargs.values())[0]
            )
        self.__dict__.clear()
        self.__class__ = layers.Rescaling
        self.__dict__.update(stock.__dict__)
        self.__dict__["_inbound_nodes"], self.__dict__["_outbound_nodes"] = nodes

    def compute_output_shape(self, x_shape, context_shape=None):
        return x_shape

    def get_config(self):
        names = ("axis", "structure", "dependent", "units", "momentum", "cost")
        own = {name: getattr(self, name) for name in names}
        sparsity = keras.saving.serialize_keras_object(self.sparsity)
        return {**super().get_config(), **own, "sparsity": sparsity}


class PathVariable:
    """Attribute of a batch normalisation: the variable of the path that runs."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, layer, owner=None):
        if layer is None:
            return self
        if on_full_path() and self.name in layer.sparse_state.get("full", {}):
            return layer.sparse_state["full"][self.name]
        if self.name not in layer.__dict__:
            raise AttributeError(f"'{layer.name}' has no {self.name}.")
        return layer.__dict__[self.name]

    def __set__(self, layer, value):
        layer.__dict__[self.name] = value


@_register
class SparseBatchNormalization(SparseMixin, layers.BatchNormalization):
    """`keras.layers.BatchNormalization` with a second set of variables for the full path.

    Nothing in it is pruned: scale, offset and moving statistics are doubled. The second set starts
    as a copy of the first, which alone is used in inference and left by `strip`.

    Args:
        sparsity: a method with two paths, such as `methods.DCIL(0.9)`; all others as there.

    Raises:
        ValueError: for a method with one path.

    Example:
        >>> keras_dst.layers.SparseBatchNormalization(sparsity=keras_dst.methods.DCIL(0.9))

    Source: arXiv 2109.04660.
    """

    stock = layers.BatchNormalization
    gamma = PathVariable()
    beta = PathVariable()
    moving_mean = PathVariable()
    moving_variance = PathVariable()
    moving_stddev = PathVariable()
    renorm_mean = PathVariable()
    renorm_stddev = PathVariable()

    def adopt(self, method):
        if not method.two_paths:
            raise ValueError(
                "A batch normalisation has a second set of variables for a method with two paths, "
                f"such as keras_dst.methods.DCIL. Received: {method!r}"
            )
        super().adopt(method)

    def _add_states(self):
        if self.sparse_state:
            return
        attributes = vars(SparseBatchNormalization).items()
        names = [name for name, value in attributes if isinstance(value, PathVariable)]
        with self._unlocked():
            self.sparse_state["full"] = {
                name: self._copy_of(self.__dict__[name], f"full_{name}")
                for name in names
                if self.__dict__.get(name) is not None  # as gamma without scale
            }

    def _copy_of(self, variable, name):
        copy = self.add_weight(
            name=name,
            shape=variable.shape,
            initializer=lambda shape, dtype=None: ops.copy(ops.convert_to_tensor(variable)),
            dtype=variable.dtype,
            trainable=any(variable is own for own in self._trainable_variables),
            autocast=False,
            regularizer=variable.regularizer,
            constraint=variable.constraint,
        )
        copy.trainable = variable.trainable  # False in a layer that is frozen
        return copy

    def load_own_variables(self, store):
        super().load_own_variables(store)
        for name, copy in self.sparse_state["full"].items():
            if f"full_{name}" not in store.keys():  # from a dense model
                copy.assign(self.__dict__[name].numpy())


SPARSE_LAYERS: tuple[type[SparseMixin], ...] = (
    SparseDense,
    SparseConv1D,
    SparseConv2D,
    SparseConv3D,
    SparseDepthwiseConv2D,
    SparseBatchNormalization,
)
