"""Reader for files of Keras 2 (`tf_keras`) models, which may be pruned with tfmot.

The reader needs neither tf_keras nor tfmot, and runs no code from a file. The reader creates only
objects of Keras classes and of registered classes.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from keras import ops

from keras_dst import _keras

_WRAPPER = "PruneLowMagnitude"  # Class name of the wrapper that tfmot puts around a layer.
_STATE = re.compile(r"(mask|threshold|pruning_step)(_\d+)?:0")
_MODELS = ("Sequential", "Functional", "Model")
# Arguments of Keras 2 layers that are ignored, because Keras 3 does not need them. Other arguments
# that Keras 3 does not know are ignored only if their value is None, 0 or False.
_SHAPES = ("batch_input_shape", "input_length", "query_shape", "key_shape", "value_shape")
_UNUSED = (
    *("implementation", "rng_type", "trainable"),
    *("kernel_initializer", "kernel_regularizer", "kernel_constraint"),
)


@dataclass
class Wrapper:
    """Pruning wrapper that tfmot put around a layer, as read from a file.

    Attributes:
        layer: Name of the wrapped layer.
        config: Arguments of the wrapper.
        masks: Masks of the prunable weights, in the order of the weights.
        step: Number of trained steps, or -1 before the first step.
    """

    layer: str
    config: dict[str, Any]
    masks: list[np.ndarray]
    step: int


def read(path: str | os.PathLike) -> tuple[keras.Model, list[Wrapper]]:
    """Read a Keras 2 file, and return the unwrapped model and the list of its tfmot wrappers.

    Raises:
        ValueError: If the file is not a `.keras` or `.h5` file of a model, or if Keras 3 does not
            support a layer in the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"Expected a .keras or .h5 file. Received: {path}. Save the model as a .keras or .h5 "
            "file, with the version of tf_keras that created the model."
        )
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if not {"model.weights.h5", "config.json"} <= names:
                raise ValueError(
                    f"Expected a .keras or .h5 file of a model. Received: {path}, a zip file with "
                    f"the members {sorted(names)[:5]}."
                )
            config = json.loads(archive.read("config.json"))
            with archive.open("model.weights.h5") as weights, h5py.File(weights, "r") as file:
                return _build(config, _KerasFormat(), file)
    if not h5py.is_hdf5(path):
        raise ValueError(
            f"Expected a .keras or .h5 file. Received: {path}, which is not a .keras or .h5 file."
        )
    with h5py.File(path, "r") as file:
        if "model_config" not in file.attrs:
            raise ValueError(
                f"{path} holds weights but no model. Save the whole model with model.save(path)."
            )
        config = json.loads(file.attrs["model_config"])
        return _build(config, _H5Format(), file["model_weights"])


def _build(config, file_format, root) -> tuple[keras.Model, list[Wrapper]]:
    """Build a model from its config, and assign the weights that the file stores."""
    if "layers" not in config["config"]:
        raise ValueError(
            f"The file holds a {config['class_name']}, which is neither Sequential nor "
            "Functional, so the file does not contain the code of the model. Write the model class "
            "for Keras 3, and load the weights into the new model."
        )
    model = keras.saving.deserialize_keras_object(_model_config(config))
    if not model.built:
        raise ValueError(
            f"The file of '{model.name}' does not contain the shape of its inputs. Build the model "
            "in tf_keras, and save it again."
        )
    return model, list(_assign_weights(model, config["config"]["layers"], file_format, root))


@keras.saving.register_keras_serializable("keras_dst.tfmot")
def keras2_hard_sigmoid(x):
    """Compute the activation `hard_sigmoid` of Keras 2, with the slope 1/5.

    The `hard_sigmoid` of Keras 3 has the slope 1/6.
    """
    return ops.clip(0.2 * x + 0.5, 0, 1)


# -- configs -------------------------------------------------------------------------------------


def _model_config(config: dict) -> dict:
    """Convert a model config to the Keras 3 format, and replace wrappers by the wrapped layers."""
    own = dict(config["config"])
    renamed = {_name(x): _name(_unwrapped(x)) for x in own["layers"]}
    first_calls = _first_calls(own)

    def tensor(reference):
        name, node, index = reference[:3]
        history = [renamed[name], node - first_calls.get(name, 0), index]
        config = {"shape": [], "dtype": "float32", "keras_history": history}
        return {"class_name": "__keras_tensor__", "config": config}

    def value(x):
        return tensor(x) if _is_reference(x, renamed) else x

    def call(node):
        node = [node] if _is_reference(node, renamed) else node
        if not all(_is_reference(x, renamed) for x in node):
            raise ValueError(
                f"Expected every layer call in '{own['name']}' to receive only tensors. "
                f"Received: {node!r}"
            )
        kwargs = node[0][3] if len(node[0]) > 3 else {}
        args = [tensor(x) for x in node]
        return {
            "args": args if len(args) == 1 else [args],
            "kwargs": {name: value(x) for name, x in kwargs.items()},
        }

    layers = []
    for entry in own["layers"]:
        layer = _layer_config(_unwrapped(entry))
        if "inbound_nodes" in entry:
            layer["name"] = renamed[_name(entry)]
            layer["inbound_nodes"] = [call(node) for node in entry["inbound_nodes"]]
        layers.append(layer)
    own["layers"] = layers
    for ends in ("input_layers", "output_layers"):
        if ends in own:
            several = [own[ends]] if _is_reference(own[ends], renamed) else own[ends]
            own[ends] = [tensor(x)["config"]["keras_history"] for x in several]
    functional = config["class_name"] != "Sequential"
    return {
        "module": "keras.src.models.functional" if functional else "keras",
        "class_name": "Functional" if functional else "Sequential",
        "config": own,
        "registered_name": None,
    }


def _is_reference(x, names) -> bool:
    """Return whether a value is a reference to a tensor: a list [layer name, call index, output
    index]."""
    return isinstance(x, list) and len(x) in (3, 4) and isinstance(x[0], str) and x[0] in names


def _first_calls(model: dict) -> dict[str, int]:
    """Return a dict that maps the name of each layer to the index of its first call.

    Keras 2 does not always number the calls of a layer from 0.
    """
    first: dict[str, int] = {}
    names = {_name(x) for x in model["layers"]}

    def visit(x):
        if _is_reference(x, names):
            first[x[0]] = min(x[1], first.get(x[0], x[1]))
        for inner in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
            visit(inner)

    visit([x.get("inbound_nodes", []) for x in model["layers"]] + [model.get("output_layers", [])])
    return first


def _name(entry: dict) -> str:
    return entry["config"]["name"]


def _unwrapped(entry: dict) -> dict:
    """Return the config of a layer without its tfmot wrapper."""
    return entry["config"]["layer"] if entry["class_name"] == _WRAPPER else entry


def _layer_config(entry: dict) -> dict:
    """Convert a layer config to the Keras 3 format."""
    name = entry["class_name"]
    if name in _MODELS and "layers" in entry["config"]:
        return _model_config(entry)
    registered = entry.get("registered_name") or name
    custom = keras.saving.get_registered_object(registered)
    cls = custom or getattr(keras.layers, name, None)
    if cls is None or cls is keras.layers.Lambda:
        reason = "runs code from the file" if cls else "is neither a Keras 3 class nor registered"
        raise ValueError(
            f"'{_name(entry)}' is a {name}, which {reason}. Write this class as a Keras 3 "
            "layer with @keras.saving.register_keras_serializable(), and load the file again."
        )
    config = entry["config"] if custom else _arguments(cls, entry["config"])
    return {
        "module": None if custom else "keras.layers",
        "class_name": name,
        "config": _config_values(config),
        "registered_name": registered if custom else None,
        **({"build_config": entry["build_config"]} if custom and "build_config" in entry else {}),
    }


def _arguments(cls, config: dict) -> dict:
    """Return a Keras 2 layer config with only the arguments that the Keras 3 class accepts."""
    known: set[str] = set()
    for base in cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters
        known.update(parameters)
        if "kwargs" not in parameters:  # The class passes no other arguments to its base classes.
            break
    config = dict(config)
    if cls is keras.layers.InputLayer and "batch_input_shape" in config:
        config["batch_shape"] = config.pop("batch_input_shape")
    if cls is keras.layers.LeakyReLU:
        config["negative_slope"] = config.pop("alpha")
    if cls is keras.layers.BatchNormalization and isinstance(config["axis"], list):
        (config["axis"],) = config["axis"]
    for name in [name for name in config if name not in known]:
        value = config.pop(name)
        if value and name not in _SHAPES + _UNUSED and (name, value) != ("groups", 1):
            raise ValueError(
                f"'{config['name']}' has {name}={value!r}, but the {cls.__name__} of Keras 3 has "
                "no such argument. Build the model in Keras 3, and load the weights into it."
            )
    return config


def _config_values(config: dict) -> dict:
    """Convert all values of a config to the Keras 3 format."""
    activation = keras.activations.serialize(keras2_hard_sigmoid)
    return {
        key: activation if key.endswith("activation") and x == "hard_sigmoid" else _config_value(x)
        for key, x in config.items()
    }


def _config_value(x):
    """Convert a value of a config, with all nested layers and objects, to the Keras 3 format."""
    if isinstance(x, list):
        return [_config_value(inner) for inner in x]
    if not isinstance(x, dict):
        return x
    name, registered = x.get("class_name"), x.get("registered_name") or x.get("class_name")
    if name is None:
        return _config_values(x)
    if name == "Policy":
        return x["config"]["name"]
    if hasattr(keras.layers, name) and "name" in x["config"]:
        return _layer_config(x)
    for kind in ("initializers", "regularizers", "constraints"):
        if hasattr(getattr(keras, kind), name):
            return {**x, "module": f"keras.{kind}"}
    if keras.saving.get_registered_object(registered) is None:
        raise ValueError(
            f"The file holds a {name} ({registered!r}), which is neither a Keras 3 class nor "
            "registered. Decorate a custom class with "
            "@keras.saving.register_keras_serializable()."
        )
    config = _config_value(x["config"])
    return {**x, "module": None, "registered_name": registered, "config": config}


# -- weights -------------------------------------------------------------------------------------


def _assign_weights(model, entries: list[dict], file_format, root) -> Iterator[Wrapper]:
    """Assign the stored weights to all layers of a model, and yield the tfmot wrappers."""
    found = file_format.find_layers(root, entries)
    by_name = {_name(_unwrapped(entry)): entry for entry in entries}
    for layer in model.layers:
        entry = by_name[layer.name]
        stored = found.get(_name(entry))
        if isinstance(layer, keras.Model):
            yield from _assign_weights(layer, entry["config"]["layers"], file_format, stored)
            continue
        if stored is None:  # The layer has no weights.
            variables, arrays = layer.weights, []
        else:
            variables, arrays = file_format.weights(stored, layer, entry)
        if [tuple(v.shape) for v in variables] != [a.shape for a in arrays]:
            raise ValueError(
                f"Expected weights of the shapes {[tuple(v.shape) for v in variables]} for "
                f"'{layer.name}'. Received: weights of the shapes {[a.shape for a in arrays]}"
            )
        for variable, array in zip(variables, arrays):
            variable.assign(array)
        for inner in _keras.flatten_layers(layer):
            if isinstance(inner, keras.layers.Normalization):
                inner.finalize_state()  # Compute `mean` and `variance` from the assigned weights.
        if entry["class_name"] == _WRAPPER:
            masks, step = file_format.state(stored, entry)
            yield Wrapper(layer.name, entry["config"], masks, step)


class _H5Format:
    """Reader for the weights of an `.h5` file, which stores a path for every weight of a layer."""

    def find_layers(self, group, entries):
        """Map the name of each layer to its list of (path, array) pairs."""
        if isinstance(group, list):  # The file stores all weights of a nested model in one list.
            return {
                _name(x): [pair for pair in group if _names_in(x) & set(pair[0].split("/"))]
                for x in entries
            }
        return {
            name: [(path, group[name][path][()]) for path in _strings(group[name], "weight_names")]
            for name in _strings(group, "layer_names")
        }

    def weights(self, pairs, layer, entry):
        arrays = [array for path, array in pairs if not self._is_state(path, entry)]
        return layer.trainable_weights + layer.non_trainable_weights, arrays

    def state(self, pairs, entry):
        state = [pair for pair in pairs if self._is_state(pair[0], entry)]
        masks = [array for path, array in state if path.split("/")[-1].startswith("mask")]
        return masks, int(state[-1][1])

    def _is_state(self, path, entry) -> bool:
        *parents, last = path.split("/")
        wrapped = entry["class_name"] == _WRAPPER and _name(entry) in parents
        return wrapped and bool(_STATE.fullmatch(last))


class _KerasFormat:
    """Reader for the weights of a `.keras` file, which names HDF5 groups after layer classes."""

    def find_layers(self, group, entries):
        """Map the name of each layer to its HDF5 group."""
        # A Sequential model does not list its InputLayer among its layers.
        counted = (
            entries
            if "inbound_nodes" in entries[0]
            else [entry for entry in entries if entry["class_name"] != "InputLayer"]
        )
        keys = _keys([entry["class_name"] for entry in counted])
        return {_name(x): group["layers"][key] for x, key in zip(counted, keys)}

    def weights(self, group, layer, entry):
        if entry["class_name"] == _WRAPPER:
            group = group.get("layer", {})
        pairs = list(self._pairs(group, layer))
        return [variable for variable, _ in pairs], [array for _, array in pairs]

    def _pairs(self, group, owner):
        """Yield a pair (variable, stored array) for each variable of a layer and its inner
        layers."""
        if isinstance(owner, (list, tuple)):
            for key, layer in zip(_keys([type(x).__name__ for x in owner]), owner):
                yield from self._pairs(group[key], layer)
            return
        variables = [
            *_keras.trainable_variables_of(owner),
            *_keras.non_trainable_variables_of(owner),
        ]
        yield from zip(variables, _numbered(group), strict=True)
        for name in group:
            if name != "vars" and _holds_arrays(group[name]):
                yield from self._pairs(group[name], getattr(owner, name))

    def state(self, group, entry):
        arrays = _numbered(group)
        # The HDF5 group stores n pruned weights, then n pairs of a mask and a threshold, and
        # finally the step count.
        n = (len(arrays) - 1) // 3
        return arrays[n:-1:2], int(arrays[-1])


def _names_in(entry) -> set[str]:
    """Return the names of a layer, of the wrapper around it, and of all layers inside it."""
    inner = [_names_in(x) for x in entry["config"].get("layers", [])]
    return {_name(entry), _name(_unwrapped(entry))}.union(*inner)


def _numbered(group) -> list[np.ndarray]:
    """Return the arrays that an HDF5 group stores under the names 0, 1, 2 and so on."""
    stored = group.get("vars", {})
    return [stored[str(i)][()] for i in range(len(stored))]


def _holds_arrays(group) -> bool:
    if isinstance(group, h5py.Dataset):
        return True
    return any(_holds_arrays(inner) for inner in group.values())


def _strings(group, name) -> list[str]:
    return [x.decode() if isinstance(x, bytes) else str(x) for x in group.attrs[name]]


def _keys(classes: list[str]) -> list[str]:
    """Return the name of each layer's HDF5 group: dense, dense_1 and so on for Dense layers."""
    found: list[str] = []
    for name in classes:
        snake = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", snake).lower()
        before = sum(1 for other in classes[: len(found)] if other == name)
        found.append(f"{snake}_{before}" if before else snake)
    return found
