"""Count how often each weight is multiplied for one sample, to compute the FLOPs of a model."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import textwrap
import warnings
from dataclasses import dataclass
from typing import Any

import keras
from keras import layers

from keras_dst import _keras
from keras_dst._reporting.weights import Weight, weights_of

Shape = tuple[int, ...]

_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)

# Endings of the names of weights that custom layers look up or add, but do not multiply.
_TABLES = re.compile(r"(embeddings?|tokens?)$")

# Batch size of the symbolic call if the Input does not define the batch size. The batch size is
# greater than 1, because a model may squeeze axes of size 1.
_BATCH = 2
# If an input has axes of unknown size, the FLOPs are counted once with size 128 and once with size
# 256. If the two counts differ, the FLOPs depend on the unknown size, and the report contains no
# FLOPs. A model with a short position embedding rejects the sizes 128 and 256, so smaller pairs of
# sizes are tried next.
_SIZES = ((128, 256), (32, 64), (8, 16), (2, 4))


def count_uses(model) -> dict[int, tuple[int | None, str | None]]:
    """Return a dict that maps the id of each prunable variable to its use count.

    A use count is the number of times that each entry of a weight is multiplied for one sample.
    Each value of the dict is a pair `(count, reason)`. If the use count is unknown, `count` is None
    and `reason` explains why. Otherwise `reason` is None.
    """
    weights = [weight for weight in weights_of(model) if weight.prunable]
    return {
        id(w.variable): found for w, found in zip(weights, count_uses_per_weight(model, weights))
    }


def dense_size(model) -> tuple[int, int | None]:
    """Return the number of parameters of a model, and its FLOPs per sample if no entry were zero.

    The FLOPs are None if they are unknown.
    """
    weights = weights_of(model)
    prunable = [weight for weight in weights if weight.prunable]
    pairs = zip(prunable, count_uses_per_weight(model, prunable))
    flops = [None if count is None else 2 * w.parameters * count for w, (count, _) in pairs]
    return sum(weight.parameters for weight in weights), sum_known(flops)


def sum_known(counts: list[int | None]) -> int | None:
    """Return the sum of the numbers in `counts`, or None if one of them is None."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


class _UnknownCount(Exception):
    """Error that states why the use count of a weight is unknown, see `count_uses`."""


@dataclass
class _Call:
    """Record of a layer call: how often it is repeated, and the shapes of its inputs and output."""

    repeats: int
    inputs: list[Shape]
    output: Shape


class _Trace(keras.Operation):
    """Operation that calls a model symbolically and records the inference calls of its layers."""

    # The model is not an argument of `__init__`, because Keras would then serialize the model.
    model: Any
    batch: int

    def __init__(self):
        super().__init__(name="trace")
        self.calls: dict[int, list[_Call]] = {}
        self.repeats = 1

    def call(self, args, kwargs):
        # On PyTorch, Keras first calls the model on the meta device. If the call on the meta device
        # fails, Keras calls the model on another device. Discard the layer calls that were recorded
        # on the meta device.
        self.calls.clear()
        self.model(*args, training=False, **kwargs)
        return []

    @contextlib.contextmanager
    def recording(self, recorded_layers: list):
        """Record the layer calls within this context.

        To record the calls, this function replaces the `call` method of each layer by an instance
        attribute.
        """
        before = []
        try:
            for layer in recorded_layers:
                name = "quantized_call" if layer.quantization_mode else "call"
                before.append((layer.__dict__, name, layer.__dict__.get(name)))
                # Assign to `__dict__`, because Keras tracks ordinary assignments.
                layer.__dict__[name] = self._recorded(layer, getattr(layer, name))
            yield
        finally:
            for attributes, name, old in before:
                if old is None:
                    attributes.pop(name, None)
                else:
                    attributes[name] = old

    def _recorded(self, layer, call):
        @functools.wraps(call)
        def record(*args, **kwargs):
            output = call(*args, **kwargs)
            recorded = _Call(self.repeats, _shapes((args, kwargs)), _shapes(output)[0])
            self.calls.setdefault(id(layer), []).append(recorded)
            return output

        # The number of recorded calls of an RNN cell differs between backends. Therefore record one
        # call of the RNN cell, and multiply the FLOPs of this call by the number of time steps.
        @functools.wraps(call)
        def record_step(sequences, *args, **kwargs):
            with self._repeat(sequences.shape[1]):
                layer.cell(sequences[:, 0], layer.get_initial_state(sequences.shape[0]))
            with self._repeat(0):
                return call(sequences, *args, **kwargs)

        return record_step if isinstance(layer, layers.RNN) else record

    @contextlib.contextmanager
    def _repeat(self, times: int):
        before, self.repeats = self.repeats, self.repeats * times
        try:
            yield
        finally:
            self.repeats = before


def _shapes(structure) -> list[Shape]:
    tensors = [x for x in keras.tree.flatten(structure) if hasattr(x, "shape")]
    return [tuple(x.shape) for x in tensors] or [()]


def count_uses_per_weight(model, weights: list[Weight]) -> list[tuple[int | None, str | None]]:
    """Return a pair for each weight: (use count, None), or (None, reason) if the use count is
    unknown. See `count_uses`."""
    recorded_layers = {id(layer): layer for weight in weights for layer in weight.layers}
    recorded_layers |= {id(x): x for x in _keras.flatten_layers(model) if isinstance(x, layers.RNN)}
    try:
        traces = _traces(model, list(recorded_layers.values()))
    except _UnknownCount as unknown:
        return [(None, str(unknown))] * len(weights)
    return [_same_in_all(weight, traces) for weight in weights]


def _same_in_all(weight: Weight, traces: list[_Trace]) -> tuple[int | None, str | None]:
    try:
        counts = {_count_in(trace, weight) for trace in traces}
    except _UnknownCount as unknown:
        return None, str(unknown)
    if len(counts) > 1:
        return None, "they depend on a size that the Input leaves open"
    return counts.pop(), None


def _count_in(trace: _Trace, weight: Weight) -> int:
    count = sum(
        call.repeats * _positions(layer, weight.variable, call)
        for layer in weight.layers
        for call in trace.calls.get(id(layer), ())
        if call.repeats
    )
    return count // trace.batch


def _traces(model, recorded_layers: list) -> list[_Trace]:
    """Call a model symbolically, and record the layer calls. If an input size is unknown, call the
    model once for each of two sizes."""
    unbuilt = [layer.name for layer in _keras.flatten_layers(model) if not layer.built]
    if unbuilt:  # A symbolic call of the model would build its unbuilt layers.
        raise _UnknownCount(f"'{unbuilt[0]}' is not built; call the model once on data")
    inputs = _inputs(model)
    tensors = keras.tree.flatten(inputs)
    batch = next((x.shape[0] for x in tensors if x.shape and x.shape[0]), _BATCH)

    def closed(x, size):
        shape = [batch, *(size if n is None else n for n in x.shape[1:])] if x.shape else []
        return keras.KerasTensor(shape, x.dtype, sparse=x.sparse)

    def traced(size):
        trace = _Trace()
        trace.model, trace.batch = model, batch
        with trace.recording(recorded_layers), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Hide warnings from layers during the symbolic call.
            trace.compute_output_spec(*keras.tree.map_structure(lambda x: closed(x, size), inputs))
        return trace

    is_open = any(None in x.shape[1:] for x in tensors)
    first: Exception | None = None
    for sizes in _SIZES if is_open else [_SIZES[0][:1]]:
        try:
            return [traced(size) for size in sizes]
        except Exception as error:
            first = first or error
    text = re.sub(r"\x1b\[\d*m", "", str(first).split("Error encountered:\n")[-1])
    raise _UnknownCount(
        f"a symbolic call of the model fails ({textwrap.shorten(text, 200)})"
    ) from first


def _inputs(model) -> tuple[tuple, dict]:
    """Return symbolic positional and keyword arguments for a call of the model."""
    inputs = getattr(model, "inputs", None)
    if inputs and all(isinstance(x, keras.KerasTensor) for x in inputs):
        return (inputs[0] if isinstance(model, keras.Sequential) else model.input,), {}
    shapes = _keras.build_shapes(model)
    if not shapes or any(shape is None for shape in shapes.values()):
        raise _UnknownCount("the model's input shape is unknown; call the model once on data")
    tensors = {
        name.removesuffix("_shape"): keras.tree.map_shape_structure(keras.KerasTensor, shape)
        for name, shape in shapes.items()
    }
    return ((*tensors.values(),), {}) if len(tensors) == 1 else ((), tensors)


def _positions(layer, variable, call: _Call) -> int:
    """Return how often each entry of a weight is multiplied for the whole batch. In a convolution,
    for example, an entry is multiplied once per output pixel."""
    shape, x, y = tuple(variable.shape), call.inputs[0], call.output
    if any(None in tensor for tensor in (x, y)):
        raise _UnknownCount(f"the shapes in {layer.name} are unknown")
    if isinstance(layer, _TRANSPOSED):
        return _grid_points(layer, x)
    if hasattr(layer, "kernel_size"):
        return _grid_points(layer, y)
    if isinstance(layer, layers.EinsumDense):
        inputs, kernel = re.split(",|->", layer.equation.replace(" ", ""))[:2]
        applied = (n for letter, n in zip(kernel, shape) if letter in inputs)
        return math.prod(x) // math.prod(applied)
    if isinstance(layer, layers.Embedding):
        return _embedding_positions(layer, variable, x, y)
    if _TABLES.search(variable.name):
        return 0
    for tensor in call.inputs:
        if len(shape) == 2 and tensor[-1:] == shape[:1]:
            return math.prod(tensor[:-1])
    raise _UnknownCount(
        f"keras_dst does not know how often {type(layer).__name__} multiplies {variable.path}"
    )


def _grid_points(layer, shape: Shape) -> int:
    """Return the number of positions in the input or output of a convolution: the product of all
    axis lengths except the number of channels."""
    first = getattr(layer, "data_format", None) == "channels_first"
    return math.prod(shape[:1] + shape[2:] if first else shape[:-1])


def _embedding_positions(layer, variable, x: Shape, y: Shape) -> int:
    """Return how many vectors a `ReversibleEmbedding` multiplies by its weights, or 0 if the layer
    only looks up vectors."""
    if len(y) > len(x):
        return 0
    tied = getattr(layer, "tie_weights", True)
    return math.prod(x[:-1]) if tied or variable.name == "reverse_embeddings" else 0
