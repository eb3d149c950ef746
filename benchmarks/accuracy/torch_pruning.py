"""Prune channels with Torch-Pruning, for the tables of results/channels and docs/models.md.

This module runs in the environment .venv-torch-pruning, in which keras_dst is not installed. The
command `train` prunes the dense networks that `benchmarks.accuracy.channels` has saved. The pruned
networks are trained with the same data, batches and number of epochs as in
`benchmarks.accuracy.channels`. The command `count` prunes half of the channels of networks with
random weights, and counts the remaining FLOPs and parameters.

    python -m benchmarks.accuracy.torch_pruning train [OPTIONS]
    python -m benchmarks.accuracy.torch_pruning count

The command `train` has the same options as `benchmarks.accuracy.channels`.
"""

import argparse
import functools
import math
import re

import torch
import torch_pruning
from torch import nn

from benchmarks import results
from benchmarks.accuracy import channels
from benchmarks.coverage import half_channels

ROUND_TO, STEPS = 8, 200
# Fraction of the epochs that are trained with the penalty of DepGraph, before channels are removed.
SPARSE_LEARNING = {
    "Torch-Pruning, group L2": 0.0,
    "Torch-Pruning, group L2 and sparse learning": 0.5,
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# -- PyTorch versions of the networks in benchmarks.networks --------------------------------------


def convolution(inputs, filters, size, stride=1, epsilon=1e-5):
    """Return a convolution without bias and a batch normalization, as a list of layers."""
    padding = size // 2
    found = [nn.Conv2d(inputs, filters, size, stride, padding, bias=False)]
    if size > 1 and stride > 1:  # Keras pads images of even size only at the right and bottom.
        found = [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(inputs, filters, size, stride, bias=False)]
    return [*found, nn.BatchNorm2d(filters, epsilon, momentum=0.1)]


class Block(nn.Module):
    """Residual block: two convolutions with a shortcut."""

    def __init__(self, inputs, filters, stride):
        super().__init__()
        first = convolution(inputs, filters, 3, stride)
        self.body = nn.Sequential(*first, nn.ReLU(), *convolution(filters, filters, 3))
        self.shortcut = nn.Sequential(
            *(convolution(inputs, filters, 1, stride) if stride > 1 else [])
        )

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(depth, stride=1):
    found = [*convolution(3, 16, 3, stride), nn.ReLU()]
    inputs = 16
    for filters in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            found.append(Block(inputs, filters, 2 if filters > inputs else 1))
            inputs = filters
    return nn.Sequential(*found, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vgg():
    found, inputs = [], 3
    for widths in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for width in widths:
            found += [*convolution(inputs, width, 3, epsilon=1e-3), nn.ReLU()]
            inputs = width
        found.append(nn.MaxPool2d(2))
    return nn.Sequential(*found, nn.Flatten(), nn.Linear(512, 10))


NETS = {
    "resnet-56": lambda: resnet(56),
    "vgg": vgg,
    "resnet-20, stride 2": lambda: resnet(20, 2),
}


def copy_weights(model, net) -> None:
    """Copy the weights of a Keras model to the same network in PyTorch.

    The layers of each class must have been created in the same order in both networks.
    """
    kinds = {"Conv2D": nn.Conv2d, "BatchNormalization": nn.BatchNorm2d, "Dense": nn.Linear}
    axes = {"Conv2D": (3, 2, 0, 1), "BatchNormalization": (0,), "Dense": (1, 0)}
    for kind, module_type in kinds.items():
        found = [layer for layer in model.layers if type(layer).__name__ == kind]
        found.sort(key=lambda layer: int((re.findall(r"_(\d+)$", layer.name) or [0])[0]))
        modules = [module for module in net.modules() if isinstance(module, module_type)]
        for layer, module in zip(found, modules, strict=True):
            first, *others = layer.get_weights()
            tensors = [module.weight, module.bias]
            if kind == "BatchNormalization":
                tensors += [module.running_mean, module.running_var]
            tensors = [tensor for tensor in tensors if tensor is not None]
            for tensor, array in zip(tensors, [first.transpose(axes[kind]), *others], strict=True):
                tensor.data.copy_(torch.tensor(array))


# -- training -------------------------------------------------------------------------------------


def train(net, data, epochs, steps, seed, penalty=None) -> None:
    """Train a network as `channels.train` does, but only for the given epochs.

    Args:
        net: Network.
        data: Images and class labels.
        epochs: Range of the epochs to train.
        steps: Number of steps of the whole training.
        seed: Seed of the batches.
        penalty: Function that adds the gradients of a penalty to the gradients of the loss.
            Defaults to no penalty.
    """
    batches = channels.batches(*data, seed)
    batches.epoch = epochs.start
    rate = channels.RATE_OF_PRUNING
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, nesterov=True)
    step = epochs.start * len(batches)
    net.train()
    for _ in epochs:
        batches.on_epoch_begin()
        for i in range(len(batches)):
            x, y = (torch.tensor(array).to(DEVICE) for array in batches[i])
            now = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = now
            loss = nn.functional.cross_entropy(net(x.permute(0, 3, 1, 2)), y.long())
            optimizer.zero_grad()
            loss.backward()
            if penalty:
                penalty(net)
            # As in Keras, apply weight decay to the weights, and not to the gradients.
            with torch.no_grad():
                for w in net.parameters():
                    w.mul_(1 - now * channels.DECAY)
            optimizer.step()
            step += 1


@torch.no_grad()
def accuracy(net, data) -> float:
    net.eval()
    right = 0
    for start in range(0, len(data[1]), 500):
        x, y = (torch.tensor(array[start : start + 500]).to(DEVICE) for array in data)
        right += int((net(x.permute(0, 3, 1, 2)).argmax(1) == y).sum())
    return right / len(data[1])


@torch.no_grad()
def cost(net, x) -> dict:
    """Return the FLOPs and the parameters of a network, counted as in `keras_dst.report`."""
    flops = 0

    def count(module, _, output):
        nonlocal flops
        outputs = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
        flops += 2 * module.weight.numel() * (output[:1].numel() // outputs)

    modules = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [module.register_forward_hook(count) for module in modules]
    net.eval()(x)
    for hook in hooks:
        hook.remove()
    tensors = [*net.parameters(), *(b for b in net.buffers() if b.ndim)]
    return {"flops": flops, "parameters": sum(t.numel() for t in tensors)}


def prune(net, x, speedup) -> None:
    """Remove channels in small steps until the FLOPs have decreased by the factor `speedup`."""
    before = cost(net, x)["flops"]
    pruner = pruner_of(net, x, pruning_ratio=0.95, iterative_steps=STEPS, global_pruning=True)
    for _ in range(STEPS):
        if cost(net, x)["flops"] <= before / speedup:
            break
        pruner.step()


def pruner_of(net, x, **options):
    """Return a pruner of DepGraph that ranks groups of coupled channels by their L2 norm."""
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    return torch_pruning.pruner.GroupNormPruner(
        net, x, importance, ignored_layers=[last], round_to=ROUND_TO, **options
    )


def run(path, net_name, data, method, speedup, epochs, seed) -> dict:
    """Prune the dense network with Torch-Pruning, and train the pruned network.

    Return the accuracy, the FLOPs and the parameters of the pruned network.
    """
    import keras

    torch.manual_seed(seed)
    net = NETS[net_name]()
    copy_weights(keras.saving.load_model(path), net)
    net.to(DEVICE)
    x = torch.zeros(1, 3, 32, 32, device=DEVICE)
    before = cost(net, x)
    dense = accuracy(net, data[1])
    first = round(SPARSE_LEARNING[method] * epochs)
    steps = epochs * (len(data[0][1]) // channels.BATCH)
    if first:
        pruner = pruner_of(net, x)
        pruner.update_regularizer()
        train(net, data[0], range(first), steps, seed, pruner.regularize)
    prune(net, x, speedup)
    train(net, data[0], range(first, epochs), steps, seed)
    after = cost(net, x)
    return {
        "dense_accuracy": dense,
        "test_accuracy": accuracy(net, data[1]),
        "flops": after["flops"] / before["flops"],
        "parameters": after["parameters"] / before["parameters"],
    }


# -- counts ---------------------------------------------------------------------------------------


@functools.cache
def torchvision_models():
    """Import `torchvision.models` without the operators of the package, which need CUDA."""
    for op in ("nms", "qnms"):
        arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{op}", arguments)
    import torchvision

    return torchvision.models


def torchvision_network(name):
    return lambda: getattr(torchvision_models(), name)(num_classes=half_channels.CLASSES)


COUNTED = {
    "ResNet-20 (CIFAR)": lambda: resnet(20),
    "ResNet-56 (CIFAR)": lambda: resnet(56),
    "VGG (CIFAR)": vgg,
    "MobileNetV2": torchvision_network("mobilenet_v2"),
    "MobileNetV3Small": torchvision_network("mobilenet_v3_small"),
    "MobileNetV3Large": torchvision_network("mobilenet_v3_large"),
    "EfficientNetB0": torchvision_network("efficientnet_b0"),
    "ResNet50": torchvision_network("resnet50"),
    "ConvNeXtTiny": torchvision_network("convnext_tiny"),
    "DenseNet121": torchvision_network("densenet121"),
}


def count() -> None:
    for name, build in COUNTED.items():
        stored = f"Torch-Pruning, {name}"
        if stored in results.runs(half_channels.BENCHMARK):
            continue
        torch.manual_seed(0)
        net, x = build(), torch.zeros(1, 3, 32, 32)
        before = cost(net, x)
        pruner_of(net, x, pruning_ratio=0.5).step()
        after = cost(net, x)
        run = {key: after[key] / before[key] for key in before}
        run |= {"dense": before, "command": "make bench-models", "seed": 0}
        results.save(half_channels.BENCHMARK, stored, run)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("count")
    channels.add_options(commands.add_parser("train"), SPARSE_LEARNING)
    args = parser.parse_args()
    if args.command == "count":
        count()
    else:
        channels.run_all(args, run)


if __name__ == "__main__":
    main()
