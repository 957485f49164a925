"""The exact geometry of Qwen2-VL-2B, with random weights in a sharded bfloat16 folder as published.

The published weights are not reachable here; this shows that they would load and run.
"""

from __future__ import annotations

import json
import subprocess
import sys

import matplotlib.cbook
import pytest
import torch
from conftest import picture
from PIL import Image
from safetensors.torch import save_file
from tiny import reference_logits, spread, tiny_processor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from hooked_qwen2vl import HookedQwen2VL

pytestmark = [pytest.mark.slow, pytest.mark.alone]

# Float32, of the logits' spread; over 60 million logits and 60 layers the reference's own two attention paths differ
# by more than this, and then they are the measure.
RELATIVE = 1e-5
CONFIG = {  # config.json of Qwen2-VL-2B-Instruct
    "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 1536,
    "initializer_range": 0.02, "intermediate_size": 8960, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "qwen2_vl", "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
    "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
                      "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
                      "temporal_patch_size": 2},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936,
}  # fmt: skip
# Anonymous memory (kB) before and after loading, in a fresh interpreter.
MEASURE = """
import sys, torch, transformers, hooked_qwen2vl
from transformers import Qwen2VLForConditionalGeneration
def anonymous():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
before = anonymous()
if sys.argv[2] == "ours":
    model = hooked_qwen2vl.HookedQwen2VL.from_pretrained(sys.argv[1])
else:
    model = Qwen2VLForConditionalGeneration.from_pretrained(sys.argv[1], dtype="auto")
print("MB", (anonymous() - before) // 1024)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shards, old key embeddings, norms and biases random. Matrices are cut from one pool of random numbers."""
    folder = tmp_path_factory.mktemp("qwen2-vl-2b")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(CONFIG)).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2**24, generator=generator)
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, (name, shape) in enumerate(shapes.items()):
        start = int(torch.randint(2**23, (1,), generator=generator))
        flat = pool[start:].repeat(shape.numel() // (2**24 - start) + 1)[: shape.numel()]
        small = len(shape) == 1
        weight = flat * (0.1 if small else 0.03) + (1.0 if small and "bias" not in name else 0.0)
        old = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        shards[number % 2][old] = weight.reshape(shape).bfloat16()
    index = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def inputs_for(model, image, **settings):
    """A prompt in the tiny tokenizer's words: its special tokens moved to where this vocabulary has them."""
    from hooked_qwen2vl import Inputs

    processor = tiny_processor(**settings)
    from tiny import tiny_config

    from hooked_qwen2vl.config import convert_config

    cfg = convert_config(tiny_config())
    cfg.n_ctx = model.cfg.n_ctx
    small = processor.to_inputs(cfg, "what is this?", images=[image])
    tokens = small.tokens.clone()
    for ours, theirs in (("image", "image"), ("vision_start", "vision_start"), ("vision_end", "vision_end")):
        tokens[small.tokens == getattr(cfg.special, ours)] = getattr(model.cfg.special, theirs)
    return Inputs.build(tokens, model.cfg, None, small.visuals, small.pixels, small.segments)


def test_loading_needs_little_memory_of_its_own(folder):
    figures = {}
    for whose in ("ours", "theirs"):
        run = subprocess.run([sys.executable, "-c", MEASURE, str(folder), whose], capture_output=True, text=True, check=True)
        figures[whose] = int(run.stdout.split("MB")[1])
    print(f"anonymous memory of loading: ours {figures['ours']} MB, transformers {figures['theirs']} MB")
    assert figures["ours"] <= 100, figures


def test_the_folder_equals_the_reference(folder):
    """In bfloat16 no worse than the reference against float32 logits, then in float32 to rounding, on a photograph."""
    hf = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    model = HookedQwen2VL.from_pretrained(folder)
    assert model.cfg.dtype == torch.bfloat16 and hf.dtype == torch.bfloat16
    small = inputs_for(model, picture(84, 56), min_pixels=784)
    with torch.no_grad():
        half, theirs_half = model(small).float(), reference_logits(hf, small).float()
    del model
    hf.float()
    model = HookedQwen2VL.from_hf(hf)
    exact = reference_logits(hf, small)
    ours, theirs = (half - exact).pow(2).mean().sqrt(), (theirs_half - exact).pow(2).mean().sqrt()
    assert ours <= 1.25 * theirs
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = Image.open(file).convert("RGB")
    inputs = inputs_for(model, photograph, min_pixels=56 * 56, max_pixels=28 * 28 * 16384)
    assert inputs.grid() == (21, 18)
    with torch.no_grad():
        logits = model(inputs)
        expected = reference_logits(hf, inputs)
        hf.set_attn_implementation("eager")
        eager = reference_logits(hf, inputs)
    scale = spread(expected)
    ours, theirs = ((x - expected).abs().max().item() / scale for x in (logits, eager))
    print(f"photograph, float32, relative to the spread: ours {ours:.1e}, the reference's eager path {theirs:.1e}")
    assert ours <= max(RELATIVE, 1.5 * theirs)
