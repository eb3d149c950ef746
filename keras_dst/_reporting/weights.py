"""Functions that collect the weights of a model and find the kept entries of each weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_dst import _keras
from keras_dst._utils.filters import is_kernel
from keras_dst.layers import Gate
from keras_dst.layers.base import SparseMixin
from keras_dst.layers.classes import layouts_of
from keras_dst.masks import KERNEL, Layout
from keras_dst.optimizers import optimizers_of, sparse_optimizers

_MAX_CELLS = 64  # Maximum number of rows, and of columns, in a density map.


@dataclass(frozen=True)
class Weight:
    """A weight of a model.

    Attributes:
        variable: Keras variable of the weight.
        values: Tensor or variable that holds the weight before the mask is applied. If LoRA is
            enabled, the values are the sum of the kernel and the product of the two LoRA matrices.
        mask: Mask that the layer applies to the weight, or None.
        layers: List of all layers that hold the weight. Several layers can share a weight.
        layout: Input and output axes of the weight.
        prunable: True if the weight has a mask, or is a kernel that a pruning method could mask.
        sparse: Whether a layer or a `SparseOptimizer` masks the weight.
    """

    variable: Any
    values: Any
    mask: Any
    layers: list
    layout: Layout
    prunable: bool
    sparse: bool

    @property
    def parameters(self) -> int:
        """Number of entries."""
        return math.prod(self.variable.shape)

    def kept(self) -> np.ndarray:
        """Return a boolean array of the entries that are neither zero nor masked."""
        # Compare the values with 0 in NumPy, because JAX would compile the comparison for every new
        # shape.
        nonzero = ops.convert_to_numpy(ops.convert_to_tensor(self.values)) != 0
        if self.mask is not None:
            nonzero = nonzero & ops.convert_to_numpy(self.mask).astype(bool)
        return nonzero


def weights_of(model) -> list[Weight]:
    """Return all weights of a model, except the variables that keras_dst added.

    Raises:
        ValueError: If a layer is quantized in a mode that stores several weights in one byte.
    """
    owners: dict[int, list] = {}
    masks: dict[int, Any] = {}
    layouts = layouts_of(model)
    ours: set[int] = set()
    for layer in _keras.flatten_layers(model):
        _check_unpacked(layer)
        for variable in [
            *_keras.trainable_variables_of(layer),
            *_keras.non_trainable_variables_of(layer),
        ]:
            owners.setdefault(id(variable), []).append(layer)
        for variable, mask in _masked(layer):
            masks[id(variable)] = mask
        if isinstance(layer, (SparseMixin, Gate)):
            ours.update(id(value) for value in layer.state_variables().values())
    updated = {
        id(kernel)
        for optimizer in optimizers_of(model)
        for sparse in sparse_optimizers(optimizer)
        for kernel in sparse.kernels
    }
    found = []
    for variable in model.weights:
        key = id(variable)
        if key in ours:
            continue
        holders = _innermost(owners[key])
        found.append(
            Weight(
                variable=variable,
                values=_values_of(variable, holders),
                mask=masks.get(key),
                layers=holders,
                layout=layouts.get(key, KERNEL),
                prunable=key in masks or any(_is_kernel(variable, layer) for layer in holders),
                sparse=key in masks or key in updated,
            )
        )
    return found


def density_map(kept: np.ndarray, layout: Layout = KERNEL) -> np.ndarray:
    """Divide a weight into blocks of nearly equal size, and return the densities of the blocks.

    Args:
        kept: Boolean array in the shape of the weight, which is True for kept entries. In the
            kernel of a convolution, the spatial axes count as input axes.
        layout: Input and output axes of the weight.

    Returns:
        A float32 matrix of densities, with one row per input and one column per output. Neighboring
        inputs and outputs are averaged, so that at most 64 rows and 64 columns remain.

    Example:
        >>> density_map(np.ones((3, 3, 16, 128), bool)).shape
        (64, 64)
    """
    inputs, outputs = _axes(kept.shape, layout)
    matrix = kept.transpose(inputs + outputs).reshape(matrix_shape(kept.shape, layout))
    return _means(_means(matrix.astype("float32")).T).T


def matrix_shape(shape: Sequence[int], layout: Layout = KERNEL) -> tuple[int, int]:
    """Return two integers: how many inputs and how many outputs a weight has."""
    inputs, outputs = _axes(shape, layout)
    return math.prod(shape[axis] for axis in inputs), math.prod(shape[axis] for axis in outputs)


def _axes(shape: Sequence[int], layout: Layout) -> tuple[list[int], list[int]]:
    outputs = [axis % len(shape) for axis in layout.outputs]
    return [axis for axis in range(len(shape)) if axis not in outputs], outputs


def _means(matrix: np.ndarray) -> np.ndarray:
    """Average neighboring rows of a matrix, so that at most 64 rows remain."""
    ends = np.linspace(0, len(matrix), min(len(matrix), _MAX_CELLS) + 1).round().astype(int)
    sums = np.add.reduceat(matrix, ends[:-1], axis=0)
    return sums / np.diff(ends)[:, None].astype("float32")


def _masked(layer) -> Iterator[tuple]:
    """Yield the unmasked variable and the mask of every masked weight of a layer."""
    if isinstance(layer, SparseMixin):
        for layout, variable, state in layer.masked_weights():
            w = ops.convert_to_tensor(variable)
            yield variable, layer.method.mask(w, state, layout)


def _check_unpacked(layer) -> None:
    """Raise ValueError if the variables of a quantized layer do not show which weights are zero."""
    mode = getattr(layer, "quantization_mode", None)
    if mode not in (None, "int8", "float8"):
        raise ValueError(
            f"Expected layers that are not quantized, or quantized to int8 or float8. Received: "
            f"'{layer.name}', quantized with {mode!r}. The quantized variables of the layer do not "
            "show which weights are zero. Call keras_dst.report before model.quantize."
        )


def _values_of(variable, holders: list):
    """Return the values of a variable, plus the LoRA update if the variable is a kernel with LoRA
    enabled."""
    adapted = [layer for layer in holders if getattr(layer, "lora_enabled", False)]
    if adapted and is_kernel(variable):
        return getattr(adapted[0], variable.name)
    return variable


def _innermost(owners: list) -> list:
    """Return the layers in `owners` that contain no other layer of `owners`."""
    ids = {id(layer) for layer in owners}
    return [
        layer
        for layer in owners
        if not any(id(inner) in ids for inner in _keras.flatten_layers(layer, include_self=False))
    ]


def _is_kernel(variable, layer) -> bool:
    """Return whether a variable is a kernel of a layer. The kernel may be frozen or quantized."""
    trained = any(variable is own for own in _keras.trainable_variables_of(layer))
    quantized = variable.dtype == "int8" and layer.quantization_mode == "int8"
    return (trained or quantized) and is_kernel(variable)
