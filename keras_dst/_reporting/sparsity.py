"""What of a model is zero, and what it costs: `report`."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.box import MARKDOWN
from rich.table import Table

from keras_dst import plots
from keras_dst._reporting import html
from keras_dst._reporting.flops import Shape, count_per_weight
from keras_dst._reporting.tables import as_text, count, percent
from keras_dst._reporting.weights import cells, weights_of
from keras_dst._utils.files import atomic_write, check_writable
from keras_dst.surgery import check_model


@dataclass(frozen=True)
class WeightReport:
    """One prunable weight of a model.

    Attributes:
        name: path of the weight.
        layer: type of its layer.
        shape: its shape.
        parameters: number of its entries.
        nonzeros: entries that are neither zero nor masked.
        sparse: whether it is under a mask, of its layer or of a `SparseOptimizer`.
        uses: how often an entry is multiplied for one sample, None where that is not known.
        reason: why `uses` is None.
        cells: densities of its parts, as `plots.masks` draws them: inputs x outputs.

    Example:
        >>> keras_dst.report(model).layers[0].density
    """

    name: str
    layer: str
    shape: Shape
    parameters: int
    nonzeros: int
    sparse: bool
    uses: int | None
    reason: str | None
    cells: np.ndarray = field(repr=False, compare=False)

    @property
    def density(self) -> float:
        """Fraction of nonzeros."""
        return self.nonzeros / max(self.parameters, 1)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.density

    @property
    def flops(self) -> int | None:
        """Multiplications and additions for one sample, those with zeros left out."""
        return None if self.uses is None else 2 * self.nonzeros * self.uses

    @property
    def dense_flops(self) -> int | None:
        """Multiplications and additions for one sample."""
        return None if self.uses is None else 2 * self.parameters * self.uses

    def to_dict(self) -> dict[str, Any]:
        """All figures, in types that JSON knows."""
        own = {**dataclasses.asdict(self), "shape": list(self.shape)}
        del own["cells"]  # a picture
        derived = ("density", "sparsity", "flops", "dense_flops")
        return {**own, **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True)
class SparsityReport:
    """What `report` found: prints as a table.

    Attributes:
        model: name of the model.
        parameters: number of all weights: kernels, biases, normalisation and its statistics, and
            not the state that keras_dst adds. A shared layer counts once.
        nonzeros: how many of them are neither zero nor masked.
        bytes: size of all weights, zeros included, in the dtypes of the variables.
        layers: the prunable weights, in the model's order.

    Example:
        >>> print(keras_dst.report(model))
    """

    model: str
    parameters: int
    nonzeros: int
    bytes: int
    layers: list[WeightReport] = field(repr=False)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights; 0 where there is none."""
        prunable = sum(row.parameters for row in self.layers)
        return 1 - sum(row.nonzeros for row in self.layers) / prunable if prunable else 0.0

    @property
    def total_sparsity(self) -> float:
        """Fraction of zeros among all weights; 0 where there is none."""
        return 1 - self.nonzeros / self.parameters if self.parameters else 0.0

    @property
    def flops(self) -> int | None:
        """FLOPs for one sample, each kernel's scaled with its density; None: see `reason`."""
        return _sum_known([row.flops for row in self.layers])

    @property
    def dense_flops(self) -> int | None:
        """FLOPs for one sample if no weight were zero; None: see `reason`."""
        return _sum_known([row.dense_flops for row in self.layers])

    @property
    def reason(self) -> str | None:
        """Why `flops` is None."""
        return "; ".join(dict.fromkeys(row.reason for row in self.layers if row.reason)) or None

    def to_dict(self) -> dict[str, Any]:
        """All figures, in types that JSON knows.

        Example:
            >>> json.dumps(keras_dst.report(model).to_dict())
        """
        names = ["model", "sparsity", "total_sparsity", "parameters", "nonzeros", "bytes"]
        names += ["flops", "dense_flops", "reason"]
        rows = [row.to_dict() for row in self.layers]
        return {**{name: getattr(self, name) for name in names}, "layers": rows}

    def __str__(self):
        table = Table(box=MARKDOWN)
        for name in ("weight", "layer", "shape"):
            table.add_column(name, no_wrap=True)
        for name in ("weights", "nonzero", "sparsity", "FLOPs", "dense FLOPs"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("masked")
        for row in self.layers:
            shape = " x ".join(str(n) for n in row.shape)
            figures = _figures(row.parameters, row.nonzeros, row.flops, row.dense_flops)
            table.add_row(row.name, row.layer, shape, *figures, "yes" if row.sparse else "")
        table.add_row()
        prunable = sum(row.parameters for row in self.layers)
        kept = sum(row.nonzeros for row in self.layers)
        figures = _figures(prunable, kept, self.flops, self.dense_flops)
        table.add_row("total of these", "", "", *figures)
        table.add_row("all weights", "", "", *_figures(self.parameters, self.nonzeros)[:3])
        lines = [f"{self.model}: {percent(self.sparsity)} sparse, {self.bytes:,} bytes if dense"]
        lines += [
            line.rstrip() for line in as_text(table, width=10_000).splitlines() if line.strip()
        ]
        if self.reason:
            lines.append(f"FLOPs are not known: {self.reason}.")
        return "\n".join(lines)

    def plot(self, ax=None):
        """Bar chart of the density of every prunable weight.

        Args:
            ax: the matplotlib axes to draw on; by default those of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: without matplotlib.

        Example:
            >>> keras_dst.report(model).plot().figure.savefig("density.png")
        """
        return plots.density(self, ax)

    def to_html(self) -> str:
        """A page with the summary, the table, the densities and heat maps of the masks.

        It is whole in itself: no scripts, and nothing is loaded from elsewhere.

        Raises:
            ImportError: without matplotlib or jinja2.

        Example:
            >>> IPython.display.HTML(keras_dst.report(model).to_html())
        """
        return html.page(self)

    def save_html(self, path) -> None:
        """Write the page of `to_html` to a file, which is whole or not there.

        Args:
            path: of the file; one that exists is replaced.

        Raises:
            OSError: where the file cannot be written.
            ImportError: without matplotlib or jinja2.

        Example:
            >>> keras_dst.report(model).save_html("report.html")
        """
        path = pathlib.Path(path)
        check_writable(path)
        text = self.to_html()
        with atomic_write(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def report(model) -> SparsityReport:
    """Count what of a model is zero, and what it costs.

    Works on every built Keras model: dense, made sparse by `sparsify`, trained with
    `SparseOptimizer`, or stripped. A weight counts as zero where it is 0 or its mask is. Prunable
    are the weights under a mask and all other kernels, frozen ones included.

    FLOPs are those of the prunable weights in inference on one sample, a multiplication and an
    addition being 2; padding counts as input. They come from one symbolic call of the model, so a
    shared layer counts as often as it is called, an RNN cell once per time step, and a layer that
    inference does not call as 0. They are None, with the reason, where the model's input shape is
    not known or leaves open a size they depend on, and for a weight of a user's own layer that is
    neither a matrix over the last axis of an input, nor that of a convolution, nor named as a token
    or an embedding, which cost nothing.

    Args:
        model: a built Keras 3 model or layer; it is left as it was.

    Returns:
        A `SparsityReport`.

    Raises:
        TypeError: for a model that is not a Keras 3 model.
        ValueError: for an unbuilt model.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> keras_dst.report(model).dense_flops
        64
    """
    check_model(model)
    weights = weights_of(model)
    uses = iter(count_per_weight(model, [weight for weight in weights if weight.prunable]))
    nonzeros = 0
    rows = []
    for weight in weights:
        kept = weight.kept()
        number = int(np.count_nonzero(kept))
        nonzeros += number
        if weight.prunable:
            times, reason = next(uses)
            rows.append(
                WeightReport(
                    name=weight.variable.path,
                    layer=type(weight.layers[0]).__name__,
                    shape=tuple(weight.variable.shape),
                    parameters=weight.parameters,
                    nonzeros=number,
                    sparse=weight.sparse,
                    uses=times,
                    reason=reason,
                    cells=cells(kept, weight.layout),
                )
            )
    return SparsityReport(
        model=model.name,
        parameters=sum(weight.parameters for weight in weights),
        nonzeros=nonzeros,
        bytes=sum(weight.parameters * _bytes_each(weight.variable.dtype) for weight in weights),
        layers=rows,
    )


def _sum_known(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _figures(parameters, nonzeros, *flops) -> list[str]:
    sparsity = 1 - nonzeros / parameters if parameters else 0.0
    return [count(parameters), count(nonzeros), percent(sparsity), *map(count, flops)]


def _bytes_each(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)  # as in bfloat16 and float8_e4m3fn; bool has none
    return max(int(bits[0]) // 8, 1) if bits else 1
