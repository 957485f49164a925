"""Figures of a patching sweep: a map of layers × positions, and recovery drawn on the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analyses.views.figure import Figure, as_array, colour_bar, evenly_spaced, largest, on_image, picture
from analyses.views.maps import signed_map
from hooked_qwen2vl.pictures import open_image

RECOVERY = "recovery (0: corrupted, 1: clean)"


def recovery_map(
    recovery: Any, layers: Sequence[int], labels: Sequence[str], title: str, path: str | Path | None = None, label: str = RECOVERY
) -> Figure:
    """A map [layer position], the last layer on top: white for no effect, red towards the clean run, blue away from it.

    Args:
        labels: of the positions; special characters are made visible, long labels are cut. label: of the colour bar.
    """
    return signed_map(recovery, layers, labels, title, path, label, "layer", upward=True)


def recovery_on_image(
    recovery: Any,
    layers: Sequence[int],
    images: Sequence[Any],
    path: str | Path | None = None,
    n_panels: int = 4,
    title: str = "",
    label: str = RECOVERY,
) -> Figure:
    """The clean and the corrupted image, then the recovery of each image token at evenly spaced layers.

    Args:
        recovery: [layer rows cols]. images: clean and corrupted, in original pixels, as `to_inputs` takes them.
    """
    data, images = as_array(recovery), [open_image(image) for image in images]
    limit = largest(data)
    chosen = evenly_spaced(len(layers), n_panels)
    side, count = 2.6, len(chosen) + len(images)
    figure = Figure(figsize=(side * count + 0.8, side * images[0].height / images[0].width + (0.9 if title else 0.6)), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, image, name in zip(panels, images, ("clean", "corrupted")):
        picture(axes, image, name)
    for axes, index in zip(panels[len(images) :], chosen):
        drawn = on_image(axes, data[index], images[0], "RdBu_r", -limit, limit)
        axes.set_title(f"patched at layer {layers[index]}", fontsize=9)
    colour_bar(figure, drawn, list(panels), label, shrink=0.85)
    if title:
        figure.titled(title)
    return figure.saved(path)
