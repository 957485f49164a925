"""A patching sweep against TransformerLens's plain loop, and the share of what the arithmetic allows.

    OMP_NUM_THREADS=2 python tests/benchmarks/bench_patching.py [rounds] [--words 8000,151936] [--batch-size 16]

12 layers × 768 under a tower of 16 × 640, an image of 280 × 392 pixels (140 tokens). In each round, layer by layer
and interleaved: our sweep of every position of the layer, and the loop's time
for a few cells of it (a cell costs the loop the same wherever it is), once with the image as it comes (the tower runs for
every cell) and once on encoded inputs. A round gives one ratio of the whole sweep; the figure is the median over rounds.

What the arithmetic allows: multiply-adds of the loop over those of the suffixes (decoder from the patched block and
position on, unembedding at one position, no tower), counted from the shapes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import geometries
import pandas as pd
import timing
import torch
from tiny import tiny_processor
from transformer_lens import patching

from analyses.patching import patch_sweep
from hooked_qwen2vl import HookedQwen2VL


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--words", default="8000,151936")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=140)
    parser.add_argument("--mlp", type=int, default=4096, help="width of the decoder's MLPs")
    parser.add_argument("--short", action="store_true", help="no chat template: bytes are tokens here, and a real template is 30")
    parser.add_argument("--layers", default="1,4,7,10", help="evenly spaced ones stand for all twelve: their mean suffix is the same")
    options = parser.parse_args()
    options.layers = [int(layer) for layer in options.layers.split(",")]
    rows = [row for words in options.words.split(",") for row in _measure(int(words), options)]
    timing.report("patching", rows)


@torch.no_grad()
def _measure(words: int, options: argparse.Namespace) -> list[timing.Row]:
    sizes = list(geometries.SIZES["medium"])
    sizes[4:6] = options.mlp, words
    geometries.SIZES["medium"] = tuple(sizes)
    model = HookedQwen2VL.from_hf(geometries.reference("medium"), tiny_processor())
    clean, corrupted = (geometries.prompt(model, options.tokens, template=not options.short) for _ in range(2))
    noise = torch.randn(corrupted.pixels.shape, generator=torch.Generator().manual_seed(1))
    corrupted.pixels.copy_(noise)
    encoded = model.encode(corrupted)
    _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith("resid_pre"))
    n = clean.shape[1]
    size = f"12 × 768 (MLP {options.mlp}), tower 16 × 640, {n} tokens ({int((clean.token_types[0] > 0).sum())} image), {words} words"

    def metric(logits):
        return logits[:, -1, 3] - logits[:, -1, 4]

    def loop(prompt, layer):
        """Seconds of one cell of TransformerLens's own loop."""
        where = torch.randint(n, (1,)).item()
        frame = pd.DataFrame({"layer": [layer], "pos": [where]})
        return _wall(
            lambda: patching.generic_activation_patch(
                model, prompt, cache, lambda z: metric(z)[0], patching.layer_pos_patch_setter, "resid_pre", index_df=frame
            )
        )

    def sweep(layer):
        return _wall(
            lambda: patch_sweep(
                model, clean, encoded, metric, layers=[layer], batch_size=options.batch_size, progress=False
            )
        )

    sweep(model.cfg.n_layers - 1), loop(corrupted, 0), loop(encoded, 0)  # warm
    ratios: dict[str, list[float]] = {"with the image": [], "encoded": []}
    whole = []
    for _ in range(options.rounds):
        ours, theirs = 0.0, {"with the image": [], "encoded": []}
        for layer in options.layers:
            theirs["with the image"].append(loop(corrupted, layer))
            theirs["encoded"].append(loop(encoded, layer))
            ours += sweep(layer)
        whole.append(ours)
        for name, seconds in theirs.items():
            ratios[name].append(sum(seconds) / len(seconds) * n * len(options.layers) / ours)
    ideal = _ideal(model, clean, options.layers)
    rows = []
    for name, goal in (("with the image", 15), ("encoded", 3.8)):
        value, low, high = timing.median_interval(ratios[name])
        share = value / ideal[name]
        note = f"ideal {ideal[name]:.1f} ×, share {share:.2f}; our sweep {sorted(whole)[len(whole) // 2]:.1f} s, {options.rounds} rounds"
        rows.append(timing.Row(6, f"patching sweep, loop / ours, {name}", size, value, "×", low, high, f"≥ {goal}", note))
        rows.append(timing.Row(6, f"share of the ideal, {name}", size, share, "×", low / ideal[name], high / ideal[name], "≥ 0.75"))
    return rows


def _wall(call: Callable) -> float:
    """Seconds by the clock: two threads share the work, so the process's own time would count both."""
    timing.synchronise()
    start = time.perf_counter()
    call()
    timing.synchronise()
    return time.perf_counter() - start


def _ideal(model: HookedQwen2VL, inputs, layers: list[int]) -> dict[str, float]:
    """Multiply-adds of the loop over ours, summed over all cells."""
    cfg, n = model.cfg, inputs.shape[1]
    per_token = sum(p.numel() for p in model.blocks[0].parameters() if p.ndim > 1)
    attention = 2 * cfg.n_heads * cfg.d_head  # for each query and key: scores and values

    def decoder(n_layers: int, first: int) -> float:
        queries = n - first
        return n_layers * (per_token * queries + attention * (n * (n + 1) - first * (first + 1)) / 2)

    unembed = cfg.d_model * cfg.d_vocab
    patches = len(inputs.pixels)
    tower = sum(p.numel() for p in model.vision_encoder.parameters() if p.ndim > 1) * patches
    tower += cfg.vision.n_layers * 2 * cfg.vision.d_vision * patches**2
    tower += sum(p.numel() for p in model.vision_projector.parameters() if p.ndim > 1) * patches / 4
    ours = sum(decoder(cfg.n_layers - layer, place) + unembed for layer in layers for place in range(n))
    plain = (decoder(cfg.n_layers, 0) + n * unembed) * n * len(layers)
    return {"with the image": (plain + tower * n * len(layers)) / ours, "encoded": plain / ours}


if __name__ == "__main__":
    main()
