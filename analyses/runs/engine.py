"""Runs over thousands of questions that can be killed at any moment and resumed.

1. Plan: which questions form which batch and which shard (see `runs.plan`); data and settings determine the plan.
2. Each missing shard is run, batch by batch, and written as one Parquet file: first under a temporary name, then renamed when it
   is complete. A shard that has its final name is done; any other is run again.
3. A question that fails (an unreadable image, a prompt that is too long) is recorded with the reason.
4. Processes and machines can share the shards; to merge their results is to read the folder.
5. Ctrl-C (KeyboardInterrupt) writes the complete batches of the current shard; the next start continues after them.

    OUT/run.json              name, model, settings, versions, seed, digest of the data; never changed once written
    OUT/plan.parquet          the composition of the batches: item, id, part, batch, size, …
    OUT/part-00012.parquet    the rows of shard 12; questions that failed have the reason in `error`. The file's metadata has
                              `composition` (the batches as they ran), the run it belongs to, and a checksum
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from analyses.common.models import describe_model
from analyses.data.examples import problem_of
from analyses.runs.files import (
    FORMAT,
    MANIFEST,
    PLAN,
    belonging,
    check_shards,
    check_unfinished,
    finished_shards,
    opening,
    read_manifest,
    read_plan,
    read_sealed,
    refuse_another,
    shard_path,
    unfinished_path,
    write_manifest_and_plan,
    write_sealed,
    written_shards,
)  # fmt: skip
from analyses.runs.plan import (
    Memory,
    Size,
    Sizer,
    digest,
    embedding_bytes,
    label,
    make_plan,
    memory_for,
    plan_digest,
    size_by_model,
    size_by_pixels,
    windows,
)
from hooked_qwen2vl.files import remove_unfinished, whole_file
from hooked_qwen2vl.moved import moved_names, renamed_arguments, renamed_attributes
from hooked_qwen2vl.protocols import Model

__getattr__ = moved_names(__name__)

if TYPE_CHECKING:
    from analyses.data.examples import Example

PACKAGES = ("hooked-qwen2vl", "torch", "transformers", "transformer_lens")
SHOWN = 8  # number of sizes that `Run.describe` lists
RESERVED = ("item", "batch", "error")

Row = Mapping[str, Any]
Work = Callable[[list["Example"]], Iterable[Row]]
Data = Iterable["Example"] | Callable[[], Iterable["Example"]]


@dataclass(frozen=True)
class Failure:
    """A question that failed, with the reason."""

    item: int
    id: str
    batch: int
    error: str


@dataclass(frozen=True)
class Shard:
    """The rows of one shard, before they are written.

    Attributes:
        results: (item, id, batch, row returned by `work`), in the order of the batches.
        failures: questions that failed.
        composition: the items of each batch as it ran: without questions whose image could not be read, and as single questions
            if the whole batch failed.
        items: all questions of the file, including those of `earlier`.
        earlier: file with the first batches of this shard, from before an interruption, or None. A writer puts its rows first.
    """

    results: list[tuple[int, str, int, Row]]
    failures: list[Failure]
    composition: list[list[int]]
    items: list[int] = field(default_factory=list)
    earlier: Path | None = None


Writer = Callable[["Run", int, Shard, Path], None]


@renamed_attributes
@dataclass(frozen=True)
class Run:
    """State of a run: its plan, and which shards are done.

    Attributes:
        out: the folder.
        manifest: as in `run.json`.
        plan: one row per question (see `runs.plan.make_plan`).
        rank: (k, n): this process runs the shards k, k + n, k + 2n, ….
        done: shards that are written, by any process.
        memory: estimate for the model's forward; None without a model.
        suffix: of the shards' files.
    """

    out: Path
    manifest: dict[str, Any]
    plan: pd.DataFrame
    rank: tuple[int, int]
    done: frozenset[int]
    memory: Memory | None = None
    suffix: str = ".parquet"

    @property
    def complete(self) -> bool:
        """Whether all shards of the run are written, including those of other processes."""
        return set(self.plan["part"]) <= self.done

    @property
    def todo(self) -> list[int]:
        """Shards of this process that are not written yet, in increasing order."""
        k, n = self.rank
        return [shard for shard in sorted(set(self.plan["part"])) if shard % n == k and shard not in self.done]

    def describe(self) -> str:
        """A text that says what is done and what is left, for --dry-run."""
        plan, (k, n) = self.plan, self.rank
        ours = plan[plan["part"].isin(self.todo)]
        n_batches, n_shards = plan["batch"].nunique(), plan["part"].nunique()
        lines = [
            f"{self.manifest['name']}: {len(plan)} questions in {n_batches} batches, {n_shards} shards, into {self.out}",
            f"written already: {len(plan[plan['part'].isin(self.done)])} questions",
            f"to do here{f' (rank {k}/{n})' if n > 1 else ''}: {len(ours)} questions in {ours['batch'].nunique()} batches",
        ]
        sizes = sorted((group for _, group in plan.groupby("size", sort=False)), key=len, reverse=True)
        for group in sizes[:SHOWN]:
            lines.append(f"  {len(group)} × {group['size'].iloc[0]}, batches of up to {group.groupby('batch').size().max()}")
        if rest := sizes[SHOWN:]:
            lines.append(f"  {sum(map(len, rest))} of {len(rest)} other sizes")
        if self.memory is not None:
            lines.append(f"memory of the forward, without what the analysis itself keeps: about {self.memory}")
        return "\n".join(lines)


@renamed_arguments
def run(
    name: str,
    examples: Data,
    work: Work,
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    model: Any = None,  # a Model
    size: Sizer | None = None,
    batch_size: int = 8,
    seed: int = 0,
    rank: tuple[int, int] | None = None,
    dry_run: bool = False,
    progress: bool = True,
    batches_per_shard: int = 4,
    window: int = 1024,
    embeddings: int = 0,
    gradients: bool = False,
    write: Writer | None = None,
    cluster: Any = None,
) -> Run:
    """Runs `work` on every question that has no result in the folder yet.

    Args:
        name: of the analysis, for the manifest.
        examples: the data, always in the same order: a sequence, or a function that returns a new iterator
            (`lambda: data.examples("scenes", 5000)`). They are iterated twice: for the plan, and for the work.
        work: function from a batch of questions with opened images to rows: any number of rows per question, each with the
            question's "id" and values that Parquet can store (numbers, strings, lists). The rows may depend on the batch only;
            random numbers are seeded before each batch.
        settings: everything that determines the rows, as JSON values.
        model: if given, its name, dtype and hash of weights are in the manifest, sizes come from its processor, and memory is
            estimated.
        size: question -> what questions of one batch have in common; None: `size_by_model` or, without a model, `size_by_pixels`.
        rank: (k, n) for process k = 0..n−1 of n; None: from accelerate (see `this_rank`).
        dry_run: only plan: run and write nothing.
        batches_per_shard: batches that are written together, and lost together if the process is killed.
        window: number of questions among which batches of equal size are formed.
        embeddings: bytes of image embeddings that `work` keeps (`ImageEmbeddingsCache.capacity`), for the estimate of memory.
        gradients: whether `work` computes gradients, for the estimate of memory.
        write: function that writes a shard's rows after those of `Shard.earlier`; None: `write_rows`.
        cluster: a `runs.cluster.Cluster` whose nodes run the shards; `work` must then be an `Experiment`, and `rank` (0, 1).
    Returns:
        the state of the run; `Run.complete` says whether all processes have finished.
    Raises:
        ValueError: the folder has another run (the message names the differences), the data are an iterator or have changed, two
            questions have the same id, the first shard failed completely, or a file in the folder is damaged or of another run
            (the message names it).
        TypeError: `work` returned something else than the rows described above.
        KeyboardInterrupt: interrupted; complete batches are written, and the message says how many questions are done.
    """
    settings = {**(settings or {}), "batch_size": batch_size, "batches_per_shard": batches_per_shard, "window": window}
    state = prepare(name, examples, out, settings, model, size, seed, rank, embeddings=embeddings, gradients=gradients)
    if dry_run:
        return state
    work_on(state, examples, work, write or write_rows, progress, cluster)
    return refreshed(state)


def read_results(out: str | Path, partial: bool = False) -> pd.DataFrame:
    """All rows of a run, in the order of the data: item, id, and the columns of `work`'s rows.

    Args:
        partial: also read a run that is not finished.
    Raises:
        ValueError: no run there, or one that is not finished.
    """
    return _read(Path(out), partial, failed=False).drop(columns=["error", "batch"])


def read_failures(out: str | Path, partial: bool = False) -> pd.DataFrame:
    """Questions that failed: item, id, batch, and the reason in `error`."""
    return _read(Path(out), partial, failed=True)[["item", "id", "batch", "error"]]


def read_composition(out: str | Path, partial: bool = False) -> pd.DataFrame:
    """The batches as they ran, one row per batch: part (number of the shard), items."""
    rows = [(shard, items) for shard, _, kept in _written(Path(out), partial) for items in kept]
    return pd.DataFrame(rows, columns=["part", "items"])


def this_rank(text: str | None = None) -> tuple[int, int]:
    """(k, n): this is process k = 0..n−1 of n processes that share a run.

    Args:
        text: "k/n"; None: from `accelerate launch`, or (0, 1) without it.
    Raises:
        ValueError: another text, or accelerate was initialised before with another number of processes.
    """
    if text is None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched == 1:
            return 0, 1
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.accelerator.is_available())  # on CPUs it needs cpu=True to see all processes
        if state.num_processes != launched:
            raise ValueError(
                f"{launched} processes were launched, but accelerate counts {state.num_processes}: it was set up before. "
                f"Call this_rank() before anything else of accelerate's (device_map, say), or pass rank=(k, n)."
            )
        return state.process_index, state.num_processes
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    rank = (int(found[1]), int(found[2])) if found else (0, 0)
    _check_rank(rank, text)
    return rank


# ---- the engine, shared with the activation store -----------------------------------------------


@renamed_arguments
def prepare(
    name: str,
    examples: Data,
    out: str | Path,
    settings: Mapping[str, Any],
    model: Any = None,  # a Model
    size: Sizer | None = None,
    seed: int = 0,
    rank: tuple[int, int] | None = None,
    suffix: str = ".parquet",
    embeddings: int = 0,
    gradients: bool = False,
) -> Run:
    """Plans a run and checks its folder; writes nothing.

    Args:
        settings: including batch_size, batches_per_shard and window.
        suffix: of the shards' files. The other arguments: see `run`.
    Raises:
        ValueError: the folder has another run, or as `run`.
    """
    rank = this_rank() if rank is None else rank
    _check_rank(rank, str(rank))
    sizes: dict[Size, int] = {}
    size = size or (size_by_model(model) if _sees(model) else size_by_pixels)
    shape = [settings[key] for key in ("batch_size", "batches_per_shard", "window")]
    plan = make_plan(_fresh(examples), _remembering(size, sizes), *shape)
    manifest = {
        "format": FORMAT,
        "name": name,
        "model": describe_model(model) if model is not None else None,
        "settings": settings,
        "versions": versions(),
        "seed": seed,
        "data": {"questions": len(plan), "batches": int(plan["batch"].nunique()), "digest": plan_digest(plan)},
    }
    manifest = _as_json(manifest)
    out = Path(out)
    refuse_another(out, manifest)
    if (out / MANIFEST).exists() and (out / PLAN).exists():
        read_plan(out)
    check_shards(out, suffix, manifest, plan, written_shards(out, suffix) & set(plan["part"]))
    rows = plan.groupby(["size", "batch"]).size().groupby("size").max()
    memory = None
    if sizes and model is not None and _sees(model):
        memory = memory_for(model, [(s, int(rows[str(s)])) for s in sizes], min(embeddings, embedding_bytes(model, sizes)), gradients)
    return Run(out, manifest, plan, rank, written_shards(out, suffix), memory, suffix)


def work_on(state: Run, examples: Data, work: Callable, write: Writer, progress: bool = True, cluster: Any = None) -> None:
    """Runs and writes the missing shards of this process, here or on a cluster.

    Args:
        write: writes a shard to the (temporary) file it is given.
    """
    from tqdm.auto import tqdm

    state.out.mkdir(parents=True, exist_ok=True)
    remove_unfinished(state.out)
    write_manifest_and_plan(state.out, state.manifest, state.plan)
    k, n = state.rank
    ours, todo = state.plan[state.plan["part"] % n == k], state.plan["part"].isin(state.todo)
    bar = tqdm(
        total=len(ours), initial=len(ours) - int(todo.sum()), unit="question",
        desc=state.manifest["name"], disable=not progress, dynamic_ncols=True,
    )  # fmt: skip

    def keep(number: int, shard: Shard) -> None:
        _refuse_all_failed(state, number, shard)
        with whole_file(shard_path(state.out, number, state.suffix)) as file:
            write(state, number, shard, file)
        unfinished_path(state.out, number, state.suffix).unlink(missing_ok=True)

    shards = ((number, _begun(state, number, planned), planned, here) for number, planned, here in _waiting(state, examples))
    with bar:
        if cluster is not None:
            _on_cluster(state, shards, work, keep, bar.update, cluster)
            return
        for number, shard, planned, here in shards:
            try:
                do_shard(shard, planned, partial(_checked, examples=here), work, state.manifest["seed"], bar.update)
                keep(number, shard)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(_interrupted(state, number, shard, write)) from None


def _on_cluster(state: Run, shards: Iterator, work: Callable, keep: Callable, tick: Callable[[int], Any], cluster: Any) -> None:
    """The driver's side of a run on a cluster: opens the questions, and writes the shards that workers return."""

    def opening_all(planned: pd.DataFrame, here: Mapping[int, Example]) -> dict[int, Example | str]:
        found: dict[int, Example | str] = {}
        for row in planned.itertuples():
            try:
                found[row.item] = _checked(row, here)
            except (ValueError, OSError) as error:
                if isinstance(error, DataChanged):
                    raise
                found[row.item] = label(str(error))
        return found

    def done(number: int, shard: Shard) -> None:
        keep(number, shard)
        tick(len(shard.items))

    opened_shards = ((number, shard, planned, opening_all(planned, here)) for number, shard, planned, here in shards)
    try:
        cluster.work_on(state, opened_shards, work, done)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(state, -1, Shard([], [], []), write_rows)) from None


def _waiting(state: Run, examples: Data) -> Iterator[tuple[int, pd.DataFrame, dict[int, Example]]]:
    """(number, rows of the plan, questions of its window by item) of each missing shard of this process.

    Raises:
        ValueError: the data have fewer questions than the plan.
    """
    waiting = state.todo
    by_shard = dict(tuple(state.plan[state.plan["part"].isin(waiting)].groupby("part")))
    if not waiting:
        return
    for questions in windows(_fresh(examples), state.manifest["settings"]["window"]):
        here = dict(questions)
        while waiting and int(by_shard[waiting[0]]["item"].iloc[0]) in here:
            shard = waiting.pop(0)
            yield shard, by_shard[shard], here
        if not waiting:
            return
    raise ValueError("the data ended before the plan did: they changed while the run was under way.")


def _refuse_all_failed(state: Run, number: int, shard: Shard) -> None:
    if number == state.rank[0] and not shard.results and len(shard.failures) > 1 and shard.composition and shard.earlier is None:
        raise ValueError(
            f"{state.manifest['name']} failed on every question of the first shard ({len(shard.failures)}), "
            f"so nothing was written; the first reason: {shard.failures[0].error}"
        )


def _begun(state: Run, number: int, planned: pd.DataFrame) -> Shard:
    """The shard as an interrupted process left it, or an empty one."""
    file = unfinished_path(state.out, number, state.suffix)
    if not file.exists():
        return Shard([], [], [])
    items = check_unfinished(file, state.manifest, number, planned)
    return Shard([], [], [], items, file)


def _interrupted(state: Run, number: int, shard: Shard, write: Writer) -> str:
    """Writes the complete batches of an interrupted shard; returns the message for the user."""
    if len(shard.items) and (shard.results or shard.failures or shard.composition):
        with whole_file(unfinished_path(state.out, number, state.suffix)) as file:
            write(state, number, shard, file)
    written = state.plan["part"].isin(written_shards(state.out, state.suffix))
    done = int(written.sum()) + (0 if number in set(state.plan["part"][written]) else len(shard.items))
    return (
        f"interrupted: {done} of {len(state.plan)} questions are done and kept in {state.out}; start the same command again, and "
        f"it goes on from there."
    )


def wait_for_all(state: Run, every: float = 0.5) -> None:
    """Waits until all shards are written, by this process and those launched with it."""
    while not refreshed(state).complete:
        time.sleep(every)


def refreshed(state: Run) -> Run:
    """The state of the run, with `done` read from the folder again."""
    return replace(state, done=written_shards(state.out, state.suffix))


def write_rows(state: Run, number: int, shard: Shard, file: Path) -> None:
    """Writes a shard as Parquet."""
    results = [(item, id, batch, None, row) for item, id, batch, row in shard.results]
    rows = results + [(f.item, f.id, f.batch, f.error, {"id": f.id}) for f in shard.failures]
    rows.sort(key=lambda row: row[0])  # stable: a question's rows stay in their order
    fixed = {
        "item": pa.array([row[0] for row in rows], pa.int64()),
        "id": pa.array([row[1] for row in rows], pa.string()),
        "batch": pa.array([row[2] for row in rows], pa.int64()),
        "error": pa.array([row[3] for row in rows], pa.string()),
    }
    given = {name: _column(name, [row[4].get(name) for row in rows]) for row in rows for name in row[4] if name != "id"}
    table, composition = pa.table(fixed | given), shard.composition
    if shard.earlier is not None:
        earlier, before = read_rows(shard.earlier)
        table = pa.concat_tables([earlier, table], promote_options="permissive") if len(table) else earlier
        table = table.take(pa.array(np.argsort(table["item"].to_numpy(), kind="stable")))
        composition = before + composition
    write_sealed(table, file, {"composition": json.dumps(composition), **belonging(state.manifest, number, shard.items)})


def read_rows(file: Path) -> tuple[pa.Table, list[list[int]]]:
    """(the table that `write_rows` wrote, the composition of its batches).

    Raises:
        ValueError: a damaged file.
    """
    with opening(file):
        table, about = read_sealed(file)
        return table.replace_schema_metadata(), json.loads(about["composition"])


def _column(name: str, values: list) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise TypeError(f"column {name!r} cannot be written: {error}; give numbers, strings, or lists of them.") from error


# ---- running a shard ---------------------------------------------------------------------------


class DataChanged(ValueError):
    """The data differ from the data of the plan."""


def _checked(row: Any, examples: Mapping[int, Example]) -> Example:
    """The question of a row of the plan, its images opened.

    Raises:
        DataChanged: the data have another question there.
        ValueError, OSError: as `opened`.
    """
    example = examples.get(row.item)
    if example is None or label(example.id) != row.id or digest(example) != row.digest:
        raise DataChanged(f"question {row.item} is not what was planned ({row.id!r}): the data changed meanwhile.")
    return opened(example)


def do_shard(
    shard: Shard,
    planned: pd.DataFrame,
    question: Callable[[Any], Example],
    work: Callable,
    seed: int,
    tick: Callable[[int], Any] = lambda n: None,
) -> None:
    """Runs the batches that the shard does not have yet, and adds each to the shard when it is complete.

    Args:
        question: function from a row of the plan to the opened question; raises ValueError or OSError if it cannot be opened.
        tick: called with the number of questions done.
    """
    before = set(shard.items)
    tick(len(before))
    for number, rows in planned.groupby("batch"):
        if int(rows["item"].iloc[0]) in before:
            continue
        one, batch = Shard([], [], []), {}
        for row in rows.itertuples():
            try:
                batch[row.item] = question(row)
            except DataChanged:
                raise
            except (ValueError, OSError) as error:
                one.failures.append(Failure(row.item, row.id, number, label(str(error))))
        if batch:
            _do_batch(one, int(number), batch, work, seed)
        for name in ("results", "failures", "composition"):
            getattr(shard, name).extend(getattr(one, name))
        shard.items.extend(rows["item"].tolist())
        tick(len(rows))


def _do_batch(shard: Shard, number: int, batch: Mapping[int, Example], work: Callable, seed: int) -> None:
    """Runs one batch; if it fails as a whole, runs its questions one at a time, so that each failure has its own reason."""
    items = list(batch)
    try:
        with seeded(seed, *items):
            rows = list(work(list(batch.values())))
    except ValueError as error:
        if len(batch) > 1:
            for item in items:
                _do_batch(shard, number, {item: batch[item]}, work, seed)
        else:
            shard.failures.append(Failure(items[0], batch[items[0]].id, number, label(str(error))))
            shard.composition.append(items)
        return
    shard.composition.append(items)
    places = {example.id: item for item, example in batch.items()}
    for row in rows:
        if not isinstance(row, Mapping) or row.get("id") not in places or any(name in row for name in RESERVED):
            raise TypeError(f"work must give rows (dicts) with the 'id' of a question of its batch and without {RESERVED}, got {row!r}.")
        shard.results.append((places[row["id"]], row["id"], number, row))


def opened(example: Example) -> Example:
    """The question with its images read from their files.

    Raises:
        ValueError, OSError: an image that cannot be read, or an invalid question (`problem_of`).
    """
    if problem := problem_of(example):
        raise ValueError(problem)
    if not example.images:
        return example
    from hooked_qwen2vl.processor import open_image

    return replace(example, images=tuple(open_image(image) for image in example.images))


@contextlib.contextmanager
def seeded(seed: int, *items: int) -> Iterator[None]:
    """Context in which random numbers depend only on the seed and these items; afterwards the generators are restored."""
    import torch

    number = int.from_bytes(hashlib.blake2b(repr((seed, items)).encode(), digest_size=4).digest(), "little")
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def read_shard(out: Path, shard: int, failed: bool = False) -> pa.Table:
    """A shard's rows, or with `failed` its questions that failed."""
    return _some(read_rows(shard_path(out, shard, ".parquet"))[0], failed)


def _some(table: pa.Table, failed: bool) -> pa.Table:
    """The rows of a table that failed, or the others; filtered in Arrow, because pandas makes integers with gaps floats."""
    return table.filter(pc.is_valid(table["error"]) if failed else pc.is_null(table["error"]))


def _written(out: Path, partial: bool) -> Iterator[tuple[int, pa.Table, list[list[int]]]]:
    """(shard, table, composition) of each written shard; with `partial` also of interrupted shards."""
    for shard in finished_shards(out, ".parquet", partial):
        yield shard, *read_rows(shard_path(out, shard, ".parquet"))
    if partial:
        manifest, plan = read_manifest(out), read_plan(out)
        for shard, planned in plan.groupby("part"):
            file = unfinished_path(out, shard, ".parquet")
            if file.exists() and not shard_path(out, shard, ".parquet").exists():
                check_unfinished(file, manifest, shard, planned)
                yield shard, *read_rows(file)


def _read(out: Path, partial: bool, failed: bool) -> pd.DataFrame:
    tables = [_some(table, failed) for _, table, _ in _written(out, partial)]
    if not tables:
        return pd.DataFrame({"item": [], "id": [], "batch": [], "error": []})
    table = pa.concat_tables(tables, promote_options="permissive").to_pandas()
    return table.sort_values("item", kind="stable", ignore_index=True)


# ---- the manifest -----------------------------------------------------------------------------


def _sees(model: Model) -> bool:
    """Whether the model takes questions with images: a HookedQwen2VL with a processor, not a text-only model."""
    return hasattr(getattr(model, "cfg", None), "vision") and model.processor is not None


def _fresh(examples: Data) -> Iterable[Example]:
    stream = examples() if callable(examples) else examples
    if not callable(examples) and iter(stream) is stream:
        raise ValueError(
            "the data are an iterator, which can be gone through only once: pass a list, or a function that gives a "
            "fresh iterator, such as lambda: examples('scenes', 5000)."
        )
    return stream


def _remembering(size: Sizer, sizes: dict[Size, int]) -> Sizer:
    def remember(example: Example) -> Any:
        found = size(example)
        if isinstance(found, Size):
            sizes[found] = sizes.get(found, 0) + 1
        return found

    return remember


def _check_rank(rank: tuple[int, int], text: str) -> None:
    if not 0 <= rank[0] < rank[1]:
        raise ValueError(f"expected a rank k/n with k in 0..n-1, such as 0/4, got {text}.")


def _as_json(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(manifest, default=_plain))


def _plain(value: Any) -> Any:
    """JSON values for paths, dtypes and NumPy numbers; other objects are refused, because their text may differ between runs."""
    if isinstance(value, (Path, np.dtype)):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    raise ValueError(f"a setting is {value!r}: expected what JSON knows (numbers, strings, lists, dicts), or a path.")


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that determine a run's numbers."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
