"""Measure the cost of training a sparse network to a given accuracy: results/time_to_accuracy.

python -m benchmarks.training_cost.time_to_accuracy --seeds 3
python -m benchmarks.training_cost.time_to_accuracy --table

LeNet-300-100 trains on MNIST to 95 % sparsity, as in `benchmarks.accuracy.methods`, with budgets of
2 to 10 epochs. Each method prunes during training. The baseline is train, prune, fine-tune: half of
the epochs dense, then all pruning at once, then the other half with the learning rate at its top
again. The result is the smallest budget whose mean accuracy over the seeds reaches the goal: the
accuracy of the dense network after five epochs minus half a point. Stored runs are not repeated.

Every weight of this network is multiplied once per sample, so operations follow from density: two
per product, in three products per step (outputs, gradients of inputs, gradients of weights). This
library executes dense products. The column for skipped zeros counts the products at the mean
density of each epoch. Methods that may revive a weight (`ALIVE`) need the gradients of all weights.
RigL needs them only in the step before an update, which is not counted.
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
LESS = 0.005  # accepted loss of accuracy
PRUNED_LATER = "train, prune, fine-tune"
METHODS = (PRUNED_LATER, "Magnitude", "DST", "DCIL", "OptG", "FlipOut", "SET", "RigL")
PATHS = {"DCIL": 2}  # forward passes per step
ALIVE = ("DST", "DCIL", "OptG")
SPARSE_FROM_THE_START = ("SET", "RigL")


def twice(rate, steps):
    """Return a learning rate that falls to 0 twice, in each half of training."""
    schedules = keras.optimizers.schedules
    return schedules.CosineDecayRestarts(rate, steps // 2, t_mul=1.0, m_mul=1.0)


def trained(method, epochs, seed, data):
    """Train one network; return the figures of the run."""
    task = dataclasses.replace(TASKS["mnist-mlp"], epochs=epochs)
    if method != PRUNED_LATER:
        return run(task, method, SPARSITY, seed, data)
    task = dataclasses.replace(task, rates=twice)
    return run(task, "Magnitude", Constant(SPARSITY, begin=0.5), seed, data)


def densities(result) -> list[float]:
    """Return the density of every epoch, the mean of its start and its end."""
    way, epochs = result["way"], result["epochs"]
    if way == "dense":
        return [1.0] * epochs
    if way == PRUNED_LATER:
        return [1.0] * (epochs // 2) + [1 - SPARSITY] * (epochs // 2)
    ends = [1 - sparsity for sparsity in result["history"]["sparsity"]]
    first = ends[0] if way in SPARSE_FROM_THE_START else 1.0
    return [(a + b) / 2 for a, b in itertools.pairwise([first, *ends])]


def operations(result) -> tuple[float, float]:
    """Return the operations of a training in units of a dense epoch.

    The first number counts executed operations, the second the operations with zeros skipped.
    """
    paths = PATHS.get(result["way"], 1)
    left = 0.0
    for density in densities(result):
        over_all = density + paths - 1  # the second path is dense
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
        "# Cost of training to a given accuracy",
        "",
        f"LeNet-300-100 on MNIST, {SPARSITY:.0%} sparse. `epochs` is the smallest budget, of "
        f"{', '.join(map(str, EPOCHS))}, whose mean test accuracy over {len(dense)} seeds "
        f"reaches {100 * goal:.2f} %: the accuracy of the dense network after five epochs minus "
        f"{100 * LESS:g} points. Operations of the whole training are given in units of a dense "
        "epoch, as executed and with every zero skipped. Seconds are the duration of `fit`, "
        f"with compile time. All runs ended within {100 * apart:.2f} points of the target. `make "
        "bench-time-to-accuracy` writes this page from the runs in this folder.",
        "",
        "| | epochs | accuracy | operations | zeros skipped | seconds |",
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
                        told | trained(way, epochs, seed, data) | {"target": SPARSITY},
                    )
    table()


if __name__ == "__main__":
    main()
