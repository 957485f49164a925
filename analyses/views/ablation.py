"""Figures of ablation experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analyses.views.figure import BLUE, GREY, ORANGE, Figure, intervals, rule


def effects_plot(result: Any, path: str | Path | None = None, most: int = 24) -> Figure:
    """Mean change of log p and of accuracy, one line per part, largest loss first; random sets in grey."""
    table = result.to_dataframe(by_category=False)
    shown = table.head(most)
    figure = Figure(figsize=(7.4, 1.5 + 0.2 * len(shown)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = [GREY if part.startswith("random") else BLUE for part in shown["part"]]
    for axes, name, label in zip(
        panels, ("change", "accuracy_change"), ("change of log p of the right answer (nats)", "change of accuracy (share of questions)")
    ):
        intervals(axes, list(shown["part"]), shown[name], shown[f"{name}_low"], shown[f"{name}_high"], colours)
        rule(axes, x=0)
        axes.set_xlabel(label, fontsize=8)
    n = f"{len(shown)} of {len(table)} parts, " if len(shown) < len(table) else ""
    how = {"zero": "zero ablation", "mean": "mean ablation", "resample": "resample ablation"}[result.settings["how"]]
    figure.titled(f"{how}: {n}{shown['items'].max()} questions, 95 % intervals over images. {result.model_name}")
    return figure.saved(path)


def search_plot(result: Any, path: str | Path | None = None) -> Figure:
    """Left: the share carried as heads are restored in the search. Right: the found set and random sets on held-out questions."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"+L{layer}H{head}" for layer, head in result.search[["layer", "head"]].itertuples(index=False)]
    left.plot(range(1, len(names) + 1), result.search["share"], color=BLUE, marker=".")
    left.set_xticks(range(1, len(names) + 1), names, rotation=90, fontsize=7)
    rule(left, y=result.settings["share"], line="--")
    rule(left, y=0)
    left.set_ylabel("share of log p carried", fontsize=8)
    left.set_title(f"search: {result.n_search} questions", fontsize=9)
    found, random = result.held_out.iloc[0], result.held_out.iloc[1:]
    spread = range(len(random))
    right.scatter([1 + 0.3 * (n / max(1, len(random) - 1) - 0.5) for n in spread], random["share"], color=GREY, s=14)
    right.errorbar(
        [0],
        [found["share"]],
        [[found["share"] - found["share_low"]], [found["share_high"] - found["share"]]],
        fmt="o",
        color=ORANGE,
        capsize=3,
    )
    right.set_xticks([0, 1], [f"found, {len(names)} heads", f"{len(random)} random sets\nof as many"], fontsize=8)
    right.set_xlim(-0.6, 1.6)
    rule(right, y=result.settings["share"], line="--")
    rule(right, y=0)
    right.set_title(f"held out: {result.n_held_out} questions, 95 % interval", fontsize=9)
    figure.titled(
        f"The smallest set of heads that carries the answers ({result.settings['how']} ablation of the others). {result.model_name}"
    )
    return figure.saved(path)
