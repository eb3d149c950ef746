"""`sensitivity`: the metric of a trained model when one weight at a time is pruned."""

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
from keras_dst._reporting.tables import as_table, format_percent
from keras_dst._training.metrics import direction_of_metric
from keras_dst._utils.filters import Filters, is_prunable, select
from keras_dst._utils.states import reset_states
from keras_dst.allocation import equal_drop
from keras_dst.layers.base import SparseMixin
from keras_dst.layers.classes import layouts_of
from keras_dst.masks import KERNEL, Layout, masked
from keras_dst.methods import Magnitude
from keras_dst.schedules import check_sparsity
from keras_dst.surgery import check_model


@dataclass(frozen=True)
class WeightSensitivity:
    """Sensitivity of one weight: a row of a `SensitivityReport`.

    Attributes:
        name: Path of the weight.
        shape: Shape of the weight.
        parameters: Number of entries.
        values: Metric of the model at each sparsity of the report, when only this weight is pruned.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class SensitivityReport:
    """Result of `sensitivity`. A `SensitivityReport` prints as a table.

    Attributes:
        model: Name of the model.
        metric: Name of the measured metric.
        mode: `"min"` if a smaller metric is better, `"max"` if a larger metric is better.
        pattern: Sparsity pattern in which the weights were pruned.
        baseline: Metric of the model before pruning.
        sparsities: Sparsities at which the metric was measured, in increasing order.
        weights: A `WeightSensitivity` for every weight, in the order of the model.

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
        """Return a sparsity for every weight, to be passed as `allocation` to a pruning method.

        The sparsities are chosen so that pruning any single weight worsens the metric by the same
        amount, and so that the total sparsity equals `sparsity`. Between the measured sparsities,
        the metric is interpolated linearly.

        Args:
            sparsity: Fraction of zeros over all weights of the report. The value must not exceed
                the highest measured sparsity.

        Returns:
            A dict that maps the path of each weight to its sparsity.

        Raises:
            ValueError: If `sparsity` is above the highest measured sparsity.

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
        """Return the whole report in types that JSON supports.

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
        sparsities = [f"{format_percent(s)} >" for s in self.sparsities]
        headings = ["weight", "shape", "weights >", *sparsities]
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
            f"{self.model}: {self.metric} is {self.baseline:.4f}, and with a single weight "
            f"pruned ({self.pattern}):\n{as_table(headings, rows)}"
        )

    def plot(self, ax=None):
        """Draw one curve per weight: the metric of the model against the sparsity of the weight.

        Args:
            ax: Matplotlib axes to draw on. Defaults to the axes of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.

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
    """Measure how the metric of a trained model changes when a single weight tensor is pruned.

    Each prunable weight is pruned by magnitude to each of the sparsities, and the model is
    evaluated. All other weights keep their values. The model may be dense, sparse or stripped.
    Weights that are already zero count as pruned. Frozen weights are measured only if they have a
    mask. Before each evaluation, the states of stateful recurrent layers are set to zero. At the
    end, all weights and states are restored, also after an error or an interrupt.

    Args:
        model: A built and compiled Keras 3 model.
        data: Evaluation data: `(x, y)`, `(x, y, sample_weight)`, or a data set that
            `model.evaluate` accepts and that can be iterated more than once.
        sparsities: Fractions of zeros, in [0, 1). Defaults to (0.5, 0.7, 0.8, 0.9, 0.95).
        pattern: Sparsity pattern, which defines the weights that are pruned together, see
            `masks.Pattern`. An N:M pattern such as `"2:4"` allows only one sparsity. Defaults to
            `"unstructured"`.
        filters: Weights to measure: the path of a weight, a regular expression for whole paths, or
            a list of both. A function that receives a variable and returns a bool is also accepted.
            Defaults to None, which selects all weights.
        metric: Name of a value that `model.evaluate` returns. Defaults to the metric that was
            passed to `compile`, if there is exactly one, and to `"loss"` otherwise.
        verbose: 0 shows no progress bar, 1 and `"auto"` show the bar, and 2 shows only its last
            line. Defaults to `"auto"`.

    Returns:
        A `SensitivityReport`.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If the model is not built or not compiled, if `data` is an iterator, such as a
            generator, or if the metric is unknown. A ValueError is also raised if the pattern does
            not fit a weight, or if the filter matches no weight. A ValueError is also raised if a
            layer computes its mask from its weights, and pruning in the pattern would change this
            mask.

    Example:
        >>> model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        >>> print(keras_dst.sensitivity(model, (x_val, y_val)))

    Source: arXiv 1608.08710, section 3.2, which prunes the filters of one layer at a time.
    """
    _check(model, data)
    if not isinstance(sparsities, (list, tuple, np.ndarray)):
        raise ValueError(f"Expected a list of sparsities. Received: sparsities={sparsities!r}")
    for sparsity in sparsities:
        check_sparsity(sparsity, "sparsities")
    grid = sorted({0.0, *sparsities})[1:]
    if not grid:
        raise ValueError(f"Expected at least one sparsity above 0. Received: {sparsities!r}")
    if verbose not in ("auto", 0, 1, 2):
        raise ValueError(f"verbose must be 'auto', 0, 1 or 2. Received: verbose={verbose!r}")
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
        results = _evaluate(model, data)
        metric, mode = _metric(model, results, metric)
        baseline = results[metric]
        bar.add(1)
        for kept in counts:
            weights = pruned(
                [k.masked_value() for k in kernels], ops.convert_to_tensor(kept, "int32")
            )
            for kernel, weight, row in zip(kernels, weights, values):
                kernel.assign(weight)
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
            f"'{model.name}' is not compiled, so it has no metric to measure. "
            "Call model.compile(loss=..., metrics=['accuracy']) first."
        )
    if data is None or (isinstance(data, (dict, list, tuple)) and not data):
        raise ValueError(
            "Expected evaluation data: (x, y), (x, y, sample_weight), or a data set. "
            f"Received: {data!r}"
        )
    if hasattr(data, "__next__"):
        raise ValueError(
            "Expected data that can be iterated more than once: (x, y), or a data set. "
            f"Received: {type(data).__name__}, which is exhausted after the first pass."
        )


@dataclass
class _Kernel:
    variable: Any
    layout: Layout
    effective: Callable | None  # Function that returns the masked kernel.

    @property
    def name(self) -> str:
        return self.variable.path

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.shape)

    def masked_value(self):
        """Return the weight that the forward pass uses, with its mask applied."""
        w = ops.convert_to_tensor(self.variable)
        return w if self.effective is None else self.effective(w)

    def assign(self, weight) -> None:
        """Assign a value to the variable.

        Raise ValueError if the mask of the layer changes the assigned value in the forward pass.
        """
        self.variable.assign(weight)
        if self.effective is not None and ops.any(
            self.masked_value() != ops.convert_to_tensor(self.variable)
        ):
            raise ValueError(
                f"The layer computes the mask of '{self.name}' from the weights, and the mask "
                "changes when the weights are pruned in another pattern. Call keras_dst.strip on "
                "the model or on a copy first, or pass the pattern of the layer's method."
            )


def _kernels(model, filters) -> list[_Kernel]:
    """Return the weights that a pruning method can prune. A shared weight is listed once."""
    layouts, effective = layouts_of(model), {}
    for layer in _keras.flatten_layers(model):
        if isinstance(layer, SparseMixin):
            for layout, variable, state in layer.masked_weights():
                apply = functools.partial(layer.method.apply, state=state, layout=layout)
                effective[id(variable)] = apply
    found = [v for v in model.weights if id(v) in effective or is_prunable(v)]
    chosen = select(found, filters, [(v.path,) for v in found])
    kernels = [
        _Kernel(v, layouts.get(id(v), KERNEL), effective.get(id(v)))
        for v, wanted in zip(found, chosen)
        if wanted
    ]
    if not kernels:
        raise ValueError(
            f"'{model.name}' has no weight to prune: "
            + ("filters selects no weight." if found else "no kernel is trained or masked.")
        )
    return kernels


def _metric(model, results: Mapping[str, float], metric: str | None) -> tuple[str, str]:
    """Return the name of the metric to measure, and its mode `"min"` or `"max"`."""
    if metric is None:
        metrics = [name for name in results if name != "loss" and not name.endswith("_loss")]
        metric = metrics[0] if len(metrics) == 1 else "loss"
    if not isinstance(metric, str) or metric not in results:
        raise ValueError(
            f"metric must be a value that model.evaluate returns: {', '.join(results)}. "
            f"Received: {metric!r}"
        )
    mode = direction_of_metric(model, metric)
    if mode is None:
        raise ValueError(
            f"The metric {metric!r} does not say whether smaller or larger values are better. "
            "Pass metric='loss', or compile the model with a Keras metric."
        )
    return metric, mode


def _evaluate(model, data) -> dict[str, float]:
    named = dict(zip(("x", "y", "sample_weight"), data)) if isinstance(data, tuple) else {"x": data}
    with reset_states(model):
        return model.evaluate(**named, verbose=0, return_dict=True)
