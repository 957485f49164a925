"""The size in bytes of an activation cache, computed from the shapes of prompts and model before anything runs.

Attention scores and patterns grow with the square of the prompt's length; all other activations grow with its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformer_lens.utilities import Slice, SliceInput

_SQUARE = ("hook_attn_scores", "hook_pattern")
_SMALL = 1 << 28  # caches with fewer bytes are never refused
_SHOWN = 3  # number of activations in messages


class CacheSize(int):
    """Number of bytes, an int.

    Attributes:
        by_hook: bytes of each kind of activation over all layers ("blocks.attn.hook_pattern"), largest first. A tensor with two names
            (`hook_resid_post` and the next `hook_resid_pre`) is counted once.
    """

    by_hook: dict[str, int]

    def __new__(cls, by_hook: dict[str, int]) -> CacheSize:
        size = super().__new__(cls, sum(by_hook.values()))
        size.by_hook = dict(sorted(by_hook.items(), key=lambda pair: -pair[1]))
        return size

    def __str__(self) -> str:
        largest = ", ".join(f"{name} {in_words(size)}" for name, size in list(self.by_hook.items())[:_SHOWN])
        return f"{in_words(int(self))} (largest: {largest})"


def cache_size(model: Any, inputs: Any, names: Iterable[str], pos_slice: Slice | SliceInput = None) -> CacheSize:
    """Bytes of a cache of these activations.

    Args:
        inputs: one or more prompts (`Inputs`).
        names: hook points.
        pos_slice: positions that are cached on the text side.
    """
    length = inputs.shape[1]
    kept = Slice.unwrap(pos_slice).apply(torch.empty(1, length, device="meta"), dim=1).numel()
    patches = sum(t * h * w for t, h, w in (visual.grid for visual in inputs.visuals))
    by_hook: dict[str, int] = {}
    names = set(names)
    for name in names:
        if _same_tensor(name, names) in names:
            continue
        vision = name.startswith("vision_")
        positions = (1, patches, patches) if vision else (len(inputs), kept, length)
        kind = re.sub(r"\.\d+(?=\.)", "", name)
        if held := _bytes_of(model.cfg, name, *positions):
            by_hook[kind] = by_hook.get(kind, 0) + held
    return CacheSize(by_hook)


def _same_tensor(name: str, names: set[str]) -> str:
    """Another name of the same tensor, or "". (After DeepStack adds to the stream, `hook_resid_pre` is a new tensor.)"""
    if found := re.fullmatch(r"(.*blocks\.)(\d+)\.hook_resid_pre", name):
        block = f"{found[1]}{int(found[2]) - 1}"
        return "" if f"{block}.hook_deepstack" in names else f"{block}.hook_resid_post"
    if found := re.fullmatch(r"(.*attn\.)hook_([qk])_normed", name):
        return f"{found[1]}{found[2]}_norm.hook_out"
    if found := re.fullmatch(r"(.*attn\.)([qk])_norm\.hook_in", name):
        return f"{found[1]}hook_{found[2]}"
    return ""


def _bytes_of(cfg: Any, name: str, batch: int, kept: int, length: int) -> int:
    vision = name.startswith("vision_")
    own, wide = cfg.dtype.itemsize, max(cfg.dtype.itemsize, 4)
    part, d_model = (cfg.vision, cfg.vision.d_vision) if vision else (cfg.text, cfg.text.d_model)
    if name.startswith("vision_projector"):
        return _of_projector(cfg, name, kept, own, wide)
    heads, kv_heads = part.n_heads, part.n_heads if vision else part.n_key_value_heads
    parent, _, hook = name.rpartition(".")
    if hook in _SQUARE:
        return batch * heads * kept * length * own
    if parent.endswith(("q_norm", "k_norm")):
        n = heads if parent.endswith("q_norm") else kv_heads
        return batch * n * kept * (wide if hook == "hook_scale" else part.d_head * own)
    if hook == "hook_scale":
        return batch * kept * wide
    if parent == "unembed":
        return batch * kept * cfg.text.d_vocab * own
    widths = {
        "hook_q": heads * part.d_head, "hook_rot_q": heads * part.d_head, "hook_z": heads * part.d_head, "hook_q_normed": heads * part.d_head,
        "hook_k": kv_heads * part.d_head, "hook_rot_k": kv_heads * part.d_head, "hook_v": kv_heads * part.d_head,
        "hook_k_normed": kv_heads * part.d_head, "hook_q_input": heads * d_model, "hook_attn_in": heads * d_model,
        "hook_k_input": kv_heads * d_model, "hook_v_input": kv_heads * d_model, "hook_result": heads * d_model,
        "hook_pre": part.d_mlp, "hook_pre_linear": part.d_mlp, "hook_post": part.d_mlp,
    }  # fmt: skip
    layer_norm = hook == "hook_normalized" and vision and part.layer_norm
    return batch * kept * widths.get(hook, d_model) * (wide if layer_norm else own)


def _of_projector(cfg: Any, name: str, patches: int, own: int, wide: int) -> int:
    vision, hook = cfg.vision, name.rpartition(".")[2]
    tokens = patches // vision.spatial_merge_size**2
    if hook == "hook_scale":
        return (tokens if ".deepstack." in name else patches) * wide  # DeepStack's mergers normalise after the merge
    if hook in ("hook_pre", "hook_post"):
        return tokens * vision.d_merge * own
    if hook == "hook_out":
        return tokens * vision.d_out * own
    return patches * vision.d_vision * (wide if hook == "hook_normalized" and vision.layer_norm else own)


def require_room(size: CacheSize, device: torch.device | str) -> None:
    """Refuses a cache that does not fit into the free memory of the device.

    Raises:
        ValueError: the message gives the size, the largest activations, the free memory, and what to leave out.
    """
    if size < _SMALL or (free := free_bytes(torch.device(device))) is None or size <= free:
        return
    square = sum(held for name, held in size.by_hook.items() if name.endswith(_SQUARE))
    if square > size // 2:
        rest = in_words(int(size) - square)
        help = (
            f"leave scores and patterns out, names_filter=lambda name: not name.endswith({_SQUARE}), which leaves {rest}, or keep the rows of "
            f"a few queries, pos_slice=-1"
        )
    else:
        help = "name the activations that are needed, names_filter=['blocks.5.hook_resid_post'], or keep a few positions, pos_slice=-1"
    raise ValueError(f"the cache of this run would hold {size}; {device} has {in_words(free)} free: {help}.")


def free_bytes(device: torch.device) -> int | None:
    """Bytes of free memory on a device; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    import psutil

    limits = [psutil.virtual_memory().available]
    group = Path("/sys/fs/cgroup")
    try:  # the limit of a container
        held = int((group / "memory.current").read_text())
        reclaimable = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        limits.append(int((group / "memory.max").read_text()) - held + (int(reclaimable[1]) if reclaimable else 0))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return max(0, min(limits))


def in_words(n: float) -> str:
    """Bytes as text, such as "3.6 GB"."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n = n / 1000
    return f"{n:.1f} GB"
