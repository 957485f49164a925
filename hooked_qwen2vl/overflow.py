"""In float16 activations can overflow; that is an error which names the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def finite(x: Tensor, where: str) -> Tensor:
    """The tensor itself.

    Raises:
        ValueError: it is float16 and has overflowed.
    """
    if x.dtype == torch.float16 and not bool(x.isfinite().all()):
        raise ValueError(not_finite(where))
    return x


def not_finite(where: str) -> str:
    return (
        f"{where} gave numbers that are not finite: float16 ends at 65,504. Load the model with dtype='bfloat16' or "
        f"'float32'."
    )


@torch.no_grad()
def first_not_finite(model: Any, pixels: Tensor, grids: Tensor) -> str:
    """The first module of the tower whose output is not finite; runs it once more."""
    names: list[str] = []

    def look(module: nn.Module, args: Any, output: Tensor, name: str) -> None:
        if not bool(output.isfinite().all()):
            names.append(name)

    tower = {f"vision_encoder.blocks.{layer}": block for layer, block in enumerate(model.vision_encoder.blocks)}
    handles = [
        module.register_forward_hook(lambda *call, name=name: look(*call, name=name)) for name, module in tower.items()
    ]
    try:
        model.vision_projector(model.vision_encoder(pixels, grids))
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else "vision_projector"
