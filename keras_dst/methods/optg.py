"""OptG: optimising gradient-driven criteria (arXiv 2201.12826).

A trainable score `v` per weight, 0 to begin with, and one ranking of all scores:

    m = 1[v among the highest 1 - s_t]        forward with w * m
    dL/dw = g m        dL/dv = g w        (straight-through)
    s_e = s sigmoid(beta (e - E/2))        rate_v(e) = rate_w(e) sigmoid(beta (e - E/2))

with `e` of `E` epochs done, masks ranked anew once an epoch, and no weight decay on scores. Since
only a mask update reads the scores, the factor on their rate is applied there: to the way that the
optimiser, whichever it is, has moved them since the last one. Deviations: the sigmoid is stretched
to begin at 0 and to end at 1 exactly, so the target is met; and trainings of less than 20 epochs,
over which it would still be steep at the end, follow that of 20 within their first three quarters.
"""

from __future__ import annotations

from collections.abc import Mapping

import keras
from keras import ops

from keras_dst import masks
from keras_dst.methods.base import LayerMethod
from keras_dst.schedules import Schedule, Sigmoid, check_sparsity

_SHORT = 20  # epochs; a shorter training has its own curve, which leaves it time to recover


@keras.saving.register_keras_serializable("keras_dst")
class OptG(LayerMethod):
    """Learn a score per weight by gradient descent, beside the weights, and keep the highest.

    Args:
        sparsity: final fraction of zeros, a number in [0, 1), reached along a sigmoid; or a
            `Schedule`.
        beta: slope of the sigmoid per epoch, around the middle of training. Defaults to None: 1,
            the paper's, from 20 epochs on; a shorter training follows the curve of 20 epochs in
            its first three quarters. A `Schedule` has its own.
        allocation: `"global"` (the paper, default), `"uniform"`, `"erk"`, or a dict of sparsities
            by weight name or regular expression.
        pattern: `"unstructured"` (the paper, default), blocks such as `"1x4"`, N:M such as
            `"2:4"`, or `"channel"`; groups are scored by the mean score of their weights.
        frequency: steps between updates of the masks, or `"epoch"` (the paper, default). A short
            training gets at least twenty updates.
        min_kept: weights that every layer keeps. Defaults to 1.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> keras_dst.sparsify(model, keras_dst.methods.OptG(0.9))

    Source: arXiv 2201.12826, equations 4 to 9.
    """

    undecayed = ("scores",)
    snapshots: Mapping[str, str] = {"anchor": "scores"}

    def __init__(
        self,
        sparsity: float | Schedule,
        beta: float | None = None,
        allocation: str | Mapping[str, float] = "global",
        pattern: str = "unstructured",
        frequency: int | str = "epoch",
        min_kept: int = 1,
    ):
        self.sparsity = sparsity
        self.beta = beta
        self.allocation = allocation
        self.pattern = pattern
        self.frequency = frequency
        self.min_kept = min_kept
        if beta is not None and not beta > 0:
            raise ValueError(f"beta must be a number > 0. Received: {beta!r}")
        if beta is not None and isinstance(sparsity, Schedule):
            raise ValueError(
                "beta is the slope of the sigmoid towards a sparsity that is a number; a Schedule "
                f"has its own. Received: sparsity={sparsity!r}, beta={beta!r}"
            )
        if not isinstance(sparsity, Schedule):
            check_sparsity(sparsity)
            sparsity = Sigmoid(sparsity, end=0.75, steepness=_SHORT)
        self.schedule = sparsity
        self._final = self.schedule.sparsity
        self._check_common()

    def schedule_over(self, epochs):
        if isinstance(self.sparsity, Schedule) or not epochs:
            return self.schedule
        if self.beta is None and epochs < _SHORT:
            return self.schedule
        return Sigmoid(self.sparsity, steepness=(self.beta or 1.0) * epochs)

    def build(self, layer, name, variable, layout):
        # The rate is the factor on the scores' learning rate, the anchor is where they were when
        # it was last applied.
        return {
            "scores": layer.add_weight(
                name=f"{name}_scores", shape=variable.shape, initializer="zeros", autocast=False
            ),
            "anchor": layer.add_weight(
                name=f"{name}_anchor",
                shape=variable.shape,
                initializer="zeros",
                trainable=False,
                autocast=False,
            ),
            "rate": layer.add_weight(
                name=f"{name}_rate",
                initializer="zeros",
                dtype="float32",
                trainable=False,
                autocast=False,
            ),
            **super().build(layer, name, variable, layout),
        }

    def apply(self, w, state, layout):
        scores, mask = (ops.convert_to_tensor(state[name]) for name in ("scores", "mask"))
        return masks.straight_through_product(w, scores, mask)

    def monitored(self, state):
        return {"scores": state["scores"]}

    def update(self, weights, states, layouts, kept, now):
        scores = [
            s["anchor"] + ops.cast(s["rate"], s["anchor"].dtype) * (s["scores"] - s["anchor"])
            for s in states
        ]
        rate = now.sparsity / max(self._final, 1e-9)
        return [
            {"scores": v, "rate": rate, "mask": mask}
            for v, mask in zip(scores, self.rank(scores, layouts, kept))
        ]
