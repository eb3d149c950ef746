"""Tests of `recalibrate`: statistics are exact means over the batches, for every kind of data."""

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst import methods

x = np.random.default_rng(0).normal(2.0, 3.0, (10, 4)).astype("float32")
y = np.arange(10) % 2
BATCHES = (x[:4], x[4:8], x[8:])
# MEAN and VARIANCE are averages over batches of 4, 4 and 2 samples. The batch sizes are the weights
# of the average.
MEAN = sum(len(b) * b.mean(0) for b in BATCHES) / 10
VARIANCE = sum(len(b) * b.var(0) for b in BATCHES) / 10


def network(**options):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dropout(0.5),
            keras.layers.BatchNormalization(momentum=0.9, **options),
            keras.layers.Dense(2, "softmax"),
        ]
    )


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return BATCHES[index], y[4 * index : 4 * index + 4]


@pytest.mark.parametrize(
    "data",
    [
        lambda: x,
        lambda: (x, y),
        lambda: (batch for batch in BATCHES),
        lambda: ((batch, None) for batch in BATCHES),
        Batches,
    ],
)
def test_statistics_are_weighted_averages_of_all_batches(data):
    model = network()
    layer = model.layers[1]
    kernel = model.layers[2].kernel.numpy()
    for _ in range(2):  # A second call of `recalibrate` gives the same result.
        assert keras_dst.recalibrate(model, data(), batch_size=4) is model
        np.testing.assert_allclose(layer.moving_mean.numpy(), MEAN, rtol=1e-5)
        np.testing.assert_allclose(layer.moving_variance.numpy(), VARIANCE, rtol=1e-5)
    assert layer.momentum == 0.9
    assert "call" not in vars(layer)
    np.testing.assert_array_equal(model.layers[2].kernel.numpy(), kernel)


def test_steps_limit_an_endless_generator():
    model = network()
    keras_dst.recalibrate(model, (x[:4] for _ in iter(int, 1)), steps=3)
    np.testing.assert_allclose(model.layers[1].moving_mean.numpy(), x[:4].mean(0), rtol=1e-5)


def test_steps_limit_an_endless_data_set():
    class Endless(Batches):
        num_batches = None

    model = network()
    keras_dst.recalibrate(model, Endless(), steps=2)
    np.testing.assert_allclose(model.layers[1].moving_mean.numpy(), x[:8].mean(0), rtol=1e-5)
    with pytest.raises(ValueError, match="num_batches=None, and steps=None"):
        keras_dst.recalibrate(model, Endless())


def test_a_shared_layer_averages_all_its_calls():
    inputs = [keras.Input((4,)), keras.Input((4,))]
    layer = keras.layers.BatchNormalization()
    model = keras.Model(inputs, keras.layers.Add()([layer(i) for i in inputs]))
    keras_dst.recalibrate(model, [x[:5], x[5:]])
    np.testing.assert_allclose(layer.moving_mean.numpy(), x.mean(0), rtol=1e-5)


def test_recalibration_uses_the_pruned_path_of_dcil():
    model = network()
    keras_dst.sparsify(model, methods.DCIL(0.5))
    keras_dst.recalibrate(model, x, batch_size=4)
    np.testing.assert_allclose(model.layers[1].moving_mean.numpy(), MEAN, rtol=1e-5)
    keras_dst.strip(model)
    np.testing.assert_allclose(model.layers[1].moving_mean.numpy(), MEAN, rtol=1e-5)


def test_an_error_restores_the_statistics():
    model = network()
    keras_dst.recalibrate(model, x, batch_size=4)

    def broken():
        yield x[:4]
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        keras_dst.recalibrate(model, broken())
    np.testing.assert_allclose(model.layers[1].moving_mean.numpy(), MEAN, rtol=1e-5)
    assert "call" not in vars(model.layers[1])


def test_invalid_arguments_raise():
    model = network()
    with pytest.raises(ValueError, match=r"Expected at least one batch of data.*new generator"):
        keras_dst.recalibrate(model, iter(()))
    with pytest.raises(ValueError, match="Fix: pass data with at least one batch"):
        keras_dst.recalibrate(model, x[:0])
    with pytest.raises(TypeError, match="Expected data as an array"):
        keras_dst.recalibrate(model, 3)
    with pytest.raises(ValueError, match="steps must be a whole number >= 1"):
        keras_dst.recalibrate(model, x, steps=0)
    model.layers[1].trainable = False
    with pytest.raises(ValueError, match="1 BatchNormalization layers, none of which"):
        keras_dst.recalibrate(model, x)
    with pytest.raises(TypeError, match="Expected a Keras 3 model"):
        keras_dst.recalibrate("model.keras", x)
