"""Measure accuracy and size of sparse int8 files for microcontrollers and NPUs: results/micro.

python -m benchmarks.files.micro [--nets NET ...]

Four small networks are trained with and without pruning, stripped, and exported for TensorFlow Lite
Micro and for three Ethos-U NPUs. The accuracies of the float model and of the int8 file are
measured on all test samples after the last epoch. Vela estimates the bytes of the encoded weights
and the number of cycles of a network. Trained networks are saved in build/micro. Runs that are
already stored are skipped.
"""

import argparse
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import keras
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from tflite_micro.python.tflite_micro.runtime import Interpreter as Micro

import keras_dst
from benchmarks import networks, results
from benchmarks.data import cifar10, mnist, spoken_digits
from keras_dst.export.ethos import compile_for_npu
from keras_dst.export.quantize import to_int8
from keras_dst.methods import Magnitude

BENCHMARK = "micro"
BATCH, SEED = 128, 0
TRAINED = results.ROOT / "build" / "micro"
KERNELS = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


@dataclass
class Net:
    """Training task: a network, its data, and the number of epochs."""

    title: str
    build: Callable
    data: Callable
    epochs: int
    rate: float
    prunable: str  # Regular expression that matches the kernels to prune.
    variants: tuple[str, ...] = ("dense", "80", "90", "95")


NETS = {
    "lenet": Net("LeNet-300-100, MNIST", networks.lenet_300_100, mnist, 10, 0.05, ".*/kernel"),
    "keywords": Net(
        "Keyword-spotting CNN, spoken digits",
        networks.keyword_cnn,
        spoken_digits,
        30,
        0.05,
        ".*(conv2d_[12]|dense)/kernel",
    ),
    "resnet": Net(
        "ResNet-8 of width 32 with a first stride of 2, CIFAR-10",
        lambda: networks.resnet(8, width=32, stride=2),
        cifar10,
        4,
        0.05,
        ".*conv2d_.*/kernel",
        ("dense", "80", "90", "95", "2:4", "16 values", "90, 16 values"),
    ),
    "ds-cnn": Net("DS-CNN, CIFAR-10", networks.ds_cnn, cifar10, 4, 0.05, ".*pointwise.*/kernel"),
}
METHODS = {
    "dense": None,
    "80": Magnitude(0.8),
    "90": Magnitude(0.9),
    "95": Magnitude(0.95),
    "2:4": Magnitude(0.5, pattern="2:4"),
}


VALUES = 16
# Maps each variant with clustered weights to the variant from which the clustering starts.
TUNED = {
    f"{VALUES} values": "dense",
    f"90, {VALUES} values": "90",
}
SAMPLES = 200
NPUS = ("ethos-u55-128", "ethos-u65-256", "ethos-u85-256")
COMPARED = 100  # Number of test samples for the comparison with LiteRT.
BARS = {"tflm": 0.25, "weights": 0.20, "cycles": 0.45, "lost": 0.5}


def train_or_load(name, variant):
    """Train a network and save it, or load the trained network if its file exists."""
    net = NETS[name]
    TRAINED.mkdir(parents=True, exist_ok=True)
    path = TRAINED / f"{name}_{variant}.keras"
    if path.exists():
        return keras.saving.load_model(path)
    x, y = net.data()[0]
    keras.utils.clear_session()
    if variant in TUNED:
        model, epochs, rate = train_or_load(name, TUNED[variant]), 1, net.rate / 10
    else:
        keras.utils.set_random_seed(SEED)
        model, epochs, rate = net.build(), net.epochs, net.rate
    keras.utils.set_random_seed(SEED)
    decay = keras.optimizers.schedules.CosineDecay(rate, epochs * -(-len(y) // BATCH))
    optimizer, callbacks = keras.optimizers.SGD(decay, momentum=0.9), []
    if variant in TUNED:
        callbacks = [keras_dst.callbacks.KeepClusters(VALUES)]
    elif method := METHODS[variant]:
        optimizer = keras_dst.SparseOptimizer(optimizer, method, filters=net.prunable)
        callbacks = [keras_dst.callbacks.SparseTraining()]
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=2, callbacks=callbacks)
    keras_dst.strip(model).save(path)
    return model


def largest_difference(content, x):
    """Return the largest difference between int8 outputs in TensorFlow Lite Micro and in LiteRT."""
    lite = Interpreter(model_content=content, experimental_op_resolver_type=KERNELS)
    lite.allocate_tensors()
    taken, given = lite.get_input_details()[0], lite.get_output_details()[0]["index"]
    micro = Micro.from_bytes(content)
    scale, zero = taken["quantization"]
    largest = 0
    for sample in to_int8(x, scale, zero):
        lite.set_tensor(taken["index"], sample[None])
        lite.invoke()
        micro.set_input(sample[None], 0)
        micro.invoke()
        difference = lite.get_tensor(given).astype(int) - micro.get_output(0)
        largest = max(largest, int(abs(difference).max()))
    return largest


def in_tflm(net, model):
    """Return the sizes and arena sizes of the file for TFLM and of the dense int8 file."""
    (x, _), (x_test, _) = net.data()
    with tempfile.TemporaryDirectory() as folder:
        report = keras_dst.export_tflite(
            model,
            pathlib.Path(folder) / "model.tflite",
            target="micro",
            quantize="full",
            representative=x[:SAMPLES],
            inputs=x_test[:32],
        )
    stored = sum(tensor.bytes for tensor in report.tensors)
    return {**dataclasses.asdict(report.micro), "weight_bytes": stored}


def run(name, variant):
    net, model = NETS[name], train_or_load(name, variant)
    (x, y), (x_test, y_test) = net.data()
    with tempfile.TemporaryDirectory() as folder:
        report = keras_dst.export_tflite(
            model,
            pathlib.Path(folder) / "model.tflite",
            target=NPUS[0],
            quantize="full",
            representative=x[:SAMPLES],
            inputs=x_test[:32],
            evaluate=(x_test, y_test),
        )
        content = report.path.read_bytes()
    estimates = {report.vela.accelerator: report.vela}
    estimates |= {npu: compile_for_npu(content, npu)[1] for npu in NPUS[1:]}
    results.save(
        BENCHMARK,
        f"{name}_{variant}",
        {
            "command": "make bench-micro",
            "net": name,
            "variant": variant,
            "method": repr(METHODS[TUNED.get(variant, variant)]),
            "seed": SEED,
            "epochs": net.epochs,
            "trained_on": len(y),
            "tested_on": len(y_test),
            "samples": SAMPLES,
            "parameters": model.count_params(),
            "sparsity": keras_dst.report(model).sparsity,
            "float_accuracy": float((model.predict(x_test, verbose=0).argmax(-1) == y_test).mean()),
            "int8_accuracy": report.files[-1].accuracy,
            "bytes": report.bytes,
            "gzip_bytes": report.gzip_bytes,
            "tflm": in_tflm(net, model),
            "tflm_difference": largest_difference(content, x_test[:COMPARED]),
            "vela": {npu: dataclasses.asdict(found) for npu, found in estimates.items()},
        },
    )


def file_ratios(run, dense):
    """Return the file sizes and the arena size of a run, relative to dense files.

    The ratio `gzip` compares the file of the run with the file of the dense network. All ratios
    except `gzip` compare the file for TFLM with the dense int8 file of the same run. The dense int8
    file of a network has the same size in every run.
    """
    micro = run["tflm"]
    return {
        "gzip": run["gzip_bytes"] / dense["gzip_bytes"],
        "TFLM file": micro["bytes"] / micro["dense_bytes"],
        # To show only the effect of zeros, do not count the bytes of the dense file that TFLM does
        # not read.
        "zeros only": micro["bytes"] / (micro["dense_bytes"] - micro["unread_bytes"]),
        "TFLM arena": micro["arena"] / micro["dense_arena"],
    }


def npu_ratios(run, dense):
    """Return Vela's estimates for each NPU, divided by Vela's estimates for the dense network."""
    found = {}
    for npu in NPUS:
        label = npu.removeprefix("ethos-").upper()
        own, other = run["vela"][npu]["file"], dense["vela"][npu]["file"]
        found[f"{label} weights"] = own["weight_bytes"] / other["weight_bytes"]
        found[f"{label} cycles"] = own["cycles"] / other["cycles"]
        found[f"{label} NPU cycles"] = own["npu_cycles"] / other["npu_cycles"]
    return found


def table():
    stored = results.runs(BENCHMARK)
    lines = [
        "# Microcontrollers and NPUs",
        "",
        "Each network on this page has three tables. The first table shows the percentage of zeros "
        "among all kernel weights, including the weights of kernels that stay dense. The first "
        "table also shows the accuracy in % of the float32 model and of its int8 file on all test "
        "samples. The columns `bytes` and `arena` describe the int8 file with dense weights that "
        "TensorFlow's converter writes. The arena is the memory, in bytes, that TensorFlow Lite "
        "Micro (TFLM) allocates to run a file.",
        "",
        "The second table compares each file with a file of the dense network, which is trained "
        "for the same number of epochs. The column `gzip` gives the size of the file after "
        "compression. The columns `TFLM file` and `TFLM arena` give the size and the arena of the "
        "file that keras_dst exports for TFLM. A file for TFLM omits the zeros of pruned kernels, "
        "and parts that TFLM does not need, such as metadata and repeated zero points. For the "
        "column `zeros only`, the parts that TFLM does not need are also removed from the dense "
        "file. The column `zeros only` therefore shows only the effect of zeros.",
        "",
        "The third table shows the bytes of the encoded weights and the cycles of three Ethos-U "
        "NPUs, relative to the dense network. The NPU cycles are the cycles in which the NPU "
        "computes. The figures for NPUs are **Vela's estimates** with Vela's default "
        "configurations, not measurements on hardware.",
        "",
        "`make bench-micro` writes this page from `results/micro/runs.jsonl`.",
    ]
    for name, net in NETS.items():
        runs = {variant: stored[f"{name}_{variant}"] for variant in net.variants}
        first = next(iter(runs.values()))
        lines += [
            "",
            f"## {net.title}",
            "",
            f"The network ({first['parameters']:,} parameters) is trained for {net.epochs} epochs "
            f"on {first['trained_on']:,} samples and tested on {first['tested_on']:,} samples.",
        ]
        files, ratios, npus = [], [], []
        for variant, run in runs.items():
            title = f"{variant} %" if variant.isdigit() else variant.replace("90,", "90 %,")
            accuracies = [f"{100 * run[f'{kind}_accuracy']:.2f}" for kind in ("float", "int8")]
            sizes = [f"{run['bytes']:,}", f"{run['tflm']['dense_arena']:,}"]
            files.append([title, f"{100 * run['sparsity']:.1f}", *accuracies, *sizes])
            of_files = file_ratios(run, runs["dense"])
            ratios.append([title, *(f"{ratio:.3f}" for ratio in of_files.values())])
            of_npus = npu_ratios(run, runs["dense"])
            for npu in dict.fromkeys(name.split()[0] for name in of_npus):
                estimates = (of_npus[f"{npu} {key}"] for key in ("weights", "cycles", "NPU cycles"))
                npus.append([title, npu, *(f"{ratio:.3f}" for ratio in estimates)])
        for headings, rows in (
            (["zeros", "float", "int8", "bytes", "arena"], files),
            (of_files, ratios),
            (["NPU", "encoded weights", "cycles", "NPU cycles"], npus),
        ):
            lines += ["", *results.table(["weights", *headings], rows)]
    results.write_index(BENCHMARK, [*lines, *bars(stored)])


def bars(stored):
    """Return the lines of the section that compares the results with the goals."""
    runs_of = {name: [run for run in stored.values() if run["net"] == name] for name in NETS}
    goals = {
        f"file for TFLM at 90 %, relative to the converter's file, at most {BARS['tflm']}": (
            BARS["tflm"],
            {name: _at_90(stored, name, file_ratios, "TFLM file") for name in NETS},
        ),
        f"the same file, effect of zeros only, at most {BARS['tflm']}": (
            BARS["tflm"],
            {name: _at_90(stored, name, file_ratios, "zeros only") for name in NETS},
        ),
        f"encoded weights at 90 % on the U55-128, at most {BARS['weights']}": (
            BARS["weights"],
            {name: _at_90(stored, name, npu_ratios, "U55-128 weights") for name in NETS},
        ),
        f"cycles at 90 % on the U55-128, at most {BARS['cycles']}": (
            BARS["cycles"],
            {name: _at_90(stored, name, npu_ratios, "U55-128 cycles") for name in NETS},
        ),
        "largest number of ops on the CPU, at most 0": (
            0,
            {name: max(map(_cpu_ops, runs)) for name, runs in runs_of.items()},
        ),
        f"largest loss of accuracy by int8 in points, at most {BARS['lost']}": (
            BARS["lost"],
            {
                name: max(100 * (run["float_accuracy"] - run["int8_accuracy"]) for run in runs)
                for name, runs in runs_of.items()
            },
        ),
    }
    names, rule = " | ".join(NETS), "|---|" + "---|" * len(NETS)
    lines = ["", "## Goals", "", f"| goal | {names} |", rule]
    for goal, (limit, found) in goals.items():
        cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in found.values()]
        marks = ["**" if value <= limit + 1e-9 else "~~" for value in found.values()]
        marked = [f"{mark}{cell}{mark}" for mark, cell in zip(marks, cells)]
        lines.append(f"| {goal} | {' | '.join(marked)} |")
    lines += ["", "Bold figures meet the goal, and crossed-out figures miss the goal.", ""]
    lines += [f"| cost that zeros cannot reduce | {names} |", rule]
    for cost, found in fixed_costs(stored).items():
        lines.append(f"| {cost} | {' | '.join(f'{value:.3f}' for value in found)} |")
    largest = max(run["tflm_difference"] for run in stored.values())
    return [
        *lines,
        "",
        f"On {COMPARED} test samples of each run, the int8 outputs of TensorFlow Lite Micro and of "
        f"LiteRT differ by at most {largest} quantization steps.",
    ]


def fixed_costs(stored):
    """Return the costs that zeros cannot reduce.

    The keys of the dict describe the costs. Each value is a list with one number per network.
    """
    sparse, dense = ([stored[f"{name}_{variant}"] for name in NETS] for variant in ("90", "dense"))
    files, npus = [run["tflm"] for run in sparse], [run["vela"][NPUS[0]]["file"] for run in dense]
    return {
        "share of the weights in kernels that stay dense": [
            1 - run["sparsity"] / 0.9 for run in sparse
        ],
        "bytes of the file for TFLM other than weights, relative to the converter's dense file": [
            (file["bytes"] - file["weight_bytes"]) / file["dense_bytes"] for file in files
        ],
        "cycles in which the U55-128 computes, relative to all cycles of the dense network": [
            npu["npu_cycles"] / npu["cycles"] for npu in npus
        ],
    }


def _at_90(stored, name, ratios, figure):
    return ratios(stored[f"{name}_90"], stored[f"{name}_dense"])[figure]


def _cpu_ops(run):
    return max(len(found["cpu_ops"]) for found in run["vela"].values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="*", choices=NETS, default=list(NETS))
    for name in parser.parse_args().nets:
        for variant in NETS[name].variants:
            if f"{name}_{variant}" not in results.runs(BENCHMARK):
                run(name, variant)
    table()


if __name__ == "__main__":
    main()
