"""Rows on disk, written one by one, so that a long run can be killed at any moment and gone on with.

JSON lines: the first holds the settings, every other one a row. A row is one write of one line; a process that
dies in it leaves a line without an end, which is cut off at the next start. A file of other settings is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Ledger:
    """Rows by key, in memory and, with a path, on disk.

    Attributes:
        rows: key -> row.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]):
        """Opens or makes the file.

        Raises:
            ValueError: the file was written with other settings, or a line in it is not a row.
        """
        self.path = None if path is None else Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path is None:
            return
        settings = json.loads(json.dumps(settings))  # as it will be read back
        lines = self._complete_lines()
        if lines:
            self._check(lines[0], settings)
            for number, line in enumerate(lines[1:], 2):
                row = self._parse(line, number)
                self.rows[str(row.pop("key"))] = row
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"settings": settings})

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Keeps a row; numbers that are not finite are written as null."""
        self.rows[key] = _finite(row)
        if self.path is not None:
            self._write({"key": key, **row})

    def _complete_lines(self) -> list[str]:
        """The file's lines; one that was cut short is removed from the file."""
        if not self.path.is_file():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return whole.decode("utf-8").split("\n")[:-1]

    def _check(self, line: str, settings: dict[str, Any]) -> None:
        found = self._parse(line, 1).get("settings")
        if not isinstance(found, dict):
            raise ValueError(f"{self.path}, line 1: expected the settings of a run; choose another folder.")
        different = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
        if different:
            said = "; ".join(f"{key} was {found.get(key)!r}, now {settings.get(key)!r}" for key in different)
            raise ValueError(f"{self.path} was written with other settings ({said}): choose another folder, or delete it.")

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}, line {number}: not JSON ({error.msg}); delete the file to start anew.") from error
        if not isinstance(row, dict) or (number > 1 and "key" not in row):
            raise ValueError(f"{self.path}, line {number}: not a row of this file; delete it to start anew.")
        return row

    def _write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode("utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
