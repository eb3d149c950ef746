"""Dynamic Sparse Training with trainable masked layers (arXiv 2005.06870, ICLR 2020).

A threshold `t` per output unit is trained beside the weights:

    Q = |w| - t        m = 1[Q > 0]        forward with w * m
    dL/dw = g m + g w S'(Q) sign(w)        dL/dt = -sum(g w S'(Q))        S': `masks.step`
    loss = task + alpha * sum(exp(-t))

so weights are pruned and come back at every step. Deviations, all of them beyond the paper:
blocks and channels are scored by their mean `|w|`; `sparsity` steers alpha, and keeps
thresholds from going below 0; the penalty is continued linearly below t = -1; thresholds that are
not finite are set back to 0.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_dst import masks
from keras_dst.masks import KERNEL, Pattern
from keras_dst.methods.base import LayerMethod
from keras_dst.regularizers import ThresholdPenalty
from keras_dst.schedules import Cubic, Schedule, check_sparsity

# The controller of alpha, see `DST.update`. Tuned on digits and MNIST with SGD and Adam, and on a
# net of 3,000 weights trained for 100 steps.
_SHARE = 0.3  # of the gap, to be closed from one update to the next
_MEMORY = 0.9  # of what was seen, from one update to the next
_FASTER = 3.0  # times its mean size that alpha may reach in an update


@keras.saving.register_keras_serializable("keras_dst")
class DST(LayerMethod):
    """Dynamic Sparse Training: a trainable threshold per output unit, one run from scratch.

    Args:
        sparsity: fraction of zeros to hold, over all weights under the method: a number in
            [0, 1), reached along a cubic ramp over the first half of training, or a `Schedule`.
            Needs the `SparseTraining` callback, which steers alpha. Defaults to None, the paper's
            own training, where alpha decides.
        alpha: weight of the penalty on thresholds. Defaults to 5e-4, the paper's for LeNets (5e-6
            for VGG-16 and WRN on CIFAR-10, 1e-4 to 1e-3 for LSTMs). With a target it is where the
            controller starts.
        granularity: what shares a threshold: `"unit"` (the paper), `"layer"`, or `"weight"`.
        pattern: `"unstructured"` (the paper), blocks such as `"1x4"`, or `"channel"`.
        reset_density: a layer whose density falls to this or below has its thresholds set back to
            0 in the same step. Defaults to 0.01, the paper's; with a target sparsity it is at
            most a tenth of the target density.
        frequency: steps between two moves of alpha, with a target. Defaults to 20.

    Raises:
        ValueError: for a value outside its range, or an N:M pattern.

    Example:
        >>> keras_dst.sparsify(model, keras_dst.methods.DST(sparsity=0.9))

    Source: arXiv 2005.06870.
    """

    learned = True

    def __init__(
        self,
        sparsity: float | Schedule | None = None,
        alpha: float = 5e-4,
        granularity: str = "unit",
        pattern: str = "unstructured",
        reset_density: float = 0.01,
        frequency: int = 20,
    ):
        self.sparsity = sparsity
        self.alpha = alpha
        self.granularity = granularity
        self.pattern = pattern
        self.reset_density = reset_density
        self.frequency = frequency
        if isinstance(sparsity, Schedule):
            self.schedule = sparsity
        elif sparsity is not None:
            check_sparsity(sparsity)
            self.schedule = Cubic(sparsity, end=0.5)
        if granularity not in ("unit", "layer", "weight"):
            raise ValueError(
                f"granularity must be 'unit', 'layer' or 'weight'. Received: {granularity!r}"
            )
        if not alpha >= 0:
            raise ValueError(f"alpha must be a number >= 0. Received: {alpha!r}")
        if not 0 <= reset_density < 1:
            raise ValueError(f"reset_density must be in [0, 1). Received: {reset_density!r}")
        if Pattern(pattern).n_of_m:
            raise ValueError(
                "DST has no N:M form: thresholds do not fix how many weights of a group are kept. "
                f"Received: pattern={pattern!r}. Use Magnitude for N:M."
            )
        self._check_common()

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
            # What the controller remembers: the last gap, and what it has learned.
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
        threshold = layer.add_weight(
            name=f"{name}_threshold",
            shape=shape,
            initializer="zeros",
            regularizer=ThresholdPenalty(alpha),
            constraint=_Reset(self, variable, layout),
            autocast=False,
        )
        return {"threshold": threshold, **state}

    def _threshold_shape(self, shape, layout):
        groups = Pattern(self.pattern).sizes(shape, layout).shape
        if self.granularity == "layer":
            return ()
        if self.granularity == "weight":
            return groups
        outputs = {axis % len(groups) for axis in layout.outputs}
        kept = [n if axis in outputs else 1 for axis, n in enumerate(groups)]
        return tuple(kept[min(outputs) :])

    # -- forward ---------------------------------------------------------------------------------

    def _margin(self, magnitude, state, layout):
        """Q: how far each group's score lies above its threshold."""
        return Pattern(self.pattern).scores(magnitude, layout) - state["threshold"]

    def apply(self, w, state, layout):
        # Not ops.abs, whose gradient at 0 is 1 on JAX; the paper's is sign(w), 0 there.
        magnitude = w * ops.stop_gradient(ops.sign(w))
        on = masks.step(self._margin(magnitude, state, layout))
        return w * Pattern(self.pattern).expand(on, w.shape, layout)

    def mask(self, w, state, layout=KERNEL):
        # What is NaN is kept, so that nobody takes it for pruned.
        on = ops.logical_not(self._margin(ops.abs(w), state, layout) <= 0)
        return Pattern(self.pattern).expand(on, w.shape, layout)

    def monitored(self, state):
        return {"threshold": state["threshold"]}

    # -- target ----------------------------------------------------------------------------------

    @property
    def reset_at(self) -> float:
        """Density at which a layer's thresholds are reset."""
        if self.schedule is None:
            return self.reset_density
        return min(self.reset_density, 0.1 * (1 - self.schedule.sparsity))

    def update(self, weights, states, layouts, kept, now):
        """Steer alpha towards the target density.

        `gap` is the shift of all thresholds that would meet the target, and alpha has to close it.
        From one update to the next it closes by `drift + response * alpha`, where drift is what
        weights and the schedule do meanwhile. Both are estimated from what was seen (exponentially
        weighted least squares), and alpha is set to close a fixed share of the gap. It is negative
        where too few weights are left.
        """
        gap = masks.kth(self._margins(weights, states, layouts), kept[0])
        sizes = [math.prod(w.shape) for w in weights]
        scale = sum(ops.sum(ops.abs(ops.cast(w, "float32"))) for w in weights) / sum(sizes)
        alpha = states[0]["alpha"]
        last, drift, square, product = ops.unstack(states[0]["control"])

        moved = ops.where(square > 0, last - gap, 0.0)
        square = _MEMORY * square + (1 - _MEMORY) * alpha**2
        product = _MEMORY * product + (1 - _MEMORY) * alpha * (moved - drift)
        response = product / ops.maximum(square, 1e-30)
        drift = _MEMORY * drift + (1 - _MEMORY) * (moved - response * alpha)
        wanted = _SHARE * ops.clip(gap, -scale, scale) - drift
        # Where alpha has had no visible effect so far, or the other way round: more of it.
        limit = _FASTER * ops.maximum(ops.sqrt(square), self.alpha)
        response = ops.maximum(response, ops.abs(wanted) / limit + 1e-30)
        alpha = ops.clip(wanted / response, -limit, limit)
        control = ops.stack([gap, drift, square, product])
        return [{"alpha": alpha, "control": control} for _ in weights]

    def project(self, weights, states, layouts, kept):
        """Shift all thresholds by the same amount, so that exactly `kept` weights are left.

        Only a layer that would lose all its weights keeps its best ones.
        """
        margins = self._margins(weights, states, layouts)
        gap = masks.kth(margins, kept[0])
        changes = []
        for w, state, margin in zip(weights, states, margins):
            most = ops.max(margin) - 1e-6 * ops.cast(ops.max(ops.abs(w)), "float32")
            shift = ops.cast(ops.minimum(gap, most), w.dtype)
            changes.append({"threshold": state["threshold"] + shift})
        return changes

    def _margins(self, weights, states, layouts):
        """Q of every weight, those of a group alike."""
        pattern = Pattern(self.pattern)
        return [
            ops.cast(
                pattern.expand(self._margin(ops.abs(w), s, layout), w.shape, layout), "float32"
            )
            for w, s, layout in zip(weights, states, layouts)
        ]


class _Reset(keras.constraints.Constraint):
    """The paper's guard, as the constraint of a threshold: applied within the optimiser's step."""

    def __init__(self, method, variable, layout):
        self.method, self.variable, self.layout = method, variable, layout

    def __call__(self, threshold):
        t = ops.convert_to_tensor(threshold)
        mask = self.method.mask(ops.convert_to_tensor(self.variable), {"threshold": t}, self.layout)
        alive = ops.mean(masks.ones(mask, "float32")) > self.method.reset_at
        t = masks.masked(t, ops.logical_and(alive, ops.isfinite(t)))
        # Below 0 a threshold masks nothing more, it only takes longer to come back.
        return t if self.method.schedule is None else ops.maximum(t, 0.0)
