"""Keras's layers with a mask over their kernel: `SparseDense` is `Dense` plus `sparsity=method`."""

import keras
from keras import layers

from keras_dst.layers.base import SparseBias, SparseMixin, SparseWeight
from keras_dst.masks import Layout

_register = keras.saving.register_keras_serializable("keras_dst")


@_register
class SparseDense(SparseMixin, layers.Dense):
    """`keras.layers.Dense` with a sparse kernel.

    Args:
        sparsity: the method, such as `methods.DST()`; all others as for `Dense`.

    Example:
        >>> keras_dst.layers.SparseDense(10, sparsity=keras_dst.methods.DST())
    """

    stock = layers.Dense
    kernel = SparseWeight()
    bias = SparseBias()


@_register
class SparseConv1D(SparseMixin, layers.Conv1D):
    """`keras.layers.Conv1D` with a sparse kernel: `sparsity=method`, all others as there."""

    stock = layers.Conv1D
    kernel = SparseWeight()
    bias = SparseBias()


@_register
class SparseConv2D(SparseMixin, layers.Conv2D):
    """`keras.layers.Conv2D` with a sparse kernel: `sparsity=method`, all others as there."""

    stock = layers.Conv2D
    kernel = SparseWeight()
    bias = SparseBias()


@_register
class SparseConv3D(SparseMixin, layers.Conv3D):
    """`keras.layers.Conv3D` with a sparse kernel: `sparsity=method`, all others as there."""

    stock = layers.Conv3D
    kernel = SparseWeight()
    bias = SparseBias()


@_register
class SparseDepthwiseConv2D(SparseMixin, layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with a sparse kernel; a unit is one channel's filter."""

    stock = layers.DepthwiseConv2D
    kernel = SparseWeight(Layout(outputs=(-2, -1), inputs=()))
    bias = SparseBias()
