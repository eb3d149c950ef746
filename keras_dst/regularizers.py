"""Penalties of DST and Consensus, as Keras regularizers that also work without a pruning method."""

import math

import keras
import numpy as np
from keras import ops

from keras_dst._backend import numbers
from keras_dst._utils.validation import check_number, is_number

__all__ = ["Budget", "Polarization", "ThresholdPenalty"]


@keras.saving.register_keras_serializable("keras_dst")
class ThresholdPenalty(keras.regularizers.Regularizer):
    """Sparse regularization term of DST, `alpha * sum(exp(-t))`, which increases thresholds.

    Deviation from the paper: for a threshold `t` below -1, the penalty uses the tangent line of
    `exp(-t)` at `t = -1`. The magnitude of the gradient is therefore at most `alpha * e`, and the
    penalty does not overflow for large negative thresholds.

    Args:
        alpha: Weight of the penalty, a number >= 0 or a scalar variable. Defaults to 5e-4.

    Raises:
        ValueError: If `alpha` is neither a number >= 0 nor a scalar variable.

    Example:
        >>> keras_dst.regularizers.ThresholdPenalty(0.1)(keras.ops.zeros((3,)))  # 0.3

    Source: arXiv 2005.06870, equation 6.
    """

    def __init__(self, alpha=5e-4):
        if not _is_scalar_tensor(alpha):
            check_number(alpha, "alpha", alternative=" or a scalar variable")
        self.alpha = alpha

    def __call__(self, x):
        x = _as_loss(x)
        steep = x < -1.0
        bounded = ops.where(steep, -math.e * x, ops.exp(-numbers.where(steep, -1.0, x)))
        return _as_factor(self.alpha, x) * ops.sum(bounded)

    def get_config(self):
        return {"alpha": float(self.alpha)}


@keras.saving.register_keras_serializable("keras_dst")
class Polarization(keras.regularizers.Regularizer):
    """Consensus penalty `weight * mean(g (1 - g))` on gates `g`, which pushes each gate to 0 or 1.

    Args:
        weight: Weight of the penalty, a number >= 0. Defaults to 1.

    Call arguments:
        x: Mean of each gate over a batch, in [0, 1]. The array may have any shape.

    Raises:
        ValueError: If `weight` is not a number >= 0.

    Example:
        >>> keras_dst.regularizers.Polarization()(keras.ops.array([1.0, 0.5]))  # 0.125

    Source: arXiv 2302.10798, polarization loss.
    """

    def __init__(self, weight: float = 1.0):
        check_number(weight, "weight")
        self.weight = weight

    def __call__(self, x):
        x = _as_loss(x)
        return self.weight * ops.mean(x * (1 - x))

    def get_config(self):
        return {"weight": self.weight}


@keras.saving.register_keras_serializable("keras_dst")
class Budget(keras.regularizers.Regularizer):
    """Penalty `weight * (sum(c g) / sum(c) - target)**2` on gates `g` with the costs `c`.

    Args:
        target: Target for the cost of the open gates, as a fraction of the cost of all gates. The
            target is a number or a scalar tensor in (0, 1].
        weight: Weight of the penalty, a number >= 0. Defaults to 1.
        costs: Cost of every gate, as an array in the shape of the gates. The costs can be in any
            unit, because only their ratios matter. Defaults to None, which means that all gates
            cost the same.

    Call arguments:
        x: Mean of each gate over a batch, in [0, 1]. The array may have any shape.

    Raises:
        ValueError: If the target is outside (0, 1], if another argument is not a number >= 0, or if
            the sum of `costs` is 0.

    Example:
        >>> budget = keras_dst.regularizers.Budget(0.5, costs=[3.0, 1.0])
        >>> budget(keras.ops.array([1.0, 0.0]))  # (3/4 - 1/2)**2 = 0.0625

    Source: arXiv 2302.10798, activation loss.
    """

    def __init__(self, target: float, weight: float = 1.0, costs=None):
        if not _is_scalar_tensor(target) and not (is_number(target) and 0 < target <= 1):
            raise ValueError(
                "target is the cost of the open gates as a fraction of the total cost, in (0, 1]. "
                f"Received: target={target!r}"
            )
        check_number(weight, "weight")
        # A tensor is not checked, because a tensor has no values while a step is traced.
        if costs is not None and not ops.is_tensor(costs):
            for cost in np.ravel(ops.convert_to_numpy(costs)).tolist():
                check_number(cost, "costs")
            if not np.sum(ops.convert_to_numpy(costs)) > 0:
                raise ValueError(f"costs must have a sum above 0. Received: costs={costs!r}")
        self.target = target
        self.weight = weight
        self.costs = costs

    def __call__(self, x):
        x = _as_loss(x)
        costs = ops.ones_like(x) if self.costs is None else ops.cast(self.costs, x.dtype)
        share = ops.sum(costs * x) / ops.sum(costs)
        return self.weight * (share - _as_factor(self.target, x)) ** 2

    def get_config(self):
        costs = None if self.costs is None else ops.convert_to_numpy(self.costs).tolist()
        return {"target": float(self.target), "weight": self.weight, "costs": costs}


def _is_scalar_tensor(value) -> bool:
    """Return whether a value is a variable or tensor that holds a single number."""
    is_tensor = isinstance(value, keras.Variable) or ops.is_tensor(value)
    return is_tensor and math.prod(value.shape) == 1


def _as_factor(value, x):
    """Return `value` unchanged if it is a number. Cast a scalar tensor to the type of `x`."""
    return ops.cast(value, x.dtype) if _is_scalar_tensor(value) else value


def _as_loss(x):
    """Cast the input of a penalty to `floatx`, which is the dtype of the model's loss."""
    return ops.cast(ops.convert_to_tensor(x), keras.config.floatx())
