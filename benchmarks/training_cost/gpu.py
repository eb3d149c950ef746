"""Measure steps, mask updates and memory on a GPU with JAX and PyTorch: results/gpu.

    python -m benchmarks.training_cost.gpu                  both backends, at most nine minutes
    python -m benchmarks.training_cost.gpu --backend jax    one backend, which gets all the time
    python -m benchmarks.training_cost.gpu --smoke          tiny networks on the CPU, nothing stored

The data are random. Each round trains the dense network and the sparse network for 17 steps, and
the first step of each network is not timed. The step time includes the copy of the batch to the
GPU. The step ratio is the time of a sparse step divided by the time of a dense step, as the median
over all rounds. For DCIL, each round contains a mask update. For all other methods, mask updates
are timed separately. The step ratio includes the time of a mask update, divided by the number of
steps from one update to the next. In this benchmark, OptG updates its masks every 200 steps,
instead of once per epoch.

The time of a mask update is also divided by the time of one pass over the weights. One pass copies
all prunable weights in float32, so that each byte is read and written once. The peak memory is
measured during training steps and a mask update. PyTorch reports the peak memory. With JAX, a
thread reads the current memory every millisecond, because JAX cannot reset its peak memory.

The time that is left is divided equally among the methods that are not measured yet. A method is
skipped if the remaining time is shorter than the first `fit` of the dense network. The results of
each method are stored as soon as the method is measured.
"""

import argparse
import gc
import itertools
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks import results
from benchmarks.backends import card, run_on
from benchmarks.timing import in_turns, ratios, seconds, steps_of_fit, update_masks

BENCHMARK = "gpu"
BACKENDS = ("jax", "torch")
SECONDS = 520  # Time limit for all backends together.
RESERVE = 15  # Seconds kept in reserve, so that the process ends before the time limit.
TOTAL = 4000  # Number of training steps of the schedule.
STEPS = 16  # Number of timed steps of each network per round.
MOST_TURNS = 7
UPDATES = 5
COPIES = 50
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


@dataclass
class Setting:
    """Network whose training is timed, with its batch size and its dtype policies."""

    title: str
    net: Callable
    shape: tuple
    batch: int
    policies: tuple = POLICIES[:1]


def resnet_32():
    from benchmarks import networks

    return networks.resnet(32)


def resnet_50():
    import keras

    return keras.applications.ResNet50(weights=None, classifier_activation=None)


def vit_small():
    from benchmarks import networks

    return networks.vision_transformer(12, 384, 6, size=224, patch=16)


def mlp(width: int = 4096, depth: int = 6):
    import keras

    hidden = [keras.layers.Dense(width, "relu") for _ in range(depth)]
    return keras.Sequential([keras.Input((width,)), *hidden, keras.layers.Dense(10)])


def tiny_resnet():
    from benchmarks import networks

    return networks.resnet(8, width=4, stride=4)


SETTINGS = {
    "mlp": Setting("MLP of 101 M weights", mlp, (4096,), 256, POLICIES),
    "resnet-32": Setting("ResNet-32, 32 px", resnet_32, (32, 32, 3), 128),
    "vit-s": Setting("ViT-S, 224 px", vit_small, (224, 224, 3), 64),
    "resnet-50": Setting("ResNet-50, 224 px", resnet_50, (224, 224, 3), 64),
}
SMOKE = {
    "mlp": Setting("tiny MLP", partial(mlp, 32, 2), (32,), 4, POLICIES),
    "resnet-32": Setting("tiny ResNet", tiny_resnet, (32, 32, 3), 4),
}


def methods() -> dict:
    from keras_dst.methods import DCIL, DST, FlipOut, Magnitude, OptG, RigL

    return {
        "DST": DST(),
        "DCIL": DCIL(0.9),
        "OptG": OptG(0.9, frequency=200),
        "FlipOut": FlipOut(0.9),
        "Magnitude": Magnitude(0.9),
        "RigL": RigL(0.9),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="only this backend (default: both)")
    parser.add_argument("--nets", nargs="*", choices=SETTINGS, help="only these networks")
    parser.add_argument("--smoke", action="store_true", help="tiny networks, nothing is stored")
    parser.add_argument("--seconds", type=float, help="seconds to measure in this process")
    args = parser.parse_args()
    if args.seconds:
        measure(args.nets or list(SETTINGS), args.smoke, args.seconds - RESERVE)
        return
    chosen = [args.backend] if args.backend else BACKENDS
    limit = SECONDS / len(chosen)
    options = ["--seconds", str(limit), *(["--smoke"] if args.smoke else [])]
    options += ["--nets", *args.nets] if args.nets else []
    failed = []
    for name in chosen:
        try:
            run_on(name, "training_cost.gpu", *options, timeout=limit)
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {limit:.0f} s. All rows printed above are stored.")
        except subprocess.CalledProcessError:
            failed.append(name)
    if not args.smoke and results.runs(BENCHMARK):
        table()
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}. Choose a backend with --backend.")


def measure(nets, smoke, limit):
    """Measure the networks, and store the results after each method."""
    import keras

    deadline = time.perf_counter() + limit
    backend = keras.backend.backend()
    device = card()
    if device is None and not smoke:
        sys.exit(
            f"Expected an accelerator. {backend} found none. Fix: pass --smoke to use the CPU."
        )
    print(f"{backend} runs on: {device or 'CPU'}")
    settings = SMOKE if smoke else SETTINGS
    cases = [(n, p) for n in nets if n in settings for p in settings[n].policies]
    cases.sort(key=lambda case: POLICIES.index(case[1]) > 0)  # Measure float32 first.
    chosen = methods()
    for done, (net, policy) in enumerate(cases):
        setting = settings[net]
        name = f"{backend}, {net}, {policy}"
        run = {
            "command": "make bench-gpu",
            "card": device,
            "net": f"{setting.title}, batch {setting.batch}",
            "seed": 0,
            "steps_per_turn": STEPS,
            "methods": {},
        }
        keras.config.set_dtype_policy(policy)
        x, y = data(setting)
        plain = None
        for turn, (method_name, method) in enumerate(chosen.items()):
            left = deadline - time.perf_counter()
            rows = (len(cases) - done) * len(chosen) - turn
            if left < (plain.first_fit if plain else 0):
                run["methods"][method_name] = None
                print(f"{name}, {method_name}: left out, because the time is over")
            else:
                plain = plain or TimedNetwork(None, setting, x, y)
                budget = 0 if smoke else left / rows
                row = compared(plain, TimedNetwork(method, setting, x, y), budget)
                run["methods"][method_name] = row
                print(f"{name}, {method_name}:", *cells(row).values(), sep="  ", flush=True)
            if not smoke:
                results.save(BENCHMARK, name, run)


def data(setting) -> tuple:
    """Return random inputs and labels for one round of training. All steps use the same batch."""
    import numpy as np

    batch = np.random.default_rng(0).standard_normal((setting.batch, *setting.shape))
    x = np.concatenate([batch.astype("float32")] * (STEPS + 1))
    return x, np.arange(len(x)) % 10


class TimedNetwork:
    """Network that is trained with a pruning method, to measure the time of its training steps.

    The constructor trains the network for two rounds, to measure `first_fit` and `peak`. If the
    method is None, the network is dense.

    Attributes:
        turn: Function that trains the network for one round, and returns the total time of the
            timed steps in seconds.
        update: Function that updates the masks, or None if the method has no mask updates.
        first_fit: Seconds of the first call of `fit`, including compilation.
        peak: Peak memory on the GPU in bytes, during a round of training and a mask update. None on
            a CPU.
    """

    def __init__(self, method, setting, x, y):
        import keras

        import keras_dst
        from benchmarks.data import apply_method

        gc.collect()
        before = bytes_in_use()
        keras.utils.set_random_seed(0)
        self.model = setting.net()
        optimizer = apply_method(method, self.model, keras.optimizers.SGD(0.01, momentum=0.9))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(optimizer, loss)
        callbacks = [keras_dst.callbacks.SparseTraining(TOTAL // (STEPS + 1))] if method else []
        self.turn = partial(steps_of_fit, self.model, x, y, setting.batch, callbacks)
        self.first_fit = seconds(self.turn)
        self.driver = callbacks[0]._drivers[0] if method else None
        self.update = None
        if self.driver and self.driver.clock:
            steps = itertools.count(TOTAL // 4, 100)
            self.update = lambda: update_masks(self.driver, next(steps))
            self.update()  # The first call compiles the mask update and is not timed.

        def turn_and_update():
            self.turn()
            if self.update:
                self.update()

        peak = peak_bytes(turn_and_update)
        self.peak = None if peak is None else peak - before


def compared(plain: TimedNetwork, sparse: TimedNetwork, budget: float) -> dict:
    """Time a sparse and a dense network alternately, for at most `budget` seconds.

    The first call of `fit` with the sparse network counts toward the `budget`. At least one round
    is timed.
    """
    end = time.perf_counter() + budget - sparse.first_fit
    times: dict[str, list[float]] = {"plain": [], "sparse": []}
    while len(times["plain"]) < MOST_TURNS:
        for name, found in in_turns({"plain": plain.turn, "sparse": sparse.turn}, 1).items():
            times[name] += found
        if time.perf_counter() > end:
            break
    step = statistics.median(times["plain"]) / STEPS
    loss = float(sparse.model.get_metrics_result()["loss"])
    row = {
        "step_ratio": ratios(times, "plain")["sparse"],
        "dense_seconds_per_step": step,
        "turns": len(times["plain"]),
        "seconds_of_first_fit": [plain.first_fit, sparse.first_fit],
        "peak_bytes": sparse.peak,
        "dense_peak_bytes": plain.peak,
        "weights": sparse.driver.size,
        "loss_is_finite": math.isfinite(loss),
        "sparsity": sparse.driver.measured_sparsity(),
    }
    if sparse.update:
        update = statistics.median(seconds(sparse.update) for _ in range(UPDATES))
        every = sparse.driver.clock.period
        # If masks are updated at least every STEPS steps, the timed steps already include updates.
        if every > STEPS:
            row["step_ratio"] += update / every / step
        row["update"] = {
            "seconds": update,
            "every_steps": every,
            "seconds_of_a_pass": seconds_of_a_pass(sparse.driver.size),
        }
    return row


def seconds_of_a_pass(size: int) -> float:
    """Return the seconds that the GPU takes to copy `size` float32 numbers."""
    from keras import ops

    from keras_dst._backend.jit import jit

    numbers, add = ops.ones((size,), "float32"), jit(lambda numbers: numbers + 1)

    def copies():
        for _ in range(COPIES):
            found = add(numbers)
        ops.convert_to_numpy(found[:1])  # Wait for the GPU.

    copies()  # The first call compiles the function and is not timed.
    return statistics.median(seconds(copies) for _ in range(3)) / COPIES


def bytes_in_use() -> int:
    """Return the bytes that the tensors of the backend occupy on the GPU, or 0 on a CPU."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.memory_allocated()
    import jax

    return (jax.devices()[0].memory_stats() or {"bytes_in_use": 0})["bytes_in_use"]


def peak_bytes(work: Callable) -> int | None:
    """Run `work`, and return the peak memory on the GPU in bytes, or None on a CPU."""
    import keras

    if card() is None:
        work()
        return None
    if keras.backend.backend() == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    # JAX also reports the peak memory, but cannot reset the peak.
    sampled, stop = [bytes_in_use()], threading.Event()

    def sample():
        while not stop.wait(0.001):
            sampled.append(bytes_in_use())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        work()
    finally:
        stop.set()
        thread.join()
    return max(sampled)


def cells(row: dict | None) -> dict[str, str]:
    """Return a dict from the heading of each table column to the cell of a method."""
    if row is None:
        return {"step": "not measured"}
    dense = 1e3 * row["dense_seconds_per_step"]
    found = {"step": f"{row['step_ratio']:.2f}× of {dense:.2f} ms"}
    if update := row.get("update"):
        passes = update["seconds"] / update["seconds_of_a_pass"]
        found["update"] = f"{1e3 * update['seconds']:.1f} ms every {update['every_steps']} steps"
        found["passes"] = f"{passes:.0f}"
    if row["peak_bytes"]:
        ratio = row["peak_bytes"] / row["dense_peak_bytes"]
        found["memory"] = f"{row['peak_bytes'] / 2**20:.0f} MiB ({ratio:.2f}×)"
    if not row["loss_is_finite"]:
        found["loss"] = "not finite"
    return found


def table():
    lines = [
        "# On a GPU",
        "",
        "The tables show the time of a training step and the peak memory as ratios to the dense "
        "network on the same GPU. Mask updates are included. The time of a mask update is given "
        "in milliseconds and in passes. One pass copies as many bytes as the weights take. `make "
        "bench-gpu` writes this page from the runs in this folder.",
    ]
    for name, run in results.runs(BENCHMARK).items():
        backend, _, policy = name.split(", ")
        rows = {method: cells(row) for method, row in run["methods"].items()}
        measured = next((row for row in run["methods"].values() if row), None)
        dense = (
            f", dense step {1e3 * measured['dense_seconds_per_step']:.2f} ms" if measured else ""
        )
        lines += ["", f"## {run['net']}, {policy}, {backend}, {run['card']}{dense}", ""]
        names = dict.fromkeys(column for row in rows.values() for column in row)
        columns = {c: {m: row.get(c, "") for m, row in rows.items()} for c in names}
        lines += results.columns(columns)
    results.write_index(BENCHMARK, lines)


if __name__ == "__main__":
    main()
