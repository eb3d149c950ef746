"""Tests that schedules agree with their formulas, computed in plain Python."""

import itertools
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dst import methods
from keras_dst.schedules import (
    Constant,
    Cubic,
    Geometric,
    Schedule,
    Sigmoid,
    as_schedule,
    check_sparsity,
)


def cubic(p, final, initial):
    return final + (initial - final) * (1 - p) ** 3


def geometric(p, final, initial):
    return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** p


def stretched(p, steepness):
    """Return the value at `p` of a logistic curve that is scaled to go from 0 to 1."""
    low, value, high = (1 / (1 + math.exp(-steepness * (q - 0.5))) for q in (0, p, 1))
    return (value - low) / (high - low)


def sigmoid(p, final, initial):
    return initial + (final - initial) * stretched(p, 20)


RAMPS = [(Cubic, cubic), (Geometric, geometric), (Sigmoid, sigmoid)]
every_ramp = pytest.mark.parametrize(("ramp", "formula"), RAMPS)


@every_ramp
@pytest.mark.parametrize(
    ("final", "initial", "begin", "end"),
    [
        (0.9, 0.0, 0.0, 1.0),
        (0.9, 0.0, 0.25, 0.75),
        (0.98, 0.5, 0.1, 0.6),
        (0.5, 0.5, 0.0, 1.0),
        (0.0, 0.0, 0.0, 1.0),
    ],
)
def test_schedules_equal_their_formulas(ramp, formula, final, initial, begin, end):
    schedule = ramp(final, initial, begin, end)
    fractions = [0, 0.05, 0.1, 0.2, 0.25, 0.5, 0.6, 0.75, 0.9, 1]
    expected = [
        formula(min(max((f - begin) / (end - begin), 0), 1), final, initial) for f in fractions
    ]
    values = [schedule(f) for f in fractions]
    assert values == pytest.approx(expected, abs=1e-12)
    assert all(type(value) is float for value in values)
    np.testing.assert_allclose(schedule(np.array(fractions)), values, rtol=1e-12)


def test_examples_of_the_documentation():
    assert Constant(0.9)(0.3) == 0.9
    assert Cubic(0.8, end=1.0)(0.5) == pytest.approx(0.7)
    assert Geometric(0.75, end=1.0)(0.5) == pytest.approx(0.5)
    assert Sigmoid(0.9)(0.5) == pytest.approx(0.45)


def test_geometric_removes_an_equal_share_of_the_remaining_weights():
    schedule = Geometric(0.9375, end=1.0)
    assert [schedule(i / 4) for i in range(5)] == pytest.approx([0, 0.5, 0.75, 0.875, 0.9375])


@pytest.mark.parametrize("steepness", [1.0, 20.0, 160.0])
def test_steepness(steepness):
    schedule = Sigmoid(0.8, steepness=steepness)
    expected = [0.8 * stretched(p, steepness) for p in [0, 0.3, 0.5, 0.9, 1]]
    assert [schedule(p) for p in [0, 0.3, 0.5, 0.9, 1]] == pytest.approx(expected)


@given(
    ramp=st.sampled_from([ramp for ramp, _ in RAMPS]),
    sparsities=st.lists(st.floats(0, 0.999), min_size=2, max_size=2).map(sorted),
    span=st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted),
    fractions=st.lists(st.floats(0, 1), min_size=2, max_size=8).map(sorted),
)
@settings(deadline=None, derandomize=True)
def test_sparsity_never_decreases_and_stays_within_bounds(ramp, sparsities, span, fractions):
    initial, final = sparsities
    values = [ramp(final, initial, *span)(f) for f in fractions]
    for earlier, later in itertools.pairwise(values):
        assert later >= earlier - 1e-12
    assert initial - 1e-12 <= values[0] <= values[-1] + 1e-12 <= final + 2e-12


@pytest.mark.parametrize("ramp", [Cubic, Geometric])
@pytest.mark.parametrize("final", [0.5, 0.9, 0.95, 0.999])
def test_final_sparsity_is_reached_exactly(ramp, final):
    schedule = ramp(final, end=0.6)
    assert schedule(0.6) == schedule(1.0) == schedule.at(60, 100) == schedule.at(100, 100) == final
    assert schedule.at(59, 100) < final
    assert ramp(final, begin_step=10, end_step=60).at(60) == final
    assert ramp(final, 0.3)(1.0) == pytest.approx(final, abs=1e-15)


def test_sigmoid_reaches_its_final_sparsity():
    assert Sigmoid(0.9, steepness=4.0)(1.0) == pytest.approx(0.9)


@pytest.mark.parametrize("final", [0.0, 0.5, 0.9])
def test_constant(final):
    schedule = Constant(final, begin=0.25)
    assert [schedule(f) for f in [0, 0.2499, 0.25, 0.7, 1]] == [0, 0, final, final, final]
    np.testing.assert_array_equal(schedule(np.array([0.2, 0.3])), [0, final])
    assert Constant(final)(0) == Constant(final).at(0, 100) == final


# -- steps -----------------------------------------------------------------------------------------


@every_ramp
def test_schedule_with_fractions_of_the_training(ramp, formula):
    # The training run has 41 steps. The schedule starts at step 10 (41 / 4, rounded down) and ends
    # at step 30.
    schedule = ramp(0.9, 0.1, begin=0.25, end=0.75)
    assert schedule.span(41) == (10, 30)
    for step in range(30):
        progress = max(step - 10, 0) / 20
        assert schedule.at(step, 41) == pytest.approx(formula(progress, 0.9, 0.1))
    assert {schedule.at(step, 41) for step in range(30, 45)} == {schedule(1.0)}


@every_ramp
@pytest.mark.parametrize("total", [None, 5, 1000])
def test_schedules_in_steps_need_no_training_length(ramp, formula, total):
    schedule = ramp(0.9, 0.1, begin_step=4, end_step=12)
    assert schedule.in_steps
    assert schedule.span(total) == (4, 12)
    for step in range(12):
        progress = max(step - 4, 0) / 8
        assert schedule.at(step, total) == pytest.approx(formula(progress, 0.9, 0.1))
    assert schedule.at(12, total) == schedule.at(99, total) == schedule(1.0)


def test_schedules_in_fractions_need_a_training_length():
    schedule = Cubic(0.9)
    assert not schedule.in_steps
    with pytest.raises(
        ValueError, match=r"Cubic\(sparsity=0.9\) is given in fractions.*begin_step"
    ):
        schedule.at(3)


@pytest.mark.parametrize(
    ("schedule", "total"),
    [
        pytest.param(Constant(0.9, begin=0.5), 10, id="Constant"),
        pytest.param(Constant(0.9, begin_step=5), None, id="Constant in steps"),
        pytest.param(Cubic(0.9, begin=0.5, end=0.5), 10, id="Cubic"),
        pytest.param(Cubic(0.9, begin_step=5, end_step=5), None, id="Cubic in steps"),
        pytest.param(Geometric(0.9, begin=0.5, end=0.55), 10, id="a ramp of less than a step"),
    ],
)
@pytest.mark.parametrize(("step", "expected"), [(4, 0), (5, 0.9), (6, 0.9)])
def test_jump_at_a_step(schedule, total, step, expected):
    assert schedule.at(step, total) == expected


@pytest.mark.parametrize(("rate", "expected"), [(None, 0), (0.5, 4), (0.9, 1)])
def test_the_number_of_jumps(rate, expected):
    schedule = Geometric(0.9, rate=rate)
    assert schedule.jump_count == len(schedule.jumps(100)) == expected


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [-0.1, 1, 1.0, 90, math.nan, math.inf, "0.9", None, True, False, [0.9]]
)
def test_invalid_sparsities_raise(value):
    with pytest.raises(ValueError, match=r"target is the fraction of zeros.*Received: target="):
        check_sparsity(value, "target")
    with pytest.raises(
        ValueError, match=r"^sparsity is the fraction of zeros, a Python number in \[0, 1"
    ):
        Cubic(value)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999, np.float64(0.5)])
def test_valid_sparsities_are_accepted(value):
    check_sparsity(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial_sparsity": 1.0}, "initial_sparsity is the fraction of zeros"),
        ({"initial_sparsity": 0.95}, "must not exceed sparsity=0.9. Received: .*=0.95"),
        ({"begin": 0.8, "end": 0.2}, "Received: begin=0.8, end=0.2"),
        ({"begin": -0.1}, "fractions of training"),
        ({"end": 1.5}, "fractions of training"),
        ({"begin": 100, "end": 200}, "Pass begin_step and end_step for numbers of steps"),
        ({"begin_step": 10}, "together. Received: begin_step=10, end_step=None"),
        ({"end_step": 10}, "together. Received: begin_step=None, end_step=10"),
        ({"begin_step": 10, "end_step": 5}, "Received: begin_step=10, end_step=5"),
        ({"begin_step": -1, "end_step": 5}, "0 <= begin_step"),
        ({"begin_step": 1.5, "end_step": 5}, "whole numbers"),
        ({"begin": 0.0, "begin_step": 1, "end_step": 5}, "Expected either begin and end"),
        ({"end": 0.5, "begin_step": 1, "end_step": 5}, r"Received: begin=None, end=0\.5, begin_s"),
        ({"end": 0.5, "end_step": 5}, "Pass only fractions or only steps"),
    ],
)
@pytest.mark.parametrize("ramp", [ramp for ramp, _ in RAMPS])
def test_invalid_arguments_raise(ramp, arguments, message):
    with pytest.raises(ValueError, match=message):
        ramp(0.9, **arguments)


def test_constant_with_begin_and_begin_step_raises():
    with pytest.raises(ValueError, match="Expected either begin and end"):
        Constant(0.9, begin=0.0, begin_step=5)


@pytest.mark.parametrize("ramp", [ramp for ramp, _ in RAMPS])
def test_an_old_config_with_fractions_and_steps_loads(ramp):
    schedule = ramp(0.9, begin_step=10, end_step=90)
    config = {**schedule.get_config(), "begin": 0.0, "end": 0.75}
    assert ramp.from_config(config) == schedule


@pytest.mark.parametrize("value", [0, 0.5, Cubic(0.5), Constant(0.5)])
def test_methods_accept_a_number_or_a_schedule(value):
    schedule = as_schedule(value, Cubic)
    assert schedule == (value if isinstance(value, Schedule) else Cubic(value))


@pytest.mark.parametrize("value", [1.0, True, "0.9", Cubic, np.float32(0.9)])
@pytest.mark.parametrize(
    "method", [methods.Magnitude, methods.DST, methods.DCIL, methods.OptG, methods.FlipOut]
)
def test_methods_with_other_sparsity_values_raise(method, value):
    with pytest.raises(ValueError, match=r"a Python number in \[0, 1.*or a Schedule.*Received"):
        method(value)


def test_methods_with_constant_sparsity_accept_no_schedule():
    with pytest.raises(ValueError, match=r"SET keeps it constant and takes no Schedule.*Cubic"):
        methods.SET(Cubic(0.9))


def test_a_custom_schedule():
    @keras.saving.register_keras_serializable("tests")
    class Linear(Schedule):
        def curve(self, progress):
            return progress

    assert Linear(0.8, end=1.0)(0.25) == pytest.approx(0.2)
    assert Linear(0.8, 0.4, begin_step=0, end_step=4).at(1) == pytest.approx(0.5)
    with pytest.raises(NotImplementedError):
        Schedule(0.8)(0.5)
