"""Tests that a `SparseOptimizer` that prunes nothing behaves like its inner optimizer.

This file runs Keras's own tests of its optimizers with wrapped optimizers.
"""

import importlib
import inspect
import types
import unittest

import keras
import numpy as np
import pytest
from keras.src.optimizers import multi_optimizer

from keras_dst import SparseOptimizer
from keras_dst.methods import FlipOut, Magnitude, RigL
from keras_dst.schedules import Constant
from tests.backends import every, slow

BACKEND = keras.backend.backend()
OPTIMIZERS = {
    name: cls
    for name, cls in vars(keras.optimizers).items()
    if inspect.isclass(cls)
    and issubclass(cls, keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
}

# -- tests from Keras ------------------------------------------------------------------------------

MODULES = [f"{name.lower()}_test" for name in OPTIMIZERS]
MODULES = [{"schedulefreeadamw_test": "schedule_free_adamw_test"}.get(m, m) for m in MODULES]
MODULES += ["optimizer_test", "loss_scale_optimizer_test", "multi_optimizer_test"]
# EXCLUDED maps tests of Keras to the reasons why a wrapped optimizer cannot pass them.
EXCLUDED = {
    "optimizer_test-test_get_method": "expects the class of the inner optimizer",
    "optimizer_test-test_optimizer_auto_naming": "expects the name of the inner class",
    "multi_optimizer_test-test_serialization": "expects the names of the inner classes",
    "multi_optimizer_test-test_tensorboard_logging_with_multi_optimizer": "expects inner names",
    "sgd_test-test_single_step": "counts variables, and the wrapper adds a mask and two counters",
    "muon_test-test_adamw_weight_decay": "calls a private function of the inner class",
}


def own_tests():
    for name in MODULES:
        module = importlib.import_module(f"keras.src.optimizers.{name}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, unittest.TestCase):
                for method in unittest.defaultTestLoader.getTestCaseNames(cls):
                    test = f"{name}-{method}"
                    if test not in EXCLUDED and method != "test_session":
                        yield pytest.param(module, cls, method, id=test)


def wrapped(cls):
    """Return a function that creates a `cls` optimizer in a SparseOptimizer that prunes nothing."""

    def make(*args, **kwargs):
        return SparseOptimizer(cls(*args, **kwargs), Magnitude(0.0))

    return make


@slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("module", "cls", "method"), list(own_tests()))
def test_tests_from_keras_pass_with_wrapped_optimizers(module, cls, method, monkeypatch):
    for mark in getattr(getattr(cls, method), "pytestmark", ()):
        if mark.name == "skipif" and mark.args[0]:
            pytest.skip(mark.kwargs["reason"])
    makers = {name: wrapped(optimizer) for name, optimizer in OPTIMIZERS.items()}
    for name, make in makers.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, make)
    if hasattr(module, "optimizers"):
        names = {**vars(module.optimizers), **makers}
        monkeypatch.setattr(module, "optimizers", types.SimpleNamespace(**names))
    result = unittest.TestResult()
    cls(method).run(result)
    problems = [text for _, text in result.failures + result.errors]
    assert not problems, problems[0]
    if result.skipped:
        pytest.skip(result.skipped[0][1])


# -- trajectories ----------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "clipnorm": {"clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.01},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "weight_decay": {"weight_decay": 0.1},
    "ema": {"use_ema": True, "ema_momentum": 0.5},
    "ema_overwrite": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "loss_scale": {"loss_scale_factor": 100.0},
    "schedule": {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)},
}


def trained(optimizer, change=lambda optimizer: None, steps=5):
    """Train for some steps, and call `change` after step 1. Return the values of all variables."""
    random = np.random.default_rng(0)
    shapes = [(4, 3), (3,), (2, 2, 3, 4)]
    variables = [
        keras.Variable(random.standard_normal(shape).astype("float32"), name=f"v{i}")
        for i, shape in enumerate(shapes)
    ]
    optimizer.build(variables)
    for step in range(steps):
        grads = [keras.ops.array(random.standard_normal(s).astype("float32")) for s in shapes]
        if BACKEND == "jax":
            values = optimizer.stateless_apply(
                [v.value for v in optimizer.variables], grads, [v.value for v in variables]
            )
            for place, new in zip((variables, optimizer.variables), values):
                for variable, value in zip(place, new):
                    variable.assign(value)
        else:
            optimizer.apply(grads, variables)
        if step == 0:
            change(optimizer)
    optimizer.finalize_variable_values(variables)
    return [v.numpy() for v in variables]


def assert_same(plain, wrapped_):
    for a, b in zip(plain, wrapped_, strict=True):
        np.testing.assert_array_equal(a, b)


SHORT = ["SGD", "AdamW"]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    "name", [n if n in SHORT else pytest.param(n, marks=slow) for n in OPTIMIZERS]
)
def test_steps_equal_those_of_the_inner_optimizer(name, option):
    cls = OPTIMIZERS[name]
    plain = cls(**OPTIONS[option])
    inner = cls(**OPTIONS[option])
    outer = SparseOptimizer(inner, Magnitude(0.0))
    assert_same(trained(plain), trained(outer))
    assert_same([v.numpy() for v in plain.variables], [v.numpy() for v in inner.variables])
    assert int(outer.iterations) == int(plain.iterations)
    for attribute in vars(plain):
        if not attribute.startswith("_") and isinstance(getattr(plain, attribute), (int, float)):
            assert getattr(outer, attribute) == getattr(plain, attribute), attribute


CHANGES = {
    "learning_rate": 0.5,
    "weight_decay": 0.3,
    "clipnorm": 0.01,
    "global_clipnorm": 0.01,
    "clipvalue": 0.001,
    "loss_scale_factor": 7.0,
    "momentum": 0.1,
}


@pytest.mark.parametrize("attribute", CHANGES)
def test_attributes_of_the_wrapper_reach_the_inner_optimizer(attribute):
    def change(optimizer):
        setattr(optimizer, attribute, CHANGES[attribute])
        assert float(getattr(optimizer, attribute)) == pytest.approx(CHANGES[attribute])

    def made():
        return keras.optimizers.SGD(0.1, momentum=0.9)

    assert_same(trained(made(), change), trained(SparseOptimizer(made(), Magnitude(0.0)), change))


@pytest.mark.parametrize("excluded", ["list", "names"])
def test_exclusions_from_weight_decay_apply_to_the_inner_optimizer(excluded):
    def values(optimizer):
        variables = [keras.Variable(np.full((2, 2), 2.0), name=n) for n in ("keep", "other")]
        chosen = {"var_list": variables[:1]} if excluded == "list" else {"var_names": ["keep"]}
        optimizer.exclude_from_weight_decay(**chosen)
        optimizer.build(variables)
        optimizer.apply([keras.ops.zeros((2, 2))] * 2, variables)
        return [v.numpy() for v in variables]

    def made():
        return keras.optimizers.AdamW(1.0, weight_decay=0.1)

    plain = values(made())
    assert plain[0][0, 0] == 2
    assert plain[1][0, 0] < 2
    assert_same(plain, values(SparseOptimizer(made(), Magnitude(0.0))))


def test_an_outer_loss_scale_replaces_the_inner_one():
    def scaled(wrap):
        inner = keras.optimizers.SGD(0.1, loss_scale_factor=100.0)
        outer = SparseOptimizer(inner, Magnitude(0.0)) if wrap else inner
        optimizer = keras.optimizers.LossScaleOptimizer(outer, initial_scale=4.0)
        assert inner.loss_scale_factor is None
        return trained(optimizer)

    assert_same(scaled(False), scaled(True))


def test_no_attribute_makes_an_optimizer_look_like_a_map_of_optimizers():
    """Attributes such as `values` would make `MultiOptimizer` treat an optimizer as a map."""
    plain = keras.optimizers.SGD()
    wrapped_ = SparseOptimizer(keras.optimizers.SGD(), Magnitude(0.0))
    for name in ("values", "keys", "items", "default_optimizer"):
        assert hasattr(wrapped_, name) == hasattr(plain, name), name


def test_optimizer_state_can_be_set_and_saved(tmp_path):
    def made():
        return SparseOptimizer(keras.optimizers.Adam(0.1), Magnitude(Constant(0.5, begin_step=1)))

    first, second = made(), made()
    trained(first)
    trained(second, steps=1)
    values = [v.numpy() for v in first.variables]
    second.set_weights(values)
    assert_same(values, [v.numpy() for v in second.variables])
    with pytest.raises(ValueError, match="one for every variable"):
        second.set_weights(values[:-1])
    third, store = made(), {}
    trained(third, steps=1)
    first.save_own_variables(store)
    third.load_own_variables(store)
    assert_same(values, [v.numpy() for v in third.variables])


def test_an_optimizer_without_variables():
    optimizer = SparseOptimizer("adam", Magnitude(0.9))
    optimizer.build([])
    optimizer.apply([], [])
    assert not optimizer.built
    with pytest.raises(ValueError, match="must already be built"):
        optimizer.apply([keras.ops.ones((2, 2))])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.Variable is TensorFlow's")
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_pruning_of_plain_tensorflow_variables(sparsity):
    import tensorflow as tf

    variable = tf.Variable([[1.0, 2.0], [3.0, 4.0]])
    method = Magnitude(Constant(sparsity, begin_step=1))
    SparseOptimizer("sgd", method).apply_gradients([(tf.ones((2, 2)), variable)])
    expected = np.array([[0.99, 1.99], [2.99, 3.99]], "float32")
    kept = expected > 2 if sparsity else True
    np.testing.assert_allclose(variable.numpy(), np.where(kept, expected, 0), rtol=1e-6)


def sparse_gradient():
    """Return a sparse gradient, with values only for rows 0 and 2 of a variable with four rows."""
    rows, values = keras.ops.array([0, 2]), keras.ops.full((2, 3), 0.5)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(values, rows, keras.ops.array([4, 3]))
    from jax.experimental.sparse import BCOO

    return BCOO((values, rows[:, None]), shape=(4, 3))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no sparse tensors on PyTorch")
@pytest.mark.parametrize("method", [Magnitude(0.0), Magnitude(Constant(0.5, begin_step=1))])
@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_sparse_gradients_act_as_dense_gradients(name, method):
    """Keras's `optimizer_sparse_test` cannot run here, because it creates optimizers at import."""
    gradient = sparse_gradient()
    found = []
    for each in (gradient, keras.ops.convert_to_tensor(gradient, sparse=False)):
        variable = keras.Variable(np.arange(1, 13, dtype="float32").reshape(4, 3))
        optimizer = SparseOptimizer(OPTIMIZERS[name](0.1), method)
        for _ in range(2):
            optimizer.apply([each], [variable])
        found.append(variable.numpy())
    np.testing.assert_array_equal(*found)
    plain = keras.Variable(np.arange(1, 13, dtype="float32").reshape(4, 3))
    for optimizer in [OPTIMIZERS[name](0.1)] * 2:
        optimizer.apply([gradient], [plain])
    if method == Magnitude(0.0):
        np.testing.assert_allclose(found[0], plain.numpy(), rtol=1e-6)
    else:
        assert np.sum(found[0] == 0) == 6


# -- several optimizers ----------------------------------------------------------------------------

METHOD = Magnitude(Constant(0.5, begin_step=1), frequency=2)


def split(sparse, plain):
    """Return a MultiOptimizer that uses `sparse` for the first layer, and `plain` for all
    others."""
    by_layer = keras.optimizers.OptimizerMap(default_optimizer=plain)
    by_layer[".*first/.*"] = sparse
    return keras.optimizers.MultiOptimizer(by_layer)


def around():
    return split(SparseOptimizer(keras.optimizers.Adam(0.01), METHOD), keras.optimizers.SGD(0.1))


def inside():
    return SparseOptimizer(split(keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1)), METHOD)


def network():
    keras.utils.set_random_seed(0)
    first = keras.layers.Dense(6, "relu", name="first")
    return keras.Sequential([keras.Input((4,)), first, keras.layers.Dense(2, name="last")])


x = np.random.default_rng(0).standard_normal((32, 4)).astype("float32")


@every(16)
@pytest.mark.parametrize("make", [around, inside])
def test_state_of_several_optimizers_after_loading(make, tmp_path):
    assert multi_optimizer.MultiOptimizer is keras.optimizers.MultiOptimizer
    model = network()
    model.compile(make(), "mse", jit_compile=False)
    for _ in range(4):
        model.train_on_batch(x, x[:, :2])
    assert np.mean(model.layers[0].kernel.numpy() == 0) == pytest.approx(0.5, abs=0.17)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(
        [v.numpy() for v in model.optimizer.variables],
        [v.numpy() for v in loaded.optimizer.variables],
    )
    for each in (model, loaded):
        for _ in range(3):
            each.train_on_batch(x, x[:, :2])
    assert_same(model.get_weights(), loaded.get_weights())


@every(16)
@pytest.mark.parametrize("method", [METHOD, FlipOut(0.5), RigL(0.5)])
def test_the_callback_finds_a_sparse_optimizer_in_a_multi_optimizer(method):
    from keras_dst.callbacks import SparseTraining

    model = network()
    sparse = SparseOptimizer(keras.optimizers.Adam(0.01), method)
    model.compile(split(sparse, keras.optimizers.SGD(0.1)), "mse", jit_compile=False)
    model.fit(x, x[:, :2], batch_size=8, epochs=3, verbose=0, callbacks=[SparseTraining()])
    assert np.mean(model.layers[0].kernel.numpy() == 0) == 0.5
    assert np.mean(model.layers[1].kernel.numpy() == 0) == 0
