"""Report of an export, and the error that an export raises."""

from __future__ import annotations

import gzip
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keras_dst._reporting.tables import as_table
from keras_dst.export.target_reports import MicroReport, VelaReport


class ExportError(RuntimeError):
    """The model could not be converted, or the file does not compute the model's outputs."""


@dataclass(frozen=True)
class TensorReport:
    """Storage of one weight in the file.

    Attributes:
        name: name of the tensor.
        op: builtin name of the first op that reads the weight.
        shape: shape of the weight in the file.
        density: fraction of values that are not zero.
        encoding: storage format, such as ``"csr+densify"``.
        bytes: bytes of the weight in this format.
        dense_bytes: bytes of the weight if it is stored dense.
        reason: the reason why the weight is stored dense; empty if it is stored in another format.
    """

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
    """Figures of one compared file: a dense file, or the file that was written.

    Attributes:
        name: ``"dense float32"``, ``"dense int8"`` or ``"this file"``.
        bytes: size of the file.
        gzip_bytes: size of the file after compression with gzip.
        latency: median seconds of one inference on this CPU. None if not measured.
        load: seconds to load the file on this CPU. None if not measured.
        memory: peak memory in bytes that loading and one inference add to a process. None if not
            measured.
        accuracy: result of ``evaluate``. None if no ``evaluate`` was given.
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
    """Result of `export_tflite`. `str()` returns a table of the weights and a table of the files.

    Attributes:
        path: path of the file.
        bytes: size of the file.
        gzip_bytes: size of the file after compression with gzip.
        dense_bytes: size of a dense float32 file of the same model.
        dense_gzip_bytes: size of the dense float32 file after compression with gzip.
        tensors: the weights of the file.
        max_error: largest ``max|y - y_keras| / max|y_keras|`` of all outputs, with and without
            XNNPACK.
        files: the dense float32 file, a dense int8 file if one was made, and the written file.
        threads: number of interpreter threads in the measurements of the files.
        batch: batch size in the measurements of the files.
        vela: Vela's estimates for an Ethos-U NPU. None for other targets, and if Vela is missing.
        micro: comparison with the dense int8 file in TensorFlow Lite for Microcontrollers. None for
            other targets.
        rounded_to_zero: number of nonzero weights that int8 rounds to zero. 0 without
            ``quantize="full"``.
        note: a sentence about figures that are missing; empty if no figure is missing.

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
    vela: VelaReport | None = None
    micro: MicroReport | None = None
    rounded_to_zero: int = 0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict of plain values, which can be written as JSON."""
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
        headings = (
            *("tensor", "op", "shape", "density >", "encoding", "bytes >"),
            *("dense bytes >", "reason if dense"),
        )
        parts = [str(part) for part in (self.vela, self.micro, self.note or None) if part]
        if self.rounded_to_zero:
            parts.append(f"int8 rounds {self.rounded_to_zero:,} nonzero weights to zero.")
        extra = "".join(f"{part}\n\n" for part in parts)
        return (
            f"{as_table(headings, rows)}\n\n{extra}{self._comparison()}\n"
            f"{self.path.name}: {self.bytes:,} bytes ({self.bytes / self.dense_bytes:.2f}x of "
            f"dense, gzip {self.gzip_bytes / self.dense_gzip_bytes:.2f}x), "
            f"max error {self.max_error:.0e}"
        )

    def _comparison(self) -> str:
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
        if dense.latency is None:
            return table
        return f"{table}\nLatency on this CPU at batch size {self.batch}, {self.threads} thread(s)."


def _scaled(value: float | None, unit: float) -> str:
    return "not measured" if value is None else f"{unit * value:.3g}"


def _ratio(value: float | None, dense: float | None) -> str:
    return "not measured" if value is None or dense is None else f"{value / dense:.3f}"


def gzip_bytes(content: bytes) -> int:
    """Return the size of a file after compression with gzip."""
    return len(gzip.compress(content, compresslevel=9))
