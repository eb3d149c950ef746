"""Which channels live or die together."""

from __future__ import annotations

import numpy as np

from keras_dst._structure.graph import Tensor


class Groups:
    """Sets of channel ids, by union and find, and those of them that have to stay."""

    def __init__(self):
        self._parents: list[int] = []
        self._pinned: list[np.ndarray] = []
        self._called: dict[int, list[Tensor]] = {}
        self._units: dict[int, np.ndarray] = {}

    def new(self, count: int) -> np.ndarray:
        """Ids of so many channels."""
        first = len(self._parents)
        self._parents += range(first, first + count)
        return np.arange(first, first + count)

    def units(self, layer, count: int) -> np.ndarray:
        """Ids of a layer's units, the same in all its calls."""
        if id(layer) not in self._units:
            self._units[id(layer)] = self.new(count)
        return self._units[id(layer)]

    def called(self, layer, x: Tensor) -> list[Tensor]:
        """All tensors that a layer with weights is called on; their channels are tied."""
        tensors = self._called.setdefault(id(layer), [])
        tensors.append(x)
        self.tie(x.ids, tensors[0].ids)
        return tensors

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Make the first channels of both live or die together, the second ones, and so on."""
        for i, j in zip(a, b):
            self._parents[self._root(i)] = self._root(j)

    def pin(self, x: Tensor) -> None:
        """Keep all channels of a tensor."""
        self.pin_ids(x.ids)

    def pin_ids(self, ids: np.ndarray) -> None:
        """Keep channels."""
        self._pinned.append(ids)

    def _root(self, i: int) -> int:
        while self._parents[i] != i:
            self._parents[i] = i = self._parents[self._parents[i]]
        return i

    def roots(self) -> np.ndarray:
        """By id: the one id that stands for its set."""
        return np.array([self._root(i) for i in range(len(self._parents))], int)

    def pinned(self) -> np.ndarray:
        """By id: whether it has to stay itself."""
        pinned = np.zeros(len(self._parents), bool)
        for ids in self._pinned:
            pinned[ids] = True
        return pinned
