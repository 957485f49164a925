"""A byte-level tokenizer with what the genuine vocabulary has: halves of characters, line breaks in one token, short beginnings."""

from __future__ import annotations

from tiny import tiny_hf, tiny_processor, tiny_tokenizer
from transformers import Qwen2Tokenizer

from hooked_qwen2vl import HookedQwen2VL

HALF = b" \xe7"  # the first byte of thousands of Chinese characters, after a space
ONE_TOKEN = (HALF, "红", "猫", "一只", "坐在", "zy", "ca", "cyan", "\n\n", b"\xf0\xaa", "system", "user", "assistant", " the", "The")


def tokenizer() -> Qwen2Tokenizer:
    return tiny_tokenizer(ONE_TOKEN)


def model(**config) -> HookedQwen2VL:
    """A tiny model of that vocabulary."""
    own = tokenizer()
    return HookedQwen2VL.from_hf(tiny_hf(tokenizer=own, **config), tiny_processor(tokenizer=own))


def pieces(text: str) -> list[str]:
    own = tokenizer()
    return [own.decode([i]) for i in own(text, add_special_tokens=False)["input_ids"]]
