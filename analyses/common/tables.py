"""Tables as CSV files whose cells a spreadsheet does not run as formulas.

`write_csv` puts an apostrophe before texts that a spreadsheet would take for a formula (texts that begin with =, +, -, @, a tab,
a carriage return or a full-width form of these signs), and before texts that begin with an apostrophe. `read_csv` removes one
apostrophe. Numbers are unchanged.
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
    """Writes the table without its index; an existing file is replaced only when the new one is complete."""
    safe = table.copy()
    for place, name in enumerate(safe.columns):
        if safe.dtypes.iloc[place].kind == "O":
            safe.isetitem(place, safe.iloc[:, place].map(_safe))
    safe.columns = [_safe(name) for name in safe.columns]
    with whole_file(path) as file:
        safe.to_csv(file, index=False)


def read_csv(path: str | Path, **options: Any) -> pd.DataFrame:
    """Reads a table that `write_csv` wrote, with its original texts; `options` are those of pandas.read_csv."""
    table = pd.read_csv(path, **options)
    for place in range(table.shape[1]):
        if table.dtypes.iloc[place].kind == "O":
            table.isetitem(place, table.iloc[:, place].map(_plain))
    return table.rename(columns=_plain)


def _safe(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and _RUNS.fullmatch(cell) and not _NUMBER.fullmatch(cell) else cell


def _plain(cell: Any) -> Any:
    return cell[1:] if isinstance(cell, str) and cell.startswith("'") else cell
