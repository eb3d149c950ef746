"""Estimate the moving statistics of batch normalization again after the weights have changed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_dst import _keras
from keras_dst._utils.validation import check_integer
from keras_dst.surgery import check_model


def recalibrate(model, data, batch_size: int = 128, steps: int | None = None):
    """Estimate the moving statistics of all BatchNormalization layers again, in one pass over data.

    One-shot pruning and `shrink` change the inputs of BatchNormalization layers. The moving means
    and variances of these layers are then no longer correct. The new statistics are averages over
    the means and variances of all batches, weighted by the number of samples. The `momentum` of the
    layers has no effect. All other layers run in inference mode, so that dropout, for example, is
    inactive. Frozen BatchNormalization layers and all other weights do not change. After an error
    or an interrupt, the old statistics are restored.

    Args:
        model: A built Keras 3 model: dense, sparse, stripped or shrunk. If the model was trained
            with DCIL, only the statistics for forward passes with masks are estimated, because
            inference uses the masks.
        data: Training data: an array of inputs, a tuple `(inputs, targets)`, or a list or dict of
            arrays for a model with several inputs. An iterable of batches is also accepted, such as
            a `tf.data.Dataset`, a `PyDataset` or a generator. Each batch consists of inputs or is a
            tuple `(inputs, targets)`.
        batch_size: Number of samples per batch, used only if the data are arrays. Defaults to 128.
        steps: Number of batches to read. Defaults to None, which reads all batches.

    Returns:
        The model.

    Raises:
        TypeError: If `model` is not a Keras 3 model, or if `data` has an unsupported type.
        ValueError: If the model has no trainable BatchNormalization layer, if a BatchNormalization
            layer has `renorm=True`, or if the data contain no batch. A ValueError is also raised if
            the data are an endless `PyDataset` and `steps` is None.

    Example:
        >>> keras_dst.recalibrate(keras_dst.shrink(model), x_train)
    """
    check_model(model)
    check_integer(batch_size, "batch_size")
    if steps is not None:
        check_integer(steps, "steps")
    layers = _normalizations(model)
    if isinstance(data, keras.utils.PyDataset) and data.num_batches is None and steps is None:
        raise ValueError(
            "Expected the argument steps, because the PyDataset is endless. Received: a PyDataset "
            "with num_batches=None, and steps=None. Fix: pass the number of batches as steps."
        )
    batches = itertools.islice(_batches(data, batch_size), steps)
    before = [(v, np.array(v.numpy())) for layer in layers for v in _statistics(layer)]
    seen = 0
    try:
        with contextlib.ExitStack() as stack:
            for layer in layers:
                stack.enter_context(_averaging(layer))
            stack.enter_context(_without_gradients())
            for batch in batches:
                model(batch, training=False)
                seen += 1
        if not seen:
            fix = (
                "create a new generator, because a generator can be read only once"
                if isinstance(data, Iterator)
                else "pass data with at least one batch"
            )
            raise ValueError(
                f"Expected at least one batch of data. Received: data without batches. Fix: {fix}."
            )
    except BaseException:
        for variable, value in before:
            variable.assign(value)
        raise
    return model


def _normalizations(model) -> list:
    """Return the BatchNormalization layers whose moving statistics are updated during training."""
    found = [
        layer
        for layer in _keras.flatten_layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    trained = [layer for layer in found if layer.trainable]
    if not trained:
        raise ValueError(
            f"Expected a model with trainable BatchNormalization layers. Received: '{model.name}' "
            f"with {len(found)} BatchNormalization layers, none of which is trainable. Fix: set "
            "layer.trainable = True for BatchNormalization layers, or do not call recalibrate."
        )
    for layer in trained:
        if getattr(layer, "renorm", False):
            raise ValueError(
                f"Expected BatchNormalization layers without renorm. Received: '{layer.name}' with "
                "renorm=True. Fix: train the model for some steps instead."
            )
    return trained


def _statistics(layer) -> list:
    return [layer.moving_mean, layer.moving_variance]


@contextlib.contextmanager
def _averaging(layer) -> Iterator[None]:
    """Average the batch statistics of a BatchNormalization layer over all calls in the context.

    In each call, the momentum is the number of samples before the call, divided by the number of
    samples including the call. At the end, the moving mean and variance are averages over all
    calls, weighted by the number of samples.
    """
    momentum, call, samples = layer.momentum, layer.call, 0

    def averaged(inputs, *args, **kwargs):
        nonlocal samples
        # Set the moving statistics to 0 before the first call. The first call multiplies the old
        # statistics by momentum 0, and an infinite statistic would become NaN.
        if not samples:
            for variable in _statistics(layer):
                variable.assign(np.zeros(variable.shape))
        before, samples = samples, samples + int(inputs.shape[0])
        layer.momentum = before / samples
        return call(inputs, **{**kwargs, "training": True})

    layer.call = averaged
    try:
        yield
    finally:
        del layer.call
        layer.momentum = momentum


def _without_gradients():
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def _batches(data, batch_size: int) -> Iterator[Any]:
    """Yield the inputs of each batch."""
    if isinstance(data, tuple):
        data = data[0]
    if isinstance(data, keras.utils.PyDataset):
        endless = data.num_batches is None
        indices = itertools.count() if endless else range(data.num_batches)
        yield from (_inputs(data[i]) for i in indices)
    elif _is_array(data) or (
        isinstance(data, (list, Mapping)) and data and all(map(_is_array, keras.tree.flatten(data)))
    ):
        length = len(keras.tree.flatten(data)[0])
        for begin in range(0, length, batch_size):
            part = slice(begin, begin + batch_size)
            yield keras.tree.map_structure(lambda array, part=part: array[part], data)
    elif isinstance(data, Iterable) and not isinstance(data, (str, list, Mapping)):
        yield from map(_inputs, data)
    else:
        raise TypeError(
            "Expected data as an array, (inputs, targets), a list or dict of arrays, or an "
            f"iterable of batches. Received: {data!r} of type {type(data).__name__}"
        )


def _is_array(data) -> bool:
    return len(getattr(data, "shape", ())) > 0


def _inputs(batch):
    return keras.utils.unpack_x_y_sample_weight(batch)[0]
