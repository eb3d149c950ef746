"""Saliency criteria: pure functions that give every weight a saliency.

The weights with the highest saliency are kept. `Magnitude(score=...)` selects a criterion:

```text
"magnitude"    |w|
"lamp"         w^2 / (sum of the squares of all weights of the layer that are not smaller)
"taylor"       moving average over the batches of (w dL/dw)^2
"bn_scale"     |gamma| of the batch normalization after the output unit
```
"""

from __future__ import annotations

from typing import Any

from keras import ops

Tensor = Any

CRITERIA = ("magnitude", "lamp", "taylor", "bn_scale")

# Momentum of the moving average in `taylor`, as in the paper.
_MOMENTUM = 0.9


def magnitude(w: Tensor) -> Tensor:
    """Return the absolute value of every entry of a weight.

    Example:
        >>> magnitude(keras.ops.array([-2.0, 0.5]))  # [2.0, 0.5]
    """
    return ops.abs(w)


def lamp(w: Tensor) -> Tensor:
    """Return the layer-adaptive score of every entry of a weight, in [0, 1].

    The square of each entry is divided by the sum of the squares of all entries with at least the
    same magnitude. The largest entry of every layer has the score 1, so a ranking of all layers
    together never prunes this entry. If two entries have the same magnitude, the later entry has
    the higher score.

    Args:
        w: Float tensor of any shape.

    Returns:
        A float32 tensor in the shape of `w`.

    Example:
        >>> lamp(keras.ops.array([1.0, -2.0, 3.0]))  # [1 / 14, 4 / 13, 1]

    Source: arXiv 2010.07611, section 3.
    """
    squares = ops.square(ops.cast(ops.reshape(w, (-1,)), "float32"))
    order = ops.argsort(squares)
    sizes = ops.take(squares, order)
    not_smaller = ops.flip(ops.cumsum(ops.flip(sizes, 0)), 0)
    scores = sizes / ops.maximum(not_smaller, 1e-30)
    places = ops.argsort(order)
    return ops.reshape(ops.take(scores, places), w.shape)


def taylor(average: Tensor, w: Tensor, grad: Tensor) -> Tensor:
    """Return the first-order Taylor saliency, updated with one more batch.

    The square of `w dL/dw` estimates how much the loss changes if the weight becomes 0. The
    saliency is the exponential moving average of `(w dL/dw)**2` over the batches, with a momentum
    of 0.9.

    Args:
        average: Saliency after the previous batch, a float32 tensor in the shape of `w`. Pass zeros
            at first.
        w: Weight.
        grad: Gradient of the loss with respect to the weight.

    Example:
        >>> taylor(average, w, grad)

    Source: arXiv 1906.10771, section 3.
    """
    change = ops.square(ops.cast(w, "float32") * ops.cast(grad, "float32"))
    return _MOMENTUM * average + (1 - _MOMENTUM) * change


def bn_scale(w: Tensor, gamma: Tensor) -> Tensor:
    """Return, for each weight, the magnitude of the normalization scale of its output unit.

    Train with an L1 penalty on the scales, as in the paper. Without an L1 penalty, the scales say
    little about the importance of a unit.

    Args:
        w: Weight.
        gamma: Scales of the normalization layer after the weight, in a shape that broadcasts to
            `w`.

    Example:
        >>> bn_scale(keras.ops.ones((2, 2)), keras.ops.array([-2.0, 1.0]))  # [[2, 1], [2, 1]]

    Source: arXiv 1708.06519, section 3.
    """
    return ops.broadcast_to(ops.abs(gamma), w.shape)
