"""A limit to the time that something takes which a file decides: loops in a chat template, say."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Stops what runs inside after so many seconds.

    Only Python code can be stopped, and only in the main thread of a system with timers, where nobody else has one; elsewhere there is
    no limit.

    Raises:
        ValueError: it took longer; `what` says what was going on.
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
