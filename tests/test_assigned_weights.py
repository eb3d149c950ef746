"""Tests that masks are applied when other callbacks assign restored weights or moving averages."""

import warnings

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst import methods
from keras_dst.callbacks import SparseTraining
from tests import models
from tests.backends import every, slow

pytestmark = every(64)

METHODS = {
    "magnitude": methods.Magnitude(0.8),
    "revival": methods.Magnitude(0.8, revival=True),
    "blocks": methods.Magnitude(0.75, pattern="1x4"),
    "two-of-four": methods.Magnitude(0.5, pattern="2:4"),
    "flipout": methods.FlipOut(0.8),
    "rigl": methods.RigL(0.8),
    "optg": methods.OptG(0.8),
    "dcil": methods.DCIL(0.8),
    "dst": methods.DST(0.8),
    "consensus": methods.Consensus(0.5),
}
rng = np.random.default_rng(0)
x = rng.standard_normal((256, 16)).astype("float32")
y = (x[:, 0] > 0).astype("int32")
# `noise` contains random labels, which a model cannot learn. The validation loss is therefore
# lowest in an early epoch.
noise = rng.integers(0, 2, 64)


def sparse(method, **optimizer_options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(32),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(32, "relu"),
            keras.layers.Dense(2, "softmax"),
        ]
    )
    optimizer = keras.optimizers.Adam(0.01, **optimizer_options)
    if isinstance(method, methods.LayerMethod):
        keras_dst.sparsify(model, method)
    else:
        optimizer = keras_dst.SparseOptimizer(optimizer, method)
    return models.compiled(model, optimizer)


def fit(model, callbacks, epochs=8):
    """Train, and return the history and the user warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = model.fit(
            x,
            y,
            batch_size=32,
            epochs=epochs,
            verbose=0,
            validation_data=(x[:64], noise),
            callbacks=callbacks,
        )
    return history.history, [str(w.message) for w in caught if w.category is UserWarning]


def check_agreement(model, history, sparse_training, target, tolerance=0.02):
    """Check that the target is met, and that the logged sparsity equals the sparsity of the
    stripped model."""
    assert sparse_training.missed() == []
    assert history["sparsity"][-1] >= target - 0.01
    keras_dst.strip(model)
    # Weights that RigL grows start at 0, so the report may count more zeros than the masks have.
    found = keras_dst.report(model).sparsity
    assert found == pytest.approx(history["sparsity"][-1], abs=tolerance)


# If `first` is True, `SparseTraining` is the first callback. Otherwise, `SparseTraining` is the
# last callback. `make test` tests `first=False` with only one method, and skips two patterns.
BOTH_ORDERS = [
    pytest.param(
        name,
        first,
        marks=slow if name in ("blocks", "two-of-four") or (name != "dst" and not first) else (),
    )
    for name in METHODS
    for first in (True, False)
]


@every(48)
@pytest.mark.parametrize(("name", "first"), BOTH_ORDERS)
def test_restored_weights_are_pruned_again_with_a_warning(name, first):
    method = METHODS[name]
    model, sparse_training = sparse(method), SparseTraining()
    initial = model.get_weights()
    restore = keras.callbacks.LambdaCallback(on_train_end=lambda logs: model.set_weights(initial))
    history, messages = fit(
        model, [sparse_training, restore] if first else [restore, sparse_training]
    )
    found = [m for m in messages if "a callback assigned weights" in m]
    assert len(found) == 1
    assert "metric_at_target" in found[0]
    # The target of Consensus is a fraction of FLOPs, not of weights.
    if isinstance(method, methods.Consensus):
        check_agreement(model, history, sparse_training, 0, tolerance=0.05)
    else:
        check_agreement(model, history, sparse_training, method.schedule.sparsity)


@every(48)
@pytest.mark.parametrize("first", [True, pytest.param(False, marks=slow)])
@pytest.mark.parametrize("name", ["magnitude", "rigl", "optg", "dst"])
def test_early_stopping_with_restored_best_weights(name, first):
    method = METHODS[name]
    model, sparse_training = sparse(method), SparseTraining()
    early = keras.callbacks.EarlyStopping("val_loss", restore_best_weights=True, patience=100)
    callbacks = [sparse_training, early]
    history, _ = fit(model, callbacks if first else callbacks[::-1])
    assert np.argmin(history["val_loss"]) < 6
    check_agreement(model, history, sparse_training, method.schedule.sparsity)


@pytest.mark.parametrize("first", [True, pytest.param(False, marks=slow)])
@pytest.mark.parametrize("method", [methods.RigL(0.8), methods.SET(0.8)])
def test_restored_weights_that_are_sparser_than_the_target_raise_no_warning(method, first):
    """Weights that SET and RigL grow start at 0, so a model may have more zeros than its masks."""
    model, sparse_training = sparse(method), SparseTraining()
    kept = []

    def remember(epoch, logs):
        if epoch == 2:
            weights = model.get_weights()
            weights[0][:, ::8] = 0
            kept.extend(weights)

    restore = keras.callbacks.LambdaCallback(
        on_epoch_end=remember, on_train_end=lambda logs: model.set_weights(kept)
    )
    callbacks = [sparse_training, restore] if first else [restore, sparse_training]
    history, messages = fit(model, callbacks)
    assert messages == []
    assert history["sparsity"][-1] > 0.802
    check_agreement(model, history, sparse_training, 0.8, tolerance=1e-6)


@every(48)
@pytest.mark.parametrize("name", ["magnitude", "revival", "rigl", "flipout", "optg"])
def test_best_weights_at_the_target_are_restored_unchanged(name):
    """The restored weights fit the masks of the same epoch, so `SparseTraining` does not warn."""
    method = METHODS[name]
    model = sparse(method)
    sparse_training = SparseTraining(metric_at_target="val_loss")
    early = keras.callbacks.EarlyStopping(
        "val_loss_at_target", mode="min", restore_best_weights=True, patience=100
    )
    history, messages = fit(model, [sparse_training, early], epochs=12)
    assert not [m for m in messages if "assigned" in m]
    best = np.argmin(history["val_loss_at_target"])
    logs = model.evaluate(x[:64], noise, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(history["val_loss"][best], rel=1e-5)
    check_agreement(model, history, sparse_training, method.schedule.sparsity)


def test_early_stopping_keeps_the_sparsity_of_the_schedule():
    model, sparse_training = sparse(METHODS["magnitude"]), SparseTraining()
    early = keras.callbacks.EarlyStopping("val_loss", restore_best_weights=True, patience=1)
    history, messages = fit(model, [sparse_training, early], epochs=40)
    assert len(history["loss"]) < 30
    assert any("of the 320 steps" in m for m in messages)
    assert len(sparse_training.missed()) == 1
    keras_dst.strip(model)
    assert keras_dst.report(model).sparsity == pytest.approx(history["sparsity"][-1], abs=1e-3)


@every(32)
@pytest.mark.parametrize("first", [True, False])
def test_weights_assigned_during_training_are_masked(first, tmp_path):
    """Dense weights that a callback assigns are masked before validation and before saving."""
    model, sparse_training = sparse(METHODS["magnitude"]), SparseTraining()
    initial = model.get_weights()
    assign = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: assign.model.set_weights(initial),
        on_test_begin=lambda logs: assign.model.set_weights(initial),
    )
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_test_batch_end=lambda batch, logs: seen.append(keras_dst.report(look.model).sparsity)
    )
    save = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True)
    callbacks = [sparse_training, assign] if first else [assign, sparse_training]
    history, _ = fit(model, [*callbacks, look, save])
    check_agreement(model, history, sparse_training, 0.8)
    loaded = sparse(METHODS["magnitude"])
    loaded.optimizer.build(loaded.trainable_variables)
    for epoch, logged in enumerate(history["sparsity"], start=1):
        assert seen[2 * epoch - 1] == pytest.approx(logged, abs=1e-3)
        loaded.load_weights(tmp_path / f"{epoch}.weights.h5")
        assert keras_dst.report(loaded).sparsity == pytest.approx(logged, abs=1e-3)


@every(32)
@pytest.mark.parametrize("swap_on_epoch", [True, False])
@pytest.mark.parametrize("first", [True, pytest.param(False, marks=slow)])
def test_moving_averages_have_the_sparsity_of_the_weights(swap_on_epoch, first, tmp_path):
    model, sparse_training = sparse(METHODS["magnitude"], use_ema=True), SparseTraining()
    seen = []
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    look = keras.callbacks.LambdaCallback(
        on_test_batch_end=lambda batch, logs: seen.append(keras_dst.report(look.model).sparsity)
    )
    save = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    callbacks = [sparse_training, swap] if first else [swap, sparse_training]
    history, messages = fit(model, [*callbacks, look, save])
    assert not messages
    for epoch, logged in enumerate(history["sparsity"], start=1):
        assert seen[2 * epoch - 1] == pytest.approx(logged, abs=1e-3)
        loaded = keras.saving.load_model(tmp_path / f"{epoch}.keras")
        assert keras_dst.report(loaded).sparsity == pytest.approx(logged, abs=1e-3)
    check_agreement(model, history, sparse_training, 0.8)


@every(32)
@pytest.mark.parametrize("name", ["magnitude", "dst"])
def test_moving_averages_that_overwrite_the_weights_are_masked(name):
    method = METHODS[name]
    model = sparse(method, use_ema=True, ema_overwrite_frequency=5)
    sparse_training = SparseTraining()
    history, messages = fit(model, [sparse_training])
    assert not [m for m in messages if "assigned" in m]
    check_agreement(model, history, sparse_training, 0.8)
