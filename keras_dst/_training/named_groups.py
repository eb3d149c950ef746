"""Coupled channels that the user declares with `groups`, for layers outside Functional graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from keras_dst import _keras
from keras_dst._structure.coupling import ChannelGroup, CoupledChannels
from keras_dst._structure.unions import Member
from keras_dst._utils.filters import is_kernel, select
from keras_dst.layers.base import SparseMixin
from keras_dst.masks import Layout
from keras_dst.methods.base import Method

# Names of variables whose entries are set to zero when channels of their layer are pruned.
_FOLLOWERS = ("bias", "beta", "gamma", "scale", "moving_mean")

# Recurrent cells whose weights hold one column per gate and unit: all units of the first gate, then
# all units of the second gate, and so on.
_CELLS = (
    keras.layers.SimpleRNNCell,
    keras.layers.LSTMCell,
    keras.layers.GRUCell,
    _keras.ConvLSTMCell,
)


def with_named_groups(
    coupled: CoupledChannels, model, method: Method, layouts: dict[int, Layout]
) -> CoupledChannels:
    """Add the groups of coupled channels in `method.groups` to a copy of `coupled`.

    Args:
        coupled: Coupled channels that were found in the graph of the model.
        model: Model that holds the layers.
        method: Pruning method, whose argument `groups` names the layers with coupled channels.
        layouts: Dict from the id of every pruned weight to its `Layout` (output and input axes).

    Raises:
        ValueError: If a name matches no layer or weight, if a weight occurs twice, or if the
            weights of a group have different numbers of channels. A ValueError is also raised if
            `coupled` already lists a weight of a group.
    """
    known = {id(member.variable) for member in coupled.members}
    groups, members, count = list(coupled.groups), list(coupled.members), coupled.count
    for names in method.groups or ():
        found: list[Member] = []
        for entry in names:
            found += _members(entry, model, method, layouts)
        for member in found:
            if id(member.variable) in known:
                raise ValueError(
                    "groups: expected every weight once, and only weights whose channels are not "
                    f"known from the graph of the model. Received: {member.variable.path}. "
                    "Remove the weight or its layer from groups."
                )
            known.add(id(member.variable))
        widths = {m.variable.path: int(i.max()) + 1 for m in found for i in m.axes.values()}
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"groups: expected the same number of channels in all weights of {list(names)}. "
                f"Received: {widths}. If a weight has several axes of channels, pass a pair of its "
                "path and the axis."
            )
        if not any(member.output for member in found):
            raise ValueError(
                f"groups: expected that {method!r} prunes at least one weight of {list(names)}. "
                f"Received only: {', '.join(widths)}. Add the layer that computes the channels."
            )
        ids = np.arange(count, count + next(iter(widths.values())))
        count += len(ids)
        found = [replace(m, axes={axis: ids[i] for axis, i in m.axes.items()}) for m in found]
        layers = list(dict.fromkeys(member.layer for member in found if member.output))
        members += found
        groups.append(ChannelGroup(ids, found, layers, chain="", reason=""))
    return replace(coupled, members=members, groups=groups, count=count)


def _members(
    entry: str | tuple[str, int], model, method: Method, layouts: dict[int, Layout]
) -> Iterator[Member]:
    """Yield the variables that an entry of `groups` selects. Their channel ids begin at 0."""
    name: str = entry if isinstance(entry, str) else entry[0]
    axis: int | None = None if isinstance(entry, str) else entry[1]
    owned = {
        id(variable): (variable, layer)
        for layer in _keras.flatten_layers(model)
        for variable in _own_variables(layer)
    }
    names_of = _names_of_layers(model, {id(layer) for _, layer in owned.values()})
    names = [(variable.path, *names_of[id(layer)]) for variable, layer in owned.values()]
    chosen = select(list(owned), name, names, "groups")
    for (variable, layer), selected in zip(owned.values(), chosen):
        if not selected:
            continue
        rank = len(variable.shape)
        if id(variable) in layouts:
            own = _output_axis(variable, layouts[id(variable)], axis)
            axes = {own: _channels_along(variable, own, layer)}
            yield Member(variable, axes, output=own, layer=layer.name)
        elif variable.name in _FOLLOWERS:
            own = axis if axis is not None and -rank <= axis < 0 else -1
            axes = {own: _channels_along(variable, own, layer)}
            yield Member(variable, axes, follows=True, layer=layer.name)
        elif is_kernel(variable):
            raise ValueError(
                f"groups: {method!r} does not prune {variable.path}. Select the layer with the "
                "filters of sparsify, or remove the layer from groups."
            )


def _names_of_layers(model, owners: set[int]) -> dict[int, list[str]]:
    """Return the names and paths that select each layer, as a dict whose keys are layer ids.

    If an outer layer contains only one layer with variables, the name and the path of the outer
    layer also select this layer. Examples of such outer layers are `LSTM` and `TimeDistributed`.

    Args:
        model: Model that holds the layers.
        owners: Ids of the layers that have variables.
    """
    names: dict[int, list[str]] = {owner: [] for owner in owners}
    for layer in _keras.flatten_layers(model):
        inside = owners & set(map(id, _keras.flatten_layers(layer)))
        for owner in inside if len(inside) == 1 else inside & {id(layer)}:
            names[owner] += filter(None, (layer.path, layer.name))
    return names


def _channels_along(variable, axis: int, layer) -> np.ndarray:
    """Return the channel of each entry along an axis of a variable. All gates of a unit in a
    recurrent cell are one channel."""
    size = variable.shape[axis]
    if not isinstance(layer, _CELLS) or axis != -1:
        return np.arange(size)
    units = layer.filters if isinstance(layer, _keras.ConvLSTMCell) else layer.units
    return np.tile(np.arange(units), size // units)


def _own_variables(layer) -> Iterator[Any]:
    """Yield the variables of a layer, but not of its inner layers or its pruning method."""
    states = layer.state_variables() if isinstance(layer, SparseMixin) else {}
    method_owns = {id(variable) for variable in states.values()}
    for variables in (_keras.trainable_variables_of, _keras.non_trainable_variables_of):
        yield from (v for v in variables(layer) if id(v) not in method_owns)


def _output_axis(variable, layout: Layout, axis: int | None) -> int:
    """Return the axis of a weight's channels as a negative number."""
    rank = len(variable.shape)
    outputs = [a for a in layout.outputs if variable.shape[a] > 1] or list(layout.outputs)
    if axis is not None and -rank <= axis < rank and axis % rank - rank in layout.outputs:
        return axis % rank - rank
    if axis is not None or len(outputs) != 1:
        raise ValueError(
            f"groups: expected one axis of output channels of {variable.path}, which has the shape "
            f"{tuple(variable.shape)}. Received: axis={axis}. Pass a pair (path, axis) with one of "
            f"the axes {layout.outputs}."
        )
    return outputs[0]
