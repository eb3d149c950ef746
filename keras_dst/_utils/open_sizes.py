"""Choose sizes for the unknown axes of a model's inputs, such as the length of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OPEN_SIZE = 32
_OTHER_SIZES = (64, 128, 256, 16, 8, 4, 2, 1)


def accepted_size(draw: Callable[[int], Any], run: Callable[[Any], Any], fix: str) -> int:
    """Return the first size that a model accepts for the unknown axes of its inputs.

    Some models accept only certain sizes of their inputs. A position embedding limits the length of
    a sequence, and strides require a minimum size of images.

    Args:
        draw: Function that returns random inputs in which all unknown sizes have the given value.
        run: Function that runs the model on inputs.
        fix: Last part of the error message, which says how to avoid the error.

    Raises:
        ValueError: If the model accepts none of the sizes.
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
        f"Expected a model that accepts inputs whose unknown sizes are all {OPEN_SIZE}, or another "
        f"power of 2 up to 256. Fix: {fix} Received for size {OPEN_SIZE}: {first}"
    ) from first
