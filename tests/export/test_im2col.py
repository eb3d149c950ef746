"""Tests of the replacement of CONV_2D by FULLY_CONNECTED, against a convolution in NumPy."""

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dst.export.encode import Format, encode, weights
from keras_dst.export.flatbuffer import read
from tests.backends import once

from .graphs import AUTO, BUILTIN, File, ops, run, sparse_values

pytestmark = once

RELU6 = schema.ActivationFunctionType.RELU6


def net(weight, sizes, stride, same, dilation, activation=0):
    graph = File().graph()
    x = graph.dynamic([1, *sizes, weight.shape[-1]])
    y = graph.convolve("CONV_2D", x, weight, stride, same, dilation)
    graph.graph.operators[-1].builtinOptions.fusedActivationFunction = activation
    return graph.finish({"x": x}, {"y": y}).content()


def lowered(content, block):
    (weight,) = weights(read(content))
    return encode(content, {weight.buffer: Format(block, unpack=False, im2col=True)})


def convolved(x, weight, stride, same, dilation):
    """Compute a convolution in NumPy, as one matrix product per output pixel."""
    filters, rows, columns, _ = weight.shape
    reach = [(size - 1) * dilation + 1 for size in (rows, columns)]
    if same:
        out = [-(-size // stride) for size in x.shape[1:3]]
        total = [max((n - 1) * stride + r - s, 0) for n, r, s in zip(out, reach, x.shape[1:3])]
        x = np.pad(x, [(0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)])
    else:
        out = [(size - r) // stride + 1 for size, r in zip(x.shape[1:3], reach)]
    y = np.zeros((len(x), *out, filters))
    for i, j in np.ndindex(*out):
        top, left = i * stride, j * stride
        window = x[:, top : top + reach[0] : dilation, left : left + reach[1] : dilation]
        y[:, i, j] = np.tensordot(window, weight, axes=([1, 2, 3], [1, 2, 3]))
    return y + np.linspace(-1, 1, filters)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(5, 9), st.integers(5, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2)]),
    st.booleans(),
    st.sampled_from([1, 4]),
    st.integers(1, 3),
)
def test_im2col_computes_the_convolution(sizes, kernel, steps, same, block, batch):
    stride, dilation = steps
    weight = sparse_values((6, *kernel, 4), 0.3, block)
    content = lowered(net(weight, sizes, stride, same, dilation), block)
    x = np.random.default_rng(0).standard_normal((batch, *sizes, 4)).astype(np.float32)
    expected = convolved(x, weight, stride, same, dilation)
    for resolver in (AUTO, BUILTIN):
        np.testing.assert_allclose(run(content, x, resolver), expected, atol=1e-4)


def test_im2col_keeps_the_activation():
    dense = net(sparse_values((6, 3, 3, 8), 0.5) * 3, (6, 6), 1, True, 1, RELU6)
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 8)).astype(np.float32)
    found = run(lowered(dense, 4), x)
    assert (found.min(), found.max()) == (0, 6)
    np.testing.assert_allclose(found, run(dense, x, BUILTIN), atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "stride", "same", "slices"), [(1, 1, True, 0), (1, 2, True, 1), (3, 1, False, 9)]
)
def test_im2col_number_of_ops(kernel, stride, same, slices):
    content = lowered(net(sparse_values((4, kernel, kernel, 8), 0.2), (8, 8), stride, same, 1), 4)
    names = [name for name, _ in ops(read(content))]
    assert names == ["STRIDED_SLICE"] * slices + ["CONCATENATION"] * (slices > 1) + [
        "FULLY_CONNECTED"
    ]
    assert ops(read(content))[-1] == ("FULLY_CONNECTED", 8)


def test_im2col_shares_equal_constants():
    """Convolutions of equal input size use the same constants for padding and slicing."""
    graph = File().graph()
    x = y = graph.dynamic([1, 8, 8, 8])
    for seed in (0, 1):
        weight = sparse_values((8, 3, 3, 8), 0.2, seed=seed)
        y = graph.convolve("CONV_2D", y, weight)
    dense = graph.finish({"x": x}, {"y": y}).content()
    format = Format(1, unpack=False, im2col=True)
    model = read(encode(dense, {weight.buffer: format for weight in weights(read(dense))}))
    integers = [t for t in model.subgraphs[0].tensors if t.type == schema.TensorType.INT32]
    # The file contains 20 integer constants: one for the paddings, and 19 for the slices. The
    # slices use nine arrays of start indices, nine arrays of end indices, and one array of strides.
    assert len(integers) == 1 + 9 + 9 + 1
