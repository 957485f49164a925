"""Figures and an HTML page of saliency maps."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from analyses.views.figure import (
    BLUE,
    COLOURS,
    GREY,
    Figure,
    colour_bar,
    evenly_spaced,
    intervals,
    largest,
    no_ticks,
    on_image,
    panels_of,
    picture,
    refuse_other_picture,
)
from analyses.views.text import line, readable, visible
from hooked_qwen2vl.files import whole_file

UNITS = {
    "knockout": "log p lost, keys hidden (nats)",
    "occlusion": "log p lost, pixels blank (nats)",
    "integrated gradients": "share of log p (nats)",
}
_NOTHING = 0.01  # of the largest value of all maps: maps below it are not stretched to the whole scale
_MOST = 8  # answer tokens in a figure, at most; the page has all
_SIDE = 1024  # pixels of an image's longer side in a page, at most


def saliency_plot(result: Any, path: str | Path | None = None, images: Sequence[Any] | None = None) -> Figure:
    """One row per image: the picture if given, the map of the whole answer, and maps of its tokens (at most 8, evenly chosen).

    Every panel has its own scale, up to the largest absolute value, which its title gives; maps with negative values are centred
    on 0. A map whose largest value is below 1 % of the largest of all maps is drawn at that 1 %: rounding is no effect.

    Raises:
        ValueError: another number of images, or an image with other proportions than its grid.
    """
    if images is not None:
        _check(result, images)
    chosen = evenly_spaced(len(result.tokens), _MOST) if len(result.tokens) > 1 else []
    columns, aspects = 1 + (images is not None) + len(chosen), [height / width for width, height in result.sizes]
    side = min(5.0, max(2.0, 1.3 / min(aspects)))  # so high that the colour bar has room for its label
    figure = Figure(figsize=(max(5.0, side * columns + 1.0), side * sum(aspects) + 0.5 * len(aspects) + 0.4), layout="constrained")
    grid = figure.subplots(len(aspects), columns, squeeze=False, height_ratios=aspects)
    titles = ["whole answer", *(visible(result.tokens[number], 14) for number in chosen)]
    all_maps = [result.maps(), *(result.maps(result.values[number]) for number in chosen)]
    least = _NOTHING * max(largest(values) for maps in all_maps for values in maps)
    for place, panels in enumerate(grid):
        if images is not None:
            picture(panels[0], images[place], f"image {place}" if len(images) > 1 else "image", 8)
        for number, (axes, title, maps) in enumerate(zip(panels[columns - len(titles) :], titles, all_maps)):
            values = maps[place].numpy()
            most = max(largest(values), least)
            low, colours = (-most, "RdBu_r") if (values < 0).any() else (0.0, "cividis")
            scale = f"{'±' if low else '0 to '}{most:.2g}" if most > least else f"no more than {most:.2g}"
            if images is not None:
                drawn = on_image(axes, values, images[place], colours, low, most)
            else:
                width, height = result.sizes[place]
                drawn = axes.imshow(values, cmap=colours, vmin=low, vmax=most, extent=(0, width, height, 0), interpolation="nearest")
                no_ticks(axes)
            axes.set_title(f"{title}\n{scale}", fontsize=8)
            if number == 0:
                colour_bar(figure, drawn, axes, str(UNITS.get(result.method, result.method)), shrink=0.7)
    said = line("".join(result.tokens), 40)
    figure.titled(f"{result.method}: what “{said}” depended on. {line(result.question, 60)} {result.model_name}")
    return figure.saved(path)


def curves_plot(curves: Sequence[Any], path: str | Path | None = None) -> Figure:
    """Deletion and insertion curves, one line per method, with the areas in the legend."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for number, name in enumerate(("deletion", "insertion")):
        for colour, one in zip(COLOURS, curves):
            values = getattr(one, name)
            panels[number].plot(one.shares, values, color=colour, marker=".", label=f"{one.method}: area {one.areas[number]:.2f}")
        panels[number].set_title(name, fontsize=9)
        panels[number].set_xlabel(f"share of image tokens {'hidden' if name == 'deletion' else 'shown'}, by {curves[0].by}", fontsize=8)
        panels[number].legend(fontsize=7, frameon=False)
    panels[0].set_ylabel("probability of the answer", fontsize=8)
    panels[0].set_ylim(-0.02, 1.02)
    figure.titled(f"Does the answer of {curves[0].model_name} depend on the image tokens that the map ranks first?")
    return figure.saved(path)


def areas_plot(table: Any, figures: dict[str, str], model_name: str, path: str | Path | None = None) -> Figure:
    """One panel per figure: each method's mean with its interval.

    Args:
        table: rows with method, and for each figure its mean, `_low` and `_high`. figures: column -> title.
    """
    methods = list(table["method"])
    figure, panels = panels_of(len(figures), (2.3, 0.7 + 0.22 * len(methods)), (1.9, 0.8), sharey=True)
    for axes, (name, title) in zip(panels, figures.items()):
        colours = [GREY if method == "random" else BLUE for method in methods]
        intervals(axes, methods, table[name], table[f"{name}_low"], table[f"{name}_high"], colours)
        axes.set_title(title, fontsize=8)
    figure.titled(f"Saliency methods, means with 95 % intervals; grey: control. {model_name}")
    return figure.saved(path)


def saliency_page(result: Any, images: Sequence[Any], path: str | Path) -> None:
    """Writes an HTML page that needs no network; the reader chooses a token of the answer and sees its map.

    Raises:
        ValueError: another number of images, or an image with other proportions than its grid.
    """
    _check(result, images)
    data = {
        "nothing": _NOTHING,
        "tokens": [readable(token) for token in result.tokens],
        "logProbs": [round(float(value), 4) for value in result.log_probs],
        "grids": result.grids,
        "unit": UNITS.get(result.method, result.method),
        "values": [[float(f"{value:.5g}") for value in row] for row in result.values.tolist()],
        "images": [_png(image) for image in images],
    }
    about = f"{line(result.question, None)} — {result.model_name}, {result.method}"
    template = files("analyses.views").joinpath("saliency.html").read_text(encoding="utf-8")
    before, between, after = template.split("{{part}}")
    page = before + html.escape(about) + between + json.dumps(data).replace("<", "\\u003c") + after
    with whole_file(path) as file:
        file.write_text(page, encoding="utf-8", errors="backslashreplace")


def _png(image: Any) -> str:
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _check(result: Any, images: Sequence[Any]) -> None:
    if len(images) != len(result.grids):
        raise ValueError(f"expected {len(result.grids)} images, one for each that the prompt has, got {len(images)}.")
    for image, grid in zip(images, result.grids):
        refuse_other_picture(image, tuple(grid))
