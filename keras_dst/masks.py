"""Masks: pure functions from weights and scores to masks, the same on every backend.

A mask has the shape of its weight; 1 is kept, 0 is pruned. Everything here goes through
`keras.ops` and can run inside a compiled step.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_dst._backend import jit
from keras_dst._backend.ranking import kth, top_k
from keras_dst._utils.validation import check_integer

__all__ = [
    "Layout",
    "Pattern",
    "kth",
    "masked",
    "n_of_m",
    "step",
    "stop_gradient_where",
    "straight_through_product",
    "top_k",
]

Tensor = Any


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


def masked(w: Tensor, mask: Tensor) -> Tensor:
    """The entries of `w` where the boolean mask is true, exact zeros elsewhere.

    Args:
        w: tensor of any type.
        mask: boolean tensor of its shape.

    Example:
        >>> keras_dst.masks.masked(keras.ops.array([1.0, 2.0]), keras.ops.array([True, False]))
    """
    if keras.backend.backend() == "torch":
        return jit.masked(w, mask)
    return ops.where(mask, w, 0)


def ones(mask: Tensor, dtype) -> Tensor:
    """A boolean mask as zeros and ones of another type.

    Example:
        >>> keras_dst.masks.ones(keras.ops.array([True, False]), "float32")
    """
    # By way of bytes, of which torch makes floats in a fifth of the time.
    return ops.cast(ops.cast(mask, "uint8"), dtype)


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
        slope = masked(ops.maximum(2.0 - 4.0 * distance, 0.4), distance <= 1.0)
        return _upstream(args, upstream) * slope

    return ones(x > 0, x.dtype), grad


def stop_gradient_where(mask: Tensor, w: Tensor) -> Tensor:
    """`w`, whose gradient is 0 where the mask is true.

    Args:
        mask: boolean tensor, of the shape of `w`.
        w: float tensor.

    Example:
        >>> keras_dst.masks.stop_gradient_where(mask, w)
    """
    w, mask = (ops.reshape(v, ops.shape(v)) for v in (w, mask))  # as in `straight_through_product`

    @ops.custom_gradient
    def identity(w, mask):
        def grad(*args, upstream=None):
            return masked(_upstream(args, upstream), ops.logical_not(mask)), None

        return w, grad

    return identity(w, mask)


def straight_through_product(w: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """`w * mask`, whose gradient reaches the scores as if they were the mask.

    With `g` the gradient of the product: `dL/dw = g * mask`, `dL/dscores = g * w`, none for the
    mask.

    Args:
        w: float tensor.
        scores: what the mask was ranked from; shape and dtype of `w`.
        mask: boolean tensor of its shape.

    Example:
        >>> keras_dst.masks.straight_through_product(w, scores, mask)

    Source: straight-through estimator, arXiv 1308.3432.
    """

    # Reshaped to what they are: TensorFlow reads variables here, else inside, as further inputs.
    w, scores, mask = (ops.reshape(v, ops.shape(v)) for v in (w, scores, mask))

    # The mask is an argument as well: JAX exports no custom gradient that closes over a tracer.
    @ops.custom_gradient
    def product(w, scores, mask):
        def grad(*args, upstream=None):
            g = _upstream(args, upstream)
            return masked(g, mask), g * w, None

        return masked(w, mask), grad

    return product(w, scores, mask)


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
    if max(block, default=1) == 1:
        return np.broadcast_to(np.int32(1), shape)  # which takes no memory
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


# -- N of M -------------------------------------------------------------------------------------


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

    Raises:
        ValueError: If `n` or `m` is not a whole number of at least 1.

    Example:
        >>> keras_dst.masks.n_of_m(keras.ops.array([[3.0], [1.0], [2.0], [4.0]]), 2, 4)

    Source: arXiv 2102.04010.
    """
    check_integer(n, "n")
    check_integer(m, "m")
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
