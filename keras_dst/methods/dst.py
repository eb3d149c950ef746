"""Dynamic Sparse Training with trainable masked layers (arXiv 2005.06870, ICLR 2020).

Every output unit has a threshold `t`, which is trained together with the weights:

```text
Q = |w| - t        m = 1[Q > 0]        forward with w * m
dL/dw = g m + g w S'(Q) sign(w)        dL/dt = -sum(g w S'(Q))        S': `masks.step`
loss = task + alpha * sum(exp(-t))
```

At every step, kept weights can be pruned, and pruned weights can be restored.

Extensions of the paper: Blocks and channels are scored by the mean `|w|` of their weights. With a
target sparsity, a controller sets the penalty weight alpha, and thresholds do not go below 0. With
a target sparsity, every layer keeps a minimum number of weights. Without this minimum, the density
of a layer could become so low that its thresholds are reset to 0. In the last quarter of training,
every update shifts the thresholds so that the model meets the target exactly. If a threshold t is
below -1, its penalty is linear in t. Thresholds that are not finite are reset to 0. The gradients
of pruned weights are limited, see `LayerMethod.limited`. If several layers compute a channel, the
channel is pruned only if it is below its threshold in all of the layers. The margin Q of a channel
is therefore the largest margin of its units. With a target sparsity, every update stores which
channels are kept. Until the next mask update, the kept channels stay unmasked in all layers.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dst import masks
from keras_dst._backend import numbers
from keras_dst._utils.validation import is_number
from keras_dst.allocation import floor_counts
from keras_dst.masks import KERNEL, Pattern
from keras_dst.methods import channels
from keras_dst.methods.base import LayerMethod, UnitMethod
from keras_dst.regularizers import ThresholdPenalty
from keras_dst.schedules import Cubic, Schedule, as_schedule

# Constants of the controller that sets alpha, see `DST.update`. The constants were tuned on digits
# and MNIST with SGD and Adam, and on a model of 3,000 weights that was trained for 100 steps.
_GAP_SHARE = 0.3  # Fraction of the gap to the target sparsity that each update tries to close.
_MEMORY = 0.9  # Momentum of the exponential moving averages.
_MAX_GROWTH = 3.0  # Maximum ratio of alpha to the root mean square of its earlier values.

# Finished fraction of training after which every mask update meets the target sparsity exactly. At
# the end of training, the learning rate is small, so alpha cannot move the thresholds. The network
# also has no time to adapt to a late change of its masks.
_EXACT = 0.75
_ALWAYS = 1e30  # Score that prevents the pruning of a weight.


@keras.saving.register_keras_serializable("keras_dst")
class DST(LayerMethod):
    """Dynamic Sparse Training with a trainable threshold per output unit.

    Args:
        sparsity: Final fraction of zeros over all weights that the method prunes: a number in [0,
            1), a `Schedule`, or None. If a number is given, the sparsity grows along a cubic ramp
            over the first half of training. If `sparsity` is not None, training needs the
            `SparseTraining` callback, which controls alpha. Defaults to None, which means that a
            constant alpha determines the sparsity, as in the paper.
        alpha: Weight of the penalty on thresholds. The paper uses 5e-4 for LeNets, 5e-6 for VGG-16
            and WRN on CIFAR-10, and 1e-4 to 1e-3 for LSTMs. With a target sparsity, a controller
            changes this penalty weight during training, starting with `alpha`. Defaults to 5e-4.
        granularity: Number of thresholds: `"unit"` for one threshold per output unit, `"layer"` for
            one threshold per layer, or `"weight"` for one threshold per weight. Defaults to
            `"unit"`, as in the paper.
        pattern: Which weights are pruned together, see `masks.Pattern`. `"unstructured"` prunes
            single weights, as in the paper. `"1x4"` prunes blocks of 1 output and 4 inputs.
            `"channel"` prunes output channels. Coupled channels are removed together, unless
            `granularity` is `"layer"`. Defaults to `"unstructured"`.
        reset_density: If the density of a layer falls to `reset_density` or below, the thresholds
            of the layer are reset to 0 in the same step. With a target sparsity, `reset_density` is
            at most a tenth of the target density. With a target sparsity, every layer also keeps at
            least a quarter of the weights that the allocation `"erk"` would keep. Defaults to 0.01,
            as in the paper.
        frequency: Number of training steps from one update of the penalty weight alpha to the next,
            or `"epoch"` for one update per epoch. Defaults to None, which means 20 steps. In a
            short training run, the default interval is shorter, so that the penalty weight is
            updated about 20 times.
        counted_in: With `pattern="channel"`, the sparsity is the removed fraction of the
            `"channels"`, `"parameters"` or `"flops"`. `"parameters"` and `"flops"` need an argument
            `sparsity` and a model with coupled channels. Defaults to `"channels"`.

    Raises:
        ValueError: If an argument is outside its range, or if `pattern` is N:M.

    Example:
        >>> keras_dst.sparsify(model, keras_dst.methods.DST(sparsity=0.9))

    Source: arXiv 2005.06870.
    """

    default_frequency = 20
    learned = True

    def __init__(
        self,
        sparsity: float | Schedule | None = None,
        alpha: float = 5e-4,
        granularity: str = "unit",
        pattern: str = "unstructured",
        reset_density: float = 0.01,
        frequency: int | str | None = None,
        counted_in: str = "channels",
    ):
        self.sparsity = sparsity
        self.alpha = alpha
        self.granularity = granularity
        self.couples_channels = granularity != "layer"
        self.pattern = pattern
        self.reset_density = reset_density
        self.frequency = frequency
        self.counted_in = counted_in
        if sparsity is not None:
            self.schedule = as_schedule(sparsity, lambda final: Cubic(final, end=0.5))
        if granularity not in ("unit", "layer", "weight"):
            raise ValueError(
                f"granularity must be 'unit', 'layer' or 'weight'. Received: {granularity!r}"
            )
        if not (is_number(alpha) and alpha >= 0):
            raise ValueError(f"alpha must be a number >= 0. Received: {alpha!r}")
        if not (is_number(reset_density) and 0 <= reset_density < 1):
            raise ValueError(f"reset_density must be in [0, 1). Received: {reset_density!r}")
        if Pattern(pattern).n_of_m:
            raise ValueError(
                "DST does not support N:M patterns, because a threshold does not fix how many "
                f"weights of a group are kept. Received: pattern={pattern!r}. Use Magnitude for "
                "N:M."
            )
        self._check_common()
        if counted_in != "channels" and not self._holds_channels:
            raise ValueError(
                "To count parameters or FLOPs, DST needs a sparsity, and a granularity other than "
                f"'layer'. Received: counted_in={counted_in!r}, sparsity={sparsity!r}, "
                f"granularity={granularity!r}. Omit counted_in, or change the other arguments."
            )

    # -- state -----------------------------------------------------------------------------------

    def build(self, layer, name, variable, layout):
        shape = self._threshold_shape(variable.shape, layout)
        state: dict[str, Any] = {}
        alpha: Any = self.alpha
        if self.schedule:
            alpha = layer.add_weight(
                name=f"{name}_alpha",
                initializer=keras.initializers.Constant(self.alpha),
                dtype="float32",
                trainable=False,
                autocast=False,
            )
            # State of the controller in `update`: the last gap to the target sparsity, and three
            # exponential moving averages.
            control = layer.add_weight(
                name=f"{name}_control",
                shape=(4,),
                initializer="zeros",
                dtype="float32",
                trainable=False,
                autocast=False,
            )
            progress = self.build_progress(layer, name)
            state = {"alpha": alpha, "control": control, "progress": progress}
        if self._holds_channels:
            # Each mask update sets `held` to 1 for the units of kept channels, and to 0 for all
            # other units.
            state["held"] = layer.add_weight(
                name=f"{name}_held",
                shape=shape,
                initializer="zeros",
                dtype="float32",
                trainable=False,
                autocast=False,
            )
        threshold = layer.add_weight(
            name=f"{name}_threshold",
            shape=shape,
            initializer="zeros",
            regularizer=ThresholdPenalty(alpha),
            constraint=_Reset(self, variable, layout),
            autocast=False,
        )
        return {"threshold": threshold, **state}

    @property
    def _holds_channels(self) -> bool:
        """Whether the method stores the units of kept channels in the variable `held`."""
        return self.schedule is not None and self.pattern == "channel" and self.couples_channels

    def _threshold_shape(self, shape, layout):
        groups = Pattern(self.pattern).groups(shape, layout)
        if self.granularity == "layer":
            return ()
        if self.granularity == "weight":
            return groups
        return UnitMethod.gate_shape(groups, layout)

    # -- forward ---------------------------------------------------------------------------------

    def _margin(self, magnitude, state, layout):
        """Return the margin Q of each group of weights: its score minus its threshold."""
        return Pattern(self.pattern).scores(magnitude, layout) - state["threshold"]

    def apply(self, w, state, layout):
        # The paper defines the gradient of |w| at 0 as 0, but `ops.abs` on JAX returns 1.
        magnitude = w * ops.stop_gradient(ops.sign(w))
        on = masks.step(self._margin(magnitude, state, layout))
        if "held" in state:
            # A unit below its threshold can be kept together with its channel. The added term is a
            # constant, so the gradient of the threshold does not change.
            held = ops.cast(ops.convert_to_tensor(state["held"]), on.dtype)
            on = on + ops.stop_gradient(numbers.at_least(held - on, 0.0))
        on = Pattern(self.pattern).expand(on, w.shape, layout)
        return self.limited(w * on, on > 0, state)

    def mask(self, w, state, layout=KERNEL):
        # Weights that are NaN are kept, so that a diverged weight is not mistaken for a pruned
        # weight.
        on = ops.logical_not(self._margin(ops.abs(w), state, layout) <= 0)
        if "held" in state:
            on = ops.logical_or(on, ops.convert_to_tensor(state["held"]) > 0)
        return Pattern(self.pattern).expand(on, w.shape, layout)

    def monitored(self, state):
        return {"threshold": state["threshold"]}

    # -- target ----------------------------------------------------------------------------------

    @property
    def reset_at(self) -> float:
        """Maximum density of a layer at which the thresholds of the layer are reset to 0.

        For coupled channels with a target sparsity, `reset_at` is -1, which disables the reset. A
        layer with coupled channels can keep a channel that is below its threshold in this layer. If
        a group keeps too few channels, `update` lowers the thresholds of the group instead of
        resetting them.
        """
        if self.schedule is None:
            return self.reset_density
        if self._holds_channels:
            return -1.0
        return min(self.reset_density, 0.1 * (1 - self.schedule.sparsity))

    def update(self, weights, states, layouts, kept, now):
        """Return a new value of alpha, the penalty weight that controls the density.

        The gap is the amount by which all thresholds would have to increase to meet the target
        sparsity. The controller models the change of the gap from one mask update to the next as a
        linear function of alpha:

        ```text
        last gap - gap = drift + response alpha
        ```

        `drift` is the decrease of the gap per mask update if alpha is 0. This decrease comes from
        the training of the weights and from the schedule of the sparsity. If alpha is 1, the gap
        decreases by `drift + response` per mask update. The controller estimates `drift` and
        `response` by exponentially weighted least squares. The gap and `drift` are measured in the
        unit of the weights, and alpha is measured in the unit of the loss. Each update sets alpha
        so that the gap to the target sparsity shrinks by the fraction `_GAP_SHARE` until the next
        update. If the model keeps too few weights, the penalty weight alpha is negative.
        """
        gap, shifts, floors = self._shifts(weights, states, layouts, kept[0])
        # At the end of training (progress 1), `update` does not shift the thresholds. After the
        # last step, the training callback first warns if the target is missed. Then the callback
        # calls `project`, which shifts the thresholds.
        late = ops.logical_and(now.progress >= _EXACT, now.progress < 1.0)
        sizes = [math.prod(w.shape) for w in weights]
        scale = sum(ops.sum(ops.abs(ops.cast(w, "float32"))) for w in weights) / sum(sizes)
        alpha = states[0]["alpha"]
        last, drift, square, product = ops.unstack(states[0]["control"])

        moved = numbers.where(square > 0, last - gap, 0.0)
        square = _MEMORY * square + (1 - _MEMORY) * alpha**2
        product = _MEMORY * product + (1 - _MEMORY) * alpha * (moved - drift)
        response = product / numbers.at_least(square, 1e-30)
        drift = _MEMORY * drift + (1 - _MEMORY) * (moved - response * alpha)
        wanted = _GAP_SHARE * ops.clip(gap, -scale, scale) - drift
        # If the measured effect of alpha is zero or has the wrong sign, alpha becomes `limit` or
        # `-limit`.
        limit = _MAX_GROWTH * numbers.at_least(ops.sqrt(square), self.alpha)
        response = ops.maximum(response, ops.abs(wanted) / limit + 1e-30)
        alpha = ops.clip(wanted / response, -limit, limit)
        control = ops.stack([numbers.where(late, 0.0, gap), drift, square, product])
        changes = []
        for state, shift, floor in zip(states, shifts, floors):
            threshold = ops.convert_to_tensor(state["threshold"])
            moved = ops.where(late, shift, numbers.at_most(floor, 0.0))
            threshold = threshold + ops.cast(moved, threshold.dtype)
            changes.append({"threshold": threshold, "alpha": alpha, "control": control})
        return self._with_held(changes, weights, layouts)

    def followers_settled(self, step, total):
        return step >= _EXACT * total

    def project(self, weights, states, layouts, kept):
        """Shift all thresholds by the same amount, so that exactly `kept` weights are kept.

        A layer gets a smaller shift of its thresholds if it would otherwise keep fewer weights than
        its minimum.
        """
        _, shifts, _ = self._shifts(weights, states, layouts, kept[0])
        changes = [
            {"threshold": state["threshold"] + ops.cast(shift, w.dtype)}
            for w, state, shift in zip(weights, states, shifts)
        ]
        return self._with_held(changes, weights, layouts)

    def _with_held(self, changes, weights, layouts):
        """For coupled channels, add the entry `held`, which marks the kept units, to `changes`."""
        if not (self._holds_channels and channels.groups_of(layouts)):
            return changes
        held = channels.of_kept_channels(self._unit_margins(weights, changes, layouts), layouts)
        return [
            {**change, "held": ops.reshape(units, change["threshold"].shape)}
            for change, units in zip(changes, held)
        ]

    def _unit_margins(self, weights, states, layouts):
        """Return the margin Q (score minus threshold) of every output unit, in float32."""
        return [
            ops.cast(self._margin(ops.abs(w), state, layout), "float32")
            for w, state, layout in zip(weights, states, layouts)
        ]

    def _shifts(self, weights, states, layouts, kept):
        """Return how far every threshold must shift so that the model keeps exactly `kept` weights.

        As in a global ranking, every layer keeps at least a minimum number of weights.

        Returns:
            A tuple `(gap, shifts, limits)`. If all thresholds were shifted by `gap`, the model
            would meet the target sparsity. `shifts` lists how far the thresholds of each layer are
            shifted. `limits` lists, for each layer, the largest shift that leaves the minimum
            number of weights. For coupled channels, each entry of `shifts` and `limits` is a tensor
            with one shift per threshold.
        """
        if channels.groups_of(layouts):
            units = self._unit_margins(weights, states, layouts)
            gap, *found = channels.shifts(self, units, layouts, ops.reshape(kept, (1,)))
            shapes = [tuple(s["threshold"].shape) for s in states]
            return gap, *([ops.reshape(x, n) for x, n in zip(each, shapes)] for each in found)
        shapes = [tuple(w.shape) for w in weights]
        margins = self._margins(weights, states, layouts)
        sizes = [math.prod(Pattern(self.pattern).block(*x)) for x in zip(shapes, layouts)]
        least = floor_counts(shapes, self.schedule.sparsity if self.schedule else 0.0)
        least = np.maximum(least // sizes, 1) * sizes  # Round to whole groups.
        least_kept = numbers.constant(least, "int32", margins[0])
        lowest = ops.unstack(masks.kth(margins, least_kept), len(shapes))
        limits = []
        for w, margin, low in zip(weights, margins, lowest):
            # If all weights of a layer have the same margin Q, no margin exceeds `low`. The limit
            # is then slightly below Q, so that all weights of the layer are kept.
            edge = ops.minimum(
                ops.min(numbers.where(margin > low, margin, _ALWAYS)), ops.max(margin)
            )
            limits.append(edge - 1e-6 * ops.cast(ops.max(ops.abs(w)), "float32"))
        ranked = [numbers.where(m > x, _ALWAYS, m) for m, x in zip(margins, limits)]
        gap = masks.kth(ranked, numbers.at_least(kept, int(least.sum())))
        return gap, [ops.minimum(gap, x) for x in limits], limits

    def _margins(self, weights, states, layouts):
        """Return the margin Q (score minus threshold) of every weight, in float32."""
        pattern = Pattern(self.pattern)
        return [
            ops.cast(
                pattern.expand(self._margin(ops.abs(w), s, layout), w.shape, layout), "float32"
            )
            for w, s, layout in zip(weights, states, layouts)
        ]


class _Reset(keras.constraints.Constraint):
    """Constraint that resets the thresholds of a layer with few kept weights, as in the paper.

    Keras applies constraints in every optimizer step.
    """

    def __init__(self, method, variable, layout):
        self.method, self.variable, self.layout = method, variable, layout

    def __call__(self, threshold):
        t = ops.convert_to_tensor(threshold)
        mask = self.method.mask(ops.convert_to_tensor(self.variable), {"threshold": t}, self.layout)
        alive = ops.mean(masks.ones(mask, "float32")) > self.method.reset_at
        t = masks.masked(t, ops.logical_and(alive, ops.isfinite(t)))
        # A threshold below 0 prunes no weights. Training would need additional steps to raise a
        # negative threshold above 0 again.
        return t if self.method.schedule is None else numbers.at_least(t, 0.0)
