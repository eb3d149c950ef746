"""Consensus sub-network: binary gates with polarisation (arXiv 2302.10798).

A gate per structure, an output unit of a layer or a residual branch, multiplies its output:

    z = 1[pi >= 0.5]        dz/dpi = 1 (straight-through)        g = mean of z over the batch
    loss = task + lambda_polar mean(g (1 - g)) + lambda_act (sum(c g) / sum(c) - target)**2

with c the cost of a structure. Two forms of pi: `sigmoid(logit)`, a trainable logit per structure,
which sparse layers and `Gate` have; or the paper's gating module of the input, which `Gate` has.
Deviations: a logit's gate is the same for all inputs, so that g = z; in inference a module's gates
are the consensus, running mean >= 0.5, at all times and not only after training; the last unit of a
layer stays open; the target of the budget comes down along a cubic ramp; the last projection makes
up for what training missed of it.
"""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from keras_dst import masks
from keras_dst.masks import KERNEL, Layout
from keras_dst.methods.base import UnitMethod
from keras_dst.regularizers import Budget, Polarization
from keras_dst.schedules import Cubic, Schedule, check_sparsity

_EDGE = 1e-3  # distance from the boundary of a gate that the last projection has turned


@keras.saving.register_keras_serializable("keras_dst")
class Consensus(UnitMethod):
    """Binary gates on output units and residual branches, in one training run without fine-tuning.

    `sparsify` gives every Dense and Conv layer a trainable gate per output unit, which closes its
    weights and its bias; layers that give the model's outputs have none. `layers.Gate` puts gates
    anywhere. All gates under equal methods share one budget. Needs the `SparseTraining` callback,
    which joins them and meets the target in the last step; `shrink` then removes what is closed.

    The budget shrinks from everything to the target over the first half of training. The mean logit
    begins at 0.1, units of larger weights higher. This and both lambdas are our choice: with a few
    hundred units or more, the target is reached within a few hundred steps of SGD or Adam; nets
    with fewer keep more accuracy with smaller lambdas.

    Args:
        sparsity: fraction of the cost of all structures that is removed, in [0, 1), reached along
            a cubic ramp over the first half of training, or a `Schedule`. Defaults to 0.5.
        cost: of a structure: `"flops"` (of its weights, for one sample) or `"parameters"` (its
            weights). Defaults to `"flops"`.
        lambda_polar: weight of the polarisation penalty. Defaults to 0.5.
        lambda_act: weight of the budget penalty. Defaults to 100.
        frequency: steps between two updates of the budget and the log. Defaults to 20.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> keras_dst.sparsify(model, keras_dst.methods.Consensus(0.5))

    Source: arXiv 2302.10798.
    """

    learned = True
    undecayed = ("logit",)
    target_quantity = "fraction of the cost closed"
    start = 0.1  # mean logit at the beginning: open, and near enough to be closed

    def __init__(
        self,
        sparsity: float | Schedule = 0.5,
        cost: str = "flops",
        lambda_polar: float = 0.5,
        lambda_act: float = 100.0,
        frequency: int = 20,
    ):
        self.sparsity = sparsity
        self.cost = cost
        self.lambda_polar = lambda_polar
        self.lambda_act = lambda_act
        self.frequency = frequency
        self.needs_use_counts = cost == "flops"
        if not isinstance(sparsity, Schedule):
            check_sparsity(sparsity)
        self.schedule = sparsity if isinstance(sparsity, Schedule) else Cubic(sparsity, end=0.5)
        self._open_at_end = 1 - self.schedule.sparsity
        if cost not in ("flops", "parameters"):
            raise ValueError(f"cost must be 'flops' or 'parameters'. Received: {cost!r}")
        for name in ("lambda_polar", "lambda_act"):
            if not getattr(self, name) >= 0:
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
        """What every gate has: cost of an entry of its weight, present target, and progress."""
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
        """Axes of a weight that are not its output axes."""
        rank = len(variable.shape)
        return tuple({*range(rank)} - {axis % rank for axis in layout.outputs})

    # -- forward ---------------------------------------------------------------------------------

    def is_open(self, state, layout: Layout = KERNEL):
        """Whether each structure is open, boolean; of units, the best is."""
        margin = state["logit"] if "logit" in state else state["mean"] - 0.5
        return margin >= (ops.minimum(ops.max(margin), 0.0) if layout.outputs else 0.0)

    def gate(self, state, layout: Layout = KERNEL):
        """z of a trainable logit, with the straight-through gradient."""
        pi = ops.sigmoid(state["logit"])
        return binary(pi, self.is_open(state, layout))

    def mask(self, w, state, layout=KERNEL):
        return ops.broadcast_to(self.is_open(state, layout), w.shape)

    def monitored(self, state):
        return {"gate": ops.sigmoid(state["logit"]) if "logit" in state else state["mean"]}

    # -- target ----------------------------------------------------------------------------------

    def bind_layers(self, layers, uses):
        for layer in layers:
            for _, variable, state in layer.masked_weights():
                state["cost"].assign(self._cost(layer, variable, uses))
        # On one of ours, which `strip` takes along.
        own = [v for x in layers for v in x.own_variables().values() if v.trainable]
        for variable in own:
            variable.regularizer = None  # from an earlier training
        for variable in own[:1]:
            variable.regularizer = _Penalties(self, layers)

    def _cost(self, layer, variable, uses) -> float:
        """Cost of an entry of a weight, or of a gate."""
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
        """Close or open the gates nearest to the boundary, so that the target is met.

        In the order of pi, as many are open as come nearest to the budget; the best unit of every
        layer always is.
        """
        key = ["logit" if "logit" in s else "mean" for s in states]
        edge = [0.0 if k == "logit" else 0.5 for k in key]
        values = [ops.convert_to_numpy(s[k]) for s, k in zip(states, key)]
        pi = [1 / (1 + np.exp(-(v - e).ravel().astype("float64"))) for v, e in zip(values, edge)]
        costs = [
            np.full(v.size, float(ops.convert_to_numpy(s["cost"])) * np.prod(w.shape) / v.size)
            for v, s, w in zip(values, states, weights)
        ]
        for p, layout in zip(pi, layouts):
            if layout.outputs:
                p[p.argmax()] = np.inf
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


def binary(pi, is_open):
    """1 where a gate is open, 0 elsewhere, whose gradient is handed on to pi as it is."""
    return masks.straight_through_product(ops.ones_like(pi), pi, is_open)


class _Penalties(keras.regularizers.Regularizer):
    """Both penalties over all gates of a model; the regulariser of one of its variables.

    The gates of layers are coupled, so that no layer could add its part by itself.
    """

    def __init__(self, method, layers):
        self.method, self.layers = method, layers

    def __call__(self, x):
        means, costs = [], []
        for layer in self.layers:
            for layout, variable, state in layer.masked_weights():
                mean = ops.cast(ops.reshape(layer.batch_mean(layout, state), (-1,)), "float32")
                each = math.prod(variable.shape) / math.prod(mean.shape)
                means.append(mean)
                costs.append(ops.convert_to_tensor(state["cost"]) * each + ops.zeros_like(mean))
        means, costs = ops.concatenate(means), ops.stop_gradient(ops.concatenate(costs))
        target = ops.convert_to_tensor(state["target"])
        polar = Polarization(self.method.lambda_polar)
        return polar(means) + Budget(target, self.method.lambda_act, costs)(means)
