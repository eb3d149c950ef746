"""Compare the accuracy of sparsity patterns at equal sparsity: results/patterns.

Networks, data and number of epochs are defined in `benchmarks.accuracy.methods`. Runs that are
already stored are skipped.
"""

import argparse
import collections

from benchmarks import results
from benchmarks.accuracy.methods import METHODS, TASKS, name_of, run

BENCHMARK = "patterns"
#: Methods that rank weights by scores, and can therefore prune single weights, blocks and channels.
SCORED = [name for name in METHODS if name not in ("dense", "random", "Consensus")]
PATTERNS = ("unstructured", "1x4", "1x16", "channel")
SPARSITIES = (0.9, 0.95)


def table():
    found = collections.defaultdict(list)
    for stored in results.runs(BENCHMARK).values():
        key = stored["net"], stored["epochs"], stored["backend"]
        found[key, stored["target"], stored["method"], stored["pattern"]].append(
            100 * stored["test_accuracy"]
        )
    lines = [
        "# Accuracy by pattern",
        "",
        "The tables below show the test accuracy in % after the last epoch as mean and standard "
        "deviation over the seeds. Every method and pattern is trained with the same network, "
        "data, optimizer and number of epochs. The hyperparameters of the methods are not tuned. "
        "A block contains the weights of consecutive inputs of one output unit. A channel "
        "contains all weights of one output unit. `make bench-patterns` writes this page from "
        "`results/patterns/runs.jsonl`.",
    ]
    for net, epochs, backend in dict.fromkeys(key for key, *_ in found):
        lines += ["", f"## {net}, {epochs} epochs, {results.TITLES[backend]}", ""]
        lines += ["| method | sparsity | seeds | " + " | ".join(PATTERNS) + " |"]
        lines += ["|---|---|---|" + "---|" * len(PATTERNS)]
        for sparsity in SPARSITIES:
            for method in SCORED:
                runs = [found.get(((net, epochs, backend), sparsity, method, p)) for p in PATTERNS]
                if any(runs):
                    cells = [results.mean_std(some) if some else "" for some in runs]
                    row = [method, f"{sparsity:.0%}", str(max(len(some or ()) for some in runs))]
                    lines.append("| " + " | ".join(row + cells) + " |")
    results.write_index(BENCHMARK, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=SCORED, choices=SCORED)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.task:
        data = TASKS[args.task].data()
        for seed in range(args.seeds):
            for method in args.methods:
                for sparsity in SPARSITIES:
                    for pattern in PATTERNS:
                        name = name_of(args.task, seed, method, sparsity, pattern)
                        if name not in results.runs(BENCHMARK):
                            command = f"python -m benchmarks.accuracy.patterns {args.task}"
                            found = run(
                                TASKS[args.task], method, sparsity, seed, data, pattern=pattern
                            )
                            results.save(
                                BENCHMARK, name, {"command": command, "pattern": pattern} | found
                            )
    table()


if __name__ == "__main__":
    main()
