"""When training begins, tell pruning methods which channels are removed together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_dst import _keras
from keras_dst.layers import Gate
from keras_dst.masks import Layout, masked
from keras_dst.methods import channels
from keras_dst.methods.base import Method, UnitMethod

# A follower is a variable that is pruned together with channels, such as a bias. The tuple holds
# the variable, the axis of the channels, and the channel index of each entry along the axis. The
# channel index is -1 for an entry that is never pruned.
Follower = tuple[Any, int, np.ndarray]


class Coupling(NamedTuple):
    """The coupled channels of a model whose weights are pruned by one method.

    Attributes:
        layouts: List of the input axes, output axes and channels of each weight.
        followers: Trainable variables that are pruned together with the channels: biases, and
            scales and offsets of normalization layers.
        statistics: Other variables that are pruned together with the channels: moving means of
            batch normalizations, and variables of frozen layers.
    """

    layouts: list[Layout]
    followers: list[Follower]
    statistics: list[Follower]


def couple(model, method: Method, weights: Sequence, layouts: Sequence[Layout]) -> Coupling:
    """Return the coupled channels of a model, for a method with `pattern="channel"`. For other
    methods, the result contains no channels.

    A channel can be pruned if the method prunes all weights that compute the channel. Channels of
    the model's outputs are never pruned.

    Args:
        model: Model that holds the weights.
        method: Method that prunes the weights.
        weights: Variables that the method prunes.
        layouts: List of the input and output axes of each variable in `weights`.

    Raises:
        ValueError: If no channel can be pruned, or if the costs of the channels are unknown.
    """
    alone = Coupling(list(layouts), [], [])
    if method.pattern != "channel":
        return alone
    if method.learned and not method.couples_channels:
        _warn_of_coupled_layers(model, method)
        return alone
    gates = any(isinstance(layer, Gate) for layer in _keras.flatten_layers(model))
    if gates and isinstance(method, UnitMethod):  # A `Gate` layer may scale any tensor.
        return alone
    has_graph = _keras.graph_of(model) is not None
    counts_channels = isinstance(method, UnitMethod) or method.counted_in == "channels"
    may_be_alone = method.learned and counts_channels
    if not has_graph and method.groups is None:
        return alone if may_be_alone else _uncoupled(model, method, layouts)
    # Import these modules only here, because most training runs do not prune whole channels.
    from keras_dst._structure.coupling import CoupledChannels, channel_groups
    from keras_dst._training.named_groups import with_named_groups

    coupled = channel_groups(model) if has_graph else CoupledChannels([], [], 0, {}, 0, 0)
    axes = {id(weight): layout for weight, layout in zip(weights, layouts)}
    coupled = with_named_groups(coupled, model, method, axes)
    chosen = [
        group
        for group in coupled.groups
        if not group.reason
        and all(id(m.variable) in axes for m in group.members if _makes_channel(m, group.ids))
    ]
    if not chosen and may_be_alone:
        return alone
    if not chosen:
        reasons = "; ".join(dict.fromkeys(group.reason for group in coupled.groups if group.reason))
        raise ValueError(
            f"pattern='channel': no channel of '{model.name}' can be pruned. Expected channels "
            "that do not reach the outputs of the model, and whose weights are all pruned by "
            f"{method!r}. Select more layers, or use another pattern. Reasons why channels are "
            f"kept: {reasons or 'none'}"
        )
    # Number all channels that can be pruned, from 0 on.
    numbers = np.full(coupled.count, -1, "int32")
    numbers[np.concatenate([group.ids for group in chosen])] = np.arange(sum(map(len, chosen)))
    groups = channels.ChannelGroups(
        [len(group) for group in chosen],
        *_costs(method, coupled, numbers, [len(group) for group in chosen]),
        [group.width for group in chosen],
    )
    known = {id(member.variable): member for member in coupled.members}
    found = [
        _with_channels(weight, layout, known.get(id(weight)), numbers, groups)
        for weight, layout in zip(weights, layouts)
    ]
    following = [
        (member.variable, axis, numbers[ids])
        for member in coupled.members
        for axis, ids in member.axes.items()
        if member.follows and (numbers[ids] >= 0).any()
    ]
    # A `UnitMethod` may open a closed gate again, so pruning must not change the biases and scales
    # of a channel with a closed gate.
    if isinstance(method, UnitMethod):
        following = []
    trained = {id(variable) for variable in model.trainable_variables}
    return Coupling(
        found,
        [follower for follower in following if id(follower[0]) in trained],
        [follower for follower in following if id(follower[0]) not in trained],
    )


def _makes_channel(member, ids: np.ndarray) -> bool:
    """Return whether a variable computes at least one of the channels with the given ids."""
    return member.output is not None and bool(np.isin(member.axes[member.output], ids).any())


def mask_followers(followers: Sequence[Follower], alive) -> None:
    """Set the entries of pruned channels to zero, in biases and other follower variables.

    Args:
        followers: Variables that are pruned together with channels.
        alive: Boolean vector from `channels.alive`, which is True for each kept channel.
    """
    for variable, mask in channels.masks_of_followers(followers, alive):
        variable.assign(masked(ops.convert_to_tensor(variable), mask))


def _uncoupled(model, method: Method, layouts) -> Coupling:
    """Return a `Coupling` without coupled channels, for a model without a graph. Warn that the
    channels of each layer are ranked separately."""
    if method.counted_in != "channels":
        raise ValueError(
            f"counted_in={method.counted_in!r} needs a Sequential or Functional model. Received: "
            f"'{model.name}' of type {type(model).__name__}, which runs its layers in its own "
            "`call` method. Leave counted_in out."
        )
    warnings.warn(
        f"{method!r}: '{model.name}' runs its layers in its own `call` method, so keras_dst does "
        "not know which channels have to be removed together. The channels of each layer are "
        "ranked separately. Layers whose outputs are added therefore keep different channels, so "
        "`shrink` can remove only few channels. The layers that compute the outputs of the model "
        "are pruned, too. List the layers whose channels are removed together in the argument "
        "groups of the method, name the layers to prune with filters, or build a Functional model.",
        stacklevel=2,
    )
    return Coupling(list(layouts), [], [])


def _warn_of_coupled_layers(model, method: Method) -> None:
    """Warn if a method selects channels separately in each layer, although some layers have coupled
    channels."""
    if _keras.graph_of(model) is None:
        return
    from keras_dst._structure.coupling import channel_groups

    chains = [
        group.chain for group in channel_groups(model).groups if group.chain and not group.reason
    ]
    if chains:
        warnings.warn(
            f"{method!r} learns which channels of each layer it keeps, and layers of "
            f"'{model.name}' have coupled channels: {'; '.join(chains[:3])}"
            f"{'; ...' if len(chains) > 3 else ''}. `shrink` removes only the channels that are "
            "pruned in all coupled layers. To remove more channels, use a method that ranks "
            "coupled channels together, such as Magnitude, or DST with granularity='unit'.",
            stacklevel=2,
        )


def _with_channels(weight, layout: Layout, member, numbers, groups) -> Layout:
    """Return a copy of a weight's layout that also states the channel of each output unit."""
    if member is None or member.output is None:
        return layout
    rank = len(weight.shape)
    out = member.output % rank
    axes = sorted(axis % rank for axis in layout.outputs)
    if out not in axes:
        axes = [out]
    units = tuple(weight.shape[axis] for axis in axes)
    along = [-1 if axis == out else 1 for axis in axes]
    ids = np.broadcast_to(numbers[member.axes[member.output]].reshape(along), units).reshape(-1)
    outputs = tuple(axis - rank for axis in axes)
    return Layout(outputs, layout.inputs, channels.Channels(ids, groups))


def _costs(method: Method, coupled, numbers, sizes) -> tuple[np.ndarray, np.ndarray]:
    """Return the arrays that `ChannelGroups` receives as `shares` and `costs`."""
    owner = np.append(np.repeat(np.arange(len(sizes)), sizes), len(sizes))
    stays = np.eye(len(sizes) + 1)[-1]
    # The first entries of `shares` and `costs` stand for all variables that never lose channels.
    # The first entry of `costs` is the total cost of these variables.
    shares, costs = [[stays, stays]], [[coupled.other_parameters, coupled.other_flops]]
    for member in coupled.members:
        size = int(np.prod(member.variable.shape))
        ids = [numbers[ids] for _, ids in sorted(member.axes.items()) if member.shrinks]
        rows = [np.bincount(owner[i], minlength=len(sizes) + 1) / len(i) for i in ids]
        shares.append([*rows, stays, stays][:2])
        uses = coupled.uses.get(id(member.variable), 0)
        costs.append([size, None if uses is None else 2 * uses * size])
    if method.counted_in == "flops" and any(flops is None for _, flops in costs):
        raise ValueError(
            "The target is counted in FLOPs, but the FLOPs of some weights are unknown. "
            "print(keras_dst.report(model)) lists them. Set the target as a share of the "
            "parameters instead."
        )
    return np.array(shares), np.array([[size, flops or 0] for size, flops in costs], "float64")
