"""OptG: optimizing gradient-driven criteria (arXiv 2201.12826).

Every weight has a trainable score `v`, which is 0 at first. The scores of all layers are ranked
together:

```text
m = 1[v among the highest 1 - s_e]        forward with w * m
dL/dw = g m        dL/dv = g w        (straight-through)
s_e = s sigmoid(beta (e - E/2))        rate_v(e) = rate_w(e) sigmoid(beta (e - E/2))
```

The symbol `e` stands for the number of finished epochs, and `E` for the total number of epochs.
Masks are updated once per epoch, and weight decay is not applied to scores. Scores are read only
when masks are updated. Each mask update therefore multiplies the change of the scores since the
last update by `sigmoid(beta (e - E/2))`, instead of changing the learning rate.

Deviations from the paper: the sigmoid is rescaled to run from exactly 0 to exactly 1, so that the
final sparsity equals the target. A training run of fewer than 20 epochs prunes along a cubic ramp
in its first half. In the second half of such a short training run, the weights adapt to the final
masks. `masks.straight_through_product` limits the gradients of the scores of pruned weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import keras
from keras import ops

from keras_dst import masks
from keras_dst._backend import numbers
from keras_dst._utils.validation import is_number
from keras_dst.methods.base import SHORT, LayerMethod
from keras_dst.methods.channels import ChannelNames
from keras_dst.schedules import Cubic, Schedule, Sigmoid, as_schedule

# Smallest factor by which the learning rate of the scores is multiplied. A factor of 0 at the first
# mask update would make all scores equal.
_SLOWEST = 1e-9


@keras.saving.register_keras_serializable("keras_dst")
class OptG(LayerMethod):
    """Pruning by trained scores: every weight has a score, and the highest scores are kept.

    Args:
        sparsity: Final fraction of zeros, a number in [0, 1) or a `Schedule`. If a number is given,
            the sparsity grows along a sigmoid, or along a cubic ramp if training has fewer than 20
            epochs.
        beta: Steepness of the sigmoid per epoch. Do not pass `beta` if `sparsity` is a `Schedule`,
            because the schedule determines the curve. Defaults to None, which means a steepness of
            1, as in the paper, if training has at least 20 epochs. In a shorter training run
            without `beta`, the sparsity grows along a cubic ramp in the first half of training.
        allocation: Distribution of the sparsity over the layers, see `keras_dst.allocation`.
            `"global"` ranks the weights of all layers together, as in the paper. `allocation` can
            also be `"uniform"`, `"erk"`, or a dict that maps weight names or regular expressions to
            sparsities. Defaults to `"global"`.
        pattern: Which weights are pruned together, see `masks.Pattern`. `"unstructured"` prunes
            single weights, as in the paper. `"1x4"` prunes blocks of 1 output and 4 inputs. `"2:4"`
            keeps 2 of every 4 weights. `"channel"` prunes output channels. The score of a block or
            channel is the mean score of its weights. Defaults to `"unstructured"`.
        frequency: Number of training steps from one mask update to the next, or `"epoch"`. Defaults
            to None, which means one update per epoch. In a training run of few epochs, the default
            interval is shorter, so that the masks are updated about 20 times.
        min_kept: Minimum number of weights that every layer keeps. With `pattern="channel"`,
            `min_kept` counts channels instead of weights. Defaults to None, which means a minimum
            of 1 weight or channel. With `allocation="global"` and no coupled channels, the default
            minimum is a quarter of the weights that the layer would keep with `allocation="erk"`.
        counted_in: With `pattern="channel"`, the sparsity is the removed fraction of the
            `"channels"`, `"parameters"` or `"flops"`. Defaults to `"channels"`.
        round_to: With `pattern="channel"`, every layer keeps a multiple of `round_to` channels, see
            `Magnitude`. Defaults to 8.
        groups: Lists of layers whose channels are removed together, see `Magnitude`. Defaults to
            None.

    Raises:
        ValueError: If an argument is outside its range, or if `beta` is passed with a `Schedule`.

    Example:
        >>> keras_dst.sparsify(model, keras_dst.methods.OptG(0.9))

    Source: arXiv 2201.12826, equations 4 to 9.
    """

    default_frequency = "epoch"
    undecayed = ("scores",)
    snapshots: Mapping[str, str] = {"anchor": "scores"}

    def __init__(
        self,
        sparsity: float | Schedule,
        beta: float | None = None,
        allocation: str | Mapping[str, float] = "global",
        pattern: str = "unstructured",
        frequency: int | str | None = None,
        min_kept: int | None = None,
        counted_in: str = "channels",
        round_to: int = 8,
        groups: ChannelNames | None = None,
    ):
        self.sparsity = sparsity
        self.beta = beta
        self.allocation = allocation
        self.pattern = pattern
        self.frequency = frequency
        self.min_kept = min_kept
        self.counted_in = counted_in
        self.round_to = round_to
        self.groups = groups
        if beta is not None and not (is_number(beta) and beta > 0):
            raise ValueError(f"beta must be a number > 0. Received: {beta!r}")
        if beta is not None and isinstance(sparsity, Schedule):
            raise ValueError(
                "beta can be used only if sparsity is a number, because a Schedule has its own "
                f"curve. Received: sparsity={sparsity!r}, beta={beta!r}. Pass sparsity as a "
                "number, or do not pass beta."
            )
        self.schedule = as_schedule(sparsity, lambda final: Cubic(final, end=0.5))
        self._final = self.schedule.sparsity
        self._check_common()

    def schedule_over(self, epochs):
        if isinstance(self.sparsity, Schedule) or not epochs:
            return self.schedule
        if self.beta is None and epochs < SHORT:
            return self.schedule
        return Sigmoid(self.sparsity, steepness=(self.beta or 1.0) * epochs)

    def build(self, layer, name, variable, layout):
        # A mask update multiplies the change of the scores by `rate`. `anchor` is a copy of the
        # scores that is made at every mask update.
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
        return masks.straight_through_product(w, scores, mask, self.limit(state))

    def monitored(self, state):
        return {"scores": state["scores"]}

    def update(self, weights, states, layouts, kept, now):
        scores = []
        for s in states:
            change = s["scores"] - s["anchor"]
            # On torch, `*=` and `+=` overwrite the tensor `change`, which saves memory.
            change *= ops.cast(s["rate"], change.dtype)
            change += s["anchor"]
            scores.append(change)
        rate = numbers.at_least(now.sparsity / max(self._final, 1e-9), _SLOWEST)
        return [
            {"scores": v, "rate": rate, "mask": mask}
            for v, mask in zip(scores, self.rank(scores, layouts, kept))
        ]
