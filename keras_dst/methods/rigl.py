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
        sparsity: Fraction of zeros, a number in [0, 1). The sparsity is constant during training.
        allocation: Distribution of the sparsity over the layers, see `SET`. Defaults to `"erk"`.
        pattern: Which weights are pruned together: `"unstructured"`, blocks such as `"1x4"`, or
            `"channel"`, see `masks.Pattern`. Defaults to `"unstructured"`.
        drop_fraction: Fraction of the kept weights that the first update replaces, in [0, 1). The
            fraction decreases to 0 along a cosine curve. Defaults to 0.3.
        stop: Fraction of training after which the masks do not change. Defaults to None, which
            means three quarters of training (0.75).
        stop_step: Step after which the masks do not change, see `SET`. Defaults to None.
        frequency: Number of training steps from one mask update to the next, or `"epoch"`, see
            `SET`. Defaults to None, which means 100 steps, or fewer steps in a short training run.
        min_kept: Minimum number of weights or channels that every layer keeps. Defaults to None,
            which means 1.
        counted_in: With `pattern="channel"`, the sparsity is the removed fraction of the
            `"channels"`, `"parameters"` or `"flops"`. Defaults to `"channels"`.
        round_to: With `pattern="channel"`, every layer keeps a multiple of `round_to` channels, see
            `Magnitude`. Defaults to 8.
        groups: Lists of layers whose channels are removed together, see `Magnitude`. Defaults to
            None.
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
