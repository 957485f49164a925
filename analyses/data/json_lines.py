"""Reader for rows in JSON: an array, or one object per line; the first character that is not a space decides which.

A line ends at a line feed only; other separators, such as U+2028, may be part of a text. Rows that Python's reader accepts
although they are not JSON or are ambiguous are bad rows: NaN, repeated keys, numbers too large for a float, very deep nesting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hooked_qwen2vl.files import open_regular

_LONGEST_NUMBER = 4000  # digits


def read_rows(file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of every row.

    Raises:
        ValueError: no such file, not UTF-8, neither an array nor JSON lines, or a bad row (the message names its line).
    """
    for line, row in rows_and_errors(file):
        if isinstance(row, ValueError):
            raise row
        yield line, row


def rows_and_errors(file: str | Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """As `read_rows`, but a bad row comes as a ValueError instead of being raised; errors of the whole file are raised."""
    text = read_text(file)
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        raise ValueError(f"{file} begins with {start!r}: expected a JSON array '[' or JSON lines '{{'.")
    for line, row in _array(text, file) if start == "[" else _lines(text, file):
        if not isinstance(row, (dict, ValueError)):
            row = ValueError(f"{file}, line {line}: expected an object, got {ascii(row)[:60]}.")
        yield line, row


def read_text(file: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: no such file, or not UTF-8.
    """
    try:
        with open_regular(file) as opened:
            return opened.read().decode("utf-8-sig").replace("\r\n", "\n")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{file} is not a file: pass a local copy.") from error
    except OSError as error:
        raise ValueError(f"{shown_path(file)} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def shown_path(file: str | Path) -> str:
    """A path for error messages, shortened if it has 300 characters or more."""
    return str(file) if len(str(file)) < 300 else f"{str(file)[:100]}…"


def read_json(file: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: no such file, or not JSON (the message names the line).
    """
    decoder, text = _Decoder(), read_text(file)
    try:
        found = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg}).") from error
    except RecursionError as error:
        raise ValueError(f"{file}: brackets are nested too deep.") from error
    if decoder.problems:
        raise ValueError(f"{file}: {decoder.problems[0]}.")
    return found


class _Decoder(json.JSONDecoder):
    """Python's decoder, which also records what that accepts silently.

    Attributes:
        problems: texts about what was read last.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int, parse_float=self._float)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
            self.problems.append(f"the key {ascii(twice[:60])} comes twice")
        return found

    def _constant(self, name: str) -> float:
        self.problems.append(f"{name} is not JSON")
        return 0.0

    def _int(self, digits: str) -> int:
        if len(digits) > _LONGEST_NUMBER:
            self.problems.append(f"a number of {len(digits)} digits")
            return 0
        return int(digits)

    def _float(self, digits: str) -> float:
        found = float(digits)
        if found in (float("inf"), float("-inf")):
            self.problems.append(f"{digits[:60]} is larger than a number can be")
        return found


def _lines(text: str, file: str | Path) -> Iterator[tuple[int, Any]]:
    decoder = _Decoder()
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            decoder.problems.clear()
            try:
                row = decoder.decode(line)
            except json.JSONDecodeError as error:
                row = ValueError(f"{where}: not JSON ({error.msg}).")
            except RecursionError:
                row = ValueError(f"{where}: brackets are nested too deep.")
            yield number, ValueError(f"{where}: {decoder.problems[0]}.") if decoder.problems else row


def _array(text: str, file: str | Path) -> Iterator[tuple[int, Any]]:
    """(line, element) of an array; json.loads does not give the lines."""
    decoder, space, line, counted = _Decoder(), re.compile(r"\s*"), 1, 0
    try:
        at = space.match(text, text.index("[") + 1).end()
        while text[at : at + 1] != "]":
            line, counted = line + text.count("\n", counted, at), at
            decoder.problems.clear()
            row, at = decoder.raw_decode(text, at)
            yield line, ValueError(f"{file}, line {line}: {decoder.problems[0]}.") if decoder.problems else row
            at = space.match(text, at).end()
            if text[at : at + 1] == ",":
                at = space.match(text, at + 1).end()
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("text after the array", text, space.match(text, at + 1).end())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg}).") from error
    except RecursionError as error:
        raise ValueError(f"{file}, line {line}: brackets are nested too deep.") from error
