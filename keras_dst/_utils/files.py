"""Files that are whole or not there, whenever a process is killed or a disk is full."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

_SAVES = ("save", "save_weights")


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write a file that gets its name in one step, once it is on the disk.

    Example:
        >>> with keras_dst._utils.files.atomic_write(path) as unfinished:
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


def check_writable(path: pathlib.Path) -> None:
    """Raise OSError, before any work is done, where a file cannot be written at this path."""
    folder = path.parent
    if path.is_dir():
        raise IsADirectoryError(f"Expected the path of a file. Received: the folder {path}.")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected a path in an existing folder. Received: {path}. Fix: create {folder}."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"Expected a path in a folder that may be written. Received: {path}. "
            f"Fix: allow writing in {folder}, or choose another folder."
        )


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
        with atomic_write(pathlib.Path(filepath)) as unfinished:
            return self.inner(unfinished, overwrite=True)
