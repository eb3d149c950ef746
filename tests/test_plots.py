"""Tests of `keras_dst.plots`. The tests read the drawn data from the matplotlib figures."""

import importlib
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_dst
from keras_dst import plots
from keras_dst._reporting.sparsity import report
from keras_dst._reporting.weights import density_map
from keras_dst.masks import Layout
from keras_dst.methods import DST, Magnitude
from tests import models
from tests.backends import once
from tests.pages import blocks
from tests.test_report import lenet, masked_model


@pytest.fixture(autouse=True)
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    yield plt
    plt.close("all")
    matplotlib.use(before)


def pictures(figure):
    """Return a dict that maps the title of each axes in a figure to the data of its heat map."""
    figure.canvas.draw()
    found = [ax for ax in figure.axes if ax.get_title()]
    return {ax.get_title(): np.asarray(ax.images[0].get_array()) for ax in found}


# -- density ---------------------------------------------------------------------------------------


@once
def test_density_draws_a_bar_per_weight(pyplot):
    found = report(masked_model())
    axes = found.plot()
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([6 / 9, 1.0])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [r.name for r in found.layers]
    assert "density" in axes.get_xlabel()
    assert axes.get_title() == f"{found.model}: 20.00 % sparse"
    axes.figure.canvas.draw()


@once
def test_density_on_given_axes(pyplot):
    axes = pyplot.figure().add_subplot()
    assert report(lenet()).plot(axes) is axes
    assert len(axes.patches) == 3


@once
@pytest.mark.parametrize("plot", [plots.density, plots.sensitivity])
def test_plots_of_a_model_instead_of_a_report_raise(plot):
    with pytest.raises(TypeError, match=r"Expected the result of keras_dst\."):
        plot(keras.Sequential([keras.Input((4,)), layers.Dense(2)]))


@once
def test_density_without_prunable_weights(pyplot):
    assert (
        len(
            report(keras.Sequential([keras.Input((4,)), layers.BatchNormalization()]))
            .plot()
            .patches
        )
        == 0
    )


@once
def test_plots_without_matplotlib_raise(monkeypatch):
    found = report(lenet())
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install keras_dst\[plot\]"):
        found.plot()


# -- density maps ----------------------------------------------------------------------------------


@once
def test_density_map_of_a_small_weight_shows_every_entry():
    kept = np.random.default_rng(0).random((5, 7)) < 0.5
    np.testing.assert_array_equal(density_map(kept), kept)


@once
def test_density_map_of_a_large_weight_shows_densities():
    kept = np.random.default_rng(0).random((256, 128)) < 0.1
    expected = kept.reshape(64, 4, 64, 2).mean((1, 3))
    np.testing.assert_allclose(density_map(kept), expected, rtol=1e-6)


@once
@pytest.mark.parametrize("shape", [(100, 1), (65, 129), (1, 300), (784, 64)])
def test_density_map_contains_every_entry(shape):
    for place in [(0, 0), (-1, -1), (shape[0] // 2, shape[1] // 2)]:
        kept = np.zeros(shape, bool)
        kept[place] = True
        found = density_map(kept)
        assert np.count_nonzero(found) == 1
        assert max(found.shape) <= 64


@once
def test_density_map_of_a_convolution():
    kept = np.zeros((3, 3, 2, 4), bool)
    kept[2, 1, 1, 3] = True
    expected = np.zeros((18, 4))
    expected[(2 * 3 + 1) * 2 + 1, 3] = 1
    np.testing.assert_array_equal(density_map(kept), expected)
    # The kernel of a transposed convolution has the axes (*window, outputs, inputs).
    found = density_map(kept, Layout((-2,), (-1,)))
    assert found.shape == (36, 2)
    assert found[(2 * 3 + 1) * 4 + 3, 1] == 1


@once
def test_density_map_of_an_empty_weight():
    assert density_map(np.zeros((0, 4), bool)).shape == (0, 4)


# -- masks -----------------------------------------------------------------------------------------


def half_pruned():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, name="body")], name="net")
    weights = np.arange(1, 25, dtype="float32").reshape(4, 6)
    model.layers[0].kernel.assign(weights)
    return model, weights


@once
def test_plot_masks_of_a_dense_model():
    model, weights = half_pruned()
    weights[:, 2] = 0
    model.layers[0].kernel.assign(weights)
    ((title, picture),) = pictures(plots.masks(model)).items()
    assert title == "net/body/kernel\n16.67 % sparse"
    np.testing.assert_array_equal(picture, weights != 0)


def test_plotted_masks_are_equal_before_and_after_strip():
    model, weights = half_pruned()
    keras_dst.sparsify(model, DST())
    model.layers[0].sparse_state["kernel"]["threshold"].assign(np.full(6, 12.5))
    expected = weights > 12.5
    for _ in range(2):
        ((title, picture),) = pictures(plots.masks(model)).items()
        assert title.endswith("50.00 % sparse")
        np.testing.assert_array_equal(picture, expected)
        keras_dst.strip(model)


@once
def test_plot_masks_of_a_sparse_optimizer():
    model = models.compiled(
        models.sequential(), keras_dst.SparseOptimizer("sgd", Magnitude(0.5, allocation="uniform"))
    )
    model.fit(*models.data(), verbose=0, callbacks=[keras_dst.callbacks.SparseTraining()])
    found = pictures(plots.masks(model, columns=2))
    assert len(found) == 4
    assert all(title.endswith("50.00 % sparse") for title in found)


@once
def test_plot_masks_by_name():
    inner = [layers.Dense(3, name=name) for name in ("stem", "body", "head")]
    model = keras.Sequential([keras.Input((4,)), *inner], name="net")
    for names in (["net/stem/kernel", "head"], ".*(stem|head)/kernel"):
        titles = list(pictures(plots.masks(model, names)))
        assert [title.split("\n")[0] for title in titles] == ["net/stem/kernel", "net/head/kernel"]
    with pytest.raises(ValueError, match="names: 'conv9' does not match any name"):
        plots.masks(model, "conv9")
    with pytest.raises(ValueError, match="no prunable weight"):
        plots.masks(keras.Sequential([keras.Input((4,)), layers.BatchNormalization()]))
    with pytest.raises(TypeError, match="Expected a Keras 3 model"):
        plots.masks("model.keras")


# -- curves ----------------------------------------------------------------------------------------


@once
def test_plot_trade_off():
    pairs = [(0.98, 0.7), (0.5, 0.9), (0.9, 0.8), (0.9, 0.9), (0.9, 0.88)]
    axes = plots.trade_off({"DST": pairs, "RigL": [(0.9, 0.5)]}, dense=0.95, metric="top-1")
    axes.figure.canvas.draw()
    curve, other = axes.containers
    assert list(curve.lines[0].get_xdata()) == pytest.approx([0.5, 0.1, 0.02])
    assert list(curve.lines[0].get_ydata()) == pytest.approx([0.9, 0.86, 0.7])
    # At density 0.1, the error bar goes from the smallest to the largest of three accuracies.
    low, high = np.array(curve.lines[2][0].get_segments())[1, :, 1]
    assert (low, high) == pytest.approx((0.8, 0.9))
    assert len(other.lines[0].get_xdata()) == 1
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] > axes.get_xlim()[1]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["50 %", "10 %", "2 %"]
    assert axes.get_ylabel() == "top-1"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == ["DST", "RigL", "dense"]


@once
@pytest.mark.parametrize("pairs", [[(1.0, 0.5)], [(-0.1, 0.5)], [(0.5, float("nan"))], []])
def test_plot_of_invalid_results_raises(pairs):
    with pytest.raises(ValueError, match=r"results\['DST'\] must"):
        plots.trade_off({"DST": pairs})
    with pytest.raises(ValueError, match="must map labels"):
        plots.trade_off({})


METRICS = {
    "accuracy": [0.5, 0.6, 0.7, 0.8],
    "loss": [1.2, 0.9, 0.8, 0.7],
    "val_loss": [0.9, 0.8],  # Only two of four epochs are validated, as with `validation_freq=2`.
    "sparsity": [0.1, 0.5, 0.9, 0.9],
    "val_accuracy_at_target": [-1e30, -5e29, 0.7, 0.8],
}


@once
def test_plot_history():
    axes = plots.history(METRICS)
    axes.figure.canvas.draw()
    left, right = axes.figure.axes
    assert left is axes
    lines = {line.get_label(): line for line in left.get_lines()}
    assert list(lines) == ["accuracy", "sparsity", "val_accuracy_at_target"]
    at_target = lines["val_accuracy_at_target"].get_ydata()
    np.testing.assert_array_equal(at_target, [np.nan, np.nan, 0.7, 0.8])
    loss, val_loss = right.get_lines()
    assert loss.get_color() == val_loss.get_color()
    assert (loss.get_linestyle(), val_loss.get_linestyle()) == ("-", "--")
    np.testing.assert_array_equal(val_loss.get_xdata(), [2, 4])
    assert right.get_ylabel() == "loss"
    assert len(axes.get_legend().get_texts()) == 5


@once
def test_plot_history_of_selected_metrics(pyplot):
    given = pyplot.figure().add_subplot()
    history = keras.callbacks.History()
    history.history = METRICS
    assert plots.history(history, ["(val_)?loss"], given) is given
    assert len(given.figure.axes) == 1
    assert len(given.get_lines()) == 2
    with pytest.raises(ValueError, match="names: 'f1' does not match any name"):
        plots.history(history, "f1")
    with pytest.raises(ValueError, match="history must have at least one epoch"):
        plots.history({})


@once
@pytest.mark.parametrize(
    ("first", "last", "validation_freq", "measured"),
    [
        (1, 10, 4, [4, 8]),
        (1, 10, [3, 10], [3, 10]),
        (1, 10, None, [3, 6, 9]),
        (1, 5, None, [1, 2, 3, 4, 5]),
        (16, 20, 2, [16, 18, 20]),
        (16, 20, None, [16, 17, 18, 19, 20]),
    ],
)
def test_plot_history_draws_values_at_their_epochs(first, last, validation_freq, measured):
    history = keras.callbacks.History()
    history.epoch = list(range(first - 1, last))
    history.history = {"loss": [2] * len(history.epoch), "val_loss": [2] * len(measured)}
    # The curve of "val_loss" alone also begins at the correct epoch.
    for names in (None, "val_loss"):
        line = plots.history(history, names, validation_freq=validation_freq).get_lines()[-1]
        np.testing.assert_array_equal(line.get_xdata(), measured)


@once
def test_plot_history_with_an_ambiguous_validation_freq_raises():
    metrics = {"loss": [1] * 10, "val_loss": [1, 1]}
    for validation_freq in (None, 3):
        with pytest.raises(ValueError, match="'val_loss' has 2 values in 10 epochs"):
            plots.history(metrics, validation_freq=validation_freq)


# -- documentation ---------------------------------------------------------------------------------


@once
def test_code_of_the_page_on_pictures_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((64, 16, 16, 3)).astype("float32")
    names = {"images": images, "classes": rng.integers(0, 4, 64)}
    codes = [code for _, code in blocks("pictures.md")]
    assert len(codes) == 6
    for code in codes:
        exec(compile(code, "pictures.md", "exec"), names)
    drawn = ["density", "history", "masks", "trade_off"]
    assert [path.stem for path in sorted(tmp_path.glob("*.png"))] == drawn
    assert (tmp_path / "report.html").stat().st_size > 5000
    for folder, tag in (("optg", b"scores/"), ("magnitude", b"kept_per_unit/")):
        (events,) = (tmp_path / "logs" / folder).iterdir()
        assert tag in events.read_bytes()
