"""Ranking of coupled channels, which must be removed from several weights at the same time.

Several weights can compute the same channel of a model, for example all convolutions whose outputs
are added. The model becomes smaller only if a channel is removed from all weights that compute it.
The functions in this module therefore rank whole channels instead of single output units:

```text
s_c = mean over the units u that compute channel c of score(u) / scale(layer of u)
cost(n) = sum over weights of base (share of inputs kept) (share of outputs kept)
```

A **group** is a set of channels that are computed by the same weights. The symbol `n` stands for
the number of kept channels in each group. All channels of a group have the same cost. Every group
keeps a multiple of `round_to` channels, because layers with, for example, 9 or 17 channels are slow
on most hardware.

`Layout.channels` states which channel each output unit of a weight computes. `Layout.channels` is
None if the output units of a weight are ranked separately, for example in a subclassed model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_dst import allocation as allocations
from keras_dst import masks
from keras_dst._backend import numbers
from keras_dst._utils.validation import is_integer
from keras_dst.masks import Layout, Pattern

Tensor = Any

COUNTED_IN = ("channels", "parameters", "flops")

# Groups of coupled channels that a user passes, see the argument `groups` of `Magnitude`.
ChannelNames = Sequence[Sequence[str | tuple[str, int]]]

# In a global ranking, the argument `kept` is the density as an integer: `round(density * _PARTS)`.
_PARTS = 2**20
_LOWEST = float(np.finfo("float32").min)


class ChannelGroups:
    """All groups of coupled channels in a model, and the parameters and FLOPs of each weight.

    Channels have consecutive numbers: the channels of the first group come first, then the channels
    of the second group, and so on. Two objects with equal arguments are equal and have the same
    hash, so compiled functions can be cached.

    Args:
        sizes: Number of channels in every group.
        shares: For each weight, the fractions of its inputs and outputs that belong to each group
            of channels. `shares` is an array of the shape (number of weights, 2, number of groups +
            1). `shares[w, 0, g]` is the fraction of the inputs of weight w that belong to group g.
            `shares[w, 1, g]` is the fraction of the outputs of weight w that belong to group g.
            `shares[w, :, -1]` holds the fractions of the inputs and outputs of weight w that are
            always kept.
        costs: Parameters and FLOPs of every weight, as an array of shape (number of weights, 2).
        widths: For each group of channels, the number of filters that are removed together with one
            channel. Only grouped convolutions have more than one filter per channel, because they
            lose filters in whole groups. Defaults to None, which means one filter per channel.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: np.ndarray,
        costs: np.ndarray,
        widths: Sequence[int] | None = None,
    ):
        self.sizes = np.array(sizes, "int32")
        self.widths = np.ones_like(self.sizes) if widths is None else np.array(widths, "int32")
        self.shares = np.array(shares, "float64")
        self.costs = np.array(costs, "float64")
        self.owner = np.repeat(np.arange(len(self.sizes), dtype="int32"), self.sizes)
        arrays = (self.sizes, self.shares, self.costs, self.widths)
        self._key = tuple(array.tobytes() for array in arrays)
        self._hash = hash(self._key)

    def __eq__(self, other):
        return isinstance(other, ChannelGroups) and self._key == other._key

    def __hash__(self):
        return self._hash

    def split(self, values: Tensor) -> list[Tensor]:
        """Split a vector with one entry per channel into one vector per group."""
        ends = np.cumsum(self.sizes).tolist()
        return [values[end - size : end] for size, end in zip(self.sizes.tolist(), ends)]

    def counts(self, kept: np.ndarray) -> np.ndarray:
        """Return the number of kept channels of every group.

        Args:
            kept: Boolean vector with one entry per channel.
        """
        return np.bincount(self.owner[kept], minlength=len(self.sizes)).astype("float64")

    def kept_share(self, kept: Tensor, counted_in: str) -> Tensor:
        """Return the fraction of the channels, parameters or FLOPs that remains after pruning.

        Args:
            kept: Number of kept channels in every group, as an array or a tensor of floats.
            counted_in: Quantity to count: `"channels"`, `"parameters"` or `"flops"`.
        """
        total: Any = np.sum
        array: Any = np.asarray
        if not isinstance(kept, np.ndarray):
            total, array = ops.sum, lambda x: numbers.constant(x, "float32", kept)
        if counted_in == "channels":
            return total(kept * array(self.widths)) / float((self.sizes * self.widths).sum())
        base = self.costs[:, COUNTED_IN.index(counted_in) - 1]
        used = base > 0
        shares = self.shares[used]
        left = kept / array(self.sizes.astype("float64"))
        inputs, outputs = (
            total(array(shares[:, side, :-1]) * left, axis=1) + array(shares[:, side, -1])
            for side in (0, 1)
        )
        return total(array(base[used] / base.sum()) * inputs * outputs)

    def rounding_step(self, method) -> float:
        """Return the largest change of the sparsity that rounding the channel count of one group
        can cause."""
        step, _ = _steps(self, method)
        whole = self.sizes.astype("float64")
        each = [
            1 - float(self.kept_share(np.maximum(whole - change, 0), method.counted_in))
            for change in np.diag(step)
        ]
        return max(0.001, *each)


class Channels:
    """The channel that each output unit of one weight computes. Equal objects have equal hashes.

    Args:
        ids: Index of the channel that each output unit computes, or -1 if the unit is always kept.
        groups: All groups of coupled channels in the model.
    """

    def __init__(self, ids: Sequence[int] | np.ndarray, groups: ChannelGroups):
        self.ids = np.array(ids, "int32")
        self.groups = groups
        self._key = (self.ids.tobytes(), groups)
        self._hash = hash(self._key)

    def __eq__(self, other):
        return isinstance(other, Channels) and self._key == other._key

    def __hash__(self):
        return self._hash


def checked_names(groups: ChannelNames | None) -> list[list] | None:
    """Return `groups` as a list of lists, or None if `groups` is None.

    Raises:
        ValueError: If `groups` is not a list of groups with at least one entry each.
    """

    def is_entry(entry):
        is_pair = isinstance(entry, (list, tuple)) and len(entry) == 2 and is_integer(entry[1])
        return isinstance(entry[0] if is_pair else entry, str)

    def is_list(value, is_valid):
        return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_valid, value))

    if groups is None:
        return None
    if not is_list(groups, lambda group: is_list(group, is_entry)):
        raise ValueError(
            "groups must be a list of lists of names, such as [['stem', 'project'], ['expand']]. "
            "Instead of a name, an inner list can hold a name with an axis: ('depthwise', -2). "
            f"Received: groups={groups!r}"
        )
    # A config in JSON cannot distinguish tuples from lists.
    return [[e if isinstance(e, str) else [e[0], int(e[1])] for e in group] for group in groups]


def groups_of(layouts: Sequence[Layout]) -> ChannelGroups | None:
    """Return the groups of coupled channels in a model, or None if `layouts` name no channels."""
    return next((layout.channels.groups for layout in layouts if layout.channels), None)


# -- numbers of kept channels --------------------------------------------------------------------


def kept_counts(method, shapes, layouts, sparsity: float, names: Sequence[str]) -> np.ndarray:
    """Return the number of channels to keep in each group.

    With `allocation="global"`, the function returns the density of the whole model instead, as an
    array with the single integer `round(density * 2**20)`.

    If the allocation is a dict that names a weight of a group, the group gets the sparsity that the
    dict states. The densities of all other groups are chosen so that the removed fraction of
    channels, parameters or FLOPs is as close as possible to `sparsity`.

    Args:
        method: Pruning method that defines `allocation`, `counted_in`, `round_to` and
            `least_units`.
        shapes: Shapes of all weights that the method prunes.
        layouts: One `masks.Layout` per weight, with the axes of the weight and the channels of its
            output units.
        names: Variable paths of the weights, needed only if the allocation is a dict.
        sparsity: Sparsity at the current step.
    """
    target = 1 - sparsity
    if method.allocation == "global":
        return np.array([round(target * _PARTS)])
    groups = _required(layouts)
    sizes, step, least = groups.sizes, *_steps(groups, method)
    own = _own_densities(method, layouts, sparsity, names, groups)

    def exact(density):
        """Return the number of channels to keep per group, without rounding."""
        if method.allocation == "erk":
            each = _mean_of_members(allocations.densities("erk", shapes, density), layouts, groups)
        else:
            each = np.full(len(sizes), density)
        return np.where(np.isnan(own), each, own) * sizes

    def rounded(density):
        counts = np.floor(exact(density) / step + 0.5) * step
        return np.clip(counts, least, sizes)

    def share(counts):
        return float(groups.kept_share(counts, method.counted_in))

    # Find the density by bisection. At the density `low`, the model keeps at most the target
    # fraction of its channels, parameters or FLOPs. At the density `high`, the model keeps more
    # than the target fraction.
    low, high = 0.0, 1.0
    if share(rounded(target)) <= target:
        low = target
    else:
        high = target
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share(rounded(middle)) <= target else (low, middle)
    counts, more = rounded(low), rounded(high)
    # Round the channel counts by the largest-remainder method, beginning with the group that has
    # the largest remainder. For each group, take the channel count at the density `high` if this
    # brings the kept fraction of the model closer to the target.
    remainder = exact(high) / step - np.floor(exact(high) / step)
    for group in np.argsort(-remainder, kind="stable"):
        trial = counts.copy()
        trial[group] = more[group]
        if abs(share(trial) - target) < abs(share(counts) - target):
            counts = trial
    return counts.astype("int64")


def _steps(groups: ChannelGroups, method) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounding step and the minimum number of channels, as arrays with one entry per
    group."""
    step = method.round_to // np.gcd(method.round_to, groups.widths)
    step = np.where(groups.sizes >= 2 * step, step, 1)
    least = [method.least_units(int(size)) for size in groups.sizes]
    return step, np.minimum(np.maximum(step, least), groups.sizes)


def _own_densities(method, layouts, sparsity, names, groups) -> np.ndarray:
    """Return the density of every group that the allocation names, and NaN for all other groups.

    If an allocation names several weights of a group, the group gets the highest of their
    densities.
    """
    own = np.full(len(groups.sizes), np.nan)
    if not isinstance(method.allocation, Mapping):
        return own
    final = method.schedule.sparsity if method.schedule else 0.0
    scale = sparsity / final if final else 1.0
    scaled = {name: value * scale for name, value in method.allocation.items()}
    named = allocations.by_name(scaled, np.nan, names)
    for density, members in zip(named, _groups_by_weight(layouts, groups)):
        own[members] = np.fmax(own[members], density)
    return own


def _mean_of_members(values, layouts, groups) -> np.ndarray:
    """Return, for each group of channels, the mean of `values` over the weights of the group."""
    total, count = np.zeros(len(groups.sizes)), np.zeros(len(groups.sizes))
    for value, members in zip(values, _groups_by_weight(layouts, groups)):
        total[members] += value
        count[members] += 1
    return np.where(count > 0, total / np.maximum(count, 1), 1.0)


def _groups_by_weight(layouts, groups) -> list[np.ndarray]:
    """Return, for each weight, the indices of the groups whose channels the weight computes."""
    ids = [layout.channels.ids if layout.channels else np.zeros(0, int) for layout in layouts]
    return [np.unique(groups.owner[i[i >= 0]]) for i in ids]


# -- the ranking ---------------------------------------------------------------------------------


def rank(method, scores: Sequence[Tensor], layouts: Sequence[Layout], kept: Tensor):
    """Return boolean masks that keep the channels with the highest scores.

    Args:
        method: Pruning method that defines `allocation`, `counted_in`, `round_to` and
            `least_units`.
        scores: One saliency tensor per weight, with the shape of the weight.
        layouts: One `masks.Layout` per weight, with the axes of the weight and the channels of its
            output units.
        kept: The array that the function `kept_counts` returned, as a tensor.
    """
    groups, pattern = _required(layouts), Pattern("channel")
    is_best = best(method, groups, channel_scores(scores, layouts), kept)
    alive = ops.concatenate([is_best, ops.ones((1,), "bool")])
    found = []
    for score, layout in zip(scores, layouts):
        shape = tuple(score.shape)
        if not layout.channels:
            found.append(ops.ones(shape, "bool"))
            continue
        units = pattern.groups(shape, layout)
        on = _of_units(alive, layout.channels.ids)
        found.append(pattern.expand(ops.reshape(on, units), shape, layout))
    return found


def best(method, groups: ChannelGroups, saliency: Tensor, kept: Tensor) -> Tensor:
    """Return a boolean vector that states for every channel whether the channel is kept.

    Args:
        method: Pruning method that defines `allocation`, `counted_in`, `round_to` and
            `least_units`.
        groups: Groups of coupled channels in the model.
        saliency: Saliency of each channel, as a vector of floats.
        kept: The array that the function `kept_counts` returned, as a tensor.
    """
    if method.allocation == "global":
        kept = _global_counts(method, groups, saliency, kept[0])
    return ops.concatenate(masks.top_k(groups.split(saliency), kept))


def channel_scores(scores: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
    """Return the saliency of every channel: the mean normalized score of its output units.

    Scores are normalized, because the scale of weights differs between layers. The scores of each
    weight tensor are divided by their mean. In this mean, negative scores count as 0, because they
    mark weights that are already pruned.

    Args:
        scores: One saliency tensor per weight, with the shape of the weight.
        layouts: One `masks.Layout` per weight, with the axes of the weight and the channels of its
            output units.

    Returns:
        A float32 vector with one entry per channel.
    """
    pattern, units = Pattern("channel"), []
    for score, layout in zip(scores, layouts):
        if not layout.channels:
            continue
        pooled = ops.reshape(pattern.scores(ops.cast(score, "float32"), layout), (-1,))
        scale = ops.mean(numbers.at_least(pooled, 0.0))
        scale = ops.where(scale > 0, scale, ops.mean(ops.abs(pooled)))
        units.append(pooled / numbers.where(scale > 0, scale, 1.0))
    # `every` holds the scores of all output units, followed by a 0. Row c of `places` lists the
    # units that compute channel c, as positions in `every`. Short rows of `places` are padded with
    # the position of the final 0 in `every`.
    places, counts = _units_of_channels(tuple(layouts))
    every = ops.concatenate([*units, ops.zeros((1,), "float32")])
    sums = ops.sum(ops.take(every, numbers.constant(places, "int32", every)), axis=1)
    return sums / numbers.constant(counts, "float32", every)


def per_unit(
    function: Callable[[Tensor, Tensor], Tensor],
    scores: Sequence[Tensor],
    found: Sequence[Tensor],
    layouts: Sequence[Layout],
) -> list[Tensor]:
    """Apply `function` per group of channels or per weight, and return one value per output unit.

    For coupled channels, `function` is called once per group, with the saliency of each channel.
    Without coupled channels, `function` is called once per weight tensor, with the mean score of
    each output unit.

    Args:
        function: Function whose arguments are the saliencies and a boolean vector that is true for
            kept channels. The function returns a float32 vector with one entry per channel.
        scores: One saliency tensor per weight, with the shape of the weight.
        found: Boolean masks that a ranking returned, one mask per weight.
        layouts: One `masks.Layout` per weight, with the axes of the weight and the channels of its
            output units.

    Returns:
        A list of vectors, one per weight. Each vector has one value per output unit. Units that are
        always kept have the value 1.
    """
    groups, units = groups_of(layouts), Pattern("channel")
    if groups is None:
        return [
            function(
                ops.reshape(units.scores(ops.cast(score, "float32"), layout), (-1,)),
                ops.reshape(kept_units(mask, layout), (-1,)),
            )
            for score, mask, layout in zip(scores, found, layouts)
        ]
    saliency, kept = channel_scores(scores, layouts), alive(found, layouts)
    parts = zip(groups.split(saliency), groups.split(kept))
    values = ops.concatenate([*(function(*part) for part in parts), ops.ones((1,), "float32")])
    return [
        _of_units(values, layout.channels.ids if layout.channels else np.full(1, -1))
        for layout in layouts
    ]


def alive(found: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
    """Return a boolean vector that is True for kept channels and has one additional True at its
    end.

    Output units that are always kept have the channel index -1, which selects the additional True.
    All weights that compute a channel have the same mask for the channel, so only the first weight
    is read.

    Args:
        found: Boolean masks that a ranking returned, one mask per weight.
        layouts: One `masks.Layout` per weight, with the axes of the weight and the channels of its
            output units.
    """
    first = _units_of_channels(tuple(layouts))[0][:, 0]
    units, start, places = [], 0, np.zeros(len(first), "int32")
    offset = 0
    for mask, layout in zip(found, layouts):
        if not layout.channels:
            continue
        end = start + len(layout.channels.ids)
        here = (first >= start) & (first < end)
        if here.any():
            units.append(ops.reshape(kept_units(mask, layout), (-1,)))
            places[here] = first[here] - start + offset
            offset += end - start
        start = end
    # A channel is kept if no weight with a mask computes the channel.
    places[first >= start] = offset
    every = ops.concatenate([*units, ops.ones((1,), "bool")])
    return ops.take(every, numbers.constant(np.append(places, offset), "int32", every))


def kept_units(mask: Tensor, layout: Layout) -> Tensor:
    """Return a boolean for each output unit: whether the mask keeps at least one of its weights.

    Args:
        mask: Boolean mask in the shape of the weight.
        layout: Axes of the weight.
    """
    rank = len(mask.shape)
    others = {*range(rank)} - {axis % rank for axis in layout.outputs}
    return ops.any(mask, tuple(sorted(others)))


class Scales(NamedTuple):
    """Scales of the normalization layers that follow the weights, one scale per output unit.

    Attributes:
        variables: Indices of the optimizer's trained variables that store normalization scales.
        places: One integer array per weight: the position of each output unit's scale in the
            concatenation of all `variables`. The shape of the array broadcasts to the shape of the
            weight. For a weight without scales, the array is None.
    """

    variables: list[int]
    places: list[np.ndarray | None]

    def read(self, variables: Sequence) -> list[Tensor | None]:
        """Return the normalization scales for each weight, or None for a weight without scales.

        Args:
            variables: Variables that hold normalization scales, such as `gamma`.
        """
        if not variables:
            return [None] * len(self.places)
        every = ops.concatenate([ops.convert_to_tensor(v) for v in variables])
        return [
            None if places is None else ops.take(every, numbers.constant(places, "int32", every))
            for places in self.places
        ]


def scales_of(
    shapes: Sequence[Sequence[int]],
    layouts: Sequence[Layout],
    gammas: Sequence[tuple[int, np.ndarray]],
) -> Scales:
    """Find the normalization scale of every output unit.

    Args:
        shapes: Shapes of all weights.
        layouts: One `masks.Layout` per weight, with the axes of the weight and the channels of its
            output units.
        gammas: One pair `(index, channels)` for each variable that stores normalization scales,
            such as `gamma`. `index` is the index of the variable, and `channels` is an array with
            the channel that each entry of the variable scales. If several variables scale the same
            channel, the function uses the first variable.
    """
    if not gammas:
        return Scales([], [])
    position: dict[int, int] = {-1: 0}  # Units that are always kept need no scale.
    for place, channel in enumerate(np.concatenate([ids for _, ids in gammas]).tolist()):
        position.setdefault(channel, place)
    places: list[np.ndarray | None] = []
    for shape, layout in zip(shapes, layouts):
        ids = layout.channels.ids.tolist() if layout.channels else []
        if not ids or any(channel not in position for channel in ids):
            places.append(None)
            continue
        found = np.array([position[channel] for channel in ids], "int32")
        places.append(found.reshape(Pattern("channel").groups(shape, layout)))
    return Scales([index for index, _ in gammas], places)


def largest_of_units(values: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
    """Return one value per channel: the largest of the values of its output units.

    A channel can be removed only if the gates of all its units are closed. The gate of a channel is
    therefore the maximum of the gates of its units.

    Args:
        values: One float32 tensor per weight, of any shape, with one value per output unit.
        layouts: One `masks.Layout` per weight, with the axes of the weight and the channels of its
            output units.
    """
    units = [ops.reshape(v, (-1,)) for v, layout in zip(values, layouts) if layout.channels]
    every = ops.pad(ops.concatenate(units), [(0, 1)], constant_values=_LOWEST)
    places, _ = _units_of_channels(tuple(layouts))
    return ops.max(ops.take(every, numbers.constant(places, "int32", every)), axis=1)


def of_kept_channels(margins: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    """Return 1 for every output unit of a kept channel, and 0 for all other output units.

    A channel is kept if at least one of its units has a positive margin. Output units without a
    coupled channel are always kept.

    Args:
        margins: One float32 tensor per weight, with the margin of every output unit: its score
            minus its threshold.
        layouts: One `masks.Layout` per weight, with the axes of the weight and the channels of its
            output units.

    Returns:
        One float32 tensor per weight, with the same shape as the weight's tensor in `margins`.
    """
    kept = ops.cast(largest_of_units(margins, layouts) > 0, "float32")
    return _in_shapes(ops.concatenate([kept, ops.ones((1,), "float32")]), margins, layouts)


def shifts(
    method, margins: Sequence[Tensor], layouts: Sequence[Layout], kept: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return by how much the threshold of every output unit must rise to meet the target sparsity.

    A unit is kept if its margin is positive, and a channel is kept if one of its units is kept. The
    margin of a channel is therefore the maximum of the margins of its units. All thresholds in a
    group of coupled channels rise by the same amount.

    Args:
        method: Pruning method that defines `allocation`, `counted_in`, `round_to` and
            `least_units`.
        margins: One float32 tensor per weight, with the margin of every output unit: its score
            minus its threshold.
        layouts: One `masks.Layout` per weight, with the axes of the weight and the channels of its
            output units.
        kept: Result of `kept_counts` for a global ranking, as a tensor.

    Returns:
        A tuple `(common, rises, limits)`. If all thresholds rose by `common`, the model would keep
        as many channels as the target requires. `rises` holds the amount by which each threshold
        rises. `limits` holds the largest amount by which each threshold can rise while its group
        keeps the minimum number of channels. For units that are always kept, `rises` and `limits`
        are 0.
    """
    groups = _required(layouts)
    largest = largest_of_units(margins, layouts)
    small = 1e-3 * ops.mean(ops.abs(largest))
    is_best = best(method, groups, largest, kept)
    minimum = numbers.constant(_steps(groups, method)[1], "int32", largest)
    parts = groups.split(largest)
    limits = list(ops.unstack(masks.kth(parts, minimum), len(parts)))
    rises = []
    for group, (values, stays) in enumerate(zip(parts, groups.split(is_best))):
        below = ops.max(numbers.where(stays, _LOWEST, values))
        above = ops.min(numbers.where(stays, values, -_LOWEST))
        # The rise is halfway between the largest margin of a pruned channel and the smallest margin
        # of a kept channel. Rounding errors can therefore not change which channels are kept.
        between = ops.where(below > _LOWEST, (below + above) / 2, above - small)
        fits = ops.logical_and(below <= 0, above > 0)
        rises.append(numbers.where(fits, 0.0, between))
        limits[group] = ops.maximum(limits[group], ops.min(values) - small)
    owner = numbers.constant(np.append(groups.owner, len(groups.sizes)), "int32", largest)
    found = []
    for each in (rises, limits):
        of_channels = ops.take(ops.stack([*each, ops.zeros(())]), owner)
        found.append(_in_shapes(of_channels, margins, layouts))
    count = ops.sum(ops.cast(is_best, "int32"))
    return masks.kth([largest], count), found[0], found[1]


def _in_shapes(values: Tensor, like: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    """Return, for every output unit, the value of its channel, in tensors shaped like `like`.

    Args:
        values: Vector with one entry per channel, and a last entry for all units that are
            always kept.
        like: Tensors with the shapes of the result: one tensor per weight, with one entry per
            output unit.
        layouts: One `masks.Layout` per weight, with the axes of the weight and the channels of its
            output units.
    """
    found = []
    for tensor, layout in zip(like, layouts):
        ids = layout.channels.ids if layout.channels else np.full(math.prod(tensor.shape), -1)
        found.append(_of_units(values, np.reshape(ids, tensor.shape)))
    return found


def _of_units(values: Tensor, ids: np.ndarray) -> Tensor:
    """Return one value per output unit: the value of the channel that the unit computes.

    Args:
        values: Vector with one entry per channel, and a last entry for all units that are
            always kept.
        ids: Index of the channel that each unit computes, or -1 if the unit is always kept.
    """
    places = np.where(ids < 0, values.shape[0] - 1, ids)
    return ops.take(values, numbers.constant(places, "int32", values))


def masks_of_followers(
    followers: Iterable[tuple[Any, int, np.ndarray]], alive: Tensor
) -> Iterator[tuple[Any, Tensor]]:
    """Yield each variable that is pruned with its channels, such as a bias, and the variable's
    mask.

    Args:
        followers: One tuple `(variable, axis, ids)` per variable that is pruned with its channels.
            `axis` is the channel axis of the variable. For each entry along `axis`, `ids` holds the
            index of its channel, or -1 if the entry is always kept.
        alive: Result of the function `alive`: a boolean vector that is True for kept channels.
    """
    for variable, axis, ids in followers:
        rank = len(variable.shape)
        on = _of_units(alive, ids)
        yield variable, ops.reshape(on, [-1 if a == axis % rank else 1 for a in range(rank)])


def _global_counts(method, groups: ChannelGroups, saliency: Tensor, kept: Tensor) -> Tensor:
    """Rank the channels of all groups together, and return the number of kept channels per group.

    The number of channels with a saliency above a threshold is rounded in every group. Bisection
    finds the common threshold at which the model meets the target.
    """
    arrays = (*_steps(groups, method), groups.sizes, groups.owner, np.arange(len(groups.sizes)))
    step, least, sizes, owner, group = (numbers.constant(x, "int32", saliency) for x in arrays)
    target = ops.cast(kept, "float32") / _PARTS
    total = len(groups.owner)
    # `place` is the rank of every channel: 0 for the highest saliency. Channels with the same
    # saliency keep their order.
    place = ops.cast(ops.argsort(ops.argsort(-saliency)), "int32")
    belongs = ops.equal(owner[None], group[:, None])

    def counts(first):
        above = ops.logical_and(belongs, (place < first)[None])
        count = ops.sum(ops.cast(above, "int32"), axis=1)
        return ops.minimum(ops.maximum((count + step // 2) // step * step, least), sizes)

    def share(first):
        return groups.kept_share(ops.cast(counts(first), "float32"), method.counted_in)

    def narrow(_, ends):
        low, high = ends
        middle = (low + high) // 2
        fits = share(middle) <= target
        return ops.where(fits, middle, low), ops.where(fits, high, middle)

    ends = (ops.zeros((), "int32"), ops.zeros((), "int32") + total)
    low, high = ops.fori_loop(0, math.ceil(math.log2(max(total, 2))) + 1, narrow, ends)
    nearer = ops.abs(share(high) - target) < ops.abs(share(low) - target)
    return counts(ops.where(nearer, high, low))


@functools.lru_cache(maxsize=16)
def _units_of_channels(layouts: tuple[Layout, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices and the number of the output units that compute each channel.

    The output units of all weights with coupled channels have consecutive indices. The returned
    matrix has one row of unit indices per channel. Short rows are padded with the total number of
    units, which is not the index of any unit.
    """
    every = np.concatenate([layout.channels.ids for layout in layouts if layout.channels])
    total = len(_required(layouts).owner)
    counts = np.bincount(every[every >= 0], minlength=total)
    order = np.argsort(every, kind="stable")[np.count_nonzero(every < 0) :]
    places = np.full((total, counts.max(initial=1)), len(every), "int32")
    column = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    places[every[order], column] = order
    return places, np.maximum(counts, 1)


def _required(layouts) -> ChannelGroups:
    groups = groups_of(layouts)
    if groups is None:
        raise ValueError("Expected layouts with channels. Received layouts without channels.")
    return groups
