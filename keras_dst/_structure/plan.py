"""What of a model can go: forwards its constants, then its ties, then what nothing needs."""

from __future__ import annotations

import numpy as np

from keras_dst import _keras
from keras_dst._structure.choose import rule_of
from keras_dst._structure.graph import Call, Tensor, lay_out
from keras_dst._structure.groups import Groups
from keras_dst._structure.rules import Kernel, Rule


class Plan:
    """Which channels of a model go.

    Attributes:
        all_rules: one for every call of an operation, in the order they run.
        rules: those that are needed for the outputs.
        names: of every layer in the new model, by the id of the old one.
        gone: by channel id, whether it goes.
        spared: why channels stay that could go, by their id.
    """

    def __init__(self, model):
        self.model = model
        self.graph = _keras.graph_of(model)
        self.inputs = [Tensor(tuple(x.shape), x.dtype) for x in self.graph.inputs]
        calls: list[Call] = []
        self.outputs = lay_out(model, self.inputs, "", calls)
        self.all_rules = [_followed(call) for call in calls]
        self.rules = self._live()
        self.names = self._named()
        self.pinned = self._tied()
        self.kernels = list({id(r.op): r for r in self.rules if isinstance(r, Kernel)}.values())
        self.gone = self._unneeded()
        self.spared = self._spare()

    def _live(self) -> list[Rule]:
        wanted = {id(x) for x in self.outputs}
        live = []
        for rule in reversed(self.all_rules):
            if any(id(y) in wanted for y in rule.call.outputs):
                live.append(rule)
                wanted |= {id(x.origin or x) for x in rule.call.inputs}
        return live[::-1]

    def _named(self) -> dict[int, str]:
        taken = {_keras.operation_of(x).name for x in self.graph.inputs}
        names: dict[int, str] = {}
        for rule in self.rules:
            if id(rule.op) not in names:
                name = rule.op.name
                while name in taken:
                    name = (rule.call.prefix or "again_") + name
                taken.add(name)
                names[id(rule.op)] = name
        return names

    def _tied(self) -> np.ndarray:
        """Give all channels their ids; return which of them have to stay."""
        groups = Groups()
        for x in self.inputs:
            x.ids = groups.new(x.channels)
            groups.pin(x)
        tensors = list(self.inputs)
        for rule in self.rules:
            for view in rule.call.inputs:
                if view.origin:
                    view.ids = groups.new(view.channels)
                    groups.pin(view)
                    groups.pin(view.origin)
                    tensors.append(view)
            rule.tie(groups)
            tensors += rule.call.outputs
        for y in self.outputs:
            groups.pin(y)
        roots = groups.roots()
        pinned = np.zeros(len(roots), bool)
        pinned[roots[groups.pinned()]] = True
        for tensor in tensors:
            tensor.ids = roots[tensor.ids]
        for rule in self.rules:
            if isinstance(rule, Kernel):
                rule.unit_ids = roots[rule.unit_ids]
        return pinned

    def _unneeded(self) -> np.ndarray:
        gone = np.zeros(len(self.pinned), bool)
        while True:  # a unit that goes reads nothing: more can go
            stays = self.pinned.copy()
            for kernel in self.kernels:
                stays[kernel.x.ids[kernel.needs(gone)]] = True
            if np.array_equal(gone, ~stays):
                return gone
            gone = ~stays

    def _spare(self) -> dict[int, str]:
        """Keep what has to hold constants, and one channel of every tensor."""
        spared: dict[int, str] = {}

        def spare(channel: int, reason: str) -> None:
            self.gone[channel] = False
            spared[channel] = reason

        for kernel in self.kernels:
            holder = kernel.holder(self.gone)
            if holder is not None and self.gone[kernel.x.ids[holder]]:
                name = self.names[id(kernel.op)]
                reason = f"'{name}' pads with zeros: it holds the constants of those that go"
                spare(kernel.x.ids[holder], reason)
        for tensor in (y for rule in self.rules for y in rule.call.outputs):
            if len(tensor.ids) and self.gone[tensor.ids].all():
                spare(tensor.ids[0], "one channel of every layer stays")
        return spared

    def keeps(self, x: Tensor) -> np.ndarray:
        """By channel: whether it stays."""
        return ~self.gone[x.ids]


def _followed(call: Call) -> Rule:
    rule = rule_of(call)
    rule.spread()
    return rule
