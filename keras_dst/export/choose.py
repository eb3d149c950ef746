"""Which weight of a model is stored in which form: rules for what is right, clocks for the rest.

The rules follow the kernels of XNNPACK and LiteRT: FULLY_CONNECTED alone reads a sparse weight
itself, any other op has to be given a dense one, unpacked at load; CONV_2D can be made a
FULLY_CONNECTED. What that costs is measured here, or taken from a model of another CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export import encode, flatbuffer, im2col, sparse_inference
from keras_dst.export.cost import CPUS, Modelled
from keras_dst.export.encode import Form, Weight

#: Stored blocks must be filled at least this much, or the pattern is another one.
BLOCK_FILL = 0.75
#: The kernel of a sparse int8 weight for float inputs has a byte for the place of a block of 16,
#: and one for the number of blocks of an output: with more it is wrong.
MOST_HYBRID_INPUTS, MOST_HYBRID_BLOCKS = 4096, 255
#: Latencies, and sizes, that differ by less than this factor count as equal.
SAME_LATENCY, SAME_SIZE = 1.05, 1.01

#: Why a weight that DENSIFY would make smaller stays dense.
UNSAFE = "DENSIFY would make ARM compute this model wrongly"

#: Gives the seconds of one inference of every file.
Clock = Callable[[Sequence[bytes]], list[float]]


@dataclass(frozen=True)
class Choice:
    """What happens to one weight.

    Attributes:
        weight: the weight.
        form: its form; None is dense, as it was.
        bytes: what it takes in the file.
        reason: why it is dense.
        slowness: the latency of the ops that read it, as a fraction of dense; where there are
            several CPUs, on the one where that is largest.
    """

    weight: Weight
    form: Form | None
    bytes: int
    reason: str = ""
    slowness: float = 1.0


@dataclass(frozen=True)
class Plan:
    """A choice for every weight of a file, in file order, and the file that they make."""

    choices: list[Choice]
    content: bytes

    @property
    def forms(self) -> dict[int, Form]:
        """The forms of the weights that are not stored as they were, by buffer."""
        return _forms(self.choices)


@dataclass(frozen=True)
class Goal:
    """What a file is for.

    Attributes:
        optimize: ``"latency"``: the fastest form, and of equally fast ones the smallest.
            ``"size"``: the smallest form, and of equally small ones the fastest.
            ``"balanced"``: the least product of bytes and latency, of the forms that are not
            slower than dense.
        clocks: one for each CPU that the file is for.
        int8: whether weights may be rounded to 8 bits.
    """

    optimize: str = "balanced"
    clocks: tuple[Clock, ...] = (Modelled(CPUS["x86"]),)
    int8: bool = False

    def best(self, sizes: Sequence[float], slowness: Sequence[float]) -> int:
        """Which of some ways is best, by bytes and by latency as a fraction of dense."""
        ways = range(len(sizes))
        if self.optimize == "size":
            small = [way for way in ways if sizes[way] <= SAME_SIZE * min(sizes)]
            return min(small, key=lambda way: (slowness[way], sizes[way]))
        limit = min(slowness) if self.optimize == "latency" else 1.0
        fast = [way for way in ways if slowness[way] <= SAME_LATENCY * limit]
        if self.optimize == "latency":
            return min(fast, key=lambda way: (sizes[way], slowness[way]))
        return min(fast, key=lambda way: sizes[way] * slowness[way])

    def slowness(self, contents: Sequence[bytes]) -> list[float]:
        """The latency of each file as a fraction of the first, where that is largest."""
        clocked = [clock(contents) for clock in self.clocks]
        return [max(times[i] / times[0] for times in clocked) for i in range(len(contents))]


def choose(
    content: bytes, goal: Goal = Goal(), progress: Callable[[str], None] = lambda line: None
) -> Plan:
    """The best plan for a dense ``.tflite`` file.

    The best form of every weight by itself comes first. The file of these is then held against
    others, as ops can be faster or slower in company: one in which all weights are read directly,
    one in which all are unpacked, which XNNPACK may compute in its sparse form, and the dense one.

    Args:
        content: the file, with float32 or int8 weights.
        goal: what it is for.
        progress: called with a line for every weight.
    """
    model = flatbuffer.read(content)
    weights = encode.weights(model)
    options = []
    for number, weight in enumerate(weights, start=1):
        progress(f"weight {number} of {len(weights)}: {weight.name}")
        options.append(_options(model, weight, goal))
    unpacked = [
        [way for way in ways if _is_dense_at_work(way.weight, way.form)] for ways in options
    ]
    direct = [[way for way in ways if way.form and not way.form.unpack] or ways for ways in options]
    plans = [
        _plan(content, options, goal),
        _plan(content, direct, replace(goal, optimize="latency")),
        _plan(content, unpacked, replace(goal, optimize="size")),
        Plan([ways[0] for ways in options], content),
    ]
    progress("whole files")
    _, *slowness = goal.slowness([content, *(plan.content for plan in plans)])
    slowness[2:] = [min(slowness[2], 1.0), 1.0]  # once unpacked, a weight is dense
    return plans[goal.best([len(plan.content) for plan in plans], slowness)]


def _plan(content: bytes, options: list[list[Choice]], goal: Goal) -> Plan:
    """The best of the options for every weight, so that every CPU computes the file rightly."""
    plan = _encoded(content, [_best(ways, goal) for ways in options])
    if not sparse_inference.is_wrong(flatbuffer.read(plan.content)):
        return plan
    return _encoded(content, [_best(_without_densify(ways), goal) for ways in options])


def _best(ways: list[Choice], goal: Goal) -> Choice:
    return ways[goal.best([way.bytes for way in ways], [way.slowness for way in ways])]


def _encoded(content: bytes, choices: list[Choice]) -> Plan:
    forms = _forms(choices)
    return Plan(choices, encode.encode(content, forms) if forms else content)


def _forms(choices: list[Choice]) -> dict[int, Form]:
    return {choice.weight.buffer: choice.form for choice in choices if choice.form}


def _is_dense_at_work(weight: Weight, form: Form | None) -> bool:
    """Whether the ops compute as on the dense weight, by the same kernel."""
    other_kernel = weight.values.dtype == np.int8 and weight.op == "FULLY_CONNECTED"
    return form is None or (form.unpack and not other_kernel)


def _without_densify(ways: list[Choice]) -> list[Choice]:
    left = [way for way in ways if not (way.form and way.form.unpack and way.form.block)]
    return [replace(way, reason=way.reason and UNSAFE) for way in left] if left != ways else ways


def _options(model: schema.ModelT, weight: Weight, goal: Goal) -> list[Choice]:
    """The dense form of a weight, and every right one that is smaller."""
    bytes_dense = weight.values.nbytes
    obstacle = _obstacle(weight)
    if obstacle:
        return [Choice(weight, None, bytes_dense, obstacle)]
    piece = flatbuffer.readers(model, weight.buffer)
    dense = flatbuffer.write(piece)
    forms = right_forms(weight, piece, goal.int8)
    if not forms:
        return [Choice(weight, None, bytes_dense, "an int8 weight of an op on floats")]
    files = {form: encode.encode(dense, {weight.buffer: form}) for form in forms}
    sizes = {form: bytes_dense + len(file) - len(dense) for form, file in files.items()}
    smaller = [form for form in forms if sizes[form] < bytes_dense]
    if not smaller:
        reason = f"{forms[0]} is no smaller: {sizes[forms[0]]:,} bytes"
        return [Choice(weight, None, bytes_dense, reason)]
    direct = [form for form in smaller if not _is_dense_at_work(weight, form)]
    slow = dict(zip(direct, _slowness(dense, [files[form] for form in direct], goal)))
    choices = [Choice(weight, form, sizes[form], "", slow.get(form, 1.0)) for form in smaller]
    return [Choice(weight, None, bytes_dense, "the fastest"), *choices]


def _slowness(dense: bytes, files: list[bytes], goal: Goal) -> list[float]:
    try:
        return goal.slowness([dense, *files])[1:] if files else []
    except RuntimeError:  # the ops cannot run by themselves, as on inputs of unknown rank
        return [float("inf")] * len(files)


def right_forms(weight: Weight, piece: schema.ModelT, int8: bool) -> list[Form]:
    """The forms in which the ops read a weight rightly, on every CPU as far as each op goes.

    Args:
        weight: a float32 or int8 weight.
        piece: the ops that read it.
        int8: whether its values may be rounded.
    """
    if weight.values.dtype == np.int8:
        return _right_forms_of_int8(weight, piece)
    shape, kinds = weight.values.shape, {kind for kind, _ in weight.readers}
    # XNNPACK takes the DEQUANTIZE before a TRANSPOSE_CONV that it does not take: garbage.
    int8 = int8 and "TRANSPOSE_CONV" not in kinds and bool(np.isfinite(weight.values).all())
    unpacked = _unpacked_forms(weight)
    forms = unpacked + [replace(form, int8=True) for form in unpacked if int8]
    forms += [Form(0, unpack=True, int8=True)] * int8
    convolved = kinds == {"CONV_2D"}
    if convolved and all(
        im2col.suits(graph, op, shape) for graph in piece.subgraphs for op in graph.operators
    ):
        inputs = shape[1] * shape[2] * shape[3]
    elif kinds == {"FULLY_CONNECTED"}:
        inputs = shape[1]
    else:
        return forms
    blocks = [block for block in (1, 4) if inputs % block == 0]
    forms += [Form(block, unpack=False, im2col=convolved) for block in blocks]
    if int8 and _suits_hybrid(weight.values.reshape(-1, inputs)):
        forms.append(Form(16, unpack=False, int8=True, im2col=convolved))
    return forms


def _suits_hybrid(values: np.ndarray) -> bool:
    """Whether the kernel of a sparse int8 weight for float inputs is right on these."""
    rows, inputs = values.shape
    if inputs % 16 or inputs > MOST_HYBRID_INPUTS:
        return False
    stored = (values.reshape(rows, -1, 16) != 0).any(axis=-1).sum(axis=-1)
    return bool(stored.max() <= MOST_HYBRID_BLOCKS)


def _right_forms_of_int8(weight: Weight, piece: schema.ModelT) -> list[Form]:
    for graph in piece.subgraphs:
        if any(graph.tensors[i].type != schema.TensorType.INT8 for i in graph.outputs):
            return []
    blocks = weight.op == "FULLY_CONNECTED" and weight.values.shape[1] % 16 == 0
    return _unpacked_forms(weight) + [Form(16, unpack=False)] * blocks


def _unpacked_forms(weight: Weight) -> list[Form]:
    return [Form(block, unpack=True) for block in (1, 4) if weight.values.shape[-1] % block == 0]


def _obstacle(weight: Weight) -> str:
    """What keeps a weight from having another form than its own."""
    if weight.values.dtype == np.float16:
        return "float16: only float32 and int8 are encoded"
    if len({tuple(tensor.shape) for tensor in weight.tensors}) > 1:
        return "read in several shapes"
    for op, slot in weight.readers:
        if op not in encode.WEIGHT_OPS or slot != encode.WEIGHT_SLOT:
            return f"read by {op}, which has no sparse form"
        if op == "FULLY_CONNECTED" and weight.values.ndim != 2:
            return f"FULLY_CONNECTED over a weight of rank {weight.values.ndim}, not 2"
    return "" if weight.readers else "read by no op"


def in_blocks(values: np.ndarray, block: int) -> bool:
    """Whether the nonzeros come in blocks along the last axis."""
    if values.shape[-1] % block:
        return False
    cells = values.reshape(-1, block) != 0
    stored = np.count_nonzero(cells.any(axis=-1)) * block
    return bool(stored) and bool(np.count_nonzero(cells) >= BLOCK_FILL * stored)
