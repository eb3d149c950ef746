"""Memory that the steps of a training free and take again: kept while the training lasts.

Where glibc is in charge, free blocks of more than 32 MiB go back to the system at once. The next
step gets them anew, page by page, which may take as long as its work. A method adds to what a step
holds, and so may bring it beyond this size where the plain step stays below.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

# The parameters of `mallopt`, and the largest number that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1
_MIB = 1 << 20


@functools.cache
def _glibc():
    """The C library, where it is glibc and nobody has told it what to keep."""
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    library = ctypes.CDLL(None) if sys.platform == "linux" and not told else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def keep() -> None:
    """Let free memory stay with the process, as far as that can be asked for."""
    _set(mmap=_MOST, trim=_MOST)


def give_back() -> None:
    """Let go of what is free, and of what will be: blocks of more than 32 MiB."""
    _set(mmap=32 * _MIB, trim=64 * _MIB)  # where glibc's own rule ends up
    if _glibc():
        _glibc().malloc_trim(0)


def _set(mmap: int, trim: int) -> None:
    if _glibc():
        _glibc().mallopt(_MMAP_THRESHOLD, mmap)
        _glibc().mallopt(_TRIM_THRESHOLD, trim)
