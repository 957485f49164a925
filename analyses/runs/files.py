"""The files of a run: written whole or not at all, and one run a folder.

    OUT/run.json              the manifest, written once
    OUT/plan.parquet          the composition of the batches
    OUT/part-00012.parquet    a part; it has this name only when it is whole and on the disk
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from hooked_qwen2vl.files import whole_file

MANIFEST, PLAN = "run.json", "plan.parquet"


def part_path(out: Path, part: int, suffix: str) -> Path:
    return out / f"part-{part:05d}{suffix}"


def read_manifest(out: str | Path) -> dict[str, Any]:
    """`run.json`.

    Raises:
        ValueError: no run there.
    """
    file = Path(out) / MANIFEST
    if not file.exists() or not (Path(out) / PLAN).exists():
        raise ValueError(f"{out} holds no run: expected {MANIFEST}, plan.parquet and parts.")
    return json.loads(file.read_text(encoding="utf-8"))


def refuse_another(out: Path, manifest: Mapping[str, Any]) -> None:
    if not (out / MANIFEST).exists():
        if any(out.glob("part-*")):
            raise ValueError(f"{out} holds parts of a run but no {MANIFEST}: choose another folder.")
        return
    kept = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    kept.pop("started", None)
    differences = list(_differences(kept, manifest))
    if differences:
        raise ValueError(
            f"{out} holds a run with other settings; go on with the same, or choose another folder:\n  "
            + "\n  ".join(differences)
        )


def _differences(kept: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(kept, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*kept, *now)):
            yield from _differences(kept.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif kept != now:
        yield f"{where}: {json.dumps(kept, ensure_ascii=False)} there, {json.dumps(now, ensure_ascii=False)} now"


def written_parts(out: Path, suffix: str) -> frozenset[int]:
    found = (re.fullmatch(rf"part-(\d+){re.escape(suffix)}", file.name) for file in out.glob(f"part-*{suffix}"))
    return frozenset(int(match[1]) for match in found if match)


def settle(out: Path, manifest: Mapping[str, Any], plan: pd.DataFrame) -> None:
    """Manifest and plan, each written once; whoever comes second compares."""
    kept = {**manifest, "started": datetime.now(UTC).isoformat(timespec="seconds")}
    if not (out / MANIFEST).exists():
        try:
            with whole_file(out / MANIFEST, exclusive=True) as file:
                file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except FileExistsError:
            refuse_another(out, manifest)
    if not (out / PLAN).exists():  # the manifest holds its digest: whoever writes it writes the same
        with whole_file(out / PLAN) as file:
            plan.to_parquet(file, index=False)


def finished_parts(out: Path, suffix: str, partial: bool) -> list[int]:
    read_manifest(out)
    planned = set(pd.read_parquet(out / PLAN, columns=["part"])["part"])
    written = written_parts(out, suffix) & planned
    if not partial and planned - written:
        raise ValueError(
            f"the run in {out} is not finished: {len(written)} of {len(planned)} parts are there. Start it again with "
            f"the same command, or read what there is with partial=True."
        )
    return sorted(written)
