"""Figures of the contextual lens and of grounding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Patch, Rectangle

from analyses.views.figure import BLUE, GREY, ORANGE, Figure, bars, colour_bar, intervals, label_ticks, panels_of, refuse_other_picture
from analyses.views.text import line, visible

_FOUND, _TRUE = ORANGE, "#ffffff"


def grounding_plot(
    result: Any, path: str | Path | None = None, images: Sequence[Any] | None = None, truth: Sequence[Any] = (), note: str = ""
) -> Figure:
    """One row per image: the picture if given, the cosine map with the best box, and the paper's heat map.

    The box is drawn on the picture and on the map it was computed from: the cosine at the two layers of the score. The maximum
    over layers is a different quantity and has its own panel and colour bar, without the box.

    Args:
        images: PIL images in original pixels, one for each heat map.
        truth: known boxes (x0, y0, x1, y1) of the first image, drawn dashed. note: text below the title.
    Raises:
        ValueError: another number of images, or an image with other proportions than its grid.
    """
    n = len(result.heat)
    if images is not None and len(images) != n:
        raise ValueError(f"expected {n} images, one for each heat map, got {len(images)}.")
    for image, heat in zip(images or (), result.heat):
        refuse_other_picture(image, tuple(heat.shape))
    columns = 2 + (images is not None)
    aspects = [height / width for width, height in result.sizes]
    side = min(4.5, max(2.6, 1.4 / min(aspects)))  # a colour bar's label is 1.4 inches long
    title = f"Where is “{line(result.text, 40)}” in the image? Contextual lens, {result.model_name}" + (f"\n{note}" if note else "")
    figure = Figure(figsize=(columns * side + 1.8, max(1.3, side * sum(aspects)) + 0.5 * n + 1.1), layout="constrained")
    grid = figure.subplots(n, columns, squeeze=False, height_ratios=aspects)
    for column, maps in ((-2, result.similarity), (-1, result.heat)):
        low, high = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)
        for axes, values, (width, height) in zip(grid[:, column], maps, result.sizes):
            colours = axes.imshow(values.numpy(), extent=(0, width, height, 0), cmap="cividis", vmin=low, vmax=high)
        colour_bar(figure, colours, list(grid[:, column]), "cosine with the answer", shrink=0.85)
    for image, (panels, (width, height)) in enumerate(zip(grid, result.sizes)):
        if images is not None:
            panels[0].imshow(images[image], extent=(0, width, height, 0))
            panels[0].set_title(f"image {image}", fontsize=8)
        panels[-2].set_title(
            f"image tokens at layer {result.image_layer}, answer at {result.text_layer}\n"
            f"box {float(result.box_scores[image]):.3f}, best token {float(result.similarity[image].max()):.3f}",
            fontsize=8,
        )
        panels[-1].set_title(f"maximum over layers (each with itself)\nbest token {float(result.heat[image].max()):.3f}", fontsize=8)
        for panel in panels:
            for box in truth if image == 0 else ():
                _draw(panel, box, _TRUE, "--")
            panel.set_xticks([0, width]), panel.set_yticks([0, height])
            panel.tick_params(labelsize=7)
        for panel in panels[:-1]:
            _draw(panel, result.boxes[image].tolist(), _FOUND, "-")
    grid[-1, 0].set_xlabel("pixels of the original image", fontsize=8)
    known = [Patch(edgecolor="#222222", facecolor="none", linestyle="--", label="what the answer depends on")] if truth else []
    found = Patch(edgecolor=_FOUND, facecolor="none", linewidth=2, label="best box at the two layers")
    figure.legend(handles=[found, *known], loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.titled(title)
    return figure.saved(path)


def score_plot(result: Any, path: str | Path | None = None) -> Figure:
    """One bar per span: cosine with its closest image token."""
    names = [f"{name}: {visible(text, 20)}" if name != text.strip() else name for name, text in zip(result.names, result.texts)]
    figure = Figure(figsize=(5.2, 1.0 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    bars(axes, names, result.scores.numpy())
    axes.set_xlabel("cosine with the closest image token (low: hallucinated)", fontsize=8)
    figure.titled(f"Contextual lens, layers {result.image_layer} and {result.text_layer}, {result.model_name}")
    return figure.saved(path)


def sweep_plot(result: Any, path: str | Path | None = None) -> Figure:
    """AUROC of every pair of layers, with 0.5 white and a frame around the best pair."""
    auroc = result.auroc.numpy()
    n = len(auroc)
    spread = max(float(np.abs(auroc - 0.5).max()), 0.05)
    figure = Figure(figsize=(2.2 + 0.25 * n, 1.4 + 0.25 * n), layout="constrained")
    axes = figure.subplots()
    colours = axes.imshow(auroc, origin="lower", cmap="RdBu_r", vmin=0.5 - spread, vmax=0.5 + spread)
    axes.add_patch(Rectangle((result.text_layer - 0.5, result.image_layer - 0.5), 1, 1, fill=False, linewidth=2))
    axes.set_xlabel("layer of the answer", fontsize=8)
    axes.set_ylabel("layer of the image tokens", fontsize=8)
    figure.titled(f"AUROC of the contextual score\n{result.n_items} items, {result.n_correct} correct. {result.model_name}")
    for axis in (axes.xaxis, axes.yaxis):
        label_ticks(axis, range(n), 0.25 * n)
    colour_bar(figure, colours, axes, "AUROC", shrink=0.85)
    return figure.saved(path)


def methods_plot(table: Any, value: str, label: str, path: str | Path | None = None, title: str = "") -> Figure:
    """One panel per category: each method's mean with its interval.

    Args:
        table: rows with category, method, items, `value`, `value`_low and `value`_high.
    """
    categories, methods = list(dict.fromkeys(table["category"])), list(dict.fromkeys(table["method"]))
    figure, panels = panels_of(len(categories), (2.1, 0.6 + 0.19 * len(methods)), (1.8, 0.9), sharex=True, sharey=True)
    colours = [GREY if "(" in method else BLUE for method in methods]
    for axes, category in zip(panels, categories):
        rows = table[table["category"] == category].set_index("method").reindex(methods)
        intervals(axes, methods, rows[value], rows[f"{value}_low"], rows[f"{value}_high"], colours)
        axes.set_title(f"{category}, {int(rows['items'].max())} items", fontsize=8)
        axes.set_xlim(-0.03, 1.03)
    figure.supxlabel(label, fontsize=8)
    figure.titled(title)
    return figure.saved(path)


def _draw(axes: Any, box: Sequence[float], colour: str, style: str) -> None:
    """Draws a box with a dark rim, so that it is visible on any picture."""
    x0, y0, x1, y1 = box
    for width, edge, dashes in ((3.4, "#222222", "-"), (1.8, colour, style)):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=width, linestyle=dashes, clip_on=False))
