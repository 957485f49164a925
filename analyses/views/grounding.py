"""Pictures of the contextual lens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Patch, Rectangle

from analyses.views.figure import Figure
from analyses.views.lens import visible

_FOUND, _TRUE = "#d55e00", "#ffffff"


def grounding_plot(
    result: Any, path: str | Path | None = None, images: Sequence[Any] | None = None, truth: Sequence[Any] = ()
) -> Figure:
    """For each image: the picture (where given) and the heat map on it, with the best box.

    Args:
        images: PIL images in original pixels, one for each.
        truth: known boxes (x0, y0, x1, y1) of the first image, dashed.
    Raises:
        ValueError: another number of images.
    """
    n = len(result.heat)
    if images is not None and len(images) != n:
        raise ValueError(f"expected {n} images, one for each heat map, got {len(images)}.")
    columns = 1 if images is None else 2
    aspects = [height / width for width, height in result.sizes]
    side = 3.2
    figure = Figure(figsize=(columns * side + 1.2, side * sum(aspects) + 0.5 * n + 0.6), layout="constrained")
    grid = figure.subplots(n, columns, squeeze=False, height_ratios=aspects)
    low = min(float(heat.min()) for heat in result.heat)
    high = max(float(heat.max()) for heat in result.heat)
    colours = None
    for image, heat in enumerate(result.heat):
        width, height = result.sizes[image]
        extent = (0, width, height, 0)
        if images is not None:
            grid[image, 0].imshow(images[image], extent=extent)
            grid[image, 0].set_title(f"image {image}; box: entry {result.image_layer}, answer {result.text_layer}", fontsize=8)
        axes = grid[image, -1]
        colours = axes.imshow(heat.numpy(), extent=extent, cmap="cividis", vmin=low, vmax=high)
        axes.set_title(f"cosine of the box {float(result.box_scores[image]):.3f}", fontsize=8)
        for panel in grid[image]:
            for box in truth if image == 0 else ():
                _draw(panel, box, _TRUE, "--")
            _draw(panel, result.boxes[image].tolist(), _FOUND, "-")
            panel.set_xticks([0, width]), panel.set_yticks([0, height])
            panel.tick_params(labelsize=7)
    grid[-1, -1].set_xlabel("pixels of the original image", fontsize=8)
    bar = figure.colorbar(colours, ax=list(grid[:, -1]), shrink=0.85)
    bar.set_label("max over entries of the cosine\nwith the answer", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    known = [Patch(edgecolor="#222222", facecolor="none", linestyle="--", label="what the answer depends on")] if truth else []
    found = Patch(edgecolor=_FOUND, facecolor="none", linewidth=2, label="best box")
    figure.legend(handles=[found, *known], loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(f"Where is “{visible(result.text, 40)}”? {result.model_name}", fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def score_plot(result: Any, path: str | Path | None = None) -> Figure:
    """A bar for each span: cosine with its closest image token."""
    names = [f"{name}: {visible(text, 20)}" if name != text.strip() else name for name, text in zip(result.names, result.texts)]
    figure = Figure(figsize=(5.2, 1.0 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(names)), result.scores.numpy(), color="#0072b2")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_xlabel("cosine with the closest image token (low: hallucinated)", fontsize=8)
    axes.set_title(f"Contextual lens, entries {result.image_layer} and {result.text_layer}, {result.model_name}", fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def sweep_plot(result: Any, path: str | Path | None = None) -> Figure:
    """AUROC of every pair of entries, 0.5 white; the chosen pair framed."""
    auroc = result.auroc.numpy()
    n = len(auroc)
    spread = max(float(np.abs(auroc - 0.5).max()), 0.05)
    figure = Figure(figsize=(2.6 + 0.3 * n, 1.8 + 0.3 * n), layout="constrained")
    axes = figure.subplots()
    colours = axes.imshow(auroc, origin="lower", cmap="RdBu_r", vmin=0.5 - spread, vmax=0.5 + spread)
    axes.add_patch(Rectangle((result.text_layer - 0.5, result.image_layer - 0.5), 1, 1, fill=False, linewidth=2))
    axes.set_xlabel("lens entry of the answer", fontsize=8)
    axes.set_ylabel("lens entry of the image tokens", fontsize=8)
    axes.set_title(f"AUROC of the contextual score\n{result.n_items} items, {result.n_correct} correct", fontsize=9)
    figure.colorbar(colours, ax=axes, label="AUROC", shrink=0.85)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def neighbours_plot(result: Any, path: str | Path | None = None) -> Figure:
    """Layer × position, the nearest token in each cell, coloured by its cosine; the last layer on top."""
    cosines = result.similarity[..., 0].numpy()
    n_layers, n_positions = cosines.shape
    figure = Figure(figsize=(1.8 + max(2.2, 0.62 * n_positions), 1.4 + 0.26 * n_layers), layout="constrained")
    axes = figure.subplots()
    colours = axes.imshow(cosines, origin="lower", aspect="auto", cmap="cividis")
    middle = (float(cosines.min()) + float(cosines.max())) / 2
    for layer in range(n_layers):
        for index in range(n_positions):
            text, shade = visible(result.tokens[layer][index][0], 9), "white" if cosines[layer, index] < middle else "black"
            axes.text(index, layer, text, ha="center", va="center", fontsize=6, color=shade)
    axes.set_xticks(range(n_positions), result.positions, fontsize=7, rotation=90 if n_positions > 20 else 0)
    axes.set_yticks(range(n_layers), result.layers, fontsize=7)
    axes.set_xlabel("position in the prompt", fontsize=8)
    axes.set_ylabel("lens entry", fontsize=8)
    axes.set_title(f"Nearest neighbours, {result.model_name}", fontsize=9)
    bar = figure.colorbar(colours, ax=axes)
    bar.set_label("cosine with the nearest", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def methods_plot(table: Any, value: str, label: str, path: str | Path | None = None) -> Figure:
    """One panel a category: each method's mean with its interval.

    Args:
        table: rows with category, method, items, `value`, `value`_low and `value`_high.
    """
    categories, methods = list(dict.fromkeys(table["category"])), list(dict.fromkeys(table["method"]))
    columns = min(4, len(categories))
    lines = -(-len(categories) // columns)
    figure = Figure(figsize=(1.8 + 2.1 * columns, 0.9 + lines * (0.6 + 0.19 * len(methods))), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, category in zip(grid, categories):
        rows = table[table["category"] == category].set_index("method").reindex(methods)
        middle = rows[value].to_numpy()
        ends = np.stack((middle - rows[f"{value}_low"], rows[f"{value}_high"] - middle))
        colours = ["#999999" if "(" in method else "#0072b2" for method in methods]
        axes.errorbar(middle, range(len(methods)), xerr=ends, fmt="none", ecolor=colours, elinewidth=1.5)
        axes.scatter(middle, range(len(methods)), c=colours, s=14, zorder=3)
        axes.set_yticks(range(len(methods)), methods, fontsize=7)
        axes.set_title(f"{category}, {int(rows['items'].max())} items", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_xlim(-0.03, 1.03)
        axes.grid(axis="x", color="#e6e6e6")
    grid[0].invert_yaxis()
    for axes in grid[len(categories) :]:
        axes.set_visible(False)
    figure.supxlabel(label, fontsize=8)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def _draw(axes: Any, box: Sequence[float], colour: str, style: str) -> None:
    """A box on a dark rim, so that it shows on any picture."""
    x0, y0, x1, y1 = box
    for width, edge, line in ((3.4, "#222222", "-"), (1.8, colour, style)):
        axes.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=width, linestyle=line, clip_on=False)
        )
