"""Tests of coupled channels, which are pruned together, in training runs of whole models."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_dst
from keras_dst import methods
from keras_dst.callbacks import SparseTraining
from keras_dst.schedules import Constant, Cubic
from tests.backends import every

pytestmark = every(48)

X = np.random.default_rng(0).standard_normal((32, 8, 8, 3)).astype("float32")
Y = np.arange(32) % 5


def residual(width=16):
    """Return a model that adds the outputs of a stem and a branch with a depthwise convolution."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(width, 3, padding="same", name="stem")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="stem_norm")(x))
    y = layers.Conv2D(2 * width, 1, use_bias=False, name="expand")(x)
    y = layers.ReLU()(layers.BatchNormalization(name="expand_norm")(y))
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(y)
    y = layers.BatchNormalization(scale=False, name="depthwise_norm")(y)
    y = layers.Conv2D(width, 1, name="project")(layers.ReLU()(y))
    x = layers.GlobalAveragePooling2D()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(5, name="classes")(x))


def compiled(method, model=None, optimizer=None):
    model = model or residual()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.05, momentum=0.9), loss)
    keras_dst.sparsify(model, method)
    return model


def fit(model, *callbacks, epochs=2):
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=[*callbacks])
    return model


def array(variable):
    return ops.convert_to_numpy(ops.convert_to_tensor(variable))


def units(model, name, axis=-1):
    """Return a mask of a layer's output units, which is True for units with nonzero weights."""
    kernel = array(model.get_layer(name).kernel)
    return np.moveaxis(kernel, axis, -1).reshape(-1, kernel.shape[axis]).any(0)


def widths(model):
    """Return the number of filters or units in each layer except the output layer."""
    made = [layer for layer in model.layers if hasattr(layer, "kernel")]
    found = [getattr(x, "filters", getattr(x, "units", None)) for x in made[:-1]]
    return [n for n in found if n is not None]


def normalized(kernel, axis=-1):
    pooled = np.abs(np.moveaxis(kernel, axis, -1)).reshape(-1, kernel.shape[axis]).mean(0)
    return pooled / pooled.mean()


def best(score, kept):
    mask = np.zeros(len(score), bool)
    mask[np.argsort(-score, kind="stable")[:kept]] = True
    return mask


RANKING = {
    "magnitude": methods.Magnitude(0.5, "uniform", "channel"),
    "magnitude-global": methods.Magnitude(0.5, "global", "channel"),
    "magnitude-taylor": methods.Magnitude(0.5, "uniform", "channel", score="taylor"),
    "magnitude-lamp": methods.Magnitude(0.5, "uniform", "channel", score="lamp"),
    "flipout": methods.FlipOut(0.5, allocation="uniform", pattern="channel"),
    "set": methods.SET(0.5, "uniform", "channel"),
    "rigl": methods.RigL(0.5, "uniform", "channel"),
    "dcil": methods.DCIL(0.5, allocation="uniform", pattern="channel"),
    "optg": methods.OptG(0.5, allocation="uniform", pattern="channel"),
    "st3": methods.ST3(0.5, allocation="uniform", pattern="channel"),
    "st3-global": methods.ST3(0.5, pattern="channel"),
}


def test_coupled_channels_are_ranked_by_summed_scores():
    model = compiled(methods.Magnitude(Constant(0.5), "uniform", "channel"), None, "sgd")
    model.optimizer.learning_rate = 0.0
    kernels = {n: array(model.get_layer(n).kernel) for n in ("stem", "expand", "project")}
    kernels["depthwise"] = array(model.get_layer("depthwise").kernel)
    fit(model, SparseTraining(), epochs=1)
    stream = best(normalized(kernels["stem"]) + normalized(kernels["project"]), 8)
    inner = best(normalized(kernels["expand"]) + normalized(kernels["depthwise"], -2), 16)
    for name, axis, expected in [
        ("stem", -1, stream),
        ("project", -1, stream),
        ("expand", -1, inner),
        ("depthwise", -2, inner),
    ]:
        np.testing.assert_array_equal(units(model, name, axis), expected, name)
    assert units(model, "classes").all()
    assert not array(model.get_layer("stem").bias)[~stream].any()
    for name, alive in (("stem_norm", stream), ("expand_norm", inner), ("depthwise_norm", inner)):
        norm = model.get_layer(name)
        followers = [norm.beta, norm.moving_mean, *([norm.gamma] if norm.scale else [])]
        assert not any(array(v)[~alive].any() for v in followers), name


@every(16)
@pytest.mark.parametrize("name", RANKING)
def test_every_ranking_method_prunes_coupled_channels(name):
    model = fit(compiled(RANKING[name]), callback := SparseTraining())
    assert callback.missed() == []
    keras_dst.strip(model)
    np.testing.assert_array_equal(units(model, "stem"), units(model, "project"))
    np.testing.assert_array_equal(units(model, "expand"), units(model, "depthwise", -2))
    assert units(model, "classes").all()
    small = keras_dst.shrink(model)
    assert sum(widths(small)) == (24 + 8 if "global" not in name else sum(widths(small)))
    assert all(width % 8 == 0 for width in widths(small))
    np.testing.assert_allclose(
        array(model(X, training=False)), array(small(X, training=False)), atol=1e-5
    )


def test_st3_soft_thresholds_the_channels_of_a_group():
    """Compare the stripped kernels with the equations in the docstring of ST3, in NumPy."""
    model = compiled(methods.ST3(Constant(0.5), allocation="uniform", pattern="channel"))
    model.optimizer.learning_rate = 0.0
    names = {"stem": -1, "project": -1, "expand": -1, "depthwise": -2}
    kernels = {name: array(model.get_layer(name).kernel) for name in names}
    fit(model, SparseTraining(), epochs=1)
    keras_dst.strip(model)
    for members in (("stem", "project"), ("expand", "depthwise")):
        score = sum(normalized(kernels[name], names[name]) for name in members) / 2
        kept = best(score, len(score) // 2)
        soft = np.where(kept, score - score[~kept].max(), 0)
        factor = soft / score * 1.01 / (soft.sum() / score.sum() + 0.01)
        for name in members:
            shape = [-1 if a == names[name] % 4 else 1 for a in range(4)]
            expected = kernels[name] * factor.reshape(shape)
            found = array(model.get_layer(name).kernel)
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5, err_msg=name)


@every(16)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_custom_loop_gives_the_channel_masks_of_fit(allocation):
    def method():
        schedule = Cubic(0.5, begin_step=1, end_step=6)
        return methods.Magnitude(
            schedule, allocation, "channel", frequency=2, counted_in="flops", round_to=4
        )

    one, other = compiled(method()), compiled(method())
    keras_dst.couple_channels(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(other)
    fit(one, SparseTraining())
    for a, b in zip(one.trainable_variables, other.trainable_variables):
        if len(a.shape) > 1:
            np.testing.assert_array_equal(array(a) == 0, array(b) == 0, a.path)
        # The two training runs compile different training steps, so sums may differ in their last
        # bits.
        np.testing.assert_allclose(array(a), array(b), rtol=1e-4, atol=1e-6, err_msg=a.path)
    assert not units(one, "stem").all()
    # `couple_channels` also masks the moving means of the pruned channels.
    keras_dst.couple_channels(other)
    for a, b in zip(one.weights, other.weights):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-4, atol=1e-6, err_msg=a.path)


def test_a_second_call_of_couple_channels_keeps_the_outputs_with_a_frozen_normalization():
    keras.utils.set_random_seed(0)
    frozen = layers.BatchNormalization(
        trainable=False, beta_initializer="ones", moving_mean_initializer="ones"
    )
    inner = [layers.Flatten(), layers.Dense(8, name="hidden"), frozen, layers.Dense(5)]
    model = keras.Sequential([keras.Input((8, 8, 3)), *inner])
    method = methods.Magnitude(Cubic(0.5, begin_step=0, end_step=4), "uniform", "channel")
    compiled(method, model)
    keras_dst.couple_channels(model)
    fit(model)
    before = array(model(X))
    keras_dst.couple_channels(model)
    assert units(model, "hidden").sum() == 4
    np.testing.assert_array_equal(array(model(X)), before)
    assert keras_dst.shrink(keras_dst.strip(model)).get_layer("hidden").units == 4


def continued_after_loading(model, tmp_path):
    """Continue to train a model and a loaded copy, check that both models are equal, and return the
    copy."""
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for continued in (model, loaded):
        fit(continued, SparseTraining(epochs=2), epochs=1)
    for a, b in zip(model.weights, loaded.weights):
        np.testing.assert_array_equal(array(a), array(b), a.path)
    return loaded


def test_channel_groups_are_found_after_loading(tmp_path):
    model = fit(
        compiled(methods.Magnitude(0.5, "uniform", "channel")), SparseTraining(epochs=2), epochs=1
    )
    loaded = continued_after_loading(model, tmp_path)
    np.testing.assert_array_equal(units(loaded, "stem"), units(loaded, "project"))
    assert units(loaded, "stem").sum() == 8


def transformer():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 32))
    x = layers.Dense(32, name="embed")(inputs)
    y = layers.LayerNormalization(name="norm")(x)
    x = layers.Add()([x, layers.MultiHeadAttention(4, 8, name="attention")(y, y)])
    y = layers.Dense(64, "gelu", name="wide")(layers.LayerNormalization()(x))
    x = layers.Add()([x, layers.Dense(32, name="narrow")(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(5, name="classes")(x))


def test_heads_and_residual_channels_of_a_transformer_are_pruned():
    model = compiled(methods.Magnitude(Constant(0.5), "uniform", "channel"), transformer(), "sgd")
    model.optimizer.learning_rate = 0.0
    kernels = {v.path: array(v) for v in model.trainable_variables}
    tokens = np.random.default_rng(0).standard_normal((32, 6, 32)).astype("float32")
    model.fit(tokens, Y, batch_size=8, verbose=0, callbacks=[SparseTraining()])
    after = {v.path: array(v) for v in model.trainable_variables}
    score = sum(
        normalized(kernels[f"attention/{name}/kernel"], 1) for name in ("query", "key", "value")
    )
    heads = best(score, 2)
    stream = [kernels["embed/kernel"], kernels["narrow/kernel"]]
    score = sum(map(normalized, [*stream, kernels["attention/attention_output/kernel"]]))
    kept = best(score, 16)
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(after[f"attention/{name}/kernel"].any((0, 2)), heads, name)
    for name in ("embed", "narrow", "attention/attention_output"):
        kernel = after[f"{name}/kernel"]
        np.testing.assert_array_equal(kernel.reshape(-1, 32).any(0), kept, name)
    np.testing.assert_array_equal(after["norm/gamma"] != 0, kept)
    small = keras_dst.shrink(keras_dst.strip(model))
    assert small.get_layer("attention").num_heads == 2
    assert small.get_layer("wide").units == 32
    np.testing.assert_allclose(array(model(tokens)), array(small(tokens)), atol=1e-5)


@every(16)
@pytest.mark.parametrize("counted_in", ["channels", "parameters", "flops"])
def test_the_target_is_met_in_channels_parameters_and_flops(counted_in):
    method = methods.Magnitude(
        Constant(0.6), "uniform", "channel", counted_in=counted_in, round_to=1
    )
    model = fit(compiled(method, residual(32)), SparseTraining(), epochs=1)
    keras_dst.strip(model)
    small = keras_dst.shrink(model)
    before, after = keras_dst.report(model), keras_dst.report(small)
    found = {
        "channels": sum(widths(small)) / sum(widths(model)),
        "parameters": after.parameters / before.parameters,
        "flops": after.dense_flops / before.dense_flops,
    }
    assert found[counted_in] == pytest.approx(0.4, abs=0.02)


def test_a_target_below_the_minimum_of_channels_warns():
    method = methods.Magnitude(0.9, "uniform", "channel")
    with pytest.warns(
        UserWarning,
        match="fraction of the channels removed 0.6.*, but the target is 0.9: missed by",
    ):
        fit(compiled(method), SparseTraining())


def test_a_channel_is_kept_if_a_filter_excludes_one_of_its_weights():
    model = residual()
    model.compile("sgd", "mse")
    keras_dst.sparsify(
        model,
        methods.Magnitude(Constant(0.5), "uniform", "channel"),
        filters=["stem", "expand", "depthwise"],
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(model.optimizer, loss)
    fit(model, SparseTraining(), epochs=1)
    assert units(model, "stem").all()
    assert units(model, "expand").sum() == 16


def test_an_optimizer_without_its_model_warns():
    method = methods.Magnitude(Constant(0.5, begin_step=1), "uniform", "channel")
    with pytest.warns(UserWarning, match=r"does not know its model.*couple_channels"):
        fit(compiled(method), epochs=1)
    flops = methods.Magnitude(Constant(0.5, begin_step=1), pattern="channel", counted_in="flops")
    with pytest.raises(ValueError, match=r"counted_in='flops'.* needs the model"):
        fit(compiled(flops), epochs=1)


@pytest.mark.parametrize("make", [methods.SET, methods.RigL])
def test_biases_follow_once_no_channel_grows(make):
    """Until the last mask update, pruned channels keep their biases, because an update may restore
    these channels."""
    model = compiled(make(0.5, "uniform", "channel", stop=0.5, frequency=1))
    followers = {}
    for variable in (model.get_layer("stem").bias, model.get_layer("stem_norm").beta):
        variable.assign(np.full(16, 0.5, "float32"))

    def record(epoch, logs):
        dead = ~units(model, "stem")
        norm = model.get_layer("stem_norm")
        found = (norm.gamma, norm.beta, norm.moving_mean, model.get_layer("stem").bias)
        followers[epoch] = [array(v)[dead].any() for v in found]

    recorder = keras.callbacks.LambdaCallback(on_epoch_end=record)
    fit(model, SparseTraining(), recorder, epochs=4)
    assert followers[0] == [True] * 4
    assert followers[1] == followers[3] == [False] * 4


def test_dst_with_one_threshold_per_layer_warns_that_layers_keep_different_channels():
    model = compiled(methods.DST(pattern="channel", granularity="layer"))
    with pytest.warns(UserWarning, match=r"coupled channels: .*stem → add.* ← project.*Magnitude"):
        fit(model, SparseTraining(), epochs=1)


@pytest.mark.filterwarnings("ignore:.*training had reached .*:UserWarning")
@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_dst_removes_a_channel_that_all_layers_of_a_group_have_pruned(granularity):
    method = methods.DST(0.5, pattern="channel", granularity=granularity)
    model = fit(compiled(method), callback := SparseTraining(), epochs=4)
    assert callback.missed() == []
    keras_dst.strip(model)
    stream, inner = units(model, "stem"), units(model, "expand")
    # In each group of coupled channels, all layers keep the same channels.
    np.testing.assert_array_equal(units(model, "project"), stream)
    np.testing.assert_array_equal(units(model, "depthwise", -2), inner)
    assert stream.sum() in (8, 16)
    assert stream.sum() + inner.sum() in (16, 24, 32)
    assert units(model, "classes").all()
    for name, alive in (("stem_norm", stream), ("expand_norm", inner), ("depthwise_norm", inner)):
        norm = model.get_layer(name)
        assert not any(array(v)[~alive].any() for v in (norm.beta, norm.moving_mean)), name
    small = keras_dst.shrink(model)
    for name, kept in (("stem", stream), ("project", stream), ("expand", inner)):
        assert small.get_layer(name).filters <= kept.sum(), name
    np.testing.assert_allclose(
        array(model(X, training=False)), array(small(X, training=False)), atol=1e-5
    )


@every(16)
def test_dst_meets_a_target_in_flops():
    method = methods.DST(0.5, pattern="channel", counted_in="flops")
    model = fit(compiled(method, residual(32)), callback := SparseTraining(), epochs=4)
    assert callback.missed() == []
    keras_dst.strip(model)
    small = keras_dst.shrink(model)
    before, after = keras_dst.report(model), keras_dst.report(small)
    # Channels are pruned in multiples of 8. The residual sum has 32 channels, and 8 of these
    # channels need at most 14 % of the FLOPs of the model. The remaining FLOPs may therefore differ
    # from the target by up to 14 % of all FLOPs.
    assert after.dense_flops / before.dense_flops == pytest.approx(0.5, abs=0.14)


def test_a_sparse_optimizer_does_not_prune_output_channels():
    model = residual()
    optimizer = keras_dst.SparseOptimizer(
        "sgd", methods.Magnitude(Constant(0.5), "global", "channel")
    )
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    fit(model, SparseTraining(), epochs=1)
    assert units(model, "classes").all()
    assert array(model.get_layer("classes").kernel).all()


class OwnCall(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.classes = layers.Dense(16, "relu"), layers.Dense(5)

    def call(self, x):
        return self.classes(self.hidden(ops.reshape(x, (-1, 192))))


def test_channels_of_a_subclassed_model_are_ranked_per_layer():
    keras.utils.set_random_seed(0)
    model = OwnCall()
    model(X)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    keras_dst.sparsify(model, methods.Magnitude(Constant(0.5), "uniform", "channel"))
    with pytest.warns(UserWarning, match="channels of each layer are ranked separately"):
        fit(model, SparseTraining(), epochs=1)
    assert array(model.hidden.kernel).any(0).sum() == 8
    model.compile("sgd", loss)
    keras_dst.sparsify(model, methods.Magnitude(0.5, pattern="channel", counted_in="flops"))
    with pytest.raises(ValueError, match="needs a Sequential or Functional model"):
        fit(model, SparseTraining(), epochs=1)


def test_a_model_without_prunable_channels_raises():
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(5)])
    method = methods.Magnitude(0.5, pattern="channel")
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="its units are the model's outputs"):
        keras_dst.sparsify(model, method)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras_dst.SparseOptimizer("sgd", method), loss)
    with pytest.raises(ValueError, match=r"no channel of .* can be pruned"):
        fit(model, SparseTraining(), epochs=1)
