"""Quantize weights to 8-bit integers. A zero weight stays zero."""

from __future__ import annotations

import numpy as np
from ai_edge_litert import schema_py_generated as schema

# Weights are quantized to integers from -127 to 127. The int8 value -128 is not used.
_LARGEST = 127


def quantize(values: np.ndarray, axis: int) -> tuple[np.ndarray, schema.QuantizationParametersT]:
    """Round values to int8. Each index along ``axis`` has its own symmetric scale.

    Return the int8 values, and an object with their scales and zero points.
    """
    others = tuple(i for i in range(values.ndim) if i != axis)
    peaks = np.abs(values).max(axis=others, keepdims=True)
    scales = np.where(peaks > 0, peaks / np.float32(_LARGEST), np.float32(1))
    parameters = schema.QuantizationParametersT()
    parameters.scale = scales.reshape(-1)
    parameters.zeroPoint = np.zeros(scales.size, np.int64)
    parameters.quantizedDimension = axis
    return np.rint(values / scales).astype(np.int8), parameters


def to_int8(array: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    """Quantize floats to int8 with one scale and one zero point."""
    return np.clip(np.rint(array / scale) + zero_point, -128, 127).astype(np.int8)


def dequantize(integers: np.ndarray, parameters: schema.QuantizationParametersT) -> np.ndarray:
    """Compute float32 values from quantized integers, scales and zero points."""
    zero_point = _along_axis(parameters.zeroPoint, integers, parameters)
    return (integers - zero_point).astype(np.float32) * steps(integers, parameters)


def steps(integers: np.ndarray, parameters: schema.QuantizationParametersT) -> np.ndarray:
    """Return the scales of quantized integers, in a shape that broadcasts to the integers."""
    return _along_axis(parameters.scale, integers, parameters).astype(np.float32)


def _along_axis(
    values: np.ndarray, integers: np.ndarray, parameters: schema.QuantizationParametersT
) -> np.ndarray:
    shape = [1] * integers.ndim
    shape[parameters.quantizedDimension] = -1
    return np.reshape(values, shape)
