"""Keeps freed memory for the next activations instead of returning it to the system; used only if called.

The system clears each new page of memory (4 kB) at its first use. glibc returns large blocks as soon as they are freed, so every
forward with a cache pays for clearing them again. If glibc keeps them, this cost arises only once.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes this process keep the memory that it frees, for the rest of its life.

    The process never becomes smaller. Useful for many runs with a cache, on Linux with glibc.

    Returns:
        True, or False if the C library is not glibc (macOS, Windows, musl).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _MOST))
