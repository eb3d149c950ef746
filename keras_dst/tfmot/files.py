"""Function `load`, which reads the file of a tf_keras model, pruned with tfmot or not."""

from __future__ import annotations

import os

import keras
import numpy as np

from keras_dst import _keras
from keras_dst.surgery import sparsify_layers
from keras_dst.tfmot import legacy_files
from keras_dst.tfmot.method import PruneLowMagnitude
from keras_dst.tfmot.pruning import leaf_layers, prunable_layers
from keras_dst.tfmot.schedules import ConstantSparsity, PolynomialDecay

_SCHEDULES = {"ConstantSparsity": ConstantSparsity, "PolynomialDecay": PolynomialDecay}


def load(path: str | os.PathLike) -> keras.Model:
    """Load a tf_keras model, pruned with tfmot or not, from its `.keras` or `.h5` file.

    The model keeps its masks, schedules and step counts. To continue training, compile the model.
    To restore stock Keras layers, strip the model. This function needs neither tf_keras nor tfmot.

    Args:
        path: Path of the `.keras` or `.h5` file.

    Returns:
        A Keras 3 model that is not compiled.

    Raises:
        ValueError: If the file is not a `.keras` or `.h5` file of a model, or if Keras 3 has no
            equivalent of a layer in the file. Register custom layers before you load the file.

    Example:
        >>> model = keras_dst.tfmot.load("pruned.h5")
        >>> keras_dst.tfmot.strip_pruning(model)
    """
    model, wrappers = legacy_files.read(path)
    leaves = {leaf.name: leaf for leaf in leaf_layers(model)}
    for wrapper in wrappers:
        method = _method_of(wrapper.config)
        inside = _keras.flatten_layers(leaves[wrapper.layer]) if wrapper.masks else []
        layers_ = prunable_layers(inside, method)
        sparsify_layers(model, layers_, method)
        members = [member for layer in layers_ for member in layer.masked_weights()]
        for (_, _, state), mask in zip(members, wrapper.masks, strict=True):
            state["mask"].assign(mask != 0)
            state["progress"].assign(np.array([max(wrapper.step, 0), 0, 1], "int32"))
    return model


def _method_of(config: dict) -> PruneLowMagnitude:
    """Return the pruning method that the config of a tfmot wrapper describes."""
    schedule = config["pruning_schedule"]
    name = schedule["class_name"]
    cls = _SCHEDULES.get(name) or keras.saving.get_registered_object(name)
    if cls is None:
        raise ValueError(
            f"The file holds a pruning schedule of the unknown class {name!r}. Write the class as "
            "a keras_dst.tfmot.PruningSchedule, decorate it with "
            "@keras.saving.register_keras_serializable(), and import it before you load the file."
        )
    block_size = tuple(config["block_size"])
    return PruneLowMagnitude(cls(**schedule["config"]), block_size, config["block_pooling_type"])
