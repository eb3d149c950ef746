"""Change the storage formats of the weight tensors inside a ``.tflite`` file.

The module edits the flatbuffer of the file directly. The module can edit the files of all
converters, and does not need TensorFlow.

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

#: Ops whose weights can be stored sparse. FULLY_CONNECTED can read a sparse weight directly. All
#: other ops need a DENSIFY op that unpacks the weight.
WEIGHT_OPS = frozenset({"FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"})
#: Index of the input that holds the weight, for all ops in `WEIGHT_OPS`.
WEIGHT_SLOT = 1

# Version of FULLY_CONNECTED that XNNPACK does not run. LiteRT runs this version of FULLY_CONNECTED
# with its builtin kernel, which reads sparse weights correctly. XNNPACK runs all other versions of
# FULLY_CONNECTED, but misreads a sparse weight as a dense weight. XNNPACK also refuses int8 weights
# that a DENSIFY op unpacks.
SPARSE_FULLY_CONNECTED_VERSION = 8

_NUMPY = {
    schema.TensorType.FLOAT32: np.float32,
    schema.TensorType.FLOAT16: np.float16,
    schema.TensorType.INT8: np.int8,
}


@dataclass(frozen=True)
class Format:
    """Description of how a file stores a weight tensor, and of how ops read the weight.

    Attributes:
        block: Number of consecutive values along the last axis that form a block. Only blocks with
            nonzero values are stored. With a block size of 1, the weight is stored in CSR. With a
            block size of 0, the weight is stored dense.
        unpack: Whether DENSIFY and DEQUANTIZE ops compute a dense float weight once, when the file
            is loaded. If `unpack` is False, ops read the stored sparse or int8 values directly.
        int8: Whether the values are quantized to int8. Defaults to False.
        im2col: Whether CONV_2D is replaced by FULLY_CONNECTED, the only op that reads a sparse
            weight directly. Defaults to False.
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
    """Constant in a file: a buffer with values, the tensors that use the buffer, and the ops that
    read the tensors.

    ``readers`` lists a pair ``(op name, index of the input)`` for each op that reads one of the
    tensors. If a tensor is an output of the graph, ``readers`` also contains the pair ``("OUTPUT",
    0)``.
    """

    buffer: int
    tensors: list
    values: np.ndarray
    readers: list[tuple[str, int]]

    @property
    def name(self) -> str:
        """Name of the weight. If several tensors share the buffer, the name of the first tensor is
        used."""
        return text(self.tensors[0].name)

    @property
    def op(self) -> str:
        """Name of the first op that reads the weight, or ``"none"`` if no op reads the weight."""
        return self.readers[0][0] if self.readers else "none"

    @property
    def density(self) -> float:
        """Fraction of nonzero values."""
        return np.count_nonzero(self.values) / self.values.size


def weights(model: schema.ModelT) -> list[Weight]:
    """Return the float32, float16 and int8 constants of rank 2 or more, in file order."""
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
    """Return the values of a dense constant.

    The result is None for computed tensors, sparse tensors and unsupported data types.
    """
    data = stored(model, tensor)
    if data is None or tensor.sparsity is not None or tensor.type not in _NUMPY:
        return None
    return data.view(_NUMPY[tensor.type]).reshape(tensor.shape)


def pack(values: np.ndarray, block: int) -> tuple[schema.SparsityParametersT, np.ndarray]:
    """Compress ``values`` along the last axis, in blocks of ``block`` values.

    Blocks of zeros are not stored. Return the `SparsityParameters` that describe the encoding in
    the file, and the stored values as a vector.
    """
    *outer, width = values.shape
    if width % block:
        # If the block size does not divide the axis, TensorFlow's converter raises no error, but
        # silently drops the last values.
        raise ValueError(
            f"Expected the last axis to be a multiple of the block size {block}. "
            f"Received: {width}. Fix: use a block size of 1."
        )
    cells = values.reshape(-1, width // block, block)
    kept = (cells != 0).any(axis=-1)
    if not kept.any():
        kept[0, 0] = True  # A constant must have a nonempty buffer.
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


def encode(content: bytes, formats: Mapping[int, Format]) -> bytes:
    """Return a copy of a ``.tflite`` file in which some weights have another storage format.

    Args:
        content: Bytes of a ``.tflite`` file whose weights are all dense.
        formats: Dict that maps the buffer index of a weight (`Weight.buffer`) to the new format of
            the weight. All other weights keep their format.

    Raises:
        ValueError: If the runtime would misread a weight in its new format. An example is a sparse
            weight that a CONV_2D op reads directly.

    Example:
        >>> content = encode(content, {w.buffer: Format(1, True) for w in weights(read(content))})
    """
    model = read(content)
    apply(model, formats)
    return write(model)


def with_positive_zeros(content: bytes) -> bytes:
    """Return a dense ``.tflite`` file in which every -0 of a float weight is +0.

    The converter multiplies kernels by the scales of batch normalizations. The product of a pruned
    weight and a negative scale is -0. gzip compresses a file with both 0 and -0 badly.
    """
    model, changed = read(content), False
    for weight in weights(model):
        values = weight.values
        if values.dtype.kind == "f" and np.signbit(values[values == 0]).any():
            zeros = np.zeros((), values.dtype)
            model.buffers[weight.buffer].data = (values + zeros).reshape(-1).view(np.uint8)
            changed = True
    return write(model) if changed else content


def encode_dense(content: bytes, formats: Mapping[int, Format]) -> bytes:
    """Return a dense file whose outputs must agree with the outputs of the sparse file from
    `encode`.

    If `encode` quantizes a weight, this function rounds the weight to the same int8 values as
    `encode`. The dense file stores the rounded values as float32, or as int8 if ops read int8
    values directly.
    """
    model = read(content)
    rounded = {buffer: format for buffer, format in formats.items() if format.int8}
    for weight in weights(model):
        if weight.buffer in rounded and rounded[weight.buffer].unpack:
            values = quantize.dequantize(*quantize.quantize(weight.values, scale_axis(weight)))
            model.buffers[weight.buffer].data = values.reshape(-1).view(np.uint8)
    apply(
        model, {b: replace(format, block=0) for b, format in rounded.items() if not format.unpack}
    )
    return write(model)


def apply(model: schema.ModelT, formats: Mapping[int, Format]) -> None:
    """Change the storage formats of weights in place, in a model that `read` returned."""
    changed = {w.buffer: (w, formats[w.buffer]) for w in weights(model) if w.buffer in formats}
    for weight, format in changed.values():
        _store(model, weight, format)
    for graph in model.subgraphs:
        here = {i: t.buffer for i, t in enumerate(graph.tensors) if t.buffer in changed}
        _rewire_readers(model, graph, {index: changed[buffer] for index, buffer in here.items()})


def _store(model: schema.ModelT, weight: Weight, format: Format) -> None:
    """Write the values of a weight into its buffer in the given format, and describe the format in
    the tensors that use the buffer."""
    values, sparsity = weight.values, None
    if format.int8:
        values, quantization = quantize.quantize(values, scale_axis(weight))
        for tensor in weight.tensors:
            tensor.type, tensor.quantization = schema.TensorType.INT8, quantization
    if format.im2col:
        values = values.reshape(len(values), -1)
    shape = np.array(values.shape, np.int32)
    if format.block:
        sparsity, values = pack(values, format.block)
    for tensor in weight.tensors:
        tensor.shape, tensor.sparsity = shape, sparsity
    model.buffers[weight.buffer].data = values.reshape(-1).view(np.uint8)


def scale_axis(weight: Weight) -> int:
    """Return the axis of a weight's output channels. Each output channel has its own int8 scale."""
    return weight.values.ndim - 1 if weight.op == "DEPTHWISE_CONV_2D" else 0


def _rewire_readers(
    model: schema.ModelT, graph: schema.SubGraphT, changed: dict[int, tuple[Weight, Format]]
) -> None:
    """Adapt all ops that read a weight whose format has changed."""
    operators: list[schema.OperatorT] = []
    unpacked: dict[int, int] = {}
    version = SPARSE_FULLY_CONNECTED_VERSION
    for op in graph.operators:
        # Copy the array of inputs, because arrays that come from a file are read-only.
        op.inputs = np.array([] if op.inputs is None else op.inputs, np.int32)
        for slot, index in ((s, int(i)) for s, i in enumerate(op.inputs) if i in changed):
            weight, format = changed[index]
            if format.unpack:
                if index not in unpacked:
                    made, unpacked[index] = _unpack(model, graph, index, format)
                    operators += made
                op.inputs[slot] = unpacked[index]
                if op_name(model, op) == "FULLY_CONNECTED" and weight.values.dtype == np.int8:
                    op.opcodeIndex = op_code(model, "FULLY_CONNECTED", version)
            elif format.im2col:
                _check_reader(model, op, slot, "CONV_2D", format)
                *before, op = im2col.lower(model, graph, op, weight.values.shape, version)
                operators += before
            else:
                _check_reader(model, op, slot, "FULLY_CONNECTED", format)
                op.opcodeIndex = op_code(model, "FULLY_CONNECTED", version)
        operators.append(op)
    graph.operators = operators


def _check_reader(
    model: schema.ModelT, op: schema.OperatorT, slot: int, wanted: str, format: Format
) -> None:
    if op_name(model, op) != wanted or slot != WEIGHT_SLOT:
        raise ValueError(
            f"Expected the format {str(format)!r} only for the weight of a {wanted} op. "
            f"Received: input {slot} of {op_name(model, op)}. Fix: use a format with unpack=True."
        )


def _unpack(
    model: schema.ModelT, graph: schema.SubGraphT, index: int, format: Format
) -> tuple[list[schema.OperatorT], int]:
    """Return new ops that unpack a weight, and the index of the tensor with the unpacked weight."""
    ops = []
    if format.block:
        dense = _computed_copy(graph.tensors[index], "dense")
        source, index = index, add_tensor(graph, dense)
        ops.append(make_op(model, "DENSIFY", [source], [index], schema.DensifyOptionsT()))
    if format.int8:
        dense = _computed_copy(graph.tensors[index], "float")
        dense.type, dense.quantization = schema.TensorType.FLOAT32, None
        source, index = index, add_tensor(graph, dense)
        options = schema.DequantizeOptionsT()
        ops.append(make_op(model, "DEQUANTIZE", [source], [index], options, version=5))
    return ops, index


def _computed_copy(tensor: schema.TensorT, suffix: str) -> schema.TensorT:
    """Return a copy of a tensor without the values, because an op will compute the values."""
    computed = copy.copy(tensor)
    computed.name = f"{text(tensor.name)}/{suffix}"
    computed.buffer = 0  # Buffer 0 is empty by convention.
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
    """Convert integers to a vector of the smallest possible type.

    Return the code of the vector's type in the schema, and an object of the schema's class for this
    type.
    """
    kinds = schema.SparseIndexVector
    largest = values.max()
    if largest <= np.iinfo(np.uint8).max:
        return kinds.Uint8Vector, schema.Uint8VectorT(values.astype(np.uint8))
    if largest <= np.iinfo(np.uint16).max:
        return kinds.Uint16Vector, schema.Uint16VectorT(values.astype(np.uint16))
    return kinds.Int32Vector, schema.Int32VectorT(values.astype(np.int32))
