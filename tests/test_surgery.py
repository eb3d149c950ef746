"""Tests of `sparsify` and `strip` on models of every kind."""

import collections
import copy
import warnings
import zipfile

import keras
import numpy as np
import pytest

import keras_dst
from keras_dst.callbacks import SparseTraining
from keras_dst.layers.base import SparseMixin
from keras_dst.layers.classes import SparseContainer
from keras_dst.methods import DCIL, DST, ST3, Consensus, FlipOut, Magnitude, OptG, RigL
from keras_dst.optimizers import sparse_optimizers
from keras_dst.schedules import Constant, Cubic
from keras_dst.surgery import has_kernel, has_sparse_layers
from tests import models
from tests.backends import LONG, every, once

pytestmark = every(64)

x, y = models.data()


@pytest.fixture(params=models.MODELS)
def model(request):
    keras.utils.set_random_seed(0)
    return models.MODELS[request.param]()


def layers_of(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, SparseMixin)]


def paths(report):
    return [path for path, _ in report.sparsified]


def prune_somewhat(model):
    """Set the thresholds so that about half of every layer is pruned."""
    for layer in layers_of(model):
        for _, variable, state in layer.masked_weights():
            middle = np.median(np.abs(variable.numpy()))
            state["threshold"].assign(np.full(state["threshold"].shape, middle))


@once
@pytest.mark.parametrize("method", [DST, DCIL, Magnitude])
def test_sparsify_does_not_serialize_a_model(method, monkeypatch):
    """Keras imports TensorFlow to serialize a model, and this import takes seconds."""
    model = models.compiled(models.residual())

    def serialized(*args):
        pytest.fail("Expected no call of `get_config`.")

    for cls in (type(model), keras.Sequential):
        monkeypatch.setattr(cls, "get_config", serialized)
    keras_dst.sparsify(model, method(0.5))
    keras_dst.strip(model)


@every(64)
@pytest.mark.parametrize("method", [DST, ST3, OptG, DCIL, Consensus, Magnitude, FlipOut, RigL])
def test_pruned_weights_become_positive_zeros(method):
    """No pruned weight is -0.0, because a file with both 0.0 and -0.0 would compress badly."""
    model = models.compiled(models.sequential())
    keras_dst.sparsify(model, method(0.5))
    with warnings.catch_warnings():
        # A single epoch may be too short to reach the target, so `fit` may warn.
        warnings.simplefilter("ignore")
        model.fit(x, y, verbose=0, callbacks=[SparseTraining()])
    keras_dst.strip(model)
    values = np.concatenate([weight.ravel() for weight in model.get_weights()])
    assert np.sum(values == 0) > 100
    assert not np.signbit(values[values == 0]).any()


@every(48)
def test_a_mask_of_ones_changes_nothing(model):
    before = models.predict(model, x)
    report = keras_dst.sparsify(model, DST())
    assert len(report.sparsified) == len(layers_of(model)) >= 3
    np.testing.assert_array_equal(models.predict(model, x), before)


@every(48)
def test_strip_preserves_predictions_and_stock_classes(model):
    classes = [type(layer) for layer in model._flatten_layers()]
    names = [v.path for v in model.variables]
    keras_dst.sparsify(model, DST())
    prune_somewhat(model)
    sparse = models.predict(model, x)
    assert keras_dst.strip(model) is model
    np.testing.assert_array_equal(models.predict(model, x), sparse)
    assert [type(layer) for layer in model._flatten_layers()] == classes
    assert [v.path for v in model.variables] == names
    assert not has_sparse_layers(model)
    for layer in model._flatten_layers():
        if isinstance(layer, (keras.layers.Dense, keras.layers.Conv2D)):
            zeros = np.mean(layer.kernel.numpy() == 0)
            assert 0.3 < zeros < 0.7


@every(64)
def test_a_stripped_model_can_be_made_sparse_again_and_trains_all_weights(model):
    keras_dst.sparsify(model, DST())
    keras_dst.strip(model)
    keras_dst.sparsify(model, DST(alpha=0.1))
    models.compiled(model, run_eagerly=False)
    before = models.arrays(model.trainable_variables)
    model.fit(x, y, batch_size=len(x), verbose=0)
    for variable, old in zip(model.trainable_variables, before):
        assert np.any(variable.numpy() != old), f"{variable.path} did not move"


@every(48)
def test_keras_file_round_trip(model, tmp_path):
    keras_dst.sparsify(model, DST(sparsity=0.5))
    prune_somewhat(model)
    expected = models.predict(model, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(models.predict(loaded, x), expected)
    # The file also contains the values of weights that are masked.
    for a, b in zip(model.weights, loaded.weights):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    assert len(layers_of(loaded)) == len(layers_of(model))
    assert {repr(layer.method) for layer in layers_of(loaded)} == {repr(DST(0.5))}
    keras_dst.strip(loaded)
    np.testing.assert_array_equal(models.predict(loaded, x), expected)
    assert not any(isinstance(z, SparseContainer) for z in loaded._flatten_layers())


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


def test_dense_weights_load_from_files_with_attribute_names(tmp_path):
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


@every(48)
def test_a_weights_file_of_the_dense_model_loads_into_the_sparse_model(model, tmp_path):
    """Keras names a layer in a weights file by its class and a number, such as `dense_1`.

    The test also uses a model in which only some layers are sparse.
    """
    expected = models.predict(model, x)
    model.save_weights(tmp_path / "dense.weights.h5")
    for some in (False, True):
        keras_dst.strip(model)
        for variable in model.variables:
            if "seed" not in variable.path:
                variable.assign(np.zeros(variable.shape))
        keras_dst.sparsify(model, DST(), every_second(model) if some else None)
        model.load_weights(tmp_path / "dense.weights.h5")
        np.testing.assert_array_equal(models.predict(model, x), expected)


def every_second(model):
    """Return a filter that selects every second layer that has a kernel."""
    chosen = [layer for layer in model._flatten_layers() if has_kernel(layer)][::2]
    return lambda layer: any(layer is other for other in chosen)


LEARNED = {
    "dst": DST(0.5),
    "optg": OptG(0.5),
    "dcil": DCIL(0.5),
    "consensus": Consensus(0.5),
}


@every(32)
@pytest.mark.parametrize("name", LEARNED)
def test_a_legacy_file_of_the_dense_model_loads_into_the_sparse_model(name, tmp_path):
    """A legacy `.h5` file stores the weights of a layer in a fixed order, without their names."""
    dense = models.residual() if name == "dcil" else models.nested()
    for variable in dense.variables:
        variable.assign(np.random.default_rng(0).uniform(0.1, 0.2, variable.shape))
    expected = models.predict(dense, x)
    dense.save(tmp_path / "whole.h5")
    dense.save_weights(tmp_path / "dense.weights.h5")
    for file, options in (
        ("whole.h5", {}),
        ("whole.h5", {"by_name": True}),
        ("whole.h5", {"skip_mismatch": True}),
        ("whole.h5", {"by_name": True, "skip_mismatch": True}),
        ("dense.weights.h5", {}),
        ("dense.weights.h5", {"skip_mismatch": True}),
    ):
        model = keras.models.clone_model(dense)
        keras_dst.sparsify(model, LEARNED[name])
        model.load_weights(tmp_path / file, **options)
        np.testing.assert_array_equal(models.predict(model, x), expected)
        keras_dst.strip(model)
        assert "load_weights" not in vars(model)
        np.testing.assert_array_equal(models.predict(model, x), expected)


def test_strip_keeps_an_own_load_weights_of_the_model():
    model = models.sequential()
    model.load_weights = own = lambda path: path
    keras_dst.strip(model)
    assert vars(model)["load_weights"] is own


def test_a_legacy_file_of_the_sparse_model_restores_its_masks(tmp_path):
    model = models.sequential()
    keras_dst.sparsify(model, DST(0.5))
    prune_somewhat(model)
    expected = models.predict(model, x)
    model.save(tmp_path / "sparse.h5")
    for layer in layers_of(model):
        for _, _, state in layer.masked_weights():
            state["threshold"].assign(np.zeros(state["threshold"].shape))
    assert np.any(models.predict(model, x) != expected)
    model.load_weights(tmp_path / "sparse.h5")
    np.testing.assert_array_equal(models.predict(model, x), expected)


def test_loading_dense_weights_does_not_change_masks(tmp_path):
    model = models.sequential()
    model.save_weights(tmp_path / "dense.weights.h5")
    keras_dst.sparsify(model, DST())
    prune_somewhat(model)
    masked = models.predict(model, x)
    model.load_weights(tmp_path / "dense.weights.h5")
    np.testing.assert_array_equal(models.predict(model, x), masked)


def test_loading_sparse_weights_into_a_dense_model_raises(tmp_path):
    model = models.sequential()
    keras_dst.sparsify(model, DST())
    model.save_weights(tmp_path / "sparse.weights.h5")
    keras_dst.strip(model)
    with pytest.raises(ValueError, match="expected 1 variables, but received 2"):
        model.load_weights(tmp_path / "sparse.weights.h5")


@once
def test_files_of_stripped_layer_methods_do_not_mention_keras_dst(model, tmp_path):
    keras_dst.sparsify(model, DST())
    models.compiled(model).optimizer.build(model.trainable_variables)
    keras_dst.strip(model).save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert "keras_dst" not in archive.read("config.json").decode()


@pytest.mark.parametrize("scaled", [False, True])
def test_files_of_stripped_optimizers_do_not_mention_keras_dst(scaled, tmp_path):
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


def test_strip_removes_sparse_optimizers_in_nested_containers():
    Pair = collections.namedtuple("Pair", "first second")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    sparse = [keras_dst.SparseOptimizer("sgd", Magnitude(0.5)) for _ in range(3)]
    model.own = {"list": [sparse[0]], "pair": Pair(sparse[1], {"deep": sparse[2]})}
    keras_dst.strip(model)
    assert model.own["list"] == [sparse[0].inner_optimizer]
    assert model.own["pair"].first is sparse[1].inner_optimizer
    assert model.own["pair"].second["deep"] is sparse[2].inner_optimizer


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer"
)
def test_strip_removes_all_sparse_optimizers_inside_a_multi_optimizer(tmp_path):
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense(16, "relu"), keras.layers.Dense(2, "softmax")
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), *dense])
    kernel, head = (layer.kernel for layer in dense)
    adam, sgd = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.01, momentum=0.9)
    by_path = keras.optimizers.OptimizerMap(keras_dst.SparseOptimizer(sgd, Magnitude(0.5)))
    by_path[kernel.path] = keras_dst.SparseOptimizer(adam, Magnitude(0.75))
    several = keras.optimizers.MultiOptimizer(by_path)
    models.compiled(model, several)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[SparseTraining()])
    predicted = model.predict(x, verbose=0)
    keras_dst.strip(model)
    assert model.optimizer is several
    assert {id(inner) for inner in several.optimizers} == {id(adam), id(sgd)}
    assert (by_path.default_optimizer, by_path[kernel.path]) == (sgd, adam)
    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)
    assert np.mean(kernel.numpy() == 0) == 0.75
    assert np.mean(head.numpy() == 0) == 0.5
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert "keras_dst" not in archive.read("config.json").decode()
    steps = int(adam.iterations.numpy())
    model.fit(x, y, verbose=0)
    assert int(adam.iterations.numpy()) == int(sgd.iterations.numpy()) == steps + 3
    assert np.all(kernel.numpy() != 0)
    assert np.all(head.numpy() != 0)


@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_a_trained_model_continues_with_its_optimizer_state(inner):
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
    assert len([path for path in paths(report) if "shared" in path]) == 1


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ("dense_a", ["dense_a"]),
        ("dense_.*", ["dense_a", "dense_b"]),
        (["dense_b", "conv"], ["conv", "dense_b"]),
        (lambda layer: isinstance(layer, keras.layers.Conv2D), ["conv"]),
    ],
)
def test_sparsify_with_filters(filters, expected):
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
    assert [path.rpartition("/")[2] for path in paths(report)] == expected
    assert [layer.name for layer in layers_of(model)] == expected
    assert {reason for _, reason in report.skipped} == {"not selected by filters"}


def test_using_the_report_as_a_model_raises():
    model = models.MODELS["sequential"]()
    report = keras_dst.sparsify(model, DST())
    assert copy.deepcopy(report).sparsified == report.sparsified
    with pytest.raises(AttributeError, match=r"'fit'\. sparsify\(\) changes the model in place"):
        report.fit(x, y)


def test_the_report_lists_skipped_layers_with_reasons():
    class Undeclared(models.Mixer):
        prunable_weights = ()

    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            keras.layers.DepthwiseConv2D(3),
            keras.layers.SpectralNormalization(keras.layers.Conv2D(4, 3)),
            keras.layers.Dense(4, name="tuned"),
            keras.layers.Dense(4, name="quantized"),
            Undeclared(4),
            keras.layers.Conv2D(8, 3, name="other"),
            keras.layers.Conv2D(8, 3),
        ]
    )
    model.get_layer("tuned").enable_lora(2)
    model.get_layer("quantized").quantize("int8")
    report = keras_dst.sparsify(
        model, DST(pattern="1x4"), filters=lambda layer: layer.name != "other"
    )
    assert report.sparsified == [(model.layers[-1].path, ("kernel",))]
    parts = [
        "needs an input axis",
        # Two layers own the kernel: the wrapped layer and its wrapper.
        "masks the weights in the optimizer step, such as Magnitude",
        "masks the weights in the optimizer step, such as Magnitude",
        "LoRA",
        "quantized",
        "Undeclared is not supported",
        "not selected by filters",
    ]
    assert len(report.skipped) == len(parts)
    for (_, reason), part in zip(report.skipped, parts):
        assert part in reason
        assert reason in str(report)


@once
def test_strip_removes_the_constraint_of_the_method_from_inner_layers():
    class NormedMixer(models.Mixer):
        def build(self, shape):
            super().build(shape)
            self.norm = keras.layers.LayerNormalization(
                scale=False, beta_constraint=keras.constraints.NonNeg()
            )
            self.norm.build((None, self.units))

    layer = NormedMixer(8)
    model = keras.Sequential([keras.Input((6,)), layer])
    keras_dst.sparsify(model, OptG(0.5))
    assert not isinstance(layer.norm.beta.constraint, keras.constraints.NonNeg)
    keras_dst.strip(model)
    assert isinstance(layer.norm.beta.constraint, keras.constraints.NonNeg)


class DoubledKernel(keras.layers.Dense):
    @property
    def kernel(self):
        return 2 * super().kernel


@once
def test_layers_that_compute_their_kernel_are_skipped():
    class SameKernel(keras.layers.Dense):
        @property
        def kernel(self):
            return super().kernel

    doubled, same = DoubledKernel(4), SameKernel(4)
    model = keras.Sequential([keras.Input((6,)), doubled, same])
    report = keras_dst.sparsify(model, OptG(0.5))
    assert paths(report) == [same.path]
    ((path, reason),) = report.skipped
    assert path == doubled.path
    assert "DoubledKernel computes `kernel` from a variable" in reason
    unbuilt = keras_dst.tfmot.prune_low_magnitude(DoubledKernel(4, name="own"))
    with pytest.raises(ValueError, match="'own' cannot be sparse: DoubledKernel computes"):
        unbuilt.build((None, 6))


@once
@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("mix", TypeError, "must be a tuple of names.*Received: 'mix'"),
        ((3,), TypeError, r"must be a tuple of names.*Received: \(3,\)"),
        (("mixx",), ValueError, "contains 'mixx', but the layer has no variable.*: 'mix', 'other'"),
        (("parts",), ValueError, "contains 'parts', but the layer has no variable"),
    ],
)
def test_wrong_names_in_prunable_weights_raise(names, error, message):
    class Named(models.Mixer):
        prunable_weights = names

        def build(self, shape):
            super().build(shape)
            self.other = self.add_weight(shape=(3, 3), name="other")
            self.parts = [self.mix]

    model = keras.Sequential([keras.Input((6,)), Named(4), keras.layers.Dense(2)])
    with pytest.raises(error, match=message):
        keras_dst.sparsify(model, OptG(0.5))
    assert not has_sparse_layers(model)
    with pytest.raises(error, match=message):
        keras_dst.tfmot.prune_low_magnitude(Named(4)).build((None, 6))


@once
def test_prunable_weights_may_be_none_and_other_attributes_are_kept():
    class Optional(models.Mixer):
        prunable_weights = ("mix", "other")

        def __init__(self, units):
            super().__init__(units)
            self.other, self._mix = None, "mode"

    built, unbuilt = Optional(4), keras_dst.tfmot.prune_low_magnitude(Optional(4))
    model = keras.Sequential([keras.Input((6,)), built])
    assert keras_dst.sparsify(model, OptG(0.5)).sparsified == [(built.path, ("mix",))]
    model.add(unbuilt)
    for layer in (built, unbuilt):
        assert isinstance(layer, SparseMixin)
        assert layer._mix == "mode"
    keras_dst.strip(model)
    for layer in (built, unbuilt):
        assert isinstance(layer.mix, keras.Variable)
        assert {"_mix": "mode", "other": None}.items() <= vars(layer).items()
        assert not any("_sparse" in name for name in vars(layer))


def test_filters_match_layers_and_their_containers():
    model = models.recurrent()
    names = [layer.name for layer in model.layers]
    bidirectional = next(name for name in names if "bidirectional" in name)
    report = keras_dst.sparsify(model, DST(), filters=bidirectional)
    assert len(report.sparsified) == 2
    assert all("lstm_cell" in path for path in paths(report))
    keras_dst.strip(model)
    again = keras_dst.sparsify(model, DST(), filters=paths(report)[1])
    assert again.sparsified == report.sparsified[1:]


def test_two_layers_with_one_weight_raise():
    class Tied(models.Mixer):
        def build(self, shape):
            self.mix = first.mix

    first = models.Mixer(8)
    model = keras.Sequential([keras.Input((8,)), first, Tied(8)])
    with pytest.raises(ValueError, match="hold the same weight"):
        keras_dst.sparsify(model, DST())
    assert not has_sparse_layers(model)


def test_a_reversible_embedding_has_one_mask(tmp_path):
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


def test_enabling_lora_on_a_sparse_layer_raises():
    model = models.sequential()
    keras_dst.sparsify(model, DST())
    before = models.predict(model, x)
    with pytest.raises(ValueError, match=r"strip\(model\) first"):
        model.layers[-1].enable_lora(2)
    np.testing.assert_array_equal(models.predict(model, x), before)


def test_quantization_preserves_zeros():
    model = models.sequential()
    keras_dst.sparsify(model, DST())
    prune_somewhat(model)
    dense = model.layers[-1]
    with pytest.raises(ValueError, match=r"strip\(model\) first, then quantize"):
        dense.quantize("int8")
    keras_dst.strip(model)
    zeros = dense.kernel.numpy() == 0
    dense.quantize("int8")
    assert dense._kernel.dtype == "int8"
    assert np.all(dense._kernel.numpy()[zeros] == 0)
    assert 0.3 < zeros.mean() < 0.7


# -- methods that mask the optimizer step ----------------------------------------------------------


def zeros_of(model):
    return {v.path: np.mean(v.numpy() == 0) for v in model.trainable_variables if len(v.shape) > 1}


@every(32)
@pytest.mark.parametrize("fitted", [False, True], ids=["compiled", "fitted"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scaling"])
def test_sparsify_wraps_the_optimizer_and_keeps_its_state(fitted, scaled, tmp_path):
    model = models.residual()
    inner = keras.optimizers.Adam(0.01)
    inner.exclude_from_weight_decay(var_names=["bias"])
    outer = keras.optimizers.LossScaleOptimizer(inner) if scaled else inner
    models.compiled(model, outer)
    if fitted:
        model.fit(x, y, verbose=0)
    inner.learning_rate = 0.02
    slots = {v.path: v.numpy().copy() for v in inner.variables}
    report = keras_dst.sparsify(model, Magnitude(0.5))
    assert len(report.sparsified) == 3
    assert not report.skipped
    assert not has_sparse_layers(model)
    assert (model.optimizer is outer) == scaled
    assert sparse_optimizers(model.optimizer)[0].inner_optimizer is inner
    for variable in inner.variables:
        np.testing.assert_array_equal(variable.numpy(), slots[variable.path])
    history = model.fit(x, y, epochs=3, verbose=0, callbacks=[SparseTraining()])
    assert history.history["sparsity"][-1] == pytest.approx(0.5, abs=0.01)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert sparse_optimizers(loaded.optimizer)[0].method == Magnitude(0.5)
    assert keras_dst.strip(model) is model
    assert not sparse_optimizers(model.optimizer)
    assert (model.optimizer.inner_optimizer if scaled else model.optimizer) is inner
    assert float(keras.ops.convert_to_numpy(inner.learning_rate)) == pytest.approx(0.02)
    model.fit(x, y, verbose=0)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ("inner", ["inner/dense_a", "inner/dense_b"]),
        ("dense_.*", ["inner/dense_a", "inner/dense_b"]),
        (["dense_b", "conv"], ["conv", "inner/dense_b"]),
        ("inner/dense_b/kernel", ["inner/dense_b"]),
        (lambda layer: isinstance(layer, keras.layers.Conv2D), ["conv"]),
    ],
)
def test_filters_select_layers_for_sparse_optimizers(filters, expected):
    dense = [keras.layers.Dense(4, name="dense_a"), keras.layers.Dense(2, name="dense_b")]
    conv = keras.layers.Conv2D(2, 3, name="conv")
    inner = keras.Sequential([keras.Input((72,)), *dense], name="inner")
    model = keras.Sequential([keras.Input((8, 8, 3)), conv, keras.layers.Flatten(), inner])
    model.compile("sgd", "sparse_categorical_crossentropy")
    report = keras_dst.sparsify(model, Magnitude(0.5), filters)
    found = [path.removeprefix(f"{model.name}/") for path in paths(report)]
    assert sorted(found) == expected
    assert {reason for _, reason in report.skipped} == {"not selected by filters"}
    model.optimizer.build(model.trainable_variables)
    kernels = {id(kernel) for kernel in model.optimizer.kernels}
    chosen = [x.name for x in (conv, *dense) if id(x.kernel) in kernels]
    assert chosen == [path.rpartition("/")[2] for path in expected]


@once
@pytest.mark.parametrize(
    ("layer", "shape", "weights"),
    [
        (keras.layers.LSTM, (8, 4), ["kernel", "recurrent_kernel"]),
        (keras.layers.SeparableConv1D, (8, 4), ["depthwise_kernel", "pointwise_kernel"]),
    ],
)
def test_a_filter_can_select_one_of_two_kernels_of_a_layer(layer, shape, weights):
    arguments = {"kernel_size": 3} if "Conv" in layer.__name__ else {}
    for name in weights:
        model = keras.Sequential([keras.Input(shape), layer(6, **arguments)])
        model.compile("sgd", "mse")
        report = keras_dst.sparsify(model, Magnitude(0.5), f".*/{name}")
        assert [names for _, names in report.sparsified] == [(name,)]


def test_the_optimizer_skips_weights_without_the_pattern_axes():
    model = models.sequential()
    models.compiled(model)
    report = keras_dst.sparsify(model, Magnitude(0.5, pattern="1x4"))
    # `model.layers[3]` is the depthwise layer.
    assert [path for path, _ in report.skipped] == [model.layers[3].path]
    assert "needs an input axis" in str(report)
    model.fit(x, y, verbose=0, callbacks=[SparseTraining()])
    assert zeros_of(model)[model.layers[3].kernel.path] == 0


@pytest.mark.parametrize("first", [Magnitude(0.5), DST()])
@pytest.mark.parametrize("second", [Magnitude(0.5), DST()])
def test_a_sparse_model_is_not_made_sparse_again(first, second):
    model = models.compiled(models.residual())
    keras_dst.sparsify(model, first)
    with pytest.raises(ValueError, match="already sparse"):
        keras_dst.sparsify(model, second)
    keras_dst.strip(model)
    keras_dst.sparsify(model, second)


@once
@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ("features", ["before", "hidden", "logits"]),
        ("logits", ["before", "hidden", "inside"]),
        ("skipped", ["hidden", "inside", "logits"]),
        ("features and logits", ["before", "hidden"]),
    ],
)
def test_channel_pruning_skips_the_output_layers_of_a_nested_model(outputs, expected):
    x = keras.Input((8,), name="x"), keras.Input((8,), name="skip")
    features = keras.layers.Dense(8, "relu", name="inside")(x[0])
    hidden = keras.layers.Dense(8, "relu", name="hidden")(features)
    logits = keras.layers.Dense(4, name="logits")(hidden)
    nested = keras.Model(x, {"features": features, "logits": logits, "skipped": x[1] + 1.0})
    inputs = keras.Input((8,))
    before = keras.layers.Dense(8, "relu", name="before")(inputs)
    results = nested({"x": inputs, "skip": before})
    model = keras.Model(inputs, [results[name] for name in outputs.split(" and ")])
    model.compile("sgd", "mse")
    report = keras_dst.sparsify(model, Magnitude(0.5, "uniform", "channel"))
    assert sorted(path.rpartition("/")[2] for path in paths(report)) == expected


def test_the_report_is_a_table_in_a_notebook():
    model = models.compiled(models.residual())
    for method in (DST(), Magnitude(0.5)):
        report = keras_dst.sparsify(model, method, filters=lambda layer: layer.name != "<head>")
        table = report._repr_html_()
        assert table.startswith("<table>")
        assert table.count("<tr>") == 1 + len(report.sparsified) + len(report.skipped)
        for path in paths(report):
            assert path in table
            assert path in str(report)
        keras_dst.strip(model)


# -- frozen layers ---------------------------------------------------------------------------------


def frozen_model(how):
    """Return a model that contains a frozen base model of two layers."""
    layers = [keras.layers.Dense(64, "relu", trainable=how != "argument") for _ in range(2)]
    base = keras.Sequential(
        [keras.Input((16,)), *layers],
        name="base",
    )
    if how == "attribute":
        base.trainable = False
    if how == "layers":
        for layer in base.layers:
            layer.trainable = False
    if how == "weights":
        for layer in base.layers:
            layer.kernel.trainable = False
    head = [keras.layers.Dense(32, "relu", name="mid"), keras.layers.Dense(2, "softmax")]
    return keras.Sequential([keras.Input((16,)), base, *head])


@every(48)
@pytest.mark.parametrize("how", ["argument", "attribute", "layers", "weights"])
@pytest.mark.parametrize("method", [OptG(0.8), Magnitude(0.8)], ids=["OptG", "Magnitude"])
def test_frozen_layers_are_skipped(method, how):
    model = models.compiled(frozen_model(how))
    report = keras_dst.sparsify(model, method)
    assert len(report.sparsified) == 2
    assert len(report.skipped) == 2
    assert all("frozen" in reason for _, reason in report.skipped)
    before = models.arrays(model.get_layer("base").weights)
    data, labels = x.reshape(96, -1)[:, :16], y
    model.fit(data, labels, epochs=2, verbose=0, callbacks=[SparseTraining()])
    keras_dst.strip(model)
    for variable, old in zip(model.get_layer("base").weights, before):
        if "kernel" in variable.path:
            np.testing.assert_array_equal(variable.numpy(), old)


@every(32)
@pytest.mark.parametrize("method", [OptG(0.8), DST(0.8), DCIL(0.8, warmup=1.0), Magnitude(0.8)])
@pytest.mark.filterwarnings("ignore:.*training had reached sparsity:UserWarning")
def test_a_layer_frozen_after_sparsify_keeps_its_mask(method):
    model = models.compiled(frozen_model("trainable"))
    keras_dst.sparsify(model, method)
    model.get_layer("base").trainable = False
    models.compiled(model, model.optimizer)
    before = models.arrays(model.get_layer("base").variables)
    data, labels = x.reshape(96, -1)[:, :16], y
    history = model.fit(data, labels, epochs=2, verbose=0, callbacks=[SparseTraining()])
    assert history.history["sparsity"][-1] == pytest.approx(0.8, abs=0.02)
    for variable, old in zip(model.get_layer("base").variables, before):
        np.testing.assert_array_equal(variable.numpy(), old, err_msg=variable.path)
    keras_dst.strip(model)
    kernels = [v for v in model.get_layer("base").weights if "kernel" in v.path]
    assert all(np.all(kernel.numpy() != 0) for kernel in kernels)


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="Keras builds an optimizer for a fixed set of layers"
)
@every(32)
@pytest.mark.parametrize(("name", "with_callback"), [("Magnitude", False), ("RigL", True)])
def test_a_layer_that_is_frozen_between_two_fits_keeps_its_mask(name, with_callback):
    schedule = Cubic(0.8, begin_step=0, end_step=12)
    method = RigL(0.8, stop_step=12, frequency=2) if name == "RigL" else Magnitude(schedule)
    model = models.compiled(frozen_model("trainable"))
    keras_dst.sparsify(model, method)
    callbacks = [SparseTraining(epochs=4)] if with_callback else []
    data, labels = x.reshape(96, -1)[:, :16], y
    model.fit(data, labels, verbose=0, callbacks=callbacks)
    base = model.get_layer("base")
    base.trainable = False
    models.compiled(model, model.optimizer)
    before = models.arrays(base.variables)
    model.fit(data, labels, epochs=3, verbose=0, callbacks=callbacks)
    for variable, old in zip(base.variables, before):
        np.testing.assert_array_equal(variable.numpy(), old, err_msg=variable.path)
    trained = np.concatenate([layer.kernel.numpy().ravel() for layer in model.layers[1:]])
    assert np.mean(trained == 0) == pytest.approx(0.8, abs=0.02)


@once
@pytest.mark.parametrize("fitted", [False, True])
def test_selected_layers_may_be_frozen_before_the_optimizer_is_built(fitted, tmp_path):
    """Keras builds the optimizer of a loaded model without the variables of frozen layers."""
    data, labels = x.reshape(96, -1)[:, :16], y
    model = models.compiled(frozen_model("trainable"))
    keras_dst.sparsify(model, Magnitude(0.8), filters=["base", "mid"])
    if fitted:
        model.fit(data, labels, verbose=0, callbacks=[SparseTraining(epochs=3)])
    model.get_layer("base").trainable = False
    models.compiled(model, model.optimizer)
    if fitted:
        model.save(tmp_path / "model.keras")
        with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
            model = keras.saving.load_model(tmp_path / "model.keras")
    model.fit(data, labels, epochs=2, verbose=0, callbacks=[SparseTraining()])
    assert np.mean(model.get_layer("mid").kernel.numpy() == 0) == pytest.approx(0.8, abs=0.01)
    assert [name[-10:] for name in model.optimizer.kernel_names] == ["mid/kernel"]


# -- the optimizer of a compiled model -------------------------------------------------------------


def optimizers():
    """Return optimizers with different variables, including optimizers that wrap others."""
    several = keras.optimizers.Adafactor, keras.optimizers.Nadam, keras.optimizers.SGD
    found = {cls.__name__: cls(0.01) for cls in several}
    found["Adam"] = keras.optimizers.Adam(0.01, use_ema=True, gradient_accumulation_steps=2)
    found["scaled"] = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    if hasattr(keras.optimizers, "MultiOptimizer"):
        rest, biases = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.01, momentum=0.9)
        map_ = keras.optimizers.OptimizerMap(rest)
        map_[".*bias"] = biases
        found["several"] = keras.optimizers.MultiOptimizer(map_)
    return found


@every(48)
@pytest.mark.parametrize("name", optimizers())
def test_sparsify_keeps_the_optimizer_object_and_its_state(name):
    model = models.compiled(models.residual(), optimizers()[name])
    optimizer = model.optimizer
    optimizer.note = "set by the user"
    model.fit(x, y, epochs=2, verbose=0)
    before = models.arrays(optimizer.variables)
    names = [v.name for v in optimizer.variables]
    keras_dst.sparsify(model, DST())
    assert model.optimizer is optimizer
    assert optimizer.note == "set by the user"
    if name != "SGD":
        assert len(optimizer.variables) > len(before)
    model.fit(x, y, verbose=0)
    keras_dst.strip(model)
    assert len(optimizer.variables) == len(names)
    keras_dst.sparsify(model, DST())
    keras_dst.strip(model)
    after = models.arrays(optimizer.variables)
    changed = [n for n, a, b in zip(names, before, after) if not np.array_equal(a, b)]
    # One epoch of training has changed most variables of the optimizer.
    assert len(changed) > len(names) / 2 or name == "SGD"
    model.fit(x, y, verbose=0)
    counters = [v for v in optimizer.variables if v.name == "iteration"]
    assert max(int(v.numpy()) for v in counters) == 12


@every(32)
@pytest.mark.parametrize("name", optimizers())
def test_sparsify_and_strip_do_not_change_optimizer_state(name):
    model = models.compiled(models.residual(), optimizers()[name])
    model.fit(x, y, epochs=2, verbose=0)
    before = models.arrays(model.optimizer.variables)
    keras_dst.sparsify(model, DST())
    keras_dst.strip(model)
    assert len(model.optimizer.variables) == len(before)
    for variable, value in zip(model.optimizer.variables, before):
        np.testing.assert_array_equal(variable.numpy(), value, err_msg=variable.path)


@every(32)
@pytest.mark.parametrize("by", ["name", "variable"])
@pytest.mark.parametrize("fitted", [False, True], ids=["compiled", "fitted"])
def test_exclusions_from_weight_decay_are_kept(by, fitted):
    model = models.residual()
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=1.0)
    kernel = model.layers[1].kernel
    chosen = {"var_names": ["kernel"]} if by == "name" else {"var_list": [kernel]}
    optimizer.exclude_from_weight_decay(**chosen)
    models.compiled(model, optimizer)
    # All sample weights are 0, so only weight decay changes the weights.
    nothing = np.zeros(len(x))
    if fitted:
        model.fit(x, y, sample_weight=nothing, verbose=0)
    before, other = kernel.numpy().copy(), model.layers[-1].kernel.numpy().copy()
    for method in (DST(alpha=0.0), Magnitude(Constant(0.0, begin_step=0))):
        keras_dst.sparsify(model, method)
        model.fit(x, y, sample_weight=nothing, verbose=0)
        keras_dst.strip(model)
        model.fit(x, y, sample_weight=nothing, verbose=0)
        np.testing.assert_array_equal(kernel.numpy(), before)
    assert np.all(model.layers[-1].kernel.numpy() == other) == (by == "name")


# -- other formats ---------------------------------------------------------------------------------

needs_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the file format needs TensorFlow"
)


def sparse_models():
    """Return a model for each class of sparse layers."""
    dcil = models.sequential()
    keras_dst.sparsify(dcil, DCIL(0.5))
    dst, optg = models.residual(), models.convolutions()
    keras_dst.sparsify(dst, DST(0.5))
    keras_dst.sparsify(optg, OptG(0.5))
    inputs = keras.Input((8, 8, 3))
    gated = keras.layers.Conv2D(4, 3)(inputs)
    gated = keras_dst.layers.Gate(dependent=True)(gated, context=gated)
    gated = keras.layers.Dense(2, "softmax")(keras.layers.GlobalAveragePooling2D()(gated))
    return {"DST": dst, "DCIL": dcil, "OptG": optg, "Gate": keras.Model(inputs, gated)}


@needs_tensorflow
@pytest.mark.parametrize("name", ["DST", "DCIL", "OptG", "Gate"] if LONG else ["DCIL", "Gate"])
def test_tensorflow_checkpoints_contain_the_whole_state(name, tmp_path):
    import tensorflow as tf

    model, other = sparse_models()[name], sparse_models()[name]
    for variable in model.variables:
        if "seed" not in variable.path:
            value = variable.numpy()
            variable.assign(~value if value.dtype == bool else value + 1)
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(model=other).restore(path).assert_existing_objects_matched()
    for a, b in zip(model.weights, other.weights):
        np.testing.assert_array_equal(b.numpy(), a.numpy(), err_msg=a.path)
    tf.saved_model.save(other, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    expected = models.predict(model, x)
    (found,) = loaded.signatures["serving_default"](tf.constant(x)).values()
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    keras_dst.strip(other)
    path = tf.train.Checkpoint(model=other).save(str(tmp_path / "stripped"))
    assert not any("threshold" in key for key, _ in tf.train.list_variables(path))


@needs_tensorflow
def test_tensorflow_checkpoints_contain_the_optimizer_state(tmp_path):
    import tensorflow as tf

    fitted, other = (models.compiled(models.residual()) for _ in range(2))
    for model in (fitted, other):
        keras_dst.sparsify(model, Magnitude(0.5))
        model.optimizer.build(model.trainable_variables)
    fitted.fit(x, y, verbose=0, callbacks=[SparseTraining()])
    checkpoint = tf.train.Checkpoint(model=fitted, optimizer=fitted.optimizer)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    checkpoint = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
    checkpoint.restore(path).assert_existing_objects_matched()
    for a, b in zip(fitted.optimizer.variables, other.optimizer.variables):
        np.testing.assert_array_equal(b.numpy(), a.numpy(), err_msg=a.path)


@every(32)
@pytest.mark.filterwarnings("ignore:.*training had reached .*:UserWarning")
@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter:DeprecationWarning")
@pytest.mark.parametrize("name", ["DST", "DCIL", "OptG", "Gate"])
def test_an_unstripped_model_can_be_exported(name, tmp_path):
    model = sparse_models()[name]
    if keras.backend.backend() == "torch":
        import torch

        model.eval()
        torch.export.export(model, (torch.zeros(2, 8, 8, 3),))
        return
    models.compiled(model).fit(
        x, y, verbose=0, callbacks=[SparseTraining(steps_per_epoch=3)], epochs=1
    )
    model.export(tmp_path / "saved", verbose=False)
    import tensorflow as tf

    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(loaded.serve(x).numpy(), models.predict(model, x), atol=1e-5)


class TestErrors:
    """Errors state the expected input, the received input and a fix. The model is not changed."""

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (keras.layers.Dense(2)(keras.Input((3,))), "keras.Model"),
            ("model.keras", "load_model"),
            (42, "Keras 3 model"),
        ],
    )
    @pytest.mark.parametrize("verb", [lambda m: keras_dst.sparsify(m, DST()), keras_dst.strip])
    def test_other_objects_than_models_raise(self, wrong, message, verb):
        with pytest.raises(TypeError, match=message):
            verb(wrong)

    @pytest.mark.parametrize(
        ("module", "message"),
        [("tf_keras.src.engine.training", "Keras 2 model"), ("torch.nn.modules.module", "torch")],
    )
    def test_models_of_other_libraries_raise(self, module, message):
        foreign = type("Model", (), {"__module__": module})()
        with pytest.raises(TypeError, match=message):
            keras_dst.sparsify(foreign, DST())

    def test_an_unbuilt_model_raises(self):
        with pytest.raises(ValueError, match="has no weights yet"):
            keras_dst.sparsify(keras.Sequential([keras.layers.Dense(2)]), DST())

    def test_update_methods_need_a_compiled_model(self):
        with pytest.raises(
            ValueError, match=r"Call model.compile.*SparseOptimizer\(optimizer, Mag"
        ):
            keras_dst.sparsify(models.residual(), Magnitude(0.5))

    def test_other_objects_than_methods_raise(self):
        with pytest.raises(TypeError, match="Expected a method"):
            keras_dst.sparsify(models.residual(), "dst")
        with pytest.raises(TypeError, match=r"the class DST\. Call it: DST\("):
            keras_dst.sparsify(models.residual(), DST)

    def test_invalid_filters_raise(self):
        model = models.residual()
        with pytest.raises(ValueError, match=r"no_such_layer.*does not match any"):
            keras_dst.sparsify(model, DST(), "no_such_layer")
        with pytest.raises(ValueError, match="not a regular expression"):
            keras_dst.sparsify(model, DST(), "(")
        with pytest.raises(TypeError, match="filters"):
            keras_dst.sparsify(model, DST(), 3)
        with pytest.raises(TypeError, match="To select a layer, pass its name"):
            keras_dst.sparsify(model, DST(), model.layers[-1])
        assert not has_sparse_layers(model)

    def test_a_model_without_supported_layers_raises(self):
        model = keras.Sequential([keras.Input((3,)), keras.layers.ReLU()])
        with pytest.raises(ValueError, match="nothing to make sparse"):
            keras_dst.sparsify(model, DST())

    def test_making_a_model_sparse_twice_raises(self):
        model = models.residual()
        keras_dst.sparsify(model, DST())
        with pytest.raises(ValueError, match="already sparse"):
            keras_dst.sparsify(model, DST())

    def test_an_unknown_class_in_a_config_raises(self, tmp_path):
        model = keras.Sequential([keras.Input((3,)), models.MyDense(2)])
        keras_dst.sparsify(model, DST())
        config = model.get_config()
        for layer in config["layers"]:
            if "stock_class" in layer["config"]:
                layer["config"]["stock_class"] = "elsewhere>Unknown"
        with pytest.raises(TypeError, match="register_keras_serializable"):
            keras.Sequential.from_config(config)


def test_clones_keep_sparse_layers_inside_composite_layers():
    inputs = keras.Input((6, 8))
    attention = keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(attention))
    keras_dst.sparsify(model, DST())
    sparse = [row.sparse for row in keras_dst.report(model).layers]
    copy = keras.models.clone_model(model)
    assert sparse == [True] * 5
    assert [row.sparse for row in keras_dst.report(copy).layers] == sparse


@once
def test_a_kernel_without_entries_is_not_pruned():
    empty, full = keras.Input((0,)), keras.Input((4,))
    x = keras.layers.Add()(
        [keras.layers.Dense(8, name="empty")(empty), keras.layers.Dense(8)(full)]
    )
    model = keras.Model([empty, full], keras.layers.Dense(2)(x))
    optimizer = keras_dst.SparseOptimizer("sgd", Magnitude(0.5))
    optimizer.build(model.trainable_variables)
    assert len(optimizer.kernel_names) == 2
    report = keras_dst.sparsify(model, OptG(0.5))
    assert len(report.sparsified) == 2
    assert not any(path.endswith("empty") for path, _ in report.sparsified)
