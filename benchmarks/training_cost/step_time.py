"""Measure the time of a training step relative to the dense baseline: results/step_time.

Each round times a few training steps of the dense baseline and of each method, with batch size 128
on one core. In each round, the step time of a method is divided by the step time of the dense
baseline. The result is the median of these ratios over all rounds. `lstm-128` is not trained with
Consensus, which cannot prune units of an LSTM.

The timed steps are the first steps of a training run of 4,000 steps. In a run of 4,000 steps, most
methods update their masks only every 100 steps. Mask updates are therefore timed separately. The
result of a method also includes the time of a mask update, divided by the number of steps from one
update to the next. DCIL updates its masks every 16 steps, so some timed rounds already contain a
mask update of DCIL. The time of such a mask update is counted twice, in the round and separately.
The compile time is the CPU time of the first round minus the CPU time of the second round.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks import results
from benchmarks.backends import BACKENDS, run_on
from benchmarks.timing import (
    cpu_seconds,
    in_turns,
    ratios,
    seconds,
    steps_of_fit,
    update_masks,
)

BENCHMARK = "step_time"
BATCH = 128
TOTAL = 4000  # Number of steps of the training run.


@dataclass
class Setting:
    """Settings of one measurement: the network, the steps per round, and the number of rounds."""

    shape: tuple
    net: Callable
    steps: int  # Number of steps per round.
    rounds: int
    without: tuple = ()  # Methods that are not measured, because they cannot prune the network.


def small_cnn():
    import keras

    model = keras.Sequential([keras.Input((28, 28, 1))])
    for filters in (32, 64):
        model.add(keras.layers.Conv2D(filters, 3, padding="same"))
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
        model.add(keras.layers.MaxPooling2D())
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(128, "relu"))
    model.add(keras.layers.Dense(10, "softmax"))
    return model


def resnet_20():
    from benchmarks import networks

    return networks.resnet(20)


def lstm_128():
    from benchmarks import networks

    return networks.lstm(128)


SETTINGS = {
    "small-cnn": Setting((28, 28, 1), small_cnn, steps=5, rounds=17),
    "resnet-20": Setting((32, 32, 3), resnet_20, steps=3, rounds=9),
    "lstm-128": Setting((28, 28, 1), lstm_128, steps=5, rounds=17, without=("Consensus",)),
}


def methods() -> dict:
    from keras_dst.methods import DCIL, DST, SET, Consensus, FlipOut, Magnitude, OptG, RigL

    return {
        "plain": None,
        "DST": DST(),
        "DST, target": DST(sparsity=0.9),
        "DCIL": DCIL(0.9),
        "OptG": OptG(0.9),
        "Consensus": Consensus(0.5),
        "Magnitude": Magnitude(0.9),
        "Magnitude, revival": Magnitude(0.9, revival=True),
        "FlipOut": FlipOut(0.9),
        "SET": SET(0.9),
        "RigL": RigL(0.9),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("net", choices=SETTINGS)
    parser.add_argument("--backend", choices=BACKENDS, help="run this backend in this process")
    parser.add_argument("--methods", nargs="*", help="only these methods, as named in the results")
    args = parser.parse_args()
    if args.backend is None:
        only = ["--methods", *args.methods] if args.methods else []
        for name in BACKENDS:
            run_on(name, "training_cost.step_time", args.net, "--backend", name, *only)
        table()
        return
    # Use one core for this process, before any library starts its threads.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    measure(args.net, args.methods)


def measure(net, only=None):
    import keras

    import keras_dst
    from benchmarks.data import apply_method

    setting = SETTINGS[net]
    x, y = data(setting)

    def build(method):
        keras.utils.set_random_seed(0)
        model = setting.net()
        optimizer = apply_method(method, model, keras.optimizers.SGD(0.01, momentum=0.9))
        model.compile(optimizer, "sparse_categorical_crossentropy")
        epochs = TOTAL // (setting.steps + 1)
        driver = keras_dst.callbacks.SparseTraining(epochs, keep_memory=True) if method else None
        callbacks = [driver] if driver else []
        return partial(steps_of_fit, model, x, y, BATCH, callbacks), driver

    chosen = {name: method for name, method in methods().items() if name not in setting.without}
    if only:
        chosen = {name: chosen[name] for name in ("plain", *only)}
    built = {name: build(method) for name, method in chosen.items()}
    turns = {name: turn for name, (turn, _) in built.items()}
    result = compared(net, turns)
    found, step = result["ratio_to_plain"], result["median_seconds_per_step"]
    compiling = result["seconds_to_compile"]
    updates = {name: update_of(driver) for name, (_, driver) in built.items() if driver}
    updates = {name: update for name, update in updates.items() if update}
    for name, update in updates.items():
        found[name] += update["seconds"] / update["every_steps"] / step["plain"]
    for name, ratio in found.items():
        line = f"{keras.backend.backend():10s} {name:20s} {ratio:.2f}"
        print(
            line,
            f"compile {compiling[name] / max(compiling['plain'], 1e-9):.2f}",
            updates.get(name),
        )
    results.save(BENCHMARK, f"{net}_{keras.backend.backend()}", {**result, "updates": updates})


def data(setting) -> tuple:
    """Return random images and labels for the training steps of one round.

    The first step of a round is not timed.
    """
    import numpy as np

    size = BATCH * (setting.steps + 1)
    x = np.random.default_rng(0).standard_normal((size, *setting.shape)).astype("float32")
    return x, np.arange(size) % 10


def compared(net, turns) -> dict:
    """Time all methods alternately.

    Return the step time of each method, and its ratio to the step time of the dense baseline. The
    name of the dense baseline is "plain".
    """
    setting = SETTINGS[net]
    first, again = ({n: cpu_seconds(turn) for n, turn in turns.items()} for _ in range(2))
    times = in_turns(turns, setting.rounds)
    step = {n: statistics.median(t) / setting.steps for n, t in times.items()}
    return {
        "command": "make bench-step" if net == "small-cnn" else "make bench-overhead",
        "net": f"{net}, {' x '.join(map(str, setting.shape))}, batch {BATCH}, one core",
        "rounds": setting.rounds,
        "steps_per_round": setting.steps,
        "ratio_to_plain": ratios(times, "plain"),
        "median_seconds_per_step": step,
        "seconds_to_compile": {n: max(0.0, first[n] - again[n]) for n in turns},
        "seconds_per_round": times,
    }


def update_of(callback) -> dict | None:
    """Return the seconds of a mask update, and the number of steps from one update to the next."""
    driver = callback._drivers[0]
    if not driver.clock:
        return None
    update = partial(update_masks, driver, 0)
    update()  # The first call compiles the mask update and is not timed.
    times = [seconds(update) for _ in range(5)]
    return {"seconds": statistics.median(times), "every_steps": driver.clock.period}


def table():
    lines = [
        "# Time of a training step",
        "",
        "The tables below show the time of a training step relative to the dense model "
        "(`plain`). The step time includes mask updates. The models are measured alternately on "
        "one core. In the table of the ResNet, numbers in brackets are compilation times relative "
        "to the dense model. Differences of a few percent between step times are noise. `make "
        "bench-step` and `make bench-overhead` write this page from "
        "`results/step_time/runs.jsonl`.",
    ]
    stored = results.runs(BENCHMARK)
    for net in SETTINGS:
        of_net = {name.split("_")[1]: run for name, run in stored.items() if name.startswith(net)}
        title = next(iter(of_net.values()))["net"]
        columns = {name: _ratios(run) for name, run in of_net.items()}
        lines += ["", f"## {title}", "", *results.columns(columns)]
    results.write_index(BENCHMARK, lines)


def _ratios(run: dict) -> dict[str, str]:
    """Return a dict from the name of each method to its table cell."""
    found = {name: f"{ratio:.2f}" for name, ratio in run["ratio_to_plain"].items()}
    compiling = run["seconds_to_compile"]
    # The table shows the ratio of compile times only if the backend compiles. A backend that does
    # not compile needs about the same CPU time for the first and the second round.
    if run["net"].startswith("resnet") and compiling["plain"] > 1:
        for name in found:
            found[name] += f" ({compiling[name] / compiling['plain']:.2f})"
    return found


if __name__ == "__main__":
    main()
