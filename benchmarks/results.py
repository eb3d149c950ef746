"""Store the runs of a benchmark in results/BENCHMARK/runs.jsonl, and write the page index.md.

Each line of `runs.jsonl` is a JSON object with the measured figures of a run. The key "run" holds
the name of the run. Other keys hold the command, the seeds, the package versions and the machine.
The keys "config" and "method" hold the constructor call of the pruning method. The
constructor call is valid for the keras_dst version that produced the run.
"""

import argparse
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
from collections.abc import Iterable, Sequence

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "results"
NOTES = pathlib.Path(__file__).parent / "notes"
# Names of the backends in headings.
TITLES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}


def runs(benchmark: str) -> dict[str, dict]:
    """Return all stored runs of a benchmark as a dict by name."""
    path = RESULTS / benchmark / "runs.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {run.pop("run"): run for run in map(json.loads, lines)}


def save(benchmark: str, name: str, run: dict) -> None:
    """Store a run with the package versions and the machine.

    A stored run of the same name is replaced.
    """
    folder = RESULTS / benchmark
    folder.mkdir(parents=True, exist_ok=True)
    # The lock is needed because several processes may store runs at the same time.
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stored = runs(benchmark) | {name: {**environment(), **run}}
        lines = [json.dumps({"run": key, **stored[key]}) + "\n" for key in sorted(stored)]
        # If the process is killed while it writes, the stored runs are not lost.
        unfinished = folder / ".runs.jsonl"
        unfinished.write_text("".join(lines))
        unfinished.replace(folder / "runs.jsonl")
    print(f"stored {name} in results/{benchmark}/runs.jsonl")


def run_missing(benchmark: str, description: str, option: str, names, run, default=None) -> None:
    """Call `run(name)` for each requested name that has no stored run yet.

    Args:
        benchmark: Name of the benchmark.
        description: Docstring of the benchmark module, whose first line is shown by `--help`.
        option: Command-line option that lists names, such as `"--nets"`.
        names: Allowed names.
        run: Function that takes a name, measures the network or case with this name, and
            saves the result.
        default: Names to run if the option is not given. Defaults to all names.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        option, dest="names", nargs="*", choices=names, default=default or list(names)
    )
    for name in parser.parse_args().names:
        if name not in runs(benchmark):
            run(name)


def write_index(benchmark: str, lines: list[str]) -> None:
    """Write index.md from the given lines and the text of benchmarks/notes/BENCHMARK.md."""
    notes = NOTES / f"{benchmark}.md"
    text = ["", notes.read_text().rstrip()] if notes.exists() else []
    path = RESULTS / benchmark / "index.md"
    path.write_text("\n".join([*lines, *text]) + "\n")
    print(path.read_text())


def table(headings: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table. Each row contains one cell per heading."""
    rule = "|" + "---|" * len(headings)
    first, *others = (f"| {' | '.join(row)} |" for row in (headings, *rows))
    return [first, rule, *others]


def columns(cells_of: dict[str, dict[str, str]]) -> list[str]:
    """Return the lines of a Markdown table with a row per method.

    `cells_of[column][method]` is the text of the cell in this column and in the row of this method.
    """
    headings = [TITLES.get(name, name) for name in cells_of]
    methods = dict.fromkeys(name for cells in cells_of.values() for name in cells)
    rows = ([name, *(cells.get(name, "") for cells in cells_of.values())] for name in methods)
    return table(["method", *headings], rows)


def environment() -> dict:
    """Return the backend, the package versions and the machine, which are stored with each run."""
    import keras

    packages = ("keras-dst", "keras", "tensorflow", "jax", "torch", "ai-edge-litert", "numpy")
    packages += ("tf_keras", "tensorflow-model-optimization", "pquant-ml")
    packages += ("tflite-micro", "ethos-u-vela", "torch-pruning")
    packages += ("onnx", "onnxruntime", "openvino", "hls4ml")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "backend": keras.backend.backend(),
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_cpu()}",
        "date": datetime.date.today().isoformat(),
    }


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def mean_std(values) -> str:
    """Return the mean of the values as text.

    If there are two or more values, the text also contains their standard deviation.
    """
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"
