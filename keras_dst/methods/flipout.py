"""FlipOut: prune the weights whose sign keeps flipping (arXiv 2009.02594).

    score = |w|^p / (flips + 1)        flips: optimiser steps that changed sign(w)
    grad <- grad + lambda ||grad||_2 / sqrt(n) N(0, 1)        for every tensor, n its size

Events, equally spaced, each remove the fraction `rate` of the weights still kept, lowest score
first, ranked over all tensors, for good; the last event removes what the target leaves. With `n`
events they come after the fractions 1/(n+1), .. n/(n+1) of training, as in the paper's own runs.
Deviation: the noise is read from a table of normal numbers (`random.normal`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras
from keras import ops

from keras_dst._backend import random
from keras_dst.masks import masked
from keras_dst.methods.base import UpdateMethod
from keras_dst.schedules import Geometric, Schedule, check_sparsity


@keras.saving.register_keras_serializable("keras_dst")
class FlipOut(UpdateMethod):
    """Prune weights that are small and whose sign does not settle, at a few events.

    Args:
        sparsity: final fraction of zeros, a number in [0, 1), reached in events that each remove
            `rate` of what is left; or a `Schedule`.
        power: the exponent p of the magnitude. Defaults to 2.
        noise: the factor lambda of the gradient noise. Defaults to 1; 0 for none.
        rate: fraction of the kept weights that an event removes, in (0, 1). Defaults to 0.5.
        allocation: `"global"` (the paper, default), `"uniform"`, `"erk"`, or a dict of sparsities
            by weight name or regular expression.
        pattern: `"unstructured"` (the paper, default), blocks such as `"1x4"`, N:M such as
            `"2:4"`, or `"channel"`; groups are scored by the mean score of their weights.
        frequency: steps between updates of the masks under a `Schedule` that grows smoothly.
            Defaults to 100.
        min_kept: weights that every layer keeps. Defaults to 1.
        seed: of the noise. Defaults to 0.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> optimizer = keras_dst.SparseOptimizer("sgd", keras_dst.methods.FlipOut(0.9))

    Source: arXiv 2009.02594, equation 2 (score) and section 3.
    """

    def __init__(
        self,
        sparsity: float | Schedule,
        power: float = 2.0,
        noise: float = 1.0,
        rate: float = 0.5,
        allocation: str | Mapping[str, float] = "global",
        pattern: str = "unstructured",
        frequency: int = 100,
        min_kept: int = 1,
        seed: int = 0,
    ):
        self.sparsity = sparsity
        self.power = power
        self.noise = noise
        self.rate = rate
        self.allocation = allocation
        self.pattern = pattern
        self.frequency = frequency
        self.min_kept = min_kept
        self.seed = seed
        if not power > 0:
            raise ValueError(f"power must be a number > 0. Received: {power!r}")
        if not noise >= 0:
            raise ValueError(f"noise must be a number >= 0. Received: {noise!r}")
        if isinstance(sparsity, Schedule):
            self.schedule = sparsity
        else:
            check_sparsity(sparsity)
            events = Geometric(sparsity, end=1.0, rate=rate).number
            self.schedule = Geometric(sparsity, end=events / (events + 1), rate=rate)
        self.reads_gradients = noise > 0
        self._check_common()

    def init(self, kernels, steps):
        # The smallest type in which no counter of this training can overflow.
        dtype = "int32" if steps is None or steps >= 2**15 else "int16" if steps > 255 else "uint8"
        return [{"flips": ("zeros", dtype)} for _ in kernels]

    def scores(self, weights, states):
        return [
            ops.where(
                s["mask"],
                ops.abs(ops.cast(w, "float32")) ** self.power
                / (ops.cast(s["flips"], "float32") + 1),
                -1.0,
            )
            for w, s in zip(weights, states)
        ]

    def monitored(self, state):
        flips, kept = ops.convert_to_numpy(state["flips"]), ops.convert_to_numpy(state["mask"])
        return {"flips": flips[kept]}  # of pruned weights they are 0

    def perturb(self, grads, masks, step):
        if not self.noise:
            return grads
        known = [i for i, grad in enumerate(grads) if grad is not None]
        grads = list(grads)
        drawn = random.normal([grads[i].shape for i in known], self.seed, step)
        for i, numbers in zip(known, drawn):
            grad, mask = grads[i], masks[i]
            size = math.prod(grad.shape)
            squares = ops.square(ops.cast(grad, "float32"))  # their sum overflows in float16
            scale = self.noise * ops.sqrt(ops.sum(squares) / size)
            added = ops.cast(numbers * scale, grad.dtype)
            grads[i] = grad + (added if mask is None else masked(added, mask))
        return grads

    def before(self, weights, grads, states):
        weights, grads, _ = super().before(weights, grads, states)
        return weights, grads, [_sign(w) for w in weights]

    def after(self, carry, weights, states):
        changes = []
        for sign, w, s in zip(carry, weights, states):
            flipped = ops.cast(ops.not_equal(_sign(w), sign), s["flips"].dtype)
            changes.append({"flips": masked(s["flips"] + flipped, s["mask"])})
        return super().after(carry, weights, states)[0], changes


def _sign(w):
    """In the smallest type: it is written and read again."""
    return ops.cast(ops.sign(w), "int8")
