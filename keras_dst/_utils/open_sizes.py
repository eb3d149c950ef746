"""Choose sizes for the unknown axes of a model's inputs, such as the length of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OPEN_SIZE = 32
_OTHER_SIZES = (64, 128, 256, 16, 8, 4, 2, 1)


def accepted_size(draw: Callable[[int], Any], run: Callable[[Any], Any], fix: str) -> int:
    """Try several sizes for the unknown axes of a model's inputs, and return the first valid size.

    Some models accept only certain sizes of their inputs. A position embedding limits the length of
    a sequence, and strides require a minimum size of images.

    Args:
        draw: Function that receives the size of all unknown axes, and returns random inputs of the
            model.
        run: Function that runs the model on inputs.
        fix: Last part of the error message, which says how to avoid the error.

    Raises:
        ValueError: If the model raises an error for every tried size.
    """
    first: Exception | None = None
    for size in (OPEN_SIZE, *_OTHER_SIZES):
        inputs = draw(size)
        try:
            run(inputs)
        except Exception as error:
            first = first or error
            continue
        return size
    raise ValueError(
        "Expected a model that runs if all unknown axes of its inputs have the same size, a power "
        f"of 2 up to 256. Fix: {fix} Received for size {OPEN_SIZE}: {first}"
    ) from first
