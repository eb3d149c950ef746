"""Groups of coupled channels, which are kept or removed together."""

from __future__ import annotations

import numpy as np

from keras_dst._structure.graph import Tensor


class ChannelGroups:
    """Union-find structure over channel ids, and the channels that have to stay.

    Every channel starts in a group of its own. `couple` merges groups; `pin` keeps channels.
    """

    def __init__(self):
        self._parents: list[int] = []
        self._pinned: list[np.ndarray] = []
        self._called_on: dict[int, list[Tensor]] = {}
        self._units: dict[int, np.ndarray] = {}

    def new(self, count: int) -> np.ndarray:
        """Return the ids of `count` new channels."""
        first = len(self._parents)
        self._parents += range(first, first + count)
        return np.arange(first, first + count)

    def units(self, layer, count: int) -> np.ndarray:
        """Return the ids of the units of a layer, which are the same in all of its calls."""
        if id(layer) not in self._units:
            self._units[id(layer)] = self.new(count)
        return self._units[id(layer)]

    def called_on(self, layer, x: Tensor) -> list[Tensor]:
        """Return all inputs of a layer so far; couple their channels, as they meet one weight."""
        tensors = self._called_on.setdefault(id(layer), [])
        tensors.append(x)
        self.couple(x.ids, tensors[0].ids)
        return tensors

    def couple(self, a: np.ndarray, b: np.ndarray) -> None:
        """Merge the group of the first channel of `a` with that of the first of `b`, and so on."""
        for i, j in zip(a, b):
            self._parents[self._root(i)] = self._root(j)

    def pin(self, x: Tensor) -> None:
        """Keep all channels of a tensor."""
        self.pin_ids(x.ids)

    def pin_ids(self, ids: np.ndarray) -> None:
        """Keep the channels with these ids."""
        self._pinned.append(ids)

    def roots(self) -> np.ndarray:
        """Return, for every channel id, the id that represents its group."""
        return np.array([self._root(i) for i in range(len(self._parents))], int)

    def pinned(self) -> np.ndarray:
        """Return, for every channel id, whether this channel itself is pinned."""
        pinned = np.zeros(len(self._parents), bool)
        for ids in self._pinned:
            pinned[ids] = True
        return pinned

    def _root(self, i: int) -> int:
        while self._parents[i] != i:
            self._parents[i] = i = self._parents[self._parents[i]]
        return i
