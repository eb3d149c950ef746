"""Dead channels removed for good: `shrink` makes a smaller dense model of one with zeros.

Three passes over the model's graph, nested models laid out flat. Forwards: which channels hold the
same number whatever the input, and which number. Then which channels live or die together: those
that a layer hands on, those that an addition adds. A channel can go where every kernel that reads
it can do without: its weights for it are zero, or the number is a constant, which moves into the
bias. Last, the graph is built anew from what is left.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers, ops, tree

from keras_dst.compiled import compiled
from keras_dst.surgery import check_model, graph_of, is_sparse, strip

_OPEN = 32  # what replaces the open sizes of an input, to try a layer on
_UNKNOWN = np.nan  # in place of a constant

_KERNELS = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_MERGES = ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum")
# Layers that treat every channel by itself and all of them alike.
_PLAIN = tuple(
    getattr(layers, name)
    for name in (
        *("Dropout", "GaussianNoise", "GaussianDropout", "ActivityRegularization", "Identity"),
        *("ReLU", "LeakyReLU", "ELU", "UpSampling1D", "UpSampling2D", "UpSampling3D"),
        *(f"{what}{n}D" for n in (1, 2, 3) for what in ("ZeroPadding", "Cropping")),
        *(f"{what}{n}D" for n in (1, 2, 3) for what in ("SpatialDropout", "MaxPooling")),
        *(f"{what}{n}D" for n in (1, 2, 3) for what in ("AveragePooling", "GlobalMaxPooling")),
        *(f"GlobalAveragePooling{n}D" for n in (1, 2, 3)),
    )
)
# Activations of one number; softmax and its like mix the channels.
_ELEMENTWISE = (
    *("linear", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish"),
    *("sigmoid", "hard_sigmoid", "hard_silu", "tanh", "hard_tanh", "softplus", "softsign"),
    *("exponential", "log_sigmoid"),
)


def shrink(model) -> keras.Model:
    """A smaller dense model that predicts the same, without channels and units that are dead.

    Dead is an output unit whose weights are all zero, as `strip` leaves them after
    `methods.Consensus` or any method with `pattern="channel"`, and a channel that no layer after it
    reads. They go through batch normalisation, activations, pooling, flattening, depthwise
    convolutions, concatenation and addition; the constants they leave behind move into the biases
    of the layers after them. A branch that adds nothing but constants goes as a whole. Where a
    constant meets zero padding, one channel holds what all of them gave. What is not understood
    (groups, attention, layers of your own) keeps its channels; one channel of every layer stays.

    Both models are run on random numbers before the new one is returned.

    Args:
        model: a built Sequential or Functional model, also one with such models inside. It is left
            as it was; one that is still sparse is stripped in a copy.

    Returns:
        A new Functional model, not compiled. Layers keep their names; those of nested models lie
        flat in it.

    Raises:
        TypeError: for something other than a Keras 3 model.
        ValueError: for an unbuilt model, or one whose `call` is its own.
        RuntimeError: should outputs differ by more than 1e-5 of their size (2e-2 in half
            precision).

    Warns:
        UserWarning: when nothing is dead.

    Example:
        >>> small = keras_dst.shrink(keras_dst.strip(model))
    """
    check_model(model)
    if not isinstance(model, keras.Model) or graph_of(model) is None:
        raise ValueError(
            f"shrink works on Sequential and Functional models. '{model.name}' is a "
            f"{type(model).__name__}, whose layers are called by code of its own."
        )
    source = model
    if is_sparse(model):
        source = keras.models.clone_model(model)
        source.set_weights(model.get_weights())
        strip(source)
    plan = _Plan(source)
    small = plan.build()
    if small.count_params() >= source.count_params():
        warnings.warn(f"shrink found nothing to remove in '{model.name}'.", stacklevel=2)
    _compare(source, small)
    return small


# -- the graph, laid out flat ----------------------------------------------------------------------


@dataclass(eq=False)
class _Tensor:
    """A tensor of the graph. Channels are on the last axis."""

    shape: tuple
    dtype: str
    constant: np.ndarray = field(init=False)  # by channel: the number it always is, or NaN
    ids: np.ndarray = field(init=False)  # by channel: channels of one id live or die together

    def __post_init__(self):
        self.constant = np.full(self.channels, _UNKNOWN)

    @property
    def channels(self) -> int:
        return (self.shape[-1] or 0) if len(self.shape) > 1 else 0


@dataclass(eq=False)
class _Call:
    """A call of an operation of the graph."""

    op: Any
    args: tuple
    kwargs: dict
    outputs: list[_Tensor]
    prefix: str
    dropped: list[_Tensor] = field(default_factory=list)  # summands that are constants

    @property
    def inputs(self) -> list[_Tensor]:
        found = [x for x in tree.flatten((self.args, self.kwargs)) if isinstance(x, _Tensor)]
        return [x for x in found if not any(x is d for d in self.dropped)]

    @property
    def kind(self) -> str:
        return _kind(self)


def _lay_out(model, inputs: list[_Tensor], prefix: str, calls: list[_Call]) -> list[_Tensor]:
    graph = graph_of(model)
    tensors = {id(x): y for x, y in zip(graph.inputs, inputs)}
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input or node.operation is None:
                continue
            args, kwargs = node.arguments.fill_in(tensors)
            if isinstance(node.operation, keras.Model) and graph_of(node.operation) is not None:
                given = [x for x in tree.flatten((args, kwargs)) if isinstance(x, _Tensor)]
                outputs = _lay_out(node.operation, given, f"{node.operation.name}_", calls)
            else:
                outputs = [_Tensor(tuple(x.shape), x.dtype) for x in node.outputs]
                calls.append(_Call(node.operation, args, kwargs, outputs, prefix))
            tensors.update((id(x), y) for x, y in zip(node.outputs, outputs))
    return [tensors[id(x)] for x in graph.outputs]


def _kind(call: _Call) -> str:
    """How channels go through an operation; `opaque` where that is not known."""
    op, inputs = call.op, call.inputs
    kind = type(op)
    ranks_known = all(x.channels for x in (*inputs, *call.outputs))
    if not ranks_known or not inputs or len(call.outputs) != 1:
        return "opaque"
    if getattr(op, "data_format", None) == "channels_first":
        return "opaque"
    if getattr(op, "quantization_mode", None) or getattr(op, "lora_enabled", False):
        return "opaque"
    x, y = inputs[0], call.outputs[0]
    if kind in _KERNELS:
        return "kernel" if getattr(op, "groups", 1) == 1 else "opaque"
    if kind in _DEPTHWISE:
        return "depthwise" if _is_elementwise(op.activation) else "opaque"
    if kind is layers.BatchNormalization:
        return "norm" if op.axis in (-1, len(x.shape) - 1) else "opaque"
    if kind is layers.Rescaling:
        own = np.shape(op.scale), np.shape(op.offset)
        fits = all(math.prod(shape) in (1, *shape[-1:]) for shape in own)
        return "scale" if fits else "opaque"
    if kind is layers.Activation:
        return "plain" if _is_elementwise(op.activation) else "opaque"
    if kind in _PLAIN:
        return "plain" if x.channels == y.channels else "opaque"
    if kind in (layers.Flatten, layers.Reshape):
        known = None not in x.shape[1:] and None not in y.shape[1:]
        if len(y.shape) == 2 and known:
            return "flat"
        return "reshape" if known and x.channels == y.channels else "opaque"
    if kind is layers.Concatenate:
        return "concat" if op.axis in (-1, len(y.shape) - 1) else "opaque"
    # The layer, or the operation that `x + y` is.
    if kind.__name__ in _MERGES and kind.__module__.startswith("keras."):
        numbers = [z for z in tree.flatten((call.args, call.kwargs)) if np.ndim(z)]
        alike = all(z.channels == y.channels for z in inputs) and not numbers
        return "merge" if alike else "opaque"
    return "opaque"


def _is_elementwise(activation) -> bool:
    name = getattr(activation, "__name__", "")
    return name in _ELEMENTWISE and activation is keras.activations.get(name)


# -- what can go -----------------------------------------------------------------------------------


class _Groups:
    """Sets of ids that live or die together: union and find."""

    def __init__(self):
        self.parents: list[int] = []

    def new(self, count: int) -> np.ndarray:
        first = len(self.parents)
        self.parents += range(first, first + count)
        return np.arange(first, first + count)

    def find(self, ids: Iterable[int]) -> np.ndarray:
        return np.array([self._root(i) for i in ids], int)

    def _root(self, i: int) -> int:
        while self.parents[i] != i:
            self.parents[i] = i = self.parents[self.parents[i]]
        return i

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        for i, j in zip(a, b):
            self.parents[self._root(i)] = self._root(j)


class _Kernel:
    """A Dense or Conv layer, and all the tensors that it is called on."""

    def __init__(self, layer, unit_ids: np.ndarray):
        self.layer, self.unit_ids = layer, unit_ids
        self.inputs: list[_Tensor] = []
        self.w = _array(layer.kernel)
        self.window = tuple(range(self.w.ndim - 2))
        self.reads = np.any(self.w != 0, axis=self.window)

    def known(self) -> np.ndarray:
        """By input channel: the constant that it is in every call, or NaN."""
        first, *others = [x.constant for x in self.inputs]
        for other in others:
            first = np.where(first == other, first, _UNKNOWN)
        return first


class _Plan:
    """Which channels of a model go, and the model without them."""

    def __init__(self, model):
        self.model = model
        self.graph = graph_of(model)
        self.inputs = [_Tensor(tuple(x.shape), x.dtype) for x in self.graph.inputs]
        calls: list[_Call] = []
        self.outputs = _lay_out(model, self.inputs, "", calls)
        for call in calls:
            self._propagate(call)
        self.calls = self._live(calls)
        self.groups = _Groups()
        self.kernels: dict[int, _Kernel] = {}
        self.pinned: set[int] = set()
        self._tie()
        self.removed = self._removable()

    # Forwards: constants.

    def _propagate(self, call: _Call) -> None:
        kind, inputs = call.kind, call.inputs
        if kind == "opaque":
            return
        x, y = inputs[0], call.outputs[0]
        if kind == "kernel":
            if _is_elementwise(call.op.activation):
                y.constant = _constant_units(call.op, x.constant)
        elif kind == "flat":
            y.constant = np.tile(x.constant, y.channels // x.channels)
        elif kind == "reshape":
            y.constant = x.constant
        elif kind == "concat":
            y.constant = np.concatenate([z.constant for z in inputs])
        else:
            y.constant = _tried(call)
        if type(call.op).__name__ == "Add" and kind == "merge":
            self._drop(call)

    @staticmethod
    def _drop(call: _Call) -> None:
        """Take summands that are constants out of an addition."""
        for x in call.inputs:
            others = [z for z in call.inputs if z is not x]
            whole = any(z.shape == call.outputs[0].shape for z in others)
            if whole and not np.isnan(x.constant).any():
                call.dropped.append(x)

    def _live(self, calls: list[_Call]) -> list[_Call]:
        wanted = {id(x) for x in self.outputs}
        live = []
        for call in reversed(calls):
            if any(id(y) in wanted for y in call.outputs):
                live.append(call)
                wanted |= {id(x) for x in call.inputs}
        return live[::-1]

    # Which channels belong together.

    def _tie(self) -> None:
        groups = self.groups
        for x in self.inputs:
            x.ids = groups.new(x.channels)
            self._pin(x)
        seen: dict[int, _Tensor] = {}
        for call in self.calls:
            kind, inputs, y = call.kind, call.inputs, call.outputs[0]
            if kind == "opaque":
                for x in inputs:
                    self._pin(x)
                for y in call.outputs:
                    y.ids = groups.new(y.channels)
                    self._pin(y)
                continue
            x = inputs[0]
            if kind in ("kernel", "norm", "scale", "depthwise"):  # its weights have one shape
                groups.tie(x.ids, seen.setdefault(id(call.op), x).ids)
            if kind == "kernel":
                kernel = self.kernels.get(id(call.op))
                if kernel is None:
                    kernel = _Kernel(call.op, groups.new(y.channels))
                    self.kernels[id(call.op)] = kernel
                kernel.inputs.append(x)
                y.ids = kernel.unit_ids
                if not _is_elementwise(call.op.activation):
                    self._pin(y)
            elif kind == "flat":
                y.ids = np.tile(x.ids, y.channels // x.channels)
            elif kind == "depthwise":
                y.ids = np.repeat(x.ids, call.op.depth_multiplier)
            elif kind == "concat":
                y.ids = np.concatenate([z.ids for z in inputs])
            else:
                for z in inputs[1:]:
                    groups.tie(z.ids, x.ids)
                y.ids = x.ids
        for y in self.outputs:
            self._pin(y)

    def _pin(self, x: _Tensor) -> None:
        self.pinned.update(map(int, x.ids))

    # What can go.

    def _removable(self) -> set[int]:
        """Ids, as `groups.find` gives them, of the channels that go."""
        find = self.groups.find
        everything = set(map(int, find(range(len(self.groups.parents)))))
        pinned = set(map(int, find(sorted(self.pinned))))
        removed: set[int] = set()
        while True:  # a unit that goes reads nothing: more can go
            blocked = set(pinned)
            for kernel in self.kernels.values():
                units = _kept(find(kernel.unit_ids), removed)
                needed = kernel.reads[:, units].any(1) & np.isnan(kernel.known())
                blocked |= set(map(int, find(kernel.inputs[0].ids[needed])))
            if everything - blocked == removed:
                break
            removed = everything - blocked
        for kernel in self.kernels.values():
            holder = self._holder(kernel, removed)
            if holder is not None:
                removed.discard(int(find(kernel.inputs[0].ids)[holder]))
        for tensor in (y for call in self.calls for y in call.outputs):
            roots = find(tensor.ids)
            if len(roots) and not _kept(roots, removed).any():
                removed.discard(int(roots[0]))
        return removed

    def _holder(self, kernel: _Kernel, removed: set[int]) -> int | None:
        """The channel that holds all the constants where they cannot go into the bias."""
        kept, constant = self._lost(kernel, removed)
        if not _pads(kernel.layer) or not constant.any():
            return None
        known = np.nan_to_num(kernel.known())
        best = np.abs(known) * (kept if np.any(known[kept]) else ~kept)
        return int(best.argmax())

    def _lost(self, kernel: _Kernel, removed: set[int]) -> tuple[np.ndarray, np.ndarray]:
        """Which input channels of a kernel stay, and the constants that are lost with the rest."""
        kept = _kept(self.groups.find(kernel.inputs[0].ids), removed)
        units = _kept(self.groups.find(kernel.unit_ids), removed)
        lost = ~kept & kernel.reads[:, units].any(1)
        return kept, np.where(lost, np.nan_to_num(kernel.known()), 0.0)

    def keeps(self, x: _Tensor) -> np.ndarray:
        return _kept(self.groups.find(x.ids), self.removed)

    # The new model.

    def build(self) -> keras.Model:
        old = self.graph.inputs
        named = [x._keras_history.operation.name for x in old]
        new = [
            keras.Input(batch_shape=x.shape, dtype=x.dtype, name=name)
            for x, name in zip(old, named)
        ]
        tensors = {id(x): y for x, y in zip(self.inputs, new)}
        made: dict[int, Any] = {}
        names = set(named)
        fills = []
        for call in self.calls:
            op = call.op
            inputs = [tensors[id(x)] for x in call.inputs]
            if call.dropped and len(inputs) == 1:
                result = inputs[0]
            else:
                if id(op) not in made:
                    name = op.name if op.name not in names else call.prefix + op.name
                    names.add(name)
                    made[id(op)], fill = self._remade(call, name)
                    fills.append((made[id(op)], fill))
                result = self._called(made[id(op)], call, tensors)
            if call.dropped:
                offset = np.sum([x.constant for x in call.dropped], axis=0)
                offset = offset[self.keeps(call.outputs[0])]
                if offset.any():
                    name, dtype = f"{op.name}_constant", call.outputs[0].dtype
                    shift = layers.Rescaling(1.0, offset.tolist(), name=name, dtype=dtype)
                    result = shift(result)
            results = tree.flatten(result)
            tensors.update((id(x), y) for x, y in zip(call.outputs, results))
        small = keras.Model(
            tree.pack_sequence_as(self.graph._inputs_struct, new),
            tree.pack_sequence_as(
                self.graph._outputs_struct, [tensors[id(y)] for y in self.outputs]
            ),
            name=self.model.name,
        )
        for layer, values in fills:
            if values:
                layer.set_weights(values)
        return small

    @staticmethod
    def _called(op, call: _Call, tensors):
        if call.dropped:
            inputs = [tensors[id(x)] for x in call.inputs]
            return op(inputs) if isinstance(op, keras.Layer) else layers.Add()(inputs)
        args, kwargs = tree.map_structure(
            lambda x: tensors[id(x)] if isinstance(x, _Tensor) else x, (call.args, call.kwargs)
        )
        return op(*args, **kwargs)

    def _remade(self, call: _Call, name: str) -> tuple[Any, list[np.ndarray]]:
        """The operation for the channels that stay, and its weights."""
        op, kind = call.op, call.kind
        if not isinstance(op, keras.Layer):  # as `x + y` is
            return op, []
        config = {**op.get_config(), "name": name}
        weights = op.get_weights()
        if kind == "kernel":
            weights = self._sliced_kernel(op, config)
        elif kind != "opaque":
            keep = self.keeps(call.inputs[0])
            if kind == "norm":
                weights = [w[keep] for w in weights]
            elif kind == "depthwise":
                kernel, *bias = weights
                units = np.repeat(keep, op.depth_multiplier)
                weights = [kernel[..., keep, :], *(b[units] for b in bias)]
            elif kind == "scale":
                for key in ("scale", "offset"):
                    value = np.asarray(getattr(op, key))
                    if value.ndim and value.shape[-1] == len(keep):
                        config[key] = value[..., keep].tolist()
            elif kind == "reshape" and "target_shape" in config:
                config["target_shape"] = (*call.outputs[0].shape[1:-1], int(keep.sum()))
            elif kind == "flat" and "target_shape" in config:
                config["target_shape"] = (-1,)
        return type(op).from_config(config), weights

    def _sliced_kernel(self, op, config) -> list[np.ndarray]:
        kernel = self.kernels[id(op)]
        kept, lost = self._lost(kernel, self.removed)
        units = _kept(self.groups.find(kernel.unit_ids), self.removed)
        config["units" if isinstance(op, layers.Dense) else "filters"] = int(units.sum())
        w = kernel.w.copy()
        given = np.einsum("i,...io->...o", lost, w)
        bias = _array(op.bias) if op.use_bias else np.zeros(len(units))
        holder = self._holder(kernel, self.removed)
        if holder is not None:
            w[..., holder, :] += given / kernel.known()[holder]
        else:
            bias = bias + given.sum(kernel.window)
        w = w[..., kept, :][..., units]
        if op.use_bias or bias.any():
            config["use_bias"] = True
            return [w, bias[units]]
        return [w]


def _kept(roots: np.ndarray, removed: set[int]) -> np.ndarray:
    return np.array([int(root) not in removed for root in roots], bool)


def _array(x) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")), "float64")


def _pads(layer) -> bool:
    """Whether a layer sees zeros around its input, where a constant channel ends."""
    window = getattr(layer, "kernel_size", (1,))
    return getattr(layer, "padding", "valid") != "valid" and math.prod(window) > 1


def _constant_units(layer, constant: np.ndarray) -> np.ndarray:
    """The number that every unit of a Dense or Conv layer always gives, or NaN."""
    w = _array(layer.kernel)
    window = tuple(range(w.ndim - 2))
    usable = (constant == 0) if _pads(layer) else ~np.isnan(constant)
    varies = (np.any(w != 0, axis=window) & ~usable[:, None]).any(0)
    value = np.nan_to_num(constant) @ w.sum(window)
    if layer.use_bias:
        value = value + _array(layer.bias)
    return np.where(
        varies, _UNKNOWN, _array(layer.activation(ops.convert_to_tensor(value, "float32")))
    )


def _tried(call: _Call) -> np.ndarray:
    """The constants that an operation gives, from running it on constants."""
    op, y = call.op, call.outputs[0]
    factor = y.channels // call.inputs[0].channels
    varies = np.any([np.repeat(np.isnan(x.constant), factor) for x in call.inputs], axis=0)
    varies = varies & ~_stops(call)
    if varies.all():
        return np.full(len(varies), _UNKNOWN)

    def sample(x):
        if not isinstance(x, _Tensor):
            return x
        shape = (1, *(_OPEN if n is None else n for n in x.shape[1:]))
        value = np.broadcast_to(np.nan_to_num(x.constant), shape)
        return ops.convert_to_tensor(value, x.dtype)

    args, kwargs = tree.map_structure(sample, (call.args, call.kwargs))
    found = _array(op(*args, **kwargs)).reshape(-1, len(varies))
    same = np.isclose(found, found[0], rtol=1e-6, atol=0).all(0)
    return np.where(varies | ~same, _UNKNOWN, found[0])


def _stops(call: _Call) -> np.ndarray:
    """Whether a channel comes out the same whatever goes in."""
    op, channels = call.op, call.outputs[0].channels
    if call.kind == "norm" and op.scale:
        return _array(op.gamma) == 0
    if call.kind == "scale":
        return np.broadcast_to(np.ravel(op.scale) == 0, channels)
    if call.kind == "depthwise":
        w = _array(op.kernel)
        return np.all(w == 0, axis=tuple(range(w.ndim - 2))).ravel()
    if type(op).__name__ == "Multiply":
        return np.any([x.constant == 0 for x in call.inputs], axis=0)
    return np.zeros(channels, bool)


def _compare(model, small) -> None:
    """Raise unless both predict the same for random inputs."""
    rng = np.random.default_rng(0)

    def draw(x):
        shape = [2, *(_OPEN if n is None else n for n in x.shape[1:])]
        shape = [n if i or x.shape[0] is None else x.shape[0] for i, n in enumerate(shape)]
        integer = "int" in x.dtype or x.dtype == "bool"
        drawn = rng.integers(0, 2, shape) if integer else rng.standard_normal(shape)
        return ops.convert_to_tensor(drawn, x.dtype)

    inputs = tree.map_structure(draw, graph_of(model)._inputs_struct)
    half = any("16" in str(layer.compute_dtype) for layer in model._flatten_layers())
    # Compiled as a whole: op by op, JAX would compile each of them.
    outputs = [compiled(lambda x, m=m: m(x, training=False))(inputs) for m in (model, small)]
    for a, b in zip(*map(tree.flatten, outputs)):
        a, b = _array(a), _array(b)
        difference, size = np.abs(a - b).max(initial=0), max(1.0, np.abs(a).max(initial=0))
        if not difference <= (2e-2 if half else 1e-5) * size:
            raise RuntimeError(
                f"shrink would have changed the outputs of '{model.name}' by {difference:.2g}, "
                f"which are of size {size:.2g}. No model is returned; please report this."
            )
