"""What was found of planted mechanisms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analyses.views.figure import COLOURS, GREY, Figure


def recovery_plot(result: Any, path: str | Path | None = None) -> Figure:
    """The share of the planted neurons or heads that each method finds, by strength, one panel per mechanism; every seed a dot. Grey:
    97.5th percentile of random choices of the same size."""
    mechanisms = list(dict.fromkeys(result.found["what"]))
    figure = Figure(figsize=(3.1 * len(mechanisms), 3.2), layout="constrained")
    panels = figure.subplots(1, len(mechanisms), sharey=True, squeeze=False)[0]
    for axes, what in zip(panels, mechanisms):
        found = result.found[result.found["what"] == what]
        strengths = sorted(found["strength"].unique())
        methods = list(dict.fromkeys(found["method"]))
        width = 0.8 / len(methods)
        for number, method in enumerate(methods):
            own = found[found["method"] == method]
            at = [place + (number - (len(methods) - 1) / 2) * width for place in range(len(strengths))]
            means = [own.loc[own["strength"] == strength, "recovered"].mean() for strength in strengths]
            chance = [own.loc[own["strength"] == strength, "random_high"].mean() for strength in strengths]
            axes.bar(at, means, 0.9 * width, color=COLOURS[number], label=method)
            axes.hlines(chance, [x - width / 2 for x in at], [x + width / 2 for x in at], color=GREY, lw=2)
            for x, strength in zip(at, strengths):
                values = own.loc[own["strength"] == strength, "recovered"]
                axes.plot([x] * len(values), values, ".", color="black", markersize=4)
        axes.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths], fontsize=8)
        axes.set_xlabel("strength", fontsize=8)
        axes.set_ylim(0, 1.25)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_title(what, fontsize=9)
        axes.legend(fontsize=7, frameon=False, loc="upper left")
    panels[0].set_ylabel("share of the planted units found", fontsize=8)
    figure.titled(f"Planted mechanisms: what the methods find. Dots: seeds; grey: random choices, 97.5th percentile. {result.model_name}")
    return figure.saved(path)
