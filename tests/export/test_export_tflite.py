"""Tests of `export_tflite`: the file is correct, or an error is raised and no file is written."""

import dataclasses
import functools
import gzip
import importlib
import io
import json
import logging
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from keras import layers, ops

import keras_dst
from keras_dst.export import ExportError, ExportReport, encode, flatbuffer, pipeline
from keras_dst.export.convert import to_tflite
from keras_dst.surgery import has_sparse_layers
from tests.backends import every, on_tensorflow, slow

from .graphs import AUTO, BUILTIN, fully_connected, sparse_values
from .graphs import ops as ops_of

pytestmark = every(32)

#: Latencies are not measured, because they take time and depend on the machine.
export_tflite = functools.partial(keras_dst.export_tflite, measure=False)


def prune(model, density, block=1):
    """Prune each kernel in blocks along the axis that is the last axis in the exported file."""
    for layer in model.layers:
        layer.set_weights([pruned(w, layer, density, block) for w in layer.get_weights()])
    return model


def pruned(weight, layer, density, block):
    if weight.ndim < 2:
        return weight
    inputs_last = isinstance(layer, layers.DepthwiseConv2D | layers.Conv2DTranspose)
    values = weight if inputs_last else np.swapaxes(weight, -1, -2)
    size = block if values.shape[-1] % block == 0 else 1
    values = values * (sparse_values(values.shape, density, size) != 0)
    return values if inputs_last else np.swapaxes(values, -1, -2)


def lenet_300_100():
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            layers.Flatten(),
            layers.Dense(300, "relu"),
            layers.Dense(100, "relu"),
            layers.Dense(10, "softmax"),
        ]
    )


def residual():
    """Return a convolutional model with batch normalization, a shortcut and two outputs."""
    x = keras.Input((16, 16, 3))
    y = layers.Conv2D(32, 3, padding="same", use_bias=False)(x)
    y = layers.BatchNormalization()(y)
    stem = layers.ReLU()(y)
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(stem)
    y = layers.Conv2D(32, 3, padding="same")(y)
    y = layers.BatchNormalization()(y)
    y = layers.ReLU()(layers.Add()([stem, y]))
    up = layers.Conv2DTranspose(16, 3, strides=2)(y)
    y = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(y))
    return keras.Model(x, {"maps": up, "classes": layers.Dense(10, name="head")(y)})


def two_by_two():
    left, right = keras.Input((40,), name="right_name"), keras.Input((24,), name="a_name")
    shared = layers.Dense(64, "relu")
    both = layers.Add()([shared(layers.Dense(24)(left)), shared(right)])
    return keras.Model([left, right], [layers.Dense(32)(both), layers.Dense(48)(both)])


def check(report, model, path):
    """Check properties that all exported files must have."""
    content = path.read_bytes()
    assert isinstance(report, ExportReport)
    assert (report.path, report.bytes) == (path, len(content))
    assert report.bytes <= report.dense_bytes
    assert report.gzip_bytes == len(gzip.compress(content, 9))
    assert report.max_error <= 1e-4
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    for tensor in report.tensors:
        assert (tensor.encoding == "dense") == bool(tensor.reason)
        assert tensor.bytes <= tensor.dense_bytes
    for resolver in (AUTO, BUILTIN):
        interpreter = Interpreter(model_content=content, experimental_op_resolver_type=resolver)
        runner = interpreter.get_signature_runner()
        assert len(runner.get_output_details()) == len(model.outputs)


def encodings(report):
    return sorted(tensor.encoding for tensor in report.tensors)


@on_tensorflow
@pytest.mark.parametrize(
    ("density", "block", "expected"),
    [
        (0.05, 1, ["csr", "csr", "csr"]),
        (0.05, 4, ["1x4", "1x4", "1x4"]),
        (0.3, 1, ["csr+densify", "csr+densify", "csr+densify"]),
        (1.0, 1, ["dense", "dense", "dense"]),
        (0.0, 1, ["csr", "csr", "csr"]),
    ],
)
def test_multilayer_perceptron(tmp_path, density, block, expected):
    model = prune(lenet_300_100(), density, block)
    path = tmp_path / "model.tflite"
    report = export_tflite(model, path)
    check(report, model, path)
    assert encodings(report) == expected
    # A stored value needs 4 bytes, and an index needs 1 or 2 bytes. With 1x4 blocks, four values
    # share one index. The rest of the file, for example biases and names, needs at most 8,000
    # bytes.
    per_weight = {"csr": 6, "1x4": 4.5, "csr+densify": 6, "dense": 4}[expected[0]]
    assert report.bytes < report.dense_bytes * density * per_weight / 4 + 8000


@on_tensorflow
@pytest.mark.parametrize(("block", "expected"), [(1, "csr+densify"), (4, "1x4+densify")])
def test_residual_network_with_named_outputs(tmp_path, block, expected):
    model = prune(residual(), 0.3, block)
    path = tmp_path / "model.tflite"
    report = export_tflite(model, path)
    check(report, model, path)
    by_op = {tensor.op: tensor.encoding for tensor in report.tensors if tensor.shape[-1] == 32}
    assert by_op["CONV_2D"] == by_op["TRANSPOSE_CONV"] == expected
    assert report.bytes < report.dense_bytes / 2


@on_tensorflow
@pytest.mark.parametrize("given", [None, list, dict])
def test_export_with_several_inputs_and_outputs(tmp_path, given):
    model = prune(two_by_two(), 0.08)
    arrays = [np.ones((5, 40), np.float32), np.ones((5, 24), np.float32)]
    inputs = given and (arrays if given is list else {"right_name": arrays[0], "a_name": arrays[1]})
    path = tmp_path / "model.tflite"
    report = export_tflite(model, path, inputs=inputs, optimize="size")
    check(report, model, path)
    assert encodings(report) == ["csr"] * 4


@on_tensorflow
def test_export_with_inputs_by_name(tmp_path):
    x = {"ids": keras.Input((6,), dtype="int32", name="ids"), "b": keras.Input((6,), name="b")}
    y = layers.Flatten()(layers.Embedding(16, 8)(x["ids"]))
    model = prune(keras.Model(x, {"y": layers.Concatenate()([layers.Dense(64)(y), x["b"]])}), 0.1)
    path = tmp_path / "model.tflite"
    report = export_tflite(model, path)
    check(report, model, path)
    reasons = {tensor.op: tensor.reason for tensor in report.tensors}
    assert reasons == {
        "GATHER": "read by GATHER, which accepts no sparse weight",
        "FULLY_CONNECTED": "",
    }


@on_tensorflow
def test_302_inputs_are_not_truncated_to_300(tmp_path):
    model = prune(keras.Sequential([keras.Input((302,)), layers.Dense(64)]), 0.1)
    path = tmp_path / "model.tflite"
    report = export_tflite(model, path)
    check(report, model, path)
    assert encodings(report) == ["csr"]
    content, x = path.read_bytes(), np.zeros((1, 302), np.float32)
    x[0, 300:] = 1
    kernel, bias = model.layers[0].get_weights()
    kernel[300:] = [[3.0], [5.0]]
    model.layers[0].set_weights([kernel, bias])
    export_tflite(model, path)
    runner = Interpreter(model_content=path.read_bytes()).get_signature_runner()
    (name,) = runner.get_input_details()
    np.testing.assert_allclose(runner(**{name: x})["output_0"], np.full((1, 64), 8.0), rtol=1e-6)
    assert path.read_bytes() != content


@on_tensorflow
@pytest.mark.parametrize(("optimize", "form"), [("size", "csr"), ("latency", "csr+densify")])
def test_export_of_sequences_and_recurrence(tmp_path, optimize, form):
    """The file contains FULLY_CONNECTED ops whose inputs have rank 3, and a WHILE op that contains
    weights."""
    x = keras.Input(batch_shape=(2, 5, 32))
    y = layers.LSTM(32, return_sequences=True)(layers.Dense(32)(x))
    model = prune(keras.Model(x, y), 0.3)
    path = tmp_path / "model.tflite"
    report = export_tflite(model, path, optimize=optimize)
    check(report, model, path)
    assert {tensor.encoding for tensor in report.tensors if tensor.op == "FULLY_CONNECTED"} == {
        form
    }


@on_tensorflow
def test_export_of_attention(tmp_path):
    x = keras.Input((7, 32))
    model = keras.Model(x, layers.MultiHeadAttention(2, 16)(x, x))
    for layer in model.layers[1]._flatten_layers(include_self=False):
        layer.set_weights([w * (sparse_values(w.shape, 0.08) != 0) for w in layer.get_weights()])
    path = tmp_path / "model.tflite"
    report = export_tflite(model, path, optimize="size")
    check(report, model, path)
    assert encodings(report) == ["csr"] * 4


@on_tensorflow
def test_a_sequential_model_built_from_data_gets_an_unknown_batch_size(tmp_path):
    model = keras.Sequential([layers.Dense(4)])
    model(np.ones((7, 3), np.float32))
    path = tmp_path / "model.tflite"
    check(export_tflite(model, path), model, path)
    (detail,) = Interpreter(str(path)).get_signature_runner().get_input_details().values()
    assert detail["shape_signature"].tolist() == [-1, 3]


@on_tensorflow
def test_a_functional_model_keeps_its_batch_size(tmp_path):
    x = keras.Input(batch_shape=(2, 3))
    path = tmp_path / "model.tflite"
    export_tflite(keras.Model(x, layers.Dense(4)(x)), path)
    (detail,) = Interpreter(str(path)).get_signature_runner().get_input_details().values()
    assert detail["shape_signature"].tolist() == [2, 3]


def input_shapes(path):
    details = Interpreter(str(path)).get_signature_runner().get_input_details()
    return {name: detail["shape_signature"].tolist() for name, detail in details.items()}


@on_tensorflow
@pytest.mark.parametrize("unroll", [False, True])
def test_a_stateful_sequential_model_keeps_its_batch_size_and_states(tmp_path, unroll):
    lstm = layers.LSTM(4, stateful=True, unroll=unroll)
    model = keras.Sequential([keras.Input(batch_shape=(1, 6, 8)), lstm, layers.Dense(3)])
    model(np.ones((1, 6, 8), np.float32))
    states = [state.numpy().copy() for state in lstm.states]
    path = tmp_path / "model.tflite"
    x = np.random.default_rng(0).standard_normal((3, 6, 8)).astype(np.float32)
    export_tflite(model, path, inputs=x)
    assert list(input_shapes(path).values()) == [[1, 6, 8]]
    for before, after in zip(states, lstm.states, strict=True):
        np.testing.assert_array_equal(before, after.numpy())
    runner = Interpreter(str(path)).get_signature_runner()
    lstm.reset_state()
    # At first, all states of the LSTM are zero. Like the Keras model, the file keeps the states
    # between two calls.
    for batch in (x[:1], x[1:2]):
        found = next(iter(runner(**dict.fromkeys(input_shapes(path), batch)).values()))
        np.testing.assert_allclose(found, keras.ops.convert_to_numpy(model(batch)), atol=1e-5)


class OptionalSum(layers.Layer):
    """Layer that returns the sum of two inputs, or the first input if the second input is None."""

    def call(self, a, b=None):
        return a if b is None else a + b


@on_tensorflow
@pytest.mark.parametrize("given", [None, "a", "ab"])
def test_an_optional_input_that_is_none_is_left_out(tmp_path, given):
    a, b = keras.Input((16,), name="a"), keras.Input((16,), name="b", optional=True)
    model = keras.Model({"a": a, "b": b}, layers.Dense(2)(OptionalSum()(a, b)))
    x = np.ones((3, 16), np.float32)
    inputs = given and {"a": x, "b": x if "b" in given else None}
    path = tmp_path / "model.tflite"
    export_tflite(model, path, inputs=inputs)
    assert sorted(input_shapes(path)) == list(given or "ab")


@on_tensorflow
def test_a_sparse_input_is_exported_as_dense(tmp_path):
    import tensorflow as tf

    x = keras.Input((16,), sparse=True, name="x")
    path = tmp_path / "model.tflite"
    export_tflite(keras.Model(x, layers.Dense(4)(x)), path, inputs=tf.sparse.eye(16))
    assert input_shapes(path) == {"x": [-1, 16]}


@on_tensorflow
def test_tensorflow_replaces_special_characters_in_input_names(tmp_path):
    x = [keras.Input((3,), name=name) for name in ("my-input", "1x.y", "größe", "_x", "self")]
    path = tmp_path / "model.tflite"
    export_tflite(keras.Model(x, layers.Dense(3)(layers.Concatenate()(x))), path)
    names = ["1x_y", "gr__e", "input__x", "input_self", "my_input"]
    assert sorted(input_shapes(path)) == names


@on_tensorflow
def test_export_of_a_model_with_infinite_outputs(tmp_path):
    x = keras.Input((3,))
    model = keras.Model(x, ops.where(x > 0, layers.Dense(3)(x), -np.inf))
    assert export_tflite(model, tmp_path / "model.tflite").max_error < 1e-6


@on_tensorflow
@pytest.mark.parametrize("size", [None, 20])
def test_dynamic_axes_have_the_sizes_of_the_samples_in_measurements(tmp_path, size):
    x = keras.Input((None, 4), name="x")
    y = layers.GlobalAveragePooling1D()(layers.Conv1D(8, 5)(x))
    model = keras.Model(x, layers.Dense(3)(y))
    inputs = size and np.ones((3, size, 4), np.float32)
    report = keras_dst.export_tflite(model, tmp_path / "model.tflite", inputs=inputs)
    assert report.shapes == {"x": (1, size or 32, 4)}
    assert f"thread(s), input 'x' of shape (1, {size or 32}, 4)." in str(report)
    assert report.files[-1].latency > 0


def words():
    x = keras.Input((1,), dtype="string", name="word")
    one_hot = layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")
    return keras.Model(x, layers.Dense(2)(one_hot(x)))


@on_tensorflow
def test_export_of_a_model_with_string_inputs(tmp_path):
    path, x = tmp_path / "model.tflite", np.array([["a"], ["c"]])
    with pytest.raises(
        ValueError, match=r"Expected inputs= for a model with string inputs.*'word'"
    ):
        export_tflite(words(), path)
    with pytest.raises(ExportError, match="numeric inputs for full int8 quantization"):
        export_tflite(words(), path, quantize="full", representative=x)
    assert list(tmp_path.iterdir()) == []
    report = keras_dst.export_tflite(words(), path, inputs=x)
    assert report.max_error < 1e-6


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="TensorFlow has strings")
def test_a_model_with_string_inputs_needs_tensorflow(tmp_path):
    with pytest.raises(ExportError, match=r"string inputs(.|\n)*Fix: .*KERAS_BACKEND=tensorflow"):
        export_tflite(words(), tmp_path / "model.tflite", inputs=np.array([["a"]]))


def backend_square(x):
    """Return the square of a tensor, computed by a function of the backend, not of keras.ops."""
    if keras.backend.backend() == "jax":
        import jax.numpy as jnp

        return jnp.square(x)
    import torch

    return torch.square(x)


@every(0)
@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="TensorFlow code converts")
def test_a_lambda_with_backend_code_raises(tmp_path):
    model = keras.Sequential(
        [keras.Input((4,)), layers.Lambda(lambda x: backend_square(x)), layers.Dense(2)]
    )
    message = r"cannot be called on TensorFlow(.|\n)*Fix: write .* with keras.ops"
    with pytest.raises(ExportError, match=message):
        export_tflite(model, tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


@on_tensorflow
def test_export_of_a_subclassed_model(tmp_path):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(64)

        def call(self, x):
            return self.dense(x)

    model = Net()
    model(np.ones((2, 32), np.float32))
    kernel, bias = model.dense.get_weights()
    model.dense.set_weights([kernel * (sparse_values(kernel.shape, 0.1) != 0), bias])
    report = export_tflite(model, tmp_path / "model.tflite", optimize="size")
    assert encodings(report) == ["csr"]


@on_tensorflow
def test_conversion_prints_nothing(capfd):
    to_tflite(lenet_300_100())
    assert capfd.readouterr() == ("", "")


@on_tensorflow
def test_conversion_prints_nothing_in_a_notebook(monkeypatch):
    import tensorflow as tf

    cell = io.StringIO()
    handler = logging.StreamHandler(cell)
    log = tf.get_logger()
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "level", logging.INFO)
    to_tflite(lenet_300_100())
    assert handler.stream is cell
    assert not cell.getvalue()


@on_tensorflow
def test_conversion_adds_no_handler_to_the_root_logger(monkeypatch):
    # Python adds a handler for stderr if a message is sent to a root logger without handlers.
    monkeypatch.setattr(logging.root, "handlers", [])
    to_tflite(lenet_300_100())
    assert logging.root.handlers == []


@on_tensorflow
@pytest.mark.parametrize(
    ("last", "message"),
    [
        (lambda x: layers.LSTM(3)(x[:, None]), "TensorListReserve(.|\n)*Fix: .*unroll=True"),
        (layers.Dense(3, dtype="mixed_float16"), r"f16>(.|\n)*set_dtype_policy\('float32'\)"),
        (layers.Dense(3, dtype="float64"), "MatMul.*f64>(.|\n)*float32"),
        (lambda x: ops.argmax(x, -1), "BitwiseAnd, part of keras.ops.argmax(.|\n)*Fix: compute"),
        (lambda x: ops.erfinv(ops.tanh(x)), "Erfinv, at .*erfinv(.|\n)*Fix: compute"),
        (layers.Lambda(ops.erfinv, name="inverse"), "Erfinv, at .* in layer 'inverse'"),
        (lambda x: ops.fft((x, x))[0], "FFT(.|\n)*Fix: .*real and imaginary"),
        (layers.Hashing(5), "AsString(.|\n)*Fix: process the strings outside"),
        (lambda x: {"a": {"b": x + 1}}, "non-Tensor(.|\n)*Fix: return .*a dict that is not nested"),
    ],
    ids=[
        *("LSTM", "mixed_float16", "float64", "argmax", "erfinv", "Lambda", "complex", "strings"),
        "nested outputs",
    ],
)
def test_models_that_cannot_be_converted_raise(tmp_path, last, message):
    x = keras.Input((4,), dtype="int32" if isinstance(last, layers.Hashing) else None)
    with pytest.raises(ExportError, match=f"could not be converted(.|\n)*{message}"):
        export_tflite(keras.Model(x, last(x)), tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


# JAX and PyTorch convert with the same code.
@every(1 if keras.backend.backend() == "tensorflow" else 0)
def test_export_does_not_change_a_sparse_model(tmp_path, monkeypatch):
    """Test a conversion in the same process on TensorFlow, and in a second process on PyTorch.

    The model has a layer class and an activation function of a module of the user.
    """
    code = "from keras import layers\nclass Own(layers.Dense): pass\ndef double(x): return 2 * x\n"
    (tmp_path / "own_layers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_layers")
    image, extra = keras.Input((16, 16, 3)), keras.Input((8,))
    y = layers.Conv2D(32, 3, padding="same", use_bias=False)(image)
    y = layers.ReLU()(layers.BatchNormalization()(y))
    y = layers.Add()([y, layers.Conv2D(32, 3, padding="same")(y)])
    y = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(y))
    y = own.Own(40, own.double)(layers.Concatenate()([y, extra]))
    model = keras.Model([extra, image], {"b": layers.Dense(32)(y), "a": layers.Dense(64)(y)})
    keras_dst.sparsify(model, keras_dst.methods.DST(), filters="(conv2d|dense).*")
    for variable in model.trainable_variables:
        if "threshold" in variable.path:
            variable.assign(np.full(variable.shape, 0.1))
    before = {layer.name: type(layer) for layer in model.layers}
    weights = model.get_weights()
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((6, *shape)).astype(np.float32) for shape in ((8,), (16, 16, 3))]
    path = tmp_path / "exported" / "model.tflite"
    path.parent.mkdir()
    report = export_tflite(model, path, inputs=x)
    check(report, model, path)
    # In the large kernel, most initial weights are below the threshold 0.1. In the kernels of the
    # output layers, only half of the initial weights are below 0.1.
    forms = {tensor.shape: (tensor.encoding, tensor.density < 0.7) for tensor in report.tensors}
    assert forms[32, 3, 3, 32] == forms[32, 40] == forms[64, 40] == ("csr+densify", True)
    assert has_sparse_layers(model)
    assert {layer.name: type(layer) for layer in model.layers} == before
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@slow
@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="needs no second Python")
def test_a_class_that_cannot_be_imported_raises(tmp_path):
    class Local(layers.Dense):
        pass

    model = keras.Sequential([keras.Input((8,)), Local(4)])
    with pytest.raises(ExportError, match="class 'Local' is not known to the process"):
        export_tflite(model, tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


# The tests below do not convert models: the fixture `converted` replaces each conversion by a given
# file.

WEIGHT = sparse_values((64, 32), 0.1)


@pytest.fixture
def model():
    x = keras.Input((32,), name="x")
    layer = layers.Dense(64, use_bias=False)
    model = keras.Model(x, layer(x))
    layer.set_weights([WEIGHT.T])
    return model


@pytest.fixture
def converted(monkeypatch):
    """Return a function that replaces the conversion of models: every conversion then returns a
    file with the given weight."""

    def convert_to(weight):
        content = fully_connected(weight, name="dense/MatMul")
        monkeypatch.setattr(
            pipeline, "conversions", lambda model, kinds, *_: [content] * len(kinds)
        )
        return content

    convert_to(WEIGHT)
    return convert_to


@pytest.fixture
def path(tmp_path):
    """Return the path of an existing file that a failed export must not change."""
    path = tmp_path / "model.tflite"
    path.write_bytes(b"older")
    return path


def is_untouched(path):
    return [entry.name for entry in path.parent.iterdir()] == [path.name] and (
        path.read_bytes() == b"older"
    )


def test_report(model, converted, path):
    dense = flatbuffer.write(flatbuffer.read(converted(WEIGHT)))
    report = export_tflite(model, str(path))
    check(report, model, path)
    (tensor,) = report.tensors
    assert (report.dense_bytes, report.bytes) == (len(dense), path.stat().st_size)
    assert (tensor.name, tensor.op, tensor.shape) == ("dense/MatMul", "FULLY_CONNECTED", (64, 32))
    assert (tensor.encoding, tensor.reason) == ("csr+densify", "")
    assert tensor.density == np.count_nonzero(WEIGHT) / WEIGHT.size
    assert tensor.dense_bytes == WEIGHT.nbytes

    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == {
        **plain,
        "tensors": [{**plain["tensors"][0], "shape": [64, 32]}],
    }
    assert plain["path"] == str(path)

    *tables, last = str(report).splitlines()
    assert last.startswith(f"model.tflite: {report.bytes:,} bytes (")
    ratios = report.bytes / report.dense_bytes, report.gzip_bytes / report.dense_gzip_bytes
    assert "({:.2f}x of dense, gzip {:.2f}x)".format(*ratios) in last
    assert last.endswith(f"max error {report.max_error:.0e}")
    cells = [cell.strip() for cell in tables[2].strip("|").split("|")]
    assert cells[:4] == ["dense/MatMul", "FULLY_CONNECTED", "64x32", f"{tensor.density:.1%}"]
    assert cells[4] == tensor.encoding
    assert [file.name for file in report.files] == ["dense float32", "this file"]
    assert str(report).count(" ? |") == 2 * 5
    assert "A question mark means that the value was not measured." in tables
    assert "\x1b" not in str(report)


def test_report_contains_measured_latency_and_accuracy(model, converted, path, monkeypatch):
    monkeypatch.setattr(
        pipeline, "loads_and_latencies", lambda contents, **_: ([3, 2, 1], [4, 1, 2])
    )
    monkeypatch.setattr(pipeline, "peak_memory", lambda content, **_: 5_000_000)
    monkeypatch.setattr(pipeline, "latencies", lambda contents, **_: [1.0] * len(contents))
    x = np.random.default_rng(0).standard_normal((50, 32)).astype(np.float32)
    y = model.predict(x, verbose=0).argmax(-1)
    y[:10] = (y[:10] + 1) % 64
    for evaluate in ((x, y), (x, np.eye(64)[y]), lambda f: np.mean(f(x).argmax(-1) == y)):
        lines = []
        report = export_tflite(model, path, measure=True, evaluate=evaluate, progress=lines.append)
        _, int8, ours = report.files
        assert (int8.name, ours.name) == ("dense int8", "this file")
        assert (ours.latency, ours.load, ours.memory, ours.bytes) == (2, 1, 5_000_000, report.bytes)
        assert [file.accuracy for file in report.files] == [0.8] * 3
        assert lines[0] == "converting"
        assert lines[-1] == "measuring"
    row = next(line for line in str(report).splitlines() if "this file" in line)
    assert "| 0.500 |" in row
    assert "80.00%" in row


def test_evaluate_needs_class_labels(model, converted, path):
    with pytest.raises(ValueError, match=r"Expected evaluate=.x, y.*Received: str"):
        export_tflite(model, path, evaluate="x")
    narrow = keras.Sequential([keras.Input((32,)), layers.Dense(1, use_bias=False)])
    converted(narrow.get_weights()[0].T.copy())
    with pytest.raises(ValueError, match="one output that has a value for each class"):
        export_tflite(narrow, path, evaluate=(np.ones((4, 32)), np.ones(4)))
    assert is_untouched(path)


MULTI_HOT = np.eye(64)[[0, 1, 2, 3]] + np.eye(64)[4]


@pytest.mark.parametrize(
    "labels",
    [np.full((4, 64), 0.3), np.full(4, 0.5), MULTI_HOT, np.array(["a"] * 4), np.full(4, np.nan)],
    ids=["regression", "fractions", "multi-hot", "strings", "NaN"],
)
def test_labels_of_other_tasks_raise(never_converted, model, tmp_path, labels):
    x = np.ones((4, 32), np.float32)
    message = (
        "Expected integers or one-hot vectors as labels in evaluate.*Fix: pass evaluate=lambda"
    )
    with pytest.raises(ValueError, match=message):
        export_tflite(model, tmp_path / "model.tflite", evaluate=(x, labels))


@pytest.mark.parametrize("dtype", [bool, np.int8, np.float32])
def test_labels_of_every_dtype(model, converted, path, dtype):
    x = np.random.default_rng(0).standard_normal((50, 32)).astype(np.float32)
    y = model.predict(x, verbose=0).argmax(-1)
    labels = [np.eye(64, dtype=dtype)[y]]
    labels += [] if dtype is bool else [y.astype(dtype), y[:, None].astype(dtype)]
    labels += [0.9 * np.eye(64)[y] + 0.1 / 64] if dtype is np.float32 else []
    for given in labels:
        report = export_tflite(model, path, evaluate=(x, given))
        assert report.files[-1].accuracy == 1


def test_report_of_a_dense_model_gives_reasons(converted, tmp_path):
    x = keras.Input((32,), name="x")
    layer = layers.Dense(64, use_bias=False)
    model = keras.Model(x, layer(x))
    converted(layer.get_weights()[0].T.copy())
    path = tmp_path / "model.tflite"
    report = export_tflite(model, path)
    check(report, model, path)
    assert report.bytes == report.dense_bytes
    assert "which is not less" in str(report)


def test_a_wrong_dense_conversion_raises(model, converted, path):
    wrong = WEIGHT.copy()
    wrong[0, 0] += 1
    converted(wrong)
    with pytest.raises(ExportError, match="The dense conversion by TensorFlow already differs"):
        export_tflite(model, path)
    assert is_untouched(path)
    export_tflite(model, path, tolerance=1.0)
    assert not is_untouched(path)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (np.nan, {}, "Received: NaN in output 'output_0'.*Fix: pass inputs="),
        (
            np.inf,
            {"quantize": "full", "representative": np.ones((4, 32))},
            "Received: infinity in output 'output_0', .*Fix: replace infinity",
        ),
    ],
    ids=["NaN", "infinity"],
)
def test_outputs_that_no_file_can_reproduce_raise(model, converted, path, value, options, message):
    broken = keras.Model(model.input, model.output + value)
    with pytest.raises(ExportError, match=message):
        export_tflite(broken, path, **options)
    assert is_untouched(path)


def test_the_error_identifies_a_wrong_sparse_weight(model, converted, path, monkeypatch):
    pack = encode.pack

    def wrong(values, block):
        sparsity, stored = pack(values, block)
        return sparsity, stored[::-1].copy()

    monkeypatch.setattr(encode, "pack", wrong)
    with pytest.raises(ExportError, match=r"at fault: 'dense/MatMul' \(FULLY_CONNECTED, csr"):
        export_tflite(model, path)
    assert is_untouched(path)


def test_the_error_if_the_file_is_wrong_but_every_single_weight_is_right(
    model, converted, path, monkeypatch
):
    select_formats = pipeline.select_formats
    whole = fully_connected(WEIGHT * 2)
    monkeypatch.setattr(
        pipeline,
        "select_formats",
        lambda *a: dataclasses.replace(select_formats(*a), content=whole),
    )
    with pytest.raises(ExportError, match="every sparse weight is correct individually"):
        export_tflite(model, path)
    assert is_untouched(path)


@pytest.mark.parametrize("failing", ["os.replace", "os.fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_file(model, converted, path, monkeypatch, failing, error):
    def fail(*_):
        # The folder contains the existing file and the temporary file.
        assert len(list(path.parent.iterdir())) == 2
        raise error

    monkeypatch.setattr(failing, fail)
    with pytest.raises(type(error)):
        export_tflite(model, path)
    assert is_untouched(path)


def test_a_new_file_has_default_permissions(model, converted, path):
    (path.parent / "other").touch()
    export_tflite(model, path)
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


DATA = {
    "evaluate, too few labels": ({"evaluate": (np.ones((4, 32)), np.ones(3))}, "4 samples and 3"),
    "evaluate, a string": ({"evaluate": "x"}, "Received: str"),
    "inputs, shape": ({"inputs": np.ones((4, 31))}, r"Received: an array of shape \(4, 31\)"),
    "inputs, an empty generator": ({"inputs": iter([])}, "Received: no batch"),
    "representative, strings": (
        {"representative": np.array([["a"] * 32]), "quantize": "full"},
        "Expected representative of type float32",
    ),
}


def test_calibrating_a_recurrent_loop_raises(never_converted, tmp_path):
    model = keras.Sequential([keras.Input(batch_shape=(1, 6, 8)), layers.LSTM(4, name="loop")])
    x = np.ones((4, 6, 8), np.float32)
    with pytest.raises(ExportError, match=r"unroll=True for full int8 quantization.*\['loop'\]"):
        export_tflite(model, tmp_path / "m.tflite", quantize="full", representative=x)


def test_a_large_fixed_batch_is_compared_and_calibrated():
    x = keras.Input(batch_shape=(40, 8))
    model = keras.Model(x, layers.Dense(3)(x))
    settings = pipeline.Settings(0.3, quantize="full", representative=np.ones((80, 8), "float32"))
    data = pipeline._read_data(model, settings)
    assert (len(data.samples), len(data.calibration)) == (40, 80)


@pytest.mark.parametrize(("options", "message"), DATA.values(), ids=DATA)
def test_data_is_checked_before_conversion(never_converted, model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_tflite(model, tmp_path / "model.tflite", **options)


@pytest.fixture
def never_converted(monkeypatch):
    """Fail the test if `export_tflite` converts a model before it checks its arguments."""

    def fail(*_, **__):
        raise AssertionError("the model was converted before the arguments were checked")

    monkeypatch.setattr(pipeline, "conversions", fail)


class Net(keras.Model):
    def call(self, x):
        return x


TfKerasModel = type("Model", (), {"__module__": "tf_keras.src.engine.training"})
TorchModule = type("Linear", (), {"__module__": "torch.nn.modules.linear"})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("model.keras", r"Received: builtins.str.*keras.saving.load_model\(path\)"),
        (layers.Dense(3, name="d"), r"Received: the layer 'd' \(Dense\). Fix: keras.Sequential"),
        (TfKerasModel(), "Keras 2 model"),
        (TorchModule(), "torch module"),
        (3, "Received: builtins.int"),
    ],
)
def test_exporting_other_objects_than_models_raises(never_converted, tmp_path, wrong, message):
    with pytest.raises(TypeError, match=message):
        export_tflite(wrong, tmp_path / "model.tflite")


@pytest.mark.parametrize("unbuilt", [keras.Sequential([layers.Dense(3)]), Net()])
def test_exporting_an_unbuilt_model_raises(never_converted, tmp_path, unbuilt):
    with pytest.raises(ValueError, match="call it once on data"):
        export_tflite(unbuilt, tmp_path / "model.tflite")


@pytest.mark.parametrize("tolerance", [-1e-6, float("nan"), float("inf")])
def test_an_invalid_tolerance_raises(never_converted, model, tmp_path, tolerance):
    with pytest.raises(ValueError, match="Expected a finite tolerance"):
        export_tflite(model, tmp_path / "model.tflite", tolerance=tolerance)


def test_paths_that_cannot_be_written_raise(never_converted, model, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"Fix: create .*missing"):
        export_tflite(model, tmp_path / "missing" / "model.tflite")
    with pytest.raises(IsADirectoryError, match="Received: the folder"):
        export_tflite(model, tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"Fix: make .* writable"):
        export_tflite(model, tmp_path / "model.tflite")


@pytest.mark.parametrize("package", ["tensorflow", "ai_edge_litert", "flatbuffers"])
def test_missing_packages_raise(never_converted, model, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}. Fix: pip .* keras_dst\[export\]"):
        export_tflite(model, tmp_path / "model.tflite")


@every(0)
def test_importing_keras_dst_needs_no_optional_package():
    packages = ["ai_edge_litert"]
    if keras.backend.backend() != "tensorflow":  # TensorFlow itself needs flatbuffers
        packages += ["flatbuffers", "tensorflow"]
    blocked = "".join(f"sys.modules[{package!r}] = None; " for package in packages)
    code = f"import sys; {blocked}import keras_dst.export; keras_dst.export.export_tflite"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_ops_of_an_exported_file(model, converted, path):
    export_tflite(model, path)
    assert ops_of(flatbuffer.read(path.read_bytes())) == [("DENSIFY", 1), ("FULLY_CONNECTED", 1)]
