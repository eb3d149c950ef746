"""Train a network with the code of a method's authors, on a CPU.

`benchmarks.accuracy.authors` calls this module, which imports the authors' modules from a checkout
of their repository. Function calls that need a GPU are replaced by functions that do nothing. The
authors' functions that load image files are replaced by functions that load arrays.

For each method, a function `METHOD_net` builds the authors' network, and a function `METHOD` trains
this network with the authors' training loop. The training function returns the masked weights and
a function that maps images to logits.
"""

import functools
import logging
import math
import sys
import tempfile
import time
from types import SimpleNamespace
from unittest import mock

import keras
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.accuracy.methods import Augmented

# -- DST -------------------------------------------------------------------------------------------


def dst_net():
    from model import LeNet_300_100_Masked

    return LeNet_300_100_Masked()


def dst(case, net, data, seed):
    from trainer import Trainer

    train, test = (loader(case.task, *part) for part in data)
    optimizer = torch.optim.SGD(net.parameters(), case.task.rate, momentum=0.9)
    with tempfile.TemporaryDirectory() as folder:
        args = SimpleNamespace(
            max_epoch=case.task.epochs, alpha=5e-4, mask=True, n_eval_step=500, model_folder=folder
        )
        Trainer(args, logging.getLogger("authors")).train(
            net, nn.CrossEntropyLoss(), torch.device("cpu"), train, test, optimizer
        )
    layers = [layer for layer in net.modules() if hasattr(layer, "threshold")]
    return net, [w.weight * (w.weight.abs() > w.threshold[:, None]) for w in layers]


# -- FlipOut ---------------------------------------------------------------------------------------


def flipout_net():
    from models.mnist_models import LeNet5

    return LeNet5()


def flipout(case, net, data, seed):
    """Train with FlipOut, and prune after every epoch except the last."""
    criterion = {"FlipOut": "flipout", "Magnitude": "global_magnitude"}[case.method]
    words = f"--prune_criterion {criterion} --prune_freq 1 --prune_rate 0.5 --opt sgd -mom 0.9"
    words += f" -lr {case.task.rate} -bs {case.task.batch} -e {case.task.epochs} --device cpu"
    sys.argv = ["main.py", *words.split(), *(["--noise"] if criterion == "flipout" else [])]
    import main as authors

    # The authors' network expects images of 32 x 32 pixels.
    data = [(np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))), y) for x, y in data]
    train, test = (loader(case.task, *part) for part in data)
    sizes = len(train.dataset), 0, len(test.dataset)
    stand_ins = {
        "get_model": lambda config: net,
        "get_opt": lambda config, net: with_cosine_decay(sgd(config, net), case.task, len(train)),
        "get_dataloaders": lambda config: ((train, None, test), sizes),
    }
    sgd = authors.getters.get_opt
    with mock.patch.multiple(authors.getters, **stand_ins):
        authors.train(authors.parse_args(), mock.MagicMock())
    return lambda x: net(nn.functional.pad(x, (2, 2, 2, 2))), net.prunable_params


# -- OptG ------------------------------------------------------------------------------------------


def optg_net():
    """Return a LeNet-5, built from the sparse convolution layers of the authors.

    Each dense layer is replaced by a convolution whose kernel is as large as the layer's input.
    """
    sys.argv = ["imagenet.py", "--config", f"{sys.path[0]}/configs/resnet50_cifar10.yaml"]
    from utils.conv_type import MySparseConv as Conv

    return nn.Sequential(
        *(Conv(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(Conv(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(Conv(16, 120, 5), nn.ReLU(), Conv(120, 84, 1), nn.ReLU(), Conv(84, 10, 1), nn.Flatten()),
    )


def optg(case, net, data, seed):
    """Train with the authors' loop, and reach the target sparsity after the last epoch.

    In a short training run, the authors' sigmoid schedule ends below the requested sparsity, so
    request a higher sparsity.
    """
    import imagenet as authors

    train, task, args = loader(case.task, *data[0]), case.task, authors.args
    changes = {"lr": task.rate, "mask_lr": 0.0, "weight_decay": 0.0, "gpu": None}
    vars(args).update(changes, epochs=task.epochs, warmup_length=0)
    authors.print = lambda *words: None
    optimizer = authors.get_optimizer(args, net)
    steps = iter(range(1, task.epochs * len(train) + 1))
    optimizer.register_step_post_hook(
        lambda *_: authors.adjust_learning_rate(optimizer, next(steps) / len(train))
    )
    authors.adjust_learning_rate(optimizer, 0)
    way = functools.partial(authors.sigmoid, beta=args.beta)
    for epoch in range(task.epochs):
        ratio = way(epoch - task.epochs / 2) / way(task.epochs / 2 - 1)
        authors.set_model(net, case.sparsity * ratio)
        authors.train(train, net, nn.CrossEntropyLoss(), optimizer, epoch, args, mock.MagicMock())
    pruned = [(m.weight.flatten(), m.prune_index) for m in net if hasattr(m, "prune_index")]
    return net, [weight.index_fill(0, index, 0.0) for weight, index in pruned]


# -- DCIL ------------------------------------------------------------------------------------------


def dcil_net():
    """Return the authors' ResNet with depth 8 and stride 2 in the first convolution."""
    from pruning.dcil import mnn
    from pruning.models import resnet_mask

    resnet_mask.mnn = mnn
    net = resnet_mask.ResNet_CIFAR(resnet_mask.BasicBlock, [1, 1, 1])
    net.conv1.stride = (2, 2)
    return net


def dcil(case, net, data, seed):
    """Train with the authors' loop. Pass fractional epochs to the loop, such as 2.5."""
    import run_dcil as authors

    task, source = case.task, Augmented(*data[0], seed)
    optimizer = torch.optim.SGD(net.parameters(), task.rate, momentum=0.9)
    optimizer = with_cosine_decay(optimizer, task, len(source))
    args = SimpleNamespace(
        cuda=False,
        prune=True,
        prune_rate=case.sparsity,
        prune_freq=16,
        prune_type="unstructured",
        prune_imp="L2",
        target_epoch=task.epochs * 225 / 300,
        warmup_loss=task.epochs * 70 / 300,
    )
    authors.iterations = 0
    # Replace the function that computes the accuracy on training images, because this function
    # fails. The benchmark does not need the training accuracy.
    authors.accuracy = lambda *_, **__: torch.zeros(2, 1)
    whole = nn.DataParallel(net)
    for epoch in range(task.epochs):
        for first in range(0, len(source), args.prune_freq):
            some = range(first, min(first + args.prune_freq, len(source)))
            part = [tensors(*source[i]) for i in some]
            now = epoch + first / len(source)
            # `with_cosine_decay` sets the learning rate, so the authors' schedule must do nothing.
            loss, schedule = nn.CrossEntropyLoss(), mock.MagicMock()
            authors.train(args, part, now, whole, loss, optimizer, schedule)
        source.on_epoch_end()
    convolutions = [m for m in net.modules() if hasattr(m, "mask")]
    return lambda x: net(x, 0), [*(m.weight * m.mask for m in convolutions), net.fc_part.weight]


# -- helpers for all methods -----------------------------------------------------------------------

NETS = {"dst": dst_net, "flipout": flipout_net, "optg": optg_net, "dcil": dcil_net}
LOOPS = {"dst": dst, "flipout": flipout, "optg": optg, "dcil": dcil}


def prepare(code, family):
    """Make the authors' modules importable, and replace the missing packages that they import."""
    sys.path[:0] = [str(code / "mnist" if family == "dst" else code)]
    missing = ["torchvision", "torchvision.models", "torchvision.transforms", "cv2"]
    for name in [*missing, "utils.data_loaders" if family == "flipout" else "data"]:
        sys.modules[name] = mock.MagicMock()
    to = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, **kwargs: to(
        self, *("cpu" if arg == "cuda" else arg for arg in args), **kwargs
    )
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *args, **kwargs: self
    nn.Conv2d.conv2d_forward = lambda self, x, w: self._conv_forward(x, w, self.bias)


def tensors(x, y):
    """Convert images (channels last) and labels to PyTorch tensors (channels first)."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy()), torch.from_numpy(y).long()


def loader(task, x, y):
    """Return a data loader that shuffles the samples and yields batches of equal size."""
    return DataLoader(TensorDataset(*tensors(x, y)), task.batch, shuffle=True, drop_last=True)


def with_cosine_decay(optimizer, task, steps_per_epoch):
    """Change an optimizer so that its learning rate decays to 0 along a cosine, step by step."""
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.epochs * steps_per_epoch)
    optimizer.register_step_post_hook(lambda *_: cosine.step())
    return optimizer


def make(family, seed):
    torch.manual_seed(seed)
    return NETS[family]()


def run(case, seed, data):
    """Train and test the authors' network.

    Return the test accuracy, the sparsity and the training time in seconds.
    """
    net = make(case.family, seed)
    begin = time.perf_counter()
    logits, weights = LOOPS[case.family](case, net, data, seed)
    seconds = time.perf_counter() - begin
    net.eval()
    x, y = tensors(*data[1])
    with torch.no_grad():
        found = torch.cat([logits(part).argmax(1) for part in x.split(500)])
    kept = sum(int(w.count_nonzero()) for w in weights)
    return {
        "test_accuracy": (found == y).float().mean().item(),
        "sparsity": 1 - kept / sum(w.numel() for w in weights),
        "seconds": seconds,
        "backend": "torch",
    }


def with_initial_weights(family, seed, model):
    """Copy the weights of the authors' untrained network to the Keras model."""
    net = make(family, seed)
    modules = [m for m in net.modules() if getattr(m, "weight", torch.ones(1)).ndim > 1]
    for layer in model.layers:
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            # Keras and PyTorch list the convolutions of residual shortcuts at different positions.
            # Therefore match the layers by the number of weights in their kernels.
            size = math.prod(layer.kernel.shape)
            module = next(module for module in modules if module.weight.numel() == size)
            modules.remove(module)
            weight = module.weight.detach().numpy()
            weight = weight.transpose(*range(2, weight.ndim), 1, 0)
            layer.kernel.assign(weight.reshape(layer.kernel.shape))
            if module.bias is not None:
                layer.bias.assign(module.bias.detach().numpy())
    return model
