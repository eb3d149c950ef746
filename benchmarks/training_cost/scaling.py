"""Measure how the cost of sparse training grows with network and batch size: results/scaling.

The networks consist of dense layers. Each series of measurements varies the number of parameters,
the number of layers, or the batch size. For each network, steps of the dense baseline and of each
method at 90 % sparsity are timed alternately, as in `benchmarks.training_cost.step_time`.
`sparsify`, `strip`, a mask update, `shrink` and `export_tflite` are timed separately. `slope` is
the slope of a line that is fitted to the logarithms of cost and size. With a slope of 1, cost is
proportional to size.

In all runs, including the dense baseline, freed memory stays in the process between steps.

python -m benchmarks.training_cost.scaling [--backend BACKEND] [--axes AXIS ...]
python -m benchmarks.training_cost.scaling --table
"""

import argparse
import gc
import itertools
import os
import pathlib
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial

from benchmarks import results
from benchmarks.backends import BACKENDS, run_on
from benchmarks.timing import in_turns, ratios, seconds, steps_of_fit, update_masks

BENCHMARK = "scaling"
STEPS, ROUNDS = 4, 5
TOTAL = 4000  # Number of steps of the whole training run.


@dataclass
class Point:
    """Network of dense layers with equal width, and the batch size of its training."""

    width: int
    depth: int
    batch: int

    @property
    def weights(self) -> int:
        return self.depth * self.width**2


SPARSITY = 0.9
AXES = {
    "parameters": [Point(width, 4, 32) for width in (160, 500, 1580, 5000)],
    "layers": [Point(64, depth, 32) for depth in (10, 40, 200)],
    "batch": [Point(500, 4, batch) for batch in (1, 8, 64, 512)],
}
# Heading of the column that contains the varied quantity.
SIZES = {"parameters": "weights", "layers": "depth", "batch": "batch"}
# Title of the section about the varied quantity.
SECTIONS = {"parameters": "Number of weights", "layers": "Number of layers", "batch": "Batch size"}
# Environment variables with which glibc keeps freed memory in the process.
KEEP = {f"MALLOC_{what}_THRESHOLD_": str(1 << 40) for what in ("MMAP", "TRIM")}


def methods() -> dict:
    from keras_dst.methods import DCIL, DST, FlipOut, Magnitude, OptG, RigL
    from keras_dst.schedules import Constant

    now = Constant(SPARSITY)  # Reach the target sparsity in the first step.
    return {
        "DST": DST(),
        "DCIL": DCIL(now),
        "OptG": OptG(now),
        "Magnitude": Magnitude(now),
        "FlipOut": FlipOut(now),
        "RigL": RigL(SPARSITY),
    }


def net(point, method=None):
    """Return a compiled network and the callback that updates its masks.

    For the dense baseline, the callback is None.
    """
    import keras

    import keras_dst
    from benchmarks.data import apply_method

    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((point.width,))])
    for _ in range(point.depth):
        model.add(keras.layers.Dense(point.width, "relu"))
    model.add(keras.layers.Dense(10, "softmax"))
    optimizer = apply_method(method, model, keras.optimizers.SGD(0.01, momentum=0.9))
    model.compile(optimizer, "sparse_categorical_crossentropy")
    if isinstance(method, keras_dst.methods.DST):
        prune(model)
    return model, keras_dst.callbacks.SparseTraining(TOTAL // (STEPS + 1)) if method else None


def prune(model):
    """Set the thresholds so that 90 % of the uniformly initialized weights are pruned."""
    from keras import ops

    for layer in model.layers:
        for _, weight, state in layer.masked_weights():
            most = ops.max(ops.abs(ops.convert_to_tensor(weight)))
            threshold = state["threshold"]
            threshold.assign(ops.full(threshold.shape, SPARSITY * float(most)))


def measure(axes):
    import keras

    name = keras.backend.backend()
    found = results.runs(BENCHMARK).get(name, {"axes": {}})["axes"]
    for axis in axes:
        found[axis] = []
        for point in AXES[axis]:
            ratio = {name: steps(point, method) for name, method in methods().items()}
            row = {**vars(point), "weights": point.weights, "ratio_to_plain": ratio}
            row["seconds"] = once(point)
            print(keras.backend.backend(), axis, row, flush=True)
            found[axis].append(row)
        result = {"command": "make bench-scaling", "steps": STEPS, "rounds": ROUNDS, "axes": found}
        results.save(BENCHMARK, name, result)


def steps(point, method) -> float:
    """Return the step time of a method, relative to the dense baseline."""
    import numpy as np

    shape = (point.batch * (STEPS + 1), point.width)  # The first step is not timed.
    x = np.random.default_rng(0).standard_normal(shape, "float32")
    y = np.arange(len(x)) % 10

    def turn(method):
        model, callback = net(point, method)
        return partial(steps_of_fit, model, x, y, point.batch, [callback] if callback else [])

    turns = {"plain": turn(None), "sparse": turn(method)}
    in_turns(turns, 2)  # Compile the training steps.
    found = ratios(in_turns(turns, ROUNDS), "plain")["sparse"]
    del turns
    gc.collect()
    return found


def once(point) -> dict:
    """Return the seconds that `sparsify`, `strip`, a mask update, `shrink` and the export take."""
    import numpy as np

    import keras_dst
    from keras_dst._training.drivers import drivers_of
    from keras_dst.methods import DST, Magnitude

    model, _ = net(point)
    times = {"sparsify": seconds(partial(keras_dst.sparsify, model, DST()))}
    times["strip"] = seconds(partial(keras_dst.strip, model))
    model, _ = net(point, Magnitude(SPARSITY))
    x = np.zeros((point.batch, point.width), np.float32)
    training = keras_dst.callbacks.SparseTraining()
    model.fit(x, np.zeros(len(x)), point.batch, verbose=0, callbacks=[training])
    (driver,) = drivers_of(model)
    driver.begin(TOTAL, TOTAL, TOTAL)
    update = partial(update_masks, driver, TOTAL)
    update()  # The first call compiles the mask update and is not timed.
    times["update"] = statistics.median(seconds(update) for _ in range(3))
    keras_dst.strip(model)
    times["shrink"] = seconds(partial(keras_dst.shrink, model))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.tflite"
        times["export"] = seconds(partial(keras_dst.export_tflite, model, path, measure=False))
    del model, driver, update
    gc.collect()
    return times


def slope(sizes, values) -> float:
    """Return the slope of the least-squares line through the logarithms of size and cost."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def table():
    lines = [
        "# Training time by size of the network",
        "",
        "The networks of this benchmark consist only of fully connected layers. All methods "
        "prune 90 % of the weights. All times are measured on one core. The first table of each "
        "section gives the step time of each method relative to the dense network, as the median "
        f"of {ROUNDS} rounds. Each round measures every network once. The second table gives "
        "times of single function calls in seconds. The column `update` contains the time of a "
        "mask update, which runs once every hundred training steps. `sparsify`, `strip`, "
        "`shrink` and the export with `export_tflite` run once per network. The export runs with "
        "`measure=False`, so that no latencies are measured. Each cost grows approximately as a "
        "power of the number of weights, layers or samples. The row `slope` gives the exponent of "
        "this power. `make bench-scaling` writes this page from `results/scaling/runs.jsonl`.",
    ]
    stored = results.runs(BENCHMARK)
    for backend in BACKENDS:
        if backend not in stored:
            continue
        found = stored[backend]["axes"]
        for axis, rows in ((a, found[a]) for a in AXES if a in found):
            size = [row[SIZES[axis]] for row in rows]
            lines += ["", f"## {SECTIONS[axis]}, {results.TITLES[backend]}"]
            lines += _rows(SIZES[axis], size, [row["ratio_to_plain"] for row in rows], ".2f")
            lines += _rows(SIZES[axis], size, [row["seconds"] for row in rows], ".3g", unit=" s")
    results.write_index(BENCHMARK, lines)


def _rows(heading, sizes, costs, digits, unit="") -> list[str]:
    """Return the lines of a table with one row per size. The last row contains the slopes."""
    rows = [
        [f"{size:,}", *(f"{value:{digits}}{unit}" for value in cost.values())]
        for size, cost in zip(sizes, costs)
    ]
    slopes = [f"{slope(sizes, [cost[name] for cost in costs]):.2f}" for name in costs[0]]
    return ["", *results.table([heading, *costs[0]], [*rows, ["slope", *slopes]])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="run this backend in this process")
    parser.add_argument("--axes", nargs="*", choices=AXES, default=list(AXES))
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    if args.backend:
        # Use one core for this process, before any library starts its threads.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        measure(args.axes)
        return
    if not args.table:
        # Start one process per varied quantity, because TensorFlow does not free the variables of a
        # finished `fit`.
        for name, axis in itertools.product(BACKENDS, args.axes):
            run_on(name, "training_cost.scaling", "--backend", name, "--axes", axis, variables=KEEP)
    table()


if __name__ == "__main__":
    main()
