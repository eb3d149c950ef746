"""Keras's layers with a mask over their weights: `SparseDense` is `Dense` plus `method=`.

All other arguments are the stock layer's; a method that prunes whole units prunes their bias too.
"""

import keras
from keras import layers

from keras_dst import _keras
from keras_dst.layers.base import (
    EinsumWeight,
    SparseBias,
    SparseCellMixin,
    SparseMixin,
    SparseWeight,
)
from keras_dst.masks import Layout

_register = keras.saving.register_keras_serializable("keras_dst")

_TRANSPOSED = Layout(outputs=(-2,), inputs=(-1,))  # (*window, out, in)
_DEPTHWISE = Layout(outputs=(-2, -1), inputs=())  # (*window, in, multiplier): a unit is one channel


@_register
class SparseDense(SparseMixin, layers.Dense):
    """`keras.layers.Dense` with a sparse kernel.

    Args:
        method: the method, such as `methods.DST()`; all others as for `Dense`.

    Example:
        >>> keras_dst.layers.SparseDense(10, method=keras_dst.methods.DST())
    """

    stock = layers.Dense
    kernel = SparseWeight()
    bias = SparseBias()


@_register
class SparseEinsumDense(SparseMixin, layers.EinsumDense):
    """`keras.layers.EinsumDense` with a sparse kernel, whose axes the equation tells."""

    stock = layers.EinsumDense
    kernel = EinsumWeight()


@_register
class SparseEmbedding(SparseMixin, layers.Embedding):
    """`keras.layers.Embedding` with a sparse table: `(tokens, units)`, as a kernel is laid out."""

    stock = layers.Embedding
    embeddings = SparseWeight()


@_register
class SparseConv1D(SparseMixin, layers.Conv1D):
    """`keras.layers.Conv1D` with a sparse kernel."""

    stock = layers.Conv1D
    kernel = SparseWeight()
    bias = SparseBias()


@_register
class SparseConv2D(SparseMixin, layers.Conv2D):
    """`keras.layers.Conv2D` with a sparse kernel."""

    stock = layers.Conv2D
    kernel = SparseWeight()
    bias = SparseBias()


@_register
class SparseConv3D(SparseMixin, layers.Conv3D):
    """`keras.layers.Conv3D` with a sparse kernel."""

    stock = layers.Conv3D
    kernel = SparseWeight()
    bias = SparseBias()


@_register
class SparseConv1DTranspose(SparseMixin, layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` with a sparse kernel."""

    stock = layers.Conv1DTranspose
    kernel = SparseWeight(_TRANSPOSED)
    bias = SparseBias()


@_register
class SparseConv2DTranspose(SparseMixin, layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` with a sparse kernel."""

    stock = layers.Conv2DTranspose
    kernel = SparseWeight(_TRANSPOSED)
    bias = SparseBias()


@_register
class SparseConv3DTranspose(SparseMixin, layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` with a sparse kernel."""

    stock = layers.Conv3DTranspose
    kernel = SparseWeight(_TRANSPOSED)
    bias = SparseBias()


@_register
class SparseDepthwiseConv1D(SparseMixin, layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` with a sparse kernel; a unit is one channel's filter."""

    stock = layers.DepthwiseConv1D
    kernel = SparseWeight(_DEPTHWISE)
    bias = SparseBias()


@_register
class SparseDepthwiseConv2D(SparseMixin, layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with a sparse kernel; a unit is one channel's filter."""

    stock = layers.DepthwiseConv2D
    kernel = SparseWeight(_DEPTHWISE)
    bias = SparseBias()


@_register
class SparseSeparableConv1D(SparseMixin, layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D`, both of whose kernels are sparse."""

    stock = layers.SeparableConv1D
    depthwise_kernel = SparseWeight(_DEPTHWISE)
    pointwise_kernel = SparseWeight()


@_register
class SparseSeparableConv2D(SparseMixin, layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D`, both of whose kernels are sparse."""

    stock = layers.SeparableConv2D
    depthwise_kernel = SparseWeight(_DEPTHWISE)
    pointwise_kernel = SparseWeight()


@_register
class SparseSimpleRNNCell(SparseCellMixin, layers.SimpleRNNCell):
    """`keras.layers.SimpleRNNCell`, sparse in its kernel and its recurrent kernel.

    Example:
        >>> keras.layers.RNN(SparseSimpleRNNCell(8, method=keras_dst.methods.DST()))
    """

    stock = layers.SimpleRNNCell
    kernel = SparseWeight()
    recurrent_kernel = SparseWeight()


@_register
class SparseLSTMCell(SparseCellMixin, layers.LSTMCell):
    """`keras.layers.LSTMCell`, sparse in its kernel and its recurrent kernel.

    A unit of theirs, which has a threshold of its own under DST, is that of one of the four gates.
    """

    stock = layers.LSTMCell
    kernel = SparseWeight()
    recurrent_kernel = SparseWeight()


@_register
class SparseGRUCell(SparseCellMixin, layers.GRUCell):
    """`keras.layers.GRUCell`, sparse in its kernel and its recurrent kernel.

    A unit of theirs, which has a threshold of its own under DST, is that of one of the three gates.
    """

    stock = layers.GRUCell
    kernel = SparseWeight()
    recurrent_kernel = SparseWeight()


@_register
class SparseConvLSTMCell(SparseCellMixin, _keras.ConvLSTMCell):
    """The cell of `keras.layers.ConvLSTM1D/2D/3D`, sparse in its kernel and recurrent kernel."""

    stock = _keras.ConvLSTMCell
    kernel = SparseWeight()
    recurrent_kernel = SparseWeight()


STOCK_LAYERS: tuple[type[SparseMixin], ...] = (
    SparseDense,
    SparseEinsumDense,
    SparseEmbedding,
    SparseConv1D,
    SparseConv2D,
    SparseConv3D,
    SparseConv1DTranspose,
    SparseConv2DTranspose,
    SparseConv3DTranspose,
    SparseDepthwiseConv1D,
    SparseDepthwiseConv2D,
    SparseSeparableConv1D,
    SparseSeparableConv2D,
    SparseSimpleRNNCell,
    SparseLSTMCell,
    SparseGRUCell,
    SparseConvLSTMCell,
)

if hasattr(layers, "ReversibleEmbedding"):  # not before Keras 3.12

    @_register
    class SparseReversibleEmbedding(SparseMixin, layers.ReversibleEmbedding):
        """`keras.layers.ReversibleEmbedding` with a sparse table, or two that are not tied."""

        stock = layers.ReversibleEmbedding
        embeddings = SparseWeight()
        reverse_embeddings = SparseWeight()

    STOCK_LAYERS += (SparseReversibleEmbedding,)
