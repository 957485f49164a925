"""The figure class of all views, and drawing functions that several views use."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from math import ceil
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib import figure
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator
from PIL import Image, ImageFilter

from analyses.views.text import columns, drawable, families, line
from hooked_qwen2vl.files import whole_file

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
BLUE, ORANGE = COLOURS[:2]
GREY, NO_VALUE = "#999999", "#d9d9d9"
LONGEST = 22.0  # inches of an axis, at most
_LONGEST_BAR = 5.0  # inches of a colour bar, at most
_MOST_TOUCH = 0.22  # largest opacity with which an image's detail lightens or darkens a map
_LINE = 1.3 / 72  # height of a line of text in inches, per point of font size
_DIGIT = 0.64 / 72  # width of a digit in inches, per point of font size


class Figure(figure.Figure):
    """matplotlib's figure, for texts that come from prompts and tokens.

    A `$` is drawn as it is, not read as mathematics. Characters that no font has are drawn as escapes. A notebook shows the
    figure, even if pyplot is not imported.
    """

    def draw(self, renderer: Any) -> None:
        for axis in (axis for axes in self.axes for axis in (axes.xaxis, axes.yaxis)):
            if isinstance(axis.get_major_locator(), FixedLocator):  # at every draw its formatter sets the labels again
                labels = [label.get_text() for label in axis.get_ticklabels()]
                if (legible := list(map(drawable, labels))) != labels:
                    axis.set_ticklabels(legible)
        for text in self.findobj(Text):
            text.set_parse_math(False)
            text.set(family=families())
            text.set_text(drawable(text.get_text()))
        super().draw(renderer)

    def titled(self, text: str, fontsize: float = 9) -> None:
        """Sets a title over the whole figure, wrapped to its width; lines after the second make the figure higher."""
        width = int(self.get_figwidth() / (_DIGIT * fontsize))
        lines = [part for given in text.split("\n") for part in wrap(line(given, None), width)]
        self.set_figheight(self.get_figheight() + max(0, len(lines) - 2) * _LINE * fontsize)
        self.suptitle("\n".join(lines), fontsize=fontsize)

    def saved(self, path: str | Path | None) -> Figure:
        """Writes the figure to a file (png, pdf, svg, …) if a path is given; returns the figure."""
        if path is not None:
            path = Path(path)
            with whole_file(path if path.suffix else path.with_suffix(".png")) as file:
                self.savefig(file, dpi=200)
        return self

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


# ---- axes ---------------------------------------------------------------------------------------


def length(n: int, cell: float, least: float = 0.0) -> float:
    """Inches of an axis of n cells of `cell` inches, at least `least` and at most LONGEST."""
    return max(least, min(LONGEST, cell * n))


def label_ticks(axis: Any, labels: Sequence[Any], inches: float, size: float = 7, rotation: float = 0) -> None:
    """Labels every k-th cell of an axis of this length, with the smallest k at which labels do not touch; `rotation` is used only
    if not all labels fit side by side."""
    labels = list(map(str, labels))
    widest = max(map(columns, labels), default=1) * _DIGIT * size + 0.05
    rotation = 0 if widest * len(labels) <= inches else rotation
    needed = widest if axis.axis_name == "x" and not rotation else _LINE * size
    step = max(1, ceil(needed * len(labels) / inches))
    slanted = {"rotation": rotation} | ({"ha": "right", "rotation_mode": "anchor"} if 0 < rotation < 90 else {})
    axis.set_ticks(range(0, len(labels), step), labels[::step], fontsize=size, **slanted)


def label_layers(axis: Any, layers: Sequence[int], most: int = 16) -> None:
    """Ticks at layers, at most `most` of them, evenly spaced."""
    axis.set_ticks(list(layers)[:: ceil(len(layers) / most)])


def colour_bar(figure: Figure, drawn: Any, axes: Any, label: str, shrink: float = 1.0, aspect: float = 20) -> None:
    """A colour bar of at most _LONGEST_BAR inches."""
    shrink = min(shrink, _LONGEST_BAR / figure.get_figheight())
    bar = figure.colorbar(drawn, ax=axes, shrink=shrink, aspect=aspect)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def write_cells(drawn: Any, texts: Sequence[Sequence[str]], size: float, lower: float = 0.0) -> None:
    """Writes a text in every cell of a map [row col] drawn by `imshow`, `lower` cells below its middle."""
    for (row, col), value in np.ndenumerate(drawn.get_array()):
        ink = ink_on(drawn.to_rgba(value))
        drawn.axes.text(col, row + lower, texts[row][col], ha="center", va="center", fontsize=size, color=ink)


def ink_on(colour: Any) -> str:
    """Black or white, whichever has the higher contrast with a background: at least 4.5."""
    return "black" if luminance(colour) > 0.179 else "white"


def luminance(colour: Any) -> float:
    """The relative luminance of a colour (0 black, 1 white), as in WCAG 2.1."""
    parts = np.array(to_rgb(colour))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def no_ticks(*panels: Any) -> None:
    for axes in panels:
        axes.set_xticks([]), axes.set_yticks([])


def rule(axes: Any, *, x: float | None = None, y: float | None = None, colour: str = GREY, line: str = "-") -> None:
    """A thin reference line behind the data, such as 0 for no effect or 1 for full recovery."""
    draw, at = (axes.axhline, y) if x is None else (axes.axvline, x)
    draw(at, color=colour, linewidth=0.8, linestyle=line, zorder=0)


# ---- kinds of figures ---------------------------------------------------------------------------


def panels_of(n: int, side: tuple[float, float], margin: tuple[float, float], **style: Any) -> tuple[Figure, list[Any]]:
    """A figure of n panels, at most four per row; `side`: width and height of each, `margin`: of all margins together (inches)."""
    across = min(4, n)
    down = ceil(n / across)
    figure = Figure(figsize=(margin[0] + side[0] * across, margin[1] + side[1] * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False, **style).flat)
    for axes in panels[n:]:
        axes.set_axis_off()
    for axes in panels[max(0, n - across) : n]:
        axes.tick_params(labelbottom=True)  # with a shared axis matplotlib labels the last row only
    return figure, panels[:n]


def intervals(axes: Any, names: Sequence[str], middle: Any, low: Any, high: Any, colours: Any = BLUE, size: float = 7.5) -> None:
    """One line per name, the first on top, with a dot and an interval; NaN is not drawn."""
    places = np.arange(len(names))
    axes.hlines(places, low, high, colors=colours, linewidth=1.5, alpha=0.6)
    axes.scatter(middle, places, c=colours, s=16, zorder=3)
    axes.set_yticks(places, names, fontsize=size)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=size)
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)


def bars(axes: Any, names: Sequence[str], values: Any, colours: Any = BLUE, size: float = 8) -> None:
    """One horizontal bar per name, the first on top."""
    axes.barh(range(len(names)), values, color=colours)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_ylim(len(names) - 0.5, -0.5)
    rule(axes, x=0)


def as_array(values: Any) -> np.ndarray:
    """A tensor of any dtype and device, an array or a list as a float64 array."""
    return np.asarray(values.detach().cpu().double() if hasattr(values, "detach") else values, dtype=float)


def on_image(axes: Any, values: Any, image: Any, colours: str, low: float, high: float) -> Any:
    """Draws a map [row col], stretched over the image (original pixels); cells that are NaN show only the image, in grey.

    The map is opaque. The image's detail is drawn over it: where the image is lighter or darker than its surroundings, a little
    white or black is added. So the colours match the colour bar, also on dark photographs.
    """
    extent = (0, image.width, image.height, 0)
    values = np.ma.masked_invalid(as_array(values))
    grey_below(axes, image)
    drawn = axes.imshow(values, cmap=colours, vmin=low, vmax=high, extent=extent, interpolation="nearest")
    there = Image.fromarray(np.uint8(255 * ~np.ma.getmaskarray(values))).resize(image.size, Image.Resampling.NEAREST)
    light = image.convert("L")
    around = light.filter(ImageFilter.GaussianBlur(max(image.size) / 12))
    detail = (np.asarray(light, dtype=float) - np.asarray(around)) / 255
    touch = np.repeat((detail > 0)[..., None].astype(float), 4, axis=2)
    touch[..., 3] = np.minimum(_MOST_TOUCH, 0.8 * np.abs(detail)) * (np.asarray(there) > 0)
    axes.imshow(touch, extent=extent)
    no_ticks(axes)
    return drawn


def grey_below(axes: Any, image: Any, pale: bool = False) -> None:
    """Draws the image in grey as a background; with `pale`, black becomes a light grey."""
    axes.imshow(image.convert("L"), cmap="gray", vmin=-220 if pale else 0, vmax=255, extent=(0, image.width, image.height, 0))


def picture(axes: Any, image: Any, title: str = "", size: float = 9) -> None:
    """Draws the image."""
    axes.imshow(image, extent=(0, image.width, image.height, 0))
    axes.set_title(title, fontsize=size)
    no_ticks(axes)


def evenly_spaced(n: int, most: int) -> list[int]:
    """At most `most` of the numbers 0..n−1, evenly spaced, including the first and the last."""
    return sorted({round((n - 1) * place / max(1, most - 1)) for place in range(most)})


def largest(values: Any) -> float:
    """The largest absolute value, for a symmetric scale; 1 if it is 0 or there is none."""
    return float(np.nan_to_num(np.abs(as_array(values))).max(initial=0.0)) or 1.0


def refuse_other_picture(image: Any, grid: tuple[int, int]) -> None:
    """Raises an error if an image cannot be the one of this token grid, for example because it is rotated.

    Args:
        image: a PIL image. grid: (rows, cols) of image tokens.
    Raises:
        ValueError: the proportions of image and grid differ.
    """
    (width, height), (rows, cols) = image.size, grid
    if abs((width * rows) / (height * cols) - 1) > 1 / min(rows, cols):
        raise ValueError(
            f"a picture of {width}×{height} pixels was not read as {cols} columns and {rows} rows of image tokens: draw on the picture "
            f"that the model was given. A file's EXIF orientation is applied when it is read: hooked_qwen2vl.open_image(path) gives that "
            f"picture."
        )
