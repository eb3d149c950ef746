"""Which weight of a model is stored in which form: rules, by op, pattern and density.

The rules follow measurements on XNNPACK and the builtin kernels of LiteRT: only FULLY_CONNECTED
runs faster on a sparse weight (1x4 blocks at any density worth storing, CSR below about 12 %);
for every other op DENSIFY makes the file smaller and leaves the speed as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export import encode
from keras_dst.export.encode import Form, Weight

CSR = Form(block=1, densify=False)
BLOCKS = Form(block=4, densify=False)
CSR_DENSIFY = Form(block=1, densify=True)
BLOCKS_DENSIFY = Form(block=4, densify=True)

#: Stored 1x4 blocks must be filled at least this much, or the pattern is not 1x4.
BLOCK_FILL = 0.75
#: Above this density FULLY_CONNECTED is slower on CSR than on the dense weight.
CSR_DENSITY = 0.12


@dataclass(frozen=True)
class Choice:
    """What happens to one weight: its form (None is dense), its bytes in the file, and why."""

    weight: Weight
    form: Form | None
    bytes: int
    reason: str = ""


def choose(content: bytes) -> list[Choice]:
    """A choice for every weight of a dense ``.tflite`` file, in file order.

    A weight is made sparse only where that makes the file smaller; `Choice.reason` says why
    another one stays dense.
    """
    model = encode.read(content)
    may_densify = not has_nchw_stem(model)
    return [_choice(weight, may_densify) for weight in encode.weights(model)]


def has_nchw_stem(model: schema.ModelT) -> bool:
    """Whether a DENSIFY op could make XNNPACK compute this model wrongly, without an error.

    On CPUs without AVX (every ARM) XNNPACK turns a graph with DENSIFY into its sparse NCHW form
    from a stem on: a 3x3 convolution with stride 2 over 3 channels, padded by exactly 1 on each
    side. Where an op further on has no NCHW form, the results are wrong. That the whole graph
    has one is not checked here, so every model with such a stem counts.

    Source: ``xnn_check_nchw_compatibility`` in XNNPACK's ``src/subgraph.c``.
    """
    return any(_has_nchw_stem(model, graph) for graph in model.subgraphs)


def _has_nchw_stem(model: schema.ModelT, graph: schema.SubGraphT) -> bool:
    padded_by_one = {
        int(op.outputs[0])
        for op in graph.operators
        if encode.op_name(model, op) in ("PAD", "PADV2") and _pads_by_one(model, graph, op)
    }
    return any(
        encode.op_name(model, op) == "CONV_2D"
        and int(op.inputs[0]) in padded_by_one
        and tuple(graph.tensors[op.inputs[1]].shape[1:]) == (3, 3, 3)
        and (op.builtinOptions.strideH, op.builtinOptions.strideW) == (2, 2)
        and op.builtinOptions.padding == schema.Padding.VALID
        for op in graph.operators
    )


def _pads_by_one(model: schema.ModelT, graph: schema.SubGraphT, op: schema.OperatorT) -> bool:
    tensor = graph.tensors[op.inputs[1]]
    data = model.buffers[tensor.buffer].data
    if data is None:
        return False
    dtype = np.int64 if tensor.type == schema.TensorType.INT64 else np.int32
    return data.view(dtype).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def _choice(weight: Weight, may_densify: bool) -> Choice:
    dense = weight.values.nbytes
    forms, reason = _candidates(weight, may_densify)
    sizes = [encode.stored_bytes(weight, form) for form in forms]
    if not forms:
        return Choice(weight, None, dense, reason)
    if min(sizes) >= dense:
        return Choice(weight, None, dense, f"{forms[0]} is no smaller: {min(sizes):,} bytes")
    best = sizes.index(min(sizes))
    return Choice(weight, forms[best], sizes[best])


def _candidates(weight: Weight, may_densify: bool) -> tuple[list[Form], str]:
    """The forms that are right for a weight, or none and the reason."""
    obstacle = _obstacle(weight)
    if obstacle:
        return [], obstacle
    if all(op == "FULLY_CONNECTED" for op, _ in weight.readers):
        if _is_1x4(weight.values):
            return [BLOCKS], ""
        if weight.density <= CSR_DENSITY:
            return [CSR], ""
    if not may_densify:
        return [], "DENSIFY behind this stem may be computed wrongly on ARM"
    divisible = weight.values.shape[-1] % BLOCKS_DENSIFY.block == 0
    return [CSR_DENSIFY, BLOCKS_DENSIFY] if divisible else [CSR_DENSIFY], ""


def _obstacle(weight: Weight) -> str:
    if weight.values.dtype != np.float32:
        return f"{weight.values.dtype}: only float32 is encoded"
    if len({tuple(tensor.shape) for tensor in weight.tensors}) > 1:
        return "read in several shapes"
    for op, slot in weight.readers:
        if op not in encode.WEIGHT_OPS or slot != encode.WEIGHT_SLOT:
            return f"read by {op}, which has no sparse form"
        if op == "FULLY_CONNECTED" and weight.values.ndim != 2:
            return f"FULLY_CONNECTED over a weight of rank {weight.values.ndim}, not 2"
    return "" if weight.readers else "read by no op"


def _is_1x4(values: np.ndarray) -> bool:
    """Whether the nonzeros come in blocks of four along the last axis."""
    if values.shape[-1] % BLOCKS.block:
        return False
    blocks = values.reshape(-1, BLOCKS.block) != 0
    stored = np.count_nonzero(blocks.any(axis=-1)) * BLOCKS.block
    return bool(stored) and bool(np.count_nonzero(blocks) >= BLOCK_FILL * stored)
