"""The rules: which weight gets which form, and the reason where it stays dense."""

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export import encode, flatbuffer
from keras_dst.export.choose import Goal, choose, right_forms
from keras_dst.export.cost import CPUS, Modelled
from keras_dst.export.decode import encoding
from keras_dst.export.encode import Form
from keras_dst.export.flatbuffer import read, readers
from tests.backends import once

from . import graphs
from .graphs import convolution, fully_connected, sparse_values

pytestmark = once


def only(content, *goal):
    (choice,) = choose(content, *goal).choices
    return choice


def clock(**nanoseconds):
    """A clock that knows how long each form takes; it sees them by the ops of a file."""

    def seconds(contents):
        return [nanoseconds[form_of(content)] for content in contents]

    return seconds


def form_of(content):
    """The form of the first sparse weight of a file, without spaces."""
    model = read(content)
    kinds = [flatbuffer.op_name(model, op) for op in model.subgraphs[0].operators]
    for tensor in model.subgraphs[0].tensors:
        if tensor.sparsity is not None:
            names = ["im2col_" * ("STRIDED_SLICE" in kinds), "int8_" * (tensor.type == 9)]
            return "".join(names) + encoding(tensor) + "_densify" * ("DENSIFY" in kinds)
    return "int8" if "DEQUANTIZE" in kinds else "dense"


def partly_filled(shape, fill):
    """1x4 blocks of which one in five is kept, each with this fraction of its values."""
    values = sparse_values(shape, 0.2, block=4)
    values.reshape(-1, 4)[:, : 4 - int(4 * fill)] = 0
    return values


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (sparse_values((64, 128), 0.05), "csr"),
        (sparse_values((64, 128), 0.14), "csr+densify"),
        (sparse_values((64, 128), 0.0), "csr"),
        (sparse_values((64, 128), 0.10, block=4), "1x4"),
        (sparse_values((64, 128), 0.20, block=4), "1x4"),
        (partly_filled((64, 128), 0.75), "1x4"),
        (partly_filled((64, 128), 0.25), "csr"),
        (sparse_values((64, 302), 0.05), "csr"),
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


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (np.float16, "float16: only float32 and int8 are encoded"),
        (np.int8, "an int8 weight of an op on floats"),
    ],
)
def test_other_weights_of_float_ops_stay_dense(dtype, reason):
    choice = only(fully_connected(sparse_values((64, 128), 0.1).astype(dtype)))
    assert (choice.form, choice.reason) == (None, reason)


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
    weight = graph.constant(sparse_values((64, 64), 0.01))
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


# A clock that is asked: each form of a 3x3 convolution and of a fully connected layer in seconds.
CONV = convolution("CONV_2D", sparse_values((64, 3, 3, 64), 0.05, block=4))
FC = fully_connected(sparse_values((64, 256), 0.05, block=16))
UNPACKED = dict.fromkeys(
    ["csr_densify", "1x4_densify", "int8_csr_densify", "int8_1x4_densify", "int8"], 1.0
)


@pytest.mark.parametrize(
    ("optimize", "direct", "form"),
    [
        ("latency", 0.9, "im2col 1x4"),
        ("latency", 0.97, "1x4+densify"),
        ("latency", 1.2, "1x4+densify"),
        ("balanced", 0.5, "im2col 1x4"),
        ("balanced", 1.2, "1x4+densify"),
        ("size", 0.1, "1x4+densify"),
    ],
)
def test_the_clock_decides(optimize, direct, form):
    times = clock(dense=1.0, im2col_1x4=direct, im2col_csr=2.0, **UNPACKED)
    choice = only(CONV, Goal(optimize, (times,)))
    assert str(choice.form) == form
    assert choice.slowness == (direct if "im2col" in form else 1.0)


@pytest.mark.parametrize("seconds", [(0.3, 2.0), (2.0, 0.3), (2.0, 2.0)])
def test_a_form_that_is_slower_on_one_of_the_cpus_is_not_taken(seconds):
    clocks = [clock(dense=1.0, im2col_1x4=slow, im2col_csr=3.0, **UNPACKED) for slow in seconds]
    assert str(only(CONV, Goal("latency", tuple(clocks))).form) == "1x4+densify"


def test_what_is_slower_as_a_whole_is_not_taken():
    """Alone the layer is fast; in the file it is not."""

    def seconds(contents):
        alone = not read(contents[0]).signatureDefs
        return [
            {"dense": 1.0, "im2col_1x4": 0.3 if alone else 1.5}.get(form_of(content), 1.0)
            for content in contents
        ]

    assert str(only(CONV, Goal("latency", (seconds,))).form) == "1x4+densify"


@pytest.mark.parametrize(
    ("optimize", "form"),
    [("latency", "int8 1x16"), ("size", "int8 1x16"), ("balanced", "int8 1x16")],
)
def test_rounded_weights_only_when_asked(optimize, form):
    times = clock(dense=1.0, csr=2.0, **{"1x4": 0.5, "int8_1x16": 0.1}, **UNPACKED)
    assert str(only(FC, Goal(optimize, (times,), int8=True)).form) == form
    assert "int8" not in str(only(FC, Goal(optimize, (times,))).form)


def test_ops_that_cannot_run_alone_keep_a_form_that_is_no_slower():
    def refuses_pieces(contents):
        if not read(contents[0]).signatureDefs:
            raise RuntimeError("Node number 0 failed to prepare.")
        return [1.0] * len(contents)

    assert str(only(CONV, Goal("latency", (refuses_pieces,))).form) == "1x4+densify"


def forms(content, int8=True):
    model = read(content)
    (weight,) = encode.weights(model)
    return {str(form) for form in right_forms(weight, readers(model, weight.buffer), int8)}


WIDE = {"csr", "csr+densify", "int8", "int8 csr+densify"}
BY_4 = WIDE | {"1x4", "1x4+densify", "int8 1x4+densify"}


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (302, WIDE),  # blocks would lose the last 2 inputs
        (300, BY_4),  # and blocks of 16 the last 12
        (304, BY_4 | {"int8 1x16"}),
        (4096, BY_4 | {"int8 1x16"}),
        (4112, BY_4),  # a counter of the kernel for float inputs would overflow
    ],
)
def test_forms_of_a_width(inputs, expected):
    assert forms(fully_connected(sparse_values((4, inputs), 0.1))) == expected


@pytest.mark.parametrize(("inputs", "right"), [(4080, True), (4096, False)])
def test_forms_of_a_full_row(inputs, right):
    """The kernel for float inputs counts the 256 blocks of its row as none."""
    weight = sparse_values((4, inputs), 0.1, block=16)
    weight[1] = 1.0
    assert ("int8 1x16" in forms(fully_connected(weight))) == right


def test_no_convolution_reads_a_sparse_weight():
    """CONV_2D becomes another op, or its weight is unpacked; the others have that alone."""
    for op in ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"):
        content = convolution(op, sparse_values((1, 3, 3, 16), 0.2))
        direct = {f for f in forms(content) if "densify" not in f and f != "int8"}
        assert all(form.startswith("im2col") for form in direct)
        assert bool(direct) == (op == "CONV_2D")


def test_a_convolution_over_groups_or_open_maps_stays_one():
    grouped = convolution("CONV_2D", sparse_values((8, 3, 3, 4), 0.2), shape=(1, 8, 8, 16))
    model = read(convolution("CONV_2D", sparse_values((8, 3, 3, 16), 0.2)))
    for tensor in model.subgraphs[0].tensors:
        if tensor.shapeSignature is not None:
            tensor.shapeSignature = np.array([-1, -1, -1, tensor.shape[3]], np.int32)
    for content in (grouped, flatbuffer.write(model)):
        assert not any("im2col" in form for form in forms(content))


def test_weights_that_are_not_finite_are_not_rounded():
    values = sparse_values((8, 32), 0.2)
    values[0, 0] = np.nan
    assert not any("int8" in form for form in forms(fully_connected(values)))


def test_estimates_grow_with_the_batch_and_shrink_with_density():
    time = {
        (density, batch): Modelled(CPUS[cpu], batch)([CONV_OF[density]])[0]
        for cpu in CPUS
        for density in CONV_OF
        for batch in (1, 8)
    }
    for density in CONV_OF:
        assert time[density, 8] > 4 * time[density, 1]
    assert time[0.02, 1] < time[0.1, 1] < time[0.5, 1]


def lowered(density):
    dense = convolution("CONV_2D", sparse_values((64, 3, 3, 64), density, block=4))
    (weight,) = encode.weights(read(dense))
    return encode.encode(dense, {weight.buffer: Form(4, unpack=False, im2col=True)})


CONV_OF = {density: lowered(density) for density in (0.02, 0.1, 0.5)}
