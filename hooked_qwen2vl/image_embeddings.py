"""What the tower makes of the images: how it is computed, kept, and known to be stale.

    pixels ─► vision_encoder ─► vision_projector ─► image embeddings ─► merged into the token embeddings
                                                 └► (Qwen3-VL) what DeepStack adds after the decoder's first blocks

Image embeddings that `encode` has computed are used again only by the weights, in the precision and for the pixels that
gave them. Weights count as the same when they lie where they lay, no in-place edit was counted (`tensor._version`), and
samples of every tensor of the tower are unchanged. Not seen: an edit behind torch's back (`.data`, `.numpy()`, inference
mode) that leaves all samples as they were; call `encode` again after such an edit.
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

CAPACITY = 1 << 30
SAMPLES = 64  # numbers of each tensor of the tower that are compared


def merge(
    embedded: Float[Tensor, "batch pos d_model"], images: Float[Tensor, "image_token d_model"] | None, inputs: Inputs
) -> Float[Tensor, "batch pos d_model"]:
    """Token embeddings with every image's embeddings in the place of its placeholders.

    Args:
        images: in order of appearance; None where there are none. A batch that comes n times over takes n times the images.
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
    """What DeepStack adds to the decoder's stream after each of its first blocks: 0 where there is no image.

    Args:
        images: stream 0 is the image embeddings; each further one is added. Of the batch, or of its copies.
        copies: how many times over the batch comes. positions: of the prompts, those that are run.
        like: the stream that they are added to.
    """
    if images is None or len(images) == 1:
        return []
    places = (inputs.token_types > 0).repeat(copies, 1).unsqueeze(-1).to(like.device)
    if images.shape[1] * copies == int(places.sum()):
        images = images.repeat(1, copies, 1)
    nothing = like.new_zeros(*places.shape[:2], like.shape[-1])
    return [nothing.masked_scatter(places, stream.to(like))[:, positions] for stream in images[1:]]


class ImageEmbeddings(Mixin):
    """Mixed into HookedQwen2VL."""

    def encode(self, inputs: Inputs) -> Inputs:
        """The same batch on the model's device with its image embeddings, so that later runs need not run the tower."""
        inputs = inputs.to(self.cfg.device)
        if not inputs.visuals:
            return inputs
        images = self.run_tower(inputs)
        return inputs.with_image_embeddings(images[0], self.tower_stamp(), images[1:])

    def image_embeddings(self, inputs: Inputs) -> Float[Tensor, "image_token d_model"] | None:
        """The images' embeddings, in order of appearance: as encoded before, or from the tower when it must run."""
        images = self.image_streams(inputs)
        return None if images is None else images[0]

    def image_streams(self, inputs: Inputs) -> Float[Tensor, "stream image_token d_model"] | None:
        """All that the projector writes for the decoder: the image embeddings, then what DeepStack adds.

        As encoded before, or from the tower when it must run: when they are stale, and when anything listens inside it.
        None for prompts without images.
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
        """Pixels through tower and projector.

        Raises:
            ValueError: the result is not finite; the first stage where it was not is named.
        """
        pixels = inputs.pixels.to(self.cfg.device, self.cfg.dtype)
        images = self.vision_projector(self.vision_encoder(pixels, inputs.grids), inputs.grids)
        with finite_check() as check:
            check.note(images, lambda: first_not_finite(self, pixels, inputs.grids))
        return images

    @torch.compiler.disable  # a question to the host
    def is_encoded(self, inputs: Inputs) -> bool:
        """Whether the inputs carry image embeddings that this tower, as it is now, has made of their pixels."""
        whole = (inputs.deepstack_embeds is not None) == bool(self.cfg.vision.deepstack_layers)
        return inputs.has_image_embeddings and whole and inputs.encoded_by == self.tower_stamp()

    def tower_is_listened_to(self) -> bool:
        """Whether anything listens before the image embeddings: a hook point, or a bare torch hook on a module."""
        exempt = {id(hook) for hook in self.vision_projector.out_hooks}
        modules = (module for tower in (self.vision_encoder, self.vision_projector) for module in tower.modules())
        return any(id(module) not in exempt and listened(module) for module in modules)

    @torch.no_grad()
    def tower_stamp(self) -> tuple:
        """Says which weights compute image embeddings, and in which precision: another model's, or edited ones, differ."""
        weights = [*self.vision_encoder.parameters(), *self.vision_projector.parameters()]
        edits = hash(tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights))
        device = self.cfg.device
        kind = torch.device(str(device)).type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return self._identity, edits, samples_of(weights), self.cfg.dtype, autocast


def samples_of(tensors: Sequence[Tensor]) -> int:
    """A hash of some numbers of each tensor, spread over it; what lies on the meta device is left out."""
    here = [tensor.detach().flatten() for tensor in tensors if not tensor.is_meta]
    picked = [flat[:: max(1, len(flat) // SAMPLES) | 1] for flat in here]
    by_device: dict[torch.device, list[Tensor]] = {}
    for some in picked:
        by_device.setdefault(some.device, []).append(some)
    return hash(tuple(torch.cat(some).cpu().double().numpy().tobytes() for some in by_device.values()))


class ImageEmbeddingsCache:
    """Image embeddings computed once an image, however many questions are asked about it.

    An image is known by the pixels the tower is given, so two files with the same picture are one image. The tower runs on
    one image at a time: what an image gives then never depends on which others were met before, and a run that was stopped
    and resumed gets the same numbers. Beyond its capacity it forgets the least recently used.

    Attributes:
        model: a HookedQwen2VL; when its tower's weights change, what was held is not used again.
        capacity: bytes it may hold.
        watch: entered while the tower runs on one image (its inputs are given); the tensors that it gives are kept with
            the embeddings.
        computed: how many images the tower has run on.
    """

    def __init__(
        self, model: Any, capacity: int = CAPACITY, watch: Callable[[Inputs], AbstractContextManager] = lambda inputs: nullcontext(())
    ):
        self.model, self.capacity, self.watch, self.computed = model, capacity, watch, 0
        self._held: OrderedDict[tuple, tuple[Float[Tensor, "stream image_token d_model"], Sequence[Tensor]]] = OrderedDict()

    def __call__(self, inputs: Inputs) -> Inputs:
        """The same batch with its image embeddings, as `model.encode` gives it."""
        return self.watched(inputs)[0]

    @torch.no_grad()
    def watched(self, inputs: Inputs) -> tuple[Inputs, list[Sequence[Tensor]]]:
        """The batch with its image embeddings, and for each of `inputs.visuals` what `watch` gave."""
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
            # only pixels and grids reach the tower: the tokens of this batch stand by
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
