"""Sparse model files.

`save_sparse` saves a model without its zero weights, and `load_sparse` loads the saved model.

A sparse file is a `.keras` archive whose weights are stored in the safetensors format instead of
HDF5. A weight tensor is stored as a bitmap and its nonzero values in C order if the dense tensor
would take more bytes. The bitmap has one bit per entry, which is 1 if the entry is nonzero. The
most significant bit of a byte comes first.

```text
bytes of a float32 tensor = (density + 1/32) * bytes of the dense tensor
```

The archive also stores the names, types and attributes of the HDF5 file. `load_sparse` rebuilds the
original `.keras` archive, and loads the archive with Keras.
"""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import keras
import numpy as np

from keras_dst import _keras
from keras_dst._utils.files import as_path, atomic_write, check_writable
from keras_dst._utils.validation import check_boolean
from keras_dst.layers.base import SparseMixin
from keras_dst.masks import masked
from keras_dst.surgery import check_model

_HDF5, _SAFETENSORS, _STRUCTURE = "model.weights.h5", "model.safetensors", "structure.json"
_FORMAT = 1


def save_sparse(model, path, include_optimizer: bool = False) -> None:
    """Save a model in one file that stores only its nonzero weights.

    A float32 weight tensor of density d takes about (d + 1/32) times the bytes of the dense tensor.
    The file is written atomically, so an error leaves no incomplete file. All pruned weights are
    zero in the file. If the values of pruned weights are needed later, use `model.save` instead.

    Args:
        model: Built Keras 3 model: sparse, stripped or dense.
        path: Path of the file. An existing file is replaced.
        include_optimizer: Whether to store the optimizer and the arguments of `compile`, so that
            training can be continued. The argument also applies to models inside the model.
            Defaults to False.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If the model is not built.
        OSError: If the file cannot be written.
        ImportError: If safetensors is not installed.

    Example:
        >>> keras_dst.save_sparse(model, "model.sparse")
        >>> model = keras_dst.load_sparse("model.sparse")
    """
    check_boolean(include_optimizer, "include_optimizer")
    safetensors = _safetensors()
    check_model(model)
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a keras.Model. Received: the layer '{model.name}'.")
    path = as_path(path, "path")
    check_writable(path)
    with tempfile.TemporaryDirectory() as folder:
        dense = pathlib.Path(folder) / "model.keras"
        without = contextlib.nullcontext() if include_optimizer else _without_optimizers(model)
        with without, _zeros_under_masks(model):
            model.save(dense)
        with zipfile.ZipFile(dense) as archive, atomic_write(path) as unfinished:
            with archive.open(_HDF5) as file, h5py.File(io.BytesIO(file.read())) as weights:
                structure, tensors = _encode(weights)
            with zipfile.ZipFile(unfinished, "w") as sparse:
                for name in archive.namelist():
                    content = archive.read(name)
                    if name == "config.json" and not include_optimizer:
                        config = json.loads(content, object_hook=_without_compile_config)
                        content = json.dumps(config).encode()
                    if name != _HDF5:
                        sparse.writestr(name, content, zipfile.ZIP_DEFLATED)
                sparse.writestr(_STRUCTURE, json.dumps(structure), zipfile.ZIP_DEFLATED)
                sparse.writestr(_SAFETENSORS, safetensors.save(tensors))


def load_sparse(path, custom_objects=None, safe_mode: bool = True) -> keras.Model:
    """Load a model from a file that `save_sparse` wrote. Nonzero weights are restored exactly.

    Args:
        path: Path of the file.
        custom_objects: Dict that maps names to custom classes or functions, as for
            `keras.saving.load_model`. Defaults to None.
        safe_mode: Whether to refuse files with `Lambda` layers, because `Lambda` layers execute
            code from the file. Defaults to True.

    Returns:
        The model, which is compiled if the file was saved with `include_optimizer=True`.

    Raises:
        FileNotFoundError: If there is no file at `path`.
        ValueError: If the file was not written by `save_sparse` or is damaged.
        ImportError: If safetensors is not installed.

    Example:
        >>> model = keras_dst.load_sparse("model.sparse")
    """
    safetensors = _safetensors()
    path = as_path(path, "path")
    check_boolean(safe_mode, "safe_mode")
    if not (custom_objects is None or isinstance(custom_objects, Mapping)):
        raise TypeError(
            "custom_objects must be a dict from names to classes or functions. "
            f"Received: custom_objects={custom_objects!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file that save_sparse wrote. Received: {path}.")
    with tempfile.TemporaryDirectory() as folder:
        dense = pathlib.Path(folder) / "model.keras"
        try:
            with zipfile.ZipFile(path) as sparse:
                damaged = sparse.testzip()
                if damaged:
                    raise ValueError(f"the checksum of {damaged} differs")
                structure = json.loads(sparse.read(_STRUCTURE))
                if structure["format"] != _FORMAT:
                    raise ValueError(f"its format version is {structure['format']}, not {_FORMAT}")
                tensors = safetensors.load(sparse.read(_SAFETENSORS))
                with zipfile.ZipFile(dense, "w") as archive:
                    for name in sparse.namelist():
                        if name not in (_STRUCTURE, _SAFETENSORS):
                            archive.writestr(name, sparse.read(name))
                    archive.writestr(_HDF5, _decode(structure, tensors))
        except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError, EOFError) as error:
            raise _damaged(path, error) from error
        except safetensors.SafetensorError as error:
            raise _damaged(path, error) from error
        with warnings.catch_warnings():
            if "optimizer" not in structure["groups"]:
                # A KerasHub model compiles itself, so Keras expects the state of an optimizer in
                # the file, and warns that the state is missing.
                warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
            return keras.saving.load_model(
                dense, custom_objects=custom_objects, safe_mode=safe_mode
            )


def _damaged(path, error) -> ValueError:
    return ValueError(
        f"{path} was not written by save_sparse, or it is damaged: {error}. "
        "Save the model again with keras_dst.save_sparse(model, path)."
    )


def _safetensors():
    """Import safetensors, and return an object with the functions `save` and `load` and the
    exception `SafetensorError` of safetensors."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Sparse model files need safetensors: pip install keras_dst[safetensors]"
        ) from error
    names = {"save": safetensors.numpy.save, "load": safetensors.numpy.load}
    return type("_Safetensors", (), {**names, "SafetensorError": safetensors.SafetensorError})


@contextlib.contextmanager
def _zeros_under_masks(model) -> Iterator[None]:
    """Set the pruned weights of sparse layers to zero, and restore the weights on exit."""
    restored = []
    try:
        for layer in _keras.flatten_layers(model):
            if isinstance(layer, SparseMixin):
                for layout, variable, state in layer.masked_weights():
                    restored.append((variable, variable.numpy()))
                    w = keras.ops.convert_to_tensor(variable)
                    variable.assign(masked(w, layer.method.mask(w, state, layout)))
        yield
    finally:
        for variable, value in restored:
            variable.assign(value)


@contextlib.contextmanager
def _without_optimizers(model) -> Iterator[None]:
    """Hide the optimizer of a model and the optimizers of all models inside it within this context,
    so that Keras does not save them."""
    models = [inner for inner in _keras.flatten_layers(model) if isinstance(inner, keras.Model)]
    hidden = [(vars(inner), inner.optimizer) for inner in models if "optimizer" in vars(inner)]
    try:
        for attributes, _ in hidden:
            attributes["optimizer"] = None
        yield
    finally:
        for attributes, optimizer in hidden:
            attributes["optimizer"] = optimizer


def _without_compile_config(config: dict) -> dict:
    """Remove the arguments of `compile` from the config of one object."""
    if "class_name" in config:
        config.pop("compile_config", None)
    return config


def _encode(weights: h5py.File) -> tuple[dict, dict[str, np.ndarray]]:
    """Split an HDF5 file into its structure, which can be stored as JSON, and its encoded tensors.

    A tensor is encoded as a bitmap and its nonzero values if the dense tensor would take more
    bytes. A boolean tensor is always encoded as a bitmap.
    """
    structure: dict[str, Any] = {"format": _FORMAT, "groups": {}, "datasets": {}}
    tensors = {}

    def visit(name, item):
        attributes = {key: _to_json(value) for key, value in item.attrs.items()}
        if isinstance(item, h5py.Group):
            structure["groups"][name] = attributes
            return
        values = np.ascontiguousarray(item[()]).reshape(-1)
        entry = {"attributes": attributes, "dtype": values.dtype.str, "shape": item.shape}
        # Compare bytes, so that -0.0 counts as nonzero.
        kept = values.view("uint8").reshape(-1, values.itemsize).any(axis=1)
        bitmap = np.packbits(kept)
        entry["sparse"] = bool(
            bitmap.nbytes + np.count_nonzero(kept) * values.itemsize < values.nbytes
        )
        if values.dtype.kind == "b":  # The bitmap contains all values of a boolean tensor.
            tensors[f"{name}:bitmap"] = bitmap
            entry["sparse"] = True
        elif entry["sparse"]:
            tensors[f"{name}:bitmap"] = bitmap
            tensors[f"{name}:values"] = values[kept].view("uint8")
        else:
            tensors[name] = values.view("uint8")
        structure["datasets"][name] = entry

    weights.visititems(visit)
    structure["attributes"] = {key: _to_json(value) for key, value in weights.attrs.items()}
    return structure, tensors


def _decode(structure: dict, tensors: dict[str, np.ndarray]) -> bytes:
    """Return the bytes of the HDF5 file that `_encode` split into `structure` and `tensors`."""
    content = io.BytesIO()
    with h5py.File(content, "w") as weights:
        weights.attrs.update(structure["attributes"])
        for name, attributes in structure["groups"].items():
            weights.require_group(name).attrs.update(attributes)
        for name, entry in structure["datasets"].items():
            dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
            size = int(np.prod(shape, dtype="int64"))
            if not entry["sparse"]:
                values = tensors[name].view(dtype)
            else:
                kept = np.unpackbits(tensors[f"{name}:bitmap"], count=size).astype(bool)
                values = kept
                if dtype.kind != "b":
                    values = np.zeros(size, dtype)
                    values[kept] = tensors[f"{name}:values"].view(dtype)
            dataset = weights.create_dataset(name, data=values.reshape(shape))
            dataset.attrs.update(entry["attributes"])
    return content.getvalue()


def _to_json(value):
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
