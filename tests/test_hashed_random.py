"""Tests of hashed random numbers: values against NumPy, and their distribution."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_dst._backend import random
from keras_dst._backend.jit import jit
from tests.test_trajectories import hashed


def array(tensor):
    return ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("numbers", [(0,), (1, 2, 3), (-5, 2**31 - 1), (7, 123456, 0, 99)])
def test_hash_equals_numpy(numbers):
    assert array(random.bits(*numbers)).view("uint32") == hashed(*numbers)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 2)])
def test_uniform_numbers_are_hashes_of_the_position(shape):
    found = array(random.uniform(shape, 3, 41))
    expected = hashed(hashed(3, 41), np.arange(np.prod(shape))) & 0xFFFFFF
    np.testing.assert_array_equal(found, (expected / 2**24).astype("float32").reshape(shape))


def test_uniform_numbers_are_uniform_and_independent():
    one, other = (array(random.uniform((1 << 16,), 0, step)) for step in (0, 1))
    counts = np.histogram(one, 16, (0, 1))[0]
    assert abs(counts / 4096 - 1).max() < 5 / 64  # Allow five standard deviations.
    for pair in ((one, other), (one[1:], one[:-1])):
        assert abs(np.corrcoef(*pair)[0, 1]) < 5 / 256


def test_normal_numbers_are_normal_and_differ_by_step_and_tensor():
    draw = jit(lambda step: random.normal([(300, 200), (), (200, 300)], 0, step))
    drawn = [[array(x) for x in draw(ops.convert_to_tensor(step, "int32"))] for step in (0, 1)]
    assert [x.shape for x in drawn[0]] == [(300, 200), (), (200, 300)]
    flat = [x.ravel() for step in drawn for x in step if x.size > 1]
    for x in flat:
        assert abs(x.mean()) < 5 / np.sqrt(x.size)
        assert abs(x.std() - 1) < 5 / np.sqrt(2 * x.size)
        assert abs((abs(x) < 1).mean() - 0.6827) < 0.01
    for i, x in enumerate(flat):
        for other in flat[:i]:
            assert abs(np.corrcoef(x, other)[0, 1]) < 5 / np.sqrt(x.size)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="only TensorFlow turns arguments into constants at compile time",
)
def test_xla_compiles_one_program_for_all_steps():
    import tensorflow as tf

    draw = tf.function(lambda step: random.normal([(3, 5)], 0, step), jit_compile=True)
    first, second = (
        draw.experimental_get_compiler_ir(tf.constant(step))(stage="hlo") for step in (1, 2)
    )
    assert first == second


def test_normal_numbers_of_a_tensor_larger_than_the_table():
    (found,) = random.normal([(3, 1 << 19)], 0, 5)
    rows = array(found)
    assert abs(rows.std() - 1) < 0.01
    assert abs(np.corrcoef(rows) - np.eye(3)).max() < 0.01


@pytest.mark.parametrize("shape", [(2000, 700), (3, 3, 700, 200), (1 << 20,)])
def test_normal_numbers_of_large_tensors_are_independent(shape):
    (found,) = random.normal([shape], 0, 5)
    assert found.shape == shape
    halves = array(found).ravel()[: 1 << 20].reshape(2, -1)
    assert abs(halves.std() - 1) < 0.01
    assert abs(np.corrcoef(halves) - np.eye(2)).max() < 0.01


def test_noise_of_a_large_tensor_has_mean_zero_per_weight():
    draw = jit(lambda step: random.normal([(1 << 8, 1 << 13)], 0, step))
    steps, places = 100, np.random.default_rng(0).integers(0, 1 << 21, 2000)
    total = sum(
        array(draw(ops.convert_to_tensor(step, "int32"))[0]).ravel()[places]
        for step in range(steps)
    )
    # If positive and negative values are equally likely, a sum over steps grows like the square
    # root of the number of steps.
    assert abs(total / np.sqrt(steps)).mean() < 1.1 * np.sqrt(2 / np.pi)
