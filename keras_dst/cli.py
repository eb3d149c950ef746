"""Command `keras-dst`: report, strip, shrink, export and check models from a shell."""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys
from collections.abc import Sequence

from keras_dst.version import __version__

_EXAMPLES = """\
examples:
  keras-dst demo                                 train, strip and export a net on real digits
  keras-dst report model.keras                   show the sparsity of every layer
  keras-dst export model.keras model.tflite      write a sparse file, measured against dense files
  keras-dst export model.keras small.tflite --optimize size --quantize weights
  keras-dst bench dense.tflite sparse.tflite     compare the latency of two files
  keras-dst report model.keras --import my_layers   for a model with custom layers

Models are loaded without compiling: no optimizer, loss or metric is needed.
KERAS_BACKEND chooses tensorflow, jax or torch, as for any program that uses Keras.
keras-dst COMMAND --help shows the options of a command.

Exit codes: 0 done; 1 failed, with the reason on stderr; 2 wrong usage.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 failed with a message, 2 wrong usage.

    The exit code of `lint` is also 1 if it finds an error.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return arguments.run(arguments) or 0
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        print(f"keras-dst {arguments.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-dst",
        description="Inspect sparse Keras 3 models; export them to smaller, faster .tflite files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"keras-dst {__version__}")
    commands = parser.add_subparsers(dest="command")

    demo = commands.add_parser("demo", help="train, strip and export a small net on real data")
    demo.add_argument(
        "--keep", metavar="FILE", help="path at which to keep the sparse .tflite file"
    )
    demo.set_defaults(run=_demo)

    report = commands.add_parser("report", help="show sparsity, parameters and FLOPs by layer")
    report.add_argument("model", help="a .keras file")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.add_argument("--html", metavar="FILE", help="also write an HTML report")
    report.set_defaults(run=_report)

    strip = commands.add_parser(
        "strip", help="apply masks to the weights; write stock Keras layers"
    )
    strip.add_argument("model", help="a .keras file")
    strip.add_argument("output", help="the .keras file to write")
    strip.set_defaults(run=_strip)

    shrink = commands.add_parser("shrink", help="remove dead channels; write a smaller dense model")
    shrink.add_argument("model", help="a .keras file")
    shrink.add_argument("output", help="the .keras file to write")
    shrink.add_argument("--latency", action="store_true", help="measure the latency of both models")
    shrink.add_argument("--json", action="store_true", help="print JSON")
    shrink.set_defaults(run=_shrink)

    export = commands.add_parser("export", help="write a sparse-encoded .tflite file")
    export.add_argument("model", help="a .keras file")
    export.add_argument("output", help="the .tflite file to write")
    export.add_argument("--optimize", choices=("latency", "size", "balanced"), default="balanced")
    export.add_argument(
        "--target",
        choices=("host", "arm", "any"),
        default="host",
        help="CPU on which the file will run (default host)",
    )
    export.add_argument("--quantize", choices=("weights", "full"), help="quantize to 8 bits")
    export.add_argument(
        "--representative", metavar="NPY", help="file of samples for --quantize full"
    )
    export.add_argument(
        "--evaluate", metavar="NPZ", help="file of arrays x and y on which to measure the accuracy"
    )
    export.add_argument("--threads", type=int, default=1, help="threads for measuring (default 1)")
    export.add_argument("--batch", type=int, default=1, help="batch size for measuring (default 1)")
    export.add_argument(
        "--no-measure", action="store_true", help="estimate latencies instead of measuring"
    )
    export.add_argument("--json", action="store_true", help="print JSON")
    export.set_defaults(run=_export)

    inspect = commands.add_parser("inspect", help="show how a .tflite file stores each constant")
    inspect.add_argument("model", help="a .tflite file")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    lint = commands.add_parser(
        "lint",
        help="find what makes a .tflite file wrong, slow or large",
        epilog="Exit codes: 0 no error found, only advice; 1 an error found, or failed with the "
        "reason on stderr; 2 wrong usage.",
    )
    lint.add_argument("model", help="a .tflite file, or a .keras file to export for the check")
    lint.add_argument("--json", action="store_true", help="print JSON")
    lint.set_defaults(run=_lint)

    bench = commands.add_parser("bench", help="compare the latency of .tflite files")
    bench.add_argument("models", nargs="+", metavar="model", help="a .tflite file")
    bench.add_argument(
        "--threads", type=int, default=1, help="threads of the interpreter (default 1)"
    )
    bench.add_argument(
        "--warmup", type=int, default=10, help="runs before the measured runs (default 10)"
    )
    bench.add_argument(
        "--runs", type=int, default=100, help="measured runs of each file (default 100)"
    )
    bench.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default 0)")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(run=_bench)
    for command in (report, strip, shrink, export, lint):
        command.add_argument(
            "--import",
            dest="modules",
            action="append",
            default=[],
            metavar="MODULE",
            help="import this module first, which registers custom layers; may be repeated",
        )
    return parser


def _demo(arguments):
    from keras_dst.demo import run

    run(keep=arguments.keep)


def _report(arguments):
    import keras_dst
    from keras_dst._utils.files import check_writable

    if arguments.html:
        check_writable(pathlib.Path(arguments.html))
    report = keras_dst.report(_load(arguments.model, arguments.modules))
    if arguments.html:
        report.save_html(arguments.html)
    _show(report, arguments.json)


def _strip(arguments):
    import keras_dst

    _check_output(arguments.output)
    _save(keras_dst.strip(_load(arguments.model, arguments.modules)), arguments.output)


def _shrink(arguments):
    from keras_dst._structure.report import shrink_and_report

    _check_output(arguments.output)
    model = _load(arguments.model, arguments.modules)
    small, report = shrink_and_report(model, latency=arguments.latency)
    _save(small, arguments.output)
    _show(report, arguments.json)


def _check_output(output: str) -> None:
    from keras_dst._utils.files import check_writable

    if not output.endswith(".keras"):
        raise ValueError(f"Expected a .keras file to write. Received: {output}.")
    check_writable(pathlib.Path(output))


def _save(model, output: str) -> None:
    from keras_dst._utils.files import atomic_write

    with atomic_write(pathlib.Path(output)) as unfinished:
        model.save(unfinished)


def _export(arguments):
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

    loaded = np.load(path)
    return dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else loaded


def _progress(line: str) -> None:
    """Replace the last line by this line if stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def _inspect(arguments):
    from keras_dst.export.tflite import check_installed

    check_installed("ai_edge_litert", "flatbuffers")
    from keras_dst.export.inspection import inspect_file

    _show(inspect_file(arguments.model), arguments.json)


def _lint(arguments):
    import keras_dst

    path = arguments.model
    report = keras_dst.lint(_load(path, arguments.modules) if path.endswith(".keras") else path)
    _show(report, arguments.json)
    return 1 if report.errors else 0


def _bench(arguments):
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


def _show(report, as_json: bool) -> None:
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)


def _load(path: str, modules: Sequence[str] = ()):
    """Return the model in a `.keras` file, not compiled.

    Args:
        path: the path of the file.
        modules: names of modules to import first, from the current folder or installed.

    Raises:
        ValueError: if the file cannot be loaded, with the reason and a fix.
    """
    import zipfile

    import keras

    import keras_dst  # registers the sparse layers with Keras  # noqa: F401

    if not pathlib.Path(path).is_file():
        raise ValueError(
            f"Expected a file that model.save('x.keras') wrote. Received: {path}, which is not a "
            "file."
        )
    if path.endswith((".h5", ".hdf5")):
        raise ValueError(
            f"Expected a .keras file. Received: {path}, which has weights alone or comes from an "
            "older Keras. Fix: load the model in Python, for a tf_keras model with "
            "keras_dst.tfmot.load(path), and save it with model.save('x.keras')."
        )
    if path.endswith(".tflite"):
        raise ValueError(
            f"Expected a .keras file. Received: {path}. Fix: use keras-dst inspect, lint or bench "
            "for .tflite files."
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"Expected a .keras file, which is a zip archive. Received: {path}, which is not a "
            "whole zip archive. Fix: save the model again with model.save('x.keras')."
        )
    if modules:
        sys.path.insert(0, "")  # find modules in the current folder, as `python -m` does
    for module in modules:
        importlib.import_module(module)
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:
        raise ValueError(
            f"{path} could not be loaded: {error} Fix: for custom layers, add --import MODULE, "
            "where the module registers them with keras.saving.register_keras_serializable. For "
            "Lambda layers, load the model in Python with keras.saving.load_model(path, "
            "safe_mode=False) and call keras_dst there."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
