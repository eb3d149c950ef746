"""Pure functions that compute and apply masks.

A mask has the shape of its weight. A mask is 1 for kept entries and 0 for pruned entries. All
functions use `keras.ops`, give the same results on every backend, and can run in a compiled step.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_dst._backend import jit, numbers
from keras_dst._backend.ranking import kth, top_k
from keras_dst._utils.validation import check_integer, is_integer

__all__ = [
    "Layout",
    "Pattern",
    "kth",
    "limit_gradient",
    "masked",
    "n_of_m",
    "step",
    "stop_gradient_where",
    "straight_through_product",
    "top_k",
    "with_limited_gradient",
]

Tensor = Any


class _Axes(NamedTuple):
    """Fields of a `Layout`."""

    outputs: tuple[int, ...] = (-1,)
    inputs: tuple[int, ...] = (-2,)
    channels: Any = None


class Layout(_Axes):
    """Output axes and input axes of a weight, as negative indices.

    The default fits the kernels of Keras's Dense and Conv layers, `(*window, in, out)`. In a
    convolution kernel, the axes that are neither outputs nor inputs are the axes of the window. A
    depthwise kernel has `inputs=()`, because each of its output units reads a single channel.

    Attributes:
        outputs: Axes of the output units. Defaults to the last axis.
        inputs: Axes of the input channels. Defaults to the second to last axis.
        channels: For coupled channels, the channel that each output unit computes (see
            `keras_dst.methods.channels`). Defaults to None, which means that every output unit is
            pruned separately.

    Raises:
        ValueError: If the axes are not tuples of negative whole numbers, or if an axis occurs
            twice.

    Example:
        >>> keras_dst.masks.Layout(outputs=(-2,), inputs=(-1,))  # kernel of a Conv2DTranspose
        Layout(outputs=(-2,), inputs=(-1,), channels=None)
    """

    __slots__ = ()

    def __new__(cls, outputs=(-1,), inputs=(-2,), channels=None):
        for name, axes in (("outputs", outputs), ("inputs", inputs)):
            is_list = isinstance(axes, (tuple, list))
            if not is_list or not all(is_integer(axis) and axis < 0 for axis in axes):
                raise ValueError(
                    f"{name} must be a tuple of negative whole numbers, such as (-1,). "
                    f"Received: {name}={axes!r}"
                )
        axes = [*outputs, *inputs]
        if len(set(axes)) < len(axes):
            raise ValueError(
                "Every axis of a Layout must occur only once. "
                f"Received: outputs={outputs!r}, inputs={inputs!r}"
            )
        if channels is not None and not hasattr(channels, "groups"):
            raise ValueError(
                "channels must be None or an object that keras_dst.couple_channels computed. "
                f"Received: channels={channels!r}"
            )
        return super().__new__(cls, tuple(map(int, outputs)), tuple(map(int, inputs)), channels)


# Axes of Keras's Dense and Conv kernels.
KERNEL = Layout()


def masked(w: Tensor, mask: Tensor) -> Tensor:
    """Return `w` with exact zeros in all entries for which the mask is false.

    Args:
        w: Tensor of any type.
        mask: Boolean tensor in the shape of `w`.

    Example:
        >>> keras_dst.masks.masked(keras.ops.array([1.0, 2.0]), keras.ops.array([True, False]))
    """
    if keras.backend.backend() == "torch":
        return jit.masked(ops.convert_to_tensor(w), ops.convert_to_tensor(mask))
    return ops.where(mask, w, 0)


def ones(mask: Tensor, dtype) -> Tensor:
    """Convert a boolean mask to zeros and ones of another dtype.

    Args:
        mask: Boolean tensor.
        dtype: Type of the result.

    Example:
        >>> keras_dst.masks.ones(keras.ops.array([True, False]), "float32")
    """
    # torch converts uint8 tensors to floats five times as fast as bool tensors.
    return ops.cast(ops.cast(mask, "uint8"), dtype)


def _upstream(args: tuple, upstream: Tensor) -> Tensor:
    # torch passes the forward arguments to a gradient function by position, and the upstream
    # gradient by keyword. TensorFlow and JAX pass only the upstream gradient, as a positional
    # argument.
    return args[-1] if upstream is None else upstream


@ops.custom_gradient
def step(x: Tensor) -> Tensor:
    """Return 1 for `x > 0` and 0 otherwise, with a surrogate derivative.

    The derivative in backpropagation is a long-tailed estimator: `2 - 4|x|` for `|x| <= 0.4`, `0.4`
    for `0.4 < |x| <= 1`, and 0 for larger `|x|`. With the surrogate derivative, pruned weights near
    their threshold still get a gradient.

    Args:
        x: Float tensor of any shape.

    Returns:
        A tensor of zeros and ones, with the shape and dtype of `x`.

    Example:
        >>> keras_dst.masks.step(keras.ops.array([-0.1, 0.0, 0.2]))  # [0, 0, 1]

    Source: arXiv 2005.06870, section 3.2 (estimator of arXiv 1802.08635).
    """

    def grad(*args, upstream=None):
        distance = ops.abs(x)
        slope = masked(numbers.at_least(2.0 - 4.0 * distance, 0.4), distance <= 1.0)
        return _upstream(args, upstream) * slope

    return ones(x > 0, x.dtype), grad


def stop_gradient_where(mask: Tensor, w: Tensor) -> Tensor:
    """Return `w` unchanged, but with a gradient of 0 in all entries for which the mask is true.

    Args:
        mask: Boolean tensor in the shape of `w`.
        w: Float tensor.

    Example:
        >>> keras_dst.masks.stop_gradient_where(mask, w)
    """
    w, mask = jit.tensor_of(w), jit.tensor_of(mask)
    return _without_gradient_where(mask, w)


@ops.custom_gradient
def _without_gradient_where(mask, w):
    def grad(*args, upstream=None):
        return None, masked(_upstream(args, upstream), ops.logical_not(mask))

    return w, grad


def limit_gradient(gradient: Tensor, mask: Tensor, limit: Tensor | float) -> Tensor:
    """Return a gradient in which the gradients of pruned weights are limited.

    The gradients of kept weights do not change. For pruned weights, the largest allowed magnitude
    is `limit` times the root mean square of the gradients of the kept weights. The mean ignores
    gradients that are 0, such as the gradients of unused rows of an embedding. If the gradients of
    all kept weights are 0, the gradients of the pruned weights are set to 0. If the mask keeps no
    weights, the gradient is unchanged, so that training can restore weights of an empty layer.

    Batch normalization multiplies the gradients of a unit by 1 / sqrt(variance + epsilon). If all
    inputs of a unit are pruned, its variance is close to 0, and this factor is very large. Without
    a limit, the pruned weights of this unit would grow larger than all other weights. The mask
    would then keep the weights of this unit, and prune other weights.

    Args:
        gradient: Gradient of the masked weight, a float tensor.
        mask: Boolean tensor in the shape of `gradient`, true for kept entries.
        limit: Largest gradient magnitude of a pruned weight, divided by the root mean square of the
            gradients of the kept weights.

    Example:
        >>> g, mask = keras.ops.array([1.0, -1.0, 300.0]), keras.ops.array([True, True, False])
        >>> keras_dst.masks.limit_gradient(g, mask, 2.0)  # [1, -1, 2]
    """
    gradient, mask = ops.convert_to_tensor(gradient), ops.convert_to_tensor(mask)
    kept = masked(gradient, mask)
    largest = numbers.where(jit.count_all_true(mask) > 0, _largest(kept, limit), math.inf)
    return _limit_pruned(gradient, kept, largest)


def _largest(kept, limit):
    """Return the largest allowed gradient magnitude of a pruned weight.

    Args:
        kept: Gradient of the masked weight, set to 0 for all pruned weights.
        limit: Returned magnitude, divided by the root mean square of the gradients of the kept
            weights.
    """
    kept = ops.cast(kept, "float32")
    count = numbers.at_least(jit.sum_of_squares(ops.sign(kept)), 1.0)
    return limit * (jit.sum_of_squares(kept) / count) ** 0.5


def _limit_pruned(gradient, kept, largest):
    """Return a gradient whose magnitude is at most `largest` for all pruned weights.

    Args:
        gradient: Gradient of the masked weight.
        kept: Gradient of the masked weight, set to 0 for all pruned weights.
        largest: Largest allowed gradient magnitude of a pruned weight, as a float32 tensor.
    """
    largest = ops.cast(largest, gradient.dtype)
    # `gradient - kept` is 0 for all kept weights. On torch, `+=` overwrites the tensor `pruned`.
    pruned = numbers.at_least(numbers.at_most(gradient - kept, largest), -largest)
    pruned += kept
    return pruned


def with_limited_gradient(w: Tensor, mask: Tensor, limit: Tensor | float) -> Tensor:
    """Return `w` unchanged, and apply `limit_gradient` to its gradient in the backward pass.

    Args:
        w: Masked weight, a float tensor.
        mask: Boolean tensor in the shape of `w`, true for kept entries.
        limit: Largest gradient magnitude of a pruned weight, divided by the root mean square of the
            gradients of the kept weights.

    Example:
        >>> keras_dst.masks.with_limited_gradient(w * mask, mask, 10.0)
    """
    w, mask = jit.tensor_of(w), jit.tensor_of(mask)
    return _with_limited_gradient(w, mask, _limit_tensor(limit, w))


@ops.custom_gradient
def _with_limited_gradient(w, mask, limit):
    def grad(*args, upstream=None):
        return limit_gradient(_upstream(args, upstream), mask, limit), None, None

    return w, grad


def straight_through_product(
    w: Tensor, scores: Tensor, mask: Tensor, limit: Tensor | float | None = None
) -> Tensor:
    """Return `w * mask`, and also pass a gradient to the scores.

    If `g` is the gradient of the product, then `dL/dw = g * mask` and `dL/dscores = g * w`. The
    mask gets no gradient.

    Args:
        w: Float tensor.
        scores: Scores by which the weights are ranked, with the shape and dtype of `w`.
        mask: Boolean tensor in the shape of `w`.
        limit: If given, `dL/dscores = limit_gradient(g, mask, limit) * w`. If the mask keeps no
            weights, however, `dL/dscores` is 0. Defaults to None.

    Example:
        >>> keras_dst.masks.straight_through_product(w, scores, mask)

    Source: straight-through estimator, arXiv 1308.3432.
    """
    w, scores, mask = map(jit.tensor_of, (w, scores, mask))
    if limit is None:
        return _straight_through_product(w, scores, mask)
    return _limited_product(w, scores, mask, _limit_tensor(limit, w))


def _limit_tensor(limit, like) -> Tensor:
    """Return the argument `limit` of `limit_gradient` as a float32 tensor."""
    if ops.is_tensor(limit):
        return ops.cast(limit, "float32")
    return numbers.constant(limit, "float32", like)


# The functions with custom gradients are defined once, because `torch.jit.trace` compares them by
# identity. All tensors are arguments, because JAX cannot export a custom gradient that closes over
# a tracer.
@ops.custom_gradient
def _straight_through_product(w, scores, mask):
    def grad(*args, upstream=None):
        g = _upstream(args, upstream)
        return masked(g, mask), g * w, None

    return masked(w, mask), grad


@ops.custom_gradient
def _limited_product(w, scores, mask, limit):
    def grad(*args, upstream=None):
        g = _upstream(args, upstream)
        kept = masked(g, mask)
        to_scores = _limit_pruned(g, kept, _largest(kept, limit))
        to_scores *= w
        return kept, to_scores, None, None

    return masked(w, mask), grad


# -- patterns ------------------------------------------------------------------------------------


class Pattern:
    """Pruning pattern, which divides a weight tensor into groups that are kept or pruned as a
    whole.

    | name | group |
    |---|---|
    | `"unstructured"` | a single weight |
    | `"RxC"`, such as `"1x4"` | R consecutive output units x C consecutive input channels |
    | `"N:M"`, such as `"2:4"` | a single weight, with N kept of M consecutive input channels |
    | `"channel"` | all weights of an output unit |

    An N:M pattern fixes the sparsity. A mask update therefore prunes nothing while the target
    sparsity of the schedule is 0, and prunes all groups as soon as the target exceeds 0.

    If the block length does not divide the length of an axis, the last block of the axis is
    smaller. In the name `"RxC"` of a block pattern, R counts outputs and C counts inputs. The
    argument `block_size` in `keras_dst.tfmot` has the opposite order, inputs x outputs, as in
    tfmot.

    Args:
        name: Name of the pattern: a name from the table, such as `"1x4"`.

    Raises:
        ValueError: If no pattern has the given name.

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
                raise ValueError(
                    f"An N:M pattern keeps N of M weights, with N < M. Received: {name!r}"
                )
        elif text not in ("unstructured", "channel"):
            raise ValueError(
                "pattern must be 'unstructured', blocks such as '1x4' (outputs x inputs), N:M such "
                f"as '2:4', or 'channel'. Received: {name!r}"
            )

    @property
    def grouped(self) -> bool:
        """Whether the pattern prunes groups of weights, such as blocks, and not single weights."""
        return self.name == "channel" or math.prod(self._block) > 1

    def block(self, shape: Sequence[int], layout: Layout = KERNEL) -> tuple[int, ...]:
        """Return the length of a block along each axis, for a weight of the given shape."""
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
                        f"Pattern {self.name!r} needs {what} axis, but this weight of shape "
                        f"{tuple(shape)} has none. Exclude the layer with `filters`, or use "
                        "'unstructured' or 'channel'."
                    )
                if not self.n_of_m:
                    lengths[axes[-1]] = min(length, shape[axes[-1]])
        return tuple(lengths)

    def scores(self, scores: Tensor, layout: Layout = KERNEL) -> Tensor:
        """Return the score of every group: the mean of the scores of its weights."""
        return pool(scores, self.block(scores.shape, layout))

    def sizes(self, shape: Sequence[int], layout: Layout = KERNEL) -> np.ndarray:
        """Return the number of weights in every group, as an int32 array with one entry per
        group."""
        return _block_sizes(shape, self.block(shape, layout))

    def groups(self, shape: Sequence[int], layout: Layout = KERNEL) -> tuple[int, ...]:
        """Return how many groups a weight of the given shape has along each axis."""
        return _block_counts(shape, self.block(shape, layout))

    def size_range(self, shape: Sequence[int], layout: Layout = KERNEL) -> tuple[int, int]:
        """Return the number of weights in the smallest group, and in the largest group."""
        block = self.block(shape, layout)
        # Length of the last block on each axis.
        last = [(n - 1) % b + 1 for n, b in zip(shape, block)]
        return math.prod(last), math.prod(block)

    def expand(self, groups: Tensor, shape: Sequence[int], layout: Layout = KERNEL) -> Tensor:
        """Expand a mask with one entry per group to a mask of the given shape, with one entry per
        weight."""
        return spread(groups, self.block(shape, layout), shape)

    def __repr__(self):
        return f"Pattern({self.name!r})"


def _block_counts(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // b) for n, b in zip(shape, block))


def _block_sizes(shape: Sequence[int], block: Sequence[int]) -> np.ndarray:
    sizes = np.ones([1] * len(shape), "int32")
    for axis, (n, b, count) in enumerate(zip(shape, block, _block_counts(shape, block))):
        along = np.minimum(b, n - b * np.arange(count))
        sizes = sizes * along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return sizes.astype("int32")


def pool(values: Tensor, block: Sequence[int]) -> Tensor:
    """Return the mean of every block. An axis of length `n` has `ceil(n / b)` blocks of length `b`.

    Args:
        values: Float tensor with a static shape.
        block: Length of a block along every axis. The last block of an axis may be smaller.

    Example:
        >>> keras_dst.masks.pool(keras.ops.ones((6, 2)), (4, 1))  # shape (2, 2)
    """
    if max(block, default=1) == 1:
        return values
    shape = tuple(values.shape)
    counts = _block_counts(shape, block)
    padding = [(0, c * b - n) for n, b, c in zip(shape, block, counts)]
    equal = not any(after for _, after in padding)  # Whether all blocks have the same size.
    if not equal:
        values = ops.pad(values, padding)
    split = ops.reshape(values, [n for pair in zip(counts, block) for n in pair])
    total = ops.sum(split, axis=tuple(range(1, 2 * len(shape), 2)))
    if equal:
        return total / ops.cast(numbers.constant(math.prod(block), "float32", total), total.dtype)
    return total / ops.convert_to_tensor(_block_sizes(shape, block), total.dtype)


def spread(groups: Tensor, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Expand one value per block to a tensor in which every entry has the value of its block.

    Args:
        groups: Tensor with one value per block.
        block: Length of a block along every axis.
        shape: Shape of the result.
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
    """Return a mask that keeps the `n` highest scores of every `m` consecutive scores.

    If several scores are equal, the earlier score is kept. If `m` does not divide the length of the
    axis, the last group is shorter and keeps up to `n` scores.

    Args:
        scores: Float tensor with a static shape.
        n: Number of scores to keep in each group.
        m: Number of scores in each group.
        axis: Axis along which consecutive scores form groups. Defaults to -2, the input axis of a
            Keras kernel.

    Returns:
        A boolean tensor in the shape of `scores`.

    Raises:
        ValueError: If `n` or `m` is not a whole number of at least 1, or if the scores do not have
            the given axis.

    Example:
        >>> keras_dst.masks.n_of_m(keras.ops.array([[3.0], [1.0], [2.0], [4.0]]), 2, 4)

    Source: arXiv 2102.04010.
    """
    check_integer(n, "n")
    check_integer(m, "m")
    check_integer(axis, "axis", minimum=None)
    scores = ops.convert_to_tensor(scores)
    shape = tuple(scores.shape)
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis must be an axis of shape {shape}. Received: axis={axis}")
    if n >= m:
        return ops.ones(shape, "bool")
    axis %= len(shape)
    length = shape[axis]
    lowest = float(np.finfo("float32").min)
    scores = ops.cast(scores, "float32")
    if length % m:
        padding = [(0, -length % m if a == axis else 0) for a in range(len(shape))]
        scores = ops.pad(scores, padding, constant_values=-math.inf)
    grouped = ops.reshape(scores, (*shape[:axis], -1, m, *shape[axis + 1 :]))
    entries = [
        numbers.where(ops.isnan(entry), lowest, entry)
        for entry in ops.unstack(grouped, m, axis=axis + 1)
    ]
    del scores, grouped  # Free the memory of the scores.
    # At the end of the loop, `counts[i] + (m - 1 - i)` entries in the group rank higher than entry
    # `i`. Of two equal scores, the earlier score ranks higher.
    counts, small = [0] * m, "int8" if m < 128 else "int32"  # Small integers need less memory.
    for i, j in itertools.combinations(range(m), 2):
        is_higher = ops.cast(entries[i] >= entries[j], small)
        counts[i], counts[j] = counts[i] - is_higher, counts[j] + is_higher
    kept = [count < n - (m - 1 - i) for i, count in enumerate(counts)]
    mask = ops.reshape(ops.stack(kept, axis=axis + 1), (*shape[:axis], -1, *shape[axis + 1 :]))
    return mask[tuple(slice(0, length) if a == axis else slice(None) for a in range(len(shape)))]
