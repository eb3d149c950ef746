"""Find the ops of a graph that XNNPACK runs with sparse kernels, and check their results.

On CPUs without AVX, such as every ARM CPU, XNNPACK can run connected ops of a graph in NCHW instead
of NHWC layout. A set of connected ops that run in NCHW layout is called an NCHW region. In NCHW
layout, 1x1 convolutions skip zero weights. XNNPACK forms an NCHW region only if the graph contains
a DENSIFY op. The region begins at an entry op: a 3x3 convolution with stride 2 over 3 channels,
padded by 1 on each side. The region ends at an exit op: a mean over height and width, or
DEPTH_TO_SPACE. All ops of the region must support NCHW layout. No op outside the region may read an
intermediate tensor of the region. In the 1x1 convolutions of the region, more than 2/3 of all
weights must be zero.

XNNPACK does not check whether the last ops of an NCHW region are exit ops. If the last op of a
region is not an exit op, its output has NCHW layout, but the next op reads NHWC data. XNNPACK then
computes wrong results without an error message.

The functions below assume that XNNPACK runs every op of the graph. In practice, LiteRT runs some
ops with its builtin kernels instead of XNNPACK's kernels. Which ops use builtin kernels depends on
the version and the build of LiteRT. An op with a builtin kernel splits the graph, and reads and
writes data in NHWC layout. A file must give correct results in all versions of LiteRT. The module
therefore reports a file as wrong even if some versions of LiteRT run the file correctly. As a
precaution, the module also reports a MEAN or SUM op with keepdims as wrong, unless only RESHAPE ops
read its result.

Source: the functions ``xnn_check_nchw_compatibility`` and ``xnn_subgraph_rewrite_for_nchw`` in
``src/subgraph.c`` of XNNPACK. In the two functions of XNNPACK, only the rules for FULLY_CONNECTED
have changed since October 2020. The rules for FULLY_CONNECTED last changed in January 2025.
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export.decode import constant_sources, shape, type_name, values
from keras_dst.export.encode import WEIGHT_SLOT
from keras_dst.export.flatbuffer import indices, op_name, stored

_UNARY = re.compile(
    "ABS|CEIL|ELU|EXP|FLOOR|GELU|HARD_SWISH|LEAKY_RELU|LOGISTIC|NEG|RELU|RELU6|RELU_N1_TO_1|ROUND|"
    "RSQRT|SIN|COS|SQRT|SQUARE|TANH"
)


class Role(enum.Flag):
    """Possible roles of an op in an NCHW region: first op (`ENTRY`), inner op (`INSIDE`) or last op
    (`EXIT`)."""

    NONE = 0
    ENTRY = enum.auto()
    INSIDE = enum.auto()
    EXIT = enum.auto()


@dataclass(eq=False)
class Node:
    """Op in the graph that XNNPACK builds from a `.tflite` file.

    The graph of XNNPACK contains neither the ops that unpack constants nor the PAD ops that XNNPACK
    merges into convolutions.

    Attributes:
        op: The op in the file.
        kind: Builtin name of the op.
        inputs: Indices of the tensors that the op reads, except constant tensors.
        outputs: Indices of the tensors that the op computes.
        role: All roles that the op can have in an NCHW region.
        obstacle: Description of the op, such as "ADD of a constant", if the op cannot read data in
            NCHW layout. Otherwise an empty string.
        zeros: Number of zero weights of a 1x1 convolution or FULLY_CONNECTED op. 0 for other ops.
        weights: Number of weights of a 1x1 convolution or FULLY_CONNECTED op, including zero
            weights. 0 for other ops.
    """

    op: schema.OperatorT
    kind: str
    inputs: list[int]
    outputs: list[int]
    role: Role
    obstacle: str
    zeros: int = 0
    weights: int = 0


@dataclass(frozen=True)
class Region:
    """NCHW region of a graph, and the ops whose results are wrong because of the NCHW layout.

    ``nodes`` lists the ops that XNNPACK runs in NCHW layout. ``wrong`` lists the ops of the graph
    that fail or compute wrong results because of the NCHW layout.
    """

    nodes: list[Node]
    wrong: list[Node]


def is_hinted(model: schema.ModelT, graph: schema.SubGraphT) -> bool:
    """Return whether a graph contains a DENSIFY op.

    Without a DENSIFY op, XNNPACK uses only dense kernels.
    """
    return any(op_name(model, op) == "DENSIFY" for op in graph.operators)


def is_wrong(model: schema.ModelT) -> bool:
    """Return whether CPUs without AVX may refuse a file or compute wrong results with it."""
    return any(
        is_hinted(model, graph) and sparse_region(read_nodes(model, graph), graph).wrong
        for graph in model.subgraphs
    )


def sparse_region(nodes: list[Node], graph: schema.SubGraphT) -> Region:
    """Return the NCHW region that XNNPACK forms if the graph contains a DENSIFY op.

    Args:
        nodes: List that `read_nodes` returned for the graph.
        graph: The graph.
    """
    outputs = set(indices(graph.outputs))
    group, roles, bad = _groups(nodes, outputs)
    off = {group[n] for n in bad}
    members = [n for n, role in enumerate(roles) if role & (Role.INSIDE | Role.EXIT)]
    readers = Counter(t for node in nodes for t in set(node.inputs)) + Counter(outputs)
    known = Counter(t for n in members if group[n] not in off for t in nodes[n].inputs)
    off |= {group[n] for n in members for t in nodes[n].inputs if known[t] != readers[t]}
    zeros: Counter[int] = Counter()
    weights: Counter[int] = Counter()
    for n, node in enumerate(nodes):
        zeros[group[n]] += node.zeros
        weights[group[n]] += node.weights
    on = [n for n in members if group[n] not in off and 3 * zeros[group[n]] > 2 * weights[group[n]]]
    nchw = {t for n in on for t in nodes[n].inputs}
    wrong = [node for node in nodes if not _is_right(node, nchw, graph)]
    return Region([nodes[n] for n in on], wrong)


def _groups(nodes: list[Node], outputs: set[int]) -> tuple[list[int], list[Role], set[int]]:
    """Divide the graph into groups of connected ops, as XNNPACK does to find NCHW regions.

    Return a list of the ops' group numbers, a list of the roles that each op can still have, and
    the set of the indices of all ops outside NCHW regions.
    """
    group, roles = list(range(len(nodes))), [node.role for node in nodes]
    bad: set[int] = set()
    producer = {t: n for n, node in enumerate(nodes) for t in node.outputs if t not in outputs}

    def join(n: int) -> bool:
        """Assign the same group number to an op and to the ops that compute the inputs of this op.

        Return whether a group number changed.
        """
        changed = False
        for t in nodes[n].inputs:
            source = producer.get(t)
            if source is None or source in bad or not roles[source] & (Role.ENTRY | Role.INSIDE):
                bad.add(n)
            else:
                roles[source] &= ~Role.EXIT
                changed = changed or group[source] != group[n]
                group[source] = group[n] = max(group[source], group[n])
        return changed

    changed = True in [join(n) for n, role in enumerate(roles) if role & Role.EXIT]
    if not changed:  # A graph without an exit op has no NCHW region.
        bad.update(range(len(nodes)))
    while changed:
        inside = (n for n, role in enumerate(roles) if role & (Role.INSIDE | Role.EXIT))
        changed = True in [join(n) for n in inside if n not in bad]
    return group, roles, bad


def _is_right(node: Node, nchw: set[int], graph: schema.SubGraphT) -> bool:
    """Return whether an op computes the right result if the tensors in ``nchw`` have NCHW layout,
    and all other tensors have NHWC layout."""
    reads = any(t in nchw for t in node.inputs)
    writes = any(t in nchw for t in node.outputs)
    # For a matrix, NCHW and NHWC are the same layout, because a matrix has no spatial axes.
    matrix = all(len(shape(graph.tensors[t])) < 3 for t in node.outputs)
    if reads and Role.EXIT in node.role:
        return not node.obstacle and (not writes or matrix)
    if reads and matrix:
        return not writes
    return reads == writes or node.role == Role.ENTRY


def read_nodes(model: schema.ModelT, graph: schema.SubGraphT) -> list[Node]:
    """Return the ops that XNNPACK runs for a graph of a ``.tflite`` file, in file order."""
    unpacked, pads = constant_sources(model, graph), _merged_pads(model, graph)
    found = []
    for op in graph.operators:
        outputs = indices(op.outputs)
        if any(t in unpacked or t in pads for t in outputs):
            continue
        kind = op_name(model, op)
        role, obstacle = _role(model, graph, op, kind, unpacked, pads)
        node = Node(op, kind, [], outputs, role, obstacle)
        for t in indices(op.inputs):
            source, _ = pads.get(t, (t, ()))
            if source not in unpacked and stored(model, graph.tensors[source]) is None:
                node.inputs.append(source)
        if kind == "MUL":  # XNNPACK runs x * x as a SQUARE op, which has only one input.
            node.inputs = list(dict.fromkeys(node.inputs))
        if role == Role.INSIDE and kind in ("CONV_2D", "FULLY_CONNECTED"):
            weight = int(op.inputs[WEIGHT_SLOT])
            node.zeros, node.weights = _zeros(model, graph.tensors[unpacked.get(weight, weight)])
        found.append(node)
    return found


def _merged_pads(model: schema.ModelT, graph: schema.SubGraphT) -> dict[int, tuple[int, tuple]]:
    """Return a dict of the PAD ops that XNNPACK merges into the convolutions that follow.

    Each key of the dict is the tensor index of a PAD op's output. The value is a pair: the tensor
    index of the PAD op's input, and the padding above, below, left and right.
    """
    readers = Counter(t for op in graph.operators for t in set(indices(op.inputs)))
    readers += Counter(indices(graph.outputs))
    pads, merged = {}, {}
    for op in graph.operators:
        kind = op_name(model, op)
        if kind in ("PAD", "PADV2"):
            widths = values(model, graph.tensors[op.inputs[1]])
            if widths is not None and widths.shape == (4, 2) and not widths[[0, 3]].any():
                pads[int(op.outputs[0])] = (int(op.inputs[0]), tuple(widths[1:3].ravel().tolist()))
        elif kind in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            t = int(op.inputs[0])
            if t in pads and readers[t] == 1 and (_is_valid(op) or _stride(op) == (1, 1)):
                merged[t] = pads[t]
    return merged


def _role(model, graph, op, kind, unpacked, pads) -> tuple[Role, str]:
    """Return the roles that an op can have in an NCHW region, and the text for `Node.obstacle`."""
    tensors = [graph.tensors[t] for t in indices(op.inputs) + indices(op.outputs)]
    ranks = {len(shape(tensor)) for tensor in tensors if stored(model, tensor) is None}
    if not all(type_name(x).startswith(("float", "int32", "int64")) for x in tensors):
        return Role.NONE, f"{kind} on integers"
    if kind == "CONV_2D":
        return _convolution(graph, op, pads)
    if kind == "DEPTHWISE_CONV_2D":
        return _depthwise(graph, op, pads)
    if kind == "FULLY_CONNECTED":
        # Without keepNumDims, XNNPACK reshapes the input of FULLY_CONNECTED to a matrix.
        kept = getattr(op.builtinOptions, "keepNumDims", False)
        sparse = graph.tensors[op.inputs[WEIGHT_SLOT]].sparsity is not None
        return (Role.INSIDE, "") if kept and not sparse else (Role.NONE, kind)
    if kind in ("MEAN", "SUM") and len(shape(tensors[0])) == 4:
        return Role.INSIDE | Role.EXIT, _reduction(model, graph, op, kind)
    if kind == "DEPTH_TO_SPACE":
        return Role.EXIT, ""
    if kind in ("ADD", "MUL") and all(len(shape(tensor)) == 4 for tensor in tensors):
        # If one operand is constant, XNNPACK checks the shape of the first operand, even if the
        # second operand is the constant.
        constant = any(stored(model, tensor) is not None for tensor in tensors[:2])
        wide = sum(size != 1 for size in _sizes(tensors[0])) > 1
        return (Role.NONE, f"{kind} of a constant") if constant and wide else (Role.INSIDE, "")
    if kind == "RESIZE_BILINEAR" and 1 not in shape(tensors[0])[1:3]:
        return Role.INSIDE, ""
    if _UNARY.fullmatch(kind) and ranks == {4}:
        return Role.INSIDE, ""
    return Role.NONE, kind


def _sizes(tensor: schema.TensorT) -> list[int]:
    """Return the shape of a tensor without the batch size, with -1 for dynamic axes."""
    signature = tensor.shapeSignature
    return list(shape(tensor) if signature is None or not len(signature) else signature)[1:]


def _reduction(model, graph, op, kind) -> str:
    """Return a description of a MEAN or SUM op that would compute wrong results from NCHW data.
    Return an empty string for a MEAN or SUM op that would compute right results from NCHW data."""
    axes = values(model, graph.tensors[op.inputs[1]])
    left = {1, 2, 3} - {int(axis) % 4 for axis in ([] if axes is None else axes.ravel())}
    if 3 in left and left != {3}:  # The axes of an NCHW result are in another order than in NHWC.
        return f"{kind} over one of height and width"
    made = int(op.outputs[0])
    readers = {op_name(model, other) for other in graph.operators if made in indices(other.inputs)}
    if op.builtinOptions.keepDims and (readers != {"RESHAPE"} or made in indices(graph.outputs)):
        # An NCHW result with keepdims has another shape than an NHWC result with keepdims.
        return f"{kind} with keepdims"
    return ""


def _convolution(graph, op, pads) -> tuple[Role, str]:
    channels = shape(graph.tensors[op.inputs[0]])[-1:]
    _, height, width, depth = shape(graph.tensors[op.inputs[WEIGHT_SLOT]])
    stride, padding = _stride(op), _padding(op, (height, width), pads)
    plain = _dilation(op) == (1, 1) and channels == (depth,)
    if plain and (height, width, stride, padding) == (1, 1, (1, 1), (0, 0, 0, 0)):
        return Role.INSIDE, ""
    text = _describe(f"{height}x{width} CONV_2D over {depth} channels", op, padding)
    if plain and (height, width, depth, stride) == (3, 3, 3, (2, 2)) and padding == (1, 1, 1, 1):
        return Role.ENTRY, text
    return Role.NONE, text


def _depthwise(graph, op, pads) -> tuple[Role, str]:
    _, height, width, _ = shape(graph.tensors[op.inputs[WEIGHT_SLOT]])
    padding = _padding(op, (height, width), pads)
    if (
        height == width
        and height in (3, 5)
        and _dilation(op) == (1, 1)
        and _stride(op) in ((1, 1), (2, 2))
        and op.builtinOptions.depthMultiplier == 1
        and padding == (height // 2,) * 4
    ):
        return Role.INSIDE, ""
    return Role.NONE, _describe(f"{height}x{width} DEPTHWISE_CONV_2D", op, padding)


def _describe(name: str, op: schema.OperatorT, padding: tuple[int, ...] | None) -> str:
    (rows, columns), dilation = _stride(op), _dilation(op)
    text = f"{name}, stride {rows}" if rows == columns else f"{name}, stride {rows}x{columns}"
    if dilation != (1, 1):
        text += f", dilation {dilation[0]}x{dilation[1]}"
    if getattr(op.builtinOptions, "depthMultiplier", 1) != 1:
        text += f", depth multiplier {op.builtinOptions.depthMultiplier}"
    return text + (
        ", padding 'same'" if padding is None else ", padded by {}+{} and {}+{}".format(*padding)
    )


def _padding(op, kernel, pads) -> tuple[int, ...] | None:
    """Return by how many pixels a convolution pads its input above, below, left and right.

    The result is None if the padding depends on the size of the input.
    """
    if _is_valid(op):
        own = [0, 0, 0, 0]
    elif _stride(op) == (1, 1):
        totals = [(size - 1) * step for size, step in zip(kernel, _dilation(op))]
        own = [half for total in totals for half in (total // 2, total - total // 2)]
    else:
        return None
    _, added = pads.get(int(op.inputs[0]), (0, (0, 0, 0, 0)))
    return tuple(a + b for a, b in zip(own, added))


def _zeros(model: schema.ModelT, tensor: schema.TensorT) -> tuple[int, int]:
    """Return the number of zeros in a weight, and the number of its entries."""
    weight = values(model, tensor)
    if weight is None:
        return 0, 0
    return int(weight.size - np.count_nonzero(weight)), int(weight.size)


def _is_valid(op: schema.OperatorT) -> bool:
    return op.builtinOptions.padding == schema.Padding.VALID


def _stride(op: schema.OperatorT) -> tuple[int, int]:
    return op.builtinOptions.strideH, op.builtinOptions.strideW


def _dilation(op: schema.OperatorT) -> tuple[int, int]:
    return op.builtinOptions.dilationHFactor, op.builtinOptions.dilationWFactor
