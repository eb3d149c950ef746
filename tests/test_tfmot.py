"""Tests of `keras_dst.tfmot` against the algorithm of tfmot in NumPy."""

import json
import subprocess
import sys
from itertools import pairwise

import h5py
import keras
import numpy as np
import pytest
from keras import layers

import keras_dst
from keras_dst import tfmot
from keras_dst.tfmot import legacy_files
from keras_dst.tfmot.masks import block_mask, magnitude_mask
from tests import models
from tests.backends import every, heavy, once

pytestmark = every(24)

BATCH, STEPS = 8, 12
GAP = 1e-4
rng = np.random.default_rng(0)
x = rng.standard_normal((BATCH * STEPS, 9)).astype("float32")
y = rng.standard_normal((BATCH * STEPS, 7)).astype("float32")
DECAY = tfmot.PolynomialDecay(0.2, 0.8, begin_step=2, end_step=11, frequency=3)
EVERY = tfmot.ConstantSparsity(0.5, begin_step=0, frequency=1)


def dense(*units, inputs=9):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((inputs,)), *(layers.Dense(n, "tanh") for n in units)])


def fit(model, epochs=1, callbacks=None, **kwargs):
    callbacks = [tfmot.UpdatePruningStep()] if callbacks is None else callbacks
    kwargs = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(x, y, epochs=epochs, callbacks=callbacks, **kwargs)


def compiled(model, optimizer=None, **kwargs):
    model.compile(optimizer or keras.optimizers.SGD(0.5), "mse", **kwargs)
    return model


def masks_of(model):
    pruned = [layer for layer in model._flatten_layers() if tfmot.is_pruned(layer)]
    return [s["mask"].numpy() for layer in pruned for _, _, s in layer.masked_weights()]


# -- schedules -------------------------------------------------------------------------------------


def update_steps(schedule, until=30):
    return [step for step in range(until) if schedule(step)[0]]


@once
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (tfmot.ConstantSparsity(0.5, 0, frequency=10), [0, 10, 20]),
        (tfmot.ConstantSparsity(0.5, 3, frequency=10), [3, 13, 23]),
        (tfmot.ConstantSparsity(0.5, 3, end_step=13, frequency=10), [3, 13]),
        (tfmot.ConstantSparsity(0.5, 3, end_step=12, frequency=10), [3]),
        (tfmot.PolynomialDecay(0.0, 0.5, 4, 20, frequency=8), [4, 12, 20]),
        (tfmot.PolynomialDecay(0.0, 0.5, 4, 19, frequency=8), [4, 12]),
        (tfmot.ConstantSparsity(0.5, 0), [0]),
    ],
    ids=repr,
)
def test_update_steps_of_tfmot_schedules(schedule, expected):
    assert update_steps(schedule) == expected


@once
def test_sparsities_of_tfmot_schedules():
    decay = tfmot.PolynomialDecay(0.25, 0.75, 10, 20)
    found = [decay(step)[1] for step in (0, 10, 15, 20, 99)]
    # At step 15, half of the schedule has passed. The distance to the final sparsity is then
    # (1 - 0.5)**3 = 1/8 of the initial distance.
    np.testing.assert_allclose(found, [0.25, 0.25, 0.75 - 0.5 / 8, 0.75, 0.75], rtol=1e-6)
    assert tfmot.PolynomialDecay(0.0, 0.5, 0, 10, power=1)(5)[1] == pytest.approx(0.25)
    falling = tfmot.PolynomialDecay(0.5, 0.0, 0, 10, power=1)
    assert falling(5)[1] == pytest.approx(0.25)
    assert tfmot.ConstantSparsity(0.5, 0)(7)[1] == 0.5


@once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tfmot.ConstantSparsity(1.0, 0), "target_sparsity"),
        (lambda: tfmot.ConstantSparsity(0.5, -1), "begin_step"),
        (lambda: tfmot.ConstantSparsity(0.5, 5, 4), "end_step"),
        (lambda: tfmot.ConstantSparsity(0.5, 0, frequency=0), "frequency"),
        (lambda: tfmot.ConstantSparsity(0.5, 0.0), "whole numbers"),
        (lambda: tfmot.PolynomialDecay(0.0, 0.5, 0, -1), "needs an end_step"),
        (lambda: tfmot.PolynomialDecay(0.0, 1.5, 0, 9), "final_sparsity"),
        (lambda: tfmot.PruneLowMagnitude(EVERY, block_size=4), "block_size"),
        (lambda: tfmot.PruneLowMagnitude(EVERY, block_pooling_type="SUM"), "'AVG' or 'MAX'"),
        (lambda: tfmot.PruneLowMagnitude(EVERY, sparsity_m_by_n=(4, 2)), "m < n"),
    ],
)
def test_arguments_out_of_range_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@once
def test_a_schedule_of_another_class_raises():
    with pytest.raises(TypeError, match="PruningSchedule"):
        tfmot.prune_low_magnitude(dense(7), keras_dst.schedules.Cubic(0.5))


@once
def test_configs_round_trip():
    full = tfmot.PruneLowMagnitude(DECAY, (2, 4), "MAX", (2, 4))
    for thing in (DECAY, EVERY, full, tfmot.PruneLowMagnitude(EVERY)):
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(thing)))
        assert keras.saving.deserialize_keras_object(config) == thing


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "sparsity", "expected"),
    [
        ([4.0, -3.0, 2.0, -1.0], 0.5, [1, 1, 0, 0]),
        ([4.0, -3.0, 2.0, -1.0], 0.0, [1, 1, 1, 1]),
        ([4.0, -3.0, 2.0, -1.0], 0.99, [1, 0, 0, 0]),  # Even at 99 % sparsity, one weight is kept.
        ([4.0, 3.0, 2.0, 1.0, 0.5], 0.5, [1, 1, 0, 0, 0]),  # 2.5 rounds to 2.
        ([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 0.5, [1, 1, 1, 1, 0, 0, 0]),  # 3.5 rounds to 4.
        ([4.0, -2.0, 2.0, 1.0], 0.5, [1, 1, 1, 0]),  # Tied entries are kept.
        # The threshold is 0, and a weight whose magnitude equals the threshold is kept.
        ([4.0, 0.0, 0.0, 0.0], 0.5, [1, 1, 1, 1]),
    ],
)
def test_magnitude_mask(weights, sparsity, expected):
    found = magnitude_mask(np.array(weights, "float32"), sparsity)
    np.testing.assert_array_equal(found, np.array(expected, bool))


def test_masks_of_a_weight_without_entries():
    w = np.zeros((0, 4), "float32")
    assert magnitude_mask(w, 0.5).shape == block_mask(w, 0.5, (2, 2), "AVG").shape == (0, 4)


def test_block_mask_ranks_blocks_by_mean_or_maximum():
    w = np.array([[9, 0, 4, 4], [0, 0, 4, 4], [1, 1, 0, 6], [1, 1, 0, 0]], "float32")
    # The mean magnitudes of the four blocks are 2.25, 4, 1 and 1.5. The largest magnitudes in the
    # blocks are 9, 4, 1 and 6.
    of_means = np.kron([[1, 1], [0, 0]], np.ones((2, 2), bool))
    np.testing.assert_array_equal(block_mask(w, 0.5, (2, 2), "AVG"), of_means)
    of_largest = np.kron([[1, 0], [0, 1]], np.ones((2, 2), bool))
    np.testing.assert_array_equal(block_mask(w, 0.5, (2, 2), "MAX"), of_largest)


@once
def test_block_mask_if_blocks_do_not_divide_the_weight():
    # Blocks of 4 rows split the six rows of this weight into rows 0-3 and rows 4-5. However, tfmot
    # computes the score of the first block from rows 0-2, and the score of the second block from
    # rows 3-5.
    w = np.array([[0, 0, 0, 5, 5, 5]], "float32").T
    found = block_mask(w, 0.5, (4, 1), "AVG")
    np.testing.assert_array_equal(found[:, 0], [0, 0, 0, 0, 1, 1])
    # This block has 3 columns, but the weight tensor has only 1 column.
    assert block_mask(w, 0.5, (1, 3), "MAX").sum() == 3


# -- training --------------------------------------------------------------------------------------


def reference(w, schedule, rate, momentum=0.0, n_of_m=None):
    """Train a linear layer in NumPy with the algorithm of tfmot.

    Return the masks after every step and the weights after the last step.
    """
    mask, slot, masks = np.ones_like(w, bool), np.zeros_like(w), []
    for step in range(1, STEPS + 1):
        update, sparsity = schedule(step)
        if n_of_m:
            update = step == 1
        if update and not n_of_m:
            kept = max(1, round(w.size * (1 - sparsity)))
            magnitudes = np.sort(np.abs(w), axis=None)
            mask = np.abs(w) >= magnitudes[-kept]
            # The smallest kept and the largest pruned magnitude differ by more than the rounding
            # differences between CPUs.
            assert magnitudes[-kept] - magnitudes[-kept - 1] > GAP or not magnitudes[-kept]
        elif update:
            zeros, of = n_of_m
            mask = np.zeros_like(w, bool)
            for column in range(w.shape[1]):
                for start in range(0, len(w), of):
                    group = np.abs(w[start : start + of, column])
                    best = np.argsort(-group, kind="stable")[: of - zeros]
                    mask[start + best, column] = True
        w = w * mask
        masks.append(mask)
        part = slice((step - 1) * BATCH, step * BATCH)
        gradient = 2 * x[part].T @ (x[part] @ w - y[part]) / y[part].size
        slot = momentum * slot - rate * gradient
        w = w + slot
    return masks, w * mask


@pytest.mark.parametrize(
    ("schedule", "momentum", "n_of_m"),
    [(EVERY, 0.0, None), (DECAY, 0.9, None), (DECAY, 0.0, (2, 4))],
    ids=["every", "decay", "2-of-4"],
)
def test_masks_and_weights_of_every_step_match_the_reference(schedule, momentum, n_of_m):
    start = np.random.default_rng(1).standard_normal((9, 7)).astype("float32") / 3
    model = keras.Sequential([keras.Input((9,)), layers.Dense(7, use_bias=False)])
    model.layers[0].kernel.assign(start)
    tfmot.prune_low_magnitude(model, schedule, sparsity_m_by_n=n_of_m)
    compiled(model, keras.optimizers.SGD(0.5, momentum))
    found = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            found.extend(masks_of(self.model))

    fit(model, callbacks=[tfmot.UpdatePruningStep(), Record()])
    expected, weights = reference(start.astype("float64"), schedule, 0.5, momentum, n_of_m)
    np.testing.assert_array_equal(found, expected)
    if schedule is EVERY:  # Some pruned weights are kept again later.
        assert any((b & ~a).any() for a, b in pairwise(expected))
    np.testing.assert_allclose(
        tfmot.strip_pruning(model).layers[0].kernel.numpy(), weights, atol=1e-5
    )


def test_a_nested_model_is_pruned_and_stripped():
    images, labels = models.data()
    model = tfmot.prune_low_magnitude(models.nested(), tfmot.ConstantSparsity(0.75, 2, frequency=3))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(images, labels, batch_size=16, verbose=0, callbacks=[tfmot.UpdatePruningStep()])
    report = keras_dst.report(model)
    for row in report.layers:  # Each kernel has the target sparsity.
        assert row.nonzeros == max(1, round(row.parameters * 0.25))
    before = model.predict(images, verbose=0)
    assert tfmot.strip_pruning(model) is model
    np.testing.assert_array_equal(model.predict(images, verbose=0), before)
    assert not any(type(z).__module__.startswith("keras_dst") for z in model._flatten_layers())


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_training_continues_exactly_after_loading_a_file(policy, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        whole = compiled(tfmot.prune_low_magnitude(dense(8, 7), DECAY), "adam")
        fit(whole, 2)
        halfway = compiled(tfmot.prune_low_magnitude(dense(8, 7), DECAY), "adam")
        fit(halfway)
        halfway.save(tmp_path / "model.keras")
        resumed = keras.saving.load_model(tmp_path / "model.keras")
        fit(resumed)
    finally:
        keras.config.set_dtype_policy(before)
    for a, b in zip(whole.variables, resumed.variables):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


@once
def test_compiling_again_does_not_reset_the_step():
    model = compiled(tfmot.prune_low_magnitude(dense(7), DECAY))
    fit(model)
    compiled(model)
    fit(model)
    (progress,) = [s["progress"].numpy() for _, _, s in model.layers[0].masked_weights()]
    assert progress[0] == 2 * STEPS


def test_training_continues_exactly_from_a_backup_within_an_epoch(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 7:
                raise KeyboardInterrupt

    def train(*callbacks):
        model = compiled(tfmot.prune_low_magnitude(dense(7), DECAY), "adam")
        fit(model, callbacks=[tfmot.UpdatePruningStep(), *callbacks])
        return model

    whole = train()
    with pytest.raises(KeyboardInterrupt):
        train(Stop(), keras_dst.callbacks.BackupAndRestore(tmp_path, save_freq=3))
    resumed = train(keras_dst.callbacks.BackupAndRestore(tmp_path, save_freq=3))
    for a, b in zip(whole.weights, resumed.weights):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


@once
def test_tfmot_training_without_the_callback_raises():
    with pytest.raises(ValueError, match=r"tfmot\.UpdatePruningStep\(\)"):
        fit(compiled(tfmot.prune_low_magnitude(dense(7), DECAY)), callbacks=[])
    model = compiled(tfmot.prune_low_magnitude(dense(7), DECAY))
    fit(model)
    with pytest.raises(ValueError, match=r"tfmot\.UpdatePruningStep\(\)"):
        fit(model, callbacks=[])
    with pytest.raises(ValueError, match="instead of SparseTraining"):
        fit(model, callbacks=[keras_dst.callbacks.SparseTraining()])
    fit(model)


@once
def test_the_callback_raises_for_models_without_pruned_layers():
    with pytest.raises(ValueError, match="found no pruned layer"):
        fit(compiled(dense(7)))
    callback = tfmot.UpdatePruningStep()
    callback.set_model(tfmot.prune_low_magnitude(dense(7)))
    with pytest.raises(ValueError, match="Compile the model"):
        callback.on_train_begin()
    if keras.backend.backend() != "torch":  # On PyTorch, Keras itself raises an error.
        model = compiled(tfmot.prune_low_magnitude(dense(7)), steps_per_execution=4)
        with pytest.raises(ValueError, match="steps_per_execution=1"):
            fit(model)


# -- what is pruned --------------------------------------------------------------------------------


def pruned_names(model):
    return [layer.name for layer in model._flatten_layers() if tfmot.is_pruned(layer)]


@once
def test_depthwise_kernels_stay_dense():
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.DepthwiseConv2D(3), layers.SeparableConv2D(4, 3, name="s")]
    )
    tfmot.prune_low_magnitude(model)
    assert pruned_names(model) == ["s"]
    assert [tuple(w.shape) for _, w, _ in model.get_layer("s").masked_weights()] == [(1, 1, 3, 4)]


def test_single_layers_keep_their_own_schedules():
    first = tfmot.prune_low_magnitude(layers.Dense(8, name="first"), EVERY)
    rest = tfmot.prune_low_magnitude([layers.Dropout(0.5), layers.Dense(7, name="last")], DECAY)
    model = keras.Sequential([keras.Input((9,)), first, *rest])
    # All layers already have a pruning schedule, so `prune_low_magnitude` changes nothing.
    tfmot.prune_low_magnitude(model, tfmot.ConstantSparsity(0.9, 0))
    assert [layer.method.pruning_schedule for layer in (first, rest[1])] == [EVERY, DECAY]
    fit(compiled(model))
    assert [m.mean() for m in masks_of(model)] == [0.5, 11 / 56]


@once
def test_a_list_may_contain_a_layer_twice():
    model = dense(8, 7)
    first, lstm = model.layers[0], layers.LSTM(3)
    tfmot.prune_low_magnitude([first, first, lstm, lstm, model], EVERY)
    assert [type(layer).__bases__.count(layers.Dense) for layer in model.layers] == [1, 1]
    lstm(keras.Input((5, 4)))
    assert all(map(tfmot.is_pruned, (*model.layers, lstm.cell)))


@once
def test_a_clone_function_can_prune_some_layers():
    def pick(layer):
        prune = isinstance(layer, layers.Dense) and layer.units == 8
        return tfmot.prune_low_magnitude(layer, EVERY) if prune else layer

    model = keras.models.clone_model(dense(8, 7), clone_function=pick)
    fit(compiled(model))
    assert [m.shape for m in masks_of(model)] == [(9, 8)]


@once
def test_two_calls_can_prune_different_parts_of_a_model(tmp_path):
    def network():
        inputs = keras.Input((4, 6))
        z = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
        return keras.Model(inputs, layers.Bidirectional(layers.LSTM(3), name="both")(z))

    model = network()
    tfmot.prune_low_magnitude(model.get_layer("both"), EVERY)
    tfmot.prune_low_magnitude(model, DECAY)
    assert len(masks_of(model)) == 8
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    found = [z.method.pruning_schedule for z in again._flatten_layers() if tfmot.is_pruned(z)]
    assert sorted(map(repr, found)) == [repr(EVERY)] * 2 + [repr(DECAY)] * 4


@keras.saving.register_keras_serializable("tests")
class Named(layers.Layer):
    prunable_weights = ("mix",)

    def build(self, shape):
        self.mix = self.add_weight(shape=(shape[-1], 7), name="mix")

    def call(self, inputs):
        return inputs @ self.mix


class WithTfmotMethod(layers.Dense):
    def get_prunable_weights(self):
        return [self.kernel, self.bias]


class Unknown(Named):
    prunable_weights = ()


class Outer(layers.Layer):
    """Layer without a `build` method, whose inner layer creates its weights in `build`."""

    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, 4, name="attention")

    def call(self, inputs):
        return self.attention(inputs, inputs)


UNBUILT = {
    "LSTM": (lambda: layers.LSTM(3), 2),
    "GRU": (lambda: layers.GRU(3), 2),
    "RNN": (lambda: layers.RNN([layers.LSTMCell(3), layers.SimpleRNNCell(3)]), 4),
    "Bidirectional": (lambda: layers.Bidirectional(layers.LSTM(3)), 4),
    "TimeDistributed": (lambda: layers.TimeDistributed(layers.Dense(3)), 1),
    "MultiHeadAttention": (lambda: layers.MultiHeadAttention(2, 4), 4),
    "user's layer": (lambda: models.Block(6), 3),
    "LayerNormalization": (layers.LayerNormalization, 0),
}


@every(40)
@pytest.mark.parametrize("name", UNBUILT)
def test_unbuilt_layers_are_pruned_when_they_are_built(name, tmp_path):
    make, expected = UNBUILT[name]
    layer = tfmot.prune_low_magnitude(make(), EVERY)
    # A layer that already has a schedule keeps this schedule.
    tfmot.prune_low_magnitude([layer], DECAY)
    inputs = keras.Input((5, 4))
    features = layer(inputs, inputs) if name == "MultiHeadAttention" else layer(inputs)
    last = tfmot.prune_low_magnitude(layers.Dense(3), EVERY)
    model = keras.Model(inputs, last(layers.Flatten()(features)))
    pruned = [x for x in layer._flatten_layers() if tfmot.is_pruned(x)]
    assert sum(len(list(x.masked_weights())) for x in pruned) == expected
    assert all(x.method.pruning_schedule == EVERY for x in pruned)
    model.compile("sgd", "mse", run_eagerly=True)
    data = np.ones((4, 5, 4), "float32"), np.ones((4, 3), "float32")
    model.fit(*data, batch_size=2, verbose=0, callbacks=[tfmot.UpdatePruningStep()])
    for mask in masks_of(model):
        assert mask.sum() == max(1, round(mask.size / 2))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for a, b in zip(masks_of(model), masks_of(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    stripped = tfmot.strip_pruning(model)
    assert not any(type(x).__module__.startswith("keras_dst") for x in stripped._flatten_layers())


@once
def test_the_config_of_an_unbuilt_pruned_layer_raises():
    lstm = tfmot.prune_low_magnitude(layers.LSTM(3))
    with pytest.raises(ValueError, match="prune the wrapper"):
        layers.Bidirectional(lstm)


@once
def test_building_an_unsupported_layer_raises():
    layer = tfmot.prune_low_magnitude(Unknown(name="own"))
    with pytest.raises(ValueError, match=r"'own' cannot be pruned: .*prunable_weights = "):
        layer(keras.Input((9,)))


@once
def test_frozen_layers_stay_dense():
    base = keras.Sequential([keras.Input((9,)), layers.Dense(8), layers.Dense(8)], name="base")
    base.trainable = False
    model = keras.Sequential([keras.Input((9,)), base, layers.Dense(7, name="head")])
    tfmot.prune_low_magnitude(model, EVERY)
    assert pruned_names(model) == ["head"]
    before = [w.numpy() for w in base.weights]
    fit(compiled(model))
    for old, new in zip(before, base.weights):
        np.testing.assert_array_equal(old, new.numpy())
    model.trainable = False
    with pytest.raises(ValueError, match="nothing to prune in 'base': its layers are frozen"):
        tfmot.prune_low_magnitude(base)
    frozen = layers.Dense(7, name="frozen", trainable=False)
    for wrong in (frozen, [layers.Dropout(0.5), frozen]):
        with pytest.raises(ValueError, match=r"'frozen' is frozen.*trainable = True"):
            tfmot.prune_low_magnitude(wrong)
    lstm = tfmot.prune_low_magnitude(layers.LSTM(3, trainable=False))
    with pytest.raises(ValueError, match="is frozen"):
        lstm(keras.Input((5, 4)))


@once
def test_layers_that_are_frozen_after_prune_low_magnitude_stay_dense():
    model = tfmot.prune_low_magnitude(dense(8, 7), EVERY)
    first, last = model.layers
    first.trainable = False
    before = [w.numpy() for w in first.weights]
    fit(compiled(model))
    for old, new in zip(before, first.weights):
        np.testing.assert_array_equal(old, new.numpy())
    assert [m.mean() for m in masks_of(model)] == [1, 0.5]
    last.trainable = False
    with pytest.raises(ValueError, match=r"All pruned layers of .* are frozen"):
        fit(compiled(model))
    model.add(layers.Dense(7))
    fit(compiled(model), callbacks=[])


@heavy
@once
def test_a_pruned_model_loads_with_only_keras_dst_imported(tmp_path):
    model = compiled(tfmot.prune_low_magnitude(dense(7), DECAY))
    fit(model)
    model.save(tmp_path / "model.keras")
    code = (
        "import sys, keras, keras_dst\n"
        "model = keras.saving.load_model(sys.argv[1])\n"
        "print(repr(model.layers[0].method.pruning_schedule))\n"
        "print(keras_dst.report(model).layers[0].nonzeros)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.keras"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [repr(DECAY), str(masks_of(model)[0].sum())]


@once
def test_dir_lists_the_public_tfmot_names():
    assert sorted(tfmot.__all__) == dir(tfmot)
    assert all(hasattr(tfmot, name) for name in tfmot.__all__)


@once
def test_custom_layers_declare_prunable_weights():
    model = keras.Sequential([keras.Input((9,)), tfmot.prune_low_magnitude(Named(), EVERY)])
    fit(compiled(model))
    assert np.count_nonzero(tfmot.strip_pruning(model).layers[0].mix.numpy()) == round(63 / 2)


@once
@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: dense(7), {"input_shape": (9,)}, "keras.Input"),
        (lambda: keras.Input((9,)), {}, "a Keras 3 model"),
        (lambda: "model.keras", {}, "load_model"),
    ],
)
def test_other_objects_than_models_and_layers_raise(make, arguments, message):
    with pytest.raises(TypeError, match=message):
        tfmot.prune_low_magnitude(make(), **arguments)


def image_model(*inner):
    return keras.Sequential([keras.Input((8, 8, 3)), *inner])


@once
@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: keras.Sequential([layers.Dense(7)]), {}, "no weights yet"),
        (lambda: image_model(layers.Flatten()), {}, "nothing to prune"),
        (
            lambda: image_model(layers.Dense(2), layers.Conv2D(2, 3)),
            {"block_size": (1, 4)},
            "2 axes",
        ),
        (
            lambda: keras.Sequential([keras.Input((8, 3)), layers.Conv1D(2, 3)]),
            {"sparsity_m_by_n": (2, 4)},
            "2 or 4 axes",
        ),
        (lambda: WithTfmotMethod(7), {}, "prunable_weights"),
        (lambda: keras.Sequential([keras.Input((9,)), Unknown()]), {}, "not supported"),
        (lambda: Outer(), {}, "'attention' cannot be pruned: it is not built"),
    ],
)
def test_layers_that_cannot_be_pruned_raise(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        tfmot.prune_low_magnitude(model := make(), **arguments)
    if model.built:
        assert not keras_dst.surgery.has_sparse_layers(model)


@once
def test_pruning_a_sparse_model_raises():
    model = dense(8, 7)
    keras_dst.sparsify(model, keras_dst.methods.DST())
    with pytest.raises(ValueError, match="sparse already"):
        tfmot.prune_low_magnitude(model)


# -- XNNPACK ---------------------------------------------------------------------------------------


def xnnpack(pad=1, strides=2, body=(), end=None, channels=3):
    body = body or [layers.Conv2D(8, 1, name="pruned"), layers.ReLU()]
    return keras.Sequential(
        [
            keras.Input((16, 16, channels)),
            layers.ZeroPadding2D(pad),
            layers.Conv2D(4, 3, strides=strides),
            layers.BatchNormalization(),
            layers.Activation("relu6"),
            *body,
            end or layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ]
    )


POLICY = tfmot.PruneForLatencyOnXNNPack()


@once
def test_the_xnnpack_policy_prunes_1x1_convolutions():
    model = xnnpack()
    tfmot.prune_low_magnitude(model, pruning_policy=POLICY)
    assert pruned_names(model) == ["pruned"]
    inputs = keras.Input((16, 16, 3))
    z = layers.Conv2D(4, 3, strides=2)(layers.ZeroPadding2D(1)(inputs))
    gate = layers.GlobalAveragePooling2D(keepdims=True)(z)
    z = z * layers.Conv2D(4, 1, activation="sigmoid", name="gate")(gate)
    z = layers.DepthwiseConv2D(5, 2)(layers.ZeroPadding2D(2)(z)) + 1.0
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(z))
    tfmot.prune_low_magnitude(model, pruning_policy=POLICY)
    assert pruned_names(model) == ["gate"]


def xnnpack_around(inner, subtract=False):
    """Return a model that contains the model `inner`. If `subtract` is True, the model also
    subtracts two tensors."""
    inputs = keras.Input((16, 16, 3))
    z = inner(layers.Conv2D(4, 3, strides=2)(layers.ZeroPadding2D(1)(inputs)))
    after = layers.Conv2D(4, 1, name="after")(z)
    z = layers.Subtract()([z - after, after]) if subtract else after
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(z))


def inner_model(*inner, size=8):
    return keras.Sequential([keras.Input((size, size, 4)), *inner])


@once
def test_the_xnnpack_policy_handles_nested_models_and_subtraction():
    within = layers.Conv2D(4, 1, name="within")
    # In the outer model, a padding layer runs before the inner model.
    depthwise = inner_model(layers.DepthwiseConv2D(5), size=12)
    inner = inner_model(within, layers.ZeroPadding2D(2), depthwise)
    model = xnnpack_around(inner, subtract=True)
    tfmot.prune_low_magnitude(model, pruning_policy=POLICY)
    assert pruned_names(model) == ["within", "after"]
    base = keras.Sequential(xnnpack().layers[:-2])
    inputs = keras.Input((16, 16, 3))
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(base(inputs))))
    tfmot.prune_low_magnitude(model, pruning_policy=POLICY)
    assert pruned_names(model) == ["pruned"]


@once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: xnnpack(pad=2), "to begin with"),
        (lambda: xnnpack(strides=1), "to begin with"),
        (lambda: xnnpack(channels=1), "to begin with"),
        (lambda: xnnpack(end=layers.GlobalMaxPooling2D()), "to go through"),
        (lambda: xnnpack(body=[layers.Conv2D(4, 3, name="wide")]), "no sparse form of 'wide'"),
        (lambda: xnnpack_around(inner_model(layers.Softmax())), "no sparse form of 'softmax"),
        (lambda: xnnpack_around(inner_model(layers.DepthwiseConv2D(3))), "no sparse form"),
        (lambda: xnnpack(body=[layers.DepthwiseConv2D(3, 2, "same")]), "no sparse form"),
        (lambda: xnnpack(body=[layers.Softmax()]), "no sparse form"),
        (lambda: xnnpack(body=[layers.Activation(layers.ReLU(6.0))]), "no sparse form"),
        (lambda: xnnpack(body=[layers.BatchNormalization(axis=1)]), "no sparse form"),
        (lambda: xnnpack(body=[layers.ReLU()]), "nothing to prune"),
        (models.Subclassed, "its own call method"),
    ],
)
def test_the_xnnpack_policy_raises_for_unsupported_models(make, message):
    model = make()
    if not model.built:
        model(np.zeros((1, 8, 8, 3), "float32"))
    with pytest.raises(ValueError, match=message):
        tfmot.prune_low_magnitude(model, pruning_policy=POLICY)


# -- files -----------------------------------------------------------------------------------------

KERNEL = np.array([[1, 0], [0, -2], [3, 0]], "float32")
WRAPPED = {
    "class_name": "PruneLowMagnitude",
    "config": {
        "name": "prune_low_magnitude_d",
        "layer": {
            "class_name": "Dense",
            "config": {"name": "d", "units": 2, "batch_input_shape": [None, 3]},
        },
        "pruning_schedule": {
            "class_name": "ConstantSparsity",
            "config": {"target_sparsity": 0.5, "begin_step": 0, "end_step": -1, "frequency": 5},
        },
        "block_size": [1, 1],
        "block_pooling_type": "AVG",
    },
}


def file_of(path, layer=WRAPPED, kernel=KERNEL, before=(), weights=None):
    """Write an .h5 file of a model in the format of tf_keras.

    Only `layer` has weights. The layers in `before` come before `layer`. `weights` are the weights
    of a pruned Dense layer by default.
    """
    inputs = {"class_name": "InputLayer", "config": {"name": "i", "batch_input_shape": [None, 3]}}
    config = {"name": "m", "layers": [inputs, *before, layer]}
    weights = weights or {
        "d/kernel:0": kernel,
        "d/bias:0": np.array([5, 6], "float32"),
        "prune_low_magnitude_d/mask:0": (KERNEL != 0).astype("float32"),
        "prune_low_magnitude_d/threshold:0": np.float32(1),
        "prune_low_magnitude_d/pruning_step:0": np.int64(7),
    }
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": config})
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [layer["config"]["name"]]
        own = group.create_group(layer["config"]["name"])
        own.attrs["weight_names"] = list(weights)
        for name, value in weights.items():
            own[name] = value
    return path


@once
def test_load_restores_masks_schedule_and_step(tmp_path):
    model = tfmot.load(file_of(tmp_path / "pruned.h5"))
    (layer,) = model.layers
    ((_, raw, state),) = layer.masked_weights()
    np.testing.assert_array_equal(raw.numpy(), KERNEL)
    np.testing.assert_array_equal(state["mask"].numpy(), KERNEL != 0)
    assert layer.method == tfmot.PruneLowMagnitude(tfmot.ConstantSparsity(0.5, 0, -1, 5))
    assert layer.name == "d"
    one = np.ones((1, 3), "float32")
    np.testing.assert_array_equal(model.predict(one, verbose=0), [[9, 4]])

    compiled(model, keras.optimizers.SGD(0.0))
    callback = [tfmot.UpdatePruningStep()]
    model.fit(np.ones((4, 3)), np.ones((4, 2)), batch_size=1, verbose=0, callbacks=callback)
    assert state["progress"].numpy()[0] == 11
    # At step 10, three of the six entries of KERNEL are kept: the entries that are not 0.
    np.testing.assert_array_equal(state["mask"].numpy(), KERNEL != 0)
    assert type(tfmot.strip_pruning(model).layers[0]) is layers.Dense


def changed(**config):
    inner = {**WRAPPED["config"]["layer"]["config"], **config}
    layer = {**WRAPPED["config"]["layer"], "config": inner}
    return {**WRAPPED, "config": {**WRAPPED["config"], "layer": layer}}


@once
def test_load_keeps_the_hard_sigmoid_of_keras_2(tmp_path):
    layer = changed(activation="hard_sigmoid")
    model = tfmot.strip_pruning(tfmot.load(file_of(tmp_path / "pruned.h5", layer)))
    x = np.array([[-1, 2, -1], [9, 9, 9], [-9, -9, -9]], "float32")
    # The layer passes [1, 2] to its activation for the first sample.
    expected = [[0.7, 0.9], [1, 0], [0, 1]]
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-6)
    model.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), expected, rtol=1e-6)


@once
def test_load_converts_layers_whose_arguments_keras_3_has_renamed_or_removed(tmp_path):
    arguments = {
        "LeakyReLU": {"alpha": 0.5},
        "Reshape": {"target_shape": [1, 1, 3]},
        "RandomFlip": {"mode": "horizontal", "seed": None, "rng_type": "stateful"},
        "SpatialDropout2D": {"rate": 0.2, "noise_shape": None, "seed": None, "trainable": True},
        "Flatten": {"data_format": "channels_last"},
    }
    before = [
        {"class_name": name, "config": {"name": name, "dtype": "float32", **config}}
        for name, config in arguments.items()
    ]
    model = tfmot.load(file_of(tmp_path / "pruned.h5", before=before))
    assert [type(layer).__name__ for layer in model.layers[:-1]] == list(arguments)
    x = np.array([[-2, 1, 0]], "float32")
    # LeakyReLU(0.5) turns -2 into -1.
    np.testing.assert_array_equal(model.predict(x, verbose=0), [[4, 4]])


@every(1)
def test_load_restores_an_adapted_normalization_layer(tmp_path):
    layer = {"class_name": "Normalization", "config": {"name": "d", "axis": [-1]}}
    weights = {
        "d/mean:0": np.array([1, 2, 3], "float32"),
        "d/variance:0": np.array([1, 4, 0.25], "float32"),
        "d/count:0": np.int64(9),
    }
    model = tfmot.load(file_of(tmp_path / "dense.h5", layer, weights=weights))
    np.testing.assert_allclose(model.predict(np.ones((1, 3)), verbose=0), [[0, -0.5, -4]])


@once
def test_names_of_layers_in_the_weights_of_a_keras_file():
    classes = ["Conv2D", "ConvLSTM2D", "Conv2DTranspose", "LeakyReLU", "Conv2D", "RNN"]
    keys = ["conv2d", "conv_lstm2d", "conv2d_transpose", "leaky_re_lu", "conv2d_1", "rnn"]
    assert legacy_files._keys(classes) == keys


LAMBDA = {"class_name": "Lambda", "config": {"name": "d", "function": ["4wEA", None, None]}}
LAMBDA_INSIDE = {"class_name": "__lambda__", "config": {"value": "4wEA"}}
FOREIGN = {"class_name": "Popen", "module": "subprocess", "config": {"args": ["true"]}}
SCHEDULE = {"class_name": "Mine", "config": {}}


@once
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LAMBDA, "runs code from the file"),
        (changed(activation=LAMBDA_INSIDE), "neither a Keras 3 class nor registered"),
        (changed(kernel_initializer=FOREIGN), "neither a Keras 3 class nor registered"),
        ({**FOREIGN, "config": {"name": "d"}}, "neither a Keras 3 class nor registered"),
        (changed(time_major=True), "time_major=True"),
        (changed(units=4), "shapes"),
        (
            {**WRAPPED, "config": {**WRAPPED["config"], "pruning_schedule": SCHEDULE}},
            "unknown class 'Mine'",
        ),
    ],
)
def test_loading_parts_missing_in_keras_3_raises(tmp_path, layer, message):
    with pytest.raises(ValueError, match=message):
        tfmot.load(file_of(tmp_path / "pruned.h5", layer))


@once
def test_loading_other_files_raises(tmp_path):
    with pytest.raises(ValueError, match="Save the model"):
        tfmot.load(tmp_path)
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(ValueError, match=r"text\.h5, which is not a"):
        tfmot.load(tmp_path / "text.h5")
    with h5py.File(tmp_path / "weights.h5", "w"):
        pass
    with pytest.raises(ValueError, match="no model"):
        tfmot.load(tmp_path / "weights.h5")
