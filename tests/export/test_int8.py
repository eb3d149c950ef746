"""Tests of quantization to int8: rounding to nearest, exact zeros, correct results of all ops."""

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from keras_dst.export import ExportError, pipeline, quantize
from keras_dst.export.decode import values
from keras_dst.export.encode import Format, encode, encode_dense, weights
from keras_dst.export.flatbuffer import read
from keras_dst.export.selection import Objective, select_formats
from tests.backends import every, on_tensorflow, once

from .graphs import AUTO, BUILTIN, File, convolution, fully_connected, ops, run, sparse_values
from .test_export_tflite import encodings, export_tflite, prune

pytestmark = every(2)

SPARSE, DENSE = Format(1, unpack=True, int8=True), Format(0, unpack=True, int8=True)
BLOCKS = Format(4, unpack=True, int8=True)
HYBRID = Format(16, unpack=False, int8=True)


# Each row of the weight has its own int8 scale. In int8, the largest values of the first two rows,
# 2.54 and 1, become 127. The third row contains only zeros and has the scale 1.
def test_quantize_a_small_weight():
    made, parameters = quantize.quantize(
        np.array([[2.54, 0, -1.27], [1, 0.5, 0], [0, 0, 0]], np.float32), axis=0
    )
    assert made.tolist() == [[127, 0, -64], [127, 64, 0], [0, 0, 0]]
    np.testing.assert_allclose(parameters.scale, [0.02, 1 / 127, 1])
    assert parameters.zeroPoint.tolist() == [0, 0, 0]


@once
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 3]))
def test_quantization_rounds_to_nearest_and_preserves_zeros(seed, axis):
    weight = sparse_values((3, 2, 4, 5), 0.5, seed=seed)
    made, parameters = quantize.quantize(weight, axis)
    found = quantize.dequantize(made, parameters)
    step = np.abs(weight).max(axis=tuple({0, 1, 2, 3} - {axis}), keepdims=True) / 127
    assert (np.abs(found - weight) <= 0.5001 * step).all()
    assert not found[weight == 0].any()


@once
@pytest.mark.parametrize("resolver", [AUTO, BUILTIN])
@pytest.mark.parametrize("format", [SPARSE, BLOCKS, DENSE], ids=str)
@pytest.mark.parametrize(
    "dense",
    [
        fully_connected(sparse_values((24, 64), 0.3)),
        convolution("CONV_2D", sparse_values((6, 3, 3, 64), 0.3)),
        convolution("DEPTHWISE_CONV_2D", sparse_values((1, 3, 3, 64), 0.3)),
    ],
    ids=["fully connected", "convolution", "depthwise"],
)
def test_quantized_weights_equal_dense_within_rounding(dense, format, resolver):
    (weight,) = weights(read(dense))
    formats = {weight.buffer: format}
    reference = encode_dense(dense, formats)
    (rounded,) = weights(read(reference))
    axis = 3 if weight.op == "DEPTHWISE_CONV_2D" else 0
    peaks = np.abs(weight.values).max(tuple({*range(weight.values.ndim)} - {axis}), keepdims=True)
    steps = np.where(peaks > 0, peaks / 127, 1)
    np.testing.assert_allclose(rounded.values, np.rint(weight.values / steps) * steps, rtol=1e-6)
    shape = (3, 64) if weight.op == "FULLY_CONNECTED" else (3, 8, 8, 64)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = run(encode(dense, formats), x, resolver)
    np.testing.assert_allclose(found, run(reference, x, BUILTIN), atol=1e-4)


@once
@pytest.mark.parametrize("resolver", [AUTO, BUILTIN])
@pytest.mark.parametrize("inputs", [64, 4096])
def test_directly_read_int8_blocks_equal_dense_within_rounding(inputs, resolver):
    weight = sparse_values((8, inputs), 0.2, block=16)
    # The rows of the weight have very different magnitudes, so each row needs its own int8 scale.
    weight *= np.logspace(-2, 1, 8, dtype=np.float32)[:, None]
    dense = fully_connected(weight)
    formats = {w.buffer: HYBRID for w in weights(read(dense))}
    content = encode(dense, formats)
    assert ops(read(content)) == [("FULLY_CONNECTED", 8)]
    x = np.random.default_rng(0).standard_normal((3, inputs)).astype(np.float32)
    found, expected = run(content, x, resolver), x @ weight.T
    np.testing.assert_array_equal(found, run(encode_dense(dense, formats), x, BUILTIN))
    # Inputs and weights are rounded to int8. Each rounding error is at most half a quantization
    # step. A quantization step is 1/127 of the largest magnitude.
    steps_x, steps_w = np.abs(x).max(1, keepdims=True) / 127, np.abs(weight).max(1) / 127
    bound = steps_x / 2 * np.abs(weight).sum(1) + np.abs(x) @ (weight != 0).T * steps_w / 2
    assert (np.abs(found - expected) <= 1.02 * bound).all()


def test_a_transposed_convolution_is_not_quantized():
    """XNNPACK computes wrong results for a transposed convolution after DEQUANTIZE."""
    content = convolution("TRANSPOSE_CONV", sparse_values((6, 3, 3, 64), 0.1))
    (choice,) = select_formats(content, Objective("size", int8=True)).choices
    assert str(choice.format) == "csr+densify"


def integers(op, weight):
    """Return a file whose input, weight and output are int8."""
    graph = File().graph()
    width = weight.shape[-1]
    x = graph.quantized(graph.tensor([2, width] if op == "FULLY_CONNECTED" else [2, 8, 8, width]))
    kernel = graph.quantized(graph.constant(np.rint(weight * 40).clip(-127, 127).astype(np.int8)))
    if op == "FULLY_CONNECTED":
        options = schema.FullyConnectedOptionsT()
        y = graph.op(op, [x, kernel, -1], [2, len(weight)], options, version=4)
    else:
        y = graph.convolve(op, x, kernel)
        bias = graph.constant(np.zeros(len(weight), np.int32))
        graph.graph.operators[-1].inputs[2] = graph.quantized(bias, 0.1 * 0.02)
        graph.file.model.operatorCodes[-1].version = 3
        graph.graph.tensors[y].shape[0] = 2
    for tensor, scale in ((x, 0.1), (y, 1.0)):
        graph.graph.tensors[graph.quantized(tensor, scale)].type = schema.TensorType.INT8
    graph.graph.tensors[y].shapeSignature = None
    return graph.finish({"x": x}, {"y": y}).content()


@once
@pytest.mark.parametrize(
    ("op", "shape", "block", "version"),
    [
        ("FULLY_CONNECTED", (24, 304), 1, 8),
        ("FULLY_CONNECTED", (24, 304), 4, 8),
        ("FULLY_CONNECTED", (24, 304), 16, 8),
        ("CONV_2D", (16, 3, 3, 32), 1, 3),
        ("CONV_2D", (16, 3, 3, 32), 4, 3),
    ],
)
def test_sparse_weights_keep_integer_ops(op, shape, block, version):
    """If a DENSIFY op unpacks the weight, XNNPACK accepts only FULLY_CONNECTED ops of version 8."""
    dense = integers(op, sparse_values(shape, 0.1, block))
    plan = select_formats(dense, Objective("size"))
    (choice,) = plan.choices
    assert str(choice.format) == {1: "csr+densify", 4: "1x4+densify", 16: "1x16"}[block]
    assert ops(read(plan.content))[-1] == (op, version)
    x = np.random.default_rng(0).integers(-99, 99, (2, *[8, 8] * (len(shape) > 2), shape[-1]))
    expected = run(dense, x.astype(np.int8), BUILTIN)
    assert len(np.unique(expected)) > 20
    for resolver in (AUTO, BUILTIN):
        found = run(plan.content, x.astype(np.int8), resolver).astype(int)
        # XNNPACK and the built-in ops may round differently.
        np.testing.assert_allclose(found, expected, atol=1)


@pytest.fixture
def converted(monkeypatch):
    """Return a model whose conversion is replaced by a file that is built by hand.

    The exporter uses this file instead of the output of TensorFlow's converter.
    """
    weight = sparse_values((64, 320), 0.1, block=16)
    x = keras.Input((320,), name="x")
    layer = layers.Dense(64, use_bias=False)
    model = keras.Model(x, layer(x))
    layer.set_weights([weight.T])
    content = fully_connected(weight)
    monkeypatch.setattr(pipeline, "conversions", lambda model, kinds, *_: [content] * len(kinds))
    return model


def cases(values):
    """Return the batches of samples with which a file and its model are compared."""
    return [values[:1], *(values[start : start + 4] for start in range(0, 32, 4))]


def largest_rounding_error(kernel, x):
    """Return an upper bound of the error of `x @ kernel`, divided by the largest output, if both
    factors are rounded to int8.

    Let ``dx`` and ``dw`` be the rounding errors of an input ``x`` and a weight ``w``. The error of
    the rounded product is ``(x + dx) (w + dw) - x w = dx w + x dw + dx dw``. Each rounding error is
    at most half a quantization step. The sum of the magnitudes of the three terms is an upper bound
    of the error.
    """
    steps_w = np.abs(kernel).max(axis=0) / 127
    steps_x = np.abs(x).max(axis=1, keepdims=True) / 127
    stored = (kernel != 0).astype(np.float32)
    bound = np.abs(x) @ stored * steps_w / 2 + steps_x / 2 * np.abs(kernel).sum(axis=0)
    bound += steps_x / 2 * steps_w / 2 * stored.sum(axis=0)
    pairs = zip(cases(bound), cases(x @ kernel), strict=True)
    return max(limit.max() / np.abs(outputs).max() for limit, outputs in pairs)


@pytest.mark.parametrize(
    ("optimize", "format"), [("latency", "int8 1x16"), ("size", "int8 1x16"), ("balanced", None)]
)
def test_export_with_quantized_weights(converted, tmp_path, optimize, format):
    x = np.random.default_rng(0).standard_normal((32, 320)).astype(np.float32)
    report = export_tflite(
        converted, tmp_path / "m.tflite", quantize="weights", optimize=optimize, inputs=x
    )
    assert format is None or encodings(report) == [format]
    assert 1e-4 < report.max_error < largest_rounding_error(converted.layers[1].get_weights()[0], x)


def test_a_wrong_scale_is_detected(converted, tmp_path, monkeypatch):
    """Simulate a wrong int8 scale: multiply the weights of the dense file by 1.2.

    The outputs of the sparse file then agree with the outputs of Keras, but not with the outputs of
    the dense file.
    """
    larger = fully_connected(converted.layers[1].get_weights()[0].T * np.float32(1.2))
    monkeypatch.setattr(pipeline.encode, "encode_dense", lambda content, formats: larger)
    with pytest.raises(ExportError, match="stores the same weights dense"):
        export_tflite(converted, tmp_path / "m.tflite", quantize="weights", optimize="size")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "full"}, "Expected representative= together with.*missing"),
        ({"representative": np.ones((4, 320))}, "Expected representative= together with.*given"),
        ({"quantize": "int4"}, "Expected quantize to be one of .*'weights'.*Received: 'int4'"),
        ({"optimize": "speed"}, "Expected optimize to be one of 'latency'.*Received: 'speed'"),
        ({"target": "x86"}, "Expected target to be one of 'host'.*Received: 'x86'"),
        ({"threads": 0}, "threads must be a whole number >= 1. Received: threads=0"),
        ({"batch": 1.5}, "batch must be a whole number >= 1. Received: batch=1.5"),
    ],
)
def test_invalid_quantization_options_raise(converted, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_tflite(converted, tmp_path / "m.tflite", **options)


@on_tensorflow
def test_export_with_full_int8(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 16)),
            layers.Conv2D(64, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(32),
        ]
    )
    prune(model, 0.1)
    x = np.random.default_rng(0).standard_normal((40, 8, 8, 16)).astype(np.float32)
    path = tmp_path / "m.tflite"
    report = export_tflite(model, path, quantize="full", representative=x)
    assert encodings(report) == ["int8 csr+densify"] * 2
    # The output has 255 quantization steps, and the rounding errors of all layers add up to a few
    # steps.
    y = model.predict(x, verbose=0)
    step = (y.max() - y.min()) / 255
    assert report.max_error < 4 * step / min(np.abs(outputs).max() for outputs in cases(y[:32]))
    found = read(path.read_bytes())
    kept = [t for t in found.subgraphs[0].tensors if t.sparsity is not None]
    kernels = {np.size(w): w for w in model.get_weights() if w.ndim > 1}
    for tensor in kept:
        matrix = values(found, tensor)
        assert np.count_nonzero(matrix) <= np.count_nonzero(kernels[matrix.size])
