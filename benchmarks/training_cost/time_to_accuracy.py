"""Measure the cost of training a sparse network to a given accuracy: results/time_to_accuracy.

python -m benchmarks.training_cost.time_to_accuracy --seeds 3
python -m benchmarks.training_cost.time_to_accuracy --table

LeNet-300-100 is trained on MNIST to 95 % sparsity for 2 to 10 epochs, as in
`benchmarks.accuracy.methods`. Each pruning method prunes the network during training. The baseline
is trained without pruning for half of the epochs, and then pruned to the target sparsity in one
shot. Fine-tuning restarts with the initial learning rate. The accuracy goal is half a percentage
point below the accuracy of the dense network after five epochs. The result is the smallest number
of epochs with which the mean accuracy over the seeds reaches the goal. Runs that are already stored
are skipped.

The number of operations is proportional to the density, because each weight of LeNet-300-100 is
multiplied once per sample. A training step computes three matrix products: outputs, gradients of
the inputs, and gradients of the weights. Each multiplication with a weight counts as two
operations. keras_dst computes all products, including products with zeros. The column "zeros
skipped" gives the number of operations on a processor that skips products for pruned weights. This
number is computed from the mean density of each epoch. DST, DCIL and OptG, the methods in `ALIVE`,
can restore a pruned weight in any step. These methods therefore need the gradients of all weights
in every step. RigL needs the gradients of pruned weights only in the step before a mask update. For
RigL, the table does not count the operations that compute the gradients of pruned weights.
"""

import argparse
import collections
import dataclasses
import itertools
import statistics

import keras

from benchmarks import results
from benchmarks.accuracy.methods import TASKS, name_of, run
from keras_dst.schedules import Constant

BENCHMARK = "time_to_accuracy"
SPARSITY = 0.95
EPOCHS = (2, 4, 6, 8, 10)
LESS = 0.005  # Accepted drop of accuracy.
PRUNED_LATER = "train, prune, fine-tune"
METHODS = (PRUNED_LATER, "Magnitude", "DST", "DCIL", "OptG", "FlipOut", "SET", "RigL")
PATHS = {"DCIL": 2}  # Number of forward passes per step.
ALIVE = ("DST", "DCIL", "OptG")
SPARSE_FROM_THE_START = ("SET", "RigL")


def twice(rate, steps):
    """Return a learning rate schedule that decays to 0 twice, once in each half of the training."""
    schedules = keras.optimizers.schedules
    return schedules.CosineDecayRestarts(rate, steps // 2, t_mul=1.0, m_mul=1.0)


def train_network(method, epochs, seed, data):
    """Train a network, and return the results of the run."""
    task = dataclasses.replace(TASKS["mnist-mlp"], epochs=epochs)
    if method != PRUNED_LATER:
        return run(task, method, SPARSITY, seed, data)
    task = dataclasses.replace(task, rates=twice)
    return run(task, "Magnitude", Constant(SPARSITY, begin=0.5), seed, data)


def densities(result) -> list[float]:
    """Return the mean density of each epoch, from the densities at its start and at its end."""
    way, epochs = result["way"], result["epochs"]
    if way == "dense":
        return [1.0] * epochs
    if way == PRUNED_LATER:
        return [1.0] * (epochs // 2) + [1 - SPARSITY] * (epochs // 2)
    ends = [1 - sparsity for sparsity in result["history"]["sparsity"]]
    first = ends[0] if way in SPARSE_FROM_THE_START else 1.0
    return [(a + b) / 2 for a, b in itertools.pairwise([first, *ends])]


def operations(result) -> tuple[float, float]:
    """Return the number of operations of a training run on two processors.

    The first processor executes all operations. The second processor skips products for pruned
    weights. The unit of both numbers is the number of operations of one dense epoch.
    """
    paths = PATHS.get(result["way"], 1)
    left = 0.0
    for density in densities(result):
        over_all = density + paths - 1  # The second forward pass of DCIL is dense.
        left += (2 * over_all + (paths if result["way"] in ALIVE else over_all)) / 3
    return float(paths * result["epochs"]), left


def table():
    found = collections.defaultdict(list)
    for result in results.runs(BENCHMARK).values():
        found[result["way"], result["epochs"]].append(result)

    def mean(runs, key):
        return statistics.mean(key(run) for run in runs)

    def accuracy(runs):
        return mean(runs, lambda run: run["test_accuracy"])

    dense = found["dense", 5]
    goal = accuracy(dense) - LESS
    sparse = [run for runs in found.values() for run in runs if run["way"] != "dense"]
    apart = max(abs(run["sparsity"] - SPARSITY) for run in sparse)
    lines = [
        "# Training cost to a given accuracy",
        "",
        f"The table below compares the cost of training LeNet-300-100 on MNIST to {SPARSITY:.0%} "
        f"sparsity. The goal is a mean test accuracy of {100 * goal:.2f} % over {len(dense)} "
        f"seeds, {100 * LESS:g} percentage points below the mean accuracy of the dense "
        "network after five epochs. The column `epochs` gives the smallest number of epochs, out "
        f"of {', '.join(map(str, EPOCHS))}, with which the method reaches the goal. The column "
        "`operations` gives the number of operations of the whole training, relative to one "
        "epoch of dense training. The column `zeros skipped` gives the number of operations for "
        "a processor that skips all zeros. The column `seconds` gives the duration of `fit`, "
        "including compilation. The sparsity of every training run differs from the target by at "
        f"most {100 * apart:.1g} percentage points. `make bench-time-to-accuracy` writes this "
        "page from `results/time_to_accuracy/runs.jsonl`.",
        "",
        "| method | epochs | accuracy | operations | zeros skipped | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for method in ("dense", *METHODS):
        budgets = sorted(epochs for name, epochs in found if name == method)
        enough = [e for e in budgets if method == "dense" or accuracy(found[method, e]) >= goal]
        epochs = enough[0] if enough else budgets[-1]
        runs = found[method, epochs]
        reached = f"{100 * accuracy(runs):.2f} %" + ("" if enough else ", not reached")
        cells = [f"{statistics.mean(n):.2f}" for n in zip(*map(operations, runs))]
        took = statistics.median(run["seconds"] for run in runs)
        lines.append(f"| {method} | {epochs} | {reached} | {' | '.join(cells)} | {took:.0f} |")
    results.write_index(BENCHMARK, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        data = TASKS["mnist-mlp"].data()
        plan = [("dense", 5), *((m, e) for m in args.methods for e in EPOCHS)]
        for seed in range(args.seeds):
            for way, epochs in plan:
                name = name_of("mnist-mlp", seed, way, epochs)
                if name not in results.runs(BENCHMARK):
                    told = {
                        "command": "python -m benchmarks.training_cost.time_to_accuracy",
                        "way": way,
                    }
                    results.save(
                        BENCHMARK,
                        name,
                        told | train_network(way, epochs, seed, data) | {"target": SPARSITY},
                    )
    table()


if __name__ == "__main__":
    main()
