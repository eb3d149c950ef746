"""What all benchmarks share: data, machine and versions, one JSON file per run."""

import os
import pathlib

import keras
import numpy as np


def mnist() -> tuple:
    """MNIST as floats in [0, 1], `(x_train, y_train), (x_test, y_test)`."""
    return tuple(
        ((x / 255.0).astype("float32")[..., None], y.astype("int32")) for x, y in _load("mnist")
    )


def cifar10() -> tuple:
    """CIFAR-10, each channel with mean 0 and deviation 1, as `mnist`."""
    (x, y), (x_test, y_test) = _load("cifar10")
    mean, deviation = x.mean((0, 1, 2)), x.std((0, 1, 2))
    return tuple(
        (((x - mean) / deviation).astype("float32"), y.ravel().astype("int32"))
        for x, y in ((x, y), (x_test, y_test))
    )


def _load(name: str) -> tuple:
    """From NAME.npz in the folder named by KERAS_DST_DATA, else from `keras.datasets`."""
    folder = os.environ.get("KERAS_DST_DATA")
    if not folder:
        return getattr(keras.datasets, name).load_data()
    with np.load(pathlib.Path(folder) / f"{name}.npz", allow_pickle=False) as file:
        return tuple((file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test"))


def under(method, model, optimizer):
    """Put the model under a method, or None; the optimizer to compile it with."""
    import keras_dst  # not at the top: other tools are timed in environments without it

    if isinstance(method, keras_dst.methods.LayerMethod):
        keras_dst.sparsify(model, method)
        return optimizer
    return keras_dst.SparseOptimizer(optimizer, method) if method else optimizer
