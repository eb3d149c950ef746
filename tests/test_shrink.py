"""`shrink`: fewer channels, the same outputs."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_dst
from keras_dst.methods import Consensus, Magnitude
from keras_dst.shrink.rules import Kernel
from tests import models

KERNELS = (layers.Dense, layers.Conv1D, layers.Conv2D)


def randomise(model, seed=0):
    """Biases, offsets and statistics as after training: none of them 0."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if len(variable.shape) == 1:
            low = 0.5 if "var" in variable.path or "gamma" in variable.path else -1.0
            variable.assign(rng.uniform(low, 1.5, variable.shape))
    return model


def kill(model, *names, count=None, bias=False):
    """Set the kernels of half of the units, or so many, to zero; the last ones."""
    for name in names:
        layer = model.get_layer(name)
        kernel = np.array(layer.kernel.numpy())
        dead = count or kernel.shape[-1] // 2
        kernel[..., -dead:] = 0
        layer.kernel.assign(kernel)
        if bias and layer.use_bias:
            values = np.array(layer.bias.numpy())
            values[-dead:] = 0
            layer.bias.assign(values)


def check(model, **widths):
    """Shrink; compare the outputs and the widths of layers; the model is left as it was."""
    before = models.arrays(model.weights)
    small = keras_dst.shrink(model)
    for variable, old in zip(model.weights, before):
        np.testing.assert_array_equal(variable.numpy(), old)
    inputs = [
        np.random.default_rng(9).standard_normal((3, *x.shape[1:])).astype("float32")
        for x in model.inputs
    ]
    inputs = inputs[0] if len(inputs) == 1 else inputs
    a, b = models.predict(model, inputs), models.predict(small, inputs)
    np.testing.assert_allclose(b, a, atol=1e-5 * max(1, np.abs(a).max()))
    found = {name: small.get_layer(name).get_weights()[0].shape[-1] for name in widths}
    assert found == widths
    assert keras_dst.report(small).parameters < keras_dst.report(model).parameters
    return small


@keras.saving.register_keras_serializable("tests")
def reverse(z):
    """An activation of the user's own, which mixes the channels."""
    return keras.ops.flip(z, -1)


def convnet(padding="same", use_bias=False):
    return randomise(
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
    # Where zeros are padded, one dead channel stays, to hold the constants of all.
    [("same", 5), ("valid", 4)],
)
def test_a_convnet(padding, one):
    model = convnet(padding)
    kill(model, "one", "two", "three")
    small = check(model, one=one, two=3, three=5, head=2)
    assert [layer.name for layer in small.layers[1:]] == [layer.name for layer in model.layers]
    assert small.get_layer("two").use_bias == (padding == "valid")


def test_dead_channels_that_are_zero_leave_nothing_behind():
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


def test_channels_that_nothing_reads():
    model = convnet()
    layer = model.get_layer("three")
    kernel = np.array(layer.kernel.numpy()).reshape(4, 4, 6, 10)
    kernel[:, :, :2] = 0
    layer.kernel.assign(kernel.reshape(-1, 10))
    # Units that are read by dead units alone go with them.
    kill(model, "three")
    kernel = np.array(model.get_layer("two").kernel.numpy())
    kernel[:, :, :3, 2:] = 0
    model.get_layer("two").kernel.assign(kernel)
    check(model, one=5, two=4, three=5, head=2)


def test_one_channel_stays():
    model = convnet()
    kill(model, "one", count=8)
    kill(model, "three", count=10)
    check(model, one=1, two=1, three=1, head=2)


def test_dead_classes_stay():
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
    return randomise(keras.Model(inputs, layers.Dense(2, name="head")(x)))


@pytest.mark.parametrize(
    "merge", [lambda x, y: layers.Add()([x, y]), lambda x, y: x + y], ids=["layer", "operator"]
)
def test_a_residual_net(merge):
    model = residual(merge)
    kill(model, "a_1", "b_1", bias=True)
    check(model, a_1=4, b_1=4, a_2=8, b_2=8, stem=8)
    # A channel goes where it is dead in all summands.
    kill(model, "a_2", "b_2", "stem", count=3, bias=True)
    kill(model, "a_2", "b_2")
    check(model, a_1=4, b_1=4, a_2=6, b_2=6, stem=6)


@pytest.mark.parametrize(
    "merge", [lambda x, y: layers.Add()([x, y]), lambda x, y: x + y], ids=["layer", "operator"]
)
@pytest.mark.parametrize("gated", [False, True])
def test_a_closed_branch_goes(merge, gated):
    model = residual(merge, gated)
    if not gated:
        kill(model, "b_2", count=8)
        small = check(model, a_1=8, a_2=8, stem=8)
        assert any("constant" in layer.name for layer in small.layers)  # the norm's offset
    else:
        small = check(model, stem=8, head=2)
        assert "a_1" not in [layer.name for layer in small.layers]
    assert "b_1" not in [layer.name for layer in small.layers]


def test_concatenation_depthwise_and_multiplication():
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
    model = randomise(keras.Model(inputs, layers.Flatten()(x)))
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


def test_shared_layers_and_several_outputs():
    one, two = keras.Input((8,)), keras.Input((8,))
    shared, norm = layers.Dense(6, "relu", name="shared"), layers.BatchNormalization()
    a, b = norm(shared(one)), norm(shared(two))
    second = layers.Dense(4, name="second")
    out = [layers.Add()([second(a), second(b)]), layers.Dense(3, name="third")(a)]
    model = randomise(keras.Model([one, two], {"x": out[0], "y": out[1]}))
    kill(model, "shared")
    small = keras_dst.shrink(model)
    x = [np.random.default_rng(i).standard_normal((5, 8)).astype("float32") for i in (1, 2)]
    for name, expected in model(x).items():
        found = keras.ops.convert_to_numpy(small(x)[name])
        np.testing.assert_allclose(found, keras.ops.convert_to_numpy(expected), atol=1e-5)
    assert small.get_layer("shared").units == 3


def test_what_is_not_understood_keeps_its_channels():
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 3, padding="same", name="one")(inputs)
    x = layers.Conv2D(8, 3, padding="same", groups=2, name="grouped")(x)
    x = layers.LayerNormalization()(x)
    x = layers.Dense(6, "relu", name="dense")(x)
    x = layers.Dense(6, "softmax", name="attention")(x)
    x = layers.Dense(4, reverse, name="own")(x)
    model = randomise(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    kill(model, "one", "grouped", "dense", "attention", "own", bias=True)
    check(model, one=8, grouped=8, dense=3, attention=6, own=4, head=3)


@pytest.mark.parametrize("kind", ["sequential", "residual", "nested"])
def test_models_of_every_kind(kind):
    keras.utils.set_random_seed(0)
    model = randomise(models.MODELS[kind]())
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
def test_half_precision(dtype):
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


def test_a_sparse_model_is_stripped_in_a_copy(tmp_path):
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


def test_channels_of_magnitude():
    method = Magnitude(0.5, pattern="channel", allocation="uniform")
    model = models.compiled(models.sequential(), keras_dst.SparseOptimizer("adam", method))
    model.fit(*models.data(), epochs=2, verbose=0, callbacks=[keras_dst.callbacks.SparseTraining()])
    small = keras_dst.shrink(keras_dst.strip(model))
    assert small.count_params() < model.count_params()


class TestErrors:
    def test_no_graph(self):
        with pytest.raises(ValueError, match="Sequential and Functional models"):
            keras_dst.shrink(models.subclassed())
        with pytest.raises(TypeError, match="Expected a Keras 3 model"):
            keras_dst.shrink("model.keras")

    def test_nothing_to_remove(self):
        with pytest.warns(UserWarning, match="nothing to remove in 'dense'"):
            small = keras_dst.shrink(
                keras.Sequential([keras.Input((3,)), layers.Dense(2)], name="dense")
            )
        assert small.count_params() == 8

    def test_a_difference(self, monkeypatch):
        model = convnet()
        kill(model, "one")
        # A bug: constants go into the bias at the border as well.
        monkeypatch.setattr(Kernel, "pads", False)
        with pytest.raises(RuntimeError, match="would have changed the outputs"):
            keras_dst.shrink(model)
