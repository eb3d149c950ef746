"""List the constants of a ``.tflite`` file and their storage formats."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from keras_dst._reporting.tables import as_table
from keras_dst.export.decode import (
    encoding,
    load,
    shape,
    stored_bytes,
    type_name,
    values,
)
from keras_dst.export.flatbuffer import indices, op_name, read, stored, text
from keras_dst.export.report import gzip_bytes


@dataclass(frozen=True)
class ConstantReport:
    """Storage of one constant of a ``.tflite`` file.

    Attributes:
        name: Name of the tensor.
        type: Data type of the values, such as ``"float32"``.
        shape: Shape of the tensor.
        encoding: ``"dense"``, ``"csr"``, ``"1x4"`` and so on, followed by ``"+densify"`` if the
            runtime unpacks the constant when it loads the file.
        bytes: Number of bytes of the values and indices together.
        sparsity: Fraction of values that are zero, or None if the values are not numbers.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    encoding: str
    bytes: int
    sparsity: float | None


@dataclass(frozen=True)
class InspectionReport:
    """Constants and size of a ``.tflite`` file. `str()` returns a table."""

    bytes: int
    gzip_bytes: int
    constants: list[ConstantReport]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict that can be written as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            (
                constant.name,
                constant.type,
                "x".join(map(str, constant.shape)),
                constant.encoding,
                f"{constant.bytes:,}",
                "?" if constant.sparsity is None else f"{constant.sparsity:.1%}",
            )
            for constant in self.constants
        ]
        headings = ("constant", "type", "shape", "encoding", "bytes >", "zeros >")
        total = f"{self.bytes:,} bytes in all, {self.gzip_bytes:,} with gzip"
        return f"{as_table(headings, rows)}\n{total}"


def inspect_file(source: str | os.PathLike[str] | bytes) -> InspectionReport:
    """Return a report on the constants of a ``.tflite`` file.

    Args:
        source: The file, as a path or as bytes.

    Returns:
        An `InspectionReport`, which lists the constants in file order.

    Raises:
        ValueError: If the file is not a ``.tflite`` file, or it is damaged.
        OSError: If the path cannot be read.

    Example:
        >>> print(inspect_file("model.tflite"))
    """
    content = load(source)
    model = read(content)
    rows = []
    for graph in model.subgraphs:
        densified = {
            index
            for op in graph.operators
            if op_name(model, op) == "DENSIFY"
            for index in indices(op.inputs)
        }
        for index, tensor in enumerate(graph.tensors):
            if stored(model, tensor) is None:
                continue
            entries = values(model, tensor)
            rows.append(
                ConstantReport(
                    name=text(tensor.name),
                    type=type_name(tensor),
                    shape=shape(tensor),
                    encoding=encoding(tensor) + "+densify" * (index in densified),
                    bytes=stored_bytes(model, tensor),
                    sparsity=None if entries is None else float(np.mean(entries == 0)),
                )
            )
    return InspectionReport(len(content), gzip_bytes(content), rows)
