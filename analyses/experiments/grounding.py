"""Do heat maps find what the answer depends on? On the embedded world, where the cells that it depends on are known.

    python -m analyses.experiments.grounding --n 600 --report docs/grounding_results.md --record hooked_qwen2vl/scenes/checkpoint/grounding.json

1. Take items of a split whose right answer depends on some cells, but not on all or none; the others ("What is the
   background?", "no", "0") are left out and counted.
2. Teacher-force the right answer. Heat maps over the image tokens:
     contextual lens   max over layers ≥ 1 of the cosine with the answer
     logit lens        max over layers of p(first token of the answer, or of the noun)
     attention         from the position that predicts the answer's first token, mean over layers and heads
     (shuffled image)  the contextual lens with another item's image of the same grid: a control for what the text alone gives
     (random)          uniform random numbers
     (centre)          larger closer to the centre
3. For each: pointing game (does the answer depend on the hottest token?), average precision of the heat map against the mask of
   cells (scikit-learn), and IoU in cells of the map's box with the mask. The box is the rectangle with the largest sum of
   (heat − mean) for all methods; the contextual lens's own box is reported too.
4. Means by category with bootstrap intervals over scenes, each with all its items (95 %, percentile).

For an existence question, the noun that it asks about (the last word of the question) is grounded instead of the answer.
The choices of boxes, nouns and controls are ours. `--record` writes the means over all categories with the hash of the weights; the
command `ground` says them of the model that has these weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from sklearn.metrics import average_precision_score
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.tools.analysis import logit_readout

from analyses.common.attention import attention_patterns
from analyses.common.models import describe_model
from analyses.common.rectangles import Cells, heaviest_rectangle
from analyses.common.result import Result
from analyses.common.statistics import mean_interval, share_interval
from analyses.common.tables import write_csv
from analyses.contextual_lens import ground, span_positions, word_spans
from analyses.logit_lens import residual_stack
from hooked_qwen2vl.files import whole_file
from hooked_qwen2vl.protocols import Model
from hooked_qwen2vl.scenes.folder import CHECKPOINT
from hooked_qwen2vl.scenes.words import ABSENT

FIGURES = {"pointing": "pointing game (share of hits)", "ap": "average precision of the heat map", "iou": "IoU of the box"}
OWN_BOX = "contextual lens, its box"
METHODS = ("contextual lens", "logit lens", "attention", "(shuffled image)", "(random)", "(centre)")


@dataclass(frozen=True)
class GroundingExperiment(Result):
    """How well the methods find what the answers depend on.

    Attributes:
        table: one row per item and method: item, scene (items of one scene share its picture), category, domain, right (whether the
            model gives the answer), share (of the cells that the answer depends on), pointing (0 to 1), ap, iou (NaN if the method
            has no such figure).
        skipped: reason -> number of items left out.
        settings: image_layer, text_layer, seed and the model's name.
    """

    table: pd.DataFrame
    skipped: dict[str, int]
    settings: dict[str, Any]

    def to_dataframe(self, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row per category (and "all") and method: numbers of items and scenes, and the mean of each figure.

        The means have 95 % intervals, which resample scenes (items, in tables without scenes).
        """
        groups = [("all", self.table), *self.table.groupby("category")]
        rows = []
        for category, part in groups:
            for method in (METHODS[0], OWN_BOX, *METHODS[1:]):
                one = part[part["method"] == method]
                scene = one["scene" if "scene" in one else "item"]
                row: dict[str, Any] = {"category": category, "method": method, "items": len(one), "scenes": scene.nunique()}
                for name in FIGURES:
                    interval = share_interval if name == "pointing" else mean_interval
                    row[name], row[f"{name}_low"], row[f"{name}_high"] = interval(one[name], scene, seed, n_boot=resamples)
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, path: Any = None, figure: str = "pointing") -> Any:
        """One panel per category: each method's mean with its interval. `figure` is one of FIGURES."""
        from analyses.views.grounding import methods_plot

        table = self.to_dataframe().dropna(subset=[figure])
        title = f"Which methods find what the answer depends on? Grey: controls. {self.settings['model']}"
        return methods_plot(table, figure, f"{FIGURES[figure]}, mean and 95 % interval", path, title)


def run_experiment(
    model: Model,
    items: Iterable[Any],
    image_layer: int | None = None,
    text_layer: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> GroundingExperiment:
    """All methods on items of the embedded world.

    Args:
        items: from `hooked_qwen2vl.scenes`.
        image_layer, text_layer: of the contextual lens's box; None: its defaults.
        seed: of the random heat maps and of the choice of other images.
    Raises:
        ValueError: no item is left.
    """
    usable, skipped = _usable(list(items))
    if not usable:
        raise ValueError(f"no item depends on some of its cells: {skipped}.")
    rng = np.random.default_rng(seed)
    rows = []
    for number, item in enumerate(tqdm(usable, desc="grounding", unit="item", disable=not progress, delay=2)):
        others = [o for o in usable if o.grid == item.grid and o.scene.key != item.scene.key]
        if not others:
            skipped["no other image of its grid"] = skipped.get("no other image of its grid", 0) + 1
            continue
        other = others[rng.integers(len(others))]
        heats, own, right = _heat_maps(model, item, other, image_layer, text_layer)
        heats |= {"(random)": torch.from_numpy(rng.random(item.grid)), "(centre)": centre_heat(*item.grid)}
        mask = mask_of(item)
        known = {
            "item": number,
            "scene": item.scene.key,
            "category": item.category,
            "domain": item.domain,
            "right": right,
            "share": mask.mean(),
        }
        for method in METHODS:
            rows.append({**known, "method": method, **figures(heats[method], mask)})
        rows.append({**known, "method": OWN_BOX, "pointing": np.nan, "ap": np.nan, "iou": box_iou(own, mask)})
    if not rows:
        raise ValueError(f"no item has a partner of its grid: {skipped}.")
    settings = {"image_layer": image_layer, "text_layer": text_layer, "seed": seed, "model": str(model.cfg.model_name)}
    return GroundingExperiment(pd.DataFrame(rows), skipped, settings)


def figures(heat: Float[Tensor, "rows cols"], mask: Bool[np.ndarray, "rows cols"]) -> dict[str, float]:
    """Pointing (share of hits among tied maxima), average precision, and IoU of the heaviest rectangle with the mask."""
    hottest = (heat == heat.max()).numpy()
    return {
        "pointing": float(mask[hottest].mean()),
        "ap": float(average_precision_score(mask.ravel(), heat.numpy().ravel())),
        "iou": box_iou(heaviest_rectangle(heat), mask),
    }


def box_iou(cells: Cells, mask: Bool[np.ndarray, "rows cols"]) -> float:
    """Intersection over union, in cells, of a rectangle with the mask."""
    box = np.zeros_like(mask)
    box[cells[0] : cells[2], cells[1] : cells[3]] = True
    return float((box & mask).sum() / (box | mask).sum())


def centre_heat(rows: int, cols: int) -> Float[Tensor, "rows cols"]:
    """Minus the squared distance from the centre, with both sides of the image scaled to length 1."""
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (rows, cols))
    return -((y[:, None] / rows - 0.5) ** 2 + (x[None] / cols - 0.5) ** 2)


def _usable(items: list[Any]) -> tuple[list[Any], dict[str, int]]:
    kept, skipped = [], {}
    for item in items:
        reason = "says that nothing is there" if item.answer in ("no", "0", ABSENT) else None
        if reason is None and not 0 < mask_of(item).mean() < 1:
            reason = "depends on no cell or on every cell"
        if reason is None:
            kept.append(item)
        else:
            skipped[reason] = skipped.get(reason, 0) + 1
    return kept, skipped


def mask_of(item: Any) -> Bool[np.ndarray, "rows cols"]:
    """The cells (image tokens) of all objects that the answer depends on."""
    return np.logical_or.reduce([thing.mask(*item.grid) for thing in item.depends_on] or [np.zeros(item.grid, dtype=bool)])


@torch.no_grad()
def _heat_maps(
    model: Model, item: Any, other: Any, image_layer: int | None, text_layer: int | None
) -> tuple[dict[str, Tensor], Cells, bool]:
    """(heat maps of the methods that use the model, the contextual lens's own box, whether the model gives the right answer)."""
    inputs, swapped = (model.to_inputs(item.question, images=[x.image], answers=item.answer) for x in (item, other))
    image, first = inputs.positions("image"), int(inputs.positions("answer")[0])
    with attention_patterns(model, lambda pattern: pattern[0, :, first - 1, image].cpu().double().mean(0)) as attention:
        stack = residual_stack(model, inputs)[0][:, 0].cpu()
    span = _span(model, inputs, item)
    ours = ground(model, inputs, 0, image_layer, text_layer, span, stack)
    shuffled = ground(model, swapped, 0, image_layer, text_layer, span)
    token = int(inputs.tokens[0, span[0]])
    probs = logit_readout(model, stack[:, image], targets=[token], return_type="probs").values[..., 0]
    places = span_positions(model, inputs, "answer", 0)
    said = logit_readout(model, stack[-1, [p - 1 for p in places]]).values.argmax(-1)
    right = bool((said.cpu() == inputs.tokens[0, places].cpu()).all())
    heats = {
        "contextual lens": ours.heat[0],
        "logit lens": probs.amax(0).cpu().double().reshape(item.grid),
        "attention": torch.stack(list(attention.values())).mean(0).reshape(item.grid),
        "(shuffled image)": shuffled.heat[0],
    }
    return heats, ours.cells[0], right


def _span(model: Model, inputs: Any, item: Any) -> list[int]:
    """Positions of the noun of an existence question, else of the answer."""
    if item.category != "existence":
        return span_positions(model, inputs, "answer", 0)
    noun = item.question.rstrip("?").split()[-1]
    return list(word_spans(model, inputs, [noun], segment="question").values())[-1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--n", type=int, default=1000, help="items of the split (default 1000)")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--image-layer", type=int)
    parser.add_argument("--text-layer", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/grounding"), help="folder for tables and plots")
    parser.add_argument("--report", type=Path, help="also write the table as Markdown to this file")
    parser.add_argument("--record", type=Path, help="also write the means, with the hash of the weights, as JSON to this file")
    options = parser.parse_args(arguments)
    from hooked_qwen2vl import HookedQwen2VL
    from hooked_qwen2vl.scenes import load_split

    model = HookedQwen2VL.from_pretrained(options.model)
    layers = options.image_layer, options.text_layer
    result = run_experiment(model, load_split(options.split, options.n), *layers, options.seed)
    write_csv(result.to_dataframe(), options.out / "summary.csv")
    write_csv(result.table, options.out / "items.csv")
    for name in FIGURES:
        result.plot(options.out / f"{name}.png", name)
    report = as_markdown(result, f"the first {options.n} items of the {options.split} split, weights {describe_model(model)['weights']}")
    for path, text in ((options.report, report), (options.record, as_json(result, model))):
        if path is not None:
            with whole_file(path) as file:
                file.write_text(text, encoding="utf-8")
    print(f"{report}\nwrote {options.out}")


def as_markdown(result: GroundingExperiment, measured_on: str) -> str:
    """The report in Markdown: what was measured, on which data, and a table with mean and 95 % interval of each figure."""
    summary = result.to_dataframe()
    shown = summary[["category", "items", "method"]].copy()
    for name in FIGURES:
        shown[name] = [
            "" if np.isnan(mean) else f"{mean:.3f} [–]" if np.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
            for mean, low, high in summary[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False)
        ]
    lines = [shown.columns, ["---"] * len(shown.columns), *shown.itertuples(index=False)]
    left_out = ", ".join(f"{n} {reason}" for reason, n in result.skipped.items()) or "none"
    once = result.table.drop_duplicates("item")
    return "\n".join(
        [
            "# Grounding on the embedded world: what came out",
            "",
            f"Written by `python -m analyses.experiments.grounding`; how it is measured: `analyses/experiments/grounding.py`. "
            f"Measured on {measured_on}; settings {result.settings}. {len(once)} items; left out: {left_out}. The model "
            f"answers {once['right'].mean():.1%} of them rightly; all are grounded with the right answer. What the answer "
            f"depends on covers {once['share'].mean():.1%} of the image on average. Mean and 95 % interval (bootstrap over "
            f"scenes); categories with few items have wide intervals.",
            "",
            *("| " + " | ".join(map(str, line)) + " |" for line in lines),
            "",
        ]
    )


def as_json(result: GroundingExperiment, model: Model) -> str:
    """The weights' hash, the number of items, and figure -> method -> [mean, low, high] over all categories (see `caveat`)."""
    summary = result.to_dataframe().query("category == 'all'").set_index("method")
    found = {name: summary[[name, f"{name}_low", f"{name}_high"]].dropna().round(4).T.to_dict("list") for name in FIGURES}
    return json.dumps({"weights": describe_model(model)["weights"], "items": int(summary["items"].max()), **found}, indent=1) + "\n"


def caveat(model: Model, record: Path = CHECKPOINT / "grounding.json") -> str:
    """How often the contextual lens points at the right place in this model, in a sentence with the recorded figures.

    Args:
        record: a file of `as_json`; the default belongs to the embedded model.
    Returns:
        "" if there is no record, or it is of other weights.
    """
    measured = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if not measured or measured["weights"] != describe_model(model)["weights"]:
        return ""

    def share(method: str) -> str:
        mean, low, high = (100 * value for value in measured["pointing"][method])
        return f"{mean:.0f} % [{low:.0f}–{high:.0f}]"

    lens, attention = (measured["pointing"][method] for method in ("contextual lens", "attention"))
    begin = "The contextual lens points less well than attention here: over" if lens[2] < attention[1] else "Over"
    return (
        f"{begin} {measured['items']} items of the embedded world the lens's hottest token (maximum over layers) lay on what the answer depends on "
        f"in {share('contextual lens')}, attention from the last position in {share('attention')}, the lens with another picture in "
        f"{share('(shuffled image)')}; the lens's own box overlapped it by {measured['iou'][OWN_BOX][0]:.2f} (IoU). [95 % intervals]"
    )


if __name__ == "__main__":
    main()
