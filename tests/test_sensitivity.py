"""Tests that compare `sensitivity` with NumPy, and its allocation with an exhaustive search."""

import json
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_dst
from keras_dst._reporting.sensitivity import SensitivityReport, WeightSensitivity
from keras_dst.allocation import densities, equal_drop
from keras_dst.methods import DCIL, DST, Magnitude
from tests.backends import COMPILES, every, once

pytestmark = every(64)

GRID = (0.5, 0.75)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((40, 4)).astype("float32"), rng.integers(0, 3, 40)


class Counted(layers.Dense):
    """A Dense layer that counts how often its `call` method runs in Python."""

    calls = 0

    def call(self, x):
        Counted.calls += 1
        return super().call(x)


def net(**kwargs):
    rng = np.random.default_rng(1)
    inner = [Counted(8, "relu", name="one"), layers.Dense(3, "softmax", name="two")]
    model = keras.Sequential([keras.Input((4,)), *inner], name="net")
    model.set_weights([rng.standard_normal(w.shape) for w in model.weights])
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"], **kwargs)
    return model


def arrays(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.variables]


def accuracy(weights, x, y):
    """Compute the accuracy of the network `net` with the given weights in NumPy."""
    one, first, two, second = weights
    return np.mean(np.argmax(np.maximum(x @ one + first, 0) @ two + second, 1) == y)


def smallest_to_zero(w, sparsity):
    order = np.argsort(np.abs(w), axis=None, kind="stable")
    w = w.copy()
    w.flat[order[: round(sparsity * w.size)]] = 0
    return w


def test_sensitivities_equal_numpy(data):
    model = net()
    before = arrays(model)
    weights = model.get_weights()
    traced = []
    inner = model.evaluate
    model.evaluate = lambda *args, **kwargs: (inner(*args, **kwargs), traced.append(Counted.calls))[
        0
    ]
    found = keras_dst.sensitivity(model, data, GRID, verbose=0)
    assert (found.metric, found.mode, found.sparsities) == ("accuracy", "max", GRID)
    assert found.baseline == pytest.approx(accuracy(weights, *data), abs=1e-6)
    assert [row.name for row in found.weights] == [w.path for w in model.weights[::2]]
    for i, row in zip((0, 2), found.weights):
        expected = []
        for sparsity in GRID:
            changed = [
                smallest_to_zero(w, sparsity) if i == j else w for j, w in enumerate(weights)
            ]
            expected.append(accuracy(changed, *data))
        assert row.values == pytest.approx(expected, abs=1e-6)
        assert row.parameters == weights[i].size
    assert len({*found.weights[0].values, *found.weights[1].values}) > 1
    for old, new in zip(before[: len(weights)], arrays(model)):
        np.testing.assert_array_equal(old, new)
    assert len(traced) == 1 + 2 * len(GRID)
    # Only the first evaluation traces the model, so the number of traces does not grow.
    if COMPILES:
        assert traced[0] == traced[-1]


def test_arguments_select_pattern_weights_and_metric(data):
    model = net()
    found = keras_dst.sensitivity(
        model, data, (0.5,), pattern="2:4", filters=".*one/kernel", metric="loss", verbose=0
    )
    (row,) = found.weights
    w = model.get_weights()
    # The pattern 2:4 prunes the two smallest of every four weights.
    order = np.argsort(np.abs(w[0]), axis=0)
    np.put_along_axis(w[0], order[:2], 0, axis=0)
    model.set_weights(w)
    assert row.values == pytest.approx([model.evaluate(*data, verbose=0)[0]], rel=1e-5)
    assert (found.mode, found.pattern) == ("min", "2:4")


@once
def test_sensitivity_of_channels(data):
    model = net()
    found = keras_dst.sensitivity(
        model, data, (0.5,), pattern="channel", filters=".*one/kernel", verbose=0
    )
    w = model.get_weights()
    w[0][:, np.argsort(np.abs(w[0]).mean(0))[:4]] = 0
    assert found.weights[0].values == pytest.approx([accuracy(w, *data)], abs=1e-6)


class Batches(keras.utils.PyDataset):
    """Batches of data. If `error` is given, the data set raises `error` after some batches."""

    def __init__(self, data, error=None, after=10**9):
        super().__init__()
        self.data, self.error, self.after = data, error, after

    def __len__(self):
        return 4

    def __getitem__(self, i):
        self.after -= 1
        if self.after < 0:
            raise self.error
        return tuple(part[10 * i : 10 * i + 10] for part in self.data)


@once
def test_sensitivity_with_a_data_set(data):
    whole = keras_dst.sensitivity(net(), data, (0.5,), verbose=0)
    parts = keras_dst.sensitivity(net(), Batches(data), (0.5,), verbose=0)
    weighted = keras_dst.sensitivity(net(), (*data, np.ones(40)), (0.5,), verbose=0)
    assert whole.to_dict() == parts.to_dict() == weighted.to_dict()


@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), ValueError("stop")], ids=repr)
def test_weights_are_restored_after_an_error(data, error):
    model = net()
    before = model.get_weights()
    # The data set raises the error in the third pass over the data. TensorFlow wraps the raised
    # error in its own error.
    with pytest.raises(BaseException, match="stop"):
        keras_dst.sensitivity(model, Batches(data, error, 10), (0.5,), verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    logs = model.evaluate(*data, verbose=0, return_dict=True)
    assert logs["accuracy"] == pytest.approx(accuracy(before, *data), abs=1e-6)
    model.fit(*data, verbose=0)


# -- kinds of models -------------------------------------------------------------------------------


def masked(method):
    model = net()
    keras_dst.sparsify(model, method)
    for layer in model.layers:
        state = layer.sparse_state["kernel"]
        if "threshold" in state:
            state["threshold"].assign(np.full(state["threshold"].shape, 0.6))
        else:
            state["mask"].assign(np.abs(layer._kernel.numpy()) > 0.6)
    return model


@pytest.mark.parametrize("method", [DST(), DCIL(0.5)], ids=["DST", "DCIL"])
def test_sensitivity_of_sparse_and_stripped_models(data, method):
    model = masked(method)
    before = arrays(model)
    found = keras_dst.sensitivity(model, data, GRID, verbose=0)
    for old, new in zip(before, arrays(model)):
        np.testing.assert_array_equal(old, new)
    keras_dst.strip(model)
    assert np.mean(model.get_weights()[0] == 0) > 0.2
    assert keras_dst.sensitivity(model, data, GRID, verbose=0).to_dict() == found.to_dict()


@once
def test_a_mask_that_would_change_raises(data):
    model = masked(DST(pattern="1x4"))
    before = model.get_weights()
    assert keras_dst.sensitivity(model, data, GRID, pattern="1x4", verbose=0)
    with pytest.raises(ValueError, match=r"computes the mask of 'net/one/kernel' from .*strip"):
        keras_dst.sensitivity(model, data, (0.9,), verbose=0)
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_sensitivity_with_two_outputs_and_a_shared_weight(data):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    shared = layers.Dense(4, "tanh", name="shared")
    x = shared(shared(inputs))
    outputs = {n: layers.Dense(3, "softmax", name=n)(x) for n in ("a", "b")}
    model = keras.Model(inputs, outputs)
    model.compile(
        loss=dict.fromkeys("ab", "sparse_categorical_crossentropy"),
        metrics={"a": ["accuracy"], "b": ["accuracy"]},
    )
    labels = {"a": data[1], "b": 2 - data[1]}
    found = keras_dst.sensitivity(model, (data[0], labels), (0.5,), verbose=0)
    assert [row.name for row in found.weights] == ["shared/kernel", "a/kernel", "b/kernel"]
    # The model has two accuracies, so `sensitivity` uses the loss.
    assert (found.metric, found.mode) == ("loss", "min")
    found = keras_dst.sensitivity(
        model, (data[0], labels), (0.5,), metric="b_accuracy", filters="(a|b)/kernel", verbose=0
    )
    assert (found.metric, found.mode) == ("b_accuracy", "max")
    a, b = found.weights
    # Pruning layer a does not change the accuracy of output b.
    assert a.values == (found.baseline,) != b.values


def test_every_evaluation_starts_from_the_same_recurrent_states():
    keras.utils.set_random_seed(0)
    inner = [layers.SimpleRNN(3, stateful=True), layers.Dense(1)]
    model = keras.Sequential([keras.Input((2, 4), batch_size=4), *inner])
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).standard_normal((4, 2, 4)).astype("float32")
    y = np.ones((4, 1))
    state = model.layers[0].states[0]
    state.assign(np.ones((4, 3)))
    # Pruning to a sparsity of 0.001 changes no weight.
    found = keras_dst.sensitivity(model, (x, y), (0.001,), verbose=0)
    np.testing.assert_array_equal(ops.convert_to_numpy(state), np.ones((4, 3)))
    assert [row.values for row in found.weights] == [(found.baseline,)] * 3
    model.layers[0].reset_state()
    assert model.evaluate(x, y, verbose=0) == found.baseline


@once
def test_sensitivity_skips_frozen_weights(data):
    model = net()
    model.layers[0].trainable = False
    model.compile("sgd", "sparse_categorical_crossentropy")
    (row,) = keras_dst.sensitivity(model, data, (0.5,), verbose=0).weights
    assert row.name == "net/two/kernel"
    model.trainable = False
    with pytest.raises(ValueError, match="'net' has no weight to prune"):
        keras_dst.sensitivity(model, data, (0.5,), verbose=0)


# -- the report ------------------------------------------------------------------------------------


def made(*rows, baseline=1.0, sparsities=GRID, mode="max"):
    weights = [
        WeightSensitivity(f"net/{name}/kernel", (size, 1), size, values)
        for name, size, values in rows
    ]
    return SensitivityReport("net", "accuracy", mode, "unstructured", baseline, sparsities, weights)


@once
def test_sensitivity_report_as_table_and_json():
    found = made(("one", 1000, (0.75, 0.5)), ("two", 8, (1.0, 0.25)))
    assert str(found).splitlines() == [
        "net: accuracy is 1.0000, and with a single weight pruned (unstructured):",
        "| weight         | shape    | weights | 50.00 % | 75.00 % |",
        "|----------------|----------|---------|---------|---------|",
        "| net/one/kernel | 1000 x 1 |   1,000 |  0.7500 |  0.5000 |",
        "| net/two/kernel | 8 x 1    |       8 |  1.0000 |  0.2500 |",
    ]
    figures = found.to_dict()
    assert json.loads(json.dumps(figures)) == figures
    assert figures["weights"][1]["values"] == [1.0, 0.25]


@once
def test_sensitivity_plot(monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    found = made(("one", 1000, (0.75, 0.5)), ("two", 8, (1.0, 0.25)))
    axes = plt.figure().subplots()
    assert found.plot(axes) is axes
    lines = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert lines[0] == [[0, 1], [0.5, 0.75], [0.75, 0.5]]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["net/one/kernel", "net/two/kernel"]
    plt.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"keras_dst\[plot\]"):
        found.plot()


@once
def test_sensitivity_progress_bar(data, capsys):
    keras_dst.sensitivity(net(), data, (0.5,))
    assert "3/3" in capsys.readouterr().out
    keras_dst.sensitivity(net(), data, (0.5,), verbose=0)
    assert capsys.readouterr().out == ""


# -- the allocation --------------------------------------------------------------------------------


@once
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.9])
def test_allocation_minimizes_the_largest_drop(seed, sparsity):
    rng = np.random.default_rng(seed)
    grid, sizes = [0, 0.5, 0.8, 0.95], np.array([100, 300, 50])
    drops = np.hstack([np.zeros((3, 1)), rng.uniform(-0.1, 0.5, (3, 3))])
    found = equal_drop(grid, drops, sizes, sparsity)
    assert found @ sizes == pytest.approx(sparsity * sizes.sum(), rel=1e-12)
    curves = np.maximum.accumulate(np.maximum(drops, 0), axis=1)

    def largest(shares):
        return max(np.interp(s, grid, curve) for s, curve in zip(shares, curves))

    # Try all pairs of sparsities of the first two weight tensors on a fine grid. Choose the
    # sparsity of the third tensor so that the total sparsity equals the target.
    best = np.inf
    for first in np.linspace(0, 0.95, 96):
        for second in np.linspace(0, 0.95, 96):
            third = (sparsity * sizes.sum() - first * sizes[0] - second * sizes[1]) / sizes[2]
            if 0 <= third <= 0.95:
                best = min(best, largest((first, second, third)))
    assert largest(found) <= best + 1e-5
    # The best sparsities may lie between the points of the grid, so allow a small difference.
    assert best - largest(found) < 0.05


@once
def test_allocation_shares_ties_evenly_within_the_measured_range():
    free = np.zeros((2, 3))
    assert equal_drop([0, *GRID], free, [10, 90], 0.4) == pytest.approx([0.4, 0.4])
    assert equal_drop([0, *GRID], free, [10, 90], 0.75) == pytest.approx([0.75, 0.75])
    assert equal_drop([0, *GRID], free, [10, 90], 0) == pytest.approx([0, 0])
    # Here, pruning the first weight tensor lowers the metric, and pruning the second tensor does
    # not. Only the second tensor is therefore pruned.
    dear = [[0, 0.5, 1], [0, 0, 0]]
    assert equal_drop([0, *GRID], dear, [10, 90], 0.675) == pytest.approx([0, 0.75], abs=1e-5)
    with pytest.raises(ValueError, match=r"at most 0.75, the highest measured sparsity"):
        equal_drop([0, *GRID], dear, [10, 90], 0.8)
    with pytest.raises(ValueError, match="finite"):
        equal_drop([0, *GRID], [[0, np.nan, 1], [0, 0, 0]], [10, 90], 0.5)


@once
def test_allocations_match_weights_by_name():
    found = made(("a", 10, (1.0, 0.5)), ("a+b", 10, (1.0, 1.0)), ("x/net/a", 20, (0.5, 0.0)))
    shares = found.allocation(0.5)
    names = [row.name for row in found.weights]
    sizes = [row.parameters for row in found.weights]
    expected = 1 - np.array([shares[name] for name in names])
    # The name "a" is a part of the names "a+b" and "x/net/a".
    for order in (shares, dict(reversed(shares.items()))):
        kept = densities(order, [(n, 1) for n in sizes], 0.5, names)
        np.testing.assert_array_equal(kept, expected)
    assert expected @ sizes == pytest.approx(20)
    lost = made(("a", 10, (0.2, 0.9)), ("b", 10, (0.1, 0.2)), baseline=0.1, mode="min")
    assert list(lost.allocation(0.5).values()) == pytest.approx([1 / 3, 2 / 3], abs=1e-5)


def sensitive(rng):
    """Return a classifier with a wide layer and a narrow layer.

    All weights of the narrow layer affect the outputs of the network.
    """
    model = keras.Sequential(
        [
            keras.Input((10,)),
            layers.Dense(10, use_bias=False, name="narrow"),
            layers.Dense(40, use_bias=False, name="wide"),
            layers.Dense(2, use_bias=False, name="out"),
        ],
        name="net",
    )
    narrow = np.linalg.qr(rng.standard_normal((10, 10)))[0]
    wide = 0.01 * rng.standard_normal((10, 40))
    # Only the first column of the wide kernel affects the outputs.
    wide[:, 0] = narrow.T @ np.ones(10)
    out = np.zeros((40, 2))
    out[0] = -1, 1
    model.set_weights([narrow, wide, out + 1e-3 * rng.standard_normal((40, 2))])
    model.compile(
        keras_dst.SparseOptimizer(keras.optimizers.SGD(0.0), Magnitude(0.7)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


@once
def test_a_sensitive_layer_is_allocated_a_higher_density():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 10)).astype("float32")
    y = (x.sum(1) > 0).astype("int32")
    model = sensitive(rng)
    found = keras_dst.sensitivity(model, (x, y), (0.3, 0.6, 0.8, 0.95), verbose=0)
    assert found.baseline > 0.99
    shares = found.allocation(0.7)
    assert shares["net/narrow/kernel"] < 0.4 < 0.7 < shares["net/wide/kernel"]
    reached = {}
    for name, allocation in (("uniform", "uniform"), ("measured", shares)):
        model = sensitive(np.random.default_rng(0))
        method = Magnitude(0.7, allocation=allocation)
        model.compile(
            keras_dst.SparseOptimizer(keras.optimizers.SGD(0.0), method),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        callback = keras_dst.callbacks.SparseTraining()
        model.fit(x, y, batch_size=100, epochs=2, callbacks=[callback], verbose=0)
        assert keras_dst.report(model).sparsity == pytest.approx(0.7, abs=1 / 580)
        reached[name] = model.evaluate(x, y, verbose=0)[1]
    assert reached["measured"] > reached["uniform"] + 0.05


# -- errors ----------------------------------------------------------------------------------------


@once
class TestErrors:
    def test_an_invalid_model_raises(self, data):
        with pytest.raises(TypeError, match="Expected a Keras 3 model"):
            keras_dst.sensitivity("model.keras", data)
        with pytest.raises(TypeError, match="the layer 'one'"):
            keras_dst.sensitivity(net().layers[0], data)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3)], name="net")
        with pytest.raises(ValueError, match=r"'net' is not compiled.*model\.compile"):
            keras_dst.sensitivity(model, data)

    def test_invalid_data_raises(self, data):
        with pytest.raises(ValueError, match=r"more than once.*generator"):
            keras_dst.sensitivity(net(), (data for _ in range(3)))

    def test_other_invalid_arguments_raise(self, data):
        with pytest.raises(ValueError, match=r"accuracy, loss\. Received: 'f1'"):
            keras_dst.sensitivity(net(), data, metric="f1", verbose=0)
        with pytest.raises(ValueError, match="Expected at least one sparsity above 0"):
            keras_dst.sensitivity(net(), data, ())
        with pytest.raises(ValueError, match=r"in \[0, 1\)"):
            keras_dst.sensitivity(net(), data, (0.5, 1.5))
        with pytest.raises(ValueError, match=r"fixes the sparsity at 0.5"):
            keras_dst.sensitivity(net(), data, pattern="2:4")
        with pytest.raises(ValueError, match="does not match any name"):
            keras_dst.sensitivity(net(), data, filters="three")
        with pytest.raises(ValueError, match="filters selects no weight"):
            keras_dst.sensitivity(net(), data, filters=lambda variable: False)

    def test_a_custom_metric_without_a_direction_raises(self, data):
        model = net()

        def mine(y, p):
            return p[:, 0]

        model.compile(loss="sparse_categorical_crossentropy", metrics=[mine])
        with pytest.raises(ValueError, match=r"'mine' does not say .* Pass metric='loss'"):
            keras_dst.sensitivity(model, data, verbose=0)
        assert keras_dst.sensitivity(model, data, metric="loss", verbose=0).mode == "min"
