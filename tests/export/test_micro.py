"""Tests of files for microcontrollers, which store no zeros and run in TensorFlow Lite Micro."""

import importlib.util

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

import keras_dst
from keras_dst.export import micro, pipeline
from keras_dst.export.convert import conversions
from keras_dst.export.encode import Format, encode, weights
from keras_dst.export.flatbuffer import op_name, read, text, write
from keras_dst.export.origins import layer_at
from keras_dst.export.report import ExportError
from keras_dst.export.samples import read_samples
from tests.backends import on_tensorflow

from .graphs import fully_connected

pytestmark = on_tensorflow
x = np.random.default_rng(0).normal(size=(24, 12, 12, 4)).astype("float32")


def sparse(model, sparsity=0.9):
    """Set the smallest weights of each kernel to zero."""
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if variable.name == "kernel":
            w = rng.normal(size=variable.shape) / np.sqrt(np.prod(variable.shape[:-1]))
            variable.assign(w * (np.abs(w) > np.quantile(np.abs(w), sparsity)))
    return model


@pytest.fixture(scope="module")
def model():
    """Return a small sparse network that contains all kinds of kernels."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12, 12, 4))
    h = keras.layers.Conv2D(32, 3, padding="same", activation="relu")(inputs)
    h = keras.layers.DepthwiseConv2D(3, padding="same", activation="relu")(h)
    h = keras.layers.Conv2D(64, 1, activation="relu")(h)
    h = keras.layers.Flatten()(keras.layers.MaxPooling2D(2)(h))
    h = keras.layers.Dense(48, activation="relu")(h)
    head = keras.layers.Dense(10)
    model = sparse(keras.Model(inputs, head(h)))
    head.kernel.assign(np.random.default_rng(1).normal(size=(48, 10)))
    return model


@pytest.fixture(scope="module")
def report(model, tmp_path_factory):
    """Export the network for a microcontroller, and return the report."""
    path = tmp_path_factory.mktemp("micro") / "model.tflite"
    return keras_dst.export_tflite(
        model, path, target="micro", quantize="full", representative=x, evaluate=lambda _: 0.5
    )


def test_micro_file_decodes_weights_and_has_only_tflm_ops(report):
    file = read(report.path.read_bytes())
    (graph,) = file.subgraphs
    names = [
        text(file.operatorCodes[op.opcodeIndex].customCode) or op_name(file, op)
        for op in graph.operators
    ]
    assert names.count(micro.DECODE) == sum(not tensor.reason for tensor in report.tensors)
    assert not micro.unsupported_ops(file)
    # TensorFlow Lite Micro keeps a decoded weight only until the next op has run.
    for place, name in enumerate(names):
        if name == micro.DECODE:
            (decoded,) = graph.operators[place].outputs
            assert decoded in graph.operators[place + 1].inputs


def test_micro_file_stores_one_zero_point_and_all_scales_of_a_weight(report):
    (graph,) = read(report.path.read_bytes()).subgraphs
    channels = {
        tuple(tensor.shape): (len(scale), tensor.quantization.zeroPoint.tolist())
        for tensor in graph.tensors
        if tensor.type == schema.TensorType.INT8 and len(scale := tensor.quantization.scale) > 1
    }
    assert channels == {
        (32, 3, 3, 4): (32, [0]),
        (1, 3, 3, 32): (32, [0]),
        (64, 1, 1, 32): (64, [0]),
        (48, 2304): (48, [0]),
        (10, 48): (10, [0]),
    }


def test_micro_report_compares_the_file_with_dense_int8(report):
    found = report.micro
    assert found.bytes == report.bytes == report.path.stat().st_size
    assert found.bytes < 0.3 * found.dense_bytes
    # The arena, which is the working memory of the interpreter, also stores decoded weights.
    assert found.arena > found.dense_arena
    assert found.samples == len(x)
    assert [file.name for file in report.files] == ["dense float32", "dense int8", "this file"]
    assert report.files[1].bytes == found.dense_bytes
    assert report.files[2].accuracy == 0.5
    assert 0 < found.unread_bytes < 0.1 * found.dense_bytes
    assert "the file is not faster" in str(report)


def test_micro_format_is_chosen_per_weight(report):
    chosen = {tensor.shape: tensor for tensor in report.tensors}
    dense = chosen[(48, 2304)]
    kept = round(dense.density * 48 * 2304)
    assert dense.encoding == "int8 bitmap"
    assert dense.bytes == 48 * 2304 // 8 + 16 + kept
    head = chosen[(10, 48)]
    assert (head.encoding, head.bytes) == ("int8 dense", 480)
    assert head.reason == "the bitmap would take more bytes than the zeros that it replaces"


def test_bitmap_and_values_of_a_pruned_weight():
    values = np.array([[0, 5, 0, -3], [0, 0, 0, 127], [1, 0, 0, 0]], np.int8)
    bitmap, kept = micro._pruned(values)
    assert bitmap.tolist() == [0b01010001, 0b10000000]
    assert kept[:16].tolist() == [2, 1, 0, 0, 1] + [0] * 11
    assert kept[16:].view(np.int8).tolist() == [5, -3, 127, 1]


def test_a_weight_of_two_ops_is_decoded_twice(tmp_path):
    inputs = keras.Input((64,))
    shared = keras.layers.Dense(64)
    model = sparse(keras.Model(inputs, shared(keras.layers.ReLU()(shared(inputs)))))
    samples = np.random.default_rng(1).normal(size=(8, 64)).astype("float32")
    path = tmp_path / "model.tflite"
    keras_dst.export_tflite(model, path, target="micro", quantize="full", representative=samples)
    file = read(path.read_bytes())
    (graph,) = file.subgraphs
    codes = [text(file.operatorCodes[op.opcodeIndex].customCode) for op in graph.operators]
    assert codes.count(micro.DECODE) == 2


def test_zeros_are_preserved_and_rounded_weights_are_counted(tmp_path):
    model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(24)])
    w = np.random.default_rng(0).uniform(0.5, 1, (32, 24))
    w *= np.arange(32 * 24).reshape(32, 24) % 5 > 2
    w[1, 1:7:2] = 1e-5  # Quantization to int8 rounds weights of 1e-5 to zero.
    model.layers[0].kernel.assign(w)
    samples = np.random.default_rng(1).normal(size=(8, 32)).astype("float32")
    path = tmp_path / "model.tflite"
    report = keras_dst.export_tflite(
        model, path, target="ethos-u55-128", quantize="full", representative=samples
    )
    assert report.rounded_to_zero == 3
    assert "int8 rounds 3 nonzero weights to zero." in str(report)
    (weight,) = weights(read(path.read_bytes()))
    (tensor,) = weight.tensors
    assert len(tensor.quantization.scale) == 24
    assert tensor.quantization.zeroPoint.tolist() == [0] * 24
    assert np.array_equal(weight.values == 0, (w < 1e-4).T)


def test_weights_that_the_converter_renamed_are_counted():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6), keras.layers.Dense(6)])
    for seed, layer in enumerate(model.layers):
        w = np.random.default_rng(seed).uniform(0.5, 1, layer.kernel.shape)
        w[0, :2] = 1e-5
        layer.kernel.assign(w)
    samples = read_samples(model, np.ones((4, 8), "float32"), "representative")
    floats, integers = conversions(model, ["float32", "integer"], None, samples)
    renamed = read(integers)
    for tensor in renamed.subgraphs[0].tensors:
        tensor.name = "arith.constant"
    assert pipeline._rounded_to_zero(floats, write(renamed)) == (4, [])
    other = read(floats)
    buffer = other.buffers[weights(other)[0].buffer]
    buffer.data = np.zeros_like(buffer.data)
    assert pipeline._rounded_to_zero(write(other), write(renamed)) == (2, ["arith.constant"])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("digits_1/dense_1/MatMul;digits_1/dense_1/Relu", "dense"),
        ("digits_1/dense_1_2/MatMul", "dense_1"),
        ("digits_1/block_1/dense_1/MatMul", "dense"),
        ("digits/block/Add", "block"),
        ("digits_1/sort/TopKV2", ""),
        ("StatefulPartitionedCall:0", ""),
    ],
)
def test_the_layer_in_the_path_of_an_op(path, name):
    assert layer_at(path, {"block", "dense", "dense_1"}) == name


def test_an_op_missing_in_tflm_raises_and_no_file_is_written(tmp_path):
    inputs = keras.Input((16,))
    model = keras.Model(inputs, keras.ops.sort(keras.layers.Dense(16, name="first")(inputs)))
    samples = np.random.default_rng(1).normal(size=(8, 16)).astype("float32")
    message = r"whose ops TFLM supports. Received: TOPK_V2 \(.*/TopKV2.* after layer 'first'\)"
    with pytest.raises(ExportError, match=message):
        keras_dst.export_tflite(
            model,
            tmp_path / "model.tflite",
            target="micro",
            quantize="full",
            representative=samples,
        )
    assert not list(tmp_path.iterdir())


def test_an_input_without_a_fixed_shape_raises(tmp_path):
    layers = [keras.layers.Conv2D(8, 3), keras.layers.GlobalAveragePooling2D()]
    model = keras.Sequential([keras.Input((None, None, 4)), *layers])
    settings = {"target": "micro", "quantize": "full", "representative": x}
    with pytest.raises(
        ExportError, match=r"shape is not fixed. Fix: .* keras.Input\(\(12, 12, 4\)\)"
    ):
        keras_dst.export_tflite(model, tmp_path / "model.tflite", **settings)
    assert not list(tmp_path.iterdir())


def test_a_file_that_tflm_refuses_raises_the_reason():
    dense = fully_connected(np.eye(8, dtype=np.float32), batch=1)
    (weight,) = weights(read(dense))
    content = encode(dense, {weight.buffer: Format(1, True)})
    with pytest.raises(ExportError, match=r"exit code 1: Didn't find op for .* 'DENSIFY'"):
        micro.run_in_tflm(content, [np.zeros((1, 1, 8), np.float32)])


def test_different_outputs_in_tflm_raise(report, monkeypatch):
    content = report.path.read_bytes()
    runs = iter([micro.Run([np.zeros(3)], 1), micro.Run([np.ones(3)], 1)])
    monkeypatch.setattr(micro, "run_in_tflm", lambda *_: next(runs))
    with pytest.raises(ExportError, match="bit for bit"):
        micro.report_for(content, content, [x])


def test_micro_arguments_that_do_not_fit_raise(model, tmp_path, monkeypatch):
    path = tmp_path / "model.tflite"
    with pytest.raises(ValueError, match="Expected quantize='full' with target='micro'"):
        keras_dst.export_tflite(model, path, target="micro")
    settings = {"target": "micro", "quantize": "full"}
    with pytest.raises(ValueError, match="do not pass optimize="):
        keras_dst.export_tflite(model, path, representative=x, optimize="size", **settings)
    with pytest.raises(ValueError, match="shape"):
        keras_dst.export_tflite(model, path, representative=x[..., :2], **settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "tflite_micro" or None)
    with pytest.raises(ImportError, match=r"keras_dst\[micro\]"):
        keras_dst.export_tflite(model, path, representative=x, **settings)
    assert not list(tmp_path.iterdir())


def rules(report):
    return {(finding.level, finding.rule) for finding in report.findings}


def test_lint_for_microcontrollers(model, report, tmp_path):
    assert keras_dst.lint(report.path, "micro").findings == []
    assert keras_dst.lint(model, "micro").findings == []
    unquantized = tmp_path / "model.tflite"
    keras_dst.export_tflite(model, unquantized, optimize="size", measure=False)
    found = keras_dst.lint(unquantized, "micro")
    assert rules(found) == {
        ("error", "sparse-constant"),
        ("error", "missing-op"),
        ("advice", "float-op"),
    }
    assert str(found).startswith("model.tflite for micro: errors: ")
    with pytest.raises(ValueError, match="Expected target to be one of 'micro', 'ethos-u55-32'"):
        keras_dst.lint(unquantized, "arm")


def test_lint_for_an_npu(report):
    (finding,) = keras_dst.lint(report.path, "ethos-u55-128").errors
    assert finding.rule == "decode"
    inputs = keras.Input((16,))
    sine = keras.Model(inputs, keras.ops.sin(keras.layers.Dense(8)(inputs)))
    found = keras_dst.lint(sine, "ethos-u55-128")
    assert rules(found) >= {("advice", "cpu-op"), ("advice", "float-op")}
    assert "SIN" in {finding.where.split()[0] for finding in found.findings}
