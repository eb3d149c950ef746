"""The command `keras-dst`."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from keras_dst.version import __version__

_EXAMPLES = """\
examples:
  keras-dst demo                                 the whole way, on real digits, in a minute
  keras-dst report model.keras                   how sparse a model is, layer by layer
  keras-dst export model.keras model.tflite      write it, run it, compare it with dense files
  keras-dst export model.keras small.tflite --optimize size --quantize weights
  keras-dst bench dense.tflite sparse.tflite     which one is faster here

KERAS_BACKEND chooses tensorflow, jax or torch, as for any program that uses Keras.
keras-dst COMMAND --help has the options of a command.

Exit codes: 0 done; 1 failed, with the reason on stderr; 2 wrong usage.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 1 failed with a message, 2 wrong usage.

    `lint` is done with 1 where it found an error.
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
        description="Sparse models from Keras 3 to a smaller, faster .tflite.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"keras-dst {__version__}")
    commands = parser.add_subparsers(dest="command")

    demo = commands.add_parser("demo", help="train, strip and export a small net on real data")
    demo.add_argument("--keep", metavar="FILE", help="keep the sparse .tflite here")
    demo.set_defaults(run=_demo)

    report = commands.add_parser("report", help="sparsity, parameters and FLOPs, layer by layer")
    report.add_argument("model", help="a .keras file")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.add_argument("--html", metavar="FILE", help="write a page with pictures here as well")
    report.set_defaults(run=_report)

    strip = commands.add_parser("strip", help="bake masks in; leave stock Keras layers")
    strip.add_argument("model", help="a .keras file")
    strip.add_argument("output", help="the .keras file to write")
    strip.set_defaults(run=_strip)

    shrink = commands.add_parser("shrink", help="remove dead channels: a smaller dense model")
    shrink.add_argument("model", help="a .keras file")
    shrink.add_argument("output", help="the .keras file to write")
    shrink.add_argument("--latency", action="store_true", help="time both models")
    shrink.add_argument("--json", action="store_true", help="print JSON")
    shrink.set_defaults(run=_shrink)

    export = commands.add_parser("export", help="write a sparse-encoded .tflite")
    export.add_argument("model", help="a .keras file")
    export.add_argument("output", help="the .tflite file to write")
    export.add_argument("--optimize", choices=("latency", "size", "balanced"), default="balanced")
    export.add_argument(
        "--target", choices=("host", "arm", "any"), default="host", help="CPU (default host)"
    )
    export.add_argument("--quantize", choices=("weights", "full"), help="round to 8 bits")
    export.add_argument("--representative", metavar="NPY", help="samples, for --quantize full")
    export.add_argument("--evaluate", metavar="NPZ", help="x and y to find the accuracy on")
    export.add_argument("--threads", type=int, default=1, help="for measuring (default 1)")
    export.add_argument("--batch", type=int, default=1, help="for measuring (default 1)")
    export.add_argument("--no-measure", action="store_true", help="estimate latencies instead")
    export.add_argument("--json", action="store_true", help="print JSON")
    export.set_defaults(run=_export)

    inspect = commands.add_parser("inspect", help="how each constant of a .tflite is stored")
    inspect.add_argument("model", help="a .tflite file")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    lint = commands.add_parser(
        "lint",
        help="what makes a .tflite wrong, slow or large",
        epilog="Exit codes: 0 no error found, advice at most; 1 an error found, or failed with "
        "the reason on stderr; 2 wrong usage.",
    )
    lint.add_argument("model", help="a .tflite file, or a .keras file to be exported")
    lint.add_argument("--json", action="store_true", help="print JSON")
    lint.set_defaults(run=_lint)

    bench = commands.add_parser("bench", help="time .tflite files against each other")
    bench.add_argument("models", nargs="+", metavar="model", help="a .tflite file")
    bench.add_argument("--threads", type=int, default=1, help="of the interpreter (default 1)")
    bench.add_argument("--warmup", type=int, default=10, help="runs not counted (default 10)")
    bench.add_argument("--runs", type=int, default=100, help="runs of each file (default 100)")
    bench.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(run=_bench)
    return parser


def _demo(arguments):
    from keras_dst.demo import run

    run(keep=arguments.keep)


def _report(arguments):
    import keras_dst
    from keras_dst._utils.files import check_writable

    if arguments.html:
        check_writable(pathlib.Path(arguments.html))
    report = keras_dst.report(_load(arguments.model))
    if arguments.html:
        report.save_html(arguments.html)
    _show(report, arguments.json)


def _strip(arguments):
    import keras_dst

    _check_output(arguments.output)
    _save(keras_dst.strip(_load(arguments.model)), arguments.output)


def _shrink(arguments):
    import keras_dst

    _check_output(arguments.output)
    model = _load(arguments.model)
    _save(keras_dst.shrink(model), arguments.output)
    _show(keras_dst.shrink_report(model, latency=arguments.latency), arguments.json)


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
                "Expected an .npz file with the arrays x and y, as of np.savez(path, x=x, y=y). "
                f"Received: {arguments.evaluate}."
            )
        settings["evaluate"] = (arrays["x"], arrays["y"])
    settings["measure"] = not arguments.no_measure
    model = _load(arguments.model)
    try:
        report = keras_dst.export_tflite(model, arguments.output, progress=_progress, **settings)
    finally:
        _progress("")
    _show(report, arguments.json)


def _arrays(path: str):
    """The array of an `.npy` file, or those of an `.npz` file by name."""
    import numpy as np

    loaded = np.load(path)
    return dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else loaded


def _progress(line: str) -> None:
    """Shows a line in place of the last one, on a terminal."""
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
    report = keras_dst.lint(_load(path) if path.endswith(".keras") else path)
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


def _load(path: str):
    """The model in a `.keras` file, or a ValueError that says what is wrong with the file."""
    import zipfile

    import keras

    if not pathlib.Path(path).is_file():
        raise ValueError(f"{path} is no file. Expected a model saved by model.save('x.keras').")
    if path.endswith((".h5", ".hdf5")):
        raise ValueError(
            f"{path} has weights alone, or is of an older Keras. Load it in Python, by "
            "keras_dst.tfmot.load(path) if it is a model of tf_keras, and save it with "
            "model.save('x.keras')."
        )
    if path.endswith(".tflite"):
        raise ValueError(
            f"{path} is no Keras model. See what is in it with keras-dst inspect, lint or bench."
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is no .keras file, or it is cut short: it is not a whole zip archive. "
            "Save the model again with model.save('x.keras')."
        )
    try:
        return keras.saving.load_model(path)
    except Exception as error:
        raise ValueError(f"{path} could not be loaded: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
