"""The flatbuffer of a ``.tflite`` file in object form: reading, writing, adding to it.

Needs flatbuffers, NumPy and the schema of LiteRT, never TensorFlow.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

_BUFFER_ALIGNMENT = 16  # the schema's force_align, which the Python object API does not apply
_OP_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}


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


def op_name(model: schema.ModelT, op: schema.OperatorT) -> str:
    """The builtin name of an op, such as ``"CONV_2D"``."""
    builtin = _builtin(model.operatorCodes[op.opcodeIndex])
    return _OP_NAMES.get(builtin, str(builtin))


def text(name: bytes | str | None) -> str:
    """A name of the flatbuffer as a string."""
    return name.decode() if isinstance(name, bytes) else name or ""


def indices(tensors: Iterable[int] | None) -> list[int]:
    """The tensors that an op reads or writes, without optional ones that are left out."""
    return [] if tensors is None else [int(t) for t in tensors if t >= 0]


def stored(model: schema.ModelT, tensor: schema.TensorT) -> np.ndarray | None:
    """The bytes of a constant as they are in the file; None for a tensor that is computed."""
    data = model.buffers[tensor.buffer].data
    return None if data is None or not len(data) else data


def readers(model: schema.ModelT, buffer: int) -> schema.ModelT:
    """A file of the ops that read a buffer alone: what they read comes in, what they make goes out.

    Its buffers have the numbers of the model's.
    """
    found = schema.ModelT()
    found.version, found.operatorCodes = model.version, list(model.operatorCodes)
    found.buffers = [schema.BufferT() for _ in model.buffers]
    found.subgraphs = [
        piece for graph in model.subgraphs if (piece := _readers(model, graph, buffer, found))
    ]
    return found


def _readers(model, graph, buffer: int, found: schema.ModelT) -> schema.SubGraphT | None:
    piece, places = schema.SubGraphT(), {-1: -1}
    piece.tensors, piece.operators = [], []
    for op in graph.operators:
        if not any(graph.tensors[i].buffer == buffer for i in indices(op.inputs)):
            continue
        op = copy.copy(op)
        for index in [*op.inputs, *op.outputs]:
            if index not in places:
                tensor = copy.copy(graph.tensors[index])
                places[int(index)] = add_tensor(piece, tensor)
                found.buffers[tensor.buffer] = copy.copy(model.buffers[tensor.buffer])
        op.inputs = np.array([places[int(index)] for index in op.inputs], np.int32)
        op.outputs = np.array([places[int(index)] for index in op.outputs], np.int32)
        piece.operators.append(op)
    made = {int(index) for op in piece.operators for index in op.outputs}
    needed = {int(index) for op in piece.operators for index in op.inputs} - made - {-1}
    piece.outputs = sorted(made)
    piece.inputs = [i for i in sorted(needed) if stored(found, piece.tensors[i]) is None]
    return piece if piece.operators else None


def add_tensor(graph: schema.SubGraphT, tensor: schema.TensorT) -> int:
    """The index of a tensor, once it is part of a graph."""
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def add_constant(model: schema.ModelT, graph: schema.SubGraphT, values) -> int:
    """The index of a tensor of integers, which is made once for equal ones."""
    array = np.asarray(values, np.int32)
    name = f"constant{array.tolist()}"
    for index, tensor in enumerate(graph.tensors):
        if text(tensor.name) == name:
            return index
    buffer, tensor = schema.BufferT(), schema.TensorT()
    buffer.data = array.reshape(-1).view(np.uint8)
    model.buffers.append(buffer)
    tensor.name, tensor.shape, tensor.type = name, array.shape, schema.TensorType.INT32
    tensor.buffer = len(model.buffers) - 1
    return add_tensor(graph, tensor)


def make_op(
    model: schema.ModelT, name: str, inputs, outputs, options, version: int = 1
) -> schema.OperatorT:
    """An op by its builtin name, with options of its type, such as ``DensifyOptionsT``."""
    op = schema.OperatorT()
    op.opcodeIndex = op_code(model, name, version)
    op.inputs, op.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
    op.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
    op.builtinOptions = options
    return op


def _builtin(code: schema.OperatorCodeT) -> int:
    # Codes above 127 came later than the one-byte field, and are in the other one alone.
    return max(code.builtinCode, code.deprecatedBuiltinCode)


def op_code(model: schema.ModelT, name: str, version: int) -> int:
    """The index of an op code, which is added where the model does not have it."""
    builtin = getattr(schema.BuiltinOperator, name)
    for index, code in enumerate(model.operatorCodes):
        if (_builtin(code), code.version) == (builtin, version):
            return index
    code = schema.OperatorCodeT()
    code.builtinCode = builtin
    code.deprecatedBuiltinCode = min(builtin, 127)
    code.version = version
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


class _AlignedBuilder(flatbuffers.Builder):
    """Starts every byte vector, and so every buffer, where a kernel may load it in one piece."""

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        if x.dtype == np.uint8:
            self.Prep(_BUFFER_ALIGNMENT, x.nbytes)
        return super().CreateNumpyVector(x)
