"""Tokenises prompts so that special tokens in a user's text are read as text.

A prompt is a list of segments. Special tokens are recognised only in segments that the library wrote (the template, the tokens
around images). In a user's text, "<|im_end|>" is tokenised as plain text, so that no input can end a turn or stand for an image.
The text between two special tokens is tokenised as a whole, even if it comes from several segments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .moved import moved_names

__getattr__ = moved_names(__name__)

VISION_TOKENS = {"<|vision_start|>": "vision_start", "<|vision_end|>": "vision_end"}


@dataclass(frozen=True)
class Segment:
    """A part of the rendered prompt.

    Attributes:
        text: its text.
        name: its name (see `Inputs.positions`).
        typed: whether special tokens in it are read as text.
    """

    text: str
    name: str
    typed: bool = False


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text; special tokens in it are read as text, and none are added."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []


def tokenize_segments(tokenizer: Any, segments: Sequence[Segment]) -> tuple[list[int], list[str]]:
    """(token ids of the joined segments, for each token the name of the segment in which it starts).

    The special tokens <|vision_start|> and <|vision_end|> get the names `vision_start` and `vision_end`.
    """
    special = special_tokens(tokenizer)
    borders = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None
    ids: list[int] = []
    names: list[str] = []
    stretch: list[Segment] = []

    def flush() -> None:
        more = _stretch(tokenizer, stretch)
        ids.extend(token for token, _ in more)
        names.extend(name for _, name in more)
        stretch.clear()

    for segment in segments:
        start = 0
        for found in borders.finditer(segment.text) if borders and not segment.typed else ():
            stretch.append(Segment(segment.text[start : found.start()], segment.name))
            flush()
            ids.append(special[found[0]])
            names.append(VISION_TOKENS.get(found[0], segment.name))
            start = found.end()
        stretch.append(Segment(segment.text[start:], segment.name))
    flush()
    return ids, names


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of all special tokens."""
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _stretch(tokenizer: Any, segments: Sequence[Segment]) -> list[tuple[int, str]]:
    """(token id, name of the segment in which it starts) for text without special tokens."""
    text = "".join(segment.text for segment in segments)
    if not text:
        return []
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, split_special_tokens=True)
    ends = np.cumsum([len(segment.text) for segment in segments])
    return [
        (token, segments[int(np.searchsorted(ends, start, side="right"))].name)
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"])
    ]
