"""The text decoder as a Qwen2 folder that any tool loads: the same weights, the same numbers on text.

On text the three M-RoPE streams are equal, so plain rotary embeddings compute the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config

from .layers import readable
from .weights import OUR_ZEROS, TEXT_TABLE


def export_text_model(model: Any, folder: str | Path) -> Path:
    """Writes config.json, model.safetensors and, where there is one, the tokenizer.

    Args:
        folder: must not exist yet, or be empty.
    Returns:
        the folder.
    Raises:
        ValueError: the folder holds something; or processed weights, whose output bias a Qwen2 has no place for.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose a new folder.")
    text = model.cfg.text
    tensors = dict(model.named_parameters(remove_duplicate=False))
    if any(bool(weight.any()) for name, weight in tensors.items() if OUR_ZEROS.match(name)):
        raise ValueError("value biases have been folded into b_O, which a Qwen2 lacks: export before process_weights.")
    tied = model.unembed.weight is model.embed.weight
    exported = {} if tied else {"lm_head.weight": tensors["unembed.weight"]}
    for theirs, (ours,) in TEXT_TABLE.items():
        for layer in range(text.n_layers) if "{l}" in theirs else (0,):
            name = theirs.format(l=layer).replace("language_model.", "model.")
            exported[name] = readable(tensors[ours.format(l=layer)], ours)
    config = Qwen2Config(
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
    )
    config.architectures = ["Qwen2ForCausalLM"]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.no_grad():
        save_file({n: w.detach().contiguous() for n, w in exported.items()}, folder / "model.safetensors", {"format": "pt"})
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    return folder
