"""Compare the results of the same training on three backends: results/backend_agreement.

python -m benchmarks.accuracy.backend_agreement mnist-mlp --seeds 3
python -m benchmarks.accuracy.backend_agreement --table

NumPy draws the initial weights and the order of the batches, so that the backends differ only in
their arithmetic. Networks, data and number of epochs are defined in `benchmarks.accuracy.methods`.
Runs that are already stored are skipped.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import tempfile

from benchmarks import results
from benchmarks.backends import BACKENDS, run_on

BENCHMARK = "backend_agreement"
SPARSITY = 0.9
PAIRS = list(itertools.combinations(BACKENDS, 2))


def initialized_by_numpy(net, seed):
    """Initialize the kernels of a network with NumPy, by the He normal initialization."""
    import numpy as np

    rng = np.random.default_rng(seed)
    model = net()
    for variable in model.trainable_variables:
        if len(variable.shape) > 1:
            fan_in = np.prod(variable.shape[:-1])
            variable.assign(np.sqrt(2 / fan_in) * rng.standard_normal(variable.shape))
    return model


def train(task_name, seed, folder):
    """Train a network with each method on this backend. Save the results and masks in a folder."""
    import keras
    import numpy as np

    from benchmarks.accuracy import methods

    backend = keras.backend.backend()
    task = methods.TASKS[task_name]
    data = task.data()
    task = dataclasses.replace(
        task,
        net=functools.partial(initialized_by_numpy, task.net, seed),
        batches=task.batches or methods.Shuffled,
    )
    for method in methods.METHODS:
        model, found = methods.train_network(task, method, SPARSITY, seed, data)
        masks = [
            keras.ops.convert_to_numpy(v).ravel() != 0
            for v in model.trainable_variables
            if len(v.shape) > 1
        ]
        name = methods.name_of("across", task_name, seed, method)
        np.save(folder / f"{name}.npy", np.concatenate(masks))
        (folder / f"{name}.json").write_text(json.dumps(found))
    names = {
        method: methods.name_of("across", task_name, seed, method) for method in methods.METHODS
    }
    (folder / f"{backend}.json").write_text(json.dumps(names))


def compare(task_name, seed):
    """Train a network on all backends. Store the results and the overlaps between the masks."""
    import numpy as np

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for backend in BACKENDS:
            arguments = (
                task_name,
                "--backend",
                backend,
                "--seed",
                str(seed),
                "--folder",
                temporary,
            )
            run_on(backend, "accuracy.backend_agreement", *arguments)
        names = {b: json.loads((folder / f"{b}.json").read_text()) for b in BACKENDS}
        rows = {}
        for method in names[BACKENDS[0]]:
            files = {b: folder / names[b][method] for b in BACKENDS}
            runs = {
                b: json.loads(f.with_name(f.name + ".json").read_text()) for b, f in files.items()
            }
            masks = {b: np.load(f.with_name(f.name + ".npy")) for b, f in files.items()}
            rows[method] = {
                "config": runs[BACKENDS[0]]["config"],
                "test_accuracy": {b: run["test_accuracy"] for b, run in runs.items()},
                "sparsity": {b: run["sparsity"] for b, run in runs.items()},
                "seconds": {b: run["seconds"] for b, run in runs.items()},
                "overlap": {
                    f"{a} {b}": float((masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum())
                    for a, b in PAIRS
                },
            }
    some = runs[BACKENDS[0]]
    told = {
        "command": f"python -m benchmarks.accuracy.backend_agreement {task_name}",
        "net": some["net"],
    }
    told |= {"backend": ", ".join(BACKENDS)}
    told |= {"epochs": some["epochs"], "seed": seed, "target": SPARSITY, "methods": rows}
    results.save(BENCHMARK, f"{task_name}_seed{seed}", told)


def table():
    lines = [
        "# Agreement of backends",
        "",
        "Every backend trains with the same network, initial weights, order of batches, method "
        f"and number of epochs. The target sparsity is {SPARSITY:.0%}. The table below shows the "
        "test accuracy in % after the last epoch, the sparsity, and the overlap of the masks of "
        "two backends. The overlap of two masks is the number of weights that both masks keep, "
        "divided by the number of weights that at least one mask keeps. All figures in the table "
        "are means over the seeds. Two random masks would have an overlap of 5 %. `make "
        "bench-agreement` writes this page from `results/backend_agreement/runs.jsonl`.",
    ]
    found: dict = {}
    for run in results.runs(BENCHMARK).values():
        found.setdefault((run["net"], run["epochs"]), []).append(run["methods"])
    for (net, epochs), seeds in found.items():
        lines += ["", f"## {net}, {epochs} epochs, seeds: {len(seeds)}", ""]
        titles = results.TITLES
        pairs = (f"{titles[a]}, {titles[b]}" for a, b in PAIRS)
        heads = [*(titles[b] for b in BACKENDS), "sparsity", *pairs]
        lines += [f"| method | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
        for method in seeds[0]:
            runs = [seed[method] for seed in seeds]
            cells = [
                results.mean_std([100 * r["test_accuracy"][b] for r in runs]) for b in BACKENDS
            ]
            reached = sorted({f"{r['sparsity'][b]:.2%}" for r in runs for b in BACKENDS})
            cells.append(" to ".join(dict.fromkeys((reached[0], reached[-1]))))
            for a, b in PAIRS:
                cells.append(f"{sum(r['overlap'][f'{a} {b}'] for r in runs) / len(runs):.1%}")
            lines.append(f"| {method} | {' | '.join(cells)} |")
    results.write_index(BENCHMARK, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", help="a task of benchmarks.accuracy.methods")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    worker = parser.add_argument_group("arguments of the process that runs one backend")
    worker.add_argument("--backend", choices=BACKENDS)
    worker.add_argument("--seed", type=int)
    worker.add_argument("--folder", type=pathlib.Path)
    args = parser.parse_args()
    if args.backend:
        # Use one core for this process, before any library starts its threads.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        train(args.task, args.seed, args.folder)
        return
    for seed in range(args.seeds) if args.task else ():
        if f"{args.task}_seed{seed}" not in results.runs(BENCHMARK):
            compare(args.task, seed)
    table()


if __name__ == "__main__":
    main()
