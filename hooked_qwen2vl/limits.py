"""A time limit for code whose duration a file determines, such as loops in a chat template."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Context that stops the code inside after some seconds.

    It stops Python code only, and only in the main thread, on systems with `setitimer`, if no other timer runs. Otherwise there is no
    limit.

    Raises:
        ValueError: the code took longer; the message names `what`.
    """
    possible = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not possible or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(*about: Any) -> None:
        raise ValueError(f"{what} took longer than {seconds:g} seconds and was stopped.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
