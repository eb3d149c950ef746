"""Tests of SparsityTensorBoard: TensorBoard reads the written files."""

import sys

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keras_dst import SparseOptimizer, layers, sparsify
from keras_dst.callbacks import SparseTraining, SparsityTensorBoard
from keras_dst.methods import DST, Consensus, FlipOut, Magnitude, OptG, RigL
from tests import models
from tests.backends import every, once

pytestmark = every(16)


class Note(keras.callbacks.Callback):
    """Callback that records the masks after every batch."""

    def __init__(self, read):
        super().__init__()
        self.read, self.masks = read, []

    def on_epoch_begin(self, epoch, logs=None):
        if not self.masks:
            self.note()

    def on_train_batch_end(self, batch, logs=None):
        self.note()

    def note(self):
        _ = self.model
        self.masks.append([np.array(keras.ops.convert_to_numpy(m)) for m in self.read()])


def net():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Flatten(),
            keras.layers.Dense(6, "relu", name="body"),
            keras.layers.Dense(2, "softmax", name="head"),
        ],
        name="net",
    )


BODY, HEAD = "net/body/kernel", "net/head/kernel"


def fitted(model, folder, optimizer=None, epochs=2, first=(), **kwargs):
    """Fit with 4 batches per epoch; return the history and the events that TensorBoard reads."""
    models.compiled(model, optimizer, metrics=["accuracy"])
    board = SparsityTensorBoard(folder, **kwargs)
    callbacks = [SparseTraining(), board, *first]
    history = model.fit(
        *models.data(size=64), batch_size=16, epochs=epochs, verbose=0, callbacks=callbacks
    )
    return history.history, read(folder)


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def scalars(events, tag):
    return {event.step: event.value for event in events.Scalars(tag)}


def test_logs_of_an_update_method(tmp_path):
    optimizer = SparseOptimizer("sgd", FlipOut(0.8, noise=0))
    note = Note(lambda: [state["mask"] for state in optimizer.states])
    history, events = fitted(net(), tmp_path, optimizer, update_freq=2, first=[note])
    assert list(scalars(events, "density")) == [2, 4, 6, 8]
    for i, name in enumerate([BODY, HEAD]):
        for step in (2, 4, 6, 8):
            now, before = note.masks[step][i], note.masks[step - 2][i]
            assert scalars(events, f"density/{name}")[step] == pytest.approx(now.mean())
            changed = scalars(events, f"mask_changes/{name}")[step]
            assert changed == pytest.approx((now != before).mean())
    now, before = (np.concatenate([m.ravel() for m in note.masks[n]]) for n in (8, 6))
    assert (
        scalars(events, "density")[8] == pytest.approx(now.mean()) == pytest.approx(0.2, abs=0.01)
    )
    assert scalars(events, "mask_changes")[8] == pytest.approx((now != before).mean())
    assert sum(scalars(events, "mask_changes").values()) == pytest.approx(0.8, abs=0.01)
    flips = events.Histograms(f"flips/{BODY}")[-1].histogram_value
    assert flips.num == note.masks[8][0].sum()
    assert flips.sum == optimizer.states[0]["flips"].numpy().sum()
    assert scalars(events, "epoch/loss") == pytest.approx(dict(zip([4, 8], history["loss"])))


def test_logs_of_a_layer_method_per_epoch(tmp_path):
    model = net()
    sparsify(model, DST(alpha=0.1))
    history, events = fitted(model, tmp_path)
    assert list(scalars(events, "density")) == [0, 1]
    assert scalars(events, "density")[1] == pytest.approx(1 - history["sparsity"][1], abs=1e-6)
    assert scalars(events, "epoch/sparsity")[1] == pytest.approx(history["sparsity"][1])
    threshold = model.get_layer("body").sparse_state["kernel"]["threshold"].numpy()
    written = events.Histograms(f"threshold/{BODY}")[-1].histogram_value
    assert (written.num, written.sum) == (6, pytest.approx(threshold.sum(), rel=1e-5))
    kept = np.abs(model.get_layer("body")._kernel.numpy()) > threshold
    assert scalars(events, f"density/{BODY}")[1] == pytest.approx(kept.mean())


@once
@pytest.mark.parametrize(
    ("method", "title"),
    [(OptG(0.5), "scores"), (DST(granularity="layer"), "threshold"), (Consensus(0), "gate")],
)
def test_logs_of_learned_state(method, title, tmp_path):
    model = net()
    sparsify(model, method, filters="body")
    _, events = fitted(model, tmp_path, epochs=1)
    kind = "scalars" if title == "threshold" else "histograms"
    assert f"{title}/{BODY}" in events.Tags()[kind]
    assert f"density/{HEAD}" not in events.Tags()["scalars"]


@once
def test_logs_of_a_gate_without_histograms(tmp_path):
    inputs = keras.Input((8, 8, 3))
    x = layers.Gate(dependent=True, method=Consensus(0), name="gate")(inputs)
    outputs = keras.layers.Dense(2, "softmax")(keras.layers.Flatten()(x))
    _, events = fitted(keras.Model(inputs, outputs), tmp_path, epochs=1, histograms=False)
    assert "density/gate/mean" in events.Tags()["scalars"]
    assert events.Tags()["histograms"] == []


@once
def test_logs_of_mask_changes_at_constant_density(tmp_path):
    _, events = fitted(net(), tmp_path, SparseOptimizer("sgd", RigL(0.5, frequency=1)), epochs=3)
    assert list(scalars(events, "density").values()) == pytest.approx([0.5] * 3, abs=0.01)
    assert scalars(events, "mask_changes")[1] > 0


@once
def test_metrics_before_the_target_are_not_logged(tmp_path):
    model = models.compiled(net(), SparseOptimizer("sgd", Magnitude(0.5)), metrics=["accuracy"])
    callbacks = [SparsityTensorBoard(tmp_path), SparseTraining(metric_at_target="val_accuracy")]
    data = models.data(size=64)
    callbacks.reverse()
    model.fit(*data, validation_data=data, epochs=4, verbose=0, callbacks=callbacks)
    at_target = scalars(read(tmp_path), "epoch/val_accuracy_at_target")
    assert 3 in at_target
    assert 0 not in at_target
    assert all(0 <= value <= 1 for value in at_target.values())


@once
def test_logs_of_two_weights_with_equal_paths(tmp_path):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Flatten()(inputs)
    twins = [keras.Sequential([keras.layers.Dense(2, name="same")], name="one") for _ in range(2)]
    for i, twin in enumerate(twins):
        x = twin(x)
        twin.name = f"number_{i}"
    model = keras.Model(inputs, keras.layers.Softmax()(x))
    _, events = fitted(model, tmp_path, SparseOptimizer("sgd", Magnitude(0.5)), epochs=1)
    found = [tag for tag in events.Tags()["scalars"] if tag.startswith("density/")]
    assert found == ["density/one/same/kernel", "density/one/same/kernel_1"]


@once
def test_logs_are_kept_after_a_failed_fit(tmp_path):
    class Fails(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fitted(net(), tmp_path, SparseOptimizer("sgd", Magnitude(0.5)), first=[Fails()])
    assert list(scalars(read(tmp_path), "density")) == [0, 1]


@once
def test_a_second_fit_continues_the_logs(tmp_path):
    optimizer = SparseOptimizer("sgd", Magnitude(0.5))
    model = net()
    fitted(model, tmp_path, optimizer, epochs=1)
    callbacks = [SparseTraining(), SparsityTensorBoard(tmp_path)]
    model.fit(*models.data(), initial_epoch=1, epochs=2, verbose=0, callbacks=callbacks)
    assert len(list(tmp_path.iterdir())) == 2
    events = read(tmp_path)
    assert list(scalars(events, "density")) == [0, 1]
    assert scalars(events, "mask_changes")[1] == 0


@once
class TestErrors:
    @pytest.mark.parametrize("wrong", [0, -1, 1.5, "batch", True, None])
    def test_an_invalid_update_freq_raises(self, wrong, tmp_path):
        with pytest.raises(ValueError, match="update_freq must be 'epoch' or a whole number"):
            SparsityTensorBoard(tmp_path, update_freq=wrong)

    def test_a_dense_model_raises(self, tmp_path):
        with pytest.raises(ValueError, match="SparsityTensorBoard found no sparse weights"):
            models.compiled(net()).fit(
                *models.data(), verbose=0, callbacks=[SparsityTensorBoard(tmp_path / "logs")]
            )
        assert not (tmp_path / "logs").exists()

    def test_a_missing_tensorboardx_raises(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
        with pytest.raises(ImportError, match=r"pip install keras_dst\[tensorboard\]"):
            SparsityTensorBoard(tmp_path)


def test_a_metric_with_one_value_per_class_is_logged_per_class(tmp_path):
    model = net()
    optimizer = SparseOptimizer("sgd", Magnitude(0.8))
    f1 = keras.metrics.F1Score(name="f1")
    model.compile(optimizer, "categorical_crossentropy", metrics=[f1])
    x, y = models.data(size=16)
    callbacks = [SparseTraining(), SparsityTensorBoard(tmp_path)]
    history = model.fit(x, np.eye(2)[y], batch_size=16, verbose=0, callbacks=callbacks)
    events = read(tmp_path)
    written = [scalars(events, f"epoch/f1/{i}")[0] for i in range(2)]
    np.testing.assert_allclose(written, np.ravel(history.history["f1"][0]))
