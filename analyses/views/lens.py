"""Figures of a logit lens and of nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from analyses.views.figure import (
    Figure,
    colour_bar,
    evenly_spaced,
    ink_on,
    label_ticks,
    length,
    on_image,
    picture,
    refuse_other_picture,
    write_cells,
)
from analyses.views.readings import RIM, readings_on_image
from analyses.views.text import line, visible

MOST_COLUMNS = 32  # columns of a map with a token in each cell; more would not be readable at a printable width
MOST_LABELS = 150  # image tokens up to which every cell has a token
_CELL, _NARROW = 0.75, 0.19  # inches


def token_map(
    values: np.ndarray,
    tokens: Sequence[Sequence[str]],
    layers: Sequence[Any],
    columns: Sequence[str],
    scale: tuple[float, float],
    words: tuple[str, str, str, str],
    path: str | Path | None = None,
) -> Figure:
    """Layers × positions, the last layer on top, coloured by value; up to MOST_COLUMNS positions with the token in each cell.

    Args:
        values: [layer pos]. tokens: by layer and position.
        scale: the values at the ends of the colour scale.
        words: title, and labels of positions, layers and colours.
    """
    title, across, up, label = words
    n_layers, n = values.shape
    written = n <= MOST_COLUMNS
    wide, tall = length(n, _CELL if written else _NARROW, 2.4), length(n_layers, 0.26, 0.8)
    figure = Figure(figsize=(2.2 + wide, 1.6 + tall), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(values, origin="lower", aspect="auto", cmap="cividis", vmin=scale[0], vmax=scale[1], interpolation="nearest")
    if written:
        fitting = int(9 * wide / (n * _CELL))  # columns of text that a cell has room for
        cells = [[visible(token, fitting) for token in row] for row in tokens]
        write_cells(drawn, cells, 7)
    label_ticks(axes.xaxis, columns, wide, rotation=45 if written else 90)
    label_ticks(axes.yaxis, layers, tall)
    axes.set_xlabel(across, fontsize=8)
    axes.set_ylabel(up, fontsize=8)
    figure.titled(title)
    colour_bar(figure, drawn, axes, label)
    return figure.saved(path)


def heat_map(lens: Any, path: str | Path | None = None, question: str = "") -> Figure:
    """Layers × positions with the top token in each cell, coloured by its probability (0..1); the last layer on top.

    Args:
        question: for the title, shortened.
    """
    tokens = [[at[0] for at in layer] for layer in lens.top_tokens]
    many = len(lens.positions) > MOST_COLUMNS  # image placeholders all have the same text
    columns = list(map(str, lens.positions)) if many else [visible(token) for token in lens.prompt_tokens]
    across = "position in the prompt" if many else "position (its own token; the lens reads the next)"
    differing = f"; the model's own top token is another at {lens.n_differs}" if lens.n_differs else ""
    title = "\n".join(filter(None, (line(question), f"Logit lens, {lens.model_name}")))
    words = (title, across + differing, "layer of the residual stream", "probability of the top token")
    return token_map(lens.top_probs[..., 0].numpy(), tokens, lens.layer_labels, columns, (0, 1), words, path)


def neighbours_plot(result: Any, path: str | Path | None = None) -> Figure:
    """Layers × positions with the nearest token in each cell, coloured by its cosine; the last layer on top."""
    cosines = result.similarity[..., 0].numpy()
    tokens = [[at[0] for at in layer] for layer in result.tokens]
    words = (f"Nearest neighbours, {result.model_name}", "position in the prompt", "layer", "cosine with the nearest")
    scale = (float(cosines.min()), float(cosines.max()))
    return token_map(cosines, tokens, result.layers, list(map(str, result.positions)), scale, words, path)


def image_overlay(lens: Any, image: Any, path: str | Path | None = None, every_token: bool = False) -> Figure:
    """The image, and at some layers the image with the top tokens of its image tokens.

    With up to MOST_LABELS image tokens, every cell has its top token, coloured by probability. With more, regions with the same
    top token are labelled (see `analyses.views.readings`).

    Args:
        image: in original pixels; the token grid is stretched over it, as the model's resizing does.
        every_token: write the top token of the last layer into every cell, however many; the figure becomes large (save it as PDF).
    Raises:
        ValueError: the lens is not of one whole image, or the image has other proportions than its grid.
    """
    if lens.grid is None:
        raise ValueError("the overlay needs a lens read at one whole image: logit_lens(model, inputs, 'image[0]').")
    rows, cols = lens.grid
    refuse_other_picture(image, lens.grid)
    small = rows * cols <= MOST_LABELS
    n = len(lens.layer_labels)
    if not small and not every_token:
        return readings_on_image(lens, image, sorted({n // 2, n - 1}), path)
    layers = evenly_spaced(n, 4) if small else [n - 1]
    side, n_panels = max(3.6, 0.4 * cols), len(layers) + small
    wide, narrow = image.width > 2 * image.height, image.height > 2 * image.width
    across = 1 if wide else n_panels if narrow else min(3, n_panels)  # more in a row are too small to read on a page
    down, tall = ceil(n_panels / across), side * image.height / image.width
    figure = Figure(figsize=(side * across + 1.2, (tall + 0.3) * down + 0.6), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes in panels[n_panels:]:
        axes.set_axis_off()
    if small:
        picture(panels[0], image, "image")
    for axes, layer in zip(panels[small:], layers):
        values = lens.top_probs[layer, :, 0].reshape(rows, cols)
        drawn = on_image(axes, values, image, "cividis", 0, 1)
        _write_tokens(drawn, [at[0] for at in lens.top_tokens[layer]], image, min(7.0, 12.5 * side / cols), rim=small)
        axes.set_title(lens.layer_labels[layer], fontsize=9)
    figure.titled(f"What the image tokens read as, {lens.model_name}", 10)
    colour_bar(figure, drawn, list(panels), "probability of the top token", shrink=0.8)
    return figure.saved(path)


def _write_tokens(drawn: Any, tokens: Sequence[str], image: Any, size: float, rim: bool) -> None:
    """Writes the token into every cell. A rim is drawn as outlines; without it the text of a PDF is small and searchable."""
    rows, cols = drawn.get_array().shape
    for token, text in enumerate(tokens):
        row, col = divmod(token, cols)
        centre = ((col + 0.5) * image.width / cols, (row + 0.5) * image.height / rows)
        style = {"color": "white", "path_effects": RIM} if rim else {"color": ink_on(drawn.to_rgba(drawn.get_array()[row, col]))}
        drawn.axes.text(*centre, visible(text, 8), ha="center", va="center", fontsize=size, in_layout=False, **style)
