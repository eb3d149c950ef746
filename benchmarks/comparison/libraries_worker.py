"""Measure one pruning tool for benchmarks.comparison.libraries, in the environment of the tool.

python -m benchmarks.comparison.libraries_worker TOOL

The results for LeNet-300-100 and ResNet-8 are stored in results/libraries, and the `.tflite` files
in build/peers/. Each method trains in a process of its own, so that its peak memory can be
measured.
"""

import multiprocessing
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from unittest import mock

import numpy as np

from benchmarks import results
from benchmarks.timing import cpu_seconds, in_turns, ratios, steps_of_fit

NET, RESNET = "lenet-300-100", "resnet-8"
TARGET, EPOCHS, BATCH, RATE, SEEDS = 0.9, 5, 128, 0.05, 3
# A round has 110 steps and contains at least one mask update, because masks are updated every 100
# steps.
STEPS, ROUNDS = 110, 9
FEW = 8  # Number of training steps per epoch of the ResNet.
ALPHAS = (1e-4, 1.25e-4, 1.5e-4, 2e-4, 6e-4)  # Values of alpha to test.
FILES = results.ROOT / "build" / "peers"


class Tool:
    """Base class of pruning tools.

    `begin` is called before the model is compiled, and `end` is called after training.
    """

    methods: tuple = ()
    slow: tuple = ()  # Slow methods, which are trained with only one seed.
    probabilities = True  # True if the network ends with a softmax.
    setting = None  # Argument `alpha` of DST. None: the default.

    def begin(self, method, model, optimizer, epochs, steps):
        """Return the pruned model, the optimizer for `compile`, and the callbacks for `fit`."""
        raise NotImplementedError

    def end(self, model):
        return model

    def files(self, model):
        """Yield a name for each choice of converter options, and the `.tflite` file as bytes."""
        import tensorflow as tf

        sparse = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
        for way, optimizations in {"converter": [], "EXPERIMENTAL_SPARSITY": sparse}.items():
            converter = tf.lite.TFLiteConverter.from_keras_model(model)
            converter.optimizations = optimizations
            yield way, converter.convert()


class KerasDST(Tool):
    methods = ("Magnitude, uniform", "Magnitude", "DST")

    def __init__(self):
        os.environ["KERAS_BACKEND"] = "tensorflow"
        import keras_dst

        self.library = keras_dst

    def begin(self, method, model, optimizer, epochs, steps):
        from benchmarks.data import apply_method

        made = {
            "Magnitude, uniform": partial(self.library.methods.Magnitude, TARGET, "uniform"),
            "Magnitude": partial(self.library.methods.Magnitude, TARGET),
            "DST": partial(self.library.methods.DST, sparsity=TARGET),
        }
        optimizer = apply_method(made[method](), model, optimizer)
        return model, optimizer, [self.library.callbacks.SparseTraining(epochs)]

    def end(self, model):
        return self.library.strip(model)

    def files(self, model):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "model.tflite"
            for optimize in ("latency", "size"):
                self.library.export_tflite(model, path, optimize=optimize)
                yield f"export_tflite, {optimize}", path.read_bytes()


class Tfmot(Tool):
    methods = ("prune_low_magnitude",)

    def __init__(self):
        from benchmarks.training_cost.tfmot_step_time import (
            tfmot,  # The import replaces Keras by tf_keras.
        )

        self.library = tfmot.sparsity.keras

    def begin(self, method, model, optimizer, epochs, steps):
        """Wrap the model with tfmot. Use the default sparsity schedule of keras_dst's Magnitude."""
        total = epochs * steps
        schedule = self.library.PolynomialDecay(
            0.0, TARGET, 0, int(0.75 * total), frequency=min(100, total // 20)
        )
        model = self.library.prune_low_magnitude(model, pruning_schedule=schedule)
        return model, optimizer, [self.library.UpdatePruningStep()]

    def end(self, model):
        return self.library.strip_pruning(model)


class TfmotOnKeras3(Tfmot):
    """Pruning tool that tests whether tfmot can prune a Keras 3 model."""

    methods = ("prune_low_magnitude, Keras 3",)

    def __init__(self):
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
        import tensorflow_model_optimization as tfmot

        self.library = tfmot.sparsity.keras


class PQuantML(Tool):
    """Pruning tool that runs PQuantML without quantization."""

    methods = ("DST", "PDP", "Wanda", "Wanda, no pretraining")
    slow = ("PDP",)
    # The network ends without softmax, because PQuantML removes all activations except ReLU and
    # tanh.
    probabilities = False

    def __init__(self):
        os.environ["KERAS_BACKEND"] = "tensorflow"
        import pquant
        from pquant.core.keras.train import PQuantCallback

        self.library, self.callback = pquant, PQuantCallback

    def config(self, method, epochs):
        config = getattr(self.library, f"{method.split(',')[0].lower()}_config")()
        config.quantization_parameters.enable_quantization = False
        pruning, training = config.pruning_parameters, config.training_parameters
        training.epochs, training.pretraining_epochs, training.fine_tuning_epochs = epochs, 0, 0
        if method.startswith("DST"):
            pruning.alpha = self.setting or pruning.alpha
        else:
            pruning.sparsity = TARGET
        # PDP fine-tunes the network in the last 1/5 of all epochs, and reaches its target sparsity
        # after 2/3 of the epochs before the fine-tuning.
        if method == "PDP":
            training.fine_tuning_epochs = epochs // 5
            training.epochs = epochs - training.fine_tuning_epochs
            pruning.epsilon = 1.5 / training.epochs
        # Wanda pretrains the network for 1/5 of all epochs, and prunes the network once, after 3/5
        # of all epochs.
        if method == "Wanda":
            training.pretraining_epochs = epochs // 5
            training.epochs = epochs - training.pretraining_epochs
            pruning.t_start_collecting_batch = 2 * epochs // 5
        return config

    def begin(self, method, model, optimizer, epochs, steps):
        config = self.config(method, epochs)
        model = self.library.add_compression_layers(model, config)
        return model, optimizer, [self.callback(config, log_ebops=False, log_keep_ratio=False)]

    def search(self):
        """Train with several values of alpha, and return the best value and all tested values.

        The best value is the alpha whose network has the sparsity closest to the target sparsity.
        """
        tried = []
        for self.setting in ALPHAS:
            model, *_ = train(self, "DST", seed=0)
            tried.append({"alpha": self.setting, "sparsity": sparsity_of(model)})
        return min(tried, key=lambda each: abs(each["sparsity"] - TARGET)) | {"tried": tried}


class PQuantMLLayers(PQuantML):
    """Pruning tool that builds the ResNet from PQuantML's own layers, as PQuantML recommends."""

    methods = ("DST, net written in its layers",)

    def begin(self, method, model, optimizer, epochs, steps):
        from benchmarks import networks

        config, layers = self.config(method, epochs), self.library.layers

        def convolution(filters, size, strides=1, **options):
            strides = (strides, strides)
            return layers.PQConv2d(config, filters, (size, size), strides=strides, **options)

        made = {"Conv2D": convolution, "Dense": lambda units, _: layers.PQDense(config, units)}
        with mock.patch.multiple(networks.layers, **made):
            model = networks.resnet(8)
        return model, optimizer, [self.callback(config, log_ebops=False, log_keep_ratio=False)]


TOOLS = {
    "keras_dst": [KerasDST],
    "tfmot": [Tfmot, TfmotOnKeras3],
    "PQuantML": [PQuantML, PQuantMLLayers],
}


def built(tool, method, net, epochs, steps):
    """Return a compiled model, and the callbacks for its training."""
    import keras

    rate = keras.optimizers.schedules.CosineDecay(RATE, epochs * steps)
    model, optimizer, callbacks = net(), keras.optimizers.SGD(rate, momentum=0.9), []
    logits = False
    if method != "dense":
        model, optimizer, callbacks = tool.begin(method, model, optimizer, epochs, steps)
        logits = not tool.probabilities
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=logits)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model, callbacks


def train(tool, method, seed):
    """Train LeNet-300-100.

    Return the trained model, its test accuracy, and the additional memory of the training in bytes.
    """
    import keras

    from benchmarks import networks
    from benchmarks.data import mnist

    (x, y), (x_test, y_test) = mnist()
    steps = len(y) // BATCH
    x, y = x[: steps * BATCH], y[: steps * BATCH]
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    model, callbacks = built(tool, method, networks.lenet_300_100, EPOCHS, steps)
    before = memory(reset=True)
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=callbacks)
    added = memory() - before
    model = model if method == "dense" else tool.end(model)
    found = model.predict(x_test, batch_size=500, verbose=0).argmax(-1) == y_test
    return model, float(found.mean()), added


def kernels(model) -> list:
    return [np.asarray(weight) for weight in model.weights if "kernel" in weight.name]


def sparsity_of(model) -> float:
    weights = np.concatenate([kernel.ravel() for kernel in kernels(model)])
    return float(np.mean(weights == 0))


def memory(reset=False) -> int:
    """Return the peak memory of this process since the last reset, in bytes."""
    process = pathlib.Path("/proc/self")
    if reset:
        (process / "clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", (process / "status").read_text())[1])


def accuracy(kind, method, setting):
    """Train with all seeds.

    Return the accuracy and the sparsity for each seed. For the first seed, also return the used
    memory, the sparsity of each layer, and the names of the `.tflite` files.
    """
    tool, result = kind(), {"test_accuracy": [], "sparsity": [], "files": {}}
    tool.setting = setting
    for seed in range(1 if method in tool.slow else SEEDS):
        model, correct, added = train(tool, method, seed)
        result["test_accuracy"].append(correct)
        result["sparsity"].append(sparsity_of(model))
        print(kind.__name__, method, seed, correct, result["sparsity"][-1], flush=True)
        if seed == 0:
            result["memory"] = added
            result["layers"] = [float(np.mean(kernel == 0)) for kernel in kernels(model)]
            files = dict(tool.files(model))
            for way, content in [*files.items()][: 1 if method == "dense" else None]:
                name = f"{kind.__name__} {method} {way}.tflite".replace(", ", "-").replace(" ", "_")
                (FILES / name).write_bytes(content)
                result["files"][way] = name
    return result


def times(kind, methods):
    """Return the step times relative to the dense network, and the compile times in CPU seconds."""
    tool, turns = kind(), {}
    from benchmarks import networks
    from benchmarks.data import mnist

    steps = STEPS + 1  # The first step is not timed.
    x, y = (part[: steps * BATCH] for part in mnist()[0])
    # The first training run in a process takes longer, because of one-time costs. Therefore train
    # an extra network, "start", before the measured networks.
    for name in ("start", "dense", *methods):
        method = "dense" if name == "start" else name
        model, callbacks = built(tool, method, networks.lenet_300_100, ROUNDS + 2, steps)
        turns[name] = partial(steps_of_fit, model, x, y, BATCH, callbacks, time.process_time)
    turns.pop("start")()
    first, again = ({n: cpu_seconds(turn) for n, turn in turns.items()} for _ in range(2))
    found = in_turns(turns, ROUNDS)
    return {
        "steps_per_round": STEPS,
        "ratio_to_dense": ratios(found, "dense"),
        "median_seconds_per_step": {n: statistics.median(t) / STEPS for n, t in found.items()},
        "seconds_to_compile": {n: max(0.0, first[n] - again[n]) for n in turns},
        "seconds_per_round": found,
    }


def jobs(kind):
    """Prune, train and convert a ResNet with each method.

    Return a dict with one entry per method. The entry of a method contains the sparsity of the
    ResNet, or the stage that failed and its error.
    """
    tool, found = kind(), {}
    from benchmarks import networks

    rng = np.random.default_rng(0)
    x = rng.standard_normal((FEW * BATCH, 32, 32, 3)).astype("float32")
    y = rng.integers(0, 10, FEW * BATCH)
    for method in tool.methods:
        stage = "pruning"
        try:
            model, callbacks = built(tool, method, partial(networks.resnet, 8), EPOCHS, FEW)
            stage = "training"
            model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=callbacks)
            stage = "finishing"
            model = tool.end(model)
            stage = "converting"
            way, content = next(tool.files(model))
            found[method] = {"sparsity": sparsity_of(model), "bytes": {way: len(content)}}
        except Exception as error:
            found[method] = {"stage": stage, "error": message_of(error)}
    return found


def message_of(error) -> str:
    """Return the message of an error without color codes."""
    return f"{type(error).__name__}: " + re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()


def in_new_process(function, *arguments):
    """Run a function in a new process and return its result."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def search(kind):
    return kind().search()


def main():
    # Use one core for this process and its children.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    FILES.mkdir(parents=True, exist_ok=True)
    name = sys.argv[1]
    kinds = TOOLS[name]
    kind = kinds[0]
    setting = in_new_process(search, kind) if hasattr(kind, "search") else None
    found = {}
    for method in ("dense", *kind.methods):
        try:
            found[method] = in_new_process(accuracy, kind, method, setting and setting["alpha"])
        except Exception as error:
            found[method] = {"error": message_of(error)}
    measured = [method for method in found if method != "dense" and "error" not in found[method]]
    lenet = {"methods": found, "search": setting, "times": in_new_process(times, kind, measured)}
    done = {
        method: result for each in kinds for method, result in in_new_process(jobs, each).items()
    }

    kind()  # Import the version of Keras that the tool needs.
    about = {"command": "make bench-libraries", "tool": name, "target": TARGET, "batch": BATCH}
    about |= {"epochs": EPOCHS}
    results.save(
        "libraries", f"{NET}_{name}", about | {"net": NET, "seeds": list(range(SEEDS))} | lenet
    )
    results.save(
        "libraries",
        f"{RESNET}_{name}",
        about | {"net": RESNET, "steps": EPOCHS * FEW, "jobs": done},
    )


if __name__ == "__main__":
    main()
