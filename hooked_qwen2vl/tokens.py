"""Strings and tokens, with TransformerLens's names. Qwen has no BOS: nothing is ever prepended."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from .inputs import Inputs


class Tokens:
    """Mixed into HookedQwen2VL; reads `self.processor` and `self.cfg`."""

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None for a model without a processor."""
        return None if self.processor is None else self.processor.tokenizer

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
        """Plain text to token ids, without chat template; several strings are padded on the left.

        `Inputs` and token tensors come back as they are, so that TransformerLens's tools which tokenise what they are
        given take them.

        Raises:
            ValueError: `prepend_bos=True` (Qwen has no BOS), an empty string, or no tokenizer.
        """
        if isinstance(input, (Inputs, Tensor)):
            return input
        if prepend_bos:
            raise ValueError("Qwen2-VL has no BOS token: call to_tokens with prepend_bos=False (the default here).")
        strings = [input] if isinstance(input, str) else list(input)
        if not strings or not all(strings):
            raise ValueError("expected one or more non-empty strings to tokenize, got an empty one.")
        encoded = self._tokenizer()(
            strings,
            return_tensors="pt",
            padding=True,
            padding_side=padding_side or self.cfg.default_padding_side,
            truncation=truncate,
            max_length=self.cfg.n_ctx if truncate else None,
        )["input_ids"]
        return encoded.to(self.cfg.device) if move_to_device else encoded

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
    ) -> list[str] | list[list[str]]:
        """Each token as a string; takes a string, a list, token ids or `Inputs` (one row: a list; several: lists)."""
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
            AssertionError: it is several tokens (TransformerLens's own type of error here).
        """
        tokens = self.to_tokens(string, move_to_device=False)[0].tolist()
        if len(tokens) != 1:
            raise AssertionError(
                f"{string!r} is not a single token: it is {self.to_str_tokens(torch.tensor(tokens))}. "
                f"Choose another variant (case, leading space) or pass a token id."
            )
        return tokens[0]

    def to_single_str_token(self, int_token: int) -> str:
        """The string of one token id."""
        return self.to_str_tokens(torch.tensor([int_token]))[0]

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
            ValueError: several rows, an unknown mode, or the token is not there.
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
