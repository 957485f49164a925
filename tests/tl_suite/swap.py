"""A pytest plugin for TransformerLens's own tests: what they boot is a HookedQwen2VL of the size they ask for.

Every prompt has an image: its first token's embedding is that of a picture of one image token, whose M-RoPE position is the
token's own, so that shapes and positions are those that the tests expect. TL_SUITE_HEADS=grouped halves the key-value heads.
TL_SUITE_RESULTS names the file that outcomes are written to.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import randomise, tiny_processor
from transformer_lens.model_bridge import TransformerBridge, sources
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from hooked_qwen2vl import HookedQwen2VL, Processor
from hooked_qwen2vl.geometry import Visual
from hooked_qwen2vl.positions import IMAGE

GPT2 = SimpleNamespace(n_layers=12, d_model=768, n_heads=12, d_head=64, d_mlp=3072, d_vocab=50257, n_ctx=1024)
GROUPED = os.environ.get("TL_SUITE_HEADS") == "grouped"
OUTCOMES: dict[str, list[str]] = {}


class Seeing(HookedQwen2VL):
    """A HookedQwen2VL that sees a picture where each prompt's first token was."""

    def as_inputs(self, *args, **kwargs):
        inputs = super().as_inputs(*args, **kwargs)
        if inputs.visuals:
            return inputs
        first = inputs.attention_mask.argmax(-1)
        rows = torch.arange(len(inputs))
        types = inputs.token_types.clone()
        types[rows, first] = IMAGE
        side = self.cfg.vision.spatial_merge_size
        pixels = torch.randn(side * side, self.cfg.vision.d_patch, generator=torch.Generator().manual_seed(0))
        segments = tuple(
            tuple("image[0]" if place == at else name for place, name in enumerate(row)) for row, at in zip(inputs.segments, first.tolist())
        )
        visuals = tuple(Visual(row, IMAGE, (1, side, side), (28.0, 28.0), side) for row in rows.tolist())
        return replace(inputs, token_types=types, visuals=visuals, pixels=pixels.repeat(len(inputs), 1), segments=segments)


def seeing(size, dtype=None, seed: int = 0, processor: Processor | None = None, image: bool = True) -> HookedQwen2VL:
    """A random model of this size: d_model, n_layers, n_heads, d_head, d_mlp, d_vocab (None: the tokenizer's), n_ctx."""
    head = size.d_head // 2
    torch.manual_seed(seed)
    kv_heads = getattr(size, "n_key_value_heads", None) or (size.n_heads // 2 if GROUPED and size.n_heads % 2 == 0 else size.n_heads)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": size.d_vocab or len(processor.tokenizer), "hidden_size": size.d_model, "intermediate_size": size.d_mlp or 4 * size.d_model,
            "num_hidden_layers": size.n_layers, "num_attention_heads": size.n_heads, "num_key_value_heads": kv_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [head - 2 * (head // 3), head // 3, head // 3]},
            "max_position_embeddings": size.n_ctx, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": size.d_model, "num_heads": 2, "mlp_ratio": 2},
        tie_word_embeddings=False,
    )  # fmt: skip
    if processor is not None:
        config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        config.video_token_id = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    hf = Qwen2VLForConditionalGeneration(config).eval()
    randomise(hf)
    model = (Seeing if image else HookedQwen2VL).from_hf(hf if dtype is None else hf.to(dtype), processor)
    if processor is None:  # a token of any id is text: the pictures come beside
        model.cfg.special = replace(model.cfg.special, image=-1, video=-1, vision_start=-1, vision_end=-1, pad=None)
    return model


def boot_native(cfg, *args, dtype=None, **kwargs) -> Seeing:
    return seeing(cfg, dtype or getattr(cfg, "dtype", None), getattr(cfg, "seed", None) or 0)


def boot_transformers(name, *args, dtype=None, **kwargs) -> Seeing:
    return seeing(GPT2, dtype, processor=tiny_processor())


def build_bridge_from_module(module, *args, **kwargs) -> Seeing:
    """Of the size of the module's configuration, by whichever names it calls it."""
    config = getattr(module.config, "text_config", None) or module.config
    heads = config.num_attention_heads
    size = SimpleNamespace(
        n_layers=config.num_hidden_layers, d_model=config.hidden_size, n_heads=heads, d_mlp=getattr(config, "intermediate_size", None),
        d_head=config.hidden_size // heads, d_vocab=config.vocab_size, n_ctx=config.max_position_embeddings,
    )  # fmt: skip
    return seeing(size)


TransformerBridge.boot_native = staticmethod(boot_native)
TransformerBridge.boot_transformers = staticmethod(boot_transformers)
sources.build_bridge_from_module = build_bridge_from_module


def pytest_runtest_logreport(report):
    """The worst of a test's three phases, and the last line of what was said."""
    kept = OUTCOMES.get(report.nodeid, ["passed", ""])
    if report.failed or (report.skipped and kept[0] == "passed"):
        kept = ["failed" if report.failed else "skipped", _said(report)]
    OUTCOMES[report.nodeid] = kept


def pytest_collectreport(report):
    if report.failed:
        OUTCOMES[report.nodeid] = ["failed", _said(report)]


def _said(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash is not None else report.longrepr).split())[:300]


def pytest_sessionfinish(session):
    if path := os.environ.get("TL_SUITE_RESULTS"):
        Path(path).write_text(json.dumps(OUTCOMES, indent=1))
