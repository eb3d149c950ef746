"""The sparse layers by hand, and what DST does to them in training."""

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst import layers
from keras_dst.callbacks import SparseTraining
from keras_dst.methods import DST, Magnitude
from tests import models

# layer: (arguments, input shape, shape of the thresholds per unit)
LAYERS = {
    "SparseDense": ({"units": 6}, (5,), (6,)),
    "SparseConv1D": ({"filters": 6, "kernel_size": 3}, (8, 4), (6,)),
    "SparseConv2D": ({"filters": 6, "kernel_size": 3, "groups": 2}, (8, 8, 4), (6,)),
    "SparseConv3D": ({"filters": 6, "kernel_size": 2}, (4, 4, 4, 3), (6,)),
    "SparseDepthwiseConv2D": ({"kernel_size": 3, "depth_multiplier": 2}, (8, 8, 3), (3, 2)),
}


@pytest.fixture(params=LAYERS)
def case(request):
    arguments, shape, thresholds = LAYERS[request.param]
    cls = getattr(layers, request.param)
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype("float32")
    return cls, arguments, x, thresholds


def test_every_layer_equals_its_stock_layer_and_masks_by_its_thresholds(case):
    cls, arguments, x, thresholds = case
    keras.utils.set_random_seed(0)
    sparse = cls(**arguments, sparsity=DST())
    y = keras.ops.convert_to_numpy(sparse(x))
    stock = cls.stock(**arguments)
    stock.build(x.shape)
    weights = [v.numpy() for v in sparse.variables if "threshold" not in v.path]
    stock.set_weights(weights)
    np.testing.assert_array_equal(y, keras.ops.convert_to_numpy(stock(x)))

    threshold = sparse.sparse_state["kernel"]["threshold"]
    assert threshold.shape == thresholds
    values = np.random.default_rng(1).uniform(0, 0.2, thresholds).astype("float32")
    threshold.assign(values)
    masked = weights[0] * (np.abs(weights[0]) > values)
    assert 0 < np.mean(masked == 0) < 1
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(sparse.kernel), masked)
    stock.set_weights([masked, *weights[1:]])
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(sparse(x)), keras.ops.convert_to_numpy(stock(x))
    )


def test_config_round_trip(case):
    cls, arguments, *_ = case
    layer = cls(**arguments, sparsity=DST(granularity="layer"))
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(copy) is cls
    assert copy.get_config() == layer.get_config()


@pytest.mark.parametrize(("granularity", "shape"), [("layer", ()), ("weight", (5, 6))])
def test_granularity(granularity, shape):
    layer = layers.SparseDense(6, sparsity=DST(granularity=granularity))
    layer.build((None, 5))
    assert layer.sparse_state["kernel"]["threshold"].shape == shape


def test_a_layer_needs_a_method_for_the_forward_pass():
    with pytest.raises(TypeError, match="SparseOptimizer"):
        layers.SparseDense(6, sparsity=Magnitude(0.5))
    with pytest.raises(TypeError, match="sparsity"):
        layers.SparseDense(6)
    with pytest.raises(AttributeError):
        _ = layers.SparseDense(6, sparsity=DST()).kernel


def test_the_guard_resets_the_thresholds_of_a_layer_that_dies_in_that_very_step():
    model = models.residual()
    keras_dst.sparsify(model, DST(alpha=0.0))
    victim = model.layers[1].sparse_state["kernel"]["threshold"]
    other = model.layers[-1].sparse_state["kernel"]["threshold"]
    victim.assign(np.full(victim.shape, 10.0))
    other.assign(np.full(other.shape, 0.01))
    x, y = models.data()
    models.compiled(model).train_on_batch(x, y)
    np.testing.assert_array_equal(victim.numpy(), np.zeros(victim.shape))
    assert np.all(other.numpy() != 0)


@pytest.mark.filterwarnings("ignore:.*training had reached sparsity:UserWarning")
@pytest.mark.parametrize("method", [DST(alpha=1.0), DST(target_sparsity=0.999)], ids=str)
def test_extreme_pressure_neither_kills_a_layer_nor_gives_nan(method):
    keras.utils.set_random_seed(0)
    model = models.sequential()
    keras_dst.sparsify(model, method)
    models.compiled(model, keras.optimizers.SGD(0.05, momentum=0.9))
    x, y = models.data()
    history = model.fit(x, y, batch_size=16, epochs=5, verbose=0, callbacks=[SparseTraining()])
    assert np.isfinite(history.history["loss"]).all()
    for variable in model.variables:
        assert np.isfinite(variable.numpy().astype("float64")).all(), variable.path
    for row in keras_dst.report(keras_dst.strip(model)).layers:
        assert row.nonzeros > 0, row.name
