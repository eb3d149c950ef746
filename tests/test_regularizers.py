"""Tests of the penalties in the papers: values and gradients against NumPy."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_dst.regularizers import Budget, Polarization, ThresholdPenalty
from tests.gradients import gradients

# Columns: threshold t, penalty exp(-t), and gradient of the penalty. Below the threshold -1, the
# penalty continues along the tangent of exp(-t) at -1.
THRESHOLDS = [
    (0.0, 1.0, -1.0),
    (0.5, math.exp(-0.5), -math.exp(-0.5)),
    (3.0, math.exp(-3), -math.exp(-3)),
    (50.0, math.exp(-50), -math.exp(-50)),
    (-0.5, math.exp(0.5), -math.exp(0.5)),
    (-0.999, math.exp(0.999), -math.exp(0.999)),
    (-1.001, 1.001 * math.e, -math.e),
    (-2.0, 2 * math.e, -math.e),
    (-1000.0, 1000 * math.e, -math.e),
]


def penalty_and_gradient(values, alpha, dtype="float32"):
    t = ops.convert_to_tensor(np.array(values, "float32"), dtype=dtype)
    penalty = ThresholdPenalty(alpha)
    value = penalty(t)
    # Keras adds penalties to the loss of the model, so a penalty must have the dtype of the loss,
    # `floatx`.
    assert keras.backend.standardize_dtype(value.dtype) == keras.config.floatx()
    (gradient,) = gradients(penalty, [t], ops.ones(()))
    return float(ops.cast(value, "float32")), gradient


@pytest.mark.parametrize(("t", "value", "slope"), THRESHOLDS)
def test_threshold_penalty(t, value, slope):
    found, gradient = penalty_and_gradient(t, 0.1)
    assert found == pytest.approx(0.1 * value, rel=1e-5)
    assert gradient == pytest.approx(0.1 * slope, rel=1e-5)


def test_threshold_penalty_gradient_at_minus_one():
    value, gradient = penalty_and_gradient(-1.0, 1.0)
    assert value == pytest.approx(math.e, rel=1e-6)
    assert gradient == pytest.approx(-math.e, rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 0.01)])
def test_threshold_penalty_is_a_sum(dtype, tolerance):
    t, values, slopes = (np.array(column) for column in zip(*THRESHOLDS[:-1]))
    found, gradient = penalty_and_gradient(t, 0.5, dtype)
    assert found == pytest.approx(0.5 * values.sum(), rel=tolerance)
    np.testing.assert_allclose(gradient, 0.5 * slopes, rtol=tolerance, atol=1e-6)


def test_alpha_can_be_a_variable():
    alpha = keras.Variable(0.25, trainable=False)
    penalty = ThresholdPenalty(alpha)
    assert float(penalty(ops.zeros((2, 2)))) == 1.0
    alpha.assign(-0.5)
    assert float(penalty(ops.zeros((2, 2)))) == -2.0
    assert penalty.get_config() == {"alpha": -0.5}


def test_threshold_penalty_as_a_regularizer_of_a_variable():
    layer = keras.layers.Layer()
    layer.add_weight(shape=(3,), initializer="zeros", regularizer=ThresholdPenalty(0.1))
    assert ops.convert_to_numpy(layer.losses[0]) == pytest.approx(0.3)


def test_config_of_the_threshold_penalty():
    penalty = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(ThresholdPenalty(0.125))
    )
    assert type(penalty) is ThresholdPenalty
    assert penalty.get_config() == {"alpha": 0.125}
    assert ThresholdPenalty().get_config() == {"alpha": 5e-4}


# -- penalties on gates ----------------------------------------------------------------------------

GATES = np.array([1.0, 0.0, 0.5, 0.25])
COSTS = np.array([1.0, 2.0, 3.0, 4.0])


def value_and_gradient(penalty, gates):
    x = ops.convert_to_tensor(gates, "float32")
    (gradient,) = gradients(penalty, [x], ops.ones(()))
    return float(penalty(x)), gradient


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_polarization(shape):
    value, gradient = value_and_gradient(Polarization(0.1), GATES.reshape(shape))
    assert value == pytest.approx(0.1 * (0.25 + 0.1875) / 4)
    np.testing.assert_allclose(gradient, 0.1 * (1 - 2 * GATES.reshape(shape)) / 4, rtol=1e-6)


@pytest.mark.parametrize("costs", [None, COSTS.tolist()])
def test_budget(costs):
    c = np.ones(4) if costs is None else COSTS
    spent = (c * GATES).sum() / c.sum()
    value, gradient = value_and_gradient(Budget(0.3, 5.0, costs), GATES)
    assert value == pytest.approx(5 * (spent - 0.3) ** 2, rel=1e-5)
    np.testing.assert_allclose(gradient, 10 * (spent - 0.3) * c / c.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "penalty", [Polarization(), Polarization(0.5), Budget(0.5), Budget(1, 2.0, [1.0, 3.0])]
)
def test_config_of_the_penalties_on_gates(penalty):
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(penalty))
    assert type(copy) is type(penalty)
    assert copy.get_config() == penalty.get_config()


def test_defaults_of_the_penalties_on_gates():
    assert Polarization().get_config() == {"weight": 1.0}
    assert Budget(0.5).get_config() == {"target": 0.5, "weight": 1.0, "costs": None}


def test_a_budget_with_costs_of_zero_raises():
    with pytest.raises(ValueError, match="sum above 0"):
        Budget(0.5, costs=[0, 0])


@pytest.mark.parametrize("target", [0, -0.5, 1.5, math.nan])
def test_a_budget_out_of_range_raises(target):
    with pytest.raises(ValueError, match=r"target is the cost .* \(0, 1\]. Received"):
        Budget(target)
