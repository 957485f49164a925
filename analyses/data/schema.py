"""Schemas of the rows of data files; all loaders use them.

    text      a text that is not blank
    label     a text that is not blank, or a whole number, which is read as a text
    note      any text, also an empty one
    file      a valid name of a file
    a list    of one of these; a text is not accepted in place of a list
    null      not accepted: leave out what is unknown

Texts with a lone surrogate (such as "\\ud800") are not accepted, because they cannot be written to a file.
Rows of our own formats may have further columns; one warning (`UnknownColumns`) names them. A column whose name is similar to a
missing column ("boxes" for "box") is an error.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes of a file name, and of a path


class UnknownColumns(UserWarning):
    """A file has columns that are not used."""


@dataclass(frozen=True)
class Kind:
    """Type of a cell.

    Attributes:
        name: for error messages, such as "a text".
        read: function from a cell to its value; raises ValueError, with or without a reason.
    """

    name: str
    read: Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return _whole(value)


def _whole(value: str) -> str:
    if reason := not_whole(value):
        raise ValueError(reason)
    return value


def not_whole(text: str) -> str:
    """Why a text cannot be written to a file; "" if it can."""
    lone = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    return f"half a character (a lone surrogate, {ascii(lone)})" if lone else ""


def _label(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 10**30:
            raise ValueError("a number of more than 30 digits")
        return str(value)
    return _text(value)


def _note(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return _whole(value)


def _file(value: Any) -> str:
    name = _text(value)
    if "\0" in name:
        raise ValueError("a name with a NUL")
    size = len(name.encode())
    if size > LONGEST_PATH or any(len(part.encode()) > LONGEST_NAME for part in name.split("/")):
        raise ValueError(f"a name of {size} bytes, longer than a file can have")
    return name


def _box(value: Any) -> tuple[float, float, float, float]:
    if not isinstance(value, list) or len(value) != 4 or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value):
        raise ValueError
    try:
        x0, y0, x1, y1 = map(float, value)
    except OverflowError:
        raise ValueError from None
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise ValueError("a number that is not finite")
    return x0, y0, x1, y1


def _truth_value(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _whole_number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError
    return value


TEXT, LABEL, NOTE, FILE = Kind("a text", _text), Kind("a text", _label), Kind("a text", _note), Kind("the name of a file", _file)
NOTE_OR_NULL = Kind("a text", lambda value: "" if value is None else _note(value))
BOX = Kind("four numbers in a list", _box)
TRUE_OR_FALSE, NUMBER = Kind("true or false", _truth_value), Kind("a whole number", _whole_number)


def a_list(kind: Kind, least: int = 0) -> Kind:
    """A list of at least `least` elements of one kind."""

    def read(value: Any) -> tuple:
        if not isinstance(value, list) or len(value) < least:
            raise ValueError
        return tuple(kind.read(element) for element in value)

    return Kind(f"a list, each {kind.name}", read)


def one_of(*allowed: str) -> Kind:
    """One of these words, in upper or lower case."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or value.strip().lower() not in allowed:
            raise ValueError
        return value.strip().lower()

    return Kind(f"of {', '.join(allowed)}", read)


@dataclass(frozen=True)
class Schema:
    """The columns of a row.

    Attributes:
        needed, optional: column -> its type. exclusive: groups of columns of which a row may have one only.
        ours: whether the format is this package's own; in files of benchmarks unknown columns are expected.
    """

    needed: Mapping[str, Kind]
    optional: Mapping[str, Kind]
    exclusive: tuple[tuple[str, ...], ...] = ()
    ours: bool = False

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the declared columns that the row has.

        Raises:
            ValueError: about the first column that does not fit: what was expected and what came.
        """
        if self.ours:
            self._refuse_misspelt(row)
        for group in self.exclusive:
            if len(both := [name for name in group if name in row]) > 1:
                raise ValueError(f'"{both[0]}" and "{both[1]}" are both there: expected one of them')
        found = {}
        for name, kind in {**self.needed, **self.optional}.items():
            if name not in row and name in self.needed:
                raise ValueError(f'expected "{name}", {kind.name}, got nothing')
            if name in row:
                found[name] = _cell(name, kind, row[name])
        return found

    def unknown(self, row: Mapping[str, Any]) -> list[str]:
        """Columns of the row that are not declared."""
        return [name for name in row if name not in self.needed and name not in self.optional]

    def _refuse_misspelt(self, row: Mapping[str, Any]) -> None:
        lacking = [name for name in (*self.needed, *self.optional) if name not in row and len(name) > 2]
        for name in self.unknown(row):
            if like := get_close_matches(name[:100].lower(), lacking, 1, 0.75):
                raise ValueError(f'unknown column {shown(name)}: is it "{like[0]}"? If not, give it another name')


def _cell(name: str, kind: Kind, value: Any) -> Any:
    try:
        return kind.read(value)
    except ValueError as error:
        reason = f"{error}: " if str(error) else ""
        raise ValueError(f'expected "{name}", {kind.name}, got {reason}{shown(value)}') from None


def shown(value: Any) -> str:
    """A value for error messages: short, on one line, printable."""
    text = value if isinstance(value, str) and value.isprintable() and len(value) <= 60 else None
    if text is not None:
        return repr(text)
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"
    text = ascii(value[:80] if isinstance(value, (str, list)) else value)
    return text if len(text) <= 90 else f"{text[:80]}…"


def tell_unknown(file: Any, names: Mapping[str, None] | list[str]) -> None:
    """Warns about unknown columns, if there are any."""
    if names:
        listed = ", ".join(shown(name) for name in list(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        warnings.warn(f"{file}: nothing is done with the columns {listed}.", UnknownColumns, stacklevel=3)


# ---- our own formats --------------------------------------------------------------------------------

QUESTION = Schema(
    {"question": TEXT},
    {"image": FILE, "images": a_list(FILE), "answer": Kind("a text", lambda v: "" if v == "" else _label(v)), "id": LABEL,
     "domain": NOTE, "category": NOTE, "candidates": a_list(LABEL)},
    (("image", "images"),), ours=True,
)  # fmt: skip
PAIR = Schema(
    {"question": TEXT, "clean": FILE, "corrupted": FILE, "answer": LABEL},
    {"other": LABEL, "id": LABEL, "category": NOTE, "domain": NOTE, "box": BOX}, ours=True,
)  # fmt: skip
JUDGEMENT = Schema({"id": LABEL, "correct": TRUE_OR_FALSE}, {}, ours=True)
GROUNDING = Schema(
    {"image": FILE},
    {"phrase": TEXT, "expression": TEXT, "sentence": TEXT, "box": BOX, "bbox": BOX, "mask": FILE, "id": LABEL, "category": NOTE},
    (("phrase", "expression", "sentence"), ("box", "bbox")), ours=True,
)  # fmt: skip

# ---- benchmarks, as their authors publish them ------------------------------------------------------

HQH_TYPES = ("ocr", "action", "attribute", "comparison", "count", "environment", "existence", "relation")
AMBER_TYPES = {
    "generative": "generative",
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute: state",
    "discriminative-attribute-number": "attribute: number",
    "discriminative-attribute-action": "attribute: action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
POPE = Schema({"question_id": LABEL, "text": TEXT, "image": FILE, "label": one_of("yes", "no")}, {})
HQH = Schema({"id": LABEL, "image": FILE, "instruction": TEXT, "ground_truth": LABEL, "type": one_of(*HQH_TYPES)}, {})
AMBER_QUERY = Schema({"id": NUMBER, "image": FILE, "query": TEXT}, {})
AMBER_KIND = Schema({"type": one_of(*AMBER_TYPES)}, {"id": NUMBER})
AMBER_GENERATIVE = Schema({}, {"truth": a_list(TEXT), "hallu": a_list(TEXT)})
AMBER_YES_NO = Schema({"truth": one_of("yes", "no")}, {})
MMHAL = Schema(
    {"question": TEXT, "gt_answer": LABEL},
    {"image": FILE, "image_src": TEXT, "image_id": LABEL, "model_answer": NOTE_OR_NULL, "image_content": a_list(TEXT)},
)
CAPTION = Schema({"image_id": LABEL, "caption": TEXT}, {"objects": a_list(TEXT)})
OBJECT_NAMES = a_list(TEXT)  # objects in an image
