"""Model to file: convert, choose, encode, verify, write, and only then measure and report."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras

from keras_dst.export import encode
from keras_dst.export.choose import Choice, Goal, Plan, choose
from keras_dst.export.convert import conversions
from keras_dst.export.cost import CPUS, Modelled, this_cpu
from keras_dst.export.measure import latencies
from keras_dst.export.report import ExportError, ExportReport, TensorReport, gzip_bytes
from keras_dst.export.verify import Case, Deviation, deviation, difference, keras_cases
from keras_dst.files import whole_or_not

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
    kinds = ["float32"] + ["int8"] * (settings.quantize == "full")
    files = conversions(model, kinds, settings.representative)
    dense, base = files[0], files[-1]
    plan = choose(base, settings.goal(), progress)
    progress("comparing with the model")
    cases = keras_cases(model, dense, settings.representative if inputs is None else inputs)
    wrong = _fault(base, plan, cases, settings)
    if wrong:
        raise ExportError(
            f"Expected {path.name} to compute what the Keras model does, within "
            f"{settings.tolerance:.0e}. Received: an error of {wrong.error:.1e} in {wrong.where}. "
            f"Nothing was written. {_culprit(base, plan.choices, cases, settings)}"
        )
    with whole_or_not(path) as unfinished:
        unfinished.write_bytes(plan.content)
    return ExportReport(
        path=path,
        bytes=len(plan.content),
        gzip_bytes=gzip_bytes(plan.content),
        dense_bytes=len(dense),
        dense_gzip_bytes=gzip_bytes(dense),
        tensors=[_tensor_report(choice) for choice in plan.choices],
        max_error=deviation(plan.content, cases).error,
    )


def _fault(base: bytes, plan: Plan, cases: list[Case], settings: Settings) -> Deviation | None:
    """What is wrong with a file: it is far from Keras, or from a dense one of the same weights."""
    found = deviation(plan.content, cases)
    if found.error > settings.tolerance:
        return found
    if settings.quantize:
        forms = {choice.weight.buffer: choice.form for choice in plan.choices if choice.form}
        rounded = difference(plan.content, encode.stored_dense(base, forms), cases)
        hybrid = any(form.int8 and not form.unpack for form in forms.values())
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
        if choice.form and _fault(base, _alone(base, choice), cases, settings)
    ]
    if not guilty:
        return "The dense conversion agrees, and so does every sparse weight alone."
    return f"The dense conversion agrees; at fault: {', '.join(guilty)}."


def _alone(base: bytes, choice: Choice) -> Plan:
    assert choice.form
    return Plan([choice], encode.encode(base, {choice.weight.buffer: choice.form}))


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
