"""Maps over image tokens drawn on the image, and attention by head and layer."""

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
    """Small panels: one row per layer (the last on top), one column per head, and a first column with the mean over all heads.

    Each panel is scaled from 0 to its own largest value, which is given in percent. The label of each layer gives the share of
    the attention (mean over all heads) that goes to the image.

    Args:
        attention: from one text token to the image tokens, in raster order, as shares of its whole attention.
        grid: (rows, cols) of image tokens.
        image: the picture, as `to_inputs` takes it; the grid is stretched over it.
        layers, heads: which to show; None: all (up to 28 layers and 28 heads are readable).
    Raises:
        ValueError: another number of tokens than the grid has.
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
    """One row per map, evenly spaced layers as columns, one scale per row; maps with negative values are centred on 0.

    Raises:
        ValueError: a map with another number of tokens than the grid has.
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
        layers = evenly_spaced(len(values), n_panels)  # maps with few layers have fewer panels
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
    """A figure of equal panels, placed here because matplotlib's layout solver takes a minute for 28 × 28 of them."""
    left, right, above, below, gap, title = 0.6, 0.1, 0.25, 0.3, 0.06, 0.2  # inches
    width, height = left + right + (side + gap) * cols - gap, above + below + (tall + title) * rows - title
    figure = Figure(figsize=(width, height))
    places = {"left": left / width, "right": 1 - right / width, "bottom": below / height, "top": 1 - above / height}
    return figure, figure.subplots(rows, cols, squeeze=False, gridspec_kw={**places, "wspace": gap / side, "hspace": title / tall})


def _scale(values: np.ndarray) -> tuple[float, float, str]:
    """(low, high, colour map): from 0 if no value is negative, else symmetric about 0."""
    most = largest(values)
    return (-most, most, "RdBu_r") if (values < 0).any() else (0.0, most, "cividis")


def _check_grid(n: int, grid: tuple[int, int]) -> None:
    if n != grid[0] * grid[1]:
        raise ValueError(f"expected {grid[0]}×{grid[1]} image tokens, got {n}.")
