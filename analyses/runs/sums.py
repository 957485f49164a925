"""Runs whose result is sums by domain, module and layer instead of rows per question.

1. `work` returns terms (`analyses.common.sums`), each with the "id" of a question. Terms may be large, so return few per batch.
2. A shard adds up its terms in the order of its batches and writes the sums. The sums of an interrupted shard are added first, so
   the order of additions, and every bit, is the same as without the interruption.
3. Reading adds up the shards in their order. Data and settings determine the shards, so the sums are the same bit for bit, no
   matter which process wrote which shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from analyses.common.sums import KEYS, Sums, add_up
from analyses.runs.engine import Failure, Run, Shard, read_rows, write_rows
from analyses.runs.files import finished_shards, shard_path


def write_sums(state: Run, number: int, shard: Shard, file: Path) -> None:
    """Writes a shard's sums; each has the item and id of the question of its first term."""
    before = [] if shard.earlier is None else _kept(shard.earlier)
    results = [(row["item"], row["id"], row["batch"], row) for row in before] + shard.results
    places: dict[tuple, tuple] = {}
    for item, id, batch, term in results:
        places.setdefault(tuple(term[name] for name in KEYS), (item, id, batch))
    sums = add_up(term for *_, term in results)
    rows = [(*places[key], {"id": places[key][1], **dict(zip(KEYS, key)), "n": n, "values": values}) for key, (n, values) in sums.items()]
    failures, composition = shard.failures, shard.composition
    if shard.earlier is not None:
        table, kept = read_rows(shard.earlier)
        failed = table.filter(pc.is_valid(table["error"])).select(["item", "id", "batch", "error"]).to_pylist()
        failures, composition = [Failure(**row) for row in failed] + failures, kept + composition
    write_rows(state, number, replace(shard, results=rows, failures=failures, composition=composition, earlier=None), file)


def _kept(file: Path) -> list[dict[str, Any]]:
    """The sums in a file, as terms."""
    table, _ = read_rows(file)
    return table.filter(pc.is_null(table["error"])).drop_columns(["error"]).to_pandas().to_dict("records")


def read_sums(out: str | Path) -> Sums:
    """The sums over a whole run, as `add_up` returns them.

    Raises:
        ValueError: no run there, or one that is not finished.
    """
    return add_up(_terms(Path(out)))


def _terms(out: Path) -> Iterator[Mapping[str, Any]]:
    """The sums of all shards as terms, with one shard in memory at a time."""
    for shard in finished_shards(out, ".parquet", partial=False):
        yield from _kept(shard_path(out, shard, ".parquet"))
