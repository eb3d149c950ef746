"""Dynamic Collective Intelligence Learning (arXiv 2109.04660, ACM MM 2023).

Every step runs the model twice, with the weights `w` and the mask `m`:

```text
pruned path p:  forward with w * m    dL/dw = g_p m             used for inference
full path f:    forward with w        dL/dw = g_f (1 - m)       the refined gradient
loss = CE(p) + CE(f) + T**2 (KL(stop(f) || p) + KL(stop(p) || f))        softmax at T
```

The two paths have separate statistics, scales and offsets of batch normalization. The KL terms are
added to the loss after a warm-up. Every 16 steps, a new mask keeps the weights with the largest
`|w|`. The sparsity of this mask is:

```text
s_t = s (1 - (1 - t / T_p)**3)
```

Each KL term trains one path, with the logits of the other path as a constant target. The authors'
code does the same. Variables without a mask, such as biases, receive gradients from both paths.

Deviation from the paper: the sparsity increases every few steps instead of every epoch. Extensions
of the paper: other allocations, blocks and N:M patterns, and a minimum number of weights in every
layer. For a binary output, the KL terms treat the output as two classes. If the model has several
outputs, the loss weight of an output also applies to its KL term.
"""

from __future__ import annotations

from collections.abc import Mapping

import keras
from keras import ops

from keras_dst._utils.validation import is_number
from keras_dst.methods.base import TwoPathMethod
from keras_dst.methods.channels import ChannelNames
from keras_dst.schedules import Cubic, Schedule, as_schedule


@keras.saving.register_keras_serializable("keras_dst")
class DCIL(TwoPathMethod):
    """Training of a pruned and a full model, which have the same weights and learn from each other.

    Pruned weights receive the gradient of the full model, so that a later mask update can restore
    them. A training step takes about as long as two training steps of the dense model. The KL terms
    need at least one output whose loss is a Keras cross-entropy. The argument `from_logits` of the
    loss states whether the outputs are logits. Outputs with other losses are trained on both paths
    without KL terms.

    Args:
        sparsity: Final fraction of zeros, a number in [0, 1) or a `Schedule`. If a number is given,
            the sparsity grows along a cubic ramp over the first three quarters of training, as in
            the paper.
        warmup: Fraction of training, in [0, 1], after which the KL terms are added to the loss. If
            `warmup` is 1, the loss has no KL terms. Defaults to 70/300, as in the paper (70 of 300
            epochs).
        temperature: Temperature T of the softmax in the KL terms. Defaults to 2.
        allocation: Distribution of the sparsity over the layers, see `keras_dst.allocation`.
            `"global"` ranks the weights of all layers together, as in the paper. `allocation` can
            also be `"uniform"`, `"erk"`, or a dict that maps weight names or regular expressions to
            sparsities. Defaults to `"global"`.
        pattern: Which weights are pruned together, see `masks.Pattern`. `"unstructured"` prunes
            single weights. `"channel"` prunes output channels, which the paper calls filters.
            `"1x4"` prunes blocks of 1 output and 4 inputs. `"2:4"` keeps 2 of every 4 weights. The
            score of a block or channel is the mean score of its weights. Defaults to
            `"unstructured"`.
        score: Saliency of a weight: `"magnitude"` for `|w|`, or `"square"` for `w**2`. Both scores
            rank single weights in the same order, but blocks and channels in different orders.
            Defaults to `"magnitude"`.
        frequency: Number of training steps from one mask update to the next, or `"epoch"` for one
            update per epoch. Defaults to None, which means 16 steps. In a short training run, the
            default interval is shorter, so that the masks are updated about 20 times.
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
        ValueError: If an argument is outside its range.

    Example:
        >>> keras_dst.sparsify(model, keras_dst.methods.DCIL(0.9))

    Source: arXiv 2109.04660.
    """

    default_frequency = 16

    def __init__(
        self,
        sparsity: float | Schedule,
        warmup: float = 70 / 300,
        temperature: float = 2.0,
        allocation: str | Mapping[str, float] = "global",
        pattern: str = "unstructured",
        score: str = "magnitude",
        frequency: int | str | None = None,
        min_kept: int | None = None,
        counted_in: str = "channels",
        round_to: int = 8,
        groups: ChannelNames | None = None,
    ):
        self.sparsity = sparsity
        self.warmup = warmup
        self.temperature = temperature
        self.allocation = allocation
        self.pattern = pattern
        self.score = score
        self.frequency = frequency
        self.min_kept = min_kept
        self.counted_in = counted_in
        self.round_to = round_to
        self.groups = groups
        self.schedule = as_schedule(sparsity, lambda final: Cubic(final, end=0.75))
        if not (is_number(warmup) and 0 <= warmup <= 1):
            raise ValueError(
                f"warmup is a fraction of training, in [0, 1]. Received: warmup={warmup!r}"
            )
        if not (is_number(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a number > 0. Received: {temperature!r}")
        if score not in ("magnitude", "square"):
            raise ValueError(f"score must be 'magnitude' or 'square'. Received: {score!r}")
        self._check_common()

    def build(self, layer, name, variable, layout):
        return {
            **super().build(layer, name, variable, layout),
            # Factor of the KL terms: 0 during the warm-up, and 1 afterwards. The factor is a
            # variable, so that it can change without a new trace of the training step.
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
        """Return the sum of the KL divergences between the paths in both directions.

        Args:
            p: Logits of the pruned path, with the classes on the last axis.
            f: Logits of the full path, with the classes on the last axis.
        """
        p, f = (ops.log_softmax(z / self.temperature) for z in (p, f))

        def from_target(z, target):
            target = ops.stop_gradient(target)
            return ops.sum(ops.exp(target) * (target - z), axis=-1)

        return self.temperature**2 * (from_target(p, f) + from_target(f, p))
