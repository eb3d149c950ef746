"""Random numbers that are a function of where and when they are drawn, and of nothing else.

Replicas, resumed trainings and the three backends all draw the same. Numbers come from a hash of
(seed, step, index of the tensor, position), in int32 arithmetic, which wraps around everywhere.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_dst._backend.ranking import bundles

Tensor = Any

_SIZE = 1 << 20  # of the table of normal numbers
_NARROW, _WIDE = 1 << 8, 1 << 13  # its rows


def bits(*numbers: Tensor) -> Tensor:
    """Hash of integers or int32 tensors, broadcast against each other: an int32 tensor."""
    state = ops.zeros((), "int32")
    for number in numbers:
        state = _mixed(state * 31 + ops.cast(number, "int32") + 0x3C6EF372)
    return state


def _mixed(x):
    # The finaliser of MurmurHash3 (public domain): every bit of x changes about half of the result.
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        x = ops.bitwise_xor(x, _shifted(x, shift)) * factor
    return ops.bitwise_xor(x, _shifted(x, 16))


def _shifted(x, by):
    # A right shift that fills with zeros; int32's own fills with the sign.
    return ops.bitwise_and(ops.bitwise_right_shift(x, by), (1 << (32 - by)) - 1)


def uniform(shape: Sequence[int], *numbers: Tensor) -> Tensor:
    """Numbers in [0, 1), float32: a function of their position and of the integers given.

    Args:
        shape: of the result.
        numbers: integers or int32 scalars, such as seed, step and index of the tensor.

    Example:
        >>> keras_dst._backend.random.uniform((2, 3), 0, step, 7)
    """
    positions = ops.arange(math.prod(shape), dtype="int32")
    found = bits(bits(*numbers), positions)
    # 24 bits are what a float32 holds exactly.
    return ops.reshape(ops.cast(ops.bitwise_and(found, 0xFFFFFF), "float32"), shape) / (1 << 24)


def normal(shapes: Sequence[Sequence[int]], seed: int, step: Tensor) -> list[Tensor]:
    """Numbers from N(0, 1), float32, for tensors of these shapes, anew at every step.

    They are random rows of a table of a million numbers, which costs a copy instead of a draw. The
    rows of a large tensor are as wide as its own, of which there are fewer, and each of them is
    there with both signs: no weight is pushed one way for long.

    Args:
        shapes: of the results.
        seed: of the table and the rows.
        step: int32 scalar.

    Example:
        >>> (noise,) = keras_dst._backend.random.normal([(2, 3)], 0, step)
    """
    table = functools.cache(lambda mirrored: ops.convert_to_tensor(_table(seed, mirrored)))
    found = []
    # Small tensors together, so that there is little to compile; a large one is not written out.
    for members in bundles([math.prod(shape) for shape in shapes]):
        alone = len(members) == 1
        # XLA copies rows that become rows; what it has to cut elsewhere it looks up one by one.
        width = _width(shapes[members[0]]) if alone else _NARROW
        numbers = ops.reshape(table(alone), (-1, 1 << (width - 1).bit_length()))
        sizes = [math.prod(shapes[i]) for i in members]
        rows = [-(-size // width) for size in sizes]
        position = np.concatenate([np.arange(n) for n in rows])
        # Gathered, not sliced at a random place: for that XLA under TensorFlow compiles every step.
        chosen = bits(seed, step, np.repeat(members, rows), position)
        chosen = ops.bitwise_and(chosen, numbers.shape[0] - 1)
        drawn = ops.take(numbers[:, :width], chosen, axis=0)
        found += [
            ops.reshape(ops.reshape(drawn[end - n : end], (-1,))[:size], shapes[i])
            for i, end, n, size in zip(members, np.cumsum(rows), rows, sizes)
        ]
    return found


def _width(shape: Sequence[int]) -> int:
    """Of rows that fill a tensor exactly, from its last axis on, where these are in bounds."""
    widths = itertools.accumulate(reversed(tuple(shape)), operator.mul)
    return next((width for width in widths if _NARROW <= width <= _WIDE), _NARROW)


@functools.lru_cache(maxsize=4)
def _table(seed: int, mirrored: bool) -> np.ndarray:
    """Normal numbers; mirrored, the second half of them has the other signs of the first."""
    numbers = np.random.default_rng(seed).standard_normal(_SIZE, "float32")
    half = numbers[: _SIZE // 2]
    return np.concatenate([half, -half]) if mirrored else numbers
