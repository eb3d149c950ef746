"""Compare all methods on the same networks, data and number of epochs: results/methods.

python -m benchmarks.accuracy.methods mnist --seeds 3
    Train LeNet-5 on MNIST for 5 epochs.

python -m benchmarks.accuracy.methods cifar10 --seeds 1
    Train ResNet-8 on CIFAR-10 for 3 epochs, with crops and flips. The first convolution has stride
    2.

python -m benchmarks.accuracy.methods --table
    Write the table from the stored runs.

All methods are trained by SGD with momentum 0.9, batch size 128 and a cosine learning rate. The
hyperparameters of the methods are not tuned. Accuracy is the test accuracy of the stripped model
after the last epoch. Runs that are already stored are skipped.
"""

import argparse
import collections
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

import keras_dst
from benchmarks import networks, results
from benchmarks.data import apply_method, cifar10, mnist
from keras_dst.methods import DCIL, DST, SET, ST3, Consensus, FlipOut, Magnitude, OptG, RigL

BENCHMARK = "methods"
BATCH = 128


class Shuffled(keras.utils.PyDataset):
    """Shuffled batches, whose order is the same on every backend because NumPy draws the order."""

    def __init__(self, x, y, seed):
        super().__init__()
        self.x, self.y, self.rng = x, y, np.random.default_rng(seed)
        self.order = self.rng.permutation(len(y))

    def __len__(self):
        return len(self.y) // BATCH

    def __getitem__(self, index):
        chosen = self.order[index * BATCH : (index + 1) * BATCH]
        return self.x[chosen], self.y[chosen]

    def on_epoch_end(self):
        self.order = self.rng.permutation(len(self.y))


class Augmented(Shuffled):
    """Shuffled batches whose images are randomly shifted by up to four pixels and flipped."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
        rows, columns = self.rng.integers(0, 9, (2, BATCH, 1)) + np.arange(self.x.shape[1])
        x = padded[np.arange(BATCH)[:, None, None], rows[:, :, None], columns[:, None, :]]
        flipped = self.rng.random(BATCH) < 0.5
        x[flipped] = x[flipped, :, ::-1]
        return x, y


def cosine(rate, steps):
    """Return a learning rate schedule that decays to 0 along a cosine."""
    return keras.optimizers.schedules.CosineDecay(rate, steps)


@dataclass
class Task:
    """Training task: a network, its data, and the number of epochs."""

    title: str
    net: Callable
    data: Callable
    epochs: int
    rate: float
    decay: float | None = None
    batch: int = BATCH
    # Class of the data loader. If None, `fit` shuffles the samples.
    batches: type[Shuffled] | None = None
    # Function that maps a learning rate and a number of steps to a learning rate schedule.
    rates: Callable = cosine


TASKS = {
    "mnist-mlp": Task("LeNet-300-100, MNIST", networks.lenet_300_100, mnist, 5, 0.05),
    "mnist": Task("LeNet-5, MNIST", networks.lenet_5, mnist, 5, 0.05),
    "cifar10": Task(
        "ResNet-8 with a first stride of 2, CIFAR-10",
        lambda: networks.resnet(8, stride=2),
        cifar10,
        3,
        0.1,
        5e-4,
        batches=Augmented,
    ),
}

# Functions that take the sparsity as first argument, and return a pruning method.
METHODS = {
    "dense": None,
    "random": functools.partial(SET, drop_fraction=0.0),
    "Magnitude": Magnitude,
    "Magnitude, revival": functools.partial(Magnitude, revival=True),
    "SET": SET,
    "RigL": RigL,
    "FlipOut": FlipOut,
    "FlipOut, no noise": functools.partial(FlipOut, noise=0.0),
    "DST": lambda s, **options: DST(sparsity=s, **options),
    "DCIL": DCIL,
    "ST-3": ST3,
    "OptG": OptG,
    # Consensus removes whole units. With `cost="parameters"`, a unit costs as much as its weights.
    "Consensus": lambda s: Consensus(s, cost="parameters"),
}
SPARSITIES = (0.9, 0.98)
ALSO = {"Consensus": (0.5,)}  # The paper of Consensus uses a sparsity of 0.5.


def run(task, method_name, sparsity, seed, data, **options):
    """Train and test a network.

    Return the test accuracy, the sparsity and the training time in seconds.
    """
    return train_network(task, method_name, sparsity, seed, data, **options)[1]


def train_network(task, method_name, sparsity, seed, data, **options):
    """Train and test a network. Return the network and the results of the run."""
    make = METHODS[method_name]
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    (x, y), test = data
    model = task.net()
    rates = task.rates(task.rate, task.epochs * (len(y) // task.batch))
    optimizer = keras.optimizers.SGD(rates, momentum=0.9, weight_decay=task.decay)
    method = make and make(sparsity, **options)
    optimizer = apply_method(method, model, optimizer)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    whole = len(y) // task.batch * task.batch
    batches = (task.batches(x, y, seed),) if task.batches else (x[:whole], y[:whole])
    begin = time.perf_counter()
    history = model.fit(
        *batches,
        batch_size=None if task.batches else task.batch,
        shuffle=task.batches is None,  # `Shuffled` shuffles the batches.
        epochs=task.epochs,
        verbose=0,
        callbacks=[keras_dst.callbacks.SparseTraining()] if method else [],
    )
    seconds = time.perf_counter() - begin
    keras_dst.strip(model)
    accuracy = model.evaluate(*test, batch_size=500, verbose=0, return_dict=True)["accuracy"]
    report = keras_dst.report(model)
    removed = report.sparsity
    # For Consensus, the sparsity is the fraction of the parameters that `shrink` removes.
    if method_name == "Consensus":
        removed = 1 - keras_dst.shrink(model).count_params() / model.count_params()
    print(f"{task.title} {method!r} seed {seed}: {accuracy:.4f}", flush=True)
    return model, {
        "net": task.title,
        "method": method_name,
        "config": repr(method),
        "target": sparsity,
        "seed": seed,
        "epochs": task.epochs,
        "test_accuracy": accuracy,
        "sparsity": removed,
        "layers": {row.name: row.density for row in report.layers},
        "seconds": seconds,
        "history": {k: [float(v) for v in values] for k, values in history.history.items()},
    }


def name_of(task, seed, method, *rest):
    """Return the name under which a run is stored."""
    method = method.lower().replace(", ", "-").replace(" ", "-")
    kind = "_".join(map(str, [method] if method == "dense" else [method, *rest]))
    return f"{task}_{kind}_{keras.backend.backend()}_seed{seed}"


def table():
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in results.runs(BENCHMARK).values():
        target = "" if run["method"] == "dense" else run["target"]
        found[run["net"], run["epochs"], run["backend"]][run["method"], target].append(run)
    lines = [
        "# Accuracy of methods after short training",
        "",
        "The tables below show the test accuracy in % after the last epoch as mean and standard "
        "deviation over the seeds. The number in brackets is the sparsity, the fraction of zero "
        "weights. For Consensus, the number in brackets is the fraction of the parameters that "
        "`shrink` removes. Every method is trained with the same network, data, optimizer and "
        "number of epochs. The hyperparameters of the methods are not tuned. `make bench-methods` "
        "writes this page from `results/methods/runs.jsonl`.",
    ]
    for (net, epochs, backend), runs in found.items():
        lines += ["", f"## {net}, {epochs} epochs, {results.TITLES[backend]}", ""]
        targets = sorted({target for _, target in runs if target != ""})
        lines += ["| method | seeds | " + " | ".join(f"{t:.0%} sparse" for t in targets) + " |"]
        lines += ["|---|---|" + "---|" * len(targets)]
        for method in METHODS:
            cells = []
            for target in targets:
                some = runs.get((method, "" if method == "dense" else target), [])
                reached = sum(r["sparsity"] for r in some) / len(some) if some else 0
                accuracies = [100 * r["test_accuracy"] for r in some]
                cells.append(f"{results.mean_std(accuracies)} ({reached:.1%})" if some else "")
            seeds = max(
                (len(some) for (name, _), some in runs.items() if name == method), default=0
            )
            if seeds:
                lines.append(f"| {method} | {seeds} | " + " | ".join(cells) + " |")
    results.write_index(BENCHMARK, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.task:
        data = TASKS[args.task].data()
        for seed in range(args.seeds):
            for method in args.methods:
                for sparsity in (*SPARSITIES, *ALSO.get(method, ())):
                    name = name_of(args.task, seed, method, sparsity)
                    if name not in results.runs(BENCHMARK):
                        command = f"python -m benchmarks.accuracy.methods {args.task}"
                        found = run(TASKS[args.task], method, sparsity, seed, data)
                        results.save(
                            BENCHMARK, name, {"command": command, "task": args.task} | found
                        )
    table()


if __name__ == "__main__":
    main()
