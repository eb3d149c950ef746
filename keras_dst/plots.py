"""Plots of sparse models and of training runs, drawn with matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from keras_dst._reporting.tables import format_percent
from keras_dst._reporting.weights import density_map, matrix_shape, weights_of
from keras_dst._training.metrics import is_worst_value
from keras_dst._utils.filters import Filters, select
from keras_dst._utils.validation import check_integer, is_number
from keras_dst.surgery import check_model

__all__ = ["density", "history", "masks", "sensitivity", "trade_off"]

_MARKERS = "osD^vPX*"


def density(report, ax=None):
    """Draw a bar chart with the density of each prunable weight.

    Args:
        report: Report that `keras_dst.report` returned for a model.
        ax: Matplotlib axes to draw on. Defaults to the axes of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `report` is not a result of `keras_dst.report`.

    Example:
        >>> plots.density(keras_dst.report(model)).figure.savefig("density.png")
    """
    _check_report(report, "sparsity", "keras_dst.report")
    ax = _axes(ax, 8, 1.5 + 0.3 * len(report.layers))
    positions = range(len(report.layers))
    bars = ax.barh(positions, [row.density for row in report.layers])
    ax.bar_label(bars, [format_percent(row.density) for row in report.layers], padding=3)
    ax.axvline(1 - report.sparsity, color="gray", linestyle="--", zorder=0)
    ax.set_yticks(positions, [row.name for row in report.layers])
    ax.set_ylim(max(len(report.layers), 1) - 0.5, -0.5)  # Draw the first weight at the top.
    ax.set_xlim(0, 1.2)  # Leave space for the bar labels.
    ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.set_xlabel("density, the fraction of nonzeros (dashed: all these weights together)")
    ax.set_title(f"{report.model}: {format_percent(report.sparsity)} sparse")
    return ax


def masks(model, names: Filters = None, columns: int = 4):
    """Draw a heat map for each prunable weight, to show which entries are kept.

    The rows of a heat map are inputs, and the columns are outputs. For a convolution, the heat map
    has one row for each combination of a window position and an input channel. If a weight has more
    than 64 inputs or outputs, each cell shows the density of several entries. An entry counts as
    zero if it is 0 or pruned by a mask, as in `report`.

    Args:
        model: A built Keras 3 model: dense, sparse or stripped. The model is not changed.
        names: Weights to draw. A string is the path of a weight, the name of a layer, or a regular
            expression that matches whole paths or names. A list may contain several such strings.
            Defaults to None, which draws all weights.
        columns: Maximum number of heat maps in a row of the figure. Defaults to 4.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the model has no prunable weight, or an entry of `names` matches no weight.

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
        raise ValueError(
            "Expected a model with prunable weights, such as kernels of Dense or Conv layers. "
            f"Received: '{model.name}', which has no prunable weights."
        )
    columns = min(columns, len(weights))
    rows = math.ceil(len(weights) / columns)
    figure = new_figure(2.4 * columns + 1, 2.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in grid[len(weights) :]:
        ax.remove()
    grid = grid[: len(weights)]
    for ax, weight in zip(grid, weights):
        image = _heat_map(ax, weight)
    # Colors are proportional to the square root of the density, so that low densities are visible.
    ticks = [0, 0.01, 0.1, 0.25, 0.5, 1]
    figure.colorbar(image, ax=list(grid), label="density", ticks=ticks, aspect=12 * rows)
    figure.suptitle(f"{model.name}: density of inputs (rows) x outputs (columns)")
    return figure


def _heat_map(ax, weight):
    from matplotlib.colors import PowerNorm

    kept = weight.kept()
    matrix = density_map(kept, weight.layout)
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
    ax.set_title(
        f"{_end_of(weight.variable.path)}\n{format_percent(1 - kept.mean())} sparse", size=8
    )
    return image


def trade_off(results, ax=None, dense: float | None = None, metric: str = "accuracy"):
    """Plot a metric against the density, which decreases from left to right.

    Every key of `results` labels one curve.

    Args:
        results: Dict that maps each label to a list of pairs `(sparsity, value)`. A list may
            contain several pairs with the same sparsity, for example one pair per seed. For these
            pairs, the plot shows the mean and the range of the values.
        ax: Matplotlib axes to draw on. Defaults to the axes of a new figure.
        dense: Value of the dense baseline, drawn as a horizontal line. Defaults to None, which
            draws no line.
        metric: Name of the metric, which labels the vertical axis. Defaults to `"accuracy"`.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `results` is empty, a sparsity is outside [0, 1), or a value is not finite.

    Example:
        >>> keras_dst.plots.trade_off({"DST": [(0.9, 0.981), (0.9, 0.979), (0.95, 0.973)]})
    """
    if not isinstance(results, Mapping) or not results:
        raise ValueError(
            f"results must map labels to pairs (sparsity, value). Received: {results!r}"
        )
    curves = {label: _by_sparsity(label, pairs) for label, pairs in results.items()}
    if dense is not None and not is_number(dense):
        raise ValueError(f"dense must be a finite number. Received: dense={dense!r}")
    ax = _axes(ax, 7, 4.5)
    for (label, curve), marker in zip(curves.items(), itertools.cycle(_MARKERS)):
        kept = [1 - sparsity for sparsity in curve]
        means = np.array([np.mean(values) for values in curve.values()])
        ranges = [
            [mean - min(values) for mean, values in zip(means, curve.values())],
            [max(values) - mean for mean, values in zip(means, curve.values())],
        ]
        ax.errorbar(kept, means, np.abs(ranges), label=label, marker=marker, capsize=3)
    if dense is not None:
        ax.axhline(dense, color="gray", linestyle="--", label="dense", zorder=0)
    ax.set_xscale("log")
    ax.invert_xaxis()
    _tick_at(ax, sorted({1 - sparsity for curve in curves.values() for sparsity in curve}))
    ax.set_xlabel("weights kept")
    ax.set_ylabel(metric)
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def _by_sparsity(label, pairs: Sequence) -> dict[float, list[float]]:
    """Return a dict that maps each sparsity to its values, in order of increasing sparsity."""
    found: dict[float, list[float]] = {}
    for pair in pairs:
        sparsity, value = pair if np.shape(pair) == (2,) else (math.nan, math.nan)
        if not (is_number(sparsity) and 0 <= sparsity < 1 and is_number(value)):
            raise ValueError(
                f"results[{label!r}] must be pairs of a sparsity in [0, 1) and a finite value. "
                f"Received: {pair!r}"
            )
        found.setdefault(round(float(sparsity), 6), []).append(float(value))
    if not found:
        raise ValueError(
            f"results[{label!r}] must have at least one pair (sparsity, value). Received: no pairs"
        )
    return dict(sorted(found.items()))


def _tick_at(ax, kept: Sequence[float]) -> None:
    """Set ticks at the densities in `kept`, but omit ticks that would be too close together."""
    ticks = [kept[-1]]
    for fraction in reversed(kept):
        if fraction < 0.8 * ticks[-1]:
            ticks.append(fraction)
    ax.set_xticks(ticks, [f"{100 * fraction:.3g} %" for fraction in ticks])
    ax.set_xticks([], minor=True)


def history(
    history, names: Filters = None, ax=None, validation_freq: int | Sequence[int] | None = None
):
    """Plot the sparsity and the metrics of a training run against the epoch.

    Metrics whose values are all in [0, 1], such as sparsity and accuracy, use the left y-axis. All
    other metrics, such as most losses, use the right y-axis. The curve of a validation metric is
    dashed and has the color of the training metric. The curves of
    `SparseTraining(metric_at_target=...)` begin at the epoch in which the target sparsity is
    reached.

    Args:
        history: The `History` object that `fit` returned, or its dict `history.history`.
        names: Metrics to plot: a name, a regular expression that matches whole names, or a list of
            names and expressions. Defaults to None, which plots all metrics.
        ax: Matplotlib axes to draw on. Defaults to the axes of a new figure.
        validation_freq: Value of the argument `validation_freq` of `fit`. Defaults to None, which
            computes `validation_freq` from the number of validation values.

    Returns:
        The matplotlib axes with the left y-axis. The list `ax.figure.axes` also contains the axes
        with the right y-axis.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the history has no epoch, an entry of `names` matches no metric, or the
            number of validation values does not determine `validation_freq`.

    Example:
        >>> history = model.fit(x, y, epochs=20, callbacks=[keras_dst.callbacks.SparseTraining()])
        >>> keras_dst.plots.history(history, ["sparsity", "(val_)?accuracy"])
    """
    metrics: Mapping[str, Sequence[float]] = getattr(history, "history", history)
    if not isinstance(metrics, Mapping) or not metrics or not all(map(len, metrics.values())):
        raise ValueError(f"history must have at least one epoch. Received: {history!r}")
    known = list(metrics)
    chosen = select(known, names, [(name,) for name in known], "names")
    curves = {
        name: np.array([math.nan if is_worst_value(v) else v for v in metrics[name]], "float64")
        for name, is_chosen in zip(known, chosen)
        if is_chosen
    }
    length = max(map(len, metrics.values()))
    epochs = [epoch + 1 for epoch in getattr(history, "epoch", [])]
    epochs = epochs if len(epochs) == length else list(range(1, length + 1))
    positions = {
        name: _measured_epochs(name, len(values), epochs, validation_freq)
        for name, values in curves.items()
    }
    ax = _axes(ax, 7, 4.5)
    bases = list(dict.fromkeys(name.removeprefix("val_") for name in curves))
    left = [base for base in bases if all(map(_is_fraction, _curves_of(base, curves)))]
    right = [base for base in bases if base not in left]
    sides = [(ax, left or right)]
    if left and right:
        sides.append((ax.twinx(), right))
    for side, shown in sides:
        for name, values in curves.items():
            base = name.removeprefix("val_")
            if base in shown:
                style, color = "-" if name == base else "--", f"C{bases.index(base)}"
                side.plot(positions[name], values, style, color=color, label=name)
        side.set_ylabel(", ".join(shown))
    ax.set_xlabel("epoch")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    lines = [line for side, _ in sides for line in side.get_lines()]
    labels = [line.get_label() for line in lines]
    ax.legend(lines, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    return ax


def _measured_epochs(name: str, count: int, epochs: list[int], validation_freq) -> list[int]:
    """Return the epochs in which a metric with `count` values was measured."""
    if count == len(epochs):
        return epochs
    if validation_freq is None:
        intervals = range(2, epochs[-1] + 1)
        candidates = [[epoch for epoch in epochs if epoch % n == 0] for n in intervals]
    elif isinstance(validation_freq, Sequence):
        candidates = [[epoch for epoch in epochs if epoch in validation_freq]]
    else:
        interval = check_integer(validation_freq, "validation_freq")
        candidates = [[epoch for epoch in epochs if epoch % interval == 0]]
    found = {tuple(candidate) for candidate in candidates if len(candidate) == count}
    if len(found) != 1:
        raise ValueError(
            f"'{name}' has {count} values in {len(epochs)} epochs. Pass the validation_freq of "
            f"`fit` to plots.history. Received: validation_freq={validation_freq!r}"
        )
    return list(found.pop())


def _curves_of(base: str, curves: Mapping) -> list:
    """Return the curves of a metric: the training curve and, if it exists, the validation curve."""
    return [values for name, values in curves.items() if name.removeprefix("val_") == base]


def _is_fraction(values) -> bool:
    """Return whether all values except NaN are in [0, 1]."""
    known = values[~np.isnan(values)]
    return bool(np.all((known >= 0) & (known <= 1)))


def _end_of(path: str, length: int = 30) -> str:
    """Shorten a long path to its end, because the end identifies the weight better."""
    return path if len(path) <= length else f"…{path[1 - length :]}"


def sensitivity(report, ax=None):
    """Draw one curve per weight tensor: the metric of the model against the sparsity of the weight
    tensor.

    Args:
        report: Report that `keras_dst.sensitivity` returned.
        ax: Matplotlib axes to draw on. Defaults to the axes of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If `report` is not a result of `keras_dst.sensitivity`.

    Example:
        >>> plots.sensitivity(keras_dst.sensitivity(model, (x, y))).figure.savefig("curves.png")
    """
    _check_report(report, "sparsities", "keras_dst.sensitivity")
    ax = _axes(ax, 8, 4.5)
    for row in report.weights:
        ax.plot((0.0, *report.sparsities), (report.baseline, *row.values), "o-", label=row.name)
    ax.axhline(report.baseline, color="gray", linestyle="--", zorder=0)
    ax.set_xlabel("sparsity of this weight; all other weights stay (dashed: no weight pruned)")
    ax.set_ylabel(report.metric)
    ax.set_title(f"{report.model}: sensitivity to {report.pattern} pruning")
    ax.legend(fontsize="small")
    return ax


def _check_report(report, attribute: str, source: str) -> None:
    """Raise TypeError if `report` is not a result of the function `source`."""
    if not hasattr(report, attribute):
        raise TypeError(
            f"Expected the result of {source}(...). "
            f"Received: {report!r} of type {type(report).__name__}"
        )


def _axes(ax, width: float, height: float):
    """Return the given axes, or the axes of a new figure if `ax` is None."""
    if ax is None:
        return new_figure(width, height).subplots()
    if not hasattr(ax, "figure"):
        raise TypeError(f"Expected ax to be matplotlib axes or None. Received: {ax!r}")
    return ax


def new_figure(width: float, height: float):
    """Return a new pyplot figure. `width` and `height` are in inches."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install keras_dst[plot]") from error
    return plt.figure(figsize=(width, height), layout="constrained")
