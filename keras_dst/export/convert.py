"""Keras 3 model on any backend -> dense ``.tflite`` files, of float32 or of int8.

TensorFlow holds the only converter that folds batch normalisation into the weights, keeps the batch
size open and freezes every variable. Models on other backends reach it as a ``.keras`` file read by
a second Python: ``python -m keras_dst.export.convert model.keras folder float32``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import keras
import numpy as np

from keras_dst.export.report import ExportError
from keras_dst.surgery import is_sparse, strip

# What a message of the converter means for the user: a part of it, and the fix.
_FIXES = {
    "Could not locate": (
        "decorate your class with @keras.saving.register_keras_serializable(), in a module that "
        "can be imported"
    ),
    "TensorListReserve": (
        "build the recurrent layers with unroll=True, or a functional model with a fixed batch, "
        "keras.Input(batch_shape=(1, ...))"
    ),
    "f16>": "rebuild the model under keras.config.set_dtype_policy('float32'), with its weights",
}
# How much of the converter's words an error shows: the end, without whole configs and call stacks.
_LINES, _COLUMNS = 8, 400


def to_tflite(model: keras.Model) -> bytes:
    """The dense float32 ``.tflite`` file of a built Keras 3 model, sparse or not."""
    return conversions(model, ["float32"])[0]


def conversions(model: keras.Model, kinds: Sequence[str], samples: Any = None) -> list[bytes]:
    """Dense ``.tflite`` files of a built Keras 3 model, sparse or not.

    The model is left as it is: where it holds layers of keras_dst, a copy of it is stripped.

    Args:
        model: the model.
        kinds: ``"float32"``; ``"dynamic"``, whose weights are int8; ``"int8"``, which computes
            with integers between inputs and outputs of the model's own types.
        samples: inputs as for `model.predict`, of which ``"int8"`` takes the ranges of all values.

    Raises:
        ExportError: the model could not be converted; with the converter's own words.
    """
    here = keras.backend.backend() == "tensorflow"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "model.keras"
        if here and not is_sparse(model):
            _quietly(_convert, model, folder, kinds, samples)
        else:
            model.save(source)
            if here:
                _quietly(convert_file, source, folder, kinds, samples)
            else:
                _in_second_python(source, folder, kinds, _flat(model, samples))
        return [(folder / kind).read_bytes() for kind in kinds]


def convert_file(source: Path, folder: Path, kinds: Sequence[str], samples: Any) -> None:
    """Converts a ``.keras`` file, on TensorFlow: strips what is sparse, writes a file per kind."""
    # The file was written a moment ago by its reader: safe_mode guards against others' files.
    model = keras.saving.load_model(source, compile=False, safe_mode=False)
    _convert(strip(model), folder, kinds, samples)


def _convert(model: keras.Model, folder: Path, kinds: Sequence[str], samples: Any) -> None:
    import tensorflow as tf

    if symbolic_inputs(model) is None:
        make = functools.partial(tf.lite.TFLiteConverter.from_keras_model, model)
    else:
        # The same steps, but from_keras_model calls the model on a flat list, whatever structure
        # it takes, and hides the reason where that fails.
        saved = str(folder / "saved")
        archive = keras.export.ExportArchive()
        archive.track(model)
        call = functools.partial(model.__call__, training=False)
        archive.add_endpoint("serve", call, [_signature(model)])
        archive.write_out(saved)
        make = functools.partial(tf.lite.TFLiteConverter.from_saved_model, saved)
    for kind in kinds:
        converter = make()
        if kind != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if kind == "int8":
            from keras_dst.export.verify import named_batches

            batches = list(named_batches(model, make().convert(), samples))
            converter.representative_dataset = lambda batches=batches: iter(batches)
        (folder / kind).write_bytes(converter.convert())


def symbolic_inputs(model: keras.Model) -> Any:
    """The inputs that a model declares, in the structure it is called with; None if it does not."""
    if not hasattr(model, "inputs"):
        return None  # a subclassed model
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def input_names(model: keras.Model) -> list[str] | None:
    """The names of a functional model's inputs, in its order; None for another kind of model.

    They are those of its Input layers, which a copy keeps; the tensors of a copy are named anew.
    """
    if isinstance(model, keras.Sequential) or not hasattr(model, "inputs"):
        return None
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.InputLayer)]
    names = {id(layer.output): layer.name for layer in layers}
    return [names[id(tensor)] for tensor in model.inputs]


def _signature(model: keras.Model) -> Any:
    import tensorflow as tf

    if isinstance(model, keras.Sequential):
        # Its batch size may be that of the data it was built from.
        (tensor,) = model.inputs
        return tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, tensor.name)
    named = zip(model.inputs, input_names(model) or [], strict=True)
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype, name) for tensor, name in named]
    return keras.tree.pack_sequence_as(model.input, specs)


def _flat(model: keras.Model, samples: Any) -> list:
    """Samples in the order of the model's inputs, whatever structure they come in."""
    if samples is None:
        return []
    from keras_dst.export.verify import declared

    return keras.tree.flatten(declared(model, samples))


def _in_second_python(source: Path, folder: Path, kinds: Sequence[str], samples: list) -> None:
    np.savez(folder / "samples.npz", *samples)
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "-1",  # the first Python may hold all the memory of the GPU
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # finds the user's own classes
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(source), str(folder), *kinds],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise _conversion_error(done.stderr)


def _quietly(convert: Callable[..., None], *arguments: Any) -> None:
    with tempfile.TemporaryFile() as log:
        try:
            with _output_to(log):
                convert(*arguments)
        except Exception as error:
            log.seek(0)
            said = log.read().decode(errors="replace")
            raise _conversion_error(f"{said}\n{error}") from error


@contextlib.contextmanager
def _output_to(log: IO[bytes]) -> Iterator[None]:
    """Sends what Python and C++ print meanwhile to ``log``; the converter says a lot."""
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
    """Sends TensorFlow's log there, which keeps the stream that it began with: a notebook's."""
    import tensorflow as tf

    handlers = [h for h in tf.get_logger().handlers if isinstance(h, logging.StreamHandler)]
    before = [handler.setStream(stream) for handler in handlers]
    try:
        yield
    finally:
        for handler, own in zip(handlers, before):
            handler.setStream(own)
        # A first word to the root logger, which had no handler, has given it one.
        for new in logging.root.handlers[:]:
            if isinstance(new, logging.StreamHandler) and new.stream is stream:
                logging.root.removeHandler(new)


def _conversion_error(output: str) -> ExportError:
    fixes = "".join(f"\nFix: {fix}." for sign, fix in _FIXES.items() if sign in output)
    lines = [line[:_COLUMNS] for line in output.splitlines() if line.strip()]
    said = "\n  ".join(lines[-_LINES:])
    return ExportError(f"The model could not be converted to .tflite:\n  {said}{fixes}")


def _main(source: str, folder: str, *kinds: str) -> None:
    with np.load(Path(folder, "samples.npz")) as arrays:
        convert_file(Path(source), Path(folder), kinds, [arrays[name] for name in arrays.files])


if __name__ == "__main__":
    _main(*sys.argv[1:])
