"""Tests that arguments for whole numbers reject booleans, fractions and strings."""

import numpy as np
import pytest

from keras_dst import callbacks, layers, masks, methods, schedules
from keras_dst._utils.validation import check_integer, is_integer
from tests.backends import once

pytestmark = once

ARGUMENTS = {
    "SparseTraining(epochs)": lambda n: callbacks.SparseTraining(epochs=n),
    "SparseTraining(steps_per_epoch)": lambda n: callbacks.SparseTraining(steps_per_epoch=n),
    "BackupAndRestore(save_freq)": lambda n: callbacks.BackupAndRestore("folder", n),
    "SparsityTensorBoard(update_freq)": lambda n: callbacks.SparsityTensorBoard("folder", n),
    "Schedule(begin_step)": lambda n: schedules.Cubic(0.8, begin_step=n, end_step=9),
    "Schedule(end_step)": lambda n: schedules.Cubic(0.8, begin_step=0, end_step=n),
    "Constant(begin_step)": lambda n: schedules.Constant(0.8, begin_step=n),
    "Gate(axis)": lambda n: layers.Gate(axis=n),
    "Gate(units)": lambda n: layers.Gate(units=n),
    "SET(stop_step)": lambda n: methods.SET(0.8, stop_step=n),
    "RigL(stop_step)": lambda n: methods.RigL(0.8, stop_step=n),
    "DST(frequency)": lambda n: methods.DST(0.8, frequency=n),
    "Consensus(frequency)": lambda n: methods.Consensus(0.8, frequency=n),
    "n_of_m(n)": lambda n: masks.n_of_m(np.ones((4, 4), "float32"), n, 4),
    "n_of_m(m)": lambda n: masks.n_of_m(np.ones((4, 4), "float32"), 2, n),
} | {
    f"{method.__name__}({name})": lambda n, method=method, name=name: method(0.8, **{name: n})
    for method, names in {
        methods.Magnitude: ("frequency", "min_kept"),
        methods.FlipOut: ("frequency", "min_kept", "seed"),
        methods.OptG: ("frequency", "min_kept"),
        methods.ST3: ("frequency", "min_kept"),
        methods.DCIL: ("frequency", "min_kept"),
        methods.SET: ("frequency", "min_kept", "seed"),
        methods.RigL: ("frequency", "min_kept", "seed"),
    }.items()
    for name in names
}


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("value", [True, False, np.True_, 1.5, 2.0, "two"])
def test_other_values_than_whole_numbers_raise(argument, value):
    with pytest.raises(ValueError, match=r"whole number|number of batches"):
        ARGUMENTS[argument](value)


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_whole_number_is_accepted(argument):
    ARGUMENTS[argument](4)
    ARGUMENTS[argument](np.int64(4))


NUMBERS = {
    "Cubic(begin)": lambda n: schedules.Cubic(0.8, begin=n),
    "Cubic(end)": lambda n: schedules.Cubic(0.8, end=n),
    "Sigmoid(steepness)": lambda n: schedules.Sigmoid(0.8, steepness=n),
    "SET(drop_fraction)": lambda n: methods.SET(0.8, drop_fraction=n),
    "RigL(stop)": lambda n: methods.RigL(0.8, stop=n),
    "OptG(beta)": lambda n: methods.OptG(0.8, beta=n),
    "DST(alpha)": lambda n: methods.DST(alpha=n),
    "DST(reset_density)": lambda n: methods.DST(reset_density=n),
    "DCIL(warmup)": lambda n: methods.DCIL(0.8, warmup=n),
    "DCIL(temperature)": lambda n: methods.DCIL(0.8, temperature=n),
    "FlipOut(power)": lambda n: methods.FlipOut(0.8, power=n),
    "FlipOut(noise)": lambda n: methods.FlipOut(0.8, noise=n),
    "Consensus(lambda_act)": lambda n: methods.Consensus(0.8, lambda_act=n),
    "Gate(cost)": lambda n: layers.Gate(cost=n),
}


@pytest.mark.parametrize("argument", NUMBERS)
@pytest.mark.parametrize("value", [True, np.True_, "0.5", [0.5], float("nan"), -1.0])
def test_other_values_than_real_numbers_raise(argument, value):
    with pytest.raises(ValueError, match=r"Received"):
        NUMBERS[argument](value)


@pytest.mark.parametrize("argument", NUMBERS)
def test_a_real_number_is_accepted(argument):
    NUMBERS[argument](0.5)
    NUMBERS[argument](np.float32(0.5))


def test_the_message_states_the_bound_and_the_received_value():
    with pytest.raises(ValueError, match=r"^runs must be a whole number >= 0. Received: runs=-1$"):
        check_integer(-1, "runs", minimum=0)
    with pytest.raises(ValueError, match=r"^axis must be a whole number. Received: axis=True$"):
        check_integer(True, "axis", minimum=None)
    check_integer(-1, "axis", minimum=None)
    assert is_integer(0)
    assert not is_integer(0, minimum=1)
