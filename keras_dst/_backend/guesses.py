"""Guess branches, so that a mask update on PyTorch waits for its GPU only once.

A branch that depends on values on a GPU makes the host wait for all earlier operations. A mask
update on PyTorch therefore takes the usual branches without waiting, and records the conditions of
the branches. After the update, the host reads all recorded conditions at once. If a guess was
wrong, the update is repeated without guesses. JAX and TensorFlow choose branches on the GPU, so
keras_dst guesses no branches there.
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
    """Guesses that one call of a wrapped function has made.

    Attributes:
        conditions: Boolean scalars, which are all true if all guesses were right.
        branches: Indices of the guessed branches' conditions in `conditions`.
        rare: Positions in `branches` of the branches whose rare case was right in the previous
            call, and is guessed again.
    """

    def __init__(self, rare: set[int]):
        self.conditions: list[Tensor] = []
        self.branches: list[int] = []
        self.rare = rare


_current: ContextVar[_Guesses | None] = ContextVar("guesses", default=None)


def with_guesses(update: Callable) -> Callable:
    """Wrap a function of tensors, so that it guesses branches and runs again after a wrong guess.

    At each branch, a call guesses the case that was right in the previous call.
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
            # Only this line makes the host wait for the GPU.
            right = ops.convert_to_numpy(ops.stack(guesses.conditions))
            if right.all():
                return found
            found = None  # Free the results of the wrong guess.
            wrong = {n for n, i in enumerate(guesses.branches) if not right[i]}
            if len(wrong) < len(right) - right.sum():
                break  # A wrong guess made by `add` has no other branch.
            rare.symmetric_difference_update(wrong)
        return update(*args)

    return guessing


def are_allowed(tensor: Tensor) -> bool:
    """Return whether conditions on a tensor may be guessed, without reading the tensor."""
    return (
        keras.backend.backend() == "torch"
        and _current.get() is not None
        and devices.on_accelerator(tensor)
    )


def add(condition: Tensor) -> None:
    """Guess that a boolean scalar is true."""
    guesses = _current.get()
    if guesses is None:
        raise RuntimeError("Expected a call within a function that `with_guesses` wraps.")
    guesses.conditions.append(condition)


def cond(condition: Tensor, usual: Callable, rare: Callable) -> Any:
    """Return `ops.cond(condition, usual, rare)`, or guess the branch without waiting."""
    guesses = _current.get()
    if guesses is None or not are_allowed(condition):
        return ops.cond(condition, usual, rare)
    is_rare = len(guesses.branches) in guesses.rare
    guesses.branches.append(len(guesses.conditions))
    add(ops.logical_not(condition) if is_rare else condition)
    return rare() if is_rare else usual()
