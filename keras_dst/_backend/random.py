"""Random numbers that depend only on the seed, the step, the tensor and the position.

Replicas, resumed training runs and the three backends draw the same numbers. The numbers are a hash
of (seed, step, index of the tensor, position) in int32 arithmetic, which overflows in the same way
on all backends.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_dst._backend.rows import bundles

Tensor = Any

_SIZE = 1 << 20  # Number of entries in the table of normally distributed numbers.
_NARROW, _WIDE = 1 << 8, 1 << 13  # Smallest and largest width of the table's rows.


def bits(*numbers: Tensor) -> Tensor:
    """Return an int32 hash of integers or int32 tensors. The tensors are broadcast."""
    state = ops.zeros((), "int32")
    for number in numbers:
        state = _mixed(state * 31 + ops.cast(number, "int32") + 0x3C6EF372)
    return state


def _mixed(x):
    # Finalizer of the hash MurmurHash3 (public domain): changing one bit of x changes about half of
    # all bits of the result.
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        x = ops.bitwise_xor(x, _shifted(x, shift)) * factor
    return ops.bitwise_xor(x, _shifted(x, 16))


def _shifted(x, by):
    # Shift the bits to the right, and fill the free bits on the left with zeros. The built-in right
    # shift of int32 would fill the free bits with the sign bit.
    return ops.bitwise_and(ops.bitwise_right_shift(x, by), (1 << (32 - by)) - 1)


def uniform(shape: Sequence[int], *numbers: Tensor) -> Tensor:
    """Return float32 random numbers from a uniform distribution in [0, 1). Each number is a hash of
    `numbers` and its position.

    Args:
        shape: Shape of the result.
        numbers: Integers or int32 scalars, such as the seed, the step and the tensor's index.

    Example:
        >>> keras_dst._backend.random.uniform((2, 3), 0, step, 7)
    """
    positions = ops.arange(math.prod(shape), dtype="int32")
    found = bits(bits(*numbers), positions)
    # A float32 represents every integer of 24 bits exactly.
    return ops.reshape(ops.cast(ops.bitwise_and(found, 0xFFFFFF), "float32"), shape) / (1 << 24)


def normal(shapes: Sequence[Sequence[int]], seed: int, step: Tensor) -> list[Tensor]:
    """Return float32 random numbers from a normal distribution, which differ from step to step.

    The numbers are rows of a table, chosen at random. The table has about a million entries.
    Copying rows is faster than computing random numbers. For a large tensor, the rows of the table
    and the rows of the tensor have the same width. A table with wide rows has few rows. If the rows
    are wide, the table therefore contains each row with both signs, so that the mean noise of every
    weight is 0.

    Args:
        shapes: Shapes of the results.
        seed: Seed of the numbers in the table and of the random choice of its rows.
        step: Number of the step, an int32 scalar.

    Example:
        >>> (noise,) = keras_dst._backend.random.normal([(2, 3)], 0, step)
    """
    table = functools.cache(lambda mirrored: ops.convert_to_tensor(_table(seed, mirrored)))
    found = []
    # Small tensors are concatenated, so that few operations are compiled. Large tensors are not
    # copied.
    for members in bundles([math.prod(shape) for shape in shapes]):
        alone = len(members) == 1
        # If the rows of the table and the rows of the tensor have the same width, XLA copies whole
        # rows. If the rows have different widths, XLA copies each entry separately.
        width = _width(shapes[members[0]]) if alone else _NARROW
        numbers = ops.reshape(table(alone), (-1, 1 << (width - 1).bit_length()))
        sizes = [math.prod(shapes[i]) for i in members]
        rows = [-(-size // width) for size in sizes]
        position = np.concatenate([np.arange(n) for n in rows])
        # Gather the rows. Under TensorFlow, XLA would recompile slices at random positions in every
        # step.
        chosen = bits(seed, step, np.repeat(members, rows), position)
        chosen = ops.bitwise_and(chosen, numbers.shape[0] - 1)
        drawn = ops.take(numbers[:, :width], chosen, axis=0)
        found += [
            ops.reshape(ops.reshape(drawn[end - n : end], (-1,))[:size], shapes[i])
            for i, end, n, size in zip(members, np.cumsum(rows), rows, sizes)
        ]
    return found


def _width(shape: Sequence[int]) -> int:
    """Return the width of the table's rows, a number from `_NARROW` to `_WIDE`. If possible, the
    width divides the size of the tensor."""
    widths = itertools.accumulate(reversed(tuple(shape)), operator.mul)
    return next((width for width in widths if _NARROW <= width <= _WIDE), _NARROW)


@functools.lru_cache(maxsize=4)
def _table(seed: int, mirrored: bool) -> np.ndarray:
    """Return normal random numbers.

    If `mirrored` is True, the second half of the table is the first half with opposite signs.
    """
    numbers = np.random.default_rng(seed).standard_normal(_SIZE, "float32")
    half = numbers[: _SIZE // 2]
    return np.concatenate([half, -half]) if mirrored else numbers
