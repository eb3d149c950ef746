"""Find the fraction of FLOPs to prune for a given latency."""

from __future__ import annotations

import platform
import warnings
from dataclasses import dataclass

import keras

from keras_dst._structure import shrink
from keras_dst._structure.graph import check_graph
from keras_dst._training.drivers import drivers_of
from keras_dst._utils.validation import check_integer, is_number
from keras_dst.export.convert import conversions
from keras_dst.export.measure import latencies
from keras_dst.methods import Magnitude
from keras_dst.optimizers import SparseOptimizer
from keras_dst.schedules import Constant
from keras_dst.surgery import has_sparse_layers

_MAX_FILES = 8  # Maximum number of pruned copies that are measured.


@dataclass(frozen=True)
class LatencySearch:
    """Result of `sparsity_at_latency`.

    Attributes:
        sparsity: Fraction of the FLOPs to prune.
        latency_ratio: Measured latency ratio at `sparsity`, relative to the dense model.
        measured: Dict that maps sparsities to measured latency ratios. Each sparsity is the
            fraction of FLOPs that was pruned.
        source: Sentence that says how the latencies were measured: runtime, CPU, threads.
    """

    sparsity: float
    latency_ratio: float
    measured: dict[float, float]
    source: str

    def __str__(self) -> str:
        return (
            f"Without {self.sparsity:.1%} of its FLOPs, the model takes {self.latency_ratio:.2f} "
            f"times the latency of the dense model. {self.source}"
        )


def sparsity_at_latency(
    model: keras.Model,
    latency_ratio: float,
    *,
    allocation: str | dict[str, float] = "uniform",
    round_to: int = 8,
    min_kept: int | None = None,
    threads: int = 1,
    tolerance: float = 0.03,
) -> LatencySearch:
    """Return the fraction of FLOPs to prune so that the model reaches a given latency ratio.

    The latency of a layer depends on its number of channels, not on the values of its weights. The
    search therefore also works for a model that is not trained yet. The search copies the model,
    prunes channels of the copies by magnitude, and exports the pruned copies. The latencies of the
    pruned copies and of the dense model are measured in LiteRT on the current CPU. The returned
    sparsity is a fraction of FLOPs. Training with the returned sparsity measures no latencies. The
    trained masks therefore do not depend on the speed of the training machine.

    Args:
        model: Built Sequential or Functional model without sparse layers. The model is not changed.
        latency_ratio: Latency of the smaller model divided by the latency of the dense model, a
            number in (0, 1).
        allocation: Value of the argument `allocation` of the pruning method. See
            `methods.Magnitude`.
        round_to: Value of the argument `round_to` of the pruning method. See `methods.Magnitude`.
        min_kept: Value of the argument `min_kept` of the pruning method. See `methods.Magnitude`.
        threads: Number of interpreter threads. Defaults to 1.
        tolerance: Accepted deviation from `latency_ratio`. Defaults to 0.03.

    Returns:
        A `LatencySearch`. Pass the attribute `sparsity` of the `LatencySearch` to a pruning method,
        together with `counted_in="flops"`.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If an argument is out of range, if the model is a subclassed model without a
            graph, or if it has sparse layers.

    Warns:
        UserWarning: If no measured model reaches `latency_ratio` within `tolerance`. The message
            states the measured latency ratio that is nearest to `latency_ratio`.

    Example:
        >>> found = keras_dst.sparsity_at_latency(model, 0.5)
        >>> method = Magnitude(found.sparsity, "uniform", "channel", counted_in="flops")
    """
    check_graph(model)
    threads = check_integer(threads, "threads")
    if not (is_number(latency_ratio) and 0 < latency_ratio < 1):
        raise ValueError(f"latency_ratio must be in (0, 1). Received: {latency_ratio!r}")
    if not (is_number(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be greater than 0. Received: {tolerance!r}")
    if has_sparse_layers(model):
        raise ValueError(
            f"Expected a model without sparse layers. Received: '{model.name}' with sparse layers. "
            "Call sparsity_at_latency before keras_dst.sparsify."
        )

    def method(sparsity: float) -> Magnitude:
        return Magnitude(
            Constant(sparsity, begin_step=0),
            allocation,
            "channel",
            min_kept=min_kept,
            counted_in="flops",
            round_to=round_to,
        )

    method(0.5)  # Check the arguments before the conversion, which takes seconds.
    (dense,) = conversions(model, ["float32"])
    measured: dict[float, float] = {}
    # `low` and `high` are pairs (sparsity, latency ratio). The next sparsity lies between the
    # sparsity of `low` and the sparsity of `high`.
    low, high = (0.0, 1.0), (1.0, 0.0)
    while len(measured) < _MAX_FILES:
        share = (low[1] - latency_ratio) / (low[1] - high[1])
        sparsity = round(low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0]), 3)
        if sparsity in measured:
            break
        (small,) = conversions(_without_channels(model, method(sparsity)), ["float32"])
        before, after = latencies([dense, small], threads=threads)
        ratio = measured[sparsity] = after / before
        if abs(ratio - latency_ratio) <= tolerance:
            break
        if ratio > latency_ratio:
            low = sparsity, ratio
        else:
            high = sparsity, ratio
        if high[0] - low[0] < 0.01:
            break
    best = min(measured, key=lambda sparsity: abs(measured[sparsity] - latency_ratio))
    missed = abs(measured[best] - latency_ratio)
    if missed > tolerance:
        warnings.warn(
            f"sparsity_at_latency: no pruned copy of '{model.name}' has the latency "
            f"ratio {latency_ratio:g}. The nearest ratio is {measured[best]:.3f}, at sparsity "
            f"{best:g}: missed by {missed:.3f}. Lower round_to or min_kept, or change the target.",
            stacklevel=2,
        )
    cpu = platform.processor() or platform.machine()
    source = f"Measured in LiteRT on this CPU ({cpu}), float32, {threads} thread(s), batch 1."
    return LatencySearch(best, measured[best], measured, source)


def _without_channels(model: keras.Model, method: Magnitude) -> keras.Model:
    """Prune the channels of a copy of a model in one shot, and return the smaller copy."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    optimizer = SparseOptimizer("sgd", method)
    copy.compile(optimizer)
    (driver,) = drivers_of(copy)
    optimizer.apply_initial_masks()
    driver.mask_followers()  # Set the moving means of pruned channels to 0.
    return shrink(copy)
