"""Directions in which metrics improve, and placeholders that are logged instead of a metric before
training reaches the target sparsity."""

from __future__ import annotations

from keras_dst import _keras

# Value that SparseTraining(metric_at_target=...) logs in the first epoch instead of the metric, if
# training has not reached the target sparsity.
_WORST = 1e30


def worst_value(epoch: int, mode: str) -> float:
    """Return a placeholder that is worse than every real value of a metric.

    The returned value improves a little from epoch to epoch, so that EarlyStopping does not stop
    training before the target is reached.
    """
    return _WORST / (epoch + 1) * (1 if mode == "min" else -1)


def is_worst_value(value: float) -> bool:
    """Return whether a logged value is a placeholder that `worst_value` returned."""
    return 1e-10 * _WORST < abs(value) <= _WORST


def direction_of_metric(model, name: str) -> str | None:
    """Return `"min"` or `"max"`, the direction in which a metric in the logs improves.

    The result is None if the metric does not say whether smaller or larger values are better.
    """
    if name == "loss" or name.endswith("_loss"):
        return "min"
    metrics = [m for group in model.metrics for m in getattr(group, "metrics", [group])]
    # If a model has several outputs, Keras adds the name of the output before the name of the
    # metric.
    found = [m for m in metrics if m.name == name]
    found = found or [m for m in metrics if name.endswith(f"_{m.name}")]
    directions = {_keras.metric_direction(metric) for metric in found}
    return "max" if directions == {"up"} else "min" if directions == {"down"} else None
