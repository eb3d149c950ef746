"""Argument checks that several modules share."""

import math
from numbers import Integral, Real

import numpy as np


def is_integer(value, minimum: int | None = None) -> bool:
    """Return whether `value` is a whole number of at least `minimum`.

    Whole numbers are integers of Python or NumPy, but not booleans.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and (minimum is None or value >= minimum)


def is_number(value) -> bool:
    """Return whether `value` is a finite real number. Booleans are not numbers."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_number(
    value, name: str, minimum: float = 0.0, maximum: float = math.inf, alternative: str = ""
) -> None:
    """Raise ValueError unless `value` is a finite number within `[minimum, maximum]`.

    Args:
        value: Argument to check.
        name: Name of the argument for the error message.
        minimum: Smallest allowed value. Defaults to 0.
        maximum: Largest allowed value. Defaults to infinity, which means no upper bound.
        alternative: Text that the error message adds for other allowed values, such as " or None".
            Defaults to an empty string.

    Example:
        >>> check_number(0.5, "momentum", maximum=1)
    """
    if not (is_number(value) and minimum <= value <= maximum):
        bound = f" >= {minimum:g}" if maximum == math.inf else f" in [{minimum:g}, {maximum:g}]"
        raise ValueError(
            f"{name} must be a finite number{bound}{alternative}. Received: {name}={value!r}"
        )


def check_boolean(value, name: str) -> bool:
    """Return a boolean of Python or NumPy as a Python boolean.

    Args:
        value: Argument to check.
        name: Name of the argument for the error message.

    Raises:
        ValueError: If `value` is not a boolean.

    Example:
        >>> check_boolean(True, "measure")
        True
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False. Received: {name}={value!r}")
    return bool(value)


def check_integer(value, name: str, minimum: int | None = 1) -> int:
    """Check that `value` is a whole number of at least `minimum`, and return it as an int.

    Args:
        value: Argument to check. NumPy integers are accepted. Booleans are not.
        name: Name of the argument, for the error message.
        minimum: Smallest accepted value. If `minimum` is None, check_integer accepts all whole
            numbers. Defaults to 1.

    Raises:
        ValueError: If `value` is not a whole number or is less than `minimum`.

    Example:
        >>> check_integer(np.int64(3), "epochs")
        3
    """
    if not is_integer(value, minimum):
        bound = "" if minimum is None else f" >= {minimum}"
        raise ValueError(f"{name} must be a whole number{bound}. Received: {name}={value!r}")
    return int(value)
