"""Model to file: convert, choose, encode, verify, and only then write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras

from keras_dst.export.choose import Choice, choose, encoded
from keras_dst.export.convert import to_tflite
from keras_dst.export.report import ExportError, ExportReport, TensorReport, gzip_bytes
from keras_dst.export.verify import Case, deviation, keras_cases
from keras_dst.files import whole_or_not


def export(model: keras.Model, path: Path, inputs: Any, tolerance: float) -> ExportReport:
    """What `keras_dst.export_tflite` does once its arguments have been checked."""
    dense = to_tflite(model)
    choices = choose(dense)
    content = encoded(dense, choices)
    cases = keras_cases(model, dense, inputs)
    found = deviation(content, cases)
    if found.error > tolerance:
        raise ExportError(
            f"Expected {path.name} to compute what the Keras model does, within {tolerance:.0e}. "
            f"Received: an error of {found.error:.1e} in {found.where}. Nothing was written. "
            + _culprit(dense, choices, cases, tolerance)
        )
    with whole_or_not(path) as unfinished:
        unfinished.write_bytes(content)
    return ExportReport(
        path=path,
        bytes=len(content),
        gzip_bytes=gzip_bytes(content),
        dense_bytes=len(dense),
        dense_gzip_bytes=gzip_bytes(dense),
        tensors=[_tensor_report(choice) for choice in choices],
        max_error=found.error,
    )


def _culprit(dense: bytes, choices: list[Choice], cases: list[Case], tolerance: float) -> str:
    """What makes a file wrong: the conversion itself, or the weights that alone do so too."""
    plain = deviation(dense, cases)
    if plain.error > tolerance:
        return (
            f"The dense conversion by TensorFlow already differs, by {plain.error:.1e} in "
            f"{plain.where}: no sparse weight is at fault."
        )
    guilty = [
        f"{choice.weight.name!r} ({choice.weight.op}, {choice.form})"
        for choice in choices
        if deviation(encoded(dense, [choice]), cases).error > tolerance
    ]
    if not guilty:
        return "The dense conversion agrees, and so does every sparse weight alone."
    return f"The dense conversion agrees; at fault: {', '.join(guilty)}."


def _tensor_report(choice: Choice) -> TensorReport:
    weight = choice.weight
    return TensorReport(
        name=weight.name,
        op=weight.op,
        shape=weight.values.shape,
        density=weight.density,
        encoding=str(choice.form or "dense"),
        bytes=choice.bytes,
        dense_bytes=weight.values.nbytes,
        reason=choice.reason,
    )
