"""``export_tflite``: the way into this package, which checks what it is given."""

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
    progress: Callable[[str], None] = lambda line: None,
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
            every output. Default: 1e-4; with ``quantize`` 0.1 for weights, 0.3 in full.
            The file must then also be close to a dense one of the same rounded weights.
        optimize: what the form of every weight is chosen for. ``"latency"``: the fastest, and of
            equally fast ones the smallest. ``"size"``: the smallest, and of equally small ones the
            fastest. ``"balanced"``: the least product of bytes and latency, of the forms that are
            not slower than dense.
        target: the CPU that latency is about: ``"host"`` is this one, ``"arm"`` one without AVX,
            ``"any"`` both, of which the slower counts.
        measure: whether latencies of this CPU are measured. Otherwise, and for another CPU, they
            come from a model of its kernels.
        threads: threads of the interpreter, for measuring.
        batch: batch size for measuring, where the model leaves it open.
        quantize: what may be rounded to 8 bits. None: nothing. ``"weights"``: weights, one by one
            where that is better. ``"full"``: all values, by the converter of TensorFlow, with
            ranges from ``representative``. Zeros stay zeros.
        representative: samples of what the model will be used on, as for `model.predict`, for
            ``quantize="full"``. Then they are the default of ``inputs`` too.
        evaluate: what the accuracy in the report is found on: ``(x, y)``, with labels as integers
            or one-hot; or a function of ``predict`` that gives a number, where ``predict`` takes
            inputs as `model.predict` does and gives the outputs of a file. Default: none.
        progress: called with a line on what is being done.

    Returns:
        An `ExportReport`: the form of every weight, the error; bytes, latency, load time, peak
        memory and accuracy of the file beside those of dense ones.

    Raises:
        TypeError: ``model`` is not a Keras 3 model.
        ValueError: an unbuilt model, ``inputs`` that do not fit it, or an unknown option.
        OSError: a ``path`` that cannot be written, before any work is done.
        ImportError: the packages of ``keras_dst[export]`` are missing.
        ExportError: the conversion failed, or the file does not compute what the model does; it
            names the weight at fault. Nothing is written.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> report = export_tflite(model, "model.tflite", optimize="latency")
    """
    check_exportable(model)
    file = _checked_path(path)
    _check_option("optimize", optimize, ("latency", "size", "balanced"))
    _check_option("target", target, ("host", "arm", "any"))
    _check_option("quantize", quantize, (None, "weights", "full"))
    for name, number in (("threads", threads), ("batch", batch)):
        check_integer(number, name)
    pair = isinstance(evaluate, tuple | list) and len(evaluate) == 2
    if not (evaluate is None or callable(evaluate) or pair):
        raise ValueError(
            "Expected evaluate=(x, y), or a function of predict. "
            f"Received: {type(evaluate).__name__}."
        )
    if (quantize == "full") != (representative is not None):
        raise ValueError(
            "Expected representative samples with quantize='full', and only then. Received: "
            f"quantize={quantize!r}, representative "
            f"{'missing' if representative is None else 'given'}. "
            "Fix: pass representative=x[:200], say, of the training data."
        )
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ValueError(f"Expected a finite tolerance of 0 or more. Received: {tolerance}.")
    check_installed("tensorflow", "ai_edge_litert", "flatbuffers")
    # Not above: keras_dst works without these packages until something is exported.
    from keras_dst.export.pipeline import TOLERANCES, Settings, export

    limit = TOLERANCES[quantize] if tolerance is None else tolerance
    settings = Settings(
        limit, optimize, target, measure, threads, batch, quantize, representative, evaluate
    )
    return export(model, file, inputs, settings, progress)


def _check_option(name: str, value: Any, known: tuple) -> None:
    if value not in known:
        raise ValueError(
            f"Expected {name} to be one of {', '.join(map(repr, known))}. Received: {value!r}."
        )


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
    check_writable(target)
    return target


def check_installed(*packages: str) -> None:
    """Raise unless these packages are there, which `import keras_dst` does without."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"Working with .tflite files needs {' and '.join(missing)}. "
            "Fix: pip install keras_dst[export]."
        )
