"""Do the methods find what was planted? The check that comes before a negative result is believed.

Mechanisms are planted in the embedded model (`hooked_qwen2vl.scenes.planted`) at three strengths and with three seeds each. For every
variant:

1. What the mechanism does: accuracy on the questions it acts on and on others, with and without it.
2. Recovery: the share of the planted neurons or heads among as many (or, of MMNeuron's selection, as many as it selects) found by each
   method, next to random choices of the same size: their mean, and their 97.5th percentile over 1,000 draws.
     domain neurons   MMNeuron's selection by firing (`select_neurons`), over all tokens and over text tokens; first-order effect
                      (`ablation_effects`)
     color prior      first-order effect on questions about shapes in another than their typical colour
     copying head     zero ablation of every head; direct attribution to the logit difference between copied and right answer
3. For the color prior also the AUROC of every answer score for right and wrong answers to colour questions.

Source: ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from analyses.answer_scores import SCORES
from analyses.common.models import describe_model
from analyses.common.result import Result
from analyses.common.statistics import detection
from analyses.data.benchmarks import EXACT, Question
from analyses.data.examples import Example
from analyses.domain_neurons import count_firings, disable_neurons
from analyses.experiments.ablation import Ablation, answer_log_probs, every_part
from analyses.experiments.hallucination import detect_hallucinations
from analyses.experiments.neurons import ablation_effects
from hooked_qwen2vl.files import whole_file
from hooked_qwen2vl.protocols import Model
from hooked_qwen2vl.scenes import sample
from hooked_qwen2vl.scenes.planted import Planted, color_in, color_prior, copying_head, domain_neurons
from hooked_qwen2vl.scenes.scene import typical_color
from hooked_qwen2vl.scenes.words import DOMAINS, SHAPES

STRENGTHS = (0.25, 0.5, 1.0)
_DRAWS = 1000
_BATCH = 32


@dataclass(frozen=True)
class Recovery(Result):
    """What was planted, what it does, and what found it.

    Attributes:
        found: one row per variant and method: what, seed, strength, method, planted (how many units), chosen (how many the method
            named), recovered (share of the planted among them), random and random_high (share in random choices of the same size: mean
            and 97.5th percentile).
        behavior: one row per variant, group of questions and condition: what, seed, strength, questions, condition, items, accuracy,
            and copied (share of the answers that are the planted one; NaN for domain neurons).
        scores: one row per variant of the color prior and answer score: seed, strength, method, auroc with its 95 % interval over
            images, items, hallucinated.
        model_name, weights: of the model before anything was planted.
    """

    found: pd.DataFrame
    behavior: pd.DataFrame
    scores: pd.DataFrame
    model_name: str
    weights: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per mechanism, strength and method: recovered, random and random_high, means over the seeds, and the smallest recovered."""
        groups = self.found.groupby(["what", "strength", "method"], sort=False)
        means = groups[["planted", "chosen", "recovered", "random", "random_high"]].mean()
        return means.assign(least=groups["recovered"].min(), seeds=groups.size()).reset_index()

    def plot(self, path: Any = None) -> Any:
        """The share found by each method, by strength, next to random choices."""
        from analyses.views.planted import recovery_plot

        return recovery_plot(self, path)


def run(
    model: Model, seeds: Sequence[int] = (0, 1, 2), strengths: Sequence[float] = STRENGTHS, n: int = 100, progress: bool = True
) -> Recovery:
    """Plants every mechanism with every seed and strength, in place and undone afterwards, and looks for it.

    Args:
        n: questions of each kind, of the test split; selections use as many of the training split.
    """
    weights = describe_model(model)["weights"]
    found: list[dict] = []
    behavior: list[dict] = []
    scores: list[dict] = []
    bar = tqdm(total=3 * len(seeds) * len(strengths), unit="variant", disable=not progress)
    for seed in seeds:
        variants = (
            (domain_neurons(model, str(DOMAINS[seed % len(DOMAINS)]), seed), _neurons_of_a_domain),
            (color_prior(model, seed), _neurons_of_the_prior),
            (copying_head(model, seed), _head_that_copies),
        )
        for planted, look in variants:
            for strength in strengths:
                variant = planted.at(strength)
                about = {"what": planted.what, "seed": seed, "strength": strength}
                for kind, row in look(model, variant, n):
                    {"found": found, "behavior": behavior, "scores": scores}[kind].append({**about, **row})
                bar.update()
    bar.close()
    return Recovery(pd.DataFrame(found), pd.DataFrame(behavior), pd.DataFrame(scores), str(model.cfg.model_name), weights)


Rows = Iterator[tuple[str, dict[str, Any]]]


def _neurons_of_a_domain(model: Model, planted: Planted, n: int) -> Rows:
    domain = planted.about[0]
    train, test = (_examples(_items(3 * n, seed=5, split=split)) for split in ("train", "test"))
    own = _examples(_items(n, seed=6, domain=domain))
    others = [example for example in test if example.domain != domain][:n]
    masks = {"planted": _mask(model, planted.neurons)}
    with planted.in_model(model):
        firings = count_firings(model, train, modules=["decoder"], progress=False)
        masks["by firing"] = firings.select().masks(domain)["decoder"]
        masks["by firing, text"] = firings.select(sources=["text"]).masks(domain)["decoder"]
        domains: list[str] = sorted(DOMAINS)
        effects = ablation_effects(model, train, domains, modules=["decoder"])
        assert effects is not None  # no rank was given
        at = domains.index(domain)
        harm = -(effects["decoder"][at] - effects["decoder"][[k for k in range(len(DOMAINS)) if k != at]].mean(0))
        masks["by effect"] = _largest(harm, len(planted.neurons))
        generator = torch.Generator().manual_seed(0)
        size = int(masks["by firing"].sum())
        masks["random"] = _largest(torch.rand(harm.shape, generator=generator, dtype=torch.float64), size)
        for name, questions in ((domain, own), ("other domains", others)):
            yield "behavior", _behavior(model, questions, name, "planted")
            for condition, mask in masks.items():
                with disable_neurons(model, {"decoder": mask}):
                    yield "behavior", _behavior(model, questions, name, f"planted, off: {condition}")
    for name, questions in ((domain, own), ("other domains", others)):
        yield "behavior", _behavior(model, questions, name, "before")
    for method in ("by firing", "by firing, text", "by effect"):
        yield "found", {"method": method, **_recovered(masks["planted"], masks[method])}


def _neurons_of_the_prior(model: Model, planted: Planted, n: int) -> Rows:
    asked = [
        item
        for item in _items(8 * n, seed=7, domain="shapes", category="attribute")
        if item.question in {f"What color is the {kind}?" for kind in SHAPES}
    ]
    groups = {
        "typical colour": [item for item in asked if item.typical][: 2 * n],
        "another colour": [item for item in asked if not item.typical][:n],
    }
    named = [
        replace(example, id=f"{group} {example.id}", domain=group, category=group)
        for group, items in groups.items()
        for example in _examples(items)
    ]
    writes = {example.id: str(typical_color(example.item.question.rstrip("?").split()[-1])) for example in named}
    for condition in ("before", "planted"):
        with planted.at(0.0 if condition == "before" else planted.strength).in_model(model):
            for group in groups:
                questions = [example for example in named if example.domain == group]
                yield "behavior", _behavior(model, questions, group, condition, writes)
    with planted.in_model(model):
        effects = ablation_effects(model, named, tuple(groups), modules=["decoder"])
        assert effects is not None  # no rank was given
        typical, other = effects["decoder"]
        mask = _mask(model, planted.neurons)
        yield "found", {"method": "by effect", **_recovered(mask, _largest(typical - other, len(planted.neurons)))}
        questions = [Question(**vars(example), benchmark="scenes", judge=EXACT) for example in named]
        claims = detect_hallucinations(model, questions, "colour questions", progress=False).judged
        for method in claims.columns.intersection(tuple(SCORES)):
            figures = detection(claims["correct"], claims[method], 1000, 0, 0.95, claims["image"])
            kept = ("auroc", "auroc_low", "auroc_high", "items", "hallucinated")
            yield "scores", {"method": method, **{name: figures[name] for name in kept}}


def _head_that_copies(model: Model, planted: Planted, n: int) -> Rows:
    asked = [item for item in _items(4 * n, seed=8, domain="shapes", category="existence") if color_in(item)][:n]
    questions = _examples(asked)
    copied = {example.id: str(color_in(example.item)) for example in questions}
    others = [example for example in _examples(_items(2 * n, seed=9)) if example.category != "existence"][:n]
    for condition in ("before", "planted"):
        with planted.at(0.0 if condition == "before" else planted.strength).in_model(model):
            yield "behavior", _behavior(model, questions, "a colour in the question", condition, copied)
            yield "behavior", _behavior(model, others, "other questions", condition)
    with planted.in_model(model):
        table = Ablation(model, every_part(model, "heads")).run(questions, batch_size=_BATCH, progress=False).table
        gains = table.assign(change=table["log_prob"] - table["base_log_prob"]).groupby("part")["change"].mean()
        ablated = torch.tensor([[gains[f"L{l}H{h}"] for h in range(model.cfg.n_heads)] for l in range(model.cfg.n_layers)])
        direct = torch.zeros_like(ablated)
        for example in questions:
            direct += _direct(model, example, copied[example.id]) / len(questions)
    mask = torch.zeros_like(ablated, dtype=torch.bool)
    mask[tuple(zip(*planted.heads))] = True
    for method, values in (("zero ablation", ablated), ("direct attribution", direct)):
        yield "found", {"method": method, **_recovered(mask, _largest(values, len(planted.heads)))}


@torch.no_grad()
def _direct(model: Model, example: Example, word: str) -> Tensor:
    """[layer head] what each head writes at the last position for the copied word against the right answer, in logits."""
    inputs = model.encode(model.to_inputs(example.question, images=list(example.images)))
    _, cache = model.run_with_cache(inputs)
    heads = cache.stack_head_results(pos_slice=-1)  # [layer · head, batch, d_model]
    heads = cache.apply_ln_to_stack(heads, layer=-1, pos_slice=-1)[:, 0].float()
    copied, right = (model.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (word, example.answer))
    return (heads @ (model.W_U[:, copied] - model.W_U[:, right]).float()).view(model.cfg.n_layers, model.cfg.n_heads).double()


@cache
def _items(n: int, **restrictions: Any) -> tuple[Any, ...]:
    """`sample`, drawn once for all variants."""
    return tuple(sample(n, **restrictions))


def _examples(items: Sequence[Any]) -> list[Example]:
    return [Example(str(number), i.question, i.answer, (i.image,), i.domain, i.category, i.candidates, i) for number, i in enumerate(items)]


def _mask(model: Model, neurons: Sequence[tuple[int, int]]) -> Bool[Tensor, "layer neuron"]:
    mask = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, dtype=torch.bool)
    mask[tuple(zip(*neurons))] = True
    return mask


def _largest(values: Tensor, n: int) -> Tensor:
    """A mask of the n largest."""
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.flatten().argsort(descending=True, stable=True)[:n]] = True
    return mask.view(values.shape)


def _recovered(planted: Tensor, chosen: Tensor) -> dict[str, float]:
    """How many of the planted are among those chosen, and among random ones, as many, of the same model."""
    n_planted, n_chosen = int(planted.sum()), int(chosen.sum())
    drawn = np.random.default_rng(0).hypergeometric(n_planted, planted.numel() - n_planted, n_chosen, _DRAWS) / n_planted
    return {
        "planted": n_planted,
        "chosen": n_chosen,
        "recovered": float((planted & chosen).sum()) / n_planted,
        "random": float(drawn.mean()),
        "random_high": float(np.percentile(drawn, 97.5)),
    }


@torch.no_grad()
def _behavior(
    model: Model, examples: Sequence[Example], name: str, condition: str, planted: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Share of answers of which every token is the top one after the right tokens before it (the end is not asked for), and of those
    that begin with the word that was planted."""
    right, copied = [], []
    for start in range(0, len(examples), _BATCH):
        some = examples[start : start + _BATCH]
        inputs = model.to_inputs([e.question for e in some], images=[list(e.images) for e in some], answers=[e.answer for e in some])
        inputs = model.encode(inputs)
        right += answer_log_probs(model, inputs)[1]
        if planted is not None:
            first = [int(inputs.positions("answer", row)[0]) - 1 for row in range(len(inputs))]
            logits = model(inputs)
            said = [model.tokenizer.decode([int(logits[row, at].argmax())]) for row, at in enumerate(first)]
            copied += [word == planted[e.id] for word, e in zip(said, some)]
    figures = {"accuracy": float(np.mean(right)), "copied": float(np.mean(copied)) if planted is not None else float("nan")}
    return {"questions": name, "condition": condition, "items": len(examples), **figures}


def as_markdown(result: Recovery) -> str:
    """The report: recovery, behaviour and scores, means over the seeds."""
    behavior = result.behavior.copy()
    behavior.loc[behavior["what"] == "domain neurons", "questions"] = behavior["questions"].where(
        behavior["questions"] == "other domains", "its domain"
    )
    keys = ["what", "strength", "questions", "condition"]
    behavior = behavior.groupby(keys, sort=False)[["accuracy", "copied"]].mean().reset_index()
    scores = result.scores.groupby(["strength", "method"], sort=False)[["auroc", "hallucinated", "items"]].mean().reset_index()
    scores = scores.pivot(index="method", columns="strength", values="auroc").reset_index()
    parts = [
        "# Planted mechanisms: what the methods find",
        f"Written by `python -m analyses.experiments.planted`; what is planted: `hooked_qwen2vl/scenes/planted.py`; how it is measured: "
        f"`analyses/experiments/planted.py`. Weights {result.weights}. Means over {result.found['seed'].nunique()} seeds.",
        "## Recovery",
        "The share of the planted neurons or heads among those that a method names (`chosen` of them), and in random choices of the same "
        "size (mean, and 97.5th percentile). `least`: of the seeds.",
        _table(result.to_dataframe()),
        "## What they do",
        "Accuracy of answers, teacher-forced and without their end; `copied`: answers that begin with the planted word (the typical colour, or the colour in the question).",
        _table(behavior),
        "## Which scores tell the prior's wrong answers",
        "AUROC for right against wrong answers to colour questions, by strength of the prior.",
        _table(scores),
    ]
    return "\n\n".join(parts) + "\n"


def _table(table: pd.DataFrame) -> str:
    def text(value: Any) -> str:
        return "" if value != value else f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(text(value) for value in line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--n", type=int, default=100, help="questions of each kind (default 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", type=Path, help="also write the tables as Markdown to this file")
    options = parser.parse_args(arguments)
    from hooked_qwen2vl import HookedQwen2VL

    report = as_markdown(run(HookedQwen2VL.from_pretrained("scenes"), options.seeds, n=options.n))
    if options.report is not None:
        with whole_file(options.report) as file:
            file.write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
