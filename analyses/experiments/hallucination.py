"""Which score separates a model's right answers from its hallucinated ones?

1. The model answers every question of a benchmark greedily (captions in the data are used as they are).
2. Answers are judged by the rules of their benchmark (`analyses.data.benchmarks.judge`). In a caption, every object it names is a
   claim, which is right if the object is in the image. Answers that need an external judge are neither right nor wrong.
3. Every method of `analyses.answer_scores.SCORES` scores every claim: higher = more likely right. For "Is there a dog?", the
   methods that look for the answer in the image look for the noun, and the score is negated if the answer is no. The control
   gets the images of another question: the last one before it in the data with different images (or the first one after it).
4. AUROC and average precision by category, with bootstrap intervals that resample images with all their claims
   (`analyses.common.statistics`), because claims of one caption, and questions about one image, are not independent.

Negating the score separates "yes" from "no" answers by itself. They are therefore also reported separately ("existence: said
no"), and "all, within categories" compares only answers of the same category that say the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from analyses.answer_scores import SCORES, Evidence
from analyses.common.result import Result
from analyses.common.statistics import detection, within_groups
from analyses.contextual_lens import LayerSweep, default_layers, sweep_layers, word_spans
from analyses.data.benchmarks import OBJECTS, Question, judge, mentions, parse_yes_no
from analyses.data.examples import image_key, in_batches
from analyses.data.json_lines import read_rows
from analyses.data.schema import JUDGEMENT
from analyses.experiments.experiment import Done, Experiment
from hooked_qwen2vl.image_embeddings import ImageEmbeddingsCache
from hooked_qwen2vl.image_hash import image_hash
from hooked_qwen2vl.moved import moved_names, renamed_arguments
from hooked_qwen2vl.processor import open_image
from hooked_qwen2vl.prompt_text import text_ids
from hooked_qwen2vl.protocols import Model

__getattr__ = moved_names(__name__)

CONTROL = "contextual_control"
ALL, WITHIN = "all", "all, within categories"
ENOUGH = 300  # hallucinated answers below which an interval is wide
_COLUMNS = ("key", "id", "image", "category", "question", "gold", "answer", "correct", "judge", "said", "noun")
_SAYS = re.compile(r"\s*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Asked(Question):
    """A question with the images for its control.

    Attributes:
        other: the images of another question (see `with_controls`); empty if all questions have the same images.
    """

    other: tuple[Any, ...] = field(repr=False, default=())


class Answer(NamedTuple):
    """The model's answer.

    Attributes:
        cut: whether generation stopped at the limit on tokens.
        other_tokens: whether the text tokenises to other tokens than were generated; scores use the text's tokens.
    """

    text: str
    cut: bool = False
    other_tokens: bool = False


@dataclass(frozen=True)
class Claim:
    """An answer, or one object that a caption names.

    Attributes:
        key: unique in its data set.
        text: the whole answer or caption.
        correct: None if an external judge is needed.
        mention: (start, end) of the object's characters in the text; None for an answer.
        noun: the noun of a yes/no question, if the answer begins with yes or no; else "".
    """

    key: str
    item: Question
    text: str
    correct: bool | None
    mention: tuple[int, int] | None = None
    noun: str = ""

    @property
    def said(self) -> str:
        """ "yes" or "no" if the claim has a noun, else ""."""
        return _SAYS.match(self.text)[1].lower() if self.noun else ""


@dataclass(frozen=True)
class Hallucinations(Result):
    """All claims with the scores of all methods.

    Attributes:
        claims: one row per claim: key, id, image (the same for questions about one image), category, question, gold, answer, correct
            (None: needs a judge), judge, said, noun, error (why scores are missing), one column per method (NaN without a score),
            cut and other_tokens.
        methods: names of the methods. data: name of the data set. model_name: name of the model; weights: hash of its weights.
        layers: (image_layer, text_layer) of the contextual lens.
        n_boot, seed, level: of the bootstrap.
    """

    claims: pd.DataFrame
    methods: tuple[str, ...]
    data: str
    model_name: str
    n_boot: int = 1000
    seed: int = 0
    level: float = 0.95
    weights: str = ""
    layers: tuple[int, int] | None = None

    @cached_property
    def judged(self) -> pd.DataFrame:
        """The claims that are right or wrong, without those that need a judge."""
        kept = self.claims[self.claims["correct"].notna()]
        return kept.assign(correct=kept["correct"].astype(bool))

    @property
    def cluster(self) -> str:
        """The column by which intervals resample claims: "image"; in tables without it "id" (question or caption), else "claim"."""
        return next((name for name in ("image", "id") if name in self.claims), "claim")

    def _clusters(self, part: pd.DataFrame) -> pd.Series | None:
        return None if self.cluster == "claim" else part[self.cluster]

    @cached_property
    def _metrics(self) -> pd.DataFrame:
        rows = []
        for method in self.methods:
            for name, part in self._groups():
                figures = detection(part["correct"], part[method], self.n_boot, self.seed, self.level, self._clusters(part))
                rows.append({"method": method, "category": name, **figures})
            strata = self.judged["category"] + " " + self.judged["said"]
            figures = within_groups(
                self.judged["correct"], self.judged[method], strata, self.n_boot, self.seed, self.level, self._clusters(self.judged)
            )
            rows.append({"method": method, "category": WITHIN, **figures})
        return pd.DataFrame(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per method and category, with the columns of `analyses.common.statistics.detection`.

        These are items, hallucinated, unscored, clusters, resamples, and auroc, ap_correct and ap_hallucinated, each with `_low`
        and `_high`. Intervals resample images (see `cluster`) with all their claims.
        """
        return self._metrics.copy()

    def table(self, figure: str = "auroc") -> pd.DataFrame:
        """Methods × categories as text, such as "0.81 [0.75, 0.86]"; the first row has "hallucinated of judged" claims."""
        cells = self._metrics.assign(text=[_interval_text(row, figure) for _, row in self._metrics.iterrows()])
        categories = list(dict.fromkeys(cells["category"]))
        shown = cells.pivot(index="method", columns="category", values="text").loc[list(self.methods), categories]
        counts = self.counts()
        shown.loc["hallucinated"] = [f"{counts[c][0]} of {counts[c][1]}" for c in categories]
        return shown.loc[["hallucinated", *self.methods]].rename_axis(index=None, columns=None)

    def counts(self) -> dict[str, tuple[int, int]]:
        """category -> (hallucinated, judged)."""
        found = {name: (int((~part["correct"]).sum()), len(part)) for name, part in self._groups()}
        return found | {WITHIN: found[ALL]}

    def few(self) -> dict[str, int]:
        """Categories with fewer than 300 hallucinated answers, whose intervals are wide -> their number."""
        return {name: wrong for name, (wrong, _) in self.counts().items() if wrong < ENOUGH and name != WITHIN}

    def markdown(self) -> str:
        """A report in Markdown: what was run, and a table of methods × categories for each figure."""
        from analyses.views.hallucination import markdown

        return markdown(self)

    def plot(self, path: Any = None, category: str = ALL) -> Any:
        """ROC curves of every method over one category."""
        from analyses.views.hallucination import roc_plot

        return roc_plot(self, path, category)

    def plot_scores(self, path: Any = None, category: str = ALL) -> Any:
        """Histograms of every method's scores, separate for right and hallucinated answers."""
        from analyses.views.hallucination import score_plot

        return score_plot(self, path, category)

    def plot_intervals(self, path: Any = None) -> Any:
        """AUROC of every method in every category, with intervals."""
        from analyses.views.hallucination import interval_plot

        return interval_plot(self, path)

    def of(self, category: str) -> pd.DataFrame:
        """The judged claims of one category ("all", "existence", "existence: said no", …).

        Raises:
            ValueError: no such category.
        """
        groups = dict(self._groups())
        if category not in groups:
            raise ValueError(f"expected a category of {', '.join(groups)}, got {category!r}.")
        return groups[category]

    def _groups(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """(name, claims) of every category, of its "yes" and "no" answers if claims have nouns, and of "all"."""
        for name, part in self.judged.groupby("category", sort=False):
            yield str(name), part
            for said in ("yes", "no"):
                if (part["said"] == said).any():
                    yield f"{name}: said {said}", part[part["said"] == said]
        yield ALL, self.judged


class HallucinationExperiment(Experiment):
    """The experiment: one row per claim, with its text and scores.

    Args:
        methods: of `answer_scores.SCORES`; None: all.
        vocabulary: word -> object, for captions (`benchmarks.read_synonyms`).
        image_layer, text_layer: layers of the contextual lens (see `choose_layers`); None: its defaults.
    Raises:
        ValueError: an unknown method or layer; when called: a question without an image, or captions without a vocabulary.
    """

    name = "hallucination"

    def __init__(
        self,
        model: Model,
        methods: Sequence[str] | None = None,
        vocabulary: Mapping[str, str] | None = None,
        max_new_tokens: int = 32,
        image_layer: int | None = None,
        text_layer: int | None = None,
    ):
        words = None if vocabulary is None else hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:16]
        self.layers = default_layers(model, image_layer, text_layer)
        settings = {"methods": list(check_methods(methods)), "vocabulary": words, "max_new_tokens": max_new_tokens}
        super().__init__(model, settings | dict(zip(("image_layer", "text_layer"), self.layers)))
        self.vocabulary, self.encode = vocabulary, ImageEmbeddingsCache(model)

    def asked(self, data: Iterable[Question]) -> Iterator[Asked]:
        return with_controls(data)

    @torch.no_grad()
    def __call__(self, batch: Sequence[Asked]) -> Iterator[dict[str, Any]]:
        if blind := [item.source or item.id for item in batch if not item.images]:
            raise ValueError(f"{blind[0]} has no image: pass images=.")
        answers = generate_answers(self.model, batch, self.settings["max_new_tokens"], self.encode)
        for item, answer in zip(batch, answers):
            for claim in claims_of([item], [answer.text], self.vocabulary):
                scores = score_claim(self.model, claim, self.settings["methods"], item.other, *self.layers, self.encode)
                yield {**_about(claim), **scores, "cut": answer.cut, "other_tokens": answer.other_tokens}

    @staticmethod
    def result(done: Done, data: str, judgements: Mapping[str, bool] | None = None, n_boot: int = 1000, seed: int = 0) -> Hallucinations:
        claims, settings = _as_claims(done.rows, set(done.ids), judgements), done.settings
        methods, layers = tuple(settings["methods"]), (settings["image_layer"], settings["text_layer"])
        return Hallucinations(claims, methods, data, done.model_name, n_boot, seed, weights=done.weights(), layers=layers)


@renamed_arguments
def detect_hallucinations(
    model: Model,
    items: Sequence[Question],
    data: str,
    methods: Sequence[str] | None = None,
    vocabulary: Mapping[str, str] | None = None,
    judgements: Mapping[str, bool] | None = None,
    max_new_tokens: int = 32,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
    image_layer: int | None = None,
    text_layer: int | None = None,
    batch_size: int = 8,
    *,
    out: str | Path | None = None,
    rank: tuple[int, int] | None = None,
) -> Hallucinations | None:
    """Generates the answers, judges them, and scores them with every method.

    Args:
        data: name of the data set, for reports.
        methods, vocabulary, max_new_tokens, image_layer, text_layer: see `HallucinationExperiment`.
        judgements: id -> whether right, by an external judge; they replace the benchmark's judgement.
        n_boot, seed: of the intervals.
        out, rank: a run in a folder (see `Experiment.run`).
    Returns:
        the result; None if `rank` is given and shards of other ranks are missing.
    Raises:
        ValueError: nothing to score, an item without a readable image, judgements of unknown ids, or as
            `HallucinationExperiment`.
    """
    experiment = HallucinationExperiment(model, methods, vocabulary, max_new_tokens, image_layer, text_layer)
    about = {"data": data, "judgements": judgements, "n_boot": n_boot, "seed": seed}
    return experiment.run(items, out, batch_size=batch_size, rank=rank, progress=progress, **about)


def read_hallucinations(
    out: str | Path, data: str, judgements: Mapping[str, bool] | None = None, n_boot: int = 1000, seed: int = 0
) -> Hallucinations:
    """Reads the result from a folder that `detect_hallucinations` wrote, without the model.

    Args:
        data, judgements, n_boot, seed: see `detect_hallucinations`.
    Raises:
        ValueError: no run there, one that is not finished, nothing to score, or judgements of unknown ids.
    """
    return HallucinationExperiment.read(out, data=data, judgements=judgements, n_boot=n_boot, seed=seed)


def run_settings(*arguments: Any, **more: Any) -> dict[str, Any]:
    """Deprecated: use `HallucinationExperiment(…).settings`."""
    warnings.warn("run_settings(…) is now HallucinationExperiment(…).settings.", DeprecationWarning, stacklevel=2)
    return HallucinationExperiment(*arguments, **more).settings


def with_controls(items: Iterable[Question]) -> Iterator[Asked]:
    """The questions, each with the images of the last question before it that has different images, or of the first one after it.

    Questions before come first so that controls stay the same when more data is added. Only the questions about the data's first
    images have none before them; they wait for the first different images.
    """
    waiting: list[Question] = []  # questions about the first images, until different images come
    last: tuple[str, tuple[Any, ...]] = ("", ())
    other: tuple[Any, ...] = ()
    for item in items:
        key = " ".join(map(image_hash, item.images))
        if waiting and key != last[0]:
            yield from (_asked(one, item.images) for one in waiting)
            waiting, other = [], last[1]
        elif not other:
            waiting.append(item)
        elif key != last[0]:
            other = last[1]
        last = key, item.images
        if not waiting:
            yield _asked(item, other)
    yield from (_asked(one, ()) for one in waiting)


@torch.no_grad()
def generate_answers(
    model: Model, items: Sequence[Question], max_new_tokens: int = 32, encode: Callable[[Any], Any] | None = None
) -> list[Answer]:
    """The model's greedy answers to one batch of questions; captions that are in the data are returned as they are.

    Args:
        encode: an `ImageEmbeddingsCache`; None: `model.encode`.
    """
    asked = [item for item in items if not (item.given and item.judge == OBJECTS)]
    said: Iterator[Answer] = iter(())
    if asked:
        inputs = model.to_inputs([item.question for item in asked], images=[list(item.images) for item in asked])
        inputs = (encode or model.encode)(inputs)
        done = model.generate(inputs, max_new_tokens=max_new_tokens, do_sample=False, return_type="inputs", verbose=False)
        said = (_answer(model, row) for row in done.tokens[:, inputs.shape[1] :].tolist())
    return [Answer(item.given) if item.given and item.judge == OBJECTS else next(said) for item in items]


def claims_of(
    items: Sequence[Question],
    answers: Sequence[str],
    vocabulary: Mapping[str, str] | None = None,
) -> list[Claim]:
    """The claims in the answers, with `correct` by the rules of the benchmark.

    Raises:
        ValueError: captions without a vocabulary.
    """
    claims = []
    for item, answer in zip(items, answers, strict=True):
        if item.judge == OBJECTS:
            claims += _mention_claims(item, answer, vocabulary)
            continue
        noun = item.noun if _begins_as_read(answer) else ""
        claims.append(Claim(item.id, item, answer, judge(item, answer), noun=noun))
    return claims


def score_claim(
    model: Model,
    claim: Claim,
    methods: Sequence[str],
    other: Sequence[Any] = (),
    image_layer: int | None = None,
    text_layer: int | None = None,
    encode: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """{method: score, …, "refused": ""}; if a claim cannot be scored, the scores are None and `refused` gives the reason.

    Args:
        methods: of `answer_scores.SCORES`.
        other: the images for the control; without readable ones the control's score is None.
        image_layer, text_layer: of the contextual lens.
        encode: an `ImageEmbeddingsCache`; None: `model.encode`.
    """
    nothing: dict[str, Any] = dict.fromkeys(methods)
    if not claim.text.strip():
        return {**nothing, "refused": "the answer is empty"}
    encode = encode or model.encode
    pictures = _readable(other) if CONTROL in methods else ()
    try:
        control = encode(claim_inputs(model, claim, pictures)) if pictures else None
        evidence = _Encoded(model, claim_inputs(model, claim), 0, claim.noun or None, control, image_layer, text_layer, encode)
        names = [name for name in methods if name != CONTROL or control is not None]
        return {**nothing, **{name: SCORES[name](model, evidence) for name in names}, "refused": ""}
    except ValueError as error:
        return {**nothing, "refused": str(error)}


def _readable(images: Sequence[Any]) -> list[Any]:
    """The images, opened; empty if one cannot be read (the question that it belongs to reports it)."""
    try:
        return [open_image(image) for image in images]
    except (ValueError, OSError):
        return []


@dataclass(frozen=True)
class _Encoded(Evidence):
    """`Evidence` that encodes images with `encode`, such as an `ImageEmbeddingsCache`."""

    encode: Callable[[Any], Any] | None = None

    @cached_property
    def item(self) -> Any:
        return self.encode(self.inputs[self.row])


def claim_inputs(model: Model, claim: Claim, images: Sequence[Any] | None = None) -> Any:
    """The prompt with the claim as its answer.

    For a mention in a caption, the caption up to its end is teacher-forced; the mention's tokens are the segment `answer`, the
    tokens before them `history`.

    Args:
        images: images to use instead of the item's.
    """
    images = list(claim.item.images if images is None else images)
    if claim.mention is None:
        return model.to_inputs(claim.item.question, images=images, answers=claim.text.strip())
    start, end = claim.mention
    inputs = model.to_inputs(claim.item.question, images=images, answers=claim.text[:end])
    word = list(word_spans(model, inputs, [claim.text[start:end]]).values())[-1]
    segments = tuple("history" if n == "answer" and at not in word else n for at, n in enumerate(inputs.segments[0]))
    return replace(inputs, segments=(segments,))


def choose_layers(model: Model, items: Sequence[Question], max_new_tokens: int = 32, progress: bool = True) -> LayerSweep:
    """Chooses the contextual lens's two layers by AUROC over the model's own answers to a validation split.

    Answers that need a judge and answers to yes/no questions (where the noun is scored, not the answer) are not used.

    Raises:
        ValueError: the answers are all right, or all hallucinated.
    """
    bar = tqdm(items, desc="answering", unit="question", disable=not progress, delay=2)
    answers = [answer.text for batch in in_batches(bar, 8) for answer in generate_answers(model, batch, max_new_tokens)]
    claims = claims_of(items, answers)
    claims = [c for c in claims if c.correct is not None and not c.noun and c.text.strip()]
    prompts = (model.encode(claim_inputs(model, claim)) for claim in claims)
    return sweep_layers(model, prompts, [bool(c.correct) for c in claims], progress=progress)


def read_judgements(file: str | Path) -> dict[str, bool]:
    """Reads the judgements of an external judge: JSON lines {"id": "…", "correct": true}.

    Raises:
        ValueError: no such file, an invalid line (which the message names), or an id that is judged twice.
    """
    found: dict[str, bool] = {}
    for line, row in read_rows(file):
        try:
            values = JUDGEMENT.read(row)
        except ValueError as error:
            raise ValueError(f'{file}, line {line}: {error}; expected {{"id": "…", "correct": true or false}}.') from error
        if values["id"] in found:
            raise ValueError(f"{file}, line {line}: {values['id']} is judged twice.")
        found[values["id"]] = values["correct"]
    return found


# ---- inside ------------------------------------------------------------------------------------------


def _begins_as_read(answer: str) -> bool:
    """Whether an answer begins with yes or no and `parse_yes_no` reads it as that ("Yes, there is no dog" is not)."""
    said = _SAYS.match(answer)
    return said is not None and said[1].lower() == parse_yes_no(answer.replace("NO", "No"))


def _answer(model: Model, ids: Sequence[int]) -> Answer:
    """The `Answer` of generated ids up to the end token, after which there is padding."""
    ends = set(model.cfg.special.eos)
    length = next((at for at, token in enumerate(ids) if token in ends), None)
    kept = list(ids[:length])
    text = model.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    same = text_ids(model.tokenizer, text.strip()) == kept
    return Answer(text, length is None, not same)


def _mention_claims(item: Question, caption: str, vocabulary: Mapping[str, str] | None) -> list[Claim]:
    if vocabulary is None:
        raise ValueError("captions need a vocabulary of objects: benchmarks.read_synonyms(file).")
    there = {vocabulary.get(name.lower(), name.lower()) for name in item.truth}
    return [Claim(f"{item.id}#{m.start}", item, caption, m.object in there, (m.start, m.end)) for m in mentions(caption, vocabulary)]


def check_methods(methods: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the methods; None: all.

    Raises:
        ValueError: an unknown method.
    """
    found = tuple(SCORES if methods is None else methods)
    if unknown := [name for name in found if name not in SCORES]:
        raise ValueError(f"unknown methods {', '.join(unknown)}; there are {', '.join(SCORES)}.")
    return found


def _about(claim: Claim) -> dict[str, Any]:
    return {
        "key": claim.key,
        "id": claim.item.id,
        "image": image_key(claim.item),
        "category": claim.item.category or "none",
        "question": claim.item.question,
        "gold": claim.item.answer,
        "answer": claim.text if claim.mention is None else claim.text[slice(*claim.mention)],
        "correct": claim.correct,
        "judge": claim.item.judge,
        "said": claim.said,
        "noun": claim.noun,
    }


def _as_claims(rows: pd.DataFrame, ids: set[str], judgements: Mapping[str, bool] | None) -> pd.DataFrame:
    """The rows of `HallucinationExperiment` as `Hallucinations.claims`; judgements replace the benchmark's."""
    if rows.empty:
        raise ValueError("there is nothing to score: no question whose image can be read, or captions that name nothing.")
    judgements = dict(judgements or {})
    if unknown := set(judgements) - ids:
        raise ValueError(f"{len(unknown)} judgements have an id that no item has, such as {min(unknown)!r}.")
    methods = [name for name in rows if name in SCORES]
    table = rows.rename(columns={"refused": "error"})[[*_COLUMNS, "error", *methods, "cut", "other_tokens"]]
    outside = [judgements.get(id) if kind != OBJECTS else None for id, kind in zip(table["id"], table["judge"])]
    correct = [own if said is None else said for said, own in zip(outside, table["correct"])]
    known = [None if pd.isna(value) else bool(value) for value in correct]
    return table.assign(correct=pd.Series(known, table.index, dtype=object)).astype(dict.fromkeys(methods, float))


def _asked(item: Question, other: tuple[Any, ...]) -> Asked:
    return Asked(**{f.name: getattr(item, f.name) for f in fields(item)}, other=other)


def _interval_text(row: pd.Series, figure: str) -> str:
    if np.isnan(row[figure]):
        return "–"
    if np.isnan(row[f"{figure}_low"]):
        return f"{row[figure]:.2f} [–]"
    return f"{row[figure]:.2f} [{row[f'{figure}_low']:.2f}, {row[f'{figure}_high']:.2f}]"
