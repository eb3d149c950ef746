"""Pictures of sparse models, drawn by matplotlib."""

from __future__ import annotations

from keras_dst.tables import percent


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
    ax.set_xlabel("density: fraction of weights kept (dashed: of all these)")
    ax.set_title(f"{report.model}: {percent(report.sparsity)} sparse")
    return ax


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
