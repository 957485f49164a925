"""Ablation over a data set: every head, attention or MLP, or sets of heads compared with random sets.

1. Effects (`Ablation`): for each question, the log-probability of the right answer and whether the model gives it, without
   ablation and with each part ablated (zero, mean or resample ablation with a reference of other questions, see
   `analyses.interventions.ablate`). Tables: mean change by part, overall and by category, with 95 % intervals that resample images.
2. A small set of heads that carries the answers (`find_heads`): start with all heads ablated; repeatedly restore the head that
   raises the mean log-probability most, until the share carried is large enough. The share carried by a set S is
       (log p with only S − log p with no head) / (log p with all heads − log p with no head), means over questions.
   The set is found on some questions and reported on held-out ones, with an interval and compared with random sets of the same
   size.

Sources: Wang et al. 2022 (faithfulness of a circuit); Conmy et al. 2023; mean ablation as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from analyses.common.result import Result
from analyses.common.statistics import cluster_codes, cluster_draws, mean_interval
from analyses.data.examples import Example, examples, image_key, in_batches
from analyses.experiments.experiment import Done, Experiment
from analyses.interventions import Interventions, ablate, hook_names
from analyses.runs.engine import opened
from hooked_qwen2vl.protocols import Model

KINDS = ("heads", "attentions", "mlps", "layers")
ALL = "(nothing)"  # name of the run without ablation
Head = tuple[int, int]


def every_part(model: Model, kind: str) -> dict[str, dict[str, list]]:
    """Name -> arguments of `ablate`, for every part of a kind: heads, attentions, mlps, or layers (attention and MLP together).

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if kind == "heads":
        return {f"L{l}H{h}": {"heads": [(l, h)]} for l in range(model.cfg.n_layers) for h in range(model.cfg.n_heads)}
    return {f"{kind[:-1]} {l}": {kind: [l]} for l in range(model.cfg.n_layers)}


def sets_of_heads(model: Model, heads: Sequence[Head], n_random: int = 20, seed: int = 0) -> dict[str, dict[str, list]]:
    """A set of heads, and `n_random` random sets of the same size, for `Ablation`.

    Raises:
        ValueError: no heads, a head that does not exist, or one given twice.
    """
    all_heads = [(l, h) for l in range(model.cfg.n_layers) for h in range(model.cfg.n_heads)]
    heads = [(int(layer), int(head)) for layer, head in heads]
    if not heads or len(set(heads)) != len(heads) or (wrong := set(heads) - set(all_heads)):
        raise ValueError(
            f"expected heads (layer, head) in 0..{model.cfg.n_layers - 1}, 0..{model.cfg.n_heads - 1}, each once, got "
            f"{sorted(wrong) if len(set(heads)) == len(heads) and heads else heads}."
        )
    random = Random(f"{seed} {sorted(heads)}")
    drawn = {f"random {n}": {"heads": sorted(random.sample(all_heads, len(heads)))} for n in range(n_random)}
    return {"set": {"heads": sorted(heads)}, **drawn}


@torch.no_grad()
def reference_of(model: Model, data: Any = "scenes:train", limit: int = 64, kind: str = "heads", seed: int = 0) -> dict[str, Tensor]:
    """A reference for mean and resample ablation: the activations of all parts of a kind at all tokens of some questions.

    Returns:
        hook name -> [1 token …], without padding.
    """
    parts = every_part(model, kind)
    names = sorted({name for part in parts.values() for name in hook_names(**part)})
    gathered: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in in_batches(map(opened, examples(data, limit, "train", seed)), 16):
        inputs = model.to_inputs([e.question for e in batch], images=[list(e.images) for e in batch], answers=[e.answer for e in batch])
        _, cache = model.run_with_cache(inputs, names_filter=names, stop_at_layer=model.cfg.n_layers)
        real = inputs.attention_mask.bool()
        for name in names:
            gathered[name].append(cache[name][real.to(cache[name].device)])
    return {name: torch.cat(chunks)[None] for name, chunks in gathered.items()}


@torch.no_grad()
def answer_log_probs(model: Model, inputs: Any, hooks: Interventions | None = None) -> tuple[Float[Tensor, "batch"], list[bool]]:
    """(log p of each row's answer in nats, summed over its tokens; whether every token of it is the model's top token)."""
    logits = model.run_with_hooks(inputs, fwd_hooks=hooks or [])
    totals, rights = [], []
    for row in range(len(inputs)):
        places = inputs.positions("answer", row).to(logits.device)
        said, wanted = logits[row, places - 1], inputs.tokens[row, places.to(inputs.device)].to(logits.device)
        totals.append(said.float().log_softmax(-1).gather(-1, wanted[:, None]).cpu().double().sum())
        rights.append(bool((said.argmax(-1) == wanted).all()))
    return torch.stack(totals), rights


# ---- effects ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AblationEffects(Result):
    """Effects of ablating parts.

    Attributes:
        table: one row per question and part: id, image, category, part, log_prob and right with the part ablated, base_log_prob and
            base_right without ablation.
        settings: of the experiment (parts, how, …). model_name: name of the model.
    """

    table: pd.DataFrame
    settings: Mapping[str, Any]
    model_name: str

    def to_dataframe(self, resamples: int = 1000, seed: int = 0, by_category: bool = True) -> pd.DataFrame:
        """One row per part and category (and "all"), largest loss first.

        Columns: mean change of log p in nats with its 95 % interval, accuracy with the part ablated and without ablation, and the
        change of accuracy with its interval.
        """
        table = self.table.assign(
            change=self.table["log_prob"] - self.table["base_log_prob"],
            accuracy_change=self.table["right"].astype(float) - self.table["base_right"].astype(float),
        )
        rows = []
        for part, of_part in table.groupby("part", sort=False):
            groups = [("all", of_part), *(of_part.groupby("category") if by_category else ())]
            for category, group in groups:
                row = {"part": part, "category": category, "items": len(group), "images": group["image"].nunique()}
                for name in ("change", "accuracy_change"):
                    keys = (name, f"{name}_low", f"{name}_high")
                    row |= dict(zip(keys, mean_interval(group[name], group["image"], seed, n_boot=resamples)))
                row |= {"accuracy": group["right"].mean(), "base_accuracy": group["base_right"].mean()}
                rows.append(row)
        result = pd.DataFrame(rows)
        order = result[result["category"] == "all"].set_index("part")["change"]
        return result.sort_values("part", key=lambda parts: parts.map(order), kind="stable").reset_index(drop=True)

    def plot(self, path: Any = None, most: int = 24) -> Any:
        """The parts with the largest loss, each with its interval."""
        from analyses.views.ablation import effects_plot

        return effects_plot(self, path, most)


class Ablation(Experiment):
    """The experiment: runs every question without ablation and with each part ablated.

    Args:
        parts: name -> arguments of `ablate` (`every_part`, `sets_of_heads`). how, reference: see `ablate` and `reference_of`.
    """

    name = "ablation"

    def __init__(self, model: Model, parts: Mapping[str, Mapping[str, Any]], how: str = "zero", reference: Any = None, seed: int = 0):
        self.hooks = {name: ablate(**part, how=cast(Any, how), reference=reference, seed=seed) for name, part in parts.items()}
        sums = {} if reference is None else {name: float(values.cpu().double().abs().sum()) for name, values in sorted(reference.items())}
        about = {
            name: {kind: [list(u) if isinstance(u, tuple) else u for u in units] for kind, units in part.items()}
            for name, part in parts.items()
        }
        super().__init__(model, {"parts": about, "how": how, "reference": sums, "seed": seed}, seed)

    def __call__(self, batch: Sequence[Example]) -> Iterable[Mapping[str, Any]]:
        if unanswered := [example.id for example in batch if not example.answer]:
            raise ValueError(f"these questions have no answer whose probability could be followed: {', '.join(unanswered[:5])}.")
        inputs = _inputs(self.model, batch)
        base, right = answer_log_probs(self.model, inputs)
        found = {name: answer_log_probs(self.model, inputs, hooks) for name, hooks in self.hooks.items()}
        for row, example in enumerate(batch):
            about = {"id": example.id, "image": image_key(example), "category": example.category or "all questions"}
            unchanged = {"base_log_prob": float(base[row]), "base_right": right[row]}
            for name, (values, rights) in found.items():
                yield {**about, "part": name, "log_prob": float(values[row]), "right": rights[row], **unchanged}

    @staticmethod
    def result(done: Done) -> AblationEffects:
        """The effects; ValueError if no question has a result."""
        if not len(done.rows):
            raise ValueError("no question has a result.")
        return AblationEffects(done.rows, done.settings, done.model_name)


def _inputs(model: Model, batch: Sequence[Example]) -> Any:
    answers = [example.answer for example in batch]
    return model.encode(model.to_inputs([e.question for e in batch], images=[list(e.images) for e in batch], answers=answers))


# ---- the smallest set ---------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadSet(Result):
    """A small set of heads that carries the answers.

    Attributes:
        heads: (layer, head), in the order in which they were restored.
        search: one row per size: the head added, and the share carried on the questions of the search.
        held_out: one row per set ("found", "random 0", …): share carried on held-out questions, with its 95 % interval over images.
        n_search, n_held_out: numbers of questions. settings: share, how, candidates, seed. model_name: name of the model.
    """

    heads: tuple[Head, ...]
    search: pd.DataFrame
    held_out: pd.DataFrame
    n_search: int
    n_held_out: int
    settings: Mapping[str, Any]
    model_name: str

    def to_dataframe(self) -> pd.DataFrame:
        """The table `held_out`."""
        return self.held_out

    def summary(self) -> dict[str, float]:
        """Number of heads, share carried on held-out questions with its interval, mean and largest share of the random sets."""
        found, random = self.held_out.iloc[0], self.held_out.iloc[1:]["share"]
        return {
            "heads": len(self.heads),
            **{name: float(found[name]) for name in ("share", "share_low", "share_high")},
            "random_mean": float(random.mean()),
            "random_largest": float(random.max()),
        }

    def plot(self, path: Any = None) -> Any:
        """The share carried, by size in the search, and on held-out questions next to the random sets."""
        from analyses.views.ablation import search_plot

        return search_plot(self, path)


@torch.no_grad()
def find_heads(
    model: Model,
    search: Iterable[Example],
    held_out: Iterable[Example],
    share: float = 0.8,
    how: str = "mean",
    reference: Any = None,
    most: int | None = None,
    candidates: int = 16,
    n_random: int = 20,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> HeadSet:
    """Greedy search for a small set of heads that carries the answers, checked on held-out questions.

    Args:
        search, held_out: questions with answers, about different images.
        share: the search ends when the set carries at least this share.
        how, reference: how the other heads are ablated, see `ablate`; by default their mean over `reference_of(model)`.
        most: largest number of heads; None: no limit.
        candidates: number of heads tried at each step: those that were best at the step before (the first step tries all heads).
        n_random: number of random sets of the same size.
    Raises:
        ValueError: no questions, an image in both parts, a share outside 0..1, or heads that do not raise the log-probability.
    """
    search, held_out = list(map(opened, search)), list(map(opened, held_out))
    if not search or not held_out or not 0 < share <= 1:
        raise ValueError(f"expected questions to search and to hold out and a share in 0..1, got {len(search)}, {len(held_out)}, {share}.")
    if both := set(map(image_key, search)) & set(map(image_key, held_out)):
        raise ValueError(f"{len(both)} images are both in the search and held out: a set must be checked on others.")
    reference = reference_of(model) if how != "zero" and reference is None else reference
    every = [head for part in every_part(model, "heads").values() for head in part["heads"]]

    def kept(batches: Sequence[Any], heads: Sequence[Head]) -> np.ndarray:
        gone = [head for head in every if head not in heads]
        hooks = ablate(heads=gone, how=cast(Any, how), reference=reference, seed=seed) if gone else None
        return np.concatenate([answer_log_probs(model, batch, hooks)[0].numpy() for batch in batches])

    batches = [_inputs(model, batch) for batch in in_batches(search, batch_size)]
    none, whole = kept(batches, []).mean(), kept(batches, every).mean()
    if whole - none < 1e-3:
        raise ValueError(f"with all heads log p is {whole:.3f}, with none {none:.3f}: there is nothing that they carry.")
    found, rows, ranked, carried = [], [], every, 0.0
    bar = tqdm(total=most or len(every), desc="searching heads", unit="head", disable=not progress, delay=2)
    while carried < share and len(found) < (most or len(every)):
        shares = {head: float((kept(batches, [*found, head]).mean() - none) / (whole - none)) for head in ranked}
        best = max(shares, key=shares.__getitem__)
        found, carried = [*found, best], shares[best]
        rows.append({"size": len(found), "layer": best[0], "head": best[1], "share": carried})
        order = sorted(shares, key=shares.__getitem__, reverse=True)
        tried = set(shares)
        ranked = [head for head in [*order, *(h for h in every if h not in tried)] if head not in found][:candidates]
        bar.update()
    bar.close()
    batches = [_inputs(model, batch) for batch in in_batches(held_out, batch_size)]
    random, images = Random(seed), [image_key(example) for example in held_out]
    sets = {"found": found, **{f"random {n}": random.sample(every, len(found)) for n in range(n_random)}}
    none, whole = kept(batches, []), kept(batches, every)
    table = [
        {"set": name, "heads": _named(heads), **_share(kept(batches, heads) - none, whole - none, images, seed)}
        for name, heads in sets.items()
    ]
    settings = {"share": share, "how": how, "candidates": candidates, "seed": seed}
    return HeadSet(
        tuple(found), pd.DataFrame(rows), pd.DataFrame(table), len(search), len(held_out), settings, str(model.cfg.model_name)
    )  # fmt: skip


def _named(heads: Sequence[Head]) -> str:
    return " ".join(f"L{layer}H{head}" for layer, head in sorted(heads))


def _share(part: np.ndarray, whole: np.ndarray, images: Sequence[str], seed: int, n_boot: int = 2000) -> dict[str, float]:
    """Ratio of the sums of `part` and `whole`, and its percentile interval over resampled images (the same resample in both sums)."""
    codes = cluster_codes(images, len(part))
    sums = np.zeros((codes.max() + 1, 2))
    np.add.at(sums, codes, np.stack((part, whole), -1))
    drawn = np.concatenate([draw @ sums for draw in cluster_draws(len(sums), n_boot, np.random.default_rng(seed))])
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5]) if len(sums) > 1 else (np.nan, np.nan)
    return {"share": float(part.sum() / whole.sum()), "share_low": float(low), "share_high": float(high)}
