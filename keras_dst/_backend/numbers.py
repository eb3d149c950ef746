"""Operations on tensors and Python numbers, without a copy of the numbers to the device.

The functions of `keras.ops` convert a Python number to a tensor. On a GPU, PyTorch then waits until
this tensor is copied to the GPU. On PyTorch, the functions of this module pass the number directly
as an argument, which needs no copy.
"""

import keras
from keras import ops


def where(condition, x1, x2):
    """Return `ops.where(condition, x1, x2)`. At least one of `x1` and `x2` is a Python number."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.where(condition, x1, x2)
    return ops.where(condition, x1, x2)


def clip(x, low, high):
    """Return `ops.clip(x, low, high)` for the Python numbers `low` and `high`."""
    return x.clamp(low, high) if keras.backend.backend() == "torch" else ops.clip(x, low, high)


def at_least(x, low):
    """Return `ops.maximum(x, low)` for the Python number `low`."""
    return x.clamp(min=low) if keras.backend.backend() == "torch" else ops.maximum(x, low)


def at_most(x, high):
    """Return `ops.minimum(x, high)` for the Python number `high`."""
    return x.clamp(max=high) if keras.backend.backend() == "torch" else ops.minimum(x, high)
