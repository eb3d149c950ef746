"""Runs a ``.tflite`` file in the LiteRT interpreter and compares it with the Keras model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from keras_dst.export.convert import input_names, symbolic_inputs

#: The ways to run a file: as users do, and without the delegate, which has faults of its own.
RESOLVERS = {
    "XNNPACK": OpResolverType.AUTO,
    "builtin kernels": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
}
MAX_SAMPLES = 32
BATCH = 4
#: Size of the axes that a model leaves open, in the inputs made here.
OPEN_SIZE = 32


@dataclass(frozen=True)
class Case:
    """One batch: arrays by input name of the file, and the outputs expected, by output name."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class Deviation:
    """The worst error of a file over some cases, and where it arose.

    ``error`` is ``max|y - expected| / max|expected|`` of the worst output, infinite where values
    are not finite, shapes differ, or the interpreter refuses the file.
    """

    error: float
    where: str


def deviation(content: bytes, cases: list[Case]) -> Deviation:
    """Runs ``content`` on every case, with and without XNNPACK, and returns the worst error."""
    return max(_deviations(content, cases, RESOLVERS), key=lambda found: found.error)


def difference(content: bytes, reference: bytes, cases: list[Case]) -> Deviation:
    """The worst error of a file against another one, each way to run them by itself."""
    found: list[Deviation] = []
    for label, resolver in RESOLVERS.items():
        outputs = run(reference, cases, resolver)
        own = [replace(case, outputs=values) for case, values in zip(cases, outputs, strict=True)]
        found += _deviations(content, own, {label: resolver})
    return max(found, key=lambda deviation: deviation.error)


def run(content: bytes, cases: list[Case], resolver: OpResolverType) -> list[dict[str, np.ndarray]]:
    """The outputs of a file for every case, by output name.

    Raises:
        RuntimeError, ValueError: what the interpreter says when it refuses the file or an input.
    """
    runner = _runner(content, resolver)
    return [runner(**case.inputs) for case in cases]


def keras_cases(model: keras.Model, content: bytes, inputs: Any = None) -> list[Case]:
    """Batches for the file ``content``, with the outputs that the Keras model itself gives.

    A model with an open batch size is run at batch 1 and at batch 4, another one at its own.

    Args:
        model: the Keras 3 model that ``content`` was converted from.
        content: a ``.tflite`` file.
        inputs: arrays as for `model.predict`, of which the first 32 samples are used. Default:
            seeded random ones (floats: standard normal; integers: zeros and ones).

    Raises:
        ValueError: ``inputs`` that do not fit the file, or missing where they cannot be made up.
    """
    wanted, fixed = _wanted(content)
    if inputs is None:
        samples = _random_samples(model, wanted, fixed if fixed > 0 else BATCH)
    else:
        samples = declared(model, keras.tree.map_structure(_sample_array, inputs))
    return [
        Case(_by_input_name(model, batch, wanted), _by_output_name(model(batch, training=False)))
        for batch in _batches(samples, fixed)
    ]


def named_batches(
    model: keras.Model, content: bytes, inputs: Any
) -> Iterator[dict[str, np.ndarray]]:
    """Samples one by one, or in batches of a fixed size, by the input names of a file."""
    wanted, fixed = _wanted(content)
    samples = declared(model, keras.tree.map_structure(np.asarray, inputs))
    for batch in _batches(samples, max(fixed, 1)):
        yield _by_input_name(model, batch, wanted)


def predictor(model: keras.Model, content: bytes) -> Callable[[Any], Any]:
    """Runs a file on inputs as for `model.predict`; gives its output, or a dict of several."""
    runner = _runner(content, OpResolverType.AUTO)

    def predict(inputs: Any) -> Any:
        found = [runner(**batch) for batch in named_batches(model, content, inputs)]
        outputs = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    return predict


def _runner(content: bytes, resolver: OpResolverType) -> Any:
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=resolver)
    return interpreter.get_signature_runner()


def _wanted(content: bytes) -> tuple[dict[str, Any], int]:
    """The details of the inputs of a file, by name, and its batch size, -1 for an open one."""
    details = _runner(content, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES).get_input_details()
    return details, int(next(iter(details.values()))["shape_signature"][0])


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
    wide = expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(result - wide).max() / max(np.abs(wide).max(), 1e-6)
    return float(error) if np.isfinite(error) else float("inf")


def _by_output_name(outputs: Any) -> dict[str, np.ndarray]:
    """Outputs under the names that the converter gives them: keys of a dict, or positions."""
    if not isinstance(outputs, dict):
        flat = keras.tree.flatten(outputs)
        outputs = {f"output_{position}": value for position, value in enumerate(flat)}
    return {name: np.asarray(keras.ops.convert_to_numpy(y)) for name, y in outputs.items()}


def _by_input_name(model: keras.Model, batch: Any, wanted: dict) -> dict[str, np.ndarray]:
    """Arrays under the input names of the file, in its dtypes."""
    names = input_names(model) or _in_order(wanted)
    arrays = keras.tree.flatten(batch)
    _check_count(arrays, names)
    named = zip(names, arrays, strict=True)
    return {name: array.astype(wanted[name]["dtype"]) for name, array in named}


def declared(model: keras.Model, inputs: Any) -> Any:
    """Arrays in the structure that the model declares, where it does; they may come by name."""
    symbolic, names = symbolic_inputs(model), input_names(model)
    if symbolic is None:
        return inputs
    if names and isinstance(inputs, dict) and set(inputs) == set(names):
        inputs = [inputs[name] for name in names]
    arrays = keras.tree.flatten(inputs)
    _check_count(arrays, names or [symbolic.name])
    return keras.tree.pack_sequence_as(symbolic, arrays)


def _check_count(arrays: list, names: list[str]) -> None:
    if len(arrays) != len(names):
        raise ValueError(f"Expected input arrays for {names}. Received: {len(arrays)} arrays.")


def _in_order(names: Any) -> list[str]:
    """``args_0, args_0_1, ... args_0_10``: the names of positional inputs in their order."""
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _batches(samples: Any, fixed: int) -> Iterator[Any]:
    arrays = keras.tree.flatten(samples)
    count = min(len(array) for array in arrays)
    if count < max(fixed, 1) or any(len(array) != len(arrays[0]) for array in arrays):
        raise ValueError(
            f"Expected input arrays with one number of samples, at least {max(fixed, 1)}. "
            f"Received: arrays of {[len(array) for array in arrays]} samples."
        )
    if fixed > 0:
        starts, size = range(0, count - fixed + 1, fixed), fixed
    else:
        starts, size = range(0, count, BATCH), BATCH
        yield keras.tree.map_structure(lambda array: array[:1], samples)
    for start in starts:
        yield keras.tree.map_structure(lambda array, s=start: array[s : s + size], samples)


def _sample_array(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim == 0 or array.dtype == object:
        raise ValueError(
            "Expected inputs as for model.predict: an array, or a list or dict of arrays, with "
            f"samples along the first axis. Received: {type(value).__name__}."
        )
    return array[:MAX_SAMPLES]


def _random_samples(model: keras.Model, wanted: dict, batch: int) -> Any:
    rng = np.random.default_rng(0)

    def made(shape: Any, dtype: Any) -> np.ndarray:
        sizes = [batch, *(OPEN_SIZE if size in (None, -1) else size for size in shape[1:])]
        if np.issubdtype(dtype, np.floating):
            return rng.standard_normal(sizes).astype(dtype)
        return rng.integers(0, 2, sizes).astype(dtype)

    symbolic = symbolic_inputs(model)
    if symbolic is not None:
        return keras.tree.map_structure(lambda t: made(t.shape, np.dtype(t.dtype)), symbolic)
    if len(wanted) == 1:
        (detail,) = wanted.values()
        return made(detail["shape_signature"], detail["dtype"])
    raise ValueError(
        f"Expected inputs= for a subclassed model with {len(wanted)} inputs, which does not say "
        "how it is called. Received: none. Fix: pass inputs= as for model.predict."
    )
