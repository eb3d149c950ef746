"""Rules of `lint`. Each rule checks one graph of a file and yields its findings.

The rules are based on measurements with LiteRT 2.3 and on the source code of XNNPACK. A finding has
the level "error" if LiteRT refuses the file, or computes wrong results. In most cases, LiteRT
computes wrong results without an error message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from keras_dst.export import sparse_inference
from keras_dst.export.decode import (
    block_sizes,
    constant_sources,
    encoding,
    index_bytes,
    shape,
    stored_bytes,
    type_name,
    values,
)
from keras_dst.export.encode import (
    SPARSE_FULLY_CONNECTED_VERSION,
    WEIGHT_OPS,
    WEIGHT_SLOT,
    Format,
    pack,
)
from keras_dst.export.findings import Finding, LintReport
from keras_dst.export.flatbuffer import indices, op_name, read, text
from keras_dst.export.selection import (
    MAX_HYBRID_BLOCKS,
    MAX_HYBRID_INPUTS,
    UNSAFE,
    has_blocks,
    select_formats,
)
from keras_dst.export.sparse_inference import Node, Role

#: Density below which FULLY_CONNECTED is faster with 1x4 blocks than with a dense weight.
_BLOCK_DENSITY = 0.5
#: Density below which FULLY_CONNECTED is faster with CSR than with a dense weight.
_CSR_DENSITY = 0.12

_EXPORT_AGAIN = "Export the model again with keras_dst.export_tflite."
_ENTRY = (
    "Begin with ZeroPadding2D(1) and Conv2D(filters, 3, strides=2, padding='valid') on an input "
    "with 3 channels."
)
_EXIT = "Put GlobalAveragePooling2D after the last convolution."
_TWO_STEP_PADDING = (
    "Pad the first convolution in two steps, ZeroPadding2D(((1, 0), (1, 0))) and then "
    "ZeroPadding2D(((0, 1), (0, 1))): XNNPACK then keeps its dense kernels."
)
_FIXES = {
    "MAX_POOL_2D": "Subsample with stride 2 in a depthwise convolution instead.",
    "AVERAGE_POOL_2D": "Subsample with stride 2 in a depthwise convolution instead.",
    "CONV_2D": "Use a depthwise convolution followed by a 1x1 convolution with stride 1.",
    "DEPTHWISE_CONV_2D": (
        "Use a 3x3 or 5x5 kernel with depth_multiplier=1. For stride 2, put ZeroPadding2D(1) or "
        "(2) before the layer and use padding='valid'."
    ),
    "CONCATENATION": "Add the branches instead.",
    "MEAN": "Use GlobalAveragePooling2D() without keepdims.",
}
_DEFAULT_FIX = "Remove the op, or move the op after GlobalAveragePooling2D."


def check(name: str, content: bytes) -> LintReport:
    """Return the report on a ``.tflite`` file."""
    model = read(content)
    found: list[Finding] = []
    for graph in model.subgraphs:
        for rule in RULES:
            found += rule(model, graph)
    verdicts = [_sparse_inference(model, graph) for graph in model.subgraphs]
    found += [finding for *_, findings in verdicts for finding in findings]
    found += _zeros_dense(content)
    engages, reason, _ = max(verdicts, key=lambda verdict: verdict[0])
    return LintReport(name, engages, reason, sorted(found, key=lambda f: f.level != "error"))


# -- wrong results -------------------------------------------------------------------------------


def _sparse_input(model, graph) -> Iterator[Finding]:
    for op, kind, slot, tensor in _sparse_reads(model, graph):
        if kind == "DENSIFY" or (kind == "FULLY_CONNECTED" and slot == WEIGHT_SLOT):
            continue
        found = f"reads the sparse tensor {_name(tensor)} as if it were dense: results are wrong"
        yield _error("sparse-input", _where(model, graph, op), found, _EXPORT_AGAIN)


def _sparse_version(model, graph) -> Iterator[Finding]:
    for op, _, tensor in _direct(model, graph):
        version = model.operatorCodes[op.opcodeIndex].version
        if version != SPARSE_FULLY_CONNECTED_VERSION:
            found = (
                f"has version {version}: XNNPACK reads the sparse weight {_name(tensor)} as if it "
                "were dense, and the results are wrong"
            )
            fix = f"Set the version of the op to {SPARSE_FULLY_CONNECTED_VERSION}. {_EXPORT_AGAIN}"
            yield _error("sparse-version", _where(model, graph, op), found, fix)


def _sparse_format(model, graph) -> Iterator[Finding]:
    for op, _, tensor in _direct(model, graph):
        known = {"float32": ("csr", "1x4"), "int8": ("1x16",)}.get(type_name(tensor), ())
        if encoding(tensor) not in known:
            found = (
                f"has no kernel for {_name(tensor)}, {type_name(tensor)} in {encoding(tensor)}: "
                "the runtime refuses the file or computes wrong results"
            )
            yield _error("sparse-format", _where(model, graph, op), found, _EXPORT_AGAIN)


def _block_remainder(model, graph) -> Iterator[Finding]:
    for tensor in graph.tensors:
        if tensor.sparsity is None:
            continue
        for size, block in zip(shape(tensor), block_sizes(tensor)):
            if size % block:
                found = (
                    f"is stored in blocks of {block} along {size} inputs: the last {size % block} "
                    "inputs are lost, and the results are wrong"
                )
                fix = (
                    f"Pad the layer's inputs to a multiple of {block}, or store its weight in CSR."
                )
                yield _error("block-remainder", _name(tensor), found, fix)


def _hybrid_width(model, graph) -> Iterator[Finding]:
    for op, x, tensor in _direct(model, graph):
        if type_name(x) != "float32" or encoding(tensor) != "1x16":
            continue
        inputs, most = shape(tensor)[-1], _max_blocks_per_row(tensor)
        fix = "Split the layer by its inputs, quantize its input as well, or use float32."
        if inputs > MAX_HYBRID_INPUTS:
            found = (
                f"multiplies {inputs} float inputs by an int8 weight: the kernel overflows above "
                f"{MAX_HYBRID_INPUTS} inputs, and the results are wrong"
            )
        elif most > MAX_HYBRID_BLOCKS:
            found = (
                f"has {most} int8 blocks in a row: the kernel counts only to {MAX_HYBRID_BLOCKS}, "
                "and the results are wrong"
            )
        else:
            continue
        yield _error("hybrid-width", _where(model, graph, op), found, fix)


def _densify_int8(model, graph) -> Iterator[Finding]:
    unpacked = _outputs(model, graph, "DENSIFY")
    for op in graph.operators:
        kind, inputs = op_name(model, op), indices(op.inputs)
        if kind not in WEIGHT_OPS or inputs[WEIGHT_SLOT] not in unpacked:
            continue
        if type_name(graph.tensors[inputs[WEIGHT_SLOT]]) == "int8":
            float_output = type_name(graph.tensors[op.outputs[0]]) == "float32"
            version = model.operatorCodes[op.opcodeIndex].version
            taken = kind != "FULLY_CONNECTED" or version != SPARSE_FULLY_CONNECTED_VERSION
            if taken and (float_output or kind == "FULLY_CONNECTED"):
                found = "reads int8 weights from DENSIFY, and XNNPACK refuses such a file"
                fix = "Put DEQUANTIZE after DENSIFY, or store the weights dense."
                yield _error("densify-int8", _where(model, graph, op), found, fix)


# -- slow or large files ---------------------------------------------------------------------------


def _densify(model, graph) -> Iterator[Finding]:
    unpacked = _outputs(model, graph, "DENSIFY")
    for op in graph.operators:
        if op_name(model, op) == "FULLY_CONNECTED" and op.inputs[WEIGHT_SLOT] in unpacked:
            tensor = graph.tensors[unpacked[op.inputs[WEIGHT_SLOT]]]
            faster = _faster_format(model, tensor)
            if faster:
                found = (
                    f"DENSIFY unpacks {_name(tensor)}, but the op may run faster if it reads the "
                    f"weight directly as {faster}"
                )
                fix = "Use keras_dst.export_tflite(optimize='latency'), which measures both."
                yield _advice("densify", _where(model, graph, op), found, fix)


def _pattern(model, graph) -> Iterator[Finding]:
    unpacked = constant_sources(model, graph)
    for op in graph.operators:
        if op_name(model, op) != "FULLY_CONNECTED":
            continue
        index = int(op.inputs[WEIGHT_SLOT])
        tensor = graph.tensors[unpacked.get(index, index)]
        weight = _matrix(model, tensor)
        if weight is None or _density(weight) > _BLOCK_DENSITY or has_blocks(weight, 4):
            continue
        found = (
            f"keeps {_density(weight):.1%} of its weights, but not in blocks of four inputs: no "
            "kernel is fast for this pattern"
        )
        fix = "Train with pattern='1x4': blocks take fewer bytes and run several times as fast."
        if weight.shape[-1] % 4:
            fix = f"Pad the {weight.shape[-1]} inputs to a multiple of 4. {fix}"
        yield _advice("pattern", _where(model, graph, op), found, fix)


def _sparse_larger(model, graph) -> Iterator[Finding]:
    for tensor in graph.tensors:
        weight = values(model, tensor)
        if tensor.sparsity is None or weight is None:
            continue
        sizes = {"dense": weight.nbytes}
        if encoding(tensor) != "csr":
            sparsity, entries = pack(weight, block=1)
            sizes["csr"] = entries.nbytes + index_bytes(sparsity)
        best = min(sizes, key=lambda name: sizes[name])
        size = stored_bytes(model, tensor)
        if sizes[best] < size:
            found = f"takes {size:,} bytes in {encoding(tensor)}, but {sizes[best]:,} in {best}"
            yield _advice("sparse-larger", _name(tensor), found, _EXPORT_AGAIN)


def _zeros_dense(content: bytes) -> Iterator[Finding]:
    for choice in select_formats(content).choices:
        weight = choice.weight
        found = (
            f"has {1 - weight.density:.1%} zeros but is stored dense, in "
            f"{weight.values.nbytes:,} bytes"
        )
        if choice.format:
            found, fix = f"{found}; {choice.format} takes {choice.bytes:,}", _EXPORT_AGAIN
        elif choice.reason == UNSAFE:
            found, fix = f"{found}: {UNSAFE}", _TWO_STEP_PADDING
        else:
            continue
        yield _advice("zeros-dense", _name(weight.tensors[0]), found, fix)


# -- sparse inference by XNNPACK -----------------------------------------------------------------


def _sparse_inference(model, graph) -> tuple[bool, str, list[Finding]]:
    """Return whether XNNPACK uses sparse kernels on CPUs without AVX, the reason for this, and a
    list of findings."""
    rule, hinted = "sparse-inference", sparse_inference.is_hinted(model, graph)
    nodes = sparse_inference.read_nodes(model, graph)
    region = sparse_inference.sparse_region(nodes, graph)
    if hinted and region.wrong:
        findings = [_misread(model, graph, nodes, node) for node in region.wrong]
        return False, "results can be wrong, see the findings of rule nchw-layout", findings
    convolutions = [n for n in nodes if n.weights and len(shape(graph.tensors[n.outputs[0]])) == 4]
    if not convolutions:
        return False, "the graph has no 1x1 convolution for the sparse kernels", []
    if region.nodes and not region.wrong and hinted:
        return True, f"{len(region.nodes)} of {len(nodes)} ops", []
    where = "1x1 convolutions"
    if region.nodes and not region.wrong:
        found = "no DENSIFY op precedes their weights, so XNNPACK does not look for zeros"
        advice = [_advice(rule, where, found, _EXPORT_AGAIN)]
        return False, "no weight is stored sparse before a DENSIFY op", advice
    findings = [
        _advice(rule, _where(model, graph, node.op), found, fix)
        for node, found, fix in _obstacles(nodes)
    ]
    zeros, weights = sum(n.zeros for n in convolutions), sum(n.weights for n in convolutions)
    if 3 * zeros <= 2 * weights:
        found = (
            f"{zeros / weights:.1%} of their weights are zero, and XNNPACK uses sparse kernels "
            "only above 66.7 %"
        )
        findings.append(_advice(rule, where, found, "Prune the 1x1 convolutions further."))
    if findings:
        return False, "see the findings of rule sparse-inference", findings
    return False, "its ops do not form one region with sparse kernels", findings


def _misread(model, graph, nodes: list[Node], node: Node) -> Finding:
    readers = [node] if node.obstacle else [n for n in nodes if set(n.inputs) & set(node.outputs)]
    blocked = next((n for n in readers if n.obstacle), None)
    reader = blocked.obstacle if blocked else "the output of the model"
    found = (
        "can give wrong results on ARM: the sparse kernels of XNNPACK pass data in NCHW layout to "
        f"{reader}, which expects NHWC"
    )
    fix = _FIXES.get(blocked.kind, _DEFAULT_FIX) if blocked else _DEFAULT_FIX
    fix = f"{fix} Or: {_TWO_STEP_PADDING}"
    return _error("nchw-layout", _where(model, graph, node.op), found, fix)


def _obstacles(nodes: list[Node]) -> Iterator[tuple[Node, str, str]]:
    """For each op that prevents sparse inference, yield the op, a description of the problem, and a
    fix."""
    entries = [node for node in nodes if node.role == Role.ENTRY]
    if not entries:
        first = next((node for node in nodes if node.kind == "CONV_2D"), nodes[0])
        yield first, f"sparse inference cannot begin at {first.obstacle or first.kind}", _ENTRY
        return
    inside, reached = list(entries), {t for node in entries for t in node.outputs}
    left = False
    for node in nodes:
        if not reached & set(node.inputs):
            continue
        if not node.role:
            found = f"{node.obstacle} cannot take part in sparse inference"
            yield node, found, _FIXES.get(node.kind, _DEFAULT_FIX)
        elif Role.EXIT not in node.role:
            inside.append(node)
            reached |= set(node.outputs)
        left = left or not node.role or Role.EXIT in node.role
    for node in inside[len(entries) :]:
        if not reached >= set(node.inputs):
            yield node, "reads a tensor from outside the region with sparse kernels", _DEFAULT_FIX
    if not left:
        yield inside[-1], "is not followed by the global average pooling that must end it", _EXIT


RULES: tuple[Callable[..., Iterator[Finding]], ...] = (
    _sparse_input,
    _sparse_version,
    _sparse_format,
    _block_remainder,
    _hybrid_width,
    _densify_int8,
    _densify,
    _pattern,
    _sparse_larger,
)


# -- helpers of the rules ------------------------------------------------------------------------


def _sparse_reads(model, graph) -> Iterator[tuple]:
    """Yield ``(op, name, index of the input, tensor)`` for each op that reads a sparse tensor."""
    for op in graph.operators:
        for slot, index in enumerate(op.inputs if op.inputs is not None else []):
            if index >= 0 and graph.tensors[index].sparsity is not None:
                yield op, op_name(model, op), slot, graph.tensors[index]


def _direct(model, graph) -> Iterator[tuple]:
    """For each FULLY_CONNECTED op that reads a sparse weight directly, yield the op, its input
    tensor and its weight tensor."""
    for op, kind, slot, tensor in _sparse_reads(model, graph):
        if kind == "FULLY_CONNECTED" and slot == WEIGHT_SLOT:
            yield op, graph.tensors[op.inputs[0]], tensor


def _outputs(model, graph, kind: str) -> dict[int, int]:
    """For all ops of one kind, return a dict that maps the index of the output tensor to the index
    of the first input tensor."""
    made = (op for op in graph.operators if op_name(model, op) == kind)
    return {int(op.outputs[0]): int(op.inputs[0]) for op in made}


def _max_blocks_per_row(tensor) -> int:
    """Return the largest number of stored blocks in one row of a block-sparse matrix."""
    return int(np.diff(tensor.sparsity.dimMetadata[1].arraySegments.values.astype(int)).max())


def _matrix(model, tensor) -> np.ndarray | None:
    weight = values(model, tensor) if type_name(tensor) == "float32" else None
    return weight if weight is not None and weight.ndim == 2 and weight.size else None


def _density(weight: np.ndarray) -> float:
    return np.count_nonzero(weight) / weight.size


def _faster_format(model, tensor) -> Format | None:
    """Return a storage format with which FULLY_CONNECTED is faster than with the dense weight, or
    None if no format is faster."""
    weight = _matrix(model, tensor)
    if weight is None:
        return None
    if has_blocks(weight, 4):
        return Format(4, unpack=False)
    return Format(1, unpack=False) if _density(weight) <= _CSR_DENSITY else None


def _where(model, graph, op) -> str:
    """Return a string that identifies an op: its builtin name, and the name of a tensor.

    The tensor is the op's weight, or the op's output if the op has no weight.
    """
    kind = op_name(model, op)
    index = int(op.inputs[WEIGHT_SLOT] if kind in WEIGHT_OPS else op.outputs[0])
    return f"{kind} {_name(graph.tensors[constant_sources(model, graph).get(index, index)])}"


def _name(tensor) -> str:
    # The converter joins the names of merged ops with semicolons.
    return repr(text(tensor.name).split(";")[0])


def _error(rule: str, where: str, found: str, fix: str) -> Finding:
    return Finding("error", rule, where, found, fix)


def _advice(rule: str, where: str, found: str, fix: str) -> Finding:
    return Finding("advice", rule, where, found, fix)
