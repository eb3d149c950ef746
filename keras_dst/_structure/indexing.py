"""Layer handlers of operations with axis arguments: stacks, reductions, slices, splits, padding."""

from __future__ import annotations

import numpy as np
from keras import ops

from keras_dst._structure.graph import Call
from keras_dst._structure.handlers import ChannelHandler, Elementwise, ElementwiseMerge
from keras_dst._structure.unions import ChannelUnions


class Reduction(Elementwise):
    """Mean, maximum or minimum over axes other than the channel axis."""

    def place_channels(self) -> None:
        axes = [] if self.op.keepdims else [axis % len(self.x.shape) for axis in self.op.axis]
        self.y.set_channels(self.x.axis - sum(axis < self.x.axis for axis in axes))


class Stack(ElementwiseMerge):
    """Stack of several tensors along a new axis."""

    def place_channels(self) -> None:
        new = self.op.axis % len(self.y.shape)
        self.y.set_channels(self.x.axis + (new <= self.x.axis))


class Slice(ChannelHandler):
    """Slice such as `x[:, 0]` or `x[..., :8]`."""

    def __init__(self, call: Call, reason: str = ""):
        super().__init__(call, reason)
        entries = full_key(call)
        assert entries is not None  # `handler_for` rejects slices with unsupported keys.
        self.entries = entries

    def place_channels(self) -> None:
        self.y.set_channels(sum(isinstance(e, slice) for e in self.entries[: self.x.axis]))

    def propagate_constants(self) -> None:
        self.y.constant = self.x.constant[self.entries[self.x.axis]]

    def couple(self, unions: ChannelUnions) -> None:
        self.y.ids = self.x.ids[self.entries[self.x.axis]]

    def apply(self, operation, args: tuple, kwargs: dict, removed: np.ndarray):
        x, axis = args[0], self.x.axis
        kept = ~removed[self.x.ids]
        start, stop, _ = self.entries[axis].indices(len(kept))
        key = list(self.entries)
        key[axis] = slice(int(kept[:start].sum()), int(kept[:stop].sum()))
        return operation(x, tuple(key))


def full_key(call: Call) -> list | None:
    """Return the key of a slice as a list with an integer or a slice for every axis. Return None if
    the key is not supported."""
    x = call.inputs[0]
    key = call.args[1] if len(call.args) > 1 else call.kwargs.get("key")
    entries = list(key) if isinstance(key, (tuple, list)) else [key]
    if not all(isinstance(e, (int, slice)) or e is Ellipsis for e in entries):
        return None
    rest = [slice(None)] * (len(x.shape) - sum(e is not Ellipsis for e in entries))
    at = next((i for i, e in enumerate(entries) if e is Ellipsis), len(entries))
    entries = entries[:at] + rest + entries[at + 1 :]
    along = entries[x.axis]
    return entries if isinstance(along, slice) and along.step in (None, 1) else None


class Split(ChannelHandler):
    """Split into several tensors."""

    @property
    def axis(self) -> int:
        """Axis along which the tensor is split."""
        return self.op.axis % len(self.x.shape)

    def place_channels(self) -> None:
        for y in self.call.outputs:
            y.set_channels(self.x.axis)

    def _parts(self, values: np.ndarray) -> list[np.ndarray]:
        """Return one array per output tensor, with one value for each channel of the tensor. The
        argument `values` has one value for each input channel."""
        if self.axis != self.x.axis:
            return [values] * len(self.call.outputs)
        ends = np.cumsum([y.channels for y in self.call.outputs])
        return np.split(values, ends[:-1])

    def propagate_constants(self) -> None:
        for y, constant in zip(self.call.outputs, self._parts(self.x.constant)):
            y.constant = constant

    def couple(self, unions: ChannelUnions) -> None:
        for y, ids in zip(self.call.outputs, self._parts(self.x.ids)):
            y.ids = ids

    def apply(self, operation, args: tuple, kwargs: dict, removed: np.ndarray):
        if self.axis != self.x.axis:
            return operation(*args, **kwargs)
        sizes = [int((~removed[y.ids]).sum()) for y in self.call.outputs]
        return ops.split(args[0], np.cumsum(sizes[:-1]).tolist(), axis=self.axis)


class Padding(ChannelHandler):
    """Zero padding of a tensor, for example along its channels."""

    @property
    def width(self) -> list[tuple[int, int]]:
        """For each axis, the numbers of zeros that are added before and after the input."""
        width = [tuple(pair) for pair in self.op.pad_width]
        return width * len(self.x.shape) if len(width) == 1 else width

    def place_channels(self) -> None:
        self.y.set_channels(self.x.axis)

    def propagate_constants(self) -> None:
        axis = self.x.axis
        inside = self.x.constant
        if any(pair != (0, 0) for a, pair in enumerate(self.width) if a != axis):
            # After padding with zeros, only channels whose constant value is 0 are still constant.
            inside = np.where(inside == 0, 0.0, np.nan)
        self.y.constant = np.pad(inside, self.width[axis])

    def couple(self, unions: ChannelUnions) -> None:
        before, after = self.width[self.x.axis]
        self.y.ids = np.concatenate([unions.new(before), self.x.ids, unions.new(after)])

    def broken_constants(self, x) -> np.ndarray:
        before = self.width[x.axis][0]
        found = self.y.constant[before : before + x.channels]
        return x.ids[~np.isnan(x.constant) & np.isnan(found)]

    def apply(self, operation, args: tuple, kwargs: dict, removed: np.ndarray):
        axis = self.x.axis
        before, after = self.width[axis]
        kept = ~removed[self.y.ids]
        width = list(self.width)
        width[axis] = (int(kept[:before].sum()), int(kept[len(kept) - after :].sum()))
        return ops.pad(args[0], width)
