"""Writes files completely or not at all, and reads regular files only."""

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
    """Opens a regular file for reading bytes; pipes and devices are refused, because reading them may never end.

    Raises:
        ValueError: not a regular file, or an invalid name.
        OSError: no such file, or no permission.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except ValueError as error:
        raise ValueError(f"no file can be called {_short(path)} ({error}).") from error
    _refuse_special(path, mode)
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    try:
        _refuse_special(path, os.fstat(file.fileno()).st_mode)  # it may have been replaced since
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
    """Context that yields a temporary file in the same folder; at the end it is flushed to disk and renamed to `path`.

    An existing file is replaced, or stays unchanged if writing fails. The folder is created if needed.

    Args:
        exclusive: raise FileExistsError instead of replacing an existing file.
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
    """Context that yields a temporary folder inside `folder`; at the end its files are flushed to disk and moved to `folder`.

    Existing files of the same names are replaced. If writing fails, nothing is moved, and folders that were created are removed.
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
                parent.rmdir()  # fails, as it should, if the folder is not empty


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Removes temporary files and folders of processes of this machine that no longer run; other files are left alone."""
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
