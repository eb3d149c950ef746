"""Magnitude masks as tfmot computes them, for single entries and for blocks, in NumPy."""

from __future__ import annotations

import numpy as np


def magnitude_mask(w: np.ndarray, sparsity: float) -> np.ndarray:
    """Return a mask that keeps the `max(1, round(size * (1 - sparsity)))` largest magnitudes.

    Entries whose magnitude equals the smallest kept magnitude are also kept, as in tfmot.
    """
    if not w.size:
        return np.ones(w.shape, "bool")
    magnitudes = np.abs(w)
    kept = max(1, int(np.round(np.float32(w.size) * (np.float32(1) - np.float32(sparsity)))))
    return magnitudes >= np.partition(magnitudes, w.size - kept, axis=None)[w.size - kept]


def block_mask(w: np.ndarray, sparsity: float, block_size, pooling: str) -> np.ndarray:
    """Return a boolean mask that keeps the blocks with the largest pooled magnitudes.

    Args:
        w: Matrix of shape (inputs, outputs).
        sparsity: Fraction of blocks that the mask prunes.
        block_size: Number of rows (inputs) and columns (outputs) of a block.
        pooling: `"AVG"` ranks blocks by their mean magnitude, and `"MAX"` ranks blocks by their
            largest magnitude.

    If the block size does not divide the length of an axis, tfmot pads both ends of the axis. Then
    tfmot computes the magnitudes of the blocks. The first block can therefore begin with padding.
    When tfmot applies a block mask, however, the first block begins with the first entry of the
    weight. tfmot therefore computes the magnitudes of blocks that are shifted by the padding. This
    function shifts the blocks in the same way, so its masks equal the masks of tfmot.
    """
    pooled = np.abs(w)
    for axis, length in enumerate(block_size):
        pooled = _pool(pooled, axis, length, {"AVG": np.nanmean, "MAX": np.nanmax}[pooling])
    mask = magnitude_mask(pooled, sparsity)
    for axis, length in enumerate(block_size):
        mask = np.repeat(mask, length, axis)
    return mask[: w.shape[0], : w.shape[1]]


def _pool(values, axis, length, reduce):
    """Pad both ends of an axis, and apply `reduce` to every `length` consecutive entries along the
    axis."""
    windows = -(-values.shape[axis] // length)
    missing = windows * length - values.shape[axis]
    padding = [(0, 0), (0, 0)]
    padding[axis] = (missing // 2, missing - missing // 2)
    padded = np.pad(values, padding, constant_values=np.nan)
    shape = [*values.shape[:axis], windows, length, *values.shape[axis + 1 :]]
    return reduce(padded.reshape(shape), axis=axis + 1)
