"""The steps at which masks are updated, in one place for callbacks and for compiled steps."""

from __future__ import annotations

from typing import NamedTuple

_FEWEST_UPDATES = 20  # of the masks while sparsity grows, unless the user gives a frequency
_LEARNED_RESPONSE = 5  # steps that a learned method needs to show the effect of an update


class UpdateClock(NamedTuple):
    """The steps of a training at which masks are updated.

    A step is the number of optimizer steps that are done; masks are updated before the next one.
    There is an update at step 0, in every `period` counted from `first`, at the jumps of the
    schedule, and at `last`.

    Attributes:
        first: First step at which the target changes.
        last: Step from which on the target stays as it is.
        period: Number of steps between two periodic updates.
        jumps: Further steps at which the target jumps.
    """

    first: int
    last: int
    period: int
    jumps: tuple[int, ...] = ()

    def is_due(self, before: int, step: int) -> bool:
        """Return whether masks are updated after step `before`, and at `step` at the latest."""
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
    """Return the clock of a method, or None if the length of the training is unknown.

    If the user sets no frequency, `default_frequency` of the method applies. The masks are then
    updated at least twenty times while the target changes.

    Args:
        method: A `methods.Method` with a schedule.
        schedule: `Schedule` of the target in this training.
        total: Number of steps in the training. A schedule in steps does not need it.
        epoch: Number of steps in an epoch, for updates once an epoch.
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
