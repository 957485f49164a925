"""A contact sheet: items with question, answer, and boxes round what the answer depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hooked_qwen2vl.files import whole_file

from .scene import BACKGROUND, CELL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .world import Item


def contact_sheet(items: Sequence[Item], path: str | Path, columns: int = 3) -> Path:
    """Draws the items as a PNG: the first object the answer depends on in a solid box, the others dashed.

    Raises:
        ValueError: no items.
    """
    figure, path = contact_figure(items, columns), Path(path)
    with whole_file(path) as file:
        figure.savefig(file)
    return path


def contact_figure(items: Sequence[Item], columns: int = 3) -> Figure:
    """The figure that `contact_sheet` writes."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    if not items:
        raise ValueError("expected at least one item to draw, got none.")
    columns = min(columns, len(items))
    rows = math.ceil(len(items) / columns)
    figure = Figure(figsize=(3.4 * columns, 3.75 * rows), layout="constrained", dpi=130)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, item in zip(axes, items):
        axis.imshow(item.image, interpolation="nearest")
        for index, thing in enumerate(item.depends_on):
            x0, y0, x1, y1 = thing.box
            inset = 4 if thing.kind == BACKGROUND else 0
            for color, width in (("white", 4.0), ("#e6007e", 2.0)):
                axis.add_patch(
                    Rectangle(
                        (x0 - 0.5 + inset, y0 - 0.5 + inset), x1 - x0 - 2 * inset, y1 - y0 - 2 * inset, fill=False,
                        edgecolor=color, linewidth=width, linestyle="-" if index == 0 else (0, (3, 2)), clip_on=False,
                    )
                )  # fmt: skip
        axis.set_xticks([x - 0.5 for x in range(0, item.image.width + 1, CELL)], labels=[])
        axis.set_yticks([y - 0.5 for y in range(0, item.image.height + 1, CELL)], labels=[])
        axis.tick_params(length=3, color="#888888")
        axis.spines[:].set_color("#888888")
        axis.set_title(item.question, fontsize=10, loc="left", pad=20)
        axis.text(0, 1.025, item.answer, transform=axis.transAxes, fontsize=10, fontweight="bold", color="#b00060")
        notes = [item.domain, item.category]
        if item.typical is not None:
            notes.append("typical" if item.typical else "atypical")
        if item.unseen:
            notes.append("unseen")
        if item.counterfactual is not None:
            notes.append(f"else: {item.counterfactual.answer}")
        axis.set_xlabel(" · ".join(notes), fontsize=8, color="#555555")
    for axis in axes[len(items) :]:
        axis.set_axis_off()
    figure.suptitle(
        "Question and answer. Solid frame: the first object that the answer depends on; dashed: the others. else: the answer of the counterfactual",
        fontsize=9, wrap=True,
    )  # fmt: skip
    return figure
