"""Clock of mask updates, which callbacks and compiled steps share."""

from __future__ import annotations

from typing import NamedTuple

_FEWEST_UPDATES = 20  # Smallest number of updates without a user's frequency.
_LEARNED_RESPONSE = 5  # Steps until a learned method shows the effect of an update.


class UpdateClock(NamedTuple):
    """Steps of a training run at which masks are updated.

    A step is the number of finished optimizer steps. Masks are updated before the next step. Masks
    are updated at step 0, at every multiple of `period` counted from `first`, at the jumps of the
    schedule, and at `last`.

    Attributes:
        first: First step at which the target changes.
        last: First step after which the target does not change.
        period: Number of steps between two periodic updates.
        jumps: Further steps at which the target jumps.
    """

    first: int
    last: int
    period: int
    jumps: tuple[int, ...] = ()

    def is_due(self, before: int, step: int) -> bool:
        """Return whether an update is due after step `before` and not after `step`."""
        periods = [(s - self.first) // self.period for s in (before, step)]
        return periods[0] != periods[1] or any(
            before < special <= step for special in (0, *self.jumps, self.last)
        )

    def steps(self) -> list[int]:
        """Return all steps up to `last` at which masks are updated.

        Example:
            >>> UpdateClock(first=2, last=14, period=5, jumps=(4,)).steps()
            [0, 2, 4, 7, 12, 14]
        """
        periodic = range(self.first % self.period, self.last, self.period)
        return sorted({0, *periodic, *self.jumps, self.last})


def update_clock(method, schedule, total=None, epoch=None) -> UpdateClock | None:
    """Return the clock of a method, or None if the length of training is unknown.

    If the user sets no frequency, `default_frequency` of the method applies. The masks are then
    updated at least twenty times while the target changes.

    Args:
        method: A `methods.Method` with a schedule.
        schedule: `Schedule` of the target in this training run.
        total: Number of steps in the training run. The number is not needed if the schedule is
            given in steps.
        epoch: Number of steps in an epoch, for a method that updates masks once per epoch.
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
