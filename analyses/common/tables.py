"""Tables as CSV that a spreadsheet shows and does not run.

A cell of text that a spreadsheet would take for a formula (=, +, -, @ before more text) gets an apostrophe before it, and so does
one that begins with an apostrophe: `read_csv` takes one away from each, and gives what was written. Numbers stay numbers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from hooked_qwen2vl.files import whole_file

_RUNS = re.compile(r"(?s)[=+\-@\t\r＝＋－＠].+|'.*")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)", re.IGNORECASE)


def write_csv(table: pd.DataFrame, path: str | Path) -> None:
    """The table without its index, whole or not at all."""
    safe = table.copy()
    for place, name in enumerate(safe.columns):
        if safe.dtypes.iloc[place].kind == "O":
            safe.isetitem(place, safe.iloc[:, place].map(_safe))
    safe.columns = [_safe(name) for name in safe.columns]
    with whole_file(path) as file:
        safe.to_csv(file, index=False)


def read_csv(path: str | Path, **options: Any) -> pd.DataFrame:
    """A table that `write_csv` wrote: its texts as they were; options as pandas.read_csv takes them."""
    table = pd.read_csv(path, **options)
    for place in range(table.shape[1]):
        if table.dtypes.iloc[place].kind == "O":
            table.isetitem(place, table.iloc[:, place].map(_plain))
    return table.rename(columns=_plain)


def _safe(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and _RUNS.fullmatch(cell) and not _NUMBER.fullmatch(cell) else cell


def _plain(cell: Any) -> Any:
    return cell[1:] if isinstance(cell, str) and cell.startswith("'") else cell
