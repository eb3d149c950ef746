"""Convert a Keras 3 model on any backend to dense ``.tflite`` files, in float32 or int8.

The conversion always uses TensorFlow's converter. TensorFlow's converter folds batch normalization
into the weights, supports a dynamic batch size, and stores all variables as constants. If Keras
runs on another backend, the model is saved as a ``.keras`` file. A second Python process with the
TensorFlow backend then converts the ``.keras`` file with the command ``python -m
keras_dst.export.convert FOLDER float32``.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FunctionType
from typing import IO, Any

import keras
import numpy as np

from keras_dst import _keras
from keras_dst._utils.states import reset_states
from keras_dst.export.origins import layer_at, layer_names
from keras_dst.export.report import ExportError
from keras_dst.export.samples import (
    InputSpec,
    Samples,
    Signature,
    fixed_batch,
    random_samples,
    signature_of,
    symbolic_inputs,
)
from keras_dst.surgery import has_sparse_layers, strip

# Maps a part of the converter's error message to the fix that our error message suggests.
_FIXES = {
    "TensorListReserve": (
        "build the recurrent layers with unroll=True, or give the model a fixed batch size, "
        "keras.Input(batch_shape=(1, ...))"
    ),
    "Outputs for functions used as signatures must be": (
        "return the outputs as a tensor, a list or a dict that is not nested, for example "
        "keras.Model(model.inputs, model.outputs)"
    ),
}
# Maps the data type of an unsupported op to the fix that our error message suggests.
_TYPE_FIXES = {
    "f16>": "rebuild the model under keras.config.set_dtype_policy('float32'), with its weights",
    "f64>": (
        "rebuild the model under keras.config.set_floatx('float32'), with its weights, and cast "
        "float64 values to float32"
    ),
    "complex<": "compute with the real and imaginary parts as two float32 tensors",
    "!tf_type.string>": "process the strings outside the exported model, and give it numbers",
}
_OP_FIX = (
    "compute it with other keras.ops, or export the part of the model before it, "
    "keras.Model(model.inputs, tensor), and compute the rest outside"
)
_REGISTER_FIX = (
    "define it at the top level of a module that another Python can import, not in the script or "
    "notebook that runs, and decorate it with @keras.saving.register_keras_serializable()"
)
_CALL_FIX = (
    "write the code of your own layers and Lambda layers with keras.ops, which runs on every "
    "backend, instead of functions of JAX, PyTorch or NumPy"
)
# Maps the name of a TensorFlow op to the Keras operations that are converted to the op.
_PART_OF = {"BitwiseAnd": "keras.ops.argmax and argmin"}

# Number formats of files with integer ops.
_INTEGER = {"int8", "integer"}

# Maximum numbers of lines and columns of the converter's log that an error message shows.
_LINES, _COLUMNS = 8, 400
# Log lines that an error message leaves out: empty lines, and lines that TensorFlow always logs.
_NOISE = re.compile(r"\s*$|[IW]\d{4} |WARNING: All log messages before absl")


class _Failure(Exception):
    """Error in a conversion. `step` is the step that failed: ``"load"``, ``"call"`` or
    ``"convert"``."""

    def __init__(self, step: str, text: str):
        super().__init__(step, text)
        self.step, self.text = step, text


def to_tflite(model: keras.Model) -> bytes:
    """Convert a built Keras 3 model to a ``.tflite`` file with dense float32 weights."""
    return conversions(model, ["float32"])[0]


def conversions(
    model: keras.Model,
    kinds: Sequence[str],
    signature: Signature | None = None,
    samples: Samples | None = None,
) -> list[bytes]:
    """Convert a built Keras 3 model to dense ``.tflite`` files, one for each entry of ``kinds``.

    The model is not changed. If the model contains sparse layers, a stripped copy is converted.

    Args:
        model: A built Keras 3 model.
        kinds: Number formats of the files to write, one string per file. ``"float32"`` means
            float32 weights and ops. ``"dynamic"`` means int8 weights. ``"int8"`` means int8 weights
            and integer ops.

            ``"integer"`` is like ``"int8"``, but the inputs and outputs are also int8.
        signature: Descriptions of the inputs of the files. Defaults to all inputs of the model.
        samples: Samples on which the ranges of activations are measured, for ``"int8"`` and
            ``"integer"``. Defaults to random samples.

    Raises:
        ExportError: If the model could not be converted. The message names the input, the op or the
            layer that failed.
    """
    signature = signature or signature_of(model)
    quantized = not _INTEGER.isdisjoint(kinds)
    check_convertible(model, signature, quantized)
    if quantized and samples is None:
        samples = random_samples(model, signature)
    on_tensorflow = keras.backend.backend() == "tensorflow"
    arrays = samples and samples.arrays
    with tempfile.TemporaryDirectory() as name, reset_states(model):
        folder = Path(name)
        try:
            if on_tensorflow and not has_sparse_layers(model):
                _quietly(_convert, model, folder, kinds, signature, arrays)
            else:
                _save(model, folder / "model.keras")
                custom = _custom_objects(model)
                if on_tensorflow:
                    _quietly(_convert_file, folder, kinds, signature, arrays, custom)
                else:
                    _convert_in_second_python(folder, kinds, signature, samples, custom)
        except _Failure as failure:
            raise _conversion_error(failure, layer_names(model)) from failure
        return [(folder / kind).read_bytes() for kind in kinds]


def check_convertible(model: keras.Model, signature: Signature, quantized: bool) -> None:
    """Raise ExportError if the model has inputs or layers that the converter cannot convert.

    Args:
        model: A built Keras 3 model.
        signature: Descriptions of the inputs of the file.
        quantized: Whether a file with integer ops is written.
    """
    strings = [spec.name for spec in signature.specs if spec.dtype == "string"]
    if strings and keras.backend.backend() != "tensorflow":
        raise ExportError(
            f"Expected numeric inputs on the {keras.backend.backend()} backend. Received: "
            f"string inputs {strings}, which Keras supports only on the TensorFlow backend. Fix: "
            "load and export the model with KERAS_BACKEND=tensorflow. Alternatively, export "
            "keras.Model(tensor, model.outputs), where tensor is the output of the layer that "
            "reads the strings."
        )
    if strings and quantized:
        raise ExportError(
            "Expected numeric inputs for full int8 quantization. Received: string inputs "
            f"{strings}, which cannot be quantized. Fix: export the model with quantize='weights'."
        )
    loops = [
        layer.name
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, keras.layers.RNN) and not layer.unroll
    ]
    if loops and quantized:  # The converter would crash.
        raise ExportError(
            "Expected recurrent layers with unroll=True for full int8 quantization. Received: the "
            f"layers {loops}, which run a loop that TensorFlow's converter cannot calibrate. Fix: "
            "build these layers with unroll=True, or export the model with quantize='weights'."
        )
    inputs = getattr(model, "inputs", None) or []
    ragged = [tensor.name for tensor in inputs if getattr(tensor, "ragged", False)]
    if ragged:
        raise ExportError(
            f"Expected dense inputs. Received: the ragged inputs {ragged}, which a .tflite file "
            "cannot have. Fix: build the model on padded sequences, with a mask if necessary."
        )


def _save(model: keras.Model, path: Path) -> None:
    try:
        model.save(path)
    except Exception as error:
        raise ExportError(
            "The model cannot be converted because saving it as a .keras file failed: "
            f"{type(error).__name__}: {error}"
        ) from error


def _convert_file(
    folder: Path,
    kinds: Sequence[str],
    signature: Signature,
    arrays: list | None,
    custom_objects: dict[str, Any],
) -> None:
    """Load and strip ``model.keras`` in a folder, and write one ``.tflite`` file per number
    format."""
    with _names_for_lambdas():
        with _step("load"), keras.saving.custom_object_scope(custom_objects):
            # Turn safe_mode off, because this process or its parent process wrote the ``.keras``
            # file.
            model = keras.saving.load_model(folder / "model.keras", compile=False, safe_mode=False)
            strip(model)
        _convert(model, folder, kinds, signature, arrays)


def _custom_objects(model: keras.Model) -> dict[str, Any]:
    """Return the user-defined classes and functions of a model, as a dict by name."""
    layers = _keras.flatten_layers(model)
    found: list[Any] = [cls for layer in layers for cls in type(layer).__mro__]
    for layer in layers:
        found += [value for value in vars(layer).values() if isinstance(value, FunctionType)]
    known = ("keras.", "keras_dst.", "torch.", "tensorflow.", "builtins")
    return {obj.__name__: obj for obj in found if not obj.__module__.startswith(known)}


def _import(module: str, name: str) -> Any:
    """Import an object from a module by its qualified name, or return None if the import fails."""
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception:  # An import runs the user's code, which may raise any error.
        return None


@contextlib.contextmanager
def _names_for_lambdas() -> Iterator[None]:
    """Add `keras`, `np` and similar names to the builtins, because a loaded lambda function has
    lost the global names of its module."""
    names = {"keras": keras, "ops": keras.ops, "layers": keras.layers, "np": np, "numpy": np}
    added = {name: module for name, module in names.items() if not hasattr(builtins, name)}
    vars(builtins).update(added)
    try:
        yield
    finally:
        for name in added:
            delattr(builtins, name)


def _convert(
    model: keras.Model,
    folder: Path,
    kinds: Sequence[str],
    signature: Signature,
    arrays: list | None,
) -> None:
    import tensorflow as tf

    specs, structure = signature.specs, symbolic_inputs(model)
    if structure is None:  # A subclassed model does not record its structure.
        structure = signature.structure

    def serve(values):
        rest = iter(values)
        inputs = [next(rest) if spec.present else None for spec in specs]
        return model(keras.tree.pack_sequence_as(structure, inputs), training=False)

    present = [spec for spec in specs if spec.present]
    tensors = [tf.TensorSpec(spec.shape, spec.dtype, spec.name) for spec in present]
    saved = str(folder / "saved")
    with _step("call"):
        archive = keras.export.ExportArchive()
        archive.track(model)
        archive.add_endpoint("serve", serve, [tensors])
        archive.write_out(saved)
    with _step("convert"):
        for kind in kinds:
            converter = tf.lite.TFLiteConverter.from_saved_model(saved)
            if kind != "float32":
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if kind == "integer":
                converter.inference_input_type = converter.inference_output_type = tf.int8
            if kind in _INTEGER:
                batches = list(_calibration_batches(specs, arrays or []))
                converter.representative_dataset = lambda batches=batches: iter(batches)
            (folder / kind).write_bytes(converter.convert())


def _calibration_batches(specs: list[InputSpec], arrays: list) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches for the calibration, as dicts by input name.

    Each batch has the fixed batch size of the model, or one sample if the batch size is dynamic.
    """
    present = [(spec, array) for spec, array in zip(specs, arrays) if spec.present]
    size = fixed_batch(specs) or 1
    count = min(len(array) for _, array in present)
    for start in range(0, count - size + 1, size):
        yield {s.name: array[start : start + size].astype(s.dtype) for s, array in present}


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _Failure(name, f"{type(error).__name__}: {error}") from error


def _convert_in_second_python(
    folder: Path,
    kinds: Sequence[str],
    signature: Signature,
    samples: Samples | None,
    custom_objects: dict[str, Any],
) -> None:
    arrays = samples.arrays if samples else []
    present = {str(place): a for place, a in enumerate(arrays) if a is not None}
    np.savez(folder / "samples.npz", **present)  # type: ignore[arg-type]
    (folder / "signature.json").write_text(json.dumps(asdict(signature)))
    places = {name: (obj.__module__, obj.__qualname__) for name, obj in custom_objects.items()}
    (folder / "custom_objects.json").write_text(json.dumps(places))
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        # Use no GPU, because the parent process may hold all memory of the GPU.
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # Import the user's modules.
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder), *kinds],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        failure = folder / "failure.json"
        step, text = "convert", f"TensorFlow's converter crashed (exit code {done.returncode})"
        if failure.exists():
            step, text = json.loads(failure.read_text())
        raise _Failure(step, f"{done.stderr}\n{text}")


def _quietly(convert: Callable[..., None], *arguments: Any) -> None:
    with tempfile.TemporaryFile() as log:
        try:
            with _output_to(log):
                convert(*arguments)
        except _Failure as failure:
            log.seek(0)
            logged = log.read().decode(errors="replace")
            raise _Failure(failure.step, f"{logged}\n{failure.text}") from failure


@contextlib.contextmanager
def _output_to(log: IO[bytes]) -> Iterator[None]:
    """Redirect all output of Python and C++ to ``log``, because the converter prints many lines."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    try:
        with (
            open(os.dup(log.fileno()), "w") as stream,
            _logs_to(stream),
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
            warnings.catch_warnings(action="ignore"),
        ):
            for descriptor in saved:
                os.dup2(log.fileno(), descriptor)
            yield
    finally:
        for descriptor, copy in saved.items():
            os.dup2(copy, descriptor)
            os.close(copy)


@contextlib.contextmanager
def _logs_to(stream: IO[str]) -> Iterator[None]:
    """Redirect TensorFlow's log handlers, which do not follow a redirection of stdout or stderr."""
    import tensorflow as tf

    handlers = [h for h in tf.get_logger().handlers if isinstance(h, logging.StreamHandler)]
    before = [handler.setStream(stream) for handler in handlers]
    try:
        yield
    finally:
        for handler, own in zip(handlers, before):
            handler.setStream(own)
        # If a message was logged inside the `with` block, Python may have added a handler to the
        # root logger. Remove this handler, because it writes to `stream`, which is closed
        # afterwards.
        for new in logging.root.handlers[:]:
            if isinstance(new, logging.StreamHandler) and new.stream is stream:
                logging.root.removeHandler(new)


def _conversion_error(failure: _Failure, layers: Collection[str]) -> ExportError:
    """Return an error with the reason, the fix, and the end of the converter's log."""
    output = re.sub(r"\x1b\[\d*m", "", failure.text)  # Remove terminal colors.
    ops = _unsupported_ops(output, layers)
    if ops:
        fixes = [fix for sign, fix in _TYPE_FIXES.items() if any(sign in op for op in ops)]
        fixes += [fix for sign, fix in _FIXES.items() if any(sign in op for op in ops)]
        return ExportError(
            "The model could not be converted to .tflite: TensorFlow Lite has no builtin op for "
            "these ops, which would need TF Select or custom ops:\n  "
            + "\n  ".join(ops)
            + "".join(f"\nFix: {fix}." for fix in fixes or [_OP_FIX])
        )
    unknown = re.search(r"Could not locate (class|function) '([^']+)'", output)
    if unknown:
        return ExportError(
            f"The model could not be converted to .tflite: the {unknown[1]} {unknown[2]!r} is not "
            f"known to the process that loads the model for the conversion.\nFix: {_REGISTER_FIX}."
        )
    fixes = [fix for sign, fix in _FIXES.items() if sign in output]
    reason = ""
    if failure.step in ("call", "load") and not fixes:
        reason = " its layers cannot be called on TensorFlow, which every conversion needs."
        fixes = [_CALL_FIX]
    lines = [line[:_COLUMNS] for line in output.splitlines() if not _NOISE.match(line)]
    log = "\n  ".join(lines[-_LINES:])
    return ExportError(
        f"The model could not be converted to .tflite:{reason}\n  {log}"
        + "".join(f"\nFix: {fix}." for fix in fixes)
    )


def _unsupported_ops(output: str, layers: Collection[str]) -> list[str]:
    """Return one text for each unsupported op that the converter's log lists.

    The text contains the name of the op. The text also contains the path, the layer and the data
    types of the op if the log contains this information.
    """
    found: dict[str, str] = {}
    for line in output.splitlines():
        op = re.search(r"error: .*'tfl?\.(\w+)' op (.*)", line)
        place = re.search(r'fused\["\w+:", "([^"@]+)', line)
        if op and op[1] not in found:
            note = f", part of {_PART_OF[op[1]]}" if op[1] in _PART_OF else ""
            found[op[1]] = f"{op[1]}{note}, at {place[1] if place else 'an unknown place'}"
            if place and (layer := layer_at(place[1], layers)):
                found[op[1]] += f" in layer {layer!r}"
            if "neither a custom op nor a flex op" not in op[2]:
                found[op[1]] += f": {op[2][:_COLUMNS]}"
        current = re.search(r'see current operation: .*"tfl?\.(\w+)"\(.* : (\(.*)', line)
        if current and current[1] in found and " on " not in found[current[1]]:
            found[current[1]] += f", on {current[2][:_COLUMNS]}"
    for names in re.findall(r"^(?:TF Select|Custom) ops: (.+)$", output, re.M):
        for name in names.split(", "):
            found.setdefault(name.strip(), name.strip())
    return list(found.values())


def _main(folder: str, *kinds: str) -> None:
    path = Path(folder)
    stored_signature = json.loads((path / "signature.json").read_text())
    specs = [InputSpec(**spec) for spec in stored_signature["specs"]]
    signature = Signature(specs, stored_signature["structure"])
    places = json.loads((path / "custom_objects.json").read_text())
    imported = {name: _import(*place) for name, place in places.items()}
    custom_objects = {name: obj for name, obj in imported.items() if obj is not None}
    with np.load(path / "samples.npz") as stored:
        arrays = [stored.get(str(place)) for place in range(len(specs))]
    try:
        _convert_file(path, kinds, signature, arrays, custom_objects)
    except _Failure as failure:
        (path / "failure.json").write_text(json.dumps([failure.step, failure.text]))
        sys.exit(1)


if __name__ == "__main__":
    _main(*sys.argv[1:])
