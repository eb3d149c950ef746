"""Measure how much accuracy `recalibrate` recovers after one-shot pruning.

python -m benchmarks.accuracy.recalibration
    Train ResNet-8 on 20,000 images of CIFAR-10 for 3 epochs, prune it without further training, and
    write results/recalibration.
"""

import collections

import keras

import keras_dst
from benchmarks import networks, results
from benchmarks.accuracy.methods import BATCH, cosine
from benchmarks.data import cifar10
from keras_dst.methods import Magnitude
from keras_dst.schedules import Constant

BENCHMARK = "recalibration"
IMAGES, EPOCHS = 20_000, 3
SPARSITIES = (0.5, 0.7)


def pruned(model, method):
    """Return a copy of a model after one-shot pruning without training."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    optimizer = keras.optimizers.SGD(0.0)
    copy.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    keras_dst.sparsify(copy, method)
    copy.optimizer.build(copy.trainable_variables)
    copy.optimizer.apply_initial_masks()
    return keras_dst.strip(copy)


def main():
    (x, y), (x_test, y_test) = cifar10()
    x, y = x[:IMAGES], y[:IMAGES]

    def accuracy(model):
        model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        found = model.evaluate(x_test, y_test, batch_size=500, verbose=0, return_dict=True)
        return found["accuracy"]

    for seed in range(1):
        keras.utils.set_random_seed(seed)
        model = networks.resnet(8, stride=2)
        rates = cosine(0.1, EPOCHS * (len(y) // BATCH))
        optimizer = keras.optimizers.SGD(rates, momentum=0.9)
        model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
        model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0)
        dense = accuracy(model)
        for sparsity in SPARSITIES:
            small = pruned(model, Magnitude(Constant(sparsity, begin_step=0), "uniform"))
            before = accuracy(small)
            after = accuracy(keras_dst.recalibrate(small, x, batch_size=BATCH))
            run = {
                "command": "make bench-recalibration",
                "target": sparsity,
                "seed": seed,
                "dense_accuracy": dense,
                "before": before,
                "after": after,
            }
            results.save(BENCHMARK, f"weights_{sparsity}_seed{seed}", run)
    table()


def table():
    found = collections.defaultdict(list)
    for run in results.runs(BENCHMARK).values():
        found[run["target"]].append(run)
    lines = [
        "# Recalibration after one-shot pruning",
        "",
        "The table shows the test accuracy in % of ResNet-8 on CIFAR-10 for one seed. The "
        "network was trained for 3 epochs on 20,000 images. Then single weights were pruned by "
        "magnitude, without further training. `make bench-recalibration` writes this page.",
        "",
        "| sparsity | dense network | pruned | after `recalibrate` |",
        "|---|---|---|---|",
    ]
    for target, runs in sorted(found.items()):
        cells = [
            results.mean_std([100 * run[name] for run in runs])
            for name in ("dense_accuracy", "before", "after")
        ]
        lines.append(f"| {target:.0%} | " + " | ".join(cells) + " |")
    results.write_index(BENCHMARK, lines)


if __name__ == "__main__":
    main()
