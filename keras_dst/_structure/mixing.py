"""Channel handlers of normalization layers, layer scales and attention layers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from keras import ops

from keras_dst import _keras
from keras_dst._structure.graph import UNKNOWN, Tensor, to_float64
from keras_dst._structure.handlers import ChannelHandler, Normalization, PerChannel
from keras_dst._structure.unions import ChannelUnions, Member


class LayerNorm(Normalization):
    """Layer normalization over the channels.

    The mean and the variance are computed over all channels, including channels that are zero.
    Before the normalization, the smaller model therefore appends channels of zeros in place of the
    removed channels. After the normalization, the smaller model discards the channels that it
    appended.
    """

    def members(self) -> list[Member]:
        return [replace(member, shrinks=False) for member in super().members()]

    def _varies(self) -> np.ndarray:
        return np.ones(self.x.channels, bool)

    def needs(self, x: Tensor, removed: np.ndarray) -> np.ndarray:
        return x.constant != 0

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        kept = ~removed[self.x.ids]
        return [np.pad(w[kept], (0, int((~kept).sum()))) for w in self.op.get_weights()]

    def apply(self, operation, args: tuple, kwargs: dict, removed: np.ndarray):
        kept = ~removed[self.x.ids]
        if kept.all():
            return operation(*args, **kwargs)
        x, axis = args[0], self.x.axis
        rank = len(x.shape)
        added = [(0, int((~kept).sum()) if a == axis else 0) for a in range(rank)]
        y = operation(ops.pad(x, added), **kwargs)
        return y[tuple(slice(int(kept.sum()) if a == axis else None) for a in range(rank))]

    def reason_for(self, others: str) -> str:
        if not self.op.scale:
            return "normalizes over channels, and has no gamma that could be zero; set scale=True"
        return "normalizes over channels; set the channel's bias, gamma and beta to zero"


class RMSNorm(LayerNorm):
    """RMS normalization over the channels.

    When channels are removed, `epsilon` and the scale are adapted so that the outputs do not
    change.
    """

    def members(self) -> list[Member]:
        return [Member(self.op.scale, {-1: self.x.ids}, follows=True)]

    def _varies(self) -> np.ndarray:
        return self.x.constant != 0

    def ignores_input(self) -> np.ndarray:
        return to_float64(self.op.scale) == 0

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        # If n - k of n channels are zero, mean(x^2) over all n channels is k / n times mean(x^2)
        # over the other k channels.
        kept = ~removed[self.x.ids]
        ratio = len(kept) / int(kept.sum())
        config["epsilon"] = self.op.epsilon * ratio
        return [w[kept] * math.sqrt(ratio) for w in self.op.get_weights()]

    def apply(self, operation, args: tuple, kwargs: dict, removed: np.ndarray):
        return operation(*args, **kwargs)

    def reason_for(self, others: str) -> str:
        return "normalizes over channels, and the channel is not zero; set its bias to zero too"


class GroupNorm(Normalization):
    """Group normalization: pruning removes either all channels of a group or none of them."""

    def couple(self, unions: ChannelUnions) -> None:
        super().couple(unions)
        size = self.x.channels // self.op.groups
        unions.couple(self.x.ids, np.repeat(self.x.ids[::size], size))

    def _varies(self) -> np.ndarray:
        size = self.x.channels // self.op.groups
        return np.repeat(np.isnan(self.x.constant).reshape(-1, size).any(1), size)

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        kept = ~removed[self.x.ids]
        config["groups"] = int(kept.sum()) * self.op.groups // len(kept)
        return super().slice(config, removed)

    def reason_for(self, others: str) -> str:
        return "normalizes groups of channels; remove all channels of the group"


class LayerScale(PerChannel):
    """Layer that multiplies each channel by its own number, as in ConvNeXt of
    `keras.applications`."""

    def members(self) -> list[Member]:
        return [Member(self.op.gamma, {-1: self.x.ids}, follows=True)]

    def ignores_input(self) -> np.ndarray:
        return to_float64(self.op.gamma) == 0

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        config["projection_dim"] = int((~removed[self.x.ids]).sum())
        return super().slice(config, removed)


class Attention(ChannelHandler):
    """Attention layer, from which input channels, output channels and whole heads can be
    removed."""

    can_slice = makes_channels = True

    def __init__(self, call, reason: str = ""):
        super().__init__(call, reason)
        self.projections = _keras.attention_projections_of(self.op)
        query, value, *others = call.args
        key = others[0] if others else None
        self.given = {"query": query, "key": value if key is None else key, "value": value}
        self.heads = self.projections["value"].kernel.shape[1]
        # In grouped-query attention, several query heads share one head of keys and values.
        self.sharing = self.projections["query"].kernel.shape[1] // self.heads

    def place_channels(self) -> None:
        self.y.set_channels(len(self.y.shape) - 1)

    def couple(self, unions: ChannelUnions) -> None:
        for name, x in self.given.items():
            unions.called_on(self.projections[name], x)
        self.head_ids = unions.units(self.projections["value"], self.heads)
        self.unit_ids = self.y.ids = unions.units(self.op, self.y.channels)
        if self.fixed_width:
            unions.couple(self.unit_ids, self.given["query"].ids)

    @property
    def fixed_width(self) -> bool:
        """Whether the layer always has as many output channels as its query input."""
        return not hasattr(self.op, "num_heads")

    def relabel(self, roots: np.ndarray) -> None:
        self.unit_ids, self.head_ids = roots[self.unit_ids], roots[self.head_ids]

    def members(self) -> list[Member]:
        found = []
        query_heads = np.repeat(self.head_ids, self.sharing)
        for name, x in self.given.items():
            heads = query_heads if name == "query" else self.head_ids
            layer = self.projections[name]
            found.append(Member(layer.kernel, {-3: x.ids, -2: heads}, output=-2))
            if layer.bias is not None:
                found.append(Member(layer.bias, {-2: heads}, follows=True))
        layer = self.projections["output"]
        found.append(Member(layer.kernel, {-3: query_heads, -1: self.unit_ids}, output=-1))
        if layer.bias is not None:
            found.append(Member(layer.bias, {-1: self.unit_ids}, follows=True))
        return found

    def propagate_constants(self) -> None:
        bias = self.projections["output"].bias
        value = 0.0 if bias is None else to_float64(bias)
        self.y.constant = np.where(self.ignores_input(), value, UNKNOWN)

    def ignores_input(self) -> np.ndarray:
        return np.all(to_float64(self.projections["output"].kernel) == 0, axis=(0, 1))

    def needs(self, x: Tensor, removed: np.ndarray) -> np.ndarray:
        needed = np.zeros(x.channels, bool)
        for name, given in self.given.items():
            if given is x:
                kernel = to_float64(self.projections[name].kernel)
                kept = ~removed[self.head_ids]
                kept = np.repeat(kept, self.sharing) if name == "query" else kept
                needed |= np.any(kernel[:, kept] != 0, axis=(1, 2))
        return needed & (x.constant != 0)

    def needed_inside(self, removed: np.ndarray) -> np.ndarray:
        """Return the ids of the attention heads that compute nonzero values for a kept unit."""
        value, output = self.projections["value"], self.projections["output"]
        filled = np.any(to_float64(value.kernel) != 0, axis=(0, 2))
        if value.bias is not None:
            filled |= np.any(to_float64(value.bias) != 0, axis=1)
        read = np.any(to_float64(output.kernel)[..., ~removed[self.unit_ids]] != 0, axis=(1, 2))
        return self.head_ids[filled & read.reshape(self.heads, self.sharing).any(1)]

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        heads = int((~removed[self.head_ids]).sum())
        if self.fixed_width:
            config["num_key_value_heads"] = heads
            config["num_query_heads"] = heads * self.sharing
        else:
            config["num_heads"] = heads
            config["output_shape"] = (int((~removed[self.unit_ids]).sum()),)
        return super().slice(config, removed)

    def reason_for(self, others: str) -> str:
        return "reads the channel, which is not zero; set its bias to zero too"
