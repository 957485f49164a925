"""The logit lens: what would the model say if it stopped after each block? (nostalgebraist, 2020)

1. Run the model without logits, keeping only the residual stream at the layers and positions asked for:
   layer l of 0..L is the stream before block l (0: the embeddings), layer L after the last block.
2. Read every layer through the model's own final norm, with statistics recomputed for that layer, and W_U.
3. Keep the top k tokens, the entropy (nats) and the targets; logits of all layers × positions × d_vocab never exist.
4. Compare the top token of layer L with the model's own.

Layer L *is* the model's own prediction, read in float32. A half-precision model computes its logits in its own precision,
where the best tokens often tie or swap ranks: `differs` says at which positions. HF's last hidden state is already normed, and
notebooks that norm it again read layer L wrongly; here the stream is always the residual stream before any norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.common.prompts import Prompt, as_prompt
from analyses.common.result import Result
from analyses.common.vocabulary import Predictions, predictions_of
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.geometry import Place
from hooked_qwen2vl.layers import readable
from hooked_qwen2vl.moved import moved_names
from hooked_qwen2vl.protocols import Model

__getattr__ = moved_names(__name__)

CHUNK = 128  # positions whose logits, the model's own, are computed at once


@dataclass(frozen=True)
class LogitLens(Result):
    """The most probable tokens at every layer, at the chosen positions of one prompt.

    Attributes:
        top_ids: [layer pos k] token ids, the most probable first.
        top_probs: [layer pos k] their probabilities.
        entropy: [layer pos] of the whole distribution, nats.
        final_probs: [layer pos] probability of the token that layer L puts first.
        final_ranks: [layer pos] its rank, 0 the most probable.
        target_ids: [target] the tokens asked for, if any.
        target_probs: [layer pos target] their probabilities.
        target_ranks: [layer pos target] their ranks, 0 the most probable.
        positions: positions in the prompt.
        layers: the layers read, 0 … L.
        layer_labels: "0_pre" … "final_post".
        prompt_tokens: the token at each position, as text.
        top_tokens: text of top_ids, nested by layer, position and k.
        target_tokens: text of target_ids.
        grid: (rows, cols) of image tokens when the positions are one whole image, else None.
        model_name: of the model.
        model_ids: [pos] the token that the model's own logits put first; None in a file of an earlier version.
        differs: [pos] whether layer L, read in float32, puts another token first than the model's own logits.
    """

    top_ids: Int[Tensor, "layer pos k"]
    top_probs: Float[Tensor, "layer pos k"]
    entropy: Float[Tensor, "layer pos"]
    final_probs: Float[Tensor, "layer pos"]
    final_ranks: Int[Tensor, "layer pos"]
    target_ids: Int[Tensor, "target"] | None
    target_probs: Float[Tensor, "layer pos target"] | None
    target_ranks: Int[Tensor, "layer pos target"] | None
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    layer_labels: tuple[str, ...]
    prompt_tokens: tuple[str, ...]
    top_tokens: tuple
    target_tokens: tuple[str, ...]
    grid: tuple[int, int] | None
    model_name: str
    model_ids: Int[Tensor, "pos"] | None = None
    differs: Bool[Tensor, "pos"] | None = None

    @property
    def n_differs(self) -> int:
        """Number of positions where layer L puts another token first than the model's own logits; see `differs`."""
        return 0 if self.differs is None else int(self.differs.sum())

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each layer, position and rank; probabilities in 0..1, entropy in nats.

        `differs_from_model` is about the position, at every layer alike: whether layer L puts another token first than the model.
        """
        rows = []
        for layer, label in enumerate(self.layer_labels):
            for index, position in enumerate(self.positions):
                for rank, token in enumerate(self.top_tokens[layer][index]):
                    rows.append(
                        {
                            "layer": self.layers[layer],
                            "layer_label": label,
                            "position": position,
                            "prompt_token": self.prompt_tokens[index],
                            "rank": rank + 1,
                            "token_id": int(self.top_ids[layer, index, rank]),
                            "token": token,
                            "probability": float(self.top_probs[layer, index, rank]),
                            "entropy_nats": float(self.entropy[layer, index]),
                            "differs_from_model": self.differs is not None and bool(self.differs[index]),
                        }
                    )
        return pd.DataFrame(rows)

    def plot_image(self, image: Any, path: Any = None, every_token: bool = False) -> Any:
        """The image with the top token of each image token drawn over it, at some layers.

        A small image has a word in each cell. A photograph has hundreds of cells: neighbours with the same top token are one
        region, named once, with a legend of the most frequent tokens and an enlarged part.

        Args:
            image: the picture, in original pixels.
            every_token: write a word into every cell of a photograph too, at its last layer; the figure is as large as that
                needs, so save it as PDF.
        Raises:
            ValueError: the lens was not read at one whole image, or not at one of these proportions.
        """
        from analyses.views.lens import image_overlay

        return image_overlay(self, image, path, every_token)

    def page(self, path: Any = None, images: Sequence[Any] = ()) -> Any:
        """A circuitsvis page that opens without a network: top-k tokens by layer, coloured by their probability.

        A notebook shows it if it is the last expression of a cell. `path` writes it to a file; `images` are shown above it.
        """
        from analyses.views.circuits import lens_page

        return lens_page(self, path, images)

    def plot(self, path: Any = None, question: str = "") -> Any:
        """The classic heat map: layer × position, the top token in each cell, coloured by its probability.

        Args:
            question: for the title.
        """
        from analyses.views.lens import heat_map

        return heat_map(self, path, question)


@torch.no_grad()
def logit_lens(
    model: Model,
    inputs: Prompt,
    positions: Place = "last",
    top_k: int = 5,
    targets: str | int | Sequence[str | int] | None = None,
    row: int = 0,
    chunk_size: int = 128,
    layers: Sequence[int] | None = None,
    translator: Any = None,
) -> LogitLens:
    """Reads the residual stream of any TransformerLens model through its own final norm and unembedding.

    Memory: `positions` × `layers` vectors of d_model, and chunk_size × d_vocab logits at a time.

    Args:
        inputs: one prompt: `Inputs`, a string or token ids.
        positions: a place (see `Inputs.resolve`): "last", "image", a box, positions, a slice, a mask.
        targets: tokens (or single-token strings) whose probability and rank to follow.
        row: which prompt of a batch.
        chunk_size: how many vectors are read at once; their logits take 4 bytes × d_vocab each.
        layers: which to read, 0 (the embedding) … L (after the last block), negative from the end; None reads all.
        translator: a tuned lens (`analyses.tuned_lens`), applied to each layer before the norm and the unembedding.
    Raises:
        ValueError: no such row, segment, position or layer, more top_k than tokens, or a tuned lens of another model.
    """
    prompt = as_prompt(model, inputs)
    chosen = prompt.resolve(positions, row).tolist()
    tokens = prompt.tokens[row]
    read_layers = _layers(layers, model.cfg.n_layers)
    streams, model_ids = residual_at(model, inputs, sorted({*read_layers, model.cfg.n_layers}), chosen, row)
    if translator is not None:
        fitted_to = getattr(translator, "model_name", "")
        if fitted_to and fitted_to != str(model.cfg.model_name):
            raise ValueError(
                f"this lens was fitted to {fitted_to}, the model is {model.cfg.model_name}: fit one to it, or set "
                f"lens.model_name = '' to read one model with another's translators on purpose."
            )
        streams = {layer: translator.translate(vectors, layer) for layer, vectors in streams.items()}
    wanted = [] if targets is None else _token_ids(model, targets)
    shared = torch.tensor(wanted, dtype=torch.long).expand(len(chosen), -1)
    # Layer L is read first, because its top token is followed through the other layers.
    last = predictions_of(model, streams[model.cfg.n_layers], shared, top_k, chunk_size)
    followed = torch.cat((last.ids[:, :1], shared), dim=1)
    last = replace(
        last,
        target_probs=torch.cat((last.probs[:, :1], last.target_probs), dim=1),
        target_ranks=torch.cat((torch.zeros_like(followed[:, :1]), last.target_ranks), dim=1),
        target_log_probs=torch.cat((last.probs[:, :1].log(), last.target_log_probs), dim=1),
    )
    read = {
        layer: last if layer == model.cfg.n_layers else predictions_of(model, streams.pop(layer), followed, top_k, chunk_size)
        for layer in dict.fromkeys(read_layers)
    }
    lens = _result(model, inputs, [read[layer] for layer in read_layers], read_layers, tokens, chosen, wanted, positions, row)
    return replace(lens, model_ids=model_ids, differs=last.ids[:, 0] != model_ids)


def _result(
    model: Model,
    inputs: Any,
    read: list[Predictions],
    layers: list[int],
    tokens: Int[Tensor, "pos"],
    chosen: list[int],
    wanted: list[int],
    positions: Any,
    row: int,
) -> LogitLens:
    """The predictions of all layers as one `LogitLens`, with labels and text."""
    ids, probs, entropy, target_probs, target_ranks = (
        torch.stack([getattr(part, name) for part in read]) for name in ("ids", "probs", "entropy", "target_probs", "target_ranks")
    )
    whole = positions if isinstance(positions, str) and positions.startswith("image") else None
    grid = inputs.grid(row, int(whole[6:-1] or 0) if whole != "image" else 0) if whole else None
    last = model.cfg.n_layers
    return LogitLens(
        top_ids=ids,
        top_probs=probs,
        entropy=entropy,
        final_probs=target_probs[..., 0],
        final_ranks=target_ranks[..., 0],
        target_ids=torch.tensor(wanted) if wanted else None,
        target_probs=target_probs[..., 1:] if wanted else None,
        target_ranks=target_ranks[..., 1:] if wanted else None,
        positions=tuple(chosen),
        layers=tuple(layers),
        layer_labels=tuple("final_post" if layer == last else f"{layer}_pre" for layer in layers),
        prompt_tokens=tuple(_texts(model, tokens[chosen])),
        top_tokens=_texts(model, ids),
        target_tokens=tuple(_texts(model, torch.tensor(wanted))) if wanted else (),
        grid=grid if grid is not None and grid[0] * grid[1] == len(chosen) else None,
        model_name=str(getattr(model.cfg, "model_name", type(model).__name__)),
    )


def residual_stack(model: Model, inputs: Prompt) -> tuple[Float[Tensor, "layer batch pos d_model"], list[str]]:
    """(the residual stream before every block and after the last, without the final norm; TransformerLens's labels)."""
    names = [_hook(layer, model.cfg.n_layers) for layer in range(model.cfg.n_layers + 1)]
    _, cache = model.run_with_cache(inputs, names_filter=names)
    return cache.accumulated_resid(return_labels=True)


@torch.no_grad()
def residual_at(
    model: Model, inputs: Prompt, layers: Sequence[int], chosen: Sequence[int], row: int
) -> tuple[dict[int, Float[Tensor, "pos d_model"]], Int[Tensor, "pos"]]:
    """(layer -> the residual stream, the token that the model's own logits put first), at the chosen positions of a row.

    A `HookedQwen2VL` caches only these positions and computes no other logits; other models cache the whole prompt.
    """
    names = {layer: _hook(layer, model.cfg.n_layers) for layer in layers}
    if not isinstance(model, HookedQwen2VL):
        logits, cache = model.run_with_cache(inputs, names_filter=list(names.values()))
        return {layer: cache[name][row, chosen] for layer, name in names.items()}, logits[row, chosen].argmax(-1).cpu()
    normalized = "ln_final.hook_normalized"
    settings = {"pos_slice": list(chosen), "return_type": None}
    _, cache = model.run_with_cache(inputs, names_filter=[*names.values(), normalized], **settings)
    weight = readable(model.ln_final.w, "the final norm's weight")
    tops = [model.unembed(part.to(weight.device) * weight).argmax(-1).cpu() for part in cache[normalized][row].split(CHUNK)]
    return {layer: cache[name][row] for layer, name in names.items()}, torch.cat(tops)


def _hook(layer: int, n_layers: int) -> str:
    return f"blocks.{layer}.hook_resid_pre" if layer < n_layers else f"blocks.{layer - 1}.hook_resid_post"


def _layers(layers: Sequence[int] | None, n_layers: int) -> list[int]:
    if layers is None:
        return list(range(n_layers + 1))
    wrong = [layer for layer in layers if not -n_layers - 1 <= layer <= n_layers]
    if wrong or not len(layers):
        raise ValueError(f"layers must be in 0..{n_layers} (negative from the end), got {list(layers)}.")
    return [layer % (n_layers + 1) for layer in layers]


def _token_ids(model: Model, targets: str | int | Sequence[str | int]) -> list[int]:
    from transformer_lens.tools.analysis._model_state import to_token_ids  # slow: it loads all models that bridges know

    return to_token_ids(model, targets)


def _texts(model: Model, ids: Tensor) -> Any:
    """Token ids as text, nested like the tensor; the ids as strings if the model has no tokenizer."""
    if ids.ndim > 1:
        return tuple(_texts(model, part) for part in ids)
    tokenizer = getattr(model, "tokenizer", None)
    return [str(int(i)) if tokenizer is None else tokenizer.decode([int(i)]) for i in ids]
