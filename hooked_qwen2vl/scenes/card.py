"""The model card: every number measured here and now. `python -m hooked_qwen2vl.scenes.card`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from .evaluate import best_without_image, beyond_short_answers, evaluate, readable_tokens, relations_beside_shortcuts
from .folder import CHECKPOINT
from .world import load_split, sample

MARKS = {
    "attribute": 0.95, "existence": 0.95, "ocr": 0.95, "environment": 0.95, "comparison": 0.90, "relation": 0.85,
    "count": 0.90,
}  # fmt: skip
FIGURE = "emergence.png"
_SEED = 11


def write_card(folder: Path = CHECKPOINT, n: int = 2000) -> pd.DataFrame:
    """Measures the checkpoint on n test items, writes README.md and the figure; returns accuracy by category."""
    items = load_split("test", n)
    seen = evaluate(items, folder)
    blind = evaluate(items, folder, blind=True, seed=_SEED)
    prior = pd.Series(best_without_image(items), name="prior")
    table = pd.DataFrame(
        {
            "items": seen.groupby("category").size(),
            "accuracy": seen.groupby("category").right.mean(),
            "aim": pd.Series(MARKS),
            "blind": blind.groupby("category").right.mean(),
            "best answer without the image": prior.groupby(seen.category).mean(),
        }
    ).loc[list(MARKS)]
    captions = evaluate(sample(250, seed=_SEED, category="caption"), folder)
    domains = seen.pivot_table(index="domain", columns="category", values="right")[list(MARKS)]
    domains.insert(0, "all", seen.groupby("domain").right.mean())
    domains["caption, word for word"] = captions.groupby("domain").right.mean()
    figure_depths(seen, folder / FIGURE)
    extra = relations_beside_shortcuts(folder, items), beyond_short_answers(folder), readable_tokens(folder)
    (folder / "README.md").write_text(_text(folder, seen, blind, prior, table, domains, *extra))
    return table


def figure_depths(seen: pd.DataFrame, path: Path) -> None:
    """For each category, the share of right answers that are top-1 from each depth on."""
    from matplotlib.figure import Figure

    right = seen[seen.right]
    n_layers = int(seen.depth.max())
    figure = Figure(figsize=(6.4, 3.8), layout="constrained", dpi=110)
    axis = figure.subplots()
    for category in MARKS:
        depth = right[right.category == category].depth
        if len(depth):
            shares = [(depth <= layer).mean() for layer in range(n_layers + 1)]
            axis.plot(range(n_layers + 1), shares, marker="o", markersize=3, label=category)
    axis.set_xlabel("layer (0: embeddings; last: the model's output)")
    axis.set_ylabel("share of right answers\nthat are top-1 from here on")
    axis.set_ylim(-0.02, 1.02)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _text(folder: Path, seen, blind, prior, table, domains, relations, beyond, readable) -> str:
    right = seen[seen.right]
    depth = right.groupby("category").depth.agg(["median", "mean"]).loc[[c for c in MARKS if c in set(right.category)]]
    typical = seen[seen.typical.notna()].groupby("typical").right.agg(["size", "mean"])
    typical.index = ["atypical" if not t else "typical" for t in typical.index]
    unseen = seen.groupby("unseen").right.agg(["size", "mean"])
    unseen.index = ["depends on an unseen combination" if u else "all combinations seen in training" for u in unseen.index]
    missed = [f"{c} ({a:.1%}, aim {m:.0%})" for c, a, m in zip(table.index, table.accuracy, table.aim) if a < m]
    return f"""---
library_name: transformers
license: mit
pipeline_tag: image-text-to-text
---
# scenes: a small Qwen2-VL with known answers

A genuine `Qwen2VLForConditionalGeneration` (8 decoder layers of width 128, 4 query and 2 key-value heads, tied
embeddings; 3 vision blocks of width 96; float32) trained from random weights on generated pictures of coloured shapes,
glyphs, bar charts, textures and routes. It exists to test interpretability methods: for every question it is
known which object, which cells and which attribute the answer depends on. It knows nothing else of the world.
All numbers below are measured by `python -m hooked_qwen2vl.scenes.card` on {len(seen)} test items, whose scenes
occur in no training batch. An answer counts only if greedy decoding gives exactly it.

## Accuracy by category

{markdown(table)}

Below the aim: {"; ".join(missed) if missed else "none"}.
*Blind* replaces the picture by noise. *Best answer without the image* is the most frequent answer to the same
question in training: what a model that never looks could reach. Blind over all: {blind.right.mean():.1%}; best without the image: {prior.mean():.1%};
with the image: {seen.right.mean():.1%}.

## By domain

{markdown(domains)}

## Relations beside the shortcuts

Accuracy of relation questions by how many things the picture holds, beside what a model would score that chose at
random among the things on the asked side of the anchor, among its neighbours on any side, or among all other things.
Single hops: both hops of the question asked for themselves (see `world.single_hops`).

{markdown(relations)}

## Beyond short answers

Questions whose image does not hold what they ask for ("none" is right), answers in words, and the last turn of a
dialogue of three, with how often the model, asked for what is not there, says "none".

{markdown(beyond)}

## Image tokens

How often an image token reads as the colour or the kind of the thing there, beside the same count for the things of another
picture of the grid: by the lens's top-1, and as the nearest word embedding by cosine after the mean image token is subtracted; at the
best layer of the validation split, and at layer 0.

{markdown(readable)}

## Typical and atypical colours

Each shape wears its typical colour in about three quarters of the scenes.

{markdown(typical.rename(columns={"size": "items", "mean": "accuracy"}))}

## Combinations of kind, colour and quadrant never trained on

{markdown(unseen.rename(columns={"size": "items", "mean": "accuracy"}))}

## How answers emerge

The layer from which on the top-1 at the last position is the final answer, over right answers:

{markdown(depth, digits=2)}

{_hops(depth)}

![share of answers settled by depth]({FIGURE})

## Training

{_training(folder)}
"""


def _hops(depth: pd.DataFrame) -> str:
    if not {"attribute", "relation"} <= set(depth.index):
        return ""
    one, two = depth.loc["attribute", "mean"], depth.loc["relation", "mean"]
    order = "earlier than" if one < two - 0.05 else "later than" if one > two + 0.05 else "as early as"
    return f"One hop (attribute, mean depth {one:.2f}) is settled {order} two (relation, {two:.2f})."


def _training(folder: Path) -> str:
    path = folder / "training.json"
    if not path.exists():
        return "No training record beside this checkpoint."
    record = json.loads(path.read_text())
    curve = pd.DataFrame(record["log"][:: max(1, len(record["log"]) // 12)]).drop(columns="levels", errors="ignore")
    table = markdown(curve.set_index("step")) if len(curve) else ""
    return f"{record['how']}\n{record.get('notes', '')}\n\n{table}"


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A table in Markdown, its index first; whole numbers as such, others with so many digits."""

    def cell(value) -> str:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:.0f}" if value.is_integer() and value > 1 else f"{value:.{digits}f}"
        return str(value)

    head = [str(table.index.name or ""), *map(str, table.columns)]
    lines = [head, ["---"] * len(head)] + [[str(i), *map(cell, row)] for i, row in zip(table.index, table.to_numpy(object))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=CHECKPOINT)
    parser.add_argument("--n", type=int, default=2000, help="test items to measure on")
    args = parser.parse_args()
    print(write_card(args.folder, args.n).to_string())


if __name__ == "__main__":
    main()
