"""`sparsify` and `strip` on models of every kind."""

import copy
import zipfile

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst.layers import SparseComposite, SparseMixin
from keras_dst.methods import DST, Magnitude
from keras_dst.surgery import is_sparse
from tests import models
from tests.backends import once

x, y = models.data()


@pytest.fixture(params=models.MODELS)
def model(request):
    keras.utils.set_random_seed(0)
    return models.MODELS[request.param]()


def layers_of(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, SparseMixin)]


def prune_somewhat(model):
    """Thresholds that prune a good part of every layer."""
    for layer in layers_of(model):
        for _, variable, state in layer.masked_weights():
            middle = np.median(np.abs(variable.numpy()))
            state["threshold"].assign(np.full(state["threshold"].shape, middle))


def test_a_mask_of_ones_changes_nothing(model):
    before = models.predict(model, x)
    report = keras_dst.sparsify(model, DST())
    assert len(report.sparse) == len(layers_of(model)) >= 3
    np.testing.assert_array_equal(models.predict(model, x), before)


def test_strip_predicts_the_same_and_leaves_no_class_of_ours(model):
    classes = [type(layer) for layer in model._flatten_layers()]
    names = [v.path for v in model.variables]
    keras_dst.sparsify(model, DST())
    prune_somewhat(model)
    sparse = models.predict(model, x)
    assert keras_dst.strip(model) is model
    np.testing.assert_array_equal(models.predict(model, x), sparse)
    assert [type(layer) for layer in model._flatten_layers()] == classes
    assert [v.path for v in model.variables] == names
    assert not is_sparse(model)
    for layer in model._flatten_layers():
        if isinstance(layer, (keras.layers.Dense, keras.layers.Conv2D)):
            zeros = np.mean(layer.kernel.numpy() == 0)
            assert 0.3 < zeros < 0.7


def test_a_stripped_model_is_made_sparse_again_and_every_weight_moves_in_a_step(model):
    keras_dst.sparsify(model, DST())
    keras_dst.strip(model)
    keras_dst.sparsify(model, DST(alpha=0.1))
    models.compiled(model, run_eagerly=False)
    before = models.arrays(model.trainable_variables)
    model.fit(x, y, batch_size=len(x), verbose=0)
    for variable, old in zip(model.trainable_variables, before):
        assert np.any(variable.numpy() != old), f"{variable.path} did not move"


def test_keras_file_round_trip(model, tmp_path):
    keras_dst.sparsify(model, DST(sparsity=0.5))
    prune_somewhat(model)
    expected = models.predict(model, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(models.predict(loaded, x), expected)
    for a, b in zip(model.weights, loaded.weights):  # those under the mask as well
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    assert len(layers_of(loaded)) == len(layers_of(model))
    assert {repr(layer.method) for layer in layers_of(loaded)} == {repr(DST(0.5))}
    keras_dst.strip(loaded)
    np.testing.assert_array_equal(models.predict(loaded, x), expected)
    assert not any(isinstance(z, SparseComposite) for z in loaded._flatten_layers())


@once
def test_weights_file_round_trip(model, tmp_path):
    keras_dst.sparsify(model, DST())
    prune_somewhat(model)
    expected = models.predict(model, x)
    model.save_weights(tmp_path / "sparse.weights.h5")
    for variable in model.variables:
        if "seed" not in variable.path:
            variable.assign(np.zeros(variable.shape))
    model.load_weights(tmp_path / "sparse.weights.h5")
    np.testing.assert_array_equal(models.predict(model, x), expected)


def test_dense_weights_load_where_the_file_names_attributes(tmp_path):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    layer = model.layers[0]
    store = {}
    layer.save_own_variables(store)
    keras_dst.sparsify(model, DST())
    layer.sparse_state["kernel"]["threshold"].assign(np.ones(4))
    saved = {key: np.array(value.numpy()) + 1 for key, value in store.items()}
    layer.load_own_variables(saved)
    np.testing.assert_array_equal(layer.sparse_state["kernel"]["threshold"].numpy(), np.ones(4))
    np.testing.assert_array_equal(layer.bias.numpy(), np.ones(4))


def test_dense_weights_never_load_by_halves(tmp_path):
    model = models.sequential()
    model.save_weights(tmp_path / "dense.weights.h5")
    keras_dst.sparsify(model, DST())
    with pytest.raises((ValueError, UserWarning)):  # Keras's file names layers by their class
        model.load_weights(tmp_path / "dense.weights.h5")


@once
def test_a_stripped_file_has_no_trace_of_keras_dst(model, tmp_path):
    keras_dst.sparsify(model, DST())
    models.compiled(model).optimizer.build(model.trainable_variables)
    keras_dst.strip(model).save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert "keras_dst" not in archive.read("config.json").decode()


@pytest.mark.parametrize("scaled", [False, True])
def test_nor_has_one_that_was_pruned_by_its_optimiser(scaled, tmp_path):
    model = models.sequential()
    optimizer = keras_dst.SparseOptimizer("adam", Magnitude(0.5))
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    models.compiled(model, optimizer).optimizer.build(model.trainable_variables)
    keras_dst.strip(model).save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert "keras_dst" not in archive.read("config.json").decode()
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(loaded.optimizer.variables) == len(model.optimizer.variables)


@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_a_trained_model_goes_on_training_with_its_optimiser(inner):
    model = models.compiled(models.residual(), inner)
    model.fit(x, y, epochs=2, verbose=0)
    slots = {v.path: v.numpy().copy() for v in model.optimizer.variables}
    keras_dst.sparsify(model, DST())
    kept = {v.path: v.numpy().copy() for v in model.optimizer.variables}
    for path, value in slots.items():
        np.testing.assert_array_equal(kept[path], value, err_msg=path)
    assert any("threshold" in path for path in kept) == (inner == "adam")
    model.fit(x, y, verbose=0)
    assert int(model.optimizer.iterations) == 9


def test_a_shared_layer_keeps_one_mask():
    model = models.nested()
    report = keras_dst.sparsify(model, DST())
    assert len([path for path in report.sparse if "shared" in path]) == 1


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ("dense_a", ["dense_a"]),
        ("dense_.*", ["dense_a", "dense_b"]),
        (["dense_b", "conv"], ["conv", "dense_b"]),
        (lambda layer: isinstance(layer, keras.layers.Conv2D), ["conv"]),
    ],
)
def test_filters(filters, expected):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(2, 3, name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(4, name="dense_a"),
            keras.layers.Dense(2, name="dense_b"),
        ]
    )
    report = keras_dst.sparsify(model, DST(), filters)
    assert [path.rpartition("/")[2] for path in report.sparse] == expected
    assert [layer.name for layer in layers_of(model)] == expected
    assert set(report.skipped.values()) == {"not selected by filters"}


def test_the_report_taken_for_the_model_says_where_the_model_is():
    model = models.MODELS["sequential"]()
    report = keras_dst.sparsify(model, DST())
    assert copy.deepcopy(report).sparse == report.sparse
    with pytest.raises(AttributeError, match=r"'fit'\. sparsify\(\) changes the model in place"):
        report.fit(x, y)


def test_the_report_says_what_was_skipped_and_why():
    class Undeclared(models.Mixer):
        prunable_weights = ()

    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            keras.layers.DepthwiseConv2D(3),
            keras.layers.SpectralNormalization(keras.layers.Conv2D(4, 3)),
            keras.layers.Dense(4, name="tuned"),
            keras.layers.Dense(4, name="quantised"),
            Undeclared(4),
            keras.layers.Conv2D(8, 3, name="other"),
            keras.layers.Conv2D(8, 3),
        ]
    )
    model.get_layer("tuned").enable_lora(2)
    model.get_layer("quantised").quantize("int8")
    report = keras_dst.sparsify(
        model, DST(pattern="1x4"), filters=lambda layer: layer.name != "other"
    )
    assert report.sparse == [model.layers[-1].path]
    parts = [
        "needs an input axis",
        "prune it with SparseOptimizer",  # the wrapper, which holds the kernel too
        "prune it with SparseOptimizer",
        "LoRA",
        "quantised",
        "Undeclared is not supported",
        "not selected by filters",
    ]
    assert len(report.skipped) == len(parts)
    for reason, part in zip(report.skipped.values(), parts):
        assert part in reason
        assert reason in str(report)


def test_filters_name_layers_or_those_around_them():
    model = models.recurrent()
    names = [layer.name for layer in model.layers]
    bidirectional = next(name for name in names if "bidirectional" in name)
    report = keras_dst.sparsify(model, DST(), filters=bidirectional)
    assert len(report.sparse) == 2
    assert all("lstm_cell" in path for path in report.sparse)
    keras_dst.strip(model)
    assert keras_dst.sparsify(model, DST(), filters=report.sparse[1]).sparse == report.sparse[1:]


def test_one_weight_has_one_mask():
    class Tied(models.Mixer):
        def build(self, shape):
            self.mix = first.mix

    first = models.Mixer(8)
    model = keras.Sequential([keras.Input((8,)), first, Tied(8)])
    with pytest.raises(ValueError, match="hold the same weight"):
        keras_dst.sparsify(model, DST())
    assert not is_sparse(model)


def test_a_table_that_is_read_both_ways_has_one_mask(tmp_path):
    if not hasattr(keras.layers, "ReversibleEmbedding"):
        pytest.skip("this Keras has no ReversibleEmbedding")
    for tied in (True, False):
        table = keras.layers.ReversibleEmbedding(16, 8, tie_weights=tied)
        tokens = keras.Input((4,), dtype="int32")
        model = keras.Model(tokens, table(keras.layers.Dense(8)(table(tokens)), reverse=True))
        keras_dst.sparsify(model, DST())
        prune_somewhat(model)
        data = np.arange(12).reshape(3, 4)
        expected = models.predict(model, data)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(models.predict(loaded, data), expected)
        keras_dst.strip(model)
        np.testing.assert_array_equal(models.predict(model, data), expected)
        weights = [w for w in table.weights if len(w.shape) == 2]
        assert len(weights) == (1 if tied else 2)
        assert all(0.4 < np.mean(w.numpy() == 0) < 0.6 for w in weights)


def test_lora_does_not_go_with_a_mask():
    model = models.sequential()
    keras_dst.sparsify(model, DST())
    before = models.predict(model, x)
    with pytest.raises(ValueError, match=r"strip\(model\) first"):
        model.layers[-1].enable_lora(2)
    np.testing.assert_array_equal(models.predict(model, x), before)


def test_zeros_survive_quantisation():
    model = models.sequential()
    keras_dst.sparsify(model, DST())
    prune_somewhat(model)
    dense = model.layers[-1]
    with pytest.raises(NotImplementedError, match="SparseDense"):  # Model.quantize warns of it
        dense.quantize("int8")
    keras_dst.strip(model)
    zeros = dense.kernel.numpy() == 0
    dense.quantize("int8")
    assert dense._kernel.dtype == "int8"
    assert np.all(dense._kernel.numpy()[zeros] == 0)
    assert 0.3 < zeros.mean() < 0.7


class TestErrors:
    """Bad input: what was expected, what was received, the fix; and the model as it was."""

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (keras.layers.Dense(2)(keras.Input((3,))), "keras.Model"),
            ("model.keras", "load_model"),
            (42, "Keras 3 model"),
        ],
    )
    @pytest.mark.parametrize("verb", [lambda m: keras_dst.sparsify(m, DST()), keras_dst.strip])
    def test_no_model(self, wrong, message, verb):
        with pytest.raises(TypeError, match=message):
            verb(wrong)

    @pytest.mark.parametrize(
        ("module", "message"),
        [("tf_keras.src.engine.training", "Keras 2 model"), ("torch.nn.modules.module", "torch")],
    )
    def test_models_of_others(self, module, message):
        foreign = type("Model", (), {"__module__": module})()
        with pytest.raises(TypeError, match=message):
            keras_dst.sparsify(foreign, DST())

    def test_unbuilt(self):
        with pytest.raises(ValueError, match="has no weights yet"):
            keras_dst.sparsify(keras.Sequential([keras.layers.Dense(2)]), DST())

    def test_method_of_the_other_family(self):
        with pytest.raises(TypeError, match="SparseOptimizer"):
            keras_dst.sparsify(models.residual(), Magnitude(0.5))
        with pytest.raises(TypeError, match="Expected a method"):
            keras_dst.sparsify(models.residual(), "dst")
        with pytest.raises(TypeError, match=r"the class DST\. Call it: DST\("):
            keras_dst.sparsify(models.residual(), DST)

    def test_filter_that_fits_nothing(self):
        model = models.residual()
        with pytest.raises(ValueError, match=r"no_such_layer.*fits none"):
            keras_dst.sparsify(model, DST(), "no_such_layer")
        with pytest.raises(ValueError, match="no regular expression"):
            keras_dst.sparsify(model, DST(), "(")
        with pytest.raises(TypeError, match="filters"):
            keras_dst.sparsify(model, DST(), 3)
        with pytest.raises(TypeError, match="of a layer give its name"):
            keras_dst.sparsify(model, DST(), model.layers[-1])
        assert not is_sparse(model)

    def test_nothing_supported(self):
        model = keras.Sequential([keras.Input((3,)), keras.layers.ReLU()])
        with pytest.raises(ValueError, match="nothing to make sparse"):
            keras_dst.sparsify(model, DST())

    def test_twice(self):
        model = models.residual()
        keras_dst.sparsify(model, DST())
        with pytest.raises(ValueError, match="sparse already"):
            keras_dst.sparsify(model, DST())

    def test_unknown_class_in_a_file(self, tmp_path):
        model = keras.Sequential([keras.Input((3,)), models.MyDense(2)])
        keras_dst.sparsify(model, DST())
        config = model.get_config()
        for layer in config["layers"]:
            if "stock_class" in layer["config"]:
                layer["config"]["stock_class"] = "elsewhere>Unknown"
        with pytest.raises(TypeError, match="register_keras_serializable"):
            keras.Sequential.from_config(config)
