"""Figures of answer trajectories and of attention knockout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from analyses.views.experiments import lines_by_span
from analyses.views.figure import BLUE, GREY, ORANGE, Figure
from analyses.views.text import line, visible

_OUTCOMES = {"straight": "#0072b2", "wavered": "#009e73", "held then lost": "#d55e00", "settled early": "#999999",
            "settled late": "#e69f00"}  # fmt: skip
_RIGHT = ("straight", "wavered")  # of the outcomes
_QUIET = "#666666"


def trajectory_plot(item: Any, path: str | Path | None = None) -> Figure:
    """Top: the top-1 token of each layer. Bottom: probability of the answer and its rival (left axis, 0..1), entropy (right axis,
    nats), and dotted lines at flips.

    If the answer has several tokens, the legend says which is drawn, and the whole answer's probability is drawn too.
    """
    layers = range(item.n_layers + 1)
    tokens = list(dict.fromkeys(item.top1.tolist()))
    band = 0.35 + 0.15 * len(tokens)
    figure = Figure(figsize=(6.4, 3.4 + band), layout="constrained")
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=(band, 3.4))
    _draw_tops(above, item, tokens)
    axes.plot(layers, item.answer_prob, color=BLUE, marker="o", markersize=3, label=f"answer: {visible(item.label, 40)}")
    axes.plot(layers, item.rival_prob, color=ORANGE, marker="s", markersize=3, label=f"rival: {visible(item.rival)}")
    if item.token_log_probs is not None and item.token_log_probs.shape[-1] > 1:
        axes.plot(layers, item.answer_log_prob.exp(), color=BLUE, linewidth=1, linestyle="--", label=f"all of {visible(item.answer, 30)}")
    drawn, named = axes.get_lines(), set()
    for layer in item.flips:
        kind = "flip" if layer in item.content_flips else "flip of case or spaces"
        style = ":" if kind == "flip" else (0, (1, 4))
        line_at = axes.axvline(layer, color="#444444", linewidth=0.8, linestyle=style, label=kind)
        drawn += [] if kind in named else [line_at]
        named.add(kind)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(-0.6, item.n_layers + 0.6)
    axes.set_xlabel("layer (0: embedding, last: the model's output)")
    axes.set_ylabel("probability")
    right = axes.twinx()
    right.plot(layers, item.entropy, color=_QUIET, linewidth=1, linestyle="--", label="entropy (right)")
    right.set_ylabel("entropy (nats)", color=_QUIET)
    right.set_ylim(bottom=0)
    lines = [*drawn, right.get_lines()[0]]
    figure.legend(
        lines,
        [str(line.get_label()) for line in lines],
        frameon=False,
        fontsize=8,
        loc="outside lower center",
        ncols=2 if item.label != item.answer or len(lines) > 3 else 3,
    )
    note = "\n(the model's own top token is another)" if item.differs_from_model else ""
    outcome = f"answered {'rightly' if item.outcome in _RIGHT else 'wrongly'} ({item.outcome})"
    figure.titled(f"“{line(item.question) or visible(item.answer)}”: {outcome}. {item.model_name}{note}")
    return figure.saved(path)


def _draw_tops(axes: Any, item: Any, tokens: list[int]) -> None:
    """One row per token, in the order of first appearance, with a mark at the layers at which it is top-1."""
    shown = {}
    for row, token in enumerate(tokens):
        layers = [layer for layer, top in enumerate(item.top1.tolist()) if top == token]
        shown[token] = visible(item.top1_tokens[layers[0]], 14)
        colour = BLUE if token in item.answer_ids else ORANGE if item.top1_tokens[layers[0]] == item.rival else GREY
        axes.barh([row] * len(layers), 0.86, left=[layer - 0.43 for layer in layers], height=0.8, color=colour)
    axes.set_yticks(range(len(tokens)), [shown[token] for token in tokens], fontsize=7)
    axes.set_ylim(len(tokens) - 0.4, -0.6)
    axes.tick_params(axis="x", labelbottom=False, length=0)
    axes.tick_params(axis="y", length=0)
    axes.set_title("top token", fontsize=8, loc="left", pad=3)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)


def trajectories_plot(table: Any, shares: Any, path: str | Path | None = None) -> Figure:
    """Left: share of each outcome by category. Right: depths of birth and stability as fractions of L, with medians.

    Args:
        table: one row per item (`Trajectory.summary`). shares: one row per category, one column per outcome.
    """
    categories = list(shares.index)
    figure = Figure(figsize=(10, 0.9 + 0.5 * len(categories)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    start = np.zeros(len(categories))
    for name, colour in _OUTCOMES.items():
        left.barh(range(len(categories)), shares[name], left=start, color=colour, label=name)
        start += shares[name].to_numpy()
    left.set_yticks(range(len(categories)), [line(str(name), 24) for name in categories])
    left.set_xlim(0, 1)
    left.set_xlabel("share of items")
    left.legend(frameon=False, fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for place, category in enumerate(categories):
        rows = table[table["category"] == category]
        for offset, (column, colour) in enumerate((("birth_1_depth", BLUE), ("stability_depth", ORANGE))):
            values = rows[column].dropna().astype(float)
            height = place + 0.18 * (2 * offset - 1)
            right.plot(values, np.full(len(values), height), "|", color=colour, alpha=0.4)
            if len(values):
                label = ("answer first on top", "top-1 settled")[offset] if place == 0 else None
                right.plot(values.median(), height, "o", color=colour, markersize=5, label=label)
    right.tick_params(axis="y", length=0)
    right.set_xlim(-0.03, 1.03)
    right.set_xlabel("depth, 0 to 1 (dot: median; stroke: an answer)")
    right.legend(frameon=False, fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.titled(f"{len(table)} questions: how their answers come about (straight and wavered: right; others: wrong), and at which depths")
    return figure.saved(path)


def knockout_plot(result: Any, path: str | Path | None = None) -> Figure:
    """Mean effect on the answer's probability (percent) by the window's centre; bands are one standard error."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    lines_by_span(axes, result.to_dataframe(), "flow", "effect_percent")
    axes.set_xlabel(f"centre of the window of {result.window} layers")
    axes.set_ylabel("change of the answer's\nprobability (%)")
    n = result.effects.shape[-1]
    said = "one prompt" if n == 1 else f"mean of {n} items; bands: one standard error"
    figure.titled(f"Attention knockout, {said}. {result.model_name}")
    return figure.saved(path)
