"""Freed memory is kept for the next activation, instead of going back to the system: an opt-in call.

A cache writes activations into memory that was not used before, and the system clears each page (4 kB) when it is first touched.
glibc gives large blocks back as soon as they are freed, so every forward pays for that again; told to keep them, it pays once.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """From now on this process keeps the memory that it frees, for its own next use; it can not be taken back.

    The process stays as large as it ever was. Worth it for many runs with a cache, on Linux with glibc.

    Returns:
        whether it was done: False where the C library is another (macOS, Windows, musl).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _MOST))
