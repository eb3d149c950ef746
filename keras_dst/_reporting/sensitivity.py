"""What every weight of a trained model loses by being pruned alone: `sensitivity`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dst import _keras, plots
from keras_dst._backend.jit import jit
from keras_dst._reporting.tables import as_table, percent
from keras_dst._training.metrics import direction_of_metric
from keras_dst._utils.filters import Filters, is_prunable, select
from keras_dst.allocation import equal_drop
from keras_dst.layers import SparseMixin, layouts_of
from keras_dst.masks import KERNEL, Layout, masked
from keras_dst.methods import Magnitude
from keras_dst.surgery import check_model


@dataclass(frozen=True)
class WeightSensitivity:
    """One weight of a model, pruned alone.

    Attributes:
        name: path of the weight.
        shape: its shape.
        parameters: number of its entries.
        values: of the metric, at each of the report's sparsities.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class SensitivityReport:
    """What `sensitivity` measured: prints as a table.

    Attributes:
        model: name of the model.
        metric: what was measured.
        mode: whether the best of it is the `"min"` or the `"max"`.
        pattern: the shape in which weights were pruned.
        baseline: its value with the model as it is.
        sparsities: fractions of zeros that were measured, increasing.
        weights: the weights, in the model's order.

    Example:
        >>> print(keras_dst.sensitivity(model, (x, y)))
    """

    model: str
    metric: str
    mode: str
    pattern: str
    baseline: float
    sparsities: tuple[float, ...]
    weights: list[WeightSensitivity] = field(repr=False)

    def allocation(self, sparsity: float) -> dict[str, float]:
        """A sparsity for every weight, as the `allocation` of a method that ranks weights.

        Weights that lose less get sparser: each as far as one drop of the metric, common to all,
        lets it, read off its curve between the points measured. The common drop is the one at
        which all these weights together have the sparsity asked for.

        Args:
            sparsity: fraction of zeros over all these weights, at most the highest measured.

        Returns:
            A dict from paths of weights to sparsities.

        Raises:
            ValueError: for a sparsity beyond those measured.

        Example:
            >>> shares = keras_dst.sensitivity(model, (x, y)).allocation(0.9)
            >>> method = keras_dst.methods.Magnitude(0.9, allocation=shares)
        """
        values = np.array([(self.baseline, *row.values) for row in self.weights])
        drops = self.baseline - values if self.mode == "max" else values - self.baseline
        sizes = [row.parameters for row in self.weights]
        shares = equal_drop((0.0, *self.sparsities), drops, sizes, sparsity)
        return {row.name: float(share) for row, share in zip(self.weights, shares)}

    def to_dict(self) -> dict[str, Any]:
        """All figures, in types that JSON knows.

        Example:
            >>> json.dumps(keras_dst.sensitivity(model, (x, y)).to_dict())
        """
        figures = dataclasses.asdict(self)
        rows = [
            {**row, "shape": list(row["shape"]), "values": list(row["values"])}
            for row in figures["weights"]
        ]
        return {**figures, "sparsities": list(self.sparsities), "weights": rows}

    def __str__(self):
        headings = ["weight", "shape", "weights >", *(f"{percent(s)} >" for s in self.sparsities)]
        rows = [
            [
                row.name,
                " x ".join(map(str, row.shape)),
                f"{row.parameters:,}",
                *(f"{value:.4f}" for value in row.values),
            ]
            for row in self.weights
        ]
        return (
            f"{self.model}: {self.metric} is {self.baseline:.4f}; with one weight alone pruned "
            f"({self.pattern}) to a sparsity of\n{as_table(headings, rows)}"
        )

    def plot(self, ax=None):
        """What the metric becomes as one weight alone is pruned: a line for every weight.

        Args:
            ax: the matplotlib axes to draw on; by default those of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: without matplotlib.

        Example:
            >>> keras_dst.sensitivity(model, (x, y)).plot().figure.savefig("curves.png")
        """
        return plots.sensitivity(self, ax)


def sensitivity(
    model,
    data,
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    *,
    pattern: str = "unstructured",
    filters: Filters = None,
    metric: str | None = None,
    verbose: str | int = "auto",
) -> SensitivityReport:
    """Measure how much a trained model loses when one of its weights is pruned.

    Every weight that a method can prune, alone and the others as they are, is pruned by magnitude
    to each of the sparsities, and the model is evaluated once. It may be dense, sparse already or
    stripped; zeros that it has count as pruned. Afterwards its weights are what they were, also
    when an evaluation was interrupted. Frozen weights are measured where they have a mask.

    Args:
        model: a built and compiled Keras 3 model.
        data: what to evaluate on: `(x, y)` or `(x, y, sample_weight)`, or a data set that
            `model.evaluate` takes and that can be gone through again and again.
        sparsities: fractions of zeros, in [0, 1).
        pattern: `"unstructured"` (default), blocks such as `"1x4"`, `"channel"`, or N:M such as
            `"2:4"`, which goes with its own sparsity alone.
        filters: which weights: None for all; a weight's path or a regular expression for whole
            paths, a list of them, or `callable(variable) -> bool`.
        metric: one of the values that `model.evaluate` gives. By default the metric that the model
            was compiled with where that is just one, else `"loss"`.
        verbose: 0 for no progress bar, 2 for its last line alone, else `"auto"` or 1.

    Returns:
        A `SensitivityReport`.

    Raises:
        TypeError: for a model that is not a Keras 3 model.
        ValueError: for a model that is not built or not compiled, data that can be gone through
            only once, an unknown metric, a pattern or filter that does not fit, or a mask that
            depends on the weights under it in another pattern.

    Example:
        >>> model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        >>> print(keras_dst.sensitivity(model, (x_val, y_val)))

    Source: arXiv 1608.08710, section 3.2, which does so for filters.
    """
    _check(model, data)
    grid = sorted({0.0, *sparsities})[1:]
    if not grid:
        raise ValueError(f"Expected sparsities above 0 to measure. Received: {sparsities!r}")
    kernels = _kernels(model, filters)
    layouts = [kernel.layout for kernel in kernels]
    shapes, names = [k.shape for k in kernels], [k.name for k in kernels]
    methods = [Magnitude(s, allocation="uniform", pattern=pattern) for s in grid]
    counts = [m.kept_counts(shapes, layouts, s, names) for m, s in zip(methods, grid)]
    before = [(v, np.array(ops.convert_to_numpy(v))) for v in model.variables]
    original = {id(variable): value for variable, value in before}

    @jit
    def pruned(weights, kept):
        scores = methods[0].scores(weights, [{} for _ in weights])
        found = methods[0].rank(scores, layouts, kept)
        return [masked(w, mask) for mask, w in zip(found, weights)]

    bar = keras.utils.Progbar(
        1 + len(grid) * len(kernels), verbose=1 if verbose == "auto" else verbose, unit_name="pass"
    )
    values: list[list[float]] = [[] for _ in kernels]
    try:
        logs = _evaluate(model, data)
        metric, mode = _metric(model, logs, metric)
        baseline = logs[metric]
        bar.add(1)
        for kept in counts:
            weights = pruned([k.seen() for k in kernels], ops.convert_to_tensor(kept, "int32"))
            for kernel, weight, row in zip(kernels, weights, values):
                kernel.take(weight)
                row.append(_evaluate(model, data)[metric])
                kernel.variable.assign(original[id(kernel.variable)])
                bar.add(1)
    except BaseException:
        _keras.discard_jax_state(model)
        for variable, value in before:
            variable.assign(value)
        raise
    rows = [
        WeightSensitivity(kernel.name, kernel.shape, math.prod(kernel.shape), tuple(row))
        for kernel, row in zip(kernels, values)
    ]
    return SensitivityReport(model.name, metric, mode, pattern, baseline, tuple(grid), rows)


def _check(model, data) -> None:
    check_model(model)
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Expected a Keras 3 model. Received: the layer {model.name!r} "
            f"({type(model).__name__}). Fix: keras.Sequential([keras.Input(shape), layer])."
        )
    if not model.compiled:
        raise ValueError(
            f"'{model.name}' is not compiled, so that there is nothing to measure. "
            "Call model.compile(loss=..., metrics=['accuracy']) first."
        )
    if hasattr(data, "__next__"):
        raise ValueError(
            "Expected data that can be gone through again and again: (x, y), or a data set. "
            f"Received: {type(data).__name__}, which is used up after the first pass."
        )


@dataclass
class _Kernel:
    variable: Any
    layout: Layout
    mask: Callable | None  # of a value of the variable, where a layer masks it

    @property
    def name(self) -> str:
        return self.variable.path

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.shape)

    def seen(self):
        """The weight as the forward pass sees it."""
        w = ops.convert_to_tensor(self.variable)
        return w if self.mask is None else masked(w, self.mask(w))

    def take(self, weight) -> None:
        """Let the forward pass see this weight."""
        self.variable.assign(weight)
        if self.mask is not None and ops.any(self.seen() != ops.convert_to_tensor(self.variable)):
            raise ValueError(
                f"The mask of '{self.name}' follows from the weights under it, and changes as they "
                "are pruned in another pattern. Call keras_dst.strip on the model, or on a copy of "
                "it, first; or ask for the pattern of its method."
            )


def _kernels(model, filters) -> list[_Kernel]:
    """The weights that a method can prune, a shared one once."""
    layouts, masks = layouts_of(model), {}
    for layer in _keras.flatten_layers(model):
        if isinstance(layer, SparseMixin):
            for layout, variable, state in layer.masked_weights():
                mask = functools.partial(layer.method.mask, state=state, layout=layout)
                masks[id(variable)] = mask
    found = [v for v in model.weights if id(v) in masks or is_prunable(v)]
    chosen = select(found, filters, [(v.path,) for v in found])
    kernels = [
        _Kernel(v, layouts.get(id(v), KERNEL), masks.get(id(v)))
        for v, wanted in zip(found, chosen)
        if wanted
    ]
    if not kernels:
        raise ValueError(
            f"'{model.name}' has no weight to prune"
            + (": filters selects none." if found else ": no kernel that is trained or masked.")
        )
    return kernels


def _metric(model, logs: Mapping[str, float], metric: str | None) -> tuple[str, str]:
    """What to measure, and whether its best value is the `"min"` or the `"max"`."""
    if metric is None:
        metrics = [name for name in logs if name != "loss" and not name.endswith("_loss")]
        metric = metrics[0] if len(metrics) == 1 else "loss"
    if metric not in logs:
        raise ValueError(
            f"metric={metric!r} is none of what model.evaluate gives: {', '.join(logs)}"
        )
    mode = direction_of_metric(model, metric)
    if mode is None:
        raise ValueError(
            f"Whether the best {metric!r} is the smallest or the largest is not known. "
            "Ask for metric='loss', or compile with a metric of Keras's."
        )
    return metric, mode


def _evaluate(model, data) -> dict[str, float]:
    named = dict(zip(("x", "y", "sample_weight"), data)) if isinstance(data, tuple) else {"x": data}
    return model.evaluate(**named, verbose=0, return_dict=True)
