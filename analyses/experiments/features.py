"""Do a dictionary's features represent what is in the image? Measured on the embedded world, whose scenes are known.

    python -m analyses.experiments.features --layer 4 --out out/features

1. Train a TopK autoencoder on the residual stream of image tokens that enters a block, over scenes of the training split.
2. Evaluate on scenes of the test split: for every colour, kind, size, row and column, the AUROC of a unit's mean activation over
   an object's image tokens, for objects that have the attribute against those that do not. The best unit is chosen on one half
   of the images and its AUROC reported on the other half, with an interval that resamples images. (Among a thousand units the
   best looks good by chance on the half it was chosen on.)
3. For comparison: the best neuron of the block's MLP and the best dimension of the residual stream, chosen in the same way, and
   a linear probe of the residual stream, fitted on the first half.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm.auto import tqdm

from analyses.common.result import Result
from analyses.common.statistics import detection
from analyses.common.tables import write_csv
from analyses.data.examples import Example, examples, image_key, in_batches
from analyses.dictionaries import Dictionary, save_dictionary, train_dictionary
from analyses.probes import TRUTHS, things
from hooked_qwen2vl.protocols import Model

UNITS = ("feature", "neuron", "dimension", "probe")
FEWEST = 8  # a label needs this many objects with it, and without it, in each half


@dataclass(frozen=True)
class FeatureJudgement(Result):
    """AUROCs with which single units predict the attributes of objects.

    Attributes:
        table: one row per truth, label and unit (one of UNITS): which unit (−1: the probe), AUROC on the held-out half with its 95 %
            interval, objects with the label and images there, and AUROC on the half that the unit was chosen on.
        hook: the dictionary's hook point. n_features: its number of features. model_name: name of the model.
    """

    table: pd.DataFrame
    hook: str
    n_features: int
    model_name: str

    def to_dataframe(self) -> pd.DataFrame:
        """The whole table."""
        return self.table

    def summary(self) -> pd.DataFrame:
        """One row per truth: for each kind of unit the mean held-out AUROC over labels, and the number of labels."""
        means = self.table.pivot_table(index="truth", columns="unit", values="auroc", sort=False)[list(UNITS)]
        return means.assign(labels=self.table.groupby("truth")["label"].nunique()).reset_index()

    def plot(self, path: Any = None) -> Any:
        """The AUROC of every label, by kind of unit."""
        from analyses.views.features import judgement_plot

        return judgement_plot(self, path)


def image_activations(model: Model, data: Iterable[Example], hook: str, batch_size: int = 16) -> Float[Tensor, "row d"]:
    """Activations at all image tokens; questions about an image that was used already are skipped."""
    rows, seen = [], set()
    with torch.no_grad():
        for batch in in_batches(data, batch_size):
            batch = [e for e in batch if not (image_key(e) in seen or seen.add(image_key(e)))]
            if batch:
                inputs = model.to_inputs([e.question for e in batch], images=[list(e.images) for e in batch])
                _, cache = model.run_with_cache(inputs, names_filter=hook, stop_at_layer=model.cfg.n_layers)
                rows.append(cache[hook][(inputs.token_types > 0).to(cache[hook].device)].float().cpu())
    return torch.cat(rows)


def shuffled_batches(rows: Float[Tensor, "row d"], size: int, n: int, seed: int = 0) -> Iterator[Float[Tensor, "size d"]]:
    """n batches of rows in random order; each pass over the rows has a new order and drops an incomplete last batch."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(n):
        if len(order) < size:
            order = torch.randperm(len(rows), generator=generator)
        yield rows[order[:size]]
        order = order[size:]


@torch.no_grad()
def judge_features(
    model: Model, dictionary: Dictionary, data: Iterable[Example], layer: int, seed: int = 0, progress: bool = True
) -> FeatureJudgement:
    """AUROC of the best feature, neuron and dimension, and of a probe, for every attribute of objects of the embedded world.

    Args:
        layer: block whose MLP neurons are compared.
    Raises:
        ValueError: no label has enough objects.
    """
    names = [dictionary.hook, f"blocks.{layer}.mlp.hook_post"]
    values: dict[str, list[Tensor]] = {unit: [] for unit in UNITS[:3]}
    labels: list[dict[str, str]] = []
    images: list[str] = []
    of_truth = {truth: things(truth) for truth in TRUTHS}
    seen: set[str] = set()
    for example in tqdm(data, desc="objects", unit="image", disable=not progress, delay=2):
        if (image := image_key(example)) in seen:
            continue
        seen.add(image)
        inputs = model.to_inputs(example.question, images=list(example.images))
        _, cache = model.run_with_cache(inputs, names_filter=names, stop_at_layer=model.cfg.n_layers)
        told = {truth: [label for _, label in targets(example)] for truth, targets in of_truth.items()}
        for number, (place, _) in enumerate(of_truth["color"](example)):
            x = cache[dictionary.hook][0, inputs.resolve(place)].float()
            values["feature"].append(dictionary.encode(x).mean(0).cpu())
            values["dimension"].append(x.mean(0).cpu())
            values["neuron"].append(cache[names[1]][0, inputs.resolve(place)].float().mean(0).cpu())
            labels.append({truth: told[truth][number] for truth in TRUTHS})
            images.append(image)
    stacked = {unit: torch.stack(rows).double().numpy() for unit, rows in values.items()}
    order = np.random.default_rng(seed).permutation(sorted(set(images)))
    first = np.isin(images, order[: len(order) // 2])
    rows = []
    for truth in TRUTHS:
        found = np.array([label[truth] for label in labels])
        for label in sorted(set(found)):
            positive = found == label
            if min(positive[first].sum(), positive[~first].sum(), (~positive)[first].sum(), (~positive)[~first].sum()) >= FEWEST:
                rows += [{"truth": truth, "label": label, **row} for row in _judged(stacked, positive, first, images)]
    if not rows:
        raise ValueError(f"no label has {FEWEST} objects with and without it in each half of {len(set(images))} images: take more.")
    return FeatureJudgement(pd.DataFrame(rows), dictionary.hook, dictionary.n_features, str(model.cfg.model_name))


def aurocs(values: Float[np.ndarray, "item unit"], positive: Bool[np.ndarray, "item"]) -> Float[np.ndarray, "unit"]:
    """AUROC of every unit (ties count half)."""
    ranks, n = rankdata(values, axis=0), positive.sum()
    return (ranks[positive].sum(0) - n * (n + 1) / 2) / (n * (len(positive) - n))


def _judged(values: dict[str, np.ndarray], positive: np.ndarray, first: np.ndarray, images: list[str]) -> Iterator[dict[str, Any]]:
    held_out = [image for image, own in zip(images, first) if not own]
    for unit in UNITS:
        if unit == "probe":
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(
                values["dimension"][first], positive[first]
            )
            score, chosen = probe.decision_function(values["dimension"]), -1
            chosen_auroc = float(aurocs(score[first][:, None], positive[first])[0])
        else:
            found = aurocs(values[unit][first], positive[first])
            chosen = int(found.argmax())
            score, chosen_auroc = values[unit][:, chosen], float(found[chosen])
        told = detection(positive[~first], score[~first], n_boot=500, clusters=held_out)
        yield {
            "unit": unit, "which": chosen, "auroc": told["auroc"], "auroc_low": told["auroc_low"], "auroc_high": told["auroc_high"],
            "chosen_auroc": chosen_auroc, "objects": int(positive[~first].sum()), "images": len(set(held_out)),
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--layer", type=int, default=4, help="the block whose input is encoded (default 4)")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--n", type=int, default=1500, help="questions to train on (default 1500)")
    parser.add_argument("--test", type=int, default=500, help="questions to judge on (default 500)")
    parser.add_argument("--batches", type=int, default=3000, help="of 1,024 image tokens (default 3000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/features"))
    options = parser.parse_args(arguments)
    from hooked_qwen2vl import HookedQwen2VL

    model, hook = HookedQwen2VL.from_pretrained(options.model), f"blocks.{options.layer}.hook_resid_pre"
    rows = image_activations(model, examples("scenes:train", options.n, "train"), hook)
    batches = shuffled_batches(rows, 1024, options.batches, options.seed)
    dictionary, log = train_dictionary(batches, hook, options.features, options.k, seed=options.seed)
    save_dictionary(dictionary, options.out / "dictionary")
    result = judge_features(model, dictionary, examples("scenes", options.test), options.layer)
    write_csv(log, options.out / "training.csv")
    write_csv(result.to_dataframe(), options.out / "features.csv")
    result.plot(options.out / "features.png")
    print(
        f"{len(rows)} image tokens; share of variance not explained at the end: {log['unexplained'].tail(50).mean():.3f}; dead: {log['dead'].iloc[-1]}"
    )
    print(result.summary().round(3).to_string(index=False))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
