"""Compares this model with transformers' model of the same weights, stage by stage.

1. Prompts: a synthetic image that is not square with a question, and a left-padded batch of it with a text-only prompt.
2. The reference (transformers' class of the same architecture, from the same folder) runs with torch hooks on its modules.
3. The same activations are read from this model's cache: positions, patch embedding, every tower block, projector, every decoder
   block, logits; then greedy tokens with and without a key-value cache.
4. The error of a stage is its largest difference divided by the reference's standard deviation. Look first at the first stage
   whose error is above the tolerance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from .inputs import Inputs
from .positions import IMAGE, VIDEO, patches_of, window_order

QUESTION = "What color is the square?"
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.05}
NEW_TOKENS = 8


def synthetic_image() -> Image.Image:
    """A coloured gradient with a square, 168 × 112 pixels, without any symmetry."""
    y, x = np.mgrid[0:112, 0:168]
    pixels = np.stack([x * 255 / 167, y * 255 / 111, (x + y) % 256], axis=-1).astype(np.uint8)
    pixels[28:70, 98:140] = (220, 30, 40)
    return Image.fromarray(pixels)


@torch.no_grad()
def self_check(model: Any, hf: Any, image: Image.Image | None = None, question: str = QUESTION) -> pd.DataFrame:
    """Compares a HookedQwen2VL with a transformers model of the same weights and dtype.

    Args:
        model: a HookedQwen2VL with a processor.
        hf: transformers' model of the same architecture.
        image: None: the synthetic image. question: about the image.
    Returns:
        one row per stage, in the order of the computation: stage, error (relative to the standard deviation), tolerance, ok.
    """
    image = synthetic_image() if image is None else image
    inputs = model.to_inputs(question, images=[image])
    batch = model.to_inputs([question, "Name a color."], images=[[image], []])
    tolerance = TOLERANCES[model.cfg.dtype]
    video = model.to_inputs(question, videos=[[synthetic_image()] * 4], fps=1 if model.cfg.vision.needs_fps else None)
    rows = [("positions", _position_error(inputs, hf), 0.0), ("positions of a video", _position_error(video, hf), 0.0)]
    theirs = reference_stages(hf, inputs)
    logits, cache = model.run_with_cache(inputs, names_filter=[name for name in theirs if name != "logits"])
    for name, expected in theirs.items():
        ours = logits if name == "logits" else cache[name]
        rows.append((name, relative_error(ours, expected), tolerance))
    seen = batch.attention_mask.bool()
    padded = relative_error(model(batch)[seen], reference_stages(hf, batch)["logits"][seen])
    rows.append(("logits of a left-padded batch", padded, tolerance))
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "stop_at_eos": False, "verbose": False}
    expected = reference_tokens(hf, batch)
    for cached in (True, False):
        tokens = model.generate(batch, use_past_kv_cache=cached, return_type="tokens", **settings)
        wrong = (tokens[:, -NEW_TOKENS:] != expected[:, -NEW_TOKENS:]).float().mean().item()
        rows.append((f"greedy tokens, {'cached' if cached else 'uncached'} (share that differs)", wrong, 0.0))
    table = pd.DataFrame(rows, columns=["stage", "error", "tolerance"])
    table["ok"] = table["error"] <= table["tolerance"]
    return table


def reference_tokens(hf: Any, batch: Inputs, n: int = NEW_TOKENS) -> Tensor:
    """The prompts followed by n greedy tokens of the reference, without the checkpoint's generation settings (such as penalties)."""
    hf.model.rope_deltas = None  # state from earlier calls
    theirs, hf.generation_config = hf.generation_config, GenerationConfig(pad_token_id=0)
    try:
        return hf.generate(**reference_batch(batch), max_new_tokens=n, do_sample=False, eos_token_id=-1)
    finally:
        hf.generation_config = theirs


def reference_batch(inputs: Inputs) -> dict[str, Tensor]:
    """The arguments of transformers' forward for the same prompts."""
    batch = {
        "input_ids": inputs.tokens,
        "attention_mask": inputs.attention_mask,
        "mm_token_type_ids": inputs.token_types.int(),
    }
    sizes = [visual.n_patches for visual in inputs.visuals]
    packs = inputs.pixels.split(sizes) if sizes else []
    names = {IMAGE: ("pixel_values", "image_grid_thw"), VIDEO: ("pixel_values_videos", "video_grid_thw")}
    for kind, (pixels, grids) in names.items():
        chosen = [(patches, visual.grid) for patches, visual in zip(packs, inputs.visuals) if visual.kind == kind]
        if chosen:
            batch[pixels] = torch.cat([patches for patches, _ in chosen])
            batch[grids] = torch.tensor([grid for _, grid in chosen], device=inputs.device)
    seconds = [visual.seconds_per_frame for visual in inputs.visuals if visual.seconds_per_frame is not None]
    return {**batch, "second_per_grid_ts": torch.tensor(seconds)} if seconds else batch


@torch.no_grad()
def reference_stages(hf: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Our hook name -> the reference's activation after that stage, in order; and "logits".

    For prompts with both images and videos only the decoder's, because the reference runs its tower separately for each.
    """
    stages: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else getattr(output, "pooler_output", output)
            stages[name] = value[None] if name.startswith("vision") else value

        return hook

    mixed = len({visual.kind for visual in inputs.visuals}) > 1
    watched = {name: module for name, module in _watched(hf).items() if not (mixed and name.startswith("vision"))}
    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    hf.model.rope_deltas = None  # state from earlier calls
    try:
        logits = hf(**reference_batch(inputs)).logits
    finally:
        for handle in handles:
            handle.remove()
    embedded = "vision_encoder.hook_patch_embed"
    if embedded in stages and (window := inputs.visuals[0].window) is not None:  # the reference sorts patches by window after embedding
        order, _ = window_order(inputs.grids, inputs.visuals[0].merge, window)
        stages[embedded] = stages[embedded][:, patches_of(order, inputs.visuals[0].merge)]
    return {**{name: stages[name] for name in watched if name in stages}, "logits": logits}


def _watched(hf: Any) -> dict[str, Any]:
    """Our hook name -> the reference's module with the same output."""
    visual, text = hf.model.visual, hf.model.language_model
    watched = {"vision_encoder.hook_patch_embed": visual.patch_embed}
    watched |= {f"vision_encoder.blocks.{i}.hook_resid_post": block for i, block in enumerate(visual.blocks)}
    mergers = getattr(visual, "deepstack_merger_list", ())
    watched |= {f"vision_projector.deepstack.{k}.hook_out": merger for k, merger in enumerate(mergers)}
    watched |= {"vision_projector.hook_out": visual}  # not its merger, whose output is not in raster order with windows
    for i, block in enumerate(text.layers):
        watched |= {f"blocks.{i}.hook_attn_out": block.self_attn, f"blocks.{i}.hook_mlp_out": block.mlp}
        watched |= {f"blocks.{i}.hook_resid_post": block}
    return watched


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference divided by the reference's standard deviation; infinite for different shapes or NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()  # a Mac's GPU has no float64
    error = float((ours - theirs).abs().max() / theirs.std())
    return error if error == error else float("inf")


def _position_error(inputs: Inputs, hf: Any) -> float:
    batch = reference_batch(inputs)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    theirs, delta = hf.model.get_rope_index(**{name: batch[name] for name in names if name in batch})
    same = torch.equal(inputs.position_ids, theirs) and torch.equal(inputs.rope_delta, delta.flatten())
    return 0.0 if same else float((inputs.position_ids - theirs).abs().max() + (inputs.rope_delta != delta[:, 0]).sum())
