"""The questions of this package asked of a whole data set: where do answers flip, which positions and flows carry them?

1. `flip_study`: trajectories of every prompt; every eligible flip (METHODS 2) is attributed and tested by ablation
   beside random components.
2. `locality_study`: a patching sweep for each counterfactual pair. Fixed beforehand: the position with the highest
   recovery averaged over layers 0…L/4 should lie on the changed object's patches.
3. `knockout_study`: attention knockout of the flows image → last, image → question, and the object's patches beside as
   many other patches, over windows of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import binomtest
from torch import Tensor
from tqdm.auto import tqdm

from analyses.common.result import Result
from analyses.counterfactuals import Pair, changed_positions
from analyses.data.examples import Example
from analyses.flip_patching import FlipTest, ablate_flip, attribute_flip
from analyses.knockout import Knockout, attention_knockout
from analyses.patching import patch_sweep
from analyses.runs.engine import read_failures, read_results
from analyses.runs.files import read_manifest
from analyses.trajectory import answer_trajectory, doubt_beside_control, outcomes_by_category
from hooked_qwen2vl.image_embeddings import Prefixes

FLIP = "flip_"  # columns that hold a list, one value a flip
FLIP_FIGURES = (
    "entry", "lost", "gained", "change", "attribution_error", "components", "entry_difference", "entry_difference_ablated",
    "entry_difference_random", "final_difference", "final_difference_ablated", "final_difference_random",
    "removed", "removed_by_random", "reversed", "reversed_by_random",
)  # fmt: skip
SPANS = ("changed object", "rest of the image", "question", "template after it", "last")


@dataclass(frozen=True)
class FlipStudy(Result):
    """Trajectories of a data set, and a test of every eligible flip, as tables: what a run keeps is enough to make it.

    Attributes:
        prompts: one row a prompt: id, L (the number of layers), and the figures of `Trajectory.summary`.
        flips: one row a flip: its prompt (a row of `prompts`) and what belongs to that, the figures of
            `FlipTest.summary`, and `entry_difference_random`, `final_difference_random`, means over the random draws.
        skipped: questions without candidates, or whose answer has no first token of its own among them.
    """

    prompts: pd.DataFrame
    flips: pd.DataFrame
    skipped: int

    @classmethod
    def from_rows(cls, rows: pd.DataFrame, skipped: int = 0) -> FlipStudy:
        """The study of what `flip_row` gave for each question.

        Raises:
            ValueError: no question was followed.
        """
        if not len(rows):
            raise ValueError("no question could be followed: each needs candidates, and an answer that differs from them.")
        nested = [name for name in rows if name.startswith(FLIP)]
        flips = rows.loc[rows[nested[0]].map(len) > 0, ["id", "question", "category", "right", "L", *nested]]
        flips = flips.rename(columns=lambda name: name.removeprefix(FLIP)).rename_axis("prompt")
        flips = flips.explode([name.removeprefix(FLIP) for name in nested]).infer_objects().reset_index()
        return cls(rows.drop(columns=nested), flips, skipped)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a flip."""
        return self.flips

    def by_category(self) -> pd.DataFrame:
        """Share of each outcome, doubt beside its control, and mean depths, by category of question."""
        return outcomes_by_category(self.prompts)

    def doubt(self) -> pd.Series:
        """How often the answer was held then lost, beside a control candidate, over all questions; see `doubt_beside_control`."""
        return doubt_beside_control(self.prompts)

    def summary(self) -> pd.DataFrame:
        """Flips removed (at their entry) and reversed (at the output) by ablating the found components and by random
        ones: share, 95 % interval (found: Wilson; random: over flips, normal), flips and prompts counted.

        That the lens at the flip's own entry changes is close to what the attribution says; that the output changes
        is the causal test.
        """
        rows = []
        for what in ("removed", "reversed"):
            found, control = (self.flips[name].to_numpy(dtype=float) for name in (what, f"{what}_by_random"))
            for name, share, interval in (
                ("found components", found, wilson(int(found.sum()), len(found))),
                ("random components", control, _normal(control)),
            ):
                rows.append((what, name, share.mean() if len(share) else np.nan, *interval, len(found), self.flips["prompt"].nunique()))
        return pd.DataFrame(rows, columns=["flip is", "by ablating", "share", "low", "high", "flips", "prompts"])

    def last_shift(self) -> pd.DataFrame:
        """The last layer's shift over prompts (rows: its figures), as it is and as the double norm would show it."""
        table = self.prompts
        names = [name.removeprefix("double_norm_") for name in table.columns if name.startswith("double_norm_")]
        return pd.DataFrame(
            {
                f"{average}, {label}": [getattr(table[f"{prefix}_{name}"], average)() for name in names]
                for average in ("median", "mean")
                for prefix, label in (("last", "as it is"), ("double_norm", "normed twice"))
            },
            index=names,
        )

    def plot(self, path: Any = None) -> Any:
        """Effect of the ablations, flip by flip, and where flips happen."""
        from analyses.views.experiments import flip_study_plot

        return flip_study_plot(self.flips, path)

    def plot_trajectories(self, path: Any = None) -> Any:
        """Outcomes, and depths of birth and stability, by category."""
        from analyses.views.trajectories import trajectories_plot

        return trajectories_plot(self.prompts, self.by_category(), path)


def flip_study(
    model: Any, examples: Iterable[Example], n_components: int = 2, n_random: int = 10, seed: int = 0, progress: bool = True
) -> FlipStudy:
    """Follows every answer that has candidates; attributes and tests every eligible flip.

    Raises:
        ValueError: no question could be followed.
    """
    prefixes = Prefixes(model)
    stream = tqdm(examples, desc="flips", unit="prompt", disable=not progress, delay=2)
    rows = [flip_row(model, example, n_components, n_random, seed, prefixes) for example in stream]
    followed = [row for row in rows if row is not None]
    return FlipStudy.from_rows(pd.DataFrame(followed), len(rows) - len(followed))


def flip_work(model: Any, n_components: int = 2, n_random: int = 10, seed: int = 0) -> Callable[[list[Example]], Iterator[dict]]:
    """The same as the work of a run over a data set (`runs.run`): a row a question that can be followed."""
    prefixes = Prefixes(model)

    def work(batch: list[Example]) -> Iterator[dict]:
        rows = (flip_row(model, example, n_components, n_random, seed, prefixes) for example in batch)
        return (row for row in rows if row is not None)

    return work


def read_flip_study(out: str | Path) -> FlipStudy:
    """The study that a run with `flip_work` has written.

    Raises:
        ValueError: no run there, one that is not finished, or no question could be followed.
    """
    rows = read_results(out)
    skipped = read_manifest(out)["data"]["questions"] - len(rows) - len(read_failures(out))
    return FlipStudy.from_rows(rows.drop(columns="item"), skipped)


@torch.no_grad()
def flip_row(
    model: Any, example: Example, n_components: int, n_random: int, seed: int, encode: Callable[[Any], Any]
) -> dict[str, Any] | None:
    """One question's figures, and those of its eligible flips as lists in columns that begin with "flip_".

    Args:
        encode: `model.encode`, or a store of prefixes that does the same.
    Returns:
        None without candidates, or where the answer has no first token of its own among them.
    """
    if not example.candidates:
        return None
    inputs = encode(model.to_inputs(example.question, images=list(example.images)))
    try:
        item = answer_trajectory(
            model, inputs, example.answer, example.candidates, category=example.category, question=example.question
        )
    except ValueError:  # no first token of its own
        return None
    tests = []
    for entry in item.eligible_flips:
        flip = attribute_flip(model, inputs, entry, int(item.top1[entry]), int(item.top1[entry - 1]))
        tests.append(_test_row(ablate_flip(model, inputs, flip, n_components, n_random, seed)))
    nested = {f"{FLIP}{name}": [test[name] for test in tests] for name in FLIP_FIGURES}
    return {"id": example.id, "L": item.n_layers, **item.summary(), **nested}


def _test_row(test: FlipTest) -> dict[str, Any]:
    entry, final = test.random.mean(0).tolist()
    return {**test.summary(), "entry_difference_random": entry, "final_difference_random": final}


@dataclass(frozen=True)
class LocalityStudy(Result):
    """Patching sweeps of many counterfactual pairs.

    Attributes:
        hits: [pair] whether the best position lies on the changed object. chance: [pair] share of the prompt's
            positions that do; image_chance: the same among the image's tokens only.
        spans: [pair layer span] recovery of the named SPANS, patched whole.
        early: how many layers the best position is averaged over.
        skipped: pairs whose change covers the whole image (its background), where no place could be missed.
        model_name.
    """

    hits: tuple[bool, ...]
    chance: tuple[float, ...]
    image_chance: tuple[float, ...]
    spans: Float[Tensor, "pair layer span"]
    categories: tuple[str, ...]
    early: int
    skipped: int
    model_name: str

    def summary(self) -> dict[str, float]:
        """Share of hits with its 95 % Wilson interval, and chance beside it."""
        low, high = wilson(sum(self.hits), len(self.hits))
        return {"pairs": len(self.hits), "hits": sum(self.hits), "share": float(np.mean(self.hits)), "low": low, "high": high,
                "chance": float(np.mean(self.chance)), "chance_in_image": float(np.mean(self.image_chance))}  # fmt: skip

    def to_dataframe(self) -> pd.DataFrame:
        """Mean recovery by layer and span, with its standard error over pairs."""
        n = len(self.spans)
        mean, error = self.spans.mean(0), self.spans.std(0) / max(1, n) ** 0.5
        return pd.DataFrame(
            {"layer": layer, "span": span, "recovery": float(mean[layer, i]), "standard_error": float(error[layer, i]), "pairs": n}
            for layer in range(self.spans.shape[1])
            for i, span in enumerate(SPANS)
        )  # fmt: skip

    def plot(self, path: Any = None) -> Any:
        """Recovery by layer, one line a span: how the answer's information moves."""
        from analyses.views.experiments import locality_plot

        return locality_plot(self, path)


def locality_study(model: Any, pairs: Iterable[Pair], batch_size: int = 32, progress: bool = True) -> LocalityStudy:
    """Sweeps `resid_pre` for every pair: each position over the early layers, each span over all layers.

    Raises:
        ValueError: no pair to patch.
    """
    early = model.cfg.n_layers // 4 + 1  # layers 0…L/4
    hits, chance, image_chance, spans, categories, skipped = [], [], [], [], [], 0
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
    if not hits:
        raise ValueError("there is no pair to patch: check_pairs kept none, or each changes the whole image.")
    return LocalityStudy(
        *(tuple(values) for values in (hits, chance, image_chance)), torch.stack(spans), tuple(categories), early,
        skipped, str(model.cfg.model_name),
    )  # fmt: skip


def _spans(pair: Pair) -> dict[str, list[int]]:
    """Positions of SPANS."""
    inputs, own = pair.clean, sorted(set(pair.on_boxes.tolist()) | set(changed_positions(pair.clean, pair.corrupted).tolist()))
    question = inputs.positions("question").tolist()
    last = inputs.shape[1] - 1
    rest = [place for place in inputs.positions("image").tolist() if place not in own]
    template = [place for place in inputs.positions("template").tolist() if question[-1] < place < last]
    return dict(zip(SPANS, (own, rest, question, template, [last])))


@torch.no_grad()
def knockout_study(
    model: Any, examples: Iterable[Example], window: int | None = None, seed: int = 0, progress: bool = True
) -> Knockout:
    """Blocks flows for every item whose objects are known and whose answer is right and a single token.

    Flows: image → last, image → question, question → last, and to everything after the image: the object's patches, and
    as many other patches of the image drawn at random.

    Raises:
        ValueError: no item could be used.
    """
    done: list[Knockout] = []
    for example in tqdm(examples, desc="knockout", unit="item", disable=not progress, delay=2):
        things = example.item.depends_on if example.item is not None else ()
        inputs = model.encode(model.to_inputs(example.question, images=list(example.images)))
        image = inputs.positions("image").tolist()
        own = sorted({place for thing in things for place in inputs.positions(thing.box).tolist()})
        others = [place for place in image if place not in own]
        tokens = model.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        if not own or len(own) > len(others) or len(tokens) != 1:
            continue
        after = list(range(image[-1] + 1, inputs.shape[1]))
        control = sorted(Random(f"{seed} {example.id}").sample(others, len(own)))
        flows = {
            "image → last": ("image", "last"),
            "image → question": ("image", "question"),
            "question → last": ("question", "last"),
            "object → all after": (own, after),
            "as many other patches → all after": (control, after),
        }
        done.append(attention_knockout(model, inputs, tokens, flows, window, progress=False))
    return Knockout.join(done)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    if n == 0:
        return float("nan"), float("nan")
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return interval.low, interval.high


def _normal(values: Sequence[float]) -> tuple[float, float]:
    """95 % normal interval of a mean of shares."""
    if len(values) < 2:
        return float("nan"), float("nan")
    error = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return max(0.0, float(np.mean(values)) - error), min(1.0, float(np.mean(values)) + error)

