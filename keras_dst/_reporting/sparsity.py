"""`report`: the sparsity, the parameters and the FLOPs of a model."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keras_dst import plots
from keras_dst._reporting import html
from keras_dst._reporting.flops import Shape, count_uses_per_weight, sum_known
from keras_dst._reporting.tables import as_paragraph, as_table, format_count, format_percent
from keras_dst._reporting.weights import density_map, weights_of
from keras_dst._structure.coupling import CoupledChannels, channel_groups
from keras_dst._utils.files import atomic_write, check_writable
from keras_dst.surgery import check_model


@dataclass(frozen=True)
class WeightReport:
    """One prunable weight of a model: a row of a `SparsityReport`.

    Attributes:
        name: Path of the weight.
        layer: Class name of the layer that holds the weight.
        shape: Shape of the weight.
        parameters: Number of entries.
        nonzeros: Number of entries that are neither zero nor masked.
        sparse: True if a layer or a `SparseOptimizer` masks the weight.
        use_count: Number of times that each entry is multiplied for one sample. None if unknown.
        reason: Reason why `use_count` is unknown, or None.
        density_map: Matrix (inputs x outputs) of densities. The weight is divided into blocks of
            nearly equal size, and each matrix entry is the density of one block.

    Example:
        >>> keras_dst.report(model).layers[0].density
    """

    name: str
    layer: str
    shape: Shape
    parameters: int
    nonzeros: int
    sparse: bool
    use_count: int | None
    reason: str | None
    density_map: np.ndarray = field(repr=False, compare=False)

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
        """FLOPs for one sample, not counting multiplications by zero, or None if they are
        unknown."""
        return None if self.use_count is None else 2 * self.nonzeros * self.use_count

    @property
    def dense_flops(self) -> int | None:
        """Number of multiplications and additions for one sample if no weight were zero.

        None if unknown.
        """
        return None if self.use_count is None else 2 * self.parameters * self.use_count

    def to_dict(self) -> dict[str, Any]:
        """Return the report on the weight as a dict for JSON, without the density map."""
        own = {**dataclasses.asdict(self), "shape": list(self.shape)}
        del own["density_map"]
        derived = ("density", "sparsity", "flops", "dense_flops")
        return {**own, **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True)
class SparsityReport:
    """Result of `report`. A `SparsityReport` prints as a table.

    Attributes:
        model: Name of the model.
        parameters: Number of parameters, including biases and the statistics of normalization
            layers. The parameters of a shared layer count once. Variables that keras_dst adds, such
            as masks, do not count.
        nonzeros: Number of parameters that are neither zero nor masked.
        bytes: Size of all parameters in bytes, including zeros, in the dtypes of the variables.
        layers: A `WeightReport` for every prunable weight, in the order of the model.
        groups: Groups of coupled channels, which can only be removed together, as `channel_groups`
            returns them. The groups are None unless `report` was called with `groups=True`.

    Example:
        >>> print(keras_dst.report(model))
    """

    model: str
    parameters: int
    nonzeros: int
    bytes: int
    layers: list[WeightReport] = field(repr=False)
    groups: CoupledChannels | None = field(default=None, repr=False, compare=False)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights, or 0 if the model has no prunable
        weights."""
        prunable = sum(row.parameters for row in self.layers)
        return 1 - sum(row.nonzeros for row in self.layers) / prunable if prunable else 0.0

    @property
    def total_sparsity(self) -> float:
        """Fraction of zeros among all weights, or 0 if the model has no weights."""
        return 1 - self.nonzeros / self.parameters if self.parameters else 0.0

    @property
    def flops(self) -> int | None:
        """FLOPs for one sample, not counting multiplications by zero, or None if they are
        unknown."""
        return sum_known([row.flops for row in self.layers])

    @property
    def dense_flops(self) -> int | None:
        """FLOPs for one sample if no weight were zero, or None if they are unknown."""
        return sum_known([row.dense_flops for row in self.layers])

    @property
    def reason(self) -> str | None:
        """Reasons why the FLOPs of the model are unknown, or None if the FLOPs are known."""
        return "; ".join(dict.fromkeys(row.reason for row in self.layers if row.reason)) or None

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report in types that JSON supports.

        Example:
            >>> json.dumps(keras_dst.report(model).to_dict())
        """
        names = ["model", "sparsity", "total_sparsity", "parameters", "nonzeros", "bytes"]
        names += ["flops", "dense_flops", "reason"]
        rows = [row.to_dict() for row in self.layers]
        groups = self.groups.to_dict() if self.groups else None
        return {**{name: getattr(self, name) for name in names}, "layers": rows, "groups": groups}

    def __str__(self):
        headings = ("weight", "shape", "weights >", "nonzero >", "sparsity >", "FLOPs >")
        rows = []
        for row in self.layers:
            shape = "x".join(str(n) for n in row.shape)
            cells = _table_cells(row.parameters, row.nonzeros, row.flops, row.dense_flops)
            rows.append((row.name, shape, *cells, "yes" if row.sparse else ""))
        prunable = sum(row.parameters for row in self.layers)
        kept = sum(row.nonzeros for row in self.layers)
        cells = _table_cells(prunable, kept, self.flops, self.dense_flops)
        rows.append(("all prunable", "", *cells, ""))
        total = _table_cells(self.parameters, self.nonzeros)[:3]
        rows.append(("all weights", "", *total, "", "", ""))
        lines = [
            f"{self.model}: {format_percent(self.sparsity)} sparse, {self.bytes:,} bytes if dense",
            as_table((*headings, "dense FLOPs >", "masked"), rows),
        ]
        if self.reason:
            lines.append(as_paragraph(f"The FLOPs are unknown: {self.reason}."))
        if self.groups:
            lines += ["", "Channels that are removed together:", str(self.groups)]
        return "\n".join(lines)

    def plot(self, ax=None):
        """Draw a bar chart of the density of every prunable weight.

        Args:
            ax: Matplotlib axes to draw on. Defaults to the axes of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.

        Example:
            >>> keras_dst.report(model).plot().figure.savefig("density.png")
        """
        return plots.density(self, ax)

    def to_html(self) -> str:
        """Return an HTML page with a summary, a table, a bar chart and maps of the masks.

        The page is self-contained: it has no scripts and loads no other files.

        Raises:
            ImportError: If matplotlib or jinja2 is not installed.

        Example:
            >>> IPython.display.HTML(keras_dst.report(model).to_html())
        """
        return html.render_page(self)

    def save_html(self, path) -> None:
        """Write the HTML page of `to_html` to a file, atomically.

        Args:
            path: Path of the file. An existing file is replaced.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If the path has the extension of a model, such as `.keras`.
            ImportError: If matplotlib or jinja2 is not installed.

        Example:
            >>> keras_dst.report(model).save_html("report.html")
        """
        path = pathlib.Path(path)
        check_writable(path, ".html")
        text = self.to_html()
        with atomic_write(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def report(model, groups: bool = False) -> SparsityReport:
    """Measure the sparsity, the parameters and the FLOPs of a model.

    The model may be dense, made sparse by `sparsify`, trained with `SparseOptimizer`, or stripped.
    An entry of a weight counts as zero if its value is 0, or if a mask prunes the entry. The
    prunable weights are the masked weights and all other kernels, including frozen kernels.

    FLOPs are counted for inference on one sample, and only for prunable weights. A multiplication
    and an addition count as 2 FLOPs. Multiplications of weights by the padding of an input are
    counted too. FLOPs are counted in a symbolic call of the model. A shared layer therefore counts
    once per call, and an RNN cell once per time step. A layer that is not called in inference
    counts as 0 FLOPs.

    FLOPs are None if they depend on a size that the input shape does not define. In custom layers,
    FLOPs are counted only for two types of weights: convolution kernels, and matrices that multiply
    the last axis of an input. FLOPs are None for other weights of custom layers. Weights whose
    names end in "token" or "embedding" count as 0 FLOPs. The attribute `reason` of the report
    states why the FLOPs are None.

    Args:
        model: A built Keras 3 model or layer. It is not changed.
        groups: Whether the report also lists the groups of channels that can only be removed
            together, see `channel_groups`. Defaults to False.

    Returns:
        A `SparsityReport`.

    Raises:
        TypeError: If `model` is not a Keras 3 model or layer.
        ValueError: If the model is not built, or if `groups` is True and the model has its own
            `call` method.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> keras_dst.report(model).dense_flops
        64
    """
    check_model(model)
    weights = weights_of(model)
    use_counts = iter(count_uses_per_weight(model, [w for w in weights if w.prunable]))
    nonzeros = 0
    rows = []
    for weight in weights:
        kept = weight.kept()
        kept_count = int(np.count_nonzero(kept))
        nonzeros += kept_count
        if weight.prunable:
            use_count, reason = next(use_counts)
            rows.append(
                WeightReport(
                    name=weight.variable.path,
                    layer=type(weight.layers[0]).__name__,
                    shape=tuple(weight.variable.shape),
                    parameters=weight.parameters,
                    nonzeros=kept_count,
                    sparse=weight.sparse,
                    use_count=use_count,
                    reason=reason,
                    density_map=density_map(kept, weight.layout),
                )
            )
    return SparsityReport(
        model=model.name,
        parameters=sum(weight.parameters for weight in weights),
        nonzeros=nonzeros,
        bytes=sum(weight.parameters * _bytes_each(weight.variable.dtype) for weight in weights),
        layers=rows,
        groups=channel_groups(model) if groups else None,
    )


def _table_cells(parameters, nonzeros, *flops) -> list[str]:
    sparsity = 1 - nonzeros / parameters if parameters else 0.0
    counts = [format_count(parameters), format_count(nonzeros)]
    return [*counts, format_percent(sparsity), *map(format_count, flops)]


def _bytes_each(dtype: str) -> int:
    # Most dtype names, such as bfloat16, contain the number of bits. The dtype name "bool" contains
    # no number of bits. A boolean takes one byte.
    bits = re.search(r"\d+", dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1
