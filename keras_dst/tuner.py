"""Search with KerasTuner for a sparse model that is accurate, small or fast."""

from __future__ import annotations

import inspect
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_dst.callbacks import SparseTraining
from keras_dst.export import export_tflite

try:
    import keras_tuner
except ImportError as error:
    raise ImportError(
        "keras_dst.tuner needs KerasTuner. Fix: pip install keras_dst[tuner]."
    ) from error

__all__ = ["SparseHyperModel"]


class SparseHyperModel(keras_tuner.HyperModel):
    """KerasTuner hypermodel that trains each trial with `SparseTraining`.

    The results of a trial are the logs of its last epoch, under names such as
    `"final_val_accuracy"`. The sparsity target is reached in the last epoch, and KerasTuner keeps
    the weights of this epoch. An earlier epoch is often more accurate, but less sparse. A trial
    that misses its target fails with a message that states the deviation.

    Args:
        build: function from hyperparameters to a compiled sparse model, as KerasTuner requires. The
            function applies `sparsify` or `SparseOptimizer`. The hyperparameters can choose the
            method or its arguments, such as sparsity, pattern or allocation.
        export: arguments of `export_tflite`, such as `{"optimize": "size"}`. If given, every trial
            exports a temporary file. The trial then has the results `"file_bytes"`, `"gzip_bytes"`,
            `"latency"` (seconds, unless `measure=False`) and `"file_accuracy"` (with `evaluate`).
            Defaults to None, which means no export.
        score: function from the dict of results to a number, which becomes the result `"score"`.
            The function can weigh accuracy against size or latency. Defaults to None, which adds no
            result `"score"`.

    Raises:
        TypeError: `build` is not a function, or `export` has an unknown argument.
        ImportError: KerasTuner is not installed.

    Example:
        >>> def build(hp):
        ...     model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10, "softmax")])
        ...     method = keras_dst.methods.Magnitude(hp.Float("sparsity", 0.5, 0.95))
        ...     optimizer = keras_dst.SparseOptimizer("adam", method)
        ...     model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
        ...     return model
        >>> objective = keras_tuner.Objective("final_val_accuracy", "max")
        >>> search = keras_tuner.RandomSearch(SparseHyperModel(build), objective)
        >>> search.search(x, y, validation_split=0.2, epochs=10)
    """

    def __init__(
        self,
        build: Callable[[keras_tuner.HyperParameters], Any],
        export: Mapping[str, Any] | None = None,
        score: Callable[[dict[str, float]], float] | None = None,
    ):
        super().__init__()
        if isinstance(build, keras.Layer) or not callable(build):
            raise TypeError(
                "Expected build to be a function from hyperparameters to a compiled model. "
                f"Received: {build!r} of type {type(build).__name__}. "
                "Fix: pass a function, for example build=lambda hp: make_model(hp)."
            )
        inspect.signature(export_tflite).bind("model", "path", **(export or {}))
        self.build_model, self.export, self.score = build, export, score

    def build(self, hp):
        """Return the model that the `build` function creates."""
        return self.build_model(hp)

    def fit(self, hp, model, *args, callbacks=(), **kwargs):
        """Train a model and return the results of the trial by name.

        Raises:
            keras_tuner.errors.FailedTrialError: the trial missed its sparsity target.
        """
        given = [callback for callback in callbacks if isinstance(callback, SparseTraining)]
        sparse = given[0] if given else SparseTraining()
        callbacks = [*([] if given else [sparse]), *callbacks]
        history = model.fit(*args, callbacks=callbacks, **kwargs).history
        if missed := sparse.missed():
            raise keras_tuner.errors.FailedTrialError(" ".join(missed))
        results = {f"final_{name}": float(values[-1]) for name, values in history.items()}
        if self.export is not None:
            results.update(_exported(model, self.export))
        if self.score is not None:
            results["score"] = float(self.score(results))
        return results


def _exported(model, options: Mapping[str, Any]) -> dict[str, float]:
    """Export a model. Return the file size, and the latency and accuracy if they were measured."""
    with tempfile.TemporaryDirectory() as folder:
        file = export_tflite(model, pathlib.Path(folder) / "model.tflite", **options).files[-1]
    found = {
        "file_bytes": file.bytes,
        "gzip_bytes": file.gzip_bytes,
        "latency": file.latency,
        "file_accuracy": file.accuracy,
    }
    return {name: float(value) for name, value in found.items() if value is not None}
