"""Why a dead channel stays: on its way to the output, the first layer that needs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from keras_dst._structure.graph import Tensor
from keras_dst._structure.plan import Plan
from keras_dst._structure.rules import Grouped, Kernel, Opaque, Rule


def makers(plan: Plan) -> Iterator[tuple[Rule, Counter[str]]]:
    """The layers that make channels, and why their dead ones stay, with how many."""
    walks = _Walks(plan)
    seen = set()
    live = {id(rule.op) for rule in plan.rules}
    for rule in plan.all_rules:
        makes = isinstance(rule, (Kernel, Grouped, Opaque))
        if makes and (isinstance(rule, Kernel) or rule.stopped().size) and id(rule.op) not in seen:
            seen.add(id(rule.op))
            yield rule, walks.reasons(rule) if id(rule.op) in live else Counter()


class _Walks:
    """From each layer's units on: who reads them, and where those that are constant get lost."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.makers = {id(y): rule for rule in plan.rules for y in rule.call.outputs}

    def reasons(self, maker: Rule) -> Counter[str]:
        """Why dead units of a layer stay, with how many."""
        plan, ids = self.plan, maker.y.ids
        own = [rule for rule in plan.rules if rule.op is maker.op]
        read, why = self._followed(own)
        dead = ~np.isin(ids, list(read))
        zero = maker.stopped()
        if zero.size:
            dead |= zero
        kept = ids[dead & ~plan.gone[ids]]
        return Counter(plan.spared.get(i) or why.get(i) or self._tied(maker, i) for i in kept)

    def _followed(self, own: list[Rule]) -> tuple[set[int], dict[int, str]]:
        """Ids of channels that are read, and why those that are constant, or unread, stay."""
        read: set[int] = set()
        why: dict[int, str] = {}
        reached = {id(rule.y) for rule in own}

        def note(ids: Iterable[int], reason: str, reads: bool = True) -> None:
            for i in ids:
                why.setdefault(int(i), reason)
            if reads:
                read.update(map(int, ids))

        if own[0].reason:
            note(own[0].y.ids, f"'{self._name(own[0])}' {own[0].reason}")
        for rule in self.plan.rules:
            given = [x for x in rule.call.inputs if id(x.origin or x) in reached]
            name = self._name(rule)
            for x in given:
                if x.origin:
                    note(x.origin.ids, f"'{name}' takes another axis for the channels")
                elif isinstance(rule, Opaque):
                    note(x.ids, f"'{name}' {rule.reason}")
                elif isinstance(rule, Kernel):
                    needs = rule.needs(self.plan.gone)
                    read.update(map(int, x.ids[needs]))
                    for i in x.ids[needs & ~np.isnan(x.constant)]:
                        note([i], f"'{name}' {rule.loss(self._others(rule, i))}")
                else:
                    for i in np.unique(rule.lost(x)):
                        note([i], f"'{name}' {rule.loss(self._others(rule, i))}", reads=False)
            if given and not isinstance(rule, (Kernel, Opaque)):
                reached.add(id(rule.y))
        for y in self.plan.outputs:
            if id(y) in reached:
                note(y.ids, "it is an output of the model")
        return read, why

    def _name(self, rule: Rule) -> str:
        return self.plan.names[id(rule.op)]

    def _others(self, rule: Rule, channel: int) -> str:
        """The layers whose channels are tied to a constant one, and live."""
        tensors = [x for x in (*rule.call.inputs, *rule.called) if channel in _varying(x)]
        return " and ".join(dict.fromkeys(self._source(x, channel) for x in tensors))

    def _source(self, x: Tensor, channel: int) -> str:
        """The layer that a channel comes from."""
        while rule := self.makers.get(id(x.origin or x)):
            varying = [z for z in rule.call.inputs if channel in _varying(z)]
            if isinstance(rule, (Kernel, Grouped, Opaque)) or not varying:
                return f"'{self._name(rule)}'"
            x = varying[0]
        return "an input of the model"

    def _tied(self, maker: Rule, channel: int) -> str:
        if isinstance(maker, Grouped):
            return f"'{self._name(maker)}' {maker.whole}"
        names = [
            f"'{self._name(rule)}'"
            for rule in self.plan.rules
            if rule.op is not maker.op
            and isinstance(rule, (Kernel, Grouped, Opaque))
            and any(channel in y.ids for y in rule.call.outputs)
        ]
        return f"it is tied to a channel of {' and '.join(dict.fromkeys(names)) or 'its own layer'}"


def _varying(x: Tensor) -> np.ndarray:
    return x.ids[np.isnan(x.constant)]
