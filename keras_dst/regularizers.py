"""The papers' penalties as Keras regularisers, usable alone."""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_dst")
class ThresholdPenalty(keras.regularizers.Regularizer):
    """DST's sparse regularisation term `alpha * sum(exp(-t))`, which drives thresholds up.

    Below `t = -1` the exponential is continued by its tangent, so that the gradient never exceeds
    `alpha * e`: the one deviation from the paper, where a threshold that runs away to minus
    infinity overflows.

    Args:
        alpha: weight of the penalty, a number or a scalar variable. Defaults to 5e-4.

    Example:
        >>> keras_dst.regularizers.ThresholdPenalty(0.1)(keras.ops.zeros((3,)))  # 0.3

    Source: arXiv 2005.06870, equation 6.
    """

    def __init__(self, alpha=5e-4):
        self.alpha = alpha

    def __call__(self, x):
        x = ops.convert_to_tensor(x)
        steep = x < -1.0
        bounded = ops.where(steep, -math.e * x, ops.exp(-ops.where(steep, -1.0, x)))
        return ops.cast(self.alpha, x.dtype) * ops.sum(bounded)

    def get_config(self):
        return {"alpha": float(self.alpha)}
