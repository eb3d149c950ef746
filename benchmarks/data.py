"""Load the data sets of the benchmarks, and apply a pruning method to a model."""

import os
import pathlib

import keras
import numpy as np


def mnist() -> tuple:
    """Return MNIST as `(x_train, y_train), (x_test, y_test)`, with pixels in [0, 1]."""
    return tuple(
        ((x / 255.0).astype("float32")[..., None], y.astype("int32")) for x, y in load("mnist")
    )


def cifar10() -> tuple:
    """Return CIFAR-10 as `(x_train, y_train), (x_test, y_test)`.

    The pixels of each color channel have mean 0 and standard deviation 1.
    """
    (x, y), (x_test, y_test) = load("cifar10")
    mean, deviation = x.mean((0, 1, 2)), x.std((0, 1, 2))
    return tuple(
        (((x - mean) / deviation).astype("float32"), y.ravel().astype("int32"))
        for x, y in ((x, y), (x_test, y_test))
    )


def spoken_digits() -> tuple:
    """Return spectrograms and labels of the Free Spoken Digit Dataset, in tuples as in `mnist`.

    Raises:
        FileNotFoundError: If fsdd_logmel.npz is not in the folder that KERAS_DST_DATA names.
    """
    return tuple(
        ((x / 255.0).astype("float32")[..., None], y.astype("int32"))
        for x, y in load("fsdd_logmel")
    )


def load(name: str) -> tuple:
    """Load a data set from the folder that KERAS_DST_DATA names, or else from `keras.datasets`."""
    folder = os.environ.get("KERAS_DST_DATA")
    if not folder and not hasattr(keras.datasets, name):
        raise FileNotFoundError(
            f"Expected the environment variable KERAS_DST_DATA to name a folder with {name}.npz. "
            f"Received: KERAS_DST_DATA is not set. Fix: set KERAS_DST_DATA, because keras.datasets "
            f"does not contain {name}."
        )
    if not folder:
        return getattr(keras.datasets, name).load_data()
    with np.load(pathlib.Path(folder) / f"{name}.npz", allow_pickle=False) as file:
        return tuple((file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test"))


def apply_method(method, model, optimizer):
    """Apply a pruning method to a model, and return the optimizer for `compile`.

    If the method is None, the model and the optimizer do not change.
    """
    # Import keras_dst only here, because the environments of other pruning tools lack keras_dst.
    import keras_dst

    if isinstance(method, keras_dst.methods.LayerMethod):
        keras_dst.sparsify(model, method)
        return optimizer
    return keras_dst.SparseOptimizer(optimizer, method) if method else optimizer
