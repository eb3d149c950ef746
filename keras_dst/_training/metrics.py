"""What a metric in the logs of `fit` means."""

from __future__ import annotations

from keras_dst import _keras

_WORST = 1e30  # of a metric before the target is reached, for SparseTraining(metric_at_target=...)


def worst_value(epoch: int, mode: str) -> float:
    """A value worse than any, and less so from epoch to epoch: nobody is to lose patience."""
    return _WORST / (epoch + 1) * (1 if mode == "min" else -1)


def is_worst_value(value: float) -> bool:
    """Whether a logged value only stands for "not at the target yet"."""
    return 1e-10 * _WORST < abs(value) <= _WORST


def direction_of_metric(model, name: str) -> str | None:
    """Whether the best value under this name in the logs is the `"min"` or the `"max"`.

    None where the compiled metric does not say.
    """
    if name == "loss" or name.endswith("_loss"):
        return "min"
    metrics = [m for group in model.metrics for m in getattr(group, "metrics", [group])]
    # The metric of one of several outputs has the name of the output before its own.
    found = [m for m in metrics if m.name == name]
    found = found or [m for m in metrics if name.endswith(f"_{m.name}")]
    directions = {_keras.metric_direction(metric) for metric in found}
    return "max" if directions == {"up"} else "min" if directions == {"down"} else None
