"""Beside peers, in one run: keras_dst, tfmot and PQuantML; results/peers_*.json, results/peers.md.

The same net, data, seeds, epochs, batch, optimiser and target for all of them; then a ResNet that
each has to prune, train for a few steps and convert. Each tool runs in the environment that it
needs, by benchmarks.comparison.libraries_worker; what has its JSON already is not run again.

python -m benchmarks.comparison.libraries [--table]
    with --table the table alone, from the JSON files that are there.
"""

import argparse
import os
import statistics
import subprocess
import sys

from benchmarks import results
from benchmarks.comparison.libraries_worker import (
    EPOCHS,
    FEW,
    FILES,
    NET,
    RESNET,
    ROUNDS,
    STEPS,
    TARGET,
)
from benchmarks.data import mnist

BENCHMARK = "libraries"
ROOT = results.ROOT
PYTHONS = {
    "keras_dst": sys.executable,
    "tfmot": ROOT / ".venv-tfmot" / "bin" / "python",
    "PQuantML": ROOT / ".venv-pquant" / "bin" / "python",
}
RUNS = 1000


def worked(tool):
    """Runs a tool, unless it has run."""
    if f"{RESNET}_{tool}" not in results.runs(BENCHMARK):
        command = [PYTHONS[tool], "-m", "benchmarks.comparison.libraries_worker", tool]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("KERAS_BACKEND", None)
        subprocess.run(command, cwd=ROOT, env=environment, check=True)


def read(net):
    """What each tool did with a net, of those that have run."""
    stored = results.runs(BENCHMARK)
    return {tool: stored[f"{net}_{tool}"] for tool in PYTHONS if f"{net}_{tool}" in stored}


def files():
    """Bytes, latency and accuracy of all files, in turns in one process."""
    from keras_dst.export.measure import bench

    rows = [
        {"tool": tool, "method": method, "way": way, "name": name}
        for tool, result in read(NET).items()
        for method, found in result["methods"].items()
        for way, name in found.get("files", {}).items()
    ]
    timings = bench([FILES / row.pop("name") for row in rows], runs=RUNS).files
    x, y = mnist()[1]
    for row, timing in zip(rows, timings):
        row["bytes"] = timing.bytes
        row["latency"], row["spread"], row["ratio"] = timing.latency, timing.spread, timing.ratio
        row["test_accuracy"] = accuracy(FILES / timing.name, x, y)
    results.save(
        BENCHMARK, f"{NET}_files", {"command": "make bench-libraries", "runs": RUNS, "files": rows}
    )


def accuracy(path, x, y) -> float:
    """Of a file, image by image."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (inputs,), (outputs,) = interpreter.get_input_details(), interpreter.get_output_details()
    right = 0
    for image, label in zip(x, y):
        interpreter.set_tensor(inputs["index"], image[None])
        interpreter.invoke()
        right += interpreter.get_tensor(outputs["index"]).argmax() == label
    return right / len(y)


def table():
    lines = [
        "# Beside peers, in one run",
        "",
        "keras_dst, tfmot and PQuantML at the same job: the same data, seeds, optimiser (SGD with "
        f"momentum 0.9 along a cosine), number of epochs and target of {TARGET:.0%}, tuned for "
        "none. Each tool in the environment that it needs, on one core, on TensorFlow. "
        "Made by `make bench-libraries` from the runs next to this page.",
        "",
        f"## LeNet-300-100, MNIST, {EPOCHS} epochs",
        "",
        "Test accuracy in % after the last epoch, of the finished net, mean and standard deviation "
        "over the seeds; the sparsity that was reached. Beside the same tool's dense net: the time "
        f"of a step (median of {ROUNDS} rounds of {STEPS} steps in turns, updates of masks in it) "
        "and the memory that training takes more. All times are those of a processor.",
        "",
        "| tool | method | seeds | accuracy | sparsity | step | step, ms | compiling, s | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for tool, result in read(NET).items():
        for method, found in result["methods"].items():
            lines.append(f"| {tool} | {method} | {_row(result, method, found)} |")
    lines += [
        "",
        "## Its files",
        "",
        "`.tflite` files of the first seed, beside the dense one of the first row: bytes, and "
        "median latency of one inference on one thread, all files in turns in one process; and the "
        "test accuracy of the file itself.",
        "",
        "| tool | method | by | bytes | latency | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    found = results.runs(BENCHMARK).get(f"{NET}_files", {"files": []})["files"]
    for row in found:
        figures = row["bytes"] / found[0]["bytes"], row["ratio"], 100 * row["test_accuracy"]
        names = row["tool"], row["method"], row["way"]
        lines.append("| {} | {} | {} | {:.3f} | {:.2f} | {:.2f} |".format(*names, *figures))
    lines += [
        "",
        "## A ResNet",
        "",
        f"ResNet-8, {EPOCHS * FEW} steps on random images, to be pruned, trained, finished and "
        "converted.",
        "",
        "| tool | method | what happens |",
        "|---|---|---|",
    ]
    for tool, result in read(RESNET).items():
        outcomes = {}
        for method, found in result["jobs"].items():
            outcomes.setdefault(_outcome(found), []).append(method)
        for outcome, methods in outcomes.items():
            lines.append(f"| {tool} | {'; '.join(methods)} | {outcome} |")
    results.write_index(BENCHMARK, lines)


def _row(result, method, found) -> str:
    if "error" in found:
        return f"| {_code(found['error'])} | | | | |"
    times, dense = result["times"], result["methods"]["dense"]
    accuracies = [100 * value for value in found["test_accuracy"]]
    cells = [
        str(len(accuracies)),
        results.mean_std(accuracies),
        f"{statistics.mean(found['sparsity']):.1%}",
    ]
    cells += [f"{times['ratio_to_dense'][method]:.2f}"]
    cells += [f"{1e3 * times['median_seconds_per_step'][method]:.1f}"]
    cells += [f"{times['seconds_to_compile'][method]:.1f}"]
    cells += [f"{round((found['memory'] - dense['memory']) / 2**20):+d} MB"]
    return " | ".join(cells)


def _outcome(found) -> str:
    if "error" in found:
        return f"{found['stage']} fails: {_code(found['error'])}"
    return f"works: {found['sparsity']:.1%} sparse"


def _code(error) -> str:
    """The first sentence or two of an error, for a cell of a table."""
    said, _, _ = error.partition("\n\nArguments received")
    return f"`{' '.join(said.split()).replace('|', '/').replace('`', chr(39))}`"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        for tool in PYTHONS:
            worked(tool)
        files()
    table()


if __name__ == "__main__":
    main()
