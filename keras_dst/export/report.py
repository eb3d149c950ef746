"""What an export gives back: a report, or an error."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.markup import escape
from rich.table import Table


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
class ExportReport:
    """What `export_tflite` wrote.

    ``bytes`` and ``gzip_bytes`` are those of the file, ``dense_bytes`` and ``dense_gzip_bytes``
    those of the same model with its weights stored densely. ``max_error`` is the worst
    ``max|y - y_keras| / max|y_keras|`` over all outputs and both ways to run the file. `str()`
    is a table of the weights, and the sizes as fractions of the dense file's, gzip of its gzip.

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

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        table = Table(box=MARKDOWN)
        for heading in ("tensor", "op", "shape", "density", "encoding", "bytes", "dense", "why"):
            number = heading in ("density", "bytes", "dense")
            table.add_column(
                heading, justify="right" if number else "left", overflow="fold", max_width=60
            )
        for tensor in self.tensors:
            table.add_row(
                escape(tensor.name),
                tensor.op,
                "x".join(map(str, tensor.shape)),
                f"{tensor.density:.1%}",
                tensor.encoding,
                f"{tensor.bytes:,}",
                f"{tensor.dense_bytes:,}",
                escape(tensor.reason),
            )
        page = io.StringIO()
        console = Console(file=page, width=300, force_terminal=False, color_system=None)
        console.print(table)
        return (
            f"{page.getvalue().strip()}\n"
            f"{self.path.name}: {self.bytes:,} bytes ({self.bytes / self.dense_bytes:.2f}x of "
            f"dense, gzip {self.gzip_bytes / self.dense_gzip_bytes:.2f}x), "
            f"max error {self.max_error:.0e}"
        )
