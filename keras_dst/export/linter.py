"""``lint``: check a ``.tflite`` file for wrong results, low speed and large size."""

from __future__ import annotations

import os
from pathlib import Path

import keras

from keras_dst.export.findings import LintReport
from keras_dst.export.target_reports import ACCELERATORS
from keras_dst.export.tflite import check_exportable, check_installed, check_option


def lint(
    model: keras.Model | str | os.PathLike[str] | bytes, target: str | None = None
) -> LintReport:
    """Find parts of a ``.tflite`` file that cause wrong results, low speed or a large size.

    The ``.tflite`` file can come from any converter, and is not run. On ARM, and on every other CPU
    without AVX, XNNPACK has fast sparse kernels for 1x1 convolutions. XNNPACK uses its sparse
    kernels only if all ops around the convolutions support NCHW layout. The report says whether
    XNNPACK uses the sparse kernels, and names the ops that prevent their use.

    Args:
        model: A ``.tflite`` file, as a path or as bytes. A built Keras 3 model is first converted
            to the file that `export_tflite` would write. If ``target`` is not None, the converted
            file is quantized to int8, with random samples for the calibration.
        target: ``"micro"`` for TensorFlow Lite for Microcontrollers, or an Ethos-U NPU that Vela
            supports, such as ``"ethos-u55-128"``. Defaults to None, which means that the file is
            for CPUs.

    Returns:
        A `LintReport`.

    Raises:
        TypeError: If ``model`` is neither a file nor a Keras 3 model.
        ValueError: If the model is not built, the file is not a ``.tflite`` file, or the target is
            unknown.
        OSError: If the path cannot be read.
        ImportError: If a package of ``keras_dst[export]`` is missing, or the target is an NPU and
            Vela is not installed.
        ExportError: If the model could not be converted.

    Example:
        >>> keras_dst.lint("model.tflite").errors
        []
    """
    if isinstance(model, bytes | str | os.PathLike):
        check_installed("ai_edge_litert", "flatbuffers")
    else:
        check_exportable(model)
        check_installed("tensorflow", "ai_edge_litert", "flatbuffers")
    # The modules below need optional packages, but `import keras_dst` must work without the
    # optional packages.
    from keras_dst.export.convert import conversions, to_tflite
    from keras_dst.export.decode import load, value_error_if_damaged
    from keras_dst.export.rules import check
    from keras_dst.export.selection import select_formats
    from keras_dst.export.target_rules import check_for_target

    if target is not None:
        check_option("target", target, ("micro", *ACCELERATORS))
    if not isinstance(model, bytes | str | os.PathLike):
        if target is not None:
            (content,) = conversions(model, ["integer"])
            return check_for_target(model.name, content, target)
        return check(model.name, select_formats(to_tflite(model)).content)
    name = "the bytes given" if isinstance(model, bytes) else Path(model).name
    content = load(model)
    with value_error_if_damaged(name):
        return check_for_target(name, content, target) if target else check(name, content)
