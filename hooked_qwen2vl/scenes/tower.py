"""The first stage of training: the vision tower learns to see, cell by cell, before any question is asked.

Linear heads on the image tokens tell what is in each cell (kind, colour, which part of the object, where it
faces, the background). They are thrown away afterwards and share nothing with the word embeddings, so that
what a lens reads off an image token later is not something it was trained to say there. Without this stage
two CPU cores need hours before questions about shapes rise above guessing.
"""

from __future__ import annotations

import time
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .batches import MERGE, patchify
from .domains import DOMAINS
from .drawing import draw
from .scene import Scene
from .words import BACKGROUNDS, COLORS, DIGITS, DIRECTIONS, LETTERS, ORIENTATIONS, PATTERNS, SHAPES
from .world import make_scene, pick_grid

_NOTHING = "nothing"
_PARTS = ("whole", "top left", "top right", "bottom left", "bottom right", "end", "top", "along")
LABELS: dict[str, tuple[str, ...]] = {
    "kind": (_NOTHING, *SHAPES, *LETTERS, *DIGITS, *PATTERNS, "bar", "arrow", "path"),
    "color": (_NOTHING, *COLORS),
    "part": (_NOTHING, *_PARTS),
    "facing": (_NOTHING, *ORIENTATIONS, *DIRECTIONS),
    "background": BACKGROUNDS,
}


def cell_labels(scene: Scene) -> np.ndarray:
    """[cell head] class of each cell (raster order) under each of `LABELS`."""
    labels = np.zeros((scene.rows, scene.cols, len(LABELS)), dtype=np.int64)
    labels[..., -1] = BACKGROUNDS.index(scene.background)
    for thing in scene.things:
        for row, col in thing.cells:
            labels[row, col, :-1] = [
                LABELS["kind"].index(thing.kind),
                LABELS["color"].index(thing.color),
                LABELS["part"].index(_part(thing, row, col)),
                LABELS["facing"].index(_facing(thing, row, col)),
            ]
    return labels.reshape(-1, len(LABELS))


def _part(thing, row: int, col: int) -> str:
    if thing.kind == "bar":
        return "top" if row == thing.row else "along"
    if thing.kind == "path":
        return "end" if (row, col) == thing.path[-1] else "along"
    if thing.size == "small":
        return "whole"
    return f"{'top' if row == thing.row else 'bottom'} {'left' if col == thing.col else 'right'}"


def _facing(thing, row: int, col: int) -> str:
    if thing.kind == "path" and (row, col) != thing.path[-1]:
        return _NOTHING
    return thing.facing or _NOTHING


def teach_tower(model, seed: int, minutes: float, lr: float = 1e-3, images: int = 30) -> tuple[float, int]:
    """Trains the vision tower and projector on cell labels; returns (running accuracy of kinds, steps)."""
    device = model.device
    rng = Random(f"tower {seed}")
    heads = nn.ModuleList(nn.Linear(model.config.text_config.hidden_size, len(v)) for v in LABELS.values()).to(device)
    visual = model.model.visual
    optimizer = torch.optim.AdamW([*visual.parameters(), *heads.parameters()], lr=lr, weight_decay=0.02, fused=True)
    began, step, running = time.monotonic(), 0, 0.0
    bar = tqdm(total=round(60 * minutes), unit="s", desc="seeing", mininterval=10)
    while (seconds := time.monotonic() - began) < 60 * minutes:
        rate = lr * min(1, (step + 1) / 50) * min(1, 2 * (1 - seconds / (60 * minutes)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows, cols = pick_grid(rng)
        names = list(DOMAINS)
        scenes = [make_scene(rng, names[i % len(names)], "train", (rows, cols)) for i in range(images)]
        pixels = torch.from_numpy(patchify(np.stack([draw(scene) for scene in scenes]))).to(device)
        grid = torch.tensor([[1, MERGE * rows, MERGE * cols]] * images, device=device)
        labels = torch.from_numpy(np.concatenate([cell_labels(scene) for scene in scenes])).to(device)
        tokens = visual(pixels, grid_thw=grid).pooler_output.view(len(labels), -1)
        filled = labels[:, 0] > 0
        weight = torch.where(filled, 1.0, 0.15)
        losses = [F.cross_entropy(head(tokens), labels[:, k], reduction="none") for k, head in enumerate(heads)]
        loss = (sum(losses) * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            right = (heads[0](tokens[filled]).argmax(-1) == labels[filled, 0]).float().mean().item()
        running += (0.5 if step < 5 else 0.05) * (right - running)
        step += 1
        bar.update(round(time.monotonic() - began) - bar.n)
        bar.set_postfix_str(f"step {step} loss {loss.item():.3f} kinds {running:.2f}", refresh=False)
    bar.close()
    return running, step
