"""Pruning policies of tfmot, which decide which layers of a model are pruned."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from keras_dst import _keras


class PruningPolicy:
    """Base class of policies that choose the layers of a model to prune."""

    def allow_pruning(self, layer) -> bool:
        """Return whether the policy allows a layer to be pruned."""
        raise NotImplementedError

    def ensure_model_supports_pruning(self, model) -> None:
        """Raise ValueError if the policy cannot be applied to a model."""
        raise NotImplementedError


class PruneForLatencyOnXNNPack(PruningPolicy):
    """Policy that prunes the 1x1 convolutions which XNNPACK computes with its sparse kernels.

    The model must begin with `ZeroPadding2D(1)` and `Conv2D(n, 3, strides=2, padding="valid")` on
    three channels, and end with `GlobalAveragePooling2D`. XNNPACK must support every layer between
    the first convolution and the pooling layer in sparse inference. The policy also checks the
    layers of nested models. To check a `.tflite` file for sparse inference in XNNPACK, call
    `keras_dst.lint`.

    Example:
        >>> policy = keras_dst.tfmot.PruneForLatencyOnXNNPack()
        >>> keras_dst.tfmot.prune_low_magnitude(model, pruning_policy=policy)

    Source: arXiv 1911.09723.
    """

    def allow_pruning(self, layer):
        return isinstance(layer, layers.Conv2D) and layer.kernel_size == (1, 1)

    def ensure_model_supports_pruning(self, model):
        graph = _keras.graph_of(model)
        if graph is None:
            raise ValueError(
                f"{type(self).__name__} needs the graph of a model, but '{model.name}' runs its "
                "own call method. Build the model as Sequential or Functional."
            )
        fed = _fed_tensors(graph, {})
        producers, consumers = _edges(graph, fed)
        inputs = [_keras.operation_of(tensor) for tensor in graph.inputs]
        outputs = [x for tensor in graph.outputs for x in _producers_of(tensor, fed)]
        starts = _first_on_every_path(inputs, lambda x: _is_start(x, producers), consumers)
        ends = _first_on_every_path(outputs, _is_end, producers)
        if not starts:
            raise ValueError(
                f"Expected every path from the inputs of '{model.name}' to begin with "
                "ZeroPadding2D(1) and Conv2D(n, 3, strides=2, padding='valid') on 3 channels, "
                "because sparse inference in XNNPACK needs both layers. Change the model, or prune "
                "without the policy."
            )
        if not ends:
            raise ValueError(
                f"Expected every path to the outputs of '{model.name}' to go through "
                "GlobalAveragePooling2D, because sparse inference in XNNPACK needs a "
                "GlobalAveragePooling2D. Change the model, or prune without the policy."
            )

        def check(operation):
            if operation not in ends and not _has_sparse_form(operation, producers):
                raise ValueError(
                    f"XNNPACK has no sparse form of '{operation.name}' "
                    f"({type(operation).__name__}) with the given arguments. Replace the layer, or "
                    "prune without the policy."
                )
            return operation in ends

        _first_on_every_path(
            [x for start in starts for x in consumers.get(start, [])], check, consumers
        )


def _graph_in(operation):
    """Return the graph of a nested model, or None for any other operation."""
    return _keras.graph_of(operation) if isinstance(operation, keras.Model) else None


def _fed_tensors(graph, found: dict[Any, list]) -> dict[Any, list]:
    """Return a dict that maps each InputLayer of a nested model to the tensors that the outer model
    passes to the InputLayer."""
    for node in _keras.nodes_in_order(graph):
        if inner := _graph_in(node.operation):
            for tensor, fed in zip(inner.inputs, node.input_tensors):
                found.setdefault(_keras.operation_of(tensor), []).append(fed)
            _fed_tensors(inner, found)
    return found


def _producers_of(tensor, fed: dict[Any, list]) -> list:
    """Return the operations that compute a tensor.

    If a nested model computes the tensor, return operations inside the nested model.
    """
    operation = _keras.operation_of(tensor)
    if operation in fed:
        return [x for outer in fed[operation] for x in _producers_of(outer, fed)]
    if inner := _graph_in(operation):
        outputs = _keras.node_of(tensor).outputs
        index = next(i for i, output in enumerate(outputs) if output is tensor)
        return _producers_of(inner.outputs[index], fed)
    return [operation]


def _edges(graph, fed: dict[Any, list]) -> tuple[dict[Any, list], dict[Any, list]]:
    """Return two dicts with the neighbors of every operation in a graph. The first dict lists the
    operations that compute its inputs, and the second dict lists the operations that read its
    outputs. Both dicts include the operations of nested models."""
    producers: dict[Any, list] = {}
    consumers: dict[Any, list] = {}
    for node in _keras.nodes_in_order(graph):
        if inner := _graph_in(node.operation):
            for edges, inside in zip((producers, consumers), _edges(inner, fed)):
                for operation, others in inside.items():
                    known = edges.setdefault(operation, [])
                    known += [x for x in others if x not in known]
            continue
        for tensor in node.input_tensors:
            for producer in _producers_of(tensor, fed):
                producers.setdefault(node.operation, []).append(producer)
                consumers.setdefault(producer, []).append(node.operation)
    return producers, consumers


def _first_on_every_path(starts, is_wanted, neighbors) -> list:
    """Follow every path of the graph to the first operation for which `is_wanted` returns True.

    Return the operations that were found, or an empty list if a path contains no wanted operation.
    """
    found, queue = [], list(dict.fromkeys(starts))
    # The loop body appends operations to `queue`, and the loop also visits the appended operations.
    for operation in queue:
        if is_wanted(operation):
            found.append(operation)
        elif operation not in neighbors:
            return []
        else:
            queue += [x for x in dict.fromkeys(neighbors[operation]) if x not in queue]
    return found


def _is_start(layer, producers) -> bool:
    """Return whether sparse inference in XNNPACK can begin with a layer: a 3x3 convolution with
    stride 2 on three channels."""
    return (
        isinstance(layer, layers.Conv2D)
        and tuple(layer.kernel.shape[:3]) == (3, 3, 3)
        and (layer.strides, layer.padding) == ((2, 2), "valid")
        and _padding_before(layer, producers) == 1
    )


def _is_end(layer) -> bool:
    return isinstance(layer, layers.GlobalAveragePooling2D)


def _padding_before(layer, producers) -> int | None:
    """Return the width of the padding before a layer, or None if the four sides have different
    widths."""
    first, *others = producers.get(layer, [None])
    if others or not isinstance(first, layers.ZeroPadding2D):
        return None
    width = first.padding[0][0]
    return width if first.padding == ((width, width), (width, width)) else None


def _has_sparse_form(operation, producers) -> bool:
    """Return whether XNNPACK supports a layer or `keras.ops` function in sparse inference."""
    if isinstance(operation, layers.DepthwiseConv2D):
        (size, width), strides = operation.kernel_size, operation.strides
        padded = _padding_before(operation, producers) == size // 2
        return (
            (operation.depth_multiplier, operation.dilation_rate) == (1, (1, 1))
            and size == width
            and size in (3, 5)
            and (
                (operation.padding == "same" and strides == (1, 1))
                or (operation.padding == "valid" and padded and strides in ((1, 1), (2, 2)))
            )
        )
    if isinstance(operation, layers.Conv2D):
        sizes = (operation.kernel_size, operation.strides, operation.dilation_rate)
        return operation.groups == 1 and sizes == ((1, 1), (1, 1), (1, 1))
    if isinstance(operation, layers.GlobalAveragePooling2D):
        return operation.keepdims
    if isinstance(operation, layers.BatchNormalization):
        return operation.axis in (3, -1)
    if isinstance(operation, layers.UpSampling2D):
        return operation.interpolation == "bilinear"
    if isinstance(operation, layers.Activation):
        return getattr(operation.activation, "__name__", "") in _ACTIVATIONS
    return isinstance(operation, _LAYERS) or type(operation).__name__ in _OPERATIONS


_ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "sigmoid")
_LAYERS = (
    *(layers.Add, layers.Subtract, layers.Multiply, layers.Identity, layers.Dropout),
    *(layers.ZeroPadding2D, layers.ReLU, layers.LeakyReLU, layers.ELU),
)
# Class names of the Keras operations that operators such as `a - b` create.
_OPERATIONS = ("Add", "Subtract", "Multiply")
