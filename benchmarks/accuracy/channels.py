"""Compare the accuracies of methods that prune channels, at equal FLOPs: results/channels.

A dense network is trained once per seed. Each method starts from the dense network, prunes it to a
fraction of its FLOPs, and trains it for the same number of epochs. Accuracy is the test accuracy
of the shrunk model after the last epoch. Runs that are already stored are skipped. The dense
networks are saved in build/channels.
"""

import argparse
import collections
import pathlib

from benchmarks import results

BENCHMARK = "channels"
NETS = ("resnet-56", "vgg", "resnet-20, stride 2")
SPEEDUPS = (2, 4)
BATCH = 128
DECAY = 5e-4
RATE_OF_DENSE, RATE_OF_PRUNING = 0.1, 0.02
FOLDER = pathlib.Path("build/channels")


def methods(sparsity):
    from keras_dst.methods import DCIL, DST, ST3, FlipOut, Magnitude, OptG
    from keras_dst.schedules import Constant

    options = {"pattern": "channel", "counted_in": "flops"}
    at_once = Constant(sparsity, begin_step=0)
    return {
        "Magnitude, uniform, before the training": Magnitude(at_once, "uniform", **options),
        "Magnitude, global, before the training": Magnitude(at_once, "global", **options),
        "Magnitude, uniform": Magnitude(sparsity, "uniform", **options),
        "Magnitude, global": Magnitude(sparsity, "global", **options),
        "Magnitude, LAMP": Magnitude(sparsity, "global", score="lamp", **options),
        "Magnitude, Taylor": Magnitude(sparsity, "global", score="taylor", **options),
        "FlipOut": FlipOut(sparsity, allocation="global", **options),
        "DCIL": DCIL(sparsity, allocation="global", **options),
        "OptG": OptG(sparsity, allocation="global", **options),
        "ST-3": ST3(sparsity, allocation="global", **options),
        "DST": DST(sparsity, **options),
    }


def network(name):
    from benchmarks import networks

    if name == "vgg":
        return networks.vgg()
    depth, _, stride = name.removeprefix("resnet-").partition(", stride ")
    return networks.resnet(int(depth), stride=int(stride or 1))


def batches(x, y, seed):
    """Return a data set whose batches contain randomly shifted and flipped images."""
    import keras
    import numpy as np

    class Augmented(keras.utils.PyDataset):
        epoch = 0

        def __len__(self):
            return len(x) // BATCH

        def on_epoch_begin(self):
            rng = np.random.default_rng((seed, self.epoch))
            self.epoch += 1
            self.order = rng.permutation(len(x))
            self.shifts = rng.integers(0, 9, (len(x), 2))
            self.flips = rng.integers(0, 2, len(x)) * 2 - 1

        def __getitem__(self, i):
            if not self.epoch:
                self.on_epoch_begin()
            chosen = self.order[i * BATCH : (i + 1) * BATCH]
            padded = np.pad(x[chosen], ((0, 0), (4, 4), (4, 4), (0, 0)))
            shifted = [
                image[a : a + 32, b : b + 32][:, :: self.flips[n]]
                for image, (a, b), n in zip(padded, self.shifts[chosen], chosen)
            ]
            return np.stack(shifted), y[chosen]

    return Augmented()


def train(model, data, rate, epochs, seed, method=None):
    """Train a network with SGD and a cosine learning rate, and return the final test accuracy."""
    import keras

    import keras_dst

    (x, y), test = data
    steps = epochs * (len(x) // BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, weight_decay=DECAY)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    callbacks = []
    if method is not None:
        keras_dst.sparsify(model, method)
        callbacks = [keras_dst.callbacks.SparseTraining()]
    model.fit(batches(x, y, seed), epochs=epochs, verbose=2, callbacks=callbacks)
    return model.evaluate(*test, batch_size=500, verbose=0)[1]


def dense(net, data, seed, epochs):
    """Return the path of the file with the trained dense network.

    If the file does not exist, train the network and save it.
    """
    import keras

    images = len(data[0][1])
    name = f"{net}, dense, {epochs} epochs, {images} images, seed {seed}"
    path = FOLDER / f"{name}.keras"
    if not path.exists() or name not in results.runs(BENCHMARK):
        keras.utils.set_random_seed(seed)
        model = network(net)
        run = {"net": net, "method": "dense", "speedup": 1, "seed": seed, "epochs": [epochs, 0]}
        run |= {"images": images, "test_accuracy": train(model, data, RATE_OF_DENSE, epochs, seed)}
        FOLDER.mkdir(parents=True, exist_ok=True)
        model.save(path)
        results.save(BENCHMARK, name, {"command": "make bench-channels", **run})
    return path


def prune(path, net, data, method, speedup, epochs, seed):
    """Prune the dense network with a method during training.

    Return the accuracy, and the fractions of the FLOPs and parameters that remain after `shrink`.
    """
    import keras

    import keras_dst

    method = methods(1 - 1 / speedup)[method]

    keras.utils.set_random_seed(seed)
    model = keras.saving.load_model(path)
    train(model, data, RATE_OF_PRUNING, epochs, seed, method)
    keras_dst.strip(model)
    small = keras_dst.shrink(model)
    small.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    before, after = keras_dst.report(model), keras_dst.report(small)
    return {
        "test_accuracy": small.evaluate(*data[1], batch_size=500, verbose=0)[1],
        "flops": after.dense_flops / before.dense_flops,
        "parameters": after.parameters / before.parameters,
    }


def table():
    found = collections.defaultdict(list)
    for run in results.runs(BENCHMARK).values():
        key = run["net"], run["epochs"][0], run["images"]
        found[key, run["method"], run["speedup"]].append(run)
    lines = [
        "# Accuracy after channel pruning",
        "",
        "The tables below show the test accuracy in % on CIFAR-10 after the last epoch, as mean "
        "and standard deviation over the seeds. The tables also show the fraction of the FLOPs "
        "that remains after pruning. The accuracy is measured after the pruned channels are "
        "removed from the model. Every method starts from the same dense network and trains for "
        "the same number of epochs with the same batches and learning rates. The hyperparameters "
        "of the methods are not tuned. By default, the sparsity rises during the first three "
        "quarters of the training. In the rows with `before the training`, all channels are "
        "pruned before the first training step. Torch-Pruning 1.6.1 ranks groups of coupled "
        "channels by their L2 norm. Without sparse learning, Torch-Pruning removes channels "
        "before the training. With sparse learning, Torch-Pruning trains with the penalty of "
        "DepGraph, and removes channels after half of the training. `make bench-channels` writes "
        "this page from `results/channels/runs.jsonl`.",
    ]
    for key in dict.fromkeys(key for key, *_ in found):
        net, epochs, images = key
        pruned = [
            runs[0] for (other, *_, speedup), runs in found.items() if speedup > 1 and other == key
        ]
        after = max(run["epochs"][1] for run in pruned) if pruned else 0
        short = (
            " The training on a CPU is short and ends far from convergence." if epochs < 50 else ""
        )
        lines += [
            "",
            f"## {net}",
            "",
            f"Each network is trained on {images:,} images, for {epochs} epochs without pruning "
            f"and for {after} epochs with each method." + short,
            "",
            "| method | seeds | dense | 2x | 4x |",
            "|---|---|---|---|---|",
        ]
        for method in dict.fromkeys(method for other, method, _ in found if other == key):
            runs = [found.get((key, method, speedup), []) for speedup in (1, *SPEEDUPS)]
            seeds = max(map(len, runs))
            lines.append(f"| {method} | {seeds} | {' | '.join(map(cell, runs))} |")
    results.write_index(BENCHMARK, lines)


def cell(runs) -> str:
    """Return the text of a table cell: the mean accuracy and the remaining fraction of the FLOPs.

    For the dense network, return only the accuracy. If `runs` is empty, return an empty text.
    """
    if not runs:
        return ""
    accuracy = results.mean_std([100 * run["test_accuracy"] for run in runs])
    if "flops" not in runs[0]:
        return accuracy
    return f"{accuracy} ({results.mean_std([run['flops'] for run in runs])})"


def add_options(parser, names):
    """Add the command-line options that all commands of this benchmark share."""
    parser.add_argument("--nets", nargs="*", choices=NETS, default=list(NETS[:2]))
    parser.add_argument("--methods", nargs="*", choices=names, default=list(names))
    parser.add_argument("--speedups", nargs="*", type=int, default=list(SPEEDUPS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", nargs=2, type=int, default=[160, 100])
    parser.add_argument("--images", type=int, default=50_000, help="number of training images")


def run_all(args, prune):
    """Run all combinations of the options that are not stored yet, and store their results.

    Args:
        args: Parsed options, see `add_options`.
        prune: Function that prunes and trains a network, and returns a dict of the results to
            store.
    """
    from benchmarks.data import cifar10

    (x, y), test = cifar10()
    data = (x[: args.images], y[: args.images]), test
    told = f"{args.epochs[0]} and {args.epochs[1]} epochs, {args.images} images"
    for seed in range(args.seeds):
        for net in args.nets:
            path = dense(net, data, seed, args.epochs[0])
            for speedup in args.speedups:
                for method in args.methods:
                    name = f"{net}, {method}, {speedup}x, {told}, seed {seed}"
                    if name in results.runs(BENCHMARK):
                        continue
                    run = {"net": net, "method": method, "speedup": speedup, "seed": seed}
                    run |= prune(path, net, data, method, speedup, args.epochs[1], seed)
                    run |= {"epochs": args.epochs, "images": args.images}
                    results.save(BENCHMARK, name, {"command": "make bench-channels", **run})
    table()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, methods(0.5))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        table()
    else:
        run_all(args, prune)


if __name__ == "__main__":
    main()
