"""Tests of methods with weights of every floating-point dtype."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_dst
from keras_dst import methods
from keras_dst.callbacks import SparseTraining
from keras_dst.masks import KERNEL
from keras_dst.methods import LayerMethod
from tests import models
from tests.backends import LONG, every

pytestmark = every(16)

METHODS = {
    "dst": methods.DST(),
    "dst-target": methods.DST(sparsity=0.8),
    "dcil": methods.DCIL(0.8),
    "consensus": methods.Consensus(0.5, min_kept=1),
    "magnitude": methods.Magnitude(0.8),
    "magnitude-revival": methods.Magnitude(0.8, revival=True),
    "magnitude-1x4": methods.Magnitude(0.8, pattern="1x4"),
    "magnitude-2:4": methods.Magnitude(0.5, pattern="2:4"),
    "flipout": methods.FlipOut(0.8),
    "optg": methods.OptG(0.8),
    "set": methods.SET(0.8),
    "rigl": methods.RigL(0.8),
}
# FAMILIES contains one method of each family. `make test` tests only the methods in FAMILIES, each
# with all pairs of dtypes.
FAMILIES = ("dst-target", "dcil", "consensus", "magnitude", "rigl")
# Pairs of dtypes: the first dtype is for the first layer of a model, and the second dtype is for
# the normalization and the second dense layer.
MIXED = [("float64", "float32"), ("float32", "float64"), ("bfloat16", "float32")]
MIXED += [("float16", "float16"), ("bfloat16", "bfloat16")]
PAIRS = [(name, types) for types in MIXED for name in (METHODS if LONG else FAMILIES)]

x = np.random.default_rng(0).standard_normal((64, 16)).astype("float32")
y = (x[:, 0] > 0).astype("int32")


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture(autouse=True)
def jax_has_float64():
    """Enable float64 on JAX, which otherwise converts float64 to float32."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def float64():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


def check_training(method, first=None, second=None):
    """Fit a model with layers of two dtypes, and check the sparsity of the stripped model."""
    keras.utils.set_random_seed(0)
    net = [keras.Input((16,)), keras.layers.Dense(64, "relu", dtype=first)]
    net += [keras.layers.BatchNormalization(dtype=second), keras.layers.Dense(32, dtype=second)]
    model = keras.Sequential([*net, keras.layers.Dense(2, "softmax")])
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    if isinstance(method, LayerMethod):
        keras_dst.sparsify(model, method)
    else:
        optimizer = keras_dst.SparseOptimizer(optimizer, method)
    models.compiled(model, optimizer)
    with warnings.catch_warnings():
        # Methods that learn their sparsity need more than twelve steps, so `fit` warns.
        warnings.simplefilter("ignore")
        history = model.fit(x, y, 16, 3, verbose=0, callbacks=[SparseTraining()]).history
    assert np.isfinite(history["loss"]).all()
    if method.schedule:
        assert history["sparsity"][-1] == pytest.approx(method.schedule.sparsity, abs=0.01)
    predicted = model.predict(x, verbose=0)
    keras_dst.strip(model)
    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)


@every(24)
@pytest.mark.usefixtures("float64")
def test_float64_as_default_dtype(method):
    check_training(method)


@every(24)
@pytest.mark.parametrize(("name", "types"), PAIRS)
def test_layers_of_two_dtypes_in_one_model(name, types):
    check_training(METHODS[name], *types)


RANKED = [name for name in METHODS if not name.startswith(("dst", "consensus"))]


@every(64)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", RANKED)
def test_masks_equal_those_of_float32(name, dtype):
    method = METHODS[name]
    rng = np.random.default_rng(0)
    # The weights are multiples of 1/64 below 2, which bfloat16 stores exactly. Because of the
    # rounding, many weights are equal.
    weights = [np.round(rng.uniform(-2, 2, shape) * 64) / 64 for shape in ((24, 16), (16, 8))]
    found = [masks_of(method, weights, kind) for kind in ("float32", dtype)]
    for mask, other in zip(*found):
        np.testing.assert_array_equal(mask, other)
        assert 0 < mask.mean() < 1


def masks_of(method, weights, dtype):
    tensors = [ops.convert_to_tensor(w, dtype) for w in weights]
    mask = [ops.cast(np.ones(w.shape), "bool") for w in weights]
    states = [
        {
            "mask": m,
            "dense": w,
            "gradient": w,
            "flips": ops.zeros(w.shape, "int32"),
            "scores": w,
            "anchor": ops.zeros(w.shape, dtype),
            "rate": ops.ones((), "float32"),
        }
        for w, m in zip(tensors, mask)
    ]
    shapes = [w.shape for w in weights]
    layouts = [KERNEL] * len(weights)
    target = method.schedule.sparsity
    kept = method.kept_counts(shapes, layouts, target, ["a", "b"])
    now = methods.ScheduleState(
        ops.convert_to_tensor(5, "int32"),
        ops.convert_to_tensor(0.5, "float32"),
        ops.convert_to_tensor(target, "float32"),
    )
    changes = method.update(tensors, states, layouts, ops.convert_to_tensor(kept, "int32"), now)
    return [ops.convert_to_numpy(change["mask"]) for change in changes]
