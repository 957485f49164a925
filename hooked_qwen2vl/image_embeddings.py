"""Image prefixes computed once an image, however many questions are asked about it.

An image is known by the pixels the tower is given, so two files with the same picture are one image. The tower
runs on one image at a time: what an image gives then never depends on which others were met before, and a run
that was stopped and resumed gets the same numbers to the bit.
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

CAPACITY = 1 << 30


class Prefixes:
    """A store of image prefixes that forgets the least recently used beyond its capacity.

    Attributes:
        model: a HookedQwen2VL; when its tower's weights change, what was held is not used again.
        capacity: bytes it may hold.
        watch: entered while the tower runs on one image (its inputs are given); the tensors that it gives are kept with
            the prefix.
        computed: how many images the tower has run on.
    """

    def __init__(
        self, model: Any, capacity: int = CAPACITY, watch: Callable[[Any], AbstractContextManager] = lambda inputs: nullcontext(())
    ):
        self.model, self.capacity, self.watch, self.computed = model, capacity, watch, 0
        self._held: OrderedDict[tuple, tuple[Float[Tensor, "image_token d_model"], Sequence[Tensor]]] = OrderedDict()

    def __call__(self, inputs: Any) -> Any:
        """The same batch with its prefix, as `model.encode` gives it."""
        return self.watched(inputs)[0]

    @torch.no_grad()
    def watched(self, inputs: Any) -> tuple[Any, list[Sequence[Tensor]]]:
        """The batch with its prefix, and for each of `inputs.visuals` what `watch` gave."""
        if not inputs.visuals:
            return inputs, []
        stamp = self.model._encoder_stamp()
        pixels = inputs.pixels.split([visual.n_patches for visual in inputs.visuals])
        held = [self._prefix(inputs, visual, part, stamp) for visual, part in zip(inputs.visuals, pixels)]
        return inputs.with_prefix(torch.cat([prefix for prefix, _ in held]), stamp), [seen for _, seen in held]

    def _prefix(
        self, inputs: Any, visual: Any, pixels: Tensor, stamp: tuple
    ) -> tuple[Float[Tensor, "image_token d_model"], Sequence[Tensor]]:
        key = (stamp, visual.grid, image_hash(pixels))
        if key not in self._held:
            # only pixels and grids reach the tower: the tokens of this batch stand by
            one = replace(inputs, visuals=(visual,), pixels=pixels)
            with self.watch(one) as seen:
                self._held[key] = self.model.encode(one).image_embeds, seen
            self.computed += 1
        self._held.move_to_end(key)
        held = self._held[key]
        while len(self._held) > 1 and sum(map(_nbytes, self._held.values())) > self.capacity:
            self._held.popitem(last=False)
        return held


def _nbytes(held: tuple[Tensor, Sequence[Tensor]]) -> int:
    return held[0].nbytes + sum(tensor.nbytes for tensor in held[1])
