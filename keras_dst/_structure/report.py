"""What `shrink` removes, what it cannot remove, and why: `shrink_report`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_dst._reporting.sparsity import report
from keras_dst._reporting.tables import as_table
from keras_dst._structure.build import build
from keras_dst._structure.pipeline import inference, random_inputs, stripped
from keras_dst._structure.plan import Plan
from keras_dst._structure.reasons import makers


@dataclass(frozen=True)
class ChannelReport:
    """The channels, units or filters, of one layer.

    Attributes:
        layer: name of the layer in the smaller model.
        type: its type.
        before: number of its channels.
        after: number of those that stay; 0 where the whole layer goes.
        reasons: why dead ones stay, each with the number of channels.

    Example:
        >>> keras_dst.shrink_report(model).layers[0].reasons
    """

    layer: str
    type: str
    before: int
    after: int
    reasons: dict[str, int]


@dataclass(frozen=True)
class ShrinkReport:
    """What `shrink_report` found: prints as a table.

    Attributes:
        model: name of the model.
        parameters_before: number of all weights.
        parameters_after: that of the smaller model.
        flops_before: FLOPs for one sample, zeros included; None where they are not known.
        flops_after: those of the smaller model.
        latency_before: seconds for one sample on the current backend; None if not asked for.
        latency_after: those of the smaller model.
        layers: the layers that make channels.

    Example:
        >>> print(keras_dst.shrink_report(model))
    """

    model: str
    parameters_before: int
    parameters_after: int
    flops_before: int | None
    flops_after: int | None
    latency_before: float | None
    latency_after: float | None
    layers: list[ChannelReport] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            (
                row.layer,
                row.type,
                f"{row.before:,}",
                f"{row.after:,}",
                f"{sum(row.reasons.values()):,}",
                "; ".join(f"{count}: {reason}" for reason, count in row.reasons.items()),
            )
            for row in self.layers
        ]
        headings = ("layer", "type", "channels >", "after >", "dead among these >", "why they stay")
        figures = [
            _ratio("parameters", self.parameters_before, self.parameters_after),
            _ratio("FLOPs", self.flops_before, self.flops_after),
        ]
        if self.latency_before is not None and self.latency_after is not None:
            times = [1e6 * seconds for seconds in (self.latency_before, self.latency_after)]
            figures.append(_ratio("latency in µs", *times))
        return "\n".join((as_table(headings, rows), f"{self.model}: {', '.join(figures)}"))


def _ratio(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return f"{name} not known"
    ratio = f" ({after / before:.2f}x)" if before else ""
    return f"{name} {before:,.0f} -> {after:,.0f}{ratio}"


def shrink_report(model, latency: bool = False) -> ShrinkReport:
    """What `shrink(model)` removes, and why dead channels stay that it cannot remove.

    Dead is a channel, unit or filter whose weights are all zero, or that nothing reads. The reason
    why one stays is the first layer on its way to the output that needs it.

    Args:
        model: what `shrink` takes: a built Sequential or Functional model, dense or sparse; it is
            left as it was.
        latency: whether to time both models: the median of 50 runs of each in turn on one sample,
            compiled as the current backend does (on torch: eagerly).

    Returns:
        A `ShrinkReport`.

    Raises:
        TypeError: for something other than a Keras 3 model.
        ValueError: for an unbuilt model, or one whose `call` is its own.

    Example:
        >>> print(keras_dst.shrink_report(model, latency=True))
    """
    source = stripped(model)
    plan = Plan(source)
    small = build(plan)
    before, after = report(source), report(small)
    times = _latencies(source, small) if latency else (None, None)
    live = {id(rule.op): rule for rule in plan.rules}
    return ShrinkReport(
        model=model.name,
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        flops_before=before.dense_flops,
        flops_after=after.dense_flops,
        latency_before=times[0],
        latency_after=times[1],
        layers=[
            ChannelReport(
                layer=plan.names.get(id(rule.op), rule.op.name),
                type=type(rule.op).__name__,
                before=rule.y.channels,
                after=int(plan.keeps(rule.y).sum()) if id(rule.op) in live else 0,
                reasons=dict(reasons),
            )
            for rule, reasons in makers(plan)
        ],
    )


def _latencies(*models: keras.Model, runs: int = 50, warmup: int = 5) -> list[float]:
    """Median seconds of one call of each model, in turn."""
    inputs = random_inputs(models[0], batch=1)
    calls = [inference(model) for model in models]
    times = np.zeros((warmup + runs, len(calls)))
    for run in range(warmup + runs):
        for place, call in enumerate(calls):
            begin = time.perf_counter()
            for output in tree.flatten(call(inputs)):
                ops.convert_to_numpy(output)  # waits for it
            times[run, place] = time.perf_counter() - begin
    return [float(median) for median in np.median(times[warmup:], axis=0)]
