"""Keras layers with sparse kernels.

For example, `SparseDense` is `Dense` with the additional argument `method=`.

All other arguments are the arguments of the stock layer. A method that prunes whole units also
prunes their biases.
"""

from keras import layers

from keras_dst import _keras
from keras_dst.layers.base import (
    EinsumWeight,
    SparseBias,
    SparseCellMixin,
    SparseMixin,
    SparseWeight,
    register,
)
from keras_dst.masks import Layout

# Axes: (*window, out, in).
_TRANSPOSED = Layout(outputs=(-2,), inputs=(-1,))
# Axes: (*window, in, multiplier). Every filter is an output unit.
_DEPTHWISE = Layout(outputs=(-2, -1), inputs=())


@register
class SparseDense(SparseMixin, layers.Dense):
    """`keras.layers.Dense` with a sparse kernel.

    Args:
        method: Method that masks the kernel, such as `methods.DST()`. All other arguments are the
            arguments of `Dense`.

    Example:
        >>> keras_dst.layers.SparseDense(10, method=keras_dst.methods.DST())
    """

    stock = layers.Dense
    kernel = SparseWeight()
    bias = SparseBias()


@register
class SparseEinsumDense(SparseMixin, layers.EinsumDense):
    """`keras.layers.EinsumDense` with a sparse kernel, whose axes are read from the equation."""

    stock = layers.EinsumDense
    kernel = EinsumWeight()


@register
class SparseEmbedding(SparseMixin, layers.Embedding):
    """`keras.layers.Embedding` with a sparse table of the shape `(tokens, units)`."""

    stock = layers.Embedding
    embeddings = SparseWeight()


@register
class SparseConv1D(SparseMixin, layers.Conv1D):
    """`keras.layers.Conv1D` with a sparse kernel."""

    stock = layers.Conv1D
    kernel = SparseWeight()
    bias = SparseBias()


@register
class SparseConv2D(SparseMixin, layers.Conv2D):
    """`keras.layers.Conv2D` with a sparse kernel."""

    stock = layers.Conv2D
    kernel = SparseWeight()
    bias = SparseBias()


@register
class SparseConv3D(SparseMixin, layers.Conv3D):
    """`keras.layers.Conv3D` with a sparse kernel."""

    stock = layers.Conv3D
    kernel = SparseWeight()
    bias = SparseBias()


@register
class SparseConv1DTranspose(SparseMixin, layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose` with a sparse kernel."""

    stock = layers.Conv1DTranspose
    kernel = SparseWeight(_TRANSPOSED)
    bias = SparseBias()


@register
class SparseConv2DTranspose(SparseMixin, layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose` with a sparse kernel."""

    stock = layers.Conv2DTranspose
    kernel = SparseWeight(_TRANSPOSED)
    bias = SparseBias()


@register
class SparseConv3DTranspose(SparseMixin, layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose` with a sparse kernel."""

    stock = layers.Conv3DTranspose
    kernel = SparseWeight(_TRANSPOSED)
    bias = SparseBias()


@register
class SparseDepthwiseConv1D(SparseMixin, layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D` with a sparse kernel. Every filter is an output unit."""

    stock = layers.DepthwiseConv1D
    kernel = SparseWeight(_DEPTHWISE)
    bias = SparseBias()


@register
class SparseDepthwiseConv2D(SparseMixin, layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` with a sparse kernel. Every filter is an output unit."""

    stock = layers.DepthwiseConv2D
    kernel = SparseWeight(_DEPTHWISE)
    bias = SparseBias()


@register
class SparseSeparableConv1D(SparseMixin, layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D` with two sparse kernels."""

    stock = layers.SeparableConv1D
    depthwise_kernel = SparseWeight(_DEPTHWISE)
    pointwise_kernel = SparseWeight()


@register
class SparseSeparableConv2D(SparseMixin, layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D` with two sparse kernels."""

    stock = layers.SeparableConv2D
    depthwise_kernel = SparseWeight(_DEPTHWISE)
    pointwise_kernel = SparseWeight()


@register
class SparseSimpleRNNCell(SparseCellMixin, layers.SimpleRNNCell):
    """`keras.layers.SimpleRNNCell` with a sparse kernel and a sparse recurrent kernel.

    Example:
        >>> keras.layers.RNN(SparseSimpleRNNCell(8, method=keras_dst.methods.DST()))
    """

    stock = layers.SimpleRNNCell
    kernel = SparseWeight()
    recurrent_kernel = SparseWeight()


@register
class SparseLSTMCell(SparseCellMixin, layers.LSTMCell):
    """`keras.layers.LSTMCell` with a sparse kernel and a sparse recurrent kernel.

    With DST, each kernel has four thresholds per unit, one for each gate of the cell.
    """

    stock = layers.LSTMCell
    kernel = SparseWeight()
    recurrent_kernel = SparseWeight()


@register
class SparseGRUCell(SparseCellMixin, layers.GRUCell):
    """`keras.layers.GRUCell` with a sparse kernel and a sparse recurrent kernel.

    With DST, each kernel has three thresholds per unit, one for each gate of the cell.
    """

    stock = layers.GRUCell
    kernel = SparseWeight()
    recurrent_kernel = SparseWeight()


@register
class SparseConvLSTMCell(SparseCellMixin, _keras.ConvLSTMCell):
    """Cell of `keras.layers.ConvLSTM1D/2D/3D` with two sparse kernels."""

    stock = _keras.ConvLSTMCell
    kernel = SparseWeight()
    recurrent_kernel = SparseWeight()


SPARSE_KERNEL_LAYERS: tuple[type[SparseMixin], ...] = (
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

if hasattr(layers, "ReversibleEmbedding"):  # `ReversibleEmbedding` is new in Keras 3.12.

    @register
    class SparseReversibleEmbedding(SparseMixin, layers.ReversibleEmbedding):
        """`keras.layers.ReversibleEmbedding` with one sparse table (two if `tie_weights=False`)."""

        stock = layers.ReversibleEmbedding
        embeddings = SparseWeight()
        reverse_embeddings = SparseWeight()

    SPARSE_KERNEL_LAYERS += (SparseReversibleEmbedding,)
