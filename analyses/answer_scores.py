"""Rival scores for "is this answer right?", each `score(model, inputs, row=0) -> float`, higher = more likely correct.

1. Run the prompt with its teacher-forced answer once; keep the residual stream and the attention mass on the image.
2. Every score reads that run; the blind one and the control need a run of their own, with another image.

`inputs` may be the `Evidence` of step 1: then scores share it. `all_scores` does so.

    probability            p(answer), the product over its tokens
    mean_log_prob          mean log-probability of its tokens, nats
    neg_entropy            −mean entropy of the distributions that its tokens were taken from, nats
    internal_confidence    max over layers and image tokens of the logit lens's p(token)  (Jiang et al., arXiv 2410.02762)
    blind_difference       p(answer | image) − p(answer | blank image)
    attention_on_image     attention from where the answer is predicted to the image, mean over layers and heads
    contextual             the contextual lens (`analyses.contextual_lens`)
    contextual_control     the contextual lens with another image: what the words alone give
    neg_flips              −F of the answer's first token (`analyses.trajectory`)
    neg_stability          −S / L of it
    neg_doubt              −(how probable another word was, on top, once the answer was among the top five)
    neg_overthinking       −the Overthinking Score (arXiv 2603.07619)

For a yes/no question `Evidence(…, noun="dog")` makes the scores that look for something in the image (internal_confidence,
contextual, contextual_control) look for the noun, with the sign flipped when the answer is no.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.common.attention import attention_patterns
from analyses.common.vocabulary import predictions_of
from analyses.contextual_lens import contextual_score, span_positions, yes_no_subject
from analyses.logit_lens import residual_stack
from analyses.trajectory import flips, same_word, stability
from hooked_qwen2vl.protocols import Model


@dataclass(frozen=True)
class Evidence:
    """One answer, and what the scores read; each part is computed once, when first asked for.

    Attributes:
        model, inputs, row: as the scores take them; the inputs carry a teacher-forced answer.
        noun: for a yes/no question, what it asks for.
        other: the same question and answer with another image (one row), for the control.
        image_layer, text_layer: of the contextual lens; None takes its defaults.
    """

    model: Model
    inputs: Any
    row: int = 0
    noun: str | None = None
    other: Any = None
    image_layer: int | None = None
    text_layer: int | None = None

    @cached_property
    def item(self) -> Any:
        """The row alone, its image encoded once."""
        return self.model.encode(self.inputs.row(self.row))

    @cached_property
    def answer(self) -> list[int]:
        """Positions of the answer's tokens, end tokens left out.

        Raises:
            ValueError: there is no answer, or nothing before it predicts its first token.
        """
        self.item.positions("last")
        return span_positions(self.model, self.item, "answer", 0)

    @cached_property
    def answer_ids(self) -> Int[Tensor, "token"]:
        return self.item.tokens[0, self.answer].cpu()

    @cached_property
    def subject(self) -> tuple[list[int], int]:
        """What is looked for in the image: its positions, and the sign of finding it."""
        return (self.answer, 1) if self.noun is None else yes_no_subject(self.model, self.item, self.noun)

    @property
    def stack(self) -> Float[Tensor, "layer pos d_model"]:
        """The residual stream at the layers 0..L."""
        return self._run[0]

    @property
    def image_attention(self) -> Float[Tensor, "layer head token"]:
        """Attention mass on the image from the position that predicts each answer token, in [0, 1]."""
        return self._run[1]

    @cached_property
    def lens(self) -> dict[str, Tensor]:
        """The lens where each answer token is predicted, [layer token]: `top1` (id), `top1_prob`, `entropy` (nats), and
        `rank` of the token itself, 0 the top."""
        vectors = self.stack[:, [p - 1 for p in self.answer]]
        targets = self.answer_ids.repeat(len(vectors))[:, None]
        read = predictions_of(self.model, vectors.flatten(0, 1), targets, top_k=1)
        flat = {"top1": read.ids[:, 0], "top1_prob": read.probs[:, 0], "entropy": read.entropy, "rank": read.target_ranks[:, 0]}
        return {name: values.unflatten(0, vectors.shape[:2]) for name, values in flat.items()}

    @cached_property
    def token_log_probs(self) -> Float[Tensor, "token"]:
        """The model's log-probability of each answer token, nats: the last layer."""
        vectors = self.stack[-1, [p - 1 for p in self.answer]]
        return predictions_of(self.model, vectors, self.answer_ids[:, None], top_k=1).target_log_probs[:, 0]

    @cached_property
    def _run(self) -> tuple[Tensor, Tensor]:
        image, before = self.item.positions("image"), torch.tensor([p - 1 for p in self.answer])

        def on_image(pattern: Float[Tensor, "batch head pos key_pos"]) -> Float[Tensor, "head token"]:
            return pattern[0][:, before][..., image].float().sum(-1).cpu()

        with torch.no_grad(), attention_patterns(self.model, on_image) as masses:
            stack, _ = residual_stack(self.model, self.item)
        return stack[:, 0].cpu(), torch.stack(list(masses.values()))


Score = Callable[..., float]
SCORES: dict[str, Score] = {}


def _score(function: Callable[[Evidence], float]) -> Score:
    """Gives a function of evidence the common signature, and its place in SCORES."""

    def score(model: Model, inputs: Any, row: int = 0) -> float:
        with torch.no_grad():
            return float(function(inputs if isinstance(inputs, Evidence) else Evidence(model, inputs, row))) + 0.0  # never −0.0

    score.__name__, score.__doc__ = function.__name__, function.__doc__
    SCORES[function.__name__] = score
    return score


def all_scores(
    model: Model,
    inputs: Any,
    row: int = 0,
    names: Iterable[str] | None = None,
    noun: str | None = None,
    other: Any = None,
    image_layer: int | None = None,
    text_layer: int | None = None,
) -> dict[str, float]:
    """Several scores of one answer from shared runs.

    Args:
        names: of SCORES; None takes all, the control only where `other` is given.
        noun, other, image_layer, text_layer: see `Evidence`.
    Raises:
        ValueError: an unknown name, no teacher-forced answer, or no image.
    """
    names = [n for n in SCORES if other is not None or n != "contextual_control"] if names is None else list(names)
    if unknown := [name for name in names if name not in SCORES]:
        raise ValueError(f"unknown scores {', '.join(unknown)}; there are {', '.join(SCORES)}.")
    evidence = Evidence(model, inputs, row, noun, other, image_layer, text_layer)
    return {name: SCORES[name](model, evidence) for name in names}


# ---- the output --------------------------------------------------------------------------------------


@_score
def probability(evidence: Evidence) -> float:
    """p(answer), in [0, 1]: the product over its tokens."""
    return float(evidence.token_log_probs.double().sum().exp())


@_score
def mean_log_prob(evidence: Evidence) -> float:
    """Mean log-probability of the answer's tokens, nats, at most 0."""
    return float(evidence.token_log_probs.double().mean())


@_score
def neg_entropy(evidence: Evidence) -> float:
    """−mean entropy (nats) of the distributions that the answer's tokens were taken from: high when the model is sure."""
    return -float(evidence.lens["entropy"][-1].mean())


@_score
def blind_difference(evidence: Evidence) -> float:
    """p(answer | image) − p(answer | blank image), in [-1, 1]: high when the answer comes from the image.

    Blank: every pixel the mean colour that the processor subtracts (ours; `blank_image` also gives noise).
    """
    blind = replace(evidence, inputs=blank_image(evidence.item), row=0)
    return probability(evidence.model, evidence) - probability(blind.model, blind)


# ---- inside ------------------------------------------------------------------------------------------


@_score
def internal_confidence(evidence: Evidence) -> float:
    """Max over layers 0..L and image tokens of the logit lens's p(token), mean over the answer's tokens (ours); in [0, 1].

    With a noun: of the noun's tokens, the sign flipped when the answer is no; then in [-1, 1].
    """
    positions, sign = evidence.subject
    vectors = evidence.stack[:, evidence.item.positions("image")].flatten(0, 1)
    targets = evidence.item.tokens[0, positions].cpu().expand(len(vectors), -1)
    return sign * float(predictions_of(evidence.model, vectors, targets, top_k=1).target_probs.amax(0).mean())


@_score
def attention_on_image(evidence: Evidence) -> float:
    """Attention from the positions that predict the answer to the image, mean over layers, heads and tokens; in [0, 1]."""
    return float(evidence.image_attention.double().mean())


@_score
def contextual(evidence: Evidence) -> float:
    """The contextual lens: cosine of the answer (or noun, see `Evidence`) with the closest image token, in [-1, 1]."""
    return _contextual(evidence, evidence.item, evidence.stack)


@_score
def contextual_control(evidence: Evidence) -> float:
    """`contextual` of the same question and answer with another image: a score that ignores the image does as well here.

    Takes `Evidence(…, other=model.to_inputs(question, images=[another], answers=answer))`, or the image of the batch's
    next row with the same grid.

    Raises:
        ValueError: there is no other image.
    """
    other = evidence.other
    if other is None:
        other = with_images(evidence.item, _next_images(evidence))
    return _contextual(evidence, other, None)


# ---- the trajectory's figures -------------------------------------------------------------------------


@_score
def neg_flips(evidence: Evidence) -> float:
    """−F: how often the top-1 changes from layer to layer, where the answer's first token is predicted."""
    return -float(len(flips(_top1(evidence, 0))))


@_score
def neg_stability(evidence: Evidence) -> float:
    """−S / L, in [-1, 0]: S is the layer from which the top-1 is the final one; high when the model settles early."""
    return -stability(_top1(evidence, 0)) / evidence.model.cfg.n_layers


@_score
def neg_doubt(evidence: Evidence) -> float:
    """−doubt (ours), in [-1, 0]: a rival word that was held, then lost, without knowing the right answer.

    From B_5, the layer at which the answer's first token is first among the top five, to L − 1: the largest probability
    of a top-1 that is another word (other than in case or space). 0 where there is none, 1 where the answer is never
    among the top five.
    """
    first = {name: values[:, 0].tolist() for name, values in evidence.lens.items()}
    born = next((l for l, rank in enumerate(first["rank"]) if rank < 5), None)
    if born is None:
        return -1.0
    own = int(evidence.answer_ids[0])
    answer = _decode(evidence.model, own)
    until = len(first["rank"]) - 1
    held = zip(first["top1"][born:until], first["top1_prob"][born:until])
    others = (prob for top, prob in held if top != own and not same_word(_decode(evidence.model, top), answer))
    return -max(others, default=0.0)


@_score
def neg_overthinking(evidence: Evidence) -> float:
    """−the Overthinking Score, at most 0, nats; mean over the answer's tokens (ours: the paper scores single tokens).

    (mean over l = 1..L of the lens's entropy H_l) · (number of different top-1 tokens at l = 1..L) / L, at the position
    that predicts the token. Source: Shoby et al., Overthinking Causes Hallucination, arXiv 2603.07619; the formula is
    that of the authors' code (`compute_overthinking`), which leaves out layer 0.
    """
    n_layers = evidence.model.cfg.n_layers
    entropy = evidence.lens["entropy"][1:].mean(0)
    hypotheses = [len(set(_top1(evidence, token)[1:])) for token in range(len(evidence.answer))]
    return -float((entropy * torch.tensor(hypotheses)).mean()) / n_layers


# ---- other images -------------------------------------------------------------------------------------


def blank_image(inputs: Any, noise: bool = False, seed: int = 0) -> Any:
    """The same prompts with nothing to see: every pixel the mean colour, or (noise=True) normal noise of its spread."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(inputs.pixels.shape, generator=generator) if noise else torch.zeros(inputs.pixels.shape)
    return replace(inputs, pixels=pixels.to(inputs.pixels), image_embeds=None, deepstack_embeds=None, encoded_by=None)


def with_images(inputs: Any, donor: Any) -> Any:
    """The same prompts with the images of `donor`, which has the same grids in the same order.

    Raises:
        ValueError: other grids: build the prompt with `model.to_inputs` and the other image.
    """
    ours, theirs = [v.grid for v in inputs.visuals], [v.grid for v in donor.visuals]
    if ours != theirs:
        raise ValueError(f"the prompt's images have grids {ours}, the donor's {theirs}: use model.to_inputs with the other image.")
    return replace(inputs, pixels=donor.pixels.to(inputs.pixels), image_embeds=None, deepstack_embeds=None, encoded_by=None)


def _next_images(evidence: Evidence) -> Any:
    """The next row of the batch, cyclically, whose images have the same grids and are others."""
    batch = evidence.inputs
    grids = [visual.grid for visual in evidence.item.visuals]
    for step in range(1, len(batch)):
        donor = batch[(evidence.row + step) % len(batch)]
        if [visual.grid for visual in donor.visuals] == grids and not torch.equal(donor.pixels, evidence.item.pixels):
            return donor
    raise ValueError(
        "the control needs another image: Evidence(model, inputs, other=model.to_inputs(question, images=[another], "
        "answers=answer)), or a batch in which another row has an image of the same grid."
    )


def _contextual(evidence: Evidence, item: Any, stack: Tensor | None) -> float:
    if evidence.noun is None:
        positions, sign = span_positions(evidence.model, item, "answer", 0), 1
    else:
        positions, sign = yes_no_subject(evidence.model, item, evidence.noun)
    layers = evidence.image_layer, evidence.text_layer
    return sign * contextual_score(evidence.model, item, 0, *layers, positions, stack).score


def _top1(evidence: Evidence, token: int) -> list[int]:
    return evidence.lens["top1"][:, token].tolist()


def _decode(model: Model, token: int) -> str:
    return model.tokenizer.decode([token])
