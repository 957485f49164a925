"""The residual stream through the final norm and the unembedding; every lens, trajectory, margin and score uses this module.

`predictions_of` computes the distribution over the whole vocabulary and keeps the top tokens, the entropy, and the
probabilities and ranks of given tokens. `logits_of` keeps all logits. Both work on chunks of vectors:

1. Apply the model's own final norm in the model's dtype and multiply by W_U in float32, into one buffer per slice of the
   vocabulary; the buffers are reused for every chunk. Half-precision weights are converted a block of tokens at a time (a
   product in half precision would give different tokens equal logits). For other TransformerLens models, b_U is added and their
   adapter's transform of the logits (a soft cap, a scale) is applied.
2. For every slice z: the maximum of every block of 64 tokens; m = max z, S = Σ exp(z−m), E = Σ exp(z−m)(z−m); and the number of
   logits above each target's. A few rows at a time, so that they stay in the CPU's cache. The top k tokens are in the k blocks
   with the largest maxima; of equal logits the lowest id comes first.
3. Combine the slices: m = max mᵢ, S = Σ exp(mᵢ−m) Sᵢ, E = Σ exp(mᵢ−m) (Eᵢ + (mᵢ−m) Sᵢ), ranks summed. Then
   log p = z − m − log S, and entropy = log S − E / S, in nats. A token's rank is the number of tokens with a larger logit.

TransformerLens's `logit_readout` refuses models without a plain final norm and unembedding (an encoder, a head between the two).
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

from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.moved import moved_names
from hooked_qwen2vl.overflow import finite
from hooked_qwen2vl.protocols import Model

__getattr__ = moved_names(__name__)

BLOCK = 64  # tokens per block; the maximum of each block is kept
SLICE = 32768  # tokens per slice; a buffer is padded to whole blocks and takes 16 MB for 128 rows
ROWS_AT_ONCE = 4  # rows summarised at once on a CPU: they and two copies of them fit in its cache
FLOAT32_TOKENS = 4096  # half-precision columns of W_U converted to float32 at a time; divides SLICE


@dataclass(frozen=True)
class Predictions:
    """Summary of the next-token distribution of every row.

    Attributes:
        ids: [row k] top tokens, by decreasing logit; of equal logits the lower id comes first.
        probs: [row k] their probabilities.
        entropy: [row] nats.
        target_probs: [row target]; target_ranks: [row target], 0 is the most probable token.
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
    """Summaries of the distributions that the final norm and the unembedding give for vectors of the residual stream, on the CPU.

    Args:
        vectors: before the final norm.
        targets: token ids whose probability and rank is wanted, equally many for each row (shape [row 0] for none).
        chunk_size: number of rows whose logits are in memory at once, in float32.
    Raises:
        ValueError: top_k or a target is out of range.
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
    """All logits of vectors of the residual stream, float32 on the CPU: 4 bytes × d_vocab per vector.

    Args:
        vectors: before the final norm.
    """
    rows = vectors.flatten(0, -2)
    logits = _Logits(model, min(chunk_size, len(rows)))
    parts = []
    for chunk in rows.split(chunk_size):
        logits.compute(chunk)
        parts.append(torch.cat([one.z[:, : one.n_tokens] for one in logits.slices(len(chunk))], dim=-1).cpu())
    return torch.cat(parts).unflatten(0, vectors.shape[:-1])


def final_norm(model: Model, vectors: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """The vectors after the model's own final norm, in the model's dtype; unchanged if it has none."""
    vectors = vectors.to(model.W_U.device, model.W_U.dtype)
    if getattr(model.cfg, "normalization_type", None) is None:
        return vectors
    return finite(model.ln_final(vectors[None])[0], "ln_final")


def characters(model: Model, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """(text of the token ids, for each token the half-open range of the characters it covers, wholly or in part)."""
    text, spans, before = model.tokenizer.decode(ids), [], 0
    for n in range(1, len(ids) + 1):
        so_far = model.tokenizer.decode(ids[:n])
        agreed = len(os.path.commonprefix((text, so_far)))  # an incomplete character decodes to a replacement character
        spans.append((before, min(len(text), agreed + (len(so_far) > agreed))))
        before = agreed
    return text, spans


@dataclass(frozen=True)
class _Slice:
    """Logits of one slice of the vocabulary for the rows of a chunk.

    Attributes:
        z: [row token], padded to whole blocks with −inf.
        start, n_tokens: the slice has the token ids start … start + n_tokens − 1.
    """

    z: Float[Tensor, "row token"]
    start: int
    n_tokens: int


class _Logits:
    """Logits of a chunk of vectors in slices of the vocabulary; every chunk overwrites the same buffers."""

    def __init__(self, model: Model, n_rows: int):
        self.model = model
        self.d_vocab, self.device = model.W_U.shape[1], model.W_U.device
        self.bias = model.b_U if bool(model.b_U.any()) else None
        self.transform = getattr(getattr(model, "adapter", None), "apply_output_logits_transform", None)
        if not isinstance(model, HookedQwen2VL):
            from transformer_lens.tools.analysis import logit_readout  # slow: it loads all models that bridges know

            logit_readout(model, model.W_U.new_zeros(1, model.W_U.shape[0]), targets=[0])  # refuses unsuitable models
        self.buffers = []
        for start in range(0, self.d_vocab, SLICE):
            n = min(SLICE, self.d_vocab - start)
            self.buffers.append(torch.empty((n_rows, -(-n // BLOCK) * BLOCK), device=self.device))
            self.buffers[-1][:, n:] = float("-inf")

    def slices(self, n_rows: int) -> list[_Slice]:
        """The logits that `compute` wrote last, for the first rows of the buffers."""
        starts = range(0, self.d_vocab, SLICE)
        return [_Slice(z[:n_rows], start, min(SLICE, self.d_vocab - start)) for z, start in zip(self.buffers, starts)]

    def compute(self, vectors: Float[Tensor, "row d_model"]) -> None:
        """Fills the buffers; half-precision weights are multiplied in float32, which is exact and on many CPUs several times faster."""
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
    """The fields of a `Predictions`, combined from all slices."""
    at_targets = _at(slices, targets)
    sums, values, ids = zip(*(_read(one, at_targets, top_k) for one in slices))
    tops, totals, weighted, larger = (torch.stack(column) for column in zip(*sums))  # [slice row], larger [slice row target]
    top = tops.amax(0)
    shift = tops - top
    scale = shift.exp()
    total = (scale * totals).sum(0)
    entropy = total.log() - (scale * (weighted + shift * totals)).sum(0) / total
    values, ids = torch.cat(values, -1), torch.cat(ids, -1)  # in order of ids among equal values
    best = largest(values, top_k)
    log_probs, target_log_probs = (z - top[:, None] - total.log()[:, None] for z in (values.gather(-1, best), at_targets))
    return ids.gather(-1, best), log_probs.exp(), entropy, target_log_probs.exp(), larger.sum(0).long(), target_log_probs


def _at(slices: list[_Slice], ids: Int[Tensor, "row n"]) -> Float[Tensor, "row n"]:
    """The logits of the given tokens of each row."""
    found = torch.empty(ids.shape, device=ids.device)
    for one in slices:
        inside = (ids >= one.start) & (ids < one.start + one.n_tokens)
        found = torch.where(inside, one.z.gather(-1, (ids - one.start).clamp(0, one.n_tokens - 1)), found)
    return found


def _read(one: _Slice, at_targets: Float[Tensor, "row target"], top_k: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """For one slice: (m, S, E, number of logits above each target's), the top k logits, and their ids."""
    few = ROWS_AT_ONCE if one.z.device.type == "cpu" else len(one.z)
    buffers = torch.empty((2, min(few, len(one.z)), one.n_tokens), device=one.z.device)
    parts = [_summarise_rows(z, one.n_tokens, t, buffers) for z, t in zip(one.z.split(few), at_targets.split(few))]
    maxima, *sums = (torch.cat(column) for column in zip(*parts))
    ids = _top_ids(one.z, maxima, min(top_k, one.n_tokens))
    return (maxima.amax(-1), *sums), one.z.gather(-1, ids), ids + one.start


def _summarise_rows(
    z: Float[Tensor, "row filled"], n_tokens: int, at_targets: Float[Tensor, "row target"], buffers: Float[Tensor, "2 rows_at_once token"]
) -> tuple[Tensor, ...]:
    """For each row: the maximum of every block, S, E, and the number of logits above each target's."""
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
    """Ids of the k largest logits of each row, looked for in the k blocks with the largest maxima.

    That is enough: a token in any other block has at least k tokens before it, the maxima of those k blocks.
    """
    blocks = largest(maxima, min(top_k, maxima.shape[1])).sort(-1).values
    ids = (blocks[..., None] * BLOCK + torch.arange(BLOCK, device=z.device)).flatten(1)
    return ids.gather(-1, largest(z.gather(-1, ids), top_k))


def largest(values: Float[Tensor, "row n"], k: int) -> Int[Tensor, "row k"]:
    """Indices of the k largest values, in decreasing order; equal values keep their order, for which tied rows are sorted."""
    top = values.topk(k, dim=-1)
    tied = ((values >= top.values[:, -1:]).sum(-1) != k) | (top.values.diff(dim=-1) == 0).any(-1)
    if bool(tied.any()):
        top.indices[tied] = values[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return top.indices
