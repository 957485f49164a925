"""The figure that every view draws on, and the shapes that several views share."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from math import ceil
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib import figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator
from PIL import Image, ImageFilter

from analyses.views.text import columns, drawable, families, line
from hooked_qwen2vl.files import whole_file

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
BLUE, ORANGE = COLOURS[:2]
GREY, NO_VALUE = "#999999", "#d9d9d9"
LONGEST = 22.0  # inches of an axis
_LONGEST_BAR = 5.0
_MOST_TOUCH = 0.22  # how much an image's detail may lighten or darken the colours over it
_LINE = 1.3 / 72  # inches of a line of text, a point of its size
_DIGIT = 0.64 / 72


class Figure(figure.Figure):
    """matplotlib's, for text that is not ours.

    A `$` is a dollar: nothing is read as mathematics. A character that no font has is shown as its escape. A notebook
    shows the figure by itself, also one that has not imported pyplot.
    """

    def draw(self, renderer: Any) -> None:
        for axis in (axis for axes in self.axes for axis in (axes.xaxis, axes.yaxis)):
            if isinstance(axis.get_major_locator(), FixedLocator):  # its labels come from its formatter, at every draw
                labels = [label.get_text() for label in axis.get_ticklabels()]
                if (legible := list(map(drawable, labels))) != labels:
                    axis.set_ticklabels(legible)
        for text in self.findobj(Text):
            text.set_parse_math(False)
            text.set(family=families())
            text.set_text(drawable(text.get_text()))
        super().draw(renderer)

    def titled(self, text: str, fontsize: float = 9) -> None:
        """A title over the whole figure, in as many lines as its width needs."""
        width = int(self.get_figwidth() / (_DIGIT * fontsize))
        self.suptitle("\n".join(part for given in text.split("\n") for part in wrap(line(given, None), width)), fontsize=fontsize)

    def saved(self, path: str | Path | None) -> Figure:
        """Itself, written to a file (png, pdf, svg, …) where one is named."""
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
    """Inches of an axis of n cells: `cell` each, or as much as there is room for."""
    return max(least, min(LONGEST, cell * n))


def label_ticks(axis: Any, labels: Sequence[Any], inches: float, size: float = 7, rotation: float = 0) -> None:
    """A label at every k-th cell, k the least with which no two touch; the axis is so long. Rotated only where all of
    them would not stand side by side."""
    labels = list(map(str, labels))
    widest = max(map(columns, labels), default=1) * _DIGIT * size + 0.05
    rotation = 0 if widest * len(labels) <= inches else rotation
    needed = widest if axis.axis_name == "x" and not rotation else _LINE * size
    step = max(1, ceil(needed * len(labels) / inches))
    slanted = {"rotation": rotation} | ({"ha": "right", "rotation_mode": "anchor"} if 0 < rotation < 90 else {})
    axis.set_ticks(range(0, len(labels), step), labels[::step], fontsize=size, **slanted)


def label_layers(axis: Any, layers: Sequence[int], most: int = 16) -> None:
    """Ticks at the layers themselves, every few of them where there are many."""
    axis.set_ticks(list(layers)[:: ceil(len(layers) / most)])


def colour_bar(figure: Figure, drawn: Any, axes: Any, label: str, shrink: float = 1.0, aspect: float = 20) -> None:
    """A colour bar, no longer than it need be beside a tall map."""
    shrink = min(shrink, _LONGEST_BAR / figure.get_figheight())
    bar = figure.colorbar(drawn, ax=axes, shrink=shrink, aspect=aspect)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def write_cells(axes: Any, texts: Sequence[Sequence[str]], values: np.ndarray, middle: float, size: float) -> None:
    """A text in every cell, white on what is dark: below `middle`."""
    for (row, col), value in np.ndenumerate(values):
        shade = "white" if value < middle else "black"
        axes.text(col, row, texts[row][col], ha="center", va="center", fontsize=size, color=shade)


def no_ticks(*panels: Any) -> None:
    for axes in panels:
        axes.set_xticks([]), axes.set_yticks([])


def rule(axes: Any, *, x: float | None = None, y: float | None = None, colour: str = GREY, line: str = "-") -> None:
    """A thin line behind the data, at what a value means nothing, or everything."""
    draw, at = (axes.axhline, y) if x is None else (axes.axvline, x)
    draw(at, color=colour, linewidth=0.8, linestyle=line, zorder=0)


# ---- shapes -------------------------------------------------------------------------------------


def panels_of(n: int, side: tuple[float, float], margin: tuple[float, float], **style: Any) -> tuple[Figure, list[Any]]:
    """A figure of n panels, at most four a row, each so wide and high (inches); `margin` is for all of them together."""
    across = min(4, n)
    down = ceil(n / across)
    figure = Figure(figsize=(margin[0] + side[0] * across, margin[1] + side[1] * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False, **style).flat)
    for axes in panels[n:]:
        axes.set_axis_off()
    for axes in panels[max(0, n - across) : n]:
        axes.tick_params(labelbottom=True)  # those under which a shared axis has nothing
    return figure, panels[:n]


def intervals(axes: Any, names: Sequence[str], middle: Any, low: Any, high: Any, colours: Any = BLUE, size: float = 7.5) -> None:
    """A line a name, the first on top: a dot and its interval, which may be NaN."""
    places = np.arange(len(names))
    axes.hlines(places, low, high, colors=colours, linewidth=1.5, alpha=0.6)
    axes.scatter(middle, places, c=colours, s=16, zorder=3)
    axes.set_yticks(places, names, fontsize=size)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=size)
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)


def bars(axes: Any, names: Sequence[str], values: Any, colours: Any = BLUE, size: float = 8) -> None:
    """A bar a name, the first on top."""
    axes.barh(range(len(names)), values, color=colours)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_ylim(len(names) - 0.5, -0.5)
    rule(axes, x=0)


def as_array(values: Any) -> np.ndarray:
    """Numbers as float64 on the host: a tensor of any dtype on any device, an array, a list."""
    return np.asarray(values.detach().cpu().double() if hasattr(values, "detach") else values, dtype=float)


def on_image(axes: Any, values: Any, image: Any, colours: str, low: float, high: float) -> Any:
    """A map [row col], stretched over the image (original pixels); places without a value show the image alone.

    The map is drawn as opaque as its colour bar, with the image's detail over it: what is lighter or darker there than around
    it, as a touch of white or black. So flat places have the bar's colours, on dark photographs too.
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
    """The image in grey, for what is drawn over it; pale, its blacks are light enough for the colours over them."""
    axes.imshow(image.convert("L"), cmap="gray", vmin=-220 if pale else 0, vmax=255, extent=(0, image.width, image.height, 0))


def picture(axes: Any, image: Any, title: str = "", size: float = 9) -> None:
    """The image itself."""
    axes.imshow(image, extent=(0, image.width, image.height, 0))
    axes.set_title(title, fontsize=size)
    no_ticks(axes)


def evenly_spaced(n: int, most: int) -> list[int]:
    """At most so many of 0..n−1, evenly spaced, the first and the last among them."""
    return sorted({round((n - 1) * place / max(1, most - 1)) for place in range(most)})


def largest(values: Any) -> float:
    """The largest absolute value, 1 where there is none: for a symmetric scale."""
    return float(np.nan_to_num(np.abs(as_array(values))).max(initial=0.0)) or 1.0


def refuse_other_picture(image: Any, grid: tuple[int, int]) -> None:
    """A picture that the token grid cannot have been read from: of other proportions, turned on its side for one.

    Args:
        image: PIL. grid: (rows, cols) of image tokens, near the picture's own proportions.
    Raises:
        ValueError: it is.
    """
    (width, height), (rows, cols) = image.size, grid
    if abs((width * rows) / (height * cols) - 1) > 1 / min(rows, cols):
        raise ValueError(
            f"a picture of {width}×{height} pixels was not read as {cols} columns and {rows} rows of image tokens: draw on the picture "
            f"that the model was given. A file's EXIF orientation is applied when it is read: hooked_qwen2vl.open_image(path) gives that "
            f"picture."
        )
