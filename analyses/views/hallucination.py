"""Figures of hallucination detection."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from analyses.views.figure import BLUE, COLOURS, ORANGE, Figure, bars, intervals, panels_of, rule
from analyses.views.text import EMPTY, line

_LINES = ("-", "--", "-.", ":")
_PER_PANEL = 4
_FIGURES = {
    "auroc": "AUROC (0.5: knows nothing)",
    "ap_hallucinated": "Average precision for hallucinated (knowing nothing gives their share)",
    "ap_correct": "Average precision for correct (knowing nothing gives their share)",
}
_RESAMPLED = {"image": "images with all their claims", "id": "questions with all their claims", "claim": "claims"}
_RIGHT, _WRONG = BLUE, ORANGE


def roc_plot(result: Any, path: str | Path | None = None, category: str = "all") -> Figure:
    """ROC curves, four methods per panel: share of right answers kept against share of hallucinated answers let through.

    Raises:
        ValueError: no such category.
    """
    table, methods = result.of(category), result.methods
    figures = result.to_dataframe().query("category == @category").set_index("method")
    n_panels = ceil(len(methods) / _PER_PANEL)
    figure = Figure(figsize=(0.6 + 3.3 * n_panels, 4.1), layout="constrained")
    panels = figure.subplots(1, n_panels, sharey=True, squeeze=False)[0]
    for number, axes in enumerate(panels):
        for place, method in enumerate(methods[number * _PER_PANEL : (number + 1) * _PER_PANEL]):
            rows = table[table[method].notna()]
            if rows["correct"].nunique() < 2:
                continue
            let_through, kept, _ = roc_curve(rows["correct"], rows[method])
            label = f"{_name(method)}: {figures.loc[method, 'auroc']:.2f}"
            axes.plot(let_through, kept, color=COLOURS[place], linestyle=_LINES[place], linewidth=1.5, label=label)
        axes.plot((0, 1), (0, 1), color="#999999", linewidth=0.8)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), box_aspect=1)
        axes.set_xlabel("hallucinated answers let through", fontsize=9)
        axes.tick_params(labelsize=8)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7.5, loc="lower right", title="AUROC", title_fontsize=7.5)
    panels[0].set_ylabel("right answers kept", fontsize=9)
    figure.titled(_title(result, category, table), 10)
    return figure.saved(path)


def score_plot(result: Any, path: str | Path | None = None, category: str = "all") -> Figure:
    """Histograms of each method's scores for right and for hallucinated answers, each normalised to shares.

    Raises:
        ValueError: no such category.
    """
    table, methods = result.of(category), result.methods
    figure, panels = panels_of(len(methods), (2.7, 1.9), (0.4, 0.9))
    for axes, method in zip(panels, methods):
        rows = table[table[method].notna()]
        if len(rows):
            edges = np.histogram_bin_edges(rows[method], bins=24)
            for kept, colour, hatch in ((rows["correct"], _RIGHT, None), (~rows["correct"], _WRONG, "////")):
                values = rows.loc[kept, method]
                style = {"color": colour, "alpha": 0.45, "hatch": hatch, "edgecolor": colour, "linewidth": 0.6}
                axes.hist(values, edges, weights=np.full(len(values), 1 / max(1, len(values))), **style)
        axes.set_xlabel(_name(method), fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in panels[::4]:
        axes.set_ylabel("share of answers", fontsize=8)
    figure.legend(handles=_kinds(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.titled(_title(result, category, table), 10)
    return figure.saved(path)


def interval_plot(result: Any, path: str | Path | None = None) -> Figure:
    """AUROC (dot) with its interval, one panel per category, one line per method; 0.5 is chance."""
    table, counts = result.to_dataframe(), result.counts()
    shown = [c for c in counts if table.loc[table["category"] == c, "auroc"].notna().any()]
    if not shown:
        raise ValueError("no category has both right and hallucinated answers: there is nothing to draw.")
    methods = [_name(method) for method in result.methods]
    figure, panels = panels_of(len(shown), (2.3, 0.75 + 0.2 * len(methods)), (1.6, 0.8), sharex=True, sharey=True)
    for axes, category in zip(panels, shown):
        rows = table[table["category"] == category].set_index("method").loc[list(result.methods)]
        rule(axes, x=0.5)
        intervals(axes, methods, rows["auroc"], rows["auroc_low"], rows["auroc_high"])
        wrong, items = counts[category]
        axes.set_title(f"{category}\n{wrong} of {items} hallucinated", fontsize=8)
        axes.set_xlim(-0.03, 1.03)
    for axes in panels[-4:]:
        axes.set_xlabel("AUROC", fontsize=8)
    left_out = [c for c in counts if c not in shown]
    note = f"\nOnly right or only hallucinated answers, so no AUROC: {', '.join(left_out)}." if left_out else ""
    drawn = table[table["category"].isin(shown) & table["auroc"].notna()]
    note = f"\nA dot without a line: too few answers of one kind for an interval.{note}" if drawn["auroc_low"].isna().any() else note
    level = f"{100 * result.level:.0f} %"
    figure.titled(
        f"AUROC of scores, right against hallucinated answers of {result.model_name} to {result.data} (line: chance, 0.5), "
        f"with {level} bootstrap intervals over {_RESAMPLED[result.cluster]}.{note}"
    )
    return figure.saved(path)


def chair_plot(result: Any, path: str | Path | None = None, most: int = 15) -> Figure:
    """Left: CHAIRs and CHAIRi (0..1). Right: the objects that are hallucinated most often, as counts of mentions."""
    figures = result.to_dataframe().iloc[0]
    made_up = result.mentions.loc[result.mentions["hallucinated"], "object"].value_counts().head(most)
    figure = Figure(figsize=(8.6, max(2.6, 1.2 + 0.24 * len(made_up))), layout="constrained")
    left, right = figure.subplots(1, 2)
    parts = {"CHAIRs": ("captions", "hallucinated_captions"), "CHAIRi": ("mentions", "hallucinated_mentions")}
    names = [f"{name}\n{figures[wrong]:.0f} of {figures[of]:.0f} {of}" for name, (of, wrong) in parts.items()]
    bars(left, names, [figures[name] for name in parts], [BLUE, ORANGE])
    left.set_xlim(0, 1)
    left.set_xlabel("share that is hallucinated", fontsize=8)
    bars(right, [line(name, 24) or EMPTY for name in made_up.index], made_up.to_numpy(), ORANGE)
    right.set_xlabel("hallucinated mentions", fontsize=8)
    right.set_title("objects most often made up" if len(made_up) else "no object is made up", fontsize=9)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.titled("CHAIR")
    return figure.saved(path)


def markdown(result: Any) -> str:
    """A report in Markdown: what was run, tables of AUROC and of both average precisions, and the categories with one class only."""
    counts, metrics = result.counts(), result.to_dataframe()
    defined = {c for c in counts if metrics.loc[metrics["category"] == c, "auroc"].notna().any()}
    parts = [
        f"{result.data}, model {result.model_name} (weights {result.weights}): {len(result.judged)} judged answers, "
        f"{counts['all'][0]} hallucinated; {100 * result.level:.0f}% intervals from {result.n_boot} resamples of {_RESAMPLED[result.cluster]}."
    ]
    if result.layers is not None:
        parts.append("The contextual lens reads the image at layer {} and the text at layer {}.".format(*result.layers))
    for figure, title in _FIGURES.items():
        table = result.table(figure)
        kept = [c for c in table.columns if c in defined and table.loc[list(result.methods), c].ne("–").any()]
        rows = [["", *kept], ["---"] + ["---:"] * len(kept)]
        rows += [[_name(name), *table.loc[name, kept]] for name in table.index]
        parts += [f"**{title}**", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    if missing := [f"{c} ({counts[c][0]} of {counts[c][1]} hallucinated)" for c in counts if c not in defined]:
        parts.append(f"Nothing to tell apart in: {', '.join(missing)}.")
    if few := result.few():
        parts.append(f"Fewer than 300 hallucinated answers, so wide intervals: {', '.join(f'{c} ({n})' for c, n in few.items())}.")
    return "\n\n".join(parts) + "\n"


def _kinds() -> list[Patch]:
    right = Patch(facecolor=_RIGHT, edgecolor=_RIGHT, alpha=0.45, label="right answers")
    return [right, Patch(facecolor=_WRONG, edgecolor=_WRONG, alpha=0.45, hatch="////", label="hallucinated answers")]


def _title(result: Any, category: str, table: Any) -> str:
    wrong = int((~table["correct"]).sum())
    return f"{result.data}, {category}: {len(table)} answers, {wrong} hallucinated ({result.model_name})"


def _name(method: str) -> str:
    """The name of a method in figures; neg_x is shown as −x."""
    return method.replace("neg_", "−").replace("_", " ")
