"""Step time of sparse training against the plain model: results/step_time_BACKEND.json.

A small CNN at batch 128 on one core: `fit` of the plain model and of each method take turns, and
the ratio to the plain model of the same turn is what counts; medians over the turns.
"""

import argparse
import os
import statistics
import time

from benchmarks.backends import BACKENDS, run_on

STEPS, ROUNDS, BATCH = 10, 11, 128


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="this one, in this process")
    parser.add_argument("--methods", nargs="*", help="these alone, as the result names them")
    args = parser.parse_args()
    if args.backend is None:
        only = ["--methods", *args.methods] if args.methods else []
        for name in BACKENDS:
            run_on(name, "step_time", "--backend", name, *only)
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before any thread pool is made
    measure(args.methods)


def measure(only=None):
    import keras
    import numpy as np

    import keras_dst
    from benchmarks.common import save, under
    from keras_dst.methods import DCIL, DST, SET, Consensus, FlipOut, Magnitude, OptG, RigL

    x = np.random.default_rng(0).standard_normal((BATCH * STEPS, 28, 28, 1)).astype("float32")
    y = np.arange(len(x)) % 10

    def build(method):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((28, 28, 1))])
        for filters in (32, 64):
            model.add(keras.layers.Conv2D(filters, 3, padding="same"))
            model.add(keras.layers.BatchNormalization())
            model.add(keras.layers.ReLU())
            model.add(keras.layers.MaxPooling2D())
        model.add(keras.layers.Flatten())
        model.add(keras.layers.Dense(128, "relu"))
        model.add(keras.layers.Dense(10, "softmax"))
        optimizer = under(method, model, keras.optimizers.SGD(0.01, momentum=0.9))
        model.compile(optimizer, "sparse_categorical_crossentropy")
        driver = [keras_dst.callbacks.SparseTraining(epochs=ROUNDS + 1)] if method else []

        def turn():
            begin = time.perf_counter()
            model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=driver)
            return (time.perf_counter() - begin) / STEPS

        return turn

    methods = {
        "plain": None,
        "DST": DST(),
        "DST, target": DST(target_sparsity=0.9),
        "DCIL": DCIL(0.9),
        "OptG": OptG(0.9),
        "Consensus": Consensus(0.5),
        "Magnitude": Magnitude(0.9),
        "Magnitude, revival": Magnitude(0.9, revival=True),
        "FlipOut": FlipOut(0.9),
        "SET": SET(0.9),
        "RigL": RigL(0.9),
    }
    if only:
        methods = {name: methods[name] for name in ("plain", *only)}
    turns = {name: build(method) for name, method in methods.items()}
    for turn in turns.values():
        turn()  # compiles
    times = {name: [] for name in turns}
    for _ in range(ROUNDS):
        for name, turn in turns.items():
            times[name].append(turn())
    ratios = {
        name: statistics.median(a / b for a, b in zip(found, times["plain"]))
        for name, found in times.items()
    }
    for name, ratio in ratios.items():
        print(f"{keras.backend.backend():10s} {name:20s} {ratio:.2f}")
    save(
        f"step_time_{keras.backend.backend()}",
        {
            "command": "make bench-step",
            "net": "small CNN, 28 x 28 x 1, batch 128, one core",
            "rounds": ROUNDS,
            "steps_per_round": STEPS,
            "median_ratio_to_plain": ratios,
            "median_seconds_per_step": {n: statistics.median(t) for n, t in times.items()},
            "seconds_per_step": times,
        },
    )


if __name__ == "__main__":
    main()
