"""The patched runs of a sweep, computing only what a patch can change (see `patching`).

`DecoderRuns` starts at the patched block and the first patched position, from the unpatched run's residual stream and with
its keys and values before that position. `TowerRuns` starts at the patched block of the vision tower with the images of
several cells as one batch, then runs the decoder from the first image token on. Both compute logits at one position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.utilities import get_act_name

from hooked_qwen2vl.image_embeddings import merge
from hooked_qwen2vl.positions import patches_of, window_order
from hooked_qwen2vl.protocols import Model
from hooked_qwen2vl.running import running_positions

TOWER = "vision_encoder."


@dataclass(frozen=True)
class Cell:
    """One patch of a sweep.

    Attributes:
        index: column of the sweep that its result belongs to.
        positions: patched positions of the prompt.
        head: patched head; None for activations without a head axis.
    """

    index: int
    positions: tuple[int, ...]
    head: int | None


class DecoderRuns:
    """Patches in the text decoder.

    Args:
        source: prompts that the patched activations come from. target: prompts that are run with them.
    """

    def __init__(self, model: Model, source: Any, target: Any, activation: str, layers: Sequence[int]):
        self.model, self.target, self.activation = model, model.encode(target), activation
        stop = model.cfg.n_layers
        names = key_value_names(range(min(layers), stop))
        with entering(model, layers) as self.entered:
            self.final, self.cache = model.run_with_cache(self.target, names_filter=names, stop_at_layer=stop)
        swept = [get_act_name(activation, layer) for layer in layers]
        self.source_final, self.source = model.run_with_cache(model.encode(source), names_filter=swept, stop_at_layer=stop)

    def source_logits(self, at: int) -> Float[Tensor, "batch 1 d_vocab"]:
        """Of the run whose activations are put in, at one position."""
        return self.model.read_out(self.source_final, logits_at=at)

    def logits(self, at: int) -> Float[Tensor, "batch 1 d_vocab"]:
        """Of the unpatched run, at one position."""
        return self.model.read_out(self.final, logits_at=at)

    def reaches(self, cell: Cell, at: int) -> bool:
        """Whether the patch can change the logits at this position: a patch at later positions cannot."""
        return min(cell.positions) <= at

    def patched(self, layer: int, cells: Sequence[Cell], at: int) -> Float[Tensor, "cell_batch 1 d_vocab"]:
        """Of the patched runs of one layer, cell by cell."""
        start = min(min(cell.positions) for cell in cells)
        residual = self.entered[layer][:, start:].repeat(len(cells), 1, 1)
        name = get_act_name(self.activation, layer)
        with self.model.hooks(fwd_hooks=[(name, self._put(name, cells, start, at))]):
            return run_suffix(self.model, self.target, self.cache, residual, layer, start, at)

    def _put(self, name: str, cells: Sequence[Cell], start: int, at: int) -> Callable:
        """A hook that patches in the source's activations; positions after `at` are not run."""
        source, by_query = self.source[name], self.activation == "pattern"

        def hook(activation: Tensor, hook: Any) -> Tensor:
            for cell, rows in zip(cells, activation.unflatten(0, (len(cells), -1))):
                places = torch.tensor([place for place in cell.positions if place <= at], device=activation.device)
                if by_query:
                    rows[:, cell.head, places - start] = source[:, cell.head, places, : at + 1]
                elif cell.head is None:
                    rows[:, places - start] = source[:, places]
                else:
                    rows[:, places - start, cell.head] = source[:, places, cell.head]
            return activation

        return hook


@contextmanager
def entering(model: Model, layers: Sequence[int]) -> Iterator[dict[int, Float[Tensor, "batch pos d_model"]]]:
    """layer -> the residual stream that enters the block in a run within this context, before any hook changes it.

    Hooks are left out because they act when the block runs again, in the patched runs.

    Raises:
        ValueError: (from the run) `drop_tokens` has removed tokens from the stream.
    """
    entered: dict[int, Tensor] = {}

    def note(block: Any, args: Any, layer: int) -> None:
        running = running_positions.get()
        if running is not None and running.left:
            raise ValueError(
                "drop_tokens removes tokens from the residual stream in this run, but a sweep needs the stream of all tokens: hide the "
                "tokens' keys instead (analyses.interventions.hide), which gives the same numbers."
            )
        if layer in layers:
            entered[layer] = args[0].detach().clone()

    noted = {*layers, model.cfg.n_layers - 1}
    handles = [model.blocks[layer].register_forward_pre_hook(partial(note, layer=layer)) for layer in noted]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


class TowerRuns:
    """Patches in the vision tower: to patch the position of an image token is to patch its 2×2 image patches.

    Raises:
        ValueError: prompts without images.
    """

    def __init__(self, model: Model, source: Any, target: Any, activation: str, layers: Sequence[int]):
        if not target.visuals:
            raise ValueError(f"{TOWER}{activation} needs prompts with images.")
        self.model, self.target, self.activation = model, target.to(model.cfg.device), activation
        self.first = int((target.token_types > 0).any(0).nonzero()[0])
        self.tapped = [layer for layer in model.cfg.vision.deepstack_layers if layer < max(layers)]
        names = [f"{TOWER}blocks.{layer}.hook_resid_pre" for layer in layers] + ["hook_embed"]
        names += [_stream_after(layer) for layer in self.tapped]
        names += key_value_names(range(model.cfg.n_layers))
        with entering(model, ()):
            self.final, self.cache = model.run_with_cache(target, names_filter=names, stop_at_layer=model.cfg.n_layers)
        swept = [self._name(layer) for layer in layers]
        self.source_final, self.source = model.run_with_cache(source, names_filter=swept, stop_at_layer=model.cfg.n_layers)

    def source_logits(self, at: int) -> Float[Tensor, "batch 1 d_vocab"]:
        """Of the run whose activations are put in, at one position."""
        return self.model.read_out(self.source_final, logits_at=at)

    def logits(self, at: int) -> Float[Tensor, "batch 1 d_vocab"]:
        """Of the unpatched run, at one position."""
        return self.model.read_out(self.final, logits_at=at)

    def reaches(self, cell: Cell, at: int) -> bool:
        """Whether the patch can change the logits at this position: not if all images come after it."""
        return self.first <= at

    def patched(self, layer: int, cells: Sequence[Cell], at: int) -> Float[Tensor, "cell_batch 1 d_vocab"]:
        """Logits of the patched runs of one layer, cell by cell.

        Patterns are patched one cell at a time: a pattern's size is the square of the number of patches in the batch.
        """
        if self.activation == "pattern" and len(cells) > 1:
            return torch.cat([self.patched(layer, [cell], at) for cell in cells])
        n, encoder = len(cells), self.model.vision_encoder
        stream = self.cache.vision[f"{TOWER}blocks.{layer}.hook_resid_pre"].repeat(1, n, 1)
        earlier = [self.cache.vision[_stream_after(l)].repeat(1, n, 1) for l in self.tapped if l < layer]
        grids = self.target.grids.repeat(n, 1)
        with self.model.hooks(fwd_hooks=[(self._name(layer), self._put(self._name(layer), cells))]):
            stream = encoder.run_blocks(stream, grids, layer, *earlier)
        images = self.model.vision_projector(stream, grids)
        residual = merge(self.cache["hook_embed"].repeat(n, 1, 1), images[0], self.target)[:, self.first :]
        return run_suffix(self.model, self.target, self.cache, residual, 0, self.first, at, images)

    def _name(self, layer: int) -> str:
        return TOWER + get_act_name(self.activation, layer)

    def _patches(self, positions: Sequence[int]) -> Int[Tensor, "patch"]:
        """Indices, in the packed order, of the image patches at these positions, over all rows."""
        is_image = self.target.token_types > 0
        order = (is_image.flatten().cumsum(0) - 1).view_as(is_image)
        tokens = order[:, list(positions)].flatten()
        vision = self.model.cfg.vision
        if vision.window is not None:  # Qwen2.5-VL's tower orders image tokens by attention window
            order, _ = window_order(self.target.grids, vision.spatial_merge_size, vision.window)
            tokens = order.argsort().to(tokens.device)[tokens]
        return patches_of(tokens, vision.spatial_merge_size)

    def _put(self, name: str, cells: Sequence[Cell]) -> Callable:
        source, by_query = self.source.vision[name][0], self.activation == "pattern"

        def hook(activation: Tensor, hook: Any) -> Tensor:
            if by_query:
                patches = self._patches(cells[0].positions)
                activation[0, cells[0].head, patches] = source[cells[0].head, patches]
                return activation
            for cell, own in zip(cells, activation[0].unflatten(0, (len(cells), -1))):
                patches = self._patches(cell.positions)
                if cell.head is None:
                    own[patches] = source[patches]
                else:
                    own[patches, cell.head] = source[patches, cell.head]
            return activation

        return hook


def run_suffix(
    model: Model,
    inputs: Any,
    cache: Any,
    residual: Float[Tensor, "cell_batch pos d_model"],
    layer: int,
    start: int,
    at: int,
    images: Float[Tensor, "stream image_token d_model"] | None = None,
) -> Float[Tensor, "cell_batch 1 d_vocab"]:
    """Logits at `at` from the blocks `layer` … L−1 on the positions `start` … `at`, with `cache`'s keys and values before `start`.

    Positions after `at` cannot change these logits and are not run.

    Args:
        images: image embeddings (and DeepStack's) of every cell, from the projector; None: those of the prompts.
    """
    past = keys_and_values_before(model, inputs, cache, layer, start, len(residual) // len(inputs))
    layers = range(layer, model.cfg.n_layers)
    residual = model.run_blocks(residual[:, : at + 1 - start], inputs, layers, past, start, images)
    return model.read_out(residual, logits_at=-1)


def _stream_after(layer: int) -> str:
    return f"{TOWER}blocks.{layer}.hook_resid_post"


def keys_and_values_before(model: Model, inputs: Any, cache: Any, layer: int, start: int, n: int) -> TransformerLensKeyValueCache | None:
    """Keys and values before `start`, for every block from `layer` on."""
    if start == 0:
        return None
    entries: list[Any] = [
        TransformerLensKeyValueCacheEntry(*(_repeated(cache[name][:, :start], n) for name in key_value_names([l])), frozen=True)
        if l >= layer
        else None
        for l in range(model.cfg.n_layers)
    ]
    return TransformerLensKeyValueCache(entries, inputs.attention_mask[:, :start], frozen=True)


def _repeated(x: Float[Tensor, "batch *rest"], n: int) -> Float[Tensor, "cell_batch *rest"]:
    """x repeated n times; a view if x has one row, which is safe because a block copies keys and values when it appends."""
    return x[None].expand(n, *x.shape).flatten(0, 1)


def key_value_names(layers: Sequence[int]) -> list[str]:
    return [f"blocks.{layer}.attn.{hook}" for layer in layers for hook in ("hook_rot_k", "hook_v")]
