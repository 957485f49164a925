"""Figures of domain-specific neurons."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd

from analyses.views.figure import Figure, colour_bar, label_ticks, length, on_image, picture, write_cells
from analyses.views.text import line, visible

_COLOURS = {"firing": "#0072b2", "effect": "#009e73", "random": "#d55e00", "random, same rate": "#e69f00",
            "random for effect": "#cc79a7", "none": "#555555"}  # fmt: skip
_OWN = {"firing": "own, by firing", "effect": "own, by effect"}
_WORDS = {"image": "image tokens", "text": "text tokens", "last": "last position"}
_SOURCES = {"image": ("#0072b2", "o"), "text": ("#d55e00", "s"), "last": ("#009e73", "^")}


def layers_plot(table: pd.DataFrame, model_name: str, path: str | Path | None = None) -> Figure:
    """One panel per module: how many neurons of each layer belong to each domain."""
    modules = list(dict.fromkeys(table["module"]))
    grids = {m: table[table["module"] == m].pivot_table(index="layer", columns="domain", values="neurons", sort=False) for m in modules}
    n_domains = len(dict.fromkeys(table["domain"]))
    height = 1.9 + length(max(len(grid) for grid in grids.values()), 0.24)
    figure = Figure(figsize=(1.2 + len(modules) * (0.9 + 0.5 * n_domains), height), layout="constrained")
    top = max(1, int(table["neurons"].max()))
    image = None
    for axes, (module, grid) in zip(figure.subplots(1, len(modules), squeeze=False)[0], grids.items()):
        image = axes.imshow(grid, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=top)
        if len(grid) <= 40:
            cells = [[f"{value:.0f}" for value in row] for row in grid.to_numpy()]
            write_cells(image, cells, 7)
        axes.set_xticks(range(grid.shape[1]), grid.columns, rotation=45, ha="right", fontsize=8)
        label_ticks(axes.yaxis, grid.index, height - 1.9, size=8)
        axes.set_title(f"{module} ({int(grid.to_numpy().sum())})", fontsize=9)
        axes.set_ylabel("layer", fontsize=8)
    colour_bar(figure, image, list(figure.axes), "neurons that serve the domain")
    figure.titled(f"Domain-specific neurons, {model_name}", 10)
    return figure.saved(path)


def accuracy_plot(table: pd.DataFrame, model_name: str, path: str | Path | None = None) -> Figure:
    """What is switched off × domain of the questions: accuracy, and below it the 95 % interval (resamples images)."""
    domains = list(dict.fromkeys(table["domain"]))
    rows = list(dict.fromkeys(zip(table["module"], table["selection"])))
    order = list(dict.fromkeys(table.loc[table["selection"] != "none", "module"]))
    rows.sort(key=lambda row: (row[1] != "none", order.index(row[0]) if row[0] in order else 0))
    values = table.set_index(["module", "selection", "domain"])
    accuracy = np.array([[values.loc[(*row, domain), "accuracy"] for domain in domains] for row in rows])
    figure = Figure(figsize=(3.4 + 0.95 * len(domains), 1.4 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    low = max(0.0, np.floor(10 * accuracy.min()) / 10 - 0.1)
    image = axes.imshow(accuracy, aspect="auto", cmap="cividis", vmin=low, vmax=1)
    cells = [[values.loc[(*row, domain)] for domain in domains] for row in rows]
    write_cells(image, [[f"{cell['accuracy']:.2f}" for cell in row] for row in cells], 8, lower=-0.12)
    write_cells(image, [[f"{cell['low']:.2f}–{cell['high']:.2f}" for cell in row] for row in cells], 5.5, lower=0.27)
    labels = ["nothing off" if kind == "none" else f"{_module(module)}: {_OWN.get(kind, kind)}" for module, kind in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    items = [int(values.loc[("all", "none", domain), "items"]) for domain in domains]
    axes.set_xticks(range(len(domains)), [f"{_domain(d)}\nn = {n}" for d, n in zip(domains, items)], fontsize=7.5)
    for y in range(1, len(rows)):
        if rows[y][0] != rows[y - 1][0] or rows[y - 1][1] == "none":
            axes.axhline(y - 0.5, color="white", linewidth=3)
    figure.titled(f"Accuracy on a domain with its own neurons, or a control, off; {model_name}")
    colour_bar(figure, image, axes, "accuracy (small: 95 % interval)", shrink=0.5)
    return figure.saved(path)


def controls_plot(table: pd.DataFrame, model_name: str, path: str | Path | None = None) -> Figure:
    """Own minus control, by module (columns) and domain; top: accuracy, bottom: log-probability of the right answer (nats)."""
    modules, domains = list(dict.fromkeys(table["module"])), list(dict.fromkeys(table["domain"]))
    pairs = list(dict.fromkeys(zip(table["selection"], table["control"])))
    figure = Figure(figsize=(1.2 + 2.2 * len(modules), 5.4), layout="constrained")
    panels = figure.subplots(2, len(modules), squeeze=False, sharey="row", sharex=True)
    for column, module in enumerate(modules):
        for axes, name in zip(panels[:, column], ("excess", "excess_log_prob")):
            for number, (selection, control) in enumerate(pairs):
                some = table.query("module == @module and selection == @selection and control == @control").set_index("domain").loc[domains]
                x = np.arange(len(domains)) + 0.22 * (number - (len(pairs) - 1) / 2)
                bars = [some[name] - some[f"{name}_low"], some[f"{name}_high"] - some[name]]
                axes.errorbar(
                    x, some[name], np.clip(bars, 0, None), fmt="os^D"[number % 4], markersize=4, capsize=2, linewidth=1,
                    color=_COLOURS[control], label=f"{_OWN[selection]} − {control}",
                )  # fmt: skip
            axes.axhline(0, color="#555555", linewidth=0.8)
            axes.grid(axis="y", alpha=0.25)
            axes.set_xticks(range(len(domains)), map(_domain, domains), rotation=45, ha="right", fontsize=8)
            axes.tick_params(axis="y", labelsize=8)
        panels[0, column].set_title(_module(module), fontsize=9)
    panels[0, 0].set_ylabel("accuracy:\nown off − control off", fontsize=8)
    panels[1, 0].set_ylabel("log p(answer), nats:\nown off − control off", fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(pairs), frameon=False, fontsize=8)
    figure.titled(f"Below 0: the domain needs its own neurons more than the control's (95 % bootstrap over images), {model_name}")
    return figure.saved(path)


def streams_plot(table: pd.DataFrame, model_name: str, path: str | Path | None = None, module: str = "all") -> Figure:
    """Left: entropy of the logit lens by layer and kind of token, nothing off (thin: domains). Right: change of the residual stream."""
    figure = Figure(figsize=(10.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    calm = table[table["selection"] == "none"]
    for source, (colour, marker) in _SOURCES.items():
        some = calm[calm["source"] == source]
        for _, one in some.groupby("domain"):
            left.plot(one["layer"], one["entropy_nats"], color=colour, linewidth=0.6, alpha=0.5)
        mean = some.groupby("layer")["entropy_nats"].mean()
        left.plot(mean.index, mean, color=colour, marker=marker, markersize=4, label=_WORDS[source])
    left.set_ylabel("entropy of the logit lens (nats)", fontsize=9)
    left.set_ylim(top=1.18 * calm["entropy_nats"].max())
    left.legend(frameon=False, fontsize=8, loc="upper center", ncols=3)
    left.set_title("nothing off (thin: one domain, thick: mean)", fontsize=9)
    moved = table[(table["selection"] != "none") & (table["module"] == module)]
    for selection, some in moved.groupby("selection", sort=False):
        for source, style in (("image", "-"), ("text", "--")):
            mean = some[some["source"] == source].groupby("layer")["deviation"].mean()
            label = _OWN.get(selection, selection) if source == "image" else None
            right.plot(mean.index, 100 * mean, style, color=_COLOURS[selection], marker="o", markersize=3, label=label)
    right.plot([], [], "-", color="#555555", label="image tokens")
    right.plot([], [], "--", color="#555555", label="text tokens")
    right.set_ylabel("change of the residual stream\n(% of its norm)", fontsize=9)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    right.set_title(f"off: {_module(module)}", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("layer (0: embeddings, last: the output)", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
    figure.titled(f"Entropy of the logit lens, and what switching domain-specific neurons off changes in the residual stream; {model_name}")
    return figure.saved(path)


def top_images_plot(top: Any, path: str | Path | None = None) -> Figure:
    """Each image, and below it the image in grey, with the patches at which the neuron fires coloured by activation."""
    n = len(top.examples)
    tallest = max(example.image.size[1] / example.image.size[0] for example in top.examples)
    figure = Figure(figsize=(2.3 * n + 0.9, 2 * 2.3 * min(tallest, 1.4) + 0.9), layout="constrained")
    panels = figure.subplots(2, n, squeeze=False)
    highest = max(float(example.activations.max()) for example in top.examples)
    colours = None
    for (above, below), example in zip(panels.T, top.examples):
        values = np.where(example.activations.numpy() > 0, example.activations.numpy(), np.nan)
        picture(above, example.image.convert("RGB"), "\n".join(wrap(line(f"{example.domain}: {example.question}"), 30)), 7)
        colours = on_image(below, values, example.image, "viridis", 0, max(highest, 1e-9))
    colour_bar(figure, colours, list(panels.flat), "activation before its function\n(no colour: does not fire)", shrink=0.6)
    module, layer, neuron = top.neuron
    writes = f"; writes {', '.join(visible(t) for t in top.writes[:6])}" if top.writes else ""
    figure.titled(f"Neuron {neuron} of layer {layer} ({module}): images that fire it most, and where{writes}")
    return figure.saved(path)


def _module(name: str) -> str:
    return "all modules" if name == "all" else name


def _domain(name: str) -> str:
    return "all domains" if name == "all" else name
