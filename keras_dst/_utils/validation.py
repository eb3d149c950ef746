"""Argument checks that several modules share."""

from numbers import Integral, Real


def is_integer(value, minimum: int | None = None) -> bool:
    """Return whether `value` is a whole number of at least `minimum`.

    Integers of Python and NumPy are whole numbers. Booleans are not.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and (minimum is None or value >= minimum)


def is_number(value) -> bool:
    """Return whether `value` is a real number of Python or NumPy. Booleans are not numbers."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_integer(value, name: str, minimum: int | None = 1) -> int:
    """Check that `value` is a whole number of at least `minimum`, and return it as an int.

    Args:
        value: Argument to check. Integers of NumPy are accepted. Booleans are not.
        name: Name of the argument, for the error message.
        minimum: Smallest accepted value. None accepts all whole numbers. Defaults to 1.

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
