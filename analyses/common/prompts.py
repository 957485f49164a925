"""One interface to the prompts of any TransformerLens model: tokens, padding, and positions by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_qwen2vl import HookedQwen2VL, Inputs
from hooked_qwen2vl.geometry import PromptShape, resolve_positions
from hooked_qwen2vl.protocols import Model

# The prompts that an analysis takes: `Inputs`, a string, several strings, or token ids [pos] or [batch pos] without padding.
Prompt: TypeAlias = Inputs | str | Sequence[str] | Tensor


@dataclass(frozen=True)
class TextPrompt:
    """Text prompts of a model that does not use `Inputs`, with the part of the interface of `Inputs` that analyses need.

    Attributes:
        tokens: [batch pos]. attention_mask: [batch pos], 1 for a token, 0 for padding.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]

    @property
    def shape(self) -> torch.Size:
        return self.tokens.shape

    @property
    def prompt_shape(self) -> PromptShape:
        """See `Inputs.prompt_shape`."""
        return PromptShape((self.attention_mask.cumsum(-1) - 1).expand(3, -1, -1), self.attention_mask)

    def __len__(self) -> int:
        return len(self.tokens)

    def alone(self, row: int, position: int) -> tuple[TextPrompt, int, int]:
        """(the row as a batch of one without padding, the position's index in that, the row's index in that: 0)."""
        real = self.attention_mask[row].bool()
        tokens = self.tokens[row][real][None]
        return TextPrompt(tokens, torch.ones_like(tokens)), int(real[:position].sum()), 0

    def resolve(self, where: Any, row: int = 0) -> Int[Tensor, "n"]:
        """Positions of a place in one row, as `Inputs.resolve`; the only segment of a text is `last`, its last token.

        Raises:
            ValueError: no such row or position, a position in the padding, or the name of another segment.
        """
        if not -len(self) <= row < len(self):
            raise ValueError(f"there is no row {row}: the batch has {len(self)}.")
        if isinstance(where, (str, tuple)) and where != "last":
            raise ValueError(f"{where!r} is a segment of an Inputs with a processor; a text has 'last', positions, slices and masks.")
        if isinstance(where, str):
            return self.attention_mask[row].bool().cpu().nonzero().flatten()[-1:]
        if isinstance(where, Tensor) and where.ndim == 2 and where.shape == self.shape:
            where = where[row]
        return resolve_positions(where, self.attention_mask[row], row)

    def position(self, where: Any, row: int = 0) -> int:
        """The position of a place that covers exactly one.

        Raises:
            ValueError: as `resolve`, or the place does not cover one position.
        """
        found = self.resolve(where, row)
        if len(found) != 1:
            raise ValueError(f"expected one position, but {where!r} covers {len(found)} of row {row}.")
        return int(found[0])


def as_prompt(model: Model, inputs: Prompt) -> Inputs | TextPrompt:
    """The prompts as `Inputs`, or as a `TextPrompt` for a model that does not use `Inputs`.

    Args:
        inputs: `Inputs`, a string, a list of strings, or token ids [pos] or [batch pos] without padding.
    """
    if isinstance(inputs, Inputs):
        return inputs
    if isinstance(model, HookedQwen2VL):
        return model.as_inputs(inputs)
    if isinstance(inputs, Tensor):
        tokens = inputs if inputs.ndim == 2 else inputs[None]
        return TextPrompt(tokens, torch.ones_like(tokens))
    tokens = model.to_tokens(inputs)
    return TextPrompt(tokens, _mask(model, tokens, [inputs] if isinstance(inputs, str) else inputs))


def _mask(model: Model, tokens: Int[Tensor, "batch pos"], strings: Sequence[str]) -> Int[Tensor, "batch pos"]:
    """The attention mask of a tokenised batch, found by tokenising each string alone, which adds no padding.

    Raises:
        ValueError: a string's tokens in the batch differ from its tokens alone.
    """
    mask = torch.ones_like(tokens)
    if len(strings) == 1:
        return mask
    for row, string in enumerate(strings):
        alone = model.to_tokens(string)[0].to(tokens.device)
        n = len(alone)
        if torch.equal(tokens[row, :n], alone):
            mask[row, n:] = 0
        elif torch.equal(tokens[row, len(tokens[row]) - n :], alone):
            mask[row, : len(tokens[row]) - n] = 0
        else:
            raise ValueError(f"the tokenizer gives {string!r} other tokens in a batch than alone: pass it by itself.")
    return mask
