"""Demo on real data: train a sparse model, strip it, export it and measure the exported file."""

from __future__ import annotations

import pathlib
import tempfile
import time

import keras
import numpy as np

from keras_dst import callbacks, methods
from keras_dst._utils.files import as_path, check_writable
from keras_dst._utils.validation import check_integer
from keras_dst.surgery import sparsify, strip

SPARSITY = 0.9


def run(epochs: int = 40, seed: int = 0, keep: str | None = None) -> dict:
    """Train LeNet-300-100 on scikit-learn's digits, once dense and once with DST.

    Compare the files.

    Args:
        epochs: Number of epochs of each training run. Defaults to 40.
        seed: Seed of each training run. Defaults to 0.
        keep: Path where the sparse `.tflite` file is saved. Defaults to None: the file is deleted
            after the demo.

    Returns:
        A dict of the numbers in the printed table: accuracies, file sizes in bytes, the latency
        ratio and the duration in seconds.
    """
    from keras_dst.export import export_tflite

    check_integer(epochs, "epochs")
    check_integer(seed, "seed", minimum=0)
    if keep is not None:
        check_writable(as_path(keep, "keep"), ".tflite")
    start = time.perf_counter()
    train, test = _digits()
    print(f"digits: {len(train[0])} images to train on, {len(test[0])} to test on, 28 x 28 pixels")

    dense = _train(train, epochs, seed, None)
    method = methods.DST(sparsity=SPARSITY, pattern="1x4")
    print(f"training with {method!r}")
    sparse = _train(train, epochs, seed, method)

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(keep or pathlib.Path(folder) / "sparse.tflite")
        report = export_tflite(strip(sparse), path, inputs=test[0], evaluate=test)
    print(report)
    unencoded, *_, encoded = report.files
    assert unencoded.latency  # By default, `export_tflite` measures the latency.
    assert encoded.latency
    figures = {
        "accuracy_dense": _accuracy(dense, test),
        "accuracy_sparse": _accuracy(sparse, test),
        "accuracy_tflite": encoded.accuracy,
        "bytes_dense": unencoded.bytes,
        "bytes_sparse": encoded.bytes,
        "latency_ratio": encoded.latency / unencoded.latency,
        "seconds": time.perf_counter() - start,
    }
    _print(figures)
    return figures


def _digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The demo needs scikit-learn: pip install keras_dst[demo]") from error
    data = load_digits()
    images = keras.ops.image.resize(data.images[..., None].astype("float32") / 16.0, (28, 28))
    images = keras.ops.convert_to_numpy(images)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], data.target[order].astype("int32")
    return (images[360:], labels[360:]), (images[:360], labels[:360])


def _train(data, epochs, seed, method):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(300, "relu"),
            keras.layers.Dense(100, "relu"),
            keras.layers.Dense(10, "softmax"),
        ],
        name="lenet_300_100",
    )
    if method:
        sparsify(model, method)
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    driver = [callbacks.SparseTraining()] if method else []
    history = model.fit(*data, batch_size=32, epochs=epochs, verbose=0, callbacks=driver)
    if method:
        sparsity = history.history["sparsity"]
        step = max(epochs // 8, 1)
        marks = range(step - 1, epochs, step)
        print("sparsity: " + "  ".join(f"epoch {i + 1}: {sparsity[i]:.3f}" for i in marks))
    return model


def _accuracy(model, data) -> float:
    images, labels = data
    return float((np.argmax(model.predict(images, verbose=0), axis=-1) == labels).mean())


def _print(figures: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"LeNet-300-100 on digits, {SPARSITY:.0%} sparse, {figures['seconds']:.0f} s"
    )
    for column in ("", "dense", "sparse", "sparse / dense"):
        table.add_column(column, justify="left" if not column else "right")
    dense, sparse = figures["bytes_dense"], figures["bytes_sparse"]
    table.add_row(
        "test accuracy, Keras",
        f"{figures['accuracy_dense']:.2%}",
        f"{figures['accuracy_sparse']:.2%}",
        "",
    )
    table.add_row("test accuracy, .tflite", "", f"{figures['accuracy_tflite']:.2%}", "")
    table.add_row("bytes, .tflite", f"{dense:,}", f"{sparse:,}", f"{sparse / dense:.3f}")
    table.add_row("latency, batch 1, one thread", "", "", f"{figures['latency_ratio']:.2f}")
    Console().print(table)
