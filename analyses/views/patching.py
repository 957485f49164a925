"""Pictures of a patching sweep: the map of layers × positions, and the image with its patches' recovery."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analyses.views.figure import Figure
from analyses.views.lens import visible


def recovery_map(
    recovery: Any, layers: Sequence[int], labels: Sequence[str], title: str, path: str | Path | None = None
) -> Figure:
    """[layer position] with no effect white, towards the clean run red and away from it blue.

    Args:
        labels: of the positions, as text; special characters are shown, long ones cut.
    """
    data = np.asarray(recovery, dtype=float)
    limit = max(1e-6, float(np.nanmax(np.abs(data))))
    figure = Figure(figsize=(min(24, 1.8 + 0.19 * len(labels)), 1.6 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(data, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    axes.set_xticks(range(len(labels)), [visible(label, 12) for label in labels], rotation=90, fontsize=6)
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label="recovery")
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def recovery_on_image(
    recovery: Any, layers: Sequence[int], images: Sequence[Any], path: str | Path | None = None, n_panels: int = 4
) -> Figure:
    """The clean and the corrupted image, then the recovery of each image token at evenly spaced layers.

    Args:
        recovery: [layer rows cols]. images: clean and corrupted, in original pixels.
    """
    data = np.asarray(recovery, dtype=float)
    limit = max(1e-6, float(np.nanmax(np.abs(data))))
    chosen = sorted({round((len(layers) - 1) * n / (n_panels - 1)) for n in range(n_panels)})
    width, height = images[0].size
    extent = (0, width, height, 0)
    side = 2.6
    count = len(chosen) + len(images)
    figure = Figure(figsize=(side * count + 0.8, side * height / width + 0.6), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, image, name in zip(panels, images, ("clean", "corrupted")):
        axes.imshow(image, extent=extent)
        axes.set_title(name, fontsize=9)
    for axes, index in zip(panels[len(images) :], chosen):
        axes.imshow(images[0].convert("L"), cmap="gray", extent=extent, alpha=0.35)
        drawn = axes.imshow(data[index], cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent, alpha=0.75)
        axes.set_title(f"patched at layer {layers[index]}", fontsize=9)
    for axes in panels:
        axes.set_xticks([]), axes.set_yticks([])
    figure.colorbar(drawn, ax=list(panels), label="recovery", shrink=0.85)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure
