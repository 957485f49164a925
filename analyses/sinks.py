"""Massive activations and attention sinks, among text and image tokens.

1. Norm: the norm of the residual stream that enters a block, at every position, compared with the median over the prompt's tokens.
2. Massive activation: an element of the residual stream whose absolute value is at least `ratio` times the median absolute value in
   that block (1,000 in the source; its second condition, a value of at least 100, depends on the model's scale and is left out).
3. Attention received: the attention that a key gets, averaged over heads and over the queries after it, divided by what it would
   get if each query spread its attention evenly over all keys it sees. 1 is an even share.
4. A sink is a token that receives at least `received` times an even share, averaged over the blocks from `from_layer` on.

The first token of a prompt usually is a sink. Among image tokens, sinks tend to be background and carry little information about
the image, so maps are better shown without them: see `Sinks.exclude`.

Sources: Sun et al. 2024 (massive activations); Xiao et al. 2023 (attention sinks); Kang et al. 2025 (visual attention sinks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.common.attention import attention_patterns
from analyses.common.prompts import Prompt
from analyses.common.result import Result
from analyses.saliency import Saliency
from hooked_qwen2vl.protocols import Model


@dataclass(frozen=True)
class Sinks(Result):
    """Norms, massive activations and attention received, at every position of one prompt.

    Attributes:
        norms: [layer pos] norm of the residual stream that enters each block.
        received: [layer pos] attention received, as a multiple of an even share; NaN at the last position, which no later query sees.
        massive: one row per massive activation: layer, position, dimension, value, ratio to the layer's median absolute value.
        tokens: [pos] texts. segments: [pos] name of the segment that each token belongs to.
        image: positions of the image tokens. grids: (rows, cols) of each image.
        is_sink: [pos]. threshold, from_layer, ratio: the settings (`received`, `from_layer` and `ratio` of `find_sinks`).
        model_name: name of the model.
    """

    norms: Float[Tensor, "layer pos"]
    received: Float[Tensor, "layer pos"]
    massive: pd.DataFrame
    tokens: tuple[str, ...]
    segments: tuple[str, ...]
    image: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    is_sink: Bool[Tensor, "pos"]
    threshold: float
    from_layer: int
    ratio: float
    model_name: str

    @property
    def image_sinks(self) -> Bool[Tensor, "image_token"]:
        """Which image tokens are sinks."""
        return self.is_sink[list(self.image)]

    def to_dataframe(self, only_sinks: bool = True) -> pd.DataFrame:
        """One row per sink, most attention first.

        Columns: token, segment, place in its image, attention received, norm and its ratio to the median (means over the blocks
        from `from_layer` on), and the number of massive activations.

        Args:
            only_sinks: False: one row per position.
        """
        medians = self.norms.median(1, keepdim=True).values
        places = {}
        first = 0
        for image, (rows, cols) in enumerate(self.grids):
            places |= {self.image[first + n]: (image, *divmod(n, cols)) for n in range(rows * cols)}
            first += rows * cols
        counts = self.massive["position"].value_counts()
        columns = [
            "position",
            "token",
            "segment",
            "image",
            "row",
            "col",
            "sink",
            "received",
            "norm",
            "norm_over_median",
            "massive_activations",
        ]
        table = pd.DataFrame(
            [
                (
                    position, self.tokens[position], self.segments[position], *places.get(position, (None, None, None)), bool(self.is_sink[position]),
                    float(self.received[self.from_layer :, position].mean()), float(self.norms[self.from_layer :, position].mean()),
                    float((self.norms / medians)[self.from_layer :, position].mean()), int(counts.get(position, 0)),
                )
                for position in range(len(self.tokens))
                if bool(self.is_sink[position]) or not only_sinks
            ],
            columns=columns,
        )  # fmt: skip
        table[["image", "row", "col"]] = table[["image", "row", "col"]].astype("Int64")
        return table.sort_values("received", ascending=False, kind="stable").reset_index(drop=True)

    def exclude(self, maps: Saliency | Float[Tensor, "*axes image_token"]) -> Any:
        """The maps with NaN at the sinks, which figures leave blank; a `Saliency`'s `method` gets ", without sinks".

        Raises:
            ValueError: maps with another number of image tokens.
        """
        values = maps.values if isinstance(maps, Saliency) else maps
        if values.shape[-1] != len(self.image):
            raise ValueError(f"these sinks are of {len(self.image)} image tokens, the maps of {values.shape[-1]}.")
        blank = values.masked_fill(self.image_sinks.to(values.device), float("nan"))
        return replace(maps, values=blank, method=f"{maps.method}, without sinks") if isinstance(maps, Saliency) else blank

    def plot(self, path: Any = None, images: Sequence[Any] = ()) -> Any:
        """Norms and attention received by block and position, and over the images (PIL) if given."""
        from analyses.views.sinks import sinks_plot

        return sinks_plot(self, path, images)


@torch.no_grad()
def find_sinks(model: Model, inputs: Prompt, row: int = 0, received: float = 5.0, ratio: float = 1000.0, from_layer: int = 1) -> Sinks:
    """Massive activations and attention sinks of one prompt.

    Args:
        received: multiple of an even share of attention from which on a token is a sink.
        ratio: multiple of the median absolute value from which on an activation is massive.
        from_layer: first block in the average for sinks (in block 0 heads attend mostly to neighbours).
    Raises:
        ValueError: a threshold that is not positive, or no such block.
    """
    n_layers = model.cfg.n_layers
    if received <= 0 or ratio <= 0 or not 0 <= from_layer < n_layers:
        raise ValueError(
            f"expected positive thresholds and a block in 0..{n_layers - 1}, got received={received}, ratio={ratio}, from_layer={from_layer}."
        )
    item = model.encode(model.as_inputs(inputs)[row])
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    with attention_patterns(model, lambda pattern: _received(pattern[0])) as shares:
        _, cache = model.run_with_cache(item, names_filter=names, stop_at_layer=n_layers)
    streams = torch.stack([cache[name][0].float().cpu() for name in names])
    relative = torch.stack([shares[layer] for layer in range(n_layers)])
    is_sink = relative[from_layer:].mean(0).nan_to_num(0.0) >= received
    segments = tuple(item.segments[0])
    image = tuple(item.positions("image").tolist()) if item.visuals and item.has_segment("image") else ()
    grids = tuple(visual.token_grid[1:] for visual in item.visuals) if image else ()
    return Sinks(
        streams.norm(dim=-1), relative, _massive(streams, ratio), tuple(model.to_str_tokens(item.tokens[0])), segments, image, grids,
        is_sink, received, from_layer, ratio, str(model.cfg.model_name),
    )  # fmt: skip


def _received(pattern: Float[Tensor, "head pos key_pos"]) -> Float[Tensor, "key_pos"]:
    """Attention that each key gets from the queries after it, divided by what an even spread would give it."""
    n = pattern.shape[-1]
    mean = pattern.cpu().double().mean(0).tril(-1)
    even = (torch.ones(n, n, dtype=torch.float64) / torch.arange(1, n + 1, dtype=torch.float64)[:, None]).tril(-1)
    return (mean.sum(0) / even.sum(0)).float()


def _massive(streams: Float[Tensor, "layer pos d_model"], ratio: float) -> pd.DataFrame:
    rows = []
    for layer, stream in enumerate(streams):
        size = stream.abs()
        median = float(size.median())
        for position, dimension in (size >= ratio * median).nonzero().tolist() if median else []:
            value = float(stream[position, dimension])
            rows.append((layer, position, dimension, value, abs(value) / median))
    return pd.DataFrame(rows, columns=["layer", "position", "dimension", "value", "ratio"])
