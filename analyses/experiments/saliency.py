"""Which saliency map finds what an answer depends on? Insertion, deletion and pointing over a data set.

1. Take questions about one image that the model answers right. On the embedded world the cells that the answer depends on are
   known: pointing and average precision (see `grounding`) are over its items that depend on some cells, but not all.
2. For each method of `analyses.saliency`: the map of the whole answer, and the areas under its insertion and deletion curves
   (probability of the answer), by keys and by pixels. Deletion: smaller is better; insertion: larger is better.
3. Means with 95 % intervals that resample images, and for each method the difference to the random order on the same items.

Deletion by keys uses the same intervention as the knockout, so compare knockout maps by pixels too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.common.result import Result
from analyses.common.statistics import mean_interval
from analyses.data.examples import Example, image_key
from analyses.experiments.experiment import Done, Experiment
from analyses.experiments.grounding import figures, mask_of
from analyses.saliency import METHODS, curves, saliency
from hooked_qwen2vl.protocols import Model

FIGURES = {
    "deletion_keys": "deletion by keys (small)",
    "insertion_keys": "insertion by keys (large)",
    "deletion_pixels": "deletion by pixels (small)",
    "insertion_pixels": "insertion by pixels (large)",
    "pointing": "pointing game (large)",
    "ap": "average precision (large)",
}


@dataclass(frozen=True)
class SaliencyExperiment(Result):
    """How well each method's maps find what answers depend on.

    Attributes:
        table: one row per item and method: id, image, category, method, and FIGURES (pointing and ap are NaN if the truth is unknown).
        skipped: reason -> number of items left out.
        settings: methods, steps, cells, seed. model_name: name of the model.
    """

    table: pd.DataFrame
    skipped: Mapping[str, int]
    settings: Mapping[str, Any]
    model_name: str

    def to_dataframe(self, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row per method: items, images, each figure's mean and 95 % interval, and its mean difference to the random order."""
        rows = []
        random = self.table[self.table["method"] == "random"].set_index("id")
        for method in dict.fromkeys(self.table["method"]):
            part = self.table[self.table["method"] == method]
            row: dict[str, Any] = {"method": method, "items": len(part), "images": part["image"].nunique()}
            for name in FIGURES:
                known = part.dropna(subset=[name])
                row[f"{name}_items"] = len(known)
                row[name], row[f"{name}_low"], row[f"{name}_high"] = mean_interval(known[name], known["image"], seed, n_boot=resamples)
                if len(random):
                    change = known[name].to_numpy() - random.loc[known["id"], name].to_numpy()
                    columns = [f"{name}_minus_random{end}" for end in ("", "_low", "_high")]
                    row |= dict(zip(columns, mean_interval(change, known["image"], seed, n_boot=resamples)))
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, path: Any = None) -> Any:
        """One panel per figure: each method's mean with its interval."""
        from analyses.views.saliency import areas_plot

        table = self.to_dataframe()
        known = {name: title for name, title in FIGURES.items() if table[name].notna().any()}
        return areas_plot(table, known, self.model_name, path)


class SaliencyRun(Experiment):
    """The experiment: the figures of every method for every question.

    Args:
        methods: of `analyses.saliency.METHODS`. steps: of the curves and of the integral. cells: `batch_size` of `saliency`.
    """

    name = "saliency"
    gradients = True

    def __init__(self, model: Model, methods: Sequence[str] = METHODS, steps: int = 10, cells: int = 16, seed: int = 0):
        super().__init__(model, {"methods": list(methods), "steps": steps, "cells": cells, "seed": seed}, seed)

    def __call__(self, batch: Sequence[Example]) -> Iterable[Mapping[str, Any]]:
        for example in batch:
            if reason := self._unusable(example):
                yield {"id": example.id, "skipped": reason}
                continue
            inputs = self.model.encode(self.model.to_inputs(example.question, images=list(example.images), answers=example.answer))
            if not self._right(inputs):
                yield {"id": example.id, "skipped": "is answered wrongly"}
                continue
            mask = mask_of(example.item) if example.item is not None else None
            known = mask is not None and example.answer not in ("no", "0") and 0 < mask.mean() < 1
            about = {"id": example.id, "image": image_key(example), "category": example.category}
            for method in self.settings["methods"]:
                found = saliency(
                    self.model,
                    inputs,
                    method,
                    batch_size=self.settings["cells"],
                    steps=self.settings["steps"],
                    seed=self.seed,
                    progress=False,
                )
                row = {**about, "method": method, **self._areas(inputs, found.whole)}
                shares = figures(found.maps()[0], cast(Any, mask)) if known else {}
                yield {**row, "pointing": shares.get("pointing", nan), "ap": shares.get("ap", nan), "skipped": ""}

    def _unusable(self, example: Example) -> str:
        if not example.answer:
            return "has no answer"
        return "" if len(example.images) == 1 else f"has {len(example.images)} images, not one"

    @torch.no_grad()
    def _right(self, inputs: Any) -> bool:
        places = inputs.positions("answer")
        said = self.model(inputs)[0, places - 1].argmax(-1)
        return bool((said == inputs.tokens[0, places]).all())

    def _areas(self, inputs: Any, values: Float[Tensor, "image_token"]) -> dict[str, float]:
        areas = {}
        for by in ("keys", "pixels"):
            found = curves(self.model, inputs, values, by, steps=self.settings["steps"], batch_size=self.settings["cells"])
            areas |= dict(zip((f"deletion_{by}", f"insertion_{by}"), found.areas))
        return areas

    @staticmethod
    def result(done: Done) -> SaliencyExperiment:
        """The figures; ValueError if no question could be used."""
        rows = done.rows
        skipped = {} if "skipped" not in rows else rows[rows["skipped"].fillna("") != ""]["skipped"].value_counts().to_dict()
        if "method" not in rows or not len(table := rows.dropna(subset=["method"])):
            raise ValueError(f"no question could be used: {skipped or 'there are none'}.")
        table = table.drop(columns="skipped").reset_index(drop=True)
        table[list(FIGURES)] = table[list(FIGURES)].astype(float)
        return SaliencyExperiment(table, skipped, done.settings, done.model_name)
