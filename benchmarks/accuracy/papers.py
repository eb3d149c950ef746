"""Train networks on CIFAR-10 for as many epochs as in the papers: results/papers.

python -m benchmarks.accuracy.papers resnet-32-16 DCIL 0.95 --seed 0 --minutes 10 --backup FOLDER
    Train for at most ten minutes, and write a backup after each epoch. To continue from the backup,
    repeat the command, on the same or on another machine. The command that trains the last epoch
    stores the run.

python -m benchmarks.accuracy.papers resnet-32-16 DCIL 0.95 --steps 20
    Train for a few steps of the first epoch, and print the loss. Nothing is stored.

python -m benchmarks.accuracy.papers --table
    Write the table from the stored runs.

All methods are trained by SGD with Nesterov momentum 0.9 and batch size 128. All trainable weights
are L2-regularized. The learning rate rises for five epochs, and then decays along a cosine. The
images are randomly cropped and flipped. Accuracy is the test accuracy of the stripped model after
the last epoch. Several runs may share one GPU. A separate thread prepares the images of the next
epoch.
"""

import argparse
import collections
import concurrent.futures
import functools
import json
import pathlib
import time

import keras
import numpy as np
from keras import layers, ops

import keras_dst
from benchmarks import results
from benchmarks.accuracy.methods import METHODS as COMMON
from benchmarks.data import apply_method, load
from keras_dst.methods import DST, ST3

BENCHMARK = "papers"
BATCH = 128
RATE, DECAY, WARMUP = 0.1, 5e-4, 5  # WARMUP is a number of epochs.
SPARSITIES = (0.9, 0.95, 0.98)
METHODS = {
    **COMMON,
    "DST": lambda s: DST(sparsity=s, alpha=5e-6),
    "ST-3 sigma": lambda s: ST3(s, sigma=True),
}


class Epochs(keras.utils.PyDataset):
    """Epochs of randomly shifted and flipped images.

    The images are the same on every backend, and also after a restart.

    Args:
        x, y: Images with 8-bit pixels, and their class labels.
        seed: Seed of the batch order, the shifts and the flips.
        epoch: Index of the first epoch to train.
    """

    def __init__(self, x, y, seed, epoch=0):
        super().__init__()
        self.y, self.rng = y, np.random.default_rng(seed)
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
        return len(self.y) // BATCH

    def __getitem__(self, index):
        x, y = self.now
        return x[index * BATCH : (index + 1) * BATCH], y[index * BATCH : (index + 1) * BATCH]

    def on_epoch_end(self):
        self.now, self.coming = self.coming.result(), self.pool.submit(self._images)


@keras.saving.register_keras_serializable("keras_dst.benchmarks")
class WarmCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate that rises for `warm` steps, and then decays to 0 until step `total`."""

    def __init__(self, rate, total, warm):
        self.rate, self.total, self.warm = rate, total, warm

    def get_config(self):
        return {"rate": self.rate, "total": self.total, "warm": self.warm}

    def __call__(self, step):
        t = ops.cast(step, "float32")
        up = ops.minimum(1.0, (t + 1) / max(self.warm, 1))
        return self.rate * up * 0.5 * (1 + ops.cos(np.pi * ops.minimum(t / self.total, 1.0)))


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


def resnet(depth, width, x_train):
    l2 = keras.regularizers.L2(DECAY / 2)
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


def vgg_19(x_train):
    l2 = keras.regularizers.L2(DECAY / 2)
    inputs, x = _begin(x_train)
    for number, width in ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512)):
        for _ in range(number):
            x = layers.ReLU()(_convolved(x, width, 3, 1, l2))
        x = layers.MaxPooling2D()(x)
    return _head(inputs, layers.Flatten()(x), l2)


# Title and network. Titles contain the numbers of channels, because papers use the same name for
# different networks.
NETS = {
    "resnet-32-16": ("ResNet-32 (16-32-64)", functools.partial(resnet, 32, 16)),
    "resnet-32-32": ("ResNet-32 (32-64-128)", functools.partial(resnet, 32, 32)),
    "resnet-56-16": ("ResNet-56 (16-32-64)", functools.partial(resnet, 56, 16)),
    "vgg-19": ("VGG-19 (64-512)", vgg_19),
}


class Paused(Exception):
    """Signal that the time limit is reached. The next command continues from the backup."""


class Log(keras.callbacks.Callback):
    """Callback that logs each epoch to a file and stops the training at the time limit."""

    def __init__(self, path, minutes):
        super().__init__()
        self.path, self.minutes = path, minutes

    def on_train_begin(self, logs=None):
        self.begin, self.first = time.monotonic(), None

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.monotonic()
        if self.first is None:
            self.first = epoch
            # Drop the log rows of epochs after the backup, because these epochs are trained again.
            rows = [row for row in self.rows() if row["epoch"] <= epoch]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif self.minutes and self.start - self.begin > 60 * self.minutes:
            raise Paused  # The backup already contains the last finished epoch.

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1, "seconds": time.monotonic() - self.start}
        row |= {name: float(value) for name, value in logs.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self):
        return [*map(json.loads, self.path.read_text().splitlines())] if self.path.exists() else []


def compiled(net, method, seed, epochs, data, epoch=0):
    """Return the compiled model of a run, and its training data from index `epoch` on."""
    keras.utils.set_random_seed(seed)
    (x, y), _ = data
    model = NETS[net][1](x)
    batches = Epochs(x, y, seed, epoch)
    rates = WarmCosine(RATE, epochs * len(batches), WARMUP * len(batches))
    optimizer = keras.optimizers.SGD(rates, momentum=0.9, nesterov=True)
    optimizer = apply_method(method, model, optimizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model, batches


def run(net, method_name, sparsity, seed, epochs, data, backup, minutes=None):
    """Train to the last epoch and return the results.

    Return None if the time limit stops the training before the last epoch.
    """
    backup.mkdir(parents=True, exist_ok=True)
    record = backup / "weights" / "training.json"
    epoch = json.loads(record.read_text())["epoch"] if record.exists() else 0
    method = COMMON[method_name] if method_name == "dense" else METHODS[method_name](sparsity)
    model, batches = compiled(net, method, seed, epochs, data, epoch)
    log = Log(backup / "epochs.jsonl", minutes)
    callbacks = [keras_dst.callbacks.SparseTraining()] if method else []
    callbacks += [keras_dst.callbacks.BackupAndRestore(backup / "weights"), log]
    try:
        model.fit(batches, epochs=epochs, verbose=0, shuffle=False, callbacks=callbacks)
    except Paused:
        print(f"paused after epoch {log.rows()[-1]['epoch']} of {epochs}", flush=True)
        return None
    keras_dst.strip(model)
    x, y = data[1]
    accuracy = model.evaluate(x, y, batch_size=1000, verbose=0, return_dict=True)["accuracy"]
    report = keras_dst.report(model)
    return {
        "net": NETS[net][0],
        "method": method_name,
        "config": repr(method),
        "target": sparsity,
        "seed": seed,
        "epochs": epochs,
        "batch": BATCH,
        "rate": RATE,
        "decay": DECAY,
        "test_accuracy": accuracy,
        "sparsity": report.sparsity,
        "layers": {row.name: row.density for row in report.layers},
        "seconds": sum(row["seconds"] for row in log.rows()),
        "history": log.rows(),
    }


def name_of(net, method, sparsity, epochs, seed):
    """Return the name under which a run is stored."""
    method = method.lower().replace(", ", "-").replace(" ", "-")
    kind = method if method == "dense" else f"{method}_{sparsity}"
    return f"{net}_{kind}_{epochs}_seed{seed}"


def table_lines(runs):
    """Return the lines of the tables, one table per network and number of epochs."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for each in runs:
        target = "" if each["method"] == "dense" else each["target"]
        found[each["net"], each["epochs"]][each["method"], target].append(each)
    lines = []
    for (net, epochs), cells in found.items():
        targets = sorted({target for _, target in cells if target != ""})
        lines += ["", f"## {net}, CIFAR-10, {epochs} epochs", ""]
        lines += ["| method | seeds | " + " | ".join(f"{t:.0%} sparse" for t in targets) + " |"]
        lines += ["|---|---|" + "---|" * len(targets)]

        def best(method, cells=cells):
            return max(
                r["test_accuracy"] for (m, _), rs in cells.items() if m == method for r in rs
            )

        for method in sorted({m for m, _ in cells}, key=best, reverse=True):
            row, seeds = [], 0
            for target in targets:
                some = cells.get((method, "" if method == "dense" else target), [])
                seeds = max(seeds, len(some))
                row.append(
                    results.mean_std([100 * r["test_accuracy"] for r in some]) if some else ""
                )
            lines.append(f"| {method} | {seeds} | " + " | ".join(row) + " |")
    return lines


def table():
    intro = [
        "# Accuracy of methods after 100 epochs",
        "",
        "The tables show the test accuracy in % after the last epoch as mean and standard "
        "deviation over the seeds. Network, data, optimizer and number of epochs are the same "
        "for every method, and no method is tuned. `make bench-papers` trains the networks and "
        "writes this page.",
    ]
    results.write_index(BENCHMARK, intro + table_lines(results.runs(BENCHMARK).values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("net", nargs="?", choices=NETS)
    parser.add_argument("method", nargs="?", choices=METHODS)
    parser.add_argument("sparsity", nargs="?", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--backup", type=pathlib.Path, default=pathlib.Path("build/papers"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.net and not args.method:
        parser.error("Expected a method after the network.")
    if args.net:
        name = name_of(args.net, args.method, args.sparsity, args.epochs, args.seed)
        (x, y), (x_test, y_test) = load("cifar10")
        data = (x, y.ravel().astype("int32")), (x_test, y_test.ravel().astype("int32"))
        if args.steps:
            method = None if args.method == "dense" else METHODS[args.method](args.sparsity)
            model, batches = compiled(args.net, method, args.seed, args.epochs, data)
            driver = [keras_dst.callbacks.SparseTraining(epochs=args.epochs)] if method else []
            options = {"epochs": 1, "steps_per_epoch": args.steps, "shuffle": False}
            print(model.fit(batches, verbose=0, callbacks=driver, **options).history)
            return
        if name not in results.runs(BENCHMARK):
            found = run(
                args.net, args.method, args.sparsity, args.seed, args.epochs, data,
                args.backup / name, args.minutes,
            )  # fmt: skip
            if found is None:
                return
            command = f"python -m benchmarks.accuracy.papers {args.net} {args.method}"
            results.save(BENCHMARK, name, {"command": command} | found)
    table()


if __name__ == "__main__":
    main()
