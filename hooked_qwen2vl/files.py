"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

_TEMPORARY = ".writing-"


@contextlib.contextmanager
def whole_file(path: str | Path, exclusive: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` to write; it gets its name only when it is whole and on the disk.

    A file of that name is replaced then, and stays as it is if writing fails; its folder is made if need be.

    Args:
        exclusive: raise FileExistsError instead of replacing a file of that name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}{path.suffix}"
    try:
        yield temporary
        _flush(temporary)
        if exclusive:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes of this machine left half-written."""
    for file in folder.glob(f"{_TEMPORARY}{socket.gethostname()}-*"):
        process = int(file.name.removeprefix(f"{_TEMPORARY}{socket.gethostname()}-").split("-")[0])
        if process != os.getpid() and not _alive(process):
            file.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
