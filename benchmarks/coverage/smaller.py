"""Measure the cost of `shrink` and the latency of the smaller models: results/smaller.

All networks have random weights, and their channels are pruned by magnitude without training. Time
and peak memory are measured during the call of `shrink`. Latency is measured in the LiteRT
interpreter on one thread, for the `.tflite` files of the dense and of the smaller network. The
dense and the smaller file are measured alternately, and the latency is the median time of one
inference. After half of the channels are removed, each op of the dense and of the smaller file is
also measured alone. The latency of each smaller network is also compared with the latency of a
network that was built at half width. Networks whose results are already stored are skipped.

python -m benchmarks.coverage.smaller [--networks NETWORK ...] [--shrink-only]
"""

import argparse
import collections
import dataclasses
import gc
import pathlib
import tempfile
import time

from benchmarks import results
from benchmarks.coverage.half_channels import _draw_statistics, applications, own

BENCHMARK = "smaller"
HALF = 0.5
LANES = 16  # Number of float32 values in a vector of the CPU with AVX-512.
CHANNELS = (0.25, 0.5, 0.75)
RUNS, ROUNDS = 100, 5

# Networks with common image sizes, such as 224 x 224 pixels. In
# `benchmarks.coverage.half_channels`, the images have at most 75 x 75 pixels.
NETWORKS = {
    "ResNet50": applications("ResNet50", 224),
    "MobileNetV2": applications("MobileNetV2", 224),
    "EfficientNetB0": applications("EfficientNetB0", 224),
    "ResNet-20 (CIFAR)": own("resnet", 20),
    "ResNet-56 (CIFAR)": own("resnet", 56),
    "VGG (CIFAR)": own("vgg"),
    "ViT, small": own("vision_transformer"),
    "U-Net": own("u_net"),
}


def drawn(build):
    """Return a network with random weights, biases and moving statistics."""
    import keras

    keras.utils.set_random_seed(0)
    model = build()
    # Random biases are needed, because the converter leaves out the addition of zero biases.
    _draw_statistics(model)
    return model


def masked(build, sparsity):
    """Prune the channels of a network by magnitude, without training, and return the network."""

    import keras_dst

    model = drawn(build)
    schedule = keras_dst.schedules.Constant(sparsity, begin_step=0)
    model.compile("sgd", "mse")
    keras_dst.sparsify(model, keras_dst.methods.Magnitude(schedule, "uniform", "channel"))
    keras_dst.couple_channels(model)
    model.optimizer.apply_initial_masks()
    keras_dst.couple_channels(model)  # Set the moving means of pruned channels to 0.
    return keras_dst.strip(model)


def measured_shrink(model):
    """Return the model after `shrink`, and the time and peak memory that `shrink` takes."""
    import keras_dst
    from keras_dst.export.memory import kilobytes

    weights = sum(4 * int(v.numpy().size) for v in model.variables)
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # Reset the peak memory.
    before, began, used = kilobytes("VmRSS"), time.perf_counter(), time.process_time()
    small = keras_dst.shrink(model)
    return small, {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
        "peak_bytes": 1024 * (kilobytes("VmHWM") - before),
        "weight_bytes": weights,
    }


def half_width(dense):
    """Return a new network like the dense network, but with half of the filters, units and heads.

    The new number of channels is rounded to a multiple of 8 if the dense layer has at least 16
    channels, as in `shrink`. The output layer keeps all its units.
    """

    def half(count):
        return count // 2 if count < 16 else (count + 8) // 16 * 8

    config = dense.get_config()
    for layer in config["layers"]:
        # Remove the stored shapes of the weights, which do not fit the smaller layers.
        layer.pop("build_config", None)
        options = layer["config"]
        if options["name"] == dense.layers[-1].name:
            continue
        for key in ("filters", "units", "num_heads"):
            if key in options:
                options[key] = half(options[key])
        # The channels are on the last axis of the target shape of a Reshape layer.
        if "target_shape" in options:
            *others, channels = options["target_shape"]
            options["target_shape"] = (*others, half(channels))
    model = type(dense).from_config(config)
    _draw_statistics(model)
    return model


def timings(files: list[bytes], rounds: int = 1) -> list:
    """Measure the latencies of `.tflite` files alternately.

    Other processes slow down some rounds. Return only the timings of the round with the smallest
    total latency.
    """
    from keras_dst.export.measure import bench

    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder, f"{place}.tflite") for place in range(len(files))]
        for path, content in zip(paths, files):
            path.write_bytes(content)
        found = [bench(paths, threads=1, runs=RUNS).files for _ in range(rounds)]
    return min(found, key=lambda timings: sum(timing.latency for timing in timings))


def compared_with_half_width(build) -> dict:
    """Compare the FLOPs and latencies of three networks.

    The first network is dense. In the second network, `shrink` has removed half of the channels.
    The third network was built with half of the channels.
    """
    import keras_dst
    from keras_dst.export.convert import conversions

    dense, small = drawn(build), keras_dst.shrink(masked(build, HALF))
    models = [dense, small, half_width(dense)]
    files = [conversions(model, ["float32"])[0] for model in models]
    flops = [keras_dst.report(model).dense_flops for model in models]
    found = timings(files, ROUNDS)
    return {
        "flops": [each / flops[0] for each in flops],
        "latencies": [timing.latency for timing in found],
        "spreads": [timing.spread for timing in found],
        "ops": [_count_ops(content) for content in files],
    }


def _count_ops(content: bytes) -> dict[str, int]:
    """Return the number of ops of each kind in a `.tflite` file, as a dict."""
    from keras_dst.export import flatbuffer

    model = flatbuffer.read(content)
    names = [flatbuffer.op_name(model, op) for g in model.subgraphs for op in g.operators]
    return dict(sorted(collections.Counter(names).items()))


def measured_latency(dense, small) -> dict:
    """Export the dense and the smaller model to `.tflite` files, and measure both files.

    Return the measured latency of each file, the measured latency ratio and the estimated latency
    ratio.
    """
    from keras_dst.export.convert import conversions
    from keras_dst.export.latency_model import CPUS, LatencyModel

    files = [conversions(model, ["float32"])[0] for model in (dense, small)]
    before, after = timings(files)
    estimates = LatencyModel(CPUS["x86"])(files)
    return {
        "latency_dense": before.latency,
        "latency": after.latency,
        "spread": after.spread,
        "latency_ratio": after.ratio,
        "estimated_ratio": estimates[1] / estimates[0],
    }


def measured_ops(dense, small) -> dict[str, list[float]]:
    """Return the run time in seconds of each kind of op in the dense and in the smaller file.

    Every op is timed in its own file, with batch size 1. Convolutions that have fewer than `LANES`
    filters in the smaller network count as a separate kind of op.
    """
    from keras_dst.export.convert import conversions
    from keras_dst.export.measure import latencies
    from keras_dst.export.samples import signature_of

    pieces = []
    for model in (dense, small):
        signature = signature_of(model)
        specs = [dataclasses.replace(s, shape=(1, *s.shape[1:])) for s in signature.specs]
        signature = dataclasses.replace(signature, specs=specs)
        pieces.append(list(single_ops(conversions(model, ["float32"], signature)[0])))
    narrow = [filters < LANES for name, filters, _ in pieces[1] if name == "CONV_2D"]
    seconds: dict[str, list[float]] = {}
    for place, ops in enumerate(pieces):
        is_narrow = iter(narrow)
        for name, _, content in ops:
            if name == "CONV_2D" and next(is_narrow):
                name = f"CONV_2D, fewer than {LANES} filters"
            seconds.setdefault(name, [0.0, 0.0])[place] += latencies([content])[0]
    return seconds


def single_ops(content: bytes):
    """Extract each op into a separate `.tflite` file. Skip ops whose inputs are all constant.

    Yield the name of each op, the number of its output channels, and the content of its file.
    """
    from keras_dst.export import flatbuffer

    model = flatbuffer.read(content)
    (graph,) = model.subgraphs
    for op in graph.operators:
        piece = flatbuffer.extract_ops(model, lambda _, other, op=op: other is op)
        if piece.subgraphs[0].inputs:
            channels = int(graph.tensors[op.outputs[0]].shape[-1])
            yield flatbuffer.op_name(model, op), channels, flatbuffer.write(piece)


def measure(build, sparsity, latency: bool) -> dict:
    import keras_dst

    model = masked(build, sparsity)
    before = keras_dst.report(model)
    small, found = measured_shrink(model)
    after = keras_dst.report(small)
    found["flops_ratio"] = after.dense_flops / before.dense_flops
    found["parameters_ratio"] = after.parameters / before.parameters
    if latency:
        dense = drawn(build)
        found |= measured_latency(dense, small)
        if sparsity == HALF:
            found["ops"] = measured_ops(dense, small)
    return found


def table():
    stored = results.runs(BENCHMARK)
    lines = [
        "# Latency after channel pruning",
        "",
        "The networks of this benchmark have random weights. Channels are pruned by magnitude and "
        "removed by `shrink`. `make bench-smaller` writes this page from "
        "`results/smaller/runs.jsonl`.",
        "",
        "## Latency of the `.tflite` file",
        "",
        f"Latency is the median time of {RUNS} inferences with batch size 1 on one thread. The "
        "dense file and the smaller file are measured alternately. FLOPs and latency are "
        "relative to the dense network. The column `estimated latency` shows the latency that "
        "`export_tflite` estimates if the target CPU is not available for a measurement.",
        "",
        "| network | channels removed | FLOPs | latency | estimated latency | dense, ms |",
        "|---|---|---|---|---|---|",
    ]
    for run in stored.values():
        if "latency_ratio" in run:
            ratios = [run[key] for key in ("flops_ratio", "latency_ratio", "estimated_ratio")]
            cells = [f"{run['channels']:.0%}", *(f"{ratio:.3f}" for ratio in ratios)]
            cells.append(f"{1e3 * run['latency_dense']:.2f}")
            lines.append(f"| {run['network']} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Networks that were built at half width",
        "",
        "Each network after `shrink` is compared with a network that was built at half width and "
        "never pruned. The network that was built at half width has the same layers as the dense "
        "network, but half of the filters, units and heads. The files are measured alternately "
        f"in {ROUNDS} rounds of {RUNS} inferences. Other processes slow down some rounds, so the "
        "table shows only the round with the smallest total latency of all files. For the "
        "network that was built at half width, the column `spread` gives the interquartile range "
        "of the latency, divided by the median latency. The last column lists the additional ops "
        "of the file after `shrink`.",
        "",
        "If the ratio of the latencies is 1, the network after `shrink` is as fast as the network "
        "that was built at half width. Both of these smaller networks can be slower than their "
        "FLOPs suggest, because the runtime runs narrow layers less efficiently than wide layers. "
        "In the ViT, the ops `PAD` and `STRIDED_SLICE` surround each layer normalization, which "
        "keeps its original width.",
        "",
        "| network | FLOPs after `shrink` | FLOPs, built | latency after `shrink` / built | "
        "spread | additional ops after `shrink` |",
        "|---|---|---|---|---|---|",
    ]
    for run in stored.values():
        if "latencies" in run:
            _, latency, expected = run["latencies"]
            ratios = [*run["flops"][1:], latency / expected, run["spreads"][2] / expected]
            small, built = (collections.Counter(ops) for ops in run["ops"][1:])
            texts = [f"{n} `{op}`" for op, n in (small - built).items()]
            texts += [f"{-n} `{op}`" for op, n in (built - small).items()]
            cells = [*(f"{ratio:.3f}" for ratio in ratios), ", ".join(texts) or "none"]
            lines.append(f"| {run['network']} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Time of each kind of op, half of the channels",
        "",
        "Each op of the dense file and of the smaller file runs alone, with batch size 1 on one "
        "thread. The column `share` gives the time of each kind of op in the smaller file, divided "
        "by the time of all ops in the smaller file. The row `other ops` contains all kinds of ops "
        "that take less than 2% of the run time of each file.",
        "",
        "A convolution or a dense layer with half of its inputs and half of its outputs needs "
        "about a quarter of the time. The time of the following ops decreases by less than a "
        "factor of four:",
        "",
        f"* A vector register of the measured CPU holds {LANES} float32 values. If a convolution "
        "has 8 filters, half of each vector register is empty. Removing 8 of the 16 filters of a "
        "convolution therefore does not make the convolution faster. A convolution with 16 filters "
        "becomes faster only if it has fewer input channels.",
        "* The time of depthwise convolutions, sums and activations is proportional to the "
        "number of channels, so half of the channels need about half of the time.",
        "* A layer normalization keeps its width, because the zeros of the removed channels count "
        "in its mean and variance. The ops `PAD` and `STRIDED_SLICE` before and after the layer "
        "normalization also need time.",
        "",
        "| network | op | dense, ms | smaller, ms | ratio | share |",
        "|---|---|---|---|---|---|",
    ]
    for run in stored.values():
        if "latencies" not in run:
            lines += _op_rows(run["network"], run.get("ops", {}))
    lines += [
        "",
        "## Cost of `shrink`",
        "",
        "The table below shows the cost of a call of `shrink` that removes half of the channels. "
        "The column `seconds` includes the time in which `shrink` compares the outputs of the "
        "dense and of the smaller network. The peak memory is the memory by which the process "
        "grows during `shrink`, relative to the weights of the dense network. On TensorFlow and "
        "JAX, the peak memory includes the memory of the compiler.",
        "",
        "| network | backend | seconds | weights, MB | peak memory / weights |",
        "|---|---|---|---|---|",
    ]
    for run in stored.values():
        if run["channels"] == HALF and "seconds" in run:
            size = run["weight_bytes"]
            cells = [run["network"], run["backend"], f"{run['seconds']:.1f}", f"{size / 1e6:.1f}"]
            lines.append(f"| {' | '.join(cells)} | {max(run['peak_bytes'], 0) / size:.2f} |")
    results.write_index(BENCHMARK, lines)


def _op_rows(network: str, ops: dict[str, list[float]]) -> list[str]:
    """Return one table row per kind of op, with its time in the dense and in the smaller file."""
    totals = [sum(column) for column in zip(*ops.values())]
    kinds: dict[str, list[float]] = {}
    for name, times in sorted(ops.items(), key=lambda item: -item[1][1]):
        small = all(time < 0.02 * total for time, total in zip(times, totals))
        sums = kinds.setdefault("other ops" if small else f"`{name}`", [0.0, 0.0])
        sums[:] = [a + b for a, b in zip(sums, times)]
    if ops:
        kinds["sum"] = totals
    return [
        f"| {network} | {name} | {1e3 * before:.3f} | {1e3 * after:.3f} | "
        f"{f'{after / before:.2f}' if before else ''} | {after / totals[1]:.0%} |"
        for name, (before, after) in kinds.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--shrink-only", action="store_true", help="half of the channels, no files")
    args = parser.parse_args()
    import keras

    for network in args.networks:
        for channels in [HALF] if args.shrink_only else CHANNELS:
            name = f"{network}, {channels:.0%}, {keras.backend.backend()}"
            if name in results.runs(BENCHMARK):
                continue
            found = measure(NETWORKS[network], channels, not args.shrink_only)
            run = {"network": network, "channels": channels, "seed": 0, **found}
            print(name, found, flush=True)
            results.save(BENCHMARK, name, {"command": "make bench-smaller", **run})
            keras.backend.clear_session()
        name = f"{network}, built at half width"
        if not args.shrink_only and name not in results.runs(BENCHMARK):
            run = {"network": network, "channels": HALF, "seed": 0}
            run |= compared_with_half_width(NETWORKS[network])
            results.save(BENCHMARK, name, {"command": "make bench-smaller", **run})
            keras.backend.clear_session()
    table()


if __name__ == "__main__":
    main()
