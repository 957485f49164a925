"""Files written whole or not at all, and read only where they are files."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = ".writing-"


def open_regular(path: str | Path) -> BinaryIO:
    """A file to read, as bytes; pipes and devices, which may never end, are not opened.

    Raises:
        ValueError: not a regular file, or a name that no file can have.
        OSError: no such file, or one that may not be read.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except ValueError as error:
        raise ValueError(f"no file can be called {_short(path)} ({error}).") from error
    _refuse_special(path, mode)
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    try:
        _refuse_special(path, os.fstat(file.fileno()).st_mode)  # what was a file a moment ago
    except ValueError:
        file.close()
        raise
    return file


def _refuse_special(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_IFDIR: "a folder",
            stat.S_IFIFO: "a pipe",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
            stat.S_IFSOCK: "a socket",
        }
        raise ValueError(f"{_short(path)} is not a file but {kinds.get(stat.S_IFMT(mode), 'something else')}.")


def _short(path: Path) -> str:
    text = ascii(str(path))
    return text if len(text) < 200 else f"{text[:80]}…{text[-40:]} ({len(text)} characters)"


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


@contextlib.contextmanager
def whole_files(folder: str | Path) -> Iterator[Path]:
    """A temporary folder in `folder` to write files in; they are moved to `folder` when all of them are whole and on the disk.

    Files of their names are replaced then. When writing fails nothing is moved, and a folder that was made for it is gone.
    """
    folder = Path(folder)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    temporary = folder / f"{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.iterdir()):
            _flush(file)
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
        _flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only where nothing is in it


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes of this machine left half-written; what is called alike is left alone."""
    ours = re.compile(rf"{re.escape(_TEMPORARY + socket.gethostname())}-(\d{{1,9}})-[0-9a-f]{{32}}(\..*)?")
    for file in folder.glob(f"{_TEMPORARY}*"):
        named = ours.fullmatch(file.name)
        if named and int(named[1]) != os.getpid() and not _alive(int(named[1])):
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
