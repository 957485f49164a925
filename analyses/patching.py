"""Activation patching sweeps, exact and fast (Heimersheim & Nanda 2024; Zhang & Nanda 2024).

Three runs: clean, corrupted, and corrupted with one clean activation put in. `transformer_lens.patching` runs the
whole model for every cell; this gives the same numbers from a fraction of the arithmetic, because in a causal
decoder a patch at (layer l, position p) leaves layers before l and positions before p as they were:

1. Run the clean prompt and keep the activation that is swept; run the corrupted prompt once and keep the residual
   stream before every block and the rotated keys and values.
2. For a cell, start at block l from the corrupted stream at positions ≥ p, with the corrupted keys and values of the
   positions before p; a hook puts the clean activation in. Cells of one layer run as one batch.
3. Read only the metric's position: final norm and unembedding there, nowhere else. The tower never runs again.

Rows of the sweep are positions, or named spans (the image, an object's patches, the question, the last position).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.patching import PatchingResult
from transformer_lens.utilities import get_act_name

STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEADS = ("z", "q", "k", "v", "pattern")
Metric = Callable[[Float[Tensor, "batch 1 d_vocab"]], Tensor]
Positions = Sequence[int | str | tuple] | Mapping[str, Any] | None


@dataclass(frozen=True)
class _Cell:
    """One patch: where it goes, and where its number goes."""

    index: int
    positions: tuple[int, ...]
    head: int | None


@torch.no_grad()
def patch_sweep(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    activation: str = "resid_pre",
    layers: Sequence[int] | None = None,
    positions: Positions = None,
    heads: Sequence[int] | None = None,
    metric_position: int = -1,
    direction: Literal["denoise", "noise"] = "denoise",
    batch_size: int = 64,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Patches every (layer, position[, head]) cell and evaluates the metric.

    Args:
        clean, corrupted: `Inputs` of one shape and one padding, a batch of pairs row by row; for images, of one grid.
        metric: logits at the metric's position, [batch 1 d_vocab], to one number an example [batch] (or a scalar
            for one pair), such as `lambda logits: logits[:, -1, a] - logits[:, -1, b]`.
        activation: one of STREAMS, or of HEADS (then there is a head axis; keys and values have key-value heads;
            a pattern's position is the query's).
        layers, heads: which; None for all.
        positions: None for every position; or rows, each a position, a name that `Inputs.positions` knows, or a box in
            original pixels; or a mapping of labels to positions.
        direction: "denoise" puts clean activations into the corrupted run, "noise" the other way round.
        batch_size: prompts in one forward at most: bounds the memory.
        checkpoint: a file that holds what is done, so that an interrupted sweep goes on; the same call again
            continues, another sweep is refused.
    Returns:
        TransformerLens's PatchingResult: values [layer pos (head) batch], axes, index table, and the unpatched
        baseline [batch].
    Raises:
        ValueError: prompts that do not align, unknown names, or a checkpoint of another sweep.
    """
    if activation not in STREAMS + HEADS:
        raise ValueError(f"activation must be one of {', '.join(STREAMS + HEADS)}, got {activation!r}.")
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction must be 'denoise' or 'noise', got {direction!r}.")
    _check_aligned(clean, corrupted)
    source, target = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    source, target = model.encode(source), model.encode(target)
    layers = _chosen(layers, model.cfg.n_layers, "layer")
    rows = _rows(target, positions)
    head_list = _heads(model, activation, heads)
    at = range(target.shape[1])[metric_position]
    cells = [
        _Cell(i, tuple(places), head)
        for i, (places, head) in enumerate((places, head) for _, places in rows for head in head_list)
    ]
    live = [cell for cell in cells if min(cell.positions) <= at]  # a later patch does nothing to the metric
    base = _Base(model, source, target, activation, layers)
    n_rows = len(target)
    baseline = _evaluate(metric, base.logits(at), n_rows)[0]
    values = baseline.repeat(len(layers), len(cells), 1)
    record = _Record(checkpoint, values, layers, (activation, direction, at, [r for r, _ in rows], head_list), source, target)
    bar = tqdm(total=len(layers) * len(live), desc=f"patching {activation}", unit="cell", disable=not progress, delay=2)
    for number, layer in enumerate(layers):
        if record.done(number):
            bar.update(len(live))
            continue
        for group in _groups(live, max(1, batch_size // n_rows)):
            start = min(min(cell.positions) for cell in group)
            logits = base.patched(layer, group, start, at)
            values[number, [cell.index for cell in group]] = _evaluate(metric, logits, n_rows)
            bar.update(len(group))
        record.save(number)
    bar.close()
    return _result(values, baseline, layers, rows, head_list, activation)


class _Base:
    """What is computed once: the corrupted run's streams, keys and values, and the clean activations."""

    def __init__(self, model: Any, source: Any, target: Any, activation: str, layers: Sequence[int]):
        self.model, self.target, self.activation = model, target, activation
        every = range(min(layers), model.cfg.n_layers)
        names = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
        names += [f"blocks.{layer}.attn.{hook}" for layer in every for hook in ("hook_rot_k", "hook_v")]
        self.final, self.cache = model.run_with_cache(target, names_filter=names, stop_at_layer=model.cfg.n_layers)
        swept = [get_act_name(activation, layer) for layer in layers]
        _, self.clean = model.run_with_cache(source, names_filter=swept, stop_at_layer=model.cfg.n_layers)

    def logits(self, at: int) -> Float[Tensor, "batch 1 d_vocab"]:
        """Of the unpatched run."""
        return self.model.unembed(self.model.ln_final(self.final[:, at : at + 1]))

    def patched(self, layer: int, group: Sequence[_Cell], start: int, at: int) -> Float[Tensor, "cell_batch 1 d_vocab"]:
        """Of the patched runs of one layer, cell by cell, from position `start` on."""
        model, n = self.model, len(group)
        residual = self.cache[f"blocks.{layer}.hook_resid_pre"][:, start:].repeat(n, 1, 1)
        position_ids = self.target.position_ids[..., start:].repeat(1, n, 1)
        mask = self.target.attention_mask.repeat(n, 1)
        blocks = range(layer, model.cfg.n_layers)
        name = get_act_name(self.activation, layer)
        put = self._put(name, group, start)
        with model.hooks(fwd_hooks=[(name, put)]):
            residual = model._run_blocks(residual, blocks, position_ids, mask, self._past(layer, start, n))
        return model.unembed(model.ln_final(residual[:, at - start : at - start + 1]))

    def _put(self, name: str, group: Sequence[_Cell], start: int) -> Callable:
        clean, by_query = self.clean[name], self.activation == "pattern"

        def hook(activation: Tensor, hook: Any) -> Tensor:
            cells = activation.unflatten(0, (len(group), -1))
            for number, cell in enumerate(group):
                places = torch.tensor(cell.positions, device=activation.device)
                if by_query:
                    cells[number][:, cell.head, places - start] = clean[:, cell.head, places]
                elif cell.head is None:
                    cells[number][:, places - start] = clean[:, places]
                else:
                    cells[number][:, places - start, cell.head] = clean[:, places, cell.head]
            return activation

        return hook

    def _past(self, layer: int, start: int, n: int) -> TransformerLensKeyValueCache | None:
        """Corrupted keys and values before `start`, for every block from `layer` on."""
        if start == 0:
            return None
        entries = [
            TransformerLensKeyValueCacheEntry(
                self.cache[f"blocks.{l}.attn.hook_rot_k"][:, :start].repeat(n, 1, 1, 1),
                self.cache[f"blocks.{l}.attn.hook_v"][:, :start].repeat(n, 1, 1, 1),
                frozen=True,
            )
            if l >= layer
            else None
            for l in range(self.model.cfg.n_layers)
        ]
        return TransformerLensKeyValueCache(entries, self.target.attention_mask[:, :start], frozen=True)


class _Record:
    """What is done of a sweep, on disk; written whole or not at all."""

    def __init__(self, path: str | Path | None, values: Tensor, layers: Sequence[int], settings: tuple, *prompts: Any):
        self.path, self.values = None if path is None else Path(path), values
        self.finished = torch.zeros(len(layers), dtype=torch.bool)
        if self.path is None:
            return
        digest = hashlib.sha256(json.dumps([list(layers), *settings], default=str).encode())
        for prompt in prompts:
            digest.update(prompt.tokens.cpu().numpy().tobytes())
            digest.update(b"" if prompt.pixels is None else prompt.pixels.float().cpu().numpy().tobytes())
        self.key = torch.tensor(list(digest.digest()), dtype=torch.uint8)
        if self.path.exists():
            stored = load_file(self.path)
            if not torch.equal(stored["key"], self.key):
                raise ValueError(f"{self.path} holds another sweep: choose another file or delete it.")
            self.finished = stored["finished"]
            values.copy_(stored["values"])

    def done(self, number: int) -> bool:
        return bool(self.finished[number])

    def save(self, number: int) -> None:
        self.finished[number] = True
        if self.path is not None:
            partial = self.path.with_suffix(self.path.suffix + ".partial")
            save_file({"values": self.values, "finished": self.finished, "key": self.key}, partial)
            partial.replace(self.path)


def recovery(result: PatchingResult, clean_metric: Tensor, epsilon: float = 1e-3) -> dict[str, Any]:
    """(patched − baseline) / (clean − baseline), per example, and its two averages.

    Args:
        result: a sweep with its baseline. clean_metric: [batch] of the clean run.
        epsilon: pairs whose clean and corrupted metrics differ by less are skipped and counted.
    Returns:
        `per_example` [… batch] (NaN where skipped), `mean_of_ratios`, `ratio_of_means`, `skipped`.
    """
    gap = clean_metric.to(result.values) - result.baseline
    kept = gap.abs() >= epsilon
    effect = result.values - result.baseline
    ratios = torch.where(kept, effect / gap, float("nan"))
    return {
        "per_example": ratios,
        "mean_of_ratios": ratios.nanmean(-1),
        "ratio_of_means": effect[..., kept].mean(-1) / gap[kept].mean(),
        "skipped": int((~kept).sum()),
    }


def _check_aligned(clean: Any, corrupted: Any) -> None:
    if clean.shape != corrupted.shape or not torch.equal(clean.attention_mask, corrupted.attention_mask):
        raise ValueError(f"expected prompts of one shape and padding, got {clean!r} and {corrupted!r}.")
    if not torch.equal(clean.position_ids, corrupted.position_ids):
        raise ValueError("the prompts' images differ in grid or place, so their positions do not correspond.")


def _chosen(wanted: Sequence[int] | None, n: int, what: str) -> list[int]:
    every = list(range(n))
    try:
        return every if wanted is None else [every[i] for i in wanted]
    except IndexError as error:
        raise ValueError(f"there is no such {what} in {list(wanted)}: the model has 0..{n - 1}.") from error


def _heads(model: Any, activation: str, heads: Sequence[int] | None) -> list[int | None]:
    if activation in STREAMS:
        if heads is not None:
            raise ValueError(f"{activation} has no heads: leave heads=None, or sweep one of {', '.join(HEADS)}.")
        return [None]
    n = model.cfg.n_key_value_heads if activation in ("k", "v") else model.cfg.n_heads
    return _chosen(heads, n, "head")


def _rows(inputs: Any, positions: Positions) -> list[tuple[Any, list[int]]]:
    """(label, positions) of every row of the sweep."""
    n = inputs.shape[1]
    if positions is None:
        return [(place, [place]) for place in range(n)]
    named = positions.items() if isinstance(positions, Mapping) else [(p, p) for p in positions]
    return [(label, _places(inputs, place, n)) for label, place in named]


def _places(inputs: Any, place: Any, n: int) -> list[int]:
    if isinstance(place, int):
        return [range(n)[place]]
    if isinstance(place, Tensor):
        return place.tolist()
    if isinstance(place, (list, range)):
        return list(place)
    found = [inputs.positions(place, row).tolist() for row in range(len(inputs))]
    if any(row != found[0] for row in found):
        raise ValueError(f"{place!r} is at other positions in other rows: sweep those pairs apart.")
    return found[0]


def _groups(cells: Sequence[_Cell], size: int) -> Iterator[list[_Cell]]:
    """Batches of cells that start at like positions, so that little is computed in vain."""
    ordered = sorted(cells, key=lambda cell: min(cell.positions))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


def _evaluate(metric: Metric, logits: Float[Tensor, "cell_batch 1 d_vocab"], n_rows: int) -> Float[Tensor, "cell batch"]:
    values = [torch.as_tensor(metric(cell)).detach().float().cpu() for cell in logits.split(n_rows)]
    for value in values:
        if value.numel() != n_rows or value.ndim > 1:
            raise ValueError(
                f"the metric must give one number for each of {n_rows} examples, got shape {tuple(value.shape)}: index "
                f"logits[:, -1, token]."
            )
    return torch.stack([value.reshape(n_rows) for value in values])


def _result(values, baseline, layers, rows, heads, activation) -> PatchingResult:
    has_heads = activation in HEADS
    shape = (len(layers), len(rows), len(heads)) if has_heads else (len(layers), len(rows))
    table = pd.DataFrame(
        [(layer, label, head) for layer in layers for label, _ in rows for head in heads],
        columns=["layer", "pos", "head_index"],
    )
    return PatchingResult(
        values=values.reshape(*shape, -1),
        axis_names=["layer", "pos", "head_index"] if has_heads else ["layer", "pos"],
        index_df=table if has_heads else table.drop(columns="head_index"),
        metric_names=["metric"],
        reduced=False,
        baseline=baseline,
    )
