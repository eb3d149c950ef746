"""Measure time and memory of a mask update of 25 million weights: results/mask_update.

Each method that ranks weights is applied to the kernels of a ResNet-50. The unit of time is one
pass over the weights, which computes `abs` and `sum` of all weights once. The benchmark alternates
between mask updates and passes over the weights. All times are CPU seconds on one core. Peak memory
is measured twice. The first measurement is the growth of the memory of the process, which includes
unused gaps of the C allocator. In the second measurement, the allocator puts each block in separate
pages, which avoids gaps.
"""

import argparse
import ctypes
import itertools
import json
import os
import pathlib
import statistics
import tempfile
from functools import partial

from benchmarks import results
from benchmarks.backends import BACKENDS, run_on
from benchmarks.timing import cpu_seconds, in_turns, ratios, update_masks

BENCHMARK = "mask_update"
ROUNDS = 9
STEPS = 10_000  # Number of training steps.
STEP = 100  # Number of training steps between two mask updates.
SELF = pathlib.Path("/proc/self")
# With this setting, glibc puts each block of 512 KiB or more in separate pages.
NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 19)}


def methods() -> dict:
    from keras_dst.methods import DCIL, FlipOut, Magnitude, OptG, RigL

    return {
        "Magnitude": Magnitude(0.9),
        "Magnitude, revival": Magnitude(0.9, revival=True),
        "FlipOut": FlipOut(0.9),
        "RigL": RigL(0.9),
        "DCIL": DCIL(0.9),
        "OptG": OptG(0.9),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="run this backend in this process")
    parser.add_argument(
        "--memory", type=pathlib.Path, help="measure only memory, and write it to this file"
    )
    args = parser.parse_args()
    if args.backend is None:
        for name in BACKENDS:
            run_on(name, "training_cost.mask_update", "--backend", name)
        table()
        return
    # Use one core for this process, before any library starts its threads.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if args.memory:
        args.memory.write_text(json.dumps({n: memory(m) for n, m in methods().items()}))
    else:
        measure()


def measure():
    import keras

    backend = keras.backend.backend()
    found = {name: times(method) for name, method in methods().items()}
    for column, variables in (("grown_over_weights", {}), ("memory_over_weights", NO_HOLES)):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            told = ("--backend", backend, "--memory", file.name)
            run_on(backend, "training_cost.mask_update", *told, variables=variables)
            for name, figure in json.load(file).items():
                found[name][column] = figure
    for name, figures in found.items():
        print(f"{backend:10s} {name:20s}", *figures.values())
    result = {"command": "make bench-overhead", "net": "ResNet50 of keras.applications"}
    results.save(BENCHMARK, backend, {**result, "rounds": ROUNDS, "methods": found})


def prepared(method):
    """Return the driver that updates the masks of a ResNet-50, and its compiled mask update."""
    import keras
    import numpy as np
    from keras import ops

    from benchmarks.data import apply_method
    from keras_dst._training.drivers import drivers_of

    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.applications.ResNet50(weights=None)
    model.compile(
        apply_method(method, model, keras.optimizers.SGD(0.1)), "sparse_categorical_crossentropy"
    )
    driver = drivers_of(model)[0]
    driver.begin(STEPS, STEPS, STEPS // 10)
    for layer in getattr(driver, "layers", []):
        # Mask updates of DCIL require this attribute, which is otherwise set by a training step.
        layer.traced_both_paths = True
    steps = itertools.count(STEPS // 4, STEP)

    def update():
        update_masks(driver, next(steps))

    update()
    random = np.random.default_rng(0)
    variables = model.trainable_variables
    model.optimizer.apply(
        [ops.convert_to_tensor(random.standard_normal(v.shape), v.dtype) for v in variables],
        variables,
    )
    update()
    return driver, update


def times(method) -> dict:
    """Return the CPU seconds of a mask update, and of `abs` and `sum` over all weights."""
    from keras import ops

    from keras_dst._backend.jit import jit

    driver, update = prepared(method)
    total = jit(lambda weights: sum(ops.sum(ops.abs(w)) for w in weights))

    def one_pass():
        float(ops.convert_to_numpy(total([ops.convert_to_tensor(w) for w in driver.weights])))

    one_pass()  # The first call compiles the function and is not timed.
    functions = {"pass": partial(cpu_seconds, one_pass), "update": partial(cpu_seconds, update)}
    found = in_turns(functions, ROUNDS)
    return {
        "passes": ratios(found, "pass")["update"],
        "seconds": statistics.median(found["update"]),
        "seconds_of_a_pass": statistics.median(found["pass"]),
        "weights": driver.size,
    }


def memory(method) -> float:
    """Return the peak memory of a mask update, relative to the memory of the weights."""
    from keras_dst.export.memory import kilobytes

    driver, update = prepared(method)
    # Return freed memory to the system, because reused memory would not be counted.
    ctypes.CDLL(None).malloc_trim(0)
    before = kilobytes("VmRSS")
    (SELF / "clear_refs").write_text("5")  # Reset the peak memory.
    update()
    return (kilobytes("VmHWM") - before) * 1024 / (4 * driver.size)


def table():
    lines = [
        "# Time and memory of a mask update",
        "",
        "The table below shows the cost of one mask update for a ResNet-50 with 25 million "
        "weights, on one core. RigL ranks each weight tensor separately, and the other methods "
        "rank all tensors together. The sparsity grows from one mask update to the next. Each "
        "cell contains the time and the peak memory of a mask update. The unit of time is one "
        "pass over the weights, which computes `abs` and `sum` of all weights once. The peak "
        "memory is relative to the memory of the weights. The goal for the time of a mask update "
        "was at most 60 passes over the weights. The goal for its peak memory was at most twice "
        "the memory of the weights. `make bench-overhead` writes this page from "
        "`results/mask_update/runs.jsonl`.",
        "",
    ]
    columns = {
        backend: {
            name: f"{cost['passes']:.0f} passes, {cost['memory_over_weights']:.1f}×"
            for name, cost in run["methods"].items()
        }
        for backend, run in results.runs(BENCHMARK).items()
    }
    results.write_index(BENCHMARK, [*lines, *results.columns(columns)])


if __name__ == "__main__":
    main()
