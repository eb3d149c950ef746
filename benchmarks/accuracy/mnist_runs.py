"""Run `benchmarks.accuracy.mnist` for all networks, sparsities and seeds: results/mnist.

Runs that are already stored are skipped. `--table` writes the table from the stored runs.
"""

import argparse
import collections
import statistics

from benchmarks import results
from benchmarks.backends import run_on

# Backend, network and target sparsity of each run. If the target is None, the argument `alpha` of
# DST determines the sparsity, as in the DST paper. "dense" means training without pruning.
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
BENCHMARK = "mnist"
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
    if f"{model}_{kind}_{backend}_seed{seed}" in results.runs(BENCHMARK):
        return
    how = {None: [], "dense": ["--dense"]}.get(target, ["--target", str(target)])
    run_on(backend, "accuracy.mnist", model, "--seed", str(seed), *how)


def table():
    groups = collections.defaultdict(list)
    for result in results.runs(BENCHMARK).values():
        arguments = result["arguments"]
        kind = "dense" if arguments["dense"] else "DST"
        if arguments["target"]:
            kind = f"DST, target {arguments['target']:.1%}"
        groups[(arguments["model"], kind, result["backend"])].append(result)
    lines = [
        "# DST on MNIST with the paper's recipe",
        "",
        "All networks are trained for 20 epochs with batches of 64 images. Pixels are in [0, 1]. "
        "The optimizer is SGD with learning rate 0.01 and momentum 0.9, and for LSTMs Adam with "
        "learning rate 0.001. The table below shows the test accuracy after the last epoch as "
        "mean and standard deviation over the seeds. `make bench-mnist` writes this page from "
        "`results/mnist/runs.jsonl`.",
        "",
        "| network | training | backend | seeds | test accuracy | density | seconds per run |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, kind, backend), runs in groups.items():
        accuracy = [100 * r["test_accuracy"] for r in runs]
        kept = [100 * r["kept"] for r in runs]
        lines.append(
            f"| {model} | {kind} | {backend} | {len(runs)} | {results.mean_std(accuracy)} % "
            f"| {results.mean_std(kept)} % | {statistics.median(r['seconds'] for r in runs):.0f} |"
        )
    results.write_index(BENCHMARK, lines)


if __name__ == "__main__":
    main()
