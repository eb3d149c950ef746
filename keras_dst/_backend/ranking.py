"""Top-k selection without a sort. The module `masks` exports the functions `top_k` and `kth`.

The scores are not copied. The threshold is found by a search: every step counts, row by row, the
scores above a candidate threshold. In a large model, counting takes nearly all the time of a mask
update.

On a CPU the rows are counted slab by slab, which keeps temporary values in the cache. On an
accelerator a loop over slabs would launch thousands of small kernels, so all rows are counted at
once. JAX fuses several counts into one pass over the scores, so each search step on JAX tries
several candidates. PyTorch launches tens of kernels for each search step, and then waits for the
GPU. On PyTorch, the search therefore stops early, and the few remaining scores are sorted. All
search algorithms maintain the same bounds around the threshold, and return equal masks.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dst._backend.devices import on_accelerator
from keras_dst._backend.jit import count_true
from keras_dst._utils.validation import check_integer

Tensor = Any

# Largest number of search steps. The search stops earlier if two thresholds are adjacent floats.
_MAX_STEPS = 900
# Scores above this limit count as tied, so that sums of two scores do not overflow.
_LARGEST = 1e38
# Scores that differ by less count as tied, because some backends flush such differences to 0.
_SMALLEST = 2.0**-126
_ROW_WIDTH = 1 << 10  # Number of scores in a row.
_BUNDLE_SIZE = 1 << 20  # Largest number of scores in a bundle of small tensors.
_SLAB_ROWS = 1 << 8  # Number of rows whose scores are counted at once.
_SORTED = 1 << 20  # Largest number of scores that are sorted on an accelerator.
_SECTIONS = 8  # Number of sections per search step. XLA counts eight sections in one pass.
# If there are at least this many scores, a sample gives the first candidate thresholds.
_SAMPLE_FROM = 1 << 22
_SAMPLE_STRIDES = (32, 25)  # Strides of the rows and of the columns in the sample.


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
        sizes: If each score belongs to a group of weights, the number of weights in every group
            (see `Pattern.sizes`). Groups are then kept in descending order of their scores, as long
            as the sum of their sizes is at most `kept`. Defaults to None, which means that every
            entry is one weight.
        first: For every tensor, the number of its best entries that are always kept. `kept` must be
            large enough for these entries. Defaults to None, which means 0.

    Returns:
        A list of boolean tensors, one per tensor of scores.

    Example:
        >>> keras_dst.masks.top_k([keras.ops.array([0.1, 0.3, 0.2])], 2)  # [[False, True, True]]
    """
    scores, kept = _checked(scores, kept)
    shapes = [tuple(s.shape) for s in scores]
    ranking = _Ranking(scores, kept.ndim == 0, sizes, first)
    # Free the scores of small tensors, because `ranking` holds copies of these scores.
    scores.clear()
    found = ranking.masks(kept if kept.ndim else kept[None])
    flat = [mask for rows, matrix in zip(ranking.bundles, found) for mask in rows.split(matrix)]
    return [ops.reshape(mask, shape) for mask, shape in zip(flat, shapes)]


def kth(scores: Sequence[Tensor], kept: Tensor) -> Tensor:
    """Return the threshold that exactly `kept` scores exceed, if no scores are equal.

    Args:
        scores: Float tensors of any shapes.
        kept: Number of scores above the threshold, an integer scalar. A vector with one number per
            tensor gives a vector with one threshold per tensor.
    """
    scores, kept = _checked(scores, kept)
    if len(kept.shape):
        return _Ranking(scores, together=False).thresholds(kept)[1]
    return _Ranking(scores, together=True).threshold(kept[None])


def _checked(scores, kept) -> tuple[list[Tensor], Tensor]:
    """Return the scores as a list of tensors, and the number of kept scores as an int32 tensor."""
    if hasattr(scores, "shape") or isinstance(scores, (str, dict)) or not scores:
        raise ValueError(f"scores must be a list of float tensors. Received: {scores!r}")
    for count in kept if isinstance(kept, (list, tuple)) else [kept]:
        if not hasattr(count, "dtype") or isinstance(count, np.generic):  # not a tensor
            check_integer(count, "kept", minimum=0)
    return [ops.convert_to_tensor(s) for s in scores], ops.cast(kept, "int32")


class _Rows:
    """Arrangement of a bundle of tensors as rows of one matrix. Every tensor begins a new row.

    Attributes:
        tensor: For each row, the index of its tensor among all tensors.
        local: For each row, the index of its tensor among the tensors of this bundle.
        owner: Boolean matrix (tensors of this bundle, rows): whether the row belongs to the tensor.
        start: For each row, the position of its first entry in the tensor. If all tensors are
            ranked together, this is the position in their concatenation.
        left: For each row, the number of entries from its start to the end of the tensor. None if
            all rows are full.
        first_rows: Index of each tensor's first row.
    """

    def __init__(self, members: Sequence[int], lengths: Sequence[int], starts: Sequence[int]):
        self.members, self.lengths = members, [lengths[i] for i in members]
        counts = [-(-n // _ROW_WIDTH) for n in self.lengths]
        within = np.concatenate([_ROW_WIDTH * np.arange(n, dtype="int32") for n in counts])
        self.tensor = np.repeat(np.array(members, "int32"), counts)
        self.owner = self.tensor == np.array(members)[:, None]
        self.local = self.tensor - members[0]
        self.first_rows = np.flatnonzero(np.diff(self.tensor, prepend=-1)).astype("int32")
        start = within + np.repeat(np.array([starts[i] for i in members], "int32"), counts)
        self.start = ops.convert_to_tensor(start[:, None])
        left = np.repeat(np.array(self.lengths, "int32"), counts) - within
        self.left = ops.convert_to_tensor(left[:, None]) if np.any(left < _ROW_WIDTH) else None

    def join(self, tensors: Sequence[Tensor], padding: float) -> Tensor:
        """Return the tensors of the bundle as rows of one matrix, padded with `padding`."""
        parts = []
        for i, length in zip(self.members, self.lengths):
            part = ops.reshape(tensors[i], (-1,))
            if length % _ROW_WIDTH:
                end = ops.full((-length % _ROW_WIDTH,), padding, part.dtype)
                part = ops.concatenate([part, end])
            # Reshape before the concatenation, because XLA would otherwise store both the flat
            # tensor and the matrix in memory.
            parts.append(ops.reshape(part, (-1, _ROW_WIDTH)))
        return ops.concatenate(parts) if len(parts) > 1 else parts[0]

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Return the entries of each tensor in the bundle as a vector."""
        ends = [*self.first_rows[1:].tolist(), len(self.tensor)]
        rows = [matrix[begin:end] for begin, end in zip(self.first_rows.tolist(), ends)]
        return [ops.reshape(r, (-1,))[:n] for r, n in zip(rows, self.lengths)]


class _Ranking:
    """Ranking of all tensors together, or of each tensor separately, by a search for thresholds.

    Small tensors are joined into bundles, so that few operations are compiled. Large tensors are
    not copied. Scores that are not finite are replaced only in comparisons. Vectors such as
    thresholds and counts have one entry if all tensors are ranked together, and otherwise one entry
    per tensor.
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
        self.at_once = on_accelerator(self.scores[0])
        # Each step of a search launches many operations on PyTorch. Its last steps are replaced by
        # a sort, but not for groups of weights, because groups of several sizes fit in their order.
        self.sort_limit = _SORTED if self.at_once and keras.backend.backend() == "torch" else 0
        self.least, self.most, self.peaks = self._extremes()
        # Number of weights in the group of each entry. None if every entry is one weight.
        self.weights, self.total = [None] * len(self.bundles), self.lengths
        if sizes is not None and any(np.any(n != 1) for n in sizes):
            ones = [ops.convert_to_tensor(n, "int32") for n in sizes]
            self.weights = [b.join(ones, 0) for b in self.bundles]
            self.sort_limit = 0
            totals = [int(n.sum()) for n in sizes]
            self.total = ops.convert_to_tensor([sum(totals)] if together else totals, "int32")
        # If each tensor is ranked separately, its best entries are kept in any case.
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
                self.first_weights = self._reduce_by_tensor(first_weights, ops.sum, 0)

    def _extremes(self):
        """Return the smallest and the largest finite score, and the largest score of every row."""
        floors = [
            self._by_row(_least, "float32", s, b.left) for b, s in zip(self.bundles, self.scores)
        ]
        peaks = [self._by_row(_largest, "float32", s) for s in self.scores]
        usual = [ops.all(ops.abs(end) <= _LARGEST) for end in floors + peaks]
        if keras.backend.backend() != "torch":
            # A sum with a NaN is NaN on every backend. A minimum or maximum with a NaN is NaN only
            # on torch.
            pairs = zip(self.bundles, self.scores)
            sums = [self._by_row(_sum, "float32", s, b.left) for b, s in pairs]
            usual += [ops.all(ops.isfinite(total)) for total in sums]

        def bounds(floors, peaks):
            least = self._reduce_by_ranking(floors, ops.min, _LARGEST)
            return least, ops.maximum(self._reduce_by_ranking(peaks, ops.max, -_LARGEST), least)

        def of_finite():
            least, most = bounds(
                [
                    self._by_row(lambda s: _least(_clipped(s, _LARGEST)), "float32", s)
                    for s in self.scores
                ],
                [
                    self._by_row(lambda s: _largest(_clipped(s, -_LARGEST)), "float32", s)
                    for s in self.scores
                ],
            )
            peaks = [
                self._by_row(
                    lambda s, *ends: _largest(self._finite(s, *ends)),
                    "float32",
                    s,
                    self._to_rows(b, least),
                    self._to_rows(b, most),
                )
                for b, s in zip(self.bundles, self.scores)
            ]
            return least, most, peaks

        return ops.cond(
            ops.all(ops.stack(usual)), lambda: (*bounds(floors, peaks), peaks), of_finite
        )

    def first_entries(self):
        """Return the best entries of every tensor, as an argument for `_with_first`."""
        if max(self.first) > 1:
            flat = [part for b, s in zip(self.bundles, self.scores) for part in b.split(s)]
            each = _Ranking(flat, together=False)
            return each.masks(ops.convert_to_tensor(self.first, "int32"))
        found = []
        for b, s, peaks in zip(self.bundles, self.scores, self.peaks):
            numbers = ops.arange(len(b.tensor), dtype="int32")
            # Find the first row with the largest score of each tensor, and the column of this
            # score.
            tops = ops.max(ops.where(b.owner, peaks, -np.inf), axis=1, keepdims=True)
            tops = ops.logical_and(b.owner, peaks >= tops)
            rows = ops.min(ops.where(tops, numbers, len(b.tensor)), axis=1)
            best = self._finite(ops.take(s, rows, axis=0), self.least, self.most)
            place = ops.cast(ops.argmax(best, axis=1), "int32")
            is_row = numbers == ops.take(rows, b.local)
            found.append(ops.where(is_row, ops.take(place, b.local), -1)[:, None])
        return found

    @staticmethod
    def _finite(s, least, most):
        """Return scores with finite values in place of infinities and NaN."""
        return ops.where(s > least, ops.minimum(s, most), least)

    def masks(self, kept):
        low, high, below, above = self.thresholds(kept, self.sort_limit)
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

        if self._can_sort(kept, below, above):
            # Every ranking without a choice between scores gets two equal thresholds.
            low, high = ops.where(room > 0, low, high), ops.where(all_fit, low, high)
            return self._with_best(low, high, firsts, room)

        # Each branch returns all masks, because XLA would otherwise compile the branches once per
        # tensor.
        return ops.cond(ops.any(some_fit), some, none_or_all)

    def _with_ties(self, b, s, low, high, end, first):
        """Return a mask of the scores above `high` and of the tied scores before position `end`."""
        tied = self._above(b, s, low) & _first_columns(self._to_rows(b, end) - b.start)
        return _with_first(self._above(b, s, high) | tied, first)

    def _with_best(self, low, high, firsts, room):
        """Return masks of the scores above `high` and of the best `room` scores above `low`.

        Among equal scores, the earlier score is kept.
        """
        bundles = list(zip(self.bundles, self.scores, firsts))
        found = [_with_first(self._above(b, s, high), first) for b, s, first in bundles]
        places, tensor, order, _ = self._sorted_between(low, found)
        ranks = ops.arange(order.shape[0], dtype="int32")
        if not self.together:  # Subtract the rank of the first score of the same tensor.
            numbers = ops.arange(self.lengths.shape[0], dtype="int32")
            ranks = ranks - ops.take(ops.searchsorted(tensor, numbers), tensor)
            room = ops.take(room, tensor)
        kept = ops.scatter_update(ops.zeros_like(order, "bool"), order[:, None], ranks < room)
        ends = np.cumsum([len(part) for part in places]).tolist()
        flat = [
            ops.scatter_update(ops.reshape(mask, (-1,)), part[:, None], kept[end - len(part) : end])
            for mask, part, end in zip(found, places, ends)
        ]
        return [ops.reshape(mask, s.shape) for mask, s in zip(flat, self.scores)]

    def _sorted_between(self, low, above):
        """Find the scores above `low` that are not in the masks `above`, and sort each ranking.

        The number of these scores depends on the values, so this function cannot be compiled.

        Returns:
            The places of the scores in every bundle, the tensor of every score, the order of the
            scores from the best score to the last score of every ranking, and the scores. Equal
            scores keep their order.
        """
        between = []
        for b, s, mask in zip(self.bundles, self.scores, above):
            between.append(ops.reshape(self._between(b, s, low, mask), (-1,)))
        # All bundles are searched at once, because every search waits for the device.
        starts = np.cumsum([0, *(len(flags) for flags in between)])
        places = ops.nonzero(ops.concatenate(between))[0]
        ends = ops.searchsorted(places, ops.convert_to_tensor(starts, "int32"))
        ends = ops.convert_to_numpy(ends).tolist()
        parts = [places[i:j] - start for i, j, start in zip(ends, ends[1:], starts.tolist())]
        pairs = list(zip(self.bundles, self.scores, parts))
        values = ops.concatenate([ops.take(ops.reshape(s, (-1,)), part) for _, s, part in pairs])
        tensor = ops.concatenate([ops.take(b.tensor, part // _ROW_WIDTH) for b, _, part in pairs])
        ranking = ops.zeros_like(tensor) if self.together else tensor
        values = self._finite(values, ops.take(self.least, ranking), ops.take(self.most, ranking))
        # The other searches cannot tell these scores apart.
        tiny = ops.maximum(ops.sign(values), 0) * (_SMALLEST / 2)
        order = ops.argsort(-ops.where(ops.abs(values) < _SMALLEST, tiny, values))
        order = order if self.together else _by_tensor(order, tensor)
        return parts, tensor, order, values

    def threshold(self, kept):
        """Return the threshold of the only ranking."""
        low, high, below, above = self.thresholds(kept, self.sort_limit)
        if not self._can_sort(kept, below, above):
            return high[0]
        above_high = [self._above(b, s, high) for b, s in zip(self.bundles, self.scores)]
        *_, order, values = self._sorted_between(low, above_high)
        return ops.take(values, order[kept[0] - above[0]])

    def thresholds(self, kept, most=0):
        """Return `(low, high, below, above)`: two thresholds, and the number of weights above each.

        The number of weights whose score exceeds `high` is `above`, and the number of weights whose
        score exceeds `low` is `below`. All search algorithms maintain `above <= kept < below`.

        Args:
            kept: Number of weights to keep, per ranking.
            most: Number of scores that may remain between the thresholds, in all rankings together.
                Defaults to 0, which means that only tied scores remain.
        """
        gap = ops.maximum(ops.abs(self.least), 1e-30)
        # Many scores, such as the scores of pruned weights, may be equal to the smallest score.
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
        return self._by_false_position(kept, low, high, below, above, most)

    def _can_sort(self, kept, below, above) -> bool:
        """Return whether the scores of which a part is kept are few enough to be sorted."""
        return (
            bool(self.sort_limit) and 0 < int(self._pending(kept, below, above)) <= self.sort_limit
        )

    @staticmethod
    def _pending(kept, below, above):
        """Return the number of scores of which a part is kept, in all rankings together."""
        return ops.sum(ops.where(above < kept, below - above, 0))

    def _is_unfinished(self, kept, low, high, above):
        """Return, for every ranking, whether its search has to continue."""
        middle = low / 2 + high / 2
        between = (low < middle) & (middle < high) & (high - low > _SMALLEST)
        return (above < kept) & between & (high > self.least)

    def _by_false_position(self, kept, low, high, below, above, most):
        """Search with one candidate per step.

        The candidate is the threshold at which linear interpolation between both counts yields
        `kept` (false position). If one bound does not move for two steps, the difference between
        its count and `kept` is halved (Illinois variant). Every third step tries the midpoint,
        which limits the number of steps for any distribution of scores.

        Source: M. Dowell and P. Jarratt, BIT 11 (1971), Illinois variant of false position.
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
            # Many scores are 0, but bisection needs many steps to reach 0, so 0 is tried early.
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

        def continues(low, high, below, above, *_):
            unfinished = ops.any(open_(low, high, below, above))
            return unfinished & (self._pending(kept, below, above) > most) if most else unfinished

        many = self.count > most if most else self.together and self.count >= _SAMPLE_FROM
        sampled = self._sample_bounds(kept) if many else ()
        one, side = ops.ones(low.shape, "float32"), ops.zeros(low.shape, "int32")
        # Convert to float32, because `ops.where` would convert two Python numbers to
        # `keras.config.floatx()`.
        half, whole = (ops.convert_to_tensor(x, "float32") for x in (0.5, 1.0))
        turn = ops.convert_to_tensor(1, "int32")
        low, high, below, above, *_ = ops.while_loop(
            continues,
            narrow,
            (low, high, below, above, one, one, side, turn),
            maximum_iterations=_MAX_STEPS,
        )
        return low, high, below, above

    def _by_sections(self, kept, low, high, below, above):
        """Search with several candidates per step, which XLA counts in one pass over the scores.

        The candidates divide the range between the thresholds into sections of equal width. The
        candidates include the exact midpoint of the interval, so the search ends for any
        distribution of scores. The candidates also include 0, because many scores are 0.
        """

        def narrow(low, high, below, above):
            active = self._is_unfinished(kept, low, high, above)
            parts = [n / _SECTIONS for n in range(1, _SECTIONS) if 2 * n != _SECTIONS]
            candidates = [low + (high - low) * part for part in parts]
            candidates += [low / 2 + high / 2, ops.where(ops.equal(high, 0), -_SMALLEST, 0.0)]
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
        """Return two scores of a sample per ranking, which probably enclose the threshold."""
        row_stride, column_stride = _SAMPLE_STRIDES
        rows = [s[::row_stride, column_stride // 2 :: column_stride] for s in self.scores]
        sample = ops.concatenate([ops.reshape(r, (-1,)) for r in rows])
        if self.together:
            sample, first, size = ops.sort(sample), 0, sample.shape[0]
        else:
            tensors = [b.tensor[::row_stride] for b in self.bundles]
            tensor = np.concatenate([np.repeat(t, r.shape[1]) for t, r in zip(tensors, rows)])
            order = _by_tensor(ops.argsort(sample), tensor)
            sizes = np.bincount(tensor, minlength=self.lengths.shape[0])
            sample = ops.take(sample, order)
            first = ops.convert_to_tensor(np.cumsum(sizes) - sizes, "int32")
            size = ops.convert_to_tensor(sizes, "float32")
        part = ops.clip(ops.cast(kept, "float32") / ops.cast(self.total, "float32"), 0, 1)
        place, spread = size * (1 - part), 3 * ops.sqrt(size * part * (1 - part)) + 1
        ends = [ops.clip(end, 0, size - 1) for end in (place + spread, place - spread)]
        return [ops.take(sample, first + ops.cast(end, "int32")) for end in ends]

    def _last_ties(self, low, high, firsts, room):
        """Return, for every ranking, the position after the last tied entry that is kept.

        Args:
            low, high: Lower and upper threshold. Scores between these thresholds are tied.
            firsts: For each bundle, the entries that are always kept (see `_with_first`), or None.
            room: Number of tied weights that are kept.
        """
        found, offset = [], 0
        for b, s, weights, first in zip(self.bundles, self.scores, self.weights, firsts):
            above = _with_first(self._above(b, s, high), first)
            tied = self._between(b, s, low, above)
            counts = self._by_row(_count_kept, "int32", tied, weights)
            before = ops.cumsum(counts) - counts
            if self.together:
                first_rows, sizes, space = np.zeros(1), np.array([len(b.tensor)]), room[0]
                before, offset = before + offset, offset + ops.sum(counts)
            else:
                first_rows, sizes = b.first_rows, np.bincount(b.local)
                before = before - ops.take(ops.take(before, first_rows), b.local)
                space = ops.take(room, b.tensor)
            first_rows, sizes = (ops.convert_to_tensor(n, "int32") for n in (first_rows, sizes))
            # Find the row with the last tied entry that is kept, and the number of entries to keep
            # in this row.
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
        """Return a mask of the scores in a bundle above `low` that are not in the mask `above`."""
        between = self._above(b, s, low) & ~above
        return between if b.left is None else between & _first_columns(b.left)

    def _above(self, b, s, thresholds):
        """Return a mask of the scores in a bundle that exceed a threshold.

        A threshold below the smallest finite score keeps all scores, including NaN.
        """
        everything = self._to_rows(b, thresholds < self.least)
        return (s > self._to_rows(b, self._finite_cut(thresholds))) | everything

    def _finite_cut(self, thresholds):
        """Return infinity in place of thresholds that are not below the largest finite score."""
        return ops.where(thresholds < self.most, thresholds, np.inf)

    def _count_above(self, thresholds):
        """Return, for every ranking, how many weights exceed a threshold or are always kept."""
        count = self._count_scores(thresholds)
        # In each tensor, one of the two sets contains the other set.
        if self.first_weights is not None:
            count = ops.sum(ops.maximum(count, self.first_weights))[None]
        return ops.where(thresholds < self.least, self.total, count)

    def _count_scores(self, thresholds):
        """Return how many weights exceed a threshold, as one number per ranking or per tensor."""

        def of_rows(s, cut, weights):
            return _count_kept(s > cut, weights)

        cut = self._finite_cut(thresholds)
        counts = [
            self._by_row(of_rows, "int32", s, self._to_rows(b, cut), n)
            for b, s, n in zip(self.bundles, self.scores, self.weights)
        ]
        if self.first_weights is None:
            return self._reduce_by_ranking(counts, ops.sum, 0)
        return self._reduce_by_tensor(counts, ops.sum, 0)

    def _by_row(self, reduce, dtype, *matrices):
        """Apply a reduction to the rows of matrices. Pass other arguments on unchanged.

        On a CPU, slabs of rows are processed one after another. XLA and TensorFlow write a mask to
        memory, with four bytes per entry, before they reduce the mask. Slabs keep this memory
        small.
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

    def _to_rows(self, rows, values):
        """Repeat the value of each ranking for all rows of a bundle that belong to the ranking."""
        return values[0] if self.together else ops.take(values, rows.tensor)[:, None]

    def _reduce_by_ranking(self, values, reduce, neutral):
        """Reduce one value per row to one value per ranking.

        `neutral` replaces the entries of other tensors, and does not change the result of `reduce`.
        """
        if self.together:
            return reduce(ops.stack([reduce(v) for v in values]))[None]
        return self._reduce_by_tensor(values, reduce, neutral)

    def _reduce_by_tensor(self, values, reduce, neutral):
        """Reduce one value per row to one value per tensor."""
        return ops.concatenate(
            [reduce(ops.where(b.owner, v, neutral), axis=1) for b, v in zip(self.bundles, values)]
        )


def bundles(lengths: Sequence[int]) -> list[list[int]]:
    """Group neighboring small tensors into bundles, and return the indices of each bundle."""
    found: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if length > room:
            found.append([])
            room = _BUNDLE_SIZE
        found[-1].append(i)
        room -= length
    return found


def _least(s, left=None):
    return ops.min(s if left is None else ops.where(_first_columns(left), s, _LARGEST), axis=1)


def _largest(s):
    return ops.max(s, axis=1)


def _sum(s, left):
    return ops.sum(s if left is None else ops.where(_first_columns(left), s, 0.0), axis=1)


def _clipped(s, neutral):
    """Clip scores to +-1e38, and replace scores that are not finite by `neutral`."""
    return ops.where(ops.isfinite(s), ops.clip(s, -_LARGEST, _LARGEST), neutral)


def _by_tensor(order, tensor):
    """Group the positions in `order` by their tensor, without other changes of the order."""
    return ops.take(order, ops.argsort(ops.take(tensor, order)))


def _with_first(mask, first):
    """Set the best entries in a mask to True. `first` is a mask, or one column index per row."""
    if first is None:
        return mask
    return mask | (first if first.shape[1] == _ROW_WIDTH else _columns() == first)


def _count_first(first, weights):
    return _count_kept(_with_first(ops.zeros(weights.shape, "bool"), first), weights)


def _columns():
    return ops.arange(_ROW_WIDTH, dtype="int32")


def _first_columns(numbers):
    """Return a mask of the first entries in every row, with `numbers` entries per row."""
    return _columns() < numbers


def _count_kept(mask, weights):
    """Return the number of kept weights in every row."""
    if weights is None:
        return count_true(mask)
    return ops.sum(ops.where(mask, weights, 0), axis=1)
