"""Matrices of scores, in which every row stores scores of a single tensor.

Small tensors are joined into bundles (one matrix for several tensors), so that few operations are
compiled. Large tensors are not copied.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_dst._backend import numbers

Tensor = Any

# All scores above `LARGEST` count as tied. The sum of two scores therefore does not overflow.
LARGEST = 1e38
# Two scores count as tied if they differ by less than `SMALLEST`, because some backends flush tiny
# differences to 0.
SMALLEST = 2.0**-126
ROW_WIDTH = 1 << 10  # Number of scores in a row of a matrix.
_BUNDLE_SIZE = 1 << 20  # Largest number of scores in one matrix of small tensors.


class Rows:
    """Index arrays of a matrix that stores several tensors (a bundle). Each tensor starts in a new
    row of the matrix, so every row stores entries of a single tensor.

    Attributes:
        tensor: For each matrix row, the index of the tensor in this row, counted among all tensors.
        local: For each matrix row, the index of the tensor in this row, counted among the tensors
            of the bundle.
        owner: Boolean matrix. `owner[i, j]` is True if row j of the matrix stores entries of tensor
            i of the bundle.
        start: For each matrix row, the position of the row's first entry within its tensor. If all
            tensors are ranked together, positions are counted in the concatenation of all tensors.
        left: For each matrix row, the number of entries from the start of the row to the end of its
            tensor. `left` is None if every row is full.
        first_rows: For each tensor of the bundle, the index of the first matrix row that stores the
            tensor.
    """

    def __init__(self, members: Sequence[int], lengths: Sequence[int], starts: Sequence[int]):
        self.members, self.lengths = members, [lengths[i] for i in members]
        counts = [-(-n // ROW_WIDTH) for n in self.lengths]
        within = np.concatenate([ROW_WIDTH * np.arange(n, dtype="int32") for n in counts])
        tensor = np.repeat(np.array(members, "int32"), counts)
        local = tensor - np.int32(members[0])
        self.sizes = np.bincount(local)
        self.first_rows = np.flatnonzero(np.diff(tensor, prepend=-1)).astype("int32")
        self.tensor, self.local = ops.convert_to_tensor(tensor), ops.convert_to_tensor(local)
        self.owner = ops.convert_to_tensor(tensor == np.array(members)[:, None])
        start = within + np.repeat(np.array([starts[i] for i in members], "int32"), counts)
        self.start = ops.convert_to_tensor(start[:, None])
        left = np.repeat(np.array(self.lengths, "int32"), counts) - within
        self.left = ops.convert_to_tensor(left[:, None]) if np.any(left < ROW_WIDTH) else None

    def join(self, tensors: Sequence[Tensor], padding: float) -> Tensor:
        """Return a matrix with the entries of all tensors of the bundle. The number `padding` fills
        the rest of the last matrix row of each tensor."""
        parts = []
        for i, length in zip(self.members, self.lengths):
            part = ops.reshape(tensors[i], (-1,))
            if length % ROW_WIDTH:
                # Use `ops.pad`, because `ops.full` would make torch read the padding value from the
                # GPU, and the host would wait.
                part = ops.pad(part, [(0, -length % ROW_WIDTH)], constant_values=padding)
            # Reshape before the concatenation, because XLA would otherwise store both the flat
            # tensor and the matrix in memory.
            parts.append(ops.reshape(part, (-1, ROW_WIDTH)))
        return ops.concatenate(parts) if len(parts) > 1 else parts[0]

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Return one vector per tensor of the bundle, with the entries of the tensor."""
        ends = [*self.first_rows[1:].tolist(), self.tensor.shape[0]]
        rows = [matrix[begin:end] for begin, end in zip(self.first_rows.tolist(), ends)]
        return [ops.reshape(r, (-1,))[:n] for r, n in zip(rows, self.lengths)]


class Scores:
    """Scores of several tensors, with a single ranking of all scores or one ranking per tensor.

    If `together` is True, there is a single ranking of all scores. Otherwise, each tensor has its
    own ranking. Thresholds and counts are vectors with one entry per ranking.

    Attributes:
        together: True if all tensors are ranked together, False if each tensor is ranked
            separately.
        count: Total number of scores in all tensors.
        lengths: Int32 vector with the number of scores in each ranking.
        bundles: List with one `Rows` object for each matrix in `scores`.
        scores: List of float32 matrices. Each matrix stores the scores of one bundle of tensors. If
            a tensor does not fill its last row, the row is padded with minus infinity.
    """

    def __init__(self, scores: Sequence[Tensor], together: bool):
        self.together = together
        lengths = [math.prod(s.shape) for s in scores]
        self.count = sum(lengths)
        if numbers.is_plain(scores[0]):
            found = _kept_on(str(scores[0].device), tuple(lengths), together)
        else:  # Each traced function creates its own tensors.
            found = _arranged(lengths, together)
        self.lengths, self.bundles = found
        scores = [ops.cast(s, "float32") for s in scores]
        self.scores = [b.join(scores, -np.inf) for b in self.bundles]

    def split(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Return one vector per tensor, with the entries of the tensor.

        `matrices` is a list of matrices with the same shapes as the matrices in `scores`.
        """
        return [part for b, matrix in zip(self.bundles, matrices) for part in b.split(matrix)]

    def best_entries(self, peaks: Sequence[Tensor], finite=lambda s: s):
        """For each bundle, yield the row indices and the column indices of the highest scores of
        its tensors.

        If several entries of a tensor have the highest score, the first entry is chosen.

        Args:
            peaks: For each matrix in `scores`, a vector with the largest score of every matrix row.
            finite: Function that replaces infinite and NaN scores by finite scores.
        """
        for b, s, highest in zip(self.bundles, self.scores, peaks):
            count = b.tensor.shape[0]
            tops = numbers.where(b.owner, highest, -math.inf)
            tops = ops.logical_and(b.owner, highest >= ops.max(tops, axis=1, keepdims=True))
            places = ops.arange(count, dtype="int32")
            # If a tensor contains NaN, its highest score is NaN, and no row has an equal score. The
            # function then returns the index of the last row, which is always a valid index.
            rows = ops.min(numbers.where(tops, places, count - 1), axis=1)
            best = finite(ops.take(s, rows, axis=0))
            yield rows, ops.cast(ops.argmax(best, axis=1), "int32")

    def to_rows(self, rows, values):
        """Expand a vector with one value per ranking to one value for each row of a bundle."""
        return values[0] if self.together else ops.take(values, rows.tensor)[:, None]

    def reduce_by_ranking(self, values, reduce, neutral):
        """Combine the values of all matrix rows, such as counts, to one value for each ranking.

        When the function reduces the rows of one tensor, `neutral` replaces the values of all other
        rows. `neutral` must be a value that does not change the result of `reduce`, such as 0 for a
        sum.
        """
        if self.together:
            return reduce(ops.stack([reduce(v) for v in values]))[None]
        return self.reduce_by_tensor(values, reduce, neutral)

    def reduce_by_tensor(self, values, reduce, neutral):
        """Reduce the values of all matrix rows, such as counts, to one value per tensor."""
        return ops.concatenate(
            [
                reduce(numbers.where(b.owner, v, neutral), axis=1)
                for b, v in zip(self.bundles, values)
            ]
        )


def _arranged(lengths, together):
    """Return the number of scores in each ranking, and a list of `Rows` objects. Each `Rows` object
    describes one bundle of tensors."""
    starts = [0, *np.cumsum(lengths)[:-1].tolist()] if together else [0] * len(lengths)
    of_rankings = ops.convert_to_tensor([sum(lengths)] if together else list(lengths), "int32")
    return of_rankings, [Rows(members, lengths, starts) for members in bundles(lengths)]


@functools.lru_cache(maxsize=64)
def _kept_on(device, lengths, together):
    """Return `_arranged(lengths, together)`, and keep the tensors of the result on the device for
    later updates.

    Without this cache, each mask update would copy these tensors to the GPU, and the host would
    wait.
    """
    return _arranged(lengths, together)


def bundles(lengths: Sequence[int]) -> list[list[int]]:
    """Join consecutive small tensors into bundles. Return, for each bundle, the list of the indices
    of its tensors."""
    found: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if length > room:
            found.append([])
            room = _BUNDLE_SIZE
        found[-1].append(i)
        room -= length
    return found


def columns():
    """Return the column indices of a matrix of scores, as an int32 vector."""
    return ops.arange(ROW_WIDTH, dtype="int32")


def first_columns(numbers):
    """Return a boolean matrix. Row i is True in its first `numbers[i]` columns."""
    return columns() < numbers
