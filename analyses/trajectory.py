"""Answer trajectories: when does the answer appear in the residual stream, does it stay, where does it flip?

For one position, z_l = W_U · norm(h_l) for the lens entries l = 0..L (h_0 the embedding, h_L after the last block;
z_L is the model's own logits), p_l = softmax(z_l) in float32. Natural logarithms.

1. A, the answer's first tokens: every variant {as given, lower, Capitalised} × {with, without a leading space};
   ids that another candidate shares are dropped and counted.
2. Birth: B_k = min{l : best rank of A < k}, k = 1, 5; B_half = min{l : Σ_A p_l ≥ 0.5}; None if never.
3. Stages of confidence: before B_5 none, from B_5 guess, from B_half sure.
4. Stability S = min{l : the top-1 is the final one from l on} (prediction depth, Baldock et al. 2021).
5. Flips: entries l ≥ 1 whose top-1 differs from that of l−1; *form* flips change only case or space of the word,
   *content* flips the word.
6. Outcome. Right: straight (once top-1, always) or wavered. Wrong: held then lost (doubt), settled early (S ≤ L/2)
   or settled late.
7. Last-layer shift: KL(p_L‖p_{L−1}), JS, total variation and its split, beside the double-norm control: what a
   notebook sees that norms HF's last hidden state, which is already normed, once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.tools.analysis import logit_readout

from analyses.common.prompts import as_prompt
from analyses.common.result import Result
from analyses.logit_lens import residual_stack
from hooked_qwen2vl.geometry import Place

SURE = 0.5
OUTCOMES = ("straight", "wavered", "held then lost", "settled early", "settled late")
# What a sentence needs and no picture shows; for the split of the last layer's shift.
FUNCTION_WORDS = frozenset(
    "a an the is are was were be been it its this that these those there here of in on at to for from by with and or "
    "not no yes as so".split()
)


@dataclass(frozen=True)
class Trajectory(Result):
    """One answer token's way through the layers.

    Attributes:
        answer: as given; question: what was asked, where known.
        answer_ids: A. dropped: how many ids were shared with another candidate.
        top1: [layer] token id; top1_tokens: their text.
        answer_prob: [layer] Σ_A p. answer_rank: [layer] best rank of A, 0 the top.
        rival_prob: [layer] of the most probable token that is not in A at the end. rival: its text.
        margin: [layer] max_A z − max_{not A} z, in logits: positive iff the top-1 is in A.
        entropy: [layer] nats. input_rank: [layer] rank of the position's own input token.
        candidates_top: [layer] index of the most probable candidate, -1 without candidates.
        last_shift, double_norm_shift: see `shift`.
        d_vocab, model_name.
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
    rest: tuple[float, ...] = field(default=())  # log-probabilities of the answer's further tokens, teacher-forced

    @property
    def n_layers(self) -> int:
        """L: entries run from 0 to L."""
        return len(self.top1) - 1

    def birth(self, k: int = 1) -> int | None:
        """B_k: first entry at which A is among the k most probable tokens."""
        return _first(self.answer_rank < k)

    @property
    def birth_sure(self) -> int | None:
        """B_half: first entry at which A has half of the probability."""
        return _first(self.answer_prob >= SURE)

    @property
    def stability(self) -> int:
        """S: from this entry on the top-1 is the final one."""
        return stability(self.top1.tolist())

    @property
    def flips(self) -> list[int]:
        """Entries whose top-1 differs from the one before."""
        return flips(self.top1.tolist())

    @property
    def content_flips(self) -> list[int]:
        """Flips that change the word, not only its case or space."""
        return [l for l in self.flips if word(self.top1_tokens[l]) != word(self.top1_tokens[l - 1])]

    @property
    def candidate_flips(self) -> list[int]:
        """Entries whose most probable candidate differs from the one before."""
        return flips(self.candidates_top.tolist()) if self.candidates else []

    @property
    def eligible_flips(self) -> list[int]:
        """Content flips between two candidates, once the answer is among the top five."""
        words = {word(candidate) for candidate in self.candidates}
        born = self.birth(5)
        return [
            l
            for l in self.content_flips
            if born is not None and l >= born and {word(self.top1_tokens[l]), word(self.top1_tokens[l - 1])} <= words
        ]

    @property
    def held(self) -> list[int]:
        """Entries at which the top-1 is in A."""
        return (self.answer_rank == 0).nonzero().flatten().tolist()

    @property
    def right(self) -> bool:
        return bool(self.answer_rank[-1] == 0)

    @property
    def outcome(self) -> str:
        """One of OUTCOMES."""
        return outcome([l in set(self.held) for l in range(self.n_layers + 1)], self.stability)

    @property
    def stages(self) -> list[str]:
        """"none", "guess" or "sure" at each entry."""
        guess, sure = self.birth(5), self.birth_sure
        return [
            "sure" if sure is not None and l >= sure else "guess" if guess is not None and l >= guess else "none"
            for l in range(self.n_layers + 1)
        ]

    @property
    def mean_log_prob(self) -> float:
        """Mean log-probability of the answer's tokens, nats: the first token's variants, then the rest."""
        first = float(np.log(max(float(self.answer_prob[-1]), 1e-45)))
        return float(np.mean([first, *self.rest]))

    def summary(self) -> dict[str, Any]:
        """The figures of this trajectory, one value each; depths also as a fraction of L."""
        L = self.n_layers
        figures = {
            "question": self.question,
            "answer": self.answer,
            "category": self.category,
            "final": self.top1_tokens[-1],
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
            "peak_prob": float(self.answer_prob.max()),
            "final_prob": float(self.answer_prob[-1]),
            "mean_log_prob": self.mean_log_prob,
            "final_entropy": float(self.entropy[-1]),
            "ids_shared_with_candidates": self.dropped,
        }
        figures |= {f"{name}_depth": None if figures[name] is None else figures[name] / L for name in
                    ("birth_1", "birth_5", "birth_sure", "stability")}  # fmt: skip
        figures |= {f"last_{name}": value for name, value in self.last_shift.items()}
        figures |= {f"double_norm_{name}": value for name, value in self.double_norm_shift.items()}
        return figures

    def to_dataframe(self) -> pd.DataFrame:
        """One row an entry."""
        return pd.DataFrame(
            {
                "layer": range(self.n_layers + 1),
                "top1": self.top1_tokens,
                "answer_prob": self.answer_prob.tolist(),
                "answer_rank": self.answer_rank.tolist(),
                "rival_prob": self.rival_prob.tolist(),
                "margin": self.margin.tolist(),
                "entropy_nats": self.entropy.tolist(),
                "entropy_share": (self.entropy / np.log(self.d_vocab)).tolist(),
                "input_rank": self.input_rank.tolist(),
                "stage": self.stages,
                "flip": [l in self.flips for l in range(self.n_layers + 1)],
            }
        )

    def plot(self, path: Any = None) -> Any:
        """Probability of answer and rival and entropy by layer, flips marked."""
        from analyses.views.trajectories import trajectory_plot

        return trajectory_plot(self, path)


@dataclass(frozen=True)
class Trajectories(Result):
    """A data set's trajectories."""

    items: tuple[Trajectory, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row an item: its figures."""
        return pd.DataFrame([item.summary() for item in self.items])

    def by_category(self) -> pd.DataFrame:
        """Share of each outcome, and mean depths as a fraction of L, by category."""
        return outcomes_by_category(self.to_dataframe())

    def plot(self, path: Any = None) -> Any:
        """Birth and stability by category, and the outcome classes."""
        from analyses.views.trajectories import trajectories_plot

        return trajectories_plot(self.to_dataframe(), self.by_category(), path)


def outcomes_by_category(table: pd.DataFrame) -> pd.DataFrame:
    """Share of each outcome, and mean depths as a fraction of L, by category; `table` has one row an item (`summary`)."""
    shares = pd.crosstab(table["category"], table["outcome"], normalize="index").reindex(columns=OUTCOMES).fillna(0.0)
    depths = table.groupby("category")[["birth_1_depth", "stability_depth"]].mean()
    return pd.concat([table.groupby("category").size().rename("items"), shares, depths], axis=1)


@torch.no_grad()
def answer_trajectory(
    model: Any,
    inputs: Any,
    answer: str,
    candidates: Sequence[str] = (),
    position: Place = "last",
    row: int = 0,
    category: str = "",
    question: str = "",
) -> Trajectory:
    """Follows an answer through the layers of any TransformerLens model.

    Args:
        inputs: `Inputs`, a string or token ids. An `Inputs` with a teacher-forced answer also gives the
            log-probabilities of its further tokens.
        candidates: the category's possible answers (the answer may be among them).
        position: where the answer's first token is predicted: a place that is one position (see `Inputs.resolve`).
    Raises:
        ValueError: no variant of the answer is left once ids shared with other candidates are dropped.
    """
    ids, dropped = answer_ids(model, answer, candidates)
    stack, _ = residual_stack(model, inputs)
    prompt = as_prompt(model, inputs)
    at = prompt.position(position, row)
    logits = _logits(model, stack[:, row, at])
    twice = _logits(model, _normed(model, stack[-1:, row, at]))
    own = int(prompt.tokens[row, at])
    return trajectory_of_logits(
        logits,
        twice[0],
        ids,
        lambda i: model.tokenizer.decode([i]),
        own=own,
        answer=answer,
        question=question,
        category=category,
        dropped=dropped,
        candidates=tuple(candidates),
        candidate_ids=[answer_ids(model, c, candidates)[0] for c in candidates],
        rest=_rest(model, stack, inputs, row),
        model_name=str(model.cfg.model_name),
    )


def trajectory_of_logits(
    logits: Float[Tensor, "layer d_vocab"],
    twice: Float[Tensor, "d_vocab"],
    ids: Sequence[int],
    text: Any,
    own: int = 0,
    answer: str = "",
    question: str = "",
    category: str = "",
    dropped: int = 0,
    candidates: tuple[str, ...] = (),
    candidate_ids: Sequence[Sequence[int]] = (),
    rest: tuple[float, ...] = (),
    model_name: str = "",
) -> Trajectory:
    """All figures from the lens's logits at one position; `twice` are those of the double norm."""
    inside = torch.zeros(logits.shape[1], dtype=torch.bool)
    inside[list(ids)] = True
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    best = logits[:, inside].max(-1).values
    rival = int(logits[-1].masked_fill(inside, float("-inf")).argmax())
    shares = torch.stack([probs[:, list(c)].sum(-1) for c in candidate_ids], -1) if candidates else None
    return Trajectory(
        question=question,
        answer=answer,
        category=category,
        answer_ids=tuple(int(i) for i in ids),
        dropped=dropped,
        top1=logits.argmax(-1),
        top1_tokens=tuple(text(int(i)) for i in logits.argmax(-1)),
        answer_prob=probs[:, inside].sum(-1),
        answer_rank=(logits > best[:, None]).sum(-1),
        rival=text(rival),
        rival_prob=probs[:, rival],
        margin=best - logits.masked_fill(inside, float("-inf")).max(-1).values,
        entropy=-(probs * log_probs).sum(-1),
        input_rank=(logits > logits[:, own : own + 1]).sum(-1),
        candidates=candidates,
        candidates_top=torch.full((len(logits),), -1) if shares is None else shares.argmax(-1),
        last_shift=shift(probs, probs[-1], text),
        double_norm_shift=shift(probs, twice.softmax(-1), text),
        d_vocab=logits.shape[1],
        model_name=model_name,
        rest=rest,
    )


def shift(probs: Float[Tensor, "layer d_vocab"], last: Float[Tensor, "d_vocab"], text: Any) -> dict[str, float]:
    """How far the last entry is from the one before it.

    Args:
        probs: of every entry. last: what to take as the last (the model's own, or the double norm's).
    Returns:
        kl (nats), js (nats, in [0, ln 2]), tv (in [0, 1]) and its parts: `tv_form` (other forms of the final word),
        `tv_function` (function words, punctuation and template tokens), `tv_content` (rival words); `js_ratio`, the
        JS over the median JS of neighbouring entries before; `argmax_changed`, 1 where the top-1 differs from p_L's.
    """
    before = probs[-2]
    steps = [_js(a, b) for a, b in zip(probs[:-2], probs[1:-1])]
    js = _js(before, last)
    moved = 0.5 * (last - before).abs()
    parts = {"form": 0.0, "function": 0.0, "content": 0.0}
    final = word(text(int(probs[-1].argmax())))
    order = moved.argsort(descending=True)[:2000]  # the rest is counted as content: it moves next to nothing
    for token in order.tolist():
        if moved[token] < 1e-9:
            break
        name = word(text(token))
        kind = "form" if name == final else "function" if _is_function(name, text(token)) else "content"
        parts[kind] += float(moved[token])
    parts["content"] += float(moved.sum()) - sum(parts.values())
    return {
        "kl": float((last * (last.clamp_min(1e-45).log() - before.clamp_min(1e-45).log())).sum()),
        "js": js,
        "tv": float(moved.sum()),
        **{f"tv_{name}": value for name, value in parts.items()},
        "js_ratio": js / float(np.median(steps)) if steps and np.median(steps) > 0 else float("nan"),
        "argmax_changed": float(last.argmax() != probs[-1].argmax()),
    }


def answer_ids(model: Any, answer: str, candidates: Sequence[str] = ()) -> tuple[list[int], int]:
    """A: first-token ids of every variant of the answer, and how many were dropped as another candidate's too.

    Raises:
        ValueError: none is left.
    """
    if not answer.strip():
        raise ValueError("expected an answer to follow, got an empty one.")
    ours = _variants(model, answer)
    others = set().union(*(_variants(model, c) for c in candidates if c != answer)) if candidates else set()
    kept = sorted(ours - others)
    if not kept:
        raise ValueError(
            f"every first token of {answer!r} is also another candidate's: choose candidates that differ in their "
            f"first token."
        )
    return kept, len(ours & others)


def stability(top1: Sequence[int]) -> int:
    """S of a top-1 sequence."""
    start = len(top1) - 1
    while start > 0 and top1[start - 1] == top1[-1]:
        start -= 1
    return start


def flips(sequence: Sequence[int]) -> list[int]:
    """Entries that differ from the one before."""
    return [l for l in range(1, len(sequence)) if sequence[l] != sequence[l - 1]]


def outcome(holds: Sequence[bool], settled: int) -> str:
    """The outcome class.

    Args:
        holds: whether the answer is top-1 at each entry.
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
    """A token without case and surrounding space."""
    return token.strip().lower()


def _variants(model: Any, answer: str) -> set[int]:
    """First tokens of an answer's forms; a bare space (Qwen2 splits it off before digits) says nothing and is left out."""
    forms = {answer, answer.lower(), answer[:1].upper() + answer[1:]}
    strings = {prefix + form.strip() for form in forms for prefix in ("", " ")}
    ids = {int(model.tokenizer(string, add_special_tokens=False)["input_ids"][0]) for string in strings}
    return {i for i in ids if model.tokenizer.decode([i]).strip()}


def _first(holds: Bool[Tensor, "layer"]) -> int | None:
    found = holds.nonzero().flatten().tolist()
    return found[0] if found else None


def _js(p: Tensor, q: Tensor) -> float:
    middle = 0.5 * (p + q)

    def kl(a: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a.clamp_min(1e-45).log() - middle.clamp_min(1e-45).log()), 0.0).sum()

    return float(0.5 * (kl(p) + kl(q)))


def _is_function(name: str, token: str) -> bool:
    return name in FUNCTION_WORDS or not any(c.isalnum() for c in name) or (token.startswith("<|") and token.endswith("|>"))


def _logits(model: Any, vectors: Float[Tensor, "layer d_model"]) -> Float[Tensor, "layer d_vocab"]:
    return logit_readout(model, vectors).values.float().cpu()


def _normed(model: Any, vectors: Float[Tensor, "layer d_model"]) -> Float[Tensor, "layer d_model"]:
    return model.ln_final(vectors[None])[0]


def _rest(model: Any, stack: Tensor, inputs: Any, row: int) -> tuple[float, ...]:
    """Log-probabilities of a teacher-forced answer's tokens after its first."""
    if not hasattr(inputs, "part_names") or "answer" not in inputs.part_names(row):
        return ()
    positions = inputs.positions("answer", row)[1:]
    if not len(positions):
        return ()
    log_probs = _logits(model, stack[-1, row, positions - 1]).log_softmax(-1)
    return tuple(log_probs[torch.arange(len(positions)), inputs.tokens[row, positions].cpu()].tolist())
