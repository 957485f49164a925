"""Direct path patching (Wang et al. 2022) into query, key and value inputs, also with grouped-query attention.

Only the path from head A to head B is patched: A's output, clean minus corrupted, is added to B's own copy of the residual
stream, before its norm; everything else still gets A's corrupted output. TransformerLens's own function requires that
every head has its own keys and values. Here the destination of a key or value path is a key-value head, which in a
grouped-query model several heads share.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from analyses.common.prompts import as_prompt
from analyses.edge_attribution import Metric
from hooked_qwen2vl.geometry import refuse_unaligned
from hooked_qwen2vl.protocols import Model


@torch.no_grad()
def direct_path_patch(
    model: Model,
    corrupted: Any,
    clean_cache: Any,
    corrupted_cache: Any,
    metric: Metric,
    source: tuple[int, int],
    component: Literal["q", "k", "v"] = "q",
    progress: bool = True,
) -> Float[Tensor, "layer head"]:
    """The metric when the path from one head to each later head's query, key or value input is patched, one head at a time.

    Args:
        clean_cache, corrupted_cache: caches with `attn.hook_z` of the source's layer.
        source: (layer, head) of head A.
        component: which input of head B is patched; for "k" and "v" the second axis of the result is key-value heads.
    Returns:
        [layer head]; NaN in the layers up to the source's, to which there is no path.
    Raises:
        ValueError: no such head, an unknown component, or caches and prompts whose positions do not correspond.
    """
    layer, head = source
    cfg = model.cfg
    if component not in ("q", "k", "v"):
        raise ValueError(f"component must be 'q', 'k' or 'v', got {component!r}.")
    if not (0 <= layer < cfg.n_layers and 0 <= head < cfg.n_heads):
        raise ValueError(f"there is no head {head} in layer {layer}: the model has {cfg.n_layers} × {cfg.n_heads}.")
    refuse_unaligned(clean_cache, corrupted_cache, "the clean and the corrupted cache")
    refuse_unaligned(clean_cache, as_prompt(model, corrupted), "the caches and the prompts")
    z_clean, z_corrupted = (cache["z", layer][:, :, head] for cache in (clean_cache, corrupted_cache))
    weight = model.blocks[layer].attn.W_O[head]
    delta = (z_clean.to(weight) - z_corrupted.to(weight)) @ weight
    n_heads = cfg.n_heads if component == "q" else cfg.n_key_value_heads
    results = torch.full((cfg.n_layers, n_heads), float("nan"))
    cells = [(to, h) for to in range(layer + 1, cfg.n_layers) for h in range(n_heads)]
    for to, to_head in tqdm(cells, desc=f"paths from L{layer}H{head}", disable=not progress, delay=2):

        def add(stream: Tensor, hook: Any, to_head: int = to_head) -> Tensor:
            stream[:, :, to_head] += delta.to(stream.device)
            return stream

        name = f"blocks.{to}.attn.hook_{component}_input"
        results[to, to_head] = metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, add)]))
    return results
