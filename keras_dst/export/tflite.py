"""``export_tflite``: check the arguments of an export, then run it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_dst._utils.files import check_writable
from keras_dst._utils.validation import check_integer
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
    """Write a model as a ``.tflite`` file with sparse weights, after running and comparing it.

    The file is run in the LiteRT interpreter, with XNNPACK and without it, and compared with the
    outputs of the model. It is written only if the outputs agree. The model is not changed.

    Args:
        model: a built Keras 3 model on any backend: sparse, stripped or never sparse. A sparse
            input becomes a dense input of the file. Optional inputs that are None in ``inputs`` or
            ``representative`` are left out of the file. States of recurrent layers begin at zero.
        path: the file to write, in an existing folder. An existing file is replaced.
        inputs: samples for the comparison, in every form that `model.predict` takes: arrays, or a
            data set, data loader or generator of batches. The first 32 samples are used. Defaults
            to seeded random samples (floats: standard normal; integers: zeros and ones). Models
            with string inputs need this argument.
        tolerance: largest accepted error, ``max|y - y_keras| / max(max|y_keras|, 1e-6)`` of each
            output. Defaults to 1e-4, to 0.1 with ``quantize="weights"``, and to 0.3 with
            ``quantize="full"``. A quantized file must also agree with a dense file of the same
            quantized weights: to 1e-4, or to 0.05 if the ops compute with integers.
        optimize: criterion by which the storage format of every weight is selected. ``"latency"``
            selects the fastest format and, among equally fast formats, the smallest. ``"size"``
            selects the smallest format and, among equally small formats, the fastest.
            ``"balanced"``, the default, selects the least product of bytes and latency among the
            formats that are not slower than dense.
        target: CPU for which latency counts: ``"host"``, the default, for this CPU, ``"arm"`` for a
            CPU without AVX, ``"any"`` for both; then the larger latency ratio counts. Or an Arm
            Ethos-U NPU, such as ``"ethos-u55-128"``, with ``quantize="full"``: the file has int8
            inputs and outputs and dense weights. If Vela is installed, the report has its
            estimates. Or ``"micro"`` for TensorFlow Lite for Microcontrollers, with
            ``quantize="full"``: weights are stored without their zeros where this saves bytes. Only
            TFLM runs such a file. With an NPU and with ``"micro"``, nothing is measured on this CPU
            and ``optimize`` keeps its default.
        measure: whether to measure latencies on this CPU. If False, and for other CPUs, a model of
            the kernels estimates them. Defaults to True.
        threads: number of threads of the interpreter for measurements. Defaults to 1.
        batch: batch size for measurements, if the model leaves it open. Defaults to 1.
        quantize: values that may be quantized to 8 bits. None, the default, for no values.
            ``"weights"`` for weights, each only if it serves ``optimize``. ``"full"`` for all
            values: TensorFlow's converter takes their ranges from ``representative``. Zeros stay
            zeros.
        representative: typical samples for ``quantize="full"``, in every form that `model.predict`
            takes. All arrays are read, and the first 1000 samples of a data set or generator. The
            samples are also the default of ``inputs``.
        evaluate: data for the accuracy in the report: ``(x, y)``, or a data set, data loader or
            generator of batches ``(x, y)``. Labels are integers or one-hot. Sample weights are
            ignored. Or a function of ``predict`` that returns a number; ``predict`` takes inputs as
            `model.predict` and returns the outputs of a file. Defaults to None: no accuracy.
        vela_path: path of the file that Vela compiles for the NPU, in an existing folder. Defaults
            to None: the compiled file is not written.
        progress: function that is called with a line of text before each step.

    Returns:
        An `ExportReport`: the format of every weight and the error of the file. It compares bytes,
        latency, load time, peak memory and accuracy with dense files.

    Raises:
        TypeError: ``model`` is not a Keras 3 model.
        ValueError: the model is not built, data does not fit it, or an option is unknown.
        OSError: ``path`` cannot be written. This is checked before any work is done.
        ImportError: the packages of ``keras_dst[export]`` are missing, or ``keras_dst[micro]`` with
            ``target="micro"``, or ``keras_dst[ethos]`` with ``vela_path``.
        ExportError: the model could not be converted, or the file does not compute the outputs of
            the model. The message names the op or the weight at fault. Nothing is written.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> report = export_tflite(model, "model.tflite", optimize="latency")
    """
    check_exportable(model)
    file = Path(path)
    check_writable(file)
    check_option("optimize", optimize, ("latency", "size", "balanced"))
    check_option("quantize", quantize, (None, "weights", "full"))
    check_integer(threads, "threads")
    check_integer(batch, "batch")
    if (quantize == "full") != (representative is not None):
        raise ValueError(
            "Expected representative= with quantize='full', and only then. Received: "
            f"quantize={quantize!r}, representative "
            f"{'missing' if representative is None else 'given'}. "
            "Fix: pass samples of the training data, for example representative=x[:200]."
        )
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ValueError(f"Expected a finite tolerance of 0 or more. Received: {tolerance}.")
    check_installed("tensorflow", "ai_edge_litert", "flatbuffers")
    # The pipeline needs these optional packages, without which `import keras_dst` must work.
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
            f"Received: optimize={optimize!r}. Fix: leave out optimize=."
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
