"""Tests of `shrink`: fewer channels with the same outputs, and the reasons in the report."""

import json
import re
import tracemalloc

import keras
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from keras import layers

import keras_dst
from keras_dst._backend.jit import jit
from keras_dst._keras import attention_projections_of
from keras_dst._structure.build import build
from keras_dst._structure.handlers import KernelLayer
from keras_dst._structure.plan import Plan
from keras_dst.methods import DST, Consensus, Magnitude
from tests import models
from tests.backends import every, once

pytestmark = every(64)

# Test fewer examples on JAX, which compiles every op of a random network, and on TensorFlow, which
# traces every op.
EXAMPLES = 12 if keras.backend.backend() == "torch" else 3
few = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    # The Hypothesis phase `shrink`, which simplifies failing examples, is omitted, because the
    # networks are small.
    phases=[Phase.explicit, Phase.generate],
)
KERNELS = (layers.Dense, layers.Conv1D, layers.Conv2D)


def randomize(model, seed=0):
    """Set biases, offsets and statistics to nonzero values, as after training."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if len(variable.shape) == 1:
            low = 0.5 if "var" in variable.path or "gamma" in variable.path else -1.0
            variable.assign(rng.uniform(low, 1.5, variable.shape))
    return model


def units_of(layer):
    """Return the kernel of a layer, and the axis of the kernel that holds the output units."""
    layer = getattr(layer, "layer", layer)
    layer = getattr(layer, "cell", layer)
    kernel = layer.pointwise_kernel if hasattr(layer, "pointwise_kernel") else layer.kernel
    return kernel, -2 if re.search("Transpose|Depthwise", type(layer).__name__) else -1


def kill(model, *names, count=None, bias=False):
    """Set the kernels of the last `count` units to zero, by default of half of the units."""
    for name in names:
        layer = model.get_layer(name)
        variable, axis = units_of(layer)
        kernel = np.moveaxis(np.array(variable.numpy()), axis, -1)
        dead = count or kernel.shape[-1] // 2
        kernel[..., -dead:] = 0
        variable.assign(np.moveaxis(kernel, -1, axis))
        if bias and layer.use_bias:
            values = np.array(layer.bias.numpy())
            values[-dead:] = 0
            layer.bias.assign(values)


def dead_units(model, name):
    """Return an array that is True for the units of a layer whose weights are all zero."""
    variable, axis = units_of(model.get_layer(name))
    return ~np.moveaxis(variable.numpy(), axis, -1).reshape(-1, variable.shape[axis]).any(0)


def outputs(model, seed=9):
    """Return the predictions of a compiled model on random inputs."""
    rng = np.random.default_rng(seed)
    inputs = [rng.standard_normal((3, *x.shape[1:])).astype("float32") for x in model.inputs]
    run = jit(lambda x: model(x, training=False))
    return keras.ops.convert_to_numpy(run(inputs[0] if len(inputs) == 1 else inputs))


def assert_same_outputs(model, small):
    a, b = outputs(model), outputs(small)
    np.testing.assert_allclose(b, a, atol=1e-5 * max(1, np.abs(a).max()))


def check(model, **widths):
    """Shrink a model. Check the layer widths, and that the outputs and the old model do not
    change."""
    before = models.arrays(model.weights)
    small = keras_dst.shrink(model)
    for variable, old in zip(model.weights, before):
        np.testing.assert_array_equal(variable.numpy(), old)
    assert_same_outputs(model, small)
    found = {}
    for name in widths:
        kernel, axis = units_of(small.get_layer(name))
        found[name] = kernel.shape[axis]
    assert found == widths
    assert keras_dst.report(small).parameters < keras_dst.report(model).parameters
    return small


@keras.saving.register_keras_serializable("tests")
def reverse(z):
    """Reverse the order of the channels, as an example of an activation that mixes channels."""
    return keras.ops.flip(z, -1)


def convnet(padding="same", use_bias=False):
    return randomize(
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(8, 3, padding=padding, use_bias=use_bias, name="one"),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.MaxPooling2D(),
                layers.Conv2D(6, 2, padding=padding, use_bias=False, name="two"),
                layers.BatchNormalization(),
                layers.Activation("tanh"),
                layers.Flatten(),
                layers.Dropout(0.5),
                layers.Dense(10, "relu", name="three"),
                layers.Dense(2, "softmax", name="head"),
            ]
        )
    )


@pytest.mark.parametrize(
    ("padding", "one"),
    # With zero padding, `shrink` keeps one dead channel. This channel also carries the constant
    # outputs of the other dead channels.
    [("same", 5), ("valid", 4)],
)
def test_shrink_a_convolutional_network(padding, one):
    model = convnet(padding)
    kill(model, "one", "two", "three")
    small = check(model, one=one, two=3, three=5, head=2)
    assert [layer.name for layer in small.layers[1:]] == [layer.name for layer in model.layers]
    assert small.get_layer("two").use_bias == (padding == "valid")


@once
def test_dead_channels_with_zero_output_leave_no_constants():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(8, 3, padding="same", activation="relu", name="one"),
            layers.Conv2D(6, 3, padding="same", use_bias=False, name="two"),
            layers.Flatten(),
            layers.Dense(2, use_bias=False, name="head"),
        ]
    )
    kill(model, "one", "two")
    small = check(model, one=4, two=3, head=2)
    assert not small.get_layer("head").use_bias


@once
def test_channels_without_readers_are_removed():
    model = convnet()
    layer = model.get_layer("three")
    kernel = np.array(layer.kernel.numpy()).reshape(4, 4, 6, 10)
    kernel[:, :, :2] = 0
    layer.kernel.assign(kernel.reshape(-1, 10))
    # A unit is also removed if all units in the next layer that read its output are dead.
    kill(model, "three")
    kernel = np.array(model.get_layer("two").kernel.numpy())
    kernel[:, :, :3, 2:] = 0
    model.get_layer("two").kernel.assign(kernel)
    check(model, one=5, two=4, three=5, head=2)


@once
def test_one_channel_of_every_layer_is_kept():
    model = convnet()
    kill(model, "one", count=8)
    kill(model, "three", count=10)
    check(model, one=1, two=1, three=1, head=2)


@once
def test_dead_classes_are_kept():
    model = convnet()
    kill(model, "one", "head")
    check(model, one=5, head=2)


def residual(merge, gated=False):
    def body(x, name):
        y = layers.Conv2D(8, 3, padding="same", activation="relu", name=f"{name}_1")(x)
        y = layers.Conv2D(8, 3, padding="same", name=f"{name}_2")(y)
        y = layers.BatchNormalization(name=f"{name}_norm")(y)
        return layers.Rescaling(0.0, name=f"{name}_gate")(y) if gated else y

    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="stem")(inputs)
    x = merge(x, body(x, "a"))
    x = layers.ReLU()(merge(x, body(x, "b")))
    x = layers.GlobalAveragePooling2D()(x)
    return randomize(keras.Model(inputs, layers.Dense(2, name="head")(x)))


@pytest.mark.parametrize(
    "merge", [lambda x, y: layers.Add()([x, y]), lambda x, y: x + y], ids=["layer", "operator"]
)
def test_shrink_a_residual_network(merge):
    model = residual(merge)
    kill(model, "a_1", "b_1", bias=True)
    check(model, a_1=4, b_1=4, a_2=8, b_2=8, stem=8)
    # A channel of a sum is removed only if it is dead in all layers whose outputs are added.
    kill(model, "a_2", "b_2", "stem", count=3, bias=True)
    kill(model, "a_2", "b_2")
    check(model, a_1=4, b_1=4, a_2=6, b_2=6, stem=6)


@once
@pytest.mark.parametrize(
    "merge", [lambda x, y: layers.Add()([x, y]), lambda x, y: x + y], ids=["layer", "operator"]
)
@pytest.mark.parametrize("gated", [False, True])
def test_a_closed_branch_is_removed(merge, gated):
    model = residual(merge, gated)
    if not gated:
        kill(model, "b_2", count=8)
        small = check(model, a_1=8, a_2=8, stem=8)
        # In the small model, a layer adds a constant: the offset of the removed normalization
        # layer.
        assert any("constant" in layer.name for layer in small.layers)
    else:
        small = check(model, stem=8, head=2)
        assert "a_1" not in [layer.name for layer in small.layers]
    assert "b_1" not in [layer.name for layer in small.layers]


@once
def test_shrink_concatenation_depthwise_and_multiplication():
    inputs = keras.Input((8, 8, 3))
    a = layers.Conv2D(6, 3, padding="same", name="a")(inputs)
    b = layers.Conv2D(4, 3, padding="same", activation="gelu", name="b")(inputs)
    x = layers.Concatenate()([a, b])
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    squeezed = layers.GlobalAveragePooling2D(keepdims=True)(x)
    scale = layers.Conv2D(20, 1, activation="sigmoid", name="scale")(squeezed)
    x = layers.Multiply()([x, scale])
    x = layers.Conv2D(5, 3, strides=2, padding="same", name="after")(x)
    x = layers.Reshape((-1, 5))(x)
    x = layers.Conv1D(4, 3, name="last")(x)
    model = randomize(keras.Model(inputs, layers.Flatten()(x)))
    kill(model, "a", bias=True)
    kill(model, "after")
    depthwise = model.get_layer("depthwise")
    kernel = np.array(depthwise.kernel.numpy())
    kernel[:, :, 6:8] = 0
    depthwise.kernel.assign(kernel)
    bias = np.array(depthwise.bias.numpy())
    bias[:16] = 0
    depthwise.bias.assign(bias)
    small = check(model, a=3, b=2, after=3, scale=10)
    assert small.get_layer("depthwise").kernel.shape == (3, 3, 5, 2)


def sequential(shape, *stack):
    """Return a network of the given layers and an output layer. No channel of the network is
    dead."""
    return randomize(
        keras.Sequential([keras.Input(shape), *stack, layers.Flatten(), layers.Dense(2)])
    )


@once
def test_shrink_separable_convolutions():
    model = sequential(
        (6, 6, 3),
        layers.SeparableConv2D(6, 3, name="one"),
        layers.PReLU(shared_axes=[1, 2], name="slopes"),
        layers.SeparableConv2D(4, 3, depth_multiplier=2, activation="relu", name="two"),
        layers.Reshape((4, 4)),
        layers.SeparableConv1D(4, 2, padding="same", name="three"),
        layers.PReLU(name="own"),
    )
    kill(model, "one", "three")
    small = check(model, one=3, two=4, three=2)
    assert small.get_layer("slopes").alpha.shape == (1, 1, 3)
    assert small.get_layer("own").alpha.shape == (4, 2)
    # Zero padding does not prevent the removal of a channel whose values are all 0.
    kill(model, "two", bias=True)
    check(model, one=3, two=2, three=2)


@once
def test_shrink_of_wide_separable_convolutions_needs_little_memory():
    """`shrink` never multiplies a depthwise kernel and a pointwise kernel.

    The product of the two kernels would have nine times as many entries as the pointwise kernel. A
    product in float64 would need eighteen times as much memory as a pointwise kernel in float32.
    """
    model = sequential(
        (6, 6, 512),
        layers.SeparableConv2D(512, 3, padding="same", activation="relu", name="one"),
        layers.SeparableConv2D(512, 3, padding="same", name="two"),
        layers.GlobalAveragePooling2D(),
    )
    kill(model, "one", bias=True)
    size = sum(variable.numpy().nbytes for variable in model.weights)
    tracemalloc.start()
    build(Plan(model))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size, f"{peak / size:.1f} times the weights"
    check(model, one=256, two=512)


@once
def test_shrink_transposed_convolutions_after_a_dense_layer():
    model = sequential(
        (3,),
        layers.Dense(16, "relu", name="seed"),
        layers.Reshape((2, 2, 4)),
        layers.Conv2DTranspose(6, 2, strides=2, activation="relu", name="one"),
        layers.Conv2DTranspose(4, 1, name="two"),
        layers.Reshape((16, 4)),
        layers.Conv1DTranspose(4, 3, padding="same", name="three"),
    )
    kill(model, "one", "two", "three", bias=True)
    kernel = np.array(model.get_layer("one").kernel.numpy())
    kernel[..., 3] = 0  # No layer reads channel 3, which contains four of the 16 units of "seed".
    model.get_layer("one").kernel.assign(kernel)
    check(model, seed=12, one=3, two=2, three=2)
    # Set all units of "seed" to zero except the first three. `Reshape` turns the 16 units into an
    # image of 2 x 2 pixels. The first three units become channels 0, 1 and 2 of the first pixel.
    kill(model, "seed", count=13)
    check(model, seed=12, one=3, two=2, three=2)


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="TensorFlow pools only channels_last on a CPU"
)
def test_shrink_with_channels_first():
    first = {"data_format": "channels_first"}
    inputs = keras.Input((3, 6, 6))
    x = layers.Conv2D(6, 3, padding="same", name="one", **first)(inputs)
    x = layers.ReLU()(layers.BatchNormalization(axis=1)(x))
    y = layers.Conv2D(6, 3, padding="same", name="closed", **first)(x)
    y = layers.BatchNormalization(axis=1)(y)
    x = layers.MaxPooling2D(**first)(layers.Add()([x, y]))
    x = layers.Concatenate(axis=1)([x, layers.Conv2D(4, 1, name="two", **first)(x)])
    a = layers.Flatten(**first)(layers.SeparableConv2D(4, 2, name="three", **first)(x))
    b = layers.Permute((2, 3, 1))(layers.DepthwiseConv2D(2, **first)(x))
    b = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 1, name="four")(b))
    model = randomize(keras.Model(inputs, layers.Dense(2)(layers.Concatenate()([a, b]))))
    kill(model, "one", "two", "three", "four")
    kill(model, "closed", count=6)
    small = check(model, one=3, two=2, three=2, four=2)
    assert "closed" not in [layer.name for layer in small.layers]


@once
def test_grouped_convolutions_lose_whole_groups():
    model = sequential(
        (5, 5, 3),
        layers.Conv2D(8, 2, activation="relu", name="one"),
        layers.Conv2D(12, 3, groups=4, padding="same", name="grouped"),
        layers.BatchNormalization(),
        layers.Conv2D(4, 2, name="two"),
    )
    kill(model, "grouped", count=6)
    small = check(model, one=4, grouped=6, two=4)
    assert small.get_layer("grouped").groups == 2
    kill(model, "grouped", count=8)
    check(model, one=4, grouped=6, two=4)
    reasons = keras_dst.shrink_report(model).layers[1].reasons
    assert reasons == {
        "'grouped' loses only whole groups, and other channels of the group are in use; prune all "
        "filters of the group": 2
    }


def test_shrink_removes_inputs_of_recurrent_layers():
    model = sequential(
        (4, 3),
        layers.TimeDistributed(layers.Dense(6, "relu"), name="one"),
        layers.LSTM(3, return_sequences=True, name="lstm"),
        layers.Dense(6, "tanh", name="two"),
        layers.GRU(3, return_sequences=True, name="gru"),
        layers.Dense(6, name="three"),
        layers.SimpleRNN(3, name="rnn"),
    )
    kill(model, "one", "two", "three")
    small = check(model, one=3, two=3, three=3, lstm=12, gru=9, rnn=3)
    assert [small.get_layer(n).cell.kernel.shape[0] for n in ("lstm", "gru", "rnn")] == [3, 3, 3]


def kill_directions(layer, *names):
    """Set all weights of the last unit of a `Bidirectional` to zero. `names` selects the
    directions: `"forward"`, `"backward"` or both."""
    for name in names:
        cell = getattr(layer, f"{name}_layer").cell
        for variable in cell.weights:
            values = np.array(variable.numpy())
            values[..., cell.units - 1 :: cell.units] = 0
            variable.assign(values)


@once
@pytest.mark.parametrize("mode", ["concat", "sum", "ave", "mul"])
def test_bidirectional_layers_lose_the_same_units_in_both_directions(mode):
    layer = layers.Bidirectional(layers.LSTM(4), mode, name="both")
    model = sequential((5, 3), layer)
    kill_directions(layer, "backward")
    row = keras_dst.shrink_report(model).layers[0]
    assert row.after == row.before
    kill_directions(layer, "forward")
    small = keras_dst.shrink(model)
    assert_same_outputs(model, small)
    both = small.get_layer("both")
    for direction in (both.forward_layer, both.backward_layer):
        assert direction.cell.kernel.shape == (3, 12)
    assert small.layers[-1].kernel.shape == (6 if mode == "concat" else 3, 2)


@once
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([layers.LSTM(4), "concat", None, layers.LSTM(6, go_backwards=True)], "different numbers"),
        ([layers.RNN([layers.LSTMCell(4), layers.LSTMCell(4)])], "repeats a RNN"),
        ([layers.LSTM(4, activation="softmax")], "has the activation 'softmax'"),
    ],
    ids=["widths", "cells", "activation"],
)
def test_bidirectional_layers_that_keep_their_channels(arguments, reason):
    both = layers.Bidirectional(*arguments)
    model = randomize(keras.Sequential([keras.Input((5, 3)), layers.Dense(6, name="one"), both]))
    kill(model, "one")
    (found,) = keras_dst.shrink_report(model).layers[0].reasons
    assert reason in found


@once
def test_batch_renormalization_loses_dead_channels():
    norm = layers.BatchNormalization(renorm=True)
    hidden, head = layers.Dense(6, name="one"), layers.Dense(2, name="two")
    model = randomize(keras.Sequential([keras.Input((8,)), hidden, norm, head]))
    kill(model, "one")
    assert [v.shape for v in check(model, one=3).layers[2].weights] == [(3,)] * 7


@once
@pytest.mark.parametrize("outer", ["attention", "wrapper"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.quantize("int8"), "is quantized"),
        (lambda layer: layer.enable_lora(2), "has LoRA"),
    ],
    ids=["quantize", "lora"],
)
def test_layers_around_a_quantized_layer_or_lora_keep_their_channels(outer, change, reason):
    inputs = keras.Input((8, 4))
    x = layers.Dense(6, name="one")(inputs)
    if outer == "attention":
        layer = layers.MultiHeadAttention(2, 3, name="outer")
        model = keras.Model(inputs, layer(x, x))
        inner = attention_projections_of(layer)["query"]
    else:
        layer = layers.TimeDistributed(layers.Dense(3), name="outer")
        model = keras.Model(inputs, layer(x))
        inner = layer.layer
    change(inner)
    kill(model, "one")
    (found,) = keras_dst.shrink_report(model).layers[0].reasons
    assert found.startswith(f"'outer' {reason}")


@once
def test_layers_that_are_called_with_inputs_by_name_lose_channels():
    inputs = keras.Input((8, 4))
    x = layers.Dense(6, name="one")(inputs)
    y = layers.Dense(6, name="two")(inputs)
    norm = layers.LayerNormalization()
    x = norm(inputs=x)
    for arguments in ({"query": x, "value": y}, {"value": y, "key": x, "query": y}):
        x = layers.MultiHeadAttention(2, 3)(**arguments)
    model = randomize(keras.Model(inputs, x))
    kill(model, "one", "two", bias=True)
    norm.set_weights([w * [1, 1, 1, 0, 0, 0] for w in norm.get_weights()])
    check(model, one=3, two=3)


@once
def test_rms_normalization_loses_zero_channels():
    hidden, head = layers.Dense(6, name="one"), layers.Dense(2, name="two")
    model = keras.Sequential([keras.Input((8,)), hidden, layers.RMSNormalization(), head])
    kill(randomize(model), "one", bias=True)
    check(model, one=3)


@once
def test_a_branch_is_removed_from_a_model_that_already_lost_a_branch():
    inputs = keras.Input((8,))
    x = layers.Add(name="sum")([layers.Dense(4, name=name)(inputs) for name in "abc"])
    model = randomize(keras.Model(inputs, layers.Dense(3)(x)))
    for name in "bc":
        kill(model, name, count=4)
        small = keras_dst.shrink(model)
        assert_same_outputs(model, small)
        model = small
    assert [layer.name for layer in model.layers[2:4]] == ["again_sum_constant", "sum_constant"]


@once
def test_slices_keep_their_names(tmp_path):
    inputs = keras.Input((8,))
    x = layers.Dense(6, name="one")(inputs)
    keras.backend.clear_session()
    x = layers.Concatenate()([x[:, ::2], x[:, :4]])
    keras.Model(inputs, x).save(tmp_path / "model.keras")
    keras.backend.clear_session()
    model = keras.models.load_model(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="nothing to remove"):
        assert_same_outputs(model, keras_dst.shrink(model))


@once
def test_shrink_shared_layers_and_several_outputs():
    one, two = keras.Input((8,)), keras.Input((8,))
    shared, norm = layers.Dense(6, "relu", name="shared"), layers.BatchNormalization()
    a, b = norm(shared(one)), norm(shared(two))
    second = layers.Dense(4, name="second")
    out = [layers.Add()([second(a), second(b)]), layers.Dense(3, name="third")(a)]
    model = randomize(keras.Model([one, two], {"x": out[0], "y": out[1]}))
    kill(model, "shared")
    small = keras_dst.shrink(model)
    x = [np.random.default_rng(i).standard_normal((5, 8)).astype("float32") for i in (1, 2)]
    for name, expected in model(x).items():
        found = keras.ops.convert_to_numpy(small(x)[name])
        np.testing.assert_allclose(found, keras.ops.convert_to_numpy(expected), atol=1e-5)
    assert small.get_layer("shared").units == 3


@once
def test_unsupported_layers_keep_their_channels():
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 3, padding="same", name="one")(inputs)
    x = layers.Conv2D(8, 3, padding="same", groups=2, name="grouped")(x)
    x = layers.LayerNormalization()(x)
    x = layers.Dense(6, "relu", name="dense")(x)
    x = layers.Dense(6, "softmax", name="attention")(x)
    x = layers.Dense(4, reverse, name="own")(x)
    model = randomize(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    kill(model, "one", "grouped", "dense", "attention", "own", bias=True)
    check(model, one=8, grouped=8, dense=3, attention=6, own=4, head=3)


@once
@pytest.mark.parametrize("kind", ["sequential", "residual", "nested"])
def test_shrink_models_of_every_kind(kind):
    keras.utils.set_random_seed(0)
    model = randomize(models.MODELS[kind]())
    for layer in model._flatten_layers():
        if type(layer) in KERNELS and layer.kernel.shape[-1] > 2:
            kernel = np.array(layer.kernel.numpy())
            kernel[..., ::2] = 0
            layer.kernel.assign(kernel)
    small = keras_dst.shrink(model)
    x = models.data()[0]
    np.testing.assert_allclose(models.predict(small, x), models.predict(model, x), atol=1e-5)
    assert small.count_params() < model.count_params()


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_shrink_in_half_precision(dtype):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = residual(lambda x, y: layers.Add()([x, y]))
        kill(model, "a_1", "b_1")
        kill(model, "b_2", count=8)
        small = keras_dst.shrink(model)
    finally:
        keras.config.set_dtype_policy(before)
    assert small.get_layer("head").dtype_policy.name == dtype
    assert small.get_layer("a_1").filters == 5


def test_shrink_strips_a_copy_of_a_sparse_model(tmp_path):
    model = models.sequential()
    keras_dst.sparsify(model, Consensus())
    layer = model.layers[0]
    layer.sparse_state["kernel"]["logit"].assign([1, -1, 1, -1, 1, -1, 1, -1])
    small = check(model)
    assert layer.sparse_state
    assert small.layers[1].filters == 4
    small.save(tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    x = models.data()[0]
    np.testing.assert_array_equal(models.predict(loaded, x), models.predict(small, x))
    models.compiled(small).fit(*models.data(), verbose=0)


@once
def test_shrink_after_magnitude_pruning():
    method = Magnitude(0.5, pattern="channel", allocation="uniform")
    model = models.compiled(models.sequential(), keras_dst.SparseOptimizer("adam", method))
    model.fit(*models.data(), epochs=2, verbose=0, callbacks=[keras_dst.callbacks.SparseTraining()])
    small = keras_dst.shrink(keras_dst.strip(model))
    assert small.count_params() < model.count_params()


@once
class TestReport:
    def test_report_of_sizes_flops_and_latency(self):
        model = convnet("valid")
        kill(model, "one", "two", "three")
        found = keras_dst.shrink_report(model, latency=True)
        small = keras_dst.shrink(model)
        for name, net in [("before", model), ("after", small)]:
            figures = keras_dst.report(net)
            assert getattr(found, f"parameters_{name}") == figures.parameters
            assert getattr(found, f"flops_{name}") == figures.dense_flops
            assert getattr(found, f"latency_{name}") > 0
        assert [(r.layer, r.type, r.before, r.after, r.reasons) for r in found.layers] == [
            ("one", "Conv2D", 8, 4, {}),
            ("two", "Conv2D", 6, 3, {}),
            ("three", "Dense", 10, 5, {}),
            ("head", "Dense", 2, 2, {}),
        ]
        assert json.loads(json.dumps(found.to_dict()))["layers"][0]["after"] == 4
        assert "latency in µs" in str(found)
        assert "FLOPs 17,608 -> " in str(found)

    def test_report_measures_latency_only_on_request(self):
        found = keras_dst.shrink_report(convnet())
        assert found.latency_before is found.latency_after is None
        assert "latency" not in str(found)

    def test_report_of_a_removed_layer(self):
        model = residual(lambda x, y: layers.Add()([x, y]))
        kill(model, "b_2", count=8)
        after = {row.layer: row.after for row in keras_dst.shrink_report(model).layers}
        assert after == {"stem": 8, "a_1": 8, "a_2": 8, "b_1": 0, "b_2": 0, "head": 2}

    def test_report_of_reasons(self):
        inputs = keras.Input((5, 5, 4))
        one = layers.Conv2D(6, 1, name="one")
        x = layers.Multiply(name="square")([one(inputs), one(layers.ReLU()(inputs))])
        x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
        x = layers.Conv2D(8, 3, name="two")(x)
        x = layers.LayerNormalization(name="norm")(x)
        x = layers.Conv2D(4, 3, padding="same", name="three")(x)
        x = layers.SeparableConv2D(4, 3, padding="same", name="separable")(x)
        x = layers.Conv2D(4, 1, name="four")(x)
        x = layers.Permute((1, 3, 2), name="turn")(x)
        x = layers.GlobalAveragePooling2D(name="pool")(x)
        x = layers.Dense(4, "softmax", name="choice")(x)
        x = layers.Dense(6, name="mine")(x)
        x = layers.Dense(6, name="last")(models.MyDense(6, name="own")(x))
        model = randomize(keras.Model(inputs, x))
        names = ("one", "two", "three", "separable", "four", "choice", "mine", "own", "last")
        kill(model, *names)
        found = {row.layer: row.reasons for row in keras_dst.shrink_report(model).layers}
        border = "changes the constant of the channel at some positions, as padding does at the "
        border += "border; make the channel zero or do not pad"
        separable = "'separable' pads with zeros, where the constant of the channel ends; use "
        separable += "padding='valid'"
        softmax = "'choice' has the activation 'softmax', which may mix channels; use an "
        softmax += "elementwise activation"
        custom = "'own' is a custom layer, whose code shrink cannot read; use layers of Keras "
        custom += "instead"
        norm = "'norm' normalizes over channels; set the channel's bias, gamma and beta to zero"
        assert found == {
            "one": {f"'depthwise' {border}": 3},
            "depthwise": {},
            "two": {norm: 4},
            "three": {separable: 2},
            "separable": {},
            "four": {"'pool' has its channels on another axis; use one axis": 2},
            "choice": {softmax: 2},
            "mine": {custom: 3},
            "own": {custom: 3},
            "last": {"it is an output of the model; exclude its layer from pruning": 3},
        }

    def test_report_of_reasons_with_shared_layers_and_constants(self):
        model = convnet()
        kill(model, "one")
        kill(model, "three", count=10)
        found = {row.layer: row.reasons for row in keras_dst.shrink_report(model).layers}
        assert found == {
            "one": {},
            "two": {"every layer keeps at least one channel; nothing can be done": 1},
            "three": {"every layer keeps at least one channel; nothing can be done": 1},
            "head": {},
        }
        model = convnet()
        kill(model, "one")
        rows = keras_dst.shrink_report(model).layers
        assert rows[0].reasons == {
            "'two' pads with zeros and needs one constant channel in place of the removed "
            "constant channels; use padding='valid' to remove this channel too": 1
        }

        a, b = keras.Input((4,)), keras.Input((4,))
        shared = layers.Dense(3, name="shared")
        x, y = layers.Dense(6, name="a")(a), layers.Dense(6, name="b")(b)
        model = randomize(keras.Model([a, b], layers.Add()([shared(x), shared(y)])))
        kill(model, "a")
        rows = {row.layer: row for row in keras_dst.shrink_report(model).layers}
        assert rows["a"].reasons == {
            "'shared' is also called on 'b', whose channel is in use; remove the same channel "
            "there too": 3
        }


# -- layers with state outside of config and weights -----------------------------------------------


class Factor(layers.Layer):
    """A custom layer whose config does not contain one of its attributes."""

    factor = 1.0

    def call(self, x):
        return x * self.factor


class Penalty(keras.regularizers.Regularizer):
    """A regularizer that does not define `get_config`."""

    def __call__(self, w):
        return 0.0 * keras.ops.sum(w)


def factor(value, name=None):
    layer = Factor(name=name)
    layer.factor = value
    return layer


def adapted(layer, data):
    layer.adapt(data)
    return layer


SAMPLES = np.random.default_rng(0).normal(5, 3, (40, 8)).astype("float32")
STATEFUL_LAYERS = {
    "statistics": lambda: adapted(layers.Normalization(), SAMPLES),
    "boundaries": lambda: adapted(layers.Discretization(num_bins=4), SAMPLES),
    "attribute": lambda: factor(3.0),
    "closure": lambda: layers.Lambda(lambda x, scale=4.0: x * scale),
    "random": lambda: layers.GaussianNoise(0.5, seed=3),
    "statistics in a nested model": lambda: keras.Sequential(
        [keras.Input((8,)), adapted(layers.Normalization(), SAMPLES)]
    ),
}


def with_layer(layer, dtype="float32", **options):
    """Return a network of `layer` and two dense layers."""
    inputs = keras.Input((8,), dtype=dtype)
    x = layers.Dense(16, "relu", name="hidden", **options)(keras.ops.cast(layer(inputs), "float32"))
    return randomize(keras.Model(inputs, layers.Dense(2, name="head")(x)))


def assert_smaller(model, x, layer="hidden"):
    """Shrink a model. Check that the outputs and the old model do not change, and that half of the
    units are removed."""
    before = models.arrays(model.variables)
    small = keras_dst.shrink(model)
    for variable, old in zip(model.variables, before):
        np.testing.assert_array_equal(variable.numpy(), old)
    with keras.StatelessScope():
        pairs = zip(*(keras.tree.flatten(m(x, training=False)) for m in (small, model)))
        for found, expected in pairs:
            found, expected = map(keras.ops.convert_to_numpy, (found, expected))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    (row,) = (r for r in keras_dst.shrink_report(model).layers if r.layer == layer)
    assert row.after == row.before // 2, row.reasons
    return small


@every(24)
@pytest.mark.parametrize("kind", STATEFUL_LAYERS)
def test_shrink_keeps_the_whole_state_of_other_layers(kind):
    model = with_layer(STATEFUL_LAYERS[kind]())
    kill(model, "hidden")
    assert_smaller(model, SAMPLES)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")
def test_shrink_keeps_the_vocabulary_of_lookup_layers():
    inputs = keras.Input((1,), dtype="int64")
    lookup = adapted(layers.IntegerLookup(output_mode="one_hot"), np.array([30, 40, 40, 50]))
    x = layers.Dense(16, "relu", name="hidden")(lookup(inputs))
    model = randomize(keras.Model(inputs, layers.Dense(2)(x)))
    kill(model, "hidden")
    assert_smaller(model, np.array([[30], [40], [7]]))


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX cannot convert the strings of this test"
)
def test_shrink_with_string_inputs():
    inputs = keras.Input((1,), dtype="string")
    words = layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")
    x = layers.Dense(16, "relu", name="hidden")(words(inputs))
    model = randomize(keras.Model(inputs, layers.Dense(2)(x)))
    kill(model, "hidden")
    if keras.backend.backend() == "tensorflow":
        assert_smaller(model, keras.ops.convert_to_tensor([["a"], ["b"], ["c"]]))
    else:
        with pytest.raises(ValueError, match="input of strings, which Keras runs on TensorFlow"):
            keras_dst.shrink(model)


def test_shrink_keeps_statistics_of_a_sparse_model():
    model = with_layer(adapted(layers.Normalization(), SAMPLES))
    keras_dst.sparsify(model, Consensus(), filters="hidden")
    layer = model.get_layer("hidden")
    layer.sparse_state["kernel"]["logit"].assign([1, -1] * 8)
    assert_smaller(model, SAMPLES)
    assert layer.sparse_state
    assert keras_dst.shrink_report(model, latency=True).latency_before > 0


@once
@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_shrink_with_objects_that_keras_cannot_save():
    inputs = keras.Input((8,))
    x = layers.Dense(8, lambda t: 2 * t, kernel_regularizer=Penalty())(inputs)
    x = layers.Dense(16, "relu", kernel_regularizer=Penalty(), name="hidden")(x)
    model = randomize(keras.Model(inputs, layers.Dense(2, lambda t: t + 1)(x)))
    kill(model, "hidden")
    small = assert_smaller(model, SAMPLES)
    assert isinstance(small.get_layer("hidden").kernel_regularizer, Penalty)
    keras_dst.sparsify(model, Consensus(), filters="hidden")
    model.get_layer("hidden").sparse_state["kernel"]["logit"].assign([1] * 8 + [-1] * 8)
    assert_smaller(model, SAMPLES)


@once
def test_shrink_two_nested_models_with_equal_layer_names():
    def block(name):
        inputs = keras.Input((8,))
        return keras.Model(inputs, factor(2.0, name="same")(inputs) + 1.0, name=name)

    model = with_layer(keras.Sequential([keras.Input((8,)), block("a"), block("b")]))
    kill(model, "hidden")
    small = assert_smaller(model, SAMPLES)
    assert len({layer.name for layer in small.layers}) == len(small.layers)


@once
def test_shrink_a_nested_model_that_is_called_with_a_dict():
    a, b = keras.Input((16,), name="a"), keras.Input((8,), name="b")
    # The order of the inputs differs from the order of the sorted names.
    nested = keras.Model([b, a], layers.Concatenate()([layers.Dense(3)(b), layers.Dense(4)(a)]))
    inputs = keras.Input((8,))
    hidden = layers.Dense(16, "relu", name="hidden")(inputs)
    other = layers.Dense(8, "relu")(inputs)
    model = keras.Model(inputs, layers.Dense(2)(nested({"a": hidden, "b": other})))
    kill(randomize(model), "hidden")
    assert_smaller(model, SAMPLES)


@once
def test_shrink_adds_no_nodes_to_the_given_model():
    model = with_layer(factor(2.0))
    kill(model, "hidden")
    operations = model.operations
    before = [len(operation._inbound_nodes) for operation in operations]
    keras_dst.shrink(model)
    assert [len(operation._inbound_nodes) for operation in operations] == before


@once
def test_shared_weights_are_not_sliced():
    class Tied(layers.Layer):
        def __init__(self, source):
            super().__init__()
            self.source = source

        def call(self, x):
            return x @ keras.ops.transpose(self.source.kernel)

    inputs = keras.Input((8,))
    hidden = layers.Dense(16, "relu", name="hidden")
    x = layers.Dense(16, "relu", name="middle")(hidden(inputs))
    model = randomize(keras.Model(inputs, Tied(hidden)(x)))
    kill(model, "hidden")
    with pytest.warns(UserWarning, match="nothing to remove"):
        keras_dst.shrink(model)
    (reason,) = keras_dst.shrink_report(model).layers[0].reasons
    assert "'hidden' shares a weight with 'tied" in reason


@once
def test_a_nested_model_with_a_custom_call_is_not_shrunk():
    class Doubled(keras.Model):
        def call(self, x, training=None):
            return 2.0 * super().call(x)

    inputs = keras.Input((8,))
    model = with_layer(Doubled(inputs, layers.Dense(8)(inputs)))
    kill(model, "hidden")
    assert_smaller(model, SAMPLES)


@once
def test_active_dropout_keeps_its_channels():
    inputs = keras.Input((8,))
    x = layers.Dense(16, "relu", name="hidden")(inputs)
    x = layers.Dropout(0.5, name="dropout")(x, training=True)
    model = randomize(keras.Model(inputs, layers.Dense(2)(x)))
    kill(model, "hidden")
    (reason,) = keras_dst.shrink_report(model).layers[0].reasons
    assert reason.startswith("'dropout' is called with training=True")


@once
@pytest.mark.parametrize("training", [True, False])
def test_shrink_keeps_the_argument_training_of_nested_models(training):
    block = keras.Sequential([keras.Input((8,)), layers.Dropout(0.5), layers.Dense(8)])
    inputs = keras.Input((8,))
    nested = keras.Model(inputs, block(inputs, training=not training))
    x = layers.Dense(16, "relu", name="hidden")(nested(inputs, training=training))
    model = randomize(keras.Model(inputs, layers.Dense(2)(x)))
    kill(model, "hidden")
    small = assert_smaller(model, SAMPLES)
    for net in (model, small):
        first, second = (keras.ops.convert_to_numpy(net(SAMPLES)) for _ in range(2))
        assert np.array_equal(first, second) is not training


@once
def test_dense_layers_of_a_nested_model_with_active_dropout_lose_channels():
    block = [keras.Input((8,)), layers.Dense(16, "relu", name="hidden"), layers.Dense(4)]
    nested = keras.Sequential([*block, layers.Dropout(0.5)])
    inputs = keras.Input((8,))
    model = randomize(keras.Model(inputs, layers.Dense(2)(nested(inputs, training=True))))
    kill(nested, "hidden")
    assert_smaller(model, SAMPLES)


# -- Keras masks -----------------------------------------------------------------------------------

IDS = np.array([[1, 2, 0, 0, 3, 0], [4, 0, 0, 0, 0, 0]])
READERS = {
    "average": layers.GlobalAveragePooling1D,
    "maximum": layers.GlobalMaxPooling1D,
    "lstm": lambda: layers.LSTM(4),
    "gru": lambda: layers.GRU(4),
    "rnn": lambda: layers.SimpleRNN(4),
    "nested": lambda: keras.Sequential([keras.Input((6, 16)), layers.GlobalAveragePooling1D()]),
}


@every(24)
@pytest.mark.filterwarnings("ignore:.*destroy the mask information")
@pytest.mark.parametrize("reader", READERS)
def test_shrink_with_masks_of_an_embedding(reader):
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(inputs)
    x = layers.Dense(16, "relu", name="hidden")(x)
    model = randomize(keras.Model(inputs, layers.Dense(2)(READERS[reader]()(x))))
    kill(model, "hidden")
    assert_smaller(model, IDS)


@once
def test_shrink_with_masks_through_a_concatenation():
    inputs = keras.Input((6, 8))
    x = layers.Masking(name="masking")(layers.Dense(6, use_bias=False, name="before")(inputs))
    x = layers.Concatenate()([layers.Dense(16, name="hidden")(x), layers.Dense(4)(x)])
    model = randomize(keras.Model(inputs, layers.LSTM(4)(x)))
    kill(model, "hidden", "before")
    samples = np.random.default_rng(0).standard_normal((2, 6, 8)).astype("float32")
    samples[:, 3:] = 0
    assert_smaller(model, samples)
    rows = {row.layer: row for row in keras_dst.shrink_report(model).layers}
    (reason,) = rows["before"].reasons
    assert reason.startswith("'masking' computes its mask from all channels")


@once
@pytest.mark.parametrize("reader", ["average", "lstm"])
def test_shrink_with_masks_from_the_user(reader):
    inputs, mask = keras.Input((6, 8)), keras.Input((6,), dtype="bool")
    x = layers.Dense(16, "relu", name="hidden")(inputs)
    x = READERS[reader]()(x, mask=mask)
    model = randomize(keras.Model([inputs, mask], layers.Dense(2)(x)))
    kill(model, "hidden")
    samples = np.random.default_rng(0).standard_normal((2, 6, 8)).astype("float32")
    assert_smaller(model, [samples, IDS > 0])


@once
def test_a_constant_term_that_removes_the_mask_is_kept():
    ids, values = keras.Input((6,), dtype="int32"), keras.Input((6, 8))
    x = layers.Embedding(9, 8, mask_zero=True)(ids)
    x = layers.Add()([x, layers.Dense(8, kernel_initializer="zeros")(values)])
    x = layers.Dense(16, name="hidden")(layers.GlobalAveragePooling1D()(x))
    model = keras.Model([ids, values], layers.Dense(2)(x))
    kill(model, "hidden")
    assert_smaller(model, [IDS, np.ones((2, 6, 8), "float32")])


# -- inputs and states -----------------------------------------------------------------------------


class Maybe(layers.Layer):
    """A layer whose second input is optional."""

    def call(self, a, b=None):
        return a if b is None else a + b


def test_shrink_with_optional_inputs():
    a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b", optional=True)
    x = layers.Dense(16, "relu", name="hidden")(Maybe()(a, b))
    model = randomize(keras.Model({"a": a, "b": b}, layers.Dense(2)(x)))
    kill(model, "hidden")
    assert_smaller(model, {"a": SAMPLES, "b": SAMPLES})
    assert_smaller(model, {"a": SAMPLES, "b": None})


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras has no sparse tensors on PyTorch"
)
def test_shrink_with_sparse_inputs():
    inputs = keras.Input((8,), sparse=True, batch_size=2, name="values")
    x = layers.Dense(16, "relu", name="hidden")(inputs)
    model = randomize(keras.Model(inputs, layers.Dense(2)(x)))
    kill(model, "hidden")
    small = assert_smaller(model, keras.ops.one_hot(np.array([1, 3]), 8, sparse=True))
    assert small.inputs[0].sparse
    assert small.inputs[0].shape == (2, 8)
    assert small.inputs[0].name == "values"


def test_shrink_with_states_of_recurrent_layers():
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(2, 6, 8)),
            layers.Dense(16, "relu", name="hidden"),
            layers.GRU(4, stateful=True, return_sequences=True),
            layers.Bidirectional(layers.LSTM(3, stateful=True)),
        ]
    )
    randomize(model)
    kill(model, "hidden")
    samples = np.random.default_rng(0).standard_normal((2, 6, 8)).astype("float32")
    model.predict(samples, verbose=0, batch_size=2)
    assert_smaller(model, samples)


def test_shrink_computes_no_initial_values():
    calls = []

    class Counted(keras.initializers.Zeros):
        def __call__(self, shape, dtype=None, **kwargs):
            calls.append(shape)
            return super().__call__(shape, dtype)

    inputs = keras.Input((8,))
    x = layers.Dense(16, "relu", kernel_initializer=Counted(), name="hidden")(inputs)
    model = randomize(keras.Model(inputs, layers.Dense(2, kernel_initializer=Counted())(x)))
    kill(model, "hidden")
    assert len(calls) == 2
    small = keras_dst.shrink(model)
    assert len(calls) == 2
    assert isinstance(small.get_layer("hidden").kernel_initializer, Counted)


def test_shrink_does_not_share_memory_with_the_given_model():
    inputs = keras.Input((8,))
    x = layers.Dense(16, "relu", name="hidden")(inputs)
    model = randomize(keras.Model(inputs, layers.Dense(2, name="head")(x)))
    kill(model, "hidden")
    small = keras_dst.shrink(model)
    before = keras.ops.convert_to_numpy(small.get_layer("head").bias).copy()
    model.get_layer("head").bias.assign([7.0, 7.0])
    np.testing.assert_array_equal(small.get_layer("head").bias, before)


def test_shrink_of_operations_that_concatenate_and_reduce():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(16, 3, name="one")(inputs)
    y = layers.Conv2D(8, 3, activation="relu", name="two")(x)
    y = keras.ops.concatenate([y, y], axis=1)
    mean = keras.ops.mean(x, (1, 2))
    largest = keras.ops.max(y, (1, 2), keepdims=True)
    y = keras.ops.concatenate([mean, layers.Flatten()(largest)], axis=-1)
    model = randomize(keras.Model(inputs, layers.Dense(3)(y)))
    kill(model, "one", "two")
    small = assert_smaller(model, np.random.default_rng(0).standard_normal((2, 8, 8, 3)), "one")
    assert small.get_layer("two").filters == 4


def test_a_reduction_over_channels_keeps_them():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(16, 3, name="one")(inputs)
    model = randomize(keras.Model(inputs, keras.ops.mean(x, -1)))
    kill(model, "one")
    (reason,) = keras_dst.shrink_report(model).layers[0].reasons
    assert "reduces over channels; prune layers whose channels it does not read" in reason


@once
def test_shrink_keeps_the_precision_of_float64_weights():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        model = convnet("valid")
        kill(model, "one")
        small = keras_dst.shrink(model)
    finally:
        keras.config.set_dtype_policy(before)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3))
    expected = model.predict(x)
    # Keras computes batch normalization in float32.
    atol = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(small.predict(x), expected, atol=atol)
    np.testing.assert_array_equal(small.get_layer("head").kernel, model.get_layer("head").kernel)


# -- random nets -----------------------------------------------------------------------------------

STEPS = {
    "conv": lambda n: layers.Conv2D(4, 2, activation="relu", name=n),
    "padded": lambda n: layers.Conv2D(4, 3, padding="same", name=n),
    "separable": lambda n: layers.SeparableConv2D(4, 2, padding="same", name=n),
    "depthwise": lambda n: layers.DepthwiseConv2D(2, depth_multiplier=2, name=n),
    "transposed": lambda n: layers.Conv2DTranspose(4, 2, name=n),
    "grouped": lambda n: layers.Conv2D(4, 1, groups=2, name=n),
    "norm": lambda n: layers.BatchNormalization(name=n),
    "slopes": lambda n: layers.PReLU(shared_axes=[1], name=n),
    "pool": lambda n: layers.AveragePooling2D(2, 1, padding="same", name=n),
    "turned": lambda n: layers.Permute((3, 1, 2), name=n),
}
REASONS = (
    *("pads with zeros", "at the border", "loses only whole groups", "at least one channel"),
    *("an output of the model", " adds ", "another axis", "several different channels"),
    "is coupled to",
)


def random_net(steps, seed):
    """Return a network with the given layers, some shortcuts, and some dead units."""
    rng = np.random.default_rng(seed)
    x = inputs = keras.Input((5, 5, 4))
    for place, (step, merge) in enumerate(steps):
        step = "conv" if step == "grouped" and x.shape[-1] % 2 else step
        y = STEPS[step](f"{step}_{place}")(x)
        if merge == "concat" and y.shape[:-1] == x.shape[:-1]:
            y = layers.Concatenate(name=f"concat_{place}")([x, y])
        if merge == "add" and y.shape == x.shape:
            y = layers.Add(name=f"add_{place}")([x, y])
        x = y
    x = layers.Flatten()(x)
    model = randomize(keras.Model(inputs, layers.Dense(2, name="head")(x)), seed)
    for layer in model.layers:
        if hasattr(layer, "kernel") or hasattr(layer, "pointwise_kernel"):
            kernel, axis = units_of(layer)
            values = np.moveaxis(np.array(kernel.numpy()), axis, -1)
            values[..., rng.random(kernel.shape[axis]) < 0.5] = 0
            kernel.assign(np.moveaxis(values, -1, axis))
            if seed % 2:
                layer.bias.assign(np.zeros(layer.bias.shape))
    return model


@once
@few
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from(["", "", "add", "concat"])),
        min_size=2,
        max_size=4,
    ),
    st.integers(0, 999),
)
@pytest.mark.filterwarnings("ignore:shrink found nothing")
def test_dead_channels_of_random_networks_are_removed_or_have_a_reason(steps, seed):
    model = random_net(steps, seed)
    small = keras_dst.shrink(model)
    assert_same_outputs(model, small)
    for row in keras_dst.shrink_report(model).layers:
        dead = dead_units(model, row.layer)
        # A depthwise convolution can have several output channels per input channel.
        living = (~dead).sum() * row.before // len(dead)
        assert row.after - sum(row.reasons.values()) <= living, row
        assert all(any(known in why for known in REASONS) for why in row.reasons), row
    again = Plan(small)
    # If only one group of a grouped convolution is left, the convolution becomes a plain
    # convolution. A second call of `shrink` could then remove more channels.
    alone = any(getattr(handler.op, "groups", 1) > 1 for handler in Plan(model).handlers)
    assert alone or all(again.keeps(handler.y).all() for handler in again.handlers)


# -- trained, pruned, shrunk -----------------------------------------------------------------------


# The network has so few channels that its sparsity may differ from the target by a few percent. DST
# warns that the sparsity differs from the target.
@every(16)
@pytest.mark.filterwarnings("ignore:DST")
@pytest.mark.parametrize("method", [Magnitude, DST], ids=lambda method: method.__name__)
def test_shrink_a_trained_residual_network(method):
    keras.utils.set_random_seed(0)
    model = residual(lambda x, y: layers.Add()([x, y]))
    if method is Magnitude:
        ranking = Magnitude(0.5, pattern="channel", allocation="uniform")
        models.compiled(model, keras_dst.SparseOptimizer("adam", ranking))
    else:
        keras_dst.sparsify(model, DST(sparsity=0.5, pattern="channel"))
        models.compiled(model)
    model.fit(*models.data(), epochs=4, verbose=0, callbacks=[keras_dst.callbacks.SparseTraining()])
    keras_dst.strip(model)
    dead = {name: dead_units(model, name) for name in ("stem", "a_1", "a_2", "b_1", "b_2")}
    small = keras_dst.shrink(model)
    assert_same_outputs(model, small)
    rows = {row.layer: row for row in keras_dst.shrink_report(model).layers}
    if method is Magnitude:  # Layers whose outputs are added keep the same four channels.
        assert all(rows[name].after == 4 and dead[name].sum() == 4 for name in dead)
    assert sum(d.sum() for d in dead.values()) >= 10
    for name in ("a_1", "b_1"):  # Inside a branch, `shrink` keeps at most one dead channel.
        assert rows[name].after <= 9 - dead[name].sum()
    # `shrink` removes a channel of the sum if the channel is pruned in all layers whose outputs are
    # added. `shrink` also removes a channel if all weights that read this channel are pruned.
    summed = dead["stem"] & dead["a_2"] & dead["b_2"]
    for name in ("stem", "a_2", "b_2"):
        assert rows[name].after <= 9 - summed.sum()


@once
class TestErrors:
    def test_a_model_without_a_graph_raises(self):
        with pytest.raises(ValueError, match="Expected a Sequential or Functional model"):
            keras_dst.shrink(models.subclassed())
        with pytest.raises(TypeError, match="Expected a Keras 3 model"):
            keras_dst.shrink("model.keras")

    def test_nothing_to_remove_warns(self):
        with pytest.warns(UserWarning, match="nothing to remove in 'dense'"):
            small = keras_dst.shrink(
                keras.Sequential([keras.Input((3,)), layers.Dense(2)], name="dense")
            )
        assert small.count_params() == 8

    def test_different_outputs_raise(self, monkeypatch):
        model = convnet()
        kill(model, "one")
        # Simulate a bug in `shrink`: ignore the zero padding, and add the constant channels to the
        # bias of the next layer. The outputs of the smaller model then differ at the border of the
        # image.
        monkeypatch.setattr(KernelLayer, "pads_with_zeros", False)
        with pytest.raises(RuntimeError, match="would change the outputs"):
            keras_dst.shrink(model)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow warns of retracing")
def test_shrinking_several_models_warns_of_no_retracing(caplog):
    for _ in range(6):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(2)])
        kernel = model.layers[0].kernel.numpy()
        kernel[:, 0] = 0
        model.layers[0].kernel.assign(kernel)
        keras_dst.shrink(model)
    assert "retracing" not in caplog.text


def test_the_outputs_are_compared_at_a_length_that_the_model_accepts():
    x = keras.Input((None, 4))
    y = layers.Dense(6, "relu", name="hidden")(x + np.ones((8, 4), "float32"))
    model = keras.Model(x, layers.Dense(2)(y))
    model.get_layer("hidden").kernel.assign(np.repeat([[1, 1, 1, 0, 0, 0]], 4, 0))
    small = keras_dst.shrink(model)
    assert small.get_layer("hidden").units == 3
    values = np.arange(64, dtype="float32").reshape(2, 8, 4)
    expected = model.predict(values)
    atol = 1e-5 * np.abs(expected).max()  # Large values of different signs may cancel in an output.
    np.testing.assert_allclose(small.predict(values), expected, atol=atol)


def test_a_model_that_accepts_no_tested_length_raises():
    x = keras.Input((None, 4))
    model = keras.Model(x, layers.Dense(2)(keras.ops.matmul(np.ones((7, 7), "float32"), x)))
    with pytest.raises(ValueError, match="Fix: create the model with fixed sizes"):
        keras_dst.shrink(model)
