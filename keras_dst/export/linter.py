"""``lint``: check whether a ``.tflite`` file is computed correctly, fast, and from few bytes."""

from __future__ import annotations

import os
from pathlib import Path

import keras

from keras_dst.export.findings import LintReport
from keras_dst.export.tflite import check_exportable, check_installed


def lint(model: keras.Model | str | os.PathLike[str] | bytes) -> LintReport:
    """Find what makes a ``.tflite`` file wrong, slow or large, without running the file.

    The file may come from any converter. On ARM, and on every other CPU without AVX, XNNPACK has
    fast kernels for 1x1 convolutions with sparse weights. It uses them only if the whole network
    supports them. The report says whether this network does, and which op prevents it.

    Args:
        model: a ``.tflite`` file, as a path or as bytes. Or a built Keras 3 model; then the file
            that `export_tflite` would write is checked.

    Returns:
        A `LintReport`.

    Raises:
        TypeError: ``model`` is neither a file nor a Keras 3 model.
        ValueError: the model is not built, or the file is not a ``.tflite`` file.
        OSError: the path cannot be read.
        ImportError: the packages of ``keras_dst[export]`` are missing.
        ExportError: the model could not be converted.

    Example:
        >>> keras_dst.lint("model.tflite").errors
        []
    """
    if isinstance(model, bytes | str | os.PathLike):
        check_installed("ai_edge_litert", "flatbuffers")
    else:
        check_exportable(model)
        check_installed("tensorflow", "ai_edge_litert", "flatbuffers")
    # The modules below need optional packages, without which `import keras_dst` must work.
    from keras_dst.export.convert import to_tflite
    from keras_dst.export.decode import load, value_error_if_damaged
    from keras_dst.export.rules import check
    from keras_dst.export.selection import select_formats

    if not isinstance(model, bytes | str | os.PathLike):
        return check(model.name, select_formats(to_tflite(model)).content)
    name = "the bytes given" if isinstance(model, bytes) else Path(model).name
    content = load(model)
    with value_error_if_damaged(name):
        return check(name, content)
