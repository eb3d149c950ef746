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
    # Finalizer of MurmurHash3 (public domain): every bit of x changes about half of all bits.
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        x = ops.bitwise_xor(x, _shifted(x, shift)) * factor
    return ops.bitwise_xor(x, _shifted(x, 16))


def _shifted(x, by):
    # Shift the bits to the right and fill with zeros. The built-in right shift of int32 would fill
    # with the sign bit.
    return ops.bitwise_and(ops.bitwise_right_shift(x, by), (1 << (32 - by)) - 1)


def uniform(shape: Sequence[int], *numbers: Tensor) -> Tensor:
    """Return uniform random float32 numbers in [0, 1): a hash of `numbers` and the position.

    Args:
        shape: Shape of the result.
        numbers: Integers or int32 scalars, such as the seed, the step and the tensor's index.

    Example:
        >>> keras_dst._backend.random.uniform((2, 3), 0, step, 7)
    """
    positions = ops.arange(math.prod(shape), dtype="int32")
    found = bits(bits(*numbers), positions)
    # A float32 holds 24 bits exactly.
    return ops.reshape(ops.cast(ops.bitwise_and(found, 0xFFFFFF), "float32"), shape) / (1 << 24)


def normal(shapes: Sequence[Sequence[int]], seed: int, step: Tensor) -> list[Tensor]:
    """Return normally distributed random float32 numbers, which differ from step to step.

    The numbers are random rows of a table with a million entries, because copying rows is faster
    than generating numbers. For a large tensor, the rows of the table are as wide as the rows of
    the tensor. A table with wide rows has only a few rows. Each wide row is therefore stored with
    both signs, so that the mean noise of every weight is 0.

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
        # XLA copies whole rows if the rows of the table are as wide as the rows of the tensor.
        # If the widths differ, XLA copies each entry separately.
        width = _width(shapes[members[0]]) if alone else _NARROW
        numbers = ops.reshape(table(alone), (-1, 1 << (width - 1).bit_length()))
        sizes = [math.prod(shapes[i]) for i in members]
        rows = [-(-size // width) for size in sizes]
        position = np.concatenate([np.arange(n) for n in rows])
        # Gather the rows. Slices at random positions would be recompiled in every step by XLA under
        # TensorFlow.
        chosen = bits(seed, step, np.repeat(members, rows), position)
        chosen = ops.bitwise_and(chosen, numbers.shape[0] - 1)
        drawn = ops.take(numbers[:, :width], chosen, axis=0)
        found += [
            ops.reshape(ops.reshape(drawn[end - n : end], (-1,))[:size], shapes[i])
            for i, end, n, size in zip(members, np.cumsum(rows), rows, sizes)
        ]
    return found


def _width(shape: Sequence[int]) -> int:
    """Return a width of table rows from `_NARROW` to `_WIDE`, which divides the tensor's size if
    possible."""
    widths = itertools.accumulate(reversed(tuple(shape)), operator.mul)
    return next((width for width in widths if _NARROW <= width <= _WIDE), _NARROW)


@functools.lru_cache(maxsize=4)
def _table(seed: int, mirrored: bool) -> np.ndarray:
    """Return normal random numbers.

    If `mirrored` is True, the second half of the numbers is the negative of the first half.
    """
    numbers = np.random.default_rng(seed).standard_normal(_SIZE, "float32")
    half = numbers[: _SIZE // 2]
    return np.concatenate([half, -half]) if mirrored else numbers
