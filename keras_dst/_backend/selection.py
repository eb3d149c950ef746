"""Select the highest scores on PyTorch, so that the host need not wait for the accelerator.

A sample of the scores gives a lower and an upper bound for each threshold. The threshold almost
certainly lies between the two bounds. The few scores between the lower and the upper bound are
copied and sorted. The vector of copies has a fixed length, so the host need not wait for the number
of copied scores. The selection assumes that each threshold lies between its bounds, and the host
checks this later (see `guesses.py`). A threshold can lie outside of its bounds, for example if a
million scores are equal. `ranking.py` then searches for the threshold.

On a CPU, this module sorts the scores of small models, which is faster than a search.
"""

import math

import numpy as np
from keras import ops

from keras_dst._backend import devices, guesses, numbers
from keras_dst._backend.jit import (
    add_true,
    count_true,
    gather,
    remove_true,
    set_true,
    true_positions,
)
from keras_dst._backend.rows import LARGEST, ROW_WIDTH, SMALLEST, Scores

_SORTED = 1 << 20  # Largest number of scores for which all scores are sorted.
_SORTED_ON_CPU = 1 << 16  # Largest number of scores that are sorted on a CPU.
_STRIDE = 61  # Every 61st score is in the sample. 61 is a prime, so all columns are sampled alike.
_DEVIATIONS = 5  # Number of standard deviations between each bound and the expected threshold.
# If all tensors are ranked together, most scores between the bounds may belong to a few tensors.
# Each bundle therefore has a longer vector of copies than an even distribution of the scores needs.
# The vector of copies is longer by a factor of at most `_CONCENTRATION`.
_CONCENTRATION = 16


def is_possible(scores, sizes=None) -> bool:
    """Return whether the highest scores can be selected without a search.

    Args:
        scores: Float tensors.
        sizes: Number of weights that each score stands for, or None (see `ranking.top_k`).
    """
    if not guesses.are_allowed() or not (sizes is None or all(np.all(n == 1) for n in sizes)):
        return False
    count = sum(math.prod(s.shape) for s in scores)
    return devices.on_accelerator(scores[0]) or count <= _SORTED_ON_CPU


def top_k(scores: Scores, kept, first=None):
    """Return a list of masks that keep the highest scores. Small tensors are joined into bundles,
    and each bundle has one mask (see `rows.py`).

    Args:
        scores: Scores of all tensors.
        kept: Int32 vector with the number of scores to keep for each ranking.
        first: For each tensor, the number of entries to keep even if other tensors have higher
            scores (see `ranking.top_k`). Defaults to None, which means 0 for every tensor.
    """
    if first is not None and max(first) > 1:
        # Give the entries that are always kept a score above all other scores.
        each = Scores(scores.split(scores.scores), together=False)
        best = top_k(each, ops.convert_to_tensor(first, "int32"))
        scores.scores = [
            ops.where(ops.logical_and(is_best, s > -np.inf), LARGEST, s)  # without the padding
            for is_best, s in zip(best, scores.scores)
        ]
        first = None
    peaks = _peaks(scores)
    everything = kept >= scores.lengths
    low, high = _bounds(scores, kept)
    high = numbers.where(everything, -math.inf, high)
    found = [s >= scores.to_rows(b, high) for b, s in zip(scores.bundles, scores.scores)]
    if first is not None:
        for mask, (rows, columns) in zip(found, scores.best_entries(peaks)):
            set_true(mask, rows * ROW_WIDTH + columns)
    above = scores.reduce_by_ranking([count_true(mask) for mask in found], ops.sum, 0)
    room = numbers.where(everything, 0, kept - above)
    between = _Between(scores, low, found)
    right = (room >= 0) & (room <= between.counts)
    guesses.add(ops.all(everything | (right & _is_finite(scores, low, above, between))))
    between.add_to(found, between.ranks < between.of_ranking(room))
    return found


def kth(scores: Scores, kept):
    """Return the (`kept` + 1)-th highest score of every ranking.

    If a ranking keeps all its scores, return a number below all scores of the ranking.
    """
    _peaks(scores)
    low, high = _bounds(scores, kept)
    found = [s >= scores.to_rows(b, high) for b, s in zip(scores.bundles, scores.scores)]
    above = scores.reduce_by_ranking([count_true(mask) for mask in found], ops.sum, 0)
    room, everything = kept - above, kept >= scores.lengths
    between = _Between(scores, low, found)
    right = (room >= 0) & (room < between.counts)
    guesses.add(ops.all(everything | (right & _is_finite(scores, low, above, between))))
    place = numbers.clip(between.first + room, 0, between.values.shape[0] - 1)
    found = ops.take(between.values, place)
    smallest = [ops.min(numbers.where(s > -math.inf, s, math.inf), axis=1) for s in scores.scores]
    smallest = scores.reduce_by_ranking(smallest, ops.min, math.inf)
    below = smallest - numbers.at_least(ops.abs(smallest), 1.0)
    return ops.where(everything, below, found)


def _peaks(scores: Scores):
    """Return the largest score in every row of the matrices. Assume that no score is NaN or above
    `LARGEST`, and record this condition for a later check (see `guesses.py`)."""
    peaks = [ops.max(s, axis=1) for s in scores.scores]
    guesses.add(ops.all(ops.stack([ops.all(peak <= LARGEST) for peak in peaks])))
    return peaks


def _is_finite(scores: Scores, low, above, between):
    """Return one boolean per ranking: True if the lower bound or all scores of the ranking are
    finite.

    The copies contain only scores above the lower bound. If the lower bound is minus infinity, the
    copies therefore lack the scores of minus infinity, although these scores are tied with the
    smallest finite score.
    """
    return (low >= -LARGEST) | ops.equal(above + between.counts, scores.lengths)


def _bounds(scores: Scores, kept):
    """Return a lower and an upper bound for the threshold of each ranking. With high probability,
    the threshold lies between the two bounds."""
    if scores.count <= _SORTED:
        # Add the bounds to zeros, because `ops.full` would make the host wait for the GPU.
        return [ops.zeros(kept.shape, "float32") + end for end in (-np.inf, np.inf)]
    sample = ops.concatenate([ops.reshape(s, (-1,))[::_STRIDE] for s in scores.scores])
    sample = -ops.sort(-sample) if scores.together else sample
    if scores.together:
        first, sizes = 0, np.array([sample.shape[0]])
    else:
        tensor = ops.concatenate(
            [
                gather(b.tensor, ops.arange(0, s.shape[0] * ROW_WIDTH, _STRIDE) // ROW_WIDTH)
                for b, s in zip(scores.bundles, scores.scores)
            ]
        )
        sample = gather(sample, _by_tensor(ops.argsort(-sample), tensor))
        starts = [np.append(b.first_rows, b.tensor.shape[0]) * ROW_WIDTH for b in scores.bundles]
        sizes = np.concatenate([np.diff(-(-start // _STRIDE)) for start in starts])
        first = ops.convert_to_tensor(np.cumsum(sizes) - sizes, "int32")
    sizes = ops.convert_to_tensor(sizes, "int32")
    size = ops.cast(scores.lengths, "float32") / _STRIDE
    part = numbers.clip(ops.cast(kept, "float32") / ops.cast(scores.lengths, "float32"), 0, 1)
    spread = _DEVIATIONS * (ops.sqrt(size * part * (1 - part)) + 1)
    upper, lower = ops.floor(size * part - spread), ops.ceil(size * part + spread)

    def at(place):
        place = ops.cast(numbers.at_least(place, 0), "int32")
        place = first + ops.minimum(place, numbers.at_least(sizes - 1, 0))
        return ops.take(sample, numbers.at_most(place, sample.shape[0] - 1))

    # All scores in the open interval from -SMALLEST to SMALLEST are tied, so no bound may lie
    # inside this interval.
    low = numbers.where(lower < ops.cast(sizes, "float32"), at(lower), -math.inf)
    low = numbers.where(ops.abs(low) < SMALLEST, 0.0, low)
    high = numbers.where((upper >= 0) & (sizes > 0), at(upper), math.inf)
    below_zero = float(np.nextafter(np.float32(-SMALLEST), 0))
    least = numbers.where(high > 0, 2.0**-149, ops.zeros_like(high) + below_zero)
    return low, ops.where(ops.abs(high) < SMALLEST, least, high)


def _by_tensor(order, tensor):
    """Sort the positions in `order` by tensor: first all positions in the first tensor, and so on.
    Within each tensor, the order of the positions does not change."""
    return gather(order, ops.argsort(gather(tensor, order)))


def _limits(scores: Scores) -> list[int]:
    """Return, for each bundle of tensors, the largest number of scores to copy."""
    if scores.count <= _SORTED:
        return [b.tensor.shape[0] * ROW_WIDTH for b in scores.bundles]

    def limit(length, total):
        # The position of the threshold in the sorted sample has a standard deviation of at most
        # half the square root of the sample's size. The positions of the two bounds differ by 2 *
        # `_DEVIATIONS` times this standard deviation.
        share = _DEVIATIONS / math.sqrt(total / _STRIDE)
        most = share * min(1.5 * total, _CONCENTRATION * length)
        return min(length, math.ceil(most) + 32 * _DEVIATIONS * _STRIDE)

    if scores.together:
        return [limit(sum(b.lengths), scores.count) for b in scores.bundles]
    return [sum(limit(n, n) for n in b.lengths) for b in scores.bundles]


class _Between:
    """Sorted copies of the scores between the lower and the upper bound of each ranking.

    Attributes:
        values: Vector of the copied scores, ordered by ranking, and within a ranking in descending
            order. The entries after the last copied score are not used.
        ranks: For each score in `values`, its rank within its ranking. Only copied scores count,
            and the highest score has rank 0.
        first: Index in `values` at which the scores of each ranking begin.
        counts: Number of copied scores of each ranking.
    """

    def __init__(self, scores: Scores, low, above):
        """Copy and sort the scores that exceed `low`. Leave out every score for which the mask in
        `above` is True."""
        self.scores = scores
        self.places, used, values, tensor = [], [], [], []
        number = scores.lengths.shape[0]
        for b, s, mask, limit in zip(scores.bundles, scores.scores, above, _limits(scores)):
            between = remove_true(s > scores.to_rows(b, low), mask)
            found = true_positions(between, limit)
            del between  # Free the memory.
            is_used = found >= 0
            if limit < sum(b.lengths):
                guesses.add(ops.logical_not(is_used[-1]))
            place = ops.where(is_used, found, ops.arange(limit))
            values.append(numbers.where(is_used, gather(ops.reshape(s, (-1,)), place), -math.inf))
            if not scores.together:
                of_place = gather(b.tensor, place // ROW_WIDTH)
                tensor.append(numbers.where(is_used, of_place, number))
            self.places.append(place)
            used.append(is_used)
        values, used = ops.concatenate(values), ops.concatenate(used)
        # As in `ranking.py`, all positive scores below `SMALLEST` are tied. Zeros are tied with all
        # negative scores above `-SMALLEST`.
        tiny = numbers.at_least(ops.sign(values), 0) * (SMALLEST / 2)
        order = ops.argsort(-ops.where(ops.abs(values) < SMALLEST, tiny, values))
        self.ranks = ops.arange(order.shape[0], dtype="int32")
        if scores.together:
            self.counts = ops.sum(ops.cast(used, "int32"))[None]
            self.first, self._ranking = ops.zeros_like(self.counts), None
        else:
            tensor = ops.concatenate(tensor)
            order = _by_tensor(order, tensor)
            self._ranking = gather(tensor, order)
            every = ops.arange(number + 1, dtype="int32")
            ends = ops.cast(ops.searchsorted(self._ranking, every), "int32")
            self.first, self.counts = ends[:-1], ends[1:] - ends[:-1]
            self.ranks = self.ranks - gather(ends, self._ranking)
        self._order, self.values = order, gather(values, order)

    def of_ranking(self, values):
        """Expand a vector with one value per ranking to one value for each score in `values`.
        Unused entries get 0."""
        if self._ranking is None:
            return values
        return gather(ops.append(values, ops.zeros_like(values[:1])), self._ranking)

    def add_to(self, masks, taken):
        """Set mask entries to True for all scores in `values` for which `taken` is True."""
        order = self._order
        taken = ops.scatter_update(ops.zeros_like(taken), order[:, None], taken)
        end = 0
        for mask, place in zip(masks, self.places):
            begin, end = end, end + place.shape[0]
            add_true(mask, place, taken[begin:end])
