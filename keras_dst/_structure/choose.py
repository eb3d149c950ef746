"""Which rule is right for a call, or why its channels cannot be followed."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import layers

from keras_dst._structure.graph import Call
from keras_dst._structure.rules import (
    DEPTHWISE,
    VERBS,
    Concat,
    Distributed,
    Grouped,
    Kernel,
    Merge,
    Moved,
    Norm,
    Opaque,
    Plain,
    Recurrent,
    Rule,
    Scale,
    Separable,
    Slope,
    Sum,
    Transposed,
)


def _every(pattern: str, ranks=(1, 2, 3)) -> tuple:
    return tuple(getattr(layers, pattern.format(n)) for n in ranks)


# Layers that treat every number by itself, or do nothing in inference.
_ELEMENTWISE_LAYERS = (
    *(layers.Dropout, layers.GaussianNoise, layers.GaussianDropout, layers.ActivityRegularization),
    *(layers.Identity, layers.ReLU, layers.LeakyReLU, layers.ELU, *_every("SpatialDropout{}D")),
)
# Layers that treat every channel by itself and all of them alike.
_SPATIAL = (
    *(*_every("UpSampling{}D"), *_every("ZeroPadding{}D"), *_every("Cropping{}D")),
    *(*_every("MaxPooling{}D"), *_every("AveragePooling{}D")),
    *(*_every("GlobalMaxPooling{}D"), *_every("GlobalAveragePooling{}D")),
)
# Activations of one number; softmax and its like mix the channels.
_ELEMENTWISE = (
    *("linear", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish"),
    *("sigmoid", "hard_sigmoid", "hard_silu", "tanh", "hard_tanh", "softplus", "softsign"),
    *("exponential", "log_sigmoid"),
)
_MIXES = {
    **dict.fromkeys(
        (*(f"{n}Normalization" for n in ("Layer", "Group", "RMS", "Unit")), "Normalize"),
        "normalises over channels",
    ),
    **dict.fromkeys(
        ("MultiHeadAttention", "GroupQueryAttention", "Attention", "AdditiveAttention"),
        "attends with all channels at once",
    ),
    "Softmax": "is a softmax over channels",
    "Dot": "multiplies channels with each other",
}

_RULES: dict[type, type[Rule]] = {
    **dict.fromkeys((layers.Dense, *_every("Conv{}D")), Kernel),
    **dict.fromkeys(_every("Conv{}DTranspose"), Transposed),
    **dict.fromkeys(_every("SeparableConv{}D", (1, 2)), Separable),
    **dict.fromkeys((layers.SimpleRNN, layers.LSTM, layers.GRU), Recurrent),
    **dict.fromkeys(DEPTHWISE, Grouped),
    **dict.fromkeys((layers.Flatten, layers.Reshape, layers.Permute), Moved),
    **dict.fromkeys((*_ELEMENTWISE_LAYERS, layers.Activation, *_SPATIAL), Plain),
    layers.BatchNormalization: Norm,
    layers.Rescaling: Scale,
    layers.PReLU: Slope,
    layers.TimeDistributed: Distributed,
    layers.Concatenate: Concat,
}


def rule_of(call: Call) -> Rule:
    """The rule for a call; `Opaque`, with the reason, where channels cannot be followed."""
    kind = type(call.op)
    rule = _RULES.get(kind)
    # The layer, or the operation that `x + y` is.
    if kind.__name__ in VERBS and kind.__module__.startswith("keras."):
        rule = Sum if kind.__name__ == "Add" else Merge
    if rule is None:
        return Opaque(call, _stranger(call.op))
    if len(call.outputs) != 1 or not call.inputs:
        return Opaque(call, "gives more than one output")
    if getattr(call.op, "quantization_mode", None):
        return Opaque(call, "is quantised")
    if getattr(call.op, "lora_enabled", False):
        return Opaque(call, "has LoRA enabled")
    y = call.outputs[0]
    if len({len(x.shape) for x in call.inputs}) == 1:
        call.look_along(_axis(call))
        if rule is not Moved and len(y.shape) == len(call.inputs[0].shape):
            y.carry(call.inputs[0].axis)
    elif any(x.axis != len(x.shape) - 1 for x in call.inputs):
        return Opaque(call, "joins channels of different axes")
    if not all(x.channels for x in (*call.inputs, y)):
        return Opaque(call, "has channels whose number is open")
    if rule is Concat and call.op.axis % len(y.shape) != call.inputs[0].axis:
        rule = Merge
    if rule is Kernel and getattr(call.op, "groups", 1) > 1:
        rule = Grouped
    reason = _refusal(rule, call)
    return Opaque(call, reason) if reason else rule(call, _pinned(rule, call))


def _axis(call: Call) -> int:
    """Where an operation takes the channels of its inputs."""
    op, last = call.op, len(call.inputs[0].shape) - 1
    if isinstance(op, layers.BatchNormalization):
        return op.axis % (last + 1)
    kind = type(op)
    if kind in (*_ELEMENTWISE_LAYERS, layers.Activation, layers.PReLU) or not _is_local(kind):
        return next((x.axis for x in call.inputs if x.axis != last), last)
    return 1 if getattr(op, "data_format", None) == "channels_first" else last


def _is_local(kind: type) -> bool:
    """Whether a layer has an axis of its own for the channels."""
    rule = _RULES.get(kind, Merge)
    return not issubclass(rule, (Moved, Concat, Merge, Scale))


def _stranger(op) -> str:
    kind = type(op)
    if not kind.__module__.startswith("keras."):
        return "is a layer of your own"
    return _MIXES.get(kind.__name__, f"is of type {kind.__name__}, which shrink does not follow")


def _refusal(rule: type[Rule], call: Call) -> str:
    """Why a call keeps the channels that go in, where its kind of layer does not."""
    op, x, y = call.op, call.inputs[0], call.outputs[0]
    if rule is Distributed and type(op.layer) is not layers.Dense:
        return f"repeats a {type(op.layer).__name__}, which shrink does not follow"
    if (rule is Grouped or isinstance(op, layers.Activation)) and not _is_elementwise(op):
        return _mixing(op)
    if rule is Recurrent and len(call.inputs) > 1:
        return "is given its first state"
    if rule is Scale:
        sizes = [math.prod(np.shape(value)) for value in (op.scale, op.offset)]
        own = {np.shape(value)[-1:] for value in (op.scale, op.offset)} - {(), (1,)}
        fits = x.axis == len(x.shape) - 1 and own <= {(x.channels,)} and max(sizes) <= x.channels
        return "" if max(sizes) == 1 or fits else "scales every place by a number of its own"
    if issubclass(rule, Merge):
        arrays = [z for z in keras.tree.flatten((call.args, call.kwargs)) if np.ndim(z)]
        alike = all(z.channels in (1, y.channels) for z in call.inputs)
        whole = any(z.channels == y.channels for z in call.inputs)
        return "" if alike and whole and not arrays else "combines channels with an array"
    if rule is Moved and None in (*x.shape[1:], *y.shape[1:]):
        last = x.axis == len(x.shape) - 1 and x.shape[-1] == y.shape[-1]
        return "" if isinstance(op, layers.Permute) or last else "has sizes that are open"
    return ""


def _pinned(rule: type[Rule], call: Call) -> str:
    """Why a layer that can do without some of its inputs has to keep its units."""
    if rule is Recurrent:
        return "is recurrent: each of its units reads all of them"
    if not issubclass(rule, Kernel):
        return ""
    layer = call.op.layer if rule is Distributed else call.op
    return "" if _is_elementwise(layer) else _mixing(layer)


def _mixing(layer) -> str:
    name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
    return f"has the activation '{name}', which may mix channels"


def _is_elementwise(layer) -> bool:
    name = getattr(layer.activation, "__name__", "")
    return name in _ELEMENTWISE and layer.activation is keras.activations.get(name)
