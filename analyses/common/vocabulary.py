"""How the residual stream is read through the vocabulary: the one path of every lens, trajectory, margin and score.

`readout` keeps of every whole-vocabulary distribution what is asked for: top tokens, entropy, and where given tokens stand.
`logits_of` keeps all of it, for the few vectors of a trajectory. Both:

1. Norm a chunk of vectors with the model's own final norm, in its own dtype, and multiply by W_U in float32
   (half-precision weights are widened a block of words at a time; a product in half precision would tie words that
   are not tied) into slabs of words, which every chunk uses again. Other TransformerLens models add b_U and what their
   adapter does to logits (a soft cap, a scale).
2. Of every slab z, a few rows at a time so that they stay in the processor's cache: the largest logit of every
   block of 64 words; m = max z, S = Σ exp(z−m), E = Σ exp(z−m)(z−m); how many logits are above a target's.
   The top k are in the k blocks with the largest maxima, ties to the lowest id.
3. The slabs joined: m = max mᵢ, S = Σ exp(mᵢ−m) Sᵢ, E = Σ exp(mᵢ−m) (Eᵢ + (mᵢ−m) Sᵢ), ranks summed.
   log p = z − m − log S, and entropy = log S − E / S, nats. A token's rank is the number of words with a larger logit.

A model that cannot be read so (an encoder, a head between norm and unembedding) is refused by TransformerLens's `logit_readout`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.tools.analysis import logit_readout

from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.overflow import finite

BLOCK = 64  # words whose largest logit is kept
SLAB = 32768  # words whose logits lie together, filled up to whole blocks; 16 MB for 128 rows
FEW = 4  # rows read at once on a CPU: with two copies of themselves they stay in its cache
WIDENED = 4096  # half-precision words made float32 at a time, a part of a slab


@dataclass(frozen=True)
class Readout:
    """What is kept of every row's distribution.

    Attributes:
        ids: [row k] by falling logit, ties by rising id.
        probs: [row k] their probabilities.
        entropy: [row] nats.
        target_probs: [row target]; target_ranks: [row target], 0 the most probable.
        target_log_probs: [row target] nats; finite also where the probability is too small for a float32.
    """

    ids: Int[Tensor, "row k"]
    probs: Float[Tensor, "row k"]
    entropy: Float[Tensor, "row"]
    target_probs: Float[Tensor, "row target"]
    target_ranks: Int[Tensor, "row target"]
    target_log_probs: Float[Tensor, "row target"]


@torch.no_grad()
def readout(
    model: Any,
    vectors: Float[Tensor, "row d_model"],
    targets: Int[Tensor, "row target"],
    top_k: int = 5,
    chunk_size: int = 128,
) -> Readout:
    """Reads vectors of the residual stream through the model's own final norm and unembedding; results on the CPU.

    Args:
        vectors: un-normed.
        targets: tokens to follow, any number for each row (none: [row 0]).
        chunk_size: rows whose logits exist at once, in float32.
    Raises:
        ValueError: more top_k than words, or a target that is no token.
    """
    n_words = model.W_U.shape[1]
    if not 1 <= top_k <= n_words:
        raise ValueError(f"top_k must be in 1..{n_words}, the number of words, got {top_k}.")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < n_words:
        raise ValueError(f"targets must be token ids in 0..{n_words - 1}, got {int(targets.min())}..{int(targets.max())}.")
    logits = _Logits(model, min(chunk_size, len(vectors)))
    parts = []
    for start in tqdm(range(0, len(vectors), chunk_size), desc="lens", unit="chunk", delay=2, leave=False):
        rows = slice(start, start + chunk_size)
        logits.compute(vectors[rows])
        parts.append(_summary(logits.slabs(len(vectors[rows])), targets[rows].to(model.W_U.device), top_k))
    return Readout(*(torch.cat(column).cpu() for column in zip(*parts)))


@torch.no_grad()
def logits_of(model: Any, vectors: Float[Tensor, "*axes d_model"], chunk_size: int = 128) -> Float[Tensor, "*axes d_vocab"]:
    """All logits of vectors of the residual stream, float32 on the CPU: 4 bytes × words for each vector.

    Args:
        vectors: un-normed.
    """
    rows = vectors.flatten(0, -2)
    logits = _Logits(model, min(chunk_size, len(rows)))
    parts = []
    for chunk in rows.split(chunk_size):
        logits.compute(chunk)
        parts.append(torch.cat([slab.z[:, : slab.n_words] for slab in logits.slabs(len(chunk))], dim=-1).cpu())
    return torch.cat(parts).unflatten(0, vectors.shape[:-1])


def final_norm(model: Any, vectors: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """The vectors through the model's own final norm, in its own dtype; as they are where it has none."""
    vectors = vectors.to(model.W_U.device, model.W_U.dtype)
    if getattr(model.cfg, "normalization_type", None) is None:
        return vectors
    return finite(model.ln_final(vectors[None])[0], "ln_final")


def characters(model: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """(the text of token ids, which of its characters each token is, or is a part of: from, to)."""
    text, spans, before = model.tokenizer.decode(ids), [], 0
    for n in range(1, len(ids) + 1):
        so_far = model.tokenizer.decode(ids[:n])
        agreed = len(os.path.commonprefix((text, so_far)))  # a character that is not whole yet shows as another
        spans.append((before, min(len(text), agreed + (len(so_far) > agreed))))
        before = agreed
    return text, spans


@dataclass(frozen=True)
class _Slab:
    """Logits of a stretch of words for the rows of a chunk.

    Attributes:
        z: [row word], filled up to whole blocks with −inf.
        start, n_words: which words they are.
    """

    z: Float[Tensor, "row word"]
    start: int
    n_words: int


class _Logits:
    """Logits of a chunk of vectors, slab by slab, in buffers that every chunk overwrites."""

    def __init__(self, model: Any, n_rows: int):
        self.model = model
        self.n_words, self.device = model.W_U.shape[1], model.W_U.device
        self.bias = model.b_U if bool(model.b_U.any()) else None
        self.transform = getattr(getattr(model, "adapter", None), "apply_output_logits_transform", None)
        if not isinstance(model, HookedQwen2VL):
            logit_readout(model, model.W_U.new_zeros(1, model.W_U.shape[0]), targets=[0])  # refuses what cannot be read so
        self.buffers = []
        for start in range(0, self.n_words, SLAB):
            n = min(SLAB, self.n_words - start)
            self.buffers.append(torch.empty((n_rows, -(-n // BLOCK) * BLOCK), device=self.device))
            self.buffers[-1][:, n:] = float("-inf")

    def slabs(self, n_rows: int) -> list[_Slab]:
        """The logits of the first rows, as computed last."""
        starts = range(0, self.n_words, SLAB)
        return [_Slab(z[:n_rows], start, min(SLAB, self.n_words - start)) for z, start in zip(self.buffers, starts)]

    def compute(self, vectors: Float[Tensor, "row d_model"]) -> None:
        """Fills the buffers, in float32 also from half-precision weights: exact products, and on many CPUs several times faster."""
        W_U, normalized = self.model.W_U, final_norm(self.model, vectors)
        narrow = W_U.dtype not in (torch.float32, torch.float64)
        normalized = normalized.float() if narrow else normalized
        step = WIDENED if narrow else SLAB
        for start in range(0, self.n_words, step):
            weight = W_U[:, start : start + step]
            weight = self._widened(weight) if narrow else weight
            out = self.buffers[start // SLAB][: len(vectors), start % SLAB :][:, : weight.shape[1]]
            if weight.dtype == out.dtype:
                torch.mm(normalized, weight, out=out)
            else:
                out.copy_(normalized @ weight)
            if self.bias is not None:
                out += self.bias[start : start + step]
            if self.transform is not None:
                out.copy_(self.transform(out))

    def _widened(self, weight: Float[Tensor, "d_model word"]) -> Float[Tensor, "d_model word"]:
        return self._room[: weight.shape[1]].copy_(weight.T).T

    @cached_property
    def _room(self) -> Float[Tensor, "word d_model"]:
        return torch.empty((WIDENED, self.model.W_U.shape[0]), device=self.device)


def _summary(slabs: list[_Slab], targets: Int[Tensor, "row target"], top_k: int) -> tuple[Tensor, ...]:
    """The fields of a `Readout`, from every slab's own."""
    at_targets = _at(slabs, targets)
    sums, values, ids = zip(*(_read(slab, at_targets, top_k) for slab in slabs))
    tops, totals, weighted, larger = (torch.stack(column) for column in zip(*sums))  # [slab row], larger [slab row target]
    top = tops.amax(0)
    shift = tops - top
    scale = shift.exp()
    total = (scale * totals).sum(0)
    entropy = total.log() - (scale * (weighted + shift * totals)).sum(0) / total
    values, ids = torch.cat(values, -1), torch.cat(ids, -1)  # of equal values, the lower id comes first
    best = largest(values, top_k)
    log_probs, target_log_probs = (z - top[:, None] - total.log()[:, None] for z in (values.gather(-1, best), at_targets))
    return ids.gather(-1, best), log_probs.exp(), entropy, target_log_probs.exp(), larger.sum(0).long(), target_log_probs


def _at(slabs: list[_Slab], ids: Int[Tensor, "row n"]) -> Float[Tensor, "row n"]:
    """The logits of some words of each row."""
    found = torch.empty(ids.shape, device=ids.device)
    for slab in slabs:
        inside = (ids >= slab.start) & (ids < slab.start + slab.n_words)
        found = torch.where(inside, slab.z.gather(-1, (ids - slab.start).clamp(0, slab.n_words - 1)), found)
    return found


def _read(slab: _Slab, at_targets: Float[Tensor, "row target"], top_k: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Of one slab: (m, S, E, how many logits are above each target's), and its top k with their ids."""
    few = FEW if slab.z.device.type == "cpu" else len(slab.z)
    rooms = torch.empty((2, min(few, len(slab.z)), slab.n_words), device=slab.z.device)
    parts = [_few_rows(z, slab.n_words, t, rooms) for z, t in zip(slab.z.split(few), at_targets.split(few))]
    maxima, *sums = (torch.cat(column) for column in zip(*parts))
    ids = _top_ids(slab.z, maxima, min(top_k, slab.n_words))
    return (maxima.amax(-1), *sums), slab.z.gather(-1, ids), ids + slab.start


def _few_rows(
    z: Float[Tensor, "row word"], n_words: int, at_targets: Float[Tensor, "row target"], rooms: Float[Tensor, "2 row word"]
) -> tuple[Tensor, ...]:
    """Every block's largest logit, S, E, and how many logits are above each target's."""
    maxima = z.view(len(z), -1, BLOCK).amax(-1)
    z, (shifted, weights) = z[:, :n_words], rooms[:, : len(z)]
    torch.sub(z, maxima.amax(-1, keepdim=True), out=shifted)
    total = torch.exp(shifted, out=weights).sum(-1)
    weighted = weights.mul_(shifted).sum(-1)
    larger = torch.empty_like(at_targets)
    for j in range(at_targets.shape[1]):
        larger[:, j] = torch.gt(z, at_targets[:, j : j + 1], out=weights).sum(-1)
    return maxima, total, weighted, larger


def _top_ids(z: Float[Tensor, "row word"], maxima: Float[Tensor, "row block"], top_k: int) -> Int[Tensor, "row k"]:
    """The k largest of each row. A word of the top k whose block were not among the k first would have k better
    words before it, one in each of those."""
    blocks = largest(maxima, min(top_k, maxima.shape[1])).sort(-1).values
    ids = (blocks[..., None] * BLOCK + torch.arange(BLOCK, device=z.device)).flatten(1)
    return ids.gather(-1, largest(z.gather(-1, ids), top_k))


def largest(values: Float[Tensor, "row n"], k: int) -> Int[Tensor, "row k"]:
    """Where the k largest are, the largest first; of equal ones the first, which only a sort of all can tell."""
    top = values.topk(k, dim=-1)
    tied = ((values >= top.values[:, -1:]).sum(-1) != k) | (top.values.diff(dim=-1) == 0).any(-1)
    if bool(tied.any()):
        top.indices[tied] = values[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return top.indices
