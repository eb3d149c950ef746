"""The rules: which weight gets which form, and the reason where it stays dense."""

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export.choose import choose

from . import graphs
from .graphs import convolution, fully_connected, sparse_values


def only(content):
    (choice,) = choose(content)
    return choice


def partly_filled(shape, fill):
    """1x4 blocks of which one in five is kept, each with this fraction of its values."""
    values = sparse_values(shape, 0.2, block=4)
    values.reshape(-1, 4)[:, : 4 - int(4 * fill)] = 0
    return values


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (sparse_values((64, 128), 0.10), "csr"),
        (sparse_values((64, 128), 0.14), "csr+densify"),
        (sparse_values((64, 128), 0.0), "csr"),
        (sparse_values((64, 128), 0.10, block=4), "1x4"),
        (sparse_values((64, 128), 0.60, block=4), "1x4"),
        (partly_filled((64, 128), 0.75), "1x4"),
        (partly_filled((64, 128), 0.5), "csr"),
        (sparse_values((64, 302), 0.10), "csr"),
        (sparse_values((64, 302), 0.30), "csr+densify"),
        (sparse_values((64, 302), 0.30, block=2), "csr+densify"),
    ],
)
def test_fully_connected(values, form):
    choice = only(fully_connected(values))
    assert (str(choice.form), choice.reason) == (form, "")
    assert choice.bytes < values.nbytes


@pytest.mark.parametrize("op", ["CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"])
@pytest.mark.parametrize(
    ("block", "form"), [(1, "csr+densify"), (4, "1x4+densify")], ids=["csr", "1x4"]
)
def test_convolutions_are_unpacked(op, block, form):
    values = sparse_values((1 if op == "DEPTHWISE_CONV_2D" else 16, 3, 3, 64), 0.3, block)
    assert str(only(convolution(op, values)).form) == form


@pytest.mark.parametrize("density", [0.85, 1.0])
@pytest.mark.parametrize("make", [fully_connected, lambda w: convolution("CONV_2D", w)])
def test_dense_where_sparse_is_no_smaller(make, density):
    rank_2 = make is fully_connected
    choice = only(make(sparse_values((64, 128) if rank_2 else (16, 3, 3, 64), density)))
    assert choice.form is None
    assert choice.bytes == choice.weight.values.nbytes
    assert "no smaller" in choice.reason


def test_dense_where_the_op_that_unpacks_costs_more_than_it_saves():
    choice = only(convolution("CONV_2D", sparse_values((2, 3, 3, 4), 0.3)))
    assert (choice.form, choice.reason[:24]) == (None, "csr+densify is no smalle")


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_only_float32_is_encoded(dtype):
    choice = only(fully_connected(sparse_values((64, 128), 0.1).astype(dtype)))
    assert (choice.form, choice.reason) == (None, f"{np.dtype(dtype)}: only float32 is encoded")


def test_fully_connected_of_another_rank_stays_dense():
    graph = graphs.File().graph()
    x = graph.dynamic([1, 128])
    weight = graph.constant(sparse_values((2, 32, 128), 0.1))
    y = graph.op("FULLY_CONNECTED", [x, weight, -1], [1, 64], schema.FullyConnectedOptionsT())
    choice = only(graph.finish({"x": x}, {"y": y}).content())
    assert (choice.form, choice.reason) == (None, "FULLY_CONNECTED over a weight of rank 3, not 2")


def two_readers(second, output=False):
    """A weight read by a FULLY_CONNECTED op and by a second op, or handed out."""
    graph = graphs.File().graph()
    x = graph.dynamic([1, 64])
    weight = graph.constant(sparse_values((64, 64), 0.1))
    y = graph.op("FULLY_CONNECTED", [x, weight, -1], [1, 64], schema.FullyConnectedOptionsT())
    outputs = {"y": y}
    if second == "FULLY_CONNECTED":
        options = schema.FullyConnectedOptionsT()
        outputs["z"] = graph.op(second, [y, weight, -1], [1, 64], options)
    elif second:
        options = getattr(
            schema, {"ADD": "AddOptionsT", "BATCH_MATMUL": "BatchMatMulOptionsT"}[second]
        )
        outputs["z"] = graph.op(second, [y, weight], [64, 64], options())
    if output:
        outputs["w"] = weight
    return graph.finish({"x": x}, outputs).content()


def test_shared_by_fully_connected_ops_is_read_directly():
    assert str(only(two_readers("FULLY_CONNECTED")).form) == "csr"


@pytest.mark.parametrize("op", ["ADD", "BATCH_MATMUL"])
def test_another_reader_keeps_it_dense(op):
    choice = only(two_readers(op))
    assert (choice.form, choice.reason) == (None, f"read by {op}, which has no sparse form")


def test_a_weight_handed_out_stays_dense():
    choice = only(two_readers(None, output=True))
    assert (choice.form, choice.reason) == (None, "read by OUTPUT, which has no sparse form")


def test_a_weight_without_a_reader_stays_dense():
    graph = graphs.File().graph()
    graph.constant(sparse_values((64, 64), 0.1))
    x = graph.dynamic([1, 4])
    choice = only(graph.finish({"x": x}, {"y": x}).content())
    assert (choice.form, choice.reason, choice.weight.op) == (None, "read by no op", "none")


def test_one_buffer_in_two_shapes_stays_dense():
    file = graphs.File()
    values = sparse_values((64, 64), 0.1)
    buffer = None
    for key, shape in (("one", (64, 64)), ("two", (32, 128))):
        graph = file.graph(key)
        x = graph.dynamic([1, shape[1]])
        weight = graph.constant(values.reshape(shape), buffer=buffer)
        buffer = graph.graph.tensors[weight].buffer
        options = schema.FullyConnectedOptionsT()
        y = graph.op("FULLY_CONNECTED", [x, weight, -1], [1, shape[0]], options)
        graph.finish({"x": x}, {"y": y})
    choice = only(file.content())
    assert (choice.form, choice.reason) == (None, "read in several shapes")
