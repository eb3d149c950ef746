"""Reasons why `shrink` keeps dead channels.

Most reasons name a later layer that needs the channel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from keras_dst._structure.graph import Tensor
from keras_dst._structure.handlers import ChannelHandler, GroupedConv, Opaque
from keras_dst._structure.plan import Plan


def explained_layers(plan: Plan) -> Iterator[tuple[ChannelHandler, Counter[str]]]:
    """Yield a pair for each layer that computes channels: its handler, and a Counter of the reasons
    why dead channels of the layer are kept."""
    finder = _ReasonFinder(plan)
    seen = set()
    kept = {id(handler.op) for handler in plan.handlers}
    for handler in plan.all_handlers:
        if id(handler.op) not in seen and _makes_channels(handler):
            seen.add(id(handler.op))
            yield handler, finder.reasons(handler) if id(handler.op) in kept else Counter()


def _makes_channels(handler: ChannelHandler) -> bool:
    return handler.makes_channels or (
        isinstance(handler, Opaque) and bool(handler.ignores_input().size)
    )


class _ReasonFinder:
    """Search for the layers that need the output channels of a given layer. The search follows the
    graph towards the outputs."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.producers = {id(y): handler for handler in plan.handlers for y in handler.call.outputs}

    def reasons(self, layer: ChannelHandler) -> Counter[str]:
        """Return a Counter of the reasons why dead units of a layer are kept."""
        plan, ids = self.plan, layer.y.ids
        calls = [handler for handler in plan.handlers if handler.op is layer.op]
        read, why = self._follow(calls)
        dead = ~np.isin(ids, list(read))
        zero = layer.ignores_input()
        if zero.size:
            dead |= zero
        kept = ids[dead & ~plan.removed[ids]]
        return Counter(
            plan.kept_reasons.get(i) or why.get(i) or self._coupling_reason(layer, i) for i in kept
        )

    def _follow(self, calls: list[ChannelHandler]) -> tuple[set[int], dict[int, str]]:
        """Return a set and a dict. The set holds the ids of the channels that later layers read.
        The dict maps the id of a channel to the reason why the channel cannot be removed."""
        read: set[int] = set()
        why: dict[int, str] = {}
        reached = {id(handler.y) for handler in calls}

        def note(ids: Iterable[int], reason: str, reads: bool = True) -> None:
            for i in ids:
                why.setdefault(int(i), reason)
            if reads:
                read.update(map(int, ids))

        if calls[0].reason:
            note(calls[0].y.ids, f"'{self._name(calls[0])}' {calls[0].reason}")
        for handler in self.plan.handlers:
            given = [x for x in handler.call.inputs if id(x.origin or x) in reached]
            name = self._name(handler)
            for x in given:
                if x.origin:
                    note(x.origin.ids, f"'{name}' has its channels on another axis; use one axis")
                elif isinstance(handler, Opaque):
                    note(x.ids, f"'{name}' {handler.reason}")
                    continue
                needs = handler.needs(x, self.plan.removed)
                if needs.any():
                    read.update(map(int, x.ids[needs]))
                    for i in x.ids[needs & ~np.isnan(x.constant)]:
                        note([i], f"'{name}' {handler.reason_for(self._coupled(handler, i))}")
                if not handler.makes_channels or isinstance(handler, GroupedConv):
                    for i in np.unique(handler.broken_constants(x)):
                        reason = handler.reason_for(self._coupled(handler, i))
                        note([i], f"'{name}' {reason}", reads=False)
            passes = not handler.makes_channels or isinstance(handler, GroupedConv)
            if given and passes and not isinstance(handler, Opaque):
                reached |= {id(y) for y in handler.call.outputs}
        for y in self.plan.outputs:
            if id(y) in reached:
                note(y.ids, "it is an output of the model; exclude its layer from pruning")
        return read, why

    def _name(self, handler: ChannelHandler) -> str:
        return self.plan.names[id(handler.op)]

    def _coupled(self, handler: ChannelHandler, channel: int) -> str:
        """Return the names of all layers that compute a non-constant value for the given
        channel."""
        tensors = [
            x for x in (*handler.call.inputs, *handler.called_on) if channel in _varying_ids(x)
        ]
        return " and ".join(dict.fromkeys(self._source(x, channel) for x in tensors))

    def _source(self, x: Tensor, channel: int) -> str:
        """Return the name of the layer that computes a channel."""
        while handler := self.producers.get(id(x.origin or x)):
            varying = [z for z in handler.call.inputs if channel in _varying_ids(z)]
            if _makes_channels(handler) or isinstance(handler, Opaque) or not varying:
                return f"'{self._name(handler)}'"
            x = varying[0]
        return "an input of the model"

    def _coupling_reason(self, layer: ChannelHandler, channel: int) -> str:
        if isinstance(layer, GroupedConv):
            return f"'{self._name(layer)}' {layer.whole_groups}"
        names = [
            f"'{self._name(handler)}'"
            for handler in self.plan.handlers
            if handler.op is not layer.op
            and (handler.makes_channels or isinstance(handler, Opaque))
            and any(channel in y.ids for y in handler.call.outputs)
        ]
        others = " and ".join(dict.fromkeys(names)) or "the same layer"
        return f"it is coupled to a channel of {others}; remove both"


def _varying_ids(x: Tensor) -> np.ndarray:
    return x.ids[np.isnan(x.constant)]
