"""Measure files with zeros and files with fewer channels in other runtimes: results/runtimes.

python -m benchmarks.files.runtimes [--nets NET ...]

Two networks are trained on MNIST in three variants: dense, with 90 % zeros, and with half of the
channels. Keras exports each variant for ONNX Runtime, OpenVINO and PyTorch. hls4ml converts one
network to C++ code for an FPGA. In each runtime, the variants are measured alternately on one
thread, with one image per inference. Networks whose results are already stored are skipped. The
export for PyTorch requires KERAS_BACKEND=torch.
"""

import functools
import gzip
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

import keras_dst
from benchmarks import networks, results, timing
from benchmarks.data import apply_method, mnist
from keras_dst.methods import Magnitude

BENCHMARK = "runtimes"
NETS = {"lenet-300-100": networks.lenet_300_100, "lenet-5-caffe": networks.lenet_5_caffe}
VARIANTS = {
    "dense": None,
    "90 % zeros": Magnitude(0.9),
    "half of the channels": Magnitude(0.5, "uniform", "channel"),
}
IMAGES, EPOCHS, BATCH, SEED = 20_000, 1, 64, 0
ROUNDS, CALLS = 300, 20  # Each round measures the total time of CALLS inferences.
COMPARED = 100  # Number of test images for the comparison with Keras.
IN_HLS4ML = ("lenet-300-100",)  # Networks that hls4ml converts.
PRECISION = "ap_fixed<24,8>"  # Fixed-point type with 24 bits: 8 integer bits and 16 fraction bits.


def onnx_runtime(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def openvino(path):
    # Pretend to be a CI job, because OpenVINO sends usage statistics outside CI jobs.
    os.environ.setdefault("CI", "true")
    from openvino import Core

    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = Core().compile_model(path, "CPU", options)
    return lambda x: compiled(x)[0]


def pytorch(path):
    import torch

    torch.set_num_threads(1)
    module = torch.export.load(path).module()

    @torch.inference_mode()
    def run(x):
        return module(torch.from_numpy(x)).numpy()

    return run


@dataclass
class Runtime:
    """Inference runtime: its format in `Model.export`, its file names, and its loader."""

    format: str
    files: tuple[str, ...]
    load: Callable


RUNTIMES = {
    "ONNX Runtime": Runtime("onnx", ("model.onnx",), onnx_runtime),
    "OpenVINO": Runtime("openvino", ("model.xml", "model.bin"), openvino),
    "PyTorch": Runtime("torch", ("model.pt2",), pytorch),
}


def train_variant(build, method):
    """Train a network with a pruning method, remove pruned channels, and return the network."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(SEED)
    model = build()
    optimizer = apply_method(method, model, keras.optimizers.Adam())
    model.compile(optimizer, "sparse_categorical_crossentropy")
    callbacks = [keras_dst.callbacks.SparseTraining()] if method else []
    x, y = (part[:IMAGES] for part in mnist()[0])
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=2, callbacks=callbacks)
    keras_dst.strip(model)
    return keras_dst.shrink(model) if method and method.pattern == "channel" else model


def exported(runtime, model, folder, x, y):
    """Export a model.

    Return a function that runs the exported model, and a dict with the file size and the largest
    error. The largest error is the largest difference from the outputs of Keras.
    """
    path = str(folder / runtime.files[0])
    model.export(path, format=runtime.format, verbose=False)
    content = b"".join((folder / name).read_bytes() for name in runtime.files)
    predict = runtime.load(path)
    outputs = np.concatenate([predict(image[None]) for image in x])
    figures = {
        "bytes": len(content),
        "gzip_bytes": len(gzip.compress(content, mtime=0)),
        "difference": float(np.abs(outputs - y).max()),
    }
    return predict, figures


def latencies(predicts, x):
    """Return the median seconds per inference of each variant, and the ratio to the dense
    variant."""

    def predict_often(predict):
        for _ in range(CALLS):
            predict(x)

    functions = {}
    for name, predict in predicts.items():
        predict_often(predict)  # The first calls are not timed.
        functions[name] = functools.partial(
            timing.seconds, functools.partial(predict_often, predict)
        )
    times = timing.in_turns(functions, ROUNDS)
    ratios = timing.ratios(times, "dense")
    return {
        name: {"seconds": statistics.median(found) / CALLS, "latency_ratio": ratios[name]}
        for name, found in times.items()
    }


def in_hls4ml(model, folder, x):
    """Convert a model with hls4ml, run the C++ code, and count the nonzero weights."""
    import hls4ml

    # Remove the softmax, because the softmax of hls4ml is only a coarse approximation.
    model.layers[-1].activation = keras.activations.linear
    y = keras.ops.convert_to_numpy(model(x))
    options = {"backend": "Vitis", "granularity": "name", "default_precision": PRECISION}
    config = hls4ml.utils.config_from_keras_model(model, **options)
    converted = hls4ml.converters.convert_from_keras_model(
        model, hls_config=config, backend="Vitis", output_dir=str(folder)
    )
    converted.compile()
    kernels = [layer.weights["weight"] for layer in converted.get_layers() if layer.weights]
    return {
        "multipliers": int(sum(kernel.nonzeros for kernel in kernels)),
        "difference": float(np.abs(converted.predict(x) - y).max()),
    }


def run(net):
    (x, labels) = mnist()[1]
    found, predicts, accuracy, parameters = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as name:
        for variant, method in VARIANTS.items():
            model = train_variant(NETS[net], method)
            y = model.predict(x, verbose=0)
            accuracy[variant] = float((y.argmax(-1) == labels).mean())
            parameters[variant] = model.count_params()
            for title, runtime in RUNTIMES.items():
                folder = pathlib.Path(name) / title / variant
                folder.mkdir(parents=True)
                predict, figures = exported(runtime, model, folder, x[:COMPARED], y[:COMPARED])
                predicts.setdefault(title, {})[variant] = predict
                found.setdefault(title, {})[variant] = figures
            if net in IN_HLS4ML:
                figures = in_hls4ml(model, pathlib.Path(name) / "hls4ml", x[:COMPARED])
                found.setdefault("hls4ml", {})[variant] = figures
        for title, variants in predicts.items():
            for variant, figures in latencies(variants, x[:1]).items():
                found[title][variant] |= figures
    results.save(
        BENCHMARK,
        net,
        {
            "command": "make bench-runtimes",
            "methods": {name: repr(method) for name, method in VARIANTS.items()},
            "seed": SEED,
            "images": IMAGES,
            "epochs": EPOCHS,
            "rounds": ROUNDS,
            "calls": CALLS,
            "compared": COMPARED,
            "precision": PRECISION,
            "parameters": parameters,
            "accuracy": accuracy,
            "runtimes": found,
        },
    )


def table():
    stored = {net: run for net, run in results.runs(BENCHMARK).items() if net in NETS}
    lines = [
        "# ONNX Runtime, OpenVINO, PyTorch and hls4ml",
        "",
        "The table below shows the size of the exported files, and their size after compression "
        "with gzip. The table also shows the median latency of an inference with one image on "
        "one thread, and the largest difference from the outputs of Keras. A figure with × is "
        "the ratio to the figure of the dense network. The files are measured alternately, and "
        "the latency ratio is the median over all rounds. The networks were trained for "
        f"{EPOCHS} epoch on {IMAGES:,} images of MNIST. `make bench-runtimes` writes this page "
        "from `results/runtimes/runs.jsonl`.",
        "",
        "| net | runtime | weights | bytes | gzip bytes | latency | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for net, run in stored.items():
        for title in RUNTIMES:
            variants = run["runtimes"][title]
            for variant, found in variants.items():
                cells = _cells(found, None if variant == "dense" else variants["dense"])
                lines.append(f"| {net} | {title} | {variant} | {' | '.join(cells)} |")
    lines += [
        "",
        "With a reuse factor of 1, hls4ml uses one multiplier per nonzero weight. The table "
        "below shows the number of multipliers, and the largest difference from the outputs of "
        "Keras before the softmax.",
        "",
        "| net | weights | accuracy | parameters | multipliers | difference |",
        "|---|---|---|---|---|---|",
    ]
    for net, run in stored.items():
        variants = run["runtimes"].get("hls4ml", {})
        for variant, found in variants.items():
            multipliers = f"{found['multipliers']:,}"
            if variant != "dense":
                multipliers = f"{found['multipliers'] / variants['dense']['multipliers']:.3f}×"
            lines.append(
                f"| {net} | {variant} | {100 * run['accuracy'][variant]:.2f} | "
                f"{run['parameters'][variant]:,} | {multipliers} | {found['difference']:.0e} |"
            )
    results.write_index(BENCHMARK, lines)


def _cells(found, dense):
    """Return the table cells of a file: size, size with gzip, latency, and difference from Keras.

    If `dense` is given, the sizes and the latency are relative to the file of the dense network.
    """
    if dense is None:
        sizes = [f"{found[key]:,}" for key in ("bytes", "gzip_bytes")]
        latency = f"{1e6 * found['seconds']:.1f} µs"
    else:
        sizes = [f"{found[key] / dense[key]:.3f}×" for key in ("bytes", "gzip_bytes")]
        latency = f"{found['latency_ratio']:.3f}×"
    return [*sizes, latency, f"{found['difference']:.0e}"]


def main():
    results.run_missing(BENCHMARK, __doc__, "--nets", NETS, run)
    table()


if __name__ == "__main__":
    main()
