"""Attention patterns of a forward, each reduced to what the caller needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooked_qwen2vl.protocols import Model


@contextmanager
def attention_patterns(model: Model, take: Callable[[Float[Tensor, "batch head pos key_pos"]], Any]) -> Iterator[dict[int, Any]]:
    """layer -> `take(pattern)`, for the forward that runs inside this context.

    Whole patterns are not kept: for many image tokens they would fill the memory.
    """
    taken: dict[int, Any] = {}

    def see(layer: int, pattern: Float[Tensor, "batch head pos key_pos"], hook: Any) -> None:
        taken[layer] = take(pattern)

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", partial(see, layer)) for layer in range(model.cfg.n_layers)]):
        yield taken
