"""Maps of signed numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analyses.views.figure import NO_VALUE, Figure, as_array, colour_bar, label_ticks, largest, length
from analyses.views.text import visible


def signed_map(
    values: Any,
    rows: Sequence[Any],
    columns: Sequence[Any],
    title: str,
    path: str | Path | None = None,
    label: str = "effect on the metric",
    ylabel: str = "",
    upward: bool = False,
) -> Figure:
    """A map [row column] with 0 white, negative values blue, positive values red, and NaN grey.

    Args:
        rows, columns: their names; special characters are made visible, long names are cut, and if there are many, only every
            k-th is written.
        upward: whether the first row is at the bottom.
    """
    data = as_array(values)
    limit = largest(data)
    wide, tall = length(len(columns), 0.19, 1.6), length(len(rows), 0.19, 0.8)
    figure = Figure(figsize=(2.4 + wide, 1.8 + tall), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(NO_VALUE)
    drawn = axes.imshow(
        data, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower" if upward else "upper", interpolation="nearest"
    )
    label_ticks(axes.xaxis, [visible(str(name)) for name in columns], wide, size=6, rotation=90)
    label_ticks(axes.yaxis, [visible(str(name)) for name in rows], tall, size=6.5)
    axes.set_ylabel(ylabel, fontsize=8)
    figure.titled(title)
    colour_bar(figure, drawn, axes, label)
    return figure.saved(path)
