"""Exports the text decoder as a Qwen2 checkpoint (for Qwen3-VL: Qwen3), with the same weights and the same logits on text.

On text the three M-RoPE streams are equal, so plain rotary embeddings compute the same, and DeepStack adds nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen3Config

from .layers import readable
from .weights import OUR_ZEROS, text_table


def export_text_model(model: Any, folder: str | Path) -> Path:
    """Writes config.json, model.safetensors and the tokenizer, if the model has one.

    Args:
        folder: a new or empty folder.
    Returns:
        the folder.
    Raises:
        ValueError: the folder is not empty, or value biases were folded into b_O, which Qwen2 does not have.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose a new folder.")
    text = model.cfg.text
    tensors = dict(model.named_parameters(remove_duplicate=False))
    if any(bool(weight.any()) for name, weight in tensors.items() if OUR_ZEROS.match(name)):
        raise ValueError("value biases have been folded into b_O, which a Qwen2 or Qwen3 lacks: export before process_weights.")
    tied = model.unembed.weight is model.embed.weight
    exported = {} if tied else {"lm_head.weight": tensors["unembed.weight"]}
    for theirs, (ours,) in text_table(text).items():
        for layer in range(text.n_layers) if "{l}" in theirs else (0,):
            name = theirs.format(l=layer).replace("language_model.", "model.")
            exported[name] = readable(tensors[ours.format(l=layer)], ours)
    config = _config(model, tied)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.no_grad():
        save_file({n: w.detach().contiguous() for n, w in exported.items()}, folder / "model.safetensors", {"format": "pt"})
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    return folder


def _config(model: Any, tied: bool) -> Qwen2Config | Qwen3Config:
    """The configuration: Qwen3 if queries and keys are normalised, else Qwen2."""
    text = model.cfg.text
    kind, own = (Qwen3Config, {"head_dim": text.d_head, "attention_bias": text.qkv_bias}) if text.qk_norm else (Qwen2Config, {})
    config = kind(
        vocab_size=text.d_vocab,
        hidden_size=text.d_model,
        intermediate_size=text.d_mlp,
        num_hidden_layers=text.n_layers,
        num_attention_heads=text.n_heads,
        num_key_value_heads=text.n_key_value_heads,
        max_position_embeddings=text.n_ctx,
        rms_norm_eps=text.eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rotary_base},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=list(model.cfg.special.eos) or None,
        dtype=str(model.cfg.dtype).removeprefix("torch."),
        **own,
    )
    config.architectures = [f"{kind.__name__.removesuffix('Config')}ForCausalLM"]
    return config
