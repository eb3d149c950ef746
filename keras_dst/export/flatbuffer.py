"""Read and write the flatbuffer of a ``.tflite`` file as Python objects that can be edited.

The module imports flatbuffers, NumPy and LiteRT, but not TensorFlow.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

_BUFFER_ALIGNMENT = 16  # The Python API of flatbuffers ignores `force_align` in the schema.
_OP_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}


def read(content: bytes) -> schema.ModelT:
    """Return a ``.tflite`` file as Python objects, which can be edited and written with `write`."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    if any(buffer.offset > 1 for buffer in model.buffers):
        raise ValueError(
            "Expected a .tflite file below 2 GB, which stores its weights inside the flatbuffer. "
            "Received: a file that stores its weights after the flatbuffer."
        )
    return model


def write(model: schema.ModelT) -> bytes:
    """Convert the Python objects that `read` returned to the bytes of a ``.tflite`` file."""
    builder = _CompactBuilder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def op_name(model: schema.ModelT, op: schema.OperatorT) -> str:
    """Return the builtin name of an op, such as ``"CONV_2D"``."""
    builtin = _builtin(model.operatorCodes[op.opcodeIndex])
    return _OP_NAMES.get(builtin, str(builtin))


def text(name: bytes | str | None) -> str:
    """Convert a name in the flatbuffer, which may be bytes or None, to a string."""
    return name.decode() if isinstance(name, bytes) else name or ""


def indices(tensors: Iterable[int] | None) -> list[int]:
    """Return tensor indices as a list of integers, without the -1 of absent optional tensors."""
    return [] if tensors is None else [int(t) for t in tensors if t >= 0]


def stored(model: schema.ModelT, tensor: schema.TensorT) -> np.ndarray | None:
    """Return the stored bytes of a constant tensor, or None for a computed tensor."""
    data = model.buffers[tensor.buffer].data
    return None if data is None or not len(data) else data


def extract_readers(model: schema.ModelT, buffer: int) -> schema.ModelT:
    """Extract a model that contains only the ops that read one buffer."""

    def reads_buffer(graph, op):
        return any(graph.tensors[i].buffer == buffer for i in indices(op.inputs))

    return extract_ops(model, reads_buffer)


def extract_ops(model: schema.ModelT, is_extracted: Callable[..., bool]) -> schema.ModelT:
    """Extract a model that contains only the ops for which `is_extracted(graph, op)` is true.

    The inputs of the extracted model are the computed tensors that the ops read. The outputs of the
    extracted model are the results of the ops. Buffers keep their indices.
    """
    extracted = schema.ModelT()
    extracted.version, extracted.operatorCodes = model.version, list(model.operatorCodes)
    extracted.buffers = [schema.BufferT() for _ in model.buffers]
    extracted.subgraphs = [
        piece
        for graph in model.subgraphs
        if (piece := _extract_from_graph(model, graph, is_extracted, extracted))
    ]
    return extracted


def _extract_from_graph(model, graph, is_extracted, extracted) -> schema.SubGraphT | None:
    piece, places = schema.SubGraphT(), {-1: -1}
    piece.tensors, piece.operators = [], []
    for op in graph.operators:
        if not is_extracted(graph, op):
            continue
        op = copy.copy(op)
        for index in [*op.inputs, *op.outputs]:
            if index not in places:
                tensor = copy.copy(graph.tensors[index])
                places[int(index)] = add_tensor(piece, tensor)
                extracted.buffers[tensor.buffer] = copy.copy(model.buffers[tensor.buffer])
        op.inputs = np.array([places[int(index)] for index in op.inputs], np.int32)
        op.outputs = np.array([places[int(index)] for index in op.outputs], np.int32)
        piece.operators.append(op)
    made = {int(index) for op in piece.operators for index in op.outputs}
    needed = {int(index) for op in piece.operators for index in op.inputs} - made - {-1}
    piece.outputs = sorted(made)
    piece.inputs = [i for i in sorted(needed) if stored(extracted, piece.tensors[i]) is None]
    return piece if piece.operators else None


def add_tensor(graph: schema.SubGraphT, tensor: schema.TensorT) -> int:
    """Add a tensor to a graph and return its index."""
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def add_constant(model: schema.ModelT, graph: schema.SubGraphT, values) -> int:
    """Return the index of an int32 constant.

    If the graph lacks the constant, the constant is added to the graph.
    """
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
    """Create an op from its builtin name and an options object, such as ``DensifyOptionsT()``."""
    op = schema.OperatorT()
    op.opcodeIndex = op_code(model, name, version)
    op.inputs, op.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
    op.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
    op.builtinOptions = options
    return op


def _builtin(code: schema.OperatorCodeT) -> int:
    # The deprecated field of an op code has one byte, so codes above 127 are stored only in the new
    # field.
    return max(code.builtinCode, code.deprecatedBuiltinCode)


def op_code(model: schema.ModelT, name: str, version: int) -> int:
    """Return the index of an op code in a model. A missing op code is added to the model."""
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


class _CompactBuilder(flatbuffers.Builder):
    """Flatbuffer builder that stores equal strings and equal vectors only once.

    Several objects of a flatbuffer may refer to the same vector. In a quantized file, for example,
    all kernels with the same number of channels share one vector of zero points.

    The builder also aligns all byte vectors, and thus the data of all buffers.
    """

    def __init__(self, size: int):
        super().__init__(size)
        self._places: dict[tuple[str, bytes], int] = {}

    def CreateString(self, s: bytes | str, encoding: str = "utf-8", errors: str = "strict") -> int:
        content = s.encode(encoding, errors) if isinstance(s, str) else s
        key = ("string", content)
        if key not in self._places:
            self._places[key] = super().CreateString(content)
        return self._places[key]

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        # The keys of the dict are digests, because keys that contain whole vectors would take as
        # much memory as the file.
        key = (x.dtype.str, hashlib.sha256(x.tobytes()).digest())
        if key not in self._places:
            if x.dtype == np.uint8:
                self.Prep(_BUFFER_ALIGNMENT, x.nbytes)
            self._places[key] = super().CreateNumpyVector(x)
        return self._places[key]
