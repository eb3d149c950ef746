"""Copies of layers, so that `shrink` does not change the layers of the given model."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import keras
from keras import layers, tree

from keras_dst import _keras
from keras_dst.layers import Gate
from keras_dst.layers.base import SparseMixin
from keras_dst.layers.classes import SparseContainer


def dense_copy(op):
    """Return a copy of a sparse layer without its masks; return any other operation unchanged."""
    if not isinstance(op, (SparseMixin, SparseContainer, Gate)):
        return op
    try:
        copy = _rebuilt_copy(op)
        for inner in _keras.flatten_layers(copy):
            if isinstance(inner, (SparseMixin, SparseContainer, Gate)):
                inner.restore_stock()
    except Exception as error:
        raise ValueError(
            f"shrink cannot copy the sparse layer '{op.name}' to remove its masks: {error} "
            "Fix: call keras_dst.strip(model), which works in place, and shrink the result."
        ) from error
    return copy


def original_variables(op, copy) -> dict[int, Any]:
    """Return a dict that maps the ids of the dense copy's variables to the variables of the sparse
    layer."""
    if copy is op:
        return {}
    pairs: list[tuple[Any, Any]] = []
    for old, new in zip(_keras.flatten_layers(op), _keras.flatten_layers(copy)):
        # In a sparse layer, the variables of the original Keras layer come before the variables of
        # the pruning method.
        for variables in (_keras.trainable_variables_of, _keras.non_trainable_variables_of):
            pairs += zip(variables(old), variables(new))
    return {id(new): old for old, new in pairs}


def copy_operation(op, name: str, share: bool = False):
    """Return a copy of an operation. The copy has the same state and a new name, and belongs to no
    graph.

    For a Keras layer with weights, the function creates a new layer and copies the values of the
    variables. A copy shares its state with the original if the layer has no weights, is a custom
    layer, or has state outside of its variables. The function does not create custom layers from
    their configs, because a config may lack attributes of the layer.
    """
    if share or not _has_only_variables(op):
        return _shallow_copy(op, name)
    copy = _rebuilt_copy(op, name=name)
    return _shallow_copy(op, name) if copy is None else copy


def live_config(layer) -> dict[str, Any]:
    """Return the constructor arguments of a layer, with functions and objects instead of their
    names.

    The config of a layer refers to functions and objects by name. Lambdas, and classes that are not
    registered with Keras, cannot be found by name.
    """
    try:
        with warnings.catch_warnings():  # Keras warns that lambdas cannot be saved.
            warnings.simplefilter("ignore")
            config = dict(layer.get_config())
    except NotImplementedError:  # an argument without `get_config`
        init = inspect.signature(getattr(layer, "stock", type(layer)).__init__)
        names = {*init.parameters, "name", "trainable", "dtype", "method", "activity_regularizer"}
        config = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    for key, value in config.items():
        own = getattr(layer, key, None)
        if key == "dtype":
            config[key] = layer.dtype_policy
        elif isinstance(own, keras.Layer):
            config[key] = type(own)(**live_config(own))
        elif isinstance(own, (list, tuple)) and any(isinstance(x, keras.Layer) for x in own):
            config[key] = [type(x)(**live_config(x)) for x in own]
        elif callable(own) or key == "method":
            config[key] = own
        elif isinstance(value, dict) and "class_name" in value:
            config[key] = keras.saving.deserialize_keras_object(value) if own is None else own
    return config


def copy_recurrent_state(layer, copy) -> None:
    """Copy the states that stateful recurrent layers keep between batches."""
    for old, new in zip(_keras.flatten_layers(layer), _keras.flatten_layers(copy)):
        if getattr(old, "stateful", False) and isinstance(old, layers.RNN):
            for source, target in zip(tree.flatten(old.states), tree.flatten(new.states)):
                target.assign(source)


def _rebuilt_copy(layer, **changes):
    """Return a built copy of a layer, or None if the variables of the copy and of the layer have
    different shapes."""
    if isinstance(layer, SparseContainer):  # Its config also describes the inner sparse layers.
        copy = type(layer).from_config(layer.get_config())
    else:
        config = {**live_config(layer), **changes}
        config.pop("stock_class", None)
        copy = type(layer)(**config)
    copy.build_from_config(layer.get_build_config())
    if [v.shape for v in copy.variables] != [v.shape for v in layer.variables]:
        return None
    for new, old in zip(copy.variables, layer.variables):
        new.assign(old)
    copy_recurrent_state(layer, copy)
    return copy


def _has_only_variables(op) -> bool:
    """Return whether an operation has variables and no other state."""
    return (
        isinstance(op, keras.Layer)
        and bool(op.weights)
        and all(_keras.is_plain_stock(layer) for layer in _keras.flatten_layers(op))
    )


def _shallow_copy(op, name: str):
    """Return a shallow copy of an operation. The copy shares the operation's state, but has another
    name and belongs to no graph."""
    handle = object.__new__(type(op))
    vars(handle).update(vars(op))
    vars(handle)["name"] = name
    _keras.set_nodes_of(handle, [], [])
    return handle
