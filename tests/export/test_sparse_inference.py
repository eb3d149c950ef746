"""Tests of the search for ops that XNNPACK runs in NCHW layout.

test_sparse_kernels.py compares the results of the search with the behavior of LiteRT.
"""

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export import sparse_inference
from keras_dst.export.encode import Format, encode, weights
from keras_dst.export.flatbuffer import read
from keras_dst.export.selection import UNSAFE, Objective, select_formats
from tests.backends import once

from .graphs import AUTO, File, run, sparse_values

pytestmark = once

BY_ONE = [[0, 0], [1, 1], [1, 1], [0, 0]]
BY_TWO = [[0, 0], [2, 2], [2, 2], [0, 0]]


def entry(graph, x, filters=32, kernel=3, stride=2, same=False, pad=BY_ONE):
    for widths in pad if isinstance(pad, tuple) else [pad] * (pad is not None):
        x = graph.pad(x, widths)
    weight = sparse_values((filters, kernel, kernel, graph.shape(x)[-1]), 1.0)
    return graph.convolve("CONV_2D", x, weight, stride, same)


def pointwise(graph, x, density=0.2, stride=1):
    weight = sparse_values((32, 1, 1, graph.shape(x)[-1]), density, seed=len(graph.graph.tensors))
    return graph.convolve("CONV_2D", x, weight, stride)


def full(graph, x):
    return graph.convolve("CONV_2D", x, sparse_values((32, 3, 3, 32), 1.0))


def depthwise(kernel=3, stride=1, pad=None, channels=32, **options):
    def add(graph, x):
        x = x if pad is None else graph.pad(x, pad)
        weight = sparse_values((1, kernel, kernel, channels), 1.0)
        return graph.convolve("DEPTHWISE_CONV_2D", x, weight, stride, pad is None, **options)

    return add


def pool(kind):
    def add(graph, x):
        options = schema.Pool2DOptionsT()
        options.strideH = options.strideW = options.filterHeight = options.filterWidth = 2
        batch, height, width, channels = graph.shape(x)
        return graph.op(kind, [x], [batch, height // 2, width // 2, channels], options)

    return add


def unary(kind, options=None):
    return lambda graph, x: graph.op(kind, [x], graph.shape(x), options and options())


def binary(kind, options, other):
    """Return a function that adds an op with two operands to a graph.

    ``other(graph, x)`` adds the second operand of the op and returns its index.
    """

    def add(graph, x):
        y = other(graph, x)
        return graph.op(kind, [x, y], graph.shape(x), getattr(schema, options)())

    return add


def vector(graph, x):
    return graph.constant(np.ones((1, 1, 1, graph.shape(x)[-1]), np.float32))


def concatenated(graph, x):
    options = schema.ConcatenationOptionsT()
    options.axis = 3
    batch, height, width, channels = graph.shape(x)
    return graph.op("CONCATENATION", [x, x], [batch, height, width, 2 * channels], options)


def mean(graph, x, axes=(1, 2), keep=False, kind="MEAN"):
    options = schema.ReducerOptionsT()
    options.keepDims = keep
    shape = [1 if i in axes else size for i, size in enumerate(graph.shape(x))]
    shape = shape if keep else [size for i, size in enumerate(shape) if i not in axes]
    return graph.op(kind, [x, graph.constant(np.array(axes, np.int32))], shape, options)


def dense(graph, x, density=0.1):
    *outer, width = graph.shape(x)
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    weight = graph.constant(sparse_values((32, width), density), "dense")
    return graph.op("FULLY_CONNECTED", [x, weight, -1], [*outer, 32], options)


def reshaped(*shape):
    def add(graph, x):
        options = schema.ReshapeOptionsT()
        options.newShape = np.array(shape, np.int32)
        return graph.op("RESHAPE", [x, graph.constant(options.newShape)], list(shape), options)

    return add


def gated(*squeeze):
    """Return a function that adds a squeeze-and-excitation block to a graph.

    The functions in ``squeeze`` add the ops that compute a factor for each channel. The block
    multiplies every channel of its input by the factor of this channel.
    """

    def add(graph, x):
        y = x
        for step in squeeze:
            y = step(graph, y)
        return graph.op("MUL", [x, y], graph.shape(x), schema.MulOptionsT())

    return add


def network(*steps, size=16, channels=3, also=()):
    """Return a file with one graph. The functions in ``steps`` add ops to the graph, in order.

    If ``also`` contains the index of a function in ``steps``, the tensor that this function returns
    is an additional output of the file.
    """
    graph = File().graph()
    x = y = graph.tensor([1, size, size, channels])
    found = []
    for step in steps:
        y = step(graph, y)
        found.append(y)
    outputs = {"y": y} | {f"y{place}": found[place] for place in also}
    content = graph.finish({"x": x}, outputs).content()
    assert np.isfinite(run(content, np.ones((1, size, size, channels), np.float32), AUTO)).all()
    return content


def unpacked(content):
    """Return a copy of the file in which a DENSIFY op unpacks each sparse weight."""
    sparse = [weight for weight in weights(read(content)) if weight.density < 0.5]
    return encode(content, {weight.buffer: Format(1, unpack=True) for weight in sparse})


def verdict(content):
    model = read(unpacked(content))
    (graph,) = model.subgraphs
    assert sparse_inference.is_hinted(model, graph)
    region = sparse_inference.sparse_region(sparse_inference.read_nodes(model, graph), graph)
    assert sparse_inference.is_wrong(model) == bool(region.wrong)
    return "wrong" if region.wrong else "on" if region.nodes else "off"


def squared(kind, options):
    return lambda graph, x: graph.op(kind, [x, x], graph.shape(x), options())


def keep(graph, x):
    return mean(graph, x, keep=True)


BODY = (entry, depthwise(), pointwise)
SQUEEZE = (pointwise, unary("LOGISTIC"))
ADD, MUL = schema.AddOptionsT, schema.MulOptionsT

# A region is a part of a graph that XNNPACK can run in NCHW layout. MIDDLES maps the name of a test
# case to two values: the ops in the middle of a region, and the expected behavior of LiteRT 2.3.
# The AVX of the CPU is hidden from LiteRT. "on" means that XNNPACK runs the region with sparse
# kernels. "off" means that XNNPACK does not use sparse kernels. "wrong" means that XNNPACK runs the
# region and computes wrong outputs.
MIDDLES = {
    "nothing": ([], "on"),
    "activations": ([unary("RELU"), unary("HARD_SWISH"), unary("LOGISTIC"), unary("SIN")], "on"),
    "depthwise 5x5": ([depthwise(5)], "on"),
    "depthwise, stride 2, padded": ([depthwise(3, 2, BY_ONE), depthwise(5, 2, BY_TWO)], "on"),
    "depthwise, stride 2, same": ([depthwise(3, 2)], "wrong"),
    "depthwise 7x7": ([depthwise(7)], "wrong"),
    "depthwise, dilated": ([depthwise(dilation=2)], "wrong"),
    "3x3": ([full], "wrong"),
    "1x1, stride 2": ([lambda graph, x: pointwise(graph, x, stride=2)], "wrong"),
    "max pooling": ([pool("MAX_POOL_2D")], "wrong"),
    "average pooling": ([pool("AVERAGE_POOL_2D")], "wrong"),
    "softmax": ([unary("SOFTMAX", lambda: schema.SoftmaxOptionsT(beta=1.0))], "wrong"),
    "concatenation": ([concatenated], "wrong"),
    "residual": ([binary("ADD", "AddOptionsT", pointwise)], "on"),
    "difference": ([binary("SUB", "SubOptionsT", pointwise)], "off"),
    "plus a vector": ([binary("ADD", "AddOptionsT", vector)], "wrong"),
    "squared": ([squared("MUL", MUL)], "on"),
    "doubled": ([squared("ADD", ADD)], "off"),
    "fully connected over maps": ([dense], "on"),
    "gate by RESHAPE": ([gated(mean, reshaped(1, 1, 1, 32), *SQUEEZE)], "off"),
    "gate by keepdims": ([gated(keep, unary("LOGISTIC"))], "wrong"),
}
ENDS = {
    "mean": ([mean], "on"),
    "sum": ([lambda graph, x: mean(graph, x, kind="SUM")], "on"),
    "mean and flat": ([keep, reshaped(1, 32)], "on"),
    "mean with keepdims": ([keep], "wrong"),
    "mean with keepdims, 1x1": ([keep, pointwise, reshaped(1, 32)], "wrong"),
    "mean over channels": ([lambda graph, x: mean(graph, x, (3,))], "on"),
    "mean over height": ([lambda graph, x: mean(graph, x, (1,))], "wrong"),
    "flat": ([reshaped(1, 2048), dense], "off"),
    "maps": ([], "off"),
    "pooled": ([pool("MAX_POOL_2D"), mean], "off"),
    "two layers": ([mean, dense, dense], "wrong"),
}
ENTRIES = {
    "stride 1": {"stride": 1},
    "same": {"same": True, "pad": None},
    "not padded": {"pad": None},
    "padded on one side": {"pad": [[0, 0], [0, 1], [0, 1], [0, 0]]},
    "padded by two": {"pad": BY_TWO},
    "padded in two steps": {"pad": ([[0, 0], [1, 0], [1, 0], [0, 0]], [[0, 0], [0, 1]] * 2)},
    "5x5": {"kernel": 5},
}


@pytest.mark.parametrize(("steps", "expected"), MIDDLES.values(), ids=MIDDLES)
def test_verdict_of_ops_in_the_middle_of_a_region(steps, expected):
    assert verdict(network(*BODY, *steps, pointwise, mean)) == expected


@pytest.mark.parametrize(("steps", "expected"), ENDS.values(), ids=ENDS)
def test_verdict_of_ops_at_the_end_of_a_region(steps, expected):
    assert verdict(network(*BODY, pointwise, *steps)) == expected


@pytest.mark.parametrize("changes", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("middle", [[], [pool("MAX_POOL_2D")]], ids=["whole", "cut"])
def test_other_first_convolutions_start_no_region(changes, middle):
    begin = [lambda graph, x: entry(graph, x, **changes), pointwise]
    assert verdict(network(*begin, *middle, pointwise, mean)) == "off"


def test_a_convolution_of_four_channels_starts_no_region():
    assert verdict(network(*BODY, mean, channels=4)) == "off"


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_region_after_paddings_of_both_integer_types(dtype):
    def begin(graph, x):
        weight = sparse_values((32, 3, 3, 3), 1.0)
        return graph.convolve("CONV_2D", graph.pad(x, BY_ONE, dtype), weight, 2, same=False)

    assert verdict(network(begin, pointwise, mean)) == "on"


@pytest.mark.parametrize(("density", "expected"), [(0.30, "on"), (0.37, "off")])
def test_a_region_needs_two_thirds_zeros(density, expected):
    thin = [lambda graph, x: pointwise(graph, x, density)] * 2
    assert verdict(network(entry, *thin, mean)) == expected


def test_zeros_of_fully_connected_count_inside_the_region():
    for density, expected in ((0.1, "on"), (1.0, "off")):
        end = [mean, lambda graph, x, density=density: dense(graph, x, density)]
        assert verdict(network(*BODY, *end)) == expected


def test_feature_maps_as_outputs_give_wrong_results():
    assert verdict(network(*BODY, pointwise, mean, also=[2])) == "wrong"


def test_no_region_without_densify():
    content = network(*BODY, pool("MAX_POOL_2D"), pointwise, mean)
    assert not sparse_inference.is_wrong(read(content))
    assert sparse_inference.is_wrong(read(unpacked(content)))


@pytest.mark.parametrize(
    "step",
    [
        unary("L2_NORMALIZATION", schema.L2NormOptionsT),
        unary("LOG_SOFTMAX", schema.LogSoftmaxOptionsT),
    ],
    ids=["L2_NORMALIZATION", "LOG_SOFTMAX"],
)
def test_ops_that_xnnpack_may_run_later_count_as_wrong(step):
    """`verdict` also returns "wrong" for ops that LiteRT 2.3 does not run in XNNPACK.

    Other versions of XNNPACK may run such ops and compute wrong results.
    """
    assert verdict(network(*BODY, step, pointwise, mean)) == "wrong"


def test_zeros_of_int8_weights_before_dequantize_count():
    def quantized(graph, x):
        weight = (20 * sparse_values((32, 1, 1, 32), 0.2)).astype(np.int8)
        packed = graph.quantized(graph.sparse(weight))
        plain = graph.unary("DENSIFY", packed, options=schema.DensifyOptionsT())
        floats = graph.unary("DEQUANTIZE", plain, "float32", schema.DequantizeOptionsT())
        return graph.convolve("CONV_2D", x, floats)

    assert verdict(network(entry, quantized, mean)) == "on"
    assert verdict(network(entry, quantized, pool("MAX_POOL_2D"), pointwise, mean)) == "wrong"


@pytest.mark.parametrize(
    ("middle", "formats"),
    [([], {"csr+densify"}), ([pool("MAX_POOL_2D")], set())],
    ids=["whole", "cut"],
)
def test_the_export_uses_densify_only_if_it_is_safe(middle, formats):
    choices = select_formats(network(*BODY, *middle, pointwise, mean)).choices
    assert {str(choice.format) for choice in choices if choice.format} == formats
    reasons = {choice.reason for choice in choices if choice.weight.density < 0.5}
    assert reasons == ({""} if formats else {UNSAFE})
    assert all("which is not less" in c.reason for c in choices if c.weight.density > 0.5)


@pytest.mark.parametrize("optimize", ["latency", "balanced"])
def test_a_layer_read_directly_does_not_split_the_region(optimize):
    """A FULLY_CONNECTED op with a sparse weight does not end the region that XNNPACK runs in NCHW
    layout."""
    content = network(*BODY, dense, pointwise, mean)
    assert verdict(content) == "on"
    plan = select_formats(content, Objective(optimize))
    assert verdict(plan.content) == "on"
    formats = {choice.weight.op: str(choice.format) for choice in plan.choices}
    assert formats == {
        "CONV_2D": "csr+densify",
        "DEPTHWISE_CONV_2D": "None",
        "FULLY_CONNECTED": "csr+densify",
    }


def test_ops_without_inputs_or_options_have_no_role():
    graph = File().graph()
    x = graph.tensor([1, 64])
    graph.op("VAR_HANDLE", [], [], schema.VarHandleOptionsT())
    y = graph.op("FULLY_CONNECTED", [x, graph.constant(sparse_values((8, 64), 0.1)), -1], [1, 8])
    model = read(graph.finish({"x": x}, {"y": y}).content())
    nodes = sparse_inference.read_nodes(model, model.subgraphs[0])
    assert [(node.kind, node.role) for node in nodes] == [
        ("VAR_HANDLE", sparse_inference.Role.NONE),
        ("FULLY_CONNECTED", sparse_inference.Role.NONE),
    ]


@pytest.mark.parametrize(
    ("signature", "role"),
    [
        ([-1, 1, 1, 32], sparse_inference.Role.INSIDE),
        ([-1, -1, -1, 32], sparse_inference.Role.NONE),
    ],
    ids=["one", "open"],
)
def test_an_unknown_size_does_not_count_as_1(signature, role):
    graph = File().graph()
    x = graph.tensor([1, 1, 1, 32])
    graph.graph.tensors[x].shapeSignature = np.array(signature, np.int32)
    y = binary("ADD", "AddOptionsT", vector)(graph, x)
    model = read(graph.finish({"x": x}, {"y": y}).content())
    (node,) = sparse_inference.read_nodes(model, model.subgraphs[0])
    assert node.role == role
