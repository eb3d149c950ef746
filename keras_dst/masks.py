"""Masks: pure functions from weights and scores to masks, the same on every backend.

A mask has the shape of its weight; 1 is kept, 0 is pruned. Everything here goes through
`keras.ops` and can run inside a compiled step.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

Tensor = Any

# Halvings of the score interval in `top_k` at the most; they stop where two floats are adjacent.
_HALVINGS = 300
_LARGEST = 1e38  # scores beyond it count as tied: there is room to calculate with them
_WIDTH = 1 << 10  # of the rows in which scores are ranked
_BUNDLE = 1 << 20  # tensors are joined up to this number of entries
_SLAB = 1 << 8  # rows that are counted at once


class Layout(NamedTuple):
    """Which axes of a weight are output units and which are input channels, counted from the end.

    The default is Keras's for Dense and Conv kernels: `(*window, in, out)`. Axes named in neither
    are the window of a convolution. `inputs=()` where an output unit sees one channel alone
    (depthwise).
    """

    outputs: tuple[int, ...] = (-1,)
    inputs: tuple[int, ...] = (-2,)


# Axes of Keras's Dense and Conv kernels.
KERNEL = Layout()


def _upstream(args: tuple, upstream: Tensor) -> Tensor:
    # torch passes the arguments and a keyword, TensorFlow and JAX the upstream gradient alone.
    return args[-1] if upstream is None else upstream


@ops.custom_gradient
def step(x: Tensor) -> Tensor:
    """Unit step, 1 where `x > 0` and 0 elsewhere, with a long-tailed derivative.

    The derivative handed to backpropagation is `2 - 4|x|` for `|x| <= 0.4`, `0.4` for
    `0.4 < |x| <= 1` and 0 beyond, so that a unit that is off still learns.

    Args:
        x: float tensor of any shape.

    Returns:
        A tensor of zeros and ones, of the shape and dtype of `x`.

    Example:
        >>> keras_dst.masks.step(keras.ops.array([-0.1, 0.0, 0.2]))  # [0, 0, 1]

    Source: arXiv 2005.06870, section 3.2 (estimator of arXiv 1802.08635).
    """

    def grad(*args, upstream=None):
        distance = ops.abs(x)
        slope = ops.where(distance <= 0.4, 2.0 - 4.0 * distance, 0.4)
        return _upstream(args, upstream) * ops.where(distance <= 1.0, slope, 0.0)

    return ops.cast(x > 0, x.dtype), grad


def straight_through_product(w: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """`w * mask`, whose gradient reaches the scores as if they were the mask.

    With `g` the gradient of the product: `dL/dw = g * mask`, `dL/dscores = g * w`, none for the
    mask.

    Args:
        w: float tensor.
        scores: what the mask was ranked from, finite; shape and dtype of `w`.
        mask: zeros and ones in the dtype of `w`; shape of `w`.

    Example:
        >>> keras_dst.masks.straight_through_product(w, scores, mask)

    Source: straight-through estimator, arXiv 1308.3432.
    """
    # The scores less themselves: exactly 0, with a derivative of 1.
    return w * (ops.stop_gradient(mask) + (scores - ops.stop_gradient(scores)))


# -- patterns ------------------------------------------------------------------------------------


class Pattern:
    """The shape in which weights are pruned: one by one, in blocks, N of M, or whole channels.

    A pattern splits a weight into groups that live or die together. `"unstructured"`: every
    weight; `"RxC"`, as `"1x4"`: blocks of R consecutive output units by C consecutive input
    channels; `"N:M"`, as `"2:4"`: N kept in every M consecutive input channels; `"channel"`: all
    the weights of an output unit. A dimension that the block does not divide ends in a smaller
    block.

    Args:
        name: one of the forms above.

    Raises:
        ValueError: for any other form.

    Example:
        >>> keras_dst.masks.Pattern("1x4").block((3, 3, 16, 8))
        (1, 1, 4, 1)
    """

    def __init__(self, name: str):
        self.name = name
        self.n_of_m: tuple[int, int] | None = None
        self._block: tuple[int, int] = (1, 1)
        text = name if isinstance(name, str) else ""
        if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
            self._block = (int(match[1]), int(match[2]))
        elif match := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text):
            self.n_of_m = (int(match[1]), int(match[2]))
            if self.n_of_m[0] >= self.n_of_m[1]:
                raise ValueError(f"An N:M pattern keeps N of M weights, N < M. Received: {name!r}")
        elif text not in ("unstructured", "channel"):
            raise ValueError(
                "pattern must be 'unstructured', blocks such as '1x4' (outputs x inputs), N:M such "
                f"as '2:4', or 'channel'. Received: {name!r}"
            )

    @property
    def grouped(self) -> bool:
        """Whether several weights share one bit of the mask."""
        return self.name == "channel" or math.prod(self._block) > 1

    def block(self, shape: Sequence[int], layout: Layout = KERNEL) -> tuple[int, ...]:
        """Length of a block along every axis of a weight of this shape."""
        lengths = [1] * len(shape)
        if self.name == "channel":
            outputs = {axis % len(shape) for axis in layout.outputs}
            return tuple(1 if axis in outputs else n for axis, n in enumerate(shape))
        for length, axes, what in (
            (self._block[0], layout.outputs, "an output"),
            (self._block[1] if not self.n_of_m else self.n_of_m[1], layout.inputs, "an input"),
        ):
            if length > 1:
                if not axes:
                    raise ValueError(
                        f"Pattern {self.name!r} needs {what} axis; this weight of shape "
                        f"{tuple(shape)} has none. Leave the layer out with `filters`, or use "
                        "'unstructured' or 'channel'."
                    )
                if not self.n_of_m:
                    lengths[axes[-1]] = min(length, shape[axes[-1]])
        return tuple(lengths)

    def scores(self, scores: Tensor, layout: Layout = KERNEL) -> Tensor:
        """Score of every group: the mean score of its weights."""
        return pool(scores, self.block(scores.shape, layout))

    def sizes(self, shape: Sequence[int], layout: Layout = KERNEL) -> np.ndarray:
        """Number of weights in every group (int32, the shape of `scores`)."""
        return _block_sizes(shape, self.block(shape, layout))

    def expand(self, groups: Tensor, shape: Sequence[int], layout: Layout = KERNEL) -> Tensor:
        """Mask of a weight from one value per group."""
        return spread(groups, self.block(shape, layout), shape)

    def __repr__(self):
        return f"Pattern({self.name!r})"


def _block_sizes(shape: Sequence[int], block: Sequence[int]) -> np.ndarray:
    sizes = np.ones([1] * len(shape), "int32")
    for axis, (n, b) in enumerate(zip(shape, block)):
        along = np.minimum(b, n - b * np.arange(-(-n // b)))
        sizes = sizes * along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return sizes.astype("int32")


def pool(values: Tensor, block: Sequence[int]) -> Tensor:
    """Mean over blocks: a tensor with `ceil(n / b)` entries along every axis.

    Args:
        values: float tensor with a static shape.
        block: length of a block along every axis; the last block of an axis may be smaller.

    Example:
        >>> keras_dst.masks.pool(keras.ops.ones((6, 2)), (4, 1))  # shape (2, 2)
    """
    if max(block, default=1) == 1:
        return values
    shape = tuple(values.shape)
    counts = [-(-n // b) for n, b in zip(shape, block)]
    padding = [(0, c * b - n) for n, b, c in zip(shape, block, counts)]
    if any(after for _, after in padding):
        values = ops.pad(values, padding)
    split = ops.reshape(values, [n for pair in zip(counts, block) for n in pair])
    total = ops.sum(split, axis=tuple(range(1, 2 * len(shape), 2)))
    return total / ops.convert_to_tensor(_block_sizes(shape, block), total.dtype)


def spread(groups: Tensor, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The reverse of `pool`: every entry of a block takes the block's value.

    Args:
        groups: tensor with one entry per block.
        block: length of a block along every axis.
        shape: shape of the result.
    """
    if max(block, default=1) == 1:
        return groups
    pairs = list(zip(groups.shape, block))
    split = ops.reshape(groups, [n for count, _ in pairs for n in (count, 1)])
    split = ops.broadcast_to(split, [n for pair in pairs for n in pair])
    whole = ops.reshape(split, [count * b for count, b in pairs])
    return whole[tuple(slice(0, n) for n in shape)]


# -- scores to masks -----------------------------------------------------------------------------


def top_k(
    scores: Sequence[Tensor],
    kept: Tensor,
    sizes: Sequence[np.ndarray] | None = None,
    first: Sequence[int] | None = None,
):
    """Masks that keep the weights of highest score, ranked over all tensors or in each of them.

    Ties go to the earlier tensor, then to the earlier position in it (C order), so that every
    backend keeps the same weights. The threshold is found by bisection, without a sort.

    Args:
        scores: float tensors, of any shapes. An infinite score ties with the largest or the
            smallest finite one, NaN with the smallest.
        kept: how many weights to keep: an integer scalar, for all tensors together, or a vector
            with a number for each of them.
        sizes: weights in every group where an entry stands for several (`Pattern.sizes`). Groups
            are then taken in order of their score while their sizes fit into `kept`.
        first: how many of the best entries of every tensor come before all others.

    Returns:
        A list of boolean tensors, one per tensor of scores.

    Example:
        >>> keras_dst.masks.top_k([keras.ops.array([0.1, 0.3, 0.2])], 2)  # [[False, True, True]]
    """
    kept = ops.cast(kept, "int32")
    ranking = _Ranking(scores, kept.ndim == 0, sizes)
    if first is not None:
        if max(first) == 1:
            ranking.put_first(ranking.best())
        else:
            each = _Ranking(scores, together=False)
            ranking.put_first(each.masks(ops.convert_to_tensor(first, "int32")))
    found = ranking.masks(kept if kept.ndim else kept[None])
    flat = [mask for rows, matrix in zip(ranking.bundles, found) for mask in rows.split(matrix)]
    return [ops.reshape(mask, tuple(s.shape)) for mask, s in zip(flat, scores)]


def kth(scores: Sequence[Tensor], kept: Tensor) -> Tensor:
    """A value that exactly `kept` scores exceed, ties aside: the threshold of `top_k`."""
    return _Ranking(scores, together=True).thresholds(ops.cast(kept, "int32")[None])[1][0]


class _Rows:
    """Some of the tensors that are ranked, as the rows of a matrix; a tensor begins a new row.

    Attributes, of every row:
        tensor: number of the tensor it belongs to.
        owner: for each of the tensors here, whether it is the row's.
        start: position of its first entry, a column.
        left: entries of its tensor from its start on, a column; None where every row is full.
    """

    def __init__(self, members: Sequence[int], lengths: Sequence[int], starts: Sequence[int]):
        self.members, self.lengths = members, [lengths[i] for i in members]
        counts = [-(-n // _WIDTH) for n in self.lengths]
        within = np.concatenate([_WIDTH * np.arange(n, dtype="int32") for n in counts])
        self.tensor = np.repeat(np.array(members, "int32"), counts)
        self.owner = self.tensor == np.array(members)[:, None]
        start = within + np.repeat(np.array([starts[i] for i in members], "int32"), counts)
        self.start = ops.convert_to_tensor(start[:, None])
        left = np.repeat(np.array(self.lengths, "int32"), counts) - within
        self.left = ops.convert_to_tensor(left[:, None]) if np.any(left < _WIDTH) else None

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        parts = []
        for i, length in zip(self.members, self.lengths):
            parts.append(ops.reshape(tensors[i], (-1,)))
            if length % _WIDTH:
                parts.append(ops.zeros(-length % _WIDTH, parts[-1].dtype))
        flat = ops.concatenate(parts) if len(parts) > 1 else parts[0]
        return ops.reshape(flat, (-1, _WIDTH))

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The entries of every tensor, flat."""
        flat = ops.reshape(matrix, (-1,))
        begins = np.flatnonzero(np.diff(self.tensor, prepend=-1)) * _WIDTH
        return [flat[begin : begin + n] for begin, n in zip(begins.tolist(), self.lengths)]


class _Ranking:
    """Scores of which a number is kept, of all together or of each tensor; bisected in one loop.

    Small tensors are joined, so that there are few operations to compile; large ones are not, as
    a copy of all the weights takes its memory. Values are kept per ranking: one, or one for each
    tensor.
    """

    def __init__(self, scores, together, sizes=None):
        self.together = together
        lengths = [math.prod(s.shape) for s in scores]
        starts = [0, *np.cumsum(lengths)[:-1].tolist()] if together else [0] * len(lengths)
        self.lengths = ops.convert_to_tensor([sum(lengths)] if together else lengths, "int32")
        self.bundles = [_Rows(members, lengths, starts) for members in _bundles(lengths)]
        scores = [ops.cast(s, "float32") for s in scores]
        self._take([b.join(scores) for b in self.bundles])
        # How many weights an entry stands for; None: one.
        self.weights = [None] * len(self.bundles)
        if sizes is not None and any(np.any(n != 1) for n in sizes):
            ones = [ops.convert_to_tensor(n, "int32") for n in sizes]
            self.weights = [b.join(ones) for b in self.bundles]

    def _take(self, scores):
        """Infinities tie with the largest and smallest finite score, NaN with the smallest."""
        # One after the other: the second waits for the memory of the first.
        nothing = ops.full(self.lengths.shape, _LARGEST)
        self.least = self._extreme(ops.min, scores, nothing)
        self.most = self._extreme(ops.max, scores, self.least)
        self.scores = []
        for b, s in zip(self.bundles, scores):
            most, least = self._each(b, self.most), self._each(b, self.least)
            s = ops.where(
                ops.isfinite(s), ops.clip(s, -_LARGEST, _LARGEST), ops.where(s > 0, most, least)
            )
            self.scores.append(s if b.left is None else ops.where(_within(b.left), s, -np.inf))

    def _extreme(self, reduce, scores, nothing):
        """The least or the largest finite score; `nothing` where there is none."""

        def of_rows(s, nothing, left):
            real = ops.isfinite(s)
            if left is not None:
                real = ops.logical_and(real, _within(left))
            return reduce(ops.where(real, ops.clip(s, -_LARGEST, _LARGEST), nothing), axis=1)

        found = [
            _by_row(of_rows, "float32", s, self._each(b, nothing), b.left)
            for b, s in zip(self.bundles, scores)
        ]
        return self._gather(found, reduce, _LARGEST if reduce is ops.min else -_LARGEST)

    def best(self):
        """Masks of the first of the best entries of every tensor."""
        most = [ops.max(s, axis=1) for s in self.scores]
        tops = self._by_tensor(most, ops.max, -np.inf)
        last = np.iinfo("int32").max
        first = []
        for b, s, m in zip(self.bundles, self.scores, most):
            place = _by_row(lambda s: ops.cast(ops.argmax(s, axis=1), "int32"), "int32", s)
            is_top = m >= ops.take(tops, b.tensor)
            first.append(ops.where(is_top, b.start[:, 0] + place, last))
        first = self._by_tensor(first, ops.min, last)
        return [_columns() == self._of(b, first) - b.start for b in self.bundles]

    def put_first(self, masks):
        """Raise some scores above all others."""
        size = ops.maximum(ops.max(ops.abs(self.most)), ops.max(ops.abs(self.least)))
        self.scores = [ops.where(m, s + 2 * size + 1, s) for m, s in zip(masks, self.scores)]
        self.most = self.most + 2 * size + 1

    def masks(self, kept):
        low, high = self.thresholds(kept)
        above = self._above(high)
        tied = [
            ops.logical_and(more, ops.logical_not(a)) for more, a in zip(self._above(low), above)
        ]
        room, ties = kept - self._count(above), self._count(tied)
        end = ops.where(ties <= room, self.lengths, 0)
        some_fit = ops.logical_and(room > 0, ties > room)
        end = ops.cond(
            ops.any(some_fit), lambda: self._last_ties(tied, room, some_fit, end), lambda: end
        )
        return [ops.logical_or(a, t) for a, t in zip(above, self._before(tied, end))]

    def thresholds(self, kept):
        """`(low, high)`: no more than `kept` weights score above `high`, more do above `low`."""
        low = self.least - ops.maximum(ops.abs(self.least), 1.0)
        high = ops.where(self._count(self._above(low)) <= kept, low, self.most)

        def open_(low, high, count):
            middle = low / 2 + high / 2
            between = ops.logical_and(low < middle, middle < high)
            return ops.logical_and(count < kept, between)

        def halve(low, high, count):
            middle = low / 2 + high / 2
            above = self._count(self._above(middle))
            fits = above <= kept
            active = open_(low, high, count)
            down, up = ops.logical_and(active, fits), ops.logical_and(active, ops.logical_not(fits))
            return (
                ops.where(up, middle, low),
                ops.where(down, middle, high),
                ops.where(down, above, count),
            )

        low, high, _ = ops.while_loop(
            lambda *state: ops.any(open_(*state)),
            halve,
            (low, high, self._count(self._above(high))),
            maximum_iterations=_HALVINGS,
        )
        return low, high

    def _last_ties(self, tied, room, some_fit, end):
        """Up to which positions the tied weights fit into `room`, where some do; else `end`."""

        def halve(low, high):  # what lies before `low` fits, what lies before `high` does not
            middle = low + (high - low) // 2
            good = self._count(self._before(tied, middle)) <= room
            active = high - low > 1
            down, up = ops.logical_and(active, ops.logical_not(good)), ops.logical_and(active, good)
            return ops.where(up, middle, low), ops.where(down, middle, high)

        low, _ = ops.while_loop(
            lambda low, high: ops.any(high - low > 1),
            halve,
            (ops.where(some_fit, 0, end), ops.where(some_fit, self.lengths, end + 1)),
        )
        return low

    def _above(self, thresholds):
        return [s > self._each(b, thresholds) for b, s in zip(self.bundles, self.scores)]

    def _before(self, masks, ends):
        """The parts of masks that lie before these positions."""
        return [
            ops.logical_and(mask, _within(self._each(b, ends) - b.start))
            for b, mask in zip(self.bundles, masks)
        ]

    def _count(self, masks):
        counts = [_by_row(_weigh, "int32", mask, n) for mask, n in zip(masks, self.weights)]
        return self._gather(counts, ops.sum, 0)

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


def _bundles(lengths: Sequence[int]) -> list[list[int]]:
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


def n_of_m(scores: Tensor, n: int, m: int, axis: int = -2) -> Tensor:
    """Mask that keeps the `n` highest scores in every `m` consecutive entries along an axis.

    Ties go to the earlier entry. An axis that `m` does not divide ends in a shorter group, of
    which up to `n` entries are kept.

    Args:
        scores: float tensor with a static shape.
        n: entries kept in a group.
        m: length of a group.
        axis: the axis the groups run along, by default the input axis of a Keras kernel.

    Returns:
        A boolean tensor of the shape of `scores`.

    Example:
        >>> keras_dst.masks.n_of_m(keras.ops.array([[3.0], [1.0], [2.0], [4.0]]), 2, 4)

    Source: arXiv 2102.04010.
    """
    shape = tuple(scores.shape)
    axis %= len(shape)
    length = shape[axis]
    lowest = float(np.finfo("float32").min)
    scores = ops.cast(scores, "float32")
    scores = ops.where(ops.isnan(scores), lowest, scores)
    padding = [(0, -length % m if a == axis else 0) for a in range(len(shape))]
    scores = ops.pad(scores, padding, constant_values=-np.inf)
    grouped = ops.reshape(scores, (*shape[:axis], -1, m, *shape[axis + 1 :]))
    entries = [ops.take(grouped, i, axis=axis + 1) for i in range(m)]
    kept = []
    for i, mine in enumerate(entries):
        ahead = [
            other >= mine if j < i else other > mine for j, other in enumerate(entries) if j != i
        ]
        kept.append(sum(ops.cast(a, "int32") for a in ahead) < n)
    mask = ops.reshape(ops.stack(kept, axis=axis + 1), (*shape[:axis], -1, *shape[axis + 1 :]))
    return mask[tuple(slice(0, length) if a == axis else slice(None) for a in range(len(shape)))]
