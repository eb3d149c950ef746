"""What an export gives back: a report, or an error."""

from __future__ import annotations

import gzip
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keras_dst._reporting.tables import as_table


class ExportError(RuntimeError):
    """A model that could not be converted, or whose file did not compute what the model does."""


@dataclass(frozen=True)
class TensorReport:
    """One weight of the file: how it is stored, in how many bytes, and why if it stayed dense."""

    name: str
    op: str
    shape: tuple[int, ...]
    density: float
    encoding: str
    bytes: int
    dense_bytes: int
    reason: str


@dataclass(frozen=True)
class FileReport:
    """One of the files that are compared: the dense ones, and the one that was written.

    ``latency`` is the median of one inference, ``load`` the time to load the file, in seconds,
    both on this CPU; ``memory`` the bytes that both add to a process at their peak. They are None
    where they were not measured, ``accuracy`` where there was nothing to evaluate on.
    """

    name: str
    bytes: int
    gzip_bytes: int
    latency: float | None
    load: float | None
    memory: int | None
    accuracy: float | None


@dataclass(frozen=True)
class ExportReport:
    """What `export_tflite` wrote.

    ``bytes`` and ``gzip_bytes`` are those of the file, ``dense_bytes`` and ``dense_gzip_bytes``
    those of the same model with its weights stored densely. ``max_error`` is the worst
    ``max|y - y_keras| / max|y_keras|`` over all outputs and both ways to run the file. ``files``
    are the dense float32 file, a dense int8 one where there is one, and the one that was written,
    at ``batch`` and ``threads``. `str()` is a table of the weights and one of the files.

    Example:
        >>> print(export_tflite(model, "model.tflite"))
    """

    path: Path
    bytes: int
    gzip_bytes: int
    dense_bytes: int
    dense_gzip_bytes: int
    tensors: list[TensorReport]
    max_error: float
    files: list[FileReport]
    threads: int
    batch: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        rows = [
            (
                tensor.name,
                tensor.op,
                "x".join(map(str, tensor.shape)),
                f"{tensor.density:.1%}",
                tensor.encoding,
                f"{tensor.bytes:,}",
                f"{tensor.dense_bytes:,}",
                tensor.reason,
            )
            for tensor in self.tensors
        ]
        headings = ("tensor", "op", "shape", "density >", "encoding", "bytes >", "dense >", "why")
        return (
            f"{as_table(headings, rows)}\n\n{self._compared()}\n"
            f"{self.path.name}: {self.bytes:,} bytes ({self.bytes / self.dense_bytes:.2f}x of "
            f"dense, gzip {self.gzip_bytes / self.dense_gzip_bytes:.2f}x), "
            f"max error {self.max_error:.0e}"
        )

    def _compared(self) -> str:
        dense = self.files[0]
        rows = [
            (
                file.name,
                f"{file.bytes:,}",
                _ratio(file.bytes, dense.bytes),
                f"{file.gzip_bytes:,}",
                _scaled(file.latency, 1e3),
                _ratio(file.latency, dense.latency),
                _scaled(file.load, 1e3),
                _scaled(file.memory, 1e-6),
                "not measured" if file.accuracy is None else f"{file.accuracy:.2%}",
            )
            for file in self.files
        ]
        measures = ("bytes >", "ratio >", "gzip >", "latency, ms >", "ratio >", "load, ms >")
        table = as_table(("file", *measures, "memory, MB >", "accuracy >"), rows)
        return f"{table}\nlatency: on this CPU, batch {self.batch}, {self.threads} thread(s)"


def _scaled(value: float | None, unit: float) -> str:
    return "not measured" if value is None else f"{unit * value:.3g}"


def _ratio(value: float | None, dense: float | None) -> str:
    return "not measured" if value is None or dense is None else f"{value / dense:.3f}"


def gzip_bytes(content: bytes) -> int:
    """How large a file is once it is compressed."""
    return len(gzip.compress(content, compresslevel=9))
