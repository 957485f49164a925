"""What is in each cell of a scene, as labels and in words: the truth that image tokens can be measured against.

cell_labels(scene)                 -> which class of each of `LABELS` every cell is of
cell_embeddings(embedding, labels) -> a scene written with the model's own word embeddings, a token a cell
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .scene import Scene
from .words import BACKGROUNDS, COLORS, DIGITS, DIRECTIONS, LETTERS, ORIENTATIONS, PATTERNS, SHAPES

NOTHING = "nothing"
_PARTS = ("whole", "top left", "top right", "bottom left", "bottom right", "end", "top", "along")
LABELS: dict[str, tuple[str, ...]] = {
    "kind": (NOTHING, *SHAPES, *LETTERS, *DIGITS, *PATTERNS, "bar", "arrow", "path"),
    "color": (NOTHING, *COLORS),
    "part": (NOTHING, *_PARTS),
    "facing": (NOTHING, *ORIENTATIONS, *DIRECTIONS),
    "background": BACKGROUNDS,
}
# How a cell is written: kind and colour in full, the rest at half strength.
_STRENGTH = {"kind": 1.0, "color": 1.0, "part": 0.5, "facing": 0.5, "background": 0.5}
_WORDS = {NOTHING: "", "whole": "small", "along": "", **{part: f"big {part}" for part in _PARTS if " " in part}}


def cell_labels(scene: Scene) -> Int[np.ndarray, "cell head"]:
    """The class of each cell (raster order) under each of `LABELS`."""
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


def cell_embeddings(
    embedding: Float[Tensor, "d_vocab d_model"], tokenizer, labels: Int[Tensor, "cell head"]
) -> Float[Tensor, "cell d_model"]:
    """Each cell as the sum of the embeddings of the words that say what is in it ("red", "star", "small", "gray")."""
    cells = torch.zeros(len(labels), embedding.shape[-1], dtype=embedding.dtype, device=embedding.device)
    for head, (name, ids) in enumerate(_word_ids(tokenizer).items()):
        ids = ids.to(embedding.device)
        words = embedding[ids.clamp_min(0)] * (ids >= 0)[..., None]
        cells = cells + _STRENGTH[name] * words.sum(1)[labels[:, head]]
    return cells


@cache
def _word_ids(tokenizer) -> dict[str, Tensor]:
    """For each of `LABELS`, [class word] token ids, -1 where a class has fewer words."""
    table = {}
    for name, classes in LABELS.items():
        words = [[tokenizer.convert_tokens_to_ids(word) for word in _WORDS.get(c, c).split()] for c in classes]
        longest = max(map(len, words))
        table[name] = torch.tensor([ids + [-1] * (longest - len(ids)) for ids in words])
    return table


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
        return NOTHING
    return thing.facing or NOTHING
