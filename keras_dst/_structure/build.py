"""The model anew, from the channels that stay."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, tree

from keras_dst import _keras
from keras_dst._structure.graph import Tensor
from keras_dst._structure.plan import Plan
from keras_dst._structure.rules import Rule, Sum


class _Build:
    """The new tensors and layers, by the ids of the old ones."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.tensors: dict[int, Any] = {}
        self.made: dict[int, Any] = {}
        self.weights: list[tuple[Any, list[np.ndarray]]] = []

    def new(self, x: Tensor):
        return self.tensors[id(x.origin or x)]

    def add(self, rule: Rule) -> None:
        """Call the operation on the new tensors, as far as it is still needed."""
        call = rule.call
        inputs = [self.new(x) for x in call.inputs]
        if call.dropped and len(inputs) == 1:
            result = inputs[0]
        elif call.dropped:
            op = self._remade(rule)
            result = (op if isinstance(op, keras.Layer) else layers.Add())(inputs)
        else:
            args, kwargs = call.map(self.new)
            result = self._remade(rule)(*args, **kwargs)
        if isinstance(rule, Sum) and call.dropped:
            result = self._shifted(rule, result)
        self.tensors.update((id(x), y) for x, y in zip(call.outputs, tree.flatten(result)))

    def _shifted(self, rule: Sum, tensor):
        offset = rule.offset(self.plan.gone)
        if not offset.any():
            return tensor
        name, dtype = f"{rule.op.name}_constant", rule.y.dtype
        return layers.Rescaling(1.0, offset.tolist(), name=name, dtype=dtype)(tensor)

    def _remade(self, rule: Rule):
        """The operation for the channels that stay, once."""
        op = rule.op
        if not isinstance(op, keras.Layer):  # as `x + y` is
            return op
        if id(op) not in self.made:
            config = {**op.get_config(), "name": self.plan.names[id(op)]}
            weights = rule.cut(config, self.plan.gone)
            self.made[id(op)] = type(op).from_config(config)
            self.weights.append((self.made[id(op)], weights))
        return self.made[id(op)]


def build(plan: Plan) -> keras.Model:
    """The smaller model of a plan, with the structure of inputs and outputs of the old one."""
    graph, work = plan.graph, _Build(plan)
    inputs = []
    for x, old in zip(plan.inputs, graph.inputs):
        name = _keras.operation_of(old).name
        inputs.append(keras.Input(batch_shape=x.shape, dtype=x.dtype, name=name))
        work.tensors[id(x)] = inputs[-1]
    for rule in plan.rules:
        work.add(rule)
    small = keras.Model(
        tree.pack_sequence_as(_keras.structures_of(graph)[0], inputs),
        tree.pack_sequence_as(_keras.structures_of(graph)[1], [work.new(y) for y in plan.outputs]),
        name=plan.model.name,
    )
    for layer, weights in work.weights:
        if weights:
            layer.set_weights(weights)
    return small
