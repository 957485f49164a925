"""Where do answers flip between layers, and which components cause the flips?

The trajectory of every prompt of a data set. Every eligible flip (docs/methods.md, section 2) is attributed to components and
tested by ablating them, compared with random components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analyses.common.result import Result
from analyses.common.statistics import share_interval
from analyses.data.examples import Example, image_key
from analyses.experiments.experiment import Data, Done, Experiment
from analyses.flip_patching import FlipTest, ablate_flip, attribute_flip
from analyses.trajectory import NoFirstToken, answer_trajectory, doubt_beside_control, outcomes_by_category
from hooked_qwen2vl.image_embeddings import ImageEmbeddingsCache
from hooked_qwen2vl.moved import moved_names, renamed_arguments, renamed_columns
from hooked_qwen2vl.protocols import Model

__getattr__ = moved_names(__name__)

FLIP = "flip_"  # columns that hold a list, one value per flip
FLIP_FIGURES = (
    "layer", "lost", "gained", "change", "attribution_error", "components", "lens_difference", "lens_difference_ablated",
    "lens_difference_random", "final_difference", "final_difference_ablated", "final_difference_random",
    "removed", "removed_by_random", "reversed", "reversed_by_random",
)  # fmt: skip


@dataclass(frozen=True)
class FlipStudy(Result):
    """Tables of the trajectories of a data set, and of a test of every eligible flip.

    Attributes:
        prompts: one row per prompt: id, image (the same for prompts about one image), L (the number of blocks), and the
            figures of `Trajectory.summary`.
        flips: one row per flip: prompt (index of a row of `prompts`), columns of that prompt, the figures of
            `FlipTest.summary`, and `lens_difference_random`, `final_difference_random`, means over the random draws.
        skipped: number of questions without an answer or candidates, or without a first token that tells the answer from the others.
    """

    prompts: pd.DataFrame
    flips: pd.DataFrame
    skipped: int

    @classmethod
    def from_rows(cls, rows: pd.DataFrame, skipped: int = 0) -> FlipStudy:
        """The study made from the rows of `flip_row`.

        Raises:
            ValueError: no rows.
        """
        rows = rows.rename(columns={f"{FLIP}{old}": f"{FLIP}{new}" for old, new in renamed_columns(cls).items()})
        if not len(rows):
            raise ValueError("no question could be followed: each needs candidates, and an answer that differs from them.")
        nested = [name for name in rows if name.startswith(FLIP)]
        about = [name for name in ("id", "image", "question", "category", "right", "L") if name in rows]
        flips = rows.loc[rows[nested[0]].map(len) > 0, [*about, *nested]]
        flips = flips.rename(columns=lambda name: name.removeprefix(FLIP)).rename_axis("prompt")
        flips = flips.explode([name.removeprefix(FLIP) for name in nested]).infer_objects().reset_index()
        return cls(rows.drop(columns=nested), flips, skipped)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per flip."""
        return self.flips

    def by_category(self) -> pd.DataFrame:
        """By category of question: share of each outcome, doubt with its control, and mean depths."""
        return outcomes_by_category(self.prompts)

    def doubt(self) -> pd.Series:
        """How often the answer was the top candidate and then lost, compared with a control; see `doubt_beside_control`."""
        return doubt_beside_control(self.prompts)

    def summary(self) -> pd.DataFrame:
        """Share of flips removed (at their layer) and reversed (at the output) by ablating the found or random components.

        With 95 % intervals, and the numbers of flips, prompts and clusters. Intervals resample clusters with all their flips:
        images, or prompts in tables without images. "removed" is close to what the attribution states; "reversed" is the causal
        test.
        """
        flips, resampled = self.flips, "image" if "image" in self.flips else "prompt"
        counts = len(flips), flips["prompt"].nunique(), flips[resampled].nunique(), resampled
        rows = []
        for what in ("removed", "reversed"):
            for name, column in (("found components", what), ("random components", f"{what}_by_random")):
                rows.append((what, name, *share_interval(flips[column], flips[resampled]), *counts))
        columns = ["flip is", "by ablating", "share", "low", "high", "flips", "prompts", "clusters", "resampled"]
        return pd.DataFrame(rows, columns=columns)

    def last_shift(self) -> pd.DataFrame:
        """Median and mean over prompts of the last layer's shift, one row per figure; and the same if the final norm is applied twice."""
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
        """Effect of the ablations on each flip, and at which layers flips are."""
        from analyses.views.experiments import flip_study_plot

        return flip_study_plot(self.flips, path)

    def plot_trajectories(self, path: Any = None) -> Any:
        """Outcomes, and depths of birth and stability, by category."""
        from analyses.views.trajectories import trajectories_plot

        return trajectories_plot(self.prompts, self.by_category(), path)


class FlipExperiment(Experiment):
    """The experiment: `flip_row` of every question that is not skipped."""

    name = "flips"

    def __init__(self, model: Model, n_components: int = 2, n_random: int = 10, seed: int = 0):
        super().__init__(model, {"components": n_components, "random": n_random}, seed)
        self.encode = ImageEmbeddingsCache(model)

    def __call__(self, batch: Sequence[Example]) -> Iterator[dict[str, Any]]:
        options = self.settings["components"], self.settings["random"], self.seed
        rows = (flip_row(self.model, example, *options, self.encode) for example in batch)
        return (row for row in rows if row is not None)

    @staticmethod
    def result(done: Done) -> FlipStudy:
        return FlipStudy.from_rows(done.rows, len(done.ids) - done.failed - len(done.rows))


@renamed_arguments
def flip_study(
    model: Model,
    examples: Data,
    n_components: int = 2,
    n_random: int = 10,
    seed: int = 0,
    progress: bool = True,
    *,
    out: str | Path | None = None,
    batch_size: int = 8,
    rank: tuple[int, int] | None = None,
) -> FlipStudy | None:
    """Trajectories of all questions with an answer and candidates; attributes and tests every eligible flip.

    Args:
        n_components: number of components to ablate per flip. n_random: number of random draws of as many components.
        out, batch_size, rank: a run in a folder (see `Experiment.run`). Each question has its own forwards, whatever the batch_size.
    Returns:
        the study; None if `rank` is given and shards of other ranks are missing.
    Raises:
        ValueError: all questions were skipped.
    """
    experiment = FlipExperiment(model, n_components, n_random, seed)
    return experiment.run(examples, out, batch_size=batch_size, rank=rank, progress=progress)


def read_flip_study(out: str | Path) -> FlipStudy:
    """Reads the study from a folder that `flip_study` wrote, without the model.

    Raises:
        ValueError: no run there, one that is not finished, or all questions were skipped.
    """
    return FlipExperiment.read(out)


@torch.no_grad()
def flip_row(
    model: Model, example: Example, n_components: int, n_random: int, seed: int, encode: Callable[[Any], Any]
) -> dict[str, Any] | None:
    """The figures of one question; those of its eligible flips are lists in columns that begin with "flip_".

    Args:
        encode: `model.encode`, or an `ImageEmbeddingsCache`.
    Returns:
        the row; None without an answer or candidates, or if no first token distinguishes the answer from the candidates.
    Raises:
        ValueError: an image or a prompt that cannot be read (a run records it).
    """
    if not example.candidates or not example.answer.strip():
        return None
    inputs = encode(model.to_inputs(example.question, images=list(example.images)))
    try:
        item = answer_trajectory(model, inputs, example.answer, example.candidates, category=example.category, question=example.question)
    except NoFirstToken:
        return None
    tests = []
    for layer in item.eligible_flips:
        flip = attribute_flip(model, inputs, layer, int(item.top1[layer]), int(item.top1[layer - 1]))
        tests.append(_test_row(ablate_flip(model, inputs, flip, n_components, n_random, seed)))
    nested = {f"{FLIP}{name}": [test[name] for test in tests] for name in FLIP_FIGURES}
    return {"id": example.id, "image": image_key(example), "L": item.n_layers, **item.summary(), **nested}


def _test_row(test: FlipTest) -> dict[str, Any]:
    at_layer, final = test.random.mean(0).tolist()
    return {**test.summary(), "lens_difference_random": at_layer, "final_difference_random": final}
