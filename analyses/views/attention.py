"""Maps over an image's tokens, drawn on the image; attention head by head and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from analyses.views.figure import Figure, as_array, colour_bar, evenly_spaced, largest, on_image
from hooked_qwen2vl.pictures import open_image


def attention_on_image(
    attention: Float[Tensor, "layer head image_token"],
    grid: tuple[int, int],
    image: Any,
    path: str | Path | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Figure:
    """Small multiples: a row a layer (the last on top), a column a head, after the mean of all heads.

    Each panel runs from 0 to its own largest value, which it states in percent; beside each layer stands the share of the
    attention, mean of heads, that goes to the image at all.

    Args:
        attention: from one text token to the image's tokens, in raster order, as shares of the whole attention.
        grid: (rows, cols) of image tokens.
        image: the picture, whatever `to_inputs` takes; the grid is stretched over it.
        layers, heads: which; None for all (at most 28 layers and 28 heads stay readable).
    Raises:
        ValueError: tokens that do not fill the grid.
    """
    _check_grid(attention.shape[-1], grid)
    image = open_image(image)
    chosen = list(range(attention.shape[0])) if layers is None else [range(attention.shape[0])[l] for l in layers]
    columns = list(range(attention.shape[1])) if heads is None else [range(attention.shape[1])[h] for h in heads]
    values = as_array(attention)
    small_image = image.copy()
    small_image.thumbnail((300, 300))  # more than a panel shows, even in print
    side = min(1.5, 22 / (len(columns) + 1))
    tall = side * image.height / image.width
    small = max(4.5, min(7.0, 5.2 * side))
    figure, panels = _grid(len(chosen), len(columns) + 1, side, tall)
    for row, layer in zip(panels, sorted(chosen, reverse=True)):
        maps = [values[layer].mean(0), *(values[layer, head] for head in columns)]
        for axes, shares in zip(row, maps):
            on_image(axes, shares.reshape(grid), small_image, "cividis", 0.0, float(shares.max()) or 1.0)
            axes.set_title(f"max {100 * shares.max():.2g} %", fontsize=small, pad=2)
        row[0].set_ylabel(f"layer {layer}\n{100 * maps[0].sum():.0f} % to image", fontsize=small + 1)
    for axes, name in zip(panels[-1], ["mean", *(f"head {head}" for head in columns)]):
        axes.set_xlabel(name, fontsize=small + 1)
    return figure.saved(path)


def maps_on_image(
    maps: Mapping[str, Float[Tensor, "layer image_token"]],
    grid: tuple[int, int],
    image: Any,
    path: str | Path | None = None,
    n_panels: int = 5,
    title: str = "",
) -> Figure:
    """A row a map, evenly spaced layers as columns, one scale a row; maps with negative values are centred on 0.

    Raises:
        ValueError: a map that does not fill the grid.
    """
    image = open_image(image)
    n_panels = min(n_panels, max(len(tensor) for tensor in maps.values()))
    rows, tall = len(maps), 1.7 * image.height / image.width
    figure = Figure(figsize=(2.2 + 1.75 * n_panels, 0.5 + (tall + 0.35) * rows), layout="constrained")
    panels = figure.subplots(rows, n_panels, squeeze=False)
    for row, (name, tensor) in zip(panels, maps.items()):
        _check_grid(tensor.shape[-1], grid)
        values = as_array(tensor)
        low, high, colours = _scale(values)
        layers = evenly_spaced(len(values), n_panels)  # a short map has fewer
        for axes in row[len(layers) :]:
            axes.set_axis_off()
        for axes, layer in zip(row, layers):
            drawn = on_image(axes, values[layer].reshape(grid), image, colours, low, high)
            axes.set_title(f"layer {layer}", fontsize=8, pad=3)
        row[0].set_ylabel(name, fontsize=8)
        colour_bar(figure, drawn, list(row), "", shrink=0.85, aspect=12)
    figure.titled(title)
    return figure.saved(path)


def _grid(rows: int, cols: int, side: float, tall: float) -> tuple[Figure, Any]:
    """Equal panels at places computed here: a solver needs a minute for 28 × 28 of them."""
    left, right, above, below, gap, title = 0.6, 0.1, 0.25, 0.3, 0.06, 0.2  # inches
    width, height = left + right + (side + gap) * cols - gap, above + below + (tall + title) * rows - title
    figure = Figure(figsize=(width, height))
    places = {"left": left / width, "right": 1 - right / width, "bottom": below / height, "top": 1 - above / height}
    return figure, figure.subplots(rows, cols, squeeze=False, gridspec_kw={**places, "wspace": gap / side, "hspace": title / tall})


def _scale(values: np.ndarray) -> tuple[float, float, str]:
    """(low, high, colour map): from 0 where nothing is negative, else symmetric."""
    most = largest(values)
    return (-most, most, "RdBu_r") if (values < 0).any() else (0.0, most, "cividis")


def _check_grid(n: int, grid: tuple[int, int]) -> None:
    if n != grid[0] * grid[1]:
        raise ValueError(f"expected {grid[0]}×{grid[1]} image tokens, got {n}.")
