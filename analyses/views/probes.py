"""Figures of probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analyses.views.figure import GREY, Figure, intervals, rule


def probes_plot(result: Any, path: str | Path | None = None) -> Figure:
    """Accuracy of every site with its interval; grey: with shuffled labels; dashed: always the most frequent label."""
    table = result.table
    figure = Figure(figsize=(6.4, 1.3 + 0.22 * len(table)), layout="constrained")
    axes = figure.subplots()
    intervals(axes, list(table["site"]), table["accuracy"], table["accuracy_low"], table["accuracy_high"])
    if "control" in table:
        axes.scatter(table["control"], range(len(table)), c=GREY, s=16, marker="x", label="labels shuffled")
        axes.legend(fontsize=7, frameon=False)
    rule(axes, x=float(table["majority"].iloc[0]), line="--")
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("accuracy on other images; dashed: always the most frequent label", fontsize=8)
    figure.titled(f"Linear probes, {len(result.labels)} labels, {table['items'].iloc[0]} items. {result.model_name}")
    return figure.saved(path)
