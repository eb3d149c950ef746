"""Atomic writes of files, and checks whether a path can be written."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

_MODELS = {".keras", ".h5", ".hdf5", ".tflite"}  # Extensions of files that hold a model.


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path to write to. When the `with` block ends, move the written file to
    `path`.

    If the process is killed or the disk is full, the file at `path` does not change.

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


def as_path(path, name: str) -> pathlib.Path:
    """Return a `pathlib.Path` of an argument that is a string or a path.

    Args:
        path: Argument to convert.
        name: Name of the argument, for the error message.

    Raises:
        TypeError: If the argument is neither a string nor a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a string or a path. Received: {name}={path!r}")
    return pathlib.Path(path)


def check_writable(path: pathlib.Path, extension: str = "") -> None:
    """Raise an error if no file can be written to `path`, or if its extension is wrong.

    Args:
        path: Path of the new file.
        extension: Usual extension of the file, such as `".tflite"`. Defaults to "", which means
            that any extension is allowed.

    Raises:
        OSError: If no file can be written to `path`.
        ValueError: If the extension of the path belongs to another type of model file.
    """
    if extension and path.suffix.lower() in _MODELS - {extension}:
        raise ValueError(
            f"Expected an output path that ends with {extension}. Received: {path}. Fix: choose a "
            f"name that ends with {extension}, so that no model is replaced."
        )
    folder = path.parent
    if path.is_dir():
        raise IsADirectoryError(f"Expected the path of a file. Received: the folder {path}.")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected a path in an existing folder. Received: {path}. Fix: create the folder "
            f"{folder}."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"Expected a path in a writable folder. Received: {path}. "
            f"Fix: make {folder} writable, or choose another folder."
        )
