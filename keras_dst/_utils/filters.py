"""Checks of prunable weights, and the selection of layers and weights by a user's filter."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras

Filters = str | Sequence[str] | Callable[[Any], bool] | None

# Names of matrices that are not kernels: biases of attention heads, and the state of a method.
_NOT_PRUNED = re.compile(
    r"(^|_)(bias|beta|gamma|scale|threshold|scores?|anchor|alpha|control|lora_\w+_[ab])$"
)


def is_kernel(variable) -> bool:
    """Return whether a weight can be pruned: float or int8, at least two axes, and not a bias."""
    return (
        len(variable.shape) >= 2
        and bool(re.search("float|^int8$", keras.backend.standardize_dtype(variable.dtype)))
        and not _NOT_PRUNED.search(variable.name)
    )


def is_prunable(variable) -> bool:
    """Return whether an optimizer can prune a weight, which must be a trainable kernel."""
    return bool(variable.trainable) and is_kernel(variable)


def select(
    items: Sequence, filters: Filters, names: Sequence[tuple[str, ...]], argument: str = "filters"
) -> list[bool]:
    """Return for every item whether the filter selects it.

    Args:
        items: Layers or variables. A callable filter is called with each item.
        filters: Name, regular expression for a whole name, list of names and expressions, or
            `callable(item) -> bool`. None selects all items.
        names: For each item, the names that select the item. The first name is its own name.
        argument: Name of the argument that the user passed, for error messages. Defaults to
            "filters".

    Raises:
        ValueError: If a name or an expression selects no item.
        TypeError: If the filter has another type.
    """
    if filters is None:
        return [True] * len(items)
    if callable(filters) and not isinstance(filters, keras.Layer):
        return [bool(filters(item)) for item in items]
    patterns = [filters] if isinstance(filters, str) else filters
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"{argument} must be a name, a regular expression, a list of names and expressions, "
            f"or a callable. To select a layer, pass its name. Received: {filters!r}"
        )
    chosen = [False] * len(items)
    for pattern in patterns:
        whole = _compile(pattern, argument).fullmatch
        hits = [any(name == pattern or whole(name) for name in own) for own in names]
        if not any(hits):
            own_names = ", ".join(own[0] for own in names)
            raise ValueError(f"{argument}: {pattern!r} does not match any name. Names: {own_names}")
        chosen = [a or b for a, b in zip(chosen, hits)]
    return chosen


def _compile(pattern: str, argument: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}") from error
