"""`UpdateClock`: the training steps at which the masks of a method are updated."""

from __future__ import annotations

from typing import NamedTuple

_FEWEST_UPDATES = 20  # Minimum number of mask updates if the user gives no frequency.
# Minimum number of steps between two mask updates of a method that learns its sparsity. A learned
# sparsity needs several steps to respond to a mask update.
_LEARNED_RESPONSE = 5


class UpdateClock(NamedTuple):
    """The steps of a training run at which masks are updated.

    A mask update at step n runs after n optimizer steps. Masks are updated at step 0, at `last` and
    at each step in `jumps`. Before `last`, masks are also updated at each step whose distance from
    `first` is a multiple of `period`.

    Attributes:
        first: First step at which the target sparsity changes.
        last: Step after which the target sparsity does not change any more.
        period: Number of steps from one periodic update to the next.
        jumps: Steps at which the target sparsity changes abruptly. Defaults to no steps.
    """

    first: int
    last: int
    period: int
    jumps: tuple[int, ...] = ()

    def is_due(self, before: int, step: int) -> bool:
        """Return whether a mask update is due at one of the steps from `before + 1` to `step`."""
        periods = [(s - self.first) // self.period for s in (before, step)]
        return periods[0] != periods[1] or any(
            before < special <= step for special in (0, *self.jumps, self.last)
        )

    def steps(self) -> list[int]:
        """Return all training steps up to `last` at which masks are updated.

        Example:
            >>> UpdateClock(first=2, last=14, period=5, jumps=(4,)).steps()
            [0, 2, 4, 7, 12, 14]
        """
        periodic = range(self.first % self.period, self.last, self.period)
        return sorted({0, *periodic, *self.jumps, self.last})


def update_clock(method, schedule, total=None, epoch=None) -> UpdateClock | None:
    """Return the steps at which a method updates its masks. Return None if the steps depend on the
    length of the training run, and the length is unknown.

    If the user gives no frequency, the method's `default_frequency` is used. In a short training
    run, masks are updated more often: at least twenty times while the target sparsity changes.

    Args:
        method: The pruning method, a `methods.Method`.
        schedule: `Schedule` of the target sparsity in the training run.
        total: Number of steps in the training run, or None if the number is unknown. Defaults to
            None.
        epoch: Number of steps in an epoch, for methods that update masks once per epoch. Defaults
            to None.
    """
    period = method.default_frequency if method.frequency is None else method.frequency
    if period == "epoch":
        period = epoch or total
    if period is None or (total is None and not schedule.in_steps):
        return None
    spans = [method.span(total), schedule.span(total)]
    first, last = min(begin for begin, _ in spans), max(end for _, end in spans)
    if method.frequency is None and first < last:
        shortest = _LEARNED_RESPONSE if method.learned else 1
        period = min(period, max(shortest, (last - first) // _FEWEST_UPDATES))
    return UpdateClock(first, last, period, tuple(schedule.jumps(total)))
