"""Small models of every kind, and data to train them on."""

import keras
import numpy as np
from keras import layers


def data(seed=0, size=96):
    """Images of 8 x 8 x 3, their class by the brighter half."""
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


def nested():
    inner = keras.Sequential([layers.Dense(16, "relu"), layers.Dense(16, "relu")], name="inner")
    shared = layers.Dense(16, "relu", name="shared")
    inputs = keras.Input((8, 8, 3))
    x = inner(layers.Flatten()(inputs))
    x = layers.Add()([shared(x), shared(inner(layers.Flatten()(inputs)))])
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """A layer that makes layers of its own, in lists and in dicts."""

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
    """A user's subclass of a supported layer."""

    def call(self, inputs):
        return super().call(inputs) * 2.0


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A subclassed model with plain layers, a block and a subclass of Dense inside."""

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


MODELS = {f.__name__: f for f in (sequential, residual, nested, subclassed, functional_with_block)}


def compiled(model, optimizer=None, **kwargs):
    """The model, compiled for `data`."""
    model.compile(
        optimizer or keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", **kwargs
    )
    return model


def predict(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


def arrays(variables):
    """Copies of the values of variables."""
    return [np.array(v.numpy()) for v in variables]
