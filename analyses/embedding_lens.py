"""Nearest neighbours of image tokens: input embeddings, and text tokens in context.

Embedding lens
1. Take the residual stream at some positions, at every layer.
2. Compute the cosine with every row of W_E; keep the k nearest tokens.

Contextual neighbours (LatentLens, arXiv 2602.00462)
1. Run sentences through the model as plain text; keep the residual stream of every token, at several layers. A token that
   follows the same prefix as an earlier one has the same vector and is kept once. The first token of a sentence has no context
   and is an attention sink; it is left out (the authors leave out the first two tokens).
2. Compute the cosine of an image token with all these vectors, over all layers; keep the k nearest, with their sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from analyses.common.prompts import Prompt, as_prompt
from analyses.common.result import Result
from analyses.common.vocabulary import characters, largest
from analyses.logit_lens import residual_stack
from hooked_qwen2vl.protocols import Model

_CHUNK = 1024


@dataclass(frozen=True)
class Neighbours(Result):
    """The nearest neighbours of vectors of one prompt.

    Attributes:
        similarity: [layer pos k] cosines in decreasing order, in [-1, 1].
        indices: [layer pos k] the neighbours: token ids, or indices into the bank.
        tokens: their texts, nested by layer, position and k.
        contexts: their contexts, nested alike: "" for input embeddings, such as "layer 4: a red [circle]" for a bank.
        layers: layers of the vectors. positions: their positions in the prompt.
        model_name: name of the model.
    """

    similarity: Float[Tensor, "layer pos k"]
    indices: Int[Tensor, "layer pos k"]
    tokens: tuple
    contexts: tuple
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    model_name: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer, position and rank."""
        return pd.DataFrame(
            {
                "layer": layer,
                "position": position,
                "rank": rank + 1,
                "token": self.tokens[i][j][rank],
                "context": self.contexts[i][j][rank],
                "cosine": float(self.similarity[i, j, rank]),
            }
            for i, layer in enumerate(self.layers)
            for j, position in enumerate(self.positions)
            for rank in range(self.similarity.shape[-1])
        )

    def plot(self, path: Any = None) -> Any:
        """Layers × positions, with the nearest token in each cell, coloured by its cosine."""
        from analyses.views.lens import neighbours_plot

        return neighbours_plot(self, path)


@dataclass(frozen=True)
class TextBank:
    """Text tokens in context.

    Attributes:
        vectors: [bank_token d_model] residual stream, normalised to length 1, float32.
        tokens: text of each. sentences: the sentence of each. places: index of each token in its sentence.
        layers: [bank_token] layer of each vector.
        model_name: name of the model.
    """

    vectors: Float[Tensor, "bank_token d_model"]
    tokens: tuple[str, ...]
    sentences: tuple[str, ...]
    places: tuple[int, ...]
    layers: Int[Tensor, "bank_token"]
    model_name: str

    def nearest(self, vectors: Float[Tensor, "*axes d_model"], top_k: int = 5) -> tuple[Float[Tensor, "*axes k"], Int[Tensor, "*axes k"]]:
        """(cosines, indices into the bank) of the k nearest bank tokens, over all layers of the bank.

        Raises:
            ValueError: vectors of another size, or fewer bank tokens than k.
        """
        return _nearest(vectors, self.vectors, top_k)


@torch.no_grad()
def embedding_lens(
    model: Model, inputs: Prompt, positions: Any = "image", top_k: int = 5, row: int = 0, layers: Sequence[int] | None = None
) -> Neighbours:
    """The input embeddings nearest to the residual stream; layer 0 of an image token is its image embedding.

    Args:
        inputs, positions, row: as `analyses.logit_lens.logit_lens`.
        layers: 0..L; None: all.
    Raises:
        ValueError: no such segment, position or layer, or more top_k than tokens.
    """
    vectors, layers, chosen = _vectors(model, inputs, positions, row, layers)
    similarity, indices = _nearest(vectors, _unit(model.W_E.detach().cpu()), top_k)
    return Neighbours(
        similarity=similarity,
        indices=indices,
        tokens=_nest(indices, lambda i: model.tokenizer.decode([i])),
        contexts=_nest(indices, lambda i: ""),
        layers=layers,
        positions=chosen,
        model_name=str(model.cfg.model_name),
    )


@torch.no_grad()
def text_bank(model: Model, sentences: Sequence[str], layers: Sequence[int] | None = None, progress: bool = True) -> TextBank:
    """Runs sentences as plain text, without chat template or image, and keeps the residual stream of their tokens.

    Args:
        layers: layers to keep; None: 1..L (layer 0 has no context).
    Raises:
        ValueError: no sentence has two tokens, or no such layer.
    """
    layers = _checked_layers(model, range(1, model.cfg.n_layers + 1) if layers is None else layers)
    seen: set[tuple[int, ...]] = set()
    vectors, tokens, kept, places = [], [], [], []
    for sentence in tqdm(sentences, desc="text bank", unit="sentence", disable=not progress, delay=2):
        ids = model.to_tokens(sentence)
        row = ids[0].tolist()
        fresh = [p for p in range(1, len(row)) if tuple(row[: p + 1]) not in seen]
        seen.update(tuple(row[: p + 1]) for p in fresh)
        if not fresh:
            continue
        stack, _ = residual_stack(model, ids)
        vectors.append(_unit(stack[list(layers), 0][:, fresh].cpu()))
        tokens += [model.tokenizer.decode([row[p]]) for p in fresh]
        kept += [sentence] * len(fresh)
        places += fresh
    if not vectors:
        raise ValueError("expected sentences of at least two tokens: a first token has no context.")
    n = len(layers)
    return TextBank(
        vectors=torch.cat(vectors, dim=1).flatten(0, 1),
        tokens=tuple(tokens) * n,
        sentences=tuple(kept) * n,
        places=tuple(places) * n,
        layers=torch.tensor(layers).repeat_interleave(len(tokens)),
        model_name=str(model.cfg.model_name),
    )


@torch.no_grad()
def contextual_neighbours(
    model: Model,
    inputs: Prompt,
    bank: TextBank,
    positions: Any = "image",
    top_k: int = 5,
    row: int = 0,
    layers: Sequence[int] | None = None,
) -> Neighbours:
    """The text tokens of a bank nearest to the residual stream, over all layers of the bank.

    Args:
        inputs, positions, row, layers: as `embedding_lens`.
        bank: from `text_bank`, of the same model.
    Raises:
        ValueError: as `embedding_lens`, or the bank is of another model.
    """
    if bank.model_name != str(model.cfg.model_name):
        raise ValueError(f"the bank was made with {bank.model_name}, the model is {model.cfg.model_name}: make it again.")
    vectors, layers, chosen = _vectors(model, inputs, positions, row, layers)
    similarity, indices = bank.nearest(vectors, top_k)
    texts = {i: _in_context(model, bank, i) for i in set(indices.flatten().tolist())}
    return Neighbours(
        similarity=similarity,
        indices=indices,
        tokens=_nest(indices, lambda i: bank.tokens[i]),
        contexts=_nest(indices, lambda i: texts[i]),
        layers=layers,
        positions=chosen,
        model_name=str(model.cfg.model_name),
    )


def _in_context(model: Model, bank: TextBank, item: int) -> str:
    """The sentence with the token in brackets; a token that is part of a character is shown as the whole character."""
    text, spans = characters(model, model.to_tokens(bank.sentences[item])[0].tolist())
    start, end = spans[bank.places[item]]
    return f"layer {int(bank.layers[item])}: {text[:start]}[{text[start:end]}]{text[end:]}"


def _vectors(
    model: Model, inputs: Prompt, positions: Any, row: int, layers: Sequence[int] | None
) -> tuple[Float[Tensor, "layer pos d_model"], tuple[int, ...], tuple[int, ...]]:
    layers = _checked_layers(model, range(model.cfg.n_layers + 1) if layers is None else layers)
    stack, _ = residual_stack(model, inputs)
    chosen = as_prompt(model, inputs).resolve(positions, row).tolist()
    return stack[list(layers), row][:, chosen].cpu(), layers, tuple(chosen)


def _checked_layers(model: Model, layers: Sequence[int]) -> tuple[int, ...]:
    layers = tuple(int(layer) for layer in layers)
    if not layers or not all(0 <= layer <= model.cfg.n_layers for layer in layers):
        raise ValueError(f"layers must be in 0..{model.cfg.n_layers}, got {layers}.")
    return layers


def _nearest(
    vectors: Float[Tensor, "*axes d_model"], bank: Float[Tensor, "bank_token d_model"], top_k: int
) -> tuple[Float[Tensor, "*axes k"], Int[Tensor, "*axes k"]]:
    """The k vectors of the bank with the largest cosines, a chunk of vectors at a time; of equal ones the first in the bank."""
    if vectors.shape[-1] != bank.shape[-1] or not 1 <= top_k <= len(bank):
        raise ValueError(f"expected vectors of width {bank.shape[-1]} and top_k in 1..{len(bank)}, got {vectors.shape[-1]} and {top_k}.")
    unit = _unit(vectors).flatten(0, -2)
    tables = ((rows @ bank.T).clamp(-1.0, 1.0) for rows in unit.split(_CHUNK))
    values, indices = (torch.cat(parts).unflatten(0, vectors.shape[:-1]) for parts in zip(*(_largest(t, top_k) for t in tables)))
    return values, indices


def _largest(table: Float[Tensor, "row bank_token"], top_k: int) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    indices = largest(table, top_k)
    return table.gather(-1, indices), indices


def _unit(vectors: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes d"]:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _nest(indices: Tensor, text: Any) -> Any:
    if indices.ndim == 0:
        return text(int(indices))
    return tuple(_nest(part, text) for part in indices)
