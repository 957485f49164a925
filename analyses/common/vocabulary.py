"""How the residual stream is read through the vocabulary: the one path of every lens, trajectory, margin and score.

`predictions_of` keeps of every whole-vocabulary distribution what is asked for: top tokens, entropy, and where given tokens stand.
`logits_of` keeps all of it, for the few vectors of a trajectory. Both:

1. Norm a chunk of vectors with the model's own final norm, in its own dtype, and multiply by W_U in float32
   (half-precision weights are widened a block of tokens at a time; a product in half precision would tie tokens that
   are not tied) into slices of the vocabulary, which every chunk uses again. Other TransformerLens models add b_U and what their
   adapter does to logits (a soft cap, a scale).
2. Of every slice z, a few rows at a time so that they stay in the processor's cache: the largest logit of every
   block of 64 tokens; m = max z, S = Σ exp(z−m), E = Σ exp(z−m)(z−m); how many logits are above a target's.
   The top k are in the k blocks with the largest maxima, ties to the lowest id.
3. The slices joined: m = max mᵢ, S = Σ exp(mᵢ−m) Sᵢ, E = Σ exp(mᵢ−m) (Eᵢ + (mᵢ−m) Sᵢ), ranks summed.
   log p = z − m − log S, and entropy = log S − E / S, nats. A token's rank is the number of tokens with a larger logit.

A model that cannot be read so (an encoder, a head between norm and unembedding) is refused by TransformerLens's `logit_readout`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.tools.analysis import logit_readout

from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.moved import moved_names
from hooked_qwen2vl.overflow import finite
from hooked_qwen2vl.protocols import Model

__getattr__ = moved_names(__name__)

BLOCK = 64  # tokens whose largest logit is kept
SLICE = 32768  # tokens whose logits lie together, filled up to whole blocks; 16 MB for 128 rows
ROWS_AT_ONCE = 4  # rows read at once on a CPU: with two copies of themselves they stay in its cache
FLOAT32_TOKENS = 4096  # half-precision columns of W_U made float32 at a time, a part of a slice


@dataclass(frozen=True)
class Predictions:
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
def predictions_of(
    model: Model,
    vectors: Float[Tensor, "row d_model"],
    targets: Int[Tensor, "row target"],
    top_k: int = 5,
    chunk_size: int = 128,
) -> Predictions:
    """Reads vectors of the residual stream through the model's own final norm and unembedding; results on the CPU.

    Args:
        vectors: un-normed.
        targets: tokens to follow, any number for each row (none: [row 0]).
        chunk_size: rows whose logits exist at once, in float32.
    Raises:
        ValueError: more top_k than tokens, or a target that is no token.
    """
    d_vocab = model.W_U.shape[1]
    if not 1 <= top_k <= d_vocab:
        raise ValueError(f"top_k must be in 1..{d_vocab}, the number of tokens, got {top_k}.")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < d_vocab:
        raise ValueError(f"targets must be token ids in 0..{d_vocab - 1}, got {int(targets.min())}..{int(targets.max())}.")
    logits = _Logits(model, min(chunk_size, len(vectors)))
    parts = []
    for start in tqdm(range(0, len(vectors), chunk_size), desc="lens", unit="chunk", delay=2, leave=False):
        rows = slice(start, start + chunk_size)
        logits.compute(vectors[rows])
        parts.append(_summary(logits.slices(len(vectors[rows])), targets[rows].to(model.W_U.device), top_k))
    return Predictions(*(torch.cat(column).cpu() for column in zip(*parts)))


@torch.no_grad()
def logits_of(model: Model, vectors: Float[Tensor, "*axes d_model"], chunk_size: int = 128) -> Float[Tensor, "*axes d_vocab"]:
    """All logits of vectors of the residual stream, float32 on the CPU: 4 bytes × d_vocab for each vector.

    Args:
        vectors: un-normed.
    """
    rows = vectors.flatten(0, -2)
    logits = _Logits(model, min(chunk_size, len(rows)))
    parts = []
    for chunk in rows.split(chunk_size):
        logits.compute(chunk)
        parts.append(torch.cat([one.z[:, : one.n_tokens] for one in logits.slices(len(chunk))], dim=-1).cpu())
    return torch.cat(parts).unflatten(0, vectors.shape[:-1])


def final_norm(model: Model, vectors: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """The vectors through the model's own final norm, in its own dtype; as they are where it has none."""
    vectors = vectors.to(model.W_U.device, model.W_U.dtype)
    if getattr(model.cfg, "normalization_type", None) is None:
        return vectors
    return finite(model.ln_final(vectors[None])[0], "ln_final")


def characters(model: Model, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """(the text of token ids, which of its characters each token is, or is a part of: from, to)."""
    text, spans, before = model.tokenizer.decode(ids), [], 0
    for n in range(1, len(ids) + 1):
        so_far = model.tokenizer.decode(ids[:n])
        agreed = len(os.path.commonprefix((text, so_far)))  # a character that is not whole yet shows as another
        spans.append((before, min(len(text), agreed + (len(so_far) > agreed))))
        before = agreed
    return text, spans


@dataclass(frozen=True)
class _Slice:
    """Logits of some tokens of the vocabulary for the rows of a chunk.

    Attributes:
        z: [row token], filled up to whole blocks with −inf.
        start, n_tokens: which tokens they are.
    """

    z: Float[Tensor, "row token"]
    start: int
    n_tokens: int


class _Logits:
    """Logits of a chunk of vectors, slice by slice, in buffers that every chunk overwrites."""

    def __init__(self, model: Model, n_rows: int):
        self.model = model
        self.d_vocab, self.device = model.W_U.shape[1], model.W_U.device
        self.bias = model.b_U if bool(model.b_U.any()) else None
        self.transform = getattr(getattr(model, "adapter", None), "apply_output_logits_transform", None)
        if not isinstance(model, HookedQwen2VL):
            logit_readout(model, model.W_U.new_zeros(1, model.W_U.shape[0]), targets=[0])  # refuses what cannot be read so
        self.buffers = []
        for start in range(0, self.d_vocab, SLICE):
            n = min(SLICE, self.d_vocab - start)
            self.buffers.append(torch.empty((n_rows, -(-n // BLOCK) * BLOCK), device=self.device))
            self.buffers[-1][:, n:] = float("-inf")

    def slices(self, n_rows: int) -> list[_Slice]:
        """The logits of the first rows, as computed last."""
        starts = range(0, self.d_vocab, SLICE)
        return [_Slice(z[:n_rows], start, min(SLICE, self.d_vocab - start)) for z, start in zip(self.buffers, starts)]

    def compute(self, vectors: Float[Tensor, "row d_model"]) -> None:
        """Fills the buffers, in float32 also from half-precision weights: exact products, and on many CPUs several times faster."""
        W_U, normalized = self.model.W_U, final_norm(self.model, vectors)
        narrow = W_U.dtype not in (torch.float32, torch.float64)
        normalized = normalized.float() if narrow else normalized
        step = FLOAT32_TOKENS if narrow else SLICE
        for start in range(0, self.d_vocab, step):
            weight = W_U[:, start : start + step]
            weight = self._as_float32(weight) if narrow else weight
            out = self.buffers[start // SLICE][: len(vectors), start % SLICE :][:, : weight.shape[1]]
            if weight.dtype == out.dtype:
                torch.mm(normalized, weight, out=out)
            else:
                out.copy_(normalized @ weight)
            if self.bias is not None:
                out += self.bias[start : start + step]
            if self.transform is not None:
                out.copy_(self.transform(out))

    def _as_float32(self, weight: Float[Tensor, "d_model token"]) -> Float[Tensor, "d_model token"]:
        return self._float32_buffer[: weight.shape[1]].copy_(weight.T).T

    @cached_property
    def _float32_buffer(self) -> Float[Tensor, "token d_model"]:
        return torch.empty((FLOAT32_TOKENS, self.model.W_U.shape[0]), device=self.device)


def _summary(slices: list[_Slice], targets: Int[Tensor, "row target"], top_k: int) -> tuple[Tensor, ...]:
    """The fields of a `Predictions`, from every slice's own."""
    at_targets = _at(slices, targets)
    sums, values, ids = zip(*(_read(one, at_targets, top_k) for one in slices))
    tops, totals, weighted, larger = (torch.stack(column) for column in zip(*sums))  # [slice row], larger [slice row target]
    top = tops.amax(0)
    shift = tops - top
    scale = shift.exp()
    total = (scale * totals).sum(0)
    entropy = total.log() - (scale * (weighted + shift * totals)).sum(0) / total
    values, ids = torch.cat(values, -1), torch.cat(ids, -1)  # of equal values, the lower id comes first
    best = largest(values, top_k)
    log_probs, target_log_probs = (z - top[:, None] - total.log()[:, None] for z in (values.gather(-1, best), at_targets))
    return ids.gather(-1, best), log_probs.exp(), entropy, target_log_probs.exp(), larger.sum(0).long(), target_log_probs


def _at(slices: list[_Slice], ids: Int[Tensor, "row n"]) -> Float[Tensor, "row n"]:
    """The logits of some tokens of each row."""
    found = torch.empty(ids.shape, device=ids.device)
    for one in slices:
        inside = (ids >= one.start) & (ids < one.start + one.n_tokens)
        found = torch.where(inside, one.z.gather(-1, (ids - one.start).clamp(0, one.n_tokens - 1)), found)
    return found


def _read(one: _Slice, at_targets: Float[Tensor, "row target"], top_k: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Of one slice: (m, S, E, how many logits are above each target's), and its top k with their ids."""
    few = ROWS_AT_ONCE if one.z.device.type == "cpu" else len(one.z)
    buffers = torch.empty((2, min(few, len(one.z)), one.n_tokens), device=one.z.device)
    parts = [_summarise_rows(z, one.n_tokens, t, buffers) for z, t in zip(one.z.split(few), at_targets.split(few))]
    maxima, *sums = (torch.cat(column) for column in zip(*parts))
    ids = _top_ids(one.z, maxima, min(top_k, one.n_tokens))
    return (maxima.amax(-1), *sums), one.z.gather(-1, ids), ids + one.start


def _summarise_rows(
    z: Float[Tensor, "row filled"], n_tokens: int, at_targets: Float[Tensor, "row target"], buffers: Float[Tensor, "2 rows_at_once token"]
) -> tuple[Tensor, ...]:
    """Every block's largest logit, S, E, and how many logits are above each target's."""
    maxima = z.view(len(z), -1, BLOCK).amax(-1)
    z, (shifted, weights) = z[:, :n_tokens], buffers[:, : len(z)]
    torch.sub(z, maxima.amax(-1, keepdim=True), out=shifted)
    total = torch.exp(shifted, out=weights).sum(-1)
    weighted = weights.mul_(shifted).sum(-1)
    larger = torch.empty_like(at_targets)
    for j in range(at_targets.shape[1]):
        larger[:, j] = torch.gt(z, at_targets[:, j : j + 1], out=weights).sum(-1)
    return maxima, total, weighted, larger


def _top_ids(z: Float[Tensor, "row token"], maxima: Float[Tensor, "row block"], top_k: int) -> Int[Tensor, "row k"]:
    """The k largest of each row. A token of the top k whose block were not among the k first would have k better
    tokens before it, one in each of those."""
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
