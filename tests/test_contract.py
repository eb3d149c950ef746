"""Tests of the behavior that all pruning methods have in common.

To test a new method, add one line to METHODS.
"""

import functools
import warnings

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst import allocation, methods, schedules
from keras_dst.callbacks import SparseTraining
from keras_dst.methods import LayerMethod, TwoPathMethod, UpdateMethod
from tests import models
from tests.backends import COMPILES, LONG, every, slow
from tests.pages import blocks

# The training runs in this file are too short for the controller of DST to reach its target, so
# `fit` warns. test_callbacks.py tests the warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*training had reached .*:UserWarning")

# `own` maps names to the classes that the code blocks of docs/own_methods.md define. The last code
# block of the page trains models with these classes. test_pages.py runs the last code block.
own: dict = {}
for _, code in blocks("own_methods.md")[:-1]:
    exec(compile(code, "docs/own_methods.md", "exec"), own)

# METHODS maps a name to a method, its final sparsity (or None), and the tolerance of this sparsity.
METHODS = {
    "dst": (methods.DST(), None, None),
    "dst-target": (methods.DST(sparsity=0.8), 0.8, 0.01),
    "dst-target-1x4": (methods.DST(sparsity=0.8, pattern="1x4"), 0.8, 0.01),
    "dst-target-layer": (methods.DST(sparsity=0.5, granularity="layer"), 0.5, 0.01),
    "dcil": (methods.DCIL(0.8), 0.8, 0.001),
    # Consensus removes 30 % of the FLOPs, plus or minus the FLOPs of one unit, because it removes
    # whole units. The pruned fraction of the 2,688 weights depends on which layers lose units. The
    # pruned fraction is 12.5 % if the model loses 14 units with 24 weights each, and 30.4 % if the
    # model loses 17 units with 48 weights each.
    "consensus": (methods.Consensus(0.3, lambda_polar=0.1, lambda_act=20.0), 0.2145, 0.09),
    "magnitude": (methods.Magnitude(0.8), 0.8, 0.001),
    "magnitude-uniform": (methods.Magnitude(0.8, allocation="uniform"), 0.8, 0.001),
    "magnitude-erk": (methods.Magnitude(0.8, allocation="erk"), 0.8, 0.001),
    "magnitude-revival": (methods.Magnitude(0.8, revival=True), 0.8, 0.001),
    "magnitude-1x4": (methods.Magnitude(0.8, pattern="1x4"), 0.8, 0.002),
    "magnitude-2:4": (methods.Magnitude(0.5, pattern="2:4"), 0.5, 0.001),
    # Of the 80 channels in two layers, 40 are pruned, in multiples of 8. A channel has 24 or 48
    # weights, so 34 % to 57 % of the weights are pruned.
    "magnitude-channel": (methods.Magnitude(0.5, pattern="channel"), 0.455, 0.12),
    "dcil-channel": (methods.DCIL(0.5, pattern="channel"), 0.455, 0.12),
    "st3-channel": (methods.ST3(0.5, pattern="channel"), 0.455, 0.12),
    "flipout": (methods.FlipOut(0.8), 0.8, 0.001),
    "optg": (methods.OptG(0.8), 0.8, 0.001),
    "st3": (methods.ST3(0.8), 0.8, 0.001),
    "st3-sigma-erk": (methods.ST3(0.8, sigma=True, allocation="erk"), 0.8, 0.001),
    "set": (methods.SET(0.8), 0.8, 0.01),
    "set-uniform": (methods.SET(0.6, allocation="uniform"), 0.6, 0.01),
    "rigl": (methods.RigL(0.8), 0.8, 0.01),
    "own-update": (own["GradientMagnitude"](0.8), 0.8, 0.001),
    "own-layer": (own["StraightThrough"](0.8), 0.8, 0.001),
    "own-two-path": (own["Twins"](0.8), 0.8, 0.001),
    "own-unit": (own["SmallUnits"](0.5), 0.5, 0.02),
}

x = np.random.default_rng(0).standard_normal((256, 24)).astype("float32")
y = (x @ np.random.default_rng(1).standard_normal((24, 4))).argmax(1)
BATCH, EPOCHS = 16, 6 if COMPILES else 4  # On PyTorch, training steps are not compiled.


ONE_OF_A_FAMILY = [METHODS[name][0] for name in ("dst-target", "magnitude-revival")]
KINDS = ["dst-target", "dcil", "optg", "st3", "consensus", "magnitude-revival", "flipout", "rigl"]
# Methods with different kinds of state, which must all be saved with a model.
RESUMED = ["dst-target", "dcil", "consensus", "magnitude-revival", "rigl"]
OWN = ["own-update", "own-layer", "own-two-path", "own-unit"]
# Patterns and allocations only change how weights are ranked. test_masks.py tests the ranking on
# every backend. Only `make test-all` on PyTorch combines every method with every option.
QUICK = COMPILES or not LONG
PATTERNS = ["dst-target-1x4", "magnitude-channel", "dcil-channel"]
TRIED = ["dst", *KINDS, *OWN, *PATTERNS] if QUICK else METHODS


@pytest.fixture(params=TRIED)
def method(request):
    return METHODS[request.param]


@pytest.fixture(params=KINDS)
def one_of_each(request):
    """Return one pruning method of each class, with the default pattern and allocation."""
    return METHODS[request.param]


def build(method, inner=None, **compile_arguments):
    """Return a small compiled network that is prepared for training with the given method."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((24,)),
            keras.layers.Dense(48, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(32, "relu"),
            keras.layers.Dense(4, "softmax"),
        ]
    )
    optimizer = inner or keras.optimizers.SGD(0.05, momentum=0.9)
    if isinstance(method, LayerMethod):
        keras_dst.sparsify(model, method)
    else:
        optimizer = keras_dst.SparseOptimizer(optimizer, method)
    return models.compiled(model, optimizer, metrics=["accuracy"], **compile_arguments)


def fit(model, epochs=EPOCHS, driver=None, callbacks=(), **kwargs):
    callbacks = [driver or SparseTraining(), *callbacks]
    kwargs.update(batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0)
    return model.fit(x, y, callbacks=callbacks, **kwargs)


def sparsity(model):
    """Strip the model, and return the sparsity of its masked weights."""
    under = {row.name for row in keras_dst.report(model).layers if row.sparse}
    kernels = [v.numpy() for v in keras_dst.strip(model).variables if v.path in under]
    return 1 - sum(np.count_nonzero(k) for k in kernels) / sum(k.size for k in kernels)


def check_target(model, method):
    _, target, tolerance = method
    reached = sparsity(model)
    if target is not None:
        assert reached == pytest.approx(target, abs=tolerance)
    return reached


def test_config_round_trip(method):
    method = method[0]
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(method))
    assert copy == method
    assert copy.get_config() == method.get_config()
    assert repr(copy) == repr(method)


@every(16)
def test_target_log_second_fit_and_strip(method):
    model = build(method[0])
    history = fit(model)
    assert history.history["accuracy"][-1] > 0.6
    logged = history.history["sparsity"]
    assert len(logged) == EPOCHS

    if method[1] is not None:  # A second call of `fit` does not change the final sparsity.
        again = fit(model, 2).history["sparsity"]
        np.testing.assert_allclose(again[-1], logged[-1], atol=method[2])
        logged = again

    before = model.predict(x, verbose=0)
    # If the activation of a unit is always 0, its grown weights get no gradient and stay 0.
    slack = 0.01 if getattr(method[0], "grows", False) else 1e-6
    assert logged[-1] - 1e-6 <= check_target(model, method) <= logged[-1] + slack
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    assert not model.losses  # `strip` removes the penalties.
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    assert not any(type(z).__module__.startswith("keras_dst") for z in model._flatten_layers())


@every(64)
@pytest.mark.parametrize("name", RESUMED if QUICK else ["set", *KINDS, *OWN])
def test_saved_and_resumed_equals_uninterrupted(name, tmp_path):
    method = METHODS[name]
    whole = build(method[0])
    fit(whole, EPOCHS)

    interrupted = build(method[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Training stops before the end of the schedule.
        fit(interrupted, callbacks=[StopAfter(1)])
    interrupted.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    fit(resumed, EPOCHS, initial_epoch=2)
    for a, b in zip(whole.variables, resumed.variables):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    for a, b in zip(whole.optimizer.variables, resumed.optimizer.variables):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


class StopAfter(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch == self.epoch


@every(16)
@pytest.mark.parametrize("name", ["dst-target", "consensus", "magnitude"])
def test_a_schedule_that_spans_two_fits(name):
    method = METHODS[name]
    model = build(method[0])
    fit(model, EPOCHS // 2, SparseTraining(epochs=EPOCHS))
    middle = model.optimizer.iterations
    assert int(middle) == EPOCHS // 2 * len(x) // BATCH
    fit(model, EPOCHS // 2, SparseTraining(epochs=EPOCHS))
    check_target(model, method)


class Memory(keras.layers.Layer):
    """A custom recurrent cell."""

    prunable_weights = ("mix",)
    state_size = output_size = 8

    def build(self, shape):
        self.mix = self.add_weight(shape=(shape[-1] + 8, 8))

    def call(self, step, states):
        h = keras.ops.tanh(keras.ops.concatenate([step, states[0]], -1) @ self.mix)
        return h, [h]


@every(16)
@pytest.mark.parametrize("name", ["dst-target", "dcil", "optg"])
def test_masks_of_recurrent_layers(name):
    keras.utils.set_random_seed(0)
    net = [keras.Input((24, 1)), keras.layers.LSTM(8, return_sequences=True)]
    net += [keras.layers.RNN(Memory()), keras.layers.Dense(4, "softmax")]
    model = keras.Sequential(net)
    keras_dst.sparsify(model, METHODS[name][0])
    models.compiled(model, "adam", run_eagerly=False)
    model.fit(x[..., None], y, BATCH, 2, verbose=0, callbacks=[SparseTraining()])
    check_target(model, METHODS[name])


@every(32)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_training_in_mixed_precision(one_of_each, policy):
    if QUICK and policy == "mixed_bfloat16" and one_of_each[0] not in ONE_OF_A_FAMILY:
        pytest.skip("every method is tested in float16, but only two methods in bfloat16")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = build(one_of_each[0], keras.optimizers.SGD(0.05, momentum=0.9))
        history = fit(model)
    finally:
        keras.config.set_dtype_policy(before)
    assert np.isfinite(history.history["loss"]).all()
    predicted = model.predict(x, verbose=0)
    check_target(model, one_of_each)
    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)


ALL_AT_ONCE = {
    "weight_decay": 0.01,
    "gradient_accumulation_steps": 2,
    "use_ema": True,
    "ema_momentum": 0.9,
    "global_clipnorm": 1.0,
}
INNER = {
    "decay": lambda: keras.optimizers.Adam(0.01, weight_decay=0.01),
    "accumulation": lambda: keras.optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=2),
    "ema": lambda: keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True, ema_momentum=0.9),
    "clipnorm": lambda: keras.optimizers.Adam(0.01, global_clipnorm=1.0),
    "all": lambda: keras.optimizers.Adam(0.01, **ALL_AT_ONCE),
}


@every(16)
@pytest.mark.parametrize("inner", ["all"] if QUICK else INNER)
def test_training_with_every_inner_optimizer(one_of_each, inner):
    model = build(one_of_each[0], INNER[inner]())
    pruned = []

    class Watch(keras.callbacks.Callback):
        """Callback that checks, after every step, that the pruned weights are 0."""

        def on_train_batch_end(self, batch, logs=None):
            optimizer = self.model.optimizer
            for kernel, state in zip(optimizer.kernels, optimizer.states):
                mask = state["mask"].numpy()
                assert not np.any(kernel.numpy()[~mask])
                pruned.append((~mask).sum())

    updated = isinstance(one_of_each[0], UpdateMethod)
    history = fit(model, callbacks=[Watch()] if updated else [])
    assert np.isfinite(history.history["loss"]).all()
    assert not updated or max(pruned) > 100
    check_target(model, one_of_each)


COMPILE_ARGUMENTS = {
    "tensorflow": [
        {"jit_compile": True},
        {"steps_per_execution": 4},
        pytest.param({"run_eagerly": True}, marks=slow),
    ],
    # `jit_compile` needs no test here, because all other tests on JAX use it.
    "jax": [{"steps_per_execution": 4}],
    # Keras rejects steps_per_execution on PyTorch. On PyTorch, the compilation of a training step
    # takes a minute.
    "torch": [
        {"run_eagerly": True},
        pytest.param(
            {"jit_compile": True},
            # torch.compile causes several warnings inside PyTorch.
            marks=[slow, pytest.mark.filterwarnings("ignore")],
        ),
    ],
}[keras.backend.backend()]


@every(32)
@pytest.mark.parametrize("compile_arguments", COMPILE_ARGUMENTS, ids=str)
def test_training_with_every_compile_option(one_of_each, compile_arguments):
    model = build(one_of_each[0], **compile_arguments)
    fit(model, 1 if "run_eagerly" in compile_arguments else 3)
    check_target(model, one_of_each)


@every(32)
def test_the_compiled_step_is_traced_once(one_of_each, monkeypatch):
    if QUICK and not COMPILES and one_of_each[0] not in ONE_OF_A_FAMILY:
        pytest.skip("PyTorch compiles no training step, so two methods are enough")
    model = build(one_of_each[0])
    traces = []
    original = model.compute_loss

    def counting(*args, **kwargs):
        traces.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "compute_loss", counting)
    fit(model, 2)
    after_two = len(traces)
    fit(model, 2)
    if not COMPILES:
        # In eager mode, Keras calls `compute_loss` in every step.
        assert len(traces) >= 4 * len(x) // BATCH
    else:
        # Keras may call `compute_loss` once more with symbolic inputs.
        assert len(traces) - after_two <= 1
        # If a method trains both the pruned and the dense network, a trace calls `compute_loss`
        # twice.
        calls = 2 if isinstance(one_of_each[0], TwoPathMethod) else 1
        assert after_two <= 2 * calls + 1


EXTREME = [
    methods.DST(sparsity=0.999),
    methods.Magnitude(0.999),
    methods.FlipOut(0.999),
    methods.OptG(0.999),
    methods.DCIL(0.999),
    methods.SET(0.999),
    methods.RigL(0.999),
]


@every(24)
@pytest.mark.parametrize("method", EXTREME, ids=lambda method: type(method).__name__)
def test_an_extreme_target_keeps_a_weight_of_every_layer(method):
    model = build(method)
    history = fit(model, 3)
    assert np.isfinite(history.history["loss"]).all()
    # Three or four of 2,816 weights are kept. Each of the three layers keeps at least one weight.
    assert history.history["sparsity"][-1] == pytest.approx(0.999, abs=0.001)
    assert all(row.nonzeros for row in keras_dst.report(model).layers)


HIGH_RATES = [
    methods.Magnitude(0.98),
    methods.Magnitude(0.98, revival=True),
    methods.FlipOut(0.98),
    methods.OptG(0.98),
    methods.DCIL(0.98),
    methods.ST3(0.98),
    methods.DST(sparsity=0.98),
    methods.SET(0.98),
    methods.RigL(0.98),
    methods.Magnitude(0.999, revival=True),
    methods.DST(sparsity=0.999),
]
if LONG:
    HIGH_RATES += [
        methods.Magnitude(0.99, revival=True),
        methods.OptG(0.999),
        methods.ST3(0.999),
        methods.DCIL(0.999),
        methods.SET(0.999),
        methods.RigL(0.999),
    ]


def train_shortcut(method=None):
    """Train a residual network at a high learning rate, and return the stripped network."""
    keras.utils.set_random_seed(0)
    model = models.shortcut()
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    if isinstance(method, UpdateMethod):
        optimizer = keras_dst.SparseOptimizer(optimizer, method)
    elif method:
        keras_dst.sparsify(model, method)
    models.compiled(model, optimizer)
    callbacks = [SparseTraining()] if method else []
    x, y = models.data()
    model.fit(x, y, batch_size=16, epochs=4, verbose=0, callbacks=callbacks)
    return keras_dst.strip(model) if method else model


@functools.cache
def largest_dense_weight():
    return max(np.abs(w.numpy()).max() for w in train_shortcut().trainable_weights)


@every(24)
@pytest.mark.parametrize("method", HIGH_RATES, ids=str)
def test_no_layer_collapses_in_a_short_training_at_a_high_rate(method):
    model = train_shortcut(method)
    report = keras_dst.report(model)
    kernels = [w.shape for w in model.trainable_weights if len(w.shape) > 1]
    target = method.get_config()["sparsity"]
    assert report.sparsity == pytest.approx(target, abs=1e-3)
    floors = np.ones(len(kernels))
    # SET and RigL keep a fixed number of weights per layer.
    if not isinstance(method, methods.SET):
        floors = allocation.floor_counts(kernels, target)
    for row, floor in zip(report.layers, floors):
        assert row.nonzeros >= floor, row
    # Even if a unit gets no signal, the weights of this unit do not explode. RigL is an exception,
    # because RigL grows the weights with the largest gradients and does not limit these gradients.
    if not isinstance(method, methods.RigL):
        largest = max(np.abs(w.numpy()).max() for w in model.trainable_weights)
        assert largest < 5 * largest_dense_weight()


def test_a_schedule_object_instead_of_a_number():
    method = methods.Magnitude(schedules.Constant(0.7))
    model = build(method)
    history = fit(model, 2)
    np.testing.assert_allclose(history.history["sparsity"], 0.7, atol=1e-3)
