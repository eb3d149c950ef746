"""Hyperparameter search with KerasTuner for accurate, small or fast sparse models."""

from __future__ import annotations

import inspect
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

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
    """KerasTuner hypermodel that trains every trial with the callback `SparseTraining`.

    The results of a trial are the metrics of its last epoch, under names such as
    `"final_val_accuracy"`. Metrics with several values, such as `F1Score(average=None)`, are left
    out. KerasTuner also keeps the weights of the last epoch, because training
    reaches the target sparsity at the end. An earlier epoch often has a higher accuracy, but also a
    lower sparsity. If a trial misses its target sparsity, the trial fails, and the error message
    states by how much.

    Args:
        build: Function that receives KerasTuner's hyperparameters and returns a compiled sparse
            model. The function must call `sparsify` or use `SparseOptimizer`. Hyperparameters can
            select the pruning method or its arguments, such as sparsity, pattern or allocation.
        export: Arguments of `export_tflite`, such as `{"optimize": "size"}`. If `export` is given,
            each trial exports a temporary file and adds the results `"file_bytes"` and
            `"gzip_bytes"`. The result `"latency"` in seconds is also added, unless `export`
            contains `measure=False`. The result `"file_accuracy"` is also added if `export`
            contains `evaluate`. Defaults to None, which exports no file.
        score: Function that receives the dict of results and returns a number, for example a
            weighted sum of accuracy and size. The returned number becomes the result `"score"` of
            the trial. Defaults to None, which adds no result `"score"`.

    Raises:
        TypeError: If `build` or `score` is not a function, or `export` has an unknown argument.
        ImportError: If KerasTuner is not installed.

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
        if export is not None and not isinstance(export, Mapping):
            raise TypeError(
                "Expected export to be a dict of arguments of export_tflite, or None. "
                f"Received: {export!r}"
            )
        if score is not None and not callable(score):
            raise TypeError(
                "Expected score to be a function from the dict of results to a number, or None. "
                f"Received: {score!r}"
            )
        inspect.signature(export_tflite).bind("model", "path", **(export or {}))
        self.build_model, self.export, self.score = build, export, score

    def build(self, hp):
        """Return the model that the `build` function of the user creates for `hp`."""
        return self.build_model(hp)

    def fit(self, hp, model, *args, callbacks=(), **kwargs):
        """Train a model, and return a dict with the results of the trial.

        Raises:
            keras_tuner.errors.FailedTrialError: If the model missed its target sparsity.
        """
        given = [callback for callback in callbacks if isinstance(callback, SparseTraining)]
        sparse = given[0] if given else SparseTraining()
        callbacks = [*([] if given else [sparse]), *callbacks]
        history = model.fit(*args, callbacks=callbacks, **kwargs).history
        if missed := sparse.missed():
            raise keras_tuner.errors.FailedTrialError(" ".join(missed))
        results = {
            f"final_{name}": float(values[-1])
            for name, values in history.items()
            if np.ndim(values[-1]) == 0
        }
        if self.export is not None:
            results.update(_exported(model, self.export))
        if self.score is not None:
            results["score"] = float(self.score(results))
        return results


def _exported(model, options: Mapping[str, Any]) -> dict[str, float]:
    """Export a model. Return the size of the file and, if measured, its latency and accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        file = export_tflite(model, pathlib.Path(folder) / "model.tflite", **options).files[-1]
    found = {
        "file_bytes": file.bytes,
        "gzip_bytes": file.gzip_bytes,
        "latency": file.latency,
        "file_accuracy": file.accuracy,
    }
    return {name: float(value) for name, value in found.items() if value is not None}
