"""Tests of `UpdateClock`, which computes the training steps at which masks are updated."""

import pytest

from keras_dst._utils.clock import UpdateClock, update_clock
from keras_dst.methods import DCIL, DST, Consensus, FlipOut, Magnitude, OptG, RigL
from keras_dst.schedules import Constant, Cubic, Geometric
from tests.backends import once

pytestmark = once


@pytest.mark.parametrize(
    "clock",
    [
        UpdateClock(2, 14, 3),
        UpdateClock(0, 0, 4),
        UpdateClock(7, 20, 5, (9, 11)),
        UpdateClock(1, 3, 9),
    ],
)
def test_steps_lists_every_due_step(clock):
    due = [step for step in range(clock.last + 1) if clock.is_due(step - 1, step)]
    assert clock.steps() == due


def test_a_skipped_update_is_due_later():
    clock = UpdateClock(first=2, last=14, period=6, jumps=(5,))
    assert clock.steps() == [0, 2, 5, 8, 14]
    assert clock.is_due(2, 7)
    assert clock.is_due(5, 9)
    assert not clock.is_due(5, 7)


def test_updates_continue_after_the_end_of_the_schedule():
    clock = UpdateClock(first=2, last=14, period=5)
    assert [s for s in range(15, 30) if clock.is_due(s - 1, s)] == [17, 22, 27]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Magnitude(Cubic(0.8, begin_step=2, end_step=14), frequency=3), [0, 2, 5, 8, 11, 14]),
        (Magnitude(Cubic(0.8, begin_step=0, end_step=40)), list(range(0, 41, 2))),
        (Magnitude(Cubic(0.8, begin_step=0, end_step=40), frequency=100), [0, 40]),
        (Magnitude(Cubic(0.8, begin_step=0, end_step=4000)), list(range(0, 4001, 100))),
        (Magnitude(Constant(0.8, begin_step=5)), [0, 5]),
        (
            FlipOut(Geometric(0.8, rate=0.5, begin_step=0, end_step=45), frequency=50),
            [0, 15, 30, 45],
        ),
        (RigL(0.5, stop_step=12, frequency=5), [0, 5, 10, 12]),
    ],
)
def test_steps_of_schedules_in_steps(method, expected):
    assert update_clock(method, method.schedule).steps() == expected


def test_the_clock_needs_the_number_of_training_steps():
    method = Magnitude(0.8)
    assert update_clock(method, method.schedule) is None
    assert update_clock(method, method.schedule, total=40).steps()[-1] == 30


@pytest.mark.parametrize(
    ("cls", "period"),
    [
        (Magnitude, 100),
        (FlipOut, 100),
        (RigL, 100),
        (OptG, 50),
        (DCIL, 16),
        (DST, 20),
        (Consensus, 20),
    ],
)
def test_default_periods(cls, period):
    """In a long training run, masks are updated as often as in the paper of the method. In a short
    training run, masks are updated at least 20 times."""
    method = cls(0.8)
    assert update_clock(method, method.schedule, total=10_000, epoch=50).period == period
    short = update_clock(method, method.schedule, total=60, epoch=10)
    assert short.period <= max(5 if method.learned else 1, (short.last - short.first) // 20)
    exact = cls(0.8, frequency=7)
    assert update_clock(exact, exact.schedule, total=60, epoch=10).period == 7
    epoch = cls(0.8, frequency="epoch")
    assert update_clock(epoch, epoch.schedule, total=60, epoch=10).period == 10
