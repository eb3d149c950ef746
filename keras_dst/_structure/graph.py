"""Graph of a model without nested models: all tensors, and all calls of layers in order of
execution."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_dst import _keras
from keras_dst._structure.copies import dense_copy, original_variables
from keras_dst.layers import Gate
from keras_dst.surgery import check_model

UNKNOWN = np.nan  # NaN stands for a channel value that depends on the input.


@dataclass(eq=False)
class Tensor:
    """Tensor in the graph of a model. The channels of the tensor are along one axis, by default the
    last axis.

    Attributes:
        shape: Shape, with None for unknown sizes.
        dtype: Name of the data type.
        masked: True if the tensor may carry a Keras mask.
        origin: If this tensor is a view with another channel axis, the tensor that it views;
            otherwise None.
        axis: Axis of the channels.
        constant: For each channel, the value of the channel if all model inputs give the same
            value, otherwise NaN.
        ids: For each channel, the id of its set of coupled channels, which are kept or removed
            together.
    """

    shape: tuple
    dtype: str
    masked: bool = False
    origin: Tensor | None = None
    axis: int = field(init=False)
    constant: np.ndarray = field(init=False)
    ids: np.ndarray = field(init=False)

    def __post_init__(self):
        self.set_channels(len(self.shape) - 1)

    @property
    def channels(self) -> int:
        """Number of channels, or 0 if the number is unknown."""
        return (self.shape[self.axis] or 0) if len(self.shape) > 1 else 0

    def set_channels(self, axis: int, constant: np.ndarray | None = None) -> None:
        """Store the channel axis and the constant value of each channel in the tensor. If
        `constant` is None, all channels count as dependent on the input."""
        self.axis = axis
        self.constant = np.full(self.channels, UNKNOWN) if constant is None else constant

    def along(self, axis: int) -> Tensor:
        """Return the tensor if its channels are along the given axis, otherwise a view with this
        channel axis."""
        if axis == self.axis:
            return self
        view = Tensor(self.shape, self.dtype, self.masked, origin=self)
        view.set_channels(axis)
        return view


@dataclass(eq=False)
class Call:
    """Call of a layer or an operation in the graph of a model.

    Attributes:
        op: Operation: a layer that is not sparse, or an operation such as `x + y`.
        args: The positional arguments.
        kwargs: Keyword arguments, without masks that Keras passes automatically.
        outputs: The output tensors.
        prefix: Names of the nested models that contain the call, joined by underscores.
        constant_terms: Constant inputs of an addition. The smaller model does not compute the
            tensors in `constant_terms`.
    """

    op: Any
    args: tuple
    kwargs: dict
    outputs: list[Tensor]
    prefix: str
    constant_terms: list[Tensor] = field(default_factory=list)

    @property
    def inputs(self) -> list[Tensor]:
        """The input tensors of the call, except Keras masks and the tensors in `constant_terms`."""
        data = {name: x for name, x in self.kwargs.items() if not _is_mask(name)}
        return [x for x in _tensors((self.args, data)) if not _contains(self.constant_terms, x)]

    @property
    def masks(self) -> list[Tensor]:
        """The tensors that the user passed to the operation as Keras masks, for example as
        `mask=`."""
        return _tensors({name: x for name, x in self.kwargs.items() if _is_mask(name)})

    def map(self, fn) -> tuple[tuple, dict]:
        """Return the positional and the keyword arguments of the call, with `fn` applied to every
        tensor."""
        return tree.map_structure(
            lambda x: fn(x) if isinstance(x, Tensor) else x, (self.args, self.kwargs)
        )

    def view_along(self, axis: int) -> None:
        """Replace each input tensor of the call by a view whose channel axis is `axis`."""
        inputs = self.inputs
        self.args, self.kwargs = self.map(lambda x: x.along(axis) if _contains(inputs, x) else x)


def check_graph(model) -> None:
    """Raise TypeError or ValueError unless a model is a Keras 3 model with a known graph."""
    check_model(model)
    if not isinstance(model, keras.Model) or _keras.graph_of(model) is None:
        raise ValueError(
            f"Expected a Sequential or Functional model. Received: '{model.name}' of type "
            f"{type(model).__name__}, which runs its layers in its own `call` method, so that its "
            "graph is not known. Fix: pass each Functional model that it contains."
        )


def flatten_graph(model, inputs: list[Tensor]) -> tuple[list[Call], list[Tensor], dict[int, Any]]:
    """Return the operation calls, output tensors and variables of a model and its nested models.

    The returned calls contain a dense copy in place of each sparse layer. The returned dict maps
    the id of each variable of a dense copy to the corresponding variable of the sparse layer.
    """
    calls: list[Call] = []
    dense: dict[int, Any] = {}
    originals: dict[int, Any] = {}
    outputs = _flatten(model, inputs, "", calls, dense, originals)
    return calls, outputs, originals


def _flatten(
    model, inputs, prefix: str, calls: list[Call], dense, originals, training: bool | None = None
) -> list[Tensor]:
    """Append the calls of a model to `calls`, and return the output tensors of the model.

    `training` is the argument with which a nested model is called. As in Keras, every layer of the
    nested model that takes the argument receives it.
    """
    graph = _keras.graph_of(model)
    tensors = {id(x): y for x, y in zip(graph.inputs, inputs)}
    for node in _keras.nodes_in_order(graph):
        if node.is_input or node.operation is None:
            continue
        op = node.operation
        args, kwargs = node.arguments.fill_in(tensors)
        for key in [key for key in kwargs if _is_automatic_mask(key, node)]:
            del kwargs[key]
        if training is not None and _takes_training(op):
            kwargs["training"] = training
        given = _tensors((args, kwargs))
        if _is_nested_graph(op) and len(given) == len(_keras.graph_of(op).inputs):
            inner = _keras.inputs_of_call(_keras.graph_of(op), args, kwargs)
            name, mode = f"{prefix}{op.name}_", kwargs.get("training")
            outputs = _flatten(op, inner, name, calls, dense, originals, training=mode)
        else:
            # A `Gate` has several inputs, but its dense copy takes only the first argument.
            if isinstance(op, Gate):
                args, kwargs = (op.first_argument(args, kwargs),), {}
            if id(op) not in dense:
                dense[id(op)] = dense_copy(op)
                originals.update(original_variables(op, dense[id(op)]))
            args, kwargs = _inputs_by_position(dense[id(op)], args, kwargs)
            masked = any(x.masked for x in given)
            outputs = [
                Tensor(tuple(x.shape), x.dtype, masked=masked or _keras.mask_of(x) is not None)
                for x in node.outputs
            ]
            calls.append(Call(dense[id(op)], args, kwargs, outputs, prefix))
        tensors.update((id(x), y) for x, y in zip(node.outputs, outputs))
    return [tensors[id(x)] for x in graph.outputs]


def _inputs_by_position(op, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return the arguments of a call, with the inputs passed by position instead of by name."""
    kwargs = dict(kwargs)
    for name, parameter in list(inspect.signature(op.call).parameters.items())[len(args) :]:
        by_position = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if not by_position or _is_mask(name) or not _tensors(kwargs.get(name)):
            break
        args = (*args, kwargs.pop(name))
    return args, kwargs


def _is_nested_graph(op) -> bool:
    return isinstance(op, keras.Model) and _keras.graph_of(op) is not None


def _takes_training(op) -> bool:
    return isinstance(op, keras.Layer) and "training" in inspect.signature(op.call).parameters


def _is_mask(name: str) -> bool:
    return name == "mask" or name.endswith("_mask")


def _is_automatic_mask(name: str, node) -> bool:
    """Return whether an argument holds masks that Keras passes to the layer automatically."""
    automatic = [mask for x in node.input_tensors if (mask := _keras.mask_of(x)) is not None]
    given = [x for x in tree.flatten(node.arguments.kwargs[name]) if x is not None]
    return _is_mask(name) and all(any(x is mask for mask in automatic) for x in given)


def _tensors(structure) -> list[Tensor]:
    return [x for x in tree.flatten(structure) if isinstance(x, Tensor)]


def _contains(tensors: list[Tensor], x: Tensor) -> bool:
    return any(x is y for y in tensors)


def to_float64(x) -> np.ndarray:
    """Return the values of a tensor or a variable as a float64 array."""
    return np.asarray(ops.convert_to_numpy(x)).astype("float64")
