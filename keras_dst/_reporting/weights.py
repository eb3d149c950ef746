"""The weights of a model, and what of each is kept, whatever makes them sparse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_dst import _keras
from keras_dst._utils.filters import is_kernel
from keras_dst.layers import Gate, SparseMixin, layouts_of
from keras_dst.masks import KERNEL, Layout
from keras_dst.optimizers import unwrap

_CELLS = 64  # of a picture of a weight, along each side at the most


@dataclass(frozen=True)
class Weight:
    """A weight of a model.

    Attributes:
        variable: the Keras variable.
        mask: that of its layer, or None.
        layers: those that hold it; several where it is shared.
        layout: which of its axes are inputs and outputs.
        prunable: whether it is under a mask, or could be.
        sparse: whether it is under a mask, of its layer or of a `SparseOptimizer`.
    """

    variable: Any
    mask: Any
    layers: list
    layout: Layout
    prunable: bool
    sparse: bool

    @property
    def parameters(self) -> int:
        """Number of its entries."""
        return math.prod(self.variable.shape)

    def kept(self) -> np.ndarray:
        """Which entries are neither zero nor masked, boolean."""
        # By NumPy: JAX would compile for every shape.
        nonzero = ops.convert_to_numpy(ops.convert_to_tensor(self.variable)) != 0
        if self.mask is not None:
            nonzero = nonzero & ops.convert_to_numpy(self.mask).astype(bool)
        return nonzero


def weights_of(model) -> list[Weight]:
    """All weights of a model, without those that keras_dst added."""
    owners: dict[int, list] = {}
    masks: dict[int, Any] = {}
    layouts = layouts_of(model)
    ours: set[int] = set()
    for layer in _keras.flatten_layers(model):
        for variable in [
            *_keras.trainable_variables_of(layer),
            *_keras.non_trainable_variables_of(layer),
        ]:
            owners.setdefault(id(variable), []).append(layer)
        for variable, mask in _masked(layer):
            masks[id(variable)] = mask
        if isinstance(layer, (SparseMixin, Gate)):
            ours.update(id(value) for value in layer.own_variables().values())
    wrapper = unwrap(getattr(model, "optimizer", None))
    updated = {id(kernel) for kernel in wrapper.kernels} if wrapper is not None else set()
    found = []
    for variable in model.weights:
        key = id(variable)
        if key in ours:
            continue
        own = _innermost(owners[key])
        found.append(
            Weight(
                variable=variable,
                mask=masks.get(key),
                layers=own,
                layout=layouts.get(key, KERNEL),
                prunable=key in masks or any(_is_kernel(variable, layer) for layer in own),
                sparse=key in masks or key in updated,
            )
        )
    return found


def cells(kept: np.ndarray, layout: Layout = KERNEL) -> np.ndarray:
    """The densities of a weight's parts, as a picture: inputs downwards, output units across.

    Args:
        kept: boolean, the shape of the weight. The window of a convolution counts as inputs.
        layout: which of its axes are outputs.

    Returns:
        A float32 matrix, of as many rows and columns as there are inputs and outputs, or of 64
        where there are more.

    Example:
        >>> keras_dst._reporting.weights.cells(np.ones((3, 3, 16, 128), bool)).shape
        (64, 64)
    """
    inputs, outputs = _axes(kept.shape, layout)
    matrix = kept.transpose(inputs + outputs).reshape(matrix_shape(kept.shape, layout))
    return _means(_means(matrix.astype("float32")).T).T


def matrix_shape(shape: Sequence[int], layout: Layout = KERNEL) -> tuple[int, int]:
    """Numbers of inputs and outputs of a weight; the window of a convolution counts as inputs."""
    inputs, outputs = _axes(shape, layout)
    return math.prod(shape[axis] for axis in inputs), math.prod(shape[axis] for axis in outputs)


def _axes(shape: Sequence[int], layout: Layout) -> tuple[list[int], list[int]]:
    outputs = [axis % len(shape) for axis in layout.outputs]
    return [axis for axis in range(len(shape)) if axis not in outputs], outputs


def _means(matrix: np.ndarray) -> np.ndarray:
    """Means over neighbouring rows, so that 64 are left at the most."""
    ends = np.linspace(0, len(matrix), min(len(matrix), _CELLS) + 1).round().astype(int)
    sums = np.add.reduceat(matrix, ends[:-1], axis=0)
    return sums / np.diff(ends)[:, None].astype("float32")


def _masked(layer) -> Iterator[tuple]:
    """The masked weights of a layer: raw variable and mask."""
    if isinstance(layer, SparseMixin):
        for layout, variable, state in layer.masked_weights():
            w = ops.convert_to_tensor(variable)
            yield variable, layer.method.mask(w, state, layout)


def _innermost(owners: list) -> list:
    """Layers that hold a weight themselves, not those that borrow it from a layer inside."""
    ids = {id(layer) for layer in owners}
    return [
        layer
        for layer in owners
        if not any(id(inner) in ids for inner in _keras.flatten_layers(layer, include_self=False))
    ]


def _is_kernel(variable, layer) -> bool:
    """Whether this would be prunable if it were neither frozen nor quantised."""
    trained = any(variable is own for own in _keras.trainable_variables_of(layer))  # frozen or not
    quantised = variable.dtype == "int8" and layer.quantization_mode == "int8"
    return (trained or quantised) and is_kernel(variable)
