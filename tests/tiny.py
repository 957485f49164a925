"""Tiny random models and processors with hostile numbers, and the reference's view of an `Inputs`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hooked_qwen2vl import Inputs, Processor
from hooked_qwen2vl.selfcheck import reference_batch

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# The template of the published checkpoints.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in "
    "content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value "
    "}}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content "
    "%}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: "
    "{% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SYSTEM = "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
CHAT_TEMPLATE3 = CHAT_TEMPLATE.replace(_SYSTEM, "")


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(rest))]


def merges_of(*words: str) -> list[tuple[str, str]]:
    """Merges that make each word one token, its bytes joined from the left."""
    symbols, merges = byte_symbols(), []
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    for word in words:
        letters = [symbols[order.index(byte)] for byte in (word if isinstance(word, bytes) else word.encode())]
        merges += [("".join(letters[:n]), letters[n]) for n in range(1, len(letters))]
    return list(dict.fromkeys(merges))


def tiny_tokenizer(more: Sequence[str | bytes] = ()) -> Qwen2Tokenizer:
    """Bytes, a few merges, and the real special tokens; `more` are further words that are one token."""
    merges = [("r", "e"), ("re", "d"), ("Ġ", "red"), ("b", "l"), ("u", "e"), ("bl", "ue"), ("Ġ", "blue"), ("t", "h")]
    merges += [merge for merge in merges_of(*more) if merge not in merges]
    vocab = {symbol: i for i, symbol in enumerate(byte_symbols() + [a + b for a, b in merges])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def tiny_processor(min_pixels: int = 28 * 28, max_pixels: int = 28 * 28 * 64, tokenizer: Qwen2Tokenizer | None = None) -> Processor:
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return Processor(tokenizer or tiny_tokenizer(), Qwen2VLImageProcessorPil(size=size), CHAT_TEMPLATE, size)


def tiny_processor3(tokenizer: Qwen2Tokenizer | None = None, max_pixels: int = 32 * 32 * 64) -> Processor:
    """Qwen3-VL's: patches of 16 pixels, other means, and (for want of the published one) a template without a system prompt."""
    size = {"shortest_edge": 32 * 32, "longest_edge": max_pixels}
    images = Qwen2VLImageProcessorPil(size=size, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Processor(tokenizer or tiny_tokenizer(), images, CHAT_TEMPLATE3, size)


def tiny_config(
    n_heads: int = 4, n_key_value_heads: int = 2, tie: bool = False, n_layers: int = 3, vision_layers: int = 2,
    tokenizer: Qwen2Tokenizer | None = None, d_vocab: int | None = None,
) -> Qwen2VLConfig:  # fmt: skip
    """d_vision ≠ d_model, uneven M-RoPE sections, few of everything, the tokenizer's ids (the tiny one's)."""
    tokenizer = tokenizer or tiny_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    d_head = 16
    return Qwen2VLConfig(
        text_config={
            "vocab_size": d_vocab or len(tokenizer) + 3,
            "hidden_size": n_heads * d_head,
            "intermediate_size": 72,
            "num_hidden_layers": n_layers,
            "num_attention_heads": n_heads,
            "num_key_value_heads": n_key_value_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": vision_layers,
            "embed_dim": 48,
            "hidden_size": n_heads * d_head,
            "num_heads": 3,
            "mlp_ratio": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie,
    )


def _ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def tiny_config25(
    n_heads: int = 4, n_key_value_heads: int = 2, tie: bool = False, n_layers: int = 3, vision_layers: int = 3, window: int = 56,
    full: tuple[int, ...] = (1,), tokens_per_second: int = 3,
) -> Qwen2_5_VLConfig:  # fmt: skip
    """Windows of 2×2 image tokens and one block without; d_vision ≠ d_model; time positions that are not frames."""
    text = tiny_config(n_heads, n_key_value_heads, tie, n_layers).text_config.to_dict()
    return Qwen2_5_VLConfig(
        text_config={key: value for key, value in text.items() if key != "model_type"},
        vision_config={
            "depth": vision_layers, "hidden_size": 48, "out_hidden_size": n_heads * 16, "num_heads": 3, "intermediate_size": 56,
            "window_size": window, "fullatt_block_indexes": list(full), "tokens_per_second": tokens_per_second,
        },
        tie_word_embeddings=tie,
        **_ids(tiny_tokenizer()),
    )  # fmt: skip


def tiny_config3(
    n_heads: int = 4, n_key_value_heads: int = 2, tie: bool = False, n_layers: int = 4, vision_layers: int = 4,
    deepstack: tuple[int, ...] = (0, 2), side: int = 5,
) -> Qwen3VLConfig:  # fmt: skip
    """Heads that do not share the stream's width, a small table of positions, DeepStack after other tower blocks than 0, 1, …"""
    tokenizer = tiny_tokenizer()
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 3, "hidden_size": 56, "intermediate_size": 72, "num_hidden_layers": n_layers,
            "num_attention_heads": n_heads, "num_key_value_heads": n_key_value_heads, "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
            "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "bos_token_id": None,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "tie_word_embeddings": tie,
        },
        vision_config={
            "depth": vision_layers, "hidden_size": 48, "out_hidden_size": 56, "num_heads": 3, "intermediate_size": 64,
            "num_position_embeddings": side**2, "deepstack_visual_indexes": list(deepstack),
        },
        tie_word_embeddings=tie,
        **_ids(tokenizer),
    )  # fmt: skip


LINE = {
    "qwen2_vl": (Qwen2VLForConditionalGeneration, tiny_config),
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, tiny_config25),
    "qwen3_vl": (Qwen3VLForConditionalGeneration, tiny_config3),
}


def tiny_hf(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, family: str = "qwen2_vl", **config
) -> PreTrainedModel:
    """A reference model whose norms and biases are random and whose layers all matter."""
    torch.manual_seed(seed)
    kind, make = LINE[family]
    config = make(**config)
    config._attn_implementation = attention
    model = kind(config).eval()
    model.set_attn_implementation(attention)
    randomise(model)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    return model.to(dtype)


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Norms around 1, biases around 0, matrices large enough that logits differ between inputs."""
    for name, weight in model.named_parameters():
        if "norm" in name or "ln_q" in name or name.endswith("bias"):
            weight.add_(0.3 * torch.randn_like(weight))
        elif "patch_embed" not in name:
            weight.normal_(0.0, 1.0 * weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3)


@torch.no_grad()
def reference_logits(hf: PreTrainedModel, inputs: Inputs, **changes) -> torch.Tensor:
    """The reference's logits; nothing is left on the model from the call before."""
    hf.model.rope_deltas = None
    return hf(**{**reference_batch(inputs), **changes}).logits


def spread(logits: torch.Tensor) -> float:
    """Standard deviation of the logits over the vocabulary: the scale errors are measured against."""
    return logits.double().std(-1).mean().item()


def real_rows(values: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The positions that are not padding."""
    return values[inputs.attention_mask.bool()]
