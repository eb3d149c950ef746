"""Guess the values of conditions, so that a mask update on PyTorch waits for its GPU only once.

An `if` on a value that a GPU computes makes the host wait for all earlier operations. A mask update
on PyTorch therefore guesses the value of each condition, runs the matching branch without waiting,
and records the condition. After the update, the host reads all recorded conditions together and
compares the conditions with the guesses. After a wrong guess, the whole update runs again, with
corrected guesses or without guesses. JAX and TensorFlow evaluate conditions on the GPU, so
keras_dst does not guess conditions there.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import keras
from keras import ops

from keras_dst._backend import devices

Tensor = Any


class _Guesses:
    """Conditions whose values a function has guessed during one call.

    Attributes:
        conditions: Guessed conditions, as boolean scalars on the GPU. A scalar is true if its guess
            was right.
        branches: For each call of the function `cond`, the index of its condition in `conditions`.
        rare: Indices of the calls in which the function `cond` takes its rare branch. In the
            previous run of the wrapped function, the rare branch was right in these calls.
    """

    def __init__(self, rare: set[int]):
        self.conditions: list[Tensor] = []
        self.branches: list[int] = []
        self.rare = rare


_current: ContextVar[_Guesses | None] = ContextVar("guesses", default=None)


def with_guesses(update: Callable) -> Callable:
    """Return a wrapper of `update` that guesses the value of each condition in `update`.

    The wrapper guesses that each condition has the same value as in the previous call. After a
    wrong guess, the wrapper calls `update` again.
    """
    rare: set[int] = set()

    @functools.wraps(update)
    def guessing(*args):
        for _ in range(2):
            token = _current.set(guesses := _Guesses(rare))
            try:
                found = update(*args)
            finally:
                _current.reset(token)
            if not guesses.conditions:
                return found
            # Only the following line makes the host wait for the GPU.
            right = ops.stack(guesses.conditions).tolist()
            if all(right):
                return found
            found = None  # Free the results of the wrong guess.
            wrong = {n for n, i in enumerate(guesses.branches) if not right[i]}
            if len(wrong) < right.count(False):
                break  # The function `add` guessed wrong, and has no second branch.
            rare.symmetric_difference_update(wrong)
        return update(*args)

    return guessing


def are_allowed() -> bool:
    """Return whether conditions may be guessed. Conditions may be guessed only on PyTorch, within a
    function that `with_guesses` wraps."""
    return keras.backend.backend() == "torch" and _current.get() is not None


def add(condition: Tensor) -> None:
    """Guess that a boolean scalar is true, and record the scalar for a later check."""
    guesses = _current.get()
    if guesses is None:
        raise RuntimeError(
            "Expected `add` to be called within a function that `with_guesses` wraps."
        )
    guesses.conditions.append(condition)


def cond(condition: Tensor, usual: Callable, rare: Callable) -> Any:
    """Return `ops.cond(condition, usual, rare)`. On an accelerator, guess the value of `condition`
    if guesses are allowed, so that the host need not wait for the value."""
    guesses = _current.get()
    if guesses is None or not devices.on_accelerator(condition):
        return ops.cond(condition, usual, rare)
    is_rare = len(guesses.branches) in guesses.rare
    guesses.branches.append(len(guesses.conditions))
    add(ops.logical_not(condition) if is_rare else condition)
    return rare() if is_rare else usual()
