"""Maps of signed numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from analyses.views.figure import Figure


def signed_map(
    values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str, path: str | Path | None = None
) -> Figure:
    """[row column] with 0 white, blue below and red above; cells that are NaN stay grey."""
    data = values.detach().float().numpy()
    limit = float(abs(data[data == data]).max()) or 1.0
    figure = Figure(figsize=(2 + 0.17 * len(columns), 1.5 + 0.17 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("#e6e6e6")
    image = axes.imshow(data, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=6)
    axes.set_yticks(range(len(rows)), rows, fontsize=6)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label="effect on the metric")
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure
