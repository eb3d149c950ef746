"""Tests of searches with KerasTuner for small sparse networks."""

import importlib
import json
import sys

import keras
import keras_tuner
import numpy as np
import pytest
from keras import layers

import keras_dst
from keras_dst.export import ExportReport, FileReport
from keras_dst.methods import DST, Magnitude
from keras_dst.tuner import SparseHyperModel
from tests.backends import COMPILES, LONG, every, once
from tests.pages import blocks

# KerasTuner uses deprecated functions of `threading`. KerasTuner also saves optimizer variables.
# When the weights are loaded into an untrained model, Keras skips the optimizer variables and
# warns.
pytestmark = [
    every(16),
    pytest.mark.filterwarnings("ignore:currentThread|getName:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning"),
]

BEST = keras_tuner.Objective("final_val_accuracy", "max")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 8)).astype("float32")
    return {"x": x, "y": (x[:, 0] > 0).astype("int32"), "validation_split": 0.25}


def network():
    return keras.Sequential(
        [keras.Input((8,)), layers.Dense(8, "relu", name="one"), layers.Dense(2, name="two")]
    )


def compiled(model, optimizer):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    return model


def magnitude_model(hp):
    sparsity = hp.Choice("sparsity", [0.5, 0.75])
    method = Magnitude(sparsity, pattern=hp.Choice("pattern", ["unstructured", "1x2"]))
    return compiled(network(), keras_dst.SparseOptimizer("adam", method))


def threshold_model(hp):
    model = network()
    alpha = hp.Float("alpha", 1e-3, 1e-1, sampling="log")
    keras_dst.sparsify(model, DST(alpha=alpha))
    return compiled(model, "adam")


def search(folder, hypermodel, objective=BEST, trials=1):
    return keras_tuner.RandomSearch(
        hypermodel, objective, max_trials=trials, seed=0, directory=folder
    )


def trials(tuner):
    return sorted(tuner.oracle.trials.values(), key=lambda trial: trial.trial_id)


@every(16)
def test_trials_reach_their_targets(data, tmp_path):
    tuner = search(tmp_path, SparseHyperModel(magnitude_model))
    tuner.search(**data, epochs=2, verbose=0)
    for trial in trials(tuner):
        metrics = trial.metrics
        assert trial.status == "COMPLETED"
        target = trial.hyperparameters["sparsity"]
        assert metrics.get_best_value("final_sparsity") == pytest.approx(target, abs=0.02)
        assert trial.score == metrics.get_best_value("final_val_accuracy")
    # The saved weights and the results of a trial are from the last epoch.
    (model,) = tuner.get_best_models()
    best = tuner.oracle.get_best_trials()[0]
    assert keras_dst.report(model).sparsity == pytest.approx(
        best.hyperparameters["sparsity"], abs=0.02
    )
    logs = model.evaluate(data["x"][60:], data["y"][60:], verbose=0, return_dict=True)
    assert logs["accuracy"] == pytest.approx(best.score)

    # A second search in the same folder continues the first search.
    second = search(tmp_path, SparseHyperModel(magnitude_model), trials=2)
    assert second.remaining_trials == 1
    second.search(**data, epochs=2, verbose=0)
    assert [t.trial_id for t in trials(second)] == ["0", "1"]
    assert trials(second)[0].score == trials(tuner)[0].score


def test_metrics_with_several_values_are_left_out(data):
    def build(hp):
        model = magnitude_model(hp)
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        f1 = keras.metrics.F1Score(average=None)
        model.compile(model.optimizer, loss, metrics=["accuracy", f1], jit_compile=False)
        return model

    hp = keras_tuner.HyperParameters()
    hypermodel = SparseHyperModel(build)
    results = hypermodel.fit(hp, build(hp), data["x"], np.eye(2)[data["y"]], verbose=0)
    assert {"final_accuracy", "final_sparsity"} <= set(results)
    assert "final_f1_score" not in results


@every(16)
def test_search_by_accuracy_and_sparsity(data, tmp_path):
    def score(results):
        return results["final_val_accuracy"] + results["final_sparsity"]

    tuner = search(
        tmp_path,
        SparseHyperModel(threshold_model, score=score),
        keras_tuner.Objective("score", "max"),
    )
    tuner.search(**data, epochs=2, verbose=0)
    (trial,) = trials(tuner)
    found = {name: trial.metrics.get_best_value(name) for name in trial.metrics.metrics}
    assert found["score"] == pytest.approx(found["final_val_accuracy"] + found["final_sparsity"])
    (model,) = tuner.get_best_models()
    assert keras_dst.report(model).sparsity == pytest.approx(found["final_sparsity"])


class Stop(keras.callbacks.Callback):
    """Callback that stops the training after the first epoch."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


@pytest.mark.filterwarnings("ignore:Magnitude.* training ended after:UserWarning")
def test_a_trial_that_misses_its_target(data, tmp_path):
    tuner = search(tmp_path, SparseHyperModel(magnitude_model))
    tuner.search(**data, epochs=4, verbose=0, callbacks=[Stop()])
    (trial,) = trials(tuner)
    assert trial.status == "FAILED"
    assert "reached sparsity" in trial.message
    assert trial.score is None
    (saved,) = tmp_path.glob("*/trial_*/trial.json")
    assert "missed by" in json.loads(saved.read_text())["message"]


def test_trials_use_the_callback_of_the_user(data):
    seen = []

    class Training(keras_dst.callbacks.SparseTraining):
        def on_train_begin(self, logs=None):
            seen.append(self)
            super().on_train_begin(logs)

    hp = keras_tuner.HyperParameters()
    hypermodel = SparseHyperModel(magnitude_model)
    results = hypermodel.fit(
        hp, hypermodel.build(hp), **data, epochs=1, verbose=0, callbacks=[Training()]
    )
    assert len(seen) == 1
    assert results["final_sparsity"] == pytest.approx(0.5)


@once
def test_trials_store_results_of_an_export(data, tmp_path, monkeypatch):
    """The test replaces the export by fixed results, because test_pages.py tests real exports."""
    calls = []

    def export(model, path, **options):
        assert path.parent.is_dir()
        calls.append((path, options))
        dense = FileReport("dense float32", 900, 800, 1e-3, 1e-3, 1, None)
        file = FileReport("this file", 300, 200, latency, 1e-3, 1, None)
        return ExportReport(path, 300, 200, 900, 800, [], 0.0, [dense, file], 1, 1)

    hypermodel = SparseHyperModel(
        magnitude_model, {"optimize": "size"}, lambda results: -results["file_bytes"]
    )
    monkeypatch.setattr("keras_dst.tuner.export_tflite", export)
    hp = keras_tuner.HyperParameters()
    for latency in (0.5, None):
        results = hypermodel.fit(hp, hypermodel.build(hp), **data, verbose=0)
        assert results["file_bytes"] == 300
        assert results["gzip_bytes"] == 200
        assert results["score"] == -300
        assert results.get("latency") == latency
        assert "file_accuracy" not in results
    (path, options), _ = calls
    assert options == {"optimize": "size"}
    assert not path.parent.exists()


@once
def test_invalid_arguments_raise():
    with pytest.raises(TypeError, match="build to be a function"):
        SparseHyperModel(network())
    with pytest.raises(TypeError, match="unexpected keyword argument 'optimize_for'"):
        SparseHyperModel(magnitude_model, {"optimize_for": "size"})


@once
def test_a_missing_keras_tuner_raises(monkeypatch):
    monkeypatch.delitem(sys.modules, "keras_dst.tuner")
    monkeypatch.setitem(sys.modules, "keras_tuner", None)
    with pytest.raises(ImportError, match=r"pip install keras_dst\[tuner\]"):
        importlib.import_module("keras_dst.tuner")


@pytest.mark.skipif(COMPILES, reason="one backend is enough")
def test_code_of_the_page_on_sensitivity_runs(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    names = {}
    # The last code block exports a file in every trial, which takes 20 seconds on PyTorch.
    for info, code in blocks("sensitivity.md")[: None if LONG else -1]:
        if info in ("", keras.backend.backend()):
            exec(compile(code, "sensitivity.md", "exec"), names)
    pyplot.close("all")
    assert (tmp_path / "sensitivity.png").stat().st_size > 0
    sizes = {row.name: row.parameters for row in names["measured"].weights}
    pruned = sum(names["shares"][name] * size for name, size in sizes.items())
    assert pruned == pytest.approx(0.9 * (64 * 128 + 128 * 32 + 32 * 10))
    found = trials(names["tuner"])
    assert [trial.status for trial in found] == ["COMPLETED"] * 2
    for trial in found:
        sparsity = trial.metrics.get_best_value("final_sparsity")
        assert sparsity == pytest.approx(trial.hyperparameters["sparsity"], abs=0.001)
        if LONG:
            assert 0 < trial.metrics.get_best_value("file_bytes") < 4 * 12_608
    assert 0.8 <= keras_dst.report(names["best"]).sparsity <= 0.951
