"""The logit lens: what would the model say if it stopped after each block? (nostalgebraist, 2020)

1. Run the model, keeping only the residual stream before every block and after the last.
2. Take the positions asked for: entry l of L+1 is the stream before block l, entry L after the last.
3. Read every entry through the model's own final norm, with statistics recomputed for that entry, and W_U.
4. Keep the top k tokens, the entropy (nats) and the targets; logits of all layers × positions × words never exist.

Entry L *is* the model's own prediction. Norming it twice, as notebooks on HF's hidden states do, is the
classic mistake: here the stream is always the un-normed one.
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
from transformer_lens.tools.analysis import logit_readout
from transformer_lens.tools.analysis._model_state import to_token_ids


@dataclass(frozen=True)
class LogitLens:
    """What every layer reads at the chosen positions of one prompt.

    Attributes:
        top_ids: [layer pos k] token ids by falling probability.
        top_probs: [layer pos k] their probabilities.
        entropy: [layer pos] of the whole distribution, nats.
        final_probs: [layer pos] probability of the token that the last entry puts first.
        final_ranks: [layer pos] its rank, 0 the most probable.
        target_ids: [target] ids asked for, if any.
        target_probs: [layer pos target] their probabilities.
        target_ranks: [layer pos target] their ranks, 0 the most probable.
        positions: positions in the prompt.
        layer_labels: "0_pre" … "final_post".
        prompt_tokens: the token at each position, as text.
        top_tokens: text of top_ids, nested [layer][pos][k].
        target_tokens: text of target_ids.
        grid: (rows, cols) of image tokens when the positions are one whole image, else None.
        model_name: of the model.
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
    layer_labels: tuple[str, ...]
    prompt_tokens: tuple[str, ...]
    top_tokens: tuple
    target_tokens: tuple[str, ...]
    grid: tuple[int, int] | None
    model_name: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each layer, position and rank; probabilities in 0..1, entropy in nats."""
        rows = []
        for layer, label in enumerate(self.layer_labels):
            for index, position in enumerate(self.positions):
                for rank, token in enumerate(self.top_tokens[layer][index]):
                    rows.append(
                        {
                            "layer": layer,
                            "entry": label,
                            "position": position,
                            "prompt_token": self.prompt_tokens[index],
                            "rank": rank + 1,
                            "token_id": int(self.top_ids[layer, index, rank]),
                            "token": token,
                            "probability": float(self.top_probs[layer, index, rank]),
                            "entropy_nats": float(self.entropy[layer, index]),
                        }
                    )
        return pd.DataFrame(rows)

    def plot_image(self, image: Any, path: Any = None) -> Any:
        """The image with its token grid: what each image token reads as, at the layers of a row of panels.

        Args:
            image: the picture, in original pixels.
        Raises:
            ValueError: the lens was not read at one whole image.
        """
        from analyses.views.lens import image_overlay

        return image_overlay(self, image, path)

    def page(self, path: Any) -> None:
        """A circuitsvis page that opens without network: top-k tokens by layer, tokens coloured by probability."""
        from analyses.views.circuits import lens_page

        lens_page(self, path)

    def plot(self, path: Any = None) -> Any:
        """The classic heat map: layer × position, the top token in each cell, coloured by its probability."""
        from analyses.views.lens import heat_map

        return heat_map(self, path)


@torch.no_grad()
def logit_lens(
    model: Any,
    inputs: Any,
    positions: str | int | slice | Sequence[int] = "last",
    top_k: int = 5,
    targets: str | int | Sequence[str | int] | None = None,
    row: int = 0,
    chunk_size: int = 64,
) -> LogitLens:
    """Reads the residual stream of any TransformerLens model through its own final norm and unembedding.

    Args:
        inputs: one prompt: `Inputs`, a string or token ids.
        positions: "last", "image", "answer" or another part of an `Inputs`; a position, several, or a slice.
        targets: tokens (or single-token strings) whose probability and rank to follow.
        row: which prompt of a batch.
    Raises:
        ValueError: no such part or position, or more top_k than words.
    """
    stack, labels = residual_stack(model, inputs)
    length = stack.shape[2]
    chosen = _positions(inputs, positions, row, length)
    vectors = stack[:, row, chosen]
    wanted = [] if targets is None else to_token_ids(model, targets)
    final = _read(model, vectors[-1], None, [], 1, chunk_size)
    followed = final["ids"][:, 0]
    read = _read(model, vectors, followed, wanted, top_k, chunk_size)
    tokens = _tokens(model, inputs, row)
    whole = positions if isinstance(positions, str) and positions.startswith("image") else None
    grid = inputs.grid(row, int(whole[6:-1] or 0) if whole != "image" else 0) if whole else None
    return LogitLens(
        top_ids=read["ids"],
        top_probs=read["probs"],
        entropy=read["entropy"],
        final_probs=read["target_probs"][..., 0],
        final_ranks=read["target_ranks"][..., 0],
        target_ids=torch.tensor(wanted) if wanted else None,
        target_probs=read["target_probs"][..., 1:] if wanted else None,
        target_ranks=read["target_ranks"][..., 1:] if wanted else None,
        positions=tuple(chosen),
        layer_labels=tuple(labels),
        prompt_tokens=tuple(_texts(model, tokens[chosen])),
        top_tokens=_texts(model, read["ids"]),
        target_tokens=tuple(_texts(model, torch.tensor(wanted))) if wanted else (),
        grid=grid if grid is not None and grid[0] * grid[1] == len(chosen) else None,
        model_name=str(getattr(model.cfg, "model_name", type(model).__name__)),
    )


def residual_stack(model: Any, inputs: Any) -> tuple[Float[Tensor, "layer batch pos d_model"], list[str]]:
    """The residual stream before every block and after the last, un-normed, and TransformerLens's labels."""
    n_layers = model.cfg.n_layers
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    _, cache = model.run_with_cache(inputs, names_filter=[*names, f"blocks.{n_layers - 1}.hook_resid_post"])
    return cache.accumulated_resid(return_labels=True)


def _read(
    model: Any,
    vectors: Float[Tensor, "*layer pos d_model"],
    followed: Int[Tensor, "pos"] | None,
    wanted: list[int],
    top_k: int,
    chunk_size: int,
) -> dict[str, Tensor]:
    """Everything that is kept of the whole-vocabulary distributions, a chunk of rows at a time.

    `target_probs` and `target_ranks` are of `followed` (one token a position), then of `wanted`.
    """
    flat = vectors.flatten(0, -2)
    targets = torch.tensor(wanted, dtype=torch.long).expand(len(flat), -1)
    if followed is not None:
        targets = torch.cat((followed.repeat(len(flat) // len(followed))[:, None], targets), dim=1)
    parts: dict[str, list[Tensor]] = {key: [] for key in ("ids", "probs", "entropy", "target_probs", "target_ranks")}
    starts = range(0, len(flat), chunk_size)
    for start in tqdm(starts, desc="lens", unit="chunk", delay=2, leave=False):
        rows = slice(start, start + chunk_size)
        readout = logit_readout(model, flat[rows], return_type="log_probs", chunk_size=chunk_size)
        log_probs = readout.values.cpu()
        top = log_probs.topk(top_k, dim=-1)
        at_targets = log_probs.gather(-1, targets[rows])
        parts["ids"].append(top.indices)
        parts["probs"].append(top.values.exp())
        parts["entropy"].append(readout.entropy.cpu())
        parts["target_probs"].append(at_targets.exp())
        parts["target_ranks"].append((log_probs[:, None, :] > at_targets[..., None]).sum(-1))
    lead = vectors.shape[:-1]
    return {key: torch.cat(values).unflatten(0, lead) for key, values in parts.items()}


def _positions(inputs: Any, positions: Any, row: int, length: int) -> list[int]:
    if isinstance(positions, str):
        if hasattr(inputs, "positions"):
            return inputs.positions(positions, row).tolist()
        if positions == "last":
            return [length - 1]
        raise ValueError(f"{positions!r} names a part of an Inputs; for text pass 'last', a position or a slice.")
    every = list(range(length))
    try:
        if isinstance(positions, slice):
            chosen = every[positions]
        else:
            chosen = [every[p] for p in ([positions] if isinstance(positions, int) else positions)]
    except IndexError as error:
        raise ValueError(f"positions {positions} are not all in the prompt of {length} tokens.") from error
    if not chosen:
        raise ValueError(f"positions {positions} select none of the prompt's {length} tokens.")
    return chosen


def _tokens(model: Any, inputs: Any, row: int) -> Int[Tensor, "pos"]:
    tokens = getattr(inputs, "tokens", inputs)
    tokens = model.to_tokens(tokens) if isinstance(tokens, (str, list)) else tokens
    return tokens[row] if tokens.ndim == 2 else tokens


def _texts(model: Any, ids: Tensor) -> Any:
    """Token ids as text, nested as they come; the ids themselves where there is no tokenizer."""
    if ids.ndim > 1:
        return tuple(_texts(model, part) for part in ids)
    tokenizer = getattr(model, "tokenizer", None)
    return [str(int(i)) if tokenizer is None else tokenizer.decode([int(i)]) for i in ids]
