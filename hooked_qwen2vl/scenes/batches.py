"""Training batches: pictures of one grid, several questions each, packed so that each sees only its own prompt.

A row is [system, picture | question 1, answer 1 | question 2, answer 2 | …]. Every question has the positions
it would have alone and attends to the prefix and to itself, so that a row is exactly as many single-turn
prompts of the chat template, at the price of one picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from random import Random

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from .domains import DOMAINS
from .drawing import draw
from .folder import CELL, PREPROCESSOR
from .scene import Scene
from .world import MAX_LEVEL, make_question, make_scene

Labels = list[tuple[int, int, str, str]]  # row, position of the first answer token, domain, category
MERGE, PATCH = 2, CELL // 2
IGNORE = -100


def patchify(images: UInt8[np.ndarray, "image height width 3"]) -> Float[np.ndarray, "patch d_patch"]:
    """Images of one size as normalised patches in the tower's order, as the reference image processor has them."""
    n, height, width, _ = images.shape
    mean, std = (np.array(PREPROCESSOR[name], dtype=np.float32) for name in ("image_mean", "image_std"))
    pixels = (images.astype(np.float32) * np.float32(1 / 255) - mean) / std
    rows, cols = height // CELL, width // CELL
    blocks = pixels.reshape(n, rows, MERGE, PATCH, cols, MERGE, PATCH, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    frames = np.repeat(blocks[:, :, :, :, :, :, None], 2, axis=6)  # a still image is two equal frames
    return frames.reshape(n * rows * cols * MERGE**2, -1)


@dataclass(frozen=True)
class Batch:
    """One packed batch.

    Attributes:
        tokens: [batch pos].
        targets: [batch pos] the next token where an answer is predicted, else IGNORE.
        weights: [batch pos] of the loss.
        position_ids: [3 1 pos].
        mask: [1 1 pos key_pos] True where a position sees a key.
        pixels: [patch d_patch].
        grid: [image 3] in patches.
        labels: where first answer tokens are predicted, and of what.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    position_ids: Tensor
    mask: Tensor
    pixels: Tensor
    grid: Tensor
    labels: Labels


class Packer:
    """Turns scenes with questions into batches.

    Args:
        tokenizer: the embedded model's.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pad = tokenizer.pad_token_id
        self._encoded: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text with special tokens, remembered."""
        if text not in self._encoded:
            self._encoded[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._encoded[text]

    @cached_property
    def _frame(self) -> tuple[list[int], int, list[int]]:
        """(tokens before the image, the placeholder, tokens after it) of the chat template's rendering."""
        content = [{"type": "image"}, {"type": "text", "text": ""}]
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        before, after = text.split("<|image_pad|>")
        return self.encode(before), self.encode("<|image_pad|>")[0], self.encode(after.split("<|im_end|>")[0])

    def branch(self, question: str, answer: str) -> tuple[list[int], int]:
        """(tokens from the question to the end of the answer, index of the last token before the answer)."""
        prompt = self.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n")
        return prompt + self.encode(answer) + self.encode("<|im_end|>"), len(prompt) - 1

    def pack(self, scenes: Sequence[Scene], asked: Sequence[Sequence[tuple[str, str, str]]]) -> Batch:
        """Scenes of one grid, each with as many (question, answer, category)."""
        rows, cols = scenes[0].rows, scenes[0].cols
        before, image, after = self._frame
        prefix = before + [image] * (rows * cols) + after
        branches = [[self.branch(question, answer) for question, answer, _ in row] for row in asked]
        lengths = tuple(max(len(row[k][0]) for row in branches) for k in range(len(branches[0])))
        starts = np.cumsum((len(prefix), *lengths))
        tokens = np.full((len(scenes), starts[-1]), self.pad)
        targets, weights = np.full(tokens.shape, IGNORE), np.zeros(tokens.shape, dtype=np.float32)
        tokens[:, : len(prefix)] = prefix
        labels: Labels = []
        for index, (scene, row, questions) in enumerate(zip(scenes, branches, asked)):
            for start, (ids, at), (_, _, category) in zip(starts, row, questions):
                end = start + len(ids)
                tokens[index, start:end] = ids
                targets[index, start + at : end - 1] = ids[at + 1 :]
                weights[index, start + at : end - 1] = 0.3 if category == "caption" else 0.5
                weights[index, start + at] = 1
                labels.append((index, int(start + at), scene.domain, category))
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            torch.from_numpy(weights),
            _positions(len(before), rows, cols, len(after), lengths),
            _mask(len(prefix), lengths),
            torch.from_numpy(patchify(np.stack([draw(scene) for scene in scenes]))),
            torch.tensor([[1, MERGE * rows, MERGE * cols]] * len(scenes)),
            labels,
        )


@cache
def _positions(before: int, rows: int, cols: int, after: int, lengths: tuple[int, ...]) -> Tensor:
    """[3 1 pos] M-RoPE positions; every question starts where the prefix ends."""
    text = torch.arange(before).expand(3, -1)
    raster = torch.stack((torch.zeros(rows * cols), torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows))).long()
    close = before + max(rows, cols)
    parts = [text, before + raster, close + torch.arange(after).expand(3, -1)]
    parts += [close + after + torch.arange(length).expand(3, -1) for length in lengths]
    return torch.cat(parts, dim=1)[:, None]


@cache
def _mask(prefix: int, lengths: tuple[int, ...]) -> Tensor:
    """[1 1 pos key_pos] causal, and questions blind to each other."""
    owner = torch.cat([torch.zeros(prefix)] + [torch.full((n,), k + 1.0) for k, n in enumerate(lengths)])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    return (causal & ((owner[:, None] == owner) | (owner == 0)))[None, None]


def draw_batch(
    packer: Packer, rng: Random, levels: dict[str, int], mix: dict[tuple[str, str], float], grid: tuple[int, int],
    images: int, questions: int,
) -> Batch:  # fmt: skip
    """A random training batch: domains in turn, categories by weight, and a caption in one batch of four.

    Args:
        levels: the current difficulty of each domain.
        mix: (domain, category) -> weight in the draw; 1 where absent.
    """
    with_caption = rng.random() < 0.25
    scenes, asked = [], []
    names = list(DOMAINS)
    for index in range(images):
        domain = names[index % len(names)]
        scene = make_scene(rng, domain, "train", grid, levels[domain])
        kinds = [kind for kind in DOMAINS[domain].asks if kind != "caption"]
        odds = [mix.get((domain, kind), 0.4 if kind == "environment" else 1.0) for kind in kinds]
        row: list[tuple[str, str, str]] = []
        while len(row) < questions:
            category = rng.choices(kinds, odds)[0]
            if question := make_question(rng, scene, category):
                row.append((question.text, question.solve(scene)[0], category))
        if with_caption:
            question = make_question(rng, scene, "caption")
            row.append((question.text, question.solve(scene)[0], "caption"))
        scenes.append(scene)
        asked.append(row)
    return packer.pack(scenes, asked)


def start_levels() -> dict[str, int]:
    """Every domain at its easiest."""
    return dict.fromkeys(DOMAINS, 1)


def raise_level(levels: dict[str, int], domain: str) -> bool:
    """One more object in a domain's scenes; False at the top."""
    if levels[domain] >= MAX_LEVEL:
        return False
    levels[domain] += 1
    return True
