"""RigL: rigging the lottery (arXiv 1911.11134), sparse from the first step.

RigL drops weights like SET, but grows the pruned weights that have the largest gradients:

```text
grow: the pruned weights with the largest |dL/d(w m)|
drop(t) = drop_fraction / 2 (1 + cos(pi t / t_stop))
```

A mask update uses the gradients of the previous training step.
"""

from __future__ import annotations

import keras
from keras import ops

from keras_dst._backend import guesses
from keras_dst.methods.set import SET, rank_first


@keras.saving.register_keras_serializable("keras_dst")
class RigL(SET):
    """Dynamic sparse training that drops small weights and grows weights with large gradients.

    Args:
        sparsity, allocation, pattern, drop_fraction, stop, stop_step, frequency, min_kept,
            counted_in, round_to, groups: These arguments have the same meaning as in `SET`.
        seed: Seed of the random first mask. Defaults to 0.

    Example:
        >>> optimizer = keras_dst.SparseOptimizer("sgd", keras_dst.methods.RigL(0.9))

    Source: arXiv 1911.11134, algorithm 1.
    """

    reads_gradients = True

    def init(self, kernels, steps):
        return [{"gradient": ("zeros", k.dtype)} for k in kernels]

    def growth_scores(self, stay, began, states, now):
        # The first mask is random, because there are no gradients yet.
        drawn = super().growth_scores
        return guesses.cond(
            ops.any(ops.stack(began)),
            lambda: rank_first(stay, (ops.abs(s["gradient"]) for s in states)),
            lambda: drawn(stay, began, states, now),
        )

    def before(self, weights, grads, states):
        weights, masked, _ = super().before(weights, grads, states)
        return weights, masked, grads

    def after(self, carry, weights, states):
        return super().after(None, weights, states)[0], [{"gradient": g} for g in carry]
