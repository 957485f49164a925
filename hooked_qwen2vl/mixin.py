"""Base class of the mixins of HookedQwen2VL, with types for the attributes that they use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import HookedQwen2VLConfig
from .layers import HookPoint


class Mixin:
    """Base of the mixins.

    Attributes:
        cfg: the model's configuration.
        processor: its `Processor`, or None.
        embed, blocks, ln_final, unembed, vision_encoder, vision_projector: modules (Any, as torch does not type their attributes).
        hook_embed: see `model.HookedQwen2VL`.
    """

    cfg: HookedQwen2VLConfig
    processor: Any
    embed: Any
    blocks: Any
    unembed: Any
    ln_final: Any
    hook_embed: HookPoint
    vision_encoder: Any
    vision_projector: Any

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
