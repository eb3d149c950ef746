"""Tests that `fit` restores the patched methods of a model, even after an error."""

import functools

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst.callbacks import BackupAndRestore, SparseTraining
from keras_dst.methods import DCIL, Magnitude
from keras_dst.schedules import Cubic
from tests import models
from tests.backends import every, slow

pytestmark = every(32)

PATCHED = ("save", "save_weights", "evaluate", "compute_loss")
x, y = models.data(size=32)


def sparse(method):
    keras.utils.set_random_seed(0)
    model = models.residual()
    if isinstance(method, Magnitude):
        return models.compiled(model, keras_dst.SparseOptimizer("sgd", method))
    keras_dst.sparsify(model, method)
    return models.compiled(model, "sgd")


def fit(model, *callbacks):
    sparse_training = SparseTraining(metric_at_target="val_loss")
    return model.fit(
        x,
        y,
        batch_size=16,
        epochs=3,
        verbose=0,
        validation_data=(x, y),
        callbacks=[sparse_training, *callbacks],
    )


def own_attributes(model):
    """Return a model's patched and added attributes, and a flag that Keras stores in the model."""
    own = vars(model)
    names = {name for name in own if name in PATCHED or "keras_dst" in name}
    return names, own["_compute_loss_has_training_arg"]


class Interrupt(keras.callbacks.Callback):
    """Callback that raises an error in one hook, after it has recorded the patched attributes of
    the model."""

    def __init__(self, hook, error, epoch):
        super().__init__()
        self.error, self.epoch, self.seen = error, epoch, None
        setattr(self, hook, self.interrupt)

    def on_epoch_begin(self, epoch, logs=None):
        self.current = epoch

    def interrupt(self, epoch=None, logs=None):
        if getattr(self, "current", 0) == self.epoch:
            self.seen = own_attributes(self.model)
            raise self.error("interrupted")


@pytest.fixture(scope="module", params=[Magnitude(0.8), DCIL(0.8)], ids=["magnitude", "dcil"])
def model(request):
    """Return one model for all tests, so that `fit` is called several times, as in a notebook."""
    return sparse(request.param)


@every(40)
@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(ValueError, marks=slow)])
@pytest.mark.parametrize(
    ("hook", "epoch"),
    [
        ("on_train_begin", 0),
        ("on_train_batch_begin", 0),
        ("on_train_batch_end", 0),
        ("on_train_batch_end", 1),
        ("on_test_batch_end", 1),
        ("on_epoch_end", 1),
        ("on_train_end", 2),
    ],
)
def test_an_interrupted_fit_restores_the_model(hook, epoch, error, model):
    interrupt = Interrupt(hook, error, epoch)
    before = own_attributes(model)[1]
    with pytest.raises(error, match="interrupted"):
        fit(model, interrupt)
    assert own_attributes(model) == (set(), before)
    # When the callback interrupted `fit`, the methods of the model were still patched.
    if hook.endswith("_end"):
        assert {"save", "save_weights", "evaluate"} <= interrupt.seen[0]
    assert model.save.__func__ is keras.Model.save
    history = fit(model)
    assert own_attributes(model) == (set(), before)
    assert not {"on_train_end"} & set(vars(history))
    assert np.isfinite(history.history["loss"]).all()


def test_methods_are_restored_before_an_exception_is_handled(model, tmp_path):
    try:
        fit(model, Interrupt("on_epoch_end", KeyboardInterrupt, 1))
    except KeyboardInterrupt:
        model.save(tmp_path / "interrupted.keras")
        logs = model.evaluate(x, y, verbose=0, return_dict=True)
    assert "loss_at_target" not in logs
    assert [file.name for file in tmp_path.iterdir()] == ["interrupted.keras"]
    assert not own_attributes(model)[0]


def test_a_training_loop_after_an_interrupted_fit_updates_the_masks():
    model = sparse(Magnitude(Cubic(0.8, begin_step=2, end_step=8), frequency=1))
    with pytest.raises(KeyboardInterrupt):
        fit(model, Interrupt("on_train_batch_end", KeyboardInterrupt, 0))
    for _ in range(8):
        model.train_on_batch(x, y)
    assert keras_dst.report(model).sparsity == pytest.approx(0.8, abs=1e-3)


def test_a_training_loop_after_an_interrupted_fit_needs_the_callback():
    model = sparse(DCIL(0.8))
    with pytest.raises(KeyboardInterrupt):
        fit(model, Interrupt("on_train_batch_end", KeyboardInterrupt, 0))
    assert not any(getattr(layer, "driver_active", False) for layer in model.layers)
    with pytest.raises(ValueError, match="SparseTraining"):
        model.train_on_batch(x, y)


def test_an_error_in_the_training_step_restores_the_model():
    model = sparse(Magnitude(0.8))

    def fails(y_true, y_pred):
        raise ValueError("in the loss")

    model.compile(model.optimizer, fails)
    with pytest.raises(ValueError, match="in the loss"):
        model.fit(x, y, verbose=0, callbacks=[SparseTraining()])
    assert not own_attributes(model)[0]


def test_methods_replaced_by_the_user_are_restored(tmp_path):
    model = sparse(Magnitude(0.8))
    vars(model)["save"] = own = functools.partial(keras.Model.save, model)
    callbacks = [SparseTraining(), keras.callbacks.ModelCheckpoint(tmp_path / "model.keras")]
    model.fit(x, y, verbose=0, callbacks=callbacks)
    assert vars(model)["save"] is own


def test_the_backup_callback_leaves_no_attributes_on_the_model(tmp_path):
    model = models.compiled(models.residual(), "sgd")
    step = model.make_train_function() or model.train_function
    model.fit(x, y, verbose=0, callbacks=[BackupAndRestore(tmp_path / "backup")])
    assert not own_attributes(model)[0]
    assert not hasattr(model, "_initial_batch")
    assert model.train_function is step


def test_patches_apply_to_one_model_only():
    one, other = sparse(Magnitude(0.8)), sparse(Magnitude(0.5))
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(own_attributes(other)[0])
    )
    fit(one, look)
    assert seen
    assert not any(seen)
