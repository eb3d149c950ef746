"""Random numbers that depend only on the seed, the training step, the tensor and the position.

Replicas, resumed training runs and the three backends therefore draw the same numbers. Each number
is a hash of (seed, step, index of the tensor, position in the tensor). The hash uses int32
arithmetic, which overflows in the same way on all backends.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_dst._backend.numbers import constant, is_plain
from keras_dst._backend.rows import bundles

Tensor = Any

_SIZE = 1 << 20  # Number of entries in the table of normal random numbers.
_NARROW, _WIDE = 1 << 8, 1 << 13  # Smallest and largest row width of the table of random numbers.


def bits(*numbers: Tensor) -> Tensor:
    """Return an int32 hash of integers or int32 tensors. The tensors are broadcast."""
    state = ops.zeros((), "int32")
    for number in numbers:
        if isinstance(number, (int, np.ndarray)):
            number = constant(number, "int32", state)
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
    mask = constant((1 << (32 - by)) - 1, "int32", x)
    return ops.bitwise_and(ops.bitwise_right_shift(x, constant(by, "int32", x)), mask)


def uniform(shape: Sequence[int], *numbers: Tensor) -> Tensor:
    """Return float32 random numbers from a uniform distribution in [0, 1). Each random number is a
    hash of the arguments `numbers` and of its position in the result.

    Args:
        shape: Shape of the result.
        numbers: Integers or int32 scalars that are hashed, such as the seed, the step and the index
            of the tensor.

    Example:
        >>> keras_dst._backend.random.uniform((2, 3), 0, step, 7)
    """
    positions = ops.arange(math.prod(shape), dtype="int32")
    found = bits(bits(*numbers), positions)
    # A float32 represents every integer of 24 bits exactly.
    found = ops.bitwise_and(found, constant(0xFFFFFF, "int32", found))
    return ops.reshape(ops.cast(found, "float32"), shape) / (1 << 24)


def normal(shapes: Sequence[Sequence[int]], seed: int, step: Tensor) -> list[Tensor]:
    """Return normally distributed float32 random numbers. The numbers differ from step to step.

    The function copies randomly chosen rows of a table with about a million random numbers. Copying
    rows is faster than computing random numbers. The table for a large tensor has rows of the same
    width as the tensor, and therefore only a few rows. This table contains every row twice, with
    opposite signs, so that the noise of every weight has a mean of 0.

    Args:
        shapes: Shapes of the results.
        seed: Seed of the random numbers in the table, and of the random choice of rows.
        step: Number of the training step, as an int32 scalar.

    Example:
        >>> (noise,) = keras_dst._backend.random.normal([(2, 3)], 0, step)
    """

    @functools.cache
    def table(mirrored):
        if is_plain(step):
            return _table_on_device(seed, mirrored, str(step.device))
        return ops.convert_to_tensor(_table(seed, mirrored))

    found = []
    # Small tensors are concatenated, so that few operations are compiled. Large tensors are not
    # copied.
    for members in bundles([math.prod(shape) for shape in shapes]):
        alone = len(members) == 1
        # XLA copies whole rows only if the rows of the table are as wide as the rows of the tensor.
        # If the rows of the table have another width, XLA copies each number separately.
        width = _width(shapes[members[0]]) if alone else _NARROW
        numbers = ops.reshape(table(alone), (-1, 1 << (width - 1).bit_length()))
        sizes = [math.prod(shapes[i]) for i in members]
        rows = [-(-size // width) for size in sizes]
        position = np.concatenate([np.arange(n) for n in rows])
        # Copy the rows with `ops.take`, not with slices. On TensorFlow, slices at random positions
        # would make XLA compile again in every step.
        chosen = bits(seed, step, np.repeat(members, rows), position)
        chosen = ops.bitwise_and(chosen, constant(numbers.shape[0] - 1, "int32", chosen))
        drawn = ops.take(numbers[:, :width], chosen, axis=0)
        found += [
            ops.reshape(ops.reshape(drawn[end - n : end], (-1,))[:size], shapes[i])
            for i, end, n, size in zip(members, np.cumsum(rows), rows, sizes)
        ]
    return found


def _width(shape: Sequence[int]) -> int:
    """Return the row width of the table for a tensor with the given shape, from `_NARROW` to
    `_WIDE`. If possible, the size of the tensor is a multiple of this width."""
    widths = itertools.accumulate(reversed(tuple(shape)), operator.mul)
    return next((width for width in widths if _NARROW <= width <= _WIDE), _NARROW)


@functools.lru_cache(maxsize=4)
def _table_on_device(seed: int, mirrored: bool, device: str) -> Tensor:
    """Return the table as a torch tensor. The tensor is stored, so that a training step does not
    copy the table to the device again."""
    return ops.convert_to_tensor(_table(seed, mirrored))


@functools.lru_cache(maxsize=4)
def _table(seed: int, mirrored: bool) -> np.ndarray:
    """Return the table of normal random numbers, as a vector.

    If `mirrored` is True, the second half of the table is the first half with opposite signs.
    """
    numbers = np.random.default_rng(seed).standard_normal(_SIZE, "float32")
    half = numbers[: _SIZE // 2]
    return np.concatenate([half, -half]) if mirrored else numbers
