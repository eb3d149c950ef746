"""Sparse versions of Keras layers.

Each sparse layer is a subclass of a Keras layer. For example, `SparseDense` is `Dense` with the
additional argument `method=`. `sparsify` converts the layers of a built model to sparse layers, in
place. Sparse layers can also be created directly.

In model summaries and files, a sparse layer has the name of its stock class, such as `Dense`. A
`.weights.h5` file of the dense model therefore loads into the sparse model.
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

if hasattr(_stock, "SparseReversibleEmbedding"):  # New in Keras 3.12.
    SparseReversibleEmbedding = _stock.SparseReversibleEmbedding
    """`keras.layers.ReversibleEmbedding` with one sparse table (two if `tie_weights=False`)."""
    __all__ += ["SparseReversibleEmbedding"]
