"""Patching sweeps beside TransformerLens's plain loop: the gain, its share of the arithmetic's, growth and memory.

    python bench_patching.py [--quick]

1. A sweep of the residual stream is timed by sampling. Its setting up is timed whole; layers are sampled evenly, and
   in each of them forwards of 16 cells at evenly spaced places stand for the layer's other forwards (a suffix's
   cost falls evenly with its place). The loop costs the same for every cell: one is timed for every layer sampled,
   with the image as it comes (the tower runs for every cell) and on encoded inputs. A round gives one ratio.
2. What the arithmetic allows: multiply-adds of the loop over those of the suffixes (decoder from the patched block
   and position on, unembedding at one position, no tower), counted from the shapes.
3. The picture: gain and allowance over image size and over depth.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import geometries
import matplotlib.pyplot as plt
import pandas as pd
import timing
import torch
from timing import MIB, QUICK, Row
from tiny import tiny_processor
from transformer_lens import patching

from analyses.patched_runs import Cell, DecoderRuns
from analyses.patching import patch_sweep
from hooked_qwen2vl import HookedQwen2VL, Inputs
from hooked_qwen2vl.config import convert_config

ROUNDS = 3 if QUICK else 5
BATCH = 16  # cells a forward, `patch_sweep`'s default
KINDS = ("with the image", "encoded")
PICTURE = Path(os.environ.get("BENCH_OUT", ".")) / "patching.png"
#        layers, d_model, heads, kv_heads, d_mlp, d_vocab; tower's layers, width, heads
LIGHT = (12, 768, 12, 2, 2048, 8000, 16, 640, 10)
MEDIUM = (12, 768, 12, 2, 4096, 8000, 16, 640, 10)
GROWTH = (8, 512, 8, 2, 2048, 8000, 8, 512, 8)


@dataclass(frozen=True)
class Setting:
    """A pair of prompts and a model to patch between them."""

    model: HookedQwen2VL
    clean: Inputs
    corrupted: Inputs

    @classmethod
    def of(cls, shape: tuple[int, ...], image_tokens: int, template: bool = True) -> Setting:
        geometries.SIZES["patched"], geometries.DTYPES["patched"] = shape, torch.float32
        model = HookedQwen2VL.from_hf(geometries.reference("patched"), tiny_processor())
        clean, corrupted = (geometries.prompt(model, image_tokens, template=template) for _ in range(2))
        corrupted.pixels.copy_(torch.randn(corrupted.pixels.shape, generator=torch.Generator().manual_seed(1)))
        return cls(model, clean, corrupted)

    @property
    def image_tokens(self) -> int:
        return int((self.clean.token_types[0] > 0).sum())

    def describe(self) -> str:
        cfg = self.model.cfg
        return (
            f"{cfg.n_layers} × {cfg.d_model} (MLP {cfg.text.d_mlp}), tower {cfg.vision.n_layers} × {cfg.vision.d_vision}, "
            f"{self.clean.shape[1]} tokens ({self.image_tokens} image), {cfg.d_vocab} tokens in the vocabulary"
        )

    def allowed(self) -> dict[str, float]:
        return allowed(self.model, self.clean.shape[1], self.image_tokens)


def gains(setting: Setting, rounds: int, n_layers: int = 3, n_groups: int = 3) -> dict[str, list[float]]:
    """Time of the loop over time of the sweep, of a whole sweep, a number a round (see 1. above)."""
    model, clean, n = setting.model, setting.clean, setting.clean.shape[1]
    encoded = model.encode(setting.corrupted)
    groups = [[Cell(at, (at,), None) for at in range(first, min(first + BATCH, n))] for first in range(0, n, BATCH)]
    chosen = [groups[round((i + 0.5) / n_groups * len(groups) - 0.5)] for i in range(n_groups)]
    layers = [round((i + 0.5) / n_layers * model.cfg.n_layers - 0.5) for i in range(n_layers)]
    _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith("resid_pre"))

    def loop(prompt: Inputs, layer: int) -> float:
        cell = pd.DataFrame({"layer": [layer], "pos": [int(torch.randint(n, ()))]})
        call = patching.generic_activation_patch
        setter = patching.layer_pos_patch_setter
        return timing.seconds(lambda: call(model, prompt, cache, lambda z: z[0, -1, 3], setter, "resid_pre", index_df=cell))

    def set_up() -> DecoderRuns:
        return DecoderRuns(model, clean, encoded, "resid_pre", range(model.cfg.n_layers))

    runs = set_up()
    runs.patched(layers[-1], chosen[-1], n - 1), loop(setting.corrupted, 0)  # warm
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        theirs: dict[str, list[float]] = {kind: [] for kind in KINDS}
        forwards = []
        for layer in layers:
            for kind, prompt in zip(KINDS, (setting.corrupted, encoded)):
                theirs[kind].append(loop(prompt, layer))
            forwards += [timing.seconds(lambda: runs.patched(layer, group, n - 1)) for group in chosen]
        ours = timing.seconds(set_up) + statistics.mean(forwards) * len(groups) * model.cfg.n_layers
        for kind, cells in theirs.items():
            found[kind].append(statistics.mean(cells) * n * model.cfg.n_layers / ours)
    return found


def allowed(model: HookedQwen2VL, n: int, n_image: int) -> dict[str, float]:
    """Multiply-adds of the loop over those of the suffixes, over all layers and positions."""
    cfg = model.cfg
    per_token = sum(p.numel() for p in model.blocks[0].parameters() if p.ndim > 1)
    attention = 2 * cfg.n_heads * cfg.d_head  # for each query and key: scores and values

    def decoder(n_layers: int, first: int) -> float:
        return n_layers * (per_token * (n - first) + attention * (n * (n + 1) - first * (first + 1)) / 2)

    unembed = cfg.d_model * cfg.d_vocab
    patches = 4 * n_image
    tower = sum(p.numel() for p in model.vision_encoder.parameters() if p.ndim > 1) * patches
    tower += cfg.vision.n_layers * 2 * cfg.vision.d_vision * patches**2
    tower += sum(p.numel() for p in model.vision_projector.parameters() if p.ndim > 1) * n_image
    ours = sum(decoder(cfg.n_layers - layer, at) + unembed for layer in range(cfg.n_layers) for at in range(n))
    plain = (decoder(cfg.n_layers, 0) + n * unembed) * n * cfg.n_layers
    return {"with the image": (plain + tower * n * cfg.n_layers) / ours, "encoded": plain / ours}


# ---- rows -----------------------------------------------------------------------------------


def settings() -> list[Callable[[], Iterator[Row]]]:
    wide = (*MEDIUM[:5], 151936, *MEDIUM[6:])
    all_of_them = [(LIGHT, False), (MEDIUM, True), (wide, True)]
    return [partial(gain_rows, *setting) for setting in all_of_them[: 1 if QUICK else 3]]


@torch.no_grad()
def gain_rows(shape: tuple[int, ...], template: bool) -> Iterator[Row]:
    setting = Setting.of(shape, 140, template)
    found, most = gains(setting, ROUNDS), setting.allowed()
    for kind, goal in zip(KINDS, ("≥ 15", "≥ 3.8")):
        value, low, high = timing.median_interval(found[kind])
        note = f"the arithmetic allows {most[kind]:.1f} ×; {ROUNDS} rounds"
        yield Row(6, f"patching sweep, loop / ours, {kind}", setting.describe(), value, "×", low, high, goal, note)
        share = [figure / most[kind] for figure in (value, low, high)]
        yield Row(6, f"share of what the arithmetic allows, {kind}", setting.describe(), share[0], "×", *share[1:], "≥ 0.75")


def published() -> Iterator[Row]:
    """The 2B model's own allowance: counted, no weights."""
    with torch.device("meta"):
        model = HookedQwen2VL(convert_config(geometries.config("2b")))
    for n_image in (300, 1200):
        for kind, value in allowed(model, n_image + 40, n_image).items():
            yield Row(6, f"what the arithmetic allows, {kind}", f"2b, {n_image + 40} tokens ({n_image} image)", value, note="counted")


@torch.no_grad()
def growth() -> Iterator[Row]:
    """The gain over image size and over depth, and its picture."""
    axes = {"image tokens": (35, 140) if QUICK else (35, 70, 140, 288), "decoder layers": (4, 8) if QUICK else (4, 8, 16)}
    points: dict[str, list[tuple]] = {}
    for axis, values in axes.items():
        for value in values:
            shape = (value, *GROWTH[1:]) if axis == "decoder layers" else GROWTH
            setting = Setting.of(shape, 140 if axis == "decoder layers" else value)
            found, most = gains(setting, ROUNDS), setting.allowed()
            x = value if axis == "decoder layers" else setting.image_tokens
            for kind in KINDS:
                figure = timing.median_interval(found[kind])
                points.setdefault(axis, []).append((x, kind, *figure, most[kind]))
                yield Row(6, f"gain by {axis}: {x}, {kind}", setting.describe(), figure[0], "×", *figure[1:],
                          note=f"the arithmetic allows {most[kind]:.1f} ×")  # fmt: skip
    draw(points)


def draw(points: dict[str, list[tuple]]) -> None:
    """Two panels: measured with its interval, and dashed what the arithmetic allows."""
    figure, panels = plt.subplots(1, len(points), figsize=(7.2, 3), sharey=True, layout="constrained")
    for panel, (axis, found) in zip(panels, points.items()):
        for kind, colour in zip(KINDS, ("#0072B2", "#D55E00")):
            x, _, value, low, high, most = zip(*(point for point in found if point[1] == kind))
            panel.plot(x, most, "--", color=colour, lw=1, label=f"{kind}: allowed by the arithmetic")
            errors = [[v - a for v, a in zip(value, low)], [b - v for v, b in zip(value, high)]]
            panel.errorbar(x, value, errors, fmt="o-", color=colour, ms=4, capsize=2, label=f"{kind}: measured")
        panel.set(xlabel=axis, xticks=x)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0)
    panels[0].set_ylabel("time of the loop / of the sweep")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=200)


@torch.no_grad()
def memory(batch_size: int) -> Iterator[Row]:
    """The sweep's peak, beside the bytes that its docstring says it holds."""
    timing.give_back_at_once()
    setting = Setting.of(GROWTH, 70 if QUICK else 288)
    model, cfg, n = setting.model, setting.model.cfg, setting.clean.shape[1]
    encoded, clean = model.encode(setting.corrupted), model.encode(setting.clean)
    keys = 2 * cfg.n_key_value_heads * cfg.d_head
    held = cfg.n_layers * n * (2 * cfg.d_model + keys) * 4 / MIB
    alone = timing.extra_memory(lambda: model(encoded[:1], return_type=None))

    def sweep():
        patch_sweep(
            model, clean, encoded, lambda z: z[:, -1, 3], layers=[0, cfg.n_layers - 1], positions=list(range(0, n, 16)),
            batch_size=batch_size, progress=False,
        )  # fmt: skip

    sweep()
    # the two layers that are swept stand for all: what a whole sweep holds more is counted
    held_now = n * (2 * 2 * cfg.d_model + cfg.n_layers * keys) * 4 / MIB
    peak = timing.extra_memory(sweep)
    note = f"held {held_now:.0f} (all layers: {held:.0f}), the rest is a forward of {batch_size}; a forward of one alone {alone:.0f}"
    yield Row(7, f"a sweep's peak memory, {batch_size} a forward", setting.describe(), peak, "MiB", note=note)


if __name__ == "__main__":
    batches = (partial(memory, batch_size) for batch_size in (1, BATCH))
    timing.report("patching", *settings(), published, growth, *batches)
