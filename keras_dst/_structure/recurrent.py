"""Handlers of recurrent layers."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from keras import ops

from keras_dst._structure.copies import live_config
from keras_dst._structure.graph import UNKNOWN, Call, Tensor, to_float64
from keras_dst._structure.handlers import ChannelHandler, KernelLayer
from keras_dst._structure.unions import ChannelUnions, Member


class Recurrent(KernelLayer):
    """SimpleRNN, LSTM or GRU.

    A unit whose weights are all zero keeps its initial state, 0, in every time step.
    """

    @property
    def layer(self):
        return self.op.cell

    @cached_property
    def gates(self) -> int:
        """Number of gate kernels that the kernel contains: 4 for LSTM, 3 for GRU, otherwise 1."""
        return self.layer.kernel.shape[-1] // self.layer.units

    def place_channels(self) -> None:
        self.y.set_channels(len(self.y.shape) - 1)

    def propagate_constants(self) -> None:
        found = [self.w, to_float64(self.layer.recurrent_kernel)]
        if self.layer.use_bias:
            found.append(to_float64(self.layer.bias).reshape(-1, self.w.shape[-1]))
        dead = np.all(np.concatenate(found) == 0, axis=0).reshape(self.gates, -1).all(0)
        at_zero = float(self.layer.activation(ops.zeros((1,)))[0])
        if not self.reason and not self.op.stateful and at_zero == 0:
            self.y.constant = np.where(dead, 0.0, UNKNOWN)

    def couple(self, unions: ChannelUnions) -> None:
        self.called_on = unions.called_on(self.op, self.x)
        self.y.ids = unions.units(self.op, self.layer.units)
        self.unit_ids = np.tile(self.y.ids, self.gates)
        if self.reason:
            unions.pin(self.y.ids, f"'{self.op.name}' {self.reason}")

    def members(self) -> list[Member]:
        cell, units = self.layer, self.unit_ids
        found = [
            Member(cell.kernel, {-2: self.x.ids, -1: units}, output=-1),
            Member(cell.recurrent_kernel, {-2: self.y.ids, -1: units}, output=-1),
        ]
        return [*found, *self._bias()]

    def ignores_input(self) -> np.ndarray:
        return self.y.constant == 0

    def can_lose(self) -> np.ndarray:
        return super().can_lose() if self.layer.use_bias else self.common_constant() == 0

    def needed_inside(self, removed: np.ndarray) -> np.ndarray:
        recurrent = to_float64(self.layer.recurrent_kernel)
        read = np.any(recurrent[:, ~removed[self.unit_ids]] != 0, axis=1)
        return self.y.ids[read & (self.y.constant != 0)]

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        config["units"] = int((~removed[self.y.ids]).sum())
        weights = ChannelHandler.slice(self, config, removed)
        moved = self.response(self._removed_constants(removed))[~removed[self.unit_ids]]
        for bias in weights[2:]:  # A GRU adds the first row of its bias to the projected input.
            bias.reshape(-1, len(moved))[0] += moved
        return weights

    def reason_for(self, others: str) -> str:
        if others:
            return super().reason_for(others)
        return "has no bias to which the constant of the channel could move; set use_bias=True"


class BothDirections(ChannelHandler):
    """`Bidirectional` layer: pruning removes the same units from both directions.

    Unit i of the forward layer and unit i of the backward layer are coupled, because both
    directions must have the same number of units.
    """

    can_slice = makes_channels = True

    def __init__(self, call: Call, reason: str = ""):
        super().__init__(call, reason)
        self.directions = [
            Recurrent(self._call_of(layer))
            for layer in (self.op.forward_layer, self.op.backward_layer)
        ]

    def _call_of(self, layer) -> Call:
        """Return a `Call` object for one inner layer of the `Bidirectional` layer."""
        y = Tensor((*self.y.shape[:-1], layer.cell.units), self.y.dtype)
        return Call(layer, self.call.args, self.call.kwargs, [y], self.call.prefix)

    def place_channels(self) -> None:
        self.y.set_channels(len(self.y.shape) - 1)
        for direction in self.directions:
            direction.place_channels()

    def propagate_constants(self) -> None:
        for direction in self.directions:
            direction.propagate_constants()
        zeros = [direction.y.constant == 0 for direction in self.directions]
        if self.op.merge_mode == "concat":
            zero = np.concatenate(zeros)
        else:
            zero = np.any(zeros, 0) if self.op.merge_mode == "mul" else np.all(zeros, 0)
        self.y.constant = np.where(zero, 0.0, UNKNOWN)

    def couple(self, unions: ChannelUnions) -> None:
        for direction in self.directions:
            direction.couple(unions)
        forward, backward = (direction.y.ids for direction in self.directions)
        unions.couple(backward, forward)
        concatenates = self.op.merge_mode == "concat"
        self.y.ids = np.concatenate([forward, backward]) if concatenates else forward

    def relabel(self, roots: np.ndarray) -> None:
        for direction in self.directions:
            direction.relabel(roots)
            direction.y.ids = roots[direction.y.ids]

    def members(self) -> list[Member]:
        return [member for direction in self.directions for member in direction.members()]

    def ignores_input(self) -> np.ndarray:
        return self.y.constant == 0

    def needs(self, x: Tensor, removed: np.ndarray) -> np.ndarray:
        return np.any([direction.needs(x, removed) for direction in self.directions], 0)

    def needed_inside(self, removed: np.ndarray) -> np.ndarray:
        return np.concatenate([d.needed_inside(removed) for d in self.directions])

    def slice(self, config: dict, removed: np.ndarray) -> list[np.ndarray]:
        weights = []
        for key, direction in zip(("layer", "backward_layer"), self.directions):
            layer = direction.op
            inner = live_config(layer)
            weights += direction.slice(inner, removed)
            config[key] = type(layer)(**inner)
        return weights

    def reason_for(self, others: str) -> str:
        if others:
            return super().reason_for(others)
        return self.directions[0].reason_for(others)
