"""Tests that sparse layers compute the expected values, and that training with DST prunes them."""

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst import layers
from keras_dst.callbacks import SparseTraining
from keras_dst.methods import DST, Magnitude
from tests import models
from tests.backends import every

# LAYERS maps the name of a layer class to arguments, the shape of an input, and shapes of
# thresholds. For each weight, a dict contains the shape of the thresholds, with one threshold per
# unit.
LAYERS = {
    "SparseDense": ({"units": 6}, (5,), {"kernel": (6,)}),
    "SparseEinsumDense": (
        {"equation": "abc,cde->abde", "output_shape": (None, 2, 3), "bias_axes": "de"},
        (5, 4),
        {"kernel": (2, 3)},
    ),
    "SparseEmbedding": ({"input_dim": 9, "output_dim": 4}, (5,), {"embeddings": (4,)}),
    "SparseConv1D": ({"filters": 6, "kernel_size": 3}, (8, 4), {"kernel": (6,)}),
    "SparseConv2D": ({"filters": 6, "kernel_size": 3, "groups": 2}, (8, 8, 4), {"kernel": (6,)}),
    "SparseConv3D": ({"filters": 6, "kernel_size": 2}, (4, 4, 4, 3), {"kernel": (6,)}),
    "SparseConv1DTranspose": ({"filters": 6, "kernel_size": 3}, (8, 4), {"kernel": (6, 1)}),
    "SparseConv2DTranspose": ({"filters": 6, "kernel_size": 3}, (8, 8, 4), {"kernel": (6, 1)}),
    "SparseConv3DTranspose": ({"filters": 6, "kernel_size": 2}, (4, 4, 4, 3), {"kernel": (6, 1)}),
    "SparseDepthwiseConv1D": (
        {"kernel_size": 3, "depth_multiplier": 2},
        (8, 3),
        {"kernel": (3, 2)},
    ),
    "SparseDepthwiseConv2D": (
        {"kernel_size": 3, "depth_multiplier": 2},
        (8, 8, 3),
        {"kernel": (3, 2)},
    ),
    "SparseSeparableConv1D": (
        {"filters": 6, "kernel_size": 3},
        (8, 4),
        {"depthwise_kernel": (4, 1), "pointwise_kernel": (6,)},
    ),
    "SparseSeparableConv2D": (
        {"filters": 6, "kernel_size": 3},
        (8, 8, 4),
        {"depthwise_kernel": (4, 1), "pointwise_kernel": (6,)},
    ),
    "SparseSimpleRNNCell": ({"units": 6}, (5, 4), {"kernel": (6,), "recurrent_kernel": (6,)}),
    "SparseLSTMCell": ({"units": 6}, (5, 4), {"kernel": (24,), "recurrent_kernel": (24,)}),
    "SparseGRUCell": ({"units": 6}, (5, 4), {"kernel": (18,), "recurrent_kernel": (18,)}),
}


@pytest.fixture(params=LAYERS)
def case(request):
    arguments, shape, thresholds = LAYERS[request.param]
    cls = getattr(layers, request.param)
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype("float32")
    if "Embedding" in request.param:
        x = np.abs(x * 3).astype("int32")
    return cls, arguments, x, thresholds


def run(layer, x):
    if "Cell" in type(layer).__name__:
        layer = keras.layers.RNN(layer)
    return keras.ops.convert_to_numpy(layer(x))


@every(2)
def test_every_sparse_layer_equals_its_stock_layer_with_masked_weights(case):
    cls, arguments, x, thresholds = case
    keras.utils.set_random_seed(0)
    sparse = cls(**arguments, method=DST())
    y = run(sparse, x)
    stock = cls.stock(**arguments)
    run(stock, x)
    own = {id(v) for v in sparse.state_variables().values()}
    for variable, source in zip(stock.weights, [v for v in sparse.weights if id(v) not in own]):
        variable.assign(source.numpy())
    np.testing.assert_array_equal(y, run(stock, x))

    assert list(sparse.sparse_state) == list(thresholds)
    for name, shape in thresholds.items():
        threshold = sparse.sparse_state[name]["threshold"]
        assert threshold.shape == shape
        weight = getattr(stock, name).numpy()
        drawn = np.random.default_rng(1).uniform(0, 1, shape) * np.abs(weight).max() / 2
        values = drawn.astype("float32")
        threshold.assign(values)
        masked = weight * (np.abs(weight) > values)
        assert 0 < np.mean(masked == 0) < 1
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(getattr(sparse, name)), masked)
        getattr(stock, name).assign(masked)
    np.testing.assert_array_equal(run(sparse, x), run(stock, x))


@every(2)
@pytest.mark.parametrize("kind", ["SimpleRNN", "LSTM", "GRU"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_cell_masks_its_weights_once_per_sequence(kind, dropout, monkeypatch):
    drop = {"dropout": dropout, "recurrent_dropout": dropout}
    cells = [getattr(layers, f"Sparse{kind}Cell")(6, method=DST(), **drop) for _ in range(2)]
    recurrent = keras.layers.RNN(cells, unroll=True)
    x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype("float32")
    recurrent(x)
    calls = []
    apply = DST.apply
    monkeypatch.setattr(DST, "apply", lambda *args: calls.append(args) or apply(*args))
    recurrent(x, training=True)
    # The recurrent layer has two cells with two weights each. A call of the layer masks
    # each weight only once, not at every time step.
    assert len(calls) == 4


def test_a_cell_keeps_no_masked_weights_between_calls():
    keras.utils.set_random_seed(0)
    cell = layers.SparseSimpleRNNCell(6, use_bias=False, method=DST(granularity="layer"))
    recurrent = keras.layers.RNN(cell)
    x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype("float32")
    nothing = np.zeros((2, 6), "float32")

    def alone():
        return keras.ops.convert_to_numpy(cell(x[:, 0], [nothing])[0])

    recurrent(x)
    kernel = cell._kernel.numpy()
    np.testing.assert_allclose(alone(), np.tanh(x[:, 0] @ kernel), rtol=1e-5)
    with pytest.raises(Exception, match=r"(?i)shape|dim|size"):
        # The wrong input shape raises an error while the cell processes the sequence.
        recurrent(x[:, :, :3])
    assert not cell.cached_weights
    cell.sparse_state["kernel"]["threshold"].assign(10.0)
    np.testing.assert_array_equal(alone(), nothing)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(recurrent(x)), nothing)


def test_config_round_trip(case):
    cls, arguments, *_ = case
    layer = cls(**arguments, method=DST(granularity="layer"))
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(copy) is cls
    assert copy.get_config() == layer.get_config()


@pytest.mark.parametrize(("granularity", "shape"), [("layer", ()), ("weight", (5, 6))])
def test_granularity(granularity, shape):
    layer = layers.SparseDense(6, method=DST(granularity=granularity))
    layer.build((None, 5))
    assert layer.sparse_state["kernel"]["threshold"].shape == shape


def test_a_layer_needs_a_method_for_the_forward_pass():
    with pytest.raises(TypeError, match="SparseOptimizer"):
        layers.SparseDense(6, method=Magnitude(0.5))
    with pytest.raises(TypeError, match="method"):
        layers.SparseDense(6)
    with pytest.raises(AttributeError):
        _ = layers.SparseDense(6, method=DST()).kernel


def test_thresholds_of_a_fully_pruned_layer_are_reset_in_the_same_step():
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


@every(2)
@pytest.mark.filterwarnings("ignore:.*training had reached sparsity:UserWarning")
@pytest.mark.parametrize("method", [DST(alpha=1.0), DST(sparsity=0.999)], ids=str)
def test_extreme_sparsity_keeps_every_layer_alive_and_finite(method):
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


def test_an_embedding_with_initial_weights():
    table = np.random.default_rng(0).standard_normal((10, 4)).astype("float32")
    layer = layers.SparseEmbedding(10, 4, weights=table, method=DST())
    assert layer.sparse_state["embeddings"]["threshold"].shape == (4,)
    tokens = np.arange(10)[None]
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(tokens))[0], table)
    copy = type(layer).from_config(layer.get_config())
    copy(tokens)
    assert copy.sparse_state["embeddings"]["threshold"].shape == (4,)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float16"])
@pytest.mark.parametrize("inner", [None, "float32", "mixed_bfloat16"])
def test_dtypes_equal_those_of_the_stock_layer(policy, inner):
    """`TimeDistributed` skips `__call__` of the inner layer, so the inner layer casts no inputs."""
    x = np.ones((3, 2, 4), "float32")
    for arguments in ({"use_bias": False}, {}):
        dtypes = []
        for cls, own in ((layers.SparseDense, {"method": DST()}), (keras.layers.Dense, {})):
            dense = cls(1, dtype=inner, **arguments, **own)
            try:
                result = keras.layers.TimeDistributed(dense, dtype=policy)(x)
                dtypes.append(keras.backend.standardize_dtype(result.dtype))
            except Exception as error:  # PyTorch cannot add two tensors whose dtypes differ.
                dtypes.append(type(error))
            dense = cls(1, dtype=policy, **arguments, **own)
            dtypes.append(keras.backend.standardize_dtype(dense(x).dtype))
            dtypes.append(keras.backend.standardize_dtype(dense.kernel.dtype))
        assert dtypes[:3] == dtypes[3:]


def test_all_names_in_the_module_are_layers():
    assert "SparseReversibleEmbedding" in layers.__all__ or not hasattr(
        keras.layers, "ReversibleEmbedding"
    )
    for name in layers.__all__:
        assert issubclass(getattr(layers, name), keras.Layer)
