"""Measure accuracy and size of sparse networks with int8 weights: results/int8.

python -m benchmarks.files.int8 [--nets NET ...]

The networks of `benchmarks.files.tflite_cases` are exported without zeros and with 90 % zeros.
Weights are float32 or int8 (`quantize="weights"`), or weights and activations are int8
(`quantize="full"`). The ranges of the activations are measured on 200 training images. All files
are exported with `optimize="size"`. Accuracy is measured on test images. Networks whose results are
already stored are skipped.
"""

import pathlib
import tempfile

import keras_dst
from benchmarks import results
from benchmarks.files.tflite_cases import IMAGES, NETS, SEED, TESTED, train_or_load
from keras_dst.methods import Magnitude

BENCHMARK = "int8"
METHODS = {
    "dense": None,
    "unstructured": Magnitude(0.9),
    "1x4": Magnitude(0.9, pattern="1x4"),
    "1x16": Magnitude(0.9, pattern="1x16"),
}
SAMPLES = 200
QUANTIZE = {"float32": None, "int8 weights": "weights", "int8": "full"}


def run(net):
    (x, _), (x_test, y_test) = NETS[net].data()
    test = x_test[:TESTED], y_test[:TESTED]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, method in METHODS.items():
            model = train_or_load(net, method)
            for kind, quantize in QUANTIZE.items():
                report = keras_dst.export_tflite(
                    model,
                    pathlib.Path(folder) / "model.tflite",
                    optimize="size",
                    measure=False,
                    quantize=quantize,
                    representative=x[:SAMPLES] if quantize == "full" else None,
                    inputs=test[0],
                    evaluate=test,
                )
                found.setdefault(name, {})[kind] = {
                    "accuracy": report.files[-1].accuracy,
                    "bytes": report.bytes,
                    "max_error": report.max_error,
                    "encodings": [tensor.encoding for tensor in report.tensors],
                }
                print(net, name, kind, found[name][kind], flush=True)
    results.save(
        BENCHMARK,
        net,
        {
            "command": "make bench-int8",
            "methods": {name: repr(method) for name, method in METHODS.items()},
            "seed": SEED,
            "images": IMAGES,
            "tested": TESTED,
            "samples": SAMPLES,
            "epochs": NETS[net].epochs,
            "files": found,
        },
    )


def table():
    lines = [
        "# int8 quantization of sparse networks",
        "",
        f"The table below shows the accuracy in % of each file on {TESTED:,} test images. The "
        "number in brackets is the size of the file relative to the dense float32 file. The "
        "sparse networks have 90 % zeros. For the column `int8 weights`, the exporter rounds a "
        "weight tensor to int8 if the file becomes smaller. The operations of files with int8 "
        "weights are computed in float32. The operations of the files in the column `int8` are "
        f"computed in integers. The value ranges of the activations are measured on {SAMPLES} "
        "training images. `make bench-int8` writes this page from `results/int8/runs.jsonl`.",
        "",
        "| net | weights | " + " | ".join(QUANTIZE) + " |",
        "|---|---|" + "---|" * len(QUANTIZE),
    ]
    stored = results.runs(BENCHMARK)
    for net in NETS:
        if net not in stored:
            continue
        found = stored[net]["files"]
        whole = found["dense"]["float32"]["bytes"]
        for name, kinds in found.items():
            cells = [
                f"{100 * file['accuracy']:.2f} ({file['bytes'] / whole:.3f}×)"
                for file in kinds.values()
            ]
            lines.append(f"| {net} | {name} | " + " | ".join(cells) + " |")
    results.write_index(BENCHMARK, lines)


def main():
    results.run_missing(BENCHMARK, __doc__, "--nets", NETS, run, ["lenet", "vgg"])
    table()


if __name__ == "__main__":
    main()
