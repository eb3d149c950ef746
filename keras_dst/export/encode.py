"""Weights inside a ``.tflite`` file in another form, written straight into its flatbuffer.

A pure pass from bytes to bytes, which works on a file from any converter.

Source: ``SparsityParameters`` in the TensorFlow Lite schema,
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export import im2col, quantize
from keras_dst.export.flatbuffer import (
    add_tensor,
    make_op,
    op_code,
    op_name,
    read,
    stored,
    text,
    write,
)

#: Ops with a kernel for a float32 weight that is unpacked by a DENSIFY op, or itself sparse.
WEIGHT_OPS = frozenset({"FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"})
#: The input of each of these ops that holds its weight.
WEIGHT_SLOT = 1

# XNNPACK takes the op in every other version, and reads the compressed bytes as a dense matrix; and
# it refuses one on int8 weights behind DENSIFY.
SPARSE_FULLY_CONNECTED_VERSION = 8

_NUMPY = {
    schema.TensorType.FLOAT32: np.float32,
    schema.TensorType.FLOAT16: np.float16,
    schema.TensorType.INT8: np.int8,
}


@dataclass(frozen=True)
class Form:
    """A way to store a weight, and to hand it to the ops that read it.

    Attributes:
        block: consecutive values along the last axis that are kept or dropped together: 1 is plain
            CSR, 0 stores every value.
        unpack: the runtime makes a dense float weight of it once, at load, by DENSIFY and
            DEQUANTIZE ops. Otherwise the op itself reads the weight as it is stored.
        int8: the values are rounded to 8 bits.
        im2col: CONV_2D becomes FULLY_CONNECTED, the only op that reads a sparse weight itself.
    """

    block: int
    unpack: bool
    int8: bool = False
    im2col: bool = False

    def __str__(self) -> str:
        storage = {0: "", 1: "csr"}.get(self.block, f"1x{self.block}")
        words = ["im2col" * self.im2col, "int8" * self.int8, storage]
        return " ".join(filter(None, words)) + "+densify" * (self.unpack and self.block > 0)


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant of a model: the values in one buffer, the tensors over it, and their readers.

    ``readers`` holds ``(op name, input slot)`` for every op that reads one of the tensors, and
    ``("OUTPUT", 0)`` where a tensor leaves the graph.
    """

    buffer: int
    tensors: list
    values: np.ndarray
    readers: list[tuple[str, int]]

    @property
    def name(self) -> str:
        return text(self.tensors[0].name)

    @property
    def op(self) -> str:
        return self.readers[0][0] if self.readers else "none"

    @property
    def density(self) -> float:
        return np.count_nonzero(self.values) / self.values.size


def weights(model: schema.ModelT) -> list[Weight]:
    """Every constant of two or more dimensions (float32, float16 or int8), in file order."""
    found: dict[int, Weight] = {}
    for graph in model.subgraphs:
        readers = _readers(model, graph)
        for index, tensor in enumerate(graph.tensors):
            values = constant(model, tensor)
            if values is None or values.ndim < 2:
                continue
            weight = found.setdefault(tensor.buffer, Weight(tensor.buffer, [], values, []))
            weight.tensors.append(tensor)
            weight.readers.extend(readers.get(index, []))
    return list(found.values())


def constant(model: schema.ModelT, tensor: schema.TensorT) -> np.ndarray | None:
    """The values of a dense constant tensor; None for a computed, sparse or other-typed one."""
    data = stored(model, tensor)
    if data is None or tensor.sparsity is not None or tensor.type not in _NUMPY:
        return None
    return data.view(_NUMPY[tensor.type]).reshape(tensor.shape)


def pack(values: np.ndarray, block: int) -> tuple[schema.SparsityParametersT, np.ndarray]:
    """Compressed sparse rows over the last axis of ``values``, in blocks of ``block`` values.

    Returns the encoding and the stored values, flat. All axes but the last are stored densely.
    """
    *outer, width = values.shape
    if width % block:
        # The converter of TensorFlow drops the last values instead.
        raise ValueError(
            f"Expected a last axis that is a multiple of the block, {block}. Received: {width}."
        )
    cells = values.reshape(-1, width // block, block)
    kept = (cells != 0).any(axis=-1)
    if not kept.any():
        kept[0, 0] = True  # a tensor with an empty buffer would no longer be a constant
    rows = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])

    sparsity = schema.SparsityParametersT()
    sparsity.dimMetadata = [_dense_axis(size) for size in outer]
    sparsity.dimMetadata.append(_compressed_axis(rows, np.nonzero(kept)[1]))
    sparsity.blockMap = np.array([], np.int32)
    if block > 1:
        sparsity.dimMetadata.append(_dense_axis(block))
        sparsity.blockMap = np.array([values.ndim - 1], np.int32)
    sparsity.traversalOrder = np.arange(len(sparsity.dimMetadata), dtype=np.int32)
    return sparsity, cells[kept].reshape(-1)


def encode(content: bytes, forms: Mapping[int, Form]) -> bytes:
    """The file with the weights of some buffers in another form; all else stays as it is.

    Args:
        content: a ``.tflite`` file with dense weights.
        forms: for each buffer (`Weight.buffer`) to change, its form.

    Raises:
        ValueError: a form that the runtime would read wrongly: a sparse weight straight into an
            op other than FULLY_CONNECTED, or blocks that do not divide the last axis.

    Example:
        >>> content = encode(content, {w.buffer: Form(1, True) for w in weights(read(content))})
    """
    model = read(content)
    apply(model, forms)
    return write(model)


def stored_dense(content: bytes, forms: Mapping[int, Form]) -> bytes:
    """A file that computes what `encode` makes of ``content``, without a sparse weight in it.

    Rounded weights are float32, but where the op reads integers.
    """
    model = read(content)
    rounded = {buffer: form for buffer, form in forms.items() if form.int8}
    for weight in weights(model):
        if weight.buffer in rounded and rounded[weight.buffer].unpack:
            values = quantize.dequantize(*quantize.quantize(weight.values, scale_axis(weight)))
            model.buffers[weight.buffer].data = values.reshape(-1).view(np.uint8)
    apply(model, {b: replace(form, block=0) for b, form in rounded.items() if not form.unpack})
    return write(model)


def apply(model: schema.ModelT, forms: Mapping[int, Form]) -> None:
    """Puts the weights of some buffers into another form, in place; see `encode`."""
    changed = {w.buffer: (w, forms[w.buffer]) for w in weights(model) if w.buffer in forms}
    for weight, form in changed.values():
        _store(model, weight, form)
    for graph in model.subgraphs:
        here = {i: t.buffer for i, t in enumerate(graph.tensors) if t.buffer in changed}
        _connect(model, graph, {index: changed[buffer] for index, buffer in here.items()})


def _store(model: schema.ModelT, weight: Weight, form: Form) -> None:
    """Writes the values of a weight, and what its tensors say of them."""
    values, sparsity = weight.values, None
    if form.int8:
        values, quantization = quantize.quantize(values, scale_axis(weight))
        for tensor in weight.tensors:
            tensor.type, tensor.quantization = schema.TensorType.INT8, quantization
    if form.im2col:
        values = values.reshape(len(values), -1)
    shape = np.array(values.shape, np.int32)
    if form.block:
        sparsity, values = pack(values, form.block)
    for tensor in weight.tensors:
        tensor.shape, tensor.sparsity = shape, sparsity
    model.buffers[weight.buffer].data = values.reshape(-1).view(np.uint8)


def scale_axis(weight: Weight) -> int:
    """The axis along which int8 codes have a scale each: the output channels."""
    return weight.values.ndim - 1 if weight.op == "DEPTHWISE_CONV_2D" else 0


def _connect(
    model: schema.ModelT, graph: schema.SubGraphT, changed: dict[int, tuple[Weight, Form]]
) -> None:
    """Lets the readers of changed tensors read them: directly, or once they are unpacked."""
    operators: list[schema.OperatorT] = []
    unpacked: dict[int, int] = {}
    version = SPARSE_FULLY_CONNECTED_VERSION
    for op in graph.operators:
        op.inputs = np.array([] if op.inputs is None else op.inputs, np.int32)  # can be written
        for slot, index in ((s, int(i)) for s, i in enumerate(op.inputs) if i in changed):
            weight, form = changed[index]
            if form.unpack:
                if index not in unpacked:
                    made, unpacked[index] = _unpack(model, graph, index, form)
                    operators += made
                op.inputs[slot] = unpacked[index]
                if op_name(model, op) == "FULLY_CONNECTED" and weight.values.dtype == np.int8:
                    op.opcodeIndex = op_code(model, "FULLY_CONNECTED", version)
            elif form.im2col:
                _check_reader(model, op, slot, "CONV_2D", form)
                *before, op = im2col.lower(model, graph, op, weight.values.shape, version)
                operators += before
            else:
                _check_reader(model, op, slot, "FULLY_CONNECTED", form)
                op.opcodeIndex = op_code(model, "FULLY_CONNECTED", version)
        operators.append(op)
    graph.operators = operators


def _check_reader(
    model: schema.ModelT, op: schema.OperatorT, slot: int, wanted: str, form: Form
) -> None:
    if op_name(model, op) != wanted or slot != WEIGHT_SLOT:
        raise ValueError(
            f"Expected the weight of a {wanted} op for the form {str(form)!r}. "
            f"Received: input {slot} of {op_name(model, op)}. Use a form that is unpacked."
        )


def _unpack(
    model: schema.ModelT, graph: schema.SubGraphT, index: int, form: Form
) -> tuple[list[schema.OperatorT], int]:
    """The ops that make a dense float weight of a stored one, and the tensor they make."""
    ops = []
    if form.block:
        dense = _computed(graph.tensors[index], "dense")
        source, index = index, add_tensor(graph, dense)
        ops.append(make_op(model, "DENSIFY", [source], [index], schema.DensifyOptionsT()))
    if form.int8:
        dense = _computed(graph.tensors[index], "float")
        dense.type, dense.quantization = schema.TensorType.FLOAT32, None
        source, index = index, add_tensor(graph, dense)
        options = schema.DequantizeOptionsT()
        ops.append(make_op(model, "DEQUANTIZE", [source], [index], options, version=5))
    return ops, index


def _computed(tensor: schema.TensorT, suffix: str) -> schema.TensorT:
    """A tensor like another one, to be computed."""
    computed = copy.copy(tensor)
    computed.name = f"{text(tensor.name)}/{suffix}"
    computed.buffer = 0  # by convention the empty one
    computed.sparsity = None
    return computed


def _readers(model: schema.ModelT, graph: schema.SubGraphT) -> dict[int, list[tuple[str, int]]]:
    readers: dict[int, list[tuple[str, int]]] = {}
    for op in graph.operators:
        for slot, index in enumerate([] if op.inputs is None else op.inputs):
            readers.setdefault(int(index), []).append((op_name(model, op), slot))
    for index in [] if graph.outputs is None else graph.outputs:
        readers.setdefault(int(index), []).append(("OUTPUT", 0))
    return readers


def _dense_axis(size: int) -> schema.DimensionMetadataT:
    axis = schema.DimensionMetadataT()
    axis.format = schema.DimensionType.DENSE
    axis.denseSize = int(size)
    return axis


def _compressed_axis(rows: np.ndarray, columns: np.ndarray) -> schema.DimensionMetadataT:
    axis = schema.DimensionMetadataT()
    axis.format = schema.DimensionType.SPARSE_CSR
    axis.arraySegmentsType, axis.arraySegments = _indices(rows)
    axis.arrayIndicesType, axis.arrayIndices = _indices(columns)
    return axis


def _indices(values: np.ndarray) -> tuple[int, object]:
    """The narrowest index vector of the schema that holds ``values``."""
    kinds = schema.SparseIndexVector
    largest = values.max()
    if largest <= np.iinfo(np.uint8).max:
        return kinds.Uint8Vector, schema.Uint8VectorT(values.astype(np.uint8))
    if largest <= np.iinfo(np.uint16).max:
        return kinds.Uint16Vector, schema.Uint16VectorT(values.astype(np.uint16))
    return kinds.Int32Vector, schema.Int32VectorT(values.astype(np.int32))
