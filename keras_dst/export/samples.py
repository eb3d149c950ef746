"""Inputs of a model, and samples for the inputs in any form that `model.predict` accepts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from keras_dst import _keras
from keras_dst._utils.open_sizes import OPEN_SIZE, accepted_size
from keras_dst._utils.states import reset_states

#: Maximum number of samples on which a file is compared with the model.
MAX_SAMPLES = 32
#: Maximum number of samples of a data set or generator that are used for calibration to int8.
MAX_CALIBRATION_SAMPLES = 1000
#: If the batch size of a Keras model is dynamic, batches of this size are used to compare a file
#: with the model.
BATCH = 4

_ACCEPTED = (
    "an array, a list or dict of arrays, a tf.data.Dataset, a torch DataLoader, a "
    "keras.utils.PyDataset, or a generator of batches"
)


@dataclass(frozen=True)
class InputSpec:
    """Description of one input of a model.

    Attributes:
        name: Name of the input in the file.
        shape: Shape of the input, including the batch size. Dynamic sizes are None.
        dtype: Name of the data type.
        optional: Whether the model accepts None for the input. Defaults to False.
        present: Whether the exported file has this input. The file lacks optional inputs that the
            samples do not contain. Defaults to True.
        key: Key of the input in a dict of inputs. The key is the name of the Input layer, and may
            contain characters that `name` cannot contain. Defaults to "": dicts are not accepted.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    optional: bool = False
    present: bool = True
    key: str = ""


@dataclass(frozen=True)
class Signature:
    """Descriptions of the inputs of a model as a flat list, and the nested structure of the inputs.

    `structure` is nested like the inputs of the model. In `structure`, each input is replaced by
    its index in `specs`.
    """

    specs: list[InputSpec]
    structure: Any


@dataclass(frozen=True)
class Samples:
    """Sample data for all inputs of a model.

    Attributes:
        arrays: One array for each input, with samples along the first axis, or None for an optional
            input that is absent.
        structure: Nested structure in which the model expects its inputs.
    """

    arrays: list[np.ndarray | None]
    structure: Any

    def __len__(self) -> int:
        return min(len(array) for array in self.arrays if array is not None)

    def __getitem__(self, rows: slice | np.ndarray) -> Samples:
        return replace(self, arrays=[None if a is None else a[rows] for a in self.arrays])

    def packed(self) -> Any:
        """Return the arrays in the nested structure in which the model expects its inputs."""
        return keras.tree.pack_sequence_as(self.structure, self.arrays)


def symbolic_inputs(model: keras.Model) -> Any:
    """Return the symbolic inputs of a model in their nested structure.

    The result is None for a subclassed model, which has no symbolic inputs.
    """
    if not hasattr(model, "inputs"):
        return None
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def signature_of(model: keras.Model, samples: Samples | None = None) -> Signature:
    """Return descriptions of the inputs of the `.tflite` file to which a model is exported.

    Args:
        model: A built Keras 3 model.
        samples: Sample data. If the samples contain None for an optional input, the file does not
            have this input. For a subclassed model, the types and shapes of the inputs are read
            from the samples.

    Raises:
        ValueError: If the model does not record its inputs, and no samples are given.
    """
    specs, structure = _declared_specs(model), symbolic_inputs(model)
    if specs is None:
        if samples is None:
            return Signature([_built_spec(model)], 0)
        specs, structure = _specs_of_samples(samples), samples.structure
    elif samples is not None:
        specs = [
            replace(spec, present=array is not None)
            for spec, array in zip(specs, samples.arrays, strict=True)
        ]
    return Signature(specs, keras.tree.pack_sequence_as(structure, list(range(len(specs)))))


def _declared_specs(model: keras.Model) -> list[InputSpec] | None:
    if symbolic_inputs(model) is None:
        return None
    if isinstance(model, keras.Sequential):
        (tensor,) = model.inputs
        batch = tensor.shape[0] if _keeps_batch_size(model) else None
        name, shape = _signature_name(tensor.name), (batch, *tensor.shape[1:])
        return [InputSpec(name, shape, tensor.dtype, key=tensor.name)]
    # A copied model keeps the names of its Input layers, but not the names of its input tensors.
    layers = [_keras.operation_of(tensor) for tensor in model.inputs]
    names = [_signature_name(layer.name) for layer in layers]
    if len(set(names)) < len(names):
        names = [f"{name}_{place}" for place, name in enumerate(names)]
    optional = [getattr(layer, "optional", False) for layer in layers]
    return [
        InputSpec(name, tuple(tensor.shape), tensor.dtype, can_be_none, key=layer.name)
        for name, tensor, can_be_none, layer in zip(
            names, model.inputs, optional, layers, strict=True
        )
    ]


def _signature_name(name: str) -> str:
    """Convert the name of an input to a name that TensorFlow accepts in a signature."""
    name = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"input_{name}" if name.startswith("_") or name == "self" else name


def _keeps_batch_size(model: keras.Sequential) -> bool:
    """Return whether a Sequential model must be exported with the batch size that Keras recorded.

    A Sequential model without an Input layer is built by its first call on data. Keras then records
    the batch size of the data. Most models can be exported with a dynamic batch size. Recurrent
    layers that are stateful or not unrolled require a fixed batch size.
    """
    layers = _keras.flatten_layers(model)
    recurrent = [layer for layer in layers if isinstance(layer, keras.layers.RNN)]
    needed = any(layer.stateful or not layer.unroll for layer in recurrent)
    return needed or _keras.declares_input(model)


def _specs_of_samples(samples: Samples) -> list[InputSpec]:
    names = ["args_0", *(f"args_0_{number}" for number in range(1, len(samples.arrays)))]
    return [
        InputSpec(name, (None, *array.shape[1:]), _dtype_in_file(array.dtype))
        for name, array in zip(names, samples.arrays)
        if array is not None
    ]


def _dtype_in_file(dtype: np.dtype) -> str:
    if dtype.kind in "US":
        return "string"
    return keras.config.floatx() if dtype.kind == "f" else dtype.name


def _built_spec(model: keras.Model) -> InputSpec:
    shapes = list((_keras.build_shapes(model) or {}).values())
    sizes = shapes[0] if len(shapes) == 1 else None
    if not (sizes and all(size is None or isinstance(size, int) for size in sizes)):
        raise ValueError(
            f"Expected sample inputs for {model.name!r}, a subclassed model that does not record "
            "its inputs. Received: none. Fix: pass inputs= to export_tflite, in a form that "
            "model.predict accepts. lint accepts the path of the exported file."
        )
    return InputSpec("args_0", (None, *sizes[1:]), keras.config.floatx())


# -- reading data --------------------------------------------------------------------------------


def read_samples(
    model: keras.Model, data: Any, argument: str, limit: int | None = None, streamed: int = 0
) -> Samples:
    """Return the inputs in ``data`` as arrays, and check that they fit the model.

    Args:
        model: A built Keras 3 model.
        data: Inputs in any form that `model.predict` accepts. Labels in a data set are ignored.
        argument: Name of the argument with which the user passed the data, for error messages.
        limit: Maximum number of samples to return. Defaults to None: all samples are returned.
        streamed: Maximum number of samples to read from a data set or generator. If ``streamed`` is
            0, the default, ``limit`` is the maximum. If a maximum is less than the fixed batch size
            of the model, the fixed batch size replaces the maximum.

    Raises:
        ValueError: If the data is of an unsupported type, or does not fit the inputs of the model.
    """
    batch_size = fixed_batch(_declared_specs(model) or []) or 1
    limit = limit and max(limit, batch_size)
    if not _is_stream(data):
        return _checked_size(_match(model, data, argument), batch_size, argument)[:limit]
    limit = max(streamed, batch_size) if streamed else limit
    found: list[Samples] = []
    for batch in _batches(data, argument, endless=limit is not None):
        inputs, _ = _split(batch, _count(model), argument)
        found.append(_match(model, inputs, argument))
        if limit is not None and sum(map(len, found)) >= limit:
            break
    return _checked_size(_joined(found, argument), batch_size, argument)[:limit]


def fixed_batch(specs: list[InputSpec]) -> int | None:
    """Return the fixed batch size of the inputs, or None if all batch sizes are dynamic.

    Raises:
        ValueError: If the inputs have different fixed batch sizes.
    """
    sizes = {spec.name: spec.shape[0] for spec in specs if spec.present and spec.shape[0]}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "Expected the same batch size for all inputs with a fixed batch size. Received: "
            f"{sizes}. Fix: build the model with the same batch size in each keras.Input."
        )
    return next(iter(sizes.values()), None)


def _checked_size(samples: Samples, least: int, argument: str) -> Samples:
    """Return the samples. Raise ValueError if there are too few samples for one batch."""
    if len(samples) < least:
        raise ValueError(
            f"Expected at least {least} samples in {argument}, because the model has a fixed batch "
            f"size. Received: {len(samples)} samples."
        )
    return samples


def read_labeled(model: keras.Model, data: Any) -> tuple[Samples, np.ndarray]:
    """Return the inputs and the labels of a pair ``(x, y)`` or of a data set of pairs.

    Raises:
        ValueError: If the data is of an unsupported type, or does not fit the inputs of the model.
    """
    if not _is_stream(data):
        if not isinstance(data, tuple | list) or len(data) != 2:
            raise ValueError(
                "Expected evaluate=(x, y), a data set of batches (x, y), or a function "
                f"that accepts predict. Received: {type(data).__name__}."
            )
        inputs, labels = data
        if _is_stream(inputs):
            raise ValueError(
                f"Expected arrays in evaluate=(x, y). Received: {type(inputs).__name__} as x. "
                "Fix: pass the data set alone, with batches (x, y)."
            )
        samples, targets = _match(model, inputs, "evaluate"), _label_array(labels)
    else:
        found, read = [], []
        for batch in _batches(data, "evaluate", endless=False):
            inputs, labels = _split(batch, _count(model), "evaluate")
            found.append(_match(model, inputs, "evaluate"))
            read.append(_label_array(labels))
        samples = _joined(found, "evaluate")
        targets = _concatenated(read, "evaluate")
    if len(samples) != len(targets):
        raise ValueError(
            "Expected one label for each sample in evaluate. "
            f"Received: {len(samples)} samples and {len(targets)} labels."
        )
    return samples, targets


def open_shapes(signature: Signature, samples: Samples, batch: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the inputs that have dynamic axes in addition to the batch axis.

    The first size of each shape is the fixed batch size, or ``batch``. All other sizes are the
    sizes of the samples.
    """
    return {
        spec.name: (spec.shape[0] or batch, *array.shape[1:])
        for spec, array in zip(signature.specs, samples.arrays, strict=True)
        if array is not None and None in spec.shape[1:]
    }


def random_samples(model: keras.Model, signature: Signature) -> Samples:
    """Return seeded random samples: standard normal floats, or integers that are 0 or 1.

    Every dynamic axis except the batch axis has size 32, or another size that the model accepts.
    """
    if all(None not in spec.shape[1:] for spec in signature.specs):
        return _random_samples(signature, OPEN_SIZE)

    def run(samples: Samples) -> None:
        with reset_states(model):
            model(samples.packed(), training=False)

    fix = "pass inputs= to export_tflite, or create the model with fixed sizes in keras.Input."
    size = accepted_size(lambda size: _random_samples(signature, size), run, fix)
    return _random_samples(signature, size)


def _random_samples(signature: Signature, open_size: int) -> Samples:
    """Return seeded random samples. Dynamic axes except the batch axis have size `open_size`."""
    rng = np.random.default_rng(0)
    batch = fixed_batch(signature.specs) or BATCH

    def array(spec: InputSpec) -> np.ndarray:
        shape = [batch, *(size or open_size for size in spec.shape[1:])]
        if spec.dtype == "string":
            raise ValueError(
                f"Expected inputs= for a model with string inputs (input {spec.name!r}). "
                "Received: none. Random strings would not be in the model's vocabulary. Fix: "
                f"pass inputs= with an array of strings of shape {_shape_text(spec.shape)}."
            )
        if "float" in spec.dtype:
            return rng.standard_normal(shape).astype(keras.config.floatx())
        if spec.dtype.startswith("complex"):
            return rng.standard_normal(shape).astype(spec.dtype)
        return rng.integers(0, 2, shape).astype(spec.dtype)

    return Samples([array(spec) for spec in signature.specs], signature.structure)


def _is_stream(data: Any) -> bool:
    """Return whether ``data`` is an iterable of batches rather than an array or nested arrays."""
    if isinstance(data, keras.utils.PyDataset):
        return True
    if isinstance(data, str | bytes | list | tuple | dict) or _is_array(data):
        return False
    return hasattr(data, "__iter__")


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") or hasattr(value, "__array__")


def _batches(data: Any, argument: str, endless: bool) -> Iterator[Any]:
    """Return an iterator over the batches of a data set.

    Raise ValueError if the data set is endless and ``endless`` is False.
    """
    if isinstance(data, keras.utils.PyDataset):
        infinite = data.num_batches is None
    else:
        infinite = hasattr(data, "cardinality") and int(data.cardinality()) == -1
    if infinite and not endless:
        raise ValueError(
            f"Expected a finite data set in {argument}. Received: an endless "
            f"{type(data).__name__}. Fix: limit the data set, for example with dataset.take(100)."
        )
    if isinstance(data, keras.utils.PyDataset):
        numbers = itertools.count() if infinite else range(data.num_batches)
        return (data[number] for number in numbers)
    return iter(data)


def _count(model: keras.Model) -> int | None:
    specs = _declared_specs(model)
    return None if specs is None else len(specs)


def _split(batch: Any, count: int | None, argument: str) -> tuple[Any, Any]:
    """Return the inputs and the labels of a batch.

    A batch has one of the forms `x`, `(x,)`, `(x, y)` and `(x, y, sample_weight)`.

    For a model with several inputs, a flat sequence with one array per input is a batch of inputs
    without labels, as in TensorFlow's converter. Sample weights are ignored, as in the `metrics` of
    `compile`.
    """
    if not isinstance(batch, tuple | list):
        return batch, None
    if count and count > 1 and len(batch) == count and not keras.tree.is_nested(batch[0]):
        return batch, None
    if len(batch) not in (1, 2, 3):
        raise ValueError(
            f"Expected batches x, (x, y) or (x, y, sample_weight) in {argument}. "
            f"Received: a {type(batch).__name__} of {len(batch)} entries as a batch."
        )
    return batch[0], batch[1] if len(batch) > 1 else None


def _joined(found: list[Samples], argument: str) -> Samples:
    if not found:
        raise ValueError(
            f"Expected at least one batch in {argument}. Received: no batch. Fix: if the data is a "
            "generator that was already read, pass a new generator."
        )
    arrays = [
        None if all(part is None for part in parts) else _concatenated(parts, argument)
        for parts in zip(*(samples.arrays for samples in found), strict=True)
    ]
    return replace(found[0], arrays=arrays)


def _concatenated(parts: Sequence[np.ndarray | None], argument: str) -> np.ndarray:
    shapes = list(dict.fromkeys(None if part is None else part.shape[1:] for part in parts))
    if len(shapes) > 1:
        raise ValueError(
            f"Expected samples of the same shape in all batches of {argument}. Received: samples "
            f"of shapes {', '.join(map(str, shapes[:4]))}. Fix: pad all batches to the same "
            "length, and pass an optional input in all batches or in none."
        )
    return np.concatenate(parts)  # type: ignore[arg-type]


def _match(model: keras.Model, inputs: Any, argument: str) -> Samples:
    """Return the inputs as arrays in the order of the model's inputs.

    Raise ValueError if the shape or type of an input does not fit the model.
    """
    specs, structure = _declared_specs(model), symbolic_inputs(model)
    arrays: list[np.ndarray | None]
    if specs is None:
        arrays = [_array(value, argument) for value in keras.tree.flatten(inputs)]
        samples = Samples(arrays, inputs)
    else:
        values = _values_in_order(inputs, specs, structure, argument)
        names = [spec.name for spec in specs]
        if len(values) != len(specs):
            raise ValueError(
                f"Expected input arrays for {names} in {argument}. Received: {len(values)} arrays."
            )
        arrays = [_fitted(x, spec, argument) for x, spec in zip(values, specs, strict=True)]
        samples = Samples(arrays, structure)
    counts = [len(array) for array in arrays if array is not None]
    if len(set(counts)) != 1:
        raise ValueError(
            f"Expected input arrays with equal numbers of samples in {argument}. Received: arrays "
            f"of {counts} samples."
        )
    return samples


def _values_in_order(inputs: Any, specs: list[InputSpec], structure: Any, argument: str) -> list:
    """Return the values of ``inputs`` in the order of the model's inputs.

    The keys of a dict are the keys of the model's input structure, the names of the Input layers,
    or the names of the inputs in the file.

    Raises:
        ValueError: If the keys of a dict do not fit the model.
    """
    if isinstance(inputs, dict):
        accepted = [[spec.key for spec in specs], [spec.name for spec in specs]]
        if isinstance(structure, dict) and len(structure) == len(specs):
            accepted.insert(0, keras.tree.flatten({key: key for key in structure}))
        for keys in accepted:
            required = {key for key, spec in zip(keys, specs) if not spec.optional}
            if required <= set(inputs) and set(keys) & set(inputs):
                return [inputs.get(key) for key in keys]
        if len(specs) > 1:  # The dict must be nested like the inputs of the model.
            values = dict(keras.tree.flatten_with_path(inputs))
            numbered = keras.tree.pack_sequence_as(structure, list(range(len(specs))))
            places = dict(keras.tree.flatten_with_path(numbered))
            if set(places) != set(values):
                raise ValueError(
                    f"Expected a dict with the keys {accepted[0]} in {argument}. Received: a dict "
                    f"with the keys {list(inputs)}."
                )
            return [values[path] for path in sorted(places, key=places.__getitem__)]
    return keras.tree.flatten(inputs)


def _fitted(value: Any, spec: InputSpec, argument: str) -> np.ndarray | None:
    """Convert a value to an array for one input.

    As in Keras, a last axis of size 1 is added or removed if the array has one axis too few or too
    many.
    """
    if value is None and spec.optional:
        return None
    array = _array(value, argument)
    if array.ndim == len(spec.shape) - 1 and spec.shape[-1] == 1:
        array = array[..., None]
    elif array.ndim == len(spec.shape) + 1 and array.shape[-1] == 1:
        array = array[..., 0]
    sizes = zip(array.shape[1:], spec.shape[1:])
    if array.ndim != len(spec.shape) or any(b not in (None, a) for a, b in sizes):
        fix = ""
        if array.shape == spec.shape[1:]:
            fix = " Fix: add a batch axis, for example with dataset.batch(32) or x[None]."
        raise ValueError(
            f"Expected {argument} of shape {_shape_text(spec.shape)} for the input {spec.name!r}. "
            f"Received: an array of shape {array.shape}.{fix}"
        )
    if (array.dtype.kind in "USO") != (spec.dtype == "string"):
        raise ValueError(
            f"Expected {argument} of type {spec.dtype} for the input {spec.name!r}. "
            f"Received: an array of type {array.dtype}."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(
            f"Expected finite numbers in {argument} for the input {spec.name!r}. Received: an "
            "array that contains NaN or infinity. Fix: remove the samples with NaN or infinity, "
            "or replace the values."
        )
    return array


def _shape_text(shape: tuple[int | None, ...]) -> str:
    sizes = ["batch" if shape[0] is None else str(shape[0]), *map(str, shape[1:])]
    return f"({', '.join(sizes)})"


def _label_array(labels: Any) -> np.ndarray:
    values = keras.tree.flatten(labels)
    if len(values) != 1 or values[0] is None:
        raise ValueError(
            "Expected one array of labels for each batch in evaluate. "
            f"Received: {'none' if labels is None else f'{len(values)} arrays'}. "
            "Fix: pass evaluate=lambda predict: ..., a function that returns the metric."
        )
    return _array(values[0], "evaluate")


def _array(value: Any, argument: str) -> np.ndarray:
    """Convert an array or tensor of any supported library to a dense NumPy array."""
    if hasattr(value, "detach"):  # Only torch tensors have `detach`.
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    for method in ("toarray", "todense", "to_dense"):  # SciPy, JAX and torch
        if hasattr(value, method):
            value = getattr(value, method)()
    if hasattr(value, "dense_shape"):  # Only TensorFlow's sparse tensors have `dense_shape`.
        value = _dense(value)
    array = np.asarray(value) if _is_array(value) else np.empty((), object)
    if array.dtype == object and array.size and all(isinstance(x, str) for x in array.flat):
        array = array.astype(str)
    if array.dtype == object and array.size and all(isinstance(x, bytes) for x in array.flat):
        array = array.astype(bytes)
    if array.ndim == 0 or array.dtype == object:
        raise ValueError(
            f"Expected {argument} in a form that model.predict accepts: {_ACCEPTED}, with samples "
            f"along the first axis. Received: {type(value).__name__}."
        )
    return array


def _dense(tensor: Any) -> np.ndarray:
    values = np.asarray(tensor.values)
    dense = np.zeros(np.asarray(tensor.dense_shape), values.dtype)
    dense[tuple(np.asarray(tensor.indices).T)] = values
    return dense
