"""Choice of the layer handler for each call, and reasons why the channels of a call cannot be
removed."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import layers

from keras_dst import _keras
from keras_dst._structure.graph import Call
from keras_dst._structure.handlers import (
    DEPTHWISE,
    MERGE_VERBS,
    NOT_READ,
    Addition,
    BatchNorm,
    ChannelHandler,
    Concatenation,
    Elementwise,
    ElementwiseMerge,
    EmbeddingTable,
    GroupedConv,
    KernelLayer,
    Opaque,
    PReLUSlopes,
    Rearrangement,
    Rescale,
    SeparableConv,
    TimeDistributedDense,
    TransposedConv,
)
from keras_dst._structure.indexing import Padding, Reduction, Slice, Split, Stack, full_key
from keras_dst._structure.mixing import Attention, GroupNorm, LayerNorm, LayerScale, RMSNorm
from keras_dst._structure.recurrent import BothDirections, Recurrent


def _every(pattern: str, ranks=(1, 2, 3)) -> tuple:
    return tuple(getattr(layers, pattern.format(n)) for n in ranks)


# Layers that apply a function to every value separately, or do nothing in inference.
_ELEMENTWISE_LAYERS = (
    *(layers.Dropout, layers.GaussianNoise, layers.GaussianDropout, layers.ActivityRegularization),
    *(layers.Identity, layers.ReLU, layers.LeakyReLU, layers.ELU, *_every("SpatialDropout{}D")),
)
# Layers that apply the same function to every channel separately.
_SPATIAL = (
    *(*_every("UpSampling{}D"), *_every("ZeroPadding{}D"), *_every("Cropping{}D")),
    *(*_every("MaxPooling{}D"), *_every("AveragePooling{}D")),
    *(*_every("GlobalMaxPooling{}D"), *_every("GlobalAveragePooling{}D")),
)
_RECURRENT = (layers.SimpleRNN, layers.LSTM, layers.GRU)
# Elementwise activations. Softmax and similar activations mix the channels.
_ELEMENTWISE = (
    *("linear", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish"),
    *("sigmoid", "hard_sigmoid", "hard_silu", "tanh", "hard_tanh", "softplus", "softsign"),
    *("exponential", "log_sigmoid"),
)
_MIXING_LAYERS = {
    **dict.fromkeys(
        ("UnitNormalization", "Normalize"),
        "normalizes over channels; use BatchNormalization instead",
    ),
    **dict.fromkeys(
        ("Attention", "AdditiveAttention"),
        f"computes attention scores from all channels; {NOT_READ}",
    ),
    "Softmax": f"is a softmax over channels; {NOT_READ}",
    **dict.fromkeys(
        ("Dot", "Matmul", "Einsum"), f"multiplies channels with each other; {NOT_READ}"
    ),
    "Masking": f"computes its mask from all channels; {NOT_READ}",
}

_HANDLERS: dict[type, type[ChannelHandler]] = {
    **dict.fromkeys((layers.Dense, *_every("Conv{}D")), KernelLayer),
    **dict.fromkeys(_every("Conv{}DTranspose"), TransposedConv),
    **dict.fromkeys(_every("SeparableConv{}D", (1, 2)), SeparableConv),
    **dict.fromkeys(_RECURRENT, Recurrent),
    layers.Bidirectional: BothDirections,
    **dict.fromkeys(DEPTHWISE, GroupedConv),
    **dict.fromkeys((layers.Flatten, layers.Reshape, layers.Permute), Rearrangement),
    **dict.fromkeys((*_ELEMENTWISE_LAYERS, layers.Activation, *_SPATIAL), Elementwise),
    layers.BatchNormalization: BatchNorm,
    layers.Rescaling: Rescale,
    layers.PReLU: PReLUSlopes,
    layers.TimeDistributed: TimeDistributedDense,
    layers.Concatenate: Concatenation,
    layers.Embedding: EmbeddingTable,
    layers.LayerNormalization: LayerNorm,
    layers.RMSNormalization: RMSNorm,
    layers.GroupNormalization: GroupNorm,
    **dict.fromkeys((layers.MultiHeadAttention, layers.GroupQueryAttention), Attention),
}
# Class names of operations and layers that Keras does not export.
_HANDLERS_BY_NAME: dict[str, type[ChannelHandler]] = {
    **dict.fromkeys(MERGE_VERBS, ElementwiseMerge),
    "CustomScaleLayer": ElementwiseMerge,  # This layer of InceptionResNetV2 computes x + scale * y.
    "Add": Addition,  # Class name of the layer `Add` and of the operation `x + y`.
    "Concatenate": Concatenation,
    "Stack": Stack,
    **dict.fromkeys(("Mean", "Max", "Min"), Reduction),
    "GetItem": Slice,
    "Split": Split,
    "Pad": Padding,
    "LayerScale": LayerScale,
    "StochasticDepth": Elementwise,
    **dict.fromkeys(("Relu", "Relu6", "Gelu", "Silu", "Sigmoid", "Tanh", "Softplus"), Elementwise),
}


def handler_for(call: Call, tied: str = "") -> ChannelHandler:
    """Return the `ChannelHandler` for the layer or operation that is called.

    Args:
        call: The call.
        tied: Reason why no channel is removed from the layer, if the layer shares a weight with
            another layer. Defaults to "", which means that the layer shares no weight with another
            layer.

    Returns:
        The handler. If the channels cannot be removed, the handler is `Opaque` and holds the
        reason.
    """
    op, kind = call.op, type(call.op)
    handler = _HANDLERS.get(kind)
    if handler is None and kind.__module__.startswith("keras."):
        handler = _HANDLERS_BY_NAME.get(kind.__name__)
    if handler is None:
        return Opaque(call, _unsupported_reason(op))
    if tied:
        return Opaque(call, f"{tied}; {NOT_READ}")
    # A kernel layer computes the same outputs in training and in inference.
    if call.kwargs.get("training") and handler is not KernelLayer:
        return Opaque(call, f"is called with training=True; {NOT_READ}")
    if (len(call.outputs) != 1 and handler is not Split) or not call.inputs:
        return Opaque(call, f"has more than one output; {NOT_READ}")
    # Wrappers and attention layers contain other layers.
    inside = _keras.flatten_layers(op) if isinstance(op, keras.Layer) else []
    if any(getattr(layer, "quantization_mode", None) for layer in inside):
        return Opaque(call, "is quantized; quantize after shrink instead")
    if any(getattr(layer, "lora_enabled", False) for layer in inside):
        return Opaque(call, "has LoRA; merge it with save_weights, and load_weights without LoRA")
    y = call.outputs[0]
    if len({len(x.shape) for x in call.inputs}) == 1:
        call.view_along(_channel_axis(call))
        if handler is not Rearrangement and len(y.shape) == len(call.inputs[0].shape):
            y.set_channels(call.inputs[0].axis)
    elif any(x.axis != len(x.shape) - 1 for x in call.inputs):
        return Opaque(call, "joins channels along different axes; use one data format")
    known = call.outputs if handler is EmbeddingTable else (*call.inputs, *call.outputs)
    if not all(x.channels for x in known):
        return Opaque(call, "has an unknown number of channels; pass the number to keras.Input")
    if handler is Concatenation and op.axis % len(y.shape) != call.inputs[0].axis:
        handler = ElementwiseMerge
    if handler is KernelLayer and getattr(op, "groups", 1) > 1:
        handler = GroupedConv
    reason = _input_reason(handler, call)
    return Opaque(call, reason) if reason else handler(call, _unit_reason(handler, call))


def _channel_axis(call: Call) -> int:
    """Return the axis along which an operation expects the channels of its inputs."""
    op, last = call.op, len(call.inputs[0].shape) - 1
    if isinstance(op, (layers.BatchNormalization, layers.GroupNormalization)):
        return op.axis % (last + 1)
    kind = type(op)
    anywhere = (*_ELEMENTWISE_LAYERS, layers.Activation, layers.PReLU)
    if kind in anywhere or not _has_channel_axis(kind):
        return next((x.axis for x in call.inputs if x.axis != last), last)
    return 1 if getattr(op, "data_format", None) == "channels_first" else last


def _has_channel_axis(kind: type) -> bool:
    """Return whether the layer's class has an argument for the axis of the channels."""
    handler = _HANDLERS.get(kind, ElementwiseMerge)
    return not issubclass(handler, (Rearrangement, Concatenation, ElementwiseMerge, Rescale))


def _unsupported_reason(op) -> str:
    kind = type(op)
    if isinstance(op, layers.Lambda):
        return "is a Lambda, whose function shrink cannot read; use layers of Keras instead"
    if not kind.__module__.startswith("keras."):
        return "is a custom layer, whose code shrink cannot read; use layers of Keras instead"
    default = f"is of type {kind.__name__}, which shrink does not support; {NOT_READ}"
    return _MIXING_LAYERS.get(kind.__name__, default)


def _input_reason(handler: type[ChannelHandler], call: Call) -> str:
    """Return the reason why no input channel can be removed from a call, or an empty string."""
    op, x, y = call.op, call.inputs[0], call.outputs[0]
    if handler is TimeDistributedDense and type(op.layer) is not layers.Dense:
        return f"repeats a {type(op.layer).__name__}, which shrink does not support; {NOT_READ}"
    if (handler is GroupedConv or isinstance(op, layers.Activation)) and not _is_elementwise(op):
        return _activation_reason(op)
    if handler in (Recurrent, BothDirections) and len(call.inputs) > 1:
        return f"is called with an initial state; {NOT_READ}"
    if handler is BothDirections:
        return _direction_reason(op.forward_layer, op.backward_layer)
    if handler is Rescale:
        sizes = [math.prod(np.shape(value)) for value in (op.scale, op.offset)]
        own = {np.shape(value)[-1:] for value in (op.scale, op.offset)} - {(), (1,)}
        fits = x.axis == len(x.shape) - 1 and own <= {(x.channels,)} and max(sizes) <= x.channels
        return "" if max(sizes) == 1 or fits else f"scales each position differently; {NOT_READ}"
    if issubclass(handler, ElementwiseMerge):
        arrays = [z for z in keras.tree.flatten((call.args, call.kwargs)) if np.ndim(z)]
        alike = all(z.channels in (1, y.channels) for z in call.inputs)
        whole = any(z.channels == y.channels for z in call.inputs)
        return "" if alike and whole and not arrays else f"combines an array; {NOT_READ}"
    if handler in (LayerNorm, RMSNorm):
        axes = [op.axis] if isinstance(op.axis, int) else list(op.axis)
        if [axis % len(x.shape) for axis in axes] != [x.axis]:
            return f"normalizes over axes other than the channels; {NOT_READ}"
        if getattr(op, "rms_scaling", False):
            return f"scales by the standard deviation; {NOT_READ}"
        # Padding and slicing the channels would discard the Keras mask of the tensor.
        masked = handler is LayerNorm and x.masked
        return f"normalizes over the channels of a masked sequence; {NOT_READ}" if masked else ""
    if handler is LayerScale and x.axis != len(x.shape) - 1:
        return f"scales each position differently; {NOT_READ}"
    if handler is Reduction and (
        op.axis is None or {axis % len(x.shape) for axis in op.axis} & {0, x.axis}
    ):
        return f"reduces over channels; {NOT_READ}"
    if handler is Slice and full_key(call) is None:
        return f"selects channels by an index or with a step; {NOT_READ}"
    if handler is Padding:
        values = [*call.args[1:], *call.kwargs.values()]
        zeros = op.mode == "constant" and all(value is None or value == 0 for value in values)
        return "" if zeros else f"pads with values other than zero; {NOT_READ}"
    if handler is Attention:
        config = op.get_config()
        if config.get("use_gate"):
            return f"is created with use_gate=True; {NOT_READ}"
        shape = config.get("output_shape")
        if isinstance(shape, (tuple, list)) and len(shape) != 1:
            return f"has units along several axes; {NOT_READ}"
    if handler is Rearrangement and None in (*x.shape[1:], *y.shape[1:]):
        last = x.axis == len(x.shape) - 1 and x.shape[-1] == y.shape[-1]
        known = isinstance(op, layers.Permute) or last
        return "" if known else "has unknown sizes; pass the full shape to keras.Input"
    return ""


def _direction_reason(*directions) -> str:
    """Return the reason why no channel can be removed from the layers of a `Bidirectional`."""
    for layer in directions:
        if type(layer) not in _RECURRENT:
            return f"repeats a {type(layer).__name__}, which shrink does not support; {NOT_READ}"
        if reason := _gate_reason(layer.cell):
            return reason
    if len({layer.cell.units for layer in directions}) > 1:
        return f"has directions with different numbers of units; {NOT_READ}"
    return ""


def _gate_reason(cell) -> str:
    """Return the reason why no unit can be removed from a recurrent cell."""
    gates = getattr(cell, "recurrent_activation", cell.activation)
    return "" if _is_elementwise(cell) and _is_known(gates) else _activation_reason(cell)


def _unit_reason(handler: type[ChannelHandler], call: Call) -> str:
    """Return the reason why only input channels, but no output channels, can be removed from a
    layer."""
    if handler is Recurrent:
        return _gate_reason(call.op.cell)
    if not issubclass(handler, KernelLayer):
        return ""
    layer = call.op.layer if handler is TimeDistributedDense else call.op
    return "" if _is_elementwise(layer) else _activation_reason(layer)


def _activation_reason(layer) -> str:
    name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
    return f"has the activation '{name}', which may mix channels; use an elementwise activation"


def _is_elementwise(layer) -> bool:
    return _is_known(layer.activation)


def _is_known(activation) -> bool:
    name = getattr(activation, "__name__", "")
    return name in _ELEMENTWISE and activation is keras.activations.get(name)
