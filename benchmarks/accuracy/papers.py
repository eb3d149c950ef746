"""Train networks on CIFAR-10 for as many epochs as in the papers: results/papers.

python -m benchmarks.accuracy.papers --nets resnet-32-16 --jobs 4
    Train a network with every method, sparsity and seed of its table. Four training runs share the
    GPU. Runs that are already stored are skipped.

python -m benchmarks.accuracy.papers --nets resnet-32-16 --methods DCIL --sparsities 0.95 \
    --seeds 0 --minutes 10 --backup FOLDER
    Train one network for at most ten minutes. A backup is written after each epoch, so the command
    can be stopped at any time. To continue from the backup, repeat the command, on the same or on
    another machine. After the last epoch, the command stores the results in results/papers.

python -m benchmarks.accuracy.papers --nets resnet-32-16 --images 640 --epochs 20 --batch 32
    Train and test on fewer images, for fewer epochs or with smaller batches. The results of such
    trial runs are stored only in the folder of the backup.

python -m benchmarks.accuracy.papers --table
    Write the tables from the stored runs.

All methods are trained by SGD with Nesterov momentum 0.9 and batch size 128. All trainable weights
are L2-regularized. In the common recipe, the learning rate rises for five epochs, and then decays
along a cosine. The images are randomly cropped and flipped. A separate thread prepares the images
of the next epoch. Accuracy is the test accuracy of the stripped model after the last epoch.

In ResNet-56, the methods prune whole channels, and the sparsity is the removed fraction of the
FLOPs. Consensus removes whole units, so it is compared only with methods that prune channels.
"""

import argparse
import collections
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
from keras import layers, ops

import keras_dst
from benchmarks import results
from benchmarks.accuracy import channels
from benchmarks.accuracy.methods import METHODS as COMMON
from benchmarks.data import apply_method, load
from keras_dst.methods import DST, ST3, Consensus

BENCHMARK = "papers"
BATCH = 128
WARMUP = 5  # Epochs in which the learning rate rises.
SEEDS = (0, 1, 2)

# Functions that take the sparsity, and return a pruning method.
METHODS = {
    "DCIL": COMMON["DCIL"],
    "OptG": COMMON["OptG"],
    "ST-3": COMMON["ST-3"],
    "ST-3 sigma": lambda s: ST3(s, sigma=True),
    "Magnitude": COMMON["Magnitude"],
    "Magnitude, revival": COMMON["Magnitude, revival"],
    "DST": lambda s: DST(sparsity=s, alpha=5e-6),
    "RigL": COMMON["RigL"],
    "SET": COMMON["SET"],
    "FlipOut": COMMON["FlipOut"],
}
CHANNEL_METHODS = {
    **{name: lambda s, name=name: channels.methods(s)[name] for name in channels.methods(0.5)},
    "Consensus": Consensus,
}


@dataclass(frozen=True)
class Recipe:
    """Training recipe.

    Args:
        epochs: Number of epochs.
        rate: Maximum of the learning rate.
        decay: Weight decay.
        drops: Fractions of training after which the learning rate is divided by 10. Defaults to
            `()`, which means that the learning rate decays to 0 along a cosine instead.
        nets, methods: Networks and methods that are trained by default. Defaults to None, which
            means all networks and all methods.
    """

    epochs: int
    rate: float
    decay: float
    drops: tuple[float, ...] = ()
    nets: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None


RECIPES = {
    "common": Recipe(100, 0.1, 5e-4),
    "dcil": Recipe(300, 0.2, 1e-4, (0.5, 0.75), ("resnet-32-16",), ("dense", "dcil")),
}

# Test accuracies in percent that a paper reports for its own recipe.
PUBLISHED = {("dcil", "resnet-32-16"): ("DCIL, in its paper", {0.9: "92.74", 0.95: "92.11"})}


class Epochs(keras.utils.PyDataset):
    """Epochs of randomly shifted and flipped images.

    All backends use the same random shifts and flips. The shifts and flips stay the same if
    training continues from a backup.

    Args:
        x, y: Images with 8-bit pixels, and their class labels.
        seed: Seed of the batch order, the shifts and the flips.
        epoch: Index of the first epoch to train.
        batch: Number of images in a batch.
    """

    def __init__(self, x, y, seed, epoch=0, batch=BATCH):
        super().__init__()
        self.y, self.batch, self.rng = y, batch, np.random.default_rng(seed)
        self.padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
        border = np.ones(self.padded.shape[1:3], bool)
        border[4:-4, 4:-4] = False
        self.padded[:, border] = x.mean((0, 1, 2)).astype("uint8")
        for _ in range(epoch):
            self._draw()
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.now, self.coming = self._images(), self.pool.submit(self._images)

    def _draw(self):
        """Return the order of the images in an epoch, and the shift and flip of each image."""
        n = len(self.y)
        order = self.rng.permutation(n)
        shifts = self.rng.integers(0, 9, n), self.rng.integers(0, 9, n)
        return order, *shifts, self.rng.random(n) < 0.5

    def _images(self):
        order, rows, columns, flipped = self._draw()
        size = self.padded.shape[1] - 8
        x = np.empty((len(order), size, size, 3), "uint8")
        for row in range(9):
            for column in range(9):
                here = np.flatnonzero((rows == row) & (columns == column))
                x[here] = self.padded[order[here], row : row + size, column : column + size]
        x[flipped] = x[flipped, :, ::-1]
        return x, self.y[order]

    def __len__(self):
        return len(self.y) // self.batch

    def __getitem__(self, index):
        chosen = slice(index * self.batch, (index + 1) * self.batch)
        return tuple(part[chosen] for part in self.now)

    def on_epoch_end(self):
        self.now, self.coming = self.coming.result(), self.pool.submit(self._images)


@keras.saving.register_keras_serializable("keras_dst.benchmarks")
class WarmRates(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate that rises for `warm` steps, and then decays until step `total`.

    Args:
        rate: Maximum of the learning rate.
        total: Number of steps of the training run.
        warm: Number of steps in which the learning rate rises.
        drops: Fractions of training after which the learning rate is divided by 10. Defaults to
            `()`, which means that the learning rate decays to 0 along a cosine instead.
    """

    def __init__(self, rate, total, warm, drops=()):
        self.rate, self.total, self.warm, self.drops = rate, total, warm, tuple(drops)

    def get_config(self):
        return {"rate": self.rate, "total": self.total, "warm": self.warm, "drops": self.drops}

    def __call__(self, step):
        t = ops.cast(step, "float32")
        rate = self.rate * ops.minimum(1.0, (t + 1) / max(self.warm, 1))
        if not self.drops:
            return rate * 0.5 * (1 + ops.cos(np.pi * ops.minimum(t / self.total, 1.0)))
        for drop in self.drops:
            rate = ops.where(t >= drop * self.total, 0.1 * rate, rate)
        return rate


def _convolved(x, filters, size, strides, l2):
    x = layers.Conv2D(
        filters, size, strides, padding="same", use_bias=False, kernel_initializer="he_normal",
        kernel_regularizer=l2,
    )(x)  # fmt: skip
    normal = layers.BatchNormalization(
        momentum=0.9, epsilon=1e-5, beta_regularizer=l2, gamma_regularizer=l2
    )
    return normal(x)


def _begin(x_train):
    """Return a symbolic input of images, and the standardized images."""
    x = x_train.astype("float32")
    mean, deviation = x.mean((0, 1, 2)), x.std((0, 1, 2))
    inputs = keras.Input((32, 32, 3), dtype="uint8")
    scales = [float(1 / d) for d in deviation]
    return inputs, layers.Rescaling(scales, [float(-m / d) for m, d in zip(mean, deviation)])(
        inputs
    )


def _head(inputs, x, l2):
    return keras.Model(inputs, layers.Dense(10, kernel_regularizer=l2, bias_regularizer=l2)(x))


def resnet(depth, width, x_train, decay):
    l2 = keras.regularizers.L2(decay / 2)
    inputs, x = _begin(x_train)
    x = layers.ReLU()(_convolved(x, width, 3, 1, l2))
    for filters in (width, 2 * width, 4 * width):
        for block in range((depth - 2) // 6):
            strides = 2 if filters > width and block == 0 else 1
            y = layers.ReLU()(_convolved(x, filters, 3, strides, l2))
            y = _convolved(y, filters, 3, 1, l2)
            if strides > 1:
                x = _convolved(x, filters, 1, strides, l2)
            x = layers.ReLU()(layers.Add()([x, y]))
    return _head(inputs, layers.GlobalAveragePooling2D()(x), l2)


def vgg_19(x_train, decay):
    l2 = keras.regularizers.L2(decay / 2)
    inputs, x = _begin(x_train)
    for number, width in ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512)):
        for _ in range(number):
            x = layers.ReLU()(_convolved(x, width, 3, 1, l2))
        x = layers.MaxPooling2D()(x)
    return _head(inputs, layers.Flatten()(x), l2)


@dataclass(frozen=True)
class Net:
    """Network of one table in results/papers. The table compares `methods` at `sparsities`.

    The title contains the numbers of channels, because papers use one name for networks of
    different widths.
    """

    title: str
    build: Callable
    methods: dict[str, Callable]
    sparsities: tuple[float, ...]


NETS = {
    name: Net(title, build, METHODS, (0.95, 0.9, 0.98))
    for name, title, build in (
        ("resnet-32-16", "ResNet-32 (16-32-64)", functools.partial(resnet, 32, 16)),
        ("resnet-32-32", "ResNet-32 (32-64-128)", functools.partial(resnet, 32, 32)),
        ("vgg-19", "VGG-19 (64-512)", vgg_19),
    )
}
NETS["resnet-56-16"] = Net(
    "ResNet-56 (16-32-64)", functools.partial(resnet, 56, 16), CHANNEL_METHODS, (0.5, 0.75)
)


@dataclass(frozen=True)
class Run:
    """Settings of one training run.

    Args:
        net: Key of `NETS`.
        method: Name of a method, or `"dense"`.
        sparsity: Final sparsity. The sparsity of a dense run is 0.
        seed: Seed of the initial weights and of the data.
        recipe: Key of `RECIPES`.
        images: Maximum number of training images, and of test images. Defaults to None, which means
            all images.
        epochs: Number of epochs. Defaults to None, which means the number of epochs of the recipe.
        batch: Number of images per batch. Defaults to None, which means 128 images.
    """

    net: str
    method: str
    sparsity: float
    seed: int
    recipe: str = "common"
    images: int | None = None
    epochs: int | None = None
    batch: int | None = None

    @property
    def is_short(self) -> bool:
        """Whether this run is a trial run, because `images`, `epochs` or `batch` is given."""
        return (self.images, self.epochs, self.batch) != (None, None, None)

    @property
    def length(self) -> int:
        """Number of epochs."""
        return RECIPES[self.recipe].epochs if self.epochs is None else self.epochs

    @property
    def name(self) -> str:
        """Name under which the run is stored."""
        kind = "dense" if self.method == "dense" else f"{_slug(self.method)}_{self.sparsity}"
        recipe = "" if self.recipe == "common" else f"{self.recipe}-recipe-"
        name = f"{self.net}_{kind}_{recipe}{self.length}_seed{self.seed}"
        if self.is_short:
            name += f"_{self.images or 'all'}-images_batch-{self.batch or BATCH}"
        return name

    @property
    def command(self) -> str:
        """Shell command that starts this training run."""
        method = _slug(self.method)
        command = f"make bench-papers NET={self.net} METHOD={method} SEED={self.seed}"
        command += "" if method == "dense" else f" SPARSITY={self.sparsity}"
        return command + ("" if self.recipe == "common" else f" RECIPE={self.recipe}")


class Paused(Exception):
    """Signal that the time limit is reached. The next command continues from the backup."""


class Log(keras.callbacks.Callback):
    """Callback that logs each epoch to a file and stops the training after the deadline.

    Args:
        path: File that receives one line per epoch.
        deadline: Value of `time.monotonic()` after which no further epoch begins. At least one
            epoch is trained.
    """

    def __init__(self, path, deadline=None):
        super().__init__()
        self.path, self.deadline = path, deadline

    def on_train_begin(self, logs=None):
        self.first = None

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.monotonic()
        if self.first is None:
            self.first = epoch
            # Drop the log rows of epochs after the backup, because `fit` trains these epochs again.
            rows = [row for row in self.rows() if row["epoch"] <= epoch]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif self.deadline is not None and self.start > self.deadline:
            raise Paused  # The backup on disk already contains the last finished epoch.

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1, "seconds": time.monotonic() - self.start}
        row |= {name: float(value) for name, value in logs.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self):
        return [*map(json.loads, self.path.read_text().splitlines())] if self.path.exists() else []


def data_of(run):
    """Return the training data and the test data of a run."""
    return tuple(
        (x[: run.images], y[: run.images].ravel().astype("int32")) for x, y in load("cifar10")
    )


def compiled(run, data, epoch=0):
    """Return the compiled model of a run, its pruning method, and its batches.

    The batches begin with the epoch of index `epoch`.
    """
    keras.utils.set_random_seed(run.seed)
    (x, y), _ = data
    net, recipe = NETS[run.net], RECIPES[run.recipe]
    model = net.build(x, recipe.decay)
    batches = Epochs(x, y, run.seed, epoch, run.batch or BATCH)
    steps = len(batches)
    rates = WarmRates(recipe.rate, run.length * steps, WARMUP * steps, recipe.drops)
    optimizer = keras.optimizers.SGD(rates, momentum=0.9, nesterov=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    method = None if run.method == "dense" else net.methods[run.method](run.sparsity)
    model.compile(apply_method(method, model, optimizer), loss, metrics=["accuracy"])
    return model, method, batches


def train(run, data, backup, deadline=None):
    """Train a network up to the last epoch. Return the trained model and a dict of its results.

    Args:
        run: Settings of the run.
        data: Training data and test data.
        backup: Folder of the backup and of the log. If the folder contains a backup, training
            continues from it.
        deadline: Value of `time.monotonic()` after which no further epoch begins.

    Raises:
        Paused: If the deadline passes before the last epoch has been trained.
    """
    backup.mkdir(parents=True, exist_ok=True)
    record = backup / "weights" / "training.json"
    epoch = json.loads(record.read_text())["epoch"] if record.exists() else 0
    model, method, batches = compiled(run, data, epoch)
    log = Log(backup / "epochs.jsonl", deadline)
    callbacks = [keras_dst.callbacks.SparseTraining()] if method else []
    # The backup is kept until the results are stored.
    callbacks += [
        keras_dst.callbacks.BackupAndRestore(backup / "weights", delete_checkpoint=False),
        log,
    ]
    model.fit(batches, epochs=run.length, verbose=0, shuffle=False, callbacks=callbacks)
    keras_dst.strip(model)
    report = keras_dst.report(model)
    found = {
        "net": NETS[run.net].title,
        "method": run.method,
        "config": repr(method),
        "target": run.sparsity,
        "seed": run.seed,
        "recipe": run.recipe,
        "epochs": run.length,
        "batch": run.batch or BATCH,
        "rate": RECIPES[run.recipe].rate,
        "decay": RECIPES[run.recipe].decay,
        "sparsity": report.sparsity,
        "layers": {row.name: row.density for row in report.layers},
    }
    if method and NETS[run.net].methods is CHANNEL_METHODS:
        model = keras_dst.shrink(model)
        small = keras_dst.report(model)
        found["flops"] = small.dense_flops / report.dense_flops
        found["parameters"] = small.parameters / report.parameters
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(loss=loss, metrics=["accuracy"])
    x, y = data[1]
    found["test_accuracy"] = model.evaluate(x, y, batch_size=1000, verbose=0, return_dict=True)[
        "accuracy"
    ]
    found["seconds"] = sum(row["seconds"] for row in log.rows())
    return model, found | {"history": log.rows()}


def complete(run, backup, deadline=None):
    """Train the network of a run and store the results, unless the deadline passes first."""
    if deadline is not None and time.monotonic() > deadline:
        print(f"not started {run.name}: the time limit has passed", flush=True)
        return
    folder = backup / run.name
    print(f"started {run.name}", flush=True)
    try:
        model, found = train(run, data_of(run), folder, deadline)
    except Paused:
        print(f"paused {run.name} before epoch {_epochs_in(folder) + 1}", flush=True)
        return
    model.save(folder / "model.keras")
    (folder / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    if not run.is_short:
        results.save(BENCHMARK, run.name, {"command": run.command} | found)
    shutil.rmtree(folder / "weights")
    print(f"finished {run.name}: {found['test_accuracy']:.4f}", flush=True)


def _epochs_in(folder):
    return len((folder / "epochs.jsonl").read_text().splitlines())


def _slug(name):
    """Return the name of a method in lower case and with hyphens, as in commands and run names."""
    return name.lower().replace(", ", "-").replace(" ", "-")


def runs_of(nets=None, methods=None, sparsities=None, seeds=SEEDS, recipe="common", **short):
    """Return one `Run` for each combination of the given settings, sorted by seed.

    If an argument is None, the default of the recipe or of the network is used.
    """
    runs = []
    methods = methods or RECIPES[recipe].methods
    for seed, net in itertools.product(seeds, nets or RECIPES[recipe].nets or NETS):
        names = {_slug(name): name for name in ("dense", *NETS[net].methods)}
        chosen = [names[method] for method in methods or names if method in names]
        for sparsity, name in itertools.product(sparsities or NETS[net].sparsities, chosen):
            target = 0.0 if name == "dense" else sparsity
            runs.append(Run(net, name, target, seed, recipe, **short))
    return list(dict.fromkeys(runs))


def table_lines(runs):
    """Return the lines of the tables, one table per network, recipe and number of epochs."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for each in runs:
        target = "" if each["method"] == "dense" else each["target"]
        key = each["net"], each.get("recipe", "common"), each["epochs"]
        found[key][each["method"], target].append(each)
    lines = []
    for (title, recipe, epochs), cells in found.items():
        targets = sorted({target for _, target in cells if target != ""})
        own = "" if recipe == "common" else f", recipe of the paper on {recipe.upper()}"
        net = next(key for key, net in NETS.items() if net.title == title)
        removed = "FLOPs removed" if NETS[net].methods is CHANNEL_METHODS else "sparse"
        lines += ["", f"## {title}, CIFAR-10, {epochs} epochs{own}", ""]
        lines += ["| method | seeds | " + " | ".join(f"{t:.0%} {removed}" for t in targets) + " |"]
        lines += ["|---|---|" + "---|" * len(targets)]

        def best(method, cells=cells):
            return max(
                r["test_accuracy"] for (m, _), rs in cells.items() if m == method for r in rs
            )

        for method in sorted(dict.fromkeys(m for m, _ in cells), key=best, reverse=True):
            old = any(r.get("outdated") for (m, _), rs in cells.items() if m == method for r in rs)
            label = f"{method}, earlier version" if old else method
            some = [cells.get((method, "" if method == "dense" else t), []) for t in targets]
            seeds = max(map(len, some), default=0)
            lines.append(f"| {label} | {seeds} | " + " | ".join(map(channels.cell, some)) + " |")
        name, published = PUBLISHED.get((recipe, net), ("", {}))
        if published:
            row = " | ".join(published.get(target, "") for target in targets)
            lines.append(f"| {name} | | {row} |")
    return lines


def table():
    intro = [
        "# Accuracy of methods after 100 epochs",
        "",
        "The tables below show the test accuracy in % after the last epoch as mean and standard "
        "deviation over the seeds. Every method of a table is trained with the same network, "
        "data, optimizer and number of epochs. The hyperparameters of the methods are not tuned. "
        "`make bench-papers` trains the networks and writes this page.",
    ]
    results.write_index(BENCHMARK, intro + table_lines(results.runs(BENCHMARK).values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = sorted({_slug(name) for net in NETS.values() for name in ("dense", *net.methods)})
    several = {"nargs": "+"}
    parser.add_argument("--nets", **several, choices=NETS)
    parser.add_argument("--methods", **several, type=_slug, choices=names)
    parser.add_argument("--sparsities", **several, type=float)
    parser.add_argument("--seeds", **several, type=int, default=SEEDS)
    parser.add_argument("--recipe", choices=RECIPES, default="common")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--minutes", type=float, help="time limit of the command")
    parser.add_argument("--backup", type=pathlib.Path, default=pathlib.Path("build/papers"))
    short = parser.add_argument_group("short runs, which are not stored in results/")
    for option in ("--images", "--epochs", "--batch"):
        short.add_argument(option, type=int)
    parser.add_argument("--table", action="store_true", help="train nothing, write the tables")
    args = parser.parse_args()
    if not args.table:
        runs = runs_of(
            args.nets, args.methods, args.sparsities, args.seeds, args.recipe,
            images=args.images, epochs=args.epochs, batch=args.batch,
        )  # fmt: skip
        if not runs:
            parser.error(f"Expected methods of the given networks. Received: {args.methods}")
        # A stored run is marked as outdated if its method has changed since the run. Train outdated
        # runs again.
        stored = {
            name: run for name, run in results.runs(BENCHMARK).items() if not run.get("outdated")
        }
        stored |= {path.parent.name: None for path in args.backup.glob("*_batch-*/result.json")}
        deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # Several runs share one GPU.
        # Do not fork the process, because JAX does not work after a fork.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            args.jobs, mp_context=context, max_tasks_per_child=1
        ) as pool:
            tasks = [
                pool.submit(complete, run, args.backup, deadline)
                for run in runs
                if run.name not in stored
            ]
        for task in tasks:
            task.result()  # If the run failed, this line raises its exception.
    table()


if __name__ == "__main__":
    main()
