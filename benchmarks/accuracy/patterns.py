"""What a pattern costs: methods at equal sparsity, weights pruned alone or together.

One JSON per run, and results/patterns.md. Nets, data and budget are those of
`benchmarks.accuracy.methods`.
Runs whose JSON is there already are not run again.

python -m benchmarks.accuracy.patterns mnist-mlp --seeds 3
python -m benchmarks.accuracy.patterns cifar10 --seeds 1 --methods Magnitude
python -m benchmarks.accuracy.patterns --table
    the table alone, from the JSON files that are there.
"""

import argparse
import collections

from benchmarks import results
from benchmarks.accuracy.methods import METHODS, TASKS, name_of, run

#: Methods that prune weights by a score, alone, in blocks along the inputs, or whole channels.
BENCHMARK = "patterns"
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
        "# What a pattern costs",
        "",
        "Test accuracy in % after the last epoch, mean and standard deviation over the seeds. Same "
        "net, data, optimiser and number of epochs for every method and pattern, tuned for none. "
        "Blocks are consecutive inputs of one unit; a channel is all that makes one unit. "
        "Made by `make bench-patterns` from the runs next to this page.",
    ]
    for net, epochs, backend in dict.fromkeys(key for key, *_ in found):
        lines += ["", f"## {net}, {epochs} epochs, {backend}", ""]
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
