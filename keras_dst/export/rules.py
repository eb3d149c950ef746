"""The rules of `lint`: each takes one graph of a file and yields what it finds there.

They follow measurements on LiteRT 2.3 and the sources of XNNPACK. What is an error here was seen to
give wrong results, most of it without a message, or to be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from keras_dst.export import sparse_inference
from keras_dst.export.choose import (
    MOST_HYBRID_BLOCKS,
    MOST_HYBRID_INPUTS,
    UNSAFE,
    choose,
    in_blocks,
)
from keras_dst.export.decode import (
    blocks,
    encoding,
    index_bytes,
    origins,
    shape,
    stored_bytes,
    type_name,
    values,
)
from keras_dst.export.encode import (
    SPARSE_FULLY_CONNECTED_VERSION,
    WEIGHT_OPS,
    WEIGHT_SLOT,
    Form,
    pack,
)
from keras_dst.export.flatbuffer import indices, op_name, read, text
from keras_dst.export.lint import Finding, LintReport
from keras_dst.export.sparse_inference import Node, Role

#: Below this density FULLY_CONNECTED is faster on 1x4 blocks than on the dense weight.
_BLOCK_DENSITY = 0.5
#: The same on CSR.
_CSR_DENSITY = 0.12

_AS_EXPORTED = "Export the model again, with keras_dst.export_tflite."
_ENTRY = (
    "Begin with ZeroPadding2D(1) and Conv2D(filters, 3, strides=2, padding='valid') on an input "
    "of 3 channels."
)
_EXIT = "End with GlobalAveragePooling2D behind the last convolution."
_DISARM = (
    "Pad the first convolution in two steps, ZeroPadding2D(((1, 0), (1, 0))) and then "
    "ZeroPadding2D(((0, 1), (0, 1))): XNNPACK then stays with its dense form."
)
_FIXES = {
    "MAX_POOL_2D": "Subsample with stride 2 in a depthwise convolution instead.",
    "AVERAGE_POOL_2D": "Subsample with stride 2 in a depthwise convolution instead.",
    "CONV_2D": "Use a depthwise convolution and then a 1x1 one with stride 1.",
    "DEPTHWISE_CONV_2D": (
        "Use a 3x3 or 5x5 kernel with depth_multiplier=1; for stride 2, ZeroPadding2D(1) or (2) "
        "before it and padding='valid'."
    ),
    "CONCATENATION": "Add the branches instead.",
    "MEAN": "Use GlobalAveragePooling2D() without keepdims.",
}
_OTHERWISE = "Leave it out, or move it behind GlobalAveragePooling2D."


def check(name: str, content: bytes) -> LintReport:
    """The report on a ``.tflite`` file."""
    model = read(content)
    found: list[Finding] = []
    for graph in model.subgraphs:
        for rule in RULES:
            found += rule(model, graph)
    verdicts = [_sparse_inference(model, graph) for graph in model.subgraphs]
    found += [finding for *_, findings in verdicts for finding in findings]
    found += _stored_dense(content)
    engages, reason, _ = max(verdicts, key=lambda verdict: verdict[0])
    return LintReport(name, engages, reason, sorted(found, key=lambda f: f.level != "error"))


# -- wrong results -------------------------------------------------------------------------------


def _unreadable(model, graph) -> Iterator[Finding]:
    for op, kind, slot, tensor in _sparse_reads(model, graph):
        if kind == "DENSIFY" or (kind == "FULLY_CONNECTED" and slot == WEIGHT_SLOT):
            continue
        found = f"reads {_name(tensor)}, which is sparse, as if it were dense"
        yield _error("sparse-input", _where(model, graph, op), found, _AS_EXPORTED)


def _other_version(model, graph) -> Iterator[Finding]:
    for op, _, tensor in _direct(model, graph):
        version = model.operatorCodes[op.opcodeIndex].version
        if version != SPARSE_FULLY_CONNECTED_VERSION:
            found = (
                f"has version {version}, in which XNNPACK takes the sparse {_name(tensor)} as dense"
            )
            fix = f"Set the version of the op to {SPARSE_FULLY_CONNECTED_VERSION}. {_AS_EXPORTED}"
            yield _error("sparse-version", _where(model, graph, op), found, fix)


def _other_format(model, graph) -> Iterator[Finding]:
    for op, _, tensor in _direct(model, graph):
        known = {"float32": ("csr", "1x4"), "int8": ("1x16",)}.get(type_name(tensor), ())
        if encoding(tensor) not in known:
            found = f"cannot read {_name(tensor)}: {type_name(tensor)} in {encoding(tensor)}"
            yield _error("sparse-format", _where(model, graph, op), found, _AS_EXPORTED)


def _remainder(model, graph) -> Iterator[Finding]:
    for tensor in graph.tensors:
        if tensor.sparsity is None:
            continue
        for size, block in zip(shape(tensor), blocks(tensor)):
            if size % block:
                found = (
                    f"in blocks of {block} along {size} inputs: the last {size % block} are lost"
                )
                fix = f"Pad the layer's inputs to a multiple of {block}, or export it in CSR."
                yield _error("block-remainder", _name(tensor), found, fix)


def _too_wide(model, graph) -> Iterator[Finding]:
    for op, x, tensor in _direct(model, graph):
        if type_name(x) != "float32" or encoding(tensor) != "1x16":
            continue
        inputs, most = shape(tensor)[-1], _most_blocks(tensor)
        fix = "Split the layer by its inputs, quantise its input too, or use float32."
        if inputs > MOST_HYBRID_INPUTS:
            found = f"{inputs} float inputs on int8 weights; its kernel has {MOST_HYBRID_INPUTS}"
        elif most > MOST_HYBRID_BLOCKS:
            found = f"{most} int8 blocks in a row; its kernel counts to {MOST_HYBRID_BLOCKS}"
        else:
            continue
        yield _error("hybrid-width", _where(model, graph, op), found, fix)


def _densified_integers(model, graph) -> Iterator[Finding]:
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
                found = "reads int8 weights behind DENSIFY, which XNNPACK refuses to prepare"
                fix = "Put DEQUANTIZE behind DENSIFY, or store the weights dense."
                yield _error("densify-int8", _where(model, graph, op), found, fix)


# -- slower or larger than need be ---------------------------------------------------------------


def _through_densify(model, graph) -> Iterator[Finding]:
    unpacked = _outputs(model, graph, "DENSIFY")
    for op in graph.operators:
        if op_name(model, op) == "FULLY_CONNECTED" and op.inputs[WEIGHT_SLOT] in unpacked:
            tensor = graph.tensors[unpacked[op.inputs[WEIGHT_SLOT]]]
            form = _direct_form(model, tensor)
            if form:
                found = f"DENSIFY unpacks {_name(tensor)}, which can be faster read as {form}"
                fix = "Let keras_dst.export_tflite(optimize='latency') measure both."
                yield _advice("densify", _where(model, graph, op), found, fix)


def _pattern(model, graph) -> Iterator[Finding]:
    unpacked = origins(model, graph)
    for op in graph.operators:
        if op_name(model, op) != "FULLY_CONNECTED":
            continue
        index = int(op.inputs[WEIGHT_SLOT])
        tensor = graph.tensors[unpacked.get(index, index)]
        weight = _matrix(model, tensor)
        if weight is None or _density(weight) > _BLOCK_DENSITY or in_blocks(weight, 4):
            continue
        found = f"{_density(weight):.1%} of the weights are left, and not in blocks of four inputs"
        fix = "Train with pattern='1x4': blocks are smaller and several times as fast."
        if weight.shape[-1] % 4:
            fix = f"Pad the {weight.shape[-1]} inputs to a multiple of 4. {fix}"
        yield _advice("pattern", _where(model, graph, op), found, fix)


def _larger(model, graph) -> Iterator[Finding]:
    for tensor in graph.tensors:
        weight = values(model, tensor)
        if tensor.sparsity is None or weight is None:
            continue
        sizes = {"dense": weight.nbytes}
        if encoding(tensor) != "csr":
            sparsity, entries = pack(weight, block=1)
            sizes["csr"] = entries.nbytes + index_bytes(sparsity)
        form = min(sizes, key=lambda form: sizes[form])
        size = stored_bytes(model, tensor)
        if sizes[form] < size:
            found = f"{size:,} bytes in {encoding(tensor)}, {sizes[form]:,} in {form}"
            yield _advice("sparse-larger", _name(tensor), found, _AS_EXPORTED)


def _stored_dense(content: bytes) -> Iterator[Finding]:
    for choice in choose(content).choices:
        weight = choice.weight
        found = f"{1 - weight.density:.1%} zeros, stored dense in {weight.values.nbytes:,} bytes"
        if choice.form:
            found, fix = f"{found}; {choice.bytes:,} in {choice.form}", _AS_EXPORTED
        elif choice.reason == UNSAFE:
            found, fix = f"{found}: {UNSAFE}", _DISARM
        else:
            continue
        yield _advice("zeros-dense", _name(weight.tensors[0]), found, fix)


# -- XNNPACK's sparse form -----------------------------------------------------------------------


def _sparse_inference(model, graph) -> tuple[bool, str, list[Finding]]:
    """Whether XNNPACK computes a graph in its sparse form where there is no AVX, why, and how."""
    rule, hinted = "sparse-inference", sparse_inference.is_hinted(model, graph)
    nodes = sparse_inference.read_nodes(model, graph)
    part = sparse_inference.moved(nodes, graph)
    if hinted and part.wrong:
        return False, "results can be wrong", [_misread(model, graph, nodes, n) for n in part.wrong]
    convolutions = [n for n in nodes if n.weights and len(shape(graph.tensors[n.outputs[0]])) == 4]
    if not convolutions:
        return False, "there is no 1x1 convolution to gain from it", []
    if part.nodes and not part.wrong and hinted:
        return True, f"{len(part.nodes)} of {len(nodes)} ops", []
    where = f"{len(convolutions)} 1x1 convolution(s)"
    if part.nodes and not part.wrong:
        found = "no weight is behind DENSIFY, without which zeros are not looked for"
        return False, "it is not asked for", [_advice(rule, where, found, _AS_EXPORTED)]
    findings = [
        _advice(rule, _where(model, graph, node.op), found, fix)
        for node, found, fix in _obstacles(nodes)
    ]
    zeros, weights = sum(n.zeros for n in convolutions), sum(n.weights for n in convolutions)
    if 3 * zeros <= 2 * weights:
        found = f"{zeros / weights:.1%} of the weights are zero; more than 66.7 % must be"
        findings.append(_advice(rule, where, found, "Prune the 1x1 convolutions further."))
    return False, "see the advice" if findings else "its ops do not fit together", findings


def _misread(model, graph, nodes: list[Node], node: Node) -> Finding:
    behind = [node] if node.obstacle else [n for n in nodes if set(n.inputs) & set(node.outputs)]
    blocked = next((n for n in behind if n.obstacle), None)
    what = blocked.obstacle if blocked else "the output of the model"
    found = f"can give wrong results on ARM: XNNPACK's sparse form ends here, before {what}"
    fix = f"{_FIXES.get(blocked.kind, _OTHERWISE) if blocked else _OTHERWISE} Or: {_DISARM}"
    return _error("nchw-layout", _where(model, graph, node.op), found, fix)


def _obstacles(nodes: list[Node]) -> Iterator[tuple[Node, str, str]]:
    """The ops that keep a graph from being moved, with what is the matter and the fix."""
    entries = [node for node in nodes if node.role == Role.ENTRY]
    if not entries:
        first = next((node for node in nodes if node.kind == "CONV_2D"), nodes[0])
        yield first, f"{first.obstacle or first.kind} is no way into the sparse form", _ENTRY
        return
    inside, reached = list(entries), {t for node in entries for t in node.outputs}
    left = False
    for node in nodes:
        if not reached & set(node.inputs):
            continue
        if not node.role:
            yield node, f"{node.obstacle} has no sparse form", _FIXES.get(node.kind, _OTHERWISE)
        elif Role.EXIT not in node.role:
            inside.append(node)
            reached |= set(node.outputs)
        left = left or not node.role or Role.EXIT in node.role
    for node in inside[len(entries) :]:
        if not reached >= set(node.inputs):
            yield node, "reads from outside of the part in sparse form", _OTHERWISE
    if not left:
        yield inside[-1], "no global average pooling is behind it", _EXIT


RULES: tuple[Callable[..., Iterator[Finding]], ...] = (
    _unreadable,
    _other_version,
    _other_format,
    _remainder,
    _too_wide,
    _densified_integers,
    _through_densify,
    _pattern,
    _larger,
)


# -- what the rules look at ----------------------------------------------------------------------


def _sparse_reads(model, graph) -> Iterator[tuple]:
    """Every read of a sparse tensor: the op, its name, the slot, the tensor."""
    for op in graph.operators:
        for slot, index in enumerate(op.inputs if op.inputs is not None else []):
            if index >= 0 and graph.tensors[index].sparsity is not None:
                yield op, op_name(model, op), slot, graph.tensors[index]


def _direct(model, graph) -> Iterator[tuple]:
    """Every FULLY_CONNECTED op that reads a sparse weight itself, its input, and the weight."""
    for op, kind, slot, tensor in _sparse_reads(model, graph):
        if kind == "FULLY_CONNECTED" and slot == WEIGHT_SLOT:
            yield op, graph.tensors[op.inputs[0]], tensor


def _outputs(model, graph, kind: str) -> dict[int, int]:
    """What the ops of one kind make, and of what."""
    made = (op for op in graph.operators if op_name(model, op) == kind)
    return {int(op.outputs[0]): int(op.inputs[0]) for op in made}


def _most_blocks(tensor) -> int:
    """The largest number of blocks in a row of a matrix that is stored in them."""
    return int(np.diff(tensor.sparsity.dimMetadata[1].arraySegments.values.astype(int)).max())


def _matrix(model, tensor) -> np.ndarray | None:
    weight = values(model, tensor) if type_name(tensor) == "float32" else None
    return weight if weight is not None and weight.ndim == 2 and weight.size else None


def _density(weight: np.ndarray) -> float:
    return np.count_nonzero(weight) / weight.size


def _direct_form(model, tensor) -> Form | None:
    """The form in which FULLY_CONNECTED is faster on this weight than on the dense one."""
    weight = _matrix(model, tensor)
    if weight is None:
        return None
    if in_blocks(weight, 4):
        return Form(4, unpack=False)
    return Form(1, unpack=False) if _density(weight) <= _CSR_DENSITY else None


def _where(model, graph, op) -> str:
    """An op by the name of its weight, after its layer, or else of what it makes."""
    kind = op_name(model, op)
    index = int(op.inputs[WEIGHT_SLOT] if kind in WEIGHT_OPS else op.outputs[0])
    return f"{kind} {_name(graph.tensors[origins(model, graph).get(index, index)])}"


def _name(tensor) -> str:
    return repr(text(tensor.name).split(";")[0])  # the converter joins the names of merged ops


def _error(rule: str, where: str, found: str, fix: str) -> Finding:
    return Finding("error", rule, where, found, fix)


def _advice(rule: str, where: str, found: str, fix: str) -> Finding:
    return Finding("advice", rule, where, found, fix)
