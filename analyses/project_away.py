"""ProjectAway: remove a word's direction from the image tokens (Jiang et al., arXiv 2410.02762).

1. t is the word's direction: run the word alone as text and take the residual stream at its last token, at some layer.
2. For every image token h at the chosen layers, p = ⟨h, t⟩ / ⟨t, t⟩.
3. If p > 0, h ← h − α p t; else h is unchanged. With α = 1, ⟨h, t⟩ = 0 afterwards.
4. The run continues with these h. In generation the image tokens are edited once, when the prompt runs (the prefill).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.interventions import Where
from analyses.logit_lens import residual_stack
from hooked_qwen2vl.protocols import Model


def project_away_hooks(
    inputs: Any,
    direction: Float[Tensor, "d_model"] | Float[Tensor, "layer d_model"],
    layers: Sequence[int],
    alpha: float = 1.0,
    n_layers: int | None = None,
) -> list[tuple[str, Callable]]:
    """Hooks for `model.run_with_hooks` and `model.generate(…, fwd_hooks=…)`.

    Args:
        inputs: the prompts that will be run, padded on the left; the image tokens of every row are edited.
        direction: t, one for all layers or one for each of `layers`.
        layers: layers to edit, 0..L; later blocks see the edited stream.
        alpha: 1 removes the direction, less removes a part of it, more reverses it.
        n_layers: L; needed only to edit layer L.
    Raises:
        ValueError: no image in any row, padding on the right (generation pads on the left), no layers, a number of directions that
            is neither 1 nor the number of layers, or a direction of length 0; when run: prompts of another layout.
    """
    layers = list(layers)
    directions = direction.expand(len(layers), -1) if direction.ndim == 1 else direction
    if not layers or len(directions) != len(layers):
        raise ValueError(f"expected one direction, or one for each of {len(layers)} layers, got {len(directions)}.")
    if not bool((directions.norm(dim=-1) > 0).all()):
        raise ValueError("a direction is the zero vector: there is nothing to project on.")
    if inputs.left_padded() is not inputs:
        raise ValueError("the inputs are padded on the right: edit and run inputs.left_padded().")
    where = (inputs.token_types > 0) & inputs.attention_mask.bool()
    if not bool(where.any()):
        raise ValueError("no row of the inputs has an image: there is nothing to edit.")
    return [
        (_name(layer, n_layers), _edit(Where(where.cpu(), inputs.prompt_shape, what="these edits were"), t, alpha))
        for layer, t in zip(layers, directions)
    ]


@torch.no_grad()
def text_direction(model: Model, text: str, layer: int) -> Float[Tensor, "d_model"]:
    """t of a word: the residual stream at its last token, at one layer, when the word is run alone as text.

    Raises:
        ValueError: an empty text, or no such layer.
    """
    if not 0 <= layer <= model.cfg.n_layers:
        raise ValueError(f"layer must be in 0..{model.cfg.n_layers}, got {layer}.")
    return residual_stack(model, model.to_tokens(text))[0][layer, 0, -1].clone()


def project_away(
    vectors: Float[Tensor, "*axes d_model"], direction: Float[Tensor, "d_model"], alpha: float = 1.0
) -> Float[Tensor, "*axes d_model"]:
    """h − α p t if p = ⟨h, t⟩ / ⟨t, t⟩ > 0, else h; computed in float32, returned in the dtype of the vectors."""
    h, t = vectors.float(), direction.to(vectors.device).float()
    p = (h @ t) / (t @ t)
    return torch.where((p > 0)[..., None], (h - alpha * p[..., None] * t).to(vectors.dtype), vectors)


def _edit(where: Where, direction: Tensor, alpha: float) -> Callable:
    def hook(residual: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        places = where.mask(residual, hook)
        residual = residual.clone()
        residual[places] = project_away(residual[places], direction, alpha)
        return residual

    return hook


def _name(layer: int, n_layers: int | None) -> str:
    if layer == n_layers:
        return f"blocks.{layer - 1}.hook_resid_post"
    if layer < 0 or (n_layers is not None and layer > n_layers):
        raise ValueError(f"layers begin at 0 and end at L, got {layer}.")
    return f"blocks.{layer}.hook_resid_pre"
