"""Answer trajectories: when does the answer appear in the residual stream, does it stay, where does it flip?

For one position, z_l = W_U · norm(h_l) for the layers l = 0..L (h_0 the embedding, h_L after the last block),
read as the logit lens reads them (`common.vocabulary`: W_U in float32); p_l = softmax(z_l). Natural logarithms.

1. A is the set of the answer's first tokens: one for each variant {as given, lower, Capitalised} × {with, without a leading
   space}, without blank tokens and tokens that are parts of characters. Ids that another candidate shares are dropped and
   counted. If a variant has several tokens, only its first is followed (`first_token_only` and `label` say so).
2. Birth: B_k = min{l : best rank of A < k}, k = 1, 5; B_half = min{l : Σ_A p_l ≥ 0.5}; None if never.
3. Stages of confidence: "none" before B_5, "guess" from B_5, "sure" from B_half.
4. Stability S = min{l : every layer from l on has the same top-1 as layer L} (prediction depth, Baldock et al. 2021).
5. Flips: layers l ≥ 1 whose top-1 differs from that of l−1. A *form* flip changes only the case or the spaces of the
   word, a *content* flip changes the word.
6. Outcome. If the model is right: straight (A stays top-1 once it is) or wavered. If it is wrong: held then lost (doubt:
   A was top-1 at some layer), settled early (S ≤ L/2) or settled late. Doubt is compared with a control: how often one
   candidate drawn at random, neither the answer nor what the model says, is held then lost.
7. Last-layer shift: KL(p_L‖p_{L−1}), JS, total variation and its split. The double-norm control repeats this with the final
   norm applied twice, as in notebooks that norm HF's last hidden state, which is already normed. On folded weights it
   needs the norm weight that was folded in; if that was not kept, the control is not reported.
8. The whole answer: log p(answer) at layer l is the sum over its tokens, spelt as given, each read at its own position
   with the tokens before it in the prompt (teacher-forced).

z_L is the model's own prediction, read in float32. A half-precision model computes its logits in its own precision, where
tokens can tie or swap ranks: `differs_from_model` says whether its top-1 is another token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.common.prompts import Prompt, TextPrompt, as_prompt
from analyses.common.result import Result
from analyses.common.vocabulary import final_norm, logits_of, predictions_of
from analyses.logit_lens import residual_at
from hooked_qwen2vl import Inputs
from hooked_qwen2vl.geometry import Place
from hooked_qwen2vl.prompt_text import text_ids
from hooked_qwen2vl.protocols import Model

SURE = 0.5
DOUBT = "held then lost"
OUTCOMES = ("straight", "wavered", DOUBT, "settled early", "settled late")
ROUNDING = 1e-12  # nats: no more than rounding, in float64
UNCLASSED = 1e-6  # total variation that may stay unclassified: it is spread over thousands of tokens
# Function words, which describe nothing in an image; used to split the last layer's shift.
FUNCTION_WORDS = frozenset(
    "a an the is are was were be been it its this that these those there here of in on at to for from by with and or "
    "not no yes as so".split()
)


@dataclass(frozen=True)
class Trajectory(Result):
    """What the logit lens says of one answer at every layer, at one position.

    Attributes:
        answer: the answer followed, as given. question: the question asked, if known.
        answer_ids: A, the answer's first tokens. dropped: how many more were shared with another candidate.
        top1: [layer] id of the most probable token. top1_tokens: their text.
        answer_prob: [layer] Σ_A p. answer_rank: [layer] how many tokens have a larger logit than the best of A.
        rival: text of the token outside A that is most probable at layer L. rival_prob: [layer] its probability.
        margin: [layer] max_A z − max_{not A} z, in logits: positive iff the top-1 is in A, 0 where the two tie.
        entropy: [layer] nats. input_rank: [layer] rank of the position's own input token.
        candidates_top: [layer] index of the most probable candidate, -1 without candidates.
        last_shift, double_norm_shift: see `shift_of_logits`; the latter is NaN if `no_double_norm` gives a reason.
        d_vocab: size of the vocabulary. model_name: of the model.
        rest: log-probabilities of the answer's tokens after its first, at layer L, nats.
        answer_tokens: text of answer_ids.
        token_log_probs: [layer token] log-probabilities of the whole answer's tokens, spelt as given, teacher-forced, nats. NaN
            if no answer can follow the position (image tokens come after it); None if they were not computed.
        model_top1: id of the token that the model's own logits put first; None if not known. model_top1_token: its text.
        control: the candidate drawn as a control for doubt, "" if none is left. control_ids: its first tokens.
        no_double_norm: why there is no double-norm control; "" if there is one.
    """

    question: str
    answer: str
    answer_ids: tuple[int, ...]
    dropped: int
    top1: Int[Tensor, "layer"]
    top1_tokens: tuple[str, ...]
    answer_prob: Float[Tensor, "layer"]
    answer_rank: Int[Tensor, "layer"]
    rival: str
    rival_prob: Float[Tensor, "layer"]
    margin: Float[Tensor, "layer"]
    entropy: Float[Tensor, "layer"]
    input_rank: Int[Tensor, "layer"]
    candidates: tuple[str, ...]
    candidates_top: Int[Tensor, "layer"]
    last_shift: dict[str, float]
    double_norm_shift: dict[str, float]
    d_vocab: int
    model_name: str
    category: str = ""
    rest: tuple[float, ...] = field(default=())
    answer_tokens: tuple[str, ...] = ()
    token_log_probs: Float[Tensor, "layer token"] | None = None
    model_top1: int | None = None
    model_top1_token: str = ""
    control: str = ""
    control_ids: tuple[int, ...] = ()
    no_double_norm: str = ""

    @property
    def n_layers(self) -> int:
        """L: layers run from 0 to L."""
        return len(self.top1) - 1

    @property
    def first_token_only(self) -> bool:
        """Whether no token of A spells the whole answer: then all figures but the log-probabilities describe its first token only."""
        return bool(self.answer and self.answer_tokens) and not any(same_word(t, self.answer) for t in self.answer_tokens)

    @property
    def label(self) -> str:
        """What is followed, for legends and tables: the answer, or its first tokens where variants have several."""
        starts = dict.fromkeys(token.strip() for token in self.answer_tokens if not same_word(token, self.answer))
        if not (self.answer and starts):
            return self.answer
        named = ", ".join(starts)
        return f"first token {named} of {self.answer}" if self.first_token_only else f"{self.answer} or first token {named}"

    @property
    def answer_log_prob(self) -> Float[Tensor, "layer"]:
        """[layer] log-probability of the whole answer, spelt as given, nats; NaN if it was not computed."""
        return torch.full((len(self.top1),), torch.nan) if self.token_log_probs is None else self.token_log_probs.sum(-1)

    @property
    def differs_from_model(self) -> bool:
        """Whether layer L, read in float32, puts another token first than the model's own logits."""
        return self.model_top1 is not None and int(self.top1[-1]) != self.model_top1

    def birth(self, k: int = 1) -> int | None:
        """B_k: first layer at which A is among the k most probable tokens."""
        return _first(self.answer_rank < k)

    @property
    def birth_sure(self) -> int | None:
        """B_half: first layer at which the probability of A is at least one half."""
        return _first(self.answer_prob >= SURE)

    @property
    def stability(self) -> int:
        """S: first layer from which the top-1 no longer changes."""
        return stability(self.top1.tolist())

    @property
    def flips(self) -> list[int]:
        """Layers whose top-1 differs from the layer before."""
        return flips(self.top1.tolist())

    @property
    def content_flips(self) -> list[int]:
        """Flips that change the word, not only its case or spaces."""
        return [l for l in self.flips if not same_word(self.top1_tokens[l], self.top1_tokens[l - 1])]

    @property
    def candidate_flips(self) -> list[int]:
        """Layers whose most probable candidate differs from the layer before."""
        return flips(self.candidates_top.tolist()) if self.candidates else []

    @property
    def eligible_flips(self) -> list[int]:
        """Content flips from one candidate to another, at B_5 or later."""
        words = {word(candidate) for candidate in self.candidates}
        born = self.birth(5)
        return [
            l
            for l in self.content_flips
            if born is not None and l >= born and {word(self.top1_tokens[l]), word(self.top1_tokens[l - 1])} <= words
        ]

    @property
    def held(self) -> list[int]:
        """Layers whose top-1 is in A."""
        return _where(self.top1, self.answer_ids)

    @property
    def control_held(self) -> list[int]:
        """Layers before the last whose top-1 is a first token of the control."""
        return _where(self.top1[:-1], self.control_ids)

    @property
    def right(self) -> bool:
        """Whether the top-1 at layer L is in A."""
        return int(self.top1[-1]) in self.answer_ids

    @property
    def outcome(self) -> str:
        """The outcome class, one of OUTCOMES (step 6 above)."""
        return outcome([l in set(self.held) for l in range(self.n_layers + 1)], self.stability)

    @property
    def stages(self) -> list[str]:
        """The stage of confidence at each layer: "none", "guess" or "sure"."""
        guess, sure = self.birth(5), self.birth_sure
        return [
            "sure" if sure is not None and l >= sure else "guess" if guess is not None and l >= guess else "none"
            for l in range(self.n_layers + 1)
        ]

    @property
    def mean_log_prob(self) -> float:
        """Mean log-probability of the whole answer's tokens, spelt as given, at layer L; nats; NaN if it was not computed."""
        return float("nan") if self.token_log_probs is None else float(self.token_log_probs[-1].mean())

    def summary(self) -> dict[str, Any]:
        """One number or label for each figure of this trajectory; depths also as a fraction of L."""
        L = self.n_layers
        figures = {
            "question": self.question,
            "answer": self.answer,
            "category": self.category,
            "followed": self.label,
            "first_token_only": self.first_token_only,
            "final": self.top1_tokens[-1],
            "differs_from_model": self.differs_from_model,
            "right": self.right,
            "outcome": self.outcome,
            "birth_1": self.birth(1),
            "birth_5": self.birth(5),
            "birth_sure": self.birth_sure,
            "stability": self.stability,
            "flips": len(self.flips),
            "content_flips": len(self.content_flips),
            "candidate_flips": len(self.candidate_flips),
            "eligible_flips": len(self.eligible_flips),
            "layers_held": len(self.held),
            "lost_at": next((l + 1 for l in reversed(self.held) if l < L), None) if not self.right else None,
            "control": self.control,
            "control_layers_held": len(self.control_held) if self.control else None,
            "peak_prob": float(self.answer_prob.max()),
            "final_prob": float(self.answer_prob[-1]),
            "answer_log_prob": float(self.answer_log_prob[-1]),
            "mean_log_prob": self.mean_log_prob,
            "final_entropy": float(self.entropy[-1]),
            "ids_shared_with_candidates": self.dropped,
        }
        figures |= {f"{name}_depth": None if figures[name] is None else figures[name] / L for name in
                    ("birth_1", "birth_5", "birth_sure", "stability")}  # fmt: skip
        figures |= {f"last_{name}": value for name, value in self.last_shift.items()}
        figures |= {f"double_norm_{name}": value for name, value in self.double_norm_shift.items()}
        return figures | {"no_double_norm": self.no_double_norm}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer."""
        return pd.DataFrame(
            {
                "layer": range(self.n_layers + 1),
                "top1": self.top1_tokens,
                "answer_prob": self.answer_prob.tolist(),
                "answer_rank": self.answer_rank.tolist(),
                "answer_log_prob": self.answer_log_prob.tolist(),
                "rival_prob": self.rival_prob.tolist(),
                "margin": self.margin.tolist(),
                "entropy_nats": self.entropy.tolist(),
                "entropy_share": (self.entropy / np.log(self.d_vocab)).tolist(),
                "input_rank": self.input_rank.tolist(),
                "stage": self.stages,
                "flip": [l in self.flips for l in range(self.n_layers + 1)],
                "differs_from_model": [False] * self.n_layers + [self.differs_from_model],
            }
        )

    def plot(self, path: Any = None) -> Any:
        """Probability of the answer and its rival, and the entropy, by layer; flips are marked."""
        from analyses.views.trajectories import trajectory_plot

        return trajectory_plot(self, path)


@dataclass(frozen=True)
class Trajectories(Result):
    """The trajectories of a data set."""

    items: tuple[Trajectory, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per item: its `Trajectory.summary`."""
        return pd.DataFrame([item.summary() for item in self.items])

    def by_category(self) -> pd.DataFrame:
        """Share of each outcome, doubt and its control, and mean depths, by category; see `outcomes_by_category`."""
        return outcomes_by_category(self.to_dataframe())

    def plot(self, path: Any = None) -> Any:
        """Birth and stability by category, and the outcome classes."""
        from analyses.views.trajectories import trajectories_plot

        return trajectories_plot(self.to_dataframe(), self.by_category(), path)


def outcomes_by_category(table: pd.DataFrame) -> pd.DataFrame:
    """Share of each outcome, doubt and its control, and mean depths as a fraction of L, by category.

    Args:
        table: one row per item (`Trajectory.summary`).
    Returns:
        one row per category: the number of items; the shares of OUTCOMES; the columns of `doubt_beside_control`; birth_1_depth
        and stability_depth; `differs_from_model`, for how many items the top-1 of layer L, read in float32, is not the model's own.
    """
    groups = table.groupby("category")
    shares = pd.crosstab(table["category"], table["outcome"], normalize="index").reindex(columns=OUTCOMES).fillna(0.0)
    doubt = pd.DataFrame({category: doubt_beside_control(rows) for category, rows in groups}).T.rename_axis("category")
    counts = doubt.columns.str.startswith("wrong") | doubt.columns.str.startswith("with")
    doubt = doubt.astype({name: int for name in doubt.columns[counts]})
    depths = groups[["birth_1_depth", "stability_depth"]].mean()
    parts = [groups.size().rename("items"), shares, doubt, depths]
    return pd.concat([*parts, *([groups["differs_from_model"].sum()] if "differs_from_model" in table else [])], axis=1)


def doubt_beside_control(table: pd.DataFrame) -> pd.Series:
    """How often the answer, and a control candidate, was top-1 at some layer but not at the last, on the same items.

    The control (`Trajectory.control`) is neither the answer nor what the model says, so on every item it can be held then lost.
    The answer can be lost only on items that the model gets wrong: compare the two on those. With two candidates (yes, no), a
    wrong item has no control, because both candidates are taken.

    Args:
        table: one row per item (`Trajectory.summary`); a table of an earlier version has no control.
    Returns:
        with_control: how many items have a control. doubt, control_doubt: the share of them whose answer (whose control) was
        held then lost. wrong_with_control, doubt_if_wrong, control_doubt_if_wrong: the same for the items answered wrongly. A
        share of no items is NaN.
    """
    with_control = table[table["control_layers_held"].notna()] if "control_layers_held" in table else table[:0]
    figures = {}
    for rows, count, suffix in (
        (with_control, "with_control", ""),
        (with_control[~with_control["right"].astype(bool)], "wrong_with_control", "_if_wrong"),
    ):
        held = rows["control_layers_held"] > 0 if len(rows) else pd.Series(dtype=float)
        figures |= {count: len(rows), f"doubt{suffix}": (rows["outcome"] == DOUBT).mean(), f"control_doubt{suffix}": held.mean()}
    return pd.Series(figures)


@torch.no_grad()
def answer_trajectory(
    model: Model,
    inputs: Prompt,
    answer: str,
    candidates: Sequence[str] = (),
    position: Place = "last",
    row: int = 0,
    category: str = "",
    question: str = "",
    seed: int = 0,
) -> Trajectory:
    """Follows an answer through the layers of any TransformerLens model.

    Of an answer of several tokens only the first is followed, and a warning says so; `answer_log_prob` is the log-probability
    of all of them, spelt as given. To compute it, the prompt is cut after the position and the answer is appended there.

    Args:
        inputs: `Inputs`, a string or token ids.
        candidates: the category's possible answers (the answer may be among them).
        position: where the answer's first token is predicted: a place that is one position (see `Inputs.resolve`).
        row: the prompt of a batch.
        category, question: labels kept in the result; the question is also part of the control's seed.
        seed: for drawing the control candidate, together with the question, the answer and the candidates.
    Raises:
        ValueError: no variant of the answer begins with a token of whole characters, or every first token is shared with
            another candidate.
    """
    ids, dropped = answer_ids(model, answer, candidates)
    inputs, tokens, at, row = _one_row(model, inputs, position, row)
    stack, model_top1, token_log_probs = _run(model, inputs, tokens, _spelt(model, answer), at, row)
    once_more, reason = _normed_once_more(model, stack[-1:])
    item = trajectory_of_logits(
        logits_of(model, stack),
        None if once_more is None else logits_of(model, once_more)[0],
        ids,
        lambda i: _text(model.tokenizer, i),
        own=int(tokens[at]),
        answer=answer,
        question=question,
        category=category,
        dropped=dropped,
        candidates=tuple(candidates),
        candidate_ids=[answer_ids(model, c, candidates)[0] for c in candidates],
        model_name=str(model.cfg.model_name),
        token_log_probs=token_log_probs,
        model_top1=model_top1,
        no_double_norm=reason,
        seed=seed,
    )
    if (n := len(_spelt(model, answer))) > 1:
        said = f"{answer!r} is {n} tokens: what is followed is {item.label}; answer_log_prob is of the whole answer."
        warnings.warn(said, stacklevel=3)  # past torch's own wrapper
    return item


@torch.no_grad()
def answer_log_probs(model: Model, inputs: Prompt, answer: str, position: Place = "last", row: int = 0) -> Float[Tensor, "layer token"]:
    """The logit lens's log-probability of every token of an answer, spelt as given, teacher-forced; nats.

    It works for every answer, also for those that `answer_trajectory` refuses. The sum over tokens is log p(answer) by layer.

    Args:
        inputs, position, row: as `answer_trajectory`.
    Raises:
        ValueError: an empty answer.
    """
    if not answer:
        raise ValueError("expected an answer to read, got an empty one.")
    inputs, tokens, at, row = _one_row(model, inputs, position, row)
    return _run(model, inputs, tokens, _spelt(model, answer), at, row)[2]


def trajectory_of_logits(
    logits: Float[Tensor, "layer d_vocab"],
    twice: Float[Tensor, "d_vocab"] | None,
    ids: Sequence[int],
    text: Callable[[int], str],
    own: int = 0,
    answer: str = "",
    question: str = "",
    category: str = "",
    dropped: int = 0,
    candidates: tuple[str, ...] = (),
    candidate_ids: Sequence[Sequence[int]] = (),
    model_name: str = "",
    token_log_probs: Float[Tensor, "layer token"] | None = None,
    model_top1: int | None = None,
    no_double_norm: str = "",
    seed: int = 0,
) -> Trajectory:
    """The trajectory computed from the logit lens's logits at one position.

    Args:
        twice: logits of layer L with the final norm applied twice; None if they are not known, and `no_double_norm` says why.
        ids: A, the answer's first tokens. candidate_ids: the same for each of `candidates`.
        text: token id -> its text.
        own: the position's input token.
        seed: for drawing the control candidate, together with the question, the answer and the candidates.
    """
    inside = torch.zeros(logits.shape[1], dtype=torch.bool)
    inside[list(ids)] = True
    log_probs = logits.double().log_softmax(-1)
    probs = log_probs.exp()
    best = logits[:, inside].max(-1).values
    rival = int(logits[-1].masked_fill(inside, float("-inf")).argmax())
    shares = torch.stack([probs[:, list(c)].sum(-1) for c in candidate_ids], -1) if candidates else None
    top1 = logits.argmax(-1)
    control = _control(candidates, candidate_ids, ids, answer, int(top1[-1]), text, f"{seed} {question} {answer}")
    last = shift_of_logits(logits, logits[-1], text)
    return Trajectory(
        question=question,
        answer=answer,
        category=category,
        answer_ids=tuple(int(i) for i in ids),
        dropped=dropped,
        top1=top1,
        top1_tokens=tuple(text(int(i)) for i in top1),
        answer_prob=probs[:, inside].sum(-1).float(),
        answer_rank=(logits > best[:, None]).sum(-1),
        rival=text(rival),
        rival_prob=probs[:, rival].float(),
        margin=best - logits.masked_fill(inside, float("-inf")).max(-1).values,
        entropy=torch.special.entr(probs).sum(-1).float(),
        input_rank=(logits > logits[:, own : own + 1]).sum(-1),
        candidates=candidates,
        candidates_top=torch.full((len(logits),), -1) if shares is None else shares.argmax(-1),
        last_shift=last,
        double_norm_shift=dict.fromkeys(last, float("nan")) if twice is None else shift_of_logits(logits, twice, text),
        d_vocab=logits.shape[1],
        model_name=model_name,
        rest=() if token_log_probs is None else tuple(token_log_probs[-1, 1:].tolist()),
        answer_tokens=tuple(text(int(i)) for i in ids),
        token_log_probs=token_log_probs,
        model_top1=model_top1,
        model_top1_token="" if model_top1 is None else text(model_top1),
        control=candidates[control] if control is not None else "",
        control_ids=tuple(map(int, candidate_ids[control])) if control is not None else (),
        no_double_norm=no_double_norm,
    )


def shift_of_logits(logits: Float[Tensor, "layer d_vocab"], last: Float[Tensor, "d_vocab"], text: Callable[[int], str]) -> dict[str, float]:
    """Distances between the distributions of the last layer and of the layer before it, computed in float64.

    Args:
        logits: of every layer. last: logits to compare layer L−1 with: those of layer L, or those normed twice.
        text: token id -> its text.
    Returns:
        kl (nats), js (nats, in [0, ln 2]), tv (total variation, in [0, 1]) and its parts: `tv_form` (the final word and its
        other forms), `tv_function` (function words, punctuation and template tokens), `tv_content` (other words and parts of
        characters); `js_ratio`, js over the median JS of earlier neighbouring layers (NaN if that is no more than rounding);
        `argmax_changed`, 1 if the top-1 of `last` is not that of layer L, else 0.
    """
    log_probs, last = logits.double().log_softmax(-1), last.double().log_softmax(-1)
    before, final = log_probs[-2], int(logits[-1].argmax())
    js = _js(before, last)
    usual = float(np.median([_js(a, b) for a, b in zip(log_probs[:-2], log_probs[1:-1])])) if len(logits) > 2 else 0.0
    moved = 0.5 * (last.exp() - before.exp()).abs()
    return {
        "kl": _kl(last, before),
        "js": js,
        "tv": float(moved.sum()),
        **{f"tv_{name}": value for name, value in _classed(moved, final, text).items()},
        "js_ratio": js / usual if usual > ROUNDING else float("nan"),
        "argmax_changed": float(int(last.argmax()) != final),
    }


def shift(probs: Float[Tensor, "layer d_vocab"], last: Float[Tensor, "d_vocab"], text: Callable[[int], str]) -> dict[str, float]:
    """`shift_of_logits` from probabilities; less exact, because float32 has no probabilities under 1e-45."""
    return shift_of_logits(probs.double().log(), last.double().log(), text)


class NoFirstToken(ValueError):
    """Raised for an answer without a first token that tells it from others."""


def answer_ids(model: Model, answer: str, candidates: Sequence[str] = ()) -> tuple[list[int], int]:
    """(A, the first-token ids of the answer's variants; how many were dropped because another candidate shares them).

    Raises:
        ValueError: an empty answer. NoFirstToken: no variant begins with a token of whole characters, or none is left.
    """
    if not answer.strip():
        raise ValueError("expected an answer to follow, got an empty one.")
    ours = _variants(model, answer)
    if not ours:
        raise NoFirstToken(
            f"no form of {answer!r} begins with a token of whole characters: its first tokens are parts of characters, which "
            f"thousands of other words share. Follow another form or answer; for this one there is its log-probability "
            f"(`answer_log_probs`)."
        )
    others = set().union(*(_variants(model, c) for c in candidates if c != answer)) if candidates else set()
    kept = sorted(ours - others)
    if not kept:
        raise NoFirstToken(
            f"every first token of {answer!r} is also another candidate's: choose candidates that differ in their first token."
        )
    return kept, len(ours & others)


def stability(top1: Sequence[int]) -> int:
    """S: the first layer from which the top-1 no longer changes."""
    start = len(top1) - 1
    while start > 0 and top1[start - 1] == top1[-1]:
        start -= 1
    return start


def flips(sequence: Sequence[int]) -> list[int]:
    """Indices of the elements that differ from the element before."""
    return [l for l in range(1, len(sequence)) if sequence[l] != sequence[l - 1]]


def outcome(holds: Sequence[bool], settled: int) -> str:
    """The outcome class, one of OUTCOMES.

    Args:
        holds: whether the answer is top-1 at each layer.
        settled: S.
    """
    last = len(holds) - 1
    if holds[-1]:
        first = list(holds).index(True)
        return "straight" if all(holds[first:]) else "wavered"
    if any(holds):
        return "held then lost"
    return "settled early" if settled <= last / 2 else "settled late"


def word(token: str) -> str:
    """A token's text in lower case, without surrounding spaces."""
    return token.strip().lower()


def whole(token: str) -> bool:
    """Whether a token's text is of whole characters: a part of a character decodes to \ufffd, an id without text to ""."""
    return bool(token) and "\ufffd" not in token


def same_word(token: str, other: str) -> bool:
    """Whether two tokens differ in case and spaces at most; never true of parts of characters or ids without text."""
    return whole(token) and whole(other) and word(token) == word(other)


def _where(top1: Int[Tensor, "layer"], ids: Sequence[int]) -> list[int]:
    return [layer for layer, token in enumerate(top1.tolist()) if token in ids]


@lru_cache(maxsize=2**18)
def _text(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token])


def _variants(model: Model, answer: str) -> set[int]:
    """First tokens of an answer's variants, without blank ones (Qwen2 splits a space off before digits) and parts of
    characters, which many other words share."""
    bare = answer.strip()
    strings = {prefix + form for form in (bare, bare.lower(), bare[:1].upper() + bare[1:]) for prefix in ("", " ")}
    texts = {token: model.tokenizer.decode([token]) for token in (_spelt(model, string)[0] for string in strings)}
    return {token for token, text in texts.items() if whole(text) and text.strip()}


def _spelt(model: Model, answer: str) -> list[int]:
    """Token ids of an answer, spelt as given."""
    return [int(token) for token in text_ids(model.tokenizer, answer)]


def _control(
    candidates: Sequence[str],
    candidate_ids: Sequence[Sequence[int]],
    ids: Sequence[int],
    answer: str,
    final: int,
    text: Callable[[int], str],
    key: str,
) -> int | None:
    """Index of the candidate that is the control for doubt: neither the answer nor what the model says, drawn with `key` as seed."""
    left = [
        number
        for number, (candidate, own) in enumerate(zip(candidates, candidate_ids))
        if candidate != answer and not set(own) & {*ids, final} and not same_word(candidate, text(final))
    ]
    return Random(key).choice(sorted(left, key=lambda number: candidates[number])) if left else None


def _first(holds: Bool[Tensor, "layer"]) -> int | None:
    found = holds.nonzero().flatten().tolist()
    return found[0] if found else None


def _kl(p: Float[Tensor, "d_vocab"], q: Float[Tensor, "d_vocab"]) -> float:
    """KL(p‖q) from log-probabilities; a token of probability 0 in p adds nothing."""
    return float(torch.where(p == float("-inf"), 0.0, p.exp() * (p - q)).sum())


def _js(p: Float[Tensor, "d_vocab"], q: Float[Tensor, "d_vocab"]) -> float:
    middle = torch.logaddexp(p, q) - np.log(2)
    return 0.5 * (_kl(p, middle) + _kl(q, middle))


def _classed(moved: Float[Tensor, "d_vocab"], final: int, text: Callable[[int], str]) -> dict[str, float]:
    """The total variation split by class of token: form, function, content. Tokens are classified from the largest change
    down; the rest, under UNCLASSED in all, is counted as content."""
    parts, last = {"form": 0.0, "function": 0.0, "content": 0.0}, text(final)
    amounts, order = moved.sort(descending=True)
    left = moved.sum() - amounts.cumsum(0)
    for token, amount in zip(order[: int((left > UNCLASSED).sum()) + 1].tolist(), amounts.tolist()):
        shown = text(token)
        same = token == final or same_word(shown, last)
        parts["form" if same else "function" if _is_function(shown) else "content"] += amount
    parts["content"] += float(moved.sum()) - sum(parts.values())
    return parts


@lru_cache(maxsize=2**18)
def _is_function(token: str) -> bool:
    """A function word, punctuation, white space or a template token."""
    bare = word(token)
    letters = any(c.isalnum() for c in bare)
    return whole(token) and (bare in FUNCTION_WORDS or not letters or (token.startswith("<|") and token.endswith("|>")))


def _normed_once_more(model: Model, last: Float[Tensor, "row d_model"]) -> tuple[Float[Tensor, "row d_model"] | None, str]:
    """(the last layer after one norm, for the lens to norm again; "") or (None, why it is not known)."""
    normed = final_norm(model, last)
    folded = getattr(getattr(model, "ln_final", None), "folded_w", None)
    if folded is not None:
        return normed * folded.to(normed), ""
    again = final_norm(model, normed)
    if torch.allclose(again.float(), normed.float(), rtol=max(1e-5, 4 * torch.finfo(normed.dtype).eps), atol=1e-6):
        return None, "the final norm's weight is folded into W_U and not kept, or constant: a second norm is no control"
    return normed, ""


def _one_row(model: Model, inputs: Prompt, position: Place, row: int) -> tuple[Any, Int[Tensor, "pos"], int, int]:
    """(what to run, the row's tokens, the position in them, the row's index); a row of plain text is run without its padding."""
    prompt = as_prompt(model, inputs)
    at = prompt.position(position, row)
    if isinstance(prompt, TextPrompt):
        prompt, at, row = prompt.alone(row, at)
    return prompt if isinstance(prompt, Inputs) else prompt.tokens, prompt.tokens[row], at, row


def _run(
    model: Model, inputs: Any, tokens: Int[Tensor, "pos"], spelt: list[int], at: int, row: int
) -> tuple[Float[Tensor, "layer d_model"], int, Float[Tensor, "layer token"]]:
    """(the residual stream at the position, the top-1 of the model's own logits there, the whole answer's log-probabilities)."""
    prompt, row, spelt = _teacher_forced(inputs, tokens, spelt, at, row)
    layers = range(model.cfg.n_layers + 1)
    streams, model_ids = residual_at(model, prompt, layers, list(range(at, at + max(1, len(spelt)))), row)
    stack = torch.stack([streams[layer] for layer in layers])
    return stack[:, 0], int(model_ids[0]), _token_log_probs(model, stack, spelt)


def _teacher_forced(inputs: Any, tokens: Int[Tensor, "pos"], spelt: list[int], at: int, row: int) -> tuple[Any, int, list[int]]:
    """(the prompt cut after the position with the answer appended, its row, the answer's tokens).

    The answer's last token predicts nothing, so it is not appended. If image tokens come after the position no answer can
    follow it: the prompt stays as it is, and the answer has no tokens.
    """
    if len(spelt) == 1:
        return inputs, row, spelt
    if not hasattr(inputs, "visuals"):
        return torch.cat((tokens[: at + 1], tokens.new_tensor(spelt[:-1])))[None], 0, spelt
    if bool(inputs.token_types[row, at + 1 :].any()):
        return inputs, row, []
    here = slice(0, at + 1)
    cut = inputs[row]
    cut = replace(
        cut,
        tokens=cut.tokens[:, here],
        attention_mask=cut.attention_mask[:, here],
        token_types=cut.token_types[:, here],
        position_ids=cut.position_ids[..., here],
        segments=(cut.segments[0][here],),
    )
    for token in spelt[:-1]:
        cut = cut.extend(cut.tokens.new_tensor([token]), torch.tensor([True], device=cut.device))
    return cut, 0, spelt


def _token_log_probs(model: Model, stack: Float[Tensor, "layer token d_model"], spelt: list[int]) -> Float[Tensor, "layer token"]:
    """The logit lens's log-probability of each token at the position before it; NaN if there are no tokens."""
    if not spelt:
        return torch.full((len(stack), 1), torch.nan)
    targets = torch.tensor(spelt).repeat(len(stack))[:, None]
    return predictions_of(model, stack.flatten(0, 1), targets, top_k=1).target_log_probs.reshape(len(stack), -1)
