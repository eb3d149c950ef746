"""What Keras has no public way to ask of a metric."""

from __future__ import annotations


def mode_of(model, name: str) -> str | None:
    """Whether the best value under this name in the logs is the `"min"` or the `"max"`.

    None where the compiled metric does not say.
    """
    if name == "loss" or name.endswith("_loss"):
        return "min"
    metrics = [m for group in model.metrics for m in getattr(group, "metrics", [group])]
    # The metric of one of several outputs has the name of the output before its own.
    found = [m for m in metrics if m.name == name]
    found = found or [m for m in metrics if name.endswith(f"_{m.name}")]
    directions = {getattr(metric, "_direction", None) for metric in found}
    return "max" if directions == {"up"} else "min" if directions == {"down"} else None
