"""Replace CONV_2D by slices of its input and one FULLY_CONNECTED op (im2col).

FULLY_CONNECTED can read a sparse weight directly, but CONV_2D cannot. For a 3x3 kernel, for
example, nine STRIDED_SLICE ops cut nine shifted images out of the padded input. A CONCATENATION op
joins the nine shifted images along the channel axis. Each pixel of the joined image contains all
input values from which the convolution computes one output pixel. If the kernel is 1x1 and the
stride is 1, the input is not sliced.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export import flatbuffer

# Bit mask that makes STRIDED_SLICE keep all entries of axes 0 (batch) and 3 (channels).
_FULL_BATCH_AND_CHANNELS = 0b1001


def is_applicable(graph: schema.SubGraphT, op: schema.OperatorT, kernel: Sequence[int]) -> bool:
    """Return whether a CONV_2D can be replaced. The CONV_2D must have only one group, and an input
    of known height and width."""
    tensor = graph.tensors[op.inputs[0]]
    signature = tensor.shapeSignature
    sizes = tensor.shape if signature is None or not len(signature) else signature
    return len(sizes) == 4 and min(sizes[1:]) > 0 and sizes[3] == kernel[3]


def lower(
    model: schema.ModelT,
    graph: schema.SubGraphT,
    op: schema.OperatorT,
    kernel: Sequence[int],
    version: int,
) -> list[schema.OperatorT]:
    """Return the ops that replace a CONV_2D op whose weight already has the shape of a matrix.

    Args:
        model: The model that contains the op. The function adds constants and op codes to the
            model.
        graph: The graph that contains the op. The function adds tensors to the graph.
        op: The CONV_2D op.
        kernel: Shape of the op's weight as (filters, height, width, channels).
        version: Version of the new FULLY_CONNECTED op.
    """
    options, x = op.builtinOptions, int(op.inputs[0])
    strides = (options.strideH, options.strideW)
    dilations = (options.dilationHFactor, options.dilationWFactor)
    sizes = [int(size) for size in graph.tensors[x].shape[1:3]]
    same = options.padding == schema.Padding.SAME
    axes = [_axis(*axis, same) for axis in zip(sizes, kernel[1:3], strides, dilations)]
    out, pads = [axis[0] for axis in axes], [axis[1] for axis in axes]

    def added(like: int, name: str, sizes: Sequence[int]) -> int:
        tensor = copy.copy(graph.tensors[like])
        tensor.name = f"{flatbuffer.text(graph.tensors[op.outputs[0]].name)}/{name}"
        tensor.shape, tensor.shapeSignature = (
            None if old is None else np.array([old[0], *sizes], np.int32)
            for old in (tensor.shape, tensor.shapeSignature)
        )
        return flatbuffer.add_tensor(graph, tensor)

    ops = []
    if np.any(pads):
        widths = flatbuffer.add_constant(model, graph, [(0, 0), *pads, (0, 0)])
        padded = added(x, "padded", [*(n + sum(pad) for n, pad in zip(sizes, pads)), kernel[3]])
        ops.append(flatbuffer.make_op(model, "PAD", [x, widths], [padded], schema.PadOptionsT()))
        x = padded
    slices = []
    if (*kernel[1:3], *strides) == (1, 1, 1, 1):
        slices = [x]
    else:
        steps = flatbuffer.add_constant(model, graph, (1, *strides, 1))
        for place in np.ndindex(*kernel[1:3]):
            begin = [i * step for i, step in zip(place, dilations)]
            end = [i + (n - 1) * stride + 1 for i, n, stride in zip(begin, out, strides)]
            bounds = [flatbuffer.add_constant(model, graph, (0, *i, 0)) for i in (begin, end)]
            slices.append(added(x, "slice{}x{}".format(*place), [*out, kernel[3]]))
            kind = schema.StridedSliceOptionsT()
            kind.beginMask = kind.endMask = _FULL_BATCH_AND_CHANNELS
            inputs = [x, *bounds, steps]
            ops.append(flatbuffer.make_op(model, "STRIDED_SLICE", inputs, slices[-1:], kind))
    x = slices[0]
    if len(slices) > 1:
        x = added(x, "columns", [*out, len(slices) * kernel[3]])
        joined = schema.ConcatenationOptionsT()
        joined.axis = 3
        ops.append(flatbuffer.make_op(model, "CONCATENATION", slices, [x], joined))
    product = schema.FullyConnectedOptionsT()
    product.fusedActivationFunction = options.fusedActivationFunction
    product.keepNumDims = True
    inputs = [x, *op.inputs[1:]]
    return [
        *ops,
        flatbuffer.make_op(model, "FULLY_CONNECTED", inputs, op.outputs, product, version),
    ]


def _axis(size: int, kernel: int, stride: int, dilation: int, same: bool) -> tuple[int, tuple]:
    """Return the output size of a convolution along an axis, and the padding at both ends of the
    axis."""
    reach = (kernel - 1) * dilation + 1
    if not same:
        return (size - reach) // stride + 1, (0, 0)
    out = -(-size // stride)
    total = max((out - 1) * stride + reach - size, 0)
    return out, (total // 2, total - total // 2)
