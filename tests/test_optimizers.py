"""Tests of `SparseOptimizer`: the pruned weights, and training loops without `fit`."""

import contextlib
import warnings

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst import SparseOptimizer
from keras_dst._training.drivers import drivers_of
from keras_dst._utils.filters import is_prunable
from keras_dst.callbacks import SparseTraining
from keras_dst.methods import DST, SET, FlipOut, Magnitude, OptG, RigL
from keras_dst.schedules import Constant, Cubic, Geometric
from tests import models, reference
from tests.backends import every, slow

pytestmark = every(32)

x, y = models.data(size=128)
STEPS = Cubic(0.8, begin_step=2, end_step=14)
# XLA may round differently in two programs for the same computation.
ROUNDING = 1e-6 if keras.backend.backend() == "jax" else 0


def train_step(model, loss_fn):
    """Return a custom training step, as in the Keras guides for the backend."""
    backend = keras.backend.backend()
    optimizer = model.optimizer
    variables = model.trainable_variables
    optimizer.build(variables)
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = loss_fn(y, model(x, training=True))
            optimizer.apply(tape.gradient(loss, variables), variables)

        return step
    if backend == "torch":

        def step(x, y):
            model.zero_grad()
            loss_fn(keras.ops.convert_to_tensor(y), model(x, training=True)).backward()
            import torch

            with torch.no_grad():
                optimizer.apply([v.value.grad for v in variables], variables)

        return step
    import jax

    def loss_of(trainable, fixed, x, y):
        predicted, fixed = model.stateless_call(trainable, fixed, x, training=True)
        return loss_fn(y, predicted), fixed

    gradients = jax.value_and_grad(loss_of, has_aux=True)

    @jax.jit
    def pure(trainable, fixed, slots, x, y):
        (_, fixed), grads = gradients(trainable, fixed, x, y)
        trainable, slots = optimizer.stateless_apply(slots, grads, trainable)
        return trainable, fixed, slots

    def step(x, y):
        places = (variables, model.non_trainable_variables, optimizer.variables)
        values = pure(*([v.value for v in place] for place in places), x, y)
        for place, new in zip(places, values):
            for variable, value in zip(place, new):
                variable.assign(value)

    return step


@pytest.mark.parametrize("method", [Magnitude(STEPS, frequency=3), Magnitude(STEPS, "erk")])
def test_a_custom_loop_with_a_schedule_in_steps_needs_no_callback(method):
    keras.utils.set_random_seed(0)
    model = models.compiled(models.residual(), SparseOptimizer("sgd", method))
    step = train_step(model, keras.losses.SparseCategoricalCrossentropy())
    sparsities = []
    for i in range(16):
        part = slice(8 * i, 8 * i + 8)
        step(x[part], y[part])
        kernels = [k.numpy() for k in model.optimizer.kernels]
        sparsities.append(1 - sum(map(np.count_nonzero, kernels)) / sum(k.size for k in kernels))
    assert sparsities[0] == 0
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == pytest.approx(0.8, abs=1e-3)
    assert int(model.optimizer.step) == 16


JUMPS = Geometric(0.8, rate=0.5, begin_step=0, end_step=15)
CLOCKS = {
    "magnitude-cubic": Magnitude(Cubic(0.8, begin_step=2, end_step=14), frequency=3),
    "magnitude-cubic-default": Magnitude(Cubic(0.8, begin_step=0, end_step=14)),
    "magnitude-rare": Magnitude(Cubic(0.8, begin_step=3, end_step=17), frequency=100),
    "magnitude-constant": Magnitude(Constant(0.6, begin_step=0), frequency=4),
    "magnitude-late": Magnitude(Constant(0.6, begin_step=5)),
    "magnitude-initial": Magnitude(Cubic(0.8, 0.4, begin_step=2, end_step=14), frequency=5),
    "revival-cubic": Magnitude(Cubic(0.8, begin_step=2, end_step=14), revival=True, frequency=3),
    "revival-constant": Magnitude(Constant(0.6, begin_step=0), revival=True, frequency=4),
    "flipout-jumps": FlipOut(JUMPS, seed=5),
    "flipout-cubic": FlipOut(Cubic(0.8, begin_step=2, end_step=14), frequency=4, seed=5),
    "set": SET(0.7, stop_step=12, frequency=3, seed=7),
    "set-default": SET(0.7, "uniform", stop_step=14, seed=7),
    "rigl": RigL(0.7, stop_step=12, frequency=5, seed=7),
}


@every(32)
@pytest.mark.parametrize("name", CLOCKS)
def test_a_custom_loop_gives_the_masks_and_weights_of_fit(name):
    """After 20 steps, the masks of both training loops are bit-equal.

    The pruning schedule ends before step 20, so the last steps update no masks. On JAX, the two
    training loops are separate programs, so their weights may differ by rounding.
    """
    steps = 20
    x, y = reference.data(steps)

    def compiled():
        model = reference.keras_net()
        optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        jit = keras.backend.backend() == "jax"
        model.compile(SparseOptimizer(optimizer, CLOCKS[name]), loss, jit_compile=jit)
        return model

    def values(model):
        variables = [*model.variables, *model.optimizer.variables]
        return {v.path: v.numpy() for v in variables if v is not model.optimizer.total}

    fitted, looped = compiled(), compiled()
    fitted.fit(
        x.reshape(-1, x.shape[-1]), y.ravel(), batch_size=x.shape[1], shuffle=False, verbose=0,
        callbacks=[SparseTraining()],
    )  # fmt: skip
    looped.optimizer.build(looped.trainable_variables)
    looped.optimizer.apply_initial_masks()
    for inputs, classes in zip(x, y):
        looped.train_on_batch(inputs, classes)

    expected = [*values(fitted).values()]
    for (path, found), value in zip(values(looped).items(), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=ROUNDING, atol=ROUNDING, err_msg=path)
    masks = [s["mask"].numpy() for s in looped.optimizer.states]
    for mask, state in zip(masks, fitted.optimizer.states, strict=True):
        np.testing.assert_array_equal(mask, state["mask"].numpy())
    assert 0.15 < np.mean(np.concatenate([m.ravel() for m in masks])) < 0.5


def test_initial_masks_need_a_built_optimizer_and_a_schedule_in_steps():
    optimizer = SparseOptimizer("sgd", Magnitude(0.5))
    with pytest.raises(ValueError, match="Expected a built optimizer"):
        optimizer.apply_initial_masks()
    optimizer.build(models.residual().trainable_variables)
    with pytest.raises(ValueError, match="begin_step and end_step"):
        optimizer.apply_initial_masks()


def test_counts_of_future_updates_are_computed_once_and_only_without_the_callback(monkeypatch):
    calls = []
    count = Magnitude.kept_counts
    monkeypatch.setattr(Magnitude, "kept_counts", lambda *args: calls.append(args) or count(*args))
    variable = keras.Variable(np.ones((4, 4), "float32"))
    optimizer = SparseOptimizer("sgd", Magnitude(Cubic(0.5, begin_step=0, end_step=40)))
    optimizer.build([variable])
    assert calls == []
    for _ in range(5):
        optimizer.apply([keras.ops.ones((4, 4))], [variable])
        assert len(calls) == 21


@slow
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch.compile is torch's")
def test_torch_compiles_the_step_without_the_callback():
    model = reference.keras_net()
    optimizer = SparseOptimizer("sgd", Magnitude(Cubic(0.5, begin_step=0, end_step=4), frequency=2))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=True)
    x, y = reference.data(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x.reshape(-1, x.shape[-1]), y.ravel(), batch_size=x.shape[1], verbose=0)
    assert keras_dst.report(model).sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("revival", [False, True])
def test_reapply_masks_prunes_assigned_weights(revival):
    keras.utils.set_random_seed(0)
    model = models.residual()
    dense = model.get_weights()
    models.compiled(model, SparseOptimizer("sgd", Magnitude(0.8, revival=revival)))
    model.fit(x, y, verbose=0, callbacks=[SparseTraining()])
    (driver,) = drivers_of(model)
    assert driver.measured_sparsity() == pytest.approx(0.8, abs=1e-3)
    pruned = [k.numpy() == 0 for k in model.optimizer.kernels]
    model.set_weights(dense)
    assert driver.measured_sparsity() == 0
    restored = [k.numpy() for k in model.optimizer.kernels]
    driver.reapply_masks()
    assert driver.measured_sparsity() == pytest.approx(0.8, abs=1e-3)
    for kernel, before, zero in zip(model.optimizer.kernels, restored, pruned):
        np.testing.assert_array_equal(kernel.numpy(), np.where(zero, 0, before))
    # `assign_states` must not change weights that were assigned after the last training step.
    driver.assign_states([{} for _ in pruned])
    for kernel, before, zero in zip(model.optimizer.kernels, restored, pruned):
        np.testing.assert_array_equal(kernel.numpy(), np.where(zero, 0, before))


def test_measured_sparsity_of_sparse_layers():
    keras.utils.set_random_seed(0)
    model = models.residual()
    keras_dst.sparsify(model, DST())
    models.compiled(model, "sgd")
    (driver,) = drivers_of(model)
    assert driver.measured_sparsity() == 0
    for state in driver.states:
        state["threshold"].assign(state["threshold"] + 0.05)
    driver.reapply_masks()
    expected = keras_dst.report(model).sparsity
    assert 0.05 < expected == pytest.approx(driver.measured_sparsity(), abs=1e-6)


@every(16)
@pytest.mark.parametrize("inner", ["sgd", "adam", "rmsprop", "adamw"])
def test_zero_sparsity_equals_the_inner_optimizer(inner):
    def weights(wrap):
        keras.utils.set_random_seed(0)
        optimizer = keras.optimizers.get(inner)
        callbacks = []
        if wrap:
            optimizer = SparseOptimizer(optimizer, Magnitude(0.0))
            callbacks = [SparseTraining()]
        model = models.compiled(models.residual(), optimizer)
        model.fit(x, y, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        return models.arrays(model.variables)

    for a, b in zip(weights(True), weights(False)):
        np.testing.assert_allclose(a, b, rtol=ROUNDING, atol=ROUNDING)


def test_inner_attributes_are_read_and_set_through_the_wrapper():
    optimizer = SparseOptimizer(keras.optimizers.SGD(0.1), Magnitude(0.5))
    assert float(optimizer.learning_rate) == pytest.approx(0.1)
    optimizer.learning_rate = 0.01
    assert float(optimizer.inner_optimizer.learning_rate) == pytest.approx(0.01)
    model = models.compiled(models.residual(), optimizer)
    decay = keras.callbacks.LearningRateScheduler(lambda epoch: 0.005)
    model.fit(x, y, verbose=0, callbacks=[SparseTraining(), decay])
    assert float(optimizer.inner_optimizer.learning_rate) == pytest.approx(0.005)
    assert int(optimizer.iterations) == 4


def test_config_round_trip():
    optimizer = SparseOptimizer(keras.optimizers.Adam(0.02), Magnitude(0.5), ["a/kernel"], name="s")
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert copy.get_config() == optimizer.get_config()
    assert copy.method == optimizer.method


@every(32)
@pytest.mark.parametrize("kind", models.MODELS)
def test_training_of_every_kind_of_model(kind):
    """Kernels of all layers are pruned, including embeddings, whose gradients are sparse."""
    keras.utils.set_random_seed(0)
    model = models.MODELS[kind]()
    before = {v.path for v in model.trainable_variables if is_prunable(v)}
    models.compiled(model, SparseOptimizer("adam", Magnitude(0.6)))
    model.fit(x[:32], y[:32], epochs=4, batch_size=16, verbose=0, callbacks=[SparseTraining()])
    assert {*model.optimizer.kernel_names} == before
    pruned = [row.sparsity for row in keras_dst.report(model).layers if row.name in before]
    assert len(pruned) == len(before) >= 3
    assert keras_dst.report(model).sparsity == pytest.approx(0.6, abs=2e-3)
    expected = models.predict(model, x)
    np.testing.assert_array_equal(models.predict(keras_dst.strip(model), x), expected)


def test_filters_select_kernels_only():
    model = models.residual()
    every = SparseOptimizer("sgd", Magnitude(0.5))
    every.build(model.trainable_variables)
    assert all(name.endswith("/kernel") for name in every.kernel_names)
    assert len(every.kernel_names) == 3
    some = SparseOptimizer("sgd", Magnitude(0.5), "conv2d.*/kernel")
    some.build(model.trainable_variables)
    assert len(some.kernel_names) == 2
    with pytest.raises(ValueError, match="does not match any"):
        SparseOptimizer("sgd", Magnitude(0.5), "nothing").build(model.trainable_variables)


def test_training_with_an_allocation_by_name():
    keras.utils.set_random_seed(0)
    model = models.residual()
    method = Magnitude(0.5, allocation={"dense.*kernel": 0.0})
    models.compiled(model, SparseOptimizer("sgd", method))
    model.fit(x, y, verbose=0, callbacks=[SparseTraining()])
    rows = {row.name: row.sparsity for row in keras_dst.report(model).layers}
    for name, sparsity in rows.items():
        assert sparsity == pytest.approx(0.0 if "dense" in name else 0.5, abs=5e-3), name


# -- several optimizers ----------------------------------------------------------------------------


def gradients_of(loss, variables):
    """Return the gradients of `loss()` with respect to variables."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss()
        return tape.gradient(value, [v.value for v in variables])
    if backend == "torch":
        for variable in variables:
            variable.value.grad = None
        loss().backward()
        return [v.value.grad for v in variables]
    import jax

    def pure(values):
        with keras.StatelessScope(list(zip(variables, values))):
            return loss()

    return jax.grad(pure)([v.value for v in variables])


class Adversarial(keras.Model):
    """A model whose `train_step` trains a generator and a discriminator with two optimizers."""

    def __init__(self):
        super().__init__()
        dense = keras.layers.Dense
        self.generator = keras.Sequential([keras.Input((8,)), dense(16, "relu"), dense(4)])
        self.discriminator = keras.Sequential([keras.Input((4,)), dense(16, "relu"), dense(1)])

    def call(self, noise):
        return self.discriminator(self.generator(noise))

    def compile(self, optimizer, discriminator_optimizer):
        super().compile(optimizer, jit_compile=False)  # On JAX, the step is not compiled.
        self.generator_optimizer = optimizer
        self.discriminator_optimizer = discriminator_optimizer
        optimizer.build(self.generator.trainable_variables)
        discriminator_optimizer.build(self.discriminator.trainable_variables)

    def train_step(self, *arguments):
        noise, real = (keras.ops.convert_to_tensor(data) for data in arguments[-1])
        on_jax = keras.backend.backend() == "jax"
        places = (
            self.trainable_variables,
            self.non_trainable_variables,
            self.optimizer.variables,
            self.metrics_variables,
        )
        if on_jax:
            for place, values in zip(places, arguments[0]):
                for variable, value in zip(place, values):
                    variable.assign(value)

        def discriminator_loss():
            losses = keras.ops.softplus(self(noise)), keras.ops.softplus(-self.discriminator(real))
            return keras.ops.mean(losses[0]) + keras.ops.mean(losses[1])

        def generator_loss():
            return keras.ops.mean(keras.ops.softplus(-self(noise)))

        for network, optimizer, loss in (
            (self.discriminator, self.discriminator_optimizer, discriminator_loss),
            (self.generator, self.generator_optimizer, generator_loss),
        ):
            gradients = gradients_of(loss, network.trainable_variables)
            with no_gradients():
                optimizer.apply(gradients, network.trainable_variables)
        with no_gradients():
            logs = {"loss": generator_loss()}
        return (logs, tuple([v.value for v in place] for place in places)) if on_jax else logs


def no_gradients():
    """Return a context in which PyTorch allows in-place changes of variables."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def zeros(network):
    """Return the fraction of zeros in the kernels of a network."""
    kernels = [layer.kernel.numpy() for layer in network.layers]
    return sum(np.sum(kernel == 0) for kernel in kernels) / sum(kernel.size for kernel in kernels)


@every(1)  # Each backend has its own `train_step` in this test.
def test_two_sparse_optimizers_prune_a_generator_and_a_discriminator():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    noise, real = (rng.standard_normal((64, n)).astype("float32") for n in (8, 4))
    model = Adversarial()
    model(noise)
    adam, sgd = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(SparseOptimizer(adam, Magnitude(0.75)), SparseOptimizer(sgd, Magnitude(0.5)))
    before = models.arrays(model.weights)
    model.fit(noise, real, batch_size=32, epochs=4, verbose=0, callbacks=[SparseTraining()])
    assert all(np.any(v.numpy() != old) for v, old in zip(model.trainable_variables, before))
    assert int(adam.iterations.numpy()) == int(sgd.iterations.numpy()) == 8
    assert (zeros(model.generator), zeros(model.discriminator)) == (0.75, 0.5)
    predicted = model.predict(noise, verbose=0)
    keras_dst.strip(model)
    assert (model.optimizer, model.discriminator_optimizer) == (adam, sgd)
    np.testing.assert_array_equal(model.predict(noise, verbose=0), predicted)
    assert (zeros(model.generator), zeros(model.discriminator)) == (0.75, 0.5)
    model.fit(noise, real, batch_size=32, verbose=0)
    assert int(sgd.iterations.numpy()) == 10
    # Training after `strip` changes pruned weights, so fewer weights are zero. The weights of
    # inactive units stay zero, because they get no gradient.
    assert zeros(model.generator) < 0.75
    assert zeros(model.discriminator) < 0.5


class OwnOptimizers(Adversarial):
    """A model whose `train_step` does not use the optimizer that Keras compiles by default."""

    def compile(self, generator_optimizer, discriminator_optimizer):
        keras.Model.compile(self, jit_compile=False)
        self.generator_optimizer = generator_optimizer
        self.discriminator_optimizer = discriminator_optimizer


class ReadSteps(keras.callbacks.Callback):
    """Callback that reads the number of finished steps in the same way as a resumed training
    run."""

    def on_epoch_end(self, epoch, logs=None):
        # On JAX, Keras updates the variables of the model only when a callback reads `self.model`.
        _ = self.model
        self.read = [driver.read_progress() for driver in drivers_of(self.model)]


@pytest.mark.parametrize("build", [True, False])
@pytest.mark.parametrize("method", [DST(0.75), OptG(0.75)])
def test_two_optimizers_of_a_train_step_train_sparse_layers(method, build):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    noise, real = (rng.standard_normal((64, n)).astype("float32") for n in (8, 4))
    model = OwnOptimizers()
    model(noise)
    keras_dst.sparsify(model, method)
    optimizers = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(*optimizers)
    if build:
        optimizers[0].build(model.generator.trainable_variables)
        optimizers[1].build(model.discriminator.trainable_variables)
    steps, history = ReadSteps(), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*training had reached")
        for epochs in (2, 4):
            training = SparseTraining(epochs=4)
            fitted = model.fit(
                noise,
                real,
                batch_size=32,
                initial_epoch=len(history),
                epochs=epochs,
                verbose=0,
                callbacks=[training, steps],
            )
            history += fitted.history["sparsity"]
            assert steps.read == [(2 * epochs, 8)]
    assert training.missed() == []
    assert history[-1] == pytest.approx(0.75, abs=0.01)
    keras_dst.strip(model)
    assert keras_dst.report(model).sparsity == pytest.approx(0.75, abs=0.01)


class TestErrors:
    def test_a_layer_method_raises(self):
        with pytest.raises(TypeError, match="sparsify"):
            SparseOptimizer("sgd", DST())
        with pytest.raises(TypeError, match="Expected a method"):
            SparseOptimizer("sgd", 0.9)
        with pytest.raises(TypeError, match=r"the class Magnitude\. Call it: Magnitude\("):
            SparseOptimizer("sgd", Magnitude)
        with pytest.raises(TypeError, match=r"SparseOptimizer\(optimizer, method\)"):
            SparseOptimizer(Magnitude(0.9), "sgd")

    def test_sparse_layers_without_an_optimizer_raise(self):
        model = models.sequential()
        keras_dst.sparsify(model, DST(0.5))
        (driver,) = drivers_of(model)
        with pytest.raises(ValueError, match="to have an optimizer, which counts"):
            driver.begin(4, 4, 4)

    def test_an_inner_loss_scale_optimizer_raises(self):
        with pytest.raises(ValueError, match="LossScaleOptimizer has to wrap"):
            SparseOptimizer(
                keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), Magnitude(0.5)
            )

    def test_an_optimizer_without_prunable_weights_raises(self):
        optimizer = SparseOptimizer("sgd", Magnitude(0.5))
        with pytest.raises(ValueError, match="no weight to prune"):
            optimizer.build([keras.Variable(np.zeros(3), name="bias")])
