"""Top tokens of a logit lens on a large image, which has too many image tokens for a text in every cell.

1. Neighbouring image tokens with the same top token form a region, which is outlined, and labelled once if the label fits.
2. The most frequent top tokens each have a colour, the same in all panels, and are listed in the key. A higher probability gives
   a stronger colour.
3. The part of the image with the most different top tokens is drawn again, close up, with the top token in every cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from scipy import ndimage

from analyses.views.figure import GREY, Figure, grey_below, no_ticks, picture
from analyses.views.text import columns, visible

_KEY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#f0e442",
    "#762a83",
    "#66a61e",
)  # seven hues: a colour's strength has a meaning of its own
_SIDE = 4.4  # inches of a panel
_CLOSE = 10  # width in image tokens of the part that is drawn close up
_SIZES = (8.0, 5.0)  # largest and smallest font size of a label, in points
_DIGIT = 0.64  # width of a digit, per point of font size
_SHORTEST = 14.0  # width in points that a row of cells needs for a label
_MARGIN = 2.5  # points that a label and its rim leave free of its row of cells, both sides together
RIM = [withStroke(linewidth=1.6, foreground="black")]


def readings_on_image(lens: Any, image: Any, layers: Sequence[int], path: str | Path | None = None) -> Figure:
    """Top row: the image, and its regions at each layer. Bottom row: a part of each, close up.

    Args:
        lens: a logit lens of one image. image: a PIL image in original pixels. layers: indices into the lens's layers.
    """
    rows, cols = lens.grid
    shown = {layer: np.array([at[0] for at in lens.top_tokens[layer]], dtype=object).reshape(rows, cols) for layer in layers}
    sure = {layer: np.asarray(lens.top_probs[layer, :, 0]).reshape(rows, cols) for layer in layers}
    most = Counter(token for layer in layers for token in shown[layer].flat).most_common(len(_KEY))
    colours = {token: colour for (token, _), colour in zip(most, _KEY)}
    window = _interesting(shown[layers[-1]], sure[layers[-1]])
    n = len(layers) + 1
    aspects = [image.height / image.width, (window[1] - window[0]) / rows * image.height / ((window[3] - window[2]) / cols * image.width)]
    figure = Figure(figsize=(_SIDE * n, _SIDE * sum(aspects) + 1.5), layout="constrained")
    panels = figure.subplots(2, n, squeeze=False, height_ratios=aspects)
    picture(panels[0, 0], image, "image")
    picture(panels[1, 0], image, "the part with the most different tokens")
    panels[0, 0].add_patch(Rectangle(*_corner_and_size(window, lens.grid, image), fill=False, edgecolor=_KEY[1], linewidth=2))
    for whole, close, layer in zip(panels[0, 1:], panels[1, 1:], layers):
        for axes in (whole, close):
            _paint(axes, shown[layer], sure[layer], colours, image)
        whole.set_title(lens.layer_labels[layer], fontsize=9)
        _name_cells(close, shown[layer], image, window)
        close.set_title(f"{lens.layer_labels[layer]}, close up", fontsize=9)
    (x, y), width, height = _corner_and_size(window, lens.grid, image)
    for axes in panels[1]:
        axes.set_xlim(x, x + width), axes.set_ylim(y + height, y)
    _key(figure, most, colours, len(layers) * rows * cols, _SIDE * n)
    figure.titled(f"What the image tokens read as, {lens.model_name} (stronger colour: higher probability)", 10)
    figure.draw_without_rendering()  # lays the panels out, so that their cells' width is known
    for whole, layer in zip(panels[0, 1:], layers):
        cell = whole.get_window_extent().width / figure.dpi * 72 / cols
        named = _name_regions(whole, shown[layer], image, cell, colours)
        whole.set_title(f"{lens.layer_labels[layer]}: {named} of {rows * cols} tokens named or in the key", fontsize=9)
    return figure.saved(path)


def _paint(axes: Any, tokens: np.ndarray, sure: np.ndarray, colours: dict[str, str], image: Any) -> None:
    """Draws every cell in its token's colour over the grey image, and lines between cells with different top tokens."""
    grey_below(axes, image, pale=True)
    paint = np.zeros((*tokens.shape, 4))
    for place, token in np.ndenumerate(tokens):
        paint[place] = (*to_rgb(colours.get(token, GREY)), (0.2 + 0.55 * sure[place]) if token in colours else 0.15)
    axes.imshow(paint, extent=(0, image.width, image.height, 0), interpolation="nearest")
    rows, cols = tokens.shape
    w, h = image.width / cols, image.height / rows
    across = [((c * w, r * h), ((c + 1) * w, r * h)) for r in range(1, rows) for c in range(cols) if tokens[r - 1, c] != tokens[r, c]]
    down = [((c * w, r * h), (c * w, (r + 1) * h)) for r in range(rows) for c in range(1, cols) if tokens[r, c - 1] != tokens[r, c]]
    axes.add_collection(LineCollection(across + down, colors="white", linewidths=0.5, alpha=0.8))
    no_ticks(axes)


def _name_regions(axes: Any, tokens: np.ndarray, image: Any, cell: float, colours: dict[str, str]) -> int:
    """Writes each region's token in the middle of its longest row, if it fits; returns the number of cells labelled or in the key."""
    rows, cols = tokens.shape
    told = sum(token in colours for token in tokens.flat)
    for token in dict.fromkeys(tokens.flat):
        regions, n = ndimage.label(_where(tokens, token))
        text = visible(token, 14)
        for region in range(1, n + 1):
            row, start, length = _longest_row(regions == region)
            size = min(_SIZES[0], cell * 0.9, (length * cell - _MARGIN) / (_DIGIT * columns(text)))
            if size < _SIZES[1] or length * cell < _SHORTEST:
                continue
            told += int((regions == region).sum()) if token not in colours else 0
            middle = ((start + length / 2) * image.width / cols, (row + 0.5) * image.height / rows)
            axes.text(*middle, text, ha="center", va="center", fontsize=size, color="white", path_effects=RIM, in_layout=False)
    return told


def _where(tokens: np.ndarray, token: str) -> np.ndarray:
    """Which cells have the token; numpy's own comparison takes "\\x00" for ""."""
    return np.array([one == token for one in tokens.flat]).reshape(tokens.shape)


def _longest_row(mask: np.ndarray) -> tuple[int, int, int]:
    """(row, first column, length) of the longest run of cells in a region; of equally long ones the closest to its middle row."""
    middle = float(np.nonzero(mask)[0].mean())
    best = (0, 0.0, 0, 0)
    for row in np.flatnonzero(mask.any(1)):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], mask[row].astype(int), [0]))))
        for start, end in zip(edges[::2], edges[1::2]):
            best = max(best, (int(end - start), -abs(row - middle), int(row), int(start)))
    length, _, row, start = best
    return row, start, length


def _name_cells(axes: Any, tokens: np.ndarray, image: Any, window: tuple[int, int, int, int]) -> None:
    rows, cols = tokens.shape
    size = min(8.0, 12.5 * _SIDE / (window[3] - window[2]))
    for row in range(window[0], window[1]):
        for col in range(window[2], window[3]):
            centre = ((col + 0.5) * image.width / cols, (row + 0.5) * image.height / rows)
            text = visible(tokens[row, col], 8)
            axes.text(
                *centre, text, ha="center", va="center", fontsize=size, color="white", path_effects=RIM, clip_on=True, in_layout=False
            )


def _interesting(tokens: np.ndarray, sure: np.ndarray) -> tuple[int, int, int, int]:
    """(row0, row1, col0, col1) of the window with the most different top tokens, each counted once, at its largest probability there."""
    rows, cols = tokens.shape
    width = min(cols, _CLOSE)
    height = min(rows, max(3, ceil(width * 0.8)))
    totals = sum(
        np.lib.stride_tricks.sliding_window_view(np.where(_where(tokens, token), sure, 0.0), (height, width)).max((2, 3))
        for token in dict.fromkeys(tokens.flat)
    )
    row, col = np.unravel_index(np.argmax(totals), (rows - height + 1, cols - width + 1))
    return int(row), int(row) + height, int(col), int(col) + width


def _corner_and_size(window: tuple[int, int, int, int], grid: tuple[int, int], image: Any) -> tuple[tuple[float, float], float, float]:
    w, h = image.width / grid[1], image.height / grid[0]
    return (window[2] * w, window[0] * h), (window[3] - window[2]) * w, (window[1] - window[0]) * h


def _key(figure: Figure, most: list[tuple[str, int]], colours: dict[str, str], n: int, inches: float) -> None:
    handles = [Patch(facecolor=colours[token], label=f"“{visible(token, 14)}” {_percent(count / n)}") for token, count in most]
    handles.append(Patch(facecolor=GREY, alpha=0.4, label="other tokens"))
    style = {
        "title": "top token, and its share of the image tokens in all layers shown",
        "title_fontsize": 8,
        "frameon": False,
        "fontsize": 8,
    }
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, int(inches / 1.6)), **style)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 else "< 1 %"
