"""What whole-vocabulary distributions say, without keeping them: top tokens, entropy, and where given tokens stand.

1. Norm a chunk of vectors with the model's own final norm, and multiply by W_U in float32 (half-precision
   weights are widened a block of words at a time): one buffer of chunk × words, used again for each chunk.
2. A few rows at a time, so that they stay in the processor's cache: the largest logit of every block of 64 words;
   the top k are in the k blocks with the largest, ties to the lowest id.
3. m = max z, S = Σ exp(z−m): log p = z − m − log S, and entropy = log S − Σ exp(z−m)(z−m) / S, nats.
4. A token's rank is the number of words with a larger logit.

`logit_readout` of TransformerLens gives the same numbers for any model and is used for every model but ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.tools.analysis import logit_readout

from hooked_qwen2vl import HookedQwen2VL

WORDS = 64  # to a block whose largest logit is kept; a vocabulary is filled up to whole blocks
WIDENED = 4096  # half-precision words made float32 at a time


@dataclass(frozen=True)
class Readout:
    """What is kept of every row's distribution.

    Attributes:
        ids: [row k] by falling logit, ties by rising id.
        probs: [row k] their probabilities.
        entropy: [row] nats.
        target_probs: [row target]; target_ranks: [row target], 0 the most probable.
    """

    ids: Int[Tensor, "row k"]
    probs: Float[Tensor, "row k"]
    entropy: Float[Tensor, "row"]
    target_probs: Float[Tensor, "row target"]
    target_ranks: Int[Tensor, "row target"]


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
        ValueError: more top_k than words.
    """
    n_words = model.W_U.shape[1]
    if not 1 <= top_k <= n_words:
        raise ValueError(f"top_k must be in 1..{n_words}, the number of words, got {top_k}.")
    logits_of = _Logits(model, min(chunk_size, len(vectors)))
    parts = []
    for start in tqdm(range(0, len(vectors), chunk_size), desc="lens", unit="chunk", delay=2, leave=False):
        rows = slice(start, start + chunk_size)
        logits, wanted = logits_of(vectors[rows]), targets[rows].to(logits_of.buffer.device)
        few = logits_of.few
        parts += [_summary(z, n_words, t, top_k, logits_of.scratch) for z, t in zip(logits.split(few), wanted.split(few))]
    return Readout(*(torch.cat(column).cpu() for column in zip(*parts)))


class _Logits:
    """Logits of a chunk of vectors, in a buffer that every chunk overwrites; what fills up the last block is −inf."""

    def __init__(self, model: Any, n_rows: int):
        self.model = model
        self.n_words, device = model.W_U.shape[1], model.W_U.device
        width = -(-self.n_words // WORDS) * WORDS
        self.few = 4 if device.type == "cpu" else n_rows
        self.buffer = torch.empty((n_rows, width), device=device)
        self.buffer[:, self.n_words :] = float("-inf")
        self.scratch = torch.empty((min(self.few, n_rows), width), device=device)
        self.widened: Tensor | None = None

    def __call__(self, vectors: Float[Tensor, "row d_model"]) -> Float[Tensor, "row word"]:
        out = self.buffer[: len(vectors)]
        if isinstance(self.model, HookedQwen2VL):
            self._unembed(vectors, out[:, : self.n_words])
        else:
            read = logit_readout(self.model, vectors, return_type="log_probs", chunk_size=len(vectors))
            out[:, : self.n_words] = read.values
        return out

    def _unembed(self, vectors: Float[Tensor, "row d_model"], out: Float[Tensor, "row word"]) -> None:
        W_U = self.model.W_U
        normalized = self.model.ln_final(vectors[None].to(W_U.device, W_U.dtype))[0]
        if W_U.dtype == torch.float32:
            torch.mm(normalized, W_U, out=out)
        elif W_U.dtype == torch.float64:
            out.copy_(normalized @ W_U)
        else:
            self._unembed_widened(normalized.float(), W_U, out)

    def _unembed_widened(self, normalized: Tensor, W_U: Float[Tensor, "d_model word"], out: Tensor) -> None:
        """In float32 from half-precision weights: exact products, and on many CPUs several times faster than theirs."""
        if self.widened is None:
            self.widened = torch.empty((WIDENED, len(W_U)), device=W_U.device)
        for first in range(0, self.n_words, WIDENED):
            some = W_U[:, first : first + WIDENED].T
            weight = self.widened[: len(some)].copy_(some)
            torch.mm(normalized, weight.T, out=out[:, first : first + WIDENED])


def _summary(
    z: Float[Tensor, "row word"], n_words: int, targets: Int[Tensor, "row target"], top_k: int, scratch: Tensor
) -> tuple[Tensor, ...]:
    """The fields of a `Readout` for a few rows; overwrites them."""
    maxima = z.unflatten(-1, (-1, WORDS)).amax(-1)
    ids = _top_ids(z, maxima, top_k)
    z = z[:, :n_words].sub_(maxima.amax(-1, keepdim=True))
    room = scratch[: len(z), :n_words]
    weights = torch.exp(z, out=room)
    total = weights.sum(-1)
    entropy = total.log() - torch.stack([torch.dot(w, logits) for w, logits in zip(weights, z)]) / total
    at_targets = z.gather(-1, targets)
    larger = [torch.gt(z, at_targets[:, [j]], out=room).sum(-1) for j in range(targets.shape[1])]
    ranks = torch.stack(larger, -1).long() if larger else torch.zeros_like(targets)
    return ids, _probs(z.gather(-1, ids), total), entropy, _probs(at_targets, total), ranks


def _probs(shifted: Float[Tensor, "row n"], total: Float[Tensor, "row"]) -> Float[Tensor, "row n"]:
    return shifted.exp() / total[:, None]


def _top_ids(z: Float[Tensor, "row word"], maxima: Float[Tensor, "row block"], top_k: int) -> Int[Tensor, "row k"]:
    """The k largest of each row. A word of the top k whose block were not among the k first would have k better
    words before it, one in each of those."""
    blocks = _first_blocks(maxima, min(top_k, maxima.shape[1])).sort(-1).values
    ids = (blocks[..., None] * WORDS + torch.arange(WORDS, device=z.device)).flatten(1)
    order = z.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return ids.gather(-1, order)


def _first_blocks(maxima: Float[Tensor, "row block"], n: int) -> Int[Tensor, "row n"]:
    """The n blocks with the largest maxima; of equal ones the first, which only a sort of all can tell."""
    top = maxima.topk(n, dim=-1)
    if bool(((maxima >= top.values[:, -1:]).sum(-1) == n).all()):
        return top.indices
    return maxima.sort(dim=-1, descending=True, stable=True).indices[:, :n]
