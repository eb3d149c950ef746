"""Tests of `encode`: encoded files run, contain the same weights, and are otherwise unchanged."""

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export.encode import Format, encode, pack, weights, with_positive_zeros
from keras_dst.export.flatbuffer import read, write
from tests.backends import once

from . import graphs
from .graphs import AUTO, BUILTIN, convolution, decode, fully_connected, ops, run, sparse_values

pytestmark = once

CSR, BLOCKS = Format(1, False), Format(4, False)
CSR_DENSIFY, BLOCKS_DENSIFY = Format(1, True), Format(4, True)


def encode_all(content, format):
    return encode(content, {weight.buffer: format for weight in weights(read(content))})


def stored(model, graph=0):
    """Return the sparse tensors of a graph, and their stored values."""
    tensors = [tensor for tensor in model.subgraphs[graph].tensors if tensor.sparsity is not None]
    return [(tensor, model.buffers[tensor.buffer].data.view(np.float32)) for tensor in tensors]


# This weight has three rows, and each row has two 1x4 blocks. The first row keeps only its second
# block, the second row keeps no block, and the third row keeps both blocks.
GOLDEN = np.array(
    [[0, 0, 0, 0, 1, 2, 0, 4], [0, 0, 0, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 0, 0, 0]], np.float32
)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_negative_zeros_become_positive_zeros(dtype):
    weight = np.array([[-0.0, 1, -2, 0.0], [3, -0.0, 4, 5]], dtype)
    (found,) = weights(read(with_positive_zeros(fully_connected(weight))))
    np.testing.assert_array_equal(found.values, weight)
    np.testing.assert_array_equal(np.signbit(found.values), weight < 0)


def test_a_file_without_negative_zeros_is_unchanged():
    content = fully_connected(np.array([[0.0, 1, -2, 0]], np.float32))
    assert with_positive_zeros(content) is content


def test_blocks_of_a_small_weight():
    sparsity, values = pack(GOLDEN, 4)
    compressed = sparsity.dimMetadata[1]
    assert compressed.arraySegments.values.tolist() == [0, 1, 1, 3]
    assert compressed.arrayIndices.values.tolist() == [1, 0, 1]
    assert values.tolist() == [1, 2, 0, 4, 5, 6, 7, 8, 9, 0, 0, 0]


def test_csr_of_a_small_weight():
    sparsity, values = pack(GOLDEN, 1)
    compressed = sparsity.dimMetadata[1]
    assert compressed.arraySegments.values.tolist() == [0, 3, 3, 8]
    assert compressed.arrayIndices.values.tolist() == [4, 5, 7, 0, 1, 2, 3, 4]
    assert values.tolist() == [1, 2, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("shape", [(7, 12), (1, 4), (5, 3, 3, 8), (1, 3, 3, 16), (2, 3, 20)])
def test_encoded_weights_decode_exactly(shape, block, density):
    values = sparse_values(shape, density, block)
    sparsity, kept = pack(values, block)
    np.testing.assert_array_equal(decode(sparsity, kept, shape), values)


@pytest.mark.parametrize(
    ("shape", "density", "segments", "indices"),
    [
        ((10, 256), 0.05, schema.Uint8VectorT, schema.Uint8VectorT),
        ((10, 257), 0.99, schema.Uint16VectorT, schema.Uint16VectorT),
        ((300, 300), 0.9, schema.Int32VectorT, schema.Uint16VectorT),
        ((2, 70_000), 0.001, schema.Uint8VectorT, schema.Int32VectorT),
    ],
)
def test_index_vectors_use_the_narrowest_type(shape, density, segments, indices):
    values = sparse_values(shape, density)
    values[0, -1] = 1
    sparsity, kept = pack(values, 1)
    compressed = sparsity.dimMetadata[1]
    assert type(compressed.arraySegments) is segments
    assert type(compressed.arrayIndices) is indices
    np.testing.assert_array_equal(decode(sparsity, kept, shape), values)


def test_encoding_preserves_nan():
    values = np.array([[0, np.nan, 0, 1]], np.float32)
    np.testing.assert_array_equal(decode(*pack(values, 1), values.shape), values)


def test_a_block_size_that_does_not_divide_the_width_raises():
    with pytest.raises(ValueError, match=r"multiple of the block size 4. Received: 302"):
        pack(np.ones((2, 302), np.float32), 4)


@pytest.mark.parametrize("resolver", [AUTO, BUILTIN])
@pytest.mark.parametrize("format", [CSR, BLOCKS, CSR_DENSIFY, BLOCKS_DENSIFY], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6])
def test_sparse_fully_connected_equals_dense(format, density, resolver):
    weight = sparse_values((12, 64), density, format.block)
    content = encode_all(fully_connected(weight), format)
    ((tensor, kept),) = stored(read(content))
    np.testing.assert_array_equal(decode(tensor.sparsity, kept, weight.shape), weight)
    for batch in (1, 4):
        x = np.random.default_rng(1).standard_normal((batch, 64)).astype(np.float32)
        np.testing.assert_allclose(run(content, x, resolver), x @ weight.T, atol=1e-5)


def test_fully_connected_with_a_sparse_weight_has_version_8():
    """XNNPACK wrongly treats the sparse weight of a FULLY_CONNECTED op of version 12 as dense.

    TensorFlow's converter writes FULLY_CONNECTED ops of version 12.
    """
    content = encode_all(fully_connected(sparse_values((8, 16), 0.2)), CSR)
    assert ops(read(content)) == [("FULLY_CONNECTED", 8)]


@pytest.mark.parametrize("resolver", [AUTO, BUILTIN])
@pytest.mark.parametrize("format", [CSR_DENSIFY, BLOCKS_DENSIFY], ids=str)
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("CONV_2D", (6, 3, 3, 8)),
        ("DEPTHWISE_CONV_2D", (1, 3, 3, 8)),
        ("TRANSPOSE_CONV", (6, 3, 3, 8)),
    ],
)
def test_sparse_convolutions_equal_dense(op, shape, format, resolver):
    weight = sparse_values(shape, 0.2, format.block)
    dense = convolution(op, weight)
    content = encode_all(dense, format)
    assert [name for name, _ in ops(read(content))] == ["DENSIFY", op]
    ((tensor, kept),) = stored(read(content))
    np.testing.assert_array_equal(decode(tensor.sparsity, kept, weight.shape), weight)
    x = np.random.default_rng(1).standard_normal((1, 8, 8, 8)).astype(np.float32)
    expected = run(dense, x, BUILTIN)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(run(content, x, resolver), expected, atol=1e-5)


@pytest.mark.parametrize("op", ["CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"])
def test_a_convolution_cannot_read_a_sparse_weight_directly(op):
    content = convolution(op, sparse_values((1, 3, 3, 8), 0.2))
    with pytest.raises(
        ValueError, match=f"Received: input 1 of {op}. Fix: use a format with unpack=True"
    ):
        encode_all(content, CSR)


def test_a_sparse_input_other_than_the_weight_raises():
    graph = graphs.File().graph()
    x = graph.constant(sparse_values((4, 8), 0.2))
    weight = graph.tensor([6, 8])
    y = graph.op("FULLY_CONNECTED", [x, weight, -1], [4, 6], schema.FullyConnectedOptionsT())
    content = graph.finish({"weight": weight}, {"y": y}).content()
    with pytest.raises(ValueError, match="input 0 of FULLY_CONNECTED"):
        encode_all(content, CSR)


def shared_weight_graph(file, key, weight, buffer=None):
    """Add a graph in which two consecutive FULLY_CONNECTED ops read the same square weight."""
    graph = file.graph(key)
    x = graph.dynamic([1, weight.shape[0]])
    shared = graph.constant(weight, buffer=buffer)
    y = x
    for _ in range(2):
        y = graph.op(
            "FULLY_CONNECTED",
            [y, shared, -1],
            [1, weight.shape[0]],
            schema.FullyConnectedOptionsT(),
        )
    graph.finish({"x": x}, {"y": y})
    return graph.graph.tensors[shared].buffer


@pytest.mark.parametrize("format", [CSR, BLOCKS_DENSIFY], ids=str)
def test_encode_a_weight_shared_by_ops_graphs_and_tensors(format):
    """Two graphs read the same weight from one buffer. Each graph unpacks this weight only once."""
    weight = sparse_values((32, 32), 0.2, format.block)
    file = graphs.File()
    buffer = shared_weight_graph(file, "one", weight)
    shared_weight_graph(file, "two", weight, buffer)
    dense = file.content()
    (found,) = weights(read(dense))
    assert (found.buffer, len(found.tensors), len(found.readers)) == (buffer, 2, 4)

    content = encode(dense, {buffer: format})
    assert len(content) < len(dense)
    model = read(content)
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    for index, key in enumerate(["one", "two"]):
        names = [name for name, _ in ops(model, index)]
        assert names.count("DENSIFY") == format.unpack
        ((tensor, kept),) = stored(model, index)
        np.testing.assert_array_equal(decode(tensor.sparsity, kept, weight.shape), weight)
        for resolver in (AUTO, BUILTIN):
            result = run(content, x, resolver, key)
            np.testing.assert_allclose(result, x @ weight.T @ weight.T, atol=1e-4)


def test_encoding_changes_no_other_part_of_the_file():
    graph = graphs.File().graph()
    x = graph.dynamic([1, 8])
    first = graph.constant(sparse_values((16, 8), 0.1), "first")
    bias = graph.constant(np.arange(16, dtype=np.float32), "bias")
    hidden = graph.op("FULLY_CONNECTED", [x, first, bias], [1, 16], schema.FullyConnectedOptionsT())
    second = graph.constant(sparse_values((16, 16), 0.1), "second")
    y = graph.op("FULLY_CONNECTED", [hidden, second, -1], [1, 16], schema.FullyConnectedOptionsT())
    content = graph.finish({"x": x}, {"y": y}).content()
    before = read(content)
    buffer = before.subgraphs[0].tensors[first].buffer
    after = read(encode(content, {buffer: CSR}))

    assert after.description == before.description
    (note,) = after.metadata
    assert after.buffers[note.buffer].data.tobytes() == b"untouched"
    (signature,) = after.signatureDefs
    assert (signature.inputs[0].name, signature.inputs[0].tensorIndex) == (b"x", x)
    assert (signature.outputs[0].name, signature.outputs[0].tensorIndex) == (b"y", y)
    assert len(after.buffers) == len(before.buffers)
    for index, old in enumerate(before.buffers[1:], start=1):
        same = after.buffers[index].data.tobytes() == old.data.tobytes()
        assert same == (index != buffer)
    for old, new in zip(before.subgraphs[0].tensors, after.subgraphs[0].tensors, strict=True):
        assert (new.name, new.shape.tolist()) == (old.name, old.shape.tolist())
        assert (new.shapeSignature is None) == (old.shapeSignature is None)
    assert ops(after) == [("FULLY_CONNECTED", 8), ("FULLY_CONNECTED", 1)]


@pytest.mark.parametrize("format", [CSR, CSR_DENSIFY], ids=str)
def test_encoding_leaves_no_unused_buffer(format):
    model = read(encode_all(fully_connected(sparse_values((8, 16), 0.2)), format))
    read_by = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    read_by |= {note.buffer for note in model.metadata}
    assert read_by == set(range(len(model.buffers)))


def test_buffers_are_aligned_to_16_bytes():
    content = encode_all(fully_connected(sparse_values((5, 16), 0.3)), CSR)
    file = np.frombuffer(content, np.uint8)
    root = schema.Model.GetRootAs(file, 0)
    data = [root.Buffers(index).DataAsNumpy() for index in range(1, root.BuffersLength())]
    offsets = [vector.ctypes.data - file.ctypes.data for vector in data]
    assert all(file[offset] == vector[0] for offset, vector in zip(offsets, data, strict=True))
    assert [offset % 16 for offset in offsets] == [0] * len(offsets)


@pytest.mark.parametrize("resolver", [AUTO, BUILTIN])
def test_equal_constants_and_names_are_stored_once(resolver):
    graph, weight = graphs.File().graph(), sparse_values((64, 64), 0.5)
    x = y = graph.dynamic([1, 64])
    for _ in range(2):
        inputs, options = [y, graph.constant(weight, "twin"), -1], schema.FullyConnectedOptionsT()
        y = graph.op("FULLY_CONNECTED", inputs, [1, 64], options)
    given = graph.finish({"x": x}, {"output_0": y}).content()
    content = write(read(given))
    assert given.count(weight.tobytes()) == given.count(b"twin") == 2
    assert content.count(weight.tobytes()) == content.count(b"twin") == 1
    first, second = weights(read(content))
    assert first.buffer != second.buffer
    np.testing.assert_array_equal(first.values, weight)
    np.testing.assert_array_equal(second.values, weight)
    values = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_array_equal(run(content, values, resolver), run(given, values, resolver))


def test_weights_lists_constants_with_their_readers():
    content = fully_connected(sparse_values((6, 8), 0.5), name="dense/kernel")
    (weight,) = weights(read(content))
    assert (weight.name, weight.op) == ("dense/kernel", "FULLY_CONNECTED")
    assert weight.readers == [("FULLY_CONNECTED", 1)]
    assert weight.density == np.count_nonzero(weight.values) / 48
    assert weights(read(encode_all(content, CSR))) == []


def test_weights_after_the_flatbuffer_raise():
    file = graphs.File()
    file.model.buffers[1].offset = 4096
    with pytest.raises(ValueError, match="below 2 GB"):
        read(file.content())
