"""A model's graph, laid out flat: tensors with channels, and calls in the order they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_dst import _keras

UNKNOWN = np.nan  # in place of a constant
OPEN = 32  # what replaces the open sizes of an input, to try a layer on


@dataclass(eq=False)
class Tensor:
    """A tensor of the graph, and its channels: those on one axis, by default the last."""

    shape: tuple
    dtype: str
    origin: Tensor | None = None  # of a view: the tensor whose channels are on another axis
    axis: int = field(init=False)
    constant: np.ndarray = field(init=False)  # by channel: the number it always is, or NaN
    ids: np.ndarray = field(init=False)  # by channel: channels of one id live or die together

    def __post_init__(self):
        self.carry(len(self.shape) - 1)

    @property
    def channels(self) -> int:
        return (self.shape[self.axis] or 0) if len(self.shape) > 1 else 0

    def carry(self, axis: int, constant: np.ndarray | None = None) -> None:
        """Put the channels on an axis. Those whose constants are not given vary."""
        self.axis = axis
        self.constant = np.full(self.channels, UNKNOWN) if constant is None else constant

    def along(self, axis: int) -> Tensor:
        """This tensor for a layer that takes another axis for the channels."""
        if axis == self.axis:
            return self
        view = Tensor(self.shape, self.dtype, origin=self)
        view.carry(axis)
        return view


@dataclass(eq=False)
class Call:
    """A call of an operation of the graph."""

    op: Any
    args: tuple
    kwargs: dict
    outputs: list[Tensor]
    prefix: str
    dropped: list[Tensor] = field(default_factory=list)  # summands that are constants

    @property
    def inputs(self) -> list[Tensor]:
        found = [x for x in tree.flatten((self.args, self.kwargs)) if isinstance(x, Tensor)]
        return [x for x in found if not any(x is d for d in self.dropped)]

    def map(self, fn) -> tuple[tuple, dict]:
        """Its arguments, with `fn` of every tensor."""
        return tree.map_structure(
            lambda x: fn(x) if isinstance(x, Tensor) else x, (self.args, self.kwargs)
        )

    def look_along(self, axis: int) -> None:
        """Take the channels of every input on this axis."""
        self.args, self.kwargs = self.map(lambda x: x.along(axis))


def lay_out(model, inputs: list[Tensor], prefix: str, calls: list[Call]) -> list[Tensor]:
    """Add the calls of a model, and of the models inside, to the list; return its outputs."""
    graph = _keras.graph_of(model)
    tensors = {id(x): y for x, y in zip(graph.inputs, inputs)}
    for node in _keras.nodes_in_order(graph):
        if node.is_input or node.operation is None:
            continue
        args, kwargs = node.arguments.fill_in(tensors)
        if isinstance(node.operation, keras.Model) and _keras.graph_of(node.operation) is not None:
            given = [x for x in tree.flatten((args, kwargs)) if isinstance(x, Tensor)]
            inner = f"{prefix}{node.operation.name}_"
            outputs = lay_out(node.operation, given, inner, calls)
        else:
            outputs = [Tensor(tuple(x.shape), x.dtype) for x in node.outputs]
            calls.append(Call(node.operation, args, kwargs, outputs, prefix))
        tensors.update((id(x), y) for x, y in zip(node.outputs, outputs))
    return [tensors[id(x)] for x in graph.outputs]


def array(x) -> np.ndarray:
    """The values of a tensor or a variable, in float64."""
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")), "float64")
