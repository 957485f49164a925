"""Figures of how well features predict the attributes of objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from analyses.views.figure import COLOURS, Figure, rule
from analyses.views.text import visible


def judgement_plot(result: Any, path: str | Path | None = None) -> Figure:
    """AUROC of the best unit of each kind and of a probe, one line per label, grouped by truth; 0.5 is chance."""
    table = result.table
    names = list(dict.fromkeys(f"{truth}: {visible(label, 20)}" for truth, label in table[["truth", "label"]].itertuples(index=False)))
    units = list(dict.fromkeys(table["unit"]))
    figure = Figure(figsize=(6.6, 1.6 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))
    for number, (unit, colour) in enumerate(zip(units, COLOURS)):
        own = table[table["unit"] == unit]
        at = places + 0.16 * (number - (len(units) - 1) / 2)
        axes.hlines(at, own["auroc_low"], own["auroc_high"], colors=colour, linewidth=1, alpha=0.5)
        label = {"feature": "best feature", "neuron": "best neuron", "dimension": "best dimension of the stream"}.get(unit, "linear probe")
        axes.scatter(own["auroc"], at, c=colour, s=12, label=label, zorder=3)
    axes.set_yticks(places, names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    rule(axes, x=0.5)
    axes.set_xlabel("AUROC on images on which it was not chosen, 95 % interval", fontsize=8)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    figure.titled(f"{result.n_features} features of {result.hook}, beside single units and a probe. {result.model_name}")
    return figure.saved(path)
