"""The best of many scores, found without a sort: `top_k` and `kth`, which `masks` has as well.

Scores stay where they are. They are counted above a threshold, row by row, until it is right; this
is all that a mask update of a large model takes time for.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from keras import ops

Tensor = Any

# Steps of the search for a threshold at the most; it stops where two floats are adjacent.
_STEPS = 900
_LARGEST = 1e38  # scores beyond it count as tied: there is room to calculate with them
_SMALLEST = 2.0**-126  # scores that differ by no more count as tied: less is 0 on some backends
_WIDTH = 1 << 10  # of the rows in which scores are ranked
_BUNDLE = 1 << 20  # tensors are joined up to this number of entries
_SLAB = 1 << 8  # rows that are counted at once
_MANY = 1 << 22  # scores of which a sample tells first where the threshold is about
_SAMPLED = (32, 25)  # of the rows and of the columns one in so many is in the sample


def top_k(
    scores: Iterable[Tensor],
    kept: Tensor,
    sizes: Sequence[np.ndarray] | None = None,
    first: Sequence[int] | None = None,
):
    """Masks that keep the weights of highest score, ranked over all tensors or in each of them.

    Ties go to the earlier tensor, then to the earlier position in it (C order), so that every
    backend keeps the same weights. The threshold is searched for, without a sort or a copy.

    Args:
        scores: float tensors, of any shapes. An infinite score ties with the largest or the
            smallest finite one, NaN with the smallest.
        kept: how many weights to keep: an integer scalar, for all tensors together, or a vector
            with a number for each of them.
        sizes: weights in every group where an entry stands for several (`Pattern.sizes`). Groups
            are then taken in order of their score while their sizes fit into `kept`.
        first: how many of the best entries of every tensor come before all others; `kept` has to
            be enough for them.

    Returns:
        A list of boolean tensors, one per tensor of scores.

    Example:
        >>> keras_dst.masks.top_k([keras.ops.array([0.1, 0.3, 0.2])], 2)  # [[False, True, True]]
    """
    kept = ops.cast(kept, "int32")
    scores = list(scores)
    shapes = [tuple(s.shape) for s in scores]
    ranking = _Ranking(scores, kept.ndim == 0, sizes, first)
    scores.clear()  # those that are joined are not needed twice
    found = ranking.masks(kept if kept.ndim else kept[None])
    flat = [mask for rows, matrix in zip(ranking.bundles, found) for mask in rows.split(matrix)]
    return [ops.reshape(mask, shape) for mask, shape in zip(flat, shapes)]


def kth(scores: Sequence[Tensor], kept: Tensor) -> Tensor:
    """A value that exactly `kept` scores exceed, ties aside: the threshold of `top_k`."""
    return _Ranking(scores, together=True).thresholds(ops.cast(kept, "int32")[None])[1][0]


class _Rows:
    """Some of the tensors that are ranked, as the rows of a matrix; a tensor begins a new row.

    Attributes, of every row:
        tensor: number of the tensor it belongs to.
        owner: for each of the tensors here, whether it is the row's.
        local: number of the tensor among those here.
        start: position of its first entry, a column.
        left: entries of its tensor from its start on, a column; None where every row is full.

    ``begins`` are the first rows of the tensors.
    """

    def __init__(self, members: Sequence[int], lengths: Sequence[int], starts: Sequence[int]):
        self.members, self.lengths = members, [lengths[i] for i in members]
        counts = [-(-n // _WIDTH) for n in self.lengths]
        within = np.concatenate([_WIDTH * np.arange(n, dtype="int32") for n in counts])
        self.tensor = np.repeat(np.array(members, "int32"), counts)
        self.owner = self.tensor == np.array(members)[:, None]
        self.local = self.tensor - members[0]
        self.begins = np.flatnonzero(np.diff(self.tensor, prepend=-1)).astype("int32")
        start = within + np.repeat(np.array([starts[i] for i in members], "int32"), counts)
        self.start = ops.convert_to_tensor(start[:, None])
        left = np.repeat(np.array(self.lengths, "int32"), counts) - within
        self.left = ops.convert_to_tensor(left[:, None]) if np.any(left < _WIDTH) else None

    def join(self, tensors: Sequence[Tensor], nothing: float) -> Tensor:
        """The matrix of their rows, with `nothing` behind the last entry of each."""
        parts = []
        for i, length in zip(self.members, self.lengths):
            part = ops.reshape(tensors[i], (-1,))
            if length % _WIDTH:
                nothings = ops.full((-length % _WIDTH,), nothing, part.dtype)
                part = ops.concatenate([part, nothings])
            # Joined as rows, not flat: XLA would keep it in both forms.
            parts.append(ops.reshape(part, (-1, _WIDTH)))
        return ops.concatenate(parts) if len(parts) > 1 else parts[0]

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The entries of every tensor, flat."""
        ends = [*self.begins[1:].tolist(), len(self.tensor)]
        rows = [matrix[begin:end] for begin, end in zip(self.begins.tolist(), ends)]
        return [ops.reshape(r, (-1,))[:n] for r, n in zip(rows, self.lengths)]


class _Ranking:
    """Scores of which a number is kept, of all together or of each tensor, in one search.

    Small tensors are joined, so that there are few operations to compile; large ones are not, as
    a copy of all the weights takes its memory. Scores stay as they are: one that is not finite is
    taken for the largest or the smallest when it is compared. Values are kept per ranking: one, or
    one for each tensor.
    """

    def __init__(self, scores, together, sizes=None, first=None):
        self.together = together
        lengths = [math.prod(s.shape) for s in scores]
        starts = [0, *np.cumsum(lengths)[:-1].tolist()] if together else [0] * len(lengths)
        self.count = sum(lengths)
        self.lengths = ops.convert_to_tensor([self.count] if together else lengths, "int32")
        self.bundles = [_Rows(members, lengths, starts) for members in bundles(lengths)]
        scores = [ops.cast(s, "float32") for s in scores]
        self.scores = [b.join(scores, -np.inf) for b in self.bundles]
        self.least, self.most, self.peaks = self._extremes()
        # How many weights an entry stands for; None: one.
        self.weights, self.total = [None] * len(self.bundles), self.lengths
        if sizes is not None and any(np.any(n != 1) for n in sizes):
            ones = [ops.convert_to_tensor(n, "int32") for n in sizes]
            self.weights = [b.join(ones, 0) for b in self.bundles]
            totals = [int(n.sum()) for n in sizes]
            self.total = ops.convert_to_tensor([sum(totals)] if together else totals, "int32")
        # Of each tensor by itself, the best are among those that are kept anyway.
        self.first: Sequence[int] = []
        self.ahead = None
        if together and first is not None:
            self.first = first
            self.ahead = ops.convert_to_tensor(first, "int32")
            if self.weights[0] is not None:
                ahead = [
                    _by_row(_weigh_marked, "int32", *of) for of in zip(self.best(), self.weights)
                ]
                self.ahead = self._by_tensor(ahead, ops.sum, 0)

    def _extremes(self):
        """The least and the largest finite score, and the largest of every row."""
        floors = [_by_row(_least, "float32", s, b.left) for b, s in zip(self.bundles, self.scores)]
        peaks = [_by_row(_largest, "float32", s) for s in self.scores]
        sums = [_by_row(_sum, "float32", s, b.left) for b, s in zip(self.bundles, self.scores)]
        # Not every backend hands a NaN on to the extremes, but all do to a sum.
        usual = [ops.all(ops.isfinite(total)) for total in sums]
        usual += [ops.all(ops.abs(end) <= _LARGEST) for end in floors + peaks]

        def bounds(floors, peaks):
            least = self._gather(floors, ops.min, _LARGEST)
            return least, ops.maximum(self._gather(peaks, ops.max, -_LARGEST), least)

        def of_finite():
            least, most = bounds(
                [
                    _by_row(lambda s: _least(_limited(s, _LARGEST)), "float32", s)
                    for s in self.scores
                ],
                [
                    _by_row(lambda s: _largest(_limited(s, -_LARGEST)), "float32", s)
                    for s in self.scores
                ],
            )
            peaks = [
                _by_row(
                    lambda s, *ends: _largest(self._finite(s, *ends)),
                    "float32",
                    s,
                    self._each(b, least),
                    self._each(b, most),
                )
                for b, s in zip(self.bundles, self.scores)
            ]
            return least, most, peaks

        return ops.cond(
            ops.all(ops.stack(usual)), lambda: (*bounds(floors, peaks), peaks), of_finite
        )

    def best(self):
        """The first of the best entries of every tensor, as many as `first` says; see `_marked`."""
        if max(self.first) > 1:
            flat = [part for b, s in zip(self.bundles, self.scores) for part in b.split(s)]
            each = _Ranking(flat, together=False)
            return each.masks(ops.convert_to_tensor(self.first, "int32"))
        found = []
        for b, s, peaks in zip(self.bundles, self.scores, self.peaks):
            numbers = ops.arange(len(b.tensor), dtype="int32")
            # Of every tensor the first row with its largest score, and the place in that.
            tops = ops.max(ops.where(b.owner, peaks, -np.inf), axis=1, keepdims=True)
            tops = ops.logical_and(b.owner, peaks >= tops)
            rows = ops.min(ops.where(tops, numbers, len(b.tensor)), axis=1)
            best = self._finite(ops.take(s, rows, axis=0), self.least, self.most)
            place = ops.cast(ops.argmax(best, axis=1), "int32")
            is_it = numbers == ops.take(rows, b.local)
            found.append(ops.where(is_it, ops.take(place, b.local), -1)[:, None])
        return found

    @staticmethod
    def _finite(s, least, most):
        """Infinities tie with the largest and smallest finite score, NaN with the smallest."""
        return ops.where(s > least, ops.minimum(s, most), least)

    def masks(self, kept):
        low, high, below, above = self.thresholds(kept)
        room, ties = kept - above, below - above
        all_fit = ties <= room
        some_fit = (room > 0) & ~all_fit
        firsts = self.best() if self.first else [None] * len(self.bundles)
        bundles = list(zip(self.bundles, self.scores, firsts))

        def none_or_all():
            cut = ops.where(all_fit, low, high)
            return [_marked(self._above(b, s, cut), first) for b, s, first in bundles]

        def some():
            end = ops.where(all_fit, self.lengths, 0)
            end = ops.where(some_fit, self._last_ties(low, high, firsts, room), end)
            found = []
            for b, s, first in bundles:
                tied = self._above(b, s, low) & _within(self._each(b, end) - b.start)
                found.append(_marked(self._above(b, s, high) | tied, first))
            return found

        # Whole masks, not their ends alone: XLA would compile all this again for every tensor.
        return ops.cond(ops.any(some_fit), some, none_or_all)

    def thresholds(self, kept):
        """`(low, high)`: no more than `kept` weights score above `high`, more do above `low`.

        And how many do. The next threshold is where a straight line between the counts meets
        `kept`, and every third time in the middle, so that no score can make the search long. A
        side that stays where it is twice counts half from then on.

        Source of the line: the Illinois variant of false position, M. Dowell and P. Jarratt, BIT
        11 (1971).
        """
        gap = ops.maximum(ops.abs(self.least), 1e-30)
        # Most scores may tie with the least: weights that are pruned already.
        rest = self._count_above(self.least)
        everything, settled = self.total <= kept, rest <= kept
        low = ops.where(settled, self.least - 2.0**-22 * gap, self.least)
        high = ops.where(settled, self.least, self.most)
        high = ops.where(everything, self.least - ops.maximum(gap, 1.0), high)
        above = ops.zeros(kept.shape, "int32") if self.ahead is None else ops.sum(self.ahead)[None]
        above = ops.where(everything, self.total, ops.where(settled, rest, above))
        below = ops.where(settled, self.total, rest)

        def open_(low, high, below, above, *_):
            middle = low / 2 + high / 2
            between = (low < middle) & (middle < high) & (high - low > _SMALLEST)
            return (above < kept) & between & (high > self.least)

        def narrow(low, high, below, above, half_below, half_above, last, turn):
            excess = half_below * ops.cast(below - kept, "float32")
            lack = half_above * ops.cast(kept - above, "float32")
            guess = low + (high - low) * (excess / ops.maximum(excess + lack, 1e-30))
            for i, threshold in enumerate(sampled):
                guess = ops.where(ops.equal(turn, i + 1), threshold, guess)
            inside = (low < guess) & (guess < high)
            # Zeros are many, and far from the next float by halves: that is tried first.
            at_zero = (low < 0) & (high > 0) & (turn > 2)
            under = (low < -_SMALLEST) & ops.equal(high, 0)
            threshold = ops.where(inside & ops.not_equal(turn % 3, 0), guess, low / 2 + high / 2)
            threshold = ops.where(at_zero, 0.0, ops.where(under, -_SMALLEST, threshold))
            count = self._count_above(threshold)
            active, fits = open_(low, high, below, above), count <= kept
            down, up = active & fits, active & ~fits
            side = ops.where(down, 1, ops.where(up, -1, last))
            again = ops.where(side == last, half, whole)
            return (
                ops.where(up, threshold, low),
                ops.where(down, threshold, high),
                ops.where(up, count, below),
                ops.where(down, count, above),
                ops.where(up, 1.0, ops.where(down, half_below * again, half_below)),
                ops.where(down, 1.0, ops.where(up, half_above * again, half_above)),
                side,
                turn + 1,
            )

        many = self.together and self.count >= _MANY
        sampled = self._of_sample(kept) if many else ()
        one, side = ops.ones(low.shape, "float32"), ops.zeros(low.shape, "int32")
        # Two Python numbers would get the type of `keras.config.floatx()`.
        half, whole = (ops.convert_to_tensor(x, "float32") for x in (0.5, 1.0))
        turn = ops.convert_to_tensor(1, "int32")
        low, high, below, above, *_ = ops.while_loop(
            lambda *state: ops.any(open_(*state)),
            narrow,
            (low, high, below, above, one, one, side, turn),
            maximum_iterations=_STEPS,
        )
        return low, high, below, above

    def _of_sample(self, kept):
        """Scores between which the threshold is, as far as a sample of them can tell."""
        down, across = _SAMPLED
        rows = [ops.take(s, np.arange(0, s.shape[0], down), axis=0) for s in self.scores]
        sample = [ops.reshape(r[:, across // 2 :: across], (-1,)) for r in rows]
        sample = ops.sort(ops.concatenate(sample))
        size = sample.shape[0]
        part = ops.clip(ops.cast(kept, "float32") / ops.cast(self.total, "float32"), 0, 1)
        place, spread = size * (1 - part), 3 * ops.sqrt(size * part * (1 - part)) + 1
        ends = [ops.clip(end, 0, size - 1) for end in (place + spread, place - spread)]
        return [ops.take(sample, ops.cast(end, "int32")) for end in ends]

    def _last_ties(self, low, high, firsts, room):
        """Up to which positions what scores between two thresholds fits into `room`."""
        found, offset = [], 0
        for b, s, weights, first in zip(self.bundles, self.scores, self.weights, firsts):
            above = _marked(self._above(b, s, high), first)
            tied = self._above(b, s, low) & ~above
            if b.left is not None:
                tied = tied & _within(b.left)
            counts = _by_row(_weigh, "int32", tied, weights)
            before = ops.cumsum(counts) - counts
            if self.together:
                begins, sizes, space = np.zeros(1), np.array([len(b.tensor)]), room[0]
                before, offset = before + offset, offset + ops.sum(counts)
            else:
                begins, sizes = b.begins, np.bincount(b.local)
                before = before - ops.take(ops.take(before, begins), b.local)
                space = ops.take(room, b.tensor)
            begins, sizes = (ops.convert_to_tensor(n, "int32") for n in (begins, sizes))
            # The row in which there is no more room, and how much of it there still is.
            full = ops.cast(before + counts <= space, "int32")
            full = ops.sum(full[None] if self.together else ops.where(b.owner, full, 0), axis=1)
            row = begins + ops.minimum(full, sizes - 1)
            rest = ops.take(space - before, row)
            entries = ops.cast(ops.take(tied, row, axis=0), "int32")
            if weights is not None:
                entries = entries * ops.take(weights, row, axis=0)
            fits = ops.cumsum(entries, axis=1) <= rest[:, None]
            place = ops.take(b.start[:, 0], row) + ops.cast(ops.sum(fits, axis=1), "int32")
            found.append(ops.where(full < sizes, place, np.iinfo("int32").max))
        places = ops.concatenate(found)
        return ops.min(places, keepdims=True) if self.together else places

    def _above(self, b, s, thresholds):
        """Mask of the scores of a bundle above a threshold; below the least one, all are."""
        everything = self._each(b, thresholds < self.least)
        return (s > self._each(b, self._finite_cut(thresholds))) | everything

    def _finite_cut(self, thresholds):
        """The same cut for scores that need not be finite: none is above the largest."""
        return ops.where(thresholds < self.most, thresholds, np.inf)

    def _count_above(self, thresholds):
        """Weights that score above a threshold, with all that come first, per ranking."""

        def of_rows(s, cut, weights):
            return _weigh(s > cut, weights)

        cut = self._finite_cut(thresholds)
        counts = [
            _by_row(of_rows, "int32", s, self._each(b, cut), n)
            for b, s, n in zip(self.bundles, self.scores, self.weights)
        ]
        if self.ahead is None:
            count = self._gather(counts, ops.sum, 0)
        else:  # what comes first and what is above: of each tensor one is part of the other
            count = ops.maximum(self._by_tensor(counts, ops.sum, 0), self.ahead)
            count = ops.sum(count)[None]
        return ops.where(thresholds < self.least, self.total, count)

    def _each(self, rows, values):
        """For every row its own of one value per ranking."""
        return values[0] if self.together else self._of(rows, values)

    @staticmethod
    def _of(rows, values):
        """For every row that of its tensor."""
        return ops.take(values, rows.tensor)[:, None]

    def _gather(self, values, reduce, nothing):
        """One value per ranking, of one for every row."""
        if self.together:
            return reduce(ops.stack([reduce(v) for v in values]))[None]
        return self._by_tensor(values, reduce, nothing)

    def _by_tensor(self, values, reduce, nothing):
        return ops.concatenate(
            [reduce(ops.where(b.owner, v, nothing), axis=1) for b, v in zip(self.bundles, values)]
        )


def bundles(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of tensors that are joined: neighbours, while they are small together."""
    found: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if length > room:
            found.append([])
            room = _BUNDLE
        found[-1].append(i)
        room -= length
    return found


def _by_row(reduce, dtype, *matrices):
    """What `reduce` gives for every row of matrices; what is none, it gets as it is.

    A slab of rows after the other: XLA and TensorFlow write out what is reduced, in four bytes
    for an entry of a mask.
    """
    rows = matrices[0].shape[0]
    slabs = rows // _SLAB
    if slabs < 2:
        return reduce(*matrices)

    def apply(part):
        return reduce(*(part(m) if getattr(m, "ndim", 0) == 2 else m for m in matrices))

    def next_slab(i, found):
        begin = i * _SLAB
        values = apply(lambda m: ops.slice(m, (begin, 0), (_SLAB, m.shape[1])))
        return ops.slice_update(found, (begin,), values)

    end = slabs * _SLAB
    found = ops.fori_loop(0, slabs, next_slab, ops.zeros((end,), dtype))
    return ops.concatenate([found, apply(lambda m: m[end:])]) if end < rows else found


def _least(s, left=None):
    return ops.min(s if left is None else ops.where(_within(left), s, _LARGEST), axis=1)


def _largest(s):
    return ops.max(s, axis=1)


def _sum(s, left):
    return ops.sum(s if left is None else ops.where(_within(left), s, 0.0), axis=1)


def _limited(s, nothing):
    """Scores within what can be calculated with; `nothing` for those that are not finite."""
    return ops.where(ops.isfinite(s), ops.clip(s, -_LARGEST, _LARGEST), nothing)


def _marked(mask, first):
    """A mask with what comes first: None, another mask, or a column in every row."""
    if first is None:
        return mask
    return mask | (first if first.shape[1] == _WIDTH else _columns() == first)


def _weigh_marked(first, weights):
    return _weigh(_marked(ops.zeros(weights.shape, "bool"), first), weights)


def _columns():
    return ops.arange(_WIDTH, dtype="int32")


def _within(numbers):
    """For every row a mask of its first entries, of so many."""
    return _columns() < numbers


def _weigh(mask, weights):
    """How many weights are kept in every row."""
    if weights is None:
        # With a third axis, because Keras transposes the counts and torch wants a matrix for that.
        return ops.cast(ops.reshape(ops.count_nonzero(mask[..., None], axis=1), (-1,)), "int32")
    return ops.sum(ops.where(mask, weights, 0), axis=1)
