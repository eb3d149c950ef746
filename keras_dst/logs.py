"""What `SparseTraining(gate=...)` logs for a metric before the target is reached."""

from __future__ import annotations

_WORST = 1e30


def worst(epoch: int, mode: str) -> float:
    """A value worse than any, and less so from epoch to epoch: nobody is to lose patience."""
    return _WORST / (epoch + 1) * (1 if mode == "min" else -1)


def is_worst(value: float) -> bool:
    """Whether a logged value only stands for "not at the target yet"."""
    return 1e-10 * _WORST < abs(value) <= _WORST
