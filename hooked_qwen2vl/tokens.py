"""TransformerLens's methods for strings and tokens. Qwen has no BOS, so none is ever prepended."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from .inputs import Inputs, padding_left
from .mixin import Mixin


class Tokens(Mixin):
    """Mixin of HookedQwen2VL; uses `self.processor` and `self.cfg`."""

    _lone_tokenizer: Any = None  # the tokenizer of a model without a processor
    _bos_explained = False

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None for a model without one; it can be replaced.

        Raises:
            ValueError: when set: its image placeholders or its number of tokens differ from the model's.
        """
        return self._lone_tokenizer if self.processor is None else self.processor.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        names = {"<|image_pad|>": self.cfg.image_token_id, "<|video_pad|>": self.cfg.video_token_id}
        vocabulary = tokenizer.get_vocab()
        wrong = [f"{name} is {vocabulary.get(name)} there and {its} here" for name, its in names.items() if vocabulary.get(name) != its]
        if max(vocabulary.values()) >= self.cfg.d_vocab:
            wrong.append(f"it has ids up to {max(vocabulary.values())}, the model {self.cfg.d_vocab} tokens")
        if wrong:
            raise ValueError(f"this tokenizer belongs to another model: {'; '.join(wrong)}.")
        if self.processor is None:
            self._lone_tokenizer = padding_left(tokenizer)
        else:
            self.processor = replace(self.processor, tokenizer=tokenizer)
        self._follow_tokenizer()

    def _follow_tokenizer(self) -> None:
        """Updates the fields of `cfg.special` that depend on the tokenizer."""
        if self.tokenizer is None:
            return
        pad = self.tokenizer.pad_token_id
        self.cfg.special = replace(
            self.cfg.special, line_breaks=line_breaks(self.tokenizer), pad=self.cfg.special.pad if pad is None else pad
        )

    def _explain_bos(self, prepend_bos: bool | None) -> None:
        """Warns once, if a BOS is asked for, that Qwen has none."""
        if (self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos) and not self._bos_explained:
            self._bos_explained = True
            warnings.warn(
                "Qwen2-VL has no BOS token: prepend_bos=True prepends nothing here (said once). Positions are those of "
                "prepend_bos=False, one less than with a model that has one.",
                stacklevel=3,
            )

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer: load it from a folder that has one, or pass processor= to from_hf; "
                "token tensors and Inputs need none."
            )
        return self.tokenizer

    def to_tokens(
        self,
        input: str | list[str] | Inputs | Int[Tensor, "batch pos"],
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"] | Inputs:
        """Token ids of plain text, without chat template.

        `Inputs` and token tensors are returned unchanged, so that TransformerLens's tools that call `to_tokens` accept them.

        Args:
            prepend_bos: True gives a warning once and has no other effect, because Qwen has no BOS.
            padding_side: for several strings; None: `model.tokenizer.padding_side`, which is "left" unless it was changed.
        Raises:
            ValueError: an empty string, an unknown side, or no tokenizer.
        """
        self._explain_bos(prepend_bos)
        _check_side(padding_side)
        if isinstance(input, (Inputs, Tensor)):
            return input
        strings: list[Any] = [input] if isinstance(input, str) else list(input)
        encoded = self._encode(strings, padding_side, truncate)["input_ids"]
        return encoded.to(self.cfg.device) if move_to_device else encoded

    def _encode(self, strings: list[str], padding_side: str | None, truncate: bool) -> Any:
        """The tokenizer's `input_ids` and `attention_mask`, [batch pos], for non-empty strings."""
        if not strings or not all(strings):
            raise ValueError("expected one or more non-empty strings to tokenize, got an empty one.")
        tokenizer = self._tokenizer()
        return tokenizer(
            strings,
            return_tensors="pt",
            padding=True,
            padding_side=padding_side or tokenizer.padding_side,
            truncation=truncate,
            max_length=self.cfg.n_ctx if truncate else None,
        )

    def to_string(self, tokens: list[int] | Tensor | np.ndarray) -> str | list[str]:
        """Token ids to text: one string for [pos], a list for [batch pos]."""
        tokens = torch.as_tensor(getattr(tokens, "tokens", tokens))
        if tokens.ndim > 2:
            raise ValueError(f"expected token ids [pos] or [batch pos], got shape {tuple(tokens.shape)}.")
        decode = self._tokenizer().batch_decode if tokens.ndim == 2 else self._tokenizer().decode
        return decode(tokens, clean_up_tokenization_spaces=False)

    def to_str_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> list[Any]:
        """Each token as a string, for a string, a list, token ids or `Inputs`; a list for one row, a list of lists for several."""
        if isinstance(input, list):
            return [self.to_str_tokens(item, prepend_bos, padding_side) for item in input]
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side)
        tokens = torch.as_tensor(getattr(input, "tokens", input))
        if tokens.ndim == 2 and tokens.shape[0] > 1:
            return [self.to_str_tokens(row) for row in tokens]
        return self._tokenizer().batch_decode([[int(t)] for t in tokens.reshape(-1)], clean_up_tokenization_spaces=False)

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token.

        Raises:
            AssertionError: the string is several tokens (the type of error is TransformerLens's).
        """
        ids: Any = self.to_tokens(string, move_to_device=False)
        tokens = ids[0].tolist()
        if len(tokens) != 1:
            raise AssertionError(
                f"{string!r} is not a single token: it is {self.to_str_tokens(torch.tensor(tokens))}. "
                f"Choose another variant (case, leading space) or pass a token id."
            )
        return tokens[0]

    def to_single_str_token(self, int_token: int) -> str:
        """The string of one token id."""
        return str(self.to_str_tokens(torch.tensor([int_token]))[0])

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: Any,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> int:
        """Position of a token in a string, one row of tokens, or an `Inputs` of one row.

        Raises:
            ValueError: several rows, an unknown mode, or the token does not occur.
        """
        if mode not in ("first", "last"):
            raise ValueError(f"mode must be 'first' or 'last', got {mode!r}.")
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side)
        tokens = torch.as_tensor(getattr(input, "tokens", input))
        if tokens.ndim == 2 and tokens.shape[0] != 1:
            raise ValueError(f"expected one row of tokens, got shape {tuple(tokens.shape)}: index one row first.")
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        found = (tokens.reshape(-1) == token).nonzero().flatten()
        if not len(found):
            raise ValueError(f"the token {single_token!r} (id {token}) does not occur in the prompt.")
        return int(found[0 if mode == "first" else -1])


def line_breaks(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens that begin with a line break (Ċ in byte-level tokenizers)."""
    return tuple(sorted(i for token, i in tokenizer.get_vocab().items() if token.startswith(("Ċ", "\n"))))


def _check_side(padding_side: str | None) -> None:
    if padding_side not in (None, "left", "right"):
        raise ValueError(f"padding_side must be 'left', 'right' or None, got {padding_side!r}.")
