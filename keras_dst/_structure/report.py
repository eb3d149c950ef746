"""Function `shrink_report`, which lists removed channels and explains why dead channels are
kept."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_dst._reporting.flops import dense_size
from keras_dst._reporting.tables import as_table
from keras_dst._structure.build import build
from keras_dst._structure.coupling import groups_of, members_of
from keras_dst._structure.explain import explained_layers
from keras_dst._structure.pipeline import inference, plan_and_build, random_inputs
from keras_dst._structure.plan import Plan
from keras_dst._utils.validation import check_boolean
from keras_dst.surgery import has_sparse_layers


@dataclass(frozen=True)
class ChannelReport:
    """Number of channels (units or filters) of one layer before and after `shrink`.

    Attributes:
        layer: Name of the layer in the smaller model.
        type: Class name of the layer.
        before: Number of channels.
        after: Number of channels that are kept, or 0 if the whole layer is removed.
        reasons: Dict that maps each reason why dead channels are kept to the number of such
            channels.

    Example:
        >>> keras_dst.shrink_report(model).layers[0].reasons
    """

    layer: str
    type: str
    before: int
    after: int
    reasons: dict[str, int]


@dataclass(frozen=True)
class GroupReport:
    """Channels of coupled layers. `shrink` removes the same channels from all these layers.

    Attributes:
        layers: Names of the layers that compute the channels.
        chain: Operations that couple the layers, such as `"conv3 → add_1 ← conv1"`, or an empty
            string if a single layer computes the channels.
        before: Number of channels.
        after: Number of channels that are kept.
        reason: Reason why no channel can be removed, or an empty string if every channel can be
            removed.

    Example:
        >>> keras_dst.shrink_report(model).groups[0].chain
    """

    layers: list[str]
    chain: str
    before: int
    after: int
    reason: str


@dataclass(frozen=True)
class ShrinkReport:
    """Result of `shrink_report`, which prints as a table.

    Attributes:
        model: Name of the model.
        parameters_before: Number of parameters of the given model.
        parameters_after: Number of parameters of the smaller model.
        flops_before: FLOPs of the given model for one sample, including multiplications by zeros,
            or None if the FLOPs are unknown.
        flops_after: FLOPs of the smaller model for one sample, or None if the FLOPs are unknown.
        latency_before: Latency of the given model for one sample, in seconds on the current
            backend, or None if the latency was not measured.
        latency_after: Latency of the smaller model for one sample, in seconds, or None if the
            latency was not measured.
        layers: Layers that compute new channels, such as `Dense` and `Conv2D`.
        groups: Groups of channels that `shrink` removes from the same layers. The printed table
            shows only groups with several layers.

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
    groups: list[GroupReport] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict of plain values, which can be written as JSON."""
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
        headings = (
            "layer",
            "type",
            "channels >",
            "after >",
            "dead among these >",
            "why they are kept",
        )
        tables = [as_table(headings, rows)]
        coupled = [
            (", ".join(group.layers), group.chain, f"{group.before:,}", f"{group.after:,}")
            for group in self.groups
            if group.chain
        ]
        if coupled:
            names = ("channels of", "removed together because of", "channels >", "after >")
            tables.append(as_table(names, coupled))
        figures = [
            _ratio("parameters", self.parameters_before, self.parameters_after),
            _ratio("FLOPs", self.flops_before, self.flops_after),
        ]
        if self.latency_before is not None and self.latency_after is not None:
            times = [1e6 * seconds for seconds in (self.latency_before, self.latency_after)]
            figures.append(_ratio("latency in µs", *times))
        return "\n\n".join(tables) + f"\n{self.model}: {', '.join(figures)}"


def _ratio(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return f"{name} unknown"
    ratio = f" ({after / before:.2f}x)" if before else ""
    return f"{name} {before:,.0f} -> {after:,.0f}{ratio}"


def shrink_report(model, latency: bool = False) -> ShrinkReport:
    """Report the channels that `shrink(model)` removes, and why other dead channels are kept.

    A channel, unit or filter is dead if its weights are all zero or if no layer reads it. If a dead
    channel is kept, the reason names the next layer that needs the channel. A second table lists
    the layers whose channels are removed together, and the operations that couple the layers.

    Args:
        model: Built Sequential or Functional model, dense or sparse. It is not changed.
        latency: Whether to measure the latency of both models. The latency is the median of 50 runs
            on one sample. The two models are called alternately. JAX and TensorFlow compile both
            models, and PyTorch runs both models in eager mode. Defaults to False.

    Returns:
        A `ShrinkReport`.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If the model is not built, has its own `call` method, or cannot be run on random
            inputs.
        RuntimeError: If the outputs of the smaller model differ from the outputs of the given
            model.

    Example:
        >>> print(keras_dst.shrink_report(model, latency=True))
    """
    return shrink_and_report(model, check_boolean(latency, "latency"))[1]


def shrink_and_report(model, latency: bool = False) -> tuple[keras.Model, ShrinkReport]:
    """Return the smaller model and its report, which come from the same pruning plan."""
    plan, small = plan_and_build(model)
    before, after = dense_size(model), dense_size(small)
    times: list[float | None] = [None, None]
    if latency:
        # Compare dense models, because sparse layers also spend time on applying their masks. The
        # ratio of the two latencies then shows only the effect of the removed channels.
        dense = build(Plan(model, remove=False)) if has_sparse_layers(model) else model
        times = _latencies(dense, small)
    kept = {id(handler.op) for handler in plan.handlers}
    rows = [
        ChannelReport(
            layer=plan.names.get(id(handler.op), handler.op.name),
            type=type(handler.op).__name__,
            before=handler.y.channels,
            after=int(plan.keeps(handler.y).sum()) if id(handler.op) in kept else 0,
            reasons=dict(reasons),
        )
        for handler, reasons in explained_layers(plan)
    ]
    return small, ShrinkReport(
        model=model.name,
        parameters_before=before[0],
        parameters_after=after[0],
        flops_before=before[1],
        flops_after=after[1],
        latency_before=times[0],
        latency_after=times[1],
        layers=rows,
        groups=[
            GroupReport(
                layers=group.layers,
                chain=group.chain,
                before=len(group) * group.width,
                after=int((~plan.removed[group.ids]).sum()) * group.width,
                reason=group.reason,
            )
            for group in groups_of(plan, members_of(plan))
        ],
    )


def _latencies(*models: keras.Model, runs: int = 50, warmup: int = 5) -> list[float | None]:
    """Return the median latency of each model in seconds. In each run, the function calls every
    model once."""
    (inputs,) = random_inputs(models[0], batch=1)
    calls = [inference(model) for model in models]
    times = np.zeros((warmup + runs, len(calls)))
    for run in range(warmup + runs):
        for place, call in enumerate(calls):
            begin = time.perf_counter()
            for output in tree.flatten(call(inputs)):
                ops.convert_to_numpy(output)  # Wait for the result.
            times[run, place] = time.perf_counter() - begin
    return [float(median) for median in np.median(times[warmup:], axis=0)]
