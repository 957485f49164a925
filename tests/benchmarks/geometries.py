"""Random models of three sizes, and prompts for them. The reference and ours share one set of weights.

small: 8 blocks of 512 under a tower of 4 blocks of 320; medium: 12 of 768 under 16 of 640; both float32.
2b: the published numbers, bfloat16, 151,936 tokens in the vocabulary.
"""

from __future__ import annotations

import numpy as np
import timing
import torch
from PIL import Image
from test_geometries import PUBLISHED
from tiny import tiny_config, tiny_processor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from hooked_qwen2vl import HookedQwen2VL, Inputs
from hooked_qwen2vl.config import convert_config

SIZES = {  # layers, d_model, heads, kv_heads, d_mlp, d_vocab; tower's layers, width, heads
    "small": (8, 512, 8, 2, 2048, 16384, 4, 320, 5),
    "medium": (12, 768, 12, 2, 4096, 32768, 16, 640, 10),
}
PART = 2**21 - 1  # numbers repeated at once: odd, so that no two tokens have the same row
DTYPES = {"small": torch.float32, "medium": torch.float32, "2b": torch.bfloat16}


def config(name: str) -> Qwen2VLConfig:
    """The configuration of a size."""
    if name == "2b":
        return Qwen2VLConfig.from_dict(PUBLISHED["qwen2_vl"])
    layers, d_model, heads, kv_heads, d_mlp, d_vocab, vision_layers, d_vision, vision_heads = SIZES[name]
    made = tiny_config().to_dict()
    half = d_model // heads // 2
    made["text_config"] |= {
        "vocab_size": d_vocab, "hidden_size": d_model, "intermediate_size": d_mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                            "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]},
    }  # fmt: skip
    made["text_config"].pop("layer_types", None)
    made["vision_config"] |= {
        "depth": vision_layers, "embed_dim": d_vision, "hidden_size": d_model, "num_heads": vision_heads, "mlp_ratio": 4,
    }  # fmt: skip
    made["tie_word_embeddings"] = False
    return Qwen2VLConfig.from_dict(made)


def reference(name: str, attention: str = "sdpa", dtype: torch.dtype | None = None) -> Qwen2VLForConditionalGeneration:
    """transformers' model with random weights; numbers are drawn once and repeated, which costs no time."""
    cfg = config(name)
    cfg._attn_implementation = attention
    dtype = dtype or DTYPES[name]
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(cfg)
    model = model.to(dtype).to_empty(device=timing.DEVICE).eval()
    pool = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).to(dtype).to(timing.DEVICE)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            flat, start = weight.view(-1), hash_of(key) % 2**20
            for first in range(0, len(flat), PART):
                part = flat[first : first + PART]
                part.copy_(pool[start : start + len(part)])
            matrix = weight.ndim > 1
            weight.mul_(weight.shape[-1] ** -0.5 if matrix else 0.1)
            if not matrix and "bias" not in key:
                weight.add_(1.0)
    model.tie_weights()
    _fill_buffers(model)
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 1
    return model


def hash_of(text: str) -> int:
    """A number for a name, the same in every process."""
    return sum((index + 1) * ord(letter) * 7919 for index, letter in enumerate(text))


def _fill_buffers(model: torch.nn.Module) -> None:
    """Rotary frequencies are computed when a module is made; on meta they were not."""
    for module in model.modules():
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and "inv_freq" in key:
                rotary = type(module)
                fresh = rotary(module.config) if hasattr(module, "config") else rotary(len(buffer) * 2)
                module._buffers[key] = getattr(fresh, key).to(timing.DEVICE)


def both(name: str, attention: str = "sdpa") -> tuple[HookedQwen2VL, Qwen2VLForConditionalGeneration]:
    """Ours and transformers', on the same storage."""
    hf = reference(name, attention)
    return HookedQwen2VL.from_hf(hf, tiny_processor()), hf


def picture(image_tokens: int) -> Image.Image:
    """An image of about so many tokens (28 × 28 pixels each), three rows for four columns."""
    rows = max(1, round((image_tokens * 3 / 4) ** 0.5))
    cols = max(1, round(image_tokens / rows))
    pixels = np.random.default_rng(0).integers(0, 256, (28 * rows, 28 * cols, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(model: HookedQwen2VL, image_tokens: int, batch: int = 1, template: bool = True) -> Inputs:
    """One picture and a question; the tiny tokenizer's ids are moved to where this vocabulary has them."""
    processor = tiny_processor(max_pixels=28 * 28 * 16384)
    cfg = convert_config(tiny_config())
    cfg.n_ctx = model.cfg.n_ctx
    small = processor.to_inputs(cfg, "what is this?", images=[picture(image_tokens)], template=template)
    tokens = small.tokens.clone()
    for name in ("image", "vision_start", "vision_end"):
        tokens[small.tokens == getattr(cfg.special, name)] = getattr(model.cfg.special, name)
    made = Inputs.build(tokens, model.cfg, None, small.visuals, small.pixels, small.segments)
    return (made if batch == 1 else made.repeat(batch)).to(timing.DEVICE)


def describe(name: str, inputs: Inputs) -> str:
    """Size of model and prompt, for the table."""
    images = int((inputs.token_types > 0).sum()) // len(inputs)
    many = f"{len(inputs)} × " if len(inputs) > 1 else ""
    return f"{name}, {many}{inputs.shape[1]} tokens ({images} image)"
