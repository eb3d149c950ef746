"""First and second pass of `shrink`: find constants and coupled channels, and choose the channels
to remove."""

from __future__ import annotations

import keras
import numpy as np

from keras_dst import _keras
from keras_dst._structure.dispatch import handler_for
from keras_dst._structure.graph import Tensor, flatten_graph
from keras_dst._structure.handlers import Addition, ChannelHandler, KernelLayer
from keras_dst._structure.unions import ChannelUnions


class Plan:
    """Channels that are removed from a model, and reasons why other channels are kept.

    Args:
        model: Sequential or Functional model, dense or sparse.
        remove: Whether to remove channels. If False, no channel is removed, and `build` makes a
            dense copy of the model. Defaults to True.

    Attributes:
        all_handlers: List with one layer handler for each call of an operation, in call order.
        handlers: Layer handlers of the calls that the outputs of the smaller model depend on.
        names: Dict that maps the id of each operation to its name in the smaller model. The dict
            also maps the id of each `Addition` with constant inputs to the name of the layer that
            adds the constants.
        tied: Operations that share a weight. The dict maps the id of each operation to a phrase,
            such as "shares a weight with 'dense'".
        originals: Dict that maps the id of each variable of a dense copy to the corresponding
            variable of the given model.
        pinned: Boolean array that is True for each set of coupled channels that must be kept.
        pin_reasons: Dict that maps the id of a set of coupled channels to the reason why the
            channels cannot be removed.
        removed: Boolean array that is True for each set of coupled channels that is removed.
        kept_reasons: Sets of coupled channels that are kept although no kept channel needs them.
            The dict maps the id of each set to the reason.
    """

    def __init__(self, model, remove: bool = True):
        self.model = model
        self.graph = _keras.graph_of(model)
        self.inputs = [Tensor(tuple(x.shape), x.dtype) for x in self.graph.inputs]
        calls, self.outputs, self.originals = flatten_graph(model, self.inputs)
        self.tied = _weight_sharing([call.op for call in calls])
        self.all_handlers = []
        for call in calls:
            handler = handler_for(call, self.tied.get(id(call.op), ""))
            handler.place_channels()
            if remove:
                handler.propagate_constants()
                if isinstance(handler, Addition):
                    handler.drop_constant_terms()
            self.all_handlers.append(handler)
        self.handlers = self._needed_handlers() if remove else self.all_handlers
        self.names = self._unique_names()
        self.pinned = self._couple_channels()
        self.kernels = list(
            {id(h.op): h for h in self.handlers if isinstance(h, KernelLayer)}.values()
        )
        self.removed = np.zeros(len(self.pinned), bool)
        self.kept_reasons: dict[int, str] = {}
        if remove:
            self._remove_unread_channels()
            self._keep_necessary_channels()

    def keeps(self, x: Tensor) -> np.ndarray:
        """Return a boolean array that is True for each kept channel of a tensor."""
        return ~self.removed[x.ids]

    def removes_nothing(self) -> bool:
        """Return True if the plan removes neither a layer nor a channel of the given model."""
        needed = {id(handler.op) for handler in self.handlers}
        layers = [h.op for h in self.all_handlers if isinstance(h.op, keras.Layer)]
        outputs = (y for handler in self.handlers for y in handler.call.outputs)
        return all(id(op) in needed for op in layers) and all(self.keeps(y).all() for y in outputs)

    def _needed_handlers(self) -> list[ChannelHandler]:
        """Return the layer handlers of the calls that the outputs of the model depend on."""
        needed = {id(x) for x in self.outputs}
        handlers = []
        for handler in reversed(self.all_handlers):
            if any(id(y) in needed for y in handler.call.outputs):
                handlers.append(handler)
                read = (*handler.call.inputs, *handler.call.masks)
                needed |= {id(x.origin or x) for x in read}
        return handlers[::-1]

    def _unique_names(self) -> dict[int, str]:
        taken = {_keras.operation_of(x).name for x in self.graph.inputs}
        names: dict[int, str] = {}

        def add(key: int, name: str, prefix: str) -> None:
            while name in taken:
                name = (prefix or "again_") + name
            taken.add(name)
            names[key] = name

        for handler in self.handlers:
            if id(handler.op) not in names:
                add(id(handler.op), handler.op.name, handler.call.prefix)
        for handler in self.handlers:
            if handler.call.constant_terms:
                name = f"{names[id(handler.op)]}_constant"
                add(id(handler), name, handler.call.prefix)
        return names

    def _couple_channels(self) -> np.ndarray:
        """Find the sets of channels that are kept or removed together.

        Return a boolean array that is True for the sets of channels that cannot be removed.
        """
        unions = ChannelUnions()
        for x in self.inputs:
            x.ids = unions.new(x.channels)
            unions.pin(x.ids, "it is an input of the model")
        tensors = list(self.inputs)
        for handler in self.handlers:
            name = handler.op.name
            for view in handler.call.inputs:
                if view.origin:
                    view.ids = unions.new(view.channels)
                    for ids in (view.ids, view.origin.ids):
                        unions.pin(ids, f"'{name}' has its channels on another axis; use one axis")
                    tensors.append(view)
            handler.couple(unions)
            for mask in handler.call.masks:
                unions.pin(mask.ids, f"'{name}' reads the channel as a mask")
            tensors += handler.call.outputs
        for y in self.outputs:
            unions.pin(y.ids, "it is an output of the model")
        roots = unions.roots()
        for tensor in tensors:
            tensor.ids = roots[tensor.ids]
        for handler in self.handlers:
            handler.relabel(roots)
        self.pin_reasons = unions.reasons(roots)
        pinned = np.zeros(len(roots), bool)
        pinned[list(self.pin_reasons)] = True
        return pinned

    def _remove_unread_channels(self) -> None:
        """Remove sets of coupled channels that no kept channel needs, until all remaining sets are
        needed."""
        # Use one handler for all calls of a kernel, because all calls need the same channels.
        known = {id(kernel.op) for kernel in self.kernels}
        others = [h for h in self.handlers if id(h.op) not in known]
        readers = [*self.kernels, *others]
        while True:
            needed = self.pinned.copy()
            for handler in readers:
                needed[handler.needed_inside(self.removed)] = True
                for x in handler.call.inputs:
                    needed[x.ids[handler.needs(x, self.removed)]] = True
            if np.array_equal(self.removed, ~needed):
                return
            self.removed = ~needed

    def _keep_necessary_channels(self) -> None:
        """Keep at least one channel of every tensor. Also keep the constant channels that layers
        with zero padding need (see `KernelLayer.carrier`)."""

        def keep(group: int, reason: str) -> None:
            self.removed[group] = False
            self.kept_reasons[group] = reason

        for kernel in self.kernels:
            carrier = kernel.carrier(self.removed)
            if carrier is not None and self.removed[kernel.x.ids[carrier]]:
                name = self.names[id(kernel.op)]
                keep(
                    kernel.x.ids[carrier],
                    f"'{name}' pads with zeros and needs one constant channel in place of the "
                    "removed constant channels; use padding='valid' to remove this channel too",
                )
        for tensor in (y for handler in self.handlers for y in handler.call.outputs):
            if len(tensor.ids) and self.removed[tensor.ids].all():
                keep(tensor.ids[0], "every layer keeps at least one channel; nothing can be done")


def _weight_sharing(operations: list) -> dict[int, str]:
    """Find the operations that share a weight. The returned dict maps the id of each such operation
    to a phrase, such as "shares a weight with 'dense'"."""
    owners: dict[int, dict[int, str]] = {}
    for op in operations:
        for variable in getattr(op, "weights", ()):
            owners.setdefault(id(variable), {})[id(op)] = op.name
    reasons = {}
    for shared in (names for names in owners.values() if len(names) > 1):
        for op in shared:
            others = " and ".join(f"'{name}'" for key, name in shared.items() if key != op)
            reasons[op] = f"shares a weight with {others}"
    return reasons
