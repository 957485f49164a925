"""Activation patching sweeps, exact and fast (Heimersheim & Nanda 2024; Zhang & Nanda 2024).

Three runs: clean, corrupted, and corrupted with one clean activation patched in. `transformer_lens.patching` runs the
whole model for every cell. This gives the same numbers with a fraction of the computation, because in a causal
decoder a patch at (layer l, position p) changes nothing in layers before l or at positions before p:

1. Run the clean prompt and keep the activation to patch; run the corrupted prompt once and keep the residual
   stream before every block, the rotated keys and the values.
2. For a cell, start at block l from the corrupted stream at positions ≥ p, with the corrupted keys and values of the
   positions before p; a hook patches the clean activation in. Cells of one layer run in batches (`patched_runs`).
3. Apply the final norm and the unembedding at the metric's position only. The vision tower does not run again, unless its
   own activations are patched; then it starts at the patched block.

Rows of the sweep are positions, or named spans (the image, an object's patches, the question, the last position).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.patching import PatchingResult

from analyses.common.models import describe_model
from analyses.patched_runs import TOWER, Cell, DecoderRuns, TowerRuns
from hooked_qwen2vl.files import whole_file
from hooked_qwen2vl.geometry import Place, refuse_unaligned
from hooked_qwen2vl.protocols import Model

STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEADS = ("z", "q", "k", "v", "pattern")
Metric = Callable[[Float[Tensor, "batch 1 d_vocab"]], Tensor]
Positions = Sequence[Place] | Mapping[str, Place] | Place | None


@dataclass
class Sweep(PatchingResult):
    """TransformerLens's `PatchingResult`, with the direction and the second unpatched metric that `recovery` needs.

    Attributes:
        direction: "denoise" or "noise".
        source_metric: [batch] metric of the unpatched run that activations are taken from; `baseline` is the metric of the
            unpatched run that they are patched into.
    """

    direction: str = "denoise"
    source_metric: Float[Tensor, "batch"] | None = None


@dataclass(frozen=True)
class _Plan:
    """What a sweep patches: its axes, and the cells on them."""

    activation: str
    tower: bool
    layers: list[int]
    rows: list[tuple[Any, list[int]]]  # label, positions
    heads: Sequence[int | None]
    at: int

    @property
    def cells(self) -> list[Cell]:
        pairs = [(places, head) for _, places in self.rows for head in self.heads]
        return [Cell(i, tuple(places), head) for i, (places, head) in enumerate(pairs)]

    def result(self, values: Float[Tensor, "layer cell batch"], baselines: Float[Tensor, "2 batch"], direction: str) -> Sweep:
        """The values as a `Sweep`, with the cells on their axes.

        Args:
            baselines: the metric of the two unpatched runs: first the one patched into, then the one that activations come from.
        """
        has_heads = self.heads != [None]
        names = ["layer", "pos", "head_index"] if has_heads else ["layer", "pos"]
        sizes = [len(self.layers), len(self.rows), len(self.heads)][: len(names)]
        table = pd.DataFrame(
            [(layer, label, head) for layer in self.layers for label, _ in self.rows for head in self.heads],
            columns=["layer", "pos", "head_index"],
        )
        return Sweep(
            values=values.reshape(*sizes, -1),
            axis_names=names,
            index_df=table[names],
            metric_names=["metric"],
            reduced=False,
            baseline=baselines[0],
            direction=direction,
            source_metric=baselines[1],
        )


@torch.no_grad()
def patch_sweep(
    model: Model,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    activation: str = "resid_pre",
    layers: Sequence[int] | None = None,
    positions: Positions = None,
    heads: Sequence[int] | None = None,
    metric_position: int = -1,
    direction: Literal["denoise", "noise"] = "denoise",
    batch_size: int = 16,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Sweep:
    """Patches each (layer, position[, head]) cell by itself and evaluates the metric.

    Args:
        clean, corrupted: `Inputs` with the same shape, padding and image grids; row i of one is paired with row i of the other.
        metric: logits at the metric's position, [batch 1 d_vocab], to one number an example [batch] (or a scalar
            for one pair), such as `lambda logits: logits[:, -1, a] - logits[:, -1, b]`.
        activation: one of STREAMS, or one of HEADS, which adds a head axis (keys and values have key-value heads; the
            position of a pattern is the query's). With the prefix "vision_encoder." it is the tower's: layers and heads are
            then the tower's, and a position is an image token with all of its patches (for a pattern, the queries).
        layers, heads: which ones; None for all.
        positions: None for every position (in the tower: every image token). Otherwise places (see `Inputs.resolve`): a list
            of them, a single name or box, or a mapping of labels to places, where each place is one row of the sweep; or a
            slice, tensor or mask of positions, where each position is one row.
        metric_position: the one position whose logits the metric gets, the same in every row of the batch.
        direction: "denoise" patches clean activations into the corrupted run, "noise" the other way round.
        batch_size: largest number of prompts in one forward; it bounds the memory. All cells of one forward start at the
            earliest position of any of them, so a large batch recomputes more positions than it needs.
        checkpoint: a file of the finished layers: the same call continues an interrupted sweep. A file of another sweep is
            refused: other prompts, cells or weights, or a metric with other values on the two unpatched runs.
    Memory: positions × ((streams + activations swept) × width + layers × 2 key-value heads × d_head) numbers for the two runs,
        and the activations of one forward of `batch_size` prompts, keys included.
    Returns:
        TransformerLens's PatchingResult: values [layer pos (head) batch], axis names, an index table, and the metric of the
        two unpatched runs, `baseline` and `source_metric` [batch].
    Raises:
        ValueError: prompts that do not align, unknown names, or a checkpoint that is damaged or of another sweep.
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction must be 'denoise' or 'noise', got {direction!r}.")
    refuse_unaligned(clean, corrupted, "the clean and the corrupted prompts")
    source, target = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    plan = _plan(model, target, activation, layers, positions, heads, metric_position)
    runs = (TowerRuns if plan.tower else DecoderRuns)(model, source, target, plan.activation, plan.layers)
    n_rows, cells = len(target), plan.cells
    live = [cell for cell in cells if runs.reaches(cell, plan.at)]
    baselines = torch.cat([_evaluate(metric, logits, n_rows) for logits in (runs.logits(plan.at), runs.source_logits(plan.at))])
    values = baselines[0].repeat(len(plan.layers), len(cells), 1)
    record = _Record(checkpoint, values, baselines, _key(model, plan, direction, source, target) if checkpoint else "")
    bar = tqdm(total=len(plan.layers) * len(live), desc=f"patching {activation}", unit="cell", disable=not progress, delay=2)
    for number, layer in enumerate(plan.layers):
        for group in [] if record.done(number) else _groups(live, max(1, batch_size // n_rows)):
            logits = runs.patched(layer, group, plan.at)
            values[number, [cell.index for cell in group]] = _evaluate(metric, logits, n_rows)
            bar.update(len(group))
        record.save(number)
    bar.close()
    return plan.result(values, baselines, direction)


def _key(model: Model, plan: _Plan, direction: str, *prompts: Any) -> str:
    """A digest of the sweep's cells, prompts and weights, which tells it from other sweeps."""
    digest = hashlib.sha256(json.dumps([vars(plan), direction, describe_model(model)], default=str).encode())
    for prompt in prompts:
        digest.update(prompt.tokens.cpu().numpy().tobytes())
        digest.update(b"" if prompt.pixels is None else prompt.pixels.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class _Record:
    """The checkpoint file: the values of the finished layers. A write replaces the file as a whole or leaves it as it was.

    Raises:
        ValueError: the file is damaged, or holds another sweep.
    """

    def __init__(self, path: str | Path | None, values: Tensor, baselines: Tensor, key: str):
        self.path, self.values, self.baselines, self.key = None if path is None else Path(path), values, baselines, key
        self.finished = torch.zeros(len(values), dtype=torch.bool)
        if self.path is not None and self.path.exists():
            self._go_on()

    def _go_on(self) -> None:
        try:
            with safe_open(self.path, framework="pt") as file:
                key = (file.metadata() or {}).get("key")
                stored = {name: file.get_tensor(name) for name in ("values", "finished", "baselines")}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path} is no whole record of a sweep ({error}): delete it to begin anew.") from error
        if key != self.key:
            raise ValueError(f"{self.path} holds another sweep (other cells, prompts or weights): choose another file or delete it.")
        if not torch.allclose(stored["baselines"], self.baselines, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"{self.path} holds a sweep with another metric: on the two unpatched runs it was {stored['baselines'].tolist()}, now "
                f"it is {self.baselines.tolist()}. Choose another file or delete it."
            )
        self.finished = stored["finished"]
        self.values.copy_(stored["values"])

    def done(self, number: int) -> bool:
        return bool(self.finished[number])

    def save(self, number: int) -> None:
        self.finished[number] = True
        if self.path is not None:
            with whole_file(self.path) as file:
                save_file({"values": self.values, "finished": self.finished, "baselines": self.baselines}, file, {"key": self.key})


def recovery(result: PatchingResult, clean_metric: Tensor | None = None, epsilon: float = 1e-3) -> dict[str, Any]:
    """(patched − corrupted) / (clean − corrupted) for each example, and two averages: 1 is the clean run, 0 the corrupted one.

    A patch without effect therefore gives 0 in a "denoise" sweep and 1 in a "noise" sweep.

    Args:
        result: of `patch_sweep`, which has both unpatched metrics; or a result of TransformerLens's own functions, with clean
            activations patched into the corrupted run and its baseline, which also needs `clean_metric`.
        clean_metric: [batch] metric of the clean run.
        epsilon: examples whose clean and corrupted metrics differ by less are skipped and counted.
    Returns:
        `per_example` [… batch] (NaN where skipped), `mean_of_ratios`, `ratio_of_means`, `skipped`.
    Raises:
        ValueError: no baseline, no clean metric, or not that of this sweep's clean run.
    """
    clean, corrupted = _clean_and_corrupted(result, clean_metric)
    gap = clean - corrupted
    kept = gap.abs() >= epsilon
    effect = result.values - corrupted
    ratios = torch.where(kept, effect / gap, float("nan"))
    return {
        "per_example": ratios,
        "mean_of_ratios": ratios.nanmean(-1),
        "ratio_of_means": effect[..., kept].mean(-1) / gap[kept].mean(),
        "skipped": int((~kept).sum()),
    }


def _clean_and_corrupted(result: PatchingResult, clean_metric: Tensor | None) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """The metric of the clean and of the corrupted run, unpatched."""
    given = None if clean_metric is None else torch.as_tensor(clean_metric).to(result.values).reshape(-1)
    if isinstance(result, Sweep):
        ends: Any = (result.source_metric, result.baseline)
        clean, corrupted = ends[:: 1 if result.direction == "denoise" else -1]
        if given is not None and (given.shape != clean.shape or not torch.allclose(given, clean, rtol=1e-2, atol=1e-3)):
            raise ValueError(
                f"clean_metric is {given.tolist()}, but on this sweep's clean run the metric was {clean.tolist()}: leave it out."
            )
        return clean, corrupted
    if result.baseline is None or given is None:
        raise ValueError("TransformerLens's result needs its baseline (baseline=True) and clean_metric=, the clean run's metric.")
    return given, result.baseline


def _plan(model: Model, inputs: Any, activation: str, layers: Any, positions: Positions, heads: Any, metric_position: int) -> _Plan:
    tower = activation.startswith(TOWER)
    kind = activation.removeprefix(TOWER)
    if kind not in STREAMS + HEADS:
        known = ", ".join(STREAMS + HEADS)
        raise ValueError(f"activation must be one of {known}, or {TOWER} and one of them, got {activation!r}.")
    half = model.cfg.vision if tower else model.cfg
    return _Plan(
        activation=kind,
        tower=tower,
        layers=_chosen(layers, half.n_layers, "layer"),
        rows=_image_rows(inputs, positions) if tower else _rows(inputs, positions),
        heads=_heads(model, kind, heads, tower),
        at=_one_position(inputs, metric_position),
    )


def _chosen(wanted: Sequence[int] | None, n: int, what: str) -> list[int]:
    every = list(range(n))
    try:
        return every if wanted is None else [every[i] for i in wanted]
    except IndexError as error:
        raise ValueError(f"there is no such {what} in {list(wanted or ())}: the model has 0..{n - 1}.") from error


def _heads(model: Model, kind: str, heads: Sequence[int] | None, tower: bool) -> Sequence[int | None]:
    if kind in STREAMS:
        if heads is not None:
            raise ValueError(f"{kind} has no heads: leave heads=None, or sweep one of {', '.join(HEADS)}.")
        return [None]
    n = model.cfg.n_key_value_heads if kind in ("k", "v") else model.cfg.n_heads
    return _chosen(heads, model.cfg.vision.n_heads if tower else n, "head")


def _rows(inputs: Any, positions: Positions) -> list[tuple[Any, list[int]]]:
    """(label, positions) of every row of the sweep."""
    if positions is None:
        return [(place, [place]) for place in range(inputs.shape[1])]
    if isinstance(positions, (slice, Tensor, np.ndarray)):
        positions = _in_every_row(inputs, positions)
    elif isinstance(positions, (str, int, tuple)):
        positions = cast(Any, [positions])
    named = positions.items() if isinstance(positions, Mapping) else [(place, place) for place in cast(Any, positions)]
    rows = [(label, _in_every_row(inputs, place)) for label, place in named]
    if not rows:
        raise ValueError("there is no position to patch: leave positions=None for all, or name some.")
    return rows


def _image_rows(inputs: Any, positions: Positions) -> list[tuple[Any, list[int]]]:
    """As `_rows`, for the tower: positions must be image tokens in every row of the batch."""
    everywhere = (inputs.token_types > 0).all(0).cpu()
    rows = _rows(inputs, everywhere.nonzero().flatten().tolist() if positions is None else positions)
    for label, places in rows:
        if not everywhere[places].all():
            raise ValueError(f"{label!r} is not made of image tokens in every prompt: the tower has nothing else.")
    return rows


def _in_every_row(inputs: Any, place: Place) -> list[int]:
    """The positions of a place, which must be the same in every row."""
    found = [inputs.resolve(place, row).tolist() for row in range(len(inputs))]
    if any(row != found[0] for row in found):
        raise ValueError(f"{place!r} is at other positions in other rows: sweep those pairs apart.")
    return found[0]


def _one_position(inputs: Any, place: Place) -> int:
    found = _in_every_row(inputs, place)
    if len(found) != 1:
        raise ValueError(f"the metric reads one position, but metric_position={place!r} covers {len(found)}.")
    return found[0]


def _groups(cells: Sequence[Cell], size: int) -> Iterator[list[Cell]]:
    """Batches of cells sorted by their first position, so that a batch recomputes few positions it does not need."""
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
