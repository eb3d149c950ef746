"""``export_tflite``: check the arguments of an export, and run the export."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_dst._utils.files import check_writable
from keras_dst._utils.validation import check_integer, is_number
from keras_dst.export.report import ExportReport
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
    compared with the outputs of the model. The file is written only if the outputs agree. The model
    is not changed.

    Args:
        model: a built Keras 3 model on any backend. The model may be sparse, stripped or dense. An
            input with ``sparse=True`` becomes a dense input of the file. Optional inputs that are
            None in ``inputs`` or ``representative`` are left out of the file. States of recurrent
            layers are zero at the beginning.
        path: the file to write, in an existing folder. An existing file is replaced.
        inputs: samples for the comparison, in every form that `model.predict` takes: arrays, or a
            data set, data loader or generator of batches. The first 32 samples are used. Defaults
            to seeded random samples, which are standard normal for floats and 0 or 1 for integers.
            Models with string inputs need this argument.
        tolerance: largest accepted error, ``max|y - y_keras| / max(max|y_keras|, 1e-6)`` of each
            output. Defaults to 1e-4, to 0.1 with ``quantize="weights"``, and to 0.3 with
            ``quantize="full"``. A quantized file must also agree with a dense file that has the
            same quantized weights, to 1e-4, or to 0.05 if the ops compute with integers.
        optimize: criterion by which the storage format of every weight is selected. ``"latency"``
            selects the fastest format and, among equally fast formats, the smallest. ``"size"``
            selects the smallest format and, among equally small formats, the fastest.
            ``"balanced"``, the default, selects the smallest product of bytes and latency among the
            formats that are not slower than dense.
        target: hardware for which the file is written. ``"host"``, the default, optimizes latency
            for this CPU, and ``"arm"`` for a CPU without AVX. ``"any"`` optimizes for both CPUs,
            and the larger latency ratio counts. An Arm Ethos-U NPU, such as ``"ethos-u55-128"``,
            needs ``quantize="full"``. The file then has int8 inputs and outputs and dense weights.
            If Vela is installed, the report includes Vela's estimates. ``"micro"`` means TensorFlow
            Lite for Microcontrollers (TFLM) and also needs ``quantize="full"``. Weights are stored
            without their zeros if this saves bytes. Only TFLM can run a file for ``"micro"``. With
            an NPU or ``"micro"``, no latency is measured on this CPU, and ``optimize`` must keep
            its default.
        measure: whether to measure latencies on this CPU. If this is False, and for other CPUs, a
            model of the kernels estimates the latencies. Defaults to True.
        threads: number of threads of the interpreter for measurements. Defaults to 1.
        batch: batch size for measurements, if the batch size of the model is dynamic. Defaults to
            1.
        quantize: values that may be quantized to 8 bits. None, the default, quantizes no values.
            ``"weights"`` quantizes a weight if this serves ``optimize``. ``"full"`` quantizes all
            values: TensorFlow's converter takes the ranges of the values from ``representative``.
            Zeros stay zeros.
        representative: typical samples for ``quantize="full"``, in every form that `model.predict`
            takes. Arrays are read completely. From a data set or generator, the first 1000 samples
            are read. The samples are also the default of ``inputs``.
        evaluate: data for the accuracy in the report: ``(x, y)``, or a data set, data loader or
            generator of batches ``(x, y)``. Labels are integers or one-hot vectors. Sample weights
            are ignored. Alternatively, a function of ``predict`` that returns a number. ``predict``
            takes inputs like `model.predict`, and returns the outputs of a file. Defaults to None,
            which measures no accuracy.
        vela_path: path of the file that Vela compiles for the NPU, in an existing folder. Defaults
            to None, which does not write the compiled file.
        progress: function that is called with a line of text before each step.

    Returns:
        An `ExportReport` with the format of every weight and the error of the file. The report
        compares the bytes, latency, load time, peak memory and accuracy of the file with dense
        files.

    Raises:
        TypeError: ``model`` is not a Keras 3 model.
        ValueError: the model is not built, the data does not fit the model, or an option is
            unknown.
        OSError: ``path`` cannot be written. The path is checked before the conversion begins.
        ImportError: the packages of ``keras_dst[export]`` are missing, of ``keras_dst[micro]`` with
            ``target="micro"``, or of ``keras_dst[ethos]`` with ``vela_path``.
        ExportError: the model could not be converted, or the file does not compute the outputs of
            the model. The message names the op or weight that is wrong. No file is written.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> report = export_tflite(model, "model.tflite", optimize="latency")
    """
    check_exportable(model)
    file = Path(path)
    check_writable(file)
    check_option("optimize", optimize, ("latency", "size", "balanced"))
    check_option("quantize", quantize, (None, "weights", "full"))
    threads, batch = check_integer(threads, "threads"), check_integer(batch, "batch")
    if (quantize == "full") != (representative is not None):
        raise ValueError(
            "Expected representative= together with quantize='full', and neither alone. "
            f"Received: quantize={quantize!r}, representative "
            f"{'missing' if representative is None else 'given'}. Fix: pass samples of the "
            "training data, for example representative=x[:200]."
        )
    if tolerance is not None and not (is_number(tolerance) and 0 <= tolerance < float("inf")):
        raise ValueError(f"Expected a finite tolerance of 0 or more. Received: {tolerance}.")
    check_installed("tensorflow", "ai_edge_litert", "flatbuffers")
    # The pipeline needs optional packages, but `import keras_dst` must work without these packages.
    from keras_dst.export.ethos import ACCELERATORS, NEEDS_VELA, vela_version
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
            f"Expected no optimize= with target={target!r}, which has one format per weight. "
            f"Received: optimize={optimize!r}. Fix: do not pass optimize=."
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
        compiled = Path(vela_path)
        check_writable(compiled)
    limit = TOLERANCES[quantize] if tolerance is None else tolerance
    settings = Settings(
        *(limit, optimize, target, measure and not integer, threads, batch, quantize),
        *(inputs, representative, evaluate, compiled),
    )
    return export(model, file, settings, progress)


def check_option(name: str, value: Any, known: tuple) -> None:
    """Raise ValueError unless an argument has one of the known values."""
    if value not in known:
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
    """Raise ImportError unless these optional packages are installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"Working with .tflite files needs {' and '.join(missing)}. "
            "Fix: pip install keras_dst[export]."
        )
