"""Check whether a variable can be pruned, and select layers and variables by a filter."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras

Filters = str | Sequence[str] | Callable[[Any], bool] | None

# Variables with these names are not kernels, although they can have two or more axes. Examples of
# such variables are biases of attention heads, states of pruning methods, and LoRA factors.
_NOT_PRUNED = re.compile(
    r"(^|_)(bias|beta|gamma|scale|threshold|scores?|anchor|alpha|control|lora_\w+_[ab])$"
)


def is_kernel(variable) -> bool:
    """Return whether a variable is a kernel: float or int8, two or more axes, and not a bias.

    A variable without entries, such as the kernel of a layer without input features, is no kernel.
    """
    return (
        len(variable.shape) >= 2
        and 0 not in variable.shape
        and bool(re.search("float|^int8$", keras.backend.standardize_dtype(variable.dtype)))
        and not _NOT_PRUNED.search(variable.name)
    )


def is_prunable(variable) -> bool:
    """Return whether an optimizer can prune a variable. Only trainable kernels can be pruned."""
    return bool(variable.trainable) and is_kernel(variable)


def check_filters(filters: Filters, argument: str = "filters") -> None:
    """Raise TypeError unless a filter is a name, a list of names, a callable or None."""
    if filters is None or (callable(filters) and not isinstance(filters, keras.Layer)):
        return
    patterns = [filters] if isinstance(filters, str) else filters
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"{argument} must be a name, a regular expression, a list of names and expressions, "
            f"or a callable. To select a layer, pass its name. Received: {filters!r}"
        )


def select(
    items: Sequence, filters: Filters, names: Sequence[tuple[str, ...]], argument: str = "filters"
) -> list[bool]:
    """Return one boolean per item: True if the filter selects the item.

    Args:
        items: Layers or variables.
        filters: A name, a regular expression that matches a whole name, or a list of names and
            expressions. A function that receives an item and returns a bool is also accepted. None
            selects all items.
        names: For each item, a tuple of all names by which a filter can select the item. Error
            messages list only the first name in each tuple.
        argument: Name of the argument in which the user passed the filter, for error messages.
            Defaults to "filters".

    Raises:
        ValueError: If a name or a regular expression matches no item.
        TypeError: If `filters` has an unsupported type.
    """
    if filters is None:
        return [True] * len(items)
    if callable(filters) and not isinstance(filters, keras.Layer):
        return [bool(filters(item)) for item in items]
    check_filters(filters, argument)
    patterns = [filters] if isinstance(filters, str) else filters
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
