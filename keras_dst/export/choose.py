"""Which weight of a model is stored in which form: rules, by op, pattern and density.

The rules follow measurements on XNNPACK and the builtin kernels of LiteRT: only FULLY_CONNECTED
runs faster on a sparse weight (1x4 blocks at any density worth storing, CSR below about 12 %);
for every other op DENSIFY makes the file smaller and leaves the speed as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keras_dst.export import encode, nchw
from keras_dst.export.encode import Form, Weight

CSR = Form(block=1, densify=False)
BLOCKS = Form(block=4, densify=False)
CSR_DENSIFY = Form(block=1, densify=True)
BLOCKS_DENSIFY = Form(block=4, densify=True)

#: Stored 1x4 blocks must be filled at least this much, or the pattern is not 1x4.
BLOCK_FILL = 0.75
#: Above this density FULLY_CONNECTED is slower on CSR than on the dense weight.
CSR_DENSITY = 0.12

#: Why a weight that DENSIFY would make smaller stays dense.
UNSAFE = "DENSIFY would make ARM compute this model wrongly"


@dataclass(frozen=True)
class Choice:
    """What happens to one weight: its form (None is dense), its bytes in the file, and why."""

    weight: Weight
    form: Form | None
    bytes: int
    reason: str = ""


def choose(content: bytes) -> list[Choice]:
    """A choice for every weight of a dense ``.tflite`` file, in file order.

    A weight is made sparse only where that makes the file smaller; `Choice.reason` says why
    another one stays dense.
    """
    weights = encode.weights(encode.read(content))
    choices = [_choice(weight, may_densify=True) for weight in weights]
    if not nchw.is_wrong(encode.read(encoded(content, choices))):
        return choices
    return [
        _choice(choice.weight, may_densify=False) if choice.form and choice.form.densify else choice
        for choice in choices
    ]


def encoded(content: bytes, choices: list[Choice]) -> bytes:
    """The file with these choices made."""
    forms = {choice.weight.buffer: choice.form for choice in choices if choice.form}
    return encode.encode(content, forms) if forms else content


def _choice(weight: Weight, may_densify: bool) -> Choice:
    dense = weight.values.nbytes
    forms, reason = _candidates(weight, may_densify)
    sizes = [encode.stored_bytes(weight, form) for form in forms]
    if not forms:
        return Choice(weight, None, dense, reason)
    if min(sizes) >= dense:
        return Choice(weight, None, dense, f"{forms[0]} is no smaller: {min(sizes):,} bytes")
    best = sizes.index(min(sizes))
    return Choice(weight, forms[best], sizes[best])


def _candidates(weight: Weight, may_densify: bool) -> tuple[list[Form], str]:
    """The forms that are right for a weight, or none and the reason."""
    obstacle = _obstacle(weight)
    if obstacle:
        return [], obstacle
    if all(op == "FULLY_CONNECTED" for op, _ in weight.readers):
        if is_1x4(weight.values):
            return [BLOCKS], ""
        if weight.density <= CSR_DENSITY:
            return [CSR], ""
    if not may_densify:
        return [], UNSAFE
    divisible = weight.values.shape[-1] % BLOCKS_DENSIFY.block == 0
    return [CSR_DENSIFY, BLOCKS_DENSIFY] if divisible else [CSR_DENSIFY], ""


def _obstacle(weight: Weight) -> str:
    if weight.values.dtype != np.float32:
        return f"{weight.values.dtype}: only float32 is encoded"
    if len({tuple(tensor.shape) for tensor in weight.tensors}) > 1:
        return "read in several shapes"
    for op, slot in weight.readers:
        if op not in encode.WEIGHT_OPS or slot != encode.WEIGHT_SLOT:
            return f"read by {op}, which has no sparse form"
        if op == "FULLY_CONNECTED" and weight.values.ndim != 2:
            return f"FULLY_CONNECTED over a weight of rank {weight.values.ndim}, not 2"
    return "" if weight.readers else "read by no op"


def is_1x4(values: np.ndarray) -> bool:
    """Whether the nonzeros come in blocks of four along the last axis."""
    if values.shape[-1] % BLOCKS.block:
        return False
    blocks = values.reshape(-1, BLOCKS.block) != 0
    stored = np.count_nonzero(blocks.any(axis=-1)) * BLOCKS.block
    return bool(stored) and bool(np.count_nonzero(blocks) >= BLOCK_FILL * stored)
