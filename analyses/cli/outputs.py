"""What a command writes: all of its files or none, with a manifest of what they were made of.

1. Files are written in a temporary folder. When all are there they are moved to their places; a command that fails, or is
   killed before that, leaves the folder as it was.
2. `COMMAND.json` beside them says the command, its options, what it was asked, the versions, and a checksum of each file. It is
   taken away before the first file is moved and written after the last: files without it, or with other checksums, are of a
   command that was killed in between.
3. Files that the last manifest lists and this one does not (of a second image, say) are removed, unless they were changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hooked_qwen2vl.files import open_regular, whole_file, whole_files
from hooked_qwen2vl.version import __version__

if TYPE_CHECKING:  # --help need not wait for it
    import pandas as pd


class Outputs:
    """A folder that is filled as a whole, as a context manager.

    Args:
        options: of the command; they stand in the manifest.
        command: its name.
        folder: where to; None takes --out.
        about: what more the manifest says (the question, the answer).
    """

    def __init__(self, options: argparse.Namespace, command: str, folder: Path | None = None, **about: Any):
        self.folder, self.command = options.out if folder is None else folder, command
        self.about = {"options": {name: _plain(value) for name, value in vars(options).items() if name != "run"}, **about}
        self.names: list[str] = []

    def __enter__(self) -> Self:
        self._whole = whole_files(self.folder)
        self._place = self._whole.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
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

    @property
    def manifest_path(self) -> Path:
        return self.folder / f"{self.command}.json"

    def path(self, name: str) -> Path:
        """Where to write a file of that name now."""
        self.names.append(name)
        return self._place / name

    def table(self, name: str, table: pd.DataFrame) -> None:
        """Writes a table as CSV."""
        from analyses.common.tables import write_csv

        write_csv(table, self.path(name))

    def wrote(self) -> str:
        """A line a file: `wrote FOLDER/a.csv`."""
        return "\n".join(f"wrote {self.folder / name}" for name in self.names)

    def _manifest(self) -> dict[str, Any]:
        made = {"command": self.command, "version": __version__, "written": datetime.now(UTC).isoformat(timespec="seconds")}
        about = json.loads(json.dumps(self.about, default=str))
        return {**made, **about, "files": {name: _checksum(self._place / name) for name in self.names}}

    def _before(self) -> dict[str, str]:
        """The files of the last manifest; none where there is no manifest that can be read."""
        try:
            with open_regular(self.manifest_path) as file:
                files = json.loads(file.read())["files"]
            return {str(name): str(checksum) for name, checksum in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}


def _checksum(file: Path) -> str | None:
    try:
        with open_regular(file) as opened:
            return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()  # pyright: ignore[reportArgumentType] (a raw file is a file)
    except (OSError, ValueError):
        return None


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float, bool, list)) else str(value)
