"""Measure `.tflite` files of networks with different patterns and sparsities: results/tflite_grid.

python -m benchmarks.files.tflite_grid [--nets NET ...]
python -m benchmarks.files.tflite_grid --table

The dense networks of `benchmarks.files.tflite_cases` are trained further with `Magnitude`, for half
as many epochs. All layers except the last have the same sparsity. The dense baseline is also
trained further, for the same number of epochs. Channels that are pruned with the pattern "channel"
are removed from the network.

Each network is exported with `optimize="latency"`. The sparse file, the dense float32 file and the
dense int8 file are measured alternately, at batch size 1 on one thread. The measured figures are
accuracy on test images, size, latency, load time and peak memory. The file that TensorFlow's
converter writes with `EXPERIMENTAL_SPARSITY` is also measured. The latency of a file for ARM is
measured with AVX disabled, because XNNPACK then uses the same kernels as on ARM. Patterns and
sparsities whose results are already stored are skipped.
"""

import argparse
import json
import pathlib
import re
import statistics
import tempfile
from dataclasses import asdict

import keras

import keras_dst
from benchmarks import results
from benchmarks.files.tflite_cases import BATCH, IMAGES, NETS, NO_AVX, SEED, TESTED, train_or_load
from keras_dst.export.convert import conversions
from keras_dst.export.measure import bench
from keras_dst.export.memory import peak_memory
from keras_dst.methods import Magnitude
from tests import no_avx

BENCHMARK = "tflite_grid"
PATTERNS = ("unstructured", "1x4", "channel")
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
TITLES = {"lenet": "LeNet-300-100", "vgg": "VGG", "resnet": "ResNet", "mobilenet": "MobileNet"}
TARGETS = {"sparse": "host", "arm": "arm"}  # Files that keras_dst writes.
RUNS, LOADS = 50, 9
FREQUENCY = 10  # Masks are updated every 10 steps, because the training runs are short.


def epochs_of(net) -> int:
    """Return the number of epochs for which a trained dense network is trained further."""
    return max(2, net.epochs // 2)


def tuned(net_name, method=None):
    """Train a trained dense network further with a pruning method, and return the network.

    If the method is None, the network stays dense.
    """
    net = NETS[net_name]
    x, y = net.data()[0]
    x, y = x[:IMAGES], y[:IMAGES]
    model = train_or_load(net_name, None)
    keras.utils.set_random_seed(SEED)
    rate = keras.optimizers.schedules.CosineDecay(net.rate, epochs_of(net) * -(-len(y) // BATCH))
    optimizer = keras.optimizers.SGD(rate, momentum=0.9)
    callbacks = []
    if method:
        last = model.layers[-1].kernel  # The last layer stays dense.
        kernels = [v.path for v in model.trainable_variables if v is not last]
        kernels = [path for path in kernels if re.fullmatch(net.prunable, path)]
        optimizer = keras_dst.SparseOptimizer(optimizer, method, filters=kernels)
        callbacks = [keras_dst.callbacks.SparseTraining()]
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=BATCH, epochs=epochs_of(net), verbose=0, callbacks=callbacks)
    return keras_dst.strip(model)


def cell(net_name, method, dense) -> dict:
    """Measure the latency, load time, memory and accuracy of the files of a sparse network.

    The sparse files are measured alternately with the dense files, whose paths are in `dense`.
    """
    x, y = NETS[net_name].data()[1]
    test = x[:TESTED], y[:TESTED]
    model = tuned(net_name, method)
    small = keras_dst.shrink(model) if method.pattern == "channel" else model
    *own_files, converter_file = (
        dense[0].with_name(f"{name}.tflite") for name in (*TARGETS, "converter")
    )
    reports = {
        path.stem: keras_dst.export_tflite(
            small, path, inputs=test[0], evaluate=test, optimize="latency", target=target
        )
        for path, target in zip(own_files, TARGETS.values())
    }
    converter_file.write_bytes(converted(model))
    paths = [*dense, *own_files, converter_file]
    files = {
        file.name.removesuffix(".tflite"): asdict(file) for file in bench(paths, runs=RUNS).files
    }
    loads = [[file.load for file in bench(paths, warmup=0, runs=1).files] for _ in range(LOADS)]
    for path, times in zip(paths, zip(*loads)):
        files[path.stem]["load"] = statistics.median(times)
        files[path.stem]["memory"] = peak_memory(path.read_bytes())
    hidden = no_avx.obstacle()
    if not hidden:
        for path, seconds in zip(paths, json.loads(no_avx.run(NO_AVX, *paths))):
            files[path.stem]["latency_no_avx"] = seconds
    return {
        "method": repr(method),
        "sparsity": keras_dst.report(model).sparsity,
        "encodings": {
            name: sorted({tensor.encoding for tensor in report.tensors})
            for name, report in reports.items()
        },
        "max_error": {name: report.max_error for name, report in reports.items()},
        "accuracy": reports["sparse"].files[-1].accuracy,
        "no_avx": hidden or "hidden",
        "files": files,
    }


def converted(model) -> bytes:
    """Return the file that TensorFlow's converter writes with `EXPERIMENTAL_SPARSITY`."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
    return converter.convert()


def run(net_name):
    cells = results.runs(BENCHMARK).get(net_name, {"cells": {}})["cells"]
    plan = [(p, s) for p in PATTERNS for s in SPARSITIES if f"{p}, {s:.0%}" not in cells]
    if not plan:
        return
    x, y = NETS[net_name].data()[1]
    model = tuned(net_name)
    with tempfile.TemporaryDirectory() as folder:
        dense = [pathlib.Path(folder) / f"{kind}.tflite" for kind in ("float32", "int8")]
        test = x[:TESTED], y[:TESTED]
        report = keras_dst.export_tflite(model, dense[0], evaluate=test)
        for file, content in zip(dense, conversions(model, ["float32", "dynamic"])):
            file.write_bytes(content)
        told = {
            "command": "make bench-tflite",
            "seed": SEED,
            "images": IMAGES,
            "tested": TESTED,
            "epochs": [NETS[net_name].epochs, epochs_of(NETS[net_name])],
            "accuracy_of_dense": {file.name: file.accuracy for file in report.files[:2]},
            "cells": cells,
        }
        for pattern, sparsity in plan:
            method = Magnitude(sparsity, pattern=pattern, allocation="uniform", frequency=FREQUENCY)
            found = cells[f"{pattern}, {sparsity:.0%}"] = cell(net_name, method, dense)
            print(net_name, pattern, sparsity, found, flush=True)
            results.save(BENCHMARK, net_name, told)


def table():
    lines = [
        "# Sparse .tflite files by network, pattern and sparsity",
        "",
        f"Each network is first trained without pruning on {IMAGES:,} images, and then with "
        "`Magnitude` for half as many epochs. `Magnitude` prunes every layer except the last to "
        f"the same sparsity. The accuracy in % of each file is measured on {TESTED:,} test "
        "images. Bytes, latency, load time and peak memory are relative to the dense float32 "
        "file. Latency is the time of one inference on one thread. The columns with `no AVX` "
        "give the bytes and the latency of a file that was exported for ARM. The latency of a "
        "file for ARM is measured with AVX disabled, because XNNPACK then uses the same kernels "
        "as on ARM. With the pattern `channel`, the pruned channels are removed from the network. "
        "The second table of each "
        "network describes the files that TensorFlow's converter writes with "
        "`EXPERIMENTAL_SPARSITY`. `make bench-tflite` writes this page from "
        "`results/tflite_grid/runs.jsonl`.",
    ]
    stored = results.runs(BENCHMARK)
    for net in NETS:
        if net in stored:
            lines += ["", f"## {TITLES[net]}", "", *_exported(stored[net])]
            lines += ["", *_converted(stored[net])]
    results.write_index(BENCHMARK, lines)


#: Columns of the two tables. Each tuple contains the heading, the name of the measured file, the
#: key of the measured value, and the number of digits.
EXPORTED = (
    ("bytes", "sparse", "bytes", 3),
    ("latency", "sparse", "latency", 2),
    ("load", "sparse", "load", 2),
    ("memory", "sparse", "memory", 2),
    ("bytes, no AVX", "arm", "bytes", 3),
    ("latency, no AVX", "arm", "latency_no_avx", 2),
)
CONVERTED = (
    ("bytes", "converter", "bytes", 3),
    ("latency", "converter", "latency", 2),
    ("load", "converter", "load", 2),
    ("memory", "converter", "memory", 2),
    ("latency, no AVX", "converter", "latency_no_avx", 2),
)


def _exported(result) -> list[str]:
    """Return the table of dense files and of the files that `export_tflite` writes."""
    first, *_ = result["cells"].values()
    dense, int8 = first["files"]["float32"], first["files"]["int8"]
    accuracy, accuracy_of_int8 = result["accuracy_of_dense"].values()
    of_int8 = {"float32": dense} | dict.fromkeys(TARGETS, int8)
    rows = [
        ("dense float32", 0, accuracy, [_absolute(dense, key) for _, _, key, _ in EXPORTED]),
        ("dense int8", 0, accuracy_of_int8, _relative(of_int8, EXPORTED)),
    ]
    for name, cell in result["cells"].items():
        rows.append((name, cell["sparsity"], cell["accuracy"], _relative(cell["files"], EXPORTED)))
    rows = [
        [name, f"{sparsity:.1%}", f"{100 * accuracy:.1f}", *cells]
        for name, sparsity, accuracy, cells in rows
    ]
    return results.table(["file", "zeros", "accuracy", *(head for head, *_ in EXPORTED)], rows)


def _converted(result) -> list[str]:
    """Return the table of the files that TensorFlow's converter writes."""
    rows = [[name, *_relative(cell["files"], CONVERTED)] for name, cell in result["cells"].items()]
    return results.table(["TensorFlow's converter", *(head for head, *_ in CONVERTED)], rows)


def _absolute(file, key) -> str:
    if key not in file:
        return "not measured"
    if key == "bytes":
        return f"{file[key]:,}"
    return f"{1e-6 * file[key]:.3g} MB" if key == "memory" else f"{1e3 * file[key]:.3g} ms"


def _relative(files, columns) -> list[str]:
    """Return one table cell per column, with values relative to the dense float32 file."""
    return [_ratio(files.get(of), files["float32"], key, digits) for _, of, key, digits in columns]


def _ratio(file, dense, key, digits) -> str:
    if file is None:
        return ""
    return f"{file[key] / dense[key]:.{digits}f}" if key in file else "not measured"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="*", choices=NETS, default=list(NETS))
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    if not args.table:
        for name in args.nets:
            run(name)
    table()


if __name__ == "__main__":
    main()
