"""Model to file: convert, choose, encode, verify, measure, and only then write."""

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
from keras_dst.export.choose import Choice, Goal, Plan, choose
from keras_dst.export.convert import conversions
from keras_dst.export.cost import CPUS, Modelled, this_cpu
from keras_dst.export.encode import Form
from keras_dst.export.measure import latencies, loads_and_latencies
from keras_dst.export.memory import peak_memory
from keras_dst.export.report import (
    ExportError,
    ExportReport,
    FileReport,
    TensorReport,
    gzip_bytes,
)
from keras_dst.export.verify import Case, Deviation, deviation, difference, keras_cases, predictor

#: The largest error against Keras that passes by default, by what is rounded.
TOLERANCES = {None: 1e-4, "weights": 0.1, "full": 0.3}
#: The largest error against a dense file of the same rounded weights.
_EXACT = 1e-4
#: The same where the runtime rounds the inputs of ops as well, by kernels that differ in that.
_INEXACT = 5e-2


@dataclass(frozen=True)
class Settings:
    """What `keras_dst.export_tflite` was asked for, checked."""

    tolerance: float
    optimize: str = "balanced"
    target: str = "host"
    measure: bool = True
    threads: int = 1
    batch: int = 1
    quantize: str | None = None
    representative: Any = None
    evaluate: Any = None

    def goal(self) -> Goal:
        """What the choice of forms is for."""
        here = this_cpu()
        cpus = {"host": [here], "arm": ["arm"], "any": sorted({here, "arm"})}[self.target]
        measured = functools.partial(latencies, threads=self.threads, batch=self.batch)
        clocks = [
            measured if self.measure and cpu == here else Modelled(CPUS[cpu], self.batch)
            for cpu in cpus
        ]
        return Goal(self.optimize, tuple(clocks), self.quantize == "weights")


def export(
    model: keras.Model,
    path: Path,
    inputs: Any,
    settings: Settings,
    progress: Callable[[str], None],
) -> ExportReport:
    """What `keras_dst.export_tflite` does once its arguments have been checked."""
    progress("converting")
    full = settings.quantize == "full"
    kinds = ["float32"] + (["int8"] if full else ["dynamic"] * settings.measure)
    files = dict(zip(kinds, conversions(model, kinds, settings.representative)))
    dense, base = files["float32"], files["int8" if full else "float32"]
    plan = choose(base, settings.goal(), progress)
    progress("comparing with the model")
    cases = keras_cases(model, dense, settings.representative if inputs is None else inputs)
    found = deviation(plan.content, cases)
    wrong = _fault(found, base, plan, cases, settings)
    if wrong:
        raise ExportError(
            f"Expected {path.name} to compute what the Keras model does, within "
            f"{settings.tolerance:.0e}. Received: an error of {wrong.error:.1e} in {wrong.where}. "
            f"Nothing was written. {_culprit(base, plan.choices, cases, settings)}"
        )
    progress("measuring")
    compared = _compared(model, [*files.values(), plan.content], settings)
    before, after = compared[0], compared[-1]
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(plan.content)
    return ExportReport(
        path=path,
        bytes=after.bytes,
        gzip_bytes=after.gzip_bytes,
        dense_bytes=before.bytes,
        dense_gzip_bytes=before.gzip_bytes,
        tensors=[_tensor_report(choice) for choice in plan.choices],
        max_error=found.error,
        files=compared,
        threads=settings.threads,
        batch=settings.batch,
    )


def _compared(model: keras.Model, contents: list[bytes], settings: Settings) -> list[FileReport]:
    """The dense files and the one to be written, last, side by side."""
    at = {"threads": settings.threads, "batch": settings.batch}
    nothing: Sequence[None] = [None] * len(contents)
    loads: Sequence[float | None] = nothing
    times: Sequence[float | None] = nothing
    memory: Sequence[int | None] = nothing
    if settings.measure:
        loads, times = loads_and_latencies(contents, **at)
        memory = [peak_memory(content, **at) for content in contents]
    accuracy = [_accuracy(model, content, settings.evaluate) for content in contents]
    names = ["dense float32", *["dense int8"] * (len(contents) - 2), "this file"]
    return [
        FileReport(name, len(content), gzip_bytes(content), *figures)
        for name, content, *figures in zip(names, contents, times, loads, memory, accuracy)
    ]


def _accuracy(model: keras.Model, content: bytes, evaluate: Any) -> float | None:
    if evaluate is None:
        return None
    predict = predictor(model, content)
    if callable(evaluate):
        return float(evaluate(predict))
    inputs, labels = evaluate
    outputs = predict(inputs)
    if isinstance(outputs, dict) or outputs.shape[-1] < 2:
        raise ValueError(
            "Expected a model with one output of a value per class for evaluate=(x, y). Received: "
            f"{len(outputs) if isinstance(outputs, dict) else 'one'} output(s) of another kind. "
            "Fix: pass evaluate=lambda predict: ..., which gives the metric."
        )
    labels = np.asarray(labels)
    one_hot = labels.ndim == outputs.ndim and labels.shape[-1] == outputs.shape[-1]
    classes = labels.argmax(-1) if one_hot else labels.reshape(outputs.shape[:-1])
    return float((outputs.argmax(-1) == classes).mean())


def _fault(
    found: Deviation, base: bytes, plan: Plan, cases: list[Case], settings: Settings
) -> Deviation | None:
    """What is wrong with a file: it is far from Keras, or from a dense one of the same weights."""
    if found.error > settings.tolerance:
        return found
    if settings.quantize:
        rounded = difference(plan.content, encode.stored_dense(base, plan.forms), cases)
        hybrid = any(form.int8 and not form.unpack for form in plan.forms.values())
        if rounded.error > (_INEXACT if hybrid or settings.quantize == "full" else _EXACT):
            return replace(rounded, where=f"{rounded.where}, from the same weights stored dense")
    return None


def _culprit(base: bytes, choices: list[Choice], cases: list[Case], settings: Settings) -> str:
    """What makes a file wrong: the conversion itself, or the weights that alone do so too."""
    plain = deviation(base, cases)
    if plain.error > settings.tolerance:
        return (
            f"The dense conversion by TensorFlow already differs, by {plain.error:.1e} in "
            f"{plain.where}: no sparse weight is at fault."
        )
    guilty = [
        f"{choice.weight.name!r} ({choice.weight.op}, {choice.form})"
        for choice in choices
        if choice.form and _is_guilty(base, choice, choice.form, cases, settings)
    ]
    if not guilty:
        return "The dense conversion agrees, and so does every sparse weight alone."
    return f"The dense conversion agrees; at fault: {', '.join(guilty)}."


def _is_guilty(
    base: bytes, choice: Choice, form: Form, cases: list[Case], settings: Settings
) -> bool:
    alone = Plan([choice], encode.encode(base, {choice.weight.buffer: form}))
    found = deviation(alone.content, cases)
    return _fault(found, base, alone, cases, settings) is not None


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
        return f"int8 {choice.form}" if choice.form else "int8"
    return str(choice.form or "dense")
