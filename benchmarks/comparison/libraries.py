"""Compare keras_dst with tfmot and PQuantML: results/libraries.

python -m benchmarks.comparison.libraries [--table]

All tools train the same network with the same data, seeds, number of epochs, batch size, optimizer
and target sparsity. Each tool also prunes a ResNet, trains the ResNet for a few steps, and converts
it to TFLite. Each tool has its own Python environment, in which
`benchmarks.comparison.libraries_worker` runs. Runs that are already stored are skipped. `--table`
writes the table from the stored runs.
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


def run_tool(tool):
    """Run a tool in its Python environment. Skip the tool if the results of its runs are stored."""
    if f"{RESNET}_{tool}" not in results.runs(BENCHMARK):
        command = [PYTHONS[tool], "-m", "benchmarks.comparison.libraries_worker", tool]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("KERAS_BACKEND", None)
        subprocess.run(command, cwd=ROOT, env=environment, check=True)


def read(net):
    """Return the stored runs of a network, as a dict from the name of each tool to its run."""
    stored = results.runs(BENCHMARK)
    return {tool: stored[f"{net}_{tool}"] for tool in PYTHONS if f"{net}_{tool}" in stored}


def files():
    """Measure and store the size, latency and accuracy of all `.tflite` files."""
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
    """Return the test accuracy of a `.tflite` file, measured with batch size 1."""
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
        "# Comparison with other libraries",
        "",
        "keras_dst, tfmot and PQuantML train with the same data, seeds, number of epochs and "
        f"target sparsity of {TARGET:.0%}. The optimizer is SGD with momentum 0.9 and a cosine "
        "learning rate. The hyperparameters of the tools are not tuned. Each tool runs on "
        "TensorFlow in its own environment, on one core. `make bench-libraries` writes this page "
        "from `results/libraries/runs.jsonl`.",
        "",
        f"## LeNet-300-100, MNIST, {EPOCHS} epochs",
        "",
        "The table below shows the test accuracy in % after the last epoch, as mean and standard "
        "deviation over the seeds, and the sparsity. Step time and memory are relative to the "
        f"dense network of the same tool. Step time is the median of {ROUNDS} rounds of {STEPS} "
        "steps, including mask updates. Each round measures every network once. All times are "
        "CPU times.",
        "",
        "| tool | method | seeds | accuracy | sparsity | step | step, ms | compiling, s | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for tool, result in read(NET).items():
        for method, found in result["methods"].items():
            lines.append(f"| {tool} | {method} | {_row(result, method, found)} |")
    lines += [
        "",
        "## Files of this network",
        "",
        "The table below shows the `.tflite` files of the first seed. Bytes and latency are "
        "relative to the dense file in the first row. Latency is the median time of one inference "
        "on one thread. The files are measured alternately in one process. Accuracy is the test "
        "accuracy of the file.",
        "",
        "| tool | method | written by | bytes | latency | accuracy |",
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
        f"Each tool prunes a ResNet-8, trains it for {EPOCHS * FEW} steps on random images, "
        "removes its masks, and converts it to a `.tflite` file.",
        "",
        "| tool | method | result |",
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
    # Show only the type of the error, because the column `accuracy` is narrow.
    if "error" in found:
        return f"| {_code(found['error'].partition(':')[0])} | | | | |"
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
    return f"pruned and converted, sparsity {found['sparsity']:.1%}"


def _code(error) -> str:
    """Return an error message as code for a table cell.

    The list of arguments at the end of the message is left out.
    """
    message, _, _ = error.partition("\n\nArguments received")
    return f"`{' '.join(message.split()).replace('|', '/').replace('`', chr(39))}`"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        for tool in PYTHONS:
            run_tool(tool)
        files()
    table()


if __name__ == "__main__":
    main()
