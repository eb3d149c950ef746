"""Tests of the benchmark that trains for as many epochs as the papers."""

import dataclasses
import json

import h5py
import keras
import numpy as np
import pytest

from benchmarks import results
from benchmarks.accuracy import papers
from benchmarks.accuracy.papers import BATCH, METHODS, NETS, Epochs, Paused, Run, WarmRates, runs_of


@pytest.mark.once
def test_epochs_after_a_restart_equal_those_of_one_run():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (BATCH + 3, 8, 8, 3), "uint8"), np.arange(BATCH + 3)
    whole = Epochs(x, y, seed=1)
    for epoch in range(3):
        resumed = Epochs(x, y, seed=1, epoch=epoch)
        for expected, found in zip(whole[0], resumed[0]):
            np.testing.assert_array_equal(found, expected)
        whole.on_epoch_end()


@pytest.mark.once
def test_shifted_images_are_filled_with_their_mean():
    x = np.full((BATCH, 8, 8, 3), 40, "uint8")
    # In each image, one of the 64 pixels has the value 104, and all others have the value 40, so
    # the mean is 41.
    x[:, 0, 0] = 104
    images, _ = Epochs(x, np.arange(BATCH), seed=0)[0]
    assert images.shape == (BATCH, 8, 8, 3)
    assert set(np.unique(images)) == {40, 41, 104}


@pytest.mark.once
def test_rate_rises_and_falls_to_zero():
    rate = WarmRates(0.1, total=100, warm=5)
    assert float(rate(0)) == pytest.approx(0.02)
    assert float(rate(50)) == pytest.approx(0.05)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.once
def test_rate_of_dcil_drops_twice():
    recipe = papers.RECIPES["dcil"]
    rate = WarmRates.from_config(WarmRates(recipe.rate, 300, 5, recipe.drops).get_config())
    rates = [float(rate(epoch)) for epoch in (0, 4, 149, 150, 224, 225, 299)]
    assert rates == pytest.approx([0.04, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002])


@pytest.mark.once
def test_settings_select_the_runs_of_a_table():
    first = runs_of(["resnet-32-16"])
    # Each of the three seeds has one dense run, and runs at three sparsities for every method.
    assert len(first) == 3 * (1 + 3 * len(METHODS))
    assert [run.method for run in first[:2]] == ["dense", "DCIL"]
    assert [run.seed for run in first] == sorted(run.seed for run in first)
    assert {run.net for run in runs_of()} == set(NETS)
    assert {run.net for run in runs_of(methods=["consensus"])} == {"resnet-56-16"}
    (one,) = runs_of(["vgg-19"], ["st-3-sigma"], [0.9], [2])
    assert one == Run("vgg-19", "ST-3 sigma", 0.9, 2)
    own = runs_of(recipe="dcil", sparsities=[0.9, 0.95], seeds=[0])
    assert [(run.net, run.method, run.length) for run in own] == [
        ("resnet-32-16", "dense", 300),
        ("resnet-32-16", "DCIL", 300),
        ("resnet-32-16", "DCIL", 300),
    ]


@pytest.mark.once
def test_names_of_runs_equal_the_names_of_stored_runs():
    for name, run in results.runs(papers.BENCHMARK).items():
        net = next(key for key, net in NETS.items() if net.title == run["net"])
        recipe = run.get("recipe", "common")
        assert Run(net, run["method"], run["target"], run["seed"], recipe).name == name


def network(x, decay):
    """Return a network with one convolution, which compiles fast."""
    return keras.Sequential(
        [
            keras.Input((32, 32, 3), dtype="uint8"),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(16, 3, 4, kernel_regularizer=keras.regularizers.L2(decay)),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10),
        ]
    )


@pytest.fixture
def tiny(monkeypatch):
    """Replace the networks by a small network, and the images by noise."""
    for name, net in list(NETS.items()):
        monkeypatch.setitem(papers.NETS, name, dataclasses.replace(net, build=network))
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (64, 32, 32, 3), "uint8"), rng.integers(0, 10, 64).astype("int32")
    data = (x[:48], y[:48]), (x[48:], y[48:])
    monkeypatch.setattr(papers, "data_of", lambda run: data)
    return data


def stored_weights(folder):
    """Return all arrays of the backup in a folder: weights, masks and states of the optimizer."""
    (path,) = (folder / "weights").glob("backup-*.weights.h5")
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()]} if hasattr(item, "shape") else {})
        )
    return found


# `make test` trains with only one method.
CASES = [
    pytest.param(name, marks=() if name == "DCIL" else pytest.mark.slow)
    for name in ("dense", *METHODS)
]


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="The benchmark trains on JAX.")
@pytest.mark.filterwarnings("ignore:.*training had reached .*:UserWarning")
@pytest.mark.parametrize("method", CASES)
def test_a_run_in_three_pieces_equals_a_run_in_one_piece(method, tiny, tmp_path):
    run = Run("resnet-32-16", method, 0.0 if method == "dense" else 0.9, 0, epochs=3, batch=16)

    def train(name, deadline=None):
        keras.utils.clear_session()  # Give the layers the same names as in a new process.
        return papers.train(run, tiny, tmp_path / name, deadline)

    model, expected = train("one")
    for _ in range(2):
        with pytest.raises(Paused):  # The deadline has passed, so each call trains one epoch.
            train("three", deadline=0.0)
    # The first of the next two calls trains the last epoch. The second call finds the finished run
    # in the backup and trains nothing.
    for _ in range(2):
        resumed, found = train("three", deadline=0.0)
        for a, b in zip(model.get_weights(), resumed.get_weights(), strict=True):
            np.testing.assert_array_equal(b, a)
        for row in (*expected["history"], *found["history"]):
            row.pop("seconds", None)
        assert found | {"seconds": 0} == expected | {"seconds": 0}
    one, three = stored_weights(tmp_path / "one"), stored_weights(tmp_path / "three")
    assert sorted(one) == sorted(three)
    assert len(one) > len(model.weights)
    for name, array in one.items():
        np.testing.assert_array_equal(three[name], array, err_msg=name)


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:.*training had reached .*:UserWarning")
def test_short_runs_are_stored_only_in_their_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "save", None)  # From now on, a call of `results.save` fails.
    run = Run("resnet-56-16", "Consensus", 0.5, 0, epochs=2, batch=16)
    papers.complete(run, tmp_path, deadline=0.0)
    # The deadline has already passed, so `complete` trains no epoch.
    assert not (tmp_path / run.name).exists()
    papers.complete(run, tmp_path)
    folder = tmp_path / run.name
    assert {path.name for path in folder.iterdir()} == {
        "epochs.jsonl",
        "model.keras",
        "result.json",
    }
    found = json.loads((folder / "result.json").read_text())
    assert found["flops"] < 0.6
    assert len(found["history"]) == 2


@pytest.mark.once
def test_tables_show_seeds_sparsities_and_published_accuracies():
    runs = [
        {"net": "ResNet-32 (16-32-64)", "recipe": "dcil", "epochs": 300, "target": target}
        | {"method": method, "test_accuracy": accuracy, "seed": seed}
        for method, target, accuracy in (("dense", 0.0, 0.94), ("DCIL", 0.9, 0.92))
        for seed in range(2)
    ]
    assert papers.table_lines(runs)[-4:] == [
        "|---|---|---|",
        "| dense | 2 | 94.00 ± 0.00 |",
        "| DCIL | 2 | 92.00 ± 0.00 |",
        "| DCIL, in its paper | | 92.74 |",
    ]
    old = runs[-1] | {"outdated": True}
    assert "| DCIL, earlier version | 1 | 92.00 |" in papers.table_lines([old])
    run = {"net": "ResNet-56 (16-32-64)", "epochs": 100, "method": "Consensus", "target": 0.5}
    lines = papers.table_lines([run | {"test_accuracy": 0.9, "flops": 0.49}])
    assert lines[3] == "| method | seeds | 50% FLOPs removed |"
    assert lines[-1] == "| Consensus | 1 | 90.00 (0.49) |"
