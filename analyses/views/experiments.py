"""Figures of experiments: locality, knockout, flips, counterfactual pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from analyses.views.figure import BLUE, COLOURS, ORANGE, Figure, bars, label_layers, rule
from analyses.views.text import line, visible

_MARKERS = "osD^v"
_STYLES = ("-", "--", "-.", ":", "-")


def locality_plot(study: Any, path: str | Path | None = None) -> Figure:
    """Mean recovery (0: corrupted, 1: clean) of each span by layer; bands are one standard error."""
    table = study.to_dataframe()
    figure = Figure(figsize=(6.8, 3.6), layout="constrained")
    axes = figure.subplots()
    rule(axes, y=1, line=":")
    lines_by_span(axes, table, "span", "recovery")
    axes.set_xlabel("layer whose residual stream (resid_pre) is patched")
    axes.set_ylabel("recovery of the logit difference")
    figures = study.summary()
    figure.titled(
        f"{figures['pairs']} counterfactual pairs; the best early position lies on the changed object in "
        f"{100 * figures['share']:.1f} % (chance {100 * figures['chance']:.1f} %); bands: one standard error. {study.model_name}"
    )
    return figure.saved(path)


def lines_by_span(axes: Any, table: Any, group: str, value: str) -> None:
    """One line per group by layer, with a band of one standard error; the legend is to the right of the plot."""
    rule(axes, y=0)
    for place, (name, rows) in enumerate(table.groupby(group, sort=False)):
        colour, marker, style = (choice[place % 5] for choice in (COLOURS, _MARKERS, _STYLES))
        axes.plot(rows["layer"], rows[value], color=colour, marker=marker, linestyle=style, markersize=4, linewidth=1.3, label=name)
        low, high = (rows[value] + sign * rows["standard_error"] for sign in (-1, 1))
        axes.fill_between(rows["layer"], low, high, color=colour, alpha=0.15, linewidth=0)
    label_layers(axes.xaxis, table["layer"].unique())
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def flip_study_plot(table: Any, path: str | Path | None = None) -> Figure:
    """Histogram of flips by layer; logit differences at the flip's layer and at the output, unchanged against ablated.

    Args:
        table: one row per flip.
    """
    figure = Figure(figsize=(11, 4.0), layout="constrained")
    panels = figure.subplots(1, 3)
    if len(table):
        _draw_flips(figure, panels, table)
        figure.titled(
            f"{len(table)} flips between two possible answers, in {table['prompt'].nunique()} questions; logit differences: new − old answer"
        )
    else:
        panels[0].set_title("no eligible flip", fontsize=9)
    return figure.saved(path)


def _draw_flips(figure: Figure, panels: Any, table: Any) -> None:
    depth = int(table["L"].max())
    groups = [table.loc[table["right"] == right, "layer"] for right in (True, False)]
    panels[0].hist(
        groups, bins=np.arange(0.5, depth + 1.5), stacked=True, color=[BLUE, ORANGE], rwidth=0.9,
        label=["answered rightly", "answered wrongly"],
    )  # fmt: skip
    panels[0].set_xlabel("layer of the flip (made by the block before it)")
    panels[0].set_ylabel("eligible flips")
    label_layers(panels[0].xaxis, range(1, depth + 1))
    panels[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    asked = ("components set to 0: is the flip undone?", "components set to 0: does the output change?")
    for axes, column, where, title in zip(
        panels[1:], ("lens_difference", "final_difference"), ("at the flip's layer", "at the output"), asked
    ):
        axes.set_title(title, fontsize=9)
        _before_after(axes, table[column], table[f"{column}_ablated"], table[f"{column}_random"])
        axes.set_xlabel(f"logit difference {where}")
        axes.set_ylabel("the same, components ablated")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower right", ncols=3)


def _before_after(axes: Any, before: Any, ablated: Any, control: Any) -> None:
    rule(axes, x=0), rule(axes, y=0)
    axes.scatter(before, control, s=9, color="#888888", marker="s", label="random components (mean of draws)")
    axes.scatter(before, ablated, s=9, color=ORANGE, label="found components")
    ends = [min(0, float(before.min())), float(before.max())]
    axes.plot(ends, ends, color="#444444", linewidth=0.8, linestyle=":", label="no effect")


def attribution_plot(flip: Any, path: str | Path | None = None) -> Figure:
    """Contribution of each component to the change of the logit difference (logits); towards the new answer in orange."""
    table = flip.to_dataframe()
    figure = Figure(figsize=(5, 1.0 + 0.24 * len(table)), layout="constrained")
    axes = figure.subplots()
    colours = [ORANGE if value > 0 else BLUE for value in table["attribution"]]
    bars(axes, table["component"], table["attribution"], colours, size=7)
    axes.set_xlabel("direct attribution (logits)")
    figure.titled(f"layer {flip.flip_layer}: {visible(flip.lost)} → {visible(flip.gained)}, {flip.before:+.2f} → {flip.after:+.2f} logits")
    return figure.saved(path)


def pairs_plot(pairs: Any, path: str | Path | None = None) -> Figure:
    """Left: logit differences of each pair, clean against corrupted. Right: numbers of kept and refused candidates, by reason."""
    table = pairs.to_dataframe()
    counts = {"kept": len(pairs), **pairs.reasons}
    figure = Figure(figsize=(8.6, max(3.2, 1.2 + 0.3 * len(counts))), layout="constrained")
    left, right = figure.subplots(1, 2)
    rule(left, x=0), rule(left, y=0)
    if len(pairs):
        kept = table[table["refused"] == ""]
        left.scatter(kept["clean_difference"], kept["corrupted_difference"], s=14, color=BLUE)
    left.set_xlabel("clean: answer − other (logits)", fontsize=8)
    left.set_ylabel("corrupted: answer − other (logits)", fontsize=8)
    left.set_title(f"{len(pairs)} pairs kept", fontsize=9)
    bars(right, [line(reason, 40) for reason in counts], list(counts.values()), [BLUE, *[ORANGE] * (len(counts) - 1)])
    right.set_xlabel("candidates", fontsize=8)
    right.set_title("kept, and refused", fontsize=9)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.titled(f"Counterfactual pairs, {pairs.model_name}")
    return figure.saved(path)
