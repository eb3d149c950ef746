"""All runs of `benchmarks.mnist`, then the table of them: results/mnist.md.

Runs whose JSON is there already are not run again; `--table` makes the table alone.
"""

import argparse
import collections
import json
import statistics

from benchmarks.backends import RESULTS, run_on, write_page
from benchmarks.common import spread

# backend, model, target sparsity (None: the paper's alpha alone; "dense": the control)
RUNS = [
    ("jax", "lenet-300-100", 0.97),
    ("tensorflow", "lenet-300-100", 0.97),
    ("torch", "lenet-300-100", 0.97),
    ("tensorflow", "lenet-5-caffe", 0.984),
    ("jax", "lenet-300-100", "dense"),
    ("jax", "lenet-300-100", None),
    ("jax", "lenet-300-100", 0.975),
    ("tensorflow", "lenet-5-caffe", "dense"),
    ("jax", "lstm-128", "dense"),
    ("jax", "lstm-128", 0.975),
    ("jax", "lstm-256", "dense"),
    ("jax", "lstm-256", 0.975),
]
SEEDS = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        for backend, model, target in RUNS:
            for seed in range(SEEDS):
                run(backend, model, target, seed)
    table()


def run(backend, model, target, seed):
    kind = {None: "alpha", "dense": "dense"}.get(target, f"target{target}")
    if (RESULTS / f"mnist_{model}_{kind}_{backend}_seed{seed}.json").exists():
        return
    how = {None: [], "dense": ["--dense"]}.get(target, ["--target", str(target)])
    run_on(backend, "mnist", model, "--seed", str(seed), *how)


def table():
    groups = collections.defaultdict(list)
    for path in sorted(RESULTS.glob("mnist_*_seed*.json")):
        result = json.loads(path.read_text())
        arguments = result["arguments"]
        kind = "dense" if arguments["dense"] else "DST"
        if arguments["target"]:
            kind = f"DST, target {arguments['target']:.1%}"
        groups[(arguments["model"], kind, result["backend"])].append(result)
    lines = [
        "# DST on MNIST, the paper's recipe",
        "",
        "SGD 0.01, momentum 0.9, for LSTMs Adam 0.001; batch 64, 20 epochs, pixels in [0, 1]; "
        "accuracy on the test set "
        "after the last epoch, mean and standard deviation over the seeds. Made by "
        "`make bench-mnist` from the JSON files in this folder.",
        "",
        "| net | training | backend | seeds | test accuracy | weights kept | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, kind, backend), runs in groups.items():
        accuracy = [100 * r["test_accuracy"] for r in runs]
        kept = [100 * r["kept"] for r in runs]
        lines.append(
            f"| {model} | {kind} | {backend} | {len(runs)} | {spread(accuracy)} % "
            f"| {spread(kept)} % | {statistics.median(r['seconds'] for r in runs):.0f} |"
        )
    write_page(RESULTS / "mnist.md", lines)


if __name__ == "__main__":
    main()
