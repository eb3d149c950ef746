"""`SparseOptimizer`: exactly the inner optimiser where nothing is pruned, and custom loops."""

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst import SparseOptimizer
from keras_dst._training.drivers import drivers_of
from keras_dst._utils.filters import is_prunable
from keras_dst.callbacks import SparseTraining
from keras_dst.methods import DST, Magnitude
from keras_dst.schedules import Cubic
from tests import models

x, y = models.data(size=128)
STEPS = Cubic(0.8, begin_step=2, end_step=14)


def train_step(model, loss_fn):
    """A user's own training step, as the backend's guides write it."""
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
def test_a_custom_loop_needs_no_callback_when_steps_are_given(method):
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


def test_the_custom_loop_and_the_callback_prune_the_same_weights():
    def masks(fit):
        keras.utils.set_random_seed(0)
        method = Magnitude(STEPS, frequency=3)
        model = models.compiled(models.residual(), SparseOptimizer("sgd", method))
        callbacks = [SparseTraining()] if fit else []
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
        return [s["mask"].numpy() for s in model.optimizer.states]

    driven, alone = masks(True), masks(False)
    assert sum(m.sum() for m in driven) == sum(m.sum() for m in alone)


@pytest.mark.parametrize("revival", [False, True])
def test_masks_apply_again_to_weights_that_were_assigned(revival):
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
    driver.take([{} for _ in pruned])  # training continues with the assigned values
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


@pytest.mark.parametrize("inner", ["sgd", "adam", "rmsprop", "adamw"])
def test_nothing_pruned_equals_the_inner_optimiser(inner):
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
        np.testing.assert_array_equal(a, b)


def test_it_passes_on_what_belongs_to_the_inner_optimiser():
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


@pytest.mark.parametrize("kind", models.MODELS)
def test_every_kind_of_model(kind):
    """The kernels of any layer, with nothing to declare; lookups have sparse gradients, too."""
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


def test_filters_and_what_is_a_kernel():
    model = models.residual()
    every = SparseOptimizer("sgd", Magnitude(0.5))
    every.build(model.trainable_variables)
    assert all(name.endswith("/kernel") for name in every.kernel_names)
    assert len(every.kernel_names) == 3
    some = SparseOptimizer("sgd", Magnitude(0.5), "conv2d.*/kernel")
    some.build(model.trainable_variables)
    assert len(some.kernel_names) == 2
    with pytest.raises(ValueError, match="fits none"):
        SparseOptimizer("sgd", Magnitude(0.5), "nothing").build(model.trainable_variables)


def test_an_allocation_by_name():
    keras.utils.set_random_seed(0)
    model = models.residual()
    method = Magnitude(0.5, allocation={"dense.*kernel": 0.0})
    models.compiled(model, SparseOptimizer("sgd", method))
    model.fit(x, y, verbose=0, callbacks=[SparseTraining()])
    rows = {row.name: row.sparsity for row in keras_dst.report(model).layers}
    for name, sparsity in rows.items():
        assert sparsity == pytest.approx(0.0 if "dense" in name else 0.5, abs=5e-3), name


class TestErrors:
    def test_a_method_of_the_other_family(self):
        with pytest.raises(TypeError, match="sparsify"):
            SparseOptimizer("sgd", DST())
        with pytest.raises(TypeError, match="Expected a method"):
            SparseOptimizer("sgd", 0.9)
        with pytest.raises(TypeError, match=r"the class Magnitude\. Call it: Magnitude\("):
            SparseOptimizer("sgd", Magnitude)
        with pytest.raises(TypeError, match=r"SparseOptimizer\(optimizer, method\)"):
            SparseOptimizer(Magnitude(0.9), "sgd")

    def test_loss_scaling_inside(self):
        with pytest.raises(ValueError, match="LossScaleOptimizer goes around"):
            SparseOptimizer(
                keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), Magnitude(0.5)
            )

    def test_nothing_to_prune(self):
        optimizer = SparseOptimizer("sgd", Magnitude(0.5))
        with pytest.raises(ValueError, match="no weight to prune"):
            optimizer.build([keras.Variable(np.zeros(3), name="bias")])
