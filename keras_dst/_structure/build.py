"""Third pass of `shrink`: build the smaller model from the channels that are kept."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, tree

from keras_dst import _keras
from keras_dst._structure.copies import copy_operation, copy_recurrent_state, live_config
from keras_dst._structure.graph import Tensor
from keras_dst._structure.handlers import Addition, ChannelHandler
from keras_dst._structure.plan import Plan


def build(plan: Plan) -> keras.Model:
    """Return the smaller model of a pruning plan, with the given model's inputs and structure."""
    graph, builder = plan.graph, _Builder(plan)
    inputs = []
    for x, old in zip(plan.inputs, graph.inputs):
        layer = _keras.operation_of(old)
        inputs.append(type(layer).from_config(layer.get_config()).output)
        builder.tensors[id(x)] = inputs[-1]
    for handler in plan.handlers:
        builder.add(handler)
    input_structure, output_structure = _keras.structures_of(graph)
    outputs = [builder.tensor(y) for y in plan.outputs]
    small = keras.Model(
        tree.pack_sequence_as(input_structure, inputs),
        tree.pack_sequence_as(output_structure, outputs),
        name=plan.model.name,
    )
    return small


class _Builder:
    """Builder of the smaller model. The dicts `tensors` and `operations` map ids of tensors and
    operations in the given model to their replacements in the smaller model."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.tensors: dict[int, Any] = {}
        self.operations: dict[int, Any] = {}

    def tensor(self, x: Tensor):
        """Return the tensor of the smaller model that replaces the tensor `x` of the given
        model."""
        return self.tensors[id(x.origin or x)]

    def add(self, handler: ChannelHandler) -> None:
        """Repeat a call of the given model in the smaller model. A sum with constant inputs becomes
        a sum of the other inputs and an offset."""
        call = handler.call
        if isinstance(handler, Addition) and call.constant_terms:
            terms = [self.tensor(x) for x in call.inputs]
            result = terms[0] if len(terms) == 1 else self._operation(handler)(terms)
            result = self._add_constants(handler, result)
        else:
            args, kwargs = call.map(self.tensor)
            result = self._apply(handler, args, kwargs)
        self.tensors.update((id(x), y) for x, y in zip(call.outputs, tree.flatten(result)))

    def _add_constants(self, handler: Addition, tensor):
        constants = handler.sum_of_constants(self.plan.removed)
        if not constants.any():
            return tensor
        name, dtype = self.plan.names[id(handler)], handler.y.dtype
        return layers.Rescaling(1.0, constants.tolist(), name=name, dtype=dtype)(tensor)

    def _apply(self, handler: ChannelHandler, args: tuple, kwargs: dict):
        """Call the operation of the smaller model that replaces `handler.op`.

        The first call of `handler.op` creates the replacement, and later calls use it again.
        """
        op, removed = handler.op, self.plan.removed
        if id(op) in self.operations or not handler.can_slice:
            return handler.apply(self._operation(handler), args, kwargs, removed)
        config = {**live_config(op), "name": self.plan.names[id(op)]}
        weights = handler.slice(config, removed)
        new = self.operations[id(op)] = type(op)(**config)
        result = _keras.call_with_weights(
            new, weights, lambda: handler.apply(new, args, kwargs, removed)
        )
        copy_recurrent_state(op, new)
        return result

    def _operation(self, handler: ChannelHandler):
        """Return a copy of the handler's operation. All calls of the operation get the same
        copy."""
        op = handler.op
        if id(op) not in self.operations:
            shared = id(op) in self.plan.tied
            new = copy_operation(op, self.plan.names[id(op)], share=shared)
            self.operations[id(op)] = new
        return self.operations[id(op)]
