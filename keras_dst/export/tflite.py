"""``export_tflite``: the way into this package, which checks what it is given."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import keras

from keras_dst.export.report import ExportReport
from keras_dst.surgery import check_model


def export_tflite(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    inputs: Any = None,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Writes a model as a ``.tflite`` file with sparse weights, after running and comparing it.

    The file is run in the LiteRT interpreter, with XNNPACK and without, and compared with the
    model's own outputs. It gets its name only when they agree. The model is not changed.

    Args:
        model: a built Keras 3 model on any backend: sparse, stripped or plain.
        path: the file to write, in an existing folder. A file of that name is replaced.
        inputs: samples to compare on, as for `model.predict`; the first 32 are used. Default:
            seeded random ones (floats: standard normal; integers: zeros and ones).
        tolerance: largest error that passes, ``max|y - y_keras| / max(max|y_keras|, 1e-6)`` of
            every output. Default 1e-4.

    Returns:
        An `ExportReport`: sizes, the form of every weight, the error.

    Raises:
        TypeError: ``model`` is not a Keras 3 model.
        ValueError: an unbuilt model, or ``inputs`` that do not fit it.
        OSError: a ``path`` that cannot be written, before any work is done.
        ImportError: the packages of ``keras_dst[export]`` are missing.
        ExportError: the conversion failed, or the file does not compute what the model does; it
            names the weight at fault. Nothing is written.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> report = export_tflite(model, "model.tflite")
    """
    check_exportable(model)
    target = _checked_path(path)
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"Expected a finite tolerance of 0 or more. Received: {tolerance}.")
    check_installed("tensorflow", "ai_edge_litert", "flatbuffers")
    # Not above: keras_dst works without these packages until something is exported.
    from keras_dst.export.pipeline import export

    return export(model, target, inputs, tolerance)


def check_exportable(model: Any) -> None:
    """Raise unless this is a built Keras 3 model."""
    if isinstance(model, keras.Layer) and not isinstance(model, keras.Model):
        raise TypeError(
            f"Expected a Keras 3 model. Received: the layer {model.name!r} "
            f"({type(model).__name__}). Fix: keras.Sequential([keras.Input(shape), layer])."
        )
    check_model(model)


def _checked_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise IsADirectoryError(f"Expected the path of a file. Received: the folder {target}.")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected a path in an existing folder. Received: {target}. Fix: create {folder}."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"Expected a path in a folder that may be written. Received: {target}. "
            f"Fix: allow writing in {folder}, or choose another folder."
        )
    return target


def check_installed(*packages: str) -> None:
    """Raise unless these packages are there, which `import keras_dst` does without."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"Working with .tflite files needs {' and '.join(missing)}. "
            "Fix: pip install keras_dst[export]."
        )
