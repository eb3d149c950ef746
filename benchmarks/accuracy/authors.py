"""Compare pruning methods of keras_dst with the code of their authors: results/authors.

python -m benchmarks.accuracy.authors dst --code PATH --seeds 3
    Train with DST, once with keras_dst and once with the authors' code. PATH is a checkout of
    the authors' repository, which is listed in REPOSITORIES.

python -m benchmarks.accuracy.authors --table
    Write the table from the stored runs.

Both implementations train the same network from the same initial weights, with the same data,
number of epochs, batch size, learning rate and momentum. Accuracy is the test accuracy after the
last epoch. Runs that are already stored are skipped.
"""

import argparse
import collections
import dataclasses
import functools
import pathlib
import subprocess
from collections.abc import Callable

from benchmarks import networks, results
from benchmarks.accuracy import methods
from benchmarks.accuracy.methods import TASKS, Task
from benchmarks.data import mnist
from keras_dst.schedules import Geometric

BENCHMARK = "authors"
REPOSITORIES = {
    "dst": "junjieliu2910/DynamicSparseTraining",
    "flipout": "AndreiXYZ/flipout",
    "optg": "zyxxmu/OptG",
    "dcil": "Jangho-Kim/DCIL-pytorch",
}


@dataclasses.dataclass
class Case:
    """Network, method and sparsity of one comparison between keras_dst and the authors' code."""

    name: str
    family: str  # Key of REPOSITORIES.
    method: str  # Key of `benchmarks.accuracy.methods.METHODS`.
    sparsity: float | None
    task: Task
    schedule: Callable | None = None  # Sparsity schedule. None: the default.
    # Constructor arguments of the method in keras_dst, besides the sparsity.
    options: dict = dataclasses.field(default_factory=dict)


def halvings(events):
    """Yield one comparison for FlipOut and one comparison for magnitude pruning.

    In both comparisons, half of the remaining weights are pruned after every epoch except the last.
    `events` is the number of pruning steps.
    """
    sparsity = 1 - 0.5**events
    task = dataclasses.replace(TASKS["mnist"], epochs=events + 1)
    schedule = functools.partial(Geometric, end=events / (events + 1), rate=0.5)
    # FlipOut in keras_dst has other defaults in short training runs, so pass the values of the
    # paper.
    paper = {"noise": 1.0, "rate": 0.5}
    yield Case(f"flipout-{sparsity:.4g}", "flipout", "FlipOut", sparsity, task, options=paper)
    yield Case(f"magnitude-{sparsity:.4g}", "flipout", "Magnitude", sparsity, task, schedule)


LENET = Task(
    "LeNet-300-100, MNIST",
    networks.lenet_300_100,
    mnist,
    20,
    0.01,
    batch=64,
    rates=lambda rate, steps: rate,
)
LENET_5 = dataclasses.replace(TASKS["mnist"], epochs=10)
# Train without weight decay, because Keras and PyTorch define weight decay differently.
RESNET = dataclasses.replace(TASKS["cifar10"], decay=None)
CASES = [
    Case("dst", "dst", "DST", None, LENET),
    *(case for events in (4, 6, 10) for case in halvings(events)),
    Case("optg-0.9", "optg", "OptG", 0.9, LENET_5, options={"beta": 1.0}),
    Case("dcil-0.9", "dcil", "DCIL", 0.9, RESNET),
]


def run_keras_dst(case, seed, data):
    from benchmarks.accuracy import (
        authors_code,  # Import PyTorch only here, because `--table` must work without PyTorch.
    )

    task = dataclasses.replace(
        case.task, net=lambda: authors_code.with_initial_weights(case.family, seed, case.task.net())
    )
    sparsity = case.schedule(case.sparsity) if case.schedule else case.sparsity
    return methods.run(task, case.method, sparsity, seed, data, **case.options)


def run(family, code, seeds):
    from benchmarks.accuracy import authors_code

    head = ["git", "-C", code, "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    authors_code.prepare(code, family)
    for case in (case for case in CASES if case.family == family):
        data = case.task.data()
        for seed in range(seeds):
            for implementation, train in (
                ("authors", authors_code.run),
                ("keras_dst", run_keras_dst),
            ):
                name = f"{case.name}_{implementation}_seed{seed}"
                if name in results.runs(BENCHMARK):
                    continue
                told = {
                    "command": f"python -m benchmarks.accuracy.authors {family}",
                    "repository": REPOSITORIES[family],
                    "commit": commit,
                    "case": case.name,
                    "implementation": implementation,
                    "net": case.task.title,
                    "epochs": case.task.epochs,
                    "seed": seed,
                }
                results.save(
                    BENCHMARK, name, told | train(case, seed, data) | {"target": case.sparsity}
                )


def table():
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    commits = {}
    for run in results.runs(BENCHMARK).values():
        found[run["case"]][run["implementation"]].append(run)
        commits[run["repository"]] = run["commit"]
    lines = [
        "# Comparison with the authors' code",
        "",
        "The table below shows the test accuracy in % after the last epoch as mean and standard "
        "deviation over the seeds. The number in brackets is the sparsity. The authors' code and "
        "keras_dst train the same network from the same initial weights. The authors' code and "
        "keras_dst also use the same data, number of epochs, batch size and learning rate. The "
        "authors' code runs on PyTorch, on a CPU. `make bench-authors` writes this page from "
        "`results/authors/runs.jsonl`.",
        "",
        "| method | network | epochs | target | seeds | authors' code | keras_dst | backend of "
        "keras_dst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        authors, keras_dst = (found[case.name][key] for key in ("authors", "keras_dst"))
        if authors and keras_dst:
            asked = "none" if case.sparsity is None else f"{case.sparsity:.2%}"
            seeds = min(len(authors), len(keras_dst))
            cells = [case.method, case.task.title, case.task.epochs, asked, seeds]
            for runs in (authors, keras_dst):
                reached = sum(run["sparsity"] for run in runs) / len(runs)
                cells.append(
                    f"{results.mean_std([100 * r['test_accuracy'] for r in runs])} ({reached:.2%})"
                )
            cells.append(keras_dst[0]["backend"])
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| authors' code | commit |", "|---|---|"]
    lines += [f"| {name} | {commit[:10]} |" for name, commit in sorted(commits.items())]
    results.write_index(BENCHMARK, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "family", nargs="?", choices=REPOSITORIES, help="method whose code is compared"
    )
    parser.add_argument("--code", type=pathlib.Path, help="a checkout of the authors' repository")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.family:
        if args.code is None:
            parser.error("expected --code PATH, a checkout of the authors' repository")
        run(args.family, args.code, args.seeds)
    table()


if __name__ == "__main__":
    main()
