"""Count the FLOPs and parameters of many networks after half of their channels are removed.

Each network is trained for only two steps on random data, so the results say nothing about
accuracy. Channels are ranked in two ways: the channels of coupled layers are ranked together, or
the channels of each layer are ranked alone. Networks whose results are already stored are skipped.
To measure a network again, delete its line in results/half_channels/runs.jsonl. The command
`python -m benchmarks.coverage.models --table` writes the table in docs/models.md.
"""

import argparse
import time
import warnings

from benchmarks import results

BENCHMARK = "half_channels"
CLASSES, BATCH, STEPS = 10, 8, 2
MODES = ("per layer", "together")


def applications(name, size=32, **options):
    def build():
        import keras

        make = getattr(keras.applications, name)
        return make(input_shape=(size, size, 3), weights=None, classes=CLASSES, **options)

    return build


def own(name, *arguments):
    def build():
        from benchmarks import networks

        return getattr(networks, name)(*arguments)

    return build


def keras_hub_resnet():
    import keras
    import keras_hub
    from keras import layers

    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[2, 2, 2, 2],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="basic_block",
        image_shape=(32, 32, 3),
    )
    x = layers.GlobalAveragePooling2D()(backbone.output)
    return keras.Model(backbone.input, layers.Dense(CLASSES)(x))


NETWORKS = {
    "ResNet-20 (CIFAR)": own("resnet", 20),
    "ResNet-56 (CIFAR)": own("resnet", 56),
    "VGG (CIFAR)": own("vgg"),
    "ViT, small": own("vision_transformer"),
    "U-Net": own("u_net"),
    "detector with three heads": own("detector"),
    "MobileNet": applications("MobileNet"),
    "MobileNetV2": applications("MobileNetV2"),
    "MobileNetV3Small": applications("MobileNetV3Small"),
    "MobileNetV3Large": applications("MobileNetV3Large"),
    "EfficientNetB0": applications("EfficientNetB0"),
    "EfficientNetV2B0": applications("EfficientNetV2B0"),
    "ResNet50": applications("ResNet50"),
    "ResNet50V2": applications("ResNet50V2"),
    "ConvNeXtTiny": applications("ConvNeXtTiny"),
    "DenseNet121": applications("DenseNet121"),
    "Xception": applications("Xception", 71),
    "InceptionV3": applications("InceptionV3", 75),
    "InceptionResNetV2": applications("InceptionResNetV2", 75),
    "EfficientNetV2S": applications("EfficientNetV2S"),
    "VGG16": applications("VGG16"),
    "KerasHub ResNetBackbone": keras_hub_resnet,
}


def measure(build, mode: str) -> dict:
    """Remove half of the channels of a network.

    Return a dict with the remaining fractions of the parameters and FLOPs, and with measurements of
    `shrink`, such as its time and the largest difference of the outputs.
    """
    import keras
    import numpy as np
    from keras import tree

    import keras_dst

    keras.utils.set_random_seed(0)
    model = build()
    schedule = keras_dst.schedules.Constant(0.5, begin_step=1)
    method = keras_dst.methods.Magnitude(schedule, "uniform", "channel", frequency=1)
    _draw_statistics(model)
    # Clip the gradients, which may be very large in networks with random weights.
    model.compile(keras.optimizers.SGD(1e-3, global_clipnorm=1.0), "mse")
    keras_dst.sparsify(model, method)
    shape = (BATCH * STEPS, *model.inputs[0].shape[1:])
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    outputs = model(x, training=False)
    y = tree.map_structure(lambda t: np.zeros(tuple(t.shape), "float32"), outputs)
    callbacks = [keras_dst.callbacks.SparseTraining()] if mode == "together" else []
    with warnings.catch_warnings():
        # Ignore the warning that the channels of each layer are ranked alone.
        warnings.simplefilter("ignore")
        model.fit(x, y, batch_size=BATCH, verbose=0, callbacks=callbacks)
    keras_dst.strip(model)
    before = keras_dst.report(model)
    began = time.perf_counter()
    small = keras_dst.shrink(model)
    seconds = time.perf_counter() - began
    after = keras_dst.report(small)
    pairs = zip(*(tree.flatten(m(x, training=False)) for m in (model, small)))
    found = [[keras.ops.convert_to_numpy(t) for t in pair] for pair in pairs]
    widths = _widths(small)
    full = _widths(model)
    changed = [name for name, width in full.items() if widths.get(name, width) != width]
    return {
        "parameters": after.parameters / before.parameters,
        "flops": after.dense_flops / before.dense_flops,
        "changed layers": len(changed),
        "odd widths": sum(widths[name] % 8 != 0 for name in changed if full[name] >= 16),
        "difference": float(max(np.abs(a - b).max() for a, b in found)),
        "seconds of shrink": seconds,
    }


def _draw_statistics(model) -> None:
    """Replace the constant initial biases, scales and moving statistics by random values."""
    import numpy as np

    rng = np.random.default_rng(0)
    for variable in model.weights:
        values = rng.uniform(0.5, 1.5, variable.shape) if len(variable.shape) == 1 else None
        if values is not None and variable.name in ("gamma", "moving_variance"):
            variable.assign(values)
        elif values is not None and variable.name in ("bias", "beta", "moving_mean"):
            variable.assign((values - 1) / 5)


def _widths(model) -> dict[str, int]:
    """Return a dict from the name of each layer to its number of filters or units."""
    found = {}
    for layer in model._flatten_layers(include_self=False):
        width = getattr(layer, "filters", None) or getattr(layer, "units", None)
        if isinstance(width, int):
            found[layer.name] = width
    return found


def table() -> list[str]:
    """Return the lines of the section "Half of the channels" in docs/models.md."""
    stored = results.runs(BENCHMARK)
    if not stored:
        return []
    lines = [
        "",
        "## Half of the channels",
        "",
        '`Magnitude(0.5, "uniform", "channel")` and `shrink` remove half of the channels of each '
        "network. The table below shows which fractions of the FLOPs and of the parameters each "
        "network keeps. After half of the channels are removed, about a quarter of the FLOPs "
        "remains. "
        "If the channels of each layer are ranked separately, fewer channels can be removed, "
        "because layers whose outputs are added keep different channels. The column `odd widths` "
        "counts the layers whose number of channels is no longer a multiple of 8 after `shrink`. "
        "Layers with fewer than 16 channels are not counted in `odd widths`. The column "
        "`difference` is the largest difference between the outputs of the stripped model and "
        "the outputs of the smaller model. For comparison, Torch-Pruning 1.6.1 removes half of "
        "the channels of the same networks in PyTorch. Torch-Pruning ranks groups of channels by "
        "their L2 norm and keeps multiples of 8 channels. The cells for Torch-Pruning are empty "
        "if we did not build the network in PyTorch. The networks in the table have random "
        "weights, so the table says nothing about accuracy. `make bench-models` writes the table "
        "of the remaining FLOPs and parameters.",
        "",
        "| network | FLOPs, ranked per layer | FLOPs, ranked together | FLOPs, Torch-Pruning "
        "| parameters, ranked together | parameters, Torch-Pruning | odd widths | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in NETWORKS:
        if name in stored:
            alone, together = (stored[name]["modes"][mode] for mode in MODES)
            theirs = stored.get(f"Torch-Pruning, {name}", {})
            lines.append(f"| {name} | {_cell(alone, 'flops')} | {_row(together, theirs)} |")
    return lines


def _row(found: dict, theirs: dict) -> str:
    if "error" in found:
        return f"{found['error']} | | | | |"
    cells = [_cell(run, key) for key in ("flops", "parameters") for run in (found, theirs)]
    odd = f"{found['odd widths']} of {found['changed layers']}"
    return " | ".join([*cells, odd, f"{found['difference']:.0e}"])


def _cell(found: dict, key: str) -> str:
    if "error" in found:
        return "error"
    return f"{found[key]:.3f}" if key in found else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    args = parser.parse_args()
    import keras

    for name in args.networks:
        if name in results.runs(BENCHMARK):
            continue
        modes = {}
        for mode in MODES:
            try:
                modes[mode] = measure(NETWORKS[name], mode)
            except ImportError as error:
                print(f"{name}: skipped, {error}", flush=True)
                break
            except Exception as error:  # Catch all errors to list them in the table.
                modes[mode] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            print(f"{name}, {mode}: {modes[mode]}", flush=True)
            keras.backend.clear_session()
        else:
            run = {"command": "make bench-models", "seed": 0, "modes": modes}
            results.save(BENCHMARK, name, run)


if __name__ == "__main__":
    main()
