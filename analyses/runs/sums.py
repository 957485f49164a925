"""Runs whose result is a sum by domain, not a row a question: counts, and anything else that is added up.

1. `work` gives terms (`analyses.common.sums`), each with the "id" of a question. They may be large: a few a batch.
2. A part adds up its own terms, in the order of its batches, and writes the sums.
3. Reading adds up the parts, in their order. The parts follow from data and settings alone, so that the sums are the same
   to the bit whoever wrote which part; of whole numbers they are exact anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from analyses.common.sums import KEYS, Sums, add_up
from analyses.runs.engine import Part, Run, read_part, write_rows
from analyses.runs.files import finished_parts


def write_sums(state: Run, number: int, part: Part, file: Path) -> None:
    """A part's sums; each stands at the question that its first term belongs to."""
    places: dict[tuple, tuple] = {}
    for item, id, batch, term in part.results:
        places.setdefault(tuple(term[name] for name in KEYS), (item, id, batch))
    sums = add_up(term for *_, term in part.results)
    rows = [
        (*places[key], {"id": places[key][1], **dict(zip(KEYS, key)), "n": n, "values": values})
        for key, (n, values) in sums.items()
    ]
    write_rows(state, number, replace(part, results=rows), file)


def read_sums(out: str | Path) -> Sums:
    """The sums over a whole run, as `add_up` gives them.

    Raises:
        ValueError: no run there, or one that is not finished.
    """
    return add_up(_terms(Path(out)))


def _terms(out: Path) -> Iterator[Mapping[str, Any]]:
    """One part in memory at a time."""
    for part in finished_parts(out, ".parquet", partial=False):
        yield from read_part(out, part).to_pandas().to_dict("records")
