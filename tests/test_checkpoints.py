"""Tests of checkpoints: each file is sparse and complete, and the best file meets the target."""

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst.callbacks import SparseTraining
from keras_dst.methods import DCIL, DST, LayerMethod
from tests import stop_worker
from tests.backends import every, heavy, once, slow
from tests.stop_worker import ALL_METHODS, x, y

pytestmark = every(32)


class Logged(keras.callbacks.Callback):
    """Callback that records the sparsity by (epoch, batch), both counted from 1."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch + 1

    def on_train_batch_end(self, batch, logs=None):
        self.seen[self.epoch, batch + 1] = keras_dst.report(self.model).sparsity

    def on_epoch_end(self, epoch, logs=None):
        self.seen[self.epoch, 0] = found = keras_dst.report(self.model).sparsity
        # Weights that RigL grows start at 0, so the model can have more zeros than the masks.
        assert logs["sparsity"] - 0.01 <= found <= logs["sparsity"] + 0.1


@every(16)
@pytest.mark.parametrize(
    ("name", "ending", "save_freq"),
    [
        ("dst-target", "keras", "epoch"),
        ("rigl", "weights.h5", 9),
        pytest.param("dst-target", "weights.h5", 9, marks=slow),
        pytest.param("rigl", "keras", "epoch", marks=slow),
    ],
)
def test_every_checkpoint_has_the_logged_sparsity(name, ending, save_freq, tmp_path):
    method = ALL_METHODS[name]
    model = stop_worker.build(method)
    place = "{epoch}" if save_freq == "epoch" else "{epoch}-{batch}"
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / f"{place}.{ending}",
        save_freq=save_freq,
        save_weights_only=ending == "weights.h5",
    )
    logged = Logged()
    stop_worker.fit(model, SparseTraining(), checkpoint, logged)
    files = sorted(tmp_path.iterdir())
    steps = stop_worker.EPOCHS * stop_worker.STEPS
    assert len(files) == (stop_worker.EPOCHS if save_freq == "epoch" else steps // 9)
    found = []
    for file in files:
        if ending == "keras":
            model = keras.saving.load_model(file)
        else:
            model.load_weights(file)
        moment = (*map(int, file.name.split(".")[0].split("-")), 0)[:2]
        found.append(keras_dst.report(model).sparsity)
        assert found[-1] == logged.seen[moment]
    assert max(found) > (0.01 if method.learned else 0.7)


@heavy
@pytest.mark.parametrize(
    ("monitor", "first"),
    [
        ("val_loss", True),
        pytest.param("val_accuracy", False, marks=slow),
        pytest.param("loss", True, marks=once),
    ],
)
def test_the_best_checkpoint_has_the_target_sparsity(monitor, first, tmp_path):
    """Early stopping waits for the target sparsity, in any order of the callbacks."""
    model = build_with_accuracy(ALL_METHODS["optg"])
    sparse = SparseTraining(metric_at_target=monitor)
    gated = f"{monitor}_at_target"
    mode = "max" if "accuracy" in monitor else "min"
    path = tmp_path / "best.keras"
    others = [
        keras.callbacks.ModelCheckpoint(path, gated, mode=mode, save_best_only=True),
        keras.callbacks.EarlyStopping(gated, mode=mode, patience=0),
    ]
    callbacks = [sparse, *others] if first else [*others, sparse]
    history = model.fit(
        x,
        y,
        batch_size=stop_worker.BATCH,
        epochs=20,
        shuffle=False,
        verbose=0,
        validation_data=(x, y),
        callbacks=callbacks,
    ).history
    at_target = np.array(history["sparsity"]) > 0.8 - 0.004
    assert not at_target[:5].any()
    values, gates = np.array(history[monitor]), np.array(history[gated])
    np.testing.assert_array_equal(gates[at_target], values[at_target])
    assert (np.abs(gates[~at_target]) > 1e20).all()
    better = np.less if mode == "min" else np.greater
    assert better(gates[1:], gates[:-1])[: at_target.argmax()].all()
    assert at_target[-1]
    loaded = keras.saving.load_model(path)
    assert keras_dst.report(loaded).sparsity == pytest.approx(0.8, abs=0.01)


def build_with_accuracy(method):
    model = stop_worker.build(method)
    jit = {"jit_compile": False} if keras.backend.backend() == "tensorflow" else {}
    loss = "sparse_categorical_crossentropy"
    model.compile(model.optimizer, loss, metrics=["accuracy"], **jit)
    return model


class TestGateErrors:
    def fit(self, method="magnitude", metric="accuracy", **arguments):
        model = build_with_accuracy(ALL_METHODS[method])
        callbacks = [SparseTraining(**arguments)]
        model.fit(x, y, validation_data=(x, y), verbose=0, callbacks=callbacks)

    @every(16)
    @pytest.mark.parametrize("gate", ["f1", "val_f1"])
    def test_an_unknown_metric_raises(self, gate):
        with pytest.raises(ValueError, match=r"not among the metrics\. Expected one of: accuracy"):
            self.fit(metric_at_target=gate)

    def test_a_method_without_a_target_raises(self):
        with pytest.raises(ValueError, match="needs a target"):
            self.fit("dst", metric_at_target="val_loss")

    def test_an_invalid_metric_mode_raises(self):
        with pytest.raises(ValueError, match="metric_mode must be"):
            SparseTraining(metric_at_target="loss", metric_mode="auto")

    def test_a_metric_without_a_direction_needs_metric_mode(self):
        model = stop_worker.build(ALL_METHODS["magnitude"])
        mean = keras.metrics.MeanMetricWrapper(lambda y, p: keras.ops.max(p, -1), name="own")
        model.compile(model.optimizer, "sparse_categorical_crossentropy", metrics=[mean])
        with pytest.raises(ValueError, match="metric_mode"):
            model.fit(x, y, verbose=0, callbacks=[SparseTraining(metric_at_target="own")])

    def test_a_fit_without_validation_data_warns(self):
        model = stop_worker.build(ALL_METHODS["magnitude"])
        with pytest.warns(UserWarning, match="pass validation_data to fit"):
            model.fit(x, y, verbose=0, callbacks=[SparseTraining(metric_at_target="val_loss")])


@every(16)
@pytest.mark.parametrize("ending", ["keras", "weights.h5"])
def test_an_interrupted_save_keeps_the_previous_file(ending, tmp_path, monkeypatch):
    path = tmp_path / f"model.{ending}"
    only = ending == "weights.h5"
    method = ALL_METHODS["magnitude"]

    class CutShort(keras.callbacks.Callback):
        """Callback that raises an interrupt while the file of the third epoch is written."""

        def on_epoch_end(self, epoch, logs=None):
            if epoch != 2:
                return
            before = path.read_bytes()

            def half(filepath, **kwargs):
                filepath.write_bytes(before[: len(before) // 2])
                raise KeyboardInterrupt

            for name in ("save", "save_weights"):
                monkeypatch.setattr(getattr(self.model, name), "inner", half)

    model = stop_worker.build(method)
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_weights_only=only)
    with pytest.raises(KeyboardInterrupt):
        stop_worker.fit(model, SparseTraining(), CutShort(), checkpoint)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    resumed = stop_worker.build(method)
    resumed.optimizer.build(resumed.trainable_variables)
    if only:
        resumed.load_weights(path)
    else:
        resumed = keras.saving.load_model(path)
    assert int(resumed.optimizer.iterations) == 2 * stop_worker.STEPS


@every(16)
@pytest.mark.parametrize("name", ["dst-target", "magnitude"])
def test_a_model_can_be_saved_after_an_interrupted_fit(name, tmp_path):
    """After an interrupted `fit`, the model can be saved. Another `fit` without the callback raises
    an error."""

    class Crash(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    method = ALL_METHODS[name]
    model = stop_worker.build(method)
    sparse = SparseTraining()
    with pytest.raises(KeyboardInterrupt):
        stop_worker.fit(model, sparse, Crash())
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="SparseTraining"):
        stop_worker.fit(model)
    # A training step that is compiled again must also raise an error.
    if isinstance(method, LayerMethod):
        model.compile("sgd", "sparse_categorical_crossentropy")
        with pytest.raises(ValueError, match="SparseTraining"):
            stop_worker.fit(model)
    with pytest.raises(ValueError, match="SparseTraining"):
        stop_worker.fit(stop_worker.build(method))
    # On JAX, variables lose their values if tracing raises an error, so load the model again.
    model = keras.saving.load_model(tmp_path / "model.keras")
    stop_worker.fit(model, SparseTraining())
    assert keras_dst.report(model).sparsity > 0.6


def test_dst_without_a_target_needs_no_callback_in_a_second_fit():
    model = stop_worker.build(DST())
    stop_worker.fit(model, SparseTraining())
    stop_worker.fit(model)


def test_training_continues_after_an_h5_file_is_loaded(tmp_path):
    """Keras loads no optimizer variables from an .h5 file, so `fit` builds the optimizer again."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(32), keras.layers.Dense(2, "softmax")]
    )
    keras_dst.sparsify(model, DCIL(0.8))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.save(tmp_path / "model.h5")
    loaded = keras.saving.load_model(tmp_path / "model.h5")
    data = np.random.default_rng(0).standard_normal((64, 16))
    logs = loaded.fit(data, data[:, 0] > 0, epochs=2, verbose=0, callbacks=[SparseTraining()])
    assert logs.history["sparsity"][-1] == pytest.approx(0.8, abs=0.01)
