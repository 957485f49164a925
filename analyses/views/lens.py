"""Pictures of a logit lens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def heat_map(lens: Any, path: str | Path | None = None) -> Figure:
    """Layer × position, the top token in each cell, coloured by its probability (0..1); the last layer on top."""
    probabilities = lens.top_probs[..., 0].numpy()
    n_layers, n_positions = probabilities.shape
    figure = Figure(figsize=(1.6 + max(1.0, 0.75 * n_positions), 1.2 + 0.26 * n_layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(probabilities, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=1)
    for layer in range(n_layers):
        for index in range(n_positions):
            dark = probabilities[layer, index] < 0.55
            text = visible(lens.top_tokens[layer][index][0])
            axes.text(index, layer, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(n_positions), [visible(t) for t in lens.prompt_tokens], rotation=45, ha="right", fontsize=7)
    axes.set_yticks(range(n_layers), lens.layer_labels, fontsize=7)
    axes.set_ylabel("residual stream")
    axes.set_title(f"Logit lens, {lens.model_name}", fontsize=9)
    figure.colorbar(image, ax=axes, label="probability of the top token")
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def visible(token: str, width: int = 12) -> str:
    """A token as a reader can see it: spaces and control characters shown, long ones cut."""
    shown = "".join("·" if c == " " else "⏎" if c == "\n" else c if c.isprintable() else "�" for c in token) or "∅"
    shown = shown.replace("$", r"\$")
    return shown if len(shown) <= width else shown[: width - 1] + "…"
