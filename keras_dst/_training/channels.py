"""Coupling of channels during training: tell methods which channels of a model leave together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_dst import _keras
from keras_dst._reporting.flops import count_uses
from keras_dst.layers.base import SparseWeight
from keras_dst.masks import Layout, masked
from keras_dst.methods import channels
from keras_dst.methods.base import Method

# A variable with channels along one axis: the variable, the axis, and the number of the channel of
# every entry along this axis, or -1 for an entry that stays.
Follower = tuple[Any, int, np.ndarray]


class Coupling(NamedTuple):
    """The coupled channels of a model, for the weights under one method.

    Attributes:
        layouts: Axes and channels of the weights.
        followers: Trainable variables that are pruned with the channels: biases, and scales and
            offsets of normalizations.
        statistics: Moving means of batch normalizations, which are pruned with the channels too.
    """

    layouts: list[Layout]
    followers: list[Follower]
    statistics: list[Follower]


def couple(model, method: Method, weights: Sequence, layouts: Sequence[Layout]) -> Coupling:
    """Return the coupled channels of a model, if the method ranks channels.

    A channel can be pruned if the method has all weights that make it. Channels of the outputs of
    the model always stay.

    Args:
        model: Model that holds the weights.
        method: Method of the weights.
        weights: Variables under the method.
        layouts: Axes of these variables.

    Raises:
        ValueError: If no channel can be pruned, or if the costs of the channels are not known.
    """
    if method.pattern != "channel" or method.learned:
        return Coupling(list(layouts), [], [])
    if _keras.graph_of(model) is None:
        return _uncoupled(model, method, layouts)
    pinned, parts = _parts(model)
    under = {id(weight) for weight in weights}
    makers: dict[int, list[int]] = {}
    for place, part in enumerate(parts):
        if part.out is not None:
            for channel in np.unique(part.axes[part.out]).tolist():
                makers.setdefault(channel, []).append(place)
    members: dict[tuple[int, ...], list[int]] = {}
    for channel, places in makers.items():
        if not pinned[channel] and all(id(parts[place].variable) in under for place in places):
            members.setdefault(tuple(places), []).append(channel)
    if not members:
        raise ValueError(
            f"pattern='channel': no channel of '{model.name}' can be pruned. Expected channels "
            "that do not reach the outputs of the model, and whose weights are all under "
            f"{method!r}. Select more layers, or use another pattern."
        )
    # Consecutive numbers for the channels of every group.
    numbers = np.full(len(pinned), -1, "int32")
    numbers[[channel for group in members.values() for channel in group]] = np.arange(
        sum(map(len, members.values()))
    )
    sizes = [len(group) for group in members.values()]
    groups = channels.ChannelGroups(sizes, *_costs(model, method, parts, numbers, sizes))
    known = {id(part.variable): part for part in parts}
    found = [
        _with_channels(weight, layout, known.get(id(weight)), numbers, groups)
        for weight, layout in zip(weights, layouts)
    ]
    following = [
        (part.variable, axis, numbers[ids])
        for part in parts
        if part.out is None
        for axis, ids in part.axes.items()
        if (numbers[ids] >= 0).any()
    ]
    if getattr(method, "grows", False):
        following = []  # a channel that grows at 0 gets a gradient only if its offsets are not 0
    trained = {id(variable) for variable in model.trainable_variables}
    return Coupling(
        found,
        [follower for follower in following if id(follower[0]) in trained],
        [follower for follower in following if id(follower[0]) not in trained],
    )


def mask_followers(followers: Sequence[Follower], alive) -> None:
    """Set the entries of pruned channels to zero.

    Args:
        followers: Variables with channels.
        alive: Vector that `channels.alive` returned.
    """
    for variable, axis, ids in followers:
        mask = channels.along_axis(alive, ids, len(variable.shape), axis)
        variable.assign(masked(ops.convert_to_tensor(variable), mask))


def _uncoupled(model, method: Method, layouts) -> Coupling:
    """Warn that the channels of each layer are ranked alone, because the model has no graph."""
    if method.counted_in != "channels":
        raise ValueError(
            f"counted_in={method.counted_in!r} needs a Sequential or Functional model. Received: "
            f"'{model.name}' of type {type(model).__name__}, which runs its layers in a `call` of "
            "its own. Leave counted_in out."
        )
    warnings.warn(
        f"{method!r}: '{model.name}' runs its layers in a `call` of its own, so it is not known "
        "which channels leave together. The channels of each layer are ranked alone. Layers whose "
        "outputs are added keep different channels, of which `shrink` can remove few, and the "
        "layers that give the outputs of the model lose channels too. Name the layers to prune "
        "with filters, or build a Functional model.",
        stacklevel=2,
    )
    return Coupling(list(layouts), [], [])


def _with_channels(weight, layout: Layout, part, numbers, groups) -> Layout:
    """Return the layout of a weight with the channels of its output units."""
    if part is None or part.out is None:
        return layout
    rank = len(weight.shape)
    out = part.out % rank
    axes = sorted(axis % rank for axis in layout.outputs)
    if out not in axes:
        axes = [out]
    units = tuple(weight.shape[axis] for axis in axes)
    along = [-1 if axis == out else 1 for axis in axes]
    ids = np.broadcast_to(numbers[part.axes[part.out]].reshape(along), units).reshape(-1)
    outputs = tuple(axis - rank for axis in axes)
    return Layout(outputs, layout.inputs, channels.Channels(ids, groups))


def _costs(model, method: Method, parts, numbers, sizes) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares and the costs of all weights of a model, see `ChannelGroups`."""
    uses = count_uses(model)
    known = {id(part.variable): part for part in parts}
    owner = np.append(np.repeat(np.arange(len(sizes)), sizes), len(sizes))
    shares, costs = [], []
    for variable in model.weights:
        size, axes = int(np.prod(variable.shape)), []
        part = known.get(id(variable))
        if part is not None:
            axes = [numbers[ids] for _, ids in sorted(part.axes.items())]
        count, reason = uses.get(id(variable), (0, None))
        if count is None:
            if method.counted_in == "flops":
                raise ValueError(
                    f"counted_in='flops': the FLOPs of {variable.path} are not known: {reason}. "
                    "Use counted_in='parameters'."
                )
            count = 0
        costs.append([size, 2 * count * size])
        rows = [np.bincount(owner[ids], minlength=len(sizes) + 1) / len(ids) for ids in axes]
        stays = np.eye(len(sizes) + 1)[-1]
        shares.append([*rows, stays, stays][:2])
    return np.array(shares), np.array(costs, "float64")


class Part(NamedTuple):
    """TEMPORARY."""

    variable: Any
    axes: dict
    out: int | None


def _parts(model):
    from keras_dst._structure.handlers import (
        DEPTHWISE,
        BatchNorm,
        GroupedConv,
        KernelLayer,
        Recurrent,
        SeparableConv,
        TransposedConv,
    )
    from keras_dst._structure.plan import Plan

    plan, found = Plan(model, remove=False), {}
    by_name = {layer.name: layer for layer in _keras.flatten_layers(model)}

    def add(op, name, axes, out=None):
        layer = by_name.get(op.name, op)
        weight = getattr(type(layer), name, None)
        v = weight.raw(layer) if isinstance(weight, SparseWeight) else getattr(layer, name, None)
        if v is not None:
            found[id(v)] = Part(v, axes, out)

    for h in plan.handlers:
        if isinstance(h, Recurrent):
            continue
        if isinstance(h, SeparableConv):
            x = h.x.ids
            add(h.op, "depthwise_kernel", {-2: x})
            pointwise = {-2: np.repeat(x, h.op.depth_multiplier), -1: h.unit_ids}
            add(h.op, "pointwise_kernel", pointwise, -1)
            add(h.op, "bias", {-1: h.unit_ids})
        elif isinstance(h, KernelLayer):
            i, o = (-1, -2) if isinstance(h, TransposedConv) else (-2, -1)
            add(h.layer, "kernel", {i: h.x.ids, o: h.unit_ids}, o)
            add(h.layer, "bias", {-1: h.unit_ids})
        elif isinstance(h, GroupedConv):
            dw = isinstance(h.op, DEPTHWISE)
            add(h.op, "kernel", {-2: h.x.ids} if dw else {-1: h.y.ids}, -2 if dw else -1)
            add(h.op, "bias", {-1: h.y.ids})
        elif isinstance(h, BatchNorm):
            for n in ("gamma", "beta", "moving_mean"):
                add(h.op, n, {-1: h.x.ids})
    return plan.pinned, list(found.values())
