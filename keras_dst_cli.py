"""Command-line program `keras-dst`: check the arguments, then import keras_dst and run a command.

This module imports only the standard library, so that the help, the version and errors about
arguments appear at once. The module is not part of the package keras_dst, because importing the
package also imports Keras and a backend, which takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys
import zipfile
from collections.abc import Sequence

#: Copy of `keras_dst.export.target_reports.ACCELERATORS`, because importing keras_dst here would be
#: slow.
_NPUS = (
    *("ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256"),
    *("ethos-u65-512", "ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024"),
    "ethos-u85-2048",
)
_EXAMPLES = """\
examples:
  keras-dst demo                                 train, strip and export a network on real digits
  keras-dst report model.keras                   show the sparsity of each layer
  keras-dst export model.keras model.tflite      write a sparse file, measured against dense files
  keras-dst export model.keras small.tflite --optimize size --quantize weights
  keras-dst bench dense.tflite sparse.tflite     compare the latency of two files
  keras-dst report model.keras --import my_layers   for a model with custom layers
  keras-dst recommend --sparsity 0.95 --epochs 100  recommend a pruning method

Models are loaded without compiling: no optimizer, loss or metric is needed.
KERAS_BACKEND chooses tensorflow, jax or torch, as for any program that uses Keras.
keras-dst COMMAND --help shows the options of a command.

Exit codes: 0 done; 1 failed, with the reason on stderr; 2 wrong usage.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 success, 1 failure, 2 wrong usage.

    `lint` also returns 1 if at least one finding is an error.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        _check_files(arguments)
        run = getattr(importlib.import_module("keras_dst.cli"), arguments.command)
        return run(arguments) or 0
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        print(f"keras-dst {arguments.command}: {error}", file=sys.stderr)
        return 1


class _Version(argparse.Action):
    """Action that prints the version of the installed package and exits."""

    def __call__(self, parser, *_):
        from importlib.metadata import version

        print(f"keras-dst {version('keras-dst')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-dst",
        description="Inspect sparse Keras 3 models; export them to smaller, faster .tflite files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command")

    demo = commands.add_parser("demo", help="train, strip and export a small net on real data")
    demo.add_argument("--keep", metavar="FILE", help="path where the sparse .tflite file is saved")

    report = commands.add_parser("report", help="show sparsity, parameters and FLOPs by layer")
    report.add_argument("model", help="a .keras file")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.add_argument("--html", metavar="FILE", help="also write an HTML report")

    strip = commands.add_parser(
        "strip", help="apply masks to the weights, and write stock Keras layers"
    )
    strip.add_argument("model", help="a .keras file")
    strip.add_argument("output", help="the .keras file to write")

    shrink = commands.add_parser(
        "shrink", help=("remove dead channels, and write a smaller dense model")
    )
    shrink.add_argument("model", help="a .keras file")
    shrink.add_argument("output", help="the .keras file to write")
    shrink.add_argument("--latency", action="store_true", help="measure the latency of both models")
    shrink.add_argument("--json", action="store_true", help="print JSON")

    export = commands.add_parser("export", help="write a sparse-encoded .tflite file")
    export.add_argument("model", help="a .keras file")
    export.add_argument("output", help="the .tflite file to write")
    export.add_argument("--optimize", choices=("latency", "size", "balanced"), default="balanced")
    export.add_argument(
        "--target",
        choices=("host", "arm", "any", "micro", *_NPUS),
        default="host",
        metavar="TARGET",
        help=f"processor for the file: host (default), arm, any, micro, {', '.join(_NPUS)}",
    )
    export.add_argument("--quantize", choices=("weights", "full"), help="quantize to 8 bits")
    export.add_argument(
        "--representative", metavar="NPY", help="file of samples for --quantize full"
    )
    export.add_argument(
        "--evaluate",
        metavar="NPZ",
        help="file with arrays x and y for measuring the accuracy",
    )
    export.add_argument(
        "--threads",
        type=int,
        default=1,
        help=("number of interpreter threads for measurements (default 1)"),
    )
    export.add_argument(
        "--batch", type=int, default=1, help=("batch size for measurements (default 1)")
    )
    export.add_argument(
        "--no-measure", action="store_true", help="estimate latencies instead of measuring them"
    )
    export.add_argument("--json", action="store_true", help="print JSON")

    inspect = commands.add_parser("inspect", help="show how a .tflite file stores each constant")
    inspect.add_argument("model", help="a .tflite file")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    lint = commands.add_parser(
        "lint",
        help="find the parts of a .tflite file that are wrong, slow or large",
        epilog=(
            "Exit codes: 0 no error found, only advice; 1 an error found, or the check failed "
            "with a reason on stderr; 2 wrong usage."
        ),
    )
    lint.add_argument("model", help="a .tflite file, or a .keras file to export for the check")
    lint.add_argument(
        "--target",
        choices=("micro", *_NPUS),
        metavar="TARGET",
        help=f"check for micro or an NPU instead of CPUs: micro, {', '.join(_NPUS)}",
    )
    lint.add_argument("--json", action="store_true", help="print JSON")

    bench = commands.add_parser("bench", help="compare the latency of .tflite files")
    bench.add_argument("models", nargs="+", metavar="model", help="a .tflite file")
    bench.add_argument(
        "--threads", type=int, default=1, help="number of interpreter threads (default 1)"
    )
    bench.add_argument(
        "--warmup",
        type=int,
        default=10,
        help=("number of runs before the measured runs (default 10)"),
    )
    bench.add_argument(
        "--runs", type=int, default=100, help="number of measured runs of each file (default 100)"
    )
    bench.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default 0)")
    bench.add_argument("--json", action="store_true", help="print JSON")

    recommend = commands.add_parser(
        "recommend", help="recommend a pruning method from measured accuracies"
    )
    recommend.add_argument(
        "--sparsity", type=float, required=True, help="fraction of zeros, between 0 and 1"
    )
    recommend.add_argument(
        "--epochs", type=int, required=True, help="number of epochs of the training run"
    )
    recommend.add_argument(
        "--pattern",
        default="unstructured",
        help="unstructured (default), blocks such as 1x4, N:M such as 2:4, or channel",
    )
    recommend.add_argument(
        "--target",
        choices=("host", "arm", "any", "micro", *_NPUS),
        metavar="TARGET",
        help=f"device that runs the model: host, arm, any, micro, {', '.join(_NPUS)}",
    )
    recommend.add_argument("--json", action="store_true", help="print JSON")
    for command in (report, strip, shrink, export, lint):
        command.add_argument(
            "--import",
            dest="modules",
            action="append",
            default=[],
            metavar="MODULE",
            help="module with custom layers that is imported first; may be repeated",
        )
    return parser


def _check_files(arguments: argparse.Namespace) -> None:
    """Raise an error if an input file is missing, or if a file name has the wrong extension."""
    command = arguments.command
    if command in ("inspect", "lint", "bench"):
        for path in arguments.models if command == "bench" else [arguments.model]:
            os.stat(path)
    if command in ("report", "strip", "shrink", "export") or (
        command == "lint" and arguments.model.endswith(".keras")
    ):
        _check_model(arguments.model)
    if command in ("strip", "shrink"):
        _check_output(arguments.output, ".keras")
    elif command == "export":
        _check_output(arguments.output, ".tflite")
    elif command == "report" and arguments.html:
        _check_output(arguments.html, ".html")
    elif command == "demo" and arguments.keep:
        _check_output(arguments.keep, ".tflite")


def _check_output(path: str, extension: str) -> None:
    """Raise ValueError if an output path has another extension, so that no input is overwritten."""
    if not path.endswith(extension):
        raise ValueError(
            f"Expected an output path that ends with {extension}. Received: {path}. Fix: choose a "
            f"name that ends with {extension}."
        )


def _check_model(path: str) -> None:
    """Raise ValueError if a file is not a `.keras` file. The error message says what to do."""
    if not pathlib.Path(path).is_file():
        raise ValueError(
            f"Expected a file that model.save('x.keras') wrote. Received: {path}, which is not a "
            "file."
        )
    if path.endswith((".h5", ".hdf5")):
        raise ValueError(
            f"Expected a .keras file. Received: {path}, which contains only weights or a model of "
            "an older Keras version. Fix: load the model in Python, and save it with "
            "model.save('x.keras'). Load a tf_keras model with keras_dst.tfmot.load(path)."
        )
    if path.endswith(".tflite"):
        raise ValueError(
            f"Expected a .keras file. Received: {path}. Fix: use keras-dst inspect, lint or bench "
            "for .tflite files."
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"Expected a .keras file, which is a zip archive. Received: {path}, which is not a "
            "complete zip archive. Fix: save the model again with model.save('x.keras')."
        )
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if "model.safetensors" in names and "structure.json" in names:
        raise ValueError(
            f"Expected a .keras file. Received: {path}, which keras_dst.save_sparse wrote. Fix: "
            "load the model in Python with keras_dst.load_sparse(path), and save it with "
            "model.save('x.keras')."
        )
    if "config.json" not in names:
        raise ValueError(
            f"Expected a .keras file. Received: {path}, which is a zip archive without "
            "config.json. Fix: save the model with model.save('x.keras')."
        )


if __name__ == "__main__":
    sys.exit(main())
