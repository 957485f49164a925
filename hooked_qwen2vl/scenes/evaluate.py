"""How well a checkpoint answers the world's items, with and without the picture, and at which depth."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from .batches import IGNORE, Packer
from .folder import CHECKPOINT
from .forward import forward
from .world import Item, sample

if TYPE_CHECKING:
    import pandas as pd

_BATCH = 32


def load_model(folder: str | Path = CHECKPOINT):
    """(model, tokenizer) of a checkpoint folder, with transformers' own classes."""
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def evaluate(items: Sequence[Item], folder: str | Path = CHECKPOINT, blind: bool = False, seed: int = 0) -> pd.DataFrame:
    """One row an item, in order: whether the model's greedy answer is right, and when it emerges.

    An answer is right when every token of it, and the end after it, is the most likely one: that is when
    greedy decoding gives exactly this answer.

    Args:
        blind: with noise of the picture's mean and spread in its place.
    Returns:
        columns question, answer, category, domain, typical, unseen, predicted (the first answer token),
        right, and depth: the layer (0 = embeddings, n_layers = the output) from which on the top-1
        at the last position is what the model answers.
    """
    import pandas as pd

    model, tokenizer = load_model(folder)
    packer = Packer(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    by_grid: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        by_grid[item.grid].append(index)
    chunks = [ids[i : i + _BATCH] for ids in by_grid.values() for i in range(0, len(ids), _BATCH)]
    rows: dict[int, dict] = {}
    for chunk in tqdm(chunks, desc="blind" if blind else "measuring", leave=False, disable=len(chunks) < 5):
        batch = packer.pack([items[i].scene for i in chunk], [[(items[i].question, items[i].answer, items[i].category)] for i in chunk])
        if blind:
            batch.pixels.normal_(generator=generator)
        streams = _residual_streams(model, batch)
        at = torch.tensor([position for _, position, _, _ in batch.labels])
        lens = torch.stack([(s[torch.arange(len(chunk)), at] @ model.lm_head.weight.T).argmax(-1) for s in streams])
        wanted = batch.targets != IGNORE
        predicted = (streams[-1] @ model.lm_head.weight.T).argmax(-1)
        right = ((predicted == batch.targets) | ~wanted).all(-1)
        for row, index in enumerate(chunk):
            item = items[index]
            same = (lens[:, row] == lens[-1, row]).tolist()
            rows[index] = {
                "question": item.question, "answer": item.answer, "category": item.category, "domain": item.domain,
                "typical": item.typical, "unseen": item.unseen, "predicted": tokenizer.decode(lens[-1, row]),
                "right": bool(right[row]), "depth": len(same) - _trailing(same),
            }  # fmt: skip
    return pd.DataFrame([rows[index] for index in range(len(items))])


def _residual_streams(model, batch) -> list[torch.Tensor]:
    """[batch pos d_model] of every layer, normed once."""
    layers = model.model.language_model
    raw: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: raw.append(args[0])) for layer in layers.layers]
    try:
        last = forward(model, batch)  # normed already
    finally:
        for hook in hooks:
            hook.remove()
    return [layers.norm(stream) for stream in raw] + [last]


def _trailing(same: list[bool]) -> int:
    """How many values at the end are True."""
    return next((n for n, ok in enumerate(reversed(same)) if not ok), len(same))


def best_without_image(items: Sequence[Item], n: int = 6000, seed: int = 1) -> list[bool]:
    """Whether each answer is the most frequent one to its question among n training items (unknown question:
    of its category and domain)."""
    by_question: dict[str, Counter] = defaultdict(Counter)
    by_kind: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for item in sample(n, seed=seed, split="train"):
        by_question[item.question][item.answer] += 1
        by_kind[item.domain, item.category][item.answer] += 1
    counts = [by_question.get(item.question) or by_kind[item.domain, item.category] for item in items]
    return [item.answer == count.most_common(1)[0][0] for item, count in zip(items, counts)]
