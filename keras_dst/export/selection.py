"""Select the storage format of each weight tensor of a model.

Fixed rules exclude all storage formats that the runtime would read incorrectly. The choice among
the valid storage formats depends on the file size and on the measured or estimated latency. The
rules follow the kernels of XNNPACK and LiteRT: only FULLY_CONNECTED reads a sparse weight directly.
All other ops need a dense weight, which the op DENSIFY unpacks when the file is loaded. To store
the weight of a CONV_2D op in a sparse format, the export can replace the CONV_2D op by a
FULLY_CONNECTED op. A FULLY_CONNECTED op on slices of the input computes the same result as a
CONV_2D op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export import encode, flatbuffer, im2col, sparse_inference
from keras_dst.export.encode import Format, Weight
from keras_dst.export.latency_model import CPUS, LatencyModel

#: A weight tensor counts as block-sparse if at least this fraction of the values in its stored
#: blocks is nonzero.
MIN_BLOCK_DENSITY = 0.75
#: Limits for a sparse int8 weight that an op multiplies by float inputs: the largest number of
#: inputs, and the largest number of stored blocks per output. LiteRT's kernel stores the position
#: of each block of 16 inputs in one byte, and the number of blocks per output in another byte. If a
#: weight has too many inputs or too many blocks, a byte overflows, and the kernel computes wrong
#: results.
MAX_HYBRID_INPUTS, MAX_HYBRID_BLOCKS = 4096, 255
#: Two latencies, or two sizes, count as equal if the larger is at most this factor times the
#: smaller.
SAME_LATENCY, SAME_SIZE = 1.05, 1.01

#: Text of the report for a weight that stays dense although a DENSIFY op would make the file
#: smaller.
UNSAFE = "with DENSIFY, ARM CPUs would compute this model wrongly"

#: Function that receives the contents of several files, and returns the seconds per inference of
#: each file.
Timer = Callable[[Sequence[bytes]], list[float]]


@dataclass(frozen=True)
class Choice:
    """Storage format that was selected for one weight tensor.

    Attributes:
        weight: The weight.
        format: The selected format, or None if the file keeps the weight unchanged.
        bytes: Size of the weight in the selected format, in bytes.
        reason: Reason why the file keeps the weight unchanged, or an empty string if the format
            changes.
        latency_ratio: Latency of the ops that read the weight, relative to their latency with the
            dense weight. If latencies are measured or estimated for several CPUs, the value is the
            largest latency ratio over all CPUs. Defaults to 1.
    """

    weight: Weight
    format: Format | None
    bytes: int
    reason: str = ""
    latency_ratio: float = 1.0


@dataclass(frozen=True)
class Plan:
    """Selected storage format of each weight tensor, in file order, and the bytes of the resulting
    ``.tflite`` file."""

    choices: list[Choice]
    content: bytes

    @property
    def formats(self) -> dict[int, Format]:
        """Dict that maps buffer indices to new formats, for all weights whose storage format
        changes."""
        return _formats(self.choices)


@dataclass(frozen=True)
class Objective:
    """Rule that selects the best of several candidates. The candidates are storage formats for one
    weight tensor, or several versions of the whole file.

    Attributes:
        optimize: ``"latency"`` selects the fastest candidate and, among equally fast candidates,
            the smallest. ``"size"`` selects the smallest candidate and, among equally small
            candidates, the fastest. ``"balanced"``, the default, selects the smallest product of
            bytes and latency among the candidates that are not slower than dense.
        timers: Functions that measure or estimate latencies, one per CPU. Defaults to an estimate
            for an x86 CPU.
        int8: Whether weights may be quantized to int8. Defaults to False.
    """

    optimize: str = "balanced"
    timers: tuple[Timer, ...] = (LatencyModel(CPUS["x86"]),)
    int8: bool = False

    def best(self, sizes: Sequence[float], ratios: Sequence[float]) -> int:
        """Return the index of the best candidate, given the size and the latency ratio of each
        candidate."""
        options = range(len(sizes))
        if self.optimize == "size":
            small = [i for i in options if sizes[i] <= SAME_SIZE * min(sizes)]
            return min(small, key=lambda i: (ratios[i], sizes[i]))
        limit = min(ratios) if self.optimize == "latency" else 1.0
        fast = [i for i in options if ratios[i] <= SAME_LATENCY * limit]
        if self.optimize == "latency":
            return min(fast, key=lambda i: (sizes[i], ratios[i]))
        return min(fast, key=lambda i: sizes[i] * ratios[i])

    def latency_ratios(self, files: Sequence[bytes]) -> list[float]:
        """Return the latency of each file divided by the latency of the first file.

        If there are timers for several CPUs, return the largest latency ratio of each file over all
        CPUs.
        """
        seconds = [timer(files) for timer in self.timers]
        return [max(times[i] / times[0] for times in seconds) for i in range(len(files))]


def select_formats(
    content: bytes,
    objective: Objective = Objective(),
    progress: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Select the storage format of each weight tensor in a dense ``.tflite`` file.

    First, a format is selected for each weight tensor, from its size and from the latency of the
    ops that read the tensor. An op can be faster or slower inside the whole model than in a model
    that contains only this op. The function therefore compares four versions of the whole file:

    * Every weight is stored in the format that was selected for the weight.
    * As many ops as possible read sparse weights directly.
    * DENSIFY ops unpack all sparse weights, so that XNNPACK may use its sparse kernels.
    * All weights are stored dense.

    Args:
        content: Bytes of a file whose weights are float32 or int8.
        objective: Rule that selects the format of each weight, and then one of the four versions of
            the file. Defaults to `Objective()`.
        progress: Function that is called with a line of text for each weight tensor.
    """
    model = flatbuffer.read(content)
    weights = encode.weights(model)
    options = []
    for number, weight in enumerate(weights, start=1):
        progress(f"weight {number} of {len(weights)}: {weight.name}")
        options.append(_options(model, weight, objective))
    encoder = _Encoder(content)
    unpacked = [[c for c in row if _uses_dense_kernel(c.weight, c.format)] for row in options]
    direct = [[c for c in row if c.format and not c.format.unpack] or row for row in options]
    plans = [
        encoder.plan(options, objective),
        encoder.plan(direct, replace(objective, optimize="latency")),
        encoder.plan(unpacked, replace(objective, optimize="size")),
        Plan([row[0] for row in options], content),
    ]
    progress("whole files")
    distinct = list(dict.fromkeys([content, *(plan.content for plan in plans)]))
    ratio_of = dict(zip(distinct, objective.latency_ratios(distinct)))
    ratios = [ratio_of[plan.content] for plan in plans]
    # LiteRT unpacks all sparse weights of `plans[2]` when it loads the file. Inference with this
    # file is therefore not slower than inference with the dense file.
    ratios[2:] = [min(ratios[2], 1.0), 1.0]
    return plans[objective.best([len(plan.content) for plan in plans], ratios)]


class _Encoder:
    """Encoder that stores the weights of one `.tflite` file in different formats. Encoded files are
    cached."""

    def __init__(self, content: bytes):
        self.content = content
        self.files: dict[frozenset, tuple[bytes, bool]] = {frozenset(): (content, False)}

    def plan(self, options: list[list[Choice]], objective: Objective) -> Plan:
        """Select the best format of each weight tensor. If DENSIFY would cause wrong results on
        some CPU, select only formats without DENSIFY."""
        choices = [_best(row, objective) for row in options]
        content, wrong = self._encode(choices)
        if wrong:
            choices = [_best(_without_densify(row), objective) for row in options]
            content, _ = self._encode(choices)
        return Plan(choices, content)

    def _encode(self, choices: list[Choice]) -> tuple[bytes, bool]:
        """Return the encoded file, and whether its results may be wrong on some CPU."""
        formats = _formats(choices)
        key = frozenset(formats.items())
        if key not in self.files:
            model = flatbuffer.read(self.content)
            encode.apply(model, formats)
            wrong = sparse_inference.is_wrong(model)
            self.files[key] = flatbuffer.write(model), wrong
        return self.files[key]


def _best(options: list[Choice], objective: Objective) -> Choice:
    sizes = [choice.bytes for choice in options]
    return options[objective.best(sizes, [choice.latency_ratio for choice in options])]


def _formats(choices: list[Choice]) -> dict[int, Format]:
    return {choice.weight.buffer: choice.format for choice in choices if choice.format}


def _uses_dense_kernel(weight: Weight, format: Format | None) -> bool:
    """Return whether a weight in the given format is read by the same kernel as a dense weight."""
    other_kernel = weight.values.dtype == np.int8 and weight.op == "FULLY_CONNECTED"
    return format is None or (format.unpack and not other_kernel)


def _without_densify(options: list[Choice]) -> list[Choice]:
    left = [c for c in options if not (c.format and c.format.unpack and c.format.block)]
    if left == options:
        return options
    return [replace(choice, reason=choice.reason and UNSAFE) for choice in left]


def _options(model: schema.ModelT, weight: Weight, objective: Objective) -> list[Choice]:
    """Return the formats that are possible for a weight tensor: dense, and all valid formats that
    take fewer bytes."""
    bytes_dense = weight.values.nbytes
    obstacle = _obstacle(weight)
    if obstacle:
        return [Choice(weight, None, bytes_dense, obstacle)]
    piece = flatbuffer.extract_readers(model, weight.buffer)
    dense = flatbuffer.write(piece)
    formats = valid_formats(weight, piece, objective.int8)
    if not formats:
        return [Choice(weight, None, bytes_dense, "an int8 weight of an op on floats")]
    files = {format: encode.encode(dense, {weight.buffer: format}) for format in formats}
    sizes = {format: bytes_dense + len(file) - len(dense) for format, file in files.items()}
    smaller = [format for format in formats if sizes[format] < bytes_dense]
    if not smaller:
        reason = f"{formats[0]} would take {sizes[formats[0]]:,} bytes, which is not less"
        return [Choice(weight, None, bytes_dense, reason)]
    direct = [format for format in smaller if not _uses_dense_kernel(weight, format)]
    ratios = dict(zip(direct, _latency_ratios(dense, [files[f] for f in direct], objective)))
    choices = [Choice(weight, f, sizes[f], "", ratios.get(f, 1.0)) for f in smaller]
    return [Choice(weight, None, bytes_dense, "dense is the fastest"), *choices]


def _latency_ratios(dense: bytes, files: list[bytes], objective: Objective) -> list[float]:
    try:
        return objective.latency_ratios([dense, *files])[1:] if files else []
    except RuntimeError:  # Some ops cannot run alone, such as ops on inputs of unknown rank.
        return [float("inf")] * len(files)


def valid_formats(weight: Weight, piece: schema.ModelT, int8: bool) -> list[Format]:
    """Return the storage formats with which all ops that read a weight compute correct results on
    every CPU.

    The function checks only the ops that read the weight. `sparse_inference.is_wrong` checks the
    whole graph for wrong results.

    Args:
        weight: A float32 or int8 weight.
        piece: Small ``.tflite`` model that contains only the ops that read the weight.
        int8: Whether the values may be quantized to int8.
    """
    if weight.values.dtype == np.int8:
        return _valid_formats_of_int8(weight, piece)
    shape, kinds = weight.values.shape, {kind for kind, _ in weight.readers}
    # Do not quantize the weight of a TRANSPOSE_CONV. The results are wrong if XNNPACK runs the
    # DEQUANTIZE op, but a builtin kernel runs the TRANSPOSE_CONV that follows.
    int8 = int8 and "TRANSPOSE_CONV" not in kinds and bool(np.isfinite(weight.values).all())
    unpacked = _unpacked_formats(weight)
    formats = unpacked + [replace(format, int8=True) for format in unpacked if int8]
    formats += [Format(0, unpack=True, int8=True)] * int8
    convolved = kinds == {"CONV_2D"}
    if convolved and all(
        im2col.is_applicable(graph, op, shape)
        for graph in piece.subgraphs
        for op in graph.operators
    ):
        inputs = shape[1] * shape[2] * shape[3]
    elif kinds == {"FULLY_CONNECTED"}:
        inputs = shape[1]
    else:
        return formats
    blocks = [block for block in (1, 4) if inputs % block == 0]
    formats += [Format(block, unpack=False, im2col=convolved) for block in blocks]
    if int8 and _fits_hybrid_kernel(weight.values.reshape(-1, inputs)):
        formats.append(Format(16, unpack=False, int8=True, im2col=convolved))
    return formats


def _fits_hybrid_kernel(values: np.ndarray) -> bool:
    """Return whether LiteRT's kernel for float inputs computes correct results with a sparse int8
    weight."""
    rows, inputs = values.shape
    if inputs % 16 or inputs > MAX_HYBRID_INPUTS:
        return False
    stored = (values.reshape(rows, -1, 16) != 0).any(axis=-1).sum(axis=-1)
    return bool(stored.max() <= MAX_HYBRID_BLOCKS)


def _valid_formats_of_int8(weight: Weight, piece: schema.ModelT) -> list[Format]:
    for graph in piece.subgraphs:
        if any(graph.tensors[i].type != schema.TensorType.INT8 for i in graph.outputs):
            return []
    blocks = weight.op == "FULLY_CONNECTED" and weight.values.shape[1] % 16 == 0
    return _unpacked_formats(weight) + [Format(16, unpack=False)] * blocks


def _unpacked_formats(weight: Weight) -> list[Format]:
    width = weight.values.shape[-1]
    return [Format(block, unpack=True) for block in (1, 4) if width % block == 0]


def _obstacle(weight: Weight) -> str:
    """Return the reason why a weight must keep its storage format, or an empty string if the
    exporter may change the storage format."""
    if weight.values.dtype == np.float16:
        return "float16: only float32 and int8 weights can be stored sparse"
    if len({tuple(tensor.shape) for tensor in weight.tensors}) > 1:
        return "ops read it in several shapes"
    for op, slot in weight.readers:
        if op not in encode.WEIGHT_OPS or slot != encode.WEIGHT_SLOT:
            return f"read by {op}, which accepts no sparse weight"
        if op == "FULLY_CONNECTED" and weight.values.ndim != 2:
            return f"FULLY_CONNECTED with a weight of rank {weight.values.ndim}, not 2"
    return "" if weight.readers else "no op reads it"


def has_blocks(values: np.ndarray, block: int) -> bool:
    """Return whether the nonzero values form blocks of `block` consecutive values along the last
    axis, as defined by `MIN_BLOCK_DENSITY`."""
    if values.shape[-1] % block:
        return False
    cells = values.reshape(-1, block) != 0
    stored = np.count_nonzero(cells.any(axis=-1)) * block
    return bool(stored) and bool(np.count_nonzero(cells) >= MIN_BLOCK_DENSITY * stored)
