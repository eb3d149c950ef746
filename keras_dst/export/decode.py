"""Read dense and sparse constants of a ``.tflite`` file, and find the ops that unpack them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export.flatbuffer import indices, op_name, read, stored

_TYPES = {code: name.lower() for name, code in vars(schema.TensorType).items() if name.isupper()}


def load(source: bytes | str | os.PathLike[str]) -> bytes:
    """Return the content of a ``.tflite`` file that is given as a path or as bytes.

    Raises:
        ValueError: If the content is not a ``.tflite`` file, or it is damaged.
    """
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    name = "the bytes given" if isinstance(source, bytes) else str(source)
    if content[4:8] != b"TFL3":
        raise ValueError(
            f"Expected a .tflite file. Received: {name}, which is not a .tflite file. Fix: load a "
            ".keras file with keras.saving.load_model and pass the model."
        )
    with value_error_if_damaged(name):
        _walk(read(content))
    return content


@contextlib.contextmanager
def value_error_if_damaged(name: str) -> Iterator[None]:
    """Convert any exception inside the block to a ValueError that says that the file is damaged."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"Expected a complete .tflite file. Received: {name}, which is damaged or incomplete "
            f"({type(error).__name__}: {error})."
        ) from error


def _walk(model: schema.ModelT) -> None:
    """Read all constants, op names and tensors of a model, so that a damaged file raises an
    exception."""
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            values(model, tensor)
        for op in graph.operators:
            op_name(model, op)
            for index in indices(op.inputs) + indices(op.outputs):
                graph.tensors[index]


def type_name(tensor: schema.TensorT) -> str:
    """Return the name of a tensor's data type, such as ``"float32"``."""
    return _TYPES.get(tensor.type, str(tensor.type))


def shape(tensor: schema.TensorT) -> tuple[int, ...]:
    """Return the shape of a tensor, with size 1 for every dynamic axis."""
    return () if tensor.shape is None else tuple(map(int, tensor.shape))


def values(model: schema.ModelT, tensor: schema.TensorT) -> np.ndarray | None:
    """Return the dense values of a constant.

    The result is None for computed tensors and for unsupported types.
    """
    data, dtype = stored(model, tensor), getattr(np, type_name(tensor), None)
    if data is None or dtype is None:
        return None
    entries = data.view(dtype)
    return entries.reshape(shape(tensor)) if tensor.sparsity is None else unpack(tensor, entries)


def unpack(tensor: schema.TensorT, entries: np.ndarray) -> np.ndarray:
    """Return the dense array of a sparse tensor in any encoding of TensorFlow Lite.

    The encoding numbers the axes of the tensor first, and then the axes inside a block. The field
    `traversalOrder` lists the axes of the tensor and the axes inside a block, from the outermost to
    the innermost. Each axis is encoded as dense or as sparse. For a sparse axis, the file stores
    the indices of the nonempty entries, as in CSR.
    """
    sparsity, rank = tensor.sparsity, len(shape(tensor))
    # Each iteration of the loop below reads one axis. `positions` contains the position of each
    # stored entry along the last axis that was read. After the loop, `positions` contains indices
    # into `entries`.
    positions = np.zeros(1, np.int64)
    # `found` contains one array for each axis that was read. The array contains the index of each
    # stored entry along this axis.
    found: list[np.ndarray] = []
    for axis in sparsity.dimMetadata:
        if axis.format == schema.DimensionType.DENSE:
            counts = np.full(len(positions), axis.denseSize)
            along = np.tile(np.arange(axis.denseSize), len(positions))
            children = np.repeat(positions * axis.denseSize, counts) + along
        else:
            starts = np.asarray(axis.arraySegments.values, np.int64)
            counts = starts[positions + 1] - starts[positions]
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            children = np.repeat(starts[positions], counts) + within
            along = np.asarray(axis.arrayIndices.values, np.int64)[children]
        found = [np.repeat(outer, counts) for outer in found] + [along]
        positions = children
    index = dict(zip(map(int, sparsity.traversalOrder), found))
    for inner, outer in enumerate(block_axes(tensor), start=rank):
        index[outer] = index[outer] * block_sizes(tensor)[outer] + index[inner]
    dense = np.zeros(shape(tensor), entries.dtype)
    dense[tuple(index[axis] for axis in range(rank))] = entries[positions]
    return dense


def block_axes(tensor: schema.TensorT) -> list[int]:
    """Return the axes along which a sparse tensor is divided into blocks."""
    block_map = tensor.sparsity.blockMap
    return [] if block_map is None else [int(axis) for axis in block_map]


def block_sizes(tensor: schema.TensorT) -> list[int]:
    """Return the block size of a sparse tensor along each axis.

    An axis without blocks has block size 1.
    """
    order, sizes = list(tensor.sparsity.traversalOrder), [1] * len(shape(tensor))
    for inner, outer in enumerate(block_axes(tensor), start=len(sizes)):
        sizes[outer] = int(tensor.sparsity.dimMetadata[order.index(inner)].denseSize)
    return sizes


def encoding(tensor: schema.TensorT) -> str:
    """Return the encoding of a constant, such as ``"dense"``, ``"csr"``, ``"1x4"`` or ``"sparse"``.

    CSR stores single nonzero values along the last axis. 1xN stores blocks of N consecutive values
    along the last axis. All other sparse encodings have the name ``"sparse"``.
    """
    if tensor.sparsity is None:
        return "dense"
    last, divided = len(shape(tensor)) - 1, block_axes(tensor)
    formats = [axis.format for axis in tensor.sparsity.dimMetadata]
    compressed = [i for i, kind in enumerate(formats) if kind != schema.DimensionType.DENSE]
    ordered = list(tensor.sparsity.traversalOrder) == list(range(len(formats)))
    if not ordered or compressed != [last] or divided not in ([], [last]):
        return "sparse"
    return f"1x{block_sizes(tensor)[-1]}" if divided else "csr"


def stored_bytes(model: schema.ModelT, tensor: schema.TensorT) -> int:
    """Return the number of bytes of a constant, including the indices of a sparse constant."""
    data = stored(model, tensor)
    size = 0 if data is None else data.nbytes
    return size if tensor.sparsity is None else size + index_bytes(tensor.sparsity)


def index_bytes(sparsity: schema.SparsityParametersT) -> int:
    """Return the number of bytes of the indices in a sparse encoding."""
    vectors = [
        vector.values
        for axis in sparsity.dimMetadata
        for vector in (axis.arraySegments, axis.arrayIndices)
        if vector is not None
    ]
    return sum(np.asarray(vector).nbytes for vector in vectors)


def constant_sources(model: schema.ModelT, graph: schema.SubGraphT) -> dict[int, int]:
    """Map the output tensor of each DENSIFY or DEQUANTIZE op to the constant that the op unpacks.
    Both the keys and the values of the returned dict are tensor indices."""
    found: dict[int, int] = {}
    for op in graph.operators:
        if op_name(model, op) in ("DENSIFY", "DEQUANTIZE"):
            source = int(op.inputs[0])
            source = found.get(source, source)
            if stored(model, graph.tensors[source]) is not None:
                found[int(op.outputs[0])] = source
    return found
