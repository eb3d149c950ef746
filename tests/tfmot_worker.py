"""Train models with the original tfmot and tf_keras, for test_tfmot_parity.py.

`python tests/tfmot_worker.py FOLDER CASE ...` runs in an environment with tfmot, and writes two
files for every test case. `CASE.npz` contains the initial weights, and the masks and weights of
every step. `CASE.EXTENSION` contains the model after the first epoch.
"""

import os
import sys

import numpy as np

# The number of batches per epoch is odd, so that some epochs end with a mask update.
BATCH, BATCHES, EPOCHS = 8, 13, 2
SGD = ("SGD", {"learning_rate": 0.5})
ADAM = ("Adam", {"learning_rate": 0.02})
MOMENTUM = ("SGD", {"learning_rate": 0.2, "momentum": 0.9})
CONSTANT = ("ConstantSparsity", {"target_sparsity": 0.55, "begin_step": 3, "frequency": 4})
EVERY = ("ConstantSparsity", {"target_sparsity": 0.7, "begin_step": 0, "frequency": 1})
DECAY = (
    "PolynomialDecay",
    {
        "initial_sparsity": 0.1,
        "final_sparsity": 0.8,
        "begin_step": 2,
        "end_step": 20,
        "frequency": 3,
    },
)
# CASES maps a name to (model, schedule, other arguments of prune_low_magnitude, optimizer, file
# format).
CASES = {
    "every-step": ("dense", EVERY, {}, MOMENTUM, "h5"),
    "regularized": ("regularized", DECAY, {}, ADAM, "keras"),
    "nested": ("nested", CONSTANT, {}, SGD, "h5"),
    "recurrent": ("recurrent", DECAY, {}, ADAM, "keras"),
    "convolutions": ("convolutions", DECAY, {}, SGD, "h5"),
    "blocks-avg": ("dense", DECAY, {"block_size": (4, 2)}, SGD, "keras"),
    "blocks-max": (
        "dense",
        CONSTANT,
        {"block_size": (3, 2), "block_pooling_type": "MAX"},
        SGD,
        "h5",
    ),
    # tfmot does not write sparsity_m_by_n to its files.
    "2-of-4": ("image", CONSTANT, {"sparsity_m_by_n": (2, 4)}, SGD, None),
}
SHAPES = {"convolutions": (6, 6, 6), "image": (6, 6, 6), "recurrent": (5, 6)}


def net(keras, name):
    """Return the model `name`, built with the given version of Keras."""
    layers = keras.layers
    inputs = keras.Input(SHAPES.get(name, (10,)))
    if name in ("dense", "regularized"):
        decay = keras.regularizers.L2(0.1) if name == "regularized" else None
        x = layers.Dense(7, activation="tanh", kernel_regularizer=decay)(inputs)
        x = layers.Dense(9, activation="tanh")(x)
    elif name == "image":
        x = layers.Flatten()(layers.Conv2D(4, 3, activation="tanh")(inputs))
    elif name == "convolutions":
        x = layers.Conv2D(4, 3, activation="tanh")(inputs)
        x = layers.BatchNormalization()(x)
        y = layers.SeparableConv2D(4, 3, padding="same")(x)
        x = layers.Add()([layers.DepthwiseConv2D(3, padding="same")(x), y])
        x = layers.GlobalAveragePooling2D()(layers.Conv2DTranspose(4, 3)(x))
    elif name == "recurrent":
        x = layers.SimpleRNN(5, return_sequences=True)(inputs)
        x = layers.Flatten()(layers.MultiHeadAttention(2, 3)(x, x))
    else:
        inner = keras.Sequential(
            [keras.Input((10,)), layers.Dense(10, "tanh"), layers.Dense(10, "tanh")]
        )
        x = layers.Dense(10)(inner(inputs))
    return keras.Model(inputs, layers.Dense(3)(x))


def data(name):
    """Return the inputs and labels for all training steps, in order."""
    rng = np.random.default_rng(0)
    size = BATCH * BATCHES * EPOCHS
    x = rng.standard_normal((size, *SHAPES.get(name, (10,)))).astype("float32")
    return x, rng.standard_normal((size, 3)).astype("float32")


def train(case, folder):
    import tensorflow_model_optimization as tfmot
    import tf_keras

    kind, (schedule, steps), arguments, (optimizer, rates), extension = CASES[case]
    sparsity = tfmot.sparsity.keras
    tf_keras.utils.set_random_seed(0)
    model = net(tf_keras, kind)
    start = [w.numpy() for w in model.weights]
    schedule = getattr(sparsity, schedule)(**steps)
    model = sparsity.prune_low_magnitude(model, schedule, **arguments)
    model.compile(getattr(tf_keras.optimizers, optimizer)(**rates), "mse")
    masks, weights = [], []

    def wrappers(model):
        for layer in model.layers:
            if isinstance(layer, tf_keras.Model):
                yield from wrappers(layer)
            elif getattr(layer, "pruning_vars", None):
                yield layer

    class Record(tf_keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            found = [pair for layer in wrappers(self.model) for pair in layer.pruning_vars]
            masks.append([mask.numpy() for _, mask, _ in found])
            weights.append([w.numpy() for w, _, _ in found])

    x, y = data(kind)
    for epoch in range(EPOCHS):
        part = slice(epoch * BATCH * BATCHES, (epoch + 1) * BATCH * BATCHES)
        model.fit(
            x[part],
            y[part],
            batch_size=BATCH,
            shuffle=False,
            verbose=0,
            callbacks=[sparsity.UpdatePruningStep(), Record()],
        )
        if epoch == 0:
            predicted = model(x).numpy()
            if extension:
                model.save(os.path.join(folder, f"{case}.{extension}"))
    record = {"predicted": predicted, "final": model(x).numpy()}
    record.update({f"start_{i}": w for i, w in enumerate(start)})
    for step, (mine, values) in enumerate(zip(masks, weights), 1):
        record.update({f"mask_{step}_{i}": m.astype(bool) for i, m in enumerate(mine)})
        record.update({f"weight_{step}_{i}": w for i, w in enumerate(values)})
    np.savez(os.path.join(folder, f"{case}.npz"), **record)


if __name__ == "__main__":
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    folder, *cases = sys.argv[1:]
    for each in cases:
        train(each, folder)
