"""The output folder of a command: all of its files or none, with an index page and a manifest.

1. Files are written to a temporary folder and moved to the output folder when all are complete. A command that fails or is killed
   before that leaves the folder unchanged.
2. `COMMAND.json`, the manifest, has the command, its options, the question, the version, and a checksum of each file. It is deleted
   before the first file is moved and written after the last. Files without a manifest, or with other checksums, come from a
   command that was killed in between.
3. Files of the previous manifest that are not in the new one (such as those of a second image) are deleted, unless they were
   changed.
4. `index.html` shows the command, its printed text, its figures and its tables.
5. Without --out the folder is `out/COMMAND/WHAT`, named after the question, the images and the data. If it has the results of
   other options, `WHAT-2` is used. A folder with the results of another command is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import unicodedata
import webbrowser
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hooked_qwen2vl.files import open_regular, whole_file, whole_files
from hooked_qwen2vl.version import __version__

if TYPE_CHECKING:  # importing pandas would slow down --help
    import pandas as pd


INDEX = "index.html"
_NOT_ASKED = {"run", "out", "open", "line"}  # attributes that are not options of the analysis


class Outputs:
    """Context manager that writes the output folder; on success it moves the files there and prints the texts of `say`.

    Args:
        options: of the command, for the manifest.
        command: its name.
        about: further entries of the manifest (the question, the answer).
    """

    def __init__(self, options: argparse.Namespace, command: str, **about: Any):
        self.folder, self.command = options.out, command
        self.line, self.open = getattr(options, "line", f"hooked-qwen2vl {command}"), getattr(options, "open", False)
        self.about = {"options": _asked(options), **about}
        self.names: list[str] = []
        self.said: list[str] = []

    def __enter__(self) -> Self:
        self._whole = whole_files(self.folder)
        self._place = self._whole.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._write_index()
                before = self._before()
                manifest = self._manifest()
                self.manifest_path.unlink(missing_ok=True)
                self._whole.__exit__(None, None, None)
                for name, checksum in before.items():
                    if name not in self.names and Path(name).name == name and _checksum(self.folder / name) == checksum:
                        (self.folder / name).unlink()
                with whole_file(self.manifest_path) as file:
                    file.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace")
        finally:
            if kind is not None:
                self._whole.__exit__(kind, error, trace)
        if kind is None:
            again = "\n(in place of what an earlier run wrote there)" if before else ""
            print("\n".join([*self.said, *([""] if self.said else []), self.wrote() + again]))
            if self.open:
                webbrowser.open((self.folder / INDEX).absolute().as_uri())

    @property
    def manifest_path(self) -> Path:
        return self.folder / f"{self.command}.json"

    def path(self, name: str) -> Path:
        """The temporary path at which to write the file of that name."""
        self.names.append(name)
        return self._place / name

    def table(self, name: str, table: pd.DataFrame) -> None:
        """Writes a table as CSV."""
        from analyses.common.tables import write_csv

        write_csv(table, self.path(name))

    def say(self, text: str) -> None:
        """Adds a text to print when all files are written, and to show on the index page."""
        self.said.append(text)

    def wrote(self) -> str:
        """One line per file: `wrote FOLDER/a.csv`."""
        return "\n".join(f"wrote {self.folder / name}" for name in self.names)

    def _write_index(self) -> None:
        from analyses.views.index import index_page

        about = {name: value for name, value in self.about.items() if name != "options"}
        page = index_page(self.command, self.line, about, "\n".join(self.said), [self._place / name for name in self.names])
        self.path(INDEX).write_text(page, encoding="utf-8", errors="backslashreplace")

    def _manifest(self) -> dict[str, Any]:
        made = {"command": self.command, "version": __version__, "written": datetime.now(UTC).isoformat(timespec="seconds")}
        about = json.loads(json.dumps(self.about, default=str))
        return {**made, **about, "files": {name: _checksum(self._place / name) for name in self.names}}

    def _before(self) -> dict[str, str]:
        """The files of the previous manifest; empty without a readable one."""
        files = _manifest_of(self.folder, self.command).get("files")
        return {str(name): str(checksum) for name, checksum in files.items()} if isinstance(files, dict) else {}


def take_place(options: argparse.Namespace, command: str, commands: Iterator[str]) -> None:
    """Sets options.out to the folder that this command writes to (see 5. above).

    Raises:
        ValueError: --out has the results of another command.
    """
    if options.out is not None:
        for other in commands:
            if other != command and _manifest_of(options.out, other):
                raise ValueError(f"--out {options.out} has what `{other}` wrote: give each command a folder of its own.")
        return
    first = Path("out") / command / _words(options)
    if hasattr(options, "rank") and getattr(options, "question", None) is None:
        options.out = first  # a run resumes in its folder, and refuses the folder of another run
        return
    asked = json.loads(json.dumps(_asked(options), default=str))
    places = (first if n == 1 else first.with_name(f"{first.name}-{n}") for n in range(1, 10_000))
    options.out = next(place for place in places if _manifest_of(place, command).get("options", asked) == asked)


def _words(options: argparse.Namespace) -> str:
    """A folder name made from model, data, images, question and answer; `example` if none is given."""
    given = vars(options)
    names = [given.get("model") if given.get("model") != "scenes" else None, given.get("adapter"), given.get("tuned")]
    names += [given.get("data") if given.get("question") is None else None]
    images = given.get("image") or []
    names += [Path(image).with_suffix("") for image in ([images] if isinstance(images, str) else images)]
    words = [*(Path(str(name)).name for name in names if name), given.get("question") or "", given.get("answer") or ""]
    slug = re.sub(r"[^\w.]+", "-", unicodedata.normalize("NFKC", "-".join(words))).strip("-._")
    while len(slug.encode("utf-8", "replace")) > 80:
        slug = slug[:-1].rstrip("-._")
    return slug.encode("utf-8", "ignore").decode() or "example"


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    return {name: _plain(value) for name, value in vars(options).items() if name not in _NOT_ASKED}


def _manifest_of(folder: Path, command: str) -> dict[str, Any]:
    """The manifest of a command in a folder; empty without a readable one."""
    try:
        with open_regular(folder / f"{command}.json") as file:
            manifest = json.loads(file.read())
        return manifest if isinstance(manifest, dict) and "files" in manifest else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _checksum(file: Path) -> str | None:
    try:
        with open_regular(file) as opened:
            return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()  # pyright: ignore[reportArgumentType] (a raw file is a file)
    except (OSError, ValueError):
        return None


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float, bool, list)) else str(value)
