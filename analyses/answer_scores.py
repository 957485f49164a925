"""Scores that estimate whether an answer is right: `score(model, inputs, row=0) -> float`, higher = more likely correct.

1. Run the prompt with its teacher-forced answer once; keep the residual stream and the attention to the image.
2. Compute every score from that run. blind_difference and contextual_control need a second run, with another image.

`inputs` may also be an `Evidence`, which holds the run of step 1, so that several scores share it. `all_scores` does this.

    probability            p(answer), the product over its tokens
    mean_log_prob          mean log-probability of its tokens, nats
    neg_entropy            −mean entropy of the distributions that predict its tokens, nats
    internal_confidence    max over layers and image tokens of the logit lens's p(token)  (Jiang et al., arXiv 2410.02762)
    blind_difference       p(answer | image) − p(answer | blank image)
    attention_on_image     attention from the positions that predict the answer to the image, mean over layers and heads
    contextual             the contextual lens (`analyses.contextual_lens`)
    contextual_control     the contextual lens with another image: a control for what the text alone gives
    neg_flips              −F of the answer's first token (`analyses.trajectory`)
    neg_stability          −S / L of the answer's first token
    neg_doubt              −(largest probability of another top-1 word after the answer entered the top five)
    neg_overthinking       −the Overthinking Score (arXiv 2603.07619)

For a yes/no question, `Evidence(…, noun="dog")` makes internal_confidence, contextual and contextual_control look for the noun in
the image instead of the answer; the score is negated if the answer is no.
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
    """One answer and the activations that the scores need; each is computed once, when first used.

    Attributes:
        model, inputs, row: as for the scores; the inputs have a teacher-forced answer.
        noun: for a yes/no question, the noun that it asks about.
        other: the same question and answer with another image (one row), for the control.
        image_layer, text_layer: of the contextual lens; None: its defaults.
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
        """The row as a batch of one, with its image encoded."""
        return self.model.encode(self.inputs.row(self.row))

    @cached_property
    def answer(self) -> list[int]:
        """Positions of the answer's tokens, without its end tokens.

        Raises:
            ValueError: there is no answer, or no position before it that predicts its first token.
        """
        self.item.positions("last")
        return span_positions(self.model, self.item, "answer", 0)

    @cached_property
    def answer_ids(self) -> Int[Tensor, "token"]:
        return self.item.tokens[0, self.answer].cpu()

    @cached_property
    def subject(self) -> tuple[list[int], int]:
        """(positions of the tokens to look for in the image, sign of the score): the answer, or the noun of a yes/no question."""
        return (self.answer, 1) if self.noun is None else yes_no_subject(self.model, self.item, self.noun)

    @property
    def stack(self) -> Float[Tensor, "layer pos d_model"]:
        """The residual stream at layers 0..L, before the final norm."""
        return self._run[0]

    @property
    def image_attention(self) -> Float[Tensor, "layer head token"]:
        """Attention to the whole image from the position that predicts each answer token, in [0, 1]."""
        return self._run[1]

    @cached_property
    def lens(self) -> dict[str, Tensor]:
        """The logit lens at the position that predicts each answer token, [layer token] each.

        `top1` (token id), `top1_prob`, `entropy` (nats), and `rank` of the answer token, where 0 is the top.
        """
        vectors = self.stack[:, [p - 1 for p in self.answer]]
        targets = self.answer_ids.repeat(len(vectors))[:, None]
        read = predictions_of(self.model, vectors.flatten(0, 1), targets, top_k=1)
        flat = {"top1": read.ids[:, 0], "top1_prob": read.probs[:, 0], "entropy": read.entropy, "rank": read.target_ranks[:, 0]}
        return {name: values.unflatten(0, vectors.shape[:2]) for name, values in flat.items()}

    @cached_property
    def token_log_probs(self) -> Float[Tensor, "token"]:
        """The model's log-probability of each answer token, nats."""
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
    """Decorator: gives a function of an `Evidence` the signature of a score and adds it to SCORES."""

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
        names: of SCORES; None: all, but contextual_control only if `other` is given.
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
    """−mean entropy (nats) of the distributions that predict the answer's tokens: high when the model is sure."""
    return -float(evidence.lens["entropy"][-1].mean())


@_score
def blind_difference(evidence: Evidence) -> float:
    """p(answer | image) − p(answer | blank image), in [-1, 1]: high when the answer comes from the image.

    In the blank image every pixel is the mean colour that the processor subtracts (our choice; see `blank_image`).
    """
    blind = replace(evidence, inputs=blank_image(evidence.item), row=0)
    return probability(evidence.model, evidence) - probability(blind.model, blind)


# ---- inside ------------------------------------------------------------------------------------------


@_score
def internal_confidence(evidence: Evidence) -> float:
    """Max over layers 0..L and image tokens of the logit lens's p(token), mean over the answer's tokens (our choice); in [0, 1].

    With a noun: for the noun's tokens, and negated if the answer is no; then in [-1, 1].
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
    """`contextual` of the same question and answer with another image: a control, which shows what the text alone gives.

    The other image comes from `Evidence(…, other=model.to_inputs(question, images=[another], answers=answer))`, or else from the
    next row of the batch that has another image with the same grid.

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
    """−F: minus the number of changes of the top-1 token from layer to layer, where the answer's first token is predicted."""
    return -float(len(flips(_top1(evidence, 0))))


@_score
def neg_stability(evidence: Evidence) -> float:
    """−S / L, in [-1, 0]: S is the first layer from which on the top-1 token is the final one; high when the model decides early."""
    return -stability(_top1(evidence, 0)) / evidence.model.cfg.n_layers


@_score
def neg_doubt(evidence: Evidence) -> float:
    """−doubt (our definition), in [-1, 0]; the right answer need not be known.

    Doubt is the largest probability of a top-1 token that is another word than the answer's first token, over the layers from
    B_5 to L − 1; words that differ only in case or space are the same. B_5 is the first layer at which the answer's first token is
    among the top five. Doubt is 0 if no other word is top-1, and 1 if the answer is never among the top five.
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
    """−the Overthinking Score in nats, at most 0; mean over the answer's tokens (our choice: the paper scores single tokens).

    (mean over l = 1..L of the lens's entropy H_l) · (number of different top-1 tokens at l = 1..L) / L, at the position
    that predicts the token. Source: Shoby et al., Overthinking Causes Hallucination, arXiv 2603.07619; the formula is
    taken from the authors' code (`compute_overthinking`), which leaves out layer 0.
    """
    n_layers = evidence.model.cfg.n_layers
    entropy = evidence.lens["entropy"][1:].mean(0)
    hypotheses = [len(set(_top1(evidence, token)[1:])) for token in range(len(evidence.answer))]
    return -float((entropy * torch.tensor(hypotheses)).mean()) / n_layers


# ---- other images -------------------------------------------------------------------------------------


def blank_image(inputs: Any, noise: bool = False, seed: int = 0) -> Any:
    """The same prompts with blank images: every pixel the processor's mean colour, or with noise=True normal noise with the
    processor's mean and standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(inputs.pixels.shape, generator=generator) if noise else torch.zeros(inputs.pixels.shape)
    return replace(inputs, pixels=pixels.to(inputs.pixels), image_embeds=None, deepstack_embeds=None, encoded_by=None)


def with_images(inputs: Any, donor: Any) -> Any:
    """The same prompts with the images of `donor`, which must have the same grids in the same order.

    Raises:
        ValueError: other grids; then build the prompt with `model.to_inputs` and the other image.
    """
    ours, theirs = [v.grid for v in inputs.visuals], [v.grid for v in donor.visuals]
    if ours != theirs:
        raise ValueError(f"the prompt's images have grids {ours}, the donor's {theirs}: use model.to_inputs with the other image.")
    return replace(inputs, pixels=donor.pixels.to(inputs.pixels), image_embeds=None, deepstack_embeds=None, encoded_by=None)


def _next_images(evidence: Evidence) -> Any:
    """The next row of the batch, cyclically, that has different images with the same grids."""
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
