"""FLOPs of a model: how often every weight is multiplied for one sample."""

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

# Weights of layers other than Keras's that are looked up or added, and not multiplied.
_TABLES = re.compile(r"(embeddings?|tokens?)$")

# A model is traced with this batch where its Input leaves it open; 1 could be squeezed away.
_BATCH = 2
# What replaces other open sizes. Layers for which the two differ have no FLOPs of their own.
_SIZES = (128, 256)


def count_uses(model) -> dict[int, tuple[int | None, str | None]]:
    """How often every prunable weight is multiplied for one sample, or None and the reason.

    By the id of its variable.
    """
    weights = [weight for weight in weights_of(model) if weight.prunable]
    return {id(w.variable): found for w, found in zip(weights, count_per_weight(model, weights))}


class _Unknown(Exception):
    """Why FLOPs cannot be told."""


@dataclass
class _Call:
    """A call of a layer: how often it happens, and the shapes of its tensors, with the batch."""

    times: int
    inputs: list[Shape]
    output: Shape


class _Trace(keras.Operation):
    """Calls a model on symbolic tensors, for inference, and notes the calls of layers inside."""

    # Attributes, because Keras serialises an operation's arguments.
    model: Any
    batch: int

    def __init__(self):
        super().__init__(name="trace")
        self.calls: dict[int, list[_Call]] = {}
        self.times = 1

    def call(self, args, kwargs):
        self.calls.clear()  # torch calls again where a model does not run on its meta device
        self.model(*args, training=False, **kwargs)
        return []

    @contextlib.contextmanager
    def watch(self, watched: list):
        """Note the calls of layers, by an attribute before the method of their class."""
        before = []
        try:
            for layer in watched:
                name = "quantized_call" if layer.quantization_mode else "call"
                before.append((layer.__dict__, name, layer.__dict__.get(name)))
                # Past Keras's tracking.
                layer.__dict__[name] = self._watched(layer, getattr(layer, name))
            yield
        finally:
            for attributes, name, old in before:
                if old is None:
                    attributes.pop(name, None)
                else:
                    attributes[name] = old

    def _watched(self, layer, call):
        @functools.wraps(call)
        def noted(*args, **kwargs):
            output = call(*args, **kwargs)
            noted_call = _Call(self.times, _shapes((args, kwargs)), _shapes(output)[0])
            self.calls.setdefault(id(layer), []).append(noted_call)
            return output

        # What an RNN calls, and how often, differs by backend. So count a step of it instead.
        @functools.wraps(call)
        def unrolled(sequences, *args, **kwargs):
            with self._repeat(sequences.shape[1]):
                layer.cell(sequences[:, 0], layer.get_initial_state(sequences.shape[0]))
            with self._repeat(0):
                return call(sequences, *args, **kwargs)

        return unrolled if isinstance(layer, layers.RNN) else noted

    @contextlib.contextmanager
    def _repeat(self, times: int):
        before, self.times = self.times, self.times * times
        try:
            yield
        finally:
            self.times = before


def _shapes(structure) -> list[Shape]:
    tensors = [x for x in keras.tree.flatten(structure) if hasattr(x, "shape")]
    return [tuple(x.shape) for x in tensors] or [()]


def count_per_weight(model, weights: list[Weight]) -> list[tuple[int | None, str | None]]:
    """How often every weight is multiplied for one sample, or None and the reason."""
    watched = {id(layer): layer for weight in weights for layer in weight.layers}
    watched |= {id(x): x for x in _keras.flatten_layers(model) if isinstance(x, layers.RNN)}
    try:
        traces = _traces(model, list(watched.values()))
    except _Unknown as unknown:
        return [(None, str(unknown))] * len(weights)
    return [_agreed(weight, traces) for weight in weights]


def _agreed(weight: Weight, traces: list[_Trace]) -> tuple[int | None, str | None]:
    try:
        uses = {_uses_in(trace, weight) for trace in traces}
    except _Unknown as unknown:
        return None, str(unknown)
    if len(uses) > 1:
        return None, "they depend on a size that the Input leaves open"
    return uses.pop(), None


def _uses_in(trace: _Trace, weight: Weight) -> int:
    uses = sum(
        call.times * _places(layer, weight.variable, call)
        for layer in weight.layers
        for call in trace.calls.get(id(layer), ())
        if call.times
    )
    return uses // trace.batch


def _traces(model, watched: list) -> list[_Trace]:
    """Trace a model, with every size for the axes that its input leaves open."""
    unbuilt = [layer.name for layer in _keras.flatten_layers(model) if not layer.built]
    if unbuilt:  # a trace would build them
        raise _Unknown(f"'{unbuilt[0]}' is not built; call the model once on data")
    inputs = _inputs(model)
    tensors = keras.tree.flatten(inputs)
    batch = next((x.shape[0] for x in tensors if x.shape and x.shape[0]), _BATCH)

    def closed(x, size):
        shape = [batch, *(size if n is None else n for n in x.shape[1:])] if x.shape else []
        return keras.KerasTensor(shape, x.dtype, sparse=x.sparse)

    def traced(size):
        trace = _Trace()
        trace.model, trace.batch = model, batch
        with trace.watch(watched), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the model's own calls
            trace.compute_output_spec(*keras.tree.map_structure(lambda x: closed(x, size), inputs))
        return trace

    is_open = any(None in x.shape[1:] for x in tensors)
    try:
        return [traced(size) for size in (_SIZES if is_open else _SIZES[:1])]
    except Exception as error:
        text = re.sub(r"\x1b\[\d*m", "", str(error).split("Error encountered:\n")[-1])
        raise _Unknown(f"the model fails in a trace ({textwrap.shorten(text, 200)})") from error


def _inputs(model) -> tuple[tuple, dict]:
    """Arguments to call a model with, positional and by name, as KerasTensors."""
    inputs = getattr(model, "inputs", None)
    if inputs and all(isinstance(x, keras.KerasTensor) for x in inputs):
        return (inputs[0] if isinstance(model, keras.Sequential) else model.input,), {}
    shapes = _keras.build_shapes(model)
    if not shapes or any(shape is None for shape in shapes.values()):
        raise _Unknown("the model's input shape is not known; call it once on data")
    tensors = {
        name.removesuffix("_shape"): keras.tree.map_shape_structure(keras.KerasTensor, shape)
        for name, shape in shapes.items()
    }
    return ((*tensors.values(),), {}) if len(tensors) == 1 else ((), tensors)


def _places(layer, variable, call: _Call) -> int:
    """At how many places of its tensors, over the batch, a layer applies the whole of a weight."""
    shape, x, y = tuple(variable.shape), call.inputs[0], call.output
    if any(None in tensor for tensor in (x, y)):
        raise _Unknown(f"the shapes in {layer.name} are not known")
    if isinstance(layer, _TRANSPOSED):
        return _points(layer, x)
    if hasattr(layer, "kernel_size"):
        return _points(layer, y)
    if isinstance(layer, layers.EinsumDense):
        inputs, kernel = re.split(",|->", layer.equation.replace(" ", ""))[:2]
        applied = (n for letter, n in zip(kernel, shape) if letter in inputs)
        return math.prod(x) // math.prod(applied)
    if isinstance(layer, layers.Embedding):
        return _reversed_places(layer, variable, x, y)
    if _TABLES.search(variable.name):
        return 0
    for tensor in call.inputs:
        if len(shape) == 2 and tensor[-1:] == shape[:1]:
            return math.prod(tensor[:-1])
    raise _Unknown(f"what {type(layer).__name__} does with {variable.path} is not known")


def _points(layer, shape: Shape) -> int:
    """Points in time or space of a convolution's input or output, over the batch."""
    first = getattr(layer, "data_format", None) == "channels_first"
    return math.prod(shape[:1] + shape[2:] if first else shape[:-1])


def _reversed_places(layer, variable, x: Shape, y: Shape) -> int:
    """An embedding looks up, at no cost, or goes back from vectors to scores of tokens."""
    if len(y) > len(x):
        return 0
    tied = getattr(layer, "tie_weights", True)
    return math.prod(x[:-1]) if tied or variable.name == "reverse_embeddings" else 0
