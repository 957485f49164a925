"""Activations of a whole data set on disk, one row per position, for sparse autoencoders and probes.

A store is written by a run (see `runs`), which can be killed at any moment, resumed, and shared between processes. Each shard
is one safetensors file:

    <hook name>     [row, …]   the activation, without padding; the plan has the composition of the batches
    item            [row]      index of the question in the data (see `ActivationStore.items`)
    position        [row]      of the token in its prompt, from 0, not counting padding
    token           [row]      token id
    is_image        [row]      whether the token is an image or video token
    mrope           [row 3]    M-RoPE position (t, row, col)

Shuffled reading: shards are read in random order into a pool; the pool is shuffled, half of it is returned as batches, and more
shards are read. Each row comes exactly once per pass, the seed determines the order, and memory holds the pool and one shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from analyses.runs.engine import Data, Run, Shard, prepare, refreshed, work_on
from analyses.runs.files import about_checksum, belonging, finished_shards, opening, read_manifest, read_plan, shard_path, tensor_checksum
from analyses.runs.plan import size_by_model
from hooked_qwen2vl.image_embeddings import CAPACITY, ImageEmbeddingsCache
from hooked_qwen2vl.moved import renamed_arguments
from hooked_qwen2vl.protocols import Model
from hooked_qwen2vl.segments import is_segment_name

SUFFIX = ".safetensors"
LABELS = ("item", "position", "token", "is_image", "mrope")
NOT_ROWS = ("hook_attn_scores", "hook_pattern")
Which = Literal["all", "image", "text"]


@renamed_arguments
def store_activations(
    model: Model,
    examples: Data,
    names: str | Sequence[str],
    out: str | Path,
    keep: str = "all",
    dtype: torch.dtype | str | None = None,
    answers: bool = False,
    *,
    batch_size: int = 8,
    rank: tuple[int, int] | None = None,
    dry_run: bool = False,
    progress: bool = True,
    batches_per_shard: int = 16,
    window: int = 1024,
) -> Run:
    """Runs the model over the data and stores activations of every position.

    Args:
        examples: as for `runs.run`.
        names: hook points of the text side (`blocks.5.hook_resid_post`), but not scores or patterns.
        keep: "all" positions, or those of a segment of the prompt: "image", "text", "question", "last", … (names of
            `Inputs.positions`); a prompt without that segment has no rows.
        dtype: on disk; None: the model's, without rounding.
        answers: whether the questions' answers are part of the prompt (teacher-forced).
        The other arguments are those of `runs.run`.
    Raises:
        ValueError: no such hook point, one without an activation per position, or as `runs.run`.
    """
    names = [names] if isinstance(names, str) else list(names)
    _check_names(model, names)
    if keep not in ("all", "text") and not is_segment_name(keep):
        raise ValueError(f"keep must be 'all' or a segment of the prompt ('image', 'text', 'question', 'last', …), got {keep!r}.")
    stored = model.cfg.dtype if dtype is None else _as_dtype(dtype)
    settings = {
        "names": names, "keep": keep, "dtype": str(stored).removeprefix("torch."), "answers": answers,
        "batch_size": batch_size, "batches_per_shard": batches_per_shard, "window": window,
    }  # fmt: skip
    state = prepare("activations", examples, out, settings, model, size_by_model(model), rank=rank, suffix=SUFFIX, embeddings=CAPACITY)
    if dry_run:
        return state
    embeddings = ImageEmbeddingsCache(model)

    @torch.no_grad()
    def work(batch: list) -> Iterator[dict[str, Any]]:
        texts = [example.answer or None for example in batch] if answers else None
        inputs = model.to_inputs([e.question for e in batch], images=[list(e.images) for e in batch], answers=texts)
        inputs = embeddings(inputs)
        _, cache = model.run_with_cache(inputs, names_filter=names, return_type=None)
        for row, example in enumerate(batch):
            yield {"id": example.id, "tensors": _rows_of(cache, inputs, row, names, keep, stored)}

    work_on(state, examples, work, _write_tensors, progress)
    return refreshed(state)


class ActivationStore:
    """Activations in a folder that `store_activations` wrote.

    Attributes:
        folder: its path.
        names: hook points of the activations.
        items: one row per question: item, id, domain, category, answer, …, for example as labels for probes.
        n_rows: number of stored positions.
        failures: questions that failed, with the reason.
    """

    def __init__(self, folder: str | Path, partial: bool = False):
        """Opens a store; activations are not read yet.

        Raises:
            ValueError: no store there, or one that is not finished (unless `partial`).
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if self.manifest["name"] != "activations":
            raise ValueError(f"{folder} holds a run of {self.manifest['name']!r}, not an activation store.")
        self._shards = finished_shards(self.folder, SUFFIX, partial)
        self.names: list[str] = self.manifest["settings"]["names"]
        self.items = read_plan(self.folder).sort_values("item", ignore_index=True)
        self.n_rows, self.failures = self._count()

    def _count(self) -> tuple[int, pd.DataFrame]:
        n_rows, failures = 0, []
        for shard in self._shards:
            tensors, about = _read_tensors(shard_path(self.folder, shard, SUFFIX), ["item"])
            n_rows += len(tensors["item"])
            failures += json.loads(about["failures"])
        return n_rows, pd.DataFrame(failures, columns=["item", "id", "batch", "error"])

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        return f"ActivationStore({self.folder}, {self.n_rows} rows of {', '.join(self.names)})"

    def question(self, id: str) -> dict[str, Tensor]:
        """Activations and labels of one question, in the order of its positions.

        Raises:
            ValueError: no such question, or one that failed.
        """
        found = self.items[self.items["id"] == id]
        if found.empty or int(found["part"].iloc[0]) not in self._shards:
            raise ValueError(f"the store has no question {id!r}.")
        why = self.failures["error"][self.failures["id"] == id]
        if len(why):
            raise ValueError(f"the question {id!r} gave no activation: {why.iloc[0]}")
        shard = self._read(int(found["part"].iloc[0]), self.names)
        rows = shard["item"] == int(found["item"].iloc[0])
        return {name: values[rows] for name, values in shard.items()}

    def batches(
        self,
        batch_size: int,
        names: str | Sequence[str] | None = None,
        seed: int | None = 0,
        which: Which = "all",
        pool: int = 1 << 16,
        drop_last: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """One pass over the rows in batches: name -> [batch …], for activations and labels.

        Args:
            names: activations to read; None: all.
            seed: of the order; use another one for each epoch. None: the order of the shards.
            which: rows of image tokens, of text tokens, or all.
            pool: number of rows that are shuffled together; memory holds them and one shard.
            drop_last: leave out an incomplete last batch.
        Raises:
            ValueError: (when called, before the first batch) an unknown name, or a size below 1.
        """
        names = self.names if names is None else [names] if isinstance(names, str) else list(names)
        unknown = [name for name in names if name not in self.names]
        if unknown or which not in ("all", "image", "text") or batch_size < 1 or pool < 1:
            raise ValueError(
                f"expected names among {self.names}, which='all', 'image' or 'text', and batch_size and pool of at least 1; "
                f"got {unknown or names}, {which!r}, {batch_size} and {pool}."
            )
        return self._batches(batch_size, names, seed, which, pool, drop_last)

    def _batches(
        self, batch_size: int, names: Sequence[str], seed: int | None, which: Which, pool: int, drop_last: bool
    ) -> Iterator[dict[str, Tensor]]:
        draw = None if seed is None else np.random.default_rng(seed)
        left = list(self._shards) if draw is None else draw.permutation(self._shards).tolist()
        held: dict[str, Tensor] = {}
        while True:
            while left and _length(held) < max(pool, batch_size):
                held = _joined(held, self._chosen(left.pop(0), names, which))
            n = _length(held)
            if not n:
                return
            if draw is not None:
                order = torch.from_numpy(draw.permutation(n))
                held = {name: values[order] for name, values in held.items()}
            # Return half of the pool in whole batches; shuffle the rest with what is read next. At the end, return all.
            out = max(n // 2, batch_size) // batch_size * batch_size if left else n
            for start in range(0, out, batch_size):
                batch = {name: values[start : min(start + batch_size, out)].clone() for name, values in held.items()}
                if _length(batch) == batch_size or not drop_last:
                    yield batch
            held = {name: values[out:] for name, values in held.items()}

    def _chosen(self, shard: int, names: Sequence[str], which: Which) -> dict[str, Tensor]:
        values = self._read(shard, names)
        if which == "all" or not values:
            return values
        rows = values["is_image"] == (which == "image")
        return {name: value[rows] for name, value in values.items()}

    def _read(self, shard: int, names: Sequence[str]) -> dict[str, Tensor]:
        """A shard's rows; empty if none of its questions has rows."""
        file = shard_path(self.folder, shard, SUFFIX)
        some = len(_read_tensors(file, ["item"])[0]["item"])
        return _read_tensors(file, (*names, *LABELS))[0] if some else {}


# ---- writing ----------------------------------------------------------------------------------


def _rows_of(cache: Mapping[str, Tensor], inputs: Any, row: int, names: Sequence[str], keep: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The chosen positions of one prompt."""
    seen = inputs.attention_mask[row].bool()
    if keep == "all":
        places = seen.nonzero()[:, 0]
    elif keep in ("image", "text"):
        places = (seen & ((inputs.token_types[row] > 0) == (keep == "image"))).nonzero()[:, 0]
    elif inputs.has_segment(keep, row):
        places = inputs.resolve(keep, row).to(seen.device)
    else:
        places = torch.zeros(0, dtype=torch.long, device=seen.device)
    first = int(seen.long().argmax())
    labels = {
        "position": (places - first).int(),
        "token": inputs.tokens[row, places].int(),
        "is_image": inputs.token_types[row, places] > 0,
        "mrope": inputs.position_ids[:, row, places].T.int(),
    }
    values = {name: cache[name][row][places.to(cache[name].device)].to(dtype) for name in names}
    return {name: value.cpu() for name, value in {**labels, **values}.items()}


def _write_tensors(state: Run, number: int, shard: Shard, file: Path) -> None:
    """Writes a shard as safetensors, with the questions in the order of the data."""
    rows = [{**row["tensors"], "item": torch.full((len(row["tensors"]["token"]),), item)} for item, _, _, row in shard.results]
    failures, composition = [vars(failure) for failure in shard.failures], shard.composition
    if shard.earlier is not None:
        before, about = _read_tensors(shard.earlier)
        rows = [before, *rows] if len(before["item"]) else rows
        failures, composition = json.loads(about["failures"]) + failures, json.loads(about["composition"]) + composition
    tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]} if rows else {"item": torch.zeros(0, dtype=torch.long)}
    order = tensors["item"].argsort(stable=True)
    tensors = {name: value[order].contiguous() for name, value in tensors.items()}
    header = {"failures": json.dumps(failures), "composition": json.dumps(composition), **belonging(state.manifest, number, shard.items)}
    header["checksums"] = json.dumps({name: tensor_checksum(value) for name, value in tensors.items()})
    save_file(tensors, file, header | {"checksum": about_checksum(header)})


def _read_tensors(file: Path, names: Sequence[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header of the file); names None: all tensors.

    Raises:
        ValueError: a damaged file.
    """
    with opening(file), safe_open(file, framework="pt") as opened:
        about = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in (opened.keys() if names is None else names)}
        sums = json.loads(about["checksums"]) if "run" in about else {}
        if sums and about_checksum(about) != about["checksum"]:
            raise ValueError("its header is not what was written: the checksum differs")
        if wrong := [name for name, value in tensors.items() if sums and sums[name] != tensor_checksum(value)]:
            raise ValueError(f"{wrong[0]} is not what was written: the checksum differs")
    return tensors, about


def _check_names(model: Model, names: Sequence[str]) -> None:
    if not names:
        raise ValueError("expected at least one hook name, such as 'blocks.5.hook_resid_post'.")
    unknown = [name for name in names if name not in model.hook_dict]
    if unknown:
        raise ValueError(f"no hook point is called {', '.join(map(repr, unknown))}; model.hook_dict lists them all.")
    wrong = [name for name in names if name.startswith("vision_") or name.endswith(NOT_ROWS)]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: expected activations of the text side with one row per position; image embeddings are in "
            f"'hook_embed', at the positions of the image tokens."
        )


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"unknown dtype {dtype!r}: expected 'float32', 'bfloat16', 'float16', or None for the model's own.")
    return found


def _length(held: Mapping[str, Tensor]) -> int:
    return len(held["item"]) if held else 0


def _joined(held: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not held or not more:
        return dict(held or more)
    return {name: torch.cat((values, more[name])) for name, values in held.items()}
