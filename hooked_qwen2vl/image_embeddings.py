"""Image embeddings: computing them, storing them, and detecting that they are stale.

    pixels ─► vision_encoder ─► vision_projector ─► image embeddings ─► merged into the token embeddings
                                                 └► (Qwen3-VL) what DeepStack adds after the decoder's first blocks

Image embeddings from `encode` are reused only with the same weights, precision and pixels. Weights count as the same if their
storage is at the same address, torch has counted no in-place edit (`tensor._version`), and samples of every tensor of the tower are
unchanged. An edit that torch does not count (`.data`, `.numpy()`, inference mode) and that changes no sample is not detected:
call `encode` again after such an edit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .image_hash import image_hash
from .inputs import Inputs
from .layers import listened
from .mixin import Mixin
from .moved import moved_names
from .overflow import finite_check, first_not_finite

__getattr__ = moved_names(__name__)

CAPACITY = 1 << 30  # default capacity of an ImageEmbeddingsCache, in bytes
SAMPLES = 64  # elements of each tensor of the tower that are compared, about


def merge(
    embedded: Float[Tensor, "batch pos d_model"], images: Float[Tensor, "image_token d_model"] | None, inputs: Inputs
) -> Float[Tensor, "batch pos d_model"]:
    """Token embeddings with the image embeddings in place of the placeholders.

    Args:
        images: in order of appearance; None without images. If `embedded` has n copies of the batch, `images` must have n copies, too.
    """
    if images is None:
        return embedded
    copies = len(embedded) // len(inputs)
    places = (inputs.token_types > 0).repeat(copies, 1).unsqueeze(-1).to(embedded.device)
    return embedded.masked_scatter(places, images.to(embedded.device, embedded.dtype))


def deepstack_terms(
    images: Float[Tensor, "stream image_token d_model"] | None,
    inputs: Inputs,
    copies: int,
    positions: slice,
    like: Float[Tensor, "rows pos d_model"],
) -> list[Float[Tensor, "rows pos d_model"]]:
    """What DeepStack adds to the residual stream after each of the decoder's first blocks; 0 at positions without an image.

    Args:
        images: stream 0 has the image embeddings, the further streams what is added; for the batch, or for all of its copies.
        copies: number of copies of the batch in the run. positions: the positions that are run.
        like: the residual stream.
    """
    if images is None or len(images) == 1:
        return []
    places = (inputs.token_types > 0).repeat(copies, 1).unsqueeze(-1).to(like.device)
    if images.shape[1] * copies == int(places.sum()):
        images = images.repeat(1, copies, 1)
    nothing = like.new_zeros(*places.shape[:2], like.shape[-1])
    return [nothing.masked_scatter(places, stream.to(like))[:, positions] for stream in images[1:]]


class ImageEmbeddings(Mixin):
    """Mixin of HookedQwen2VL."""

    def encode(self, inputs: Inputs) -> Inputs:
        """The same batch on the model's device, with its image embeddings, so that later runs do not run the tower."""
        inputs = inputs.to(self.cfg.device)
        if not inputs.visuals:
            return inputs
        images = self.run_tower(inputs)
        return inputs.with_image_embeddings(images[0], self.tower_stamp(), images[1:])

    def image_embeddings(self, inputs: Inputs) -> Float[Tensor, "image_token d_model"] | None:
        """The image embeddings, in order of appearance, from `encode` or from the tower (see `image_streams`)."""
        images = self.image_streams(inputs)
        return None if images is None else images[0]

    def image_streams(self, inputs: Inputs) -> Float[Tensor, "stream image_token d_model"] | None:
        """The projector's output: stream 0 has the image embeddings, further streams what DeepStack adds.

        From `encode`, or from the tower if they are missing or stale or if something listens inside the tower. None for prompts
        without images.
        """
        if not inputs.visuals:
            return None
        if not self.is_encoded(inputs) or self.tower_is_listened_to():  # pyright: ignore[reportAttributeAccessIssue] (torch.compiler.disable loses its type)
            return self.run_tower(inputs)
        hooks, streams = self.vision_projector.out_hooks, inputs.image_streams
        if not listened(*hooks):
            return streams
        return torch.cat([hook(stream.clone()) for hook, stream in zip(hooks, streams.split(1))])

    def run_tower(self, inputs: Inputs) -> Float[Tensor, "stream image_token d_model"]:
        """Runs tower and projector on the pixels.

        Raises:
            ValueError: the result is not finite; the message names the first stage with a number that is not finite.
        """
        pixels = inputs.pixels.to(self.cfg.device, self.cfg.dtype)
        images = self.vision_projector(self.vision_encoder(pixels, inputs.grids), inputs.grids)
        with finite_check() as check:
            check.note(images, lambda: first_not_finite(self, pixels, inputs.grids))
        return images

    @torch.compiler.disable  # runs on the host
    def is_encoded(self, inputs: Inputs) -> bool:
        """Whether the inputs have image embeddings that this tower computed with its current weights."""
        whole = (inputs.deepstack_embeds is not None) == bool(self.cfg.vision.deepstack_layers)
        return inputs.has_image_embeddings and whole and inputs.encoded_by == self.tower_stamp()

    def tower_is_listened_to(self) -> bool:
        """Whether a hook (of a hook point, or torch's on a module) listens in the tower or in the projector before its output."""
        exempt = {id(hook) for hook in self.vision_projector.out_hooks}
        modules = (module for tower in (self.vision_encoder, self.vision_projector) for module in tower.modules())
        return any(id(module) not in exempt and listened(module) for module in modules)

    @torch.no_grad()
    def tower_stamp(self) -> tuple:
        """A value that identifies the tower's weights and precision; it differs for another model and after edits."""
        weights = [*self.vision_encoder.parameters(), *self.vision_projector.parameters()]
        edits = hash(tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights))
        device = self.cfg.device
        kind = torch.device(str(device)).type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return self._identity, edits, samples_of(weights), self.cfg.dtype, autocast


def samples_of(tensors: Sequence[Tensor]) -> int:
    """A hash of some elements of each tensor, evenly spaced; tensors on the meta device are left out."""
    here = [tensor.detach().flatten() for tensor in tensors if not tensor.is_meta]
    picked = [flat[:: max(1, len(flat) // SAMPLES) | 1] for flat in here]
    by_device: dict[torch.device, list[Tensor]] = {}
    for some in picked:
        by_device.setdefault(some.device, []).append(some)
    return hash(tuple(torch.cat(some).cpu().double().numpy().tobytes() for some in by_device.values()))


class ImageEmbeddingsCache:
    """Computes the embeddings of each image once and stores them, for many questions about the same images.

    Images are identified by the pixels that the tower gets, so two files with the same picture are one image. The tower runs on one
    image at a time, so that the numbers do not depend on other images, and a resumed run gets the same ones. When the capacity is
    exceeded, the least recently used images are dropped.

    Attributes:
        model: a HookedQwen2VL; when the weights of its tower change, stored embeddings are not used any more.
        capacity: bytes.
        watch: function from the inputs with one image to a context that is entered while the tower runs on it; the tensors that the
            context yields are stored with the embeddings.
        computed: number of images that the tower has run on.
    """

    def __init__(
        self, model: Any, capacity: int = CAPACITY, watch: Callable[[Inputs], AbstractContextManager] = lambda inputs: nullcontext(())
    ):
        self.model, self.capacity, self.watch, self.computed = model, capacity, watch, 0
        self._held: OrderedDict[tuple, tuple[Float[Tensor, "stream image_token d_model"], Sequence[Tensor]]] = OrderedDict()

    def __call__(self, inputs: Inputs) -> Inputs:
        """The same batch with its image embeddings, as from `model.encode`."""
        return self.watched(inputs)[0]

    @torch.no_grad()
    def watched(self, inputs: Inputs) -> tuple[Inputs, list[Sequence[Tensor]]]:
        """(the batch with its image embeddings, for each of `inputs.visuals` the tensors from `watch`)."""
        if not inputs.visuals:
            return inputs, []
        stamp = self.model.tower_stamp()
        pixels = inputs.pixels.split([visual.n_patches for visual in inputs.visuals])
        held = [self._of_one(inputs, visual, part, stamp) for visual, part in zip(inputs.visuals, pixels)]
        images = torch.cat([images for images, _ in held], dim=1)
        return inputs.with_image_embeddings(images[0], stamp, images[1:]), [seen for _, seen in held]

    def _of_one(
        self, inputs: Inputs, visual: Any, pixels: Tensor, stamp: tuple
    ) -> tuple[Float[Tensor, "stream image_token d_model"], Sequence[Tensor]]:
        key = (stamp, visual.grid, image_hash(pixels))
        if key not in self._held:
            # the tower uses only pixels and grids, so the tokens of the batch do not matter
            one = replace(inputs, visuals=(visual,), pixels=pixels)
            with self.watch(one) as seen:
                self._held[key] = self.model.encode(one).image_streams, seen
            self.computed += 1
        self._held.move_to_end(key)
        held = self._held[key]
        while len(self._held) > 1 and sum(map(_nbytes, self._held.values())) > self.capacity:
            self._held.popitem(last=False)
        return held


def _nbytes(held: tuple[Tensor, Sequence[Tensor]]) -> int:
    return held[0].nbytes + sum(tensor.nbytes for tensor in held[1])
