"""The main job from end to end on real data: train sparse, strip, export, run the file."""

from __future__ import annotations

import pathlib
import tempfile
import time

import keras
import numpy as np

from keras_dst import callbacks, methods
from keras_dst.surgery import sparsify, strip

SPARSITY = 0.9


def run(epochs: int = 40, seed: int = 0, keep: str | None = None) -> dict:
    """Train LeNet-300-100 on scikit-learn's digits, dense and with DST, and compare the files.

    Args:
        epochs: epochs of both trainings.
        seed: seed of both trainings.
        keep: path to keep the sparse `.tflite` at. Defaults to None: it is deleted.

    Returns:
        The figures of the table that is printed: accuracies, bytes, and the latency ratio.
    """
    from keras_dst.export import export_tflite
    from keras_dst.export.measure import latencies

    start = time.perf_counter()
    train, test = _digits()
    print(f"digits: {len(train[0])} images to train on, {len(test[0])} to test on, 28 x 28 pixels")

    dense = _train(train, epochs, seed, None)
    method = methods.DST(target_sparsity=SPARSITY, pattern="1x4")
    print(f"training with {method!r}")
    sparse = _train(train, epochs, seed, method)

    with tempfile.TemporaryDirectory() as folder:
        small = pathlib.Path(keep or pathlib.Path(folder) / "sparse.tflite")
        report = export_tflite(strip(sparse), small, inputs=test[0], evaluate=test)
        export_tflite(dense, pathlib.Path(folder) / "dense.tflite", measure=False)
        print(report)
        files = [(pathlib.Path(folder) / "dense.tflite").read_bytes(), small.read_bytes()]
    dense_time, sparse_time = latencies(files)
    figures = {
        "accuracy_dense": _accuracy(dense.predict(test[0], verbose=0), test[1]),
        "accuracy_sparse": _accuracy(sparse.predict(test[0], verbose=0), test[1]),
        "accuracy_tflite": _accuracy(_interpret(files[1], test[0]), test[1]),
        "bytes_dense": len(files[0]),
        "bytes_sparse": len(files[1]),
        "latency_ratio": sparse_time / dense_time,
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
        marks = range(epochs // 8 - 1, epochs, epochs // 8)
        print("sparsity: " + "  ".join(f"epoch {i + 1}: {sparsity[i]:.3f}" for i in marks))
    return model


def _accuracy(probabilities, labels) -> float:
    return float((np.argmax(probabilities, axis=-1) == labels).mean())


def _interpret(content: bytes, images):
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_content=content).get_signature_runner()
    (name,) = runner.get_input_details()
    (output,) = runner(**{name: images}).values()
    return output


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
