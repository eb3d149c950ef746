"""A hook for KerasTuner: methods searched against accuracy, the size of the file, or latency."""

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
    raise ImportError("This hook needs KerasTuner: pip install keras_dst[tuner]") from error

__all__ = ["SparseHyperModel"]


class SparseHyperModel(keras_tuner.HyperModel):
    """Trains each trial of a search with `SparseTraining`, and judges it by what it ends with.

    The results of a trial are the logs of its last epoch, under names that begin with `final_`, as
    in `"final_val_accuracy"`: the target is reached there, and its weights are what KerasTuner
    keeps. The best epoch would often be one before the target. A trial that misses its target
    fails, and its message says by how much.

    Args:
        build: a function as KerasTuner takes it, from hyperparameters to a compiled model. It makes
            the model sparse, by `sparsify` or `SparseOptimizer`, with a method of which `hp.Float`,
            `hp.Choice` and the like choose alpha, target, pattern or allocation.
        export: arguments of `export_tflite`, such as `{"optimize": "size"}`. Then every trial
            writes a file, for a moment, and has these results too: `"file_bytes"`, `"gzip_bytes"`,
            `"latency"` (seconds; unless `measure=False`) and `"file_accuracy"` (with `evaluate`).
            Defaults to None: no file.
        score: a function from a dict of the results to a number, which is one of the results too,
            under the name `"score"`: for accuracy at a price, or within a limit. Defaults to None.

    Raises:
        TypeError: for a `build` that is no function, or arguments that `export_tflite` lacks.
        ImportError: when imported without KerasTuner.

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
                f"Received: {build!r} of type {type(build).__name__}"
            )
        inspect.signature(export_tflite).bind("model", "path", **(export or {}))
        self.build_model, self.export, self.score = build, export, score

    def build(self, hp):
        """A model, as the function makes it."""
        return self.build_model(hp)

    def fit(self, hp, model, *args, callbacks=(), **kwargs):
        """Train a model; return the results of the trial by name.

        Raises:
            keras_tuner.errors.FailedTrialError: when the target was missed.
        """
        given = [callback for callback in callbacks if isinstance(callback, SparseTraining)]
        sparse = given[0] if given else SparseTraining()
        callbacks = [*([] if given else [sparse]), *callbacks]
        history = model.fit(*args, callbacks=callbacks, **kwargs).history
        if missed := sparse.missed():
            raise keras_tuner.errors.FailedTrialError(" ".join(missed))
        results = {f"final_{name}": float(values[-1]) for name, values in history.items()}
        if self.export is not None:
            results.update(_measured(model, self.export))
        if self.score is not None:
            results["score"] = float(self.score(results))
        return results


def _measured(model, options: Mapping[str, Any]) -> dict[str, float]:
    """Size, latency and accuracy of a model's file, as far as these are measured."""
    with tempfile.TemporaryDirectory() as folder:
        file = export_tflite(model, pathlib.Path(folder) / "model.tflite", **options).files[-1]
    found = {
        "file_bytes": file.bytes,
        "gzip_bytes": file.gzip_bytes,
        "latency": file.latency,
        "file_accuracy": file.accuracy,
    }
    return {name: float(value) for name, value in found.items() if value is not None}
