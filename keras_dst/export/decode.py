"""What a ``.tflite`` file holds: constants, dense or sparse, and how they reach the ops."""

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
    """The content of a ``.tflite`` file, or a ValueError where it is no such file."""
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    name = "the bytes given" if isinstance(source, bytes) else str(source)
    if content[4:8] != b"TFL3":
        raise ValueError(
            f"Expected a .tflite file; a .keras file has to be loaded first. Received: {name}."
        )
    with whole(name):
        _walk(read(content))
    return content


@contextlib.contextmanager
def whole(name: str) -> Iterator[None]:
    """Makes a ValueError of what goes wrong while a damaged file is read."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"Expected a whole .tflite file. Received: {name}, which is damaged or cut short "
            f"({type(error).__name__}: {error})."
        ) from error


def _walk(model: schema.ModelT) -> None:
    """Reads all that a file refers to; raises where that is not there."""
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            values(model, tensor)
        for op in graph.operators:
            op_name(model, op)
            for index in indices(op.inputs) + indices(op.outputs):
                graph.tensors[index]


def type_name(tensor: schema.TensorT) -> str:
    """The type of a tensor's entries, such as ``"float32"``."""
    return _TYPES.get(tensor.type, str(tensor.type))


def shape(tensor: schema.TensorT) -> tuple[int, ...]:
    """The shape of a tensor, with 1 for a size that is open."""
    return () if tensor.shape is None else tuple(map(int, tensor.shape))


def values(model: schema.ModelT, tensor: schema.TensorT) -> np.ndarray | None:
    """The entries of a constant, sparse ones unpacked; None where computed, or not of numbers."""
    data, dtype = stored(model, tensor), getattr(np, type_name(tensor), None)
    if data is None or dtype is None:
        return None
    entries = data.view(dtype)
    return entries.reshape(shape(tensor)) if tensor.sparsity is None else unpack(tensor, entries)


def unpack(tensor: schema.TensorT, entries: np.ndarray) -> np.ndarray:
    """The dense form of a sparse tensor, in any encoding of the schema.

    Its axes are those of the tensor and, behind them, those within a block. They are walked in
    `traversalOrder`, each either whole or as compressed rows of indices.
    """
    sparsity, rank = tensor.sparsity, len(shape(tensor))
    positions = np.zeros(1, np.int64)  # of what is stored so far, one level after the other
    found: list[np.ndarray] = []  # its index along every axis walked
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
        index[outer] = index[outer] * blocks(tensor)[outer] + index[inner]
    dense = np.zeros(shape(tensor), entries.dtype)
    dense[tuple(index[axis] for axis in range(rank))] = entries[positions]
    return dense


def block_axes(tensor: schema.TensorT) -> list[int]:
    """The axes of a sparse tensor that are cut into blocks."""
    block_map = tensor.sparsity.blockMap
    return [] if block_map is None else [int(axis) for axis in block_map]


def blocks(tensor: schema.TensorT) -> list[int]:
    """The size of the blocks of a sparse tensor along each of its axes; 1 where not cut."""
    order, sizes = list(tensor.sparsity.traversalOrder), [1] * len(shape(tensor))
    for inner, outer in enumerate(block_axes(tensor), start=len(sizes)):
        sizes[outer] = int(tensor.sparsity.dimMetadata[order.index(inner)].denseSize)
    return sizes


def encoding(tensor: schema.TensorT) -> str:
    """How a constant is stored: ``"dense"``, ``"csr"``, ``"1x4"``, or ``"sparse"`` for the rest.

    CSR and 1xN compress the last axis alone: in single values, and in blocks of N.
    """
    if tensor.sparsity is None:
        return "dense"
    last, cut = len(shape(tensor)) - 1, block_axes(tensor)
    formats = [axis.format for axis in tensor.sparsity.dimMetadata]
    compressed = [i for i, kind in enumerate(formats) if kind != schema.DimensionType.DENSE]
    ordered = list(tensor.sparsity.traversalOrder) == list(range(len(formats)))
    if not ordered or compressed != [last] or cut not in ([], [last]):
        return "sparse"
    return f"1x{blocks(tensor)[-1]}" if cut else "csr"


def stored_bytes(model: schema.ModelT, tensor: schema.TensorT) -> int:
    """Bytes of the values of a constant and, where it is sparse, of its indices."""
    data = stored(model, tensor)
    size = 0 if data is None else data.nbytes
    return size if tensor.sparsity is None else size + index_bytes(tensor.sparsity)


def index_bytes(sparsity: schema.SparsityParametersT) -> int:
    """Bytes of the indices of an encoding."""
    vectors = [
        vector.values
        for axis in sparsity.dimMetadata
        for vector in (axis.arraySegments, axis.arrayIndices)
        if vector is not None
    ]
    return sum(np.asarray(vector).nbytes for vector in vectors)


def origins(model: schema.ModelT, graph: schema.SubGraphT) -> dict[int, int]:
    """For every tensor that DENSIFY or DEQUANTIZE computes from a constant: that constant."""
    found: dict[int, int] = {}
    for op in graph.operators:
        if op_name(model, op) in ("DENSIFY", "DEQUANTIZE"):
            source = int(op.inputs[0])
            source = found.get(source, source)
            if stored(model, graph.tensors[source]) is not None:
                found[int(op.outputs[0])] = source
    return found
