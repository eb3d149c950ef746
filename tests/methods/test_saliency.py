"""Tests of the saliency criteria against their formulas in NumPy."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_dst
from keras_dst.methods import Magnitude, saliency
from keras_dst.schedules import Constant, Cubic
from tests.backends import every

pytestmark = every(16)


def array(tensor):
    return ops.convert_to_numpy(tensor)


def test_lamp_divides_by_the_sum_of_equal_or_larger_squares():
    found = array(saliency.lamp(ops.array([[1.0, -2.0], [3.0, 0.0]])))
    np.testing.assert_allclose(found, [[1 / 14, 4 / 13], [1.0, 0.0]], rtol=1e-6)


def test_lamp_gives_every_layer_the_same_largest_score():
    small, large = (array(saliency.lamp(s * ops.array([1.0, 2.0]))) for s in (1e-3, 1e3))
    np.testing.assert_allclose(small, large, rtol=1e-5)
    assert small.max() == large.max() == 1.0


def test_lamp_of_a_pruned_layer_is_finite():
    np.testing.assert_array_equal(array(saliency.lamp(ops.zeros((2, 3)))), np.zeros((2, 3)))


def test_lamp_of_equal_weights_prefers_the_later_weight():
    found = array(saliency.lamp(ops.array([2.0, 2.0])))
    np.testing.assert_allclose(found, [0.5, 1.0])


def test_taylor_is_a_moving_average_of_squared_products():
    average = ops.zeros((2,))
    for _ in range(2):
        average = saliency.taylor(average, ops.array([1.0, 2.0]), ops.array([3.0, -1.0]))
    np.testing.assert_allclose(array(average), [0.19 * 9, 0.19 * 4], rtol=1e-6)


@every(16)
@pytest.mark.parametrize("score", ["lamp", "taylor"])
@pytest.mark.parametrize("revival", [False, True])
def test_a_fit_meets_the_target(score, revival):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    keras_dst.sparsify(model, Magnitude(0.75, score=score, revival=revival))
    x = np.random.default_rng(0).standard_normal((32, 6)).astype("float32")
    callback = keras_dst.callbacks.SparseTraining()
    model.fit(x, x[:, :2], batch_size=4, epochs=2, verbose=0, callbacks=[callback])
    zeros = sum(int((array(layer.kernel) == 0).sum()) for layer in model.layers)
    assert zeros == 48


def test_taylor_in_a_step_equals_the_formula():
    variable = keras.Variable(np.array([[1.0, 2.0, 3.0, 4.0]], "float32"))
    schedule = Cubic(0.5, begin_step=2, end_step=2)
    optimizer = keras_dst.SparseOptimizer(
        keras.optimizers.SGD(0.0), Magnitude(schedule, score="taylor", frequency=1)
    )
    # Smaller weights get larger gradients in this test.
    for _ in range(2):
        optimizer.apply([ops.array([[8.0, 3.0, 1.0, 0.1]])], [variable])
    state = optimizer.states[0]
    expected = 0.19 * np.square([[8.0, 6.0, 3.0, 0.4]])
    np.testing.assert_allclose(array(ops.convert_to_tensor(state["taylor"])), expected, rtol=1e-5)
    np.testing.assert_array_equal(array(ops.convert_to_tensor(variable)), [[1.0, 2.0, 0.0, 0.0]])


def test_taylor_with_pruning_before_the_first_step_raises():
    with pytest.raises(ValueError, match="do not exist before the first step"):
        Magnitude(Constant(0.5), score="taylor")
    Magnitude(Constant(0.5, begin_step=1), score="taylor")


def test_bn_scale_ranks_units_by_the_following_batch_norm():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Dense(6, name="plain")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, layers.Dense(2)(x))
    gamma = np.array([3, -8, 1, 5, 2, -7, 4, 6], "float32")
    model.get_layer("norm").gamma.assign(gamma)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    method = Magnitude(Constant(0.5), "uniform", "channel", score="bn_scale", round_to=1)
    keras_dst.sparsify(model, method)
    images = np.ones((4, 6, 6, 3), "float32")
    callback = keras_dst.callbacks.SparseTraining()
    size = array(model.get_layer("plain").kernel)
    model.fit(images, np.ones((4, 2)), verbose=0, callbacks=[callback])
    for name, axes in (("conv", (0, 1, 2)), ("depthwise", (0, 1, 3))):
        kept = array(model.get_layer(name).kernel).any(axes)
        np.testing.assert_array_equal(kept, np.abs(gamma) > 4)
    # Units without batch normalization are ranked by magnitude.
    kept = array(model.get_layer("plain").kernel).any(0)
    assert set(np.flatnonzero(kept)) == set(np.argsort(-np.abs(size).mean(0))[:3])
    with pytest.raises(ValueError, match="Pass pattern='channel'"):
        Magnitude(0.5, score="bn_scale")


def test_an_unknown_score_raises():
    with pytest.raises(ValueError, match="score must be one of 'magnitude', 'lamp', 'taylor'"):
        Magnitude(0.5, score="hessian")
