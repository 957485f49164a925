"""At which positions is the information about the answer, and how does it move? Patching sweeps of counterfactual pairs.

One sweep per pair. The prediction, fixed before measuring: the position with the highest recovery, averaged over layers 0…L/4,
is an image token of the changed object.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from analyses.common.result import Result
from analyses.common.statistics import cluster_codes, n_different, share_interval, standard_error
from analyses.counterfactuals import Pair, changed_positions
from analyses.patching import patch_sweep
from hooked_qwen2vl.image_hash import image_hash
from hooked_qwen2vl.protocols import Model

SPANS = ("changed object", "rest of the image", "question", "template after it", "last")


@dataclass(frozen=True)
class LocalityStudy(Result):
    """Patching sweeps of many counterfactual pairs.

    Attributes:
        hits: [pair] whether the best position is on the changed object. chance: [pair] share of the prompt's positions that are;
            image_chance: the same among image tokens only.
        spans: [pair layer span] recovery when a whole span of SPANS is patched.
        categories: [pair] category of the question.
        early: number of layers over which recovery is averaged for the best position.
        skipped: number of pairs whose change covers the whole image (the background), where every image token would be a hit.
        images: [pair] hash of the clean image; () if each pair has its own.
        model_name: name of the model.
    """

    hits: tuple[bool, ...]
    chance: tuple[float, ...]
    image_chance: tuple[float, ...]
    spans: Float[Tensor, "pair layer span"]
    categories: tuple[str, ...]
    early: int
    skipped: int
    model_name: str
    images: tuple[str, ...] = ()

    def summary(self) -> dict[str, float]:
        """Share of hits with its 95 % interval (resamples clean images with all their pairs), and the shares expected by chance."""
        share, low, high = share_interval(np.array(self.hits), self.images or None)
        n_images = n_different(cluster_codes(self.images or None, len(self.hits)))
        return {"pairs": len(self.hits), "images": n_images, "hits": sum(self.hits), "share": share, "low": low, "high": high,
                "chance": float(np.mean(self.chance)), "chance_in_image": float(np.mean(self.image_chance))}  # fmt: skip

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer and span: mean recovery, and its standard error clustered by clean image."""
        n, mean = len(self.spans), self.spans.mean(0)
        return pd.DataFrame(
            {"layer": layer, "span": span, "recovery": float(mean[layer, i]),
             "standard_error": standard_error(self.spans[:, layer, i].numpy(), self.images or None), "pairs": n}
            for layer in range(self.spans.shape[1])
            for i, span in enumerate(SPANS)
        )  # fmt: skip

    def plot(self, path: Any = None) -> Any:
        """Recovery by layer, one line per span."""
        from analyses.views.experiments import locality_plot

        return locality_plot(self, path)


def locality_study(model: Model, pairs: Iterable[Pair], batch_size: int = 32, progress: bool = True) -> LocalityStudy:
    """Sweeps `resid_pre` for every pair: each position over the early layers, each span over all layers.

    Raises:
        ValueError: no pair to patch.
    """
    early = model.cfg.n_layers // 4 + 1  # layers 0…L/4
    hits, chance, image_chance, spans, categories, images, skipped = [], [], [], [], [], [], 0
    for pair in tqdm(pairs, desc="locality", unit="pair", disable=not progress, delay=2):
        rows = _spans(pair)
        if not rows[SPANS[1]]:
            skipped += 1
            continue
        prompts, gap = (model, pair.clean, pair.corrupted, pair.metric), pair.clean_difference - pair.corrupted_difference
        options = {"batch_size": batch_size, "progress": False}
        sweep = patch_sweep(*prompts, layers=range(early), **options)
        best = int(sweep.values[..., 0].mean(0).argmax())
        hits.append(best in pair.on_boxes.tolist())
        chance.append(len(pair.on_boxes) / pair.clean.shape[1])
        image_chance.append(len(pair.on_boxes) / len(pair.clean.positions("image")))
        sweep = patch_sweep(*prompts, positions=rows, **options)
        spans.append((sweep.values[..., 0] - pair.corrupted_difference) / gap)
        categories.append(pair.source.category)
        images.append(image_hash(pair.source.clean))
    if not hits:
        raise ValueError("there is no pair to patch: check_pairs kept none, or each changes the whole image.")
    return LocalityStudy(
        tuple(hits), tuple(chance), tuple(image_chance), torch.stack(spans), tuple(categories), early,
        skipped, str(model.cfg.model_name), tuple(images),
    )  # fmt: skip


def _spans(pair: Pair) -> dict[str, list[int]]:
    """Span of SPANS -> its positions."""
    inputs, own = pair.clean, sorted(set(pair.on_boxes.tolist()) | set(changed_positions(pair.clean, pair.corrupted).tolist()))
    question = inputs.positions("question").tolist()
    last = inputs.shape[1] - 1
    rest = [place for place in inputs.positions("image").tolist() if place not in own]
    template = [place for place in inputs.positions("template").tolist() if question[-1] < place < last]
    return dict(zip(SPANS, (own, rest, question, template, [last])))
