"""Keras's layers with a mask over their weights: `SparseDense` is `Dense` plus `method=`.

`sparsify` turns the layers of a built model into these, in place; they can be used by hand too.
"""

from keras_dst.layers.base import SparseBias, SparseMixin, SparseWeight, check_method
from keras_dst.layers.classes import (
    SPARSE_LAYERS,
    SparseComposite,
    SparseSubclass,
    composite_class,
    layouts_of,
    make_sparse,
    prunable,
    sparse_class,
)
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
    "SPARSE_LAYERS",
    "Gate",
    "SparseBatchNormalization",
    "SparseBias",
    "SparseComposite",
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
    "SparseMixin",
    "SparseSeparableConv1D",
    "SparseSeparableConv2D",
    "SparseSimpleRNNCell",
    "SparseSubclass",
    "SparseWeight",
    "check_method",
    "composite_class",
    "layouts_of",
    "make_sparse",
    "prunable",
    "sparse_class",
]
