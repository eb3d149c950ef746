"""Export a model: read data, convert, select formats, encode, compare, measure and write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_dst._utils.files import atomic_write
from keras_dst.export import encode
from keras_dst.export.convert import check_convertible, conversions
from keras_dst.export.encode import Format
from keras_dst.export.ethos import NEEDS_VELA, compile_for_npu, vela_version
from keras_dst.export.flatbuffer import read
from keras_dst.export.latency_model import CPUS, LatencyModel, this_cpu
from keras_dst.export.measure import latencies, loads_and_latencies
from keras_dst.export.memory import peak_memory
from keras_dst.export.micro import (
    check_ops,
    encode_for_micro,
    quantized_inputs,
    report_for,
)
from keras_dst.export.origins import layer_names
from keras_dst.export.quantize import dequantize, steps
from keras_dst.export.report import (
    ExportError,
    ExportReport,
    FileReport,
    TensorReport,
    gzip_bytes,
)
from keras_dst.export.samples import (
    MAX_CALIBRATION_SAMPLES,
    MAX_SAMPLES,
    Samples,
    Signature,
    fixed_batch,
    open_shapes,
    random_samples,
    read_labeled,
    read_samples,
    signature_of,
)
from keras_dst.export.selection import Choice, Objective, Plan, select_formats
from keras_dst.export.target_reports import ACCELERATORS, MicroReport, VelaReport
from keras_dst.export.verify import (
    Case,
    Deviation,
    by_input_name,
    deviation,
    deviation_between,
    keras_cases,
    predictor,
)

#: Default of the argument `tolerance` for each value of the argument `quantize`.
TOLERANCES = {None: 1e-4, "weights": 0.1, "full": 0.3}
#: Largest accepted difference between the outputs of the exported file and of a dense file with the
#: same quantized weights.
_EXACT = 1e-4
#: Replaces `_EXACT` as the largest accepted difference if the runtime also quantizes the inputs of
#: ops. In this case, kernels for sparse weights and kernels for dense weights round inputs
#: differently.
_INEXACT = 5e-2


@dataclass(frozen=True)
class Settings:
    """Checked arguments of `keras_dst.export_tflite`."""

    tolerance: float
    optimize: str = "balanced"
    target: str = "host"
    measure: bool = True
    threads: int = 1
    batch: int = 1
    quantize: str | None = None
    inputs: Any = None
    representative: Any = None
    evaluate: Any = None
    vela_path: Path | None = None

    @property
    def npu(self) -> bool:
        """Whether the file is for an Ethos-U NPU."""
        return self.target in ACCELERATORS

    @property
    def micro(self) -> bool:
        """Whether the file is for a microcontroller."""
        return self.target == "micro"

    def objective(self, shapes: dict[str, tuple[int, ...]]) -> Objective:
        """Return the criterion by which storage formats are selected.

        `shapes` contains the shapes of inputs with dynamic axes, see `latencies`.
        """
        here = this_cpu()
        cpus = {"host": [here], "arm": ["arm"], "any": sorted({here, "arm"})}[self.target]
        measured = functools.partial(
            latencies, threads=self.threads, batch=self.batch, shapes=shapes
        )
        timers = [
            measured if self.measure and cpu == here else LatencyModel(CPUS[cpu], self.batch)
            for cpu in cpus
        ]
        return Objective(self.optimize, tuple(timers), self.quantize == "weights")


@dataclass(frozen=True)
class _Data:
    """Samples and labels that the user passed to an export, as arrays.

    Attributes:
        signature: Descriptions of the inputs of the exported file.
        samples: Samples on which the file is compared with the model.
        shapes: Result of `open_shapes`, for measurements.
        calibration: Samples on which the converter measures the ranges of activations. None without
            full quantization.
        evaluate: The function that the user passed as `evaluate`, a pair of samples and labels, or
            None if accuracy is not measured.
    """

    signature: Signature
    samples: Samples
    shapes: dict[str, tuple[int, ...]]
    calibration: Samples | None
    evaluate: Any


def export(
    model: keras.Model, path: Path, settings: Settings, progress: Callable[[str], None]
) -> ExportReport:
    """Export a model. The caller has already checked all arguments except the samples and
    labels."""
    data = _read_data(model, settings)
    progress("converting")
    full = settings.quantize == "full"
    integer = settings.npu or settings.micro
    second = "integer" if integer else "int8" if full else "dynamic"
    kinds = ["float32"] + [second] * (full or settings.measure)
    files = dict(zip(kinds, conversions(model, kinds, data.signature, data.calibration)))
    files["float32"] = encode.with_positive_zeros(files["float32"])
    base = files[second if full else "float32"]
    if integer:
        plan = _dense_plan(base)
    else:
        plan = select_formats(base, settings.objective(data.shapes), progress)
    progress("comparing with the model")
    cases = keras_cases(model, data.signature, data.samples)
    _check_outputs(cases, settings)
    found = deviation(plan.content, cases)
    wrong = _find_fault(found, base, plan, cases, settings)
    if wrong:
        raise ExportError(
            f"Expected {path.name} to compute the outputs of the Keras model, within "
            f"{settings.tolerance:.0e}. Received: an error of {wrong.error:.1e} in {wrong.where}. "
            f"Nothing was written. {_explain_fault(base, plan.choices, cases, settings)}"
        )
    compiled, vela = _compile(plan.content, settings, progress)
    content, tensors, micro = plan.content, [_tensor_report(c) for c in plan.choices], None
    if settings.micro:
        check_ops(base, layer_names(model))
        content, tensors, micro = _encode_for_micro(base, data, progress)
    progress("measuring")
    # For an NPU, the exported file is the dense int8 file, so the dense int8 file is not listed
    # twice.
    others = [files["float32"]] if settings.npu else list(files.values())
    compared = _compare(model, others if settings.micro else [*others, content], data, settings)
    # LiteRT cannot run a file for TFLM, so the accuracy of the exported file cannot be measured.
    # The dense int8 file computes the same outputs, so the report contains its accuracy instead.
    if settings.micro:
        sizes = (len(content), gzip_bytes(content))
        compared.append(
            replace(compared[-1], name="this file", bytes=sizes[0], gzip_bytes=sizes[1])
        )
    before, after = compared[0], compared[-1]
    rounded, unmatched = _rounded_to_zero(files["float32"], base) if full else (0, [])
    notes = [NEEDS_VELA] if settings.npu and vela is None else []
    if unmatched:
        notes.append(
            "The number of weights that int8 rounds to zero does not include the following "
            f"weights, which equal no float32 weight: {', '.join(unmatched)}."
        )
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(content)
    if settings.vela_path is not None:
        with atomic_write(settings.vela_path) as unfinished:
            unfinished.write_bytes(compiled)
    return ExportReport(
        path=path,
        bytes=after.bytes,
        gzip_bytes=after.gzip_bytes,
        dense_bytes=before.bytes,
        dense_gzip_bytes=before.gzip_bytes,
        tensors=tensors,
        max_error=found.error,
        files=compared,
        threads=settings.threads,
        batch=settings.batch,
        shapes=data.shapes,
        vela=vela,
        micro=micro,
        rounded_to_zero=rounded,
        note=" ".join(notes),
    )


def _encode_for_micro(
    dense: bytes, data: _Data, progress: Callable[[str], None]
) -> tuple[bytes, list[TensorReport], MicroReport]:
    """Encode a dense int8 file for microcontrollers, and run the result in TFLM on all samples."""
    progress("running the file in TensorFlow Lite for Microcontrollers")
    content, tensors = encode_for_micro(dense)
    inputs = quantized_inputs(dense, by_input_name(data.samples, data.signature))
    return content, tensors, report_for(content, dense, inputs)


def _rounded_to_zero(floats: bytes, integers: bytes) -> tuple[int, list[str]]:
    """Return the number of nonzero weights of a float file that are zero in the int8 file.

    The converter may rename weight tensors. The function therefore compares values to find the
    float tensor from which each int8 tensor was quantized. The second return value lists the names
    of the int8 tensors for which no float tensor was found.
    """
    originals = [weight.values for weight in encode.weights(read(floats))]
    count, unmatched = 0, []
    for weight in encode.weights(read(integers)):
        parameters = weight.tensors[0].quantization
        if weight.values.dtype != np.int8 or parameters is None or parameters.scale is None:
            continue
        values = dequantize(weight.values, parameters)
        # Rounding to int8 changes a value by up to half a step, or slightly more, because the
        # scales are rounded too.
        limit = 0.51 * steps(weight.values, parameters)
        original = next((w for w in originals if _agree(values, w, limit)), None)
        if original is None:
            unmatched.append(weight.name)
        else:
            count += int(((original != 0) & (values == 0)).sum())
    return count, unmatched


def _agree(values: np.ndarray, others: np.ndarray, limit: np.ndarray) -> bool:
    """Return whether two weight tensors have the same shape and differ by at most `limit`."""
    return values.shape == others.shape and bool((np.abs(values - others) <= limit).all())


def _dense_plan(content: bytes) -> Plan:
    """Return a `Plan` in which every weight tensor of an int8 file stays dense."""
    reason = "an NPU needs dense weights, which Vela compresses"
    found = encode.weights(read(content))
    return Plan([Choice(weight, None, weight.values.nbytes, reason) for weight in found], content)


def _compile(
    content: bytes, settings: Settings, progress: Callable[[str], None]
) -> tuple[bytes, VelaReport | None]:
    """Compile a file with Vela if the target is an NPU and Vela is installed.

    Returns:
        The compiled file and Vela's report, or ``(b"", None)`` if Vela did not run.
    """
    if not settings.npu or vela_version() is None:
        return b"", None
    progress("running Vela")
    return compile_for_npu(content, settings.target)


def _read_data(model: keras.Model, settings: Settings) -> _Data:
    """Read and check all samples and labels that the user passed, before the conversion begins."""
    calibration = samples = None
    if settings.representative is not None:
        calibration = read_samples(
            model, settings.representative, "representative", streamed=MAX_CALIBRATION_SAMPLES
        )
        batch = fixed_batch(signature_of(model, calibration).specs) or 1
        samples = calibration[: max(MAX_SAMPLES, batch)]
    if settings.inputs is not None:
        samples = read_samples(model, settings.inputs, "inputs", limit=MAX_SAMPLES)
    signature = signature_of(model, samples)
    if calibration and signature_of(model, calibration) != signature:
        raise ValueError(
            "Expected inputs= and representative= with arrays for the same inputs of the model. "
            "Received: an optional input that is None in only one of the two arguments."
        )
    # `conversions` also runs this check, but its errors must come before those of `random_samples`.
    check_convertible(model, signature, settings.quantize == "full")
    if samples is None:
        samples = random_samples(model, signature)
    evaluate = settings.evaluate
    if not (evaluate is None or callable(evaluate)):
        outputs = getattr(model, "outputs", None)
        _check_classes(outputs)
        evaluate = read_labeled(model, evaluate)
        if outputs is not None:
            _check_labels(evaluate[1], outputs[0].shape)
    shapes = open_shapes(signature, samples, settings.batch)
    return _Data(signature, samples, shapes, calibration, evaluate)


def _compare(
    model: keras.Model, files: list[bytes], data: _Data, settings: Settings
) -> list[FileReport]:
    """Return one `FileReport` per file.

    `files` lists the dense float32 file first, and then the dense int8 file, if there is one. The
    exported file is last, except for `target="micro"`, where `files` lists only dense files.
    """
    nothing: Sequence[None] = [None] * len(files)
    loads: Sequence[float | None] = nothing
    times: Sequence[float | None] = nothing
    memory: Sequence[int | None] = nothing
    if settings.measure:
        threads, batch, shapes = settings.threads, settings.batch, data.shapes
        loads, times = loads_and_latencies(files, threads=threads, batch=batch, shapes=shapes)
        memory = [
            peak_memory(content, threads=threads, batch=batch, shapes=shapes) for content in files
        ]
    accuracy = [_accuracy(model, content, data) for content in files]
    last = "dense int8" if settings.micro else "this file"
    names = ["dense float32", *["dense int8"] * (len(files) - 2), last]
    return [
        FileReport(name, len(content), gzip_bytes(content), *figures)
        for name, content, *figures in zip(names, files, times, loads, memory, accuracy)
    ]


def _accuracy(model: keras.Model, content: bytes, data: _Data) -> float | None:
    if data.evaluate is None:
        return None
    predict = predictor(model, content, data.signature)
    if callable(data.evaluate):
        return float(data.evaluate(predict))
    samples, labels = data.evaluate
    outputs = predict(samples)
    _check_classes(list(outputs.values()) if isinstance(outputs, dict) else [outputs])
    _check_labels(labels, outputs.shape)
    one_hot = _is_one_hot(labels, outputs.shape)
    if not one_hot and labels.size != outputs[..., 0].size:
        raise ValueError(
            "Expected one integer label per prediction, or one-hot labels, in evaluate. "
            f"Received: labels of shape {labels.shape} for outputs of shape {outputs.shape}."
        )
    classes = labels.argmax(-1) if one_hot else labels.reshape(outputs.shape[:-1])
    return float((outputs.argmax(-1) == classes).mean())


def _is_one_hot(labels: np.ndarray, outputs: Sequence[int | None]) -> bool:
    """Return whether labels have one value per class, for outputs of the given shape."""
    return labels.ndim == len(outputs) and labels.shape[-1] == outputs[-1]


def _check_labels(labels: np.ndarray, outputs: Sequence[int | None]) -> None:
    """Raise ValueError unless labels are integers or one-hot vectors, for outputs of the given
    shape. Smoothed one-hot vectors are valid."""
    valid = labels.dtype.kind in "biuf"
    if valid and _is_one_hot(labels, outputs):
        largest = labels == labels.max(-1, keepdims=True)
        valid = bool((largest.sum(-1) == 1).all()) and np.allclose(labels.sum(-1), 1, atol=1e-2)
    elif valid:
        valid = bool((labels == np.rint(labels)).all())
    if not valid:
        raise ValueError(
            "Expected integers or one-hot vectors as labels in evaluate, because evaluate= is not "
            f"a function. Received: labels of type {labels.dtype} and shape {labels.shape} with "
            "other values. Fix: pass evaluate=lambda predict: ..., a function that returns the "
            "metric."
        )


def _check_classes(outputs: Sequence | None) -> None:
    """Raise ValueError unless the model has exactly one output, with one value per class."""
    if outputs is None:
        return
    if len(outputs) != 1 or len(outputs[0].shape) < 2 or (outputs[0].shape[-1] or 2) < 2:
        raise ValueError(
            "Expected a model with one output that has a value for each class, because evaluate= "
            f"is not a function. Received: outputs of shapes {[tuple(y.shape) for y in outputs]}. "
            "Fix: pass evaluate=lambda predict: ..., a function that returns the metric."
        )


def _check_outputs(cases: list[Case], settings: Settings) -> None:
    """Raise ExportError if the Keras model returns values that no file can reproduce."""
    for case in cases:
        for name, y in case.outputs.items():
            if y.dtype.kind not in "fc":
                continue
            if np.isnan(y).any():
                raise ExportError(
                    f"Expected a Keras model whose outputs are numbers. Received: NaN in output "
                    f"{name!r}. Nothing was written. Fix: pass inputs= with samples for which the "
                    "model returns no NaN, or train the model again."
                )
            if settings.quantize == "full" and np.isinf(y).any():
                raise ExportError(
                    "Expected finite outputs of the Keras model for quantize='full'. Received: "
                    f"infinity in output {name!r}, which int8 cannot represent. Nothing was "
                    "written. Fix: replace infinity by a finite number, or use quantize='weights'."
                )


def _find_fault(
    found: Deviation, base: bytes, plan: Plan, cases: list[Case], settings: Settings
) -> Deviation | None:
    """Return a `Deviation` of the file's outputs that is too large, or None if all outputs are
    accurate."""
    if found.error > settings.tolerance:
        return found
    if settings.quantize:
        reference = encode.encode_dense(base, plan.formats)
        rounded = deviation_between(plan.content, reference, cases)
        hybrid = any(f.int8 and not f.unpack for f in plan.formats.values())
        if rounded.error > (_INEXACT if hybrid or settings.quantize == "full" else _EXACT):
            return replace(
                rounded,
                where=f"{rounded.where}, relative to a file that stores the same weights dense",
            )
    return None


def _explain_fault(
    base: bytes, choices: list[Choice], cases: list[Case], settings: Settings
) -> str:
    """Return a text that says whether the dense conversion or sparse weights caused a wrong
    result."""
    plain = deviation(base, cases)
    if plain.error > settings.tolerance:
        larger = ", or pass a larger tolerance=" if np.isfinite(plain.error) else ""
        return (
            f"The dense conversion by TensorFlow already differs, by {plain.error:.1e} in "
            f"{plain.where}: no sparse weight causes the fault. Fix: use keras.ops that compute "
            f"the same on TensorFlow{larger}."
        )
    guilty = [
        f"{choice.weight.name!r} ({choice.weight.op}, {choice.format})"
        for choice in choices
        if choice.format and _is_guilty(base, choice, choice.format, cases, settings)
    ]
    if not guilty:
        return "The dense conversion is correct, and every sparse weight is correct individually."
    return f"The dense conversion is correct. Sparse weights at fault: {', '.join(guilty)}."


def _is_guilty(
    base: bytes, choice: Choice, format: Format, cases: list[Case], settings: Settings
) -> bool:
    alone = Plan([choice], encode.encode(base, {choice.weight.buffer: format}))
    found = deviation(alone.content, cases)
    return _find_fault(found, base, alone, cases, settings) is not None


def _tensor_report(choice: Choice) -> TensorReport:
    weight = choice.weight
    return TensorReport(
        name=weight.name,
        op=weight.op,
        shape=weight.values.shape,
        density=weight.density,
        encoding=_encoding(choice),
        bytes=choice.bytes,
        dense_bytes=weight.values.nbytes,
        reason=choice.reason,
    )


def _encoding(choice: Choice) -> str:
    if choice.weight.values.dtype == "int8":
        return f"int8 {choice.format}" if choice.format else "int8"
    return str(choice.format or "dense")
