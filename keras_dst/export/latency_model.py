"""Estimate the latency of a ``.tflite`` file, for example on a CPU that is not available.

The latency model adds up the estimated latencies of single ops on one thread. The constants of the
latency model, in nanoseconds, were measured for single ops on an x86 CPU of 2023 and rounded. The
constants for CPUs without AVX were measured on the same CPU with AVX disabled, as a proxy for ARM.
The overheads per inference and per op, and the time to copy a value, are guesses, not measurements.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_dst._utils.open_sizes import OPEN_SIZE
from keras_dst.export import sparse_inference
from keras_dst.export.decode import constant_sources, encoding, shape, type_name, values
from keras_dst.export.encode import WEIGHT_OPS, WEIGHT_SLOT
from keras_dst.export.flatbuffer import indices, op_name, read, stored
from keras_dst.export.memory import concrete_sizes

_COPIES = frozenset({"PAD", "STRIDED_SLICE", "CONCATENATION"})
_AT_LOAD = frozenset({"DENSIFY", "DEQUANTIZE"})
_RUN, _OP = 1000, 100  # Fixed overheads per inference and per op, in nanoseconds.
_NANO = 1e-9


@dataclass(frozen=True)
class Cpu:
    """Latency constants of one CPU, in nanoseconds.

    Attributes:
        vector: Nanoseconds per weight, in a dense FULLY_CONNECTED op with one input row.
        matrix: Nanoseconds per multiplication, in a dense op with many input rows, such as a
            convolution.
        direct: Dict that maps each sparse encoding to a pair of latencies of a FULLY_CONNECTED op
            that reads a sparse weight directly. The unit is nanoseconds per stored value and per
            input row. The first latency applies to one input row, and the second latency applies to
            many input rows.
        row: Nanoseconds per output value in a FULLY_CONNECTED op that reads a sparse weight
            directly. The latency of the op is the sum of the latencies from ``direct`` and ``row``.
        copy: Nanoseconds per value that PAD, STRIDED_SLICE or CONCATENATION writes.
        sparse: Nanoseconds per multiplication by a nonzero weight in XNNPACK's sparse convolution.
            The value is None for a CPU on which XNNPACK does not use its sparse convolution.
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
    """Return the key in `CPUS` for the CPU of the current machine."""
    return "x86" if platform.machine().lower() in ("x86_64", "amd64") else "arm"


@dataclass(frozen=True)
class LatencyModel:
    """Function that receives the contents of files, and estimates the seconds per inference of each
    file.

    The estimate assumes that all dynamic axes of a tensor have size 32, except the batch axis.

    Attributes:
        cpu: Latency constants of the CPU.
        batch: Batch size for files with a dynamic batch size. Defaults to 1.
    """

    cpu: Cpu
    batch: int = 1

    def __call__(self, files: Sequence[bytes]) -> list[float]:
        return [self._seconds(read(content)) for content in files]

    def _seconds(self, model: schema.ModelT) -> float:
        total = float(_RUN)
        for graph in model.subgraphs:
            sparse = self._sparse_ops(model, graph)
            unpacked = constant_sources(model, graph)
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

    def _sparse_ops(self, model, graph) -> set[int]:
        """Return the ids of the ops that XNNPACK runs with sparse kernels."""
        if self.cpu.sparse is None or not sparse_inference.is_hinted(model, graph):
            return set()
        nodes = sparse_inference.read_nodes(model, graph)
        region = sparse_inference.sparse_region(nodes, graph)
        return set() if region.wrong else {id(node.op) for node in region.nodes if node.weights}

    def _size(self, tensor: schema.TensorT) -> float:
        if tensor.shapeSignature is None:
            return float(np.prod(shape(tensor)))
        return float(np.prod(concrete_sizes(tensor.shapeSignature, self.batch, OPEN_SIZE)))
