"""Measure how much accuracy `recalibrate` gains after one-shot pruning and after `shrink`.

python -m benchmarks.accuracy.recalibration
    Train ResNet-8 on 20,000 images of CIFAR-10 for 3 epochs, and prune single weights or channels.
    The results are written to results/recalibration. Runs that are already stored are skipped.
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
IMAGES, EPOCHS, SEEDS = 20_000, 3, 3
ONE_SHOT = {"unstructured": (0.5, 0.7), "channel": (0.25, 0.5)}
TRAINED = 0.5  # Fraction of channels to prune in the runs that train for one more epoch.


def pruned(model, method):
    """Prune a copy of a model in one shot, without further training, and return the copy.

    If the method ranks channels, the pruned channels are removed from the copy by `shrink`.
    """
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    optimizer = keras.optimizers.SGD(0.0)
    copy.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    keras_dst.sparsify(copy, method)
    copy.optimizer.build(copy.trainable_variables)
    if method.pattern != "channel":
        copy.optimizer.apply_initial_masks()
        return keras_dst.strip(copy)
    keras_dst.couple_channels(copy)
    copy.optimizer.apply_initial_masks()
    keras_dst.couple_channels(copy)  # Set the moving means of pruned channels to 0.
    return keras_dst.shrink(keras_dst.strip(copy))


def train_and_shrink(model, x, y, method):
    """Train a copy of a model for an epoch while pruning channels, and return the shrunk copy."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    optimizer = keras.optimizers.SGD(cosine(0.02, len(y) // BATCH), momentum=0.9)
    copy.compile(optimizer, "sparse_categorical_crossentropy")
    keras_dst.sparsify(copy, method)
    copy.fit(x, y, batch_size=BATCH, verbose=0, callbacks=[keras_dst.callbacks.SparseTraining()])
    return keras_dst.shrink(keras_dst.strip(copy))


def main():
    (x, y), (x_test, y_test) = cifar10()
    x, y = x[:IMAGES], y[:IMAGES]

    def accuracy(model):
        model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        found = model.evaluate(x_test, y_test, batch_size=500, verbose=0, return_dict=True)
        return found["accuracy"]

    for seed in range(SEEDS):
        if f"trained_channel_{TRAINED}_seed{seed}" in results.runs(BENCHMARK):
            continue
        keras.utils.set_random_seed(seed)
        model = networks.resnet(8, stride=2)
        rates = cosine(0.1, EPOCHS * (len(y) // BATCH))
        optimizer = keras.optimizers.SGD(rates, momentum=0.9)
        model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
        model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0)
        dense = accuracy(model)

        one_shot = [
            ("one-shot", pattern, target) for pattern in ONE_SHOT for target in ONE_SHOT[pattern]
        ]
        for training, pattern, target in [*one_shot, ("trained", "channel", TRAINED)]:
            if training == "trained":
                small = train_and_shrink(model, x, y, Magnitude(target, "uniform", pattern))
            else:
                method = Magnitude(Constant(target, begin_step=0), "uniform", pattern)
                small = pruned(model, method)
            run = {"training": training, "pattern": pattern, "target": target, "seed": seed}
            run |= {"dense_accuracy": dense, "before": accuracy(small)}
            run["after"] = accuracy(keras_dst.recalibrate(small, x, batch_size=BATCH))
            run["command"] = "make bench-recalibration"
            results.save(BENCHMARK, f"{training}_{pattern}_{target}_seed{seed}", run)
    table()


def table():
    found = collections.defaultdict(list)
    for run in results.runs(BENCHMARK).values():
        found[run["training"], run["pattern"], run["target"]].append(run)
    lines = [
        "# Accuracy after recalibration of batch normalization",
        "",
        "The table below shows the test accuracy in % of ResNet-8 on CIFAR-10, as mean and "
        f"standard deviation over the seeds. The network was trained for {EPOCHS} epochs on "
        f"{IMAGES:,} images and pruned by magnitude. The network was pruned either in one shot "
        "without further training, or during another epoch of training. `shrink` removed the "
        "pruned channels. `make bench-recalibration` writes this page from "
        "`results/recalibration/runs.jsonl`.",
        "",
        "| pruned | fraction | seeds | dense network | pruned network | after `recalibrate` |",
        "|---|---|---|---|---|---|",
    ]
    for training, pattern, target in sorted(found, key=lambda key: (key[0], key[1][0] != "u", key)):
        runs = found[training, pattern, target]
        cells = [
            results.mean_std([100 * run[name] for run in runs])
            for name in ("dense_accuracy", "before", "after")
        ]
        what = "weights" if pattern == "unstructured" else "channels"
        how = "in one shot" if training == "one-shot" else "in an epoch of training"
        lines.append(f"| {what}, {how} | {target:.0%} | {len(runs)} | " + " | ".join(cells) + " |")
    results.write_index(BENCHMARK, lines)


if __name__ == "__main__":
    main()
