"""Tests of the storage formats that the exporter selects, and of reasons for dense weights."""

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export import encode, flatbuffer
from keras_dst.export.decode import encoding
from keras_dst.export.encode import Format
from keras_dst.export.flatbuffer import extract_readers, read
from keras_dst.export.latency_model import CPUS, LatencyModel
from keras_dst.export.selection import Objective, select_formats, valid_formats
from tests.backends import once

from . import graphs
from .graphs import convolution, fully_connected, sparse_values, with_dynamic_images

pytestmark = once


def only(content, *goal):
    (choice,) = select_formats(content, *goal).choices
    return choice


def timer(**seconds_of):
    """Return a replacement for the timer of files, which returns a fixed time for each storage
    format.

    The timer detects the format of a weight from the ops in the file.
    """

    def seconds(contents):
        return [seconds_of[format_of(content)] for content in contents]

    return seconds


def format_of(content):
    """Return the format of the first sparse weight of a file as text, for test names."""
    model = read(content)
    kinds = [flatbuffer.op_name(model, op) for op in model.subgraphs[0].operators]
    for tensor in model.subgraphs[0].tensors:
        if tensor.sparsity is not None:
            names = ["im2col_" * ("STRIDED_SLICE" in kinds), "int8_" * (tensor.type == 9)]
            return "".join(names) + encoding(tensor) + "_densify" * ("DENSIFY" in kinds)
    return "int8" if "DEQUANTIZE" in kinds else "dense"


def partly_filled(shape, fill):
    """Return a weight that keeps one in five 1x4 blocks.

    `fill` is the fraction of nonzero values in a kept block.
    """
    values = sparse_values(shape, 0.2, block=4)
    values.reshape(-1, 4)[:, : 4 - int(4 * fill)] = 0
    return values


@pytest.mark.parametrize(
    ("values", "format"),
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
def test_selected_formats_of_fully_connected(values, format):
    choice = only(fully_connected(values))
    assert (str(choice.format), choice.reason) == (format, "")
    assert choice.bytes < values.nbytes


@pytest.mark.parametrize("op", ["CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"])
@pytest.mark.parametrize(
    ("block", "format"), [(1, "csr+densify"), (4, "1x4+densify")], ids=["csr", "1x4"]
)
def test_convolutions_unpack_their_weights(op, block, format):
    values = sparse_values((1 if op == "DEPTHWISE_CONV_2D" else 16, 3, 3, 64), 0.3, block)
    assert str(only(convolution(op, values)).format) == format


@pytest.mark.parametrize("density", [0.85, 1.0])
@pytest.mark.parametrize("make", [fully_connected, lambda w: convolution("CONV_2D", w)])
def test_a_weight_stays_dense_if_sparse_is_not_smaller(make, density):
    rank_2 = make is fully_connected
    choice = only(make(sparse_values((64, 128) if rank_2 else (16, 3, 3, 64), density)))
    assert choice.format is None
    assert choice.bytes == choice.weight.values.nbytes
    assert "which is not less" in choice.reason


def test_a_small_weight_stays_dense_because_densify_takes_bytes_too():
    choice = only(convolution("CONV_2D", sparse_values((2, 3, 3, 4), 0.3)))
    assert (choice.format, choice.reason[:17]) == (None, "csr+densify would")


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (np.float16, "float16: only float32 and int8 weights can be stored sparse"),
        (np.int8, "an int8 weight of an op on floats"),
    ],
)
def test_weights_of_other_types_stay_dense(dtype, reason):
    choice = only(fully_connected(sparse_values((64, 128), 0.1).astype(dtype)))
    assert (choice.format, choice.reason) == (None, reason)


def test_a_weight_of_rank_3_stays_dense():
    graph = graphs.File().graph()
    x = graph.dynamic([1, 128])
    weight = graph.constant(sparse_values((2, 32, 128), 0.1))
    y = graph.op("FULLY_CONNECTED", [x, weight, -1], [1, 64], schema.FullyConnectedOptionsT())
    choice = only(graph.finish({"x": x}, {"y": y}).content())
    assert (choice.format, choice.reason) == (
        None,
        "FULLY_CONNECTED with a weight of rank 3, not 2",
    )


def two_readers(second, output=False):
    """Return a file in which a FULLY_CONNECTED op and a second op read the same weight."""
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


def test_fully_connected_ops_directly_read_a_shared_weight():
    assert str(only(two_readers("FULLY_CONNECTED")).format) == "csr"


@pytest.mark.parametrize("op", ["ADD", "BATCH_MATMUL"])
def test_a_weight_that_another_op_reads_stays_dense(op):
    choice = only(two_readers(op))
    assert (choice.format, choice.reason) == (None, f"read by {op}, which accepts no sparse weight")


def test_a_weight_that_is_an_output_stays_dense():
    choice = only(two_readers(None, output=True))
    assert (choice.format, choice.reason) == (
        None,
        "read by OUTPUT, which accepts no sparse weight",
    )


def test_a_weight_that_no_op_reads_stays_dense():
    graph = graphs.File().graph()
    graph.constant(sparse_values((64, 64), 0.1))
    x = graph.dynamic([1, 4])
    choice = only(graph.finish({"x": x}, {"y": x}).content())
    assert (choice.format, choice.reason, choice.weight.op) == (None, "no op reads it", "none")


def test_a_buffer_with_two_shapes_stays_dense():
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
    assert (choice.format, choice.reason) == (None, "ops read it in several shapes")


# CONV is a file with a 3x3 convolution, and FC is a file with a fully connected layer. In the tests
# with these files, a fake timer returns fixed seconds.
CONV = convolution("CONV_2D", sparse_values((64, 3, 3, 64), 0.05, block=4))
FC = fully_connected(sparse_values((64, 256), 0.05, block=16))
UNPACKED = dict.fromkeys(
    ["csr_densify", "1x4_densify", "int8_csr_densify", "int8_1x4_densify", "int8"], 1.0
)


@pytest.mark.parametrize(
    ("optimize", "direct", "format"),
    [
        ("latency", 0.9, "im2col 1x4"),
        ("latency", 0.97, "1x4+densify"),
        ("latency", 1.2, "1x4+densify"),
        ("balanced", 0.5, "im2col 1x4"),
        ("balanced", 1.2, "1x4+densify"),
        ("size", 0.1, "1x4+densify"),
    ],
)
def test_the_fastest_format_is_selected(optimize, direct, format):
    times = timer(dense=1.0, im2col_1x4=direct, im2col_csr=2.0, **UNPACKED)
    choice = only(CONV, Objective(optimize, (times,)))
    assert str(choice.format) == format
    assert choice.latency_ratio == (direct if "im2col" in format else 1.0)


@pytest.mark.parametrize("seconds", [(0.3, 2.0), (2.0, 0.3), (2.0, 2.0)])
def test_a_format_that_is_slower_on_one_cpu_is_not_selected(seconds):
    timers = [timer(dense=1.0, im2col_1x4=slow, im2col_csr=3.0, **UNPACKED) for slow in seconds]
    assert str(only(CONV, Objective("latency", tuple(timers))).format) == "1x4+densify"


def test_a_format_that_makes_the_whole_file_slower_is_not_selected():
    """In this test, 1x4 blocks make the layer faster than a dense layer, but make the whole file
    slower than the dense file."""

    def seconds(contents):
        alone = not read(contents[0]).signatureDefs
        return [
            {"dense": 1.0, "im2col_1x4": 0.3 if alone else 1.5}.get(format_of(content), 1.0)
            for content in contents
        ]

    assert str(only(CONV, Objective("latency", (seconds,))).format) == "1x4+densify"


@pytest.mark.parametrize(
    ("optimize", "format"),
    [("latency", "int8 1x16"), ("size", "int8 1x16"), ("balanced", "int8 1x16")],
)
def test_weights_are_quantized_only_on_request(optimize, format):
    times = timer(dense=1.0, csr=2.0, **{"1x4": 0.5, "int8_1x16": 0.1}, **UNPACKED)
    assert str(only(FC, Objective(optimize, (times,), int8=True)).format) == format
    assert "int8" not in str(only(FC, Objective(optimize, (times,))).format)


def test_ops_that_cannot_run_alone_get_an_unpacked_format():
    def refuses_pieces(contents):
        if not read(contents[0]).signatureDefs:
            raise RuntimeError("Node number 0 failed to prepare.")
        return [1.0] * len(contents)

    assert str(only(CONV, Objective("latency", (refuses_pieces,))).format) == "1x4+densify"


def formats_of(content, int8=True):
    model = read(content)
    (weight,) = encode.weights(model)
    return {
        str(format) for format in valid_formats(weight, extract_readers(model, weight.buffer), int8)
    }


WIDE = {"csr", "csr+densify", "int8", "int8 csr+densify"}
BY_4 = WIDE | {"1x4", "1x4+densify", "int8 1x4+densify"}


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (302, WIDE),  # 302 is not a multiple of 4 or 16, so blocks would lose the last inputs.
        (300, BY_4),  # With blocks of 16, the file would lose the last 12 of the 300 inputs.
        (304, BY_4 | {"int8 1x16"}),
        (4096, BY_4 | {"int8 1x16"}),
        # A row of 4112 inputs has 257 blocks, but LiteRT's kernel for float inputs stores the
        # position of a block in one byte.
        (4112, BY_4),
    ],
)
def test_selected_formats_by_number_of_inputs(inputs, expected):
    assert formats_of(fully_connected(sparse_values((4, inputs), 0.1))) == expected


@pytest.mark.parametrize(("inputs", "right"), [(4080, True), (4096, False)])
def test_selected_formats_of_a_full_row(inputs, right):
    """LiteRT's kernel for float inputs wrongly reads a row of 256 blocks as a row of 0 blocks."""
    weight = sparse_values((4, inputs), 0.1, block=16)
    weight[1] = 1.0
    assert ("int8 1x16" in formats_of(fully_connected(weight))) == right


def test_convolutions_never_read_a_sparse_weight():
    """The exporter replaces a sparse CONV_2D op with FULLY_CONNECTED, or adds a DENSIFY op that
    unpacks the weight.

    For depthwise and transposed convolutions, a DENSIFY op must unpack the weight.
    """
    for op in ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"):
        content = convolution(op, sparse_values((1, 3, 3, 16), 0.2))
        direct = {f for f in formats_of(content) if "densify" not in f and f != "int8"}
        assert all(format.startswith("im2col") for format in direct)
        assert bool(direct) == (op == "CONV_2D")


def test_convolutions_with_groups_or_unknown_sizes_are_not_lowered():
    grouped = convolution("CONV_2D", sparse_values((8, 3, 3, 4), 0.2), shape=(1, 8, 8, 16))
    dynamic = with_dynamic_images(convolution("CONV_2D", sparse_values((8, 3, 3, 16), 0.2)))
    for content in (grouped, dynamic):
        assert not any("im2col" in format for format in formats_of(content))


def test_weights_with_nan_are_not_quantized():
    values = sparse_values((8, 32), 0.2)
    values[0, 0] = np.nan
    assert not any("int8" in format for format in formats_of(fully_connected(values)))


def test_estimated_latency_grows_with_batch_and_density():
    time = {
        (density, batch): LatencyModel(CPUS[cpu], batch)([CONV_OF[density]])[0]
        for cpu in CPUS
        for density in CONV_OF
        for batch in (1, 8)
    }
    for density in CONV_OF:
        assert time[density, 8] > 4 * time[density, 1]
    assert time[0.02, 1] < time[0.1, 1] < time[0.5, 1]


def test_estimated_latency_of_dynamic_axes():
    fixed = convolution("CONV_2D", sparse_values((8, 3, 3, 4), 1.0), shape=(1, 32, 32, None))
    for batch in (1, 8):
        a, b = LatencyModel(CPUS["x86"], batch)([fixed, with_dynamic_images(fixed)])
        assert a == b


def lowered(density):
    dense = convolution("CONV_2D", sparse_values((64, 3, 3, 64), density, block=4))
    (weight,) = encode.weights(read(dense))
    return encode.encode(dense, {weight.buffer: Format(4, unpack=False, im2col=True)})


CONV_OF = {density: lowered(density) for density in (0.02, 0.1, 0.5)}
