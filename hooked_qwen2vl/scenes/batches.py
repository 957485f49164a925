"""Training batches: pictures of one grid, several questions each, packed so that each sees only its own prompt.

A row is [system, picture | question 1, answer 1 | question 2, answer 2 | …]. Every question has the positions
it would have alone and attends to the prefix and to itself, so that a row is exactly as many single-turn
prompts of the chat template, at the price of one picture. A question may be the last turn of a dialogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from .cells import cell_labels
from .domains import DOMAINS
from .drawing import draw
from .folder import CELL, PREPROCESSOR
from .questions import Question, background, in_words
from .scene import Scene
from .world import MAX_LEVEL, make_dialogue, make_question, make_scene, tempting

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


class Asked(NamedTuple):
    """A question with its answer, and the turns before it."""

    question: str
    answer: str
    category: str
    earlier: tuple[tuple[str, str], ...] = ()  # (question, answer)


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
        cells: [cell head] what is in each cell, all pictures in turn (see `cells.LABELS`).
        labels: where first answer tokens are predicted, and of what.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    position_ids: Tensor
    mask: Tensor
    pixels: Tensor
    grid: Tensor
    cells: Tensor
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

    def branch(self, asked: Asked) -> tuple[list[int], list[tuple[int, int]]]:
        """(tokens from the first question to the end of the last answer, the spans of the answers with their end tokens)."""
        ids: list[int] = []
        spans = []
        for question, answer in (*asked.earlier, (asked.question, asked.answer)):
            if ids:
                ids += self.encode("\n<|im_start|>user\n")
            ids += self.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n")
            start = len(ids)
            ids += self.encode(answer) + self.encode("<|im_end|>")
            spans.append((start, len(ids)))
        return ids, spans

    def pack(self, scenes: Sequence[Scene], asked: Sequence[Sequence[Asked]], pictures: bool = True) -> Batch:
        """Scenes of one grid, each asked as often.

        Args:
            pictures: False leaves `pixels` empty, for a model that reads the cells instead.
        """
        rows, cols = scenes[0].rows, scenes[0].cols
        before, image, after = self._frame
        prefix = before + [image] * (rows * cols) + after
        branches = [[self.branch(one) for one in row] for row in asked]
        lengths = tuple(max(len(row[k][0]) for row in branches) for k in range(len(branches[0])))
        starts = np.cumsum((len(prefix), *lengths))
        tokens = np.full((len(scenes), starts[-1]), self.pad)
        targets, weights = np.full(tokens.shape, IGNORE), np.zeros(tokens.shape, dtype=np.float32)
        tokens[:, : len(prefix)] = prefix
        labels: Labels = []
        for index, (scene, row, questions) in enumerate(zip(scenes, branches, asked)):
            for start, (ids, spans), one in zip(starts, row, questions):
                tokens[index, start : start + len(ids)] = ids
                for first, end in spans:
                    targets[index, start + first - 1 : start + end - 1] = ids[first:end]
                    weights[index, start + first - 1 : start + end - 1] = 0.3 if one.category == "caption" else 0.5
                    weights[index, start + first - 1] = 1
                labels.append((index, int(start + spans[-1][0] - 1), scene.domain, one.category))
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            torch.from_numpy(weights),
            _positions(len(before), rows, cols, len(after), lengths),
            _mask(len(prefix), lengths),
            torch.from_numpy(patchify(np.stack([draw(scene) for scene in scenes]))) if pictures else torch.empty(0),
            torch.tensor([[1, MERGE * rows, MERGE * cols]] * len(scenes)),
            torch.from_numpy(np.concatenate([cell_labels(scene) for scene in scenes])),
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


@dataclass(frozen=True)
class Mix:
    """What a training batch is drawn from.

    Attributes:
        levels: the current difficulty of each domain.
        weights: (domain, category) -> weight in the draw; 1 where absent.
        relation: share of the questions that are relations.
        crowded: whether scenes hold at least three things, and relations are asked where the first thing in sight
            will not do.
        domains: of the pictures, in turn.
    """

    levels: dict[str, int]
    weights: dict[tuple[str, str], float]
    relation: float = 0.2
    crowded: bool = False
    domains: tuple[str, ...] = tuple(DOMAINS)


def draw_batch(packer: Packer, rng: Random, mix: Mix, grid: tuple[int, int], images: int, questions: int, pictures: bool = True) -> Batch:
    """A random training batch: domains in turn, categories by weight, and in one batch of four each a caption, a
    question answered in words, and a dialogue."""
    forms = rng.choices((None, "caption", "words", "dialogue"), k=1)[0]
    scenes, asked = [], []
    for index in range(images):
        domain = mix.domains[index % len(mix.domains)]
        scene = _draw_scene(rng, domain, mix, grid)
        row = []
        for _ in range(questions):
            question = _draw_question(rng, scene, mix)
            row.append(_asked(scene, question))
        if forms == "caption":
            row.append(_asked(scene, make_question(rng, scene, "caption")))
        elif forms == "words":
            row[-1] = next((said for said in map(_in_words, row) if said), row[-1])
        elif forms == "dialogue":
            earlier = make_dialogue(rng, scene, row[-1].question, rng.choice((2, 2, 3)))
            row[-1] = row[-1]._replace(earlier=tuple(_asked(scene, turn)[:2] for turn in earlier))
        scenes.append(scene)
        asked.append(row)
    return packer.pack(scenes, asked, pictures)


def _draw_scene(rng: Random, domain: str, mix: Mix, grid: tuple[int, int]) -> Scene:
    while True:
        scene = make_scene(rng, domain, "train", grid, mix.levels[domain])
        # a path with its two ends is three things; arrows have no relations, and a line of text has few
        if not mix.crowded or len(scene.things) >= 3 or mix.levels[domain] < 3:
            return scene


def _draw_question(rng: Random, scene: Scene, mix: Mix) -> Question:
    kinds = [kind for kind in DOMAINS[scene.domain].asks if kind not in ("caption", "relation")]
    odds = [mix.weights.get((scene.domain, kind), 0.4 if kind == "environment" else 1.0) for kind in kinds]
    for _ in range(20):
        if rng.random() < mix.relation:
            question = make_question(rng, scene, "relation")
            if question and mix.crowded and not tempting(scene, question):
                continue
        else:
            hops = DOMAINS[scene.domain].hops
            question = (
                rng.choice(hops)(scene, rng) if hops and rng.random() < 0.1 else make_question(rng, scene, rng.choices(kinds, odds)[0])
            )
            question = question if question and question.solve(scene) else None
        if question:
            return question
    return background()


def _asked(scene: Scene, question: Question | None) -> Asked:
    found = question and question.solve(scene)
    assert question and found  # the question was asked because it has an answer here
    return Asked(question.text, found[0], question.category)


def _in_words(asked: Asked) -> Asked | None:
    said = in_words(asked.question, asked.answer)
    return Asked(*said, asked.category) if said else None


def start_levels() -> dict[str, int]:
    """Every domain at its easiest."""
    return dict.fromkeys(DOMAINS, 1)


def raise_level(levels: dict[str, int], domain: str) -> bool:
    """One more object in a domain's scenes; False at the top."""
    if levels[domain] >= MAX_LEVEL:
        return False
    levels[domain] += 1
    return True
