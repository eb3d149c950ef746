"""Run ``.tflite`` files in the LiteRT interpreter and compare them with the Keras model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from keras_dst._utils.states import reset_states
from keras_dst.export.quantize import to_int8
from keras_dst.export.samples import BATCH, Samples, Signature, fixed_batch, read_samples

#: Each file is run with XNNPACK, the default of LiteRT, and without XNNPACK. Some files give wrong
#: results only with XNNPACK, and other files only without XNNPACK.
RESOLVERS = {
    "XNNPACK": OpResolverType.AUTO,
    "builtin kernels": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
}


@dataclass(frozen=True)
class Case:
    """Test case: a batch of inputs and the expected outputs, both as dicts that map names in the
    file to arrays."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class Deviation:
    """Error of one output of a file, and a text that names the output and the kernels that ran.

    The error of an output ``y`` is ``max|y - expected| / max(max|expected|, 1e-6)``, where
    ``expected`` is the output of the Keras model or of a reference file. Both maxima leave out
    infinite expected values, if ``y`` has the same infinity or the largest float32 number instead.
    The error is infinite if other values are not finite, shapes differ, or the interpreter refuses
    the file.
    """

    error: float
    where: str


def deviation(content: bytes, cases: list[Case]) -> Deviation:
    """Run a file on the inputs of all test cases, with and without XNNPACK, and return the
    `Deviation` with the largest error."""
    return max(_deviations(content, cases, RESOLVERS), key=lambda found: found.error)


def deviation_between(content: bytes, reference: bytes, cases: list[Case]) -> Deviation:
    """Return the largest difference between the outputs of a file and of a reference file."""
    found: list[Deviation] = []
    for label, resolver in RESOLVERS.items():
        outputs = run(reference, cases, resolver)
        own = [replace(case, outputs=values) for case, values in zip(cases, outputs, strict=True)]
        found += _deviations(content, own, {label: resolver})
    return max(found, key=lambda deviation: deviation.error)


def run(content: bytes, cases: list[Case], resolver: OpResolverType) -> list[dict[str, np.ndarray]]:
    """Run a file on the inputs of each test case, and return its outputs for each test case.

    For each test case, the returned list contains a dict that maps output names to arrays.

    Raises:
        RuntimeError, ValueError: If the interpreter refuses the file or an input.
    """
    runner = _runner(content, resolver)
    return [runner(**case.inputs) for case in cases]


def keras_cases(model: keras.Model, signature: Signature, samples: Samples) -> list[Case]:
    """Split samples into batches, and compute the outputs of the Keras model for each batch.

    If the batch size of the model is dynamic, the first batch has one sample, and all other batches
    have at most four samples. The states of recurrent layers are zero before the first batch. The
    model is not changed.

    Args:
        model: The Keras 3 model from which the file was converted.
        signature: Descriptions of the inputs of the file.
        samples: Samples for all inputs of the model.
    """
    with reset_states(model):
        return [
            Case(
                by_input_name(batch, signature),
                _by_output_name(model(batch.packed(), training=False)),
            )
            for batch in _batches(samples, signature)
        ]


def predictor(model: keras.Model, content: bytes, signature: Signature) -> Callable[[Any], Any]:
    """Return a function that runs a file on inputs in any form that `model.predict` accepts.

    The function returns the output of the file, or a dict if the file has several outputs.
    """
    runner = _runner(content, OpResolverType.AUTO)
    size = fixed_batch(signature.specs) or 1

    def predict(inputs: Any) -> Any:
        is_read = isinstance(inputs, Samples)
        samples = inputs if is_read else read_samples(model, inputs, "predict")
        count = len(samples)
        found: list[dict[str, np.ndarray]] = []
        for start in range(0, count, size):
            # If the samples do not fill the last batch, the last batch is completed with the first
            # samples.
            rows = np.arange(start, start + size) % count
            found.append(runner(**by_input_name(samples[rows], signature)))
        outputs = {name: np.concatenate([y[name] for y in found])[:count] for name in found[0]}
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    return predict


def _runner(content: bytes, resolver: OpResolverType) -> Callable[..., dict[str, np.ndarray]]:
    """Return a function that runs a file on float arrays, and quantizes the arrays first if the
    file has int8 inputs."""
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=resolver)
    runner = interpreter.get_signature_runner()
    inputs, outputs = runner.get_input_details(), runner.get_output_details()

    def run(**arrays: np.ndarray) -> dict[str, np.ndarray]:
        found = runner(**{name: _quantized(a, inputs[name]) for name, a in arrays.items()})
        return {name: _dequantized(a, outputs[name]) for name, a in found.items()}

    return run


def _quantized(array: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Quantize floats for an int8 input of an exported model. Return the arrays of all other inputs
    unchanged."""
    scale, zero_point = details["quantization"]
    if details["dtype"] != np.int8 or array.dtype.kind != "f" or not scale:
        return array
    return to_int8(array, scale, zero_point)


def _dequantized(array: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    scale, zero_point = details["quantization"]
    if details["dtype"] != np.int8 or not scale:
        return array
    return np.float32(scale) * (array.astype(np.float32) - zero_point)


def _deviations(
    content: bytes, cases: list[Case], resolvers: dict[str, OpResolverType]
) -> Iterator[Deviation]:
    for label, resolver in resolvers.items():
        try:
            results = run(content, cases, resolver)
        except (RuntimeError, ValueError) as error:
            yield Deviation(float("inf"), f"{label} refused the file: {error}")
            continue
        for case, result in zip(cases, results, strict=True):
            batch = len(next(iter(case.inputs.values())))
            for name, expected in case.outputs.items():
                where = f"output {name!r} ({label}, batch {batch})"
                yield Deviation(_error(result.get(name), expected), where)


def _error(result: np.ndarray | None, expected: np.ndarray) -> float:
    if result is None or result.shape != expected.shape:
        return float("inf")
    if expected.dtype.kind in "SUO":  # The values are strings.
        return (
            0.0 if np.array_equal(result.astype(np.bytes_), expected.astype(np.bytes_)) else np.inf
        )
    wide = expected.astype(np.complex128 if expected.dtype.kind == "c" else np.float64)
    infinite = np.isinf(wide)
    if infinite.any():
        # TensorFlow's converter replaces infinite constants by the largest float32 number.
        limit = np.finfo(np.float32).max
        compared = ~infinite | (np.clip(result, -limit, limit) != np.clip(wide, -limit, limit))
        result, wide = result[compared], wide[compared]
    with np.errstate(invalid="ignore"):
        error = np.abs(result - wide).max(initial=0) / max(np.abs(wide).max(initial=0), 1e-6)
    return float(error) if np.isfinite(error) else float("inf")


def _by_output_name(outputs: Any) -> dict[str, np.ndarray]:
    """Return a dict that maps the names of the file's outputs to the outputs of a Keras model.

    The name of an output is its key in a dict of outputs, or ``output_0``, ``output_1`` and so on.
    """
    if not isinstance(outputs, dict):
        flat = keras.tree.flatten(outputs)
        outputs = {f"output_{position}": value for position, value in enumerate(flat)}
    return {name: np.asarray(keras.ops.convert_to_numpy(y)) for name, y in outputs.items()}


def by_input_name(batch: Samples, signature: Signature) -> dict[str, np.ndarray]:
    """Return a dict that maps the names of the file's inputs to arrays with the dtypes of the
    file."""
    return {
        spec.name: array.astype(np.bytes_ if spec.dtype == "string" else spec.dtype)
        for spec, array in zip(signature.specs, batch.arrays, strict=True)
        if array is not None and spec.present
    }


def _batches(samples: Samples, signature: Signature) -> Iterator[Samples]:
    fixed = fixed_batch(signature.specs)
    if fixed is None:
        yield samples[:1]
        for start in range(0, len(samples), BATCH):
            yield samples[start : start + BATCH]
    else:
        for start in range(0, len(samples) - fixed + 1, fixed):
            yield samples[start : start + fixed]
