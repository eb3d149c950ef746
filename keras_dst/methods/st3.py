"""ST-3: straight-through gradients and soft thresholding (arXiv 2212.01076, WACV 2023).

The forward pass uses soft-thresholded weights, rescaled per output unit. The gradient passes
straight through to the raw weights. If a pruned weight exceeds the threshold again, its value in
the forward pass starts at 0, without a jump:

```text
m = 1[|w| > tau]                           tau: the sparsity quantile of all |w|
v = a sign(w) (|w| - tau) m                forward        dL/dw = dL/dv
a = (1 + e) / (sum|w| m / sum|w| + e)      for each output unit, e = 0.01
s_t = s (1 - (1 - t / T)**3)               T: half of training
```

ST-3 sigma (`sigma=True`) ranks `|w| / std` instead of `|w|`, with `std = 1 / sqrt(sum(shape))` for
each layer. The threshold for `|w|` in a layer is therefore `tau * std`. With ST-3 sigma, the
sparsities of the layers differ less than with ST-3.

Masks, thresholds and factors are constant between two mask updates. The constant `e` and the
formula for `std` come from the authors' code.

Deviations from the paper: masks are updated every 16 steps instead of every step. The sparsity ramp
begins at the first step, and not after 5 of 160 epochs as in the paper. `tau` is the largest
magnitude among the pruned weights instead of an interpolated quantile, so that every kept weight
exceeds `tau`. A layer has its own, lower threshold `tau` if it would otherwise keep fewer weights
than its minimum. With an allocation other than `"global"`, every layer has its own `tau`.
`LayerMethod.limited` limits the gradients of pruned weights.

Extension of the paper: with `pattern="channel"`, all weights of a channel have the same factor:

```text
v = a w max(0, 1 - tau / s)        s: saliency of the channel
a = (1 + e) / (sum max(0, s - tau) / sum s + e)        for each group of coupled channels
```

With `pattern="channel"`, `tau` is the largest saliency of a pruned channel in the same group of
coupled channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_dst import masks
from keras_dst._backend import numbers
from keras_dst._utils.validation import check_boolean
from keras_dst.methods import channels
from keras_dst.methods.base import LayerMethod, UnitMethod
from keras_dst.methods.channels import ChannelNames
from keras_dst.schedules import Cubic, Schedule, as_schedule

_EPSILON = 0.01  # Constant `e`: limits the factor of units whose weights are all pruned.
# Small number that prevents a division by 0 if all weights of a unit or channel are 0.
_TINY = 1e-6


@keras.saving.register_keras_serializable("keras_dst")
class ST3(LayerMethod):
    """Pruning with soft-thresholded weights in the forward pass and straight-through gradients.

    Pruned weights are still trained. If a pruned weight exceeds its threshold again, its value
    starts at 0, without a jump. `strip` writes the thresholded and rescaled weights into the model.

    Args:
        sparsity: Final fraction of zeros, a number in [0, 1) or a `Schedule`. If a number is given,
            the sparsity grows along a cubic ramp over the first half of training, as in the paper's
            CIFAR-10 runs.
        sigma: If True, the magnitudes in each layer are divided by the standard deviation of the
            layer before they are ranked (ST-3 sigma). With ST-3 sigma, the sparsities of the layers
            differ less, and pruning saves more FLOPs than with ST-3. Defaults to False.
        allocation: Distribution of the sparsity over the layers, see `keras_dst.allocation`.
            `"global"` ranks the weights of all layers together, as in the paper. `allocation` can
            also be `"uniform"`, `"erk"`, or a dict that maps weight names or regular expressions to
            sparsities. Defaults to `"global"`.
        pattern: Which weights are pruned together: `"unstructured"` (single weights, as in the
            paper) or `"channel"` (output channels). Defaults to `"unstructured"`.
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
        ValueError: If an argument is outside its range, or if `pattern` is a block or N:M.

    Example:
        >>> keras_dst.sparsify(model, keras_dst.methods.ST3(0.95))

    Source: arXiv 2212.01076.
    """

    default_frequency = 16

    def __init__(
        self,
        sparsity: float | Schedule,
        sigma: bool = False,
        allocation: str | Mapping[str, float] = "global",
        pattern: str = "unstructured",
        frequency: int | str | None = None,
        min_kept: int | None = None,
        counted_in: str = "channels",
        round_to: int = 8,
        groups: ChannelNames | None = None,
    ):
        self.sparsity = sparsity
        self.sigma = check_boolean(sigma, "sigma")
        self.allocation = allocation
        self.pattern = pattern
        self.frequency = frequency
        self.min_kept = min_kept
        self.counted_in = counted_in
        self.round_to = round_to
        self.groups = groups
        self.schedule = as_schedule(sparsity, lambda final: Cubic(final, end=0.5))
        if pattern not in ("unstructured", "channel"):
            raise ValueError(
                f"pattern must be 'unstructured' or 'channel'. Received: pattern={pattern!r}. Use "
                "another method, such as Magnitude, for blocks and N:M patterns."
            )
        self._check_common()

    def build(self, layer, name, variable, layout):
        def add(kind, shape, initializer):
            return layer.add_weight(
                name=f"{name}_{kind}",
                shape=shape,
                initializer=initializer,
                dtype="float32",
                trainable=False,
                autocast=False,
            )

        return {
            **super().build(layer, name, variable, layout),
            "threshold": add("threshold", (), "zeros"),
            "factor": add("factor", UnitMethod.gate_shape(variable.shape, layout), "ones"),
        }

    def apply(self, w, state, layout):
        raw = ops.cast(w, "float32")
        soft = ops.convert_to_tensor(state["factor"]) * (
            raw - ops.sign(raw) * ops.convert_to_tensor(state["threshold"])
        )
        mask = self.mask(w, state, layout)
        value = ops.cast(masks.masked(soft, mask), w.dtype)
        # The difference `w - stop_gradient(w)` is 0, but its gradient with respect to `w` is 1. The
        # gradient therefore passes straight through to `w`.
        straight = ops.stop_gradient(value) + (w - ops.stop_gradient(w))
        return self.limited(straight, mask, state)

    def monitored(self, state):
        return {"threshold": state["threshold"], "factor": state["factor"]}

    def scores(self, weights, states):
        return [ops.abs(ops.cast(w, "float32")) / self._std(w.shape) for w in weights]

    def update(self, weights, states, layouts, kept, now):
        scores = self.scores(weights, states)
        found = self.rank(scores, layouts, kept)
        if self.pattern == "channel":
            return self._channel_changes(scores, states, layouts, found)
        # For every weight tensor, find the largest score of a pruned weight and the smallest score
        # of a kept weight.
        below = [ops.max(numbers.where(m, 0.0, s)) for m, s in zip(found, scores)]
        above = [ops.min(numbers.where(m, s, math.inf)) for m, s in zip(found, scores)]
        common = ops.max(ops.stack(below)) if self.allocation == "global" else None
        changes = []
        for w, layout, mask, own, least in zip(weights, layouts, found, below, above):
            # A layer may need a lower threshold than the other layers to keep its minimum number of
            # weights.
            threshold = own if common is None else ops.where(common < least, common, own)
            threshold = threshold * self._std(w.shape)
            factor = _factor(ops.abs(ops.cast(w, "float32")), mask, layout)
            changes.append({"mask": mask, "threshold": threshold, "factor": factor})
        return changes

    @staticmethod
    def _channel_changes(scores, states, layouts, found):
        """Return the changed states of all weights, for `pattern="channel"`."""
        factors = channels.per_unit(_channel_factors, scores, found, layouts)
        changes = []
        for state, mask, factor, layout in zip(states, found, factors, layouts):
            if factor.shape[0] > 1:
                factor = ops.reshape(factor, UnitMethod.gate_shape(mask.shape, layout))
            factor = ops.broadcast_to(factor, state["factor"].shape)
            changes.append({"mask": mask, "threshold": ops.zeros(()), "factor": factor})
        return changes

    def _std(self, shape) -> np.float32:
        """Return the number by which the scores of a layer are divided: 1 unless `sigma` is
        true."""
        return np.float32(1 / np.sqrt(sum(shape)) if self.sigma else 1.0)


def _channel_factors(saliency, kept):
    """Return the rescaling factor of every channel in a group of channels that are ranked together.

    Soft thresholding subtracts the largest saliency of a pruned channel from the saliency of each
    kept channel. The returned factor combines the soft thresholding with a rescaling that restores
    the total saliency of the channels.
    """
    threshold = ops.max(numbers.where(kept, 0.0, saliency))
    soft = numbers.where(kept, 1.0 - threshold / numbers.at_least(saliency, _TINY), 0.0)
    return soft * _ratio(ops.sum(saliency) + _TINY, ops.sum(soft * saliency) + _TINY)


def _factor(magnitude, mask, layout):
    """Return the factor per output unit that restores the mean magnitude of the unit's weights."""
    rank = len(magnitude.shape)
    outputs = {axis % rank for axis in layout.outputs}
    inputs = tuple(axis for axis in range(rank) if axis not in outputs)
    whole = ops.mean(magnitude, inputs, keepdims=True) + _TINY
    left = ops.mean(masks.masked(magnitude, mask), inputs, keepdims=True) + _TINY
    return ops.reshape(_ratio(whole, left), UnitMethod.gate_shape(magnitude.shape, layout))


def _ratio(whole, left):
    """Return the rescaling factor `a`, which is exactly 1 if nothing is pruned."""
    return (whole + _EPSILON * whole) / (left + _EPSILON * whole)
