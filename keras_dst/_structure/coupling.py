"""Groups of channels that `shrink` removes from the same layers.

`channel_groups` returns the groups as plain data. Training masks a channel in all layers of its
group, and `shrink` then removes exactly the masked channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from keras_dst._reporting.flops import count_uses
from keras_dst._reporting.tables import as_table
from keras_dst._reporting.weights import weights_of
from keras_dst._structure.graph import check_graph
from keras_dst._structure.handlers import ElementwiseMerge, GroupedConv, Opaque
from keras_dst._structure.plan import Plan
from keras_dst._structure.unions import Member
from keras_dst._utils.html import html_table

_HEADINGS = ("channels >", "made by", "coupled by", "reason to stay")


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Group of channels that are computed by the same variables and read by the same variables.

    If several layers compute the channels, a removed channel is removed from all these layers. All
    channels of a group cost the same number of parameters and FLOPs.

    Attributes:
        ids: Ids of the channels, in ascending order. Each id stands for one channel, or for several
            channels that can only be removed together, such as a group of a grouped convolution.
        members: Variables that have channels of the group along at least one axis.
        layers: Names of the layers that compute the channels of the group.
        chain: Operations that couple the layers, such as `"conv3 → add_1 ← conv1"`, or an empty
            string if a single layer computes the channels.
        reason: Reason why the channels cannot be removed, or an empty string if they can be
            removed.
        width: Number of channels that share one id. The width of most groups is 1.
    """

    ids: np.ndarray
    members: list[Member]
    layers: list[str]
    chain: str
    reason: str
    width: int = 1

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class CoupledChannels:
    """All channels of a model, in groups. `shrink` removes the channels of a group from the same
    layers.

    Every channel has an integer id. `Member.axes` lists the ids along each axis of a variable. All
    slices of variables that have the same id are kept or removed together. The channels of the
    first group have the smallest ids, the channels of the second group have the next ids, and so
    on.

    To prune channels, create a boolean array `dead` with one entry per id, which is True for pruned
    channels. Then change every `member` in `members`:

    * If `member.output` is not None, let `ids` be `member.axes[member.output]`. Set
      `member.variable` to zero at all indices of the axis `member.output` at which `dead[ids]` is
      True.
    * If `member.follows` is True, `member.axes` has a single item `(axis, ids)`. Set
      `member.variable` to zero at all indices of `axis` at which `dead[ids]` is True.

    All dead channels are then exactly zero, and `shrink` can remove all dead channels. The saliency
    of a channel is the sum of the saliencies of all weight entries that have the channel's id along
    the output axis. Variables of the model that are not in `members` have no channels that can be
    removed.

    Attributes:
        members: All variables of the given model that have channels. Each variable appears once.
        groups: All groups, in this order: first the groups whose channels can be removed, then the
            groups whose channels cannot be removed.
        count: Number of ids.
        uses: Dict that maps the id of each prunable variable to its use count: how often each entry
            is multiplied for one sample. The use count of a variable is None if the number of
            multiplications is unknown.
        other_parameters: Number of parameters in the variables that `members` does not list.
        other_flops: FLOPs of the variables that `members` does not list, or None if the FLOPs are
            unknown.
    """

    members: list[Member]
    groups: list[ChannelGroup]
    count: int
    uses: dict[int, int | None]
    other_parameters: int
    other_flops: int | None

    def __str__(self) -> str:
        return as_table(_HEADINGS, self._rows())

    def _repr_html_(self) -> str:
        """Return the groups as an HTML table for notebooks."""
        return html_table([heading.removesuffix(" >") for heading in _HEADINGS], self._rows())

    def to_dict(self) -> list[dict[str, Any]]:
        """Return one dict per group, with values that can be written as JSON."""
        return [
            {"channels": len(g) * g.width, "layers": g.layers, "chain": g.chain, "reason": g.reason}
            for g in self.groups
        ]

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [
            (f"{len(g) * g.width:,}", ", ".join(g.layers), g.chain, g.reason) for g in self.groups
        ]


def channel_groups(model) -> CoupledChannels:
    """Return all channels of a model, in groups. `shrink` removes the channels of a group from the
    same layers.

    Channels are coupled by sums and products, by depthwise and grouped convolutions, by
    normalizations, and by layers that are called several times. Training with `pattern="channel"`
    prunes coupled channels together, and `shrink` removes them.

    Args:
        model: Built Sequential or Functional model, dense or sparse. The model may contain other
            Sequential and Functional models. It is not changed.

    Returns:
        A `CoupledChannels`, which displays as a table with one row per group. The columns are the
        number of channels, the layers that compute the channels, and the operations that couple the
        layers. The last column states why channels cannot be removed.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If the model is not built, or has its own `call` method and therefore no graph.

    Example:
        >>> print(keras_dst.channel_groups(model))
    """
    check_graph(model)
    plan = Plan(model, remove=False)
    members = members_of(plan)
    counts = {key: count for key, (count, _) in count_uses(model).items()}
    owned = {id(member.variable) for member in members}
    sizes = {id(w.variable): w.parameters for w in weights_of(model)}
    others = [key for key in sizes if key not in owned]
    unknown = any(counts.get(key, 0) is None for key in others)
    found = groups_of(plan, members)
    number = np.full(len(plan.pinned), -1)
    number[np.concatenate([group.ids for group in found])] = np.arange(sum(map(len, found)))
    members = [_renumbered(member, number) for member in members]
    groups = []
    for group in found:
        ids = number[group.ids]
        inside = [m for m in members if any(np.isin(a, ids).any() for a in m.axes.values())]
        groups.append(replace(group, ids=ids, members=inside))
    return CoupledChannels(
        members=members,
        groups=groups,
        count=sum(map(len, groups)),
        uses=counts,
        other_parameters=sum(sizes[key] for key in others),
        other_flops=None if unknown else sum(2 * sizes[k] * (counts.get(k) or 0) for k in others),
    )


def members_of(plan: Plan) -> list[Member]:
    """Return the variables of the given model that have channels, without duplicates."""
    found = {}
    for handler in plan.handlers:
        for member in handler.members():
            variable = plan.originals.get(id(member.variable), member.variable)
            axes = {axis: np.asarray(ids) for axis, ids in member.axes.items()}
            layer = plan.names[id(handler.op)]
            found[id(variable)] = replace(member, variable=variable, axes=axes, layer=layer)
    return list(found.values())


def _renumbered(member: Member, number: np.ndarray) -> Member:
    return replace(member, axes={axis: number[ids] for axis, ids in member.axes.items()})


def groups_of(plan: Plan, members: list[Member]) -> list[ChannelGroup]:
    """Return all groups of coupled channels in a pruning plan.

    The function does not fill the list `members` of the groups. The list begins with the groups
    whose channels can be removed.

    Args:
        plan: Pruning plan of a model. The attribute `ids` of each returned group holds channel ids
            of this plan.
        members: Variables that `members_of` returned.
    """
    touched: dict[int, list[tuple[int, int]]] = {}
    for place, member in enumerate(members):
        for axis, ids in member.axes.items():
            for channel in np.unique(ids).tolist():
                touched.setdefault(channel, []).append((place, axis))
    alike: dict[tuple, list[int]] = {}
    for channel in sorted(touched):
        key = (plan.pin_reasons.get(channel, ""), *touched[channel])
        alike.setdefault(key, []).append(channel)
    chains = _Chains(plan)
    groups = []
    for (reason, *places), channels in alike.items():
        ids = np.array(channels)
        axes = [members[place].axes[axis] for place, axis in places]
        layers = [members[p].layer for p, axis in places if axis == members[p].output]
        groups.append(
            ChannelGroup(
                ids=ids,
                members=[],
                layers=list(dict.fromkeys(layers)),
                chain=chains.text(channels[0]),
                reason=reason or ("" if layers else "no weight computes the channels"),
                width=min(int(np.isin(a, ids).sum()) // len(ids) for a in axes),
            )
        )
    groups.sort(key=lambda group: bool(group.reason))
    return groups


class _Chains:
    """Operations that couple the channels of several layers."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.links: list[tuple[np.ndarray, str]] = []
        source: dict[int, str] = {}
        called: dict[int, list[str]] = {}
        for handler in plan.handlers:
            name = plan.names[id(handler.op)]
            inputs = [source.get(id(x.origin or x), "input") for x in handler.call.inputs]
            distinct = list(dict.fromkeys(inputs))
            joins = isinstance(handler, GroupedConv) or (
                isinstance(handler, ElementwiseMerge) and len(distinct) > 1
            )
            makes = handler.makes_channels or isinstance(handler, Opaque)
            for y in handler.call.outputs:
                source[id(y)] = name if joins or makes or not inputs else inputs[0]
            if joins:
                first, *others = distinct
                text = " ← ".join((f"{first} → {name}", *others))
                self.links.append((handler.y.ids, text))
            elif makes and inputs and not isinstance(handler, Opaque):
                before = called.setdefault(id(handler.op), [])
                if before and inputs[0] not in before:
                    self.links.append((handler.x.ids, f"{before[0]} → {name} ← {inputs[0]}"))
                before.append(inputs[0])

    def text(self, channel: int) -> str:
        """Return a text that names the operations which couple a channel to other channels."""
        return ", ".join(dict.fromkeys(text for ids, text in self.links if channel in ids))
