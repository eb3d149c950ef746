"""`ExportReport`, the result of an export, and `ExportError`, which a failed export raises."""

from __future__ import annotations

import gzip
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keras_dst._reporting.tables import as_paragraph, as_table
from keras_dst.export.target_reports import MicroReport, VelaReport


class ExportError(RuntimeError):
    """Failed export: the model cannot be converted, or the outputs of the file are wrong."""


@dataclass(frozen=True)
class TensorReport:
    """Storage of one weight tensor in the exported file.

    Attributes:
        name: Name of the weight tensor.
        op: TFLite name of the first op that reads the weight, such as ``"CONV_2D"``.
        shape: Shape of the weight in the file.
        density: Fraction of nonzero values.
        encoding: Storage format, such as ``"csr+densify"``.
        bytes: Size of the weight in its storage format, in bytes.
        dense_bytes: Size of the weight in dense format, in bytes.
        reason: Reason why the weight is stored dense, or an empty string for a sparse format.
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
    """Size, speed, memory and accuracy of one file: a dense file, or the exported file.

    Attributes:
        name: ``"dense float32"``, ``"dense int8"`` or, for the exported file, ``"this file"``.
        bytes: Size of the file.
        gzip_bytes: Size of the file after compression with gzip.
        latency: Median seconds per inference on the current CPU. None if not measured.
        load: Seconds to load the file on the current CPU. None if not measured.
        memory: Bytes by which the peak memory of a process grows when it loads the file and runs it
            once. None if not measured.
        accuracy: Accuracy on the data in ``evaluate``, or the number that the function ``evaluate``
            returned. None without ``evaluate``.
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
        path: Path of the file.
        bytes: Size of the file.
        gzip_bytes: Size of the file after compression with gzip.
        dense_bytes: Size of a dense float32 file of the same model.
        dense_gzip_bytes: Size of the dense float32 file after compression with gzip.
        tensors: One report per weight tensor of the file.
        max_error: Largest error of all outputs, over runs with and without XNNPACK. The error of an
            output ``y`` of the file is ``max|y - y_keras| / max(max|y_keras|, 1e-6)``, where
            ``y_keras`` is the output of the model.
        files: One report on each file: the dense float32 file, the dense int8 file if there is one,
            and the exported file.
        threads: Number of interpreter threads in the measurements of the files.
        batch: Batch size in the measurements of the files.
        shapes: Shapes at which the files were measured, as a dict by input name. The dict contains
            only inputs that have dynamic axes besides the batch axis.
        vela: Vela's estimates for an Ethos-U NPU, or None for other targets, or if Vela is not
            installed.
        micro: Comparison with the dense int8 file in TensorFlow Lite for Microcontrollers (TFLM),
            or None for targets other than ``"micro"``.
        rounded_to_zero: Number of nonzero weights that quantization to int8 rounds to zero. Always
            0 unless ``quantize="full"``.
        note: Sentence that explains which values are missing from the report, or an empty string if
            no value is missing.

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
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    vela: VelaReport | None = None
    micro: MicroReport | None = None
    rounded_to_zero: int = 0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict that can be written as JSON."""
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
            )
            for tensor in self.tensors
        ]
        headings = (
            *("tensor", "op", "shape", "density >", "encoding", "bytes >"),
            "dense bytes >",
        )
        reasons: dict[str, list[str]] = {}
        for tensor in self.tensors:
            if tensor.reason:
                reasons.setdefault(tensor.reason, []).append(tensor.name)
        lines = [
            as_table(headings, rows),
            *(
                as_paragraph(f"Stored dense: {', '.join(names)}. Reason: {reason}.", indent=2)
                for reason, names in reasons.items()
            ),
        ]
        tensors = "\n".join(lines)
        parts = [str(part) for part in (self.vela, self.micro, self.note or None) if part]
        if self.rounded_to_zero:
            parts.append(f"int8 rounds {self.rounded_to_zero:,} nonzero weights to zero.")
        extra = "".join(f"{part}\n\n" for part in parts)
        return (
            f"{tensors}\n\n{extra}{self._comparison()}\n"
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
                "?" if file.accuracy is None else f"{file.accuracy:.2%}",
            )
            for file in self.files
        ]
        measures = ("bytes >", "ratio >", "gzip >", "latency, ms >", "ratio >", "load, ms >")
        table = as_table(("file", *measures, "memory, MB >", "accuracy >"), rows)
        if any("?" in row for row in rows):
            table += "\nA question mark means that the value was not measured."
        if dense.latency is None:
            return table
        inputs = (f", input {name!r} of shape {shape}" for name, shape in self.shapes.items())
        return (
            f"{table}\nLatency on this CPU at batch size {self.batch}, {self.threads} "
            f"thread(s){''.join(inputs)}."
        )


def _scaled(value: float | None, unit: float) -> str:
    return "?" if value is None else f"{unit * value:.3g}"


def _ratio(value: float | None, dense: float | None) -> str:
    return "?" if value is None or dense is None else f"{value / dense:.3f}"


def gzip_bytes(content: bytes) -> int:
    """Return the size of a file after compression with gzip."""
    return len(gzip.compress(content, compresslevel=9))
