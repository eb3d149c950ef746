"""``export_tflite``: check the arguments of an export, and run the export."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import keras

from keras_dst._utils.files import as_path, check_writable
from keras_dst._utils.validation import check_boolean, check_integer, is_number
from keras_dst.export.report import ExportReport
from keras_dst.export.target_reports import ACCELERATORS
from keras_dst.surgery import check_model


def export_tflite(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    inputs: Any = None,
    tolerance: float | None = None,
    optimize: str = "balanced",
    target: str = "host",
    measure: bool = True,
    threads: int = 1,
    batch: int = 1,
    quantize: str | None = None,
    representative: Any = None,
    evaluate: Any = None,
    vela_path: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> ExportReport:
    """Write a model as a ``.tflite`` file with sparse weights, after a comparison with the model.

    The new file is run in the LiteRT interpreter, with and without XNNPACK, and its outputs are
    compared with the outputs of the model. The file is written only if its outputs agree with the
    outputs of the model. The model is not changed.

    Args:
        model: A built Keras 3 model on any backend. The model may be sparse, stripped or dense. An
            input with ``sparse=True`` becomes a dense input of the file. If an optional input is
            None in ``inputs`` or ``representative``, the file lacks the optional input. Each run of
            the file starts with zero states of the recurrent layers.
        path: Path of the file to write, in an existing folder. An existing file is replaced.
        inputs: Samples on which the file is compared with the model. As in `model.predict`, the
            samples can be arrays, or a data set, data loader or generator of batches. Only the
            first 32 samples are used in the comparison, or one batch if the model has a larger
            fixed batch size. Defaults to the samples in ``representative``. Without
            ``representative``, the samples are random with a fixed seed: standard normal floats, or
            integers that are 0 or 1. Dynamic axes of random samples have size 32, or another size
            that the model accepts. A model with string inputs requires ``inputs``.
        tolerance: Largest accepted error of each output of the file. The error of an output ``y``
            is ``max|y - y_keras| / max(max|y_keras|, 1e-6)``, where ``y_keras`` is the output of
            the model. The default depends on ``quantize``: 1e-4 for None, 0.1 for ``"weights"``,
            0.3 for ``"full"``. A quantized file is also compared with a dense file that has the
            same quantized weights. The outputs of the quantized and the dense file may differ by at
            most 1e-4, or 0.05 if the ops compute with integers.
        optimize: Criterion by which the storage format of each weight tensor is selected.
            ``"latency"`` selects the fastest format and, among equally fast formats, the smallest.
            ``"size"`` selects the smallest format and, among equally small formats, the fastest.
            ``"balanced"``, the default, selects the smallest product of bytes and latency among the
            formats that are not slower than dense.
        target: Hardware for which the file is written. ``"host"``, the default, optimizes the file
            for the CPU of the current machine. ``"arm"`` optimizes the file for a CPU without AVX.
            ``"any"`` selects formats by the larger of two latency ratios: the ratio on the CPU of
            the current machine, and the ratio on a CPU without AVX. The name of an Arm Ethos-U NPU,
            such as ``"ethos-u55-128"``, requires ``quantize="full"``. A file for an NPU has int8
            inputs, int8 outputs and dense weights. If Vela is installed, the report includes Vela's
            estimates. ``"micro"`` means TensorFlow Lite for Microcontrollers (TFLM) and also
            requires ``quantize="full"``. In a file for TFLM, the zeros of a weight tensor are
            omitted if this makes the file smaller. No other runtime can run a file for TFLM. For an
            NPU or ``"micro"``, no latency is measured, and ``optimize`` must keep its default.
        measure: Whether to measure latencies on the CPU of the current machine. A latency model
            estimates latencies on other CPUs, and all latencies if ``measure`` is False. Defaults
            to True.
        threads: Number of interpreter threads during measurements. Defaults to 1.
        batch: Batch size during measurements, for a model with a dynamic batch size. Defaults to 1.
            Other dynamic axes have the sizes of the samples on which the file is compared with the
            model.
        quantize: Selects the tensors that are quantized to 8 bits. Defaults to None: no tensor is
            quantized. ``"weights"`` quantizes each weight tensor for which ``optimize`` selects an
            int8 format. ``"full"`` quantizes weights and activations. TensorFlow's converter
            measures the ranges of the activations on ``representative``. Zero weights stay zero.
        representative: Typical input samples for ``quantize="full"``, in any form that
            `model.predict` accepts. All samples of an array are used, but only the first 1000
            samples of a data set or generator.
        evaluate: Data to measure the accuracy of the exported and the dense files: ``(x, y)``, or a
            data set, data loader or generator of batches ``(x, y)``. Labels are integers or one-hot
            vectors. Sample weights are ignored. Alternatively, ``evaluate`` is a function that
            receives ``predict`` and returns a number. ``predict`` accepts inputs like
            `model.predict`, and returns the outputs of the file. Defaults to None: accuracy is not
            measured.
        vela_path: Path where the file that Vela compiled for the NPU is saved, in an existing
            folder. Defaults to None: the compiled file is not saved.
        progress: Function that is called with a line of text before each step of the export.

    Returns:
        An `ExportReport` with the storage format of each weight tensor and the error of the file.
        The report compares size, latency, load time, peak memory and accuracy between the exported
        file and dense files.

    Raises:
        TypeError: If ``model`` is not a Keras 3 model.
        ValueError: If the model is not built, the data does not fit the model, or an argument has
            an unknown value.
        OSError: If no file can be written at ``path`` or ``vela_path``. The export checks ``path``
            and ``vela_path`` before the conversion begins.
        ImportError: If a required extra of keras_dst is not installed. Every export requires the
            extra ``export``. In addition, ``target="micro"`` requires the extra ``micro``, and
            ``vela_path`` requires the extra ``ethos``.
        ExportError: If the model could not be converted, or the outputs of the file differ from the
            outputs of the model. The message names the op or weight tensor that causes the
            difference. No file is written.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> report = export_tflite(model, "model.tflite", optimize="latency")
    """
    check_exportable(model)
    file = as_path(path, "path")
    check_writable(file, ".tflite")
    check_option("optimize", optimize, ("latency", "size", "balanced"))
    check_option("quantize", quantize, (None, "weights", "full"))
    check_boolean(measure, "measure")
    if not callable(progress):
        raise TypeError(
            f"progress must be a function that accepts a line of text. Received: {progress!r}"
        )
    threads, batch = check_integer(threads, "threads"), check_integer(batch, "batch")
    if (quantize == "full") != (representative is not None):
        raise ValueError(
            "Expected representative= together with quantize='full', or neither of the two. "
            f"Received: quantize={quantize!r}, representative "
            f"{'missing' if representative is None else 'given'}. Fix: pass samples of the "
            "training data, for example representative=x[:200]."
        )
    if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):
        raise ValueError(f"Expected a finite tolerance of 0 or more. Received: {tolerance!r}.")
    check_installed("tensorflow", "ai_edge_litert", "flatbuffers")
    # The modules below need optional packages, but `import keras_dst` must work without the
    # optional packages.
    from keras_dst.export.ethos import NEEDS_VELA, vela_version
    from keras_dst.export.micro import check_tflm
    from keras_dst.export.pipeline import TOLERANCES, Settings, export

    check_option("target", target, ("host", "arm", "any", "micro", *ACCELERATORS))
    npu, compiled = target in ACCELERATORS, None
    integer = npu or target == "micro"
    if integer and quantize != "full":
        raise ValueError(
            f"Expected quantize='full' with target={target!r}. Received: quantize={quantize!r}. "
            "Fix: pass quantize='full' and samples of the training data as representative=."
        )
    if integer and optimize != "balanced":
        raise ValueError(
            f"Expected no optimize= with target={target!r}, which offers no choice of storage "
            f"formats. Received: optimize={optimize!r}. Fix: do not pass optimize=."
        )
    if target == "micro":
        check_tflm()
    if vela_path is not None:
        if not npu:
            raise ValueError(
                "Expected an Ethos-U target with vela_path=, such as target='ethos-u55-128'. "
                f"Received: target={target!r}."
            )
        if vela_version() is None:
            raise ImportError(NEEDS_VELA)
        compiled = as_path(vela_path, "vela_path")
        if compiled.resolve() == file.resolve():
            raise ValueError(
                f"Expected different files as path and vela_path. Received: {file} as both. "
                "Fix: choose another name for vela_path."
            )
        check_writable(compiled, ".tflite")
    limit = TOLERANCES[quantize] if tolerance is None else tolerance
    settings = Settings(
        *(limit, optimize, target, measure and not integer, threads, batch, quantize),
        *(inputs, representative, evaluate, compiled),
    )
    return export(model, file, settings, progress)


def check_option(name: str, value: Any, known: tuple) -> None:
    """Raise ValueError if the value of an argument is not in ``known``."""
    if not (value is None or isinstance(value, str)) or value not in known:
        raise ValueError(
            f"Expected {name} to be one of {', '.join(map(repr, known))}. Received: {value!r}."
        )


def check_exportable(model: Any) -> None:
    """Raise TypeError or ValueError unless ``model`` is a built Keras 3 model."""
    if isinstance(model, keras.Layer) and not isinstance(model, keras.Model):
        raise TypeError(
            f"Expected a Keras 3 model. Received: the layer {model.name!r} "
            f"({type(model).__name__}). Fix: keras.Sequential([keras.Input(shape), layer])."
        )
    check_model(model)


def check_installed(*packages: str) -> None:
    """Raise ImportError unless the given optional packages are installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"Working with .tflite files needs {' and '.join(missing)}. "
            "Fix: pip install keras_dst[export]."
        )
