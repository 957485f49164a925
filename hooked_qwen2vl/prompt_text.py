"""Text that was written becomes tokens that mean it: in what a user says, `<|im_end|>` is eight characters of text.

A prompt is made of parts. Special tokens count only in parts that the library placed (the template, the frames of
images); in a user's text each is spelt by plain tokens, so that nothing typed can end a turn or stand for an image.
Special tokens are hard borders for the tokenizer: what lies between two of them is tokenised as a whole, however many
parts it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

VISION_TOKENS = {"<|vision_start|>": "vision_start", "<|vision_end|>": "vision_end"}


@dataclass(frozen=True)
class Part:
    """A stretch of the rendered prompt.

    Attributes:
        text: as it was written.
        name: which part of the conversation it is (see `Inputs.positions`).
        typed: whether special tokens in it are text.
    """

    text: str
    name: str
    typed: bool = False


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, special tokens in it spelt by plain tokens; none are added."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []


def tokenize_parts(tokenizer: Any, parts: Sequence[Part]) -> tuple[list[int], list[str]]:
    """The ids of the parts joined to one text, and for each the name of the part it starts in.

    `vision_start` and `vision_end`, where the library placed them, are named after themselves.
    """
    special = special_tokens(tokenizer)
    borders = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None
    ids: list[int] = []
    names: list[str] = []
    stretch: list[Part] = []

    def flush() -> None:
        more = _stretch(tokenizer, stretch)
        ids.extend(token for token, _ in more)
        names.extend(name for _, name in more)
        stretch.clear()

    for part in parts:
        start = 0
        for found in borders.finditer(part.text) if borders and not part.typed else ():
            stretch.append(Part(part.text[start : found.start()], part.name))
            flush()
            ids.append(special[found[0]])
            names.append(VISION_TOKENS.get(found[0], part.name))
            start = found.end()
        stretch.append(Part(part.text[start:], part.name))
    flush()
    return ids, names


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Each special token's text and id."""
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _stretch(tokenizer: Any, parts: Sequence[Part]) -> list[tuple[int, str]]:
    """(id, name of the part it starts in) of text without special tokens."""
    text = "".join(part.text for part in parts)
    if not text:
        return []
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, split_special_tokens=True)
    ends = np.cumsum([len(part.text) for part in parts])
    return [
        (token, parts[int(np.searchsorted(ends, start, side="right"))].name)
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"])
    ]
