"""Operations on tensors and numbers, without a copy of the numbers to the device in every call.

The functions of `keras.ops` convert a Python number or a NumPy array to a tensor. On a GPU, PyTorch
then waits until this tensor is copied to the GPU. On PyTorch, most functions of this module pass a
Python number directly as an argument, which needs no copy. The function `constant` copies a NumPy
array only once.
"""

import functools

import keras
import numpy as np
from keras import ops


def where(condition, x1, x2):
    """Return `ops.where(condition, x1, x2)`. At least one of `x1` and `x2` is a Python number."""
    if keras.backend.backend() != "torch":
        return ops.where(condition, x1, x2)
    import torch

    if is_plain(condition):
        # `torch.where` would create a tensor on the device from a number in each call.
        (tensor,) = [x for x in (x1, x2) if torch.is_tensor(x)] or [condition]
        if tensor.is_floating_point():
            dtype = keras.backend.standardize_dtype(tensor.dtype)
            x1, x2 = (x if torch.is_tensor(x) else constant(x, dtype, condition) for x in (x1, x2))
    return torch.where(condition, x1, x2)


def clip(x, low, high):
    """Return `ops.clip(x, low, high)` for the Python numbers `low` and `high`."""
    return x.clamp(low, high) if keras.backend.backend() == "torch" else ops.clip(x, low, high)


def at_least(x, low):
    """Return `ops.maximum(x, low)` for the Python number `low`."""
    return x.clamp(min=low) if keras.backend.backend() == "torch" else ops.maximum(x, low)


def at_most(x, high):
    """Return `ops.minimum(x, high)` for the Python number `high`."""
    return x.clamp(max=high) if keras.backend.backend() == "torch" else ops.minimum(x, high)


def constant(value, dtype, like):
    """Return `ops.convert_to_tensor(value, dtype)`. On PyTorch, the tensor is stored for later
    calls, so do not change the tensor in place.

    Args:
        value: Python number or NumPy array.
        dtype: Name of the type of the result.
        like: Tensor that is used together with the result, on the same device.
    """
    if not is_plain(like):  # Each traced function creates its own tensors.
        return ops.convert_to_tensor(value, dtype)
    array = np.asarray(value, dtype)
    return _stored(str(like.device), dtype, array.shape, array.tobytes())


@functools.lru_cache(maxsize=1024)
def _stored(device, dtype, shape, data):
    return ops.convert_to_tensor(np.frombuffer(data, dtype).reshape(shape).copy())


def stored_result(fn, tensor):
    """Return `fn(tensor)`. On PyTorch, the result is stored until the values of the tensor change,
    so do not change the result in place.

    Args:
        fn: Function whose result depends only on the tensor. Pass the same function in each call.
        tensor: Value of a variable.
    """
    if not is_plain(tensor):
        return fn(tensor)
    results = _results_of_tensors()
    version, result = results.get(tensor, {}).get(fn, (None, None))
    if version != tensor._version:
        version, result = tensor._version, fn(tensor)
        results.setdefault(tensor, {})[fn] = version, result
    return result


@functools.cache
def _results_of_tensors():
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def is_plain(tensor) -> bool:
    """Return whether a tensor is a torch tensor with values, outside of any trace or export."""
    if keras.backend.backend() != "torch":
        return False
    import torch

    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or torch.is_inference_mode_enabled():
        return False
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)
