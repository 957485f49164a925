"""The files of a run: each is written completely or not at all; one run per folder.

    OUT/run.json              the manifest, written once
    OUT/plan.parquet          the composition of the batches
    OUT/part-00012.parquet    a shard; it has this name only when it is complete and on disk
    OUT/unfinished-00013.parquet    complete batches of an interrupted shard (Ctrl-C); deleted when the shard is complete

The file of a shard names its run and its questions. Parquet files are sealed: their metadata has a checksum of all their bytes,
which is compared before parsing, because a damaged file can crash the parser.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from analyses.runs.plan import plan_digest
from hooked_qwen2vl.files import open_regular, whole_file

MANIFEST, PLAN = "run.json", "plan.parquet"
FORMAT = 2  # of the folder; since 2 the files of shards name their run
SEAL, _DIGITS = b"hooked-qwen2vl seal ", 32
AGAIN = "Delete it and start the same command again: it is made anew."


def shard_path(out: Path, shard: int, suffix: str) -> Path:
    return out / f"part-{shard:05d}{suffix}"


def unfinished_path(out: Path, shard: int, suffix: str) -> Path:
    return out / f"unfinished-{shard:05d}{suffix}"


def read_manifest(out: str | Path) -> dict[str, Any]:
    """`run.json`.

    Raises:
        ValueError: no run there, or a damaged `run.json`.
    """
    file = Path(out) / MANIFEST
    if not file.exists() or not (Path(out) / PLAN).exists():
        raise ValueError(f"{out} holds no run: expected {MANIFEST}, plan.parquet and shards.")
    return _manifest(file)


def _manifest(file: Path) -> dict[str, Any]:
    with opening(file, "Choose another folder: nothing says what its shards belong to."):
        with open_regular(file) as opened:
            found = json.loads(opened.read().decode("utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("data"), dict) or not isinstance(found.get("settings"), dict):
            raise ValueError("it has no data and settings")
    return found


@contextmanager
def opening(file: Path, advice: str = AGAIN) -> Iterator[None]:
    """Context for reading a file of a run: turns errors into a ValueError with the file's name and advice.

    Raises:
        ValueError: the file is damaged, truncated, or of another kind.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException, SafetensorError) as error:
        if str(error).startswith(str(file)):  # from a nested `opening`
            raise
        why = (getattr(error, "strerror", None) or str(error)).strip().split("\n")[0].replace(repr(str(file)), "it")
        why = why[:200].rstrip(".") or type(error).__name__
        raise ValueError(f"{file} cannot be read ({why}): it is damaged, or was written by something else. {advice}") from error


def read_plan(out: str | Path) -> pd.DataFrame:
    """`plan.parquet`, checked against the digest in the manifest.

    Raises:
        ValueError: a damaged plan, or one of another run.
    """
    file = Path(out) / PLAN
    manifest = read_manifest(out)
    with opening(file):
        plan = read_sealed(file)[0].to_pandas()
        if plan_digest(plan) != manifest["data"]["digest"]:
            raise ValueError(f"it is not the plan that {MANIFEST} knows")
    return plan


def refuse_another(out: Path, manifest: Mapping[str, Any]) -> None:
    if not (out / MANIFEST).exists():
        if any(out.glob("part-*")):
            raise ValueError(f"{out} holds shards of a run but no {MANIFEST}: choose another folder.")
        return
    kept = _manifest(out / MANIFEST)
    kept.pop("started", None)
    differences = list(_differences(kept, manifest))
    if differences:
        raise ValueError(
            f"{out} holds a run with other settings; go on with the same, or choose another folder:\n  " + "\n  ".join(differences)
        )


def _differences(kept: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(kept, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*kept, *now)):
            yield from _differences(kept.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif kept != now:
        yield f"{where}: {json.dumps(kept, ensure_ascii=False)} there, {json.dumps(now, ensure_ascii=False)} now"


def written_shards(out: Path, suffix: str) -> frozenset[int]:
    found = (re.fullmatch(rf"part-(\d+){re.escape(suffix)}", file.name) for file in out.glob(f"part-*{suffix}"))
    return frozenset(int(match[1]) for match in found if match)


def write_manifest_and_plan(out: Path, manifest: Mapping[str, Any], plan: pd.DataFrame) -> None:
    """Writes manifest and plan if they are missing; if another process wrote the manifest, compares it."""
    kept = {**manifest, "started": datetime.now(UTC).isoformat(timespec="seconds")}
    if not (out / MANIFEST).exists():
        try:
            with whole_file(out / MANIFEST, exclusive=True) as file:
                file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except FileExistsError:
            refuse_another(out, manifest)
    if not (out / PLAN).exists():  # the manifest has its digest, so every process writes the same plan
        with whole_file(out / PLAN) as file:
            write_sealed(pa.Table.from_pandas(plan, preserve_index=False), file)


def finished_shards(out: Path, suffix: str, partial: bool) -> list[int]:
    """The written shards, in order, after checking that each belongs to this run.

    Raises:
        ValueError: no run there, one that is not finished (unless `partial`), or a shard that does not belong.
    """
    manifest, plan = read_manifest(out), read_plan(out)
    planned = set(plan["part"])
    written = written_shards(out, suffix) & planned
    if not partial and planned - written:
        raise ValueError(
            f"the run in {out} is not finished: {len(written)} of {len(planned)} shards are there. Start it again with "
            f"the same command, or read what there is with partial=True."
        )
    check_shards(out, suffix, manifest, plan, written)
    return sorted(written)


# ---- which run a shard belongs to, and whether it is intact ----------------------------------------


def run_digest(manifest: Mapping[str, Any]) -> str:
    """A hash that identifies the run, equal for all its processes and starts."""
    kept = {name: value for name, value in manifest.items() if name != "started"}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=12).hexdigest()


def belonging(manifest: Mapping[str, Any], shard: int, items: Iterable[int]) -> dict[str, str]:
    """The metadata of a shard's file: its run, its number, and its questions."""
    return {"run": run_digest(manifest), "part": str(shard), "items": json.dumps(sorted(items))}


def check_shards(out: Path, suffix: str, manifest: Mapping[str, Any], plan: pd.DataFrame, shards: Iterable[int]) -> None:
    """Checks that each of these files is intact and has the questions of the plan.

    Raises:
        ValueError: a file of another run or shard, or one that cannot be read; the message names it.
    """
    if "format" not in manifest:  # runs of an earlier version have no such metadata
        return
    run, items = run_digest(manifest), plan.groupby("part")["item"].apply(sorted)
    for shard in sorted(shards):
        file = shard_path(out, shard, suffix)
        about = read_about(file)
        found = json.loads(about["items"])
        if about["run"] != run:
            raise ValueError(f"{file} belongs to another run than {MANIFEST} describes. {AGAIN}")
        if int(about["part"]) != shard or found != items[shard]:
            raise ValueError(
                f"{file} holds questions {found[:3]} … of shard {about['part']}; the plan has {items[shard][:3]} … of shard {shard} there. {AGAIN}"
            )


def check_unfinished(file: Path, manifest: Mapping[str, Any], shard: int, planned: pd.DataFrame) -> list[int]:
    """The questions in the file of an interrupted shard, after checking that they are complete batches of the plan.

    Raises:
        ValueError: a file of another run or shard, or one that cannot be read.
    """
    about = read_about(file)
    items = json.loads(about["items"])
    batches = planned["batch"].isin(planned["batch"][planned["item"].isin(items)])
    expected = belonging(manifest, shard, planned["item"][batches].tolist())
    if any(about[name] != value for name, value in expected.items()):
        raise ValueError(f"{file} does not belong to this run. Delete it and start the same command again: its batches are done anew.")
    return items


def read_about(file: Path) -> dict[str, str]:
    """The metadata of a shard's file.

    Raises:
        ValueError: a file that cannot be read, or has no such metadata.
    """
    with opening(file):
        if file.suffix == ".parquet":
            about = read_sealed(file)[1]
        else:
            open_regular(file).close()
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
        json.loads(about["items"]), about["run"], int(about["part"]), json.loads(about["composition"])
    return about


def about_checksum(about: Mapping[str, str]) -> str:
    """Checksum of a file's metadata."""
    said = {name: value for name, value in sorted(about.items()) if name not in ("checksum", "ARROW:schema")}
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()


def write_sealed(table: pa.Table, file: Path, about: Mapping[str, str] | None = None) -> None:
    """Writes a table as Parquet with metadata and a seal."""
    buffer = pa.BufferOutputStream()
    more = {k.encode(): v.encode() for k, v in (about or {}).items()}
    kept = {**(table.schema.metadata or {}), **more, b"seal": SEAL + b"0" * _DIGITS}
    pq.write_table(table.replace_schema_metadata(kept), buffer)
    content = bytearray(buffer.getvalue().to_pybytes())
    at = content.rfind(SEAL) + len(SEAL)
    content[at : at + _DIGITS] = _seal(content, at)
    file.write_bytes(content)


def read_sealed(file: Path) -> tuple[pa.Table, dict[str, str]]:
    """(table, metadata), after comparing the seal; files of earlier versions have none.

    Raises:
        ValueError: a damaged file.
    """
    with opening(file):
        with open_regular(file) as opened:
            content = opened.read()
        places = [found.end() for found in re.finditer(re.escape(SEAL), content)]
        if places and not any(content[at : at + _DIGITS] == _seal(content, at) for at in places):
            raise ValueError("it is not what was written: the checksum differs")
        table = pq.read_table(pa.BufferReader(content))
        about = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        if "seal" in about and not places:
            raise ValueError("its seal is broken")
        return table, about


def _seal(content: bytes | bytearray, at: int) -> bytes:
    """Checksum of a file's bytes without the bytes of the checksum itself."""
    hashed = hashlib.blake2b(memoryview(content)[:at], digest_size=_DIGITS // 2)
    hashed.update(memoryview(content)[at + _DIGITS :])
    return hashed.hexdigest().encode()


def tensor_checksum(tensor: torch.Tensor) -> str:
    """Checksum of a tensor's values, dtype and shape."""
    hashed = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType] (an array is a buffer)
    return hashed.hexdigest()
