"""RigL: rigging the lottery (arXiv 1911.11134), sparse from the first step on.

As SET, but connections grow where the gradient of the dense weight is largest:

    grow: the highest |dL/d(w m)| among the weights that are pruned
    drop(t) = drop_fraction / 2 (1 + cos(pi t / t_stop))

The gradient is that of the last step before an update.
"""

from __future__ import annotations

import keras
from keras import ops

from keras_dst.methods.set import SET, put_first


@keras.saving.register_keras_serializable("keras_dst")
class RigL(SET):
    """Sparse from the first step on: drop the smallest weights, grow where gradients are largest.

    Args:
        sparsity, allocation, pattern, drop_fraction, stop, stop_step, frequency, min_kept, seed:
            as for `SET`; the seed is that of the mask to begin with.

    Example:
        >>> optimizer = keras_dst.SparseOptimizer("sgd", keras_dst.methods.RigL(0.9))

    Source: arXiv 1911.11134, algorithm 1.
    """

    reads_gradients = True

    def init(self, kernels, steps):
        return [{"gradient": ("zeros", k.dtype)} for k in kernels]

    def ranked(self, stay, began, states, now):
        # In the first mask they are random.
        drawn = super().ranked
        return ops.cond(
            ops.any(ops.stack(began)),
            lambda: put_first(stay, (ops.abs(s["gradient"]) for s in states)),
            lambda: drawn(stay, began, states, now),
        )

    def before(self, weights, grads, states):
        weights, masked, _ = super().before(weights, grads, states)
        return weights, masked, grads

    def after(self, carry, weights, states):
        return super().after(None, weights, states)[0], [{"gradient": g} for g in carry]
