"""Layer handlers: how each kind of layer treats its channels.

`shrink` creates one handler for every call of a layer. The handler determines which output channels
are constant, and which channels must be removed together. The handler also slices the weights of
the layer, and states why a channel cannot be removed.
"""

from __future__ import annotations

import math
from functools import cached_property

import keras
import numpy as np
from keras import layers, ops

from keras_dst._structure.copies import live_config
from keras_dst._structure.graph import UNKNOWN, Call, Tensor, to_float64
from keras_dst._structure.unions import ChannelUnions, Member
from keras_dst._utils.open_sizes import OPEN_SIZE

DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
MERGE_VERBS = {
    **{"Add": "adds", "Subtract": "subtracts", "Multiply": "multiplies by"},
    **{"Average": "averages with", "Maximum": "compares with", "Minimum": "compares with"},
}
NOT_READ = "prune layers whose channels it does not read"
_SAME_CHANNEL = "remove the same channel there too"


class ChannelHandler:
    """Base class of layer handlers. A handler relates the output channels of one call to the input
    channels.

    Args:
        call: The call.
        reason: Reason why no output channel of the operation can be removed, or an empty string.
    """

    can_slice = False  # Whether the handler creates the layer again with fewer channels.
    makes_channels = False  # True for layers that compute new channels, such as `Dense`.

    def __init__(self, call: Call, reason: str = ""):
        self.call, self.op, self.reason = call, call.op, reason
        # Inputs of all calls of the layer, if the layer has weights.
        self.called_on: list[Tensor] = []

    @property
    def x(self) -> Tensor:
        """The first input."""
        return self.call.inputs[0]

    @property
    def y(self) -> Tensor:
        """The first output."""
        return self.call.outputs[0]

    def place_channels(self) -> None:
        """Store in the output tensor which of its axes is the channel axis."""

    def propagate_constants(self) -> None:
        """Determine which output channels are constant, and compute their values."""

    def couple(self, unions: ChannelUnions) -> None:
        """Give ids to the output channels. Couple the channels that must be removed together, and
        mark the channels that cannot be removed."""
        raise NotImplementedError

    def members(self) -> list[Member]:
        """Return the variables of the layer that have channels. Call this method after `couple` has
        given ids to all channels."""
        return []

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        """Adapt the layer's config to the kept channels, and return the weights without removed
        channels.

        Removed channels are constant, and their contribution is added to the bias. If the layer
        pads with zeros, the contribution is added to the kernel entries of one kept channel
        instead.

        Args:
            config: Dict of the layer's constructor arguments, which the function changes in place.
            removed: Boolean array that is True for each set of coupled channels that is removed.
        """
        axes = {id(member.variable): member.axes for member in self.members()}
        weights = []
        for variable, w in zip(self.op.weights, self.op.get_weights()):
            for axis, ids in axes.get(id(variable), {}).items():
                w = w.compress(~removed[ids], axis)
            weights.append(w)
        return weights

    def apply(self, operation, args: tuple, kwargs: dict, removed: np.ndarray):
        """Call an operation of the smaller model, and return its output.

        Args:
            operation: The replacement of the handler's operation, with only the kept channels.
            args: Positional arguments of the call, with the tensors of the smaller model.
            kwargs: Keyword arguments of the call, with the tensors of the smaller model.
            removed: Boolean array that is True for each set of coupled channels that is removed.
        """
        return operation(*args, **kwargs)

    def relabel(self, roots: np.ndarray) -> None:
        """Replace the id of each output unit by the id of the set of coupled channels that contains
        the unit."""

    def needs(self, x: Tensor, removed: np.ndarray) -> np.ndarray:
        """Return a boolean array that is True for the channels of `x` that must be kept because the
        operation reads them. An operation that only passes channels on, such as an activation, does
        not read channels itself.

        Args:
            x: Input of the call.
            removed: Boolean array that is True for each set of coupled channels that is removed.
        """
        return np.zeros(x.channels, bool)

    def needed_inside(self, removed: np.ndarray) -> np.ndarray:
        """Return the ids of inner channels, such as attention heads, that the layer's outputs
        need."""
        return np.zeros(0, int)

    def ignores_input(self) -> np.ndarray:
        """Return whether each output channel has the same value for all inputs, as a boolean
        array."""
        return np.zeros(self.y.channels, bool)

    def broken_constants(self, x: Tensor) -> np.ndarray:
        """Return the ids of the channels that are constant in the input, but not in the output."""
        return x.ids[:0]

    def reason_for(self, others: str) -> str:
        """Return the reason why a constant input channel does not stay constant in the output.

        Args:
            others: Names of the layers that compute a non-constant value for the channel.
        """
        if others and len(self.called_on) > 1:
            return f"is also called on {others}, whose channel is in use; {_SAME_CHANNEL}"
        return (
            "changes the constant of the channel at some positions, as padding does at the border; "
            "make the channel zero or do not pad"
        )


class Opaque(ChannelHandler):
    """Operation whose input and output channels are all kept. `reason` states why."""

    def couple(self, unions: ChannelUnions) -> None:
        for y in self.call.outputs:
            y.ids = unions.new(y.channels)
        for tensor in (*self.call.inputs, *self.call.outputs):
            unions.pin(tensor.ids, f"'{self.op.name}' {self.reason}")

    def ignores_input(self) -> np.ndarray:
        kernel = getattr(self.op, "kernel", None)
        shape = tuple(getattr(kernel, "shape", ()))
        if len(self.call.outputs) > 1 or len(shape) < 2 or shape[-1] != self.y.channels:
            return np.zeros(0, bool)
        return np.all(to_float64(kernel) == 0, axis=tuple(range(len(shape) - 1)))


class Elementwise(ChannelHandler):
    """Operation that applies the same function to every channel separately."""

    def place_channels(self) -> None:
        axis = self.x.axis if len(self.y.shape) == len(self.x.shape) else len(self.y.shape) - 1
        self.y.set_channels(axis)

    def propagate_constants(self) -> None:
        self.y.constant = self._run_on_constants()

    def couple(self, unions: ChannelUnions) -> None:
        self.y.ids = self.x.ids

    def broken_constants(self, x: Tensor) -> np.ndarray:
        return self.y.ids[~np.isnan(x.constant) & np.isnan(self.y.constant)]

    def _varies(self) -> np.ndarray:
        return np.any(np.broadcast_arrays(*(np.isnan(x.constant) for x in self.call.inputs)), 0)

    def _run_on_constants(self) -> np.ndarray:
        """Run the operation on the constant values of its input channels. Return the constant value
        of each output channel, or NaN."""
        y, varies = self.y, self._varies() & ~self.ignores_input()
        if varies.all():
            return np.full(y.channels, UNKNOWN)

        def sample(x):
            shape = [1, *(OPEN_SIZE if n is None else n for n in x.shape[1:])]
            if any(x is mask for mask in self.call.masks):
                return ops.ones(shape, x.dtype)
            values = np.broadcast_to(_broadcast_channels(x, np.nan_to_num(x.constant)), shape)
            return ops.convert_to_tensor(values, x.dtype)

        args, kwargs = self.call.map(sample)
        # The handler calls a layer of the user's model. A stateless scope keeps the layer's
        # variables unchanged.
        with keras.StatelessScope():
            found = to_float64(self.op(*args, **kwargs))
        found = np.moveaxis(found, y.axis, -1).reshape(-1, y.channels)
        same = np.isclose(found, found[0], rtol=1e-6, atol=0).all(0)
        return np.where(varies | ~same, UNKNOWN, found[0])


class PerChannel(Elementwise):
    """Layer that has separate parameters for each channel, such as batch normalization."""

    can_slice = True

    def couple(self, unions: ChannelUnions) -> None:
        self.called_on = unions.called_on(self.op, self.x)
        super().couple(unions)


class Normalization(PerChannel):
    """Normalization with an optional scale and an optional offset for every channel."""

    def ignores_input(self) -> np.ndarray:
        return to_float64(self.op.gamma) == 0 if self.op.scale else super().ignores_input()

    def members(self) -> list[Member]:
        offsets = [v for v in (self.op.gamma, self.op.beta) if v is not None]
        return [Member(v, {-1: self.x.ids}, follows=True) for v in offsets]


class BatchNorm(Normalization):
    """Batch normalization."""

    def propagate_constants(self) -> None:
        op = self.op
        scale = (to_float64(op.moving_variance) + op.epsilon) ** -0.5
        scale = scale * to_float64(op.gamma) if op.scale else scale
        offset = to_float64(op.beta) if op.center else 0.0
        centered = self.x.constant - to_float64(op.moving_mean)
        self.y.constant = np.where(scale == 0, 0.0, centered * scale) + offset

    def members(self) -> list[Member]:
        op, axes = self.op, {-1: self.x.ids}
        means, variances = [op.moving_mean], [op.moving_variance]
        if getattr(op, "renorm", False):
            means.append(op.renorm_mean)
            variances += [op.moving_stddev, op.renorm_stddev]
        found = [*super().members(), *(Member(mean, axes, follows=True) for mean in means)]
        return [*found, *(Member(variance, axes) for variance in variances)]


class Rescale(PerChannel):
    """`Rescaling` layer, with one scale for the whole input or one scale per channel of the last
    axis."""

    def ignores_input(self) -> np.ndarray:
        return np.broadcast_to(np.ravel(self.op.scale) == 0, self.y.channels)

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        for key in ("scale", "offset"):
            value = np.asarray(getattr(self.op, key))
            if value.size > 1:
                config[key] = value[..., ~removed[self.x.ids]].tolist()
        return []


class PReLUSlopes(PerChannel):
    """PReLU, whose slopes may be shared along axes."""

    def members(self) -> list[Member]:
        axis = self.x.axis - len(self.x.shape)
        shared = self.op.alpha.shape[axis] == 1
        return [Member(self.op.alpha, {} if shared else {axis: self.x.ids})]


class ElementwiseMerge(Elementwise):
    """Merge of several tensors: a sum, product or similar elementwise operation, or a concatenation
    along time or space."""

    def couple(self, unions: ChannelUnions) -> None:
        whole = [x for x in self.call.inputs if x.channels == self.y.channels]
        for x in self.call.inputs:
            if x.channels == self.y.channels:
                unions.couple(x.ids, whole[0].ids)
            else:  # The input has a single channel, which is broadcast.
                reason = f"'{self.op.name}' broadcasts the channel; {NOT_READ}"
                unions.pin(x.ids, reason)
        self.y.ids = whole[0].ids

    def ignores_input(self) -> np.ndarray:
        if type(self.op).__name__ != "Multiply":
            return super().ignores_input()
        return np.any(np.broadcast_arrays(*(x.constant == 0 for x in self.call.inputs)), 0)

    def reason_for(self, others: str) -> str:
        if not others:
            return super().reason_for(others)
        verb = MERGE_VERBS.get(type(self.op).__name__, "joins")
        return f"{verb} {others}, whose channel is in use; {_SAME_CHANNEL}"


class Addition(ElementwiseMerge):
    """Sum of tensors. Inputs whose channels are all constant can be replaced by an offset."""

    def drop_constant_terms(self) -> None:
        """Replace constant inputs by an offset, unless this could change the Keras mask of the
        output."""
        if any(x.masked for x in self.call.inputs):
            return
        for x in self.call.inputs:
            others = [z for z in self.call.inputs if z is not x]
            whole = any(z.shape == self.y.shape for z in others)
            if whole and not np.isnan(x.constant).any():
                self.call.constant_terms.append(x)

    def sum_of_constants(self, removed: np.ndarray) -> np.ndarray:
        """Return the offset that replaces the constant inputs, in a shape that broadcasts to the
        output."""
        total = sum(np.broadcast_to(x.constant, self.y.channels) for x in self.call.constant_terms)
        kept = np.asarray(total)[~removed[self.y.ids]]
        return kept.reshape(-1, *(1,) * (len(self.y.shape) - 1 - self.y.axis))


class Concatenation(ChannelHandler):
    """Concatenation of the channels of several tensors."""

    def place_channels(self) -> None:
        self.y.set_channels(self.x.axis)

    def propagate_constants(self) -> None:
        self.y.constant = np.concatenate([x.constant for x in self.call.inputs])

    def couple(self, unions: ChannelUnions) -> None:
        self.y.ids = np.concatenate([x.ids for x in self.call.inputs])


class GroupedConv(Elementwise):
    """Depthwise or grouped convolution: pruning removes either all channels of a group or none of
    them."""

    can_slice = makes_channels = True
    whole_groups = (
        "loses only whole groups, and other channels of the group are in use; prune all filters "
        "of the group"
    )

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Number of input channels and number of output channels of each group of the
        convolution."""
        groups = self.x.channels if isinstance(self.op, DEPTHWISE) else self.op.groups
        return self.x.channels // groups, self.y.channels // groups

    def couple(self, unions: ChannelUnions) -> None:
        self.called_on = unions.called_on(self.op, self.x)
        inputs, units = self.sizes
        first = self.x.ids[::inputs]
        unions.couple(self.x.ids, np.repeat(first, inputs))
        self.y.ids = np.repeat(first, units)

    def members(self) -> list[Member]:
        depthwise = isinstance(self.op, DEPTHWISE)
        axes = {-2: self.x.ids} if depthwise else {-1: self.y.ids}
        found = [Member(self.op.kernel, axes, output=-2 if depthwise else -1)]
        if self.op.use_bias:
            found.append(Member(self.op.bias, {-1: self.y.ids}, follows=True))
        return found

    def _varies(self) -> np.ndarray:
        inputs, units = self.sizes
        return np.repeat(np.isnan(self.x.constant).reshape(-1, inputs).any(1), units)

    def broken_constants(self, x: Tensor) -> np.ndarray:
        inputs, units = self.sizes
        varies = np.isnan(self.y.constant).reshape(-1, units).any(1)
        return x.ids[~np.isnan(x.constant) & np.repeat(varies, inputs)]

    def ignores_input(self) -> np.ndarray:
        kernel = to_float64(self.op.kernel)
        return np.all(kernel.reshape(-1, self.sizes[0], self.y.channels) == 0, axis=(0, 1))

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        if not isinstance(self.op, DEPTHWISE):
            config["filters"] = int((~removed[self.y.ids]).sum())
            config["groups"] = config["filters"] // self.sizes[1]
        return super().slice(config, removed)

    def reason_for(self, others: str) -> str:
        if not others or self.sizes[0] == 1:
            return super().reason_for(others)
        return self.whole_groups


class Rearrangement(ChannelHandler):
    """Flatten, Reshape and Permute."""

    can_slice = True

    def place_channels(self) -> None:
        self.y.set_channels(self._output_axis())

    def propagate_constants(self) -> None:
        rows = self._rows(self.x.constant)
        self.y.constant = np.where(np.all(rows == rows[0], 0), rows[0], UNKNOWN)

    def couple(self, unions: ChannelUnions) -> None:
        rows = self._rows(self.x.ids)
        for row in np.unique(rows, axis=0):
            unions.couple(row, rows[0])
        self.y.ids = rows[0]

    def _output_axis(self) -> int:
        """Return the channel axis of the output. If the channels are spread over several axes,
        return the last of these axes."""
        places = self._rearranged(np.arange(self.x.channels))
        for axis in reversed(range(places.ndim)):
            if np.all(places == places.take([0], axis)):
                continue
            along = np.moveaxis(places, axis, -1).reshape(-1, places.shape[axis])
            return axis + 1 if np.all(along == along[0]) else places.ndim
        return places.ndim

    def _rows(self, values: np.ndarray) -> np.ndarray:
        """Rearrange a vector of one value per input channel, as the layer rearranges its input. The
        result is a matrix with one column per output channel, and one row per position of the
        output."""
        moved = np.moveaxis(self._rearranged(values), self.y.axis - 1, -1)
        return moved.reshape(-1, self.y.channels)

    def _rearranged(self, values: np.ndarray) -> np.ndarray:
        """Apply the layer to a sample in which every channel has the same value at all positions,
        and return the output. Entry i of `values` is the value of input channel i.

        Unknown sizes of the input are replaced by 2, because every size above 1 gives the same
        result.
        """
        shape = [2 if n is None else n for n in self.x.shape[1:]]
        grid = np.broadcast_to(_broadcast_channels(self.x, values)[0], shape)
        if isinstance(self.op, layers.Permute):
            return grid.transpose([n - 1 for n in self.op.dims])
        if getattr(self.op, "data_format", None) == "channels_first":  # Flatten
            grid = np.moveaxis(grid, 0, -1)
        return grid.reshape([-1 if n is None else n for n in self.y.shape[1:]])

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        if "target_shape" in config:
            target = [-1 if n is None else n for n in self.y.shape]
            target[self.y.axis] = int((~removed[self.y.ids]).sum())
            config["target_shape"] = tuple(target[1:])
        return []

    def broken_constants(self, x: Tensor) -> np.ndarray:
        constant = ~np.isnan(self._rows(x.constant))
        return self._rows(x.ids)[constant & np.isnan(self.y.constant)]

    def reason_for(self, others: str) -> str:
        return "joins several different channels into one; prune all of these channels"


class KernelLayer(ChannelHandler):
    """Dense layer or convolution: every unit can read every input channel."""

    can_slice = makes_channels = True

    @property
    def layer(self):
        """The Keras layer that owns the kernel, such as the layer inside a wrapper."""
        return self.op

    @property
    def w(self) -> np.ndarray:
        """Kernel as an array, with axes in this order: the window, the input channels, the
        units."""
        return np.asarray(ops.convert_to_numpy(self.layer.kernel))

    @cached_property
    def window(self) -> tuple[int, ...]:
        """Axes of the kernel along which the window of a convolution extends."""
        return tuple(range(len(self.layer.kernel.shape) - 2))

    @cached_property
    def reads(self) -> np.ndarray:
        """Boolean matrix. Entry [i, j] is True if unit j has a nonzero weight for input channel
        i."""
        return np.any(self.w != 0, axis=self.window)

    def response(self, constants: np.ndarray) -> np.ndarray:
        """Return the sum that the given constant input channels add to the output of each unit."""
        rows = constants.nonzero()[0]  # usually few, or none
        return constants[rows] @ self.w[..., rows, :].sum(self.window, dtype="float64")

    @property
    def pads_with_zeros(self) -> bool:
        """Whether the layer pads its input with zeros, so that a constant input channel is not
        constant at the border."""
        window = getattr(self.layer, "kernel_size", (1,))
        return getattr(self.layer, "padding", "valid") != "valid" and math.prod(window) > 1

    def place_channels(self) -> None:
        convolves = hasattr(self.layer, "kernel_size")
        self.y.set_channels(self.x.axis if convolves else len(self.y.shape) - 1)

    def propagate_constants(self) -> None:
        if not self.reason:
            self.y.constant = self._constant_units()

    def _constant_units(self) -> np.ndarray:
        """Return the constant output of every unit, or NaN if the output of the unit depends on the
        input."""
        constant = self.x.constant
        usable = (constant == 0) if self.pads_with_zeros else ~np.isnan(constant)
        varies = (self.reads & ~usable[:, None]).any(0)
        value = self.response(np.nan_to_num(constant))
        if self.layer.use_bias:
            value = value + to_float64(self.layer.bias)
        dtype = "float64" if self.layer.compute_dtype == "float64" else "float32"
        activated = self.layer.activation(ops.convert_to_tensor(value, dtype))
        return np.where(varies, UNKNOWN, to_float64(activated))

    def couple(self, unions: ChannelUnions) -> None:
        self.called_on = unions.called_on(self.op, self.x)
        self.unit_ids = self.y.ids = unions.units(self.op, self.y.channels)
        if self.reason:
            unions.pin(self.y.ids, f"'{self.op.name}' {self.reason}")

    def members(self) -> list[Member]:
        found = [Member(self.layer.kernel, {-2: self.x.ids, -1: self.unit_ids}, output=-1)]
        return found + self._bias()

    def _bias(self) -> list[Member]:
        if not self.layer.use_bias:
            return []
        return [Member(self.layer.bias, {-1: self.unit_ids}, follows=True)]

    def ignores_input(self) -> np.ndarray:
        return np.all(~self.reads, axis=0)

    def common_constant(self) -> np.ndarray:
        """Return the value of each input channel if it is constant and the same in all calls of the
        layer, otherwise NaN."""
        constants = np.stack([x.constant for x in self.called_on])
        return np.where(np.all(constants == constants[0], 0), constants[0], UNKNOWN)

    def can_lose(self) -> np.ndarray:
        """Return a boolean array that is True for each constant input channel that can be removed
        even if kept units read the channel. The contribution of such a channel moves to the bias or
        to another channel.
        """
        return ~np.isnan(self.common_constant())

    def relabel(self, roots: np.ndarray) -> None:
        self.unit_ids = roots[self.unit_ids]

    def needs(self, x: Tensor, removed: np.ndarray) -> np.ndarray:
        return self.reads[:, ~removed[self.unit_ids]].any(1) & ~self.can_lose()

    def carrier(self, removed: np.ndarray) -> int | None:
        """Return the index of a constant input channel that replaces the removed constant channels.

        If the layer pads with zeros, a bias cannot replace the removed channels. The kernel entries
        for one constant channel are then changed instead, so that the outputs stay the same. Return
        None if a bias can replace the removed channels, or if the removed channels are 0.
        """
        kept, constant = ~removed[self.x.ids], self._removed_constants(removed)
        if not self.pads_with_zeros or not constant.any():
            return None
        common = np.nan_to_num(self.common_constant())
        best = np.abs(common) * (kept if np.any(common[kept]) else ~kept)
        return int(best.argmax())

    def _removed_constants(self, removed: np.ndarray) -> np.ndarray:
        """Return one value per input channel. If a channel is removed although kept units read the
        channel, the value is the constant of the channel. Otherwise, the value is 0."""
        lost = removed[self.x.ids] & self.reads[:, ~removed[self.unit_ids]].any(1)
        return np.where(lost, np.nan_to_num(self.common_constant()), 0.0)

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        kept, units = ~removed[self.x.ids], ~removed[self.unit_ids]
        config["units" if "units" in config else "filters"] = int(units.sum())
        removed_constants = self._removed_constants(removed)
        bias = to_float64(self.layer.bias) if self.layer.use_bias else np.zeros(len(units))
        carrier = self.carrier(removed)
        weights = self._sliced(kept, units)
        if carrier is not None and kept[carrier]:
            lost = removed_constants.nonzero()[0]
            moved = np.einsum("i,...io->...o", removed_constants[lost], self.w[..., lost, :])
            added = moved / self.common_constant()[carrier]
            place = int(kept[:carrier].sum())
            weights[0][..., place, :] = weights[0][..., place, :] + added[..., units]
        elif carrier is None and removed_constants.any():
            bias = bias + self.response(removed_constants)
        config["use_bias"] = bool(self.layer.use_bias or bias.any())
        return self._to_layer_axes(weights) + [bias[units]] * config["use_bias"]

    def _sliced(self, kept: np.ndarray, units: np.ndarray) -> list[np.ndarray]:
        """Return each kernel with only the kept input channels and units, in the axis order of
        `w`."""
        return [self.w.compress(kept, -2).compress(units, -1)]

    def _to_layer_axes(self, weights: list[np.ndarray]) -> list[np.ndarray]:
        """Transpose kernels from the axis order of the property `w` to the axis order of the
        layer."""
        return weights


class TransposedConv(KernelLayer):
    """Transposed convolution. At some positions, only a part of the window overlaps the input."""

    @property
    def w(self) -> np.ndarray:
        return np.swapaxes(super().w, -1, -2)

    def members(self) -> list[Member]:
        axes = {-2: self.unit_ids, -1: self.x.ids}
        return [Member(self.op.kernel, axes, output=-2), *self._bias()]

    @property
    def pads_with_zeros(self) -> bool:
        return math.prod((*self.op.kernel_size, *self.op.strides)) > 1

    def _to_layer_axes(self, weights: list[np.ndarray]) -> list[np.ndarray]:
        return [np.swapaxes(w, -1, -2) for w in weights]


class SeparableConv(KernelLayer):
    """Separable convolution: a depthwise convolution, then a convolution with kernel size 1."""

    @cached_property
    def window(self) -> tuple[int, ...]:
        return tuple(range(len(self.op.depthwise_kernel.shape) - 2))

    def response(self, constants: np.ndarray) -> np.ndarray:
        rows = constants.nonzero()[0]
        depthwise = to_float64(self.op.depthwise_kernel).sum(self.window)[rows]
        return np.einsum("i,im,imo->o", constants[rows], depthwise, self._pointwise[rows])

    @cached_property
    def reads(self) -> np.ndarray:
        depthwise = np.any(to_float64(self.op.depthwise_kernel) != 0, axis=self.window)
        return np.any(depthwise[..., None] & (self._pointwise != 0), axis=1)

    @property
    def _pointwise(self) -> np.ndarray:
        pointwise = np.asarray(ops.convert_to_numpy(self.op.pointwise_kernel))
        return pointwise.reshape(-1, self.op.depth_multiplier, pointwise.shape[-1])

    def members(self) -> list[Member]:
        inputs = np.repeat(self.x.ids, self.op.depth_multiplier)
        pointwise = Member(self.op.pointwise_kernel, {-2: inputs, -1: self.unit_ids}, output=-1)
        depthwise = Member(self.op.depthwise_kernel, {-2: self.x.ids}, output=-2)
        return [depthwise, pointwise, *self._bias()]

    def can_lose(self) -> np.ndarray:
        # The contribution of a channel cannot move to another channel, because the depthwise kernel
        # has a separate window for each channel.
        return self.common_constant() == 0 if self.pads_with_zeros else super().can_lose()

    def _sliced(self, kept, units) -> list[np.ndarray]:
        pointwise = self._pointwise[kept].reshape(-1, len(units))[:, units]
        shape = (1,) * len(self.window) + pointwise.shape
        return [to_float64(self.op.depthwise_kernel)[..., kept, :], pointwise.reshape(shape)]

    def reason_for(self, others: str) -> str:
        if others:
            return super().reason_for(others)
        return "pads with zeros, where the constant of the channel ends; use padding='valid'"


class EmbeddingTable(ChannelHandler):
    """Embedding layer, whose table has one column per output channel."""

    can_slice = makes_channels = True

    def place_channels(self) -> None:
        self.y.set_channels(len(self.y.shape) - 1)

    def propagate_constants(self) -> None:
        self.y.constant = np.where(self.ignores_input(), 0.0, UNKNOWN)

    def couple(self, unions: ChannelUnions) -> None:
        self.unit_ids = self.y.ids = unions.units(self.op, self.y.channels)
        unions.pin(self.x.ids, f"'{self.op.name}' uses the values as indices")

    def relabel(self, roots: np.ndarray) -> None:
        self.unit_ids = roots[self.unit_ids]

    def members(self) -> list[Member]:
        return [Member(self.op.embeddings, {-1: self.unit_ids}, output=-1)]

    def ignores_input(self) -> np.ndarray:
        return np.all(to_float64(self.op.embeddings) == 0, axis=0)

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        config["output_dim"] = int((~removed[self.unit_ids]).sum())
        return super().slice(config, removed)


class TimeDistributedDense(KernelLayer):
    """`TimeDistributed(Dense)`."""

    @property
    def layer(self):
        return self.op.layer

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        inner = live_config(self.layer)
        weights = super().slice(inner, removed)
        config["layer"] = type(self.layer)(**inner)
        return weights


def _broadcast_channels(x: Tensor, values: np.ndarray) -> np.ndarray:
    """Reshape a vector with one value per channel so that it broadcasts to the shape of `x`."""
    shape = [1] * len(x.shape)
    shape[x.axis] = x.channels
    return values.reshape(shape)
