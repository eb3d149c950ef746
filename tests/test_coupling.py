"""Tests of `channel_groups`: channels that leave together, with expected groups written by hand."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_dst
from keras_dst._structure.coupling import channel_groups, cost_of
from tests.backends import once

pytestmark = once


def groups_of(model):
    """Return the size and the layers of every group that can leave."""
    found = channel_groups(model)
    return [(len(group), group.layers) for group in found.groups if not group.reason]


def bottleneck():
    """Return a net with a residual sum around an expansion and a depthwise convolution."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", name="stem")(inputs)
    y = layers.Conv2D(16, 1, use_bias=False, name="expand")(x)
    y = layers.ReLU()(layers.BatchNormalization(name="norm")(y))
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(y)
    y = layers.Conv2D(8, 1, name="project")(y)
    x = layers.Add(name="sum")([x, y])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x))


def test_groups_of_a_residual_net():
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
    assert (found.removable, found.count) == (24, 31)
    np.testing.assert_array_equal(stream.ids, np.arange(8))
    np.testing.assert_array_equal(hidden.ids, np.arange(8, 24))


def test_members_of_a_residual_net():
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


def test_cost_is_the_cost_of_the_smaller_model():
    model = bottleneck()
    found = channel_groups(model)
    dense = keras_dst.report(model)
    assert cost_of(found) == (dense.parameters, dense.dense_flops)
    dead = np.zeros(found.count, bool)
    dead[[0, 1, 2, 8, 12]] = True
    remove(found, dead)
    small = keras_dst.report(keras_dst.shrink(model))
    assert cost_of(found, dead) == (small.parameters, small.dense_flops)


def remove(found, dead):
    """Set everything to zero that belongs to the dead channels."""
    for member in found.members:
        axis = member.output if member.output is not None else -1
        if member.output is not None or member.follows:
            values = np.moveaxis(np.array(member.variable.numpy()), axis, 0)
            values[dead[member.axes[axis]]] = 0
            member.variable.assign(np.moveaxis(values, 0, axis))


def test_variables_of_sparse_layers_are_those_of_the_model():
    model = bottleneck()
    keras_dst.sparsify(model, keras_dst.methods.DST())
    variables = {id(v) for v in model.variables}
    assert all(id(member.variable) in variables for member in channel_groups(model).members)


def test_a_model_without_a_graph():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="Expected a Sequential or Functional model"):
        channel_groups(Own())
