"""Numbering of channels. `Member` lists the channels of a variable, and `ChannelUnions` joins the
channels that must be removed together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_dst._structure.graph import Tensor


@dataclass(frozen=True, eq=False)
class Member:
    """Variable of a layer, with the ids of the channels along each axis of the variable.

    Attributes:
        variable: The Keras variable.
        axes: Dict that maps every axis with channels, as a negative number, to the ids of the
            channels along the axis. Axes without channels, such as the window of a convolution, are
            not listed.
        output: Axis of the output channels, or None for variables without output channels. The axis
            is -1 for kernels of `Dense` and of convolutions, and -2 for depthwise and transposed
            kernels.
        follows: True if the entries of pruned channels must be set to zero, so that pruned channels
            output exactly zero. For example, `follows` is True for a bias. `follows` is False for
            kernels and for moving variances.
        shrinks: False if the variable keeps its size when channels are removed. For example, the
            variables of a layer normalization keep their size, because the smaller model fills in
            zeros for the removed channels.
        layer: Name of the layer.
    """

    variable: Any
    axes: dict[int, np.ndarray]
    output: int | None = None
    follows: bool = False
    shrinks: bool = True
    layer: str = ""


class ChannelUnions:
    """Sets of coupled channels, and the reasons why some channels cannot be removed.

    At first, every set contains a single channel. The method `couple` joins sets of channels, and
    the method `pin` prevents the removal of channels.
    """

    def __init__(self):
        self._count = 0
        self._edges: list[tuple[np.ndarray, np.ndarray]] = []
        self._pinned: list[tuple[np.ndarray, str]] = []
        self._called_on: dict[int, list[Tensor]] = {}
        self._units: dict[int, np.ndarray] = {}

    def new(self, count: int) -> np.ndarray:
        """Return the ids of `count` new channels."""
        self._count += count
        return np.arange(self._count - count, self._count)

    def units(self, layer, count: int) -> np.ndarray:
        """Return the ids of the output channels of a layer. All calls of the layer get the same
        ids."""
        if id(layer) not in self._units:
            self._units[id(layer)] = self.new(count)
        return self._units[id(layer)]

    def called_on(self, layer, x: Tensor) -> list[Tensor]:
        """Record that the layer is called on `x`. Return all tensors on which the layer has been
        called.

        If a layer is called several times, the channels of its inputs are coupled, because all
        calls use the same weights.
        """
        tensors = self._called_on.setdefault(id(layer), [])
        tensors.append(x)
        self.couple(x.ids, tensors[0].ids)
        return tensors

    def couple(self, a: np.ndarray, b: np.ndarray) -> None:
        """Join the set of the first channel in `a` with the set of the first channel in `b`, and so
        on."""
        self._edges.append((a, b))

    def pin(self, ids: np.ndarray, reason: str) -> None:
        """Prevent the removal of the channels with the given ids, and store the reason."""
        self._pinned.append((ids, reason))

    def roots(self) -> np.ndarray:
        """Return, for every channel id, the smallest id of its set of coupled channels."""
        roots = np.arange(self._count)
        if not self._edges:
            return roots
        a, b = (np.concatenate(ends).astype(int) for ends in zip(*self._edges))
        while not np.array_equal(roots[a], roots[b]):
            low = np.minimum(roots[a], roots[b])
            np.minimum.at(roots, roots[a], low)
            np.minimum.at(roots, roots[b], low)
            while not np.array_equal(roots, roots[roots]):
                roots = roots[roots]
        return roots

    def reasons(self, roots: np.ndarray) -> dict[int, str]:
        """Return a dict that maps sets of coupled channels to the reasons why the sets cannot be
        removed. The key of a set is the smallest id of its channels.
        """
        found: dict[int, str] = {}
        for ids, reason in self._pinned:
            for root in np.unique(roots[ids]):
                found.setdefault(int(root), reason)
        return found
