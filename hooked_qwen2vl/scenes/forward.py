"""A packed batch through transformers' own model: what training and measuring both run."""

from __future__ import annotations

import torch
from transformers import Qwen2VLForConditionalGeneration

from .batches import Batch


def forward(model: Qwen2VLForConditionalGeneration, batch: Batch, image: torch.Tensor | None = None) -> torch.Tensor:
    """[batch pos d_model] normed residual streams of a packed batch.

    Args:
        image: [cell d_model] what stands at the image tokens' places instead of what the tower sees.
    """
    inner = model.model
    embeds = inner.language_model.embed_tokens(batch.tokens)
    if image is None:
        image = inner.visual(batch.pixels, grid_thw=batch.grid).pooler_output
    is_image = batch.tokens[0] == model.config.image_token_id  # every row has the same prefix
    embeds[:, is_image] = image.view(len(embeds), -1, embeds.shape[-1])
    return inner.language_model(
        inputs_embeds=embeds,
        position_ids=batch.position_ids.expand(3, len(embeds), -1),
        attention_mask=batch.mask,
        use_cache=False,
    ).last_hidden_state
