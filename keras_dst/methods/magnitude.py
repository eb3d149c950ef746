"""Magnitude pruning along a gradual schedule (arXiv 1710.01878), the usual baseline.

    s_t = s_f + (s_i - s_f)(1 - (t - t0) / (t1 - t0))**3        score = |w|

With `revival=True` the optimizer keeps a dense copy of the weights and trains it with the gradient
at the masked weights, so that pruned weights may come back (Dynamic Model Pruning with Feedback,
arXiv 2006.07253).
"""

from __future__ import annotations

from collections.abc import Mapping

import keras
from keras import ops

from keras_dst.methods.base import State, UpdateMethod
from keras_dst.schedules import Cubic, Schedule, as_schedule


@keras.saving.register_keras_serializable("keras_dst")
class Magnitude(UpdateMethod):
    """Gradual magnitude pruning: the smallest weights become 0 while the model is trained.

    Args:
        sparsity: Final fraction of zeros, a number in [0, 1) or a `Schedule`. A number is reached
            along a cubic ramp over the first three quarters of training.
        allocation: Distribution of the sparsity over the weights: `"global"` (one ranking of all
            weights), `"uniform"`, `"erk"`, or a dict from weight names or regular
            expressions to sparsities. Defaults to `"global"`.
        pattern: Shape of the groups that are pruned together: `"unstructured"` (single weights),
            blocks such as `"1x4"` (outputs x inputs), N:M such as `"2:4"`, or `"channel"`. A group
            has the mean magnitude of its weights as its score. Defaults to `"unstructured"`.
        revival: Whether pruned weights are still trained and may come back. Defaults to False.
        frequency: Steps between mask updates, or `"epoch"`. Defaults to None:
            100 in a long training, and at least twenty updates in a short training.
        min_kept: Number of weights that every layer keeps. Defaults to 1.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> optimizer = keras_dst.SparseOptimizer("adam", keras_dst.methods.Magnitude(0.9))

    Source: arXiv 1710.01878; arXiv 2006.07253 for revival.
    """

    def __init__(
        self,
        sparsity: float | Schedule,
        allocation: str | Mapping[str, float] = "global",
        pattern: str = "unstructured",
        revival: bool = False,
        frequency: int | str | None = None,
        min_kept: int = 1,
    ):
        self.sparsity = sparsity
        self.allocation = allocation
        self.pattern = pattern
        self.revival = revival
        self.frequency = frequency
        self.min_kept = min_kept
        self.schedule = as_schedule(sparsity, Cubic)
        self.moves_weights = revival
        self._check_common()

    def init(self, kernels, steps):
        return [{"dense": ("value", k.dtype)} if self.revival else {} for k in kernels]

    def scores(self, weights, states):
        if self.revival:
            weights = [s["dense"] for s in states]
        return [ops.abs(w) for w in weights]

    def before(self, weights, grads, states):
        if not self.revival:
            return super().before(weights, grads, states)
        return [s["dense"] for s in states], list(grads), None

    def after(self, carry, weights, states):
        if not self.revival:
            return super().after(carry, weights, states)
        changes: list[State] = [{"dense": w} for w in weights]
        return [self.masked(w, {**s, **c}) for w, s, c in zip(weights, states, changes)], changes

    def masked(self, w, state):
        return super().masked(state["dense"] if self.revival else w, state)
