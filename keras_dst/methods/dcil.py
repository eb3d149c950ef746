"""Dynamic Collective Intelligence Learning (arXiv 2109.04660, ACM MM 2023).

Two forward paths in every step, over the same weights and the same mask:

    pruned path p:  forward with w * m    dL/dw = g_p m             used for inference
    full path f:    forward with w        dL/dw = g_f (1 - m)       the refined gradient
    loss = CE(p) + CE(f) + T**2 (KL(stop(f) || p) + KL(stop(p) || f))        softmax at T

each path with its own batch normalisation (statistics, scale and offset), KL after a warm-up.
Every 16 steps all weights are ranked anew by `|w|`, at the sparsity

    s_t = s (1 - (1 - t / T_p)**3)

The logits of the other path are a constant target in each KL, as in the authors' code. Deviations:
the schedule grows by steps, not by epochs; beyond the paper are other allocations, blocks and N:M,
the KL of binary outputs (two classes) and of several outputs (their sum, weighted as their losses),
and a guard that leaves every layer a weight. What has no mask (biases, and layers that are not
sparse) is trained by both paths.
"""

from __future__ import annotations

from collections.abc import Mapping

import keras
from keras import ops

from keras_dst.methods.base import TwoPathMethod
from keras_dst.schedules import Cubic, Schedule, check_sparsity


@keras.saving.register_keras_serializable("keras_dst")
class DCIL(TwoPathMethod):
    """Two paths, pruned and full, that learn from each other; pruned weights get true gradients.

    A step costs about two steps of the plain model. The KL term needs an output under a
    cross-entropy of Keras, whose `from_logits` says whether outputs are logits or probabilities;
    outputs under other losses are trained on both paths without it.

    Args:
        sparsity: final fraction of zeros, a number in [0, 1), reached along a cubic ramp over the
            first three quarters of training (the paper's 225 of 300 epochs), or a `Schedule`.
        warmup: fraction of training, in [0, 1], before the KL term comes in, at the next update of
            the masks; 1 leaves it out. Defaults to 70/300, the paper's.
        temperature: T of the softmax in the KL term. Defaults to 2.
        allocation: `"global"` (default: all weights ranked together), `"uniform"`, `"erk"`, or a
            dict of sparsities by weight name or regular expression.
        pattern: `"unstructured"` (default), `"channel"` (the paper's filters), blocks such as
            `"1x4"`, or N:M such as `"2:4"`; blocks and channels have the mean score of their
            weights.
        score: `"magnitude"` (default), `|w|`, or `"square"`, `w**2`, which differs for blocks and
            channels.
        frequency: steps between updates of the masks. Defaults to 16; a short training gets at
            least twenty updates.
        min_kept: weights that every layer keeps. Defaults to 1.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> keras_dst.sparsify(model, keras_dst.methods.DCIL(0.9))

    Source: arXiv 2109.04660.
    """

    def __init__(
        self,
        sparsity: float | Schedule,
        warmup: float = 70 / 300,
        temperature: float = 2.0,
        allocation: str | Mapping[str, float] = "global",
        pattern: str = "unstructured",
        score: str = "magnitude",
        frequency: int = 16,
        min_kept: int = 1,
    ):
        self.sparsity = sparsity
        self.warmup = warmup
        self.temperature = temperature
        self.allocation = allocation
        self.pattern = pattern
        self.score = score
        self.frequency = frequency
        self.min_kept = min_kept
        if not isinstance(sparsity, Schedule):
            check_sparsity(sparsity)
        self.schedule = sparsity if isinstance(sparsity, Schedule) else Cubic(sparsity, end=0.75)
        if not 0 <= warmup <= 1:
            raise ValueError(
                f"warmup is a fraction of training, in [0, 1]. Received: warmup={warmup!r}"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be a number > 0. Received: {temperature!r}")
        if score not in ("magnitude", "square"):
            raise ValueError(f"score must be 'magnitude' or 'square'. Received: {score!r}")
        self._check_common()

    def build(self, layer, name, variable, layout):
        return {
            **super().build(layer, name, variable, layout),
            # 1 once the warm-up is over; a variable, so that the step need not be traced anew.
            "coupled": layer.add_weight(
                name=f"{name}_coupled",
                initializer="zeros",
                dtype="float32",
                trainable=False,
                autocast=False,
            ),
        }

    def scores(self, weights, states):
        weights = [ops.cast(w, "float32") for w in weights]
        return [ops.abs(w) if self.score == "magnitude" else ops.square(w) for w in weights]

    def update(self, weights, states, layouts, kept, now):
        coupled = ops.cast(now.progress >= self.warmup, "float32")
        changes = super().update(weights, states, layouts, kept, now)
        return [{**change, "coupled": coupled} for change in changes]

    def path_divergence(self, state):
        if self.warmup == 1:
            return None
        return lambda p, f: ops.convert_to_tensor(state["coupled"]) * self.divergence(p, f)

    def divergence(self, p, f):
        """KL of each path from the other, the mean over all entries.

        Args:
            p, f: logits of the pruned and of the full path, classes last.
        """
        p, f = (ops.log_softmax(z / self.temperature) for z in (p, f))

        def from_target(z, target):
            target = ops.stop_gradient(target)
            return ops.mean(ops.sum(ops.exp(target) * (target - z), axis=-1))

        return self.temperature**2 * (from_target(p, f) + from_target(f, p))
