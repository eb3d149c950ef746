"""Sparse forms of Keras's layers: `SparseDense` is `Dense` with the additional argument `method=`.

`sparsify` turns the layers of a built model into these layers, in place. They can also be created
directly.
"""

from keras_dst.layers import stock as _stock
from keras_dst.layers.gate import Gate
from keras_dst.layers.normalization import SparseBatchNormalization
from keras_dst.layers.stock import (
    SparseConv1D,
    SparseConv1DTranspose,
    SparseConv2D,
    SparseConv2DTranspose,
    SparseConv3D,
    SparseConv3DTranspose,
    SparseConvLSTMCell,
    SparseDense,
    SparseDepthwiseConv1D,
    SparseDepthwiseConv2D,
    SparseEinsumDense,
    SparseEmbedding,
    SparseGRUCell,
    SparseLSTMCell,
    SparseSeparableConv1D,
    SparseSeparableConv2D,
    SparseSimpleRNNCell,
)

__all__ = [
    "Gate",
    "SparseBatchNormalization",
    "SparseConv1D",
    "SparseConv1DTranspose",
    "SparseConv2D",
    "SparseConv2DTranspose",
    "SparseConv3D",
    "SparseConv3DTranspose",
    "SparseConvLSTMCell",
    "SparseDense",
    "SparseDepthwiseConv1D",
    "SparseDepthwiseConv2D",
    "SparseEinsumDense",
    "SparseEmbedding",
    "SparseGRUCell",
    "SparseLSTMCell",
    "SparseSeparableConv1D",
    "SparseSeparableConv2D",
    "SparseSimpleRNNCell",
]

if hasattr(_stock, "SparseReversibleEmbedding"):  # Keras has the stock layer since 3.12
    SparseReversibleEmbedding = _stock.SparseReversibleEmbedding
    __all__ += ["SparseReversibleEmbedding"]
