"""Tests of `sparsity_at_latency`.

To save time, models are not converted and timed: latencies are computed from FLOPs.
"""

import keras
import pytest
from keras import layers

import keras_dst
from keras_dst.export import latency_target
from tests.backends import once

pytestmark = once


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(64, 3, padding="same", activation="relu", name="stem")(inputs)
    x = layers.Conv2D(128, 3, padding="same", activation="relu")(x)
    x = layers.Conv2D(64, 3, padding="same", activation="relu")(x)
    return keras.Model(inputs, layers.Dense(4)(layers.Flatten()(x)))


@pytest.fixture
def files(monkeypatch):
    """Replace the conversion and the timing of models: compute each latency from the FLOPs of the
    model."""

    def convert(model, kinds):
        return [keras_dst.report(model).dense_flops]

    def time(files, threads):
        return [0.1 + 0.9 * flops / files[0] for flops in files]

    monkeypatch.setattr(latency_target, "conversions", convert)
    monkeypatch.setattr(latency_target, "latencies", time)


def test_the_smaller_model_has_the_latency(files):
    model = network()
    weights = model.get_weights()
    found = keras_dst.sparsity_at_latency(model, 0.55, round_to=1, tolerance=0.01)
    assert found.sparsity == pytest.approx(0.5, abs=0.02)
    assert found.latency_ratio == found.measured[found.sparsity] == pytest.approx(0.55, abs=0.01)
    assert "LiteRT" in str(found)
    assert all((a == b).all() for a, b in zip(weights, model.get_weights()))


def test_a_latency_that_no_smaller_model_has(files):
    with pytest.warns(UserWarning, match=r"nearest ratio is 0\.1\d+, at sparsity .*: missed by"):
        keras_dst.sparsity_at_latency(network(), 0.05, tolerance=0.01)


def test_arguments_out_of_range():
    model = network()
    with pytest.raises(ValueError, match=r"latency_ratio must be in \(0, 1\). Received: 1.5"):
        keras_dst.sparsity_at_latency(model, 1.5)
    keras_dst.sparsify(model, keras_dst.methods.DST())
    with pytest.raises(ValueError, match="Expected a model without sparse layers"):
        keras_dst.sparsity_at_latency(model, 0.5)


def test_latency_is_not_a_quantity_of_a_method():
    with pytest.raises(ValueError, match=r"Received: 'latency'.*sparsity_at_latency"):
        keras_dst.methods.Magnitude(0.5, pattern="channel", counted_in="latency")
