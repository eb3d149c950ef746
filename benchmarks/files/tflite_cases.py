"""Measure size, latency and accuracy of sparse .tflite files: results/tflite_cases.

python -m benchmarks.files.tflite_cases [--cases CASE ...]

Each network is trained with and without pruning. The exported files run in the LiteRT interpreter.
Accuracy is measured on test images. Size and latency are relative to the dense float32 file. The
latencies of the files are measured alternately at batch size 1 on one thread. The latencies are
measured a second time with AVX disabled, because XNNPACK then uses the same kernels as on ARM. The
accuracies are low, because the networks are trained on only 5,000 images for a few epochs. Cases
whose results are already stored are skipped.
"""

import json
import pathlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import keras

import keras_dst
from benchmarks import networks, results
from benchmarks.data import cifar10, mnist
from keras_dst.methods import Magnitude
from tests import no_avx

BENCHMARK = "tflite_cases"
IMAGES, TESTED, BATCH, SEED = 5_000, 2_000, 64, 0
TRAINED = results.ROOT / "build" / "edge"


@dataclass
class Net:
    """Training task: a network, its data, and the number of epochs."""

    build: Callable
    data: Callable
    epochs: int
    rate: float
    prunable: str  # Regular expression that matches the kernels to prune.


@dataclass
class Case:
    """Benchmark case: network, pruning method, export options, and goals for the exported file."""

    net: str
    method: Magnitude
    options: dict = field(default_factory=dict)
    shrink: bool = False
    bars: dict = field(default_factory=dict)


def enlarged():
    """Return the CIFAR-10 images of this benchmark, enlarged to 96 x 96 pixels."""
    return tuple((x[:IMAGES].repeat(3, 1).repeat(3, 2), y[:IMAGES]) for x, y in cifar10())


NETS = {
    "lenet": Net(networks.lenet_300_100, mnist, 10, 0.05, ".*dense.*/kernel"),
    "vgg": Net(networks.vgg, cifar10, 4, 0.01, ".*conv2d.*/kernel"),
    "resnet": Net(lambda: networks.resnet(20), cifar10, 4, 0.05, ".*conv2d.*/kernel"),
    "mobilenet": Net(networks.mobilenet, enlarged, 3, 0.05, ".*pointwise.*/kernel"),
}
FAST = {"optimize": "latency"}
ARM = FAST | {"target": "arm"}
SMALL = {"optimize": "size", "quantize": "weights"}
CASES = {
    "lenet-90-1x4": Case(
        "lenet", Magnitude(0.9, pattern="1x4"), FAST, bars={"latency": 0.35, "bytes": 0.12}
    ),
    "lenet-90": Case("lenet", Magnitude(0.9), FAST),
    "vgg-95-1x4": Case(
        "vgg",
        Magnitude(0.95, pattern="1x4"),
        FAST,
        bars={"latency": 0.45, "bytes": 0.07},
    ),
    "vgg-95-1x4-arm": Case(
        "vgg",
        # With the default allocation, `"global"`, one of the first layers would stay dense.
        Magnitude(0.95, pattern="1x4", allocation="uniform"),
        ARM,
        bars={"latency_no_avx": 0.25},
    ),
    "vgg-95": Case("vgg", Magnitude(0.95), SMALL, bars={"bytes": 0.04, "accuracy_lost": 0.5}),
    "vgg-50-channel": Case(
        "vgg",
        Magnitude(0.5, pattern="channel", allocation="uniform"),
        FAST,
        shrink=True,
        bars={"latency": 0.35},
    ),
    "mobilenet-90": Case(
        "mobilenet",
        # Most of the latency is in the first layers, so prune the first layers as much as the last
        # layers.
        Magnitude(0.9, allocation="uniform"),
        ARM,
        bars={"latency_no_avx": 0.3},
    ),
}
# The following code measures latency like keras_dst.export.measure, but does not import Keras. The
# backends of Keras cannot run while AVX is disabled.
NO_AVX = """
import json, statistics, time
from ai_edge_litert.interpreter import Interpreter
interpreters = [Interpreter(path, num_threads=1) for path in sys.argv[1:]]
times = [[] for _ in interpreters]
for interpreter in interpreters:
    interpreter.allocate_tensors()
for turn in range(50):
    for interpreter, found in zip(interpreters, times):
        interpreter.invoke()
        begin = time.perf_counter()
        interpreter.invoke()
        found.append(time.perf_counter() - begin)
print(json.dumps([statistics.median(found) for found in times]))
"""


def train_or_load(net_name, method):
    """Train a network and save it, or load the trained network if its file exists.

    If the method is None, the network is dense.
    """
    net = NETS[net_name]
    TRAINED.mkdir(parents=True, exist_ok=True)
    path = TRAINED / f"{net_name}_{method!r}.keras".replace("/", "")
    if path.exists():
        return keras.saving.load_model(path)
    x, y = net.data()[0]
    x, y = x[:IMAGES], y[:IMAGES]
    keras.utils.clear_session()
    keras.utils.set_random_seed(SEED)
    model = net.build()
    rate = keras.optimizers.schedules.CosineDecay(net.rate, net.epochs * -(-len(y) // BATCH))
    optimizer = keras.optimizers.SGD(rate, momentum=0.9)
    callbacks = []
    if method:
        optimizer = keras_dst.SparseOptimizer(optimizer, method, filters=net.prunable)
        callbacks = [keras_dst.callbacks.SparseTraining()]
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, batch_size=BATCH, epochs=net.epochs, verbose=2, callbacks=callbacks)
    keras_dst.strip(model).save(path)
    return model


def run(name):
    case = CASES[name]
    model = train_or_load(case.net, case.method)
    dense = train_or_load(case.net, None)
    x, y = NETS[case.net].data()[1]
    test = x[:TESTED], y[:TESTED]
    small = keras_dst.shrink(model) if case.shrink else model
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder) / f"{kind}.tflite" for kind in ("dense", "sparse")]
        before = keras_dst.export_tflite(dense, paths[0], measure=False, evaluate=test)
        after = keras_dst.export_tflite(
            small, paths[1], inputs=test[0], evaluate=test, **case.options
        )
        print(after)
        found = {
            "bytes": after.bytes / before.dense_bytes,
            "gzip_bytes": after.gzip_bytes / before.dense_gzip_bytes,
            "latency": _ratio(keras_dst.export.measure.latencies([p.read_bytes() for p in paths])),
            "latency_no_avx": None,
            "no_avx": no_avx.obstacle() or "hidden",
        }
        if not no_avx.obstacle():
            found["latency_no_avx"] = _ratio(json.loads(no_avx.run(NO_AVX, *paths)))
    accuracy = {
        "dense": before.files[0].accuracy,
        "sparse": float((model.predict(test[0], verbose=0).argmax(-1) == test[1]).mean()),
        "file": after.files[-1].accuracy,
    }
    found["accuracy_lost"] = 100 * (accuracy["sparse"] - accuracy["file"])
    results.save(
        BENCHMARK,
        name,
        {
            "command": "make bench-tflite",
            "method": repr(case.method),
            "options": case.options,
            "shrink": case.shrink,
            "sparsity": keras_dst.report(model).sparsity,
            "seed": SEED,
            "images": IMAGES,
            "epochs": NETS[case.net].epochs,
            "accuracy": accuracy,
            "against_dense": found,
            "report": after.to_dict() | {"path": "sparse.tflite"},
        },
    )


def _ratio(seconds) -> float:
    dense, sparse = seconds
    return sparse / dense


def table():
    lines = [
        "# Sparse .tflite files: size, latency, accuracy",
        "",
        "The table below shows the bytes and the latency of each file, relative to the dense "
        "float32 file. The dense network and the sparse network are trained for the same number "
        "of epochs. Latency is the time of one inference on one thread. Latency is also measured "
        "with AVX disabled, because XNNPACK then uses the same kernels as on ARM. The column "
        f"`accuracy` gives three accuracies in % on {TESTED:,} test images: of the dense "
        "network, of the sparse network, and of the sparse file. Bold figures meet their goal, "
        "and crossed-out figures miss their goal. `make bench-tflite` writes this page from "
        "`results/tflite_cases/runs.jsonl`.",
        "",
        "| case | accuracy | bytes | gzip | latency | latency, AVX disabled |",
        "|---|---|---|---|---|---|",
    ]
    stored = results.runs(BENCHMARK)
    for name in CASES:
        if name not in stored:
            continue
        result = stored[name]
        accuracy = " / ".join(f"{100 * value:.1f}" for value in result["accuracy"].values())
        columns = ("bytes", "gzip_bytes", "latency", "latency_no_avx")
        figures = [_figure(result, column, CASES[name].bars.get(column)) for column in columns]
        lines.append(f"| {name} | {accuracy} | {' | '.join(figures)} |")
    results.write_index(BENCHMARK, lines)


def _figure(result, column, bar) -> str:
    value = result["against_dense"][column]
    if value is None:
        return "not measured"
    mark = "" if bar is None else "**" if value <= bar else "~~"
    goal = "" if bar is None else f" (≤ {bar})"
    return f"{mark}{value:.3f}{mark}{goal}"


def main():
    results.run_missing(BENCHMARK, __doc__, "--cases", CASES, run)
    table()


if __name__ == "__main__":
    main()
