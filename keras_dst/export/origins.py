"""Find the Keras layer from which the converter made an op of a ``.tflite`` file."""

from __future__ import annotations

import re
from collections.abc import Collection

import keras

from keras_dst import _keras


def layer_names(model: keras.Model) -> set[str]:
    """Return the names of all layers in a model."""
    return {layer.name for layer in _keras.flatten_layers(model, include_self=False)}


def layer_at(path: str, names: Collection[str]) -> str:
    """Return the innermost layer in the path of an op, such as ``"model_1/dense_1/MatMul"``.

    TensorFlow appends a number to the names of most layers.

    Args:
        path: path of the op. The converter joins the paths of several ops by semicolons.
        names: names of layers.

    Returns:
        The name of the layer. Empty if the path contains none of the names.
    """
    for part in reversed(path.split(";")[0].split("/")[:-1]):
        for name in (re.sub(r"_\d+$", "", part), part):
            if name in names:
                return name
    return ""
