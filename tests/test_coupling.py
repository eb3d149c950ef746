"""Tests of `channel_groups`, which finds channels that must be removed together."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_dst
from keras_dst._structure.coupling import channel_groups
from keras_dst._training.channels import couple
from keras_dst.masks import Layout
from keras_dst.methods import channels
from tests.backends import heavy, once
from tests.test_shrink import assert_same_outputs, randomize

pytestmark = once


def groups_of(model):
    """Return the size and the layers of every group of channels that can be removed."""
    found = channel_groups(model)
    return [(len(group), group.layers) for group in found.groups if not group.reason]


def bottleneck():
    """Return a network with an inverted residual block: expansion, depthwise convolution,
    projection and residual sum."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", name="stem")(inputs)
    y = layers.Conv2D(16, 1, use_bias=False, name="expand")(x)
    y = layers.ReLU()(layers.BatchNormalization(name="norm")(y))
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(y)
    y = layers.Conv2D(8, 1, name="project")(y)
    x = layers.Add(name="sum")([x, y])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x))


def test_channel_groups_of_a_residual_network():
    found = channel_groups(bottleneck())
    stream, hidden, inputs, outputs = found.groups
    assert stream.layers == ["stem", "project"]
    assert len(stream) == 8
    assert stream.chain == "stem → sum ← project"
    assert hidden.layers == ["expand", "depthwise"]
    assert len(hidden) == 16
    assert hidden.chain == "expand → depthwise"
    assert inputs.reason == "it is an input of the model"
    assert len(inputs) == 3
    assert outputs.reason == "it is an output of the model"
    assert outputs.layers == ["head"]
    assert found.count == 31
    np.testing.assert_array_equal(stream.ids, np.arange(8))
    np.testing.assert_array_equal(hidden.ids, np.arange(8, 24))


def test_members_of_channel_groups_of_a_residual_network():
    model = bottleneck()
    members = {m.variable.path: m for m in channel_groups(model).members}
    kernel = members["depthwise/kernel"]
    assert kernel.output == -2
    assert list(kernel.axes) == [-2]
    assert not kernel.follows
    assert members["project/kernel"].output == -1
    np.testing.assert_array_equal(members["project/kernel"].axes[-2], np.arange(8, 24))
    following = {path for path, m in members.items() if m.follows}
    norm = {"norm/gamma", "norm/beta", "norm/moving_mean"}
    assert following == norm | {f"{x}/bias" for x in ("stem", "depthwise", "project", "head")}


def test_predicted_cost_equals_the_cost_of_the_shrunk_model():
    model = bottleneck()
    found = channel_groups(model)
    dead = np.zeros(found.count, bool)
    dead[[0, 1, 2, 8, 12]] = True
    assert_planned_costs(model, found, dead)


def assert_planned_costs(model, found, dead):
    """Remove channels; compare the predicted and the real numbers of parameters and FLOPs."""
    weights = [member.variable for member in found.members if member.output is not None]
    layouts = [Layout((m.output,), ()) for m in found.members if m.output is not None]
    method = keras_dst.methods.Magnitude(0.5, pattern="channel")
    groups = channels.groups_of(couple(model, method, weights, layouts).layouts)
    planned = {
        name: float(groups.kept_share(groups.counts(~dead[: len(groups.owner)]), name))
        for name in ("parameters", "flops")
    }
    before = keras_dst.report(model)
    remove(found, dead)
    small = keras_dst.shrink(model)
    after = keras_dst.report(small)
    assert planned == pytest.approx(
        {
            "parameters": after.parameters / before.parameters,
            "flops": after.dense_flops / before.dense_flops,
        },
        rel=1e-9,
    )
    return small


def remove(found, dead):
    """Set all weights of the channels that `dead` selects to zero."""
    for member in found.members:
        axis = member.output if member.output is not None else next(iter(member.axes), None)
        if member.output is not None or member.follows:
            values = np.moveaxis(np.array(member.variable.numpy()), axis, 0)
            values[dead[member.axes[axis]]] = 0
            member.variable.assign(np.moveaxis(values, 0, axis))


def vision_transformer():
    inputs = keras.Input((8, 8, 3))
    x = layers.Reshape((4, 8))(layers.Conv2D(8, 4, strides=4, name="patches")(inputs))
    y = layers.LayerNormalization(name="norm")(x)
    x = layers.Add(name="add")([x, layers.MultiHeadAttention(4, 2, name="attention")(y, y)])
    y = layers.LayerNormalization()(x)
    y = layers.Dense(8, name="narrow")(layers.Dense(16, "gelu", name="wide")(y))
    x = layers.LayerNormalization()(layers.Add(name="add_2")([x, y]))
    return keras.Model(inputs, layers.Dense(3, name="head")(x[:, 0]))


def grouped_query():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(5, 8, name="tokens")(inputs)
    y = layers.RMSNormalization()(x)
    x = layers.Add(name="add")([x, layers.GroupQueryAttention(2, 8, 4, name="attention")(y, y)])
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def squeeze_and_excitation():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv")(inputs)
    y = layers.GlobalAveragePooling2D(keepdims=True)(x)
    y = layers.Conv2D(4, 1, activation="relu", name="squeeze")(y)
    y = layers.Conv2D(8, 1, activation="sigmoid", name="excite")(y)
    x = layers.Conv2D(4, 3, padding="same", name="next")(layers.Multiply(name="gate")([x, y]))
    return keras.Model(inputs, layers.Conv2D(2, 1, name="head")(x))


def concatenation():
    inputs = keras.Input((6, 6, 3))
    a = layers.Conv2D(4, 1, name="a")(inputs)
    b = layers.Conv2D(6, 1, name="b")(inputs)
    x = layers.Concatenate()([a, b])
    x = layers.Conv2DTranspose(8, 2, strides=2, name="up")(x)
    x = layers.SeparableConv2D(4, 3, padding="same", depth_multiplier=2, name="separable")(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))


def gated_halves():
    inputs = keras.Input((6, 6, 3))
    a, b = keras.ops.split(layers.Conv2D(16, 3, name="both")(inputs), 2, axis=-1)
    x = layers.GroupNormalization(4, name="norm")(layers.Multiply(name="product")([a, b]))
    x = layers.Conv2D(8, 1, groups=2, name="grouped")(x)
    return keras.Model(inputs, layers.Conv2D(2, 1, name="head")(x))


def recurrent():
    inputs = keras.Input((5, 3))
    x = layers.LSTM(8, return_sequences=True, name="lstm")(inputs)
    x = layers.GRU(6, return_sequences=True, name="gru")(x)
    x = layers.SimpleRNN(4, name="rnn")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def bidirectional():
    inputs = keras.Input((5, 3))
    lstm, gru = layers.LSTM(8, return_sequences=True), layers.GRU(6, return_sequences=True)
    x = layers.Bidirectional(lstm, name="concatenated")(inputs)
    x = layers.Bidirectional(gru, merge_mode="sum", name="summed")(x)
    backward = layers.SimpleRNN(4, go_backwards=True)
    own = layers.Bidirectional(layers.LSTM(4), "mul", backward_layer=backward, name="multiplied")
    return keras.Model(inputs, layers.Dense(2, name="head")(own(x)))


def stack():
    inputs = keras.Input((5, 3))
    a, b = (layers.Dense(8, name=name)(inputs) for name in "ab")
    x = keras.ops.stack([a, b], axis=2)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def scaled_sums():
    """Return a network with the scaling layers of ConvNeXt and of InceptionResNetV2."""
    from keras.src.applications.convnext import LayerScale
    from keras.src.applications.inception_resnet_v2 import CustomScaleLayer

    inputs = keras.Input((5, 3))
    x = layers.Dense(8, name="a")(inputs)
    x = layers.Add(name="sum")([x, LayerScale(0.5, 8)(layers.Dense(8, name="b")(x))])
    x = CustomScaleLayer(0.2)([x, layers.Dense(8, name="c")(x)])
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def called_twice_and_nested():
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="inner")], name="nested")
    inputs = keras.Input((4,))
    x, shared = layers.Dense(8, name="first")(inputs), layers.Dense(6, name="shared")
    y = inner(x)
    return keras.Model(
        inputs, layers.Dense(2, name="head")(layers.Concatenate()([shared(x), shared(y)]))
    )


MODELS = {
    vision_transformer: [
        (8, ["patches", "attention", "narrow"]),
        (4, ["attention"]),
        (16, ["wide"]),
    ],
    grouped_query: [(8, ["tokens", "attention"]), (4, ["attention"])],
    squeeze_and_excitation: [(8, ["conv", "excite"]), (4, ["squeeze"]), (4, ["next"])],
    concatenation: [
        (4, ["a"]),
        (6, ["b"]),
        (8, ["up", "separable"]),
        (4, ["separable", "depthwise"]),
    ],
    gated_halves: [(2, ["both", "grouped"])],
    recurrent: [(8, ["lstm"]), (6, ["gru"]), (4, ["rnn"])],
    bidirectional: [(8, ["concatenated"]), (6, ["summed"]), (4, ["multiplied"])],
    stack: [(8, ["a", "b"])],
    scaled_sums: [(8, ["a", "b", "c"])],
    called_twice_and_nested: [(8, ["first", "inner"]), (6, ["shared"])],
}


@heavy
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_removing_half_of_every_group_preserves_the_outputs(build):
    """Remove half of every group of coupled channels; check the outputs and the predicted costs."""
    keras.utils.set_random_seed(0)
    model = randomize(build())
    assert groups_of(model) == MODELS[build]
    found = channel_groups(model)
    dead = np.zeros(found.count, bool)
    for group in found.groups:
        if not group.reason:
            dead[group.ids[len(group) // 2 :]] = True
    small = assert_planned_costs(model, found, dead)
    assert_same_outputs(model, small)
    # If a grouped convolution has only one group left, it no longer couples channels.
    if build is not gated_halves:
        assert [2 * size for size, _ in groups_of(small)] == [size for size, _ in MODELS[build]]


def test_layer_normalization_keeps_a_channel_that_is_not_zero():
    model = randomize(vision_transformer())
    kernel = model.get_layer("patches").kernel
    values = np.array(kernel.numpy())
    values[..., 4:] = 0
    kernel.assign(values)
    with pytest.warns(UserWarning, match="found nothing to remove"):
        keras_dst.shrink(model)


def test_channel_groups_contain_variables_of_the_model():
    model = bottleneck()
    keras_dst.sparsify(model, keras_dst.methods.DST())
    variables = {id(v) for v in model.variables}
    assert all(id(member.variable) in variables for member in channel_groups(model).members)


def test_channel_groups_of_a_model_without_a_graph_raise():
    class Own(keras.Model):
        def call(self, x):
            return x

    model = Own()
    model.build((1, 2))
    with pytest.raises(ValueError, match="Expected a Sequential or Functional model"):
        channel_groups(model)


def test_channel_groups_are_printed_as_a_table():
    lines = str(keras_dst.channel_groups(bottleneck())).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["8", "stem, project", "stem → sum ← project", ""]
    assert "stem → sum ← project</td>" in keras_dst.channel_groups(bottleneck())._repr_html_()


def test_the_report_of_shrink_lists_the_groups():
    model = bottleneck()
    found = channel_groups(model)
    dead = np.zeros(found.count, bool)
    dead[[0, 1, 8]] = True
    remove(found, dead)
    report = keras_dst.shrink_report(model)
    stream, hidden, inputs, outputs = report.groups
    assert (stream.layers, stream.chain) == (["stem", "project"], "stem → sum ← project")
    assert (stream.before, stream.after) == (8, 6)
    assert (hidden.chain, hidden.before, hidden.after) == ("expand → depthwise", 16, 15)
    assert (inputs.reason, inputs.after) == ("it is an input of the model", 3)
    assert (outputs.reason, outputs.after) == ("it is an output of the model", 4)
    rows = [[cell.strip() for cell in line.split("|")] for line in str(report).splitlines()]
    assert ["", "stem, project", "stem → sum ← project", "8", "6", ""] in rows
    assert report.to_dict()["groups"][1]["chain"] == "expand → depthwise"
