"""Which weights and layers are meant: what can be pruned, and what a user's filter selects."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras

Filters = str | Sequence[str] | Callable[[Any], bool] | None

# A matrix that is no kernel: biases of attention heads, and what belongs to a mask of ours.
_NOT_PRUNED = re.compile(
    r"(^|_)(bias|beta|gamma|scale|threshold|scores?|anchor|alpha|control|lora_\w+_[ab])$"
)


def is_kernel(variable) -> bool:
    """Whether this weight counts as prunable: floats or int8, two or more axes, and no bias."""
    return (
        len(variable.shape) >= 2
        and bool(re.search("float|^int8$", keras.backend.standardize_dtype(variable.dtype)))
        and not _NOT_PRUNED.search(variable.name)
    )


def is_prunable(variable) -> bool:
    """Whether an optimiser can prune this weight: a kernel that is trained."""
    return bool(variable.trainable) and is_kernel(variable)


def select(
    items: Sequence, filters: Filters, names: Sequence[tuple[str, ...]], argument: str = "filters"
) -> list[bool]:
    """For every item, whether the filter selects it.

    Args:
        items: layers or variables, as the callable form of `filters` gets them.
        filters: None for all; a name or a regular expression, compared with the whole name; a
            list of them; or `callable(item) -> bool`.
        names: for every item, the names it has, its own first.
        argument: what the user calls the filter, for errors.

    Raises:
        ValueError: when a name or expression selects nothing.
        TypeError: for a filter of another type.
    """
    if filters is None:
        return [True] * len(items)
    if callable(filters) and not isinstance(filters, keras.Layer):
        return [bool(filters(item)) for item in items]
    patterns = [filters] if isinstance(filters, str) else filters
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"{argument} must be a name, a regular expression, a list of them, or a callable that "
            f"takes a layer; of a layer give its name. Received: {filters!r}"
        )
    chosen = [False] * len(items)
    for pattern in patterns:
        whole = _compile(pattern, argument).fullmatch
        hits = [any(name == pattern or whole(name) for name in own) for own in names]
        if not any(hits):
            own_names = ", ".join(own[0] for own in names)
            raise ValueError(f"{argument}: {pattern!r} fits none of the names. Names: {own_names}")
        chosen = [a or b for a, b in zip(chosen, hits)]
    return chosen


def _compile(pattern: str, argument: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is no regular expression: {error}") from error
