"""Tests of groups of coupled channels that the user names, in models without a complete graph."""

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
from tests.test_channels import X, array, compiled, continued_after_loading, fit, units

pytestmark = every(24)

GROUPS = [["stem", "stem_norm", "project"], ["expand", ("depthwise", -2)]]


@keras.saving.register_keras_serializable("tests")
class OwnCall(keras.Model):
    """Residual network that adds tensors in its own `call` method and has no graph."""

    def __init__(self, branch=None, **kwargs):
        super().__init__(**kwargs)
        self.stem = layers.Conv2D(16, 3, padding="same", name="stem")
        self.norm = layers.BatchNormalization(name="stem_norm")
        self.branch = branch or keras.Sequential(
            [
                layers.Conv2D(32, 1, activation="relu", name="expand"),
                layers.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise"),
                layers.Conv2D(16, 1, name="project"),
            ],
            name="branch",
        )
        self.classes = layers.Dense(5, name="classes")

    def call(self, x, training=None):
        x = ops.relu(self.norm(self.stem(x), training=training))
        return self.classes(ops.mean(x + self.branch(x), (1, 2)))


def own_call():
    keras.utils.set_random_seed(0)
    model = OwnCall(name="own")
    model(X)
    return model


def kernels(model):
    return {v.path: array(v) for v in model.trainable_variables if "kernel" in v.name}


def alive(model, name, axis=-1):
    (kernel,) = (w for path, w in kernels(model).items() if f"/{name}/" in f"/{path}")
    return np.moveaxis(kernel, axis, -1).reshape(-1, kernel.shape[axis]).any(0)


def check_masks(model):
    np.testing.assert_array_equal(alive(model, "stem"), alive(model, "project"))
    np.testing.assert_array_equal(alive(model, "expand"), alive(model, "depthwise", -2))
    assert alive(model, "stem").sum() == 8
    assert alive(model, "expand").sum() == 16
    assert alive(model, "classes").all()
    dead = ~alive(model, "stem")
    for variable in (model.stem.bias, model.norm.gamma, model.norm.beta, model.norm.moving_mean):
        assert not array(variable)[dead].any(), variable.path


@pytest.mark.parametrize("make", [methods.Magnitude, methods.ST3, methods.DCIL, methods.RigL])
def test_named_groups_are_pruned_together(make):
    method = make(0.5, allocation="uniform", pattern="channel", groups=GROUPS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ranked separately")
        model = fit(compiled(method, own_call()), callback := SparseTraining())
    assert callback.missed() == []
    check_masks(keras_dst.strip(model))


def test_a_custom_loop_prunes_named_groups():
    schedule = Cubic(0.5, begin_step=1, end_step=6)
    method = methods.Magnitude(schedule, "uniform", "channel", frequency=2, groups=GROUPS)
    model = compiled(method, own_call())
    keras_dst.couple_channels(model)
    fit(model)
    keras_dst.couple_channels(model)
    check_masks(model)


def test_named_groups_are_saved_with_the_model(tmp_path):
    method = methods.Magnitude(0.5, "uniform", "channel", groups=GROUPS)
    model = fit(compiled(method, own_call()), SparseTraining(epochs=2), epochs=1)
    check_masks(continued_after_loading(model, tmp_path))


def test_shrink_removes_named_channels_inside_the_functional_parts_of_a_model():
    method = methods.Magnitude(Constant(0.5), "uniform", "channel", groups=GROUPS)
    model = fit(compiled(method, own_call()), SparseTraining(), epochs=1)
    keras_dst.strip(model)
    small = OwnCall(keras_dst.shrink(model.branch))
    small(X)
    for name in ("stem", "norm", "classes"):
        getattr(small, name).set_weights(getattr(model, name).get_weights())
    expected = array(model(X, training=False))
    np.testing.assert_allclose(array(small(X, training=False)), expected, atol=1e-5)
    assert small.branch.get_layer("expand").filters == 16
    # "project" is the output layer of the branch, so `shrink` keeps all channels of "project".
    assert small.branch.get_layer("project").filters == 16


@keras.saving.register_keras_serializable("tests")
class Branch(layers.Layer):
    """Custom layer whose inner layers are not part of the graph of the model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner, self.outer = layers.Dense(32, name="inner"), layers.Dense(16, name="outer")

    def build(self, shape):
        self.inner.build(shape)
        self.outer.build((*shape[:-1], 32))

    def call(self, x):
        return x + self.outer(ops.relu(self.inner(x)))


def test_groups_name_layers_inside_a_custom_layer_of_a_functional_model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Dense(16, name="embed")(layers.Dense(32, "relu", name="wide")(inputs))
    x = layers.GlobalAveragePooling2D()(Branch(name="block")(x))
    model = keras.Model(inputs, layers.Dense(5, name="classes")(x))
    method = methods.Magnitude(Constant(0.5), "uniform", "channel", groups=[["block/inner"]])
    keras_dst.strip(fit(compiled(method, model), SparseTraining(), epochs=1))
    assert alive(model, "inner").sum() == units(model, "wide").sum() == 16
    assert alive(model, "outer").all()
    assert units(model, "embed").all()  # The custom layer reads all channels of "embed".
    groups = [["wide", "block/inner"]]
    method = methods.Magnitude(0.5, pattern="channel", groups=groups)
    with pytest.raises(ValueError, match=r"not\s+known from the graph.*wide/kernel"):
        fit(compiled(method, model), SparseTraining())


class Recurrent(keras.Model):
    """Model with its own `call` method, whose named layers keep their weights in inner layers."""

    def __init__(self):
        super().__init__()
        self.embed = layers.TimeDistributed(layers.Dense(8, "relu"), name="embed")
        self.rnn = layers.GRU(6, name="rnn")
        self.classes = layers.Dense(5, name="classes")

    def call(self, x):
        return self.classes(self.rnn(self.embed(ops.mean(x, 1))))


def test_groups_name_recurrent_and_wrapped_layers():
    keras.utils.set_random_seed(0)
    model = Recurrent()
    model(X)
    # Biases are 0 at first. Nonzero biases show which of their entries are pruned.
    model.rnn.cell.bias.assign(np.ones((2, 18)))
    groups = [["embed"], ["rnn"]]
    method = methods.Magnitude(Constant(0.5, begin_step=0), "uniform", "channel", groups=groups)
    optimizer = keras_dst.SparseOptimizer("sgd", method)
    keras_dst.couple_channels(model, optimizer)
    optimizer.apply_initial_masks()
    assert array(model.embed.layer.kernel).any(0).sum() == 4
    cell = model.rnn.cell
    # All gates of a unit are pruned together.
    gates = [array(w).reshape(-1, 3, 6).any((0, 1)) for w in cell.weights]
    assert gates[0].sum() == 3
    for found, weight in zip(gates, cell.weights):
        np.testing.assert_array_equal(found, gates[0], weight.path)


@every(0)
@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["stem", "projekt"]], "'projekt' does not match any name. Names: .*stem/kernel"),
        ([["stem", "expand"]], "same number of channels .*stem/kernel.*16.*expand/kernel.*32"),
        ([["stem"], ["project", "stem"]], "expected every weight once.*Received: .*stem/kernel"),
        ([["stem_norm"]], "Magnitude.* prunes at least one weight.*Received only.*gamma"),
        ([[("stem", -2)]], r"one axis of output channels of .*stem/kernel.*\(3, 3, 3, 16\)"),
    ],
)
def test_wrong_groups_raise(groups, message):
    method = methods.Magnitude(0.5, "uniform", "channel", groups=groups)
    with pytest.raises(ValueError, match=message):
        fit(compiled(method, own_call()), SparseTraining())


@every(0)
def test_a_group_with_an_excluded_layer_raises():
    model = own_call()
    method = methods.Magnitude(0.5, "uniform", "channel", groups=GROUPS)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    keras_dst.sparsify(model, method, filters=["stem", "expand", "depthwise"])
    with pytest.raises(ValueError, match=r"does not prune .*project/kernel.*filters"):
        fit(model, SparseTraining())


@pytest.mark.once
@pytest.mark.parametrize("groups", ["stem", [], ["stem"], [[]], [[1]], [[("stem", "-1")]]])
def test_groups_that_are_not_lists_of_names_raise(groups):
    with pytest.raises(ValueError, match="groups must be a list of lists of names"):
        methods.Magnitude(0.5, pattern="channel", groups=groups)


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "only with pattern='channel'.*pattern='unstructured'"),
        ({"pattern": "channel", "counted_in": "flops"}, "cannot count.*counted_in='flops'"),
        ({"pattern": "channel", "counted_in": "parameters"}, "cannot count.*'parameters'"),
    ],
)
def test_groups_without_the_channel_pattern_or_with_costs_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        methods.Magnitude(0.5, groups=GROUPS, **arguments)
