"""Which score tells a model's right answers from its hallucinated ones?

1. The model answers every question of a benchmark, greedily (captions that came with the data are taken as they are).
2. An answer is judged as its benchmark says (`analyses.benchmarks.judge`); of a caption, every object it names is a
   claim of its own, right if the object is truly there. Where a judge is needed nothing is called right or wrong.
3. Every method of `analyses.baselines.SCORES` scores every claim: higher = more likely right. For "Is there a dog?" the
   methods that look for something in the image look for the noun, with the sign flipped when the answer is no. The
   control sees another picture: the nearest one before (else after) in the data that differs.
4. AUROC and average precision by category, with bootstrap intervals (`analyses.detection`).

Flipping the sign sets a noun's "yes" and "no" answers apart before anything is compared. So these are also reported
apart ("existence: said no"), and "all, within categories" compares only answers of one category that said the same.

With a folder, answers and scores are written one by one and a run goes on where it was stopped; a folder of another
model, other data or other settings is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from analyses.baselines import SCORES, all_scores
from analyses.benchmarks import OBJECTS, Question, judge, mentions, parse_yes_no
from analyses.contextual_lens import LayerSweep, default_layers, sweep_layers, word_spans
from analyses.detection import detection, within
from analyses.ledger import Ledger

CONTROL = "contextual_control"
NOUN_METHODS = ("internal_confidence", "contextual", CONTROL)
ALL, WITHIN = "all", "all, within categories"
ENOUGH = 300  # hallucinated answers below which an interval is wide
_SAYS = re.compile(r"\s*(yes|no)\b", re.IGNORECASE)
Scorer = Callable[..., Mapping[str, float]]


class Answer(NamedTuple):
    """What the model said.

    Attributes:
        cut: whether it was stopped by the limit on tokens.
        other_tokens: whether the text, tokenised again (so it is scored), has other tokens than were generated.
    """

    text: str
    cut: bool = False
    other_tokens: bool = False


@dataclass(frozen=True)
class Claim:
    """What is scored: an answer, or one object that a caption names.

    Attributes:
        key: unique in its data set.
        text: the whole answer or caption.
        correct: None where a judge is needed.
        mention: (start, end) of the object's characters in the text; None for an answer.
        noun: what a yes/no question asks for, where the answer begins with yes or no; else "".
    """

    key: str
    item: Question
    text: str
    correct: bool | None
    mention: tuple[int, int] | None = None
    noun: str = ""

    @property
    def said(self) -> str:
        """"yes" or "no" where a noun is scored, else ""."""
        return _SAYS.match(self.text)[1].lower() if self.noun else ""


@dataclass(frozen=True)
class Hallucinations:
    """Every claim with every method's score.

    Attributes:
        claims: one row a claim: key, id, category, question, gold, answer, correct (None: needs a judge), judge, said,
            noun, error (why scores are missing), a column a method (NaN where there is none), cut and other_tokens.
        methods: their names. data, model_name, weights: what was run; `weights` is their fingerprint.
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

    @cached_property
    def judged(self) -> pd.DataFrame:
        """The claims that are known to be right or wrong."""
        kept = self.claims[self.claims["correct"].notna()]
        return kept.assign(correct=kept["correct"].astype(bool))

    @cached_property
    def _metrics(self) -> pd.DataFrame:
        rows = []
        for method in self.methods:
            for name, part in self._groups():
                figures = detection(part["correct"], part[method], self.n_boot, self.seed, self.level)
                rows.append({"method": method, "category": name, **figures})
            strata = self.judged["category"] + " " + self.judged["said"]
            figures = within(
                self.judged["correct"], self.judged[method], strata, self.n_boot, self.seed, self.level
            )
            rows.append({"method": method, "category": WITHIN, **figures})
        return pd.DataFrame(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a method and category: items, hallucinated, unscored, resamples, and auroc, ap_correct and
        ap_hallucinated with `_low` and `_high`."""
        return self._metrics.copy()

    def table(self, figure: str = "auroc") -> pd.DataFrame:
        """Methods × categories as text: "0.81 [0.75, 0.86]"; the first row counts hallucinated answers of items."""
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
        """The categories with fewer than 300 hallucinated answers: their intervals are wide."""
        return {name: wrong for name, (wrong, _) in self.counts().items() if wrong < ENOUGH and name != WITHIN}

    def markdown(self) -> str:
        """What was run, and a table of methods × categories for each figure."""
        from analyses.views.hallucination import markdown

        return markdown(self)

    def plot(self, path: Any = None, category: str = ALL) -> Any:
        """ROC curves of every method over one category."""
        from analyses.views.hallucination import roc_plot

        return roc_plot(self, path, category)

    def plot_scores(self, path: Any = None, category: str = ALL) -> Any:
        """Histograms of every method's scores, right and hallucinated answers apart."""
        from analyses.views.hallucination import score_plot

        return score_plot(self, path, category)

    def plot_intervals(self, path: Any = None) -> Any:
        """AUROC of every method in every category, with intervals."""
        from analyses.views.hallucination import interval_plot

        return interval_plot(self, path)

    def of(self, category: str) -> pd.DataFrame:
        """The judged claims of one category (or of a part of it, or "all").

        Raises:
            ValueError: no such category.
        """
        groups = dict(self._groups())
        if category not in groups:
            raise ValueError(f"expected a category of {', '.join(groups)}, got {category!r}.")
        return groups[category]

    def _groups(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Categories in order, those with nouns also by what was said, then all."""
        for name, part in self.judged.groupby("category", sort=False):
            yield str(name), part
            for said in ("yes", "no"):
                if (part["said"] == said).any():
                    yield f"{name}: said {said}", part[part["said"] == said]
        yield ALL, self.judged


def detect_hallucinations(
    model: Any,
    items: Sequence[Question],
    data: str,
    folder: str | Path | None = None,
    methods: Sequence[str] | None = None,
    vocabulary: Mapping[str, str] | None = None,
    judgements: Mapping[str, bool] | None = None,
    max_new_tokens: int = 32,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
    image_layer: int | None = None,
    text_layer: int | None = None,
) -> Hallucinations:
    """Answers, judges, scores.

    Args:
        data: the data set's name; a folder takes answers to one only.
        folder: for answers.jsonl and scores.jsonl; None keeps nothing.
        methods: of `baselines.SCORES`; None takes all.
        vocabulary: word -> object, for captions (`benchmarks.read_synonyms`).
        judgements: id -> whether right, of a judge outside; they come before the benchmark's own.
        n_boot, seed: of the intervals.
        image_layer, text_layer: lens entries of the contextual lens (see `choose_layers`); None takes its defaults.
    Raises:
        ValueError: no items, an unknown method, a folder of another run, an item without image, or captions without
            a vocabulary.
    """
    if not items:
        raise ValueError("expected questions, got none.")
    methods = list(SCORES) if methods is None else list(methods)
    if unknown := [name for name in methods if name not in SCORES]:
        raise ValueError(f"unknown methods {', '.join(unknown)}; there are {', '.join(SCORES)}.")
    if without := [item.source or item.id for item in items if not item.images]:
        raise ValueError(f"{len(without)} questions have no image (the first: {without[0]}): pass images=.")
    paths = [None, None] if folder is None else [Path(folder) / name for name in ("answers.jsonl", "scores.jsonl")]
    settings = {"data": data, "model": str(model.cfg.model_name), "weights": fingerprint(model)}
    answers = generate_answers(model, items, paths[0], settings, max_new_tokens, progress)
    claims = claims_of(items, [answer.text for answer in answers], vocabulary, judgements)
    layers = dict(zip(("image_layer", "text_layer"), default_layers(model, image_layer, text_layer)))
    scores = score_claims(
        model, claims, methods, paths[1], {**settings, **layers}, progress, partial(all_scores, **layers)
    )
    table = pd.DataFrame([_row(claim, scores[claim.key], methods) for claim in claims])
    said = {item.id: answer for item, answer in zip(items, answers)}
    for name in ("cut", "other_tokens"):
        table[name] = [getattr(said[id], name) for id in table["id"]]
    return Hallucinations(table, tuple(methods), data, settings["model"], n_boot, seed, weights=settings["weights"])


@torch.no_grad()
def generate_answers(
    model: Any,
    items: Sequence[Question],
    path: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    max_new_tokens: int = 32,
    progress: bool = True,
) -> list[Answer]:
    """The model's greedy answer to every question; captions that came with the data are not generated.

    Args:
        path: answers are read from and added to this file.
        settings: what else the file must have been written with.
    Raises:
        ValueError: the file is another run's, or a question or picture of it has changed.
    """
    ledger = Ledger(path, {"what": "answers", **(settings or {}), "max_new_tokens": max_new_tokens})
    answers = []
    for item in tqdm(items, desc="answering", unit="question", disable=not progress, delay=2):
        if item.given and item.judge == OBJECTS:
            answers.append(Answer(item.given))
            continue
        stamp = _stamp(item)
        known = ledger.rows.get(item.id)
        if known is None:
            inputs = model.to_inputs(item.question, images=list(item.images))
            known = {"stamp": stamp, "question": item.question, **_answer(model, inputs, max_new_tokens)}
            ledger.add(item.id, known)
        elif known["stamp"] != stamp:
            raise ValueError(f"{path}: question or picture of {item.id} changed since it was answered; choose another folder.")
        answers.append(Answer(known["answer"], known["cut"], known["other_tokens"]))
    return answers


def claims_of(
    items: Sequence[Question],
    answers: Sequence[str],
    vocabulary: Mapping[str, str] | None = None,
    judgements: Mapping[str, bool] | None = None,
) -> list[Claim]:
    """What is to be scored, and whether it is right, where that is known.

    Raises:
        ValueError: captions without a vocabulary, or judgements of unknown ids.
    """
    judgements = dict(judgements or {})
    if unknown := set(judgements) - {item.id for item in items}:
        raise ValueError(f"{len(unknown)} judgements have an id that no item has, such as {min(unknown)!r}.")
    claims = []
    for item, answer in zip(items, answers, strict=True):
        if item.judge == OBJECTS:
            claims += _mention_claims(item, answer, vocabulary)
            continue
        correct = judgements.get(item.id, judge(item, answer))
        noun = item.noun if _begins_as_read(answer) else ""
        claims.append(Claim(item.id, item, answer, correct, noun=noun))
    return claims


def score_claims(
    model: Any,
    claims: Sequence[Claim],
    methods: Sequence[str],
    path: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    scorer: Scorer = all_scores,
) -> dict[str, dict[str, Any]]:
    """key -> {method: score, …, "error": ""}; a claim that a method refuses has no scores, and the error says why.

    Args:
        path, settings: as `generate_answers`.
        scorer: (model, inputs, names=, noun=, other=) -> scores; `baselines.all_scores`.
    """
    ledger = Ledger(path, {"what": "scores", **(settings or {}), "methods": list(methods)})
    stamps = [_stamp(claim.item, claim.text, claim.noun, claim.mention) for claim in claims]
    others = _other_pictures([claim.item for claim in claims]) if CONTROL in methods else [None] * len(claims)
    for claim, stamp, other in zip(tqdm(claims, desc="scoring", disable=not progress, delay=2), stamps, others):
        known = ledger.rows.get(claim.key)
        if known is None:
            ledger.add(claim.key, {"stamp": stamp, **_scores(model, claim, methods, other, scorer)})
        elif known["stamp"] != stamp:
            raise ValueError(f"{path}: {claim.key} was scored with another answer or picture; choose another folder.")
    return {claim.key: ledger.rows[claim.key] for claim in claims}


def claim_inputs(model: Any, claim: Claim, images: Sequence[Any] | None = None) -> Any:
    """The prompt with what is claimed as its answer.

    A mention is run where it stands, after the caption's earlier words, which count as history; only its own tokens are
    called `answer`.

    Args:
        images: instead of the item's own.
    """
    images = list(claim.item.images if images is None else images)
    if claim.mention is None:
        return model.to_inputs(claim.item.question, images=images, answers=claim.text.strip())
    start, end = claim.mention
    inputs = model.to_inputs(claim.item.question, images=images, answers=claim.text[:end])
    word = list(word_spans(model, inputs, [claim.text[start:end]]).values())[-1]
    names = tuple("history" if n == "answer" and at not in word else n for at, n in enumerate(inputs.names[0]))
    return replace(inputs, names=(names,))


def choose_layers(
    model: Any, items: Sequence[Question], max_new_tokens: int = 32, progress: bool = True
) -> LayerSweep:
    """The contextual lens's two entries by AUROC over the model's own answers to a validation split.

    Only answers that are judged and that are scored themselves: a yes/no question's noun is another thing.

    Raises:
        ValueError: no right, or no hallucinated, answer among them.
    """
    answers = generate_answers(model, items, None, None, max_new_tokens, progress)
    claims = claims_of(items, [answer.text for answer in answers])
    claims = [c for c in claims if c.correct is not None and not c.noun and c.text.strip()]
    prompts = (model.encode(claim_inputs(model, claim)) for claim in claims)
    return sweep_layers(model, prompts, [c.correct for c in claims], progress=progress)


def fingerprint(model: Any) -> str:
    """Tells weights apart: names, shapes and dtypes, and of each its sum and some of its entries (offloaded ones aside)."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not weight.is_meta:
            flat = weight.detach().flatten()
            some = flat[:: max(1, len(flat) // 64)].double().cpu().numpy()
            digest.update(flat.sum(dtype=torch.float64).cpu().numpy().tobytes() + some.tobytes())
    return digest.hexdigest()[:16]


def read_judgements(file: str | Path) -> dict[str, bool]:
    """A judge's verdicts: JSON lines {"id": "…", "correct": true}.

    Raises:
        ValueError: no such file, or a line that is not like this (it is named).
    """
    file, found = Path(file), {}
    if not file.is_file():
        raise ValueError(f'{file} is not a file: expected JSON lines {{"id": "…", "correct": true}}.')
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error.msg}).") from error
        if not isinstance(row, dict) or "id" not in row or not isinstance(row.get("correct"), bool):
            raise ValueError(f'{file}, line {number}: expected {{"id": "…", "correct": true or false}}.')
        if str(row["id"]) in found:
            raise ValueError(f"{file}, line {number}: {row['id']} is judged twice.")
        found[str(row["id"])] = row["correct"]
    return found


# ---- inside ------------------------------------------------------------------------------------------


def _begins_as_read(answer: str) -> bool:
    """Whether an answer begins with yes or no and is read as that ("Yes, there is no dog" is not)."""
    said = _SAYS.match(answer)
    return said is not None and said[1].lower() == parse_yes_no(answer.replace("NO", "No"))


def _answer(model: Any, inputs: Any, max_new_tokens: int) -> dict[str, Any]:
    """The answer's text; whether it was cut at the limit, and whether its text has other tokens than were generated."""
    done = model.generate(inputs, max_new_tokens=max_new_tokens, do_sample=False, return_type="inputs", verbose=False)
    ids = done.tokens[0, inputs.shape[1] :].tolist()
    ends = set(model.cfg.special.eos)
    ended = bool(ids) and ids[-1] in ends
    ids = [i for i in ids if i not in ends]
    text = model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    same = model.tokenizer(text.strip(), add_special_tokens=False)["input_ids"] == ids
    return {"answer": text, "cut": not ended, "other_tokens": not same}


def _mention_claims(item: Question, caption: str, vocabulary: Mapping[str, str] | None) -> list[Claim]:
    if vocabulary is None:
        raise ValueError("captions need a vocabulary of objects: benchmarks.read_synonyms(file).")
    there = {vocabulary.get(name.lower(), name.lower()) for name in item.truth}
    return [
        Claim(f"{item.id}#{m.start}", item, caption, m.object in there, (m.start, m.end))
        for m in mentions(caption, vocabulary)
    ]


def _scores(model: Any, claim: Claim, methods: Sequence[str], other: Any, scorer: Scorer) -> dict[str, Any]:
    if not claim.text.strip():
        return {"error": "the answer is empty"}
    names = [name for name in methods if name != CONTROL or other is not None]
    try:
        inputs = claim_inputs(model, claim)
        control = claim_inputs(model, claim, other) if other is not None else None
        found = scorer(model, inputs, names=names, noun=claim.noun or None, other=control)
    except ValueError as error:
        return {"error": str(error)}
    return {**found, "error": ""}


def _row(claim: Claim, scores: Mapping[str, Any], methods: Sequence[str]) -> dict[str, Any]:
    return {
        "key": claim.key,
        "id": claim.item.id,
        "category": claim.item.category or "none",
        "question": claim.item.question,
        "gold": claim.item.answer,
        "answer": claim.text if claim.mention is None else claim.text[slice(*claim.mention)],
        "correct": claim.correct,
        "judge": claim.item.judge,
        "said": claim.said,
        "noun": claim.noun,
        "error": scores["error"],
        **{name: float("nan") if scores.get(name) is None else float(scores[name]) for name in methods},
    }


def _other_pictures(items: Sequence[Question]) -> list[tuple[Any, ...] | None]:
    """For each item the pictures of the nearest item before it whose pictures differ, else after it; None without any.

    Looking back first keeps them the same when a run is made longer.
    """
    prints = [_pictures_print(item) for item in items]
    later: list[int | None] = [None] * len(items)
    for at in range(len(items) - 2, -1, -1):
        later[at] = at + 1 if prints[at + 1] != prints[at] else later[at + 1]
    earlier: list[int | None] = []
    for at in range(len(items)):
        last = at - 1
        earlier.append(None if last < 0 else last if prints[last] != prints[at] else earlier[last])
    chosen = [back if back is not None else ahead for back, ahead in zip(earlier, later)]
    return [None if at is None else items[at].images for at in chosen]


def _stamp(item: Question, *more: Any) -> str:
    """Says whether a question, its pictures or more is what it was."""
    return hashlib.sha256(repr((item.question, _pictures_print(item), more)).encode()).hexdigest()[:16]


def _pictures_print(item: Question) -> str:
    digest = hashlib.sha256()
    for image in item.images:
        if isinstance(image, Image.Image):
            digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        elif isinstance(image, (str, Path)):
            status = os.stat(image)
            digest.update(_file_print(str(image), status.st_mtime_ns, status.st_size))
        else:
            digest.update(np.asarray(image).tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=100_000)
def _file_print(path: str, changed: int, size: int) -> bytes:
    """Of a file's content, read once: benchmarks ask many questions about one picture."""
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _interval_text(row: pd.Series, figure: str) -> str:
    if np.isnan(row[figure]):
        return "–"
    if np.isnan(row[f"{figure}_low"]):
        return f"{row[figure]:.2f} [–]"
    return f"{row[figure]:.2f} [{row[f'{figure}_low']:.2f}, {row[f'{figure}_high']:.2f}]"
