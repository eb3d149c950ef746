"""Files that are whole or not there, whenever a process is killed or a disk is full."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

_SAVES = ("save", "save_weights")


@contextlib.contextmanager
def whole_or_not(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write a file that gets its name in one step, once it is on the disk.

    Example:
        >>> with keras_dst.files.whole_or_not(path) as unfinished:
        ...     model.save(unfinished)
    """
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_whole(model) -> None:
    """Let a model's `save` and `save_weights` give a file its name once it is whole.

    Keras writes over a file in place: a kill meanwhile leaves neither the old nor the new one.
    """
    for name in _SAVES:  # past Keras's tracking of attributes
        vars(model)[name] = _WholeSave(getattr(model, name))


def save_in_place(model) -> None:
    """Give a model its own methods back."""
    for name in _SAVES:
        vars(model).pop(name, None)


class _WholeSave:
    def __init__(self, save):
        self.inner = getattr(save, "inner", save)  # left by a fit that was interrupted

    def __call__(self, filepath, overwrite=True, **kwargs):
        if kwargs or not overwrite or "://" in str(filepath):
            return self.inner(filepath, overwrite=overwrite, **kwargs)
        with whole_or_not(pathlib.Path(filepath)) as unfinished:
            return self.inner(unfinished, overwrite=True)
