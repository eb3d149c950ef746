"""Checks of arguments that many classes share."""


def is_integer(value, minimum: int | None = None) -> bool:
    """Return whether `value` is a whole number, at least `minimum`; booleans are not numbers."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and (minimum is None or value >= minimum)


def check_integer(value, name: str, minimum: int = 1) -> None:
    """Raise ValueError unless `value` is a whole number of at least `minimum`.

    Args:
        value: the argument to check. Booleans are refused.
        name: the name of the argument, for the message.
        minimum: the smallest allowed value. Defaults to 1.

    Example:
        >>> check_integer(3, "epochs")
    """
    if not is_integer(value, minimum):
        raise ValueError(f"{name} must be a whole number >= {minimum}. Received: {value!r}")
