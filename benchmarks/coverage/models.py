"""Test every method on many models and on every backend: results/models.

Each model is made sparse, trained for a few steps, evaluated, saved, loaded and stripped. If a
stage fails, such as saving the model, its error message is stored. The command `python -m
benchmarks.coverage.models --table` writes docs/models.md.
"""

import argparse
import math
import os
import tempfile

from benchmarks import results
from benchmarks.backends import BACKENDS, run_on
from benchmarks.coverage import half_channels

BENCHMARK = "models"
STEPS = ("fit", "evaluate", "predict", "save, load", "strip")
BATCH, BATCHES, CLASSES = 4, 3, 5
PAGE = results.ROOT / "docs" / "models.md"


def images(size=32):
    import numpy as np

    return np.random.default_rng(0).standard_normal((BATCH * BATCHES, size, size, 3), "float32")


def words(length=12):
    import numpy as np

    return np.random.default_rng(0).integers(1, 64, (BATCH * BATCHES, length)).astype("int32")


def of_applications(name, **options):
    def build():
        import keras

        make = getattr(keras.applications, name)
        return make(input_shape=(32, 32, 3), weights=None, classes=CLASSES, **options), images()

    return build


def vision_transformer():
    import keras
    from keras import layers

    inputs = keras.Input((32, 32, 3))
    x = layers.Reshape((16, 32))(layers.Conv2D(32, 8, strides=8)(inputs))
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 8)(y, y)
        y = layers.Dense(64, "gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(32)(y)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES, "softmax")(x)), images()


def recurrent_text():
    import keras
    from keras import layers

    model = keras.Sequential([keras.Input((12,), dtype="int32"), layers.Embedding(64, 16)])
    model.add(layers.Bidirectional(layers.LSTM(12, return_sequences=True)))
    model.add(layers.TimeDistributed(layers.Dense(12, "relu")))
    model.add(layers.GRU(12))
    model.add(layers.Dense(CLASSES, "softmax"))
    return model, words()


def multi_input():
    """Return a model with two inputs, two outputs and a nested model that is called twice."""
    import keras
    from keras import layers

    a, b = keras.Input((32, 32, 3)), keras.Input((32, 32, 3))
    tower = keras.Sequential([layers.Conv2D(8, 3, activation="relu"), layers.Flatten()])
    x = layers.concatenate([tower(a), tower(b)])
    heads = [layers.Dense(CLASSES, "softmax", name=name)(x) for name in ("one", "two")]
    return keras.Model([a, b], heads), [images(), images()[::-1].copy()]


def keras_hub_bert():
    import keras
    import keras_hub
    import numpy as np
    from keras import layers

    bert = keras_hub.models.BertBackbone(
        vocabulary_size=64,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=12,
        dropout=0.0,
    )
    inputs = {name: keras.Input((12,), dtype="int32", name=name) for name in bert.input}
    x = layers.Dense(CLASSES, "softmax")(bert(inputs)["pooled_output"])
    data = {"token_ids": words(), "segment_ids": np.zeros_like(words())}
    data["padding_mask"] = np.ones_like(words())
    return keras.Model(inputs, x), data


MODELS = {
    "Sequential, recurrent text": recurrent_text,
    "two inputs, two outputs, shared tower": multi_input,
    "vision transformer": vision_transformer,
    "KerasHub BertBackbone": keras_hub_bert,
    "MobileNetV2": of_applications("MobileNetV2", alpha=0.35),
    "MobileNetV3Small": of_applications("MobileNetV3Small"),
    "EfficientNetB0": of_applications("EfficientNetB0"),
    "ResNet50": of_applications("ResNet50"),
    "ConvNeXtTiny": of_applications("ConvNeXtTiny"),
}


def methods():
    from keras_dst.methods import DCIL, DST, SET, Consensus, FlipOut, Magnitude, OptG, RigL

    return {
        "DST": DST(sparsity=0.5),
        "DCIL": DCIL(0.8),
        "OptG": OptG(0.8),
        "Consensus": Consensus(0.5),
        "Magnitude": Magnitude(0.8),
        "FlipOut": FlipOut(0.8),
        "SET": SET(0.8),
        "RigL": RigL(0.8),
    }


def run(build, method) -> dict[str, str]:
    """Train, evaluate, save, load and strip a model. Return "ok" or an error message per stage."""
    found = {}
    try:
        for step in _steps(build, method):
            found[step] = "ok"
    except Exception as error:  # Catch all errors to list them in the table.
        step = STEPS[len(found)]
        found[step] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found


def _steps(build, method):
    import keras
    import numpy as np

    import keras_dst
    from benchmarks.data import apply_method

    def predict(model):
        outputs = model.predict(x, batch_size=BATCH, verbose=0)
        return [np.array(output) for output in keras.tree.flatten(outputs)]

    def check(condition, what):
        if not condition:
            raise AssertionError(what)

    keras.utils.set_random_seed(0)
    model, x = build()
    y = np.arange(BATCH * BATCHES) % CLASSES
    y = [y] * len(model.outputs) if len(model.outputs) > 1 else y
    optimizer = apply_method(method, model, keras.optimizers.SGD(1e-3, momentum=0.9))
    # On TensorFlow and PyTorch, the compilation with XLA would take minutes.
    xla = keras.backend.backend() == "jax"
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=xla)
    driver = keras_dst.callbacks.SparseTraining()
    history = model.fit(x, y, batch_size=BATCH, epochs=2, verbose=0, callbacks=[driver]).history
    check(math.isfinite(history["loss"][-1]), f"loss: {history['loss'][-1]}")
    check(history["sparsity"][-1] > 0, "nothing was pruned")
    yield "fit"
    model.evaluate(x, y, batch_size=BATCH, verbose=0)
    yield "evaluate"
    expected = predict(model)
    yield "predict"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
    check(all(map(np.array_equal, predict(loaded), expected)), "the loaded model differs")
    yield "save, load"
    sparsity = keras_dst.report(keras_dst.strip(loaded)).sparsity
    check(all(map(np.array_equal, predict(loaded), expected)), "the stripped model differs")
    ours = [z for z in loaded._flatten_layers() if type(z).__module__.startswith("keras_dst")]
    check(not ours, f"left by strip: {ours}")
    check(sparsity > 0, "no zeros")
    yield "strip"


def measure(models, names):
    import keras

    name = keras.backend.backend()
    cells = results.runs(BENCHMARK).get(name, {"cells": {}})["cells"]
    for model in models:
        for method in names:
            print(f"{model}, {method}: ", end="", flush=True)
            found = run(MODELS[model], methods()[method])
            cells.setdefault(model, {})[method] = found
            print(list(found.values())[-1] if len(found) < len(STEPS) else "ok", flush=True)
            keras.backend.clear_session()
        results.save(
            BENCHMARK, name, {"command": "make bench-models", "steps": STEPS, "cells": cells}
        )


def table():
    lines = [
        "# Tested models",
        "",
        "For each model and method, the benchmark makes the model sparse, and then trains, "
        "evaluates, saves, loads and strips the model. The benchmark uses small inputs and random "
        "weights. A check mark means that all steps succeeded, and that the loaded model and the "
        "stripped model predict exactly the same values as the trained model. An empty cell means "
        "that the benchmark has not run this model with this method. `make bench-models` writes "
        "this page from the runs in `results/models`.",
    ]
    notes: list[str] = []
    stored = results.runs(BENCHMARK)
    for backend in BACKENDS:
        if backend not in stored:
            continue
        result = stored[backend]
        names = list(methods())
        keras = result["versions"]["keras"]
        lines += [
            "",
            f"## {results.TITLES[backend]}, Keras {keras}",
            "",
            f"| model | {' | '.join(names)} |",
        ]
        lines += ["|---|" + "---|" * len(names)]
        for model in MODELS:
            row = result["cells"].get(model, {})
            cells = [_cell(model, name, row.get(name), notes) for name in names]
            lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += ["", *notes] if notes else []
    lines += half_channels.table()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
    print(PAGE.read_text())


def _cell(model, method, found, notes) -> str:
    if found is None:
        return ""
    if all(found.get(step) == "ok" for step in STEPS):
        return "✓"
    step, error = list(found.items())[-1]
    note = f"{model}, {method}, {step}: {error}"
    if note not in notes:
        notes.append(f"{len(notes) + 1}. {note}")
    return f"[{len(notes)}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="run this backend in this process")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="*", default=["DST", "Magnitude"])
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    if args.backend:
        measure(args.models, args.methods)
        return
    if not args.table:
        for name in BACKENDS:
            which = ["--models", *args.models, "--methods", *args.methods]
            run_on(name, "coverage.models", "--backend", name, *which)
    table()


if __name__ == "__main__":
    main()
