"""The memory policy of the C library: whether a process keeps the memory that it frees.

glibc immediately returns free blocks of more than 32 MiB to the system. The next training step must
request this memory again, page by page. Requesting the memory can take as long as the computation
of the training step. A sparse training step needs larger blocks of memory than a dense step. A
sparse step can therefore need blocks of more than 32 MiB even if the dense step does not.

The memory policy applies to the whole process. `SparseTraining` therefore changes the memory policy
only if the argument `keep_memory` is True.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

# Ids of two parameters of the C function `mallopt`, and the largest value of a parameter.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
_MIB = 1 << 20


@functools.cache
def glibc():
    """Return the glibc library. Return None if glibc is absent, or if environment variables
    configure glibc."""
    is_set = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    library = ctypes.CDLL(None) if sys.platform == "linux" and not is_set else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees. If `glibc()` returns None, the function has no
    effect."""
    _set(mmap=_LARGEST, trim=_LARGEST)


def return_freed_memory() -> None:
    """Return free memory to the system now, and allow glibc to return large blocks from now on."""
    # If a program never calls `mallopt`, glibc raises its mmap threshold up to 32 MiB and its trim
    # threshold up to 64 MiB.
    _set(mmap=32 * _MIB, trim=64 * _MIB)
    if glibc():
        glibc().malloc_trim(0)


def _set(mmap: int, trim: int) -> None:
    if glibc():
        glibc().mallopt(_MMAP_THRESHOLD, mmap)
        glibc().mallopt(_TRIM_THRESHOLD, trim)
