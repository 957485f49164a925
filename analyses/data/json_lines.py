"""The one reader of rows in JSON: an array, or one object a line; the first character that is not space tells which.

A line ends at a line feed only: other separators, such as U+2028, may stand inside a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_rows(file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of every row.

    Raises:
        ValueError: no such file, not UTF-8, neither an array nor JSON lines, or a row that is no object (its line is named).
    """
    for line, row in rows_and_errors(file):
        if isinstance(row, ValueError):
            raise row
        yield line, row


def rows_and_errors(file: str | Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """The same, with the error in place of a bad row, for who counts them; what is wrong with the whole file is raised."""
    text = read_text(file)
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        raise ValueError(f"{file} begins with {start!r}: expected a JSON array '[' or JSON lines '{{'.")
    for line, row in _array(text, file) if start == "[" else _lines(text, file):
        if not isinstance(row, (dict, ValueError)):
            row = ValueError(f"{file}, line {line}: expected an object, got {json.dumps(row)[:60]}.")
        yield line, row


def read_text(file: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: no such file, or not UTF-8.
    """
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"{file} is not a file: pass a local copy.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _lines(text: str, file: str | Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, ValueError(f"{file}, line {number}: not JSON ({error.msg}).")


def _array(text: str, file: str | Path) -> Iterator[tuple[int, Any]]:
    """The elements of an array with the line each begins on, which json.loads does not tell."""
    decoder, space, line, counted = json.JSONDecoder(), re.compile(r"\s*"), 1, 0
    try:
        at = space.match(text, text.index("[") + 1).end()
        while text[at : at + 1] != "]":
            line, counted = line + text.count("\n", counted, at), at
            row, at = decoder.raw_decode(text, at)
            yield line, row
            at = space.match(text, at).end()
            if text[at : at + 1] == ",":
                at = space.match(text, at + 1).end()
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("text after the array", text, space.match(text, at + 1).end())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg}).") from error
