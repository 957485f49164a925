"""The plain forward with an image on Qwen2.5-VL and Qwen3-VL, beside transformers'.

    python bench_line.py [--quick]

Random models of 8 blocks of 512 under a tower of 6 blocks of 320; 16,384 tokens in the vocabulary, float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import geometries
import torch
from conftest import picture
from timing import BUDGET, QUICK, Row, interleaved, report
from tiny import LINE, randomise, tiny_processor, tiny_processor3

from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.selfcheck import reference_batch

TEXT = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
ROPE = {
    "qwen2_5_vl": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    "qwen3_vl": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10], "mrope_interleaved": True},
}
TOWER = {"depth": 6, "hidden_size": 320, "out_hidden_size": 512, "num_heads": 5, "intermediate_size": 1280}
OWN = {
    "qwen2_5_vl": {"window_size": 112, "fullatt_block_indexes": [2, 5]},
    "qwen3_vl": {"num_position_embeddings": 24**2, "deepstack_visual_indexes": [1, 3]},
}


def both(family: str) -> tuple[HookedQwen2VL, Any]:
    """Ours and transformers' with SDPA, over one set of weights."""
    kind, make = LINE[family]
    made = make().to_dict()
    made["text_config"] |= TEXT | {"rope_parameters": ROPE[family], "max_position_embeddings": 8192}
    made["text_config"].pop("layer_types", None)
    if family == "qwen3_vl":
        made["text_config"]["head_dim"] = 64
    made["vision_config"] |= TOWER | OWN[family]
    made["tie_word_embeddings"] = False
    config = type(make()).from_dict(made)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    hf = kind(config).eval()
    hf.set_attn_implementation("sdpa")
    randomise(hf)
    processor = (tiny_processor3 if family == "qwen3_vl" else tiny_processor)()
    return HookedQwen2VL.from_hf(hf, processor), hf


@torch.no_grad()
def rows(family: str) -> Iterator[Row]:
    model, hf = both(family)
    images = [picture(320, 192, seed) for seed in range(1 if QUICK else 5)]  # 60 image tokens each, or 77
    inputs = model.to_inputs("what is this?", images=images)
    batch, size = reference_batch(inputs), geometries.describe(family, inputs)

    def theirs() -> Any:
        hf.model.rope_deltas = None
        return hf(**batch, use_cache=False).logits

    difference = (model(inputs) - theirs()).abs().max().item() / theirs().std().item()
    pair = interleaved(lambda: model(inputs), theirs, budget=2 * BUDGET)
    yield pair.row(1, "forward / transformers SDPA", size, "≤ 1.00", f"largest difference of the logits {difference:.0e} of their spread")


if __name__ == "__main__":
    report("line", *(partial(rows, family) for family in OWN))
