"""Consensus sub-network (arXiv 2302.10798): binary gates, trained with a polarization penalty.

A structure is an output unit of a layer, or a residual branch. A gate multiplies the output of one
structure, such as a channel:

```text
z = 1[pi >= 0.5]        dz/dpi = 1 (straight-through)        g = mean of z over the batch
loss = task + lambda_polar mean(g (1 - g)) + lambda_act (cost(g) / cost(1) - target)**2
```

The cost is the number of FLOPs or parameters of the model after all closed channels are removed. A
channel is removed if its gates are closed in all layers that compute the channel. Together with a
channel, the corresponding inputs of the next layers are removed. For a subclassed model, or a model
that contains `layers.Gate`, the cost is `sum(c g)`, as in the paper. Each term of the sum is the
cost c of a structure times its gate g.

The gate activation pi is between 0 and 1. Sparse layers compute `pi = sigmoid(logit)`, with a
trainable logit per structure. By default, `layers.Gate` computes pi in the same way. With
`dependent=True`, the gating module of the paper computes pi from the input of the layer.

Deviations: A gate with a trainable logit has the same value z for all inputs, so its batch mean g
is also z. In inference, a gating module ignores its input. A gate is open if its running mean is at
least 0.5 (the consensus). Every layer keeps a minimum number of open units, see `min_kept`.
`LayerMethod.limited` limits the gradients of closed gates. The target cost decreases along a cubic
ramp. In the last quarter of training, every update opens or closes gates until the target is met.
The weights can then adapt to the final gates.
"""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from keras_dst import masks
from keras_dst._backend import numbers
from keras_dst._utils.validation import is_number
from keras_dst.masks import KERNEL, Layout
from keras_dst.methods import channels
from keras_dst.methods.base import UnitMethod
from keras_dst.regularizers import Budget, Polarization
from keras_dst.schedules import Cubic, Schedule, as_schedule

# `project` closes a gate by moving its logit or running mean at least this far below the decision
# boundary.
_EDGE = 1e-3


@keras.saving.register_keras_serializable("keras_dst")
class Consensus(UnitMethod):
    """Pruning of output units and residual branches by trained binary gates, without fine-tuning.

    `sparsify` gives every Dense and Conv layer a trainable gate per output unit. A closed gate sets
    the weights and the bias of its unit to zero. Layers that compute the outputs of the model get
    no gates. `layers.Gate` adds gates at any position in a model. All gates that were created with
    equal `Consensus` objects share one target cost. Training needs the `SparseTraining` callback.
    In the last quarter of training and after the last step, the callback opens or closes gates
    until the target is met. After training, `shrink` removes the closed units.

    Initially, the mean logit is 0.1, and units with larger weights have higher logits. With the
    default penalty weights, a model of a few hundred units reaches the target within a few hundred
    steps of SGD or Adam. Smaller models keep more accuracy with a smaller `lambda_polar` and
    `lambda_act`. The paper does not state the initial logits and the penalty weights.

    Args:
        sparsity: Final fraction of the cost that is removed, a number in [0, 1) or a `Schedule`. If
            a number is given, the sparsity grows along a cubic ramp over the first half of
            training. Defaults to 0.5.
        cost: `"flops"` or `"parameters"`. The sparsity is the removed fraction of the FLOPs of one
            sample, or of the parameters. Defaults to `"flops"`.
        lambda_polar: Weight of the polarization penalty. Defaults to 0.5.
        lambda_act: Weight of the penalty on the cost of all open gates. Defaults to 100.
        frequency: Number of training steps from one update of the target cost to the next, or
            `"epoch"` for one update per epoch. Defaults to None, which means 20 steps. In a short
            training run, the default interval is shorter, so that the target cost is updated about
            20 times.
        round_to: After the last step, the number of kept channels of every layer is a multiple of
            `round_to`. Layers with fewer than `2 * round_to` channels can keep any number of
            channels. In the last quarter of training, the `SparseTraining` callback opens or closes
            gates until the number of channels is a multiple of `round_to`. Defaults to 1, which
            allows any number of channels. Convolutions are fastest with a multiple of 8 channels.
        min_kept: Minimum number of units that every layer keeps, and of channels that every group
            of coupled channels keeps. Defaults to None, which means `max(2, ceil(sqrt(1 - s) / 2 *
            units))` for a sparsity of s. This default is about half of the number of units that a
            uniform sparsity would keep. Layers with fewer than `min_kept` units keep all units.

    Raises:
        ValueError: If an argument is outside its range, or if `round_to` is larger than 1 and the
            model has no groups of coupled channels.

    Example:
        >>> keras_dst.sparsify(model, keras_dst.methods.Consensus(0.5))

    Source: arXiv 2302.10798.
    """

    default_frequency = 20
    learned = True
    # A gate that is closed after the last step costs accuracy, because no step follows in which the
    # other weights adapt. After this fraction of training, every update therefore opens or closes
    # gates until the target is met.
    exact_from = 0.75
    undecayed = ("logit",)
    target_quantity = "fraction of the cost closed"
    # Mean of the initial logits, at which gates are open but close to the decision boundary.
    start = 0.1

    def __init__(
        self,
        sparsity: float | Schedule = 0.5,
        cost: str = "flops",
        lambda_polar: float = 0.5,
        lambda_act: float = 100.0,
        frequency: int | str | None = None,
        round_to: int = 1,
        min_kept: int | None = None,
    ):
        self.sparsity = sparsity
        self.cost = cost
        self.lambda_polar = lambda_polar
        self.lambda_act = lambda_act
        self.frequency = frequency
        self.round_to = round_to
        self.min_kept = min_kept
        self.needs_use_counts = cost == "flops"
        self.counted_in = cost
        self.schedule = as_schedule(sparsity, lambda final: Cubic(final, end=0.5))
        self._open_at_end = 1 - self.schedule.sparsity
        if cost not in ("flops", "parameters"):
            raise ValueError(f"cost must be 'flops' or 'parameters'. Received: {cost!r}")
        for name in ("lambda_polar", "lambda_act"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise ValueError(f"{name} must be a number >= 0. Received: {getattr(self, name)!r}")
        self._check_common()

    # -- state -----------------------------------------------------------------------------------

    def build(self, layer, name, variable, layout):
        def initial(shape, dtype=None):
            size = ops.mean(
                ops.abs(ops.convert_to_tensor(variable)), self._window(variable, layout)
            )
            mean = ops.mean(size)
            size = ops.where(mean > 0, size / ops.where(mean > 0, mean, 1.0), 1.0)
            return ops.cast(self.start * ops.reshape(size, shape), dtype)

        logit = layer.add_weight(
            name=f"{name}_logit",
            shape=self.gate_shape(variable.shape, layout),
            initializer=initial,
            autocast=False,
        )
        return {"logit": logit, **self.build_budget(layer, name)}

    def build_budget(self, layer, name: str):
        """Create layer variables for the cost per weight entry, the target cost and the schedule
        position."""
        state = {
            key: layer.add_weight(
                name=f"{name}_{key}",
                initializer="ones",
                dtype="float32",
                trainable=False,
                autocast=False,
            )
            for key in ("cost", "target")
        }
        return {**state, "progress": self.build_progress(layer, name)}

    @staticmethod
    def _window(variable, layout):
        """Return the axes of a weight that are not its output axes."""
        rank = len(variable.shape)
        return tuple({*range(rank)} - {axis % rank for axis in layout.outputs})

    # -- forward ---------------------------------------------------------------------------------

    def is_open(self, state, layout: Layout = KERNEL):
        """Return one boolean per gate: True for an open gate, and False for a closed gate.

        The output units with the highest logits or mean gates in a layer are always open. Their
        number is `least_units`.
        """
        margin = state["logit"] if "logit" in state else state["mean"] - 0.5
        if not layout.outputs:
            return margin >= 0.0
        units = ops.reshape(margin, (-1,))
        # `ops.top_k` of JAX lowers to an operation that TensorFlow cannot load from a SavedModel.
        lowest = ops.sort(units)[-self.least_units(units.shape[0])]
        return margin >= numbers.at_most(lowest, 0.0)

    def least_units(self, units: int) -> int:
        least = self.min_kept
        if least is None:
            # If all layers keep the fraction q of their units, the model keeps about q**2 of its
            # cost. If all layers keep only the default minimum, the fraction q / 2 of their units,
            # the model keeps about q**2 / 4 of its cost. A layer with a single open unit often
            # stops learning.
            least = max(2, math.ceil(math.sqrt(self._open_at_end) / 2 * units - 1e-9))
        return min(least, units)

    def gate(self, state, layout: Layout = KERNEL):
        """Return the gates z, computed from trainable logits, with a straight-through gradient."""
        pi = ops.sigmoid(state["logit"])
        return binary(pi, self.is_open(state, layout))

    def apply(self, w, state, layout):
        return self.limited(super().apply(w, state, layout), self.mask(w, state, layout), state)

    def mask(self, w, state, layout=KERNEL):
        return ops.broadcast_to(self.is_open(state, layout), w.shape)

    def monitored(self, state):
        return {"gate": ops.sigmoid(state["logit"]) if "logit" in state else state["mean"]}

    # -- target ----------------------------------------------------------------------------------

    def bind_layers(self, layers, uses, layouts):
        if self.round_to > 1 and channels.groups_of(layouts) is None:
            raise ValueError(
                "round_to > 1 needs a Sequential or Functional model without `layers.Gate`, from "
                f"which channels can be removed. Received: round_to={self.round_to}. Fix: pass "
                "round_to=1."
            )
        for layer in layers:
            for _, variable, state in layer.masked_weights():
                state["cost"].assign(self._cost(layer, variable, uses))
        # The regularizer of a single gate variable computes the penalties of all gates. `strip`
        # removes the gate variable, and therefore also the penalties.
        own = [v for x in layers for v in x.state_variables().values() if v.trainable]
        for variable in own:
            variable.regularizer = None  # Remove the penalties of an earlier training run.
        for variable in own[:1]:
            variable.regularizer = _Penalties(self, layers, layouts)

    def _cost(self, layer, variable, uses) -> float:
        """Return the cost of one entry of a weight, or of one channel or branch of a `Gate`
        layer."""
        if id(variable) not in uses:
            return getattr(layer, "cost", 1.0)
        times, reason = uses[id(variable)]
        if times is None:
            raise ValueError(
                f"The FLOPs of {variable.path} are not known: {reason}. "
                "Use Consensus(cost='parameters')."
            )
        return 2.0 * times

    def cost_per_entry(self, state):
        return float(state["cost"].numpy())

    def update(self, weights, states, layouts, kept, now):
        return [{"target": 1 - now.sparsity} for _ in weights]

    def project(self, weights, states, layouts, kept):
        """Open or close the gates that are nearest to the decision boundary, so that the cost meets
        the target.

        Gates are opened in descending order of their activation pi, until the total cost of all
        open gates is as close as possible to the target. In every layer, the gates with the highest
        activations are always open, see `least_units`. If channels are coupled, all gates of a
        channel are closed together. In every group of channels, the channels with the highest gate
        activations are always open.
        """
        key = ["logit" if "logit" in s else "mean" for s in states]
        edge = [0.0 if k == "logit" else 0.5 for k in key]
        values = [ops.convert_to_numpy(s[k]) for s, k in zip(states, key)]
        pi = [1 / (1 + np.exp(-(v - e).ravel().astype("float64"))) for v, e in zip(values, edge)]
        groups = channels.groups_of(layouts)
        if groups:
            return self._project_channels(groups, values, pi, layouts, kept)
        costs = [
            np.full(v.size, float(ops.convert_to_numpy(s["cost"])) * np.prod(w.shape) / v.size)
            for v, s, w in zip(values, states, weights)
        ]
        for p, layout in zip(pi, layouts):
            if layout.outputs:
                p[np.argsort(-p, kind="stable")[: self.least_units(p.size)]] = np.inf
        order = np.argsort(-np.concatenate(pi), kind="stable")
        spent = np.concatenate([[0.0], np.cumsum(np.concatenate(costs)[order])])
        count = np.argmin(np.abs(spent - self._open_at_end * spent[-1]))
        kept = np.zeros(len(order), bool)
        kept[order[: max(count, np.isinf(np.concatenate(pi)).sum())]] = True
        on = np.split(kept, np.cumsum([v.size for v in values])[:-1])
        turned = [
            np.where(o.reshape(v.shape), np.maximum(v, e), np.minimum(v, e - _EDGE))
            for e, v, o in zip(edge, values, on)
        ]
        return [{k: ops.convert_to_tensor(new, "float32")} for k, new in zip(key, turned)]

    def _project_channels(self, groups, logits, pi, layouts, kept):
        """Close the channels with the lowest gate activations, so that the open channels cost as
        much as the target."""
        units = [ops.convert_to_tensor(p, "float32") for p in pi]
        largest = channels.largest_of_units(units, layouts)
        is_open = ops.convert_to_numpy(channels.best(self, groups, largest, kept))
        largest = ops.convert_to_numpy(largest)
        changes = []
        for logit, unit, layout in zip(logits, units, layouts):
            new = logit.copy()
            if layout.channels:
                ids = layout.channels.ids.reshape(new.shape)
                stays = is_open[ids] | (ids < 0)
                new = np.where(stays, new, np.minimum(new, -_EDGE))
                # Several gates can belong to one channel. If the channel stays open, open its gate
                # with the highest activation pi. All other gates of the channel stay as they are,
                # unless their layer has too few open gates.
                unit = ops.convert_to_numpy(unit).reshape(new.shape)
                best = unit == largest[ids]
                least = min(self.least_units(unit.size), int(np.count_nonzero(stays)))
                best |= unit >= np.sort(unit[stays])[-least]
                new = np.where(stays & (ids >= 0) & best, np.maximum(new, 0.0), new)
            changes.append({"logit": ops.convert_to_tensor(new, "float32")})
        return changes


def binary(pi, is_open):
    """Return 1 for open gates and 0 for closed gates, with a straight-through gradient for `pi`."""
    return masks.straight_through_product(ops.ones_like(pi), pi, is_open)


class _Penalties(keras.regularizers.Regularizer):
    """Regularizer that adds the polarization penalty and the cost penalty of all gates of a model.

    Only one variable of the model has the regularizer, because the penalties depend on the gates of
    all layers.
    """

    def __init__(self, method, layers, layouts):
        self.method, self.layers, self.layouts = method, layers, layouts

    def __call__(self, x):
        means, costs = [], []
        for layer in self.layers:
            for layout, variable, state in layer.masked_weights():
                mean = ops.cast(ops.reshape(layer.batch_mean(layout, state), (-1,)), "float32")
                each = math.prod(variable.shape) / math.prod(mean.shape)
                means.append(mean)
                costs.append(ops.convert_to_tensor(state["cost"]) * each + ops.zeros_like(mean))
        target = ops.convert_to_tensor(state["target"])
        polar = Polarization(self.method.lambda_polar)(ops.concatenate(means))
        groups = channels.groups_of(self.layouts)
        if groups is None:
            costs = ops.stop_gradient(ops.concatenate(costs))
            budget = Budget(target, self.method.lambda_act, costs)
            return polar + budget(ops.concatenate(means))
        kept = channels.largest_of_units(means, self.layouts)
        counts = ops.stack([ops.sum(part) for part in groups.split(kept)])
        share = groups.kept_share(counts, self.method.counted_in)
        return polar + self.method.lambda_act * ops.cast(share - target, polar.dtype) ** 2
