"""SET: sparse evolutionary training (arXiv 1707.04780), sparse from the first step on.

Every `frequency` steps each weight tensor drops a fraction of its kept weights, those of smallest
magnitude, and grows as many others at random places, which start at 0 with fresh momentum:

    drop(t) = drop_fraction / 2 (1 + cos(pi t / t_stop))

The cosine, the end at three quarters of training and the Erdős-Rényi-Kernel densities are RigL's
(arXiv 1911.11134), whose comparison this is; SET's own drop fraction is constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_dst._backend import random
from keras_dst._utils.validation import check_integer
from keras_dst.masks import Pattern
from keras_dst.methods.base import UpdateMethod
from keras_dst.schedules import Constant, check_sparsity

# "uniform" leaves the first weight dense where it is at most one part in so many of what is kept.
_FIRST = 4


@keras.saving.register_keras_serializable("keras_dst")
class SET(UpdateMethod):
    """Sparse from the first step on: drop the smallest weights, grow others at random.

    The few weights that are left start as they were drawn for a dense net. Deep nets without
    normalisation may therefore not begin to learn at extreme sparsities; put batch normalisation
    after their layers, or take a method that starts dense.

    Args:
        sparsity: fraction of zeros, a number in [0, 1), all through training.
        allocation: densities of the layers: `"erk"` (default), `"uniform"` (the first weight stays
            dense, and the others share its zeros, unless it is a quarter of what is kept), or a
            dict of sparsities by weight name or regular expression.
        pattern: `"unstructured"` (default), blocks such as `"1x4"`, or `"channel"`.
        drop_fraction: part of the kept weights replaced at the first update, in [0, 1). Defaults
            to 0.3; it falls to 0 along a cosine.
        stop: fraction of training after which connections stay. Defaults to 0.75.
        stop_step: the same in steps, which a loop without `SparseTraining` needs.
        frequency: steps between updates. Defaults to 100; a short training gets at least twenty.
        min_kept: weights that every layer keeps. Defaults to 1.
        seed: of the random connections. Defaults to 0.

    Raises:
        ValueError: for a value outside its range, global allocation (there is nothing to rank
            before training), or an N:M pattern.

    Example:
        >>> optimizer = keras_dst.SparseOptimizer("sgd", keras_dst.methods.SET(0.9))

    Source: arXiv 1707.04780, algorithm 1; arXiv 1911.11134, section 3.
    """

    grows = True

    def __init__(
        self,
        sparsity: float,
        allocation: str | Mapping[str, float] = "erk",
        pattern: str = "unstructured",
        drop_fraction: float = 0.3,
        stop: float = 0.75,
        stop_step: int | None = None,
        frequency: int = 100,
        min_kept: int = 1,
        seed: int = 0,
    ):
        self.sparsity = sparsity
        self.allocation = allocation
        self.pattern = pattern
        self.drop_fraction = drop_fraction
        self.stop = stop
        self.stop_step = stop_step
        self.frequency = frequency
        self.min_kept = min_kept
        self.seed = seed
        check_sparsity(sparsity)
        if not 0 <= drop_fraction < 1:
            raise ValueError(f"drop_fraction must be in [0, 1). Received: {drop_fraction!r}")
        if not 0 < stop <= 1:
            raise ValueError(
                "stop is a fraction of training, in (0, 1] (give stop_step for a step number). "
                f"Received: stop={stop!r}"
            )
        if stop_step is not None:
            check_integer(stop_step, "stop_step")
        self.schedule = Constant(sparsity, begin_step=None if stop_step is None else 0)
        name = type(self).__name__
        if Pattern(pattern).n_of_m:
            raise ValueError(
                f"{name} has no N:M form: dropping and growing would change the N of a group. "
                f"Received: pattern={pattern!r}. Use Magnitude for N:M."
            )
        if allocation == "global":
            raise ValueError(
                f"{name} fixes every layer's density before training, when there is nothing to "
                "rank. Use allocation='erk', 'uniform' or a dict."
            )
        self._check_common()

    def span(self, total_steps):
        if self.stop_step is not None:
            return 0, self.stop_step
        first, _ = super().span(total_steps)
        return first, math.floor(self.stop * (total_steps or 0))

    def kept_counts(self, shapes, layouts, sparsity, names):
        counts = super().kept_counts(shapes, layouts, sparsity, names)
        first = math.prod(shapes[0])
        if self.allocation != "uniform" or len(shapes) == 1 or _FIRST * first > counts.sum():
            return counts
        left = sum(math.prod(shape) for shape in shapes[1:])
        density = (counts.sum() - first) / left
        others = super().kept_counts(shapes[1:], layouts[1:], 1 - density, names[1:])
        return np.array([first, *others])

    def ranked(self, stay, began, states, now):
        """Scores of all places: those that stay are the best, the others are free to grow."""
        drawn = (
            random.uniform(s["mask"].shape, self.seed, now.step, i) for i, s in enumerate(states)
        )
        return put_first(stay, drawn)

    def update(self, weights, states, layouts, kept, now):
        # Before the first update everything is kept, afterwards no more than `kept`. The mask to
        # begin with is random for every method, and keeps the weights as they were initialised.
        began = [ops.logical_not(ops.all(s["mask"])) for s in states]
        drop = ops.cast(ops.round(self._drop(now) * ops.cast(kept, "float32")), "int32")
        # What is ranked is as large as the weights, and goes as it comes.
        magnitudes = (
            ops.where(s["mask"], ops.abs(ops.cast(w, "float32")), -1.0)
            for w, s in zip(weights, states)
        )
        stay = self.rank(list(magnitudes), layouts, kept - drop)
        stay = [ops.logical_and(b, mask) for b, mask in zip(began, stay)]
        new = self.rank(self.ranked(stay, began, states, now), layouts, kept)
        return [
            {"mask": m, "grown": ops.logical_and(b, ops.logical_and(m, ops.logical_not(s)))}
            for m, s, b in zip(new, stay, began)
        ]

    def _drop(self, now):
        """Fraction of the kept weights to replace now."""
        if self.stop_step is not None:
            done = ops.cast(now.step, "float32") / self.stop_step
        else:
            done = now.progress / self.stop
        return self.drop_fraction / 2 * (1 + ops.cos(math.pi * ops.minimum(done, 1.0)))


def put_first(masks, scores):
    """Scores, float32, of which those in the masks are the best."""
    scores = (ops.cast(s, "float32") for s in scores)
    return [ops.where(mask, ops.max(s) + 1.0, s) for mask, s in zip(masks, scores)]
