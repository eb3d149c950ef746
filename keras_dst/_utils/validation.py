"""Argument checks that several modules share."""


def is_integer(value, minimum: int | None = None) -> bool:
    """Return whether `value` is a whole number of at least `minimum`.

    Booleans do not count as whole numbers.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and (minimum is None or value >= minimum)


def check_integer(value, name: str, minimum: int | None = 1) -> None:
    """Raise ValueError unless `value` is a whole number of at least `minimum`.

    Args:
        value: Argument to check. Booleans are not accepted.
        name: Name of the argument for the error message.
        minimum: Smallest allowed value, or None if every whole number is allowed. Defaults to 1.

    Example:
        >>> check_integer(3, "epochs")
    """
    if not is_integer(value, minimum):
        bound = "" if minimum is None else f" >= {minimum}"
        raise ValueError(f"{name} must be a whole number{bound}. Received: {name}={value!r}")
