"""Top-k selection without a sort. The module `masks` exports the functions `top_k` and `kth`.

Each tensor of scores is viewed as a matrix with 1024 scores in each row. Large tensors are not
copied. Several small tensors are joined into one matrix, a bundle (see `rows.py`). A search finds
the threshold that exactly `kept` scores exceed. Each step of the search counts the scores above a
candidate threshold, row by row. In a large model, this counting takes nearly all the time of a mask
update.

On a CPU, the scores of 256 rows (a slab) are counted at once, so that temporary values fit into the
cache. On an accelerator, the scores in all rows are counted at once. A loop over groups of 256 rows
would launch thousands of small operations on an accelerator. JAX fuses several counts into one pass
over the scores, so each search step on JAX tries several candidate thresholds. In each search step,
PyTorch would launch tens of GPU kernels and then wait for their result. On PyTorch, `selection.py`
therefore usually selects the highest scores without a search for the threshold. All backends return
the same masks, whether they search for the threshold or select the scores.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dst._backend import devices, selection
from keras_dst._backend.jit import count_true, traced_once
from keras_dst._backend.rows import LARGEST, ROW_WIDTH, SMALLEST, Scores, columns, first_columns
from keras_dst._utils.validation import check_integer, is_integer

Tensor = Any

# Largest number of steps in the search for a threshold. The search stops earlier if the lower and
# the upper threshold are adjacent floats.
_MAX_STEPS = 900
_SLAB_ROWS = 1 << 8  # On a CPU, the scores of 256 rows are counted at once.
# Number of sections into which a search step divides the range between the lower and the upper
# threshold. XLA counts the scores above all boundaries between sections in one pass over the
# scores.
_SECTIONS = 8
# Smallest number of scores for which the first two candidate thresholds come from a sample.
_SAMPLE_FROM = 1 << 22
_SAMPLE_STRIDES = (32, 25)  # The sample takes every 32nd row and every 25th column of a matrix.


def top_k(
    scores: Iterable[Tensor],
    kept: Tensor,
    sizes: Sequence[np.ndarray] | None = None,
    first: Sequence[int] | None = None,
):
    """Return masks that keep the highest scores, over all tensors or within each tensor.

    Equal scores are kept in the order of their tensors, and within a tensor in the order of their
    positions (C order). All backends therefore keep the same weights.

    Args:
        scores: Float tensors of any shapes. Infinity counts as the largest finite score. Minus
            infinity and NaN count as the smallest finite score.
        kept: Number of weights to keep: an integer scalar for all tensors together, or a vector
            with one number per tensor.
        sizes: Number of weights that each score stands for, if weights are ranked in groups such as
            blocks (see `Pattern.sizes`). Groups with higher scores are kept first, as long as the
            kept groups contain at most `kept` weights. Defaults to None, which means that every
            score stands for one weight.
        first: For each tensor, the number of entries to keep even if other tensors have higher
            scores. Within a tensor, the entries with the highest scores are kept. `kept` must be
            large enough for all these entries. Defaults to None, which means 0 for every tensor.

    Returns:
        A list of boolean tensors, one per tensor of scores.

    Raises:
        ValueError: If an argument has the wrong type, or if `sizes` or `first` do not fit the
            scores.

    Example:
        >>> keras_dst.masks.top_k([keras.ops.array([0.1, 0.3, 0.2])], 2)  # [[False, True, True]]
    """
    scores, kept = _checked(scores, kept)
    _check_groups([tuple(s.shape) for s in scores], sizes, first)
    # Do not cache `sizes`, because the arrays can be as large as the weights.
    if sizes is not None:
        return _top_k(scores, kept, sizes, first)
    return traced_once(_top_k, scores, kept, None, None if first is None else tuple(first))


def _top_k(scores, kept, sizes, first):
    shapes = [tuple(s.shape) for s in scores]
    together, counts = kept.ndim == 0, kept if kept.ndim else kept[None]
    if selection.is_possible(scores, sizes):
        arranged = Scores(scores, together)
        scores.clear()  # Free the scores of small tensors, because `arranged` holds copies.
        found = selection.top_k(arranged, counts, first if together else None)
    else:
        arranged = _Ranking(scores, together, sizes, first)
        scores.clear()
        found = arranged.masks(counts)
    return [ops.reshape(mask, shape) for mask, shape in zip(arranged.split(found), shapes)]


def kth(scores: Sequence[Tensor], kept: Tensor) -> Tensor:
    """Return a threshold that exactly `kept` scores exceed, unless several scores are equal.

    Args:
        scores: Float tensors of any shapes.
        kept: Number of scores that must exceed the threshold, an integer scalar. If `kept` is a
            vector with one number per tensor, the result is a vector with one threshold per tensor.
    """
    return traced_once(_kth, *_checked(scores, kept))


def _kth(scores, kept):
    together, counts = kept.ndim == 0, kept if kept.ndim else kept[None]
    if selection.is_possible(scores):
        found = selection.kth(Scores(scores, together), counts)
    else:
        found = _Ranking(scores, together).thresholds(counts)[1]
    return found[0] if together else found


def _checked(scores, kept) -> tuple[list[Tensor], Tensor]:
    """Return the scores as a list of tensors, and the number of kept scores as an int32 tensor."""
    listed = isinstance(scores, Iterable) and not isinstance(scores, (str, dict))
    if not listed or hasattr(scores, "shape") or not scores:
        raise ValueError(f"scores must be a list of float tensors. Received: {scores!r}")
    for count in kept if isinstance(kept, (list, tuple)) else [kept]:
        if not hasattr(count, "dtype") or isinstance(count, np.generic):  # not a tensor
            check_integer(count, "kept", minimum=0)
        elif not keras.backend.is_int_dtype(count.dtype):
            raise ValueError(
                "kept must be a whole number, or an integer tensor with one number per tensor of "
                f"scores. Received: kept of type {keras.backend.standardize_dtype(count.dtype)}."
            )
    return [ops.convert_to_tensor(s) for s in scores], ops.cast(kept, "int32")


def _check_groups(shapes, sizes, first) -> None:
    """Raise ValueError if `sizes` or `first` does not match the tensors of scores."""
    if sizes is not None:
        found = [np.asarray(size) for size in sizes] if isinstance(sizes, (list, tuple)) else []
        if [size.shape for size in found] != shapes or any(s.dtype.kind not in "iu" for s in found):
            raise ValueError(
                f"sizes must be a list of integer arrays with the shapes of the scores, {shapes}. "
                f"Received: sizes={sizes!r}"
            )
    if first is not None:
        counts = first if isinstance(first, (list, tuple)) else []
        limits = [max(math.prod(shape), 1) for shape in shapes]
        fits = len(counts) == len(limits) and all(map(is_integer, counts))
        if not fits or any(not 0 <= n <= limit for n, limit in zip(counts, limits)):
            raise ValueError(
                "first must be a list with one whole number per tensor of scores, from 0 to the "
                f"number of its entries. Received: first={first!r}"
            )


class _Ranking(Scores):
    """Search for the thresholds that the highest scores exceed, for all tensors together or for
    each tensor separately.

    In comparisons, infinity and NaN count as finite scores (see `top_k`). The tensors in
    `self.scores` keep their infinite and NaN scores.
    """

    def __init__(self, scores, together, sizes=None, first=None):
        super().__init__(scores, together)
        self.at_once = devices.on_accelerator(self.scores[0])
        self.least, self.most, self.peaks = self._extremes()
        # Number of weights that each score stands for, or None if every score stands for one
        # weight.
        self.weights, self.total = [None] * len(self.bundles), self.lengths
        if sizes is not None and any(np.any(n != 1) for n in sizes):
            ones = [ops.convert_to_tensor(n, "int32") for n in sizes]
            self.weights = [b.join(ones, 0) for b in self.bundles]
            totals = [int(n.sum()) for n in sizes]
            self.total = ops.convert_to_tensor([sum(totals)] if together else totals, "int32")
        # If each tensor has its own threshold, the argument `first` has no effect, because the
        # highest scores of each tensor are kept anyway.
        self.first: Sequence[int] = []
        self.first_weights = None
        if together and first is not None:
            self.first = first
            self.first_weights = ops.convert_to_tensor(first, "int32")
            if self.weights[0] is not None:
                first_weights = [
                    self._by_row(_count_first, "int32", *pair)
                    for pair in zip(self.first_entries(), self.weights)
                ]
                self.first_weights = self.reduce_by_tensor(first_weights, ops.sum, 0)

    def _extremes(self):
        """Return the smallest and the largest finite score of every ranking, and the largest score
        in every row of the matrices."""
        floors = [
            self._by_row(_least, "float32", s, b.left) for b, s in zip(self.bundles, self.scores)
        ]
        peaks = [self._by_row(_largest, "float32", s) for s in self.scores]
        usual = [ops.all(ops.abs(end) <= LARGEST) for end in floors + peaks]
        if keras.backend.backend() != "torch":
            # If an array contains NaN, its sum is NaN on every backend, but its minimum and maximum
            # are NaN only on torch.
            pairs = zip(self.bundles, self.scores)
            sums = [self._by_row(_sum, "float32", s, b.left) for b, s in pairs]
            usual += [ops.all(ops.isfinite(total)) for total in sums]

        def bounds(floors, peaks):
            least = self.reduce_by_ranking(floors, ops.min, LARGEST)
            return least, ops.maximum(self.reduce_by_ranking(peaks, ops.max, -LARGEST), least)

        def of_finite():
            least, most = bounds(
                [
                    self._by_row(lambda s: _least(_clipped(s, LARGEST)), "float32", s)
                    for s in self.scores
                ],
                [
                    self._by_row(lambda s: _largest(_clipped(s, -LARGEST)), "float32", s)
                    for s in self.scores
                ],
            )
            peaks = [
                self._by_row(
                    lambda s, *ends: _largest(self._finite(s, *ends)),
                    "float32",
                    s,
                    self.to_rows(b, least),
                    self.to_rows(b, most),
                )
                for b, s in zip(self.bundles, self.scores)
            ]
            return least, most, peaks

        return ops.cond(
            ops.all(ops.stack(usual)), lambda: (*bounds(floors, peaks), peaks), of_finite
        )

    def first_entries(self):
        """Return, for each bundle of tensors, the entries that the argument `first` of `top_k`
        always keeps. Every item of the list can be passed to `_with_first`."""
        if max(self.first) > 1:
            flat = self.split(self.scores)
            each = _Ranking(flat, together=False)
            return each.masks(ops.convert_to_tensor(self.first, "int32"))
        found = []
        best = self.best_entries(self.peaks, lambda s: self._finite(s, self.least, self.most))
        for b, (rows, place) in zip(self.bundles, best):
            is_row = ops.arange(b.tensor.shape[0], dtype="int32") == ops.take(rows, b.local)
            found.append(ops.where(is_row, ops.take(place, b.local), -1)[:, None])
        return found

    @staticmethod
    def _finite(s, least, most):
        """Return the scores, with infinities and NaN replaced by finite values."""
        return ops.where(s > least, ops.minimum(s, most), least)

    def masks(self, kept):
        low, high, below, above = self.thresholds(kept)
        room, ties = kept - above, below - above
        all_fit = ties <= room
        some_fit = (room > 0) & ~all_fit
        firsts = self.first_entries() if self.first else [None] * len(self.bundles)
        bundles = list(zip(self.bundles, self.scores, firsts))

        def none_or_all():
            cut = ops.where(all_fit, low, high)
            return [_with_first(self._above(b, s, cut), first) for b, s, first in bundles]

        def some():
            end = ops.where(all_fit, self.lengths, 0)
            end = ops.where(some_fit, self._last_ties(low, high, firsts, room), end)
            return [self._with_ties(b, s, low, high, end, first) for b, s, first in bundles]

        # Call `ops.cond` once for the masks of all tensors. With one call per tensor, XLA would
        # compile the functions `some` and `none_or_all` once per tensor.
        return ops.cond(ops.any(some_fit), some, none_or_all)

    def _with_ties(self, b, s, low, high, end, first):
        """Return a mask of the scores above `high`, and of the scores between `low` and `high` at
        positions before `end`."""
        tied = self._above(b, s, low) & first_columns(self.to_rows(b, end) - b.start)
        return _with_first(self._above(b, s, high) | tied, first)

    def thresholds(self, kept):
        """Return `(low, high, below, above)`: two thresholds per ranking, and the number of weights
        above each threshold.

        `above` is the number of weights whose score exceeds `high`, and `below` is the number of
        weights whose score exceeds `low`. In every step of the search, `above <= kept < below`
        holds.

        Args:
            kept: Vector with the number of weights to keep for each ranking.
        """
        gap = ops.maximum(ops.abs(self.least), 1e-30)
        # Many scores may be equal to the smallest score, for example the scores of pruned weights.
        rest = self._count_above(self.least)
        everything, settled = self.total <= kept, rest <= kept
        low = ops.where(settled, self.least - 2.0**-22 * gap, self.least)
        high = ops.where(settled, self.least, self.most)
        high = ops.where(everything, self.least - ops.maximum(gap, 1.0), high)
        none = ops.zeros(kept.shape, "int32")
        above = none if self.first_weights is None else ops.sum(self.first_weights)[None]
        above = ops.where(everything, self.total, ops.where(settled, rest, above))
        below = ops.where(settled, self.total, rest)
        by_sections = self.at_once and keras.backend.backend() == "jax"
        if by_sections:
            return self._by_sections(kept, low, high, below, above)
        return self._by_false_position(kept, low, high, below, above)

    def _is_unfinished(self, kept, low, high, above):
        """Return a boolean for each ranking: True if the threshold is not found yet."""
        middle = low / 2 + high / 2
        between = (low < middle) & (middle < high) & (high - low > SMALLEST)
        return (above < kept) & between & (high > self.least)

    def _by_false_position(self, kept, low, high, below, above):
        """Search for the threshold of each ranking. Each step tries one candidate for the
        threshold.

        The count of a threshold is the number of weights above the threshold. The search assumes
        that the count changes linearly between the lower and the upper threshold. The next
        candidate is the threshold at which this linear function equals `kept` (false position).
        Each of the two thresholds has an error: the difference between its count and `kept`. If a
        threshold stays the same for two steps, the search halves the error of this threshold
        (Illinois variant). Every third step tries the midpoint between the lower and the upper
        threshold. The number of steps is therefore limited for any distribution of scores.

        Dowell and Jarratt analyze the Illinois variant in "A modified regula falsi method for
        computing the root of an equation", BIT 11 (1971).
        """

        def open_(low, high, below, above, *_):
            return self._is_unfinished(kept, low, high, above)

        def narrow(low, high, below, above, half_below, half_above, last, turn):
            excess = half_below * ops.cast(below - kept, "float32")
            lack = half_above * ops.cast(kept - above, "float32")
            guess = low + (high - low) * (excess / ops.maximum(excess + lack, 1e-30))
            for i, threshold in enumerate(sampled):
                guess = ops.where(ops.equal(turn, i + 1), threshold, guess)
            inside = (low < guess) & (guess < high)
            # In many models, a large part of the scores is exactly 0. Bisection would need many
            # steps to reach the threshold 0, so the search tries 0 early.
            at_zero = (low < 0) & (high > 0) & (turn > 2)
            under = (low < -SMALLEST) & ops.equal(high, 0)
            threshold = ops.where(inside & ops.not_equal(turn % 3, 0), guess, low / 2 + high / 2)
            threshold = ops.where(at_zero, 0.0, ops.where(under, -SMALLEST, threshold))
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

        many = self.together and self.count >= _SAMPLE_FROM
        sampled = self._sample_bounds(kept) if many else ()
        one, side = ops.ones(low.shape, "float32"), ops.zeros(low.shape, "int32")
        # Convert to float32, because `ops.where` would convert two Python numbers to
        # `keras.config.floatx()`.
        half, whole = (ops.convert_to_tensor(x, "float32") for x in (0.5, 1.0))
        turn = ops.convert_to_tensor(1, "int32")
        low, high, below, above, *_ = ops.while_loop(
            lambda *bounds: ops.any(open_(*bounds)),
            narrow,
            (low, high, below, above, one, one, side, turn),
            maximum_iterations=_MAX_STEPS,
        )
        return low, high, below, above

    def _by_sections(self, kept, low, high, below, above):
        """Search for the threshold of each ranking. Each step tries several candidate thresholds.

        XLA counts the scores above all candidate thresholds of a step in one pass over the scores.

        The candidate thresholds divide the range between the lower and the upper threshold into
        sections of equal width. One candidate threshold is the exact midpoint between the lower and
        the upper threshold, so the search ends for any distribution of scores. Another candidate
        threshold is 0, because many scores are 0.
        """

        def narrow(low, high, below, above):
            active = self._is_unfinished(kept, low, high, above)
            parts = [n / _SECTIONS for n in range(1, _SECTIONS) if 2 * n != _SECTIONS]
            candidates = [low + (high - low) * part for part in parts]
            candidates += [low / 2 + high / 2, ops.where(ops.equal(high, 0), -SMALLEST, 0.0)]
            new = low, high, below, above
            for threshold in candidates:
                count = self._count_above(threshold)
                low, high, below, above = new
                inside = active & (low < threshold) & (threshold < high)
                up, down = inside & (count > kept), inside & (count <= kept)
                new = (
                    ops.where(up, threshold, low),
                    ops.where(down, threshold, high),
                    ops.where(up, count, below),
                    ops.where(down, count, above),
                )
            return new

        return ops.while_loop(
            lambda low, high, below, above: ops.any(self._is_unfinished(kept, low, high, above)),
            narrow,
            (low, high, below, above),
            maximum_iterations=_MAX_STEPS,
        )

    def _sample_bounds(self, kept):
        """Return an upper and a lower bound, between which the common threshold of all tensors
        probably lies. Both bounds are taken from a sample of all scores."""
        row_stride, column_stride = _SAMPLE_STRIDES
        rows = [s[::row_stride, column_stride // 2 :: column_stride] for s in self.scores]
        sample = ops.sort(ops.concatenate([ops.reshape(r, (-1,)) for r in rows]))
        size = sample.shape[0]
        part = ops.clip(ops.cast(kept, "float32") / ops.cast(self.total, "float32"), 0, 1)
        place, spread = size * (1 - part), 3 * ops.sqrt(size * part * (1 - part)) + 1
        ends = [ops.clip(end, 0, size - 1) for end in (place + spread, place - spread)]
        return [ops.take(sample, ops.cast(end, "int32")) for end in ends]

    def _last_ties(self, low, high, firsts, room):
        """Return, for every ranking, the position after the last tied entry that is kept.

        Args:
            low: Lower threshold. Scores between `low` and `high` count as tied.
            high: Upper threshold.
            firsts: For each bundle, the entries that are always kept (see `_with_first`).
            room: For each ranking, the number of weights with tied scores to keep.
        """
        found, offset = [], 0
        for b, s, weights, first in zip(self.bundles, self.scores, self.weights, firsts):
            above = _with_first(self._above(b, s, high), first)
            tied = self._between(b, s, low, above)
            counts = self._by_row(_count_kept, "int32", tied, weights)
            before = ops.cumsum(counts) - counts
            if self.together:
                first_rows, sizes, space = np.zeros(1), b.sizes.sum(keepdims=True), room[0]
                before, offset = before + offset, offset + ops.sum(counts)
            else:
                first_rows, sizes = b.first_rows, b.sizes
                before = before - ops.take(ops.take(before, first_rows), b.local)
                space = ops.take(room, b.tensor)
            first_rows, sizes = (ops.convert_to_tensor(n, "int32") for n in (first_rows, sizes))
            # Find the matrix row with the last tied entry to keep, and the number of tied entries
            # to keep in this row.
            full = ops.cast(before + counts <= space, "int32")
            full = ops.sum(full[None] if self.together else ops.where(b.owner, full, 0), axis=1)
            row = first_rows + ops.minimum(full, sizes - 1)
            rest = ops.take(space - before, row)
            entries = ops.cast(ops.take(tied, row, axis=0), "int32")
            if weights is not None:
                entries = entries * ops.take(weights, row, axis=0)
            fits = ops.cumsum(entries, axis=1) <= rest[:, None]
            place = ops.take(b.start[:, 0], row) + ops.cast(ops.sum(fits, axis=1), "int32")
            found.append(ops.where(full < sizes, place, np.iinfo("int32").max))
        places = ops.concatenate(found)
        return ops.min(places, keepdims=True) if self.together else places

    def _between(self, b, s, low, above):
        """Return a boolean mask, which is True for scores above `low` at which the mask `above` is
        False."""
        between = self._above(b, s, low) & ~above
        return between if b.left is None else between & first_columns(b.left)

    def _above(self, b, s, thresholds):
        """Return a boolean mask, which is True for scores above the threshold.

        A threshold below the smallest finite score keeps all scores, including NaN.
        """
        everything = self.to_rows(b, thresholds < self.least)
        return (s > self.to_rows(b, self._finite_cut(thresholds))) | everything

    def _finite_cut(self, thresholds):
        """Return the thresholds. Infinity replaces every threshold that is not below the largest
        finite score."""
        return ops.where(thresholds < self.most, thresholds, np.inf)

    def _count_above(self, thresholds):
        """Return the number of kept weights in each ranking. A weight is kept if its score exceeds
        the threshold, or if the weight is always kept."""
        count = self._count_scores(thresholds)
        # In each tensor, two sets of entries are kept: the entries above the threshold, and the
        # entries that are always kept. Both sets consist of the highest scores of the tensor, so
        # the larger set contains the smaller set. The number of kept entries is therefore the size
        # of the larger set.
        if self.first_weights is not None:
            count = ops.sum(ops.maximum(count, self.first_weights))[None]
        return ops.where(thresholds < self.least, self.total, count)

    def _count_scores(self, thresholds):
        """Return the number of weights whose scores exceed the threshold. The result has one number
        per tensor if some entries are always kept, otherwise one number per ranking."""

        def of_rows(s, cut, weights):
            return _count_kept(s > cut, weights)

        cut = self._finite_cut(thresholds)
        counts = [
            self._by_row(of_rows, "int32", s, self.to_rows(b, cut), n)
            for b, s, n in zip(self.bundles, self.scores, self.weights)
        ]
        if self.first_weights is None:
            return self.reduce_by_ranking(counts, ops.sum, 0)
        return self.reduce_by_tensor(counts, ops.sum, 0)

    def _by_row(self, reduce, dtype, *matrices):
        """Return `reduce(*matrices)`. The function `reduce` computes one value for each row of a
        matrix.

        On a CPU, `reduce` receives 256 rows at a time. XLA and TensorFlow write a mask to memory,
        with four bytes per entry, before they sum the mask. A mask of only 256 rows needs little
        memory. Arguments that are not matrices are passed to `reduce` unchanged.
        """
        rows = matrices[0].shape[0]
        slabs = rows // _SLAB_ROWS
        if slabs < 2 or self.at_once:
            return reduce(*matrices)

        def apply(part):
            return reduce(*(part(m) if getattr(m, "ndim", 0) == 2 else m for m in matrices))

        def next_slab(i, found):
            begin = i * _SLAB_ROWS
            values = apply(lambda m: ops.slice(m, (begin, 0), (_SLAB_ROWS, m.shape[1])))
            return ops.slice_update(found, (begin,), values)

        end = slabs * _SLAB_ROWS
        found = ops.fori_loop(0, slabs, next_slab, ops.zeros((end,), dtype))
        return ops.concatenate([found, apply(lambda m: m[end:])]) if end < rows else found


def _least(s, left=None):
    return ops.min(s if left is None else ops.where(first_columns(left), s, LARGEST), axis=1)


def _largest(s):
    return ops.max(s, axis=1)


def _sum(s, left):
    return ops.sum(s if left is None else ops.where(first_columns(left), s, 0.0), axis=1)


def _clipped(s, neutral):
    """Clip scores to +-1e38, and replace infinite and NaN scores by `neutral`."""
    return ops.where(ops.isfinite(s), ops.clip(s, -LARGEST, LARGEST), neutral)


def _with_first(mask, first):
    """Return a copy of the mask in which the entries that are always kept are True.

    `first` is a boolean matrix of the entries that are always kept, or a column vector. A column
    vector states, for each row, the column index of one entry that is always kept, or -1.
    """
    if first is None:
        return mask
    return mask | (first if first.shape[1] == ROW_WIDTH else columns() == first)


def _count_first(first, weights):
    return _count_kept(_with_first(ops.zeros(weights.shape, "bool"), first), weights)


def _count_kept(mask, weights):
    """Return the number of kept weights in every row of a mask."""
    if weights is None:
        return count_true(mask)
    return ops.sum(ops.where(mask, weights, 0), axis=1)
