"""Pictures of a logit lens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analyses.views.figure import Figure


def heat_map(lens: Any, path: str | Path | None = None) -> Figure:
    """Layer × position, the top token in each cell, coloured by its probability (0..1); the last layer on top."""
    probabilities = lens.top_probs[..., 0].numpy()
    n_layers, n_positions = probabilities.shape
    figure = Figure(figsize=(1.8 + max(2.2, 0.75 * n_positions), 1.4 + 0.26 * n_layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(probabilities, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=1)
    for layer in range(n_layers):
        for index in range(n_positions):
            dark = probabilities[layer, index] < 0.55
            text = visible(lens.top_tokens[layer][index][0])
            axes.text(index, layer, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(n_positions), [visible(t) for t in lens.prompt_tokens], rotation=45, ha="right", fontsize=7)
    axes.set_yticks(range(n_layers), lens.layer_labels, fontsize=7)
    axes.set_xlabel("position (its own token; the lens reads the next)", fontsize=8)
    axes.set_ylabel("entry of the residual stream", fontsize=8)
    axes.set_title(f"Logit lens, {lens.model_name}", fontsize=9)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("probability of the top token", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def visible(token: str, width: int = 12) -> str:
    """A token as a reader can see it: spaces and control characters shown, long ones cut."""
    shown = "".join("·" if c == " " else "⏎" if c == "\n" else c if c.isprintable() else "�" for c in token) or "∅"
    shown = shown.replace("$", r"\$")
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def image_overlay(lens: Any, image: Any, path: str | Path | None = None, n_panels: int = 4) -> Figure:
    """The image, and it again at evenly spaced layers, each image token coloured by its top token's probability and labelled.

    Args:
        image: in original pixels; the token grid is stretched over it, as the model's resizing does.
    Raises:
        ValueError: the lens was not read at one whole image.
    """
    if lens.grid is None:
        raise ValueError("the overlay needs a lens read at one whole image: logit_lens(model, inputs, 'image[0]').")
    rows, cols = lens.grid
    width, height = image.size
    last = len(lens.layer_labels) - 1
    layers = sorted({round(last * n / (n_panels - 1)) for n in range(n_panels)})
    side = 3.6
    figure = Figure(figsize=(side * (len(layers) + 1) + 0.6, side * height / width + 0.7), layout="constrained")
    panels = figure.subplots(1, len(layers) + 1, squeeze=False)[0]
    panels[0].imshow(image, extent=(0, width, height, 0))
    panels[0].set_title("image", fontsize=9)
    panels[0].set_xticks([]), panels[0].set_yticks([])
    colours = None
    for axes, layer in zip(panels[1:], layers):
        axes.imshow(image.convert("L"), cmap="gray", extent=(0, width, height, 0), alpha=0.9)
        values = lens.top_probs[layer, :, 0].reshape(rows, cols)
        colours = axes.imshow(values, extent=(0, width, height, 0), cmap="cividis", vmin=0, vmax=1, alpha=0.6)
        if rows * cols <= 150:
            size = min(7.0, 0.9 * 72 * side / cols / 5)
            for token in range(rows * cols):
                row, col = divmod(token, cols)
                text = visible(lens.top_tokens[layer][token][0], 6)
                shade = "white" if values[row, col] < 0.55 else "black"
                centre = ((col + 0.5) * width / cols, (row + 0.5) * height / rows)
                axes.text(*centre, text, ha="center", va="center", fontsize=size, color=shade)
        axes.set_xticks([]), axes.set_yticks([])
        axes.set_title(lens.layer_labels[layer], fontsize=9)
    figure.suptitle(f"What the image tokens read as, {lens.model_name}", fontsize=10)
    figure.colorbar(colours, ax=list(panels), label="probability of the top token", shrink=0.8)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure
