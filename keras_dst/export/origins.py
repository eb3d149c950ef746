"""Find the Keras layer that an op of a ``.tflite`` file comes from."""

from __future__ import annotations

import re
from collections.abc import Collection

import keras

from keras_dst import _keras


def layer_names(model: keras.Model) -> set[str]:
    """Return the names of all layers in a model."""
    return {layer.name for layer in _keras.flatten_layers(model, include_self=False)}


def layer_at(path: str, names: Collection[str]) -> str:
    """Return the innermost layer in the path of an op.

    In the path ``"model_1/dense_1/MatMul"``, the innermost layer is ``"dense"`` or ``"dense_1"``,
    because TensorFlow appends numbers to most layer names.

    Args:
        path: Path of the op in the file. If ops were merged, their paths are joined by semicolons,
            and only the first path is used.
        names: Names of all layers.

    Returns:
        The name of the layer, or an empty string if the path contains no layer name.
    """
    for part in reversed(path.split(";")[0].split("/")[:-1]):
        for name in (re.sub(r"_\d+$", "", part), part):
            if name in names:
                return name
    return ""
