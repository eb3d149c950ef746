"""What a pattern costs: methods at equal sparsity, weights pruned alone or together.

One JSON per run, and results/patterns.md. Nets, data and budget are those of `benchmarks.methods`.
Runs whose JSON is there already are not run again.

python -m benchmarks.patterns mnist-mlp --seeds 3
python -m benchmarks.patterns cifar10 --seeds 1 --methods Magnitude
python -m benchmarks.patterns --table
    the table alone, from the JSON files that are there.
"""

import argparse
import collections
import json

from benchmarks.backends import RESULTS, write_page
from benchmarks.common import save, spread
from benchmarks.methods import METHODS, TASKS, name_of, run

#: Methods that prune weights by a score, alone, in blocks along the inputs, or whole channels.
SCORED = [name for name in METHODS if name not in ("dense", "random", "Consensus")]
PATTERNS = ("unstructured", "1x4", "1x16", "channel")
SPARSITIES = (0.9, 0.95)


def table():
    found = collections.defaultdict(list)
    for path in sorted(RESULTS.glob("patterns_*_seed*.json")):
        run = json.loads(path.read_text())
        key = run["net"], run["epochs"], run["backend"]
        found[key, run["target"], run["method"], run["pattern"]].append(100 * run["test_accuracy"])
    lines = [
        "# What a pattern costs",
        "",
        "Test accuracy in % after the last epoch, mean and standard deviation over the seeds. Same "
        "net, data, optimiser and number of epochs for every method and pattern, tuned for none. "
        "Blocks are consecutive inputs of one unit; a channel is all that makes one unit. "
        "Made by `make bench-patterns` from the JSON files here.",
    ]
    for net, epochs, backend in dict.fromkeys(key for key, *_ in found):
        lines += ["", f"## {net}, {epochs} epochs, {backend}", ""]
        lines += ["| method | sparsity | seeds | " + " | ".join(PATTERNS) + " |"]
        lines += ["|---|---|---|" + "---|" * len(PATTERNS)]
        for sparsity in SPARSITIES:
            for method in SCORED:
                runs = [found.get(((net, epochs, backend), sparsity, method, p)) for p in PATTERNS]
                if any(runs):
                    cells = [spread(some) if some else "" for some in runs]
                    row = [method, f"{sparsity:.0%}", str(max(len(some or ()) for some in runs))]
                    lines.append("| " + " | ".join(row + cells) + " |")
    write_page(RESULTS / "patterns.md", lines)


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
                        name = name_of("patterns", args.task, seed, method, sparsity, pattern)
                        if not (RESULTS / f"{name}.json").exists():
                            command = f"python -m benchmarks.patterns {args.task}"
                            found = run(
                                TASKS[args.task], method, sparsity, seed, data, pattern=pattern
                            )
                            save(name, {"command": command, "pattern": pattern} | found)
    table()


if __name__ == "__main__":
    main()
