"""An estimate of the latency of a ``.tflite`` file, where it cannot be measured.

Constants are nanoseconds on one thread, rounded from runs of single ops on a CPU of 2023; those for
CPUs without AVX with AVX hidden, in place of an ARM. Overheads and copies are guesses.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_dst.export import sparse_inference
from keras_dst.export.decode import encoding, origins, shape, type_name, values
from keras_dst.export.encode import WEIGHT_OPS, WEIGHT_SLOT
from keras_dst.export.flatbuffer import indices, op_name, read, stored

_COPIES = frozenset({"PAD", "STRIDED_SLICE", "CONCATENATION"})
_AT_LOAD = frozenset({"DENSIFY", "DEQUANTIZE"})
_RUN, _OP = 1000, 100  # nanoseconds that a run takes, and an op, whatever their sizes
_NANO = 1e-9


@dataclass(frozen=True)
class Cpu:
    """What the kernels of a CPU take, in nanoseconds.

    Attributes:
        vector: dense FULLY_CONNECTED of one row, for each weight.
        matrix: dense ops on many rows, for each multiplication.
        direct: FULLY_CONNECTED on a sparse weight, for each stored value and row, by encoding:
            of one row, and of many.
        row: the same, for each row of the weight and of the input.
        copy: for each value that a PAD, STRIDED_SLICE or CONCATENATION writes.
        sparse: a convolution in XNNPACK's sparse form, for each multiplication by a nonzero; None
            where that does not exist.
    """

    vector: float
    matrix: float
    direct: dict[str, tuple[float, float]]
    row: float
    copy: float
    sparse: float | None


CPUS = {
    "x86": Cpu(
        vector=0.16,
        matrix=0.03,
        direct={"csr": (1.3, 0.7), "1x4": (0.45, 0.2), "1x16": (0.36, 0.36)},
        row=5,
        copy=0.1,
        sparse=None,
    ),
    "arm": Cpu(
        vector=0.2,
        matrix=0.12,
        direct={"csr": (1.3, 0.7), "1x4": (0.45, 0.25), "1x16": (0.36, 0.36)},
        row=5,
        copy=0.15,
        sparse=0.12,
    ),
}


def this_cpu() -> str:
    """The name of the CPU that is like this one."""
    return "x86" if platform.machine().lower() in ("x86_64", "amd64") else "arm"


@dataclass(frozen=True)
class Modelled:
    """A clock of a CPU: gives the estimated seconds of files, at a batch size."""

    cpu: Cpu
    batch: int = 1

    def __call__(self, contents: Sequence[bytes]) -> list[float]:
        return [self._seconds(read(content)) for content in contents]

    def _seconds(self, model: schema.ModelT) -> float:
        total = float(_RUN)
        for graph in model.subgraphs:
            sparse = self._computed_sparse(model, graph)
            unpacked = origins(model, graph)
            for op in graph.operators:
                kind = op_name(model, op)
                if kind in _AT_LOAD or not indices(op.outputs):
                    continue
                total += _OP
                made = graph.tensors[op.outputs[0]]
                if kind in _COPIES:
                    total += self.cpu.copy * self._size(made)
                elif kind in WEIGHT_OPS:
                    index = int(op.inputs[WEIGHT_SLOT])
                    tensor = graph.tensors[unpacked.get(index, index)]
                    rows = self._size(made) / max(shape(made)[-1:], default=1)
                    total += self._product(model, tensor, rows, id(op) in sparse, index in unpacked)
        return _NANO * total

    def _product(self, model, tensor, rows: float, sparse: bool, unpacked: bool) -> float:
        cpu, size = self.cpu, float(np.prod(shape(tensor)))
        weight = values(model, tensor)
        if sparse and cpu.sparse is not None and weight is not None:
            return min(cpu.sparse * np.count_nonzero(weight), cpu.matrix * size) * rows
        data = stored(model, tensor)
        if tensor.sparsity is None or data is None or unpacked:
            return max(cpu.vector * size, cpu.matrix * size * rows)
        one, many = cpu.direct.get(encoding(tensor), cpu.direct["csr"])
        entries = data.nbytes / np.dtype(type_name(tensor)).itemsize
        product = entries * max(one, many * rows)
        return product + cpu.row * shape(tensor)[0] * rows

    def _computed_sparse(self, model, graph) -> set[int]:
        """The ops that XNNPACK computes in its sparse form."""
        if self.cpu.sparse is None or not sparse_inference.is_hinted(model, graph):
            return set()
        part = sparse_inference.moved(sparse_inference.read_nodes(model, graph), graph)
        return set() if part.wrong else {id(node.op) for node in part.nodes if node.weights}

    def _size(self, tensor: schema.TensorT) -> float:
        signature = tensor.shapeSignature
        is_open = signature is not None and len(signature) and signature[0] == -1
        return float(np.prod(shape(tensor))) * (self.batch if is_open else 1)
