"""Figures of attention sinks and massive activations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter

from analyses.views.figure import ORANGE, Figure, label_layers, on_image, refuse_other_picture
from analyses.views.text import visible


def sinks_plot(result: Any, path: str | Path | None = None, images: Sequence[Any] = ()) -> Figure:
    """Top: norm and attention received, by block and position; sinks are labelled, image tokens underlined. Bottom, with images:
    the attention that their tokens receive; sinks are framed.

    Raises:
        ValueError: another number of images, or an image with other proportions than its grid.
    """
    if len(images) not in (0, len(result.grids)):
        raise ValueError(f"expected {len(result.grids)} images, one for each that the prompt has, or none, got {len(images)}.")
    tall = [3.2 * image.height / image.width for image in images]
    figure = Figure(figsize=(9.6, 4.6 + (0.6 + max(tall) if images else 0)), layout="constrained")
    parts = figure.subfigures(2 if images else 1, 1, height_ratios=[4.6, 0.6 + max(tall)] if images else [1], squeeze=False)[:, 0]
    panels = parts[0].subplots(2, 1, sharex=True)
    received = result.received.numpy()
    for axes, values, label in ((panels[0], result.norms.numpy(), "norm"), (panels[1], received, "× an even share")):
        low = max(float(np.nanpercentile(values, 1)), 1e-3)
        norm = LogNorm(low, max(float(np.nanmax(values)), low * 1.01))
        drawn = axes.imshow(values, cmap="cividis", norm=norm, aspect="auto", interpolation="nearest")
        label_layers(axes.yaxis, range(len(values)))
        axes.set_ylabel("block", fontsize=8)
        axes.tick_params(labelsize=7)
        _bar(parts[0], drawn, axes, label)
    panels[0].set_title("norm of the stream that enters each block", fontsize=9)
    panels[1].set_title(f"attention received from later tokens; sinks, from {result.threshold:g} × an even share on, are named", fontsize=9)
    sinks = np.flatnonzero(result.is_sink.numpy())
    names = [f"{position} {'▢' if position in result.image else visible(result.tokens[position], 10)}" for position in sinks]
    named, last = [], -np.inf
    for number, position in enumerate(sinks):  # of sinks close together only the first is labelled
        if position - last >= len(result.tokens) / 60:
            named, last = [*named, number], position
    panels[1].set_xticks(sinks[named], [names[number] for number in named], rotation=90, fontsize=6)
    if result.image:
        for axes in panels:
            axes.axvspan(min(result.image) - 0.5, max(result.image) + 0.5, ymin=0, ymax=0.03, color=ORANGE)
    if images:
        _on_images(parts[1], result, images)
    n = int(result.is_sink.sum())
    figure.suptitle(
        f"{n} sinks, {int(result.image_sinks.sum()) if result.image else 0} of them image tokens (orange bar); {len(result.massive)} massive "
        f"activations (from {result.ratio:g} × the median). {result.model_name}",
        fontsize=9,
    )
    return figure.saved(path)


def _on_images(part: Any, result: Any, images: Sequence[Any]) -> None:
    """Draws the attention that each image's tokens receive on the images."""
    mean = result.received[result.from_layer :].mean(0).numpy()[list(result.image)]
    panels, first = part.subplots(1, len(images), squeeze=False)[0], 0
    for axes, image, (rows, cols) in zip(panels, images, result.grids):
        refuse_other_picture(image, (rows, cols))
        own = slice(first, first + rows * cols)
        values, framed = mean[own].reshape(rows, cols), result.image_sinks.numpy()[own].reshape(rows, cols)
        drawn = on_image(axes, values, image, "cividis", 0.0, float(np.nanmax(values)) or 1.0)
        width, height = image.width / cols, image.height / rows
        for row, col in np.argwhere(framed):
            axes.add_patch(Rectangle((col * width, row * height), width, height, fill=False, edgecolor=ORANGE, linewidth=1.2))
        axes.set_title(f"{int(framed.sum())} of {rows * cols} image tokens are sinks", fontsize=8)
        _bar(part, drawn, axes, "× an even share")
        first += rows * cols


def _bar(part: Any, drawn: Any, axes: Any, label: str) -> None:
    """A colour bar with plain numbers; a logarithmic one would write them as powers of 10."""
    bar = part.colorbar(drawn, ax=axes, shrink=0.9, format=FuncFormatter(lambda x, _: f"{x:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
