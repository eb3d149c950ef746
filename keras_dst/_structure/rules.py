"""How channels go through a call: their constants, their ties, and what is cut."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from keras import layers, ops

from keras_dst._structure.graph import OPEN, UNKNOWN, Call, Tensor, array
from keras_dst._structure.groups import Groups

DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
# What a merge does with another tensor.
VERBS = {
    **{"Add": "adds", "Subtract": "subtracts", "Multiply": "multiplies by"},
    **{"Average": "averages with", "Maximum": "compares with", "Minimum": "compares with"},
}


class Rule:
    """What one call does with channels."""

    def __init__(self, call: Call, reason: str = ""):
        self.call, self.op, self.reason = call, call.op, reason
        self.called: list[Tensor] = []  # every tensor that a layer with weights is called on

    @property
    def x(self) -> Tensor:
        return self.call.inputs[0]

    @property
    def y(self) -> Tensor:
        return self.call.outputs[0]

    def spread(self) -> None:
        """Give the output its axis of channels, and their constants."""
        raise NotImplementedError

    def tie(self, groups: Groups) -> None:
        """Give the output its ids; tie channels that live or die together."""
        raise NotImplementedError

    def cut(self, config: dict, gone: np.ndarray) -> list[np.ndarray]:
        """Change the layer's config for the channels that stay; return its weights for them.

        Of the channels that go, by id, the constants move into the bias or into one channel.
        """
        return self.op.get_weights()

    def stopped(self) -> np.ndarray:
        """By output channel: whether it comes out the same whatever goes in."""
        return np.zeros(self.y.channels, bool)

    def lost(self, x: Tensor) -> np.ndarray:
        """Ids of the channels of an input that are constant, and no longer so behind this."""
        return x.ids[:0]

    def loss(self, others: str) -> str:
        """Why they are not; `others` are tied to them, and live."""
        if others and len(self.called) > 1:
            return f"is called on {others} too, whose channel lives"
        return "gives the constant of the channel other numbers at other places, as at a border"


class Opaque(Rule):
    """An operation that keeps its channels, for a reason."""

    def spread(self) -> None:
        """Nothing is known of the outputs."""

    def tie(self, groups: Groups) -> None:
        for y in self.call.outputs:
            y.ids = groups.new(y.channels)
        for tensor in (*self.call.inputs, *self.call.outputs):
            groups.pin(tensor)

    def stopped(self) -> np.ndarray:
        kernel = getattr(self.op, "kernel", None)
        shape = tuple(getattr(kernel, "shape", ()))
        if len(self.call.outputs) > 1 or len(shape) < 2 or shape[-1] != self.y.channels:
            return np.zeros(0, bool)
        return np.all(array(kernel) == 0, axis=tuple(range(len(shape) - 1)))


class Plain(Rule):
    """Every channel by itself, all of them alike."""

    def spread(self) -> None:
        axis = self.x.axis if len(self.y.shape) == len(self.x.shape) else len(self.y.shape) - 1
        self.y.carry(axis)
        self.y.constant = self._tried()

    def tie(self, groups: Groups) -> None:
        self.y.ids = self.x.ids

    def lost(self, x: Tensor) -> np.ndarray:
        return self.y.ids[~np.isnan(x.constant) & np.isnan(self.y.constant)]

    def _varies(self) -> np.ndarray:
        return np.any(np.broadcast_arrays(*(np.isnan(x.constant) for x in self.call.inputs)), 0)

    def _tried(self) -> np.ndarray:
        """The constants that the operation gives, from running it on constants."""
        y, varies = self.y, self._varies() & ~self.stopped()
        if varies.all():
            return np.full(y.channels, UNKNOWN)

        def sample(x):
            shape = [1, *(OPEN if n is None else n for n in x.shape[1:])]
            values = np.broadcast_to(_beside(x, np.nan_to_num(x.constant)), shape)
            return ops.convert_to_tensor(values, x.dtype)

        args, kwargs = self.call.map(sample)
        found = np.moveaxis(array(self.op(*args, **kwargs)), y.axis, -1).reshape(-1, y.channels)
        same = np.isclose(found, found[0], rtol=1e-6, atol=0).all(0)
        return np.where(varies | ~same, UNKNOWN, found[0])


class Scaled(Plain):
    """A layer with weights for every channel."""

    def tie(self, groups: Groups) -> None:
        self.called = groups.called(self.op, self.x)
        super().tie(groups)


class Norm(Scaled):
    """Batch normalisation."""

    def stopped(self) -> np.ndarray:
        return array(self.op.gamma) == 0 if self.op.scale else super().stopped()

    def cut(self, config: dict, gone: np.ndarray) -> list[np.ndarray]:
        return [w[~gone[self.x.ids]] for w in self.op.get_weights()]


class Scale(Scaled):
    """Rescaling by numbers, or by one number for each channel of the last axis."""

    def stopped(self) -> np.ndarray:
        return np.broadcast_to(np.ravel(self.op.scale) == 0, self.y.channels)

    def cut(self, config: dict, gone: np.ndarray) -> list[np.ndarray]:
        for key in ("scale", "offset"):
            value = np.asarray(getattr(self.op, key))
            if value.size > 1:
                config[key] = value[..., ~gone[self.x.ids]].tolist()
        return []


class Slope(Scaled):
    """PReLU, whose slopes may be shared along axes."""

    def cut(self, config: dict, gone: np.ndarray) -> list[np.ndarray]:
        (alpha,) = self.op.get_weights()
        axis = self.x.axis - 1
        return [alpha if alpha.shape[axis] == 1 else alpha.compress(~gone[self.x.ids], axis)]


class Merge(Plain):
    """A sum, a product and the like; also a concatenation in time or space."""

    def tie(self, groups: Groups) -> None:
        whole = [x for x in self.call.inputs if x.channels == self.y.channels]
        for x in self.call.inputs:
            if x.channels == self.y.channels:
                groups.tie(x.ids, whole[0].ids)
            else:  # one channel, for all of the others
                groups.pin(x)
        self.y.ids = whole[0].ids

    def stopped(self) -> np.ndarray:
        if type(self.op).__name__ != "Multiply":
            return super().stopped()
        return np.any(np.broadcast_arrays(*(x.constant == 0 for x in self.call.inputs)), 0)

    def loss(self, others: str) -> str:
        verb = VERBS.get(type(self.op).__name__, "joins")
        return f"{verb} {others}, whose channel lives" if others else super().loss(others)


class Sum(Merge):
    """An addition, without the summands that are constants."""

    def spread(self) -> None:
        super().spread()
        for x in self.call.inputs:
            others = [z for z in self.call.inputs if z is not x]
            whole = any(z.shape == self.y.shape for z in others)
            if whole and not np.isnan(x.constant).any():
                self.call.dropped.append(x)

    def offset(self, gone: np.ndarray) -> np.ndarray:
        """What was dropped, in a shape that broadcasts to the output."""
        total = sum(np.broadcast_to(x.constant, self.y.channels) for x in self.call.dropped)
        kept = np.asarray(total)[~gone[self.y.ids]]
        return kept.reshape(-1, *(1,) * (len(self.y.shape) - 1 - self.y.axis))


class Concat(Rule):
    """Channels of several tensors side by side."""

    def spread(self) -> None:
        constants = [x.constant for x in self.call.inputs]
        self.y.carry(self.x.axis, np.concatenate(constants))

    def tie(self, groups: Groups) -> None:
        self.y.ids = np.concatenate([x.ids for x in self.call.inputs])


class Grouped(Plain):
    """A depthwise or a grouped convolution: of every group all channels go, or none."""

    whole = "loses whole groups alone, and others of its group live"

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Inputs and units of a group."""
        groups = self.x.channels if isinstance(self.op, DEPTHWISE) else self.op.groups
        return self.x.channels // groups, self.y.channels // groups

    def tie(self, groups: Groups) -> None:
        self.called = groups.called(self.op, self.x)
        inputs, units = self.sizes
        first = self.x.ids[::inputs]
        groups.tie(self.x.ids, np.repeat(first, inputs))
        self.y.ids = np.repeat(first, units)

    def _varies(self) -> np.ndarray:
        inputs, units = self.sizes
        return np.repeat(np.isnan(self.x.constant).reshape(-1, inputs).any(1), units)

    def lost(self, x: Tensor) -> np.ndarray:
        inputs, units = self.sizes
        varies = np.isnan(self.y.constant).reshape(-1, units).any(1)
        return x.ids[~np.isnan(x.constant) & np.repeat(varies, inputs)]

    def stopped(self) -> np.ndarray:
        kernel = array(self.op.kernel)
        return np.all(kernel.reshape(-1, self.sizes[0], self.y.channels) == 0, axis=(0, 1))

    def cut(self, config: dict, gone: np.ndarray) -> list[np.ndarray]:
        kernel, *bias = self.op.get_weights()
        units = ~gone[self.y.ids]
        if isinstance(self.op, DEPTHWISE):
            kernel = kernel[..., ~gone[self.x.ids], :]
        else:
            kernel = kernel[..., units]
            config["filters"] = int(units.sum())
            config["groups"] = config["filters"] // self.sizes[1]
        return [kernel, *(b[units] for b in bias)]

    def loss(self, others: str) -> str:
        if not others or self.sizes[0] == 1:
            return super().loss(others)
        return self.whole


class Moved(Rule):
    """Flatten, Reshape and Permute."""

    def spread(self) -> None:
        self.y.carry(self._axis())
        rows = self._rows(self.x.constant)
        self.y.constant = np.where(np.all(rows == rows[0], 0), rows[0], UNKNOWN)

    def tie(self, groups: Groups) -> None:
        rows = self._rows(self.x.ids)
        for row in np.unique(rows, axis=0):
            groups.tie(row, rows[0])
        self.y.ids = rows[0]

    def _axis(self) -> int:
        """The axis of the output where the channels are, the last where they are on several."""
        places = self._moved(np.arange(self.x.channels))
        for axis in reversed(range(places.ndim)):
            if np.all(places == places.take([0], axis)):
                continue
            along = np.moveaxis(places, axis, -1).reshape(-1, places.shape[axis])
            return axis + 1 if np.all(along == along[0]) else places.ndim
        return places.ndim

    def _rows(self, values: np.ndarray) -> np.ndarray:
        """Values by channel, by channel of the output: one row for each place."""
        return np.moveaxis(self._moved(values), self.y.axis - 1, -1).reshape(-1, self.y.channels)

    def _moved(self, values: np.ndarray) -> np.ndarray:
        """Values by channel, at every place of the output. An open size is as good as 2."""
        shape = [2 if n is None else n for n in self.x.shape[1:]]
        grid = np.broadcast_to(_beside(self.x, values)[0], shape)
        if isinstance(self.op, layers.Permute):
            return grid.transpose([n - 1 for n in self.op.dims])
        if getattr(self.op, "data_format", None) == "channels_first":  # Flatten
            grid = np.moveaxis(grid, 0, -1)
        return grid.reshape([-1 if n is None else n for n in self.y.shape[1:]])

    def cut(self, config: dict, gone: np.ndarray) -> list[np.ndarray]:
        if "target_shape" in config:
            target = [-1 if n is None else n for n in self.y.shape]
            target[self.y.axis] = int((~gone[self.y.ids]).sum())
            config["target_shape"] = tuple(target[1:])
        return []

    def lost(self, x: Tensor) -> np.ndarray:
        known = ~np.isnan(self._rows(x.constant))
        return self._rows(x.ids)[known & np.isnan(self.y.constant)]

    def loss(self, others: str) -> str:
        return "makes one channel of several that differ"


class Kernel(Rule):
    """A layer whose units read all channels: Dense or a convolution."""

    @property
    def layer(self):
        """The layer with the weights."""
        return self.op

    @cached_property
    def w(self) -> np.ndarray:
        """What the layer multiplies by: window, channels, units."""
        return array(self.layer.kernel)

    @cached_property
    def window(self) -> tuple[int, ...]:
        """The axes of the window."""
        return tuple(range(self.w.ndim - 2))

    @cached_property
    def reads(self) -> np.ndarray:
        """By channel and unit: whether there is a weight that is not zero."""
        return np.any(self.w != 0, axis=self.window)

    @property
    def pads(self) -> bool:
        """Whether the layer sees zeros around its input, where a constant channel ends."""
        window = getattr(self.layer, "kernel_size", (1,))
        return getattr(self.layer, "padding", "valid") != "valid" and math.prod(window) > 1

    def spread(self) -> None:
        self.y.carry(self.x.axis if len(self.w.shape) > 2 else len(self.y.shape) - 1)
        if not self.reason:
            self.y.constant = self._units()

    def _units(self) -> np.ndarray:
        """The number that every unit always gives, or NaN."""
        constant = self.x.constant
        usable = (constant == 0) if self.pads else ~np.isnan(constant)
        varies = (self.reads & ~usable[:, None]).any(0)
        value = np.nan_to_num(constant) @ self.w.sum(self.window)
        if self.layer.use_bias:
            value = value + array(self.layer.bias)
        given = self.layer.activation(ops.convert_to_tensor(value, "float32"))
        return np.where(varies, UNKNOWN, array(given))

    def tie(self, groups: Groups) -> None:
        self.called = groups.called(self.op, self.x)
        self.unit_ids = self.y.ids = groups.units(self.op, self.y.channels)
        if self.reason:
            groups.pin(self.y)

    def stopped(self) -> np.ndarray:
        return np.all(~self.reads, axis=0)

    def known(self) -> np.ndarray:
        """By channel: the constant that it is in every call, or NaN."""
        constants = np.stack([x.constant for x in self.called])
        return np.where(np.all(constants == constants[0], 0), constants[0], UNKNOWN)

    def spares(self) -> np.ndarray:
        """By channel: whether it is a constant, and the layer can do without it."""
        return ~np.isnan(self.known())

    def needs(self, gone: np.ndarray) -> np.ndarray:
        """By channel: whether it has to stay for the units that do."""
        return self.reads[:, ~gone[self.unit_ids]].any(1) & ~self.spares()

    def holder(self, gone: np.ndarray) -> int | None:
        """The channel that holds all the constants where they cannot go into the bias."""
        kept, constant = ~gone[self.x.ids], self._lost(gone)
        if not self.pads or not constant.any():
            return None
        known = np.nan_to_num(self.known())
        best = np.abs(known) * (kept if np.any(known[kept]) else ~kept)
        return int(best.argmax())

    def _lost(self, gone: np.ndarray) -> np.ndarray:
        """By channel: the constant that is lost with it."""
        lost = gone[self.x.ids] & self.reads[:, ~gone[self.unit_ids]].any(1)
        return np.where(lost, np.nan_to_num(self.known()), 0.0)

    def cut(self, config: dict, gone: np.ndarray) -> list[np.ndarray]:
        kept, units = ~gone[self.x.ids], ~gone[self.unit_ids]
        config["units" if "units" in config else "filters"] = int(units.sum())
        given = np.einsum("i,...io->...o", self._lost(gone), self.w)
        bias = array(self.layer.bias) if self.layer.use_bias else np.zeros(len(units))
        holder = self.holder(gone)
        w = self.w.copy()
        if holder is not None:
            w[..., holder, :] += given / self.known()[holder]
        else:
            bias = bias + given.sum(self.window)
        config["use_bias"] = bool(self.layer.use_bias or bias.any())
        return self._sliced(w, kept, units) + [bias[units]] * config["use_bias"]

    def _sliced(self, w: np.ndarray, kept: np.ndarray, units: np.ndarray) -> list[np.ndarray]:
        return [w[..., kept, :][..., units]]


class Transposed(Kernel):
    """A transposed convolution. Not all of its window meets the input at every place."""

    @cached_property
    def w(self) -> np.ndarray:
        return np.swapaxes(array(self.layer.kernel), -1, -2)

    @property
    def pads(self) -> bool:
        return math.prod((*self.op.kernel_size, *self.op.strides)) > 1

    def _sliced(self, w, kept, units) -> list[np.ndarray]:
        return [np.swapaxes(sliced, -1, -2) for sliced in super()._sliced(w, kept, units)]


class Separable(Kernel):
    """A depthwise convolution, and one of a window of 1 behind it."""

    @cached_property
    def w(self) -> np.ndarray:
        return np.einsum("...im,imo->...io", array(self.op.depthwise_kernel), self._pointwise)

    @property
    def _pointwise(self) -> np.ndarray:
        pointwise = array(self.op.pointwise_kernel)
        return pointwise.reshape(-1, self.op.depth_multiplier, pointwise.shape[-1])

    def spares(self) -> np.ndarray:
        # No channel can hold the constant of another: each has but one window.
        return self.known() == 0 if self.pads else super().spares()

    def _sliced(self, w, kept, units) -> list[np.ndarray]:
        pointwise = self._pointwise[kept].reshape(-1, len(units))[:, units]
        shape = (1,) * len(self.window) + pointwise.shape
        return [array(self.op.depthwise_kernel)[..., kept, :], pointwise.reshape(shape)]

    def loss(self, others: str) -> str:
        return super().loss(others) if others else "pads with zeros, where its constant ends"


class Distributed(Kernel):
    """TimeDistributed(Dense)."""

    @property
    def layer(self):
        return self.op.layer

    def cut(self, config: dict, gone: np.ndarray) -> list[np.ndarray]:
        del config["layer"]["build_config"]
        return super().cut(config["layer"]["config"], gone)


class Recurrent(Kernel):
    """SimpleRNN, LSTM or GRU: its units stay, as all of them read all of them."""

    @property
    def layer(self):
        return self.op.cell

    def spread(self) -> None:
        self.y.carry(len(self.y.shape) - 1)

    def tie(self, groups: Groups) -> None:
        self.called = groups.called(self.op, self.x)
        self.unit_ids = groups.units(self.op, self.w.shape[-1])
        self.y.ids = groups.new(self.y.channels)
        groups.pin_ids(self.unit_ids)
        groups.pin(self.y)

    def stopped(self) -> np.ndarray:
        return np.zeros(0, bool)

    def spares(self) -> np.ndarray:
        return super().spares() if self.layer.use_bias else self.known() == 0

    def cut(self, config: dict, gone: np.ndarray) -> list[np.ndarray]:
        kernel, recurrent, *bias = self.op.get_weights()
        for b in bias:  # the first row of a GRU's is added to the input
            b.reshape(-1, kernel.shape[-1])[0] += self._lost(gone) @ self.w
        return [kernel[~gone[self.x.ids]], recurrent, *bias]

    def loss(self, others: str) -> str:
        return super().loss(others) if others else "has no bias for the constant of the channel"


def _beside(x: Tensor, values: np.ndarray) -> np.ndarray:
    """Values by channel, in a shape that broadcasts to that of the tensor."""
    shape = [1] * len(x.shape)
    shape[x.axis] = x.channels
    return values.reshape(shape)
