"""Maximally activating images of a neuron, and the tokens that it promotes.

1. Run every example; keep the neuron's activation before the activation function on the image's grid: at every image token for
   decoder and projector (28 pixels; Qwen3-VL: 32), at every patch for the tower (14; 16). The neuron fires if it is above 0.
2. Keep the examples with the highest activation.
3. Promoted tokens: the neuron's row of W_out, times the final norm's weight, through the unembedding. A decoder neuron's
   activation (gate times `up`) may be negative and then promotes the other end of the list, so both ends are given.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.common.result import Result
from analyses.data.examples import Example, examples, in_batches
from analyses.domain_neurons import SITES, masks_of, write_weights
from hooked_qwen2vl.processor import open_image
from hooked_qwen2vl.protocols import Model


@dataclass(frozen=True)
class Fired(Result):
    """The neuron's activations on one image.

    Attributes:
        id, question, domain, image: of the example (its first image, in original pixels).
        activations: [rows cols] before the activation function, raster order; the neuron fires above 0.
    """

    id: str
    question: str
    domain: str
    image: Any = field(repr=False)
    activations: Float[Tensor, "rows cols"] = field(repr=False)


@dataclass(frozen=True)
class TopImages(Result):
    """The images with the highest activations of a neuron.

    Attributes:
        neuron: (module, layer, neuron).
        examples: highest first.
        writes: the tokens that the neuron promotes most; empty for neurons of the tower.
    """

    neuron: tuple[str, int, int]
    examples: tuple[Fired, ...]
    writes: tuple[str, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per example and cell of its grid (raster order): rank, id, domain, question, row, col, activation."""
        return pd.DataFrame(
            {"rank": rank, "id": e.id, "domain": e.domain, "question": e.question, "row": row, "col": col, "activation": value}
            for rank, e in enumerate(self.examples)
            for row, line in enumerate(e.activations.tolist())
            for col, value in enumerate(line)
        )

    def plot(self, path: Any = None) -> Any:
        """The images, with the patches or image tokens at which the neuron fires drawn on them."""
        from analyses.views.neurons import top_images_plot

        return top_images_plot(self, path)


@torch.no_grad()
def top_images(
    model: Model,
    neuron: tuple[str, int, int],
    data: str | Path | Iterable[Example] = "scenes",
    limit: int | None = None,
    n: int = 4,
    batch_size: int = 8,
) -> TopImages:
    """The n images with the highest activation of a neuron.

    Args:
        neuron: (module, layer, neuron). data, limit: see `analyses.data.examples`; examples without an image are skipped.
    Raises:
        ValueError: no such neuron, or no example with an image.
    """  # fmt: skip
    masks_of(model, [neuron])  # raises if there is no such neuron
    module, layer, index = neuron
    name = f"{SITES[module].format(layer)}.hook_pre"
    best: list[tuple[float, int, Example, Tensor]] = []
    number = 0
    for batch in in_batches((example for example in examples(data, limit) if example.images), batch_size):
        inputs = model.to_inputs([e.question for e in batch], images=[list(e.images) for e in batch])
        _, cache = model.run_with_cache(inputs, names_filter=[name], return_type=None)
        for row, example in enumerate(batch):
            if module == "decoder":
                places = inputs.positions("image[0]", row)
                grid = cache[name][row, places, index].unflatten(0, inputs.grid(row))
            else:
                grid = inputs.unpack_image(cache.vision[name][0, :, index], row)
            number += 1
            entry = (float(grid.max()), -number, example, grid.float().cpu())
            (heapq.heappush if len(best) < n else heapq.heappushpop)(best, entry)
    if not best:
        raise ValueError("no example has an image.")
    fired = tuple(Fired(e.id, e.question, e.domain, open_image(e.images[0]), grid) for _, _, e, grid in sorted(best, reverse=True))
    writes = () if module == "vision" else tuple(written_tokens(model, neuron).query("end == 'most'")["token"])
    return TopImages(neuron, fired, writes)


@torch.no_grad()
def written_tokens(model: Model, neuron: tuple[str, int, int], top_k: int = 10) -> pd.DataFrame:
    """The tokens whose logits a neuron's row of W_out, times the final norm's weight, raises most and least.

    Returns:
        columns end ("most", "least"), token_id, token, logit (for an activation of 1 and a residual stream of rms 1).
    Raises:
        ValueError: no such neuron, or a neuron of the tower, which writes to the tower's residual stream and not to the decoder's.
    """
    module, layer, index = neuron
    if module == "vision":
        raise ValueError("a neuron of the tower writes to the tower's stream; only decoder and projector write to the decoder's.")
    masks_of(model, [neuron])
    row = write_weights(model, module, layer)[index].float() * model.ln_final.w.float()
    logits = row @ model.W_U.float()
    tables = []
    for end, largest in (("most", True), ("least", False)):
        values, ids = logits.topk(top_k, largest=largest)
        tokens = [model.to_single_str_token(int(i)) for i in ids]
        tables.append(pd.DataFrame({"end": end, "token_id": ids.tolist(), "token": tokens, "logit": values.tolist()}))
    return pd.concat(tables, ignore_index=True)
