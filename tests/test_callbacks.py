"""Tests of `SparseTraining`: schedules, logs, final projection, errors and warnings."""

import functools

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst._training.drivers import drivers_of
from keras_dst.callbacks import SparseTraining
from keras_dst.methods import DST, Magnitude
from keras_dst.schedules import Constant, Cubic
from tests import models
from tests.backends import every

pytestmark = every(64)

x, y = models.data(size=128)


def sparse(method):
    keras.utils.set_random_seed(0)
    model = models.residual()
    if isinstance(method, DST):
        keras_dst.sparsify(model, method)
        return models.compiled(model)
    return models.compiled(model, keras_dst.SparseOptimizer("adam", method))


class Record(keras.callbacks.Callback):
    """Callback that records the logged sparsity after every step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(logs["sparsity"])


def test_sparsity_follows_the_cubic_schedule_of_the_paper():
    method = Magnitude(Cubic(0.8, begin=0.25, end=0.75), frequency=1)
    model, record = sparse(method), Record()
    model.fit(x, y, batch_size=16, epochs=5, verbose=0, callbacks=[SparseTraining(), record])
    size = sum(np.prod(k.shape) for k in model.optimizer.kernels)
    steps = 5 * 8
    for step, seen in enumerate(record.seen, start=1):
        progress = min(max((step - steps / 4) / (steps / 2), 0), 1)
        expected = 0.8 * (1 - (1 - progress) ** 3)
        assert seen == pytest.approx(round(expected * size) / size, abs=1.01 / size), step


def test_a_short_training_is_pruned():
    # The training run has 96 steps. If masks were updated every 100 steps, as in tfmot, no mask
    # would be updated.
    model = sparse(Magnitude(0.9))
    history = model.fit(x, y, batch_size=8, epochs=6, verbose=0, callbacks=[SparseTraining()])
    assert history.history["sparsity"][-1] == pytest.approx(0.9, abs=1e-3)
    assert keras_dst.report(model).sparsity == pytest.approx(0.9, abs=1e-3)
    assert len(set(history.history["sparsity"])) > 3


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="only PyTorch wraps the step to compile it"
)
def test_fit_keeps_the_torch_compile_wrapper_of_the_step(monkeypatch):
    # `fit` adds a guard around the training step. The next call of `fit` removes the guard, but
    # must keep the wrapper of `torch.compile`.
    import torch

    steps = []

    def stand_in(step):  # Replacement for `torch.compile`, which would take a minute.
        @functools.wraps(step)
        def compiled(data):
            steps.append(1)
            return step(data)

        return compiled

    monkeypatch.setattr(torch, "compile", stand_in)
    model = sparse(Magnitude(0.5))
    model.compile(model.optimizer, "sparse_categorical_crossentropy", jit_compile=True)
    for _ in range(2):
        model.fit(x, y, batch_size=64, verbose=0, callbacks=[SparseTraining()])
    assert len(steps) == 4


def test_training_with_one_batch_per_epoch():
    model = sparse(Magnitude(0.5))
    history = model.fit(x, y, batch_size=len(x), epochs=1, verbose=0, callbacks=[SparseTraining()])
    assert history.history["sparsity"] == pytest.approx([0.5], abs=1e-3)


# Keras warns that the generator has no more batches.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_generator_of_unknown_length_needs_steps_per_epoch():
    def batches():
        for start in range(0, len(x), 16):
            yield x[start : start + 16], y[start : start + 16]

    model = sparse(Magnitude(0.8))
    with pytest.raises(ValueError, match="steps_per_epoch"):
        model.fit(batches(), shuffle=False, verbose=0, callbacks=[SparseTraining()])
    driver = SparseTraining(steps_per_epoch=8)
    history = model.fit(batches(), shuffle=False, verbose=0, callbacks=[driver])
    assert history.history["sparsity"] == pytest.approx([0.8], abs=1e-3)


def test_the_progress_bar_shows_the_sparsity(capsys):
    sparse(Magnitude(0.5)).fit(x, y, epochs=1, verbose=2, callbacks=[SparseTraining()])
    assert "sparsity: 0.5" in capsys.readouterr().out


def test_a_checkpoint_of_the_last_epoch_has_the_target_sparsity(tmp_path):
    model = sparse(Magnitude(0.8))
    path = tmp_path / "last.keras"
    callbacks = [SparseTraining(), keras.callbacks.ModelCheckpoint(path)]
    model.fit(x, y, epochs=3, verbose=0, callbacks=callbacks)
    loaded = keras.saving.load_model(path)
    assert keras_dst.report(loaded).sparsity == pytest.approx(0.8, abs=1e-3)


def test_the_controller_reaches_its_target():
    """If DST had missed the target by more than 1 % in the last step, `fit` would warn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = (digits.data / 16).astype("float32"), digits.target
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(100, "relu"), keras.layers.Dense(10, "softmax")]
    )
    keras_dst.sparsify(model, DST(sparsity=0.9))
    models.compiled(model, keras.optimizers.SGD(0.05, momentum=0.9), metrics=["accuracy"])
    record = Record()
    history = model.fit(
        images, labels, batch_size=32, epochs=12, verbose=0, callbacks=[SparseTraining(), record]
    )
    assert np.median(np.abs(np.array(record.seen[len(record.seen) * 3 // 4 :]) - 0.9)) < 0.01
    assert history.history["accuracy"][-1] > 0.95


def test_the_last_projection_reaches_a_missed_target_with_a_warning():
    model = sparse(DST(sparsity=0.9))
    with pytest.warns(UserWarning, match=r"reached sparsity 0\.\d+, but the target is 0\.9"):
        history = model.fit(x, y, epochs=1, verbose=0, callbacks=[SparseTraining()])
    assert history.history["sparsity"][-1] == pytest.approx(0.9, abs=0.01)


def test_a_training_that_ends_early_warns():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    model = sparse(Magnitude(0.9))
    with pytest.warns(UserWarning, match=r"ended after 4 of the 40 steps"):
        model.fit(x, y, epochs=10, verbose=0, callbacks=[SparseTraining(), Stop()])
    history = model.fit(x, y, epochs=9, verbose=0, callbacks=[SparseTraining()])
    assert history.history["sparsity"][-1] == pytest.approx(0.9, abs=1e-3)


def test_training_resumed_from_a_backup_equals_an_uninterrupted_run(tmp_path):
    class Crash(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def train(*extra):
        model = sparse(Magnitude(0.8, revival=True))
        callbacks = [SparseTraining(), keras.callbacks.BackupAndRestore(tmp_path / "b"), *extra]
        model.fit(x, y, epochs=5, shuffle=False, verbose=0, callbacks=callbacks)
        return models.arrays(model.variables)

    plain = sparse(Magnitude(0.8, revival=True))
    plain.fit(x, y, epochs=5, shuffle=False, verbose=0, callbacks=[SparseTraining()])
    with pytest.raises(KeyboardInterrupt):
        train(Crash())
    resumed = train()
    for a, b in zip(models.arrays(plain.variables), resumed):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", [Magnitude(0.9), DST(sparsity=0.9)], ids=["magnitude", "dst"])
def test_fit_without_epochs_does_not_prune(method):
    model = sparse(method)
    before = models.arrays(model.variables)
    model.fit(x, y, epochs=0, verbose=0, callbacks=[SparseTraining()])
    for old, new in zip(before, models.arrays(model.variables)):
        np.testing.assert_array_equal(new, old)
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[SparseTraining(epochs=4)])
    assert history.history["sparsity"][-1] < 0.89


@every(1)
@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras rejects steps_per_execution on PyTorch"
)
@pytest.mark.parametrize("repeats", [False, True])
def test_steps_are_counted_if_steps_per_execution_does_not_divide_the_epoch(repeats):
    def batches():
        while True:
            yield x[:16], y[:16]

    model = sparse(Magnitude(0.8))
    models.compiled(model, model.optimizer, steps_per_execution=3)
    data = {"x": batches(), "steps_per_epoch": 8} if repeats else {"x": x, "y": y, "batch_size": 16}
    model.fit(**data, epochs=2, shuffle=False, verbose=0, callbacks=[SparseTraining()])
    # If the data repeat, Keras trains three batches in each of the three executions.
    assert int(model.optimizer.step) == int(model.optimizer.iterations) == (18 if repeats else 16)


def test_an_unfrozen_layer_continues_the_schedule():
    model = sparse(DST(sparsity=0.9))
    frozen = next(layer for layer in model.layers if layer.weights)
    frozen.trainable = False
    models.compiled(model)
    model.fit(x, y, epochs=1, verbose=0, callbacks=[SparseTraining(epochs=9)])
    frozen.trainable = True
    models.compiled(model)
    (driver,) = drivers_of(model)
    assert driver.read_progress() == (4, 36)


class TestErrors:
    def test_fit_of_a_dense_model_raises(self):
        model = models.compiled(models.residual())
        with pytest.raises(ValueError, match="with sparse layers or a SparseOptimizer"):
            model.fit(x, y, verbose=0, callbacks=[SparseTraining()])

    def test_sparse_models_without_the_callback_raise(self):
        with pytest.raises(ValueError, match="SparseTraining"):
            sparse(Magnitude(0.5)).fit(x, y, verbose=0)
        with pytest.raises(ValueError, match="SparseTraining"):
            sparse(DST(sparsity=0.5)).fit(x, y, verbose=0)

    def test_dst_without_a_target_needs_no_callback(self):
        sparse(DST()).fit(x, y, verbose=0)

    @pytest.mark.parametrize("epochs", [0, 1.5, "ten"])
    def test_invalid_epochs_raise(self, epochs):
        with pytest.raises(ValueError, match="whole number"):
            SparseTraining(epochs=epochs)


def test_constant_schedule_starts_at_the_first_step():
    model, record = sparse(Magnitude(Constant(0.6))), Record()
    model.fit(x, y, epochs=1, verbose=0, callbacks=[SparseTraining(), record])
    assert record.seen[0] == pytest.approx(0.6, abs=1e-3)
