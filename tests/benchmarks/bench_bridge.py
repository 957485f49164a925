"""The text decoder beside TransformerLens's bridge on a Qwen2 of the same size and weights, in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import geometries
import torch
from timing import DEVICE, QUICK, Row, interleaved, report
from transformer_lens.model_bridge import TransformerBridge


@torch.no_grad()
def rows(name: str) -> Iterator[Row]:
    model, _ = geometries.both(name)
    with tempfile.TemporaryDirectory() as folder:
        bridge = TransformerBridge.boot_transformers(str(model.export_text_model(Path(folder) / "qwen2")), device=DEVICE)
    tokens = torch.randint(10, 250, (1, 128 if QUICK else 370), device=DEVICE)
    difference = (model(tokens) - bridge(tokens)).abs().max().item()
    size = f"{name}, {tokens.shape[1]} tokens of text"
    pair = interleaved(lambda: model(tokens), lambda: bridge(tokens))
    yield pair.row(0, "forward / TransformerLens bridge", size, note=f"largest difference of the logits {difference:.0e}")
    streams = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    pair = interleaved(
        lambda: model.run_with_cache(tokens, names_filter=streams),
        lambda: bridge.run_with_cache(tokens, names_filter=streams),
    )
    yield pair.row(0, "run_with_cache of the residual stream / TransformerLens bridge", size)
    pair = interleaved(lambda: model.run_with_cache(tokens), lambda: bridge.run_with_cache(tokens))
    yield pair.row(0, "run_with_cache by default / TransformerLens bridge", size)


if __name__ == "__main__":
    report("bridge", *(partial(rows, name) for name in (("small",) if QUICK else ("small", "medium"))))
