"""Tests of DCIL against its equations in NumPy: gradients, loss, masks, and training runs."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_dst
from keras_dst.callbacks import SparseTraining
from keras_dst.layers import SparseBatchNormalization, SparseDense
from keras_dst.masks import KERNEL
from keras_dst.methods import DCIL, DST, full_path
from keras_dst.schedules import Constant, Cubic
from tests import models, reference
from tests.backends import every
from tests.gradients import gradients

pytestmark = every(48)

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_numbers():
    """Reset the random generator before every test, because tests may run in any order."""
    RNG.bit_generator.state = START


def array(x):
    return ops.convert_to_numpy(x)


def random(*shape):
    return RNG.standard_normal(shape).astype("float32")


# -- one weight ------------------------------------------------------------------------------------


def test_forward_and_gradient_of_both_paths():
    #      w        m        g
    #   1  -2     1   0    5  6
    #   3  -4     0   1    7  8
    w = ops.convert_to_tensor([[1.0, -2.0], [3.0, -4.0]])
    state = {"mask": ops.convert_to_tensor([[True, False], [False, True]])}
    g = ops.convert_to_tensor([[5.0, 6.0], [7.0, 8.0]])

    def apply(w):
        return DCIL(0.5).apply(w, state, KERNEL)

    np.testing.assert_array_equal(array(apply(w)), [[1, 0], [0, -4]])
    np.testing.assert_array_equal(gradients(apply, [w], g)[0], [[5, 0], [0, 8]])
    with full_path():
        np.testing.assert_array_equal(array(apply(w)), array(w))
        np.testing.assert_array_equal(gradients(apply, [w], g)[0], [[0, 6], [7, 0]])
    np.testing.assert_array_equal(array(apply(w)), [[1, 0], [0, -4]])


def test_channels_rank_differently_by_squares_and_magnitudes():
    # The mean of |w| is 1 in the first channel and 0.95 in the second channel. The mean of w**2 is
    # 1 in the first channel and 1.8 in the second channel.
    w = [ops.convert_to_tensor([[1.0, 1.9], [1.0, 0.0]])]
    kept = ops.convert_to_tensor([2])
    found = {}
    for score in ("magnitude", "square"):
        method = DCIL(0.5, pattern="channel", score=score)
        found[score] = array(method.rank(method.scores(w, [{}]), [KERNEL], kept)[0])
    np.testing.assert_array_equal(found["magnitude"], [[True, False]] * 2)
    np.testing.assert_array_equal(found["square"], [[False, True]] * 2)


def divergence(p, f, temperature):
    """Return the KL divergences of all samples, and the gradients of the mean divergence."""
    a, b = reference.softmax(p / temperature), reference.softmax(f / temperature)
    each = a * np.log(a / b) + b * np.log(b / a)
    step = temperature * (a - b) / len(p)
    return temperature**2 * each.sum(-1), step, -step


def test_divergence_and_its_gradients():
    p, f = random(6, 3), random(6, 3)
    method = DCIL(0.5, temperature=3.0)
    value, to_p, to_f = divergence(p.astype("float64"), f.astype("float64"), 3.0)
    tensors = [ops.convert_to_tensor(p), ops.convert_to_tensor(f)]
    np.testing.assert_allclose(array(method.divergence(*tensors)), value, rtol=1e-5)
    found = gradients(method.divergence, tensors, ops.ones((6,)) / 6)
    np.testing.assert_allclose(found[0], to_p, atol=1e-6)
    np.testing.assert_allclose(found[1], to_f, atol=1e-6)


# -- batch normalization ---------------------------------------------------------------------------


@keras.saving.register_keras_serializable("tests")
class MyNorm(layers.BatchNormalization):
    """A custom layer that inherits from `BatchNormalization`, as a user may write it."""


@pytest.mark.parametrize("arguments", [{}, {"scale": False}, {"center": False}], ids=str)
def test_batch_norm_equals_the_stock_layer_on_either_path(arguments):
    x, other = random(8, 5), 3 * random(8, 5) + 1
    dual = SparseBatchNormalization(**arguments, momentum=0.5, method=DCIL(0.5))
    pruned, full = (layers.BatchNormalization(**arguments, momentum=0.5) for _ in range(2))
    np.testing.assert_array_equal(array(dual(x, training=True)), array(pruned(x, training=True)))
    with full_path():
        np.testing.assert_array_equal(
            array(dual(other, training=True)), array(full(other, training=True))
        )
        np.testing.assert_array_equal(array(dual(x)), array(full(x)))
    np.testing.assert_array_equal(array(dual(x)), array(pruned(x)))
    second = dual.state_variables()
    assert len(second) == len(full.weights) == len(dual.weights) / 2
    for name, variable in second.items():
        stock = getattr(full, name.removeprefix("full_"))
        np.testing.assert_array_equal(variable.numpy(), stock.numpy())
        assert variable.trainable == stock.trainable


def norm_model(norm=layers.BatchNormalization):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((5,)), layers.Dense(6), norm(), layers.Dense(3, "softmax")]
    )


@pytest.mark.parametrize("norm", [layers.BatchNormalization, MyNorm])
def test_second_batch_norm_set_is_saved_reported_and_stripped(norm, tmp_path):
    model = norm_model(norm)
    model.layers[1].set_weights([random(6), random(6), random(6), random(6) ** 2])
    plain = keras_dst.report(model)
    stock = [type(layer) for layer in model._flatten_layers()]
    report = keras_dst.sparsify(model, DCIL(0.5), filters="dense.*")
    assert report.doubled == [model.layers[1].path]
    assert len(report.sparsified) == 2
    assert not report.skipped
    assert f"doubled    {model.layers[1].path}" in str(report)
    assert "doubled" not in str(keras_dst.sparsify(norm_model(), DST()))
    assert keras_dst.report(model).parameters == plain.parameters

    dual = model.layers[1]
    for name, variable in dual.state_variables().items():
        first = getattr(dual, name.removeprefix("full_"))
        np.testing.assert_array_equal(variable.numpy(), first.numpy())
        variable.assign(variable.numpy() + 1)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    by_hand = norm_model(norm)
    keras_dst.sparsify(by_hand, DCIL(0.5))
    by_hand.load_weights(tmp_path / "model.weights.h5")
    for copy in (loaded, by_hand):
        assert type(copy.layers[1]) is type(dual)
        for a, b in zip(model.variables, copy.variables):
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)

    first = [v.numpy() for v in dual.weights[:2]]
    keras_dst.strip(model)
    assert [type(layer) for layer in model._flatten_layers()] == stock
    assert len(model.layers[1].weights) == 4
    np.testing.assert_array_equal(model.layers[1].get_weights()[:2], first)


@keras.saving.register_keras_serializable("tests")
class NormBlock(layers.Layer):
    """A layer that creates its own batch normalization."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = [layers.Dense(4), layers.BatchNormalization()]

    def build(self, input_shape):
        self.steps[0].build(input_shape)
        self.steps[1].build((*input_shape[:-1], 4))

    def call(self, x):
        for step in self.steps:
            x = step(x)
        return x


def test_batch_norm_inside_a_custom_layer(tmp_path):
    model = keras.Sequential([keras.Input((5,)), NormBlock(), layers.Dense(3)])
    keras_dst.sparsify(model, DCIL(0.5))
    assert isinstance(model.layers[0].steps[1], SparseBatchNormalization)
    for variable in model.layers[0].steps[1].state_variables().values():
        variable.assign(random(4))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(model.variables) == len(loaded.variables)
    for a, b in zip(model.weights, loaded.weights):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


def test_weights_of_a_stock_layer_are_loaded_into_both_sets():
    stock = norm_model().layers[1]
    stock.set_weights([random(6), random(6), random(6), random(6) ** 2])
    store: dict = {}
    stock.save_own_variables(store)
    model = norm_model()
    keras_dst.sparsify(model, DCIL(0.5))
    dual = model.layers[1]
    dual.load_own_variables({key: value.numpy() for key, value in store.items()})
    for name, variable in dual.state_variables().items():
        first = getattr(stock, name.removeprefix("full_"))
        np.testing.assert_array_equal(variable.numpy(), first.numpy())


def test_a_frozen_batch_norm_stays_frozen():
    model = norm_model()
    model.layers[1].trainable = False
    keras_dst.sparsify(model, DCIL(0.5))
    assert len(model.trainable_variables) == 4
    model.layers[1].trainable = True
    assert len(model.trainable_variables) == 8


# -- the loss --------------------------------------------------------------------------------------


def fit(model, x, y, epochs=1, batch_size=16, driver=None, callbacks=(), **arguments):
    driver = driver or SparseTraining()
    return model.fit(
        x, y, epochs=epochs, batch_size=batch_size, shuffle=False, verbose=0,
        callbacks=[driver, *callbacks], **arguments,
    )  # fmt: skip


def still(model, loss, **arguments):
    """Compile a model with learning rate 0, so that a training step does not change the weights."""
    model.compile(keras.optimizers.SGD(0.0), loss, **arguments)
    return model


def on_both_paths(model, x):
    pruned = model(x, training=False)
    with full_path():
        full = model(x, training=False)
    return [np.asarray(array(y), "float64") for y in (pruned, full)]


class OneNumber(layers.Layer):
    """A layer that adds the mean of its inputs to the loss. This mean changes if the weights of an
    earlier layer are pruned."""

    def call(self, x):
        self.add_loss(ops.mean(x))
        return x


@pytest.mark.parametrize("from_logits", [True, False])
def test_loss_counts_penalties_once_and_applies_sample_weights(from_logits):
    x, y, weights = random(16, 5), RNG.integers(0, 3, 16), RNG.uniform(size=16).astype("float32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, "relu", kernel_regularizer=keras.regularizers.L2(0.1)),
            OneNumber(),
            layers.Dense(3, None if from_logits else "softmax"),
        ]
    )
    keras_dst.sparsify(model, DCIL(Constant(0.5), warmup=0.0))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    still(
        model, loss, metrics=[keras.metrics.SparseCategoricalCrossentropy("ce", None, from_logits)]
    )
    logs = fit(model, x, y, sample_weight=weights).history

    outputs = on_both_paths(model, x)
    hidden = np.maximum(x @ array(model.layers[0].kernel) + model.layers[0].bias.numpy(), 0)
    logits = outputs if from_logits else [np.log(p) for p in outputs]
    pruned, full = (-np.log(reference.softmax(z)[np.arange(16), y]) for z in logits)
    assert abs(pruned - full).max() > 0.1
    penalties = 0.1 * (model.layers[0]._kernel.numpy() ** 2).sum() + hidden.mean()
    task = (weights * (pruned + full)).mean()
    expected = task + penalties + (weights * divergence(*logits, 2.0)[0]).mean()
    np.testing.assert_allclose(logs["loss"], [expected], rtol=1e-5)
    np.testing.assert_allclose(logs["ce"], [pruned.mean()], rtol=1e-5)


def test_loss_of_several_outputs():
    x = random(16, 5)
    inputs = keras.Input((5,))
    outputs = [
        layers.Dense(3, "softmax", name="many")(inputs),
        layers.Dense(2, "sigmoid", name="some")(inputs),
        layers.Dense(1, name="number")(inputs),
    ]
    model = keras.Model(inputs, outputs)
    targets = [RNG.integers(0, 3, 16), RNG.integers(0, 2, (16, 2)), random(16, 1)]
    keras_dst.sparsify(model, DCIL(Constant(0.5), warmup=0.0))
    losses = ["sparse_categorical_crossentropy", "binary_crossentropy", "mse"]
    still(model, losses, loss_weights=[1.0, 3.0, 5.0])
    logs = fit(model, x, targets).history

    def task(outputs):
        many, some, number = outputs
        return [
            -np.log(many[np.arange(16), targets[0]]).mean(),
            -np.log(np.where(targets[1], some, 1 - some)).mean(),
            ((number - targets[2]) ** 2).mean(),
        ]

    pruned = [np.asarray(array(z), "float64") for z in model(x)]
    with full_path():
        full = [np.asarray(array(z), "float64") for z in model(x)]
    two = [np.stack([np.zeros(32), np.log(s / (1 - s)).ravel()], -1) for s in (pruned[1], full[1])]
    kl = divergence(np.log(pruned[0]), np.log(full[0]), 2.0)[0].mean()
    kl += 3 * divergence(*two, 2.0)[0].mean()
    weighted = np.dot([1, 3, 5], np.add(task(pruned), task(full)))
    np.testing.assert_allclose(logs["loss"], [weighted + kl], rtol=1e-4)
    # The logs report the loss of each output. This loss is computed with the pruned weights.
    np.testing.assert_allclose(logs["number_loss"], [task(pruned)[2]], rtol=1e-4)


def test_a_regression_loss_needs_training_without_divergence():
    x, y = random(16, 5), random(16, 1)
    for warmup, raises in ((0.5, True), (1.0, False)):
        model = keras.Sequential([keras.Input((5,)), layers.Dense(4, "relu"), layers.Dense(1)])
        keras_dst.sparsify(model, DCIL(Constant(0.5), warmup=warmup))
        still(model, "mse")
        if raises:
            with pytest.raises(ValueError, match=r"warmup=1\.0"):
                fit(model, x, y)
        logs = None if raises else fit(model, x, y).history
    pruned, full = on_both_paths(model, x)
    expected = ((pruned - y) ** 2).mean() + ((full - y) ** 2).mean()
    np.testing.assert_allclose(logs["loss"], [expected], rtol=1e-5)


# -- training runs ---------------------------------------------------------------------------------


def trained_by_equations(x, y, p, statistics, warmup):
    """Train with DCIL in NumPy.

    The masks are updated in every second step. The sparsity rises from 0 at the start to 0.8 at
    step 40.
    """
    optimizer = reference.Momentum(p)
    names, losses = ("w1", "w2"), []
    for t in range(len(x)):
        if t % 2 == 0:
            scores = np.concatenate([abs(p[n]).ravel() for n in names])
            target = 0.8 * (1 - (1 - min(t / 40, 1)) ** 3)
            kept = round((1 - target) * scores.size)
            threshold = np.sort(scores)[::-1][kept - 1]
            mask = {n: abs(p[n]) >= threshold for n in names}
            coupled = t / 50 >= warmup
        pruned = {**p, **{n: p[n] * mask[n] for n in names}}
        full = {**p, "gamma": p["full_gamma"], "beta": p["full_beta"]}
        (zp, cp), (zf, cf) = reference.forward(x[t], pruned), reference.forward(x[t], full)
        (lp, dp), (lf, df) = (reference.cross_entropy(z, y[t]) for z in (zp, zf))
        kl, kp, kf = divergence(zp, zf, 2.0)
        kl = kl.mean()
        gp = reference.backward(dp + coupled * kp, pruned, cp)
        gf = reference.backward(df + coupled * kf, full, cf)
        g = {n: gp[n] * mask[n] + gf[n] * ~mask[n] for n in names}
        g |= {"gamma": gp["gamma"], "beta": gp["beta"], "b2": gp["b2"] + gf["b2"]}
        g |= {"full_gamma": gf["gamma"], "full_beta": gf["beta"]}
        optimizer.step(p, g)
        losses.append(lp + lf + coupled * kl)
        for own, cache in zip(statistics, (cp, cf)):
            for n in own:
                own[n] += (1 - reference.MOMENTUM) * (cache[n] - own[n])
    return losses


def test_trajectory_equals_the_equations():
    x, y = reference.data(50)
    model = reference.keras_net()
    keras_dst.sparsify(model, DCIL(Cubic(0.8, end=0.8), warmup=0.5))
    p = reference.parameters(model)
    p |= {"full_gamma": p["gamma"].copy(), "full_beta": p["beta"].copy()}
    statistics = [{"mean": np.zeros(16), "var": np.ones(16)} for _ in range(2)]
    losses = trained_by_equations(x, y, p, statistics, 0.5)

    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    logs = fit(model, np.concatenate(x), np.concatenate(y)).history
    np.testing.assert_allclose(logs["loss"], [np.mean(losses)], rtol=1e-4)
    for name, found in reference.parameters(model).items():
        np.testing.assert_allclose(found, p[name], atol=1e-4, err_msg=name)
    dual = model.layers[1]
    second = {k.removeprefix("full_"): v.numpy() for k, v in dual.state_variables().items()}
    assert abs(second["gamma"] - dual.gamma.numpy()).max() > 0.01
    for name in ("gamma", "beta"):
        np.testing.assert_allclose(second[name], p[f"full_{name}"], atol=1e-4)
    first = {
        "moving_mean": dual.moving_mean.numpy(),
        "moving_variance": dual.moving_variance.numpy(),
    }
    for expected, own in zip(statistics, (first, second)):
        np.testing.assert_allclose(own["moving_mean"], expected["mean"], atol=1e-4)
        np.testing.assert_allclose(own["moving_variance"], expected["var"], atol=1e-4)


class Watch(keras.callbacks.Callback):
    """Callback that records after each step whether the divergence between the outputs of the
    pruned and the dense weights is a part of the loss."""

    def __init__(self):
        super().__init__()
        self.coupled = []

    def on_train_batch_end(self, batch, logs=None):
        state = self.model.layers[0].sparse_state["kernel"]
        self.coupled.append(float(state["coupled"].numpy()))


@every(16)
@pytest.mark.parametrize("warmup", [0.0, 0.4])
def test_divergence_starts_after_the_warm_up(warmup):
    x, y = random(40, 5), RNG.integers(0, 3, 40)
    model = norm_model()
    keras_dst.sparsify(model, DCIL(0.5, warmup=warmup))
    models.compiled(model)
    watch = Watch()
    fit(model, x, y, 5, batch_size=4, callbacks=[watch])
    assert watch.coupled == [float(step / 50 >= warmup) for step in range(1, 51)]


# Exclude the recurrent model: DCIL runs the model twice, with pruned and with dense weights, and
# XLA takes minutes to compile both runs.
@every(32)
@pytest.mark.parametrize("kind", [kind for kind in models.MODELS if kind != "recurrent"])
def test_training_of_every_kind_of_model(kind, tmp_path):
    x, y = models.data(size=32)
    keras.utils.set_random_seed(0)
    model = models.MODELS[kind]()
    keras_dst.sparsify(model, DCIL(0.7))
    before = [v.numpy() for v in model.trainable_variables]
    models.compiled(model)
    logs = fit(model, x, y, 6).history
    assert np.isfinite(logs["loss"]).all()
    assert logs["sparsity"][-1] == pytest.approx(0.7, abs=2e-3)
    for old, variable in zip(before, model.trainable_variables):
        assert np.any(old != variable.numpy()), variable.path
    assert "compute_loss" not in vars(model)

    expected = models.predict(model, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for a, b in zip(model.weights, loaded.weights):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    for copy in (model, loaded):
        np.testing.assert_array_equal(models.predict(keras_dst.strip(copy), x), expected)
        assert not any(type(z).__module__.startswith("keras_dst") for z in copy._flatten_layers())


def test_training_with_dropout_in_two_parts_equals_one_fit():
    x, y = random(32, 5), RNG.integers(0, 3, 32)

    def build():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((5,)),
                layers.Dense(8, "relu"),
                layers.Dropout(0.5, seed=1),
                layers.Dense(3, "softmax"),
            ]
        )
        keras_dst.sparsify(model, DCIL(0.5, warmup=0.2))
        return models.compiled(model)

    whole, parts = build(), build()
    fit(whole, x, y, 4)
    for _ in range(2):
        fit(parts, x, y, 2, driver=SparseTraining(epochs=4))
    for a, b in zip(whole.variables, parts.variables):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    drawn = whole.layers[1].seed_generator.state.numpy()[1]
    # In each step, the model runs twice, with pruned and with dense weights, and draws a dropout
    # mask in each run.
    assert drawn == 2 * int(whole.optimizer.iterations)


def test_patterns():
    x, y = random(32, 16), RNG.integers(0, 4, 32)
    for pattern in ("2:4", "1x4"):
        model = keras.Sequential(
            [keras.Input((16,)), layers.Dense(16, "relu"), layers.Dense(4, "softmax")]
        )
        keras_dst.sparsify(model, DCIL(0.5, pattern=pattern))
        fit(models.compiled(model), x, y, 2)
        kernel = keras_dst.strip(model).layers[0].kernel.numpy()
        groups = (kernel != 0).reshape(4, 4, 16).sum(1)
        assert set(groups.ravel()) <= ({2} if pattern == "2:4" else {0, 4})


# -- models with custom loss or training step ------------------------------------------------------


class OwnLoss(keras.Model):
    """A model that overrides `compute_loss` with the old signature of Keras, without `training`."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, "softmax")

    def call(self, x):
        return self.dense(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return 10.0 + super().compute_loss(x, y, y_pred, sample_weight)


def test_a_custom_compute_loss_is_called():
    x, y = random(16, 5), RNG.integers(0, 3, 16)
    model = OwnLoss()
    model(x)
    keras_dst.sparsify(model, DCIL(Constant(0.5), warmup=1.0))
    still(model, "sparse_categorical_crossentropy")
    logs = fit(model, x, y, validation_data=(x, y)).history
    pruned, full = (-np.log(p[np.arange(16), y]).mean() for p in on_both_paths(model, x))
    np.testing.assert_allclose(logs["loss"], [20 + pruned + full], rtol=1e-5)
    np.testing.assert_allclose(logs["val_loss"], [10 + pruned], rtol=1e-5)
    assert model._compute_loss_has_training_arg is False


def test_a_training_step_without_compute_loss_raises():
    class Other(keras.Sequential):
        def train_step(self, *args):
            if keras.backend.backend() == "jax":
                return {"loss": ops.zeros(())}, args[0]
            return {"loss": ops.zeros(())}

    model = Other([keras.Input((5,)), layers.Dense(3)])
    keras_dst.sparsify(model, DCIL(0.5))
    still(model, "mse")
    # A training run of 4 steps includes a mask update, and a run of 1 step does not.
    for steps in (4, 1):
        with pytest.raises(ValueError, match="does not call"):
            fit(model, random(16 * steps, 5), random(16 * steps, 3))


# Keras warns that the variables of the unpruned network get no gradients.
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_training_without_the_callback_raises():
    x, y = random(32, 5), RNG.integers(0, 3, 32)
    model = norm_model()
    keras_dst.sparsify(model, DCIL(0.5))
    with pytest.raises(ValueError, match="SparseTraining"):
        models.compiled(model).fit(x, y, verbose=0)


def test_fit_after_an_interrupted_fit():
    x, y = random(32, 5), RNG.integers(0, 3, 32)
    model = norm_model()
    keras_dst.sparsify(model, DCIL(0.5))
    models.compiled(model)

    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, x, y, 3, callbacks=[Break()])
    fit(model, x, y, 3)
    assert "compute_loss" not in vars(model)
    with pytest.raises(ValueError, match="SparseTraining"):
        model.fit(x, y, verbose=0)


def test_two_methods_with_two_paths_raise():
    model = keras.Sequential(
        [
            keras.Input((5,)),
            SparseDense(4, method=DCIL(0.5)),
            SparseDense(3, "softmax", method=DCIL(0.6)),
        ]
    )
    models.compiled(model)
    with pytest.raises(ValueError, match="one method with two paths"):
        fit(model, random(16, 5), RNG.integers(0, 3, 16))


@every(1)  # On JAX, DCIL trains in a remat scope. On other backends, DCIL raises an error.
def test_layers_in_a_remat_scope():
    x, y = random(16, 5), RNG.integers(0, 3, 16)

    def train():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5,)), layers.Dense(3, "softmax")])
        keras_dst.sparsify(model, DCIL(Constant(0.5), warmup=0.0))
        fit(models.compiled(model), x, y)
        return model.layers[0]._kernel.numpy()

    if keras.backend.backend() != "jax":
        with keras.RematScope("full"), pytest.raises(ValueError, match="RematScope"):
            train()
        return
    expected = train()
    with keras.RematScope("full"):
        # The two training runs compile different programs, so sums may differ in their last bits.
        np.testing.assert_allclose(train(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is the fraction of zeros"),
        ({"warmup": 70}, r"warmup is a fraction of training, in \[0, 1\]. Received: warmup=70"),
        ({"temperature": 0}, "temperature must be a number > 0. Received: 0"),
        ({"score": "l1"}, "score must be 'magnitude' or 'square'. Received: 'l1'"),
        ({"sparsity": 0.9, "pattern": "2:4"}, "fixes the sparsity at 0.5"),
        ({"frequency": 0}, "frequency must be a whole number"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        DCIL(**{"sparsity": 0.5, **arguments})


def test_sparse_batch_normalization_needs_a_method_with_two_paths():
    with pytest.raises(ValueError, match="two paths"):
        SparseBatchNormalization(method=DST())


def test_schedule():
    assert DCIL(0.9).schedule == Cubic(0.9, end=0.75)
    assert DCIL(Constant(0.7)).schedule == Constant(0.7)
