"""Figures of comparisons of models, of attention heads, and of cross-model patching."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.lines import Line2D

from analyses.views.figure import COLOURS, GREY, Figure, colour_bar, label_ticks, rule

_STYLES = {"image": "-", "words": "--", "neither": ":"}
_MARKERS = {"image": "o", "words": "s", "neither": "^"}
_NAMES = {"image": "with the image", "words": "scene in words", "neither": "question only"}
_PANELS = {
    "answer_prob": "probability of the right answer",
    "entropy_share": "entropy / ln(vocabulary)",
    "final_prob": "probability of the final token",
    "recovery_scene": "recovery, patched at the scene",
    "recovery_last": "recovery, patched at the last position",
}
_KINDS = ("previous token", "duplicate token", "induction")
_SYMBOLS = dict(zip(_KINDS, ("v", "D", "*")))  # none of _MARKERS


def comparison_plot(comparison: Any, path: str | Path | None = None) -> Figure:
    """Six panels over relative depth: lens, trajectory and patching curves, and the best head of each kind by block."""
    models = list(dict.fromkeys(run.model for run in comparison.runs))
    colours = {model: COLOURS[number % len(COLOURS)] for number, model in enumerate(models)}
    widths = {model: max(1.0, 2.8 - 1.0 * number) for number, model in enumerate(models)}  # so that a line under another is visible
    figure = Figure(figsize=(10.5, 6.2), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    for axes, (measure, title) in zip(panels, _PANELS.items()):
        for run in comparison.runs:
            if (curve := run.curve(measure)) is not None:
                axes.plot(*curve, color=colours[run.model], linestyle=_STYLES[run.condition],
                          marker=_MARKERS[run.condition], markersize=2 + widths[run.model],
                          linewidth=widths[run.model])  # fmt: skip
        axes.set_title(title, fontsize=9)
    _draw_heads(panels[-1], comparison.heads, colours, widths)
    for axes in panels:
        axes.set_xlim(-0.02, 1.02)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("relative depth (0 embedding, 1 output)", fontsize=8)
    for axes in panels[:3]:
        axes.set_ylim(-0.03, 1.03)
    for axes in panels[3:5]:
        rule(axes, y=0), rule(axes, y=1)
    shown = list(dict.fromkeys(run.condition for run in comparison.runs))
    keys = [Line2D([], [], color=colours[model], linewidth=widths[model], label=model) for model in models]
    keys += [
        Line2D([], [], color="#444444", linestyle=cast(Any, _STYLES[c]), marker=_MARKERS[c], label=_NAMES[c], markersize=4) for c in shown
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(8, len(keys)), frameon=False, fontsize=8)
    n = max(len(run.trajectories.items) for run in comparison.runs)
    figure.titled(f"{len(models)} models on the same {n} questions: means, by relative depth. Recovery: 0 as corrupted, 1 as clean")
    return figure.saved(path)


def _draw_heads(axes: Any, heads: Any, colours: dict[str, str], widths: dict[str, float]) -> None:
    for model, found in heads.items():
        for kind in _KINDS:
            scores = found.text[kind]
            depth = (np.arange(len(scores)) + 0.5) / len(scores)
            axes.plot(depth, scores.max(-1).values, color=colours[model], linewidth=0.6 * widths[model],
                      marker=_SYMBOLS[kind], markersize=(4 if kind == "induction" else 2) + widths[model])  # fmt: skip
    axes.set_ylim(0, 1.45 * max(float(found.text[kind].max()) for found in heads.values() for kind in _KINDS))
    axes.set_ylabel("share of attention", fontsize=8)
    axes.set_title("best head of each block, on text", fontsize=9)
    keys = [Line2D([], [], color="#444444", marker=_SYMBOLS[k], linewidth=0.8, markersize=5, label=k) for k in _KINDS]
    axes.legend(handles=keys, frameon=False, fontsize=7)


def heads_plot(heads: Any, path: str | Path | None = None) -> Figure:
    """One panel per kind, one point per head: score on text against score among image tokens, coloured by relative depth; dashed:
    the scores of a head that attends evenly."""
    shown = [kind for kind in _KINDS if kind in heads.image] or list(_KINDS)
    figure = Figure(figsize=(3.3 * len(shown) + 0.9, 3.6), layout="constrained")
    points = None
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, kind in zip(panels, shown):
        text = heads.text[kind]
        image = heads.image.get(kind, text * float("nan"))
        depth = ((np.arange(len(text)) + 0.5) / len(text))[:, None].repeat(text.shape[1], 1)
        points = axes.scatter(text.flatten(), image.flatten(), c=depth.flatten(), cmap="viridis", vmin=0, vmax=1, s=16)
        top = 1.08 * max(float(text.max()), float(image.nan_to_num().max()), heads.even_text[kind])
        axes.plot((0, top), (0, top), color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        rule(axes, x=heads.even_text[kind], line="--")
        rule(axes, y=heads.even_image.get(kind, float("nan")), line="--")
        axes.set_xlim(-0.03 * top, top), axes.set_ylim(-0.03 * top, top)
        axes.set_title(kind, fontsize=9)
        axes.set_xlabel("share of attention, text", fontsize=8)
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("share of attention, image tokens", fontsize=8)
    colour_bar(figure, points, list(panels), "relative depth of the block", shrink=0.85)
    keys = [("o", "", "a head"), ("", "--", "a head that attends evenly"), ("", ":", "the same on both")]
    handles = [
        Line2D([], [], color=GREY, marker=marker, linestyle=cast(Any, style), markersize=4, label=label) for marker, style, label in keys
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=8)
    figure.titled(f"Attention heads of {heads.model_name}, on text and among image tokens")
    return figure.saved(path)


def model_patching_plot(result: Any, path: str | Path | None = None) -> Figure:
    """`explained` by place (0: as the target, 1: as the source), one line per span, one dot per item."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(result.places))
    for number, span in enumerate(result.spans):
        values = result.explained[:, number]
        if bool(values.isnan().all()):
            continue
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(places, values.nanmean(-1), color=colour, marker="o^sDv*"[number % 6], markersize=5, label=span)
        spread = (number - (len(result.spans) - 1) / 2) * 0.08
        x = (places + spread)[:, None].repeat(values.shape[1], 1)
        axes.plot(x.flatten(), values.flatten(), ".", color=colour, markersize=2.5, alpha=0.35)
    rule(axes, y=0), rule(axes, y=1)
    low = float(np.nanmin(result.explained.nanmean(-1).numpy()))
    axes.set_ylim(min(-0.2, 1.2 * low), 1.15)
    labels = [f"{place.split('.')[1]}" if "resid_post" not in place else "end" for place in result.places]
    label_ticks(axes.xaxis, labels, 5.2)
    axes.set_xlabel({"resid_pre": "stream before block", "attn_out": "attention of block", "mlp_out": "MLP of block"}[
        result.activation])  # fmt: skip
    axes.set_ylabel("explained share of the\ndifference between the models")
    axes.legend(frameon=False, fontsize=8)
    figure.titled(f"{result.source_name} patched into {result.target_name}, {result.explained.shape[-1]} prompts")
    return figure.saved(path)
