"""Pictures of sparse models and of their training, drawn by matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from keras_dst._reporting.tables import percent
from keras_dst._reporting.weights import cells, matrix_shape, weights_of
from keras_dst._training.metrics import is_worst_value
from keras_dst._utils.filters import Filters, select
from keras_dst._utils.validation import check_integer
from keras_dst.surgery import check_model

__all__ = ["density", "history", "masks", "sensitivity", "trade_off"]

_MARKERS = "osD^vPX*"


def density(report, ax=None):
    """Bar chart of the density of every prunable weight.

    Args:
        report: a `keras_dst.report` of a model.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> plots.density(keras_dst.report(model)).figure.savefig("density.png")
    """
    ax = ax or new_figure(8, 1.5 + 0.3 * len(report.layers)).subplots()
    places = range(len(report.layers))
    bars = ax.barh(places, [row.density for row in report.layers])
    ax.bar_label(bars, [percent(row.density) for row in report.layers], padding=3)
    ax.axvline(1 - report.sparsity, color="grey", linestyle="--", zorder=0)
    ax.set_yticks(places, [row.name for row in report.layers])
    ax.set_ylim(max(len(report.layers), 1) - 0.5, -0.5)  # the first layer on top
    ax.set_xlim(0, 1.2)  # room for the labels
    ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.set_xlabel("density: fraction of weights kept (dashed: of all these)")
    ax.set_title(f"{report.model}: {percent(report.sparsity)} sparse")
    return ax


def masks(model, names: Filters = None, columns: int = 4):
    """Heat maps of what is kept of every prunable weight: where the zeros are.

    A weight is drawn as a matrix, inputs downwards and output units across; the window of a
    convolution counts as inputs. Where it has more than 64 of either, a cell is the density of
    several entries. Zeros are those of `report`: a weight that is 0, or whose mask is.

    Args:
        model: a built Keras 3 model, dense, sparse or stripped; it is left as it was.
        names: which weights: None for all; a path or a layer's name, a regular expression for one
            of them, or a list of these.
        columns: heat maps side by side. Defaults to 4.

    Returns:
        The figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: when there is nothing to draw, or a name fits no weight.

    Example:
        >>> keras_dst.plots.masks(model, ".*kernel").savefig("masks.png")
    """
    check_model(model)
    check_integer(columns, "columns")
    weights = [weight for weight in weights_of(model) if weight.prunable]
    paths = [(w.variable.path, *(layer.name for layer in w.layers)) for w in weights]
    chosen = select([w.variable for w in weights], names, paths, "names")
    weights = [weight for weight, is_chosen in zip(weights, chosen) if is_chosen]
    if not weights:
        raise ValueError(f"'{model.name}' has no prunable weight to draw.")
    columns = min(columns, len(weights))
    rows = math.ceil(len(weights) / columns)
    figure = new_figure(2.4 * columns + 1, 2.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in grid[len(weights) :]:
        ax.remove()
    grid = grid[: len(weights)]
    for ax, weight in zip(grid, weights):
        image = _heat_map(ax, weight)
    # Steps of a root, so that what little is kept can be seen.
    ticks = [0, 0.01, 0.1, 0.25, 0.5, 1]
    figure.colorbar(image, ax=list(grid), label="density", ticks=ticks, aspect=12 * rows)
    figure.suptitle(f"{model.name}: what is kept, inputs (down) x outputs (across)")
    return figure


def _heat_map(ax, weight):
    from matplotlib.colors import PowerNorm

    kept = weight.kept()
    matrix = cells(kept, weight.layout)
    inputs, outputs = matrix_shape(kept.shape, weight.layout)
    image = ax.imshow(
        matrix,
        cmap="Blues",
        norm=PowerNorm(0.5, 0, 1),
        aspect="auto",
        interpolation="nearest",
        extent=(0, outputs, inputs, 0),
    )
    ax.set_xticks([outputs])
    ax.set_yticks([inputs])
    ax.tick_params(labelsize=7, length=2)
    ax.set_title(f"{_end_of(weight.variable.path)}\n{percent(1 - kept.mean())} sparse", size=8)
    return image


def trade_off(results, ax=None, dense: float | None = None, metric: str = "accuracy"):
    """Curves of a metric over the fraction of weights kept, from many to few.

    Args:
        results: for every label, pairs `(sparsity, value)`. Several at one sparsity, as of several
            seeds, are drawn as their mean and their range.
        ax: the matplotlib axes to draw on; by default those of a new figure.
        dense: the value of the dense model, drawn as a line.
        metric: what the values are.

    Returns:
        The axes.

    Raises:
        ImportError: without matplotlib.
        ValueError: for no results, a sparsity outside [0, 1), or a value that is not finite.

    Example:
        >>> keras_dst.plots.trade_off({"DST": [(0.9, 0.981), (0.9, 0.979), (0.95, 0.973)]})
    """
    curves = {label: _by_sparsity(label, pairs) for label, pairs in results.items()}
    if not curves:
        raise ValueError("results must have a label with pairs (sparsity, value). Received: none")
    ax = ax or new_figure(7, 4.5).subplots()
    for (label, curve), marker in zip(curves.items(), itertools.cycle(_MARKERS)):
        kept = [1 - sparsity for sparsity in curve]
        means = np.array([np.mean(values) for values in curve.values()])
        ranges = [
            [mean - min(values) for mean, values in zip(means, curve.values())],
            [max(values) - mean for mean, values in zip(means, curve.values())],
        ]
        ax.errorbar(kept, means, np.abs(ranges), label=label, marker=marker, capsize=3)
    if dense is not None:
        ax.axhline(dense, color="grey", linestyle="--", label="dense", zorder=0)
    ax.set_xscale("log")
    ax.invert_xaxis()
    _tick_at(ax, sorted({1 - sparsity for curve in curves.values() for sparsity in curve}))
    ax.set_xlabel("weights kept")
    ax.set_ylabel(metric)
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def _by_sparsity(label, pairs: Sequence) -> dict[float, list[float]]:
    """The values at every sparsity, in ascending order of it."""
    found: dict[float, list[float]] = {}
    for sparsity, value in pairs:
        if not 0 <= sparsity < 1 or not math.isfinite(value):
            raise ValueError(
                f"results[{label!r}] must be pairs of a sparsity in [0, 1) and a finite value. "
                f"Received: {(sparsity, value)!r}"
            )
        found.setdefault(round(float(sparsity), 6), []).append(float(value))
    if not found:
        raise ValueError(f"results[{label!r}] must have a pair (sparsity, value). Received: none")
    return dict(sorted(found.items()))


def _tick_at(ax, kept: Sequence[float]) -> None:
    """Ticks where results are, but for those that are too near to the one before."""
    ticks = [kept[-1]]
    for fraction in reversed(kept):
        if fraction < 0.8 * ticks[-1]:
            ticks.append(fraction)
    ax.set_xticks(ticks, [f"{100 * fraction:.3g} %" for fraction in ticks])
    ax.set_xticks([], minor=True)


def history(history, names: Filters = None, ax=None):
    """Sparsity and metrics over the epochs of a training.

    What lies within [0, 1], such as sparsity and accuracy, is on the left axis; the rest, such as
    most losses, has the right one. Validation is dashed, in the colour of the training. What
    `SparseTraining(metric_at_target=...)` logs before the target is reached is left open.

    Args:
        history: what `fit` returned, or its dict.
        names: which logs: None for all; a name, a regular expression for whole names, or a list of
            these.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes on the left; `ax.figure.axes` has both.

    Raises:
        ImportError: without matplotlib.
        ValueError: for an empty history, or a name that fits no log.

    Example:
        >>> history = model.fit(x, y, epochs=20, callbacks=[keras_dst.callbacks.SparseTraining()])
        >>> keras_dst.plots.history(history, ["sparsity", "(val_)?accuracy"])
    """
    logs: Mapping[str, Sequence[float]] = getattr(history, "history", history)
    if not logs or not all(map(len, logs.values())):
        raise ValueError(f"history must have an epoch at least. Received: {history!r}")
    known = list(logs)
    chosen = select(known, names, [(name,) for name in known], "names")
    curves = {
        name: np.array([math.nan if is_worst_value(v) else v for v in logs[name]], "float64")
        for name, is_chosen in zip(known, chosen)
        if is_chosen
    }
    ax = ax or new_figure(7, 4.5).subplots()
    bases = list(dict.fromkeys(name.removeprefix("val_") for name in curves))
    left = [base for base in bases if all(map(_is_fraction, _of(base, curves)))]
    right = [base for base in bases if base not in left]
    sides = [(ax, left or right)]
    if left and right:
        sides.append((ax.twinx(), right))
    length = max(map(len, curves.values()))
    for side, shown in sides:
        for name, values in curves.items():
            base = name.removeprefix("val_")
            if base in shown:
                every = length // len(values)  # validation_freq
                epochs = every * np.arange(1, len(values) + 1)
                style = "-" if name == base else "--"
                side.plot(epochs, values, style, color=f"C{bases.index(base)}", label=name)
        side.set_ylabel(", ".join(shown))
    ax.set_xlabel("epoch")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    lines = [line for side, _ in sides for line in side.get_lines()]
    labels = [line.get_label() for line in lines]
    ax.legend(lines, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    return ax


def _of(base: str, curves: Mapping) -> list:
    """The curves of a metric, in training and validation."""
    return [values for name, values in curves.items() if name.removeprefix("val_") == base]


def _is_fraction(values) -> bool:
    known = values[~np.isnan(values)]
    return bool(np.all((known >= 0) & (known <= 1)))


def _end_of(path: str, length: int = 30) -> str:
    """The end of a long path, which tells more than its beginning."""
    return path if len(path) <= length else f"…{path[1 - length :]}"


def sensitivity(report, ax=None):
    """What the metric becomes as one weight alone is pruned: a line for every weight.

    Args:
        report: a `keras_dst.sensitivity` of a model.
        ax: the matplotlib axes to draw on; by default those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> plots.sensitivity(keras_dst.sensitivity(model, (x, y))).figure.savefig("curves.png")
    """
    ax = ax or new_figure(8, 4.5).subplots()
    for row in report.weights:
        ax.plot((0.0, *report.sparsities), (report.baseline, *row.values), "o-", label=row.name)
    ax.axhline(report.baseline, color="grey", linestyle="--", zorder=0)
    ax.set_xlabel("sparsity of this weight alone (dashed: none pruned)")
    ax.set_ylabel(report.metric)
    ax.set_title(f"{report.model}: sensitivity to {report.pattern} pruning")
    ax.legend(fontsize="small")
    return ax


def new_figure(width: float, height: float):
    """A new figure of pyplot, so many inches wide and high, that makes room for its labels."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install keras_dst[plot]") from error
    return plt.figure(figsize=(width, height), layout="constrained")
