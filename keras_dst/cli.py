"""Commands of `keras-dst`, one function per command. Each function receives the parsed arguments.

The module `keras_dst_cli` parses the arguments, and only then imports this module.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from collections.abc import Sequence


def demo(arguments):
    """Train, strip and export a small network, and compare it with a dense network."""
    from keras_dst.demo import run

    run(keep=arguments.keep)


def report(arguments):
    """Print the sparsity, number of parameters and FLOPs of each layer."""
    import keras_dst
    from keras_dst._utils.files import check_writable

    if arguments.html:
        check_writable(pathlib.Path(arguments.html), ".html")
    report = keras_dst.report(_load(arguments.model, arguments.modules))
    if arguments.html:
        report.save_html(arguments.html)
    _show(report, arguments.json)


def strip(arguments):
    """Apply the masks to the weights, and write the model with stock Keras layers."""
    import keras_dst
    from keras_dst._utils.files import check_writable

    check_writable(pathlib.Path(arguments.output))
    _save(keras_dst.strip(_load(arguments.model, arguments.modules)), arguments.output)


def shrink(arguments):
    """Write a smaller model without dead channels, and print which channels were removed."""
    from keras_dst._structure.report import shrink_and_report
    from keras_dst._utils.files import check_writable

    check_writable(pathlib.Path(arguments.output))
    model = _load(arguments.model, arguments.modules)
    small, report = shrink_and_report(model, latency=arguments.latency)
    _save(small, arguments.output)
    _show(report, arguments.json)


def _save(model, output: str) -> None:
    from keras_dst._utils.files import atomic_write

    with atomic_write(pathlib.Path(output)) as unfinished:
        model.save(unfinished)


def export(arguments):
    """Write a `.tflite` file, and print the storage format of each weight tensor."""
    import keras_dst

    names = ("optimize", "target", "quantize", "threads", "batch")
    settings = {name: getattr(arguments, name) for name in names}
    if arguments.representative:
        settings["representative"] = _arrays(arguments.representative)
    if arguments.evaluate:
        arrays = _arrays(arguments.evaluate)
        if not isinstance(arrays, dict) or set(arrays) != {"x", "y"}:
            raise ValueError(
                "Expected an .npz file with the arrays x and y. "
                f"Received: {arguments.evaluate}. Fix: write it with np.savez(path, x=x, y=y)."
            )
        settings["evaluate"] = (arrays["x"], arrays["y"])
    settings["measure"] = not arguments.no_measure
    model = _load(arguments.model, arguments.modules)
    try:
        report = keras_dst.export_tflite(model, arguments.output, progress=_progress, **settings)
    finally:
        _progress("")
    _show(report, arguments.json)


def _arrays(path: str):
    """Return the array of an `.npy` file, or the arrays of an `.npz` file by name."""
    import numpy as np

    try:
        loaded = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"Expected an .npy or .npz file of numbers. Received: {path}. NumPy reports: {error} "
            "Fix: write the file with np.save or np.savez."
        ) from error
    return dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else loaded


def _progress(line: str) -> None:
    """Replace the last line of stderr by `line` if stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def inspect(arguments):
    """Print the storage format of each constant in a `.tflite` file."""
    from keras_dst.export.tflite import check_installed

    check_installed("ai_edge_litert", "flatbuffers")
    from keras_dst.export.inspection import inspect_file

    _show(inspect_file(arguments.model), arguments.json)


def lint(arguments):
    """Print the findings of `lint`. Return 1 if at least one finding is an error."""
    import keras_dst

    path = arguments.model
    model = _load(path, arguments.modules) if path.endswith(".keras") else path
    report = keras_dst.lint(model, arguments.target)
    _show(report, arguments.json)
    return 1 if report.errors else 0


def bench(arguments):
    """Print the latency of each `.tflite` file."""
    from keras_dst.export.tflite import check_installed

    check_installed("ai_edge_litert", "flatbuffers")
    from keras_dst.export.measure import bench

    def progress(done):
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rrun {done} of {total}", end=end, file=sys.stderr, flush=True)

    names = ("threads", "warmup", "runs", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    total = arguments.warmup + arguments.runs
    _show(bench(arguments.models, **settings, progress=progress), arguments.json)


def recommend(arguments):
    """Print the recommended method, its measured accuracy, and notes."""
    from keras_dst.recommendation import recommend

    names = ("sparsity", "epochs", "pattern", "target")
    _show(recommend(**{name: getattr(arguments, name) for name in names}), arguments.json)


def _show(report, as_json: bool) -> None:
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)


def _load(path: str, modules: Sequence[str] = ()):
    """Load a model from a `.keras` file without compiling it.

    Args:
        path: Path of the file.
        modules: Names of modules that are imported first, for example to register custom layers.
            Each module must be in the current folder or installed. Defaults to no modules.

    Raises:
        ValueError: If the file cannot be loaded. The message contains the reason and a fix.
    """
    import keras

    # Importing the package registers the sparse layers with Keras.
    import keras_dst  # noqa: F401

    if modules:
        sys.path.insert(0, "")  # Find modules in the current folder, as `python -m` does.
    for module in modules:
        importlib.import_module(module)
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:
        raise ValueError(
            f"{path} could not be loaded: {error} Fix: for custom layers, add --import MODULE, "
            "where MODULE registers them with keras.saving.register_keras_serializable. For "
            "Lambda layers, load the model in Python with keras.saving.load_model(path, "
            "safe_mode=False) and call keras_dst there."
        ) from error
