"""Sparse weights inside a ``.tflite`` file, written straight into its flatbuffer.

A pure pass from bytes to bytes: it needs flatbuffers, NumPy and the schema of LiteRT, never
TensorFlow, so it works on a file from any converter.

Source: ``SparsityParameters`` in the TensorFlow Lite schema,
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

#: Ops with a kernel for a float32 weight that is unpacked by a DENSIFY op, or itself sparse.
WEIGHT_OPS = frozenset({"FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"})
#: The input of each of these ops that holds its weight.
WEIGHT_SLOT = 1

# XNNPACK takes the op in every other version, and reads the compressed bytes as a dense matrix.
SPARSE_FULLY_CONNECTED_VERSION = 8

_BUFFER_ALIGNMENT = 16  # the schema's force_align, which the Python object API does not apply
_NUMPY = {
    schema.TensorType.FLOAT32: np.float32,
    schema.TensorType.FLOAT16: np.float16,
    schema.TensorType.INT8: np.int8,
}
_OP_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}


@dataclass(frozen=True)
class Form:
    """A sparse way to store a weight.

    ``block`` consecutive values along the last axis are kept or dropped together (1 is plain CSR).
    With ``densify`` the runtime unpacks the weight once at load, through a DENSIFY op; without it
    the consuming op reads the sparse weight itself, which FULLY_CONNECTED alone can do.
    """

    block: int
    densify: bool

    def __str__(self) -> str:
        storage = "csr" if self.block == 1 else f"1x{self.block}"
        return f"{storage}+densify" if self.densify else storage


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


def read(content: bytes) -> schema.ModelT:
    """The object form of a ``.tflite`` file, for reading and for changing."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    if any(buffer.offset > 1 for buffer in model.buffers):
        raise ValueError(
            "Expected a .tflite file below 2 GB, with its weights inside the flatbuffer. "
            "Received: a file with its weights behind it."
        )
    return model


def write(model: schema.ModelT) -> bytes:
    """The ``.tflite`` file of a model in object form."""
    builder = _AlignedBuilder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


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
    data = model.buffers[tensor.buffer].data
    if data is None or not len(data) or tensor.sparsity is not None or tensor.type not in _NUMPY:
        return None
    return data.view(_NUMPY[tensor.type]).reshape(tensor.shape)


def op_name(model: schema.ModelT, op: schema.OperatorT) -> str:
    """The builtin name of an op, such as ``"CONV_2D"``."""
    builtin = _builtin(model.operatorCodes[op.opcodeIndex])
    return _OP_NAMES.get(builtin, str(builtin))


def text(name: bytes | str | None) -> str:
    """A name of the flatbuffer as a string."""
    return name.decode() if isinstance(name, bytes) else name or ""


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


def stored_bytes(weight: Weight, form: Form) -> int:
    """Bytes that ``weight`` takes in the file in this form: values, indices, metadata and op.

    At most: paddings are counted in full.
    """
    sparsity, data = pack(weight.values, form.block)
    code = schema.OperatorCodeT()
    size = data.nbytes + _BUFFER_ALIGNMENT
    for tensor in weight.tensors:
        unpacking = [_unpacked(tensor), _densify_op(0, 0, 0)] if form.densify else []
        size += _packed_bytes(code, sparsity, *unpacking)
    return size


def encode(content: bytes, forms: Mapping[int, Form]) -> bytes:
    """The file with the weights of some buffers stored sparse; every other byte stays as it is.

    Args:
        content: a ``.tflite`` file with dense weights.
        forms: for each buffer (`Weight.buffer`) to store sparse, how.

    Raises:
        ValueError: a form that the runtime would read wrongly: a sparse weight straight into an
            op other than FULLY_CONNECTED, or blocks that do not divide the last axis.

    Example:
        >>> content = encode(content, {w.buffer: Form(1, True) for w in weights(read(content))})
    """
    model = read(content)
    packed = {
        weight.buffer: pack(weight.values, forms[weight.buffer].block)
        for weight in weights(model)
        if weight.buffer in forms
    }
    for graph in model.subgraphs:
        sparse = [i for i, tensor in enumerate(graph.tensors) if tensor.buffer in packed]
        for index in sparse:
            graph.tensors[index].sparsity = packed[graph.tensors[index].buffer][0]
        _connect(model, graph, {i: forms[graph.tensors[i].buffer] for i in sparse})
    for buffer, (_, data) in packed.items():
        model.buffers[buffer].data = data.view(np.uint8)
    return write(model)


def _connect(model: schema.ModelT, graph: schema.SubGraphT, forms: dict[int, Form]) -> None:
    """Lets the readers of sparse tensors read them: directly, or through a DENSIFY op."""
    operators: list[schema.OperatorT] = []
    unpacked: dict[int, int] = {}
    for op in graph.operators:
        inputs = [] if op.inputs is None else list(op.inputs)
        for slot, index in enumerate(inputs):
            if index not in forms:
                continue
            if forms[index].densify:
                if index not in unpacked:
                    unpacked[index] = len(graph.tensors)
                    graph.tensors.append(_unpacked(graph.tensors[index]))
                    code = _op_code(model, schema.BuiltinOperator.DENSIFY, version=1)
                    operators.append(_densify_op(code, index, unpacked[index]))
                inputs[slot] = unpacked[index]
            else:
                _read_directly(model, op, slot)
        op.inputs = np.array(inputs, np.int32)
        operators.append(op)
    graph.operators = operators


def _read_directly(model: schema.ModelT, op: schema.OperatorT, slot: int) -> None:
    if op_name(model, op) != "FULLY_CONNECTED" or slot != WEIGHT_SLOT:
        raise ValueError(
            "Expected the weight of a FULLY_CONNECTED op, the only op that reads a sparse "
            f"constant. Received: input {slot} of {op_name(model, op)}. Use a form with densify."
        )
    code = schema.BuiltinOperator.FULLY_CONNECTED
    op.opcodeIndex = _op_code(model, code, version=SPARSE_FULLY_CONNECTED_VERSION)


def _readers(model: schema.ModelT, graph: schema.SubGraphT) -> dict[int, list[tuple[str, int]]]:
    readers: dict[int, list[tuple[str, int]]] = {}
    for op in graph.operators:
        for slot, index in enumerate([] if op.inputs is None else op.inputs):
            readers.setdefault(int(index), []).append((op_name(model, op), slot))
    for index in [] if graph.outputs is None else graph.outputs:
        readers.setdefault(int(index), []).append(("OUTPUT", 0))
    return readers


def _unpacked(tensor: schema.TensorT) -> schema.TensorT:
    """The tensor that DENSIFY computes from a sparse one."""
    dense = copy.copy(tensor)
    dense.name = text(tensor.name) + "/dense"
    dense.buffer = 0  # by convention the empty one
    dense.sparsity = None
    return dense


def _densify_op(code: int, source: int, target: int) -> schema.OperatorT:
    op = schema.OperatorT()
    op.opcodeIndex = code
    op.inputs = np.array([source], np.int32)
    op.outputs = np.array([target], np.int32)
    op.builtinOptionsType = schema.BuiltinOptions.DensifyOptions
    op.builtinOptions = schema.DensifyOptionsT()
    return op


def _builtin(code: schema.OperatorCodeT) -> int:
    # Codes above 127 came later than the one-byte field, and are in the other one alone.
    return max(code.builtinCode, code.deprecatedBuiltinCode)


def _op_code(model: schema.ModelT, builtin: int, version: int) -> int:
    """The index of an op code, which is added where the model does not have it."""
    for index, code in enumerate(model.operatorCodes):
        if (_builtin(code), code.version) == (builtin, version):
            return index
    code = schema.OperatorCodeT()
    code.builtinCode = builtin
    code.deprecatedBuiltinCode = min(builtin, 127)
    code.version = version
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


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


def _packed_bytes(*tables: object) -> int:
    builder = _AlignedBuilder(0)
    for table in tables:
        table.Pack(builder)  # type: ignore[attr-defined]
    return builder.Offset()


class _AlignedBuilder(flatbuffers.Builder):
    """Starts every byte vector, and so every buffer, where a kernel may load it in one piece."""

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        if x.dtype == np.uint8:
            self.Prep(_BUFFER_ALIGNMENT, x.nbytes)
        return super().CreateNumpyVector(x)
