"""Small models of every kind, and training data for them."""

import keras
import numpy as np
from keras import layers


def data(seed=0, size=96):
    """Return images (8 x 8 x 3) and classes, which tell whether the left half is brighter."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((size, 8, 8, 3)).astype("float32")
    y = (x[:, :, :4].mean((1, 2, 3)) > x[:, :, 4:].mean((1, 2, 3))).astype("int32")
    return x, y


def sequential():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.Flatten(),
            layers.Dense(16, activation="relu"),
            layers.Dense(2, activation="softmax"),
        ]
    )


def residual():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    y = layers.Conv2D(8, 3, padding="same")(x)
    y = layers.BatchNormalization()(y)
    x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


def shortcut():
    """Return a network that adds two convolutions and a shortcut with a convolution."""
    inputs = keras.Input((8, 8, 3))
    a = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(16, 3, use_bias=False)(inputs)))
    b = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(32, 3, use_bias=False)(a)))
    b = layers.BatchNormalization()(layers.Conv2D(32, 3, padding="same", use_bias=False)(b))
    a = layers.BatchNormalization()(layers.Conv2D(32, 1, use_bias=False)(a[:, 1:-1, 1:-1]))
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(a + b))
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


def nested():
    inner = keras.Sequential([layers.Dense(16, "relu"), layers.Dense(16, "relu")], name="inner")
    shared = layers.Dense(16, "relu", name="shared")
    inputs = keras.Input((8, 8, 3))
    x = inner(layers.Flatten()(inputs))
    x = layers.Add()([shared(x), shared(inner(layers.Flatten()(inputs)))])
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """A layer that stores sublayers in lists and dicts."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.steps = [layers.Dense(units, "relu") for _ in range(2)]
        self.extra = {"gate": layers.Dense(units, "sigmoid")}

    def call(self, x):
        for step in self.steps:
            x = step(x)
        return x * self.extra["gate"](x)

    def build(self, input_shape):
        for step in self.steps:
            step.build(input_shape)
            input_shape = (*input_shape[:-1], self.units)
        self.extra["gate"].build(input_shape)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("tests")
class MyDense(layers.Dense):
    """A subclass of Dense, as a user may write it."""

    def call(self, inputs):
        return super().call(inputs) * 2.0


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A subclassed model that contains stock layers, a block and a subclass of Dense."""

    def __init__(self, units=16, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.conv = layers.Conv2D(4, 3, activation="relu")
        self.flat = layers.Flatten()
        self.block = Block(units)
        self.mine = MyDense(units)
        self.head = layers.Dense(2, activation="softmax")

    def call(self, x):
        return self.head(self.mine(self.block(self.flat(self.conv(x)))))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 8, 8, 3), "float32"))
    return model


def functional_with_block():
    inputs = keras.Input((8, 8, 3))
    x = Block(16)(layers.Flatten()(inputs))
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(MyDense(8)(x)))


@keras.saving.register_keras_serializable("tests")
class Backbone(keras.Model):
    """A subclass of Model that builds a Functional graph, as in KerasHub."""

    def __init__(self, units=16, **kwargs):
        inputs = keras.Input((8, 8, 3))
        x = Block(units, name="block")(layers.Flatten(name="flat")(inputs))
        x = layers.Dense(2, "softmax", name="head")(x)
        super().__init__(inputs, x, **kwargs)
        self.units = units

    def get_config(self):
        return {"name": self.name, "units": self.units}


def backbone():
    return Backbone()


@keras.saving.register_keras_serializable("tests")
class Mixer(layers.Layer):
    """A custom layer that lists the names of its prunable weights."""

    prunable_weights = ("mix",)

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.mix = self.add_weight(name="mix", shape=(shape[-1], self.units))

    def call(self, x):
        return keras.ops.relu(keras.ops.matmul(x, self.mix))

    def compute_output_shape(self, shape):
        return (*shape[:-1], self.units)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def convolutions():
    inputs = keras.Input((8, 8, 3))
    x = layers.SeparableConv2D(8, 3, padding="same", activation="relu")(inputs)
    x = layers.Conv2DTranspose(6, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Reshape((32, 48))(x)
    x = layers.DepthwiseConv1D(3)(x)
    x = layers.SeparableConv1D(8, 3, activation="relu")(x)
    x = layers.Conv1DTranspose(4, 3, activation="relu")(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


def attention():
    """Return a model with an embedding, two kinds of attention and a custom layer."""
    inputs = keras.Input((8, 8, 3))
    words = keras.ops.cast(keras.ops.clip(layers.Reshape((24, 8))(inputs) * 4 + 8, 0, 15), "int32")
    x = layers.Embedding(16, 4)(words[:, :, 0]) + layers.Embedding(16, 4)(words[:, :, 1])
    x = layers.MultiHeadAttention(2, 3)(x, x) + x
    x = layers.GroupQueryAttention(3, 4, 2)(x, x) + x
    x = layers.EinsumDense("abc,cd->abd", (None, 6), activation="relu", bias_axes="d")(x)
    x = layers.GlobalAveragePooling1D()(Mixer(8)(x))
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


def recurrent():
    inputs = keras.Input((8, 8, 3))
    x = layers.ConvLSTM1D(3, 3, padding="same", return_sequences=True)(inputs)
    x = layers.TimeDistributed(layers.Dense(6, "relu"))(layers.Reshape((8, 24))(x))
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(x)
    x = layers.GRU(6, return_sequences=True)(x)
    x = layers.SimpleRNN(6)(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


KINDS = (sequential, residual, nested, subclassed, functional_with_block)
KINDS += (backbone, convolutions, attention, recurrent)
MODELS = {f.__name__: f for f in KINDS}


def compiled(model, optimizer=None, **kwargs):
    """Compile a model for `data`, and return the model.

    On TensorFlow, models run without XLA, and recurrent models run eagerly, to save time.
    """
    if keras.backend.backend() == "tensorflow":
        recurrent = any(isinstance(layer, layers.RNN) for layer in model._flatten_layers())
        kwargs = {"jit_compile": False, "run_eagerly": recurrent, **kwargs}
    model.compile(
        optimizer or keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", **kwargs
    )
    return model


def predict(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


def arrays(variables):
    """Return the values of variables as copies in NumPy arrays."""
    return [np.array(v.numpy()) for v in variables]
