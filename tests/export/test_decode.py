"""Tests of `decode` against values and encodings that are written by hand."""

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export.decode import encoding, unpack
from keras_dst.export.encode import Format, encode, pack, weights
from keras_dst.export.flatbuffer import read
from keras_dst.export.inspection import InspectionReport, inspect_file
from tests.backends import once

from .graphs import File, convolution, fully_connected, sparse_values

pytestmark = once


def tensor(shape, sparsity):
    made = schema.TensorT()
    made.shape, made.sparsity = np.array(shape, np.int32), sparsity
    return made


@pytest.mark.parametrize("shape", [(5, 48), (3, 2, 2, 32), (16,)], ids=str)
@pytest.mark.parametrize(("block", "name"), [(1, "csr"), (4, "1x4"), (16, "1x16")])
def test_unpack_inverts_pack(shape, block, name):
    values = sparse_values(shape, 0.3, block)
    sparsity, stored = pack(values, block)
    packed = tensor(shape, sparsity)
    assert encoding(packed) == name
    np.testing.assert_array_equal(unpack(packed, stored), values)


def axis(size=None, starts=None, columns=None):
    made = schema.DimensionMetadataT()
    if size is not None:
        made.format, made.denseSize = schema.DimensionType.DENSE, size
        return made
    made.format = schema.DimensionType.SPARSE_CSR
    made.arraySegments = schema.Uint8VectorT(np.array(starts, np.uint8))
    made.arrayIndices = schema.Uint8VectorT(np.array(columns, np.uint8))
    return made


# In this example from the TFLite schema, a weight has 2x2 blocks. The file stores the blocks column
# by column.
def test_decode_2x2_blocks_in_column_order():
    sparsity = schema.SparsityParametersT()
    sparsity.traversalOrder, sparsity.blockMap = np.array([1, 0, 2, 3]), np.array([0, 1])
    sparsity.dimMetadata = [axis(2), axis(None, [0, 1, 2], [0, 1]), axis(2), axis(2)]
    packed = tensor((4, 4), sparsity)
    assert encoding(packed) == "sparse"
    expected = [[1, 0, 0, 0], [0, 4, 0, 0], [0, 0, 2, 3], [0, 0, 0, 5]]
    stored = np.array([1, 0, 0, 4, 2, 3, 0, 5])
    np.testing.assert_array_equal(unpack(packed, stored), expected)


def test_list_constants_of_a_dense_and_a_sparse_file():
    values = sparse_values((16, 3, 3, 32), 0.25)
    dense = convolution("CONV_2D", values)
    (weight,) = weights(read(dense))
    sparse = encode(dense, {weight.buffer: Format(1, unpack=True)})
    for content, format in ((dense, "dense"), (sparse, "csr+densify")):
        report = inspect_file(content)
        kernel, bias = report.constants
        assert (kernel.name, kernel.type, kernel.shape) == ("weight", "float32", (16, 3, 3, 32))
        assert (kernel.encoding, bias.encoding) == (format, "dense")
        assert kernel.sparsity == pytest.approx(1 - weight.density)
        assert (bias.bytes, bias.shape, bias.sparsity) == (64, (16,), 0)
        assert (report.bytes, report.gzip_bytes < report.bytes) == (len(content), True)
    # CSR stores 4 bytes per value, 1 byte per column index, and 2 bytes for the start of each of
    # the 144 rows.
    stored = np.count_nonzero(values)
    assert inspect_file(sparse).constants[0].bytes == 5 * stored + 2 * (16 * 9 + 1)
    assert inspect_file(dense).constants[0].bytes == values.nbytes


def test_list_constants_of_other_types():
    graph = File().graph()
    x = graph.dynamic([1, 4])
    graph.constant(np.array([[0, 5]], np.int64), "int64")
    text = graph.constant(np.frombuffer(b"hello", np.int8), "text")
    graph.graph.tensors[text].type = schema.TensorType.STRING
    report = inspect_file(graph.finish({"x": x}, {"y": x}).content())
    found = [(row.name, row.type, row.bytes, row.sparsity) for row in report.constants]
    assert found == [("int64", "int64", 16, 0.5), ("text", "string", 5, None)]
    assert isinstance(report, InspectionReport)
    assert str(report).splitlines()[3].split("|")[-2].strip() == "?"


def test_print_the_table_of_constants():
    lines = str(inspect_file(fully_connected(sparse_values((8, 16), 0.5)))).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:5] == ["weight", "float32", "8x16", "dense", "512"]
    assert lines[-1].endswith("with gzip")
