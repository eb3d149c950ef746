"""Tests of OptG: gradients, learning rate of the scores, schedule, and the required callback."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_dst
from keras_dst.callbacks import SparseTraining
from keras_dst.masks import KERNEL
from keras_dst.methods import OptG
from keras_dst.schedules import Constant, Cubic, Sigmoid
from tests import models
from tests.backends import every
from tests.gradients import gradients

pytestmark = every(48)

x, y = models.data(size=128)


def sparse(method, optimizer):
    keras.utils.set_random_seed(0)
    model = models.residual()
    keras_dst.sparsify(model, method)
    return models.compiled(model, optimizer)


def states(model):
    return [
        state
        for layer in model._flatten_layers()
        if hasattr(layer, "sparse_state")
        for state in layer.sparse_state.values()
    ]


def test_gradients():
    rng = np.random.default_rng(0)
    w, v, g = (rng.standard_normal((4, 3)).astype("float32") for _ in range(3))
    mask = rng.random((4, 3)) < 0.5

    def masked(w, v):
        state = {"scores": v, "mask": ops.convert_to_tensor(mask)}
        return OptG(0.5).apply(w, state, KERNEL)

    to_w, to_v = gradients(
        masked, [ops.convert_to_tensor(a) for a in (w, v)], ops.convert_to_tensor(g)
    )
    np.testing.assert_allclose(to_w, g * mask, rtol=1e-6)
    np.testing.assert_allclose(to_v, g * w, rtol=1e-6)


def test_an_eager_call_equals_predict():
    model = sparse(OptG(0.5), "sgd")
    found = ops.convert_to_numpy(model(x[:4]))
    np.testing.assert_allclose(found, model.predict(x[:4], verbose=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("epochs", [2, 10, 160])
def test_beta_is_the_slope_per_epoch(epochs):
    schedule = OptG(0.9, beta=1.0).schedule_over(epochs)
    assert schedule == Sigmoid(0.9, steepness=epochs)
    for epoch in (0.3 * epochs, 0.5 * epochs, 0.6 * epochs):
        plain = 1 / (1 + np.exp(-(epoch - epochs / 2)))
        assert schedule(epoch / epochs) == pytest.approx(
            0.9 * plain, abs=0.3 / epochs**2 + 0.25 / epochs
        )


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (160, Sigmoid(0.9, steepness=160)),
        (20, Sigmoid(0.9, steepness=20)),
        (19, Cubic(0.9, end=0.5)),
        (0.5, Cubic(0.9, end=0.5)),
        (None, Cubic(0.9, end=0.5)),
    ],
)
def test_a_short_training_ends_pruning_early(epochs, expected):
    assert OptG(0.9).schedule_over(epochs) == expected


def test_a_custom_schedule_is_not_changed():
    schedule = Sigmoid(0.9, begin_step=0, end_step=10)
    assert OptG(schedule).schedule_over(160) == schedule


@pytest.mark.parametrize(
    "make",
    [lambda: keras.optimizers.SGD(0.1), lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1)],
    ids=["sgd", "adamw"],
)
def test_scores_have_no_weight_decay(make):
    optimizer = make()
    optimizer.weight_decay = 0.1
    model = sparse(OptG(0.5), optimizer)
    model.fit(x, y, batch_size=32, epochs=1, verbose=0, callbacks=[SparseTraining()])
    for layer in model._flatten_layers():
        if hasattr(layer, "sparse_state"):
            assert not optimizer._use_weight_decay(layer.sparse_state["kernel"]["scores"])
            assert optimizer._use_weight_decay(layer._kernel)


def test_weight_decay_exemptions_of_the_user_are_kept():
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model = sparse(OptG(0.5), optimizer)
    model.fit(x, y, batch_size=32, epochs=1, verbose=0, callbacks=[SparseTraining()])
    for variable in model.trainable_variables:
        exempt = variable.path.endswith(("bias", "scores"))
        assert optimizer._use_weight_decay(variable) is not exempt, variable.path


@pytest.mark.parametrize(("sparsity", "rate"), [(0.3, 0.6), (0.0, 1e-9)])
def test_scores_move_by_the_rate_of_the_last_update(sparsity, rate):
    w = ops.ones((2, 2))
    state = {
        "scores": ops.convert_to_tensor([[5.0, 1.0], [3.0, 4.0]]),
        "anchor": ops.ones((2, 2)),
        "rate": ops.convert_to_tensor(0.5),
        "mask": ops.ones((2, 2), "bool"),
    }
    from keras_dst.methods.base import ScheduleState

    now = ScheduleState(
        ops.convert_to_tensor(7), ops.convert_to_tensor(0.5), ops.convert_to_tensor(sparsity)
    )
    (change,) = OptG(0.5).update([w], [state], [KERNEL], ops.convert_to_tensor([2]), now)
    found = {k: ops.convert_to_numpy(v) for k, v in change.items()}
    np.testing.assert_allclose(found["scores"], [[3, 1], [2, 2.5]])
    np.testing.assert_array_equal(found["mask"], [[True, False], [False, True]])
    assert found["rate"] == pytest.approx(rate)


def test_an_update_sets_the_anchor_to_the_scores():
    model = sparse(OptG(0.5, frequency=2), "sgd")
    for _ in range(2):  # The second `fit` passes all variables of OptG to the training step again.
        model.fit(x, y, batch_size=32, epochs=2, verbose=0, callbacks=[SparseTraining(epochs=4)])
    for state in states(model):
        scores, anchor = (ops.convert_to_numpy(state[n]) for n in ("scores", "anchor"))
        assert np.any(scores)
        np.testing.assert_array_equal(anchor, scores)


def test_fit_without_the_callback_raises():
    model = sparse(OptG(0.5), "sgd")
    with pytest.raises(ValueError, match="SparseTraining"):
        model.fit(x, y, verbose=0)


def test_a_second_fit_without_the_callback_raises():
    model = sparse(OptG(0.5), "sgd")
    model.fit(x, y, verbose=0, callbacks=[SparseTraining()])
    with pytest.raises(ValueError, match="SparseTraining"):
        model.fit(x, y, verbose=0)
    model.fit(x, y, verbose=0, callbacks=[SparseTraining()])


def test_zero_sparsity_prunes_nothing():
    model = sparse(OptG(0.0), "sgd")
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[SparseTraining()])
    assert history.history["sparsity"] == [0.0, 0.0]
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0}, "beta must be a number > 0. Received: 0"),
        (
            {"beta": 1.0, "sparsity": Constant(0.9)},
            "own curve. Received: sparsity=",
        ),
        ({"sparsity": 1.0}, "sparsity"),
        ({"frequency": "day"}, "frequency"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        OptG(**{"sparsity": 0.9, **arguments})
