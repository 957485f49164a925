"""Raises an error for numbers that are not finite, which names the first stage that they came from.

Every stage records the sum of its output, which is not finite if any element is not. The sums are moved to the host together, once
per forward: nested `finite_check` contexts use the check of the outermost one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn


class FiniteCheck:
    """The sums of the stages of a forward, kept on their devices until they are checked."""

    def __init__(self) -> None:
        self.notes: list[tuple[Tensor, str | Callable[[], str], torch.dtype]] = []

    def note(self, x: Tensor, stage: str | Callable[[], str]) -> None:
        """Records the sum of x.

        Args:
            stage: name of the stage, or a function that finds the name if it is needed.
        """
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.notes.append((x.detach().sum(dtype=wide), stage, x.dtype))

    def flags(self) -> Bool[Tensor, "stage"]:
        """Whether each recorded sum is finite, on the device of the first."""
        if not self.notes:
            return torch.zeros(0, dtype=torch.bool)
        device = self.notes[0][0].device
        return torch.stack([total.to(device) for total, _, _ in self.notes]).isfinite()

    def ask(self) -> None:
        """Raises ValueError for the first stage whose numbers are not finite."""
        if self.notes:
            self.judge(self.flags().tolist())

    def judge(self, finite: Sequence[bool]) -> None:
        """As `ask`, with flags that were moved to the host before; clears the recorded sums.

        Raises:
            ValueError: for the first stage whose numbers are not finite.
        """
        notes, self.notes = self.notes, []
        if all(finite):
            return
        _, stage, dtype = notes[finite.index(False)]
        raise ValueError(_not_finite(stage if isinstance(stage, str) else stage(), dtype))


_current: ContextVar[FiniteCheck | None] = ContextVar("finite_check", default=None)


@contextmanager
def finite_check(ask: bool = True) -> Iterator[FiniteCheck]:
    """Context that yields the check of the current forward; the outermost context calls `ask` at its end.

    Args:
        ask: False: the caller calls `ask` or `judge`.

    Raises:
        ValueError: at the end: a stage gave numbers that are not finite.
    """
    outer = _current.get()
    if outer is not None:
        yield outer
        return
    check = FiniteCheck()
    token = _current.set(check)
    try:
        yield check
    finally:
        _current.reset(token)
    if ask:
        check.ask()


def finite(x: Tensor, stage: str) -> Tensor:
    """Records x for the check of the current forward and returns it.

    Raises:
        ValueError: at the end of the forward: x is not finite.
    """
    with finite_check() as check:
        check.note(x, stage)
    return x


def _not_finite(stage: str, dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        why = "float16 ends at 65,504. Load the model with dtype='bfloat16' or 'float32'."
    else:
        why = "expected finite weights, pixels and edits. Look for NaN or inf in the weights of that stage, or in what a hook put there."
    return f"{stage} gave numbers that are not finite: {why}"


@torch.no_grad()
def first_not_finite(model: Any, pixels: Tensor, grids: Tensor) -> str:
    """The first stage of the tower whose output is not finite; runs it once more."""
    if not bool(pixels.isfinite().all()):
        return "the processor (pixels)"
    names: list[str] = []

    def look(module: nn.Module, args: Any, output: Tensor, name: str) -> None:
        if not bool(output.isfinite().all()):
            names.append(name)

    encoder = model.vision_encoder
    tower = {"vision_encoder.patch_embed": encoder.patch_embed}
    tower |= {f"vision_encoder.blocks.{layer}": block for layer, block in enumerate(encoder.blocks)}
    handles = [module.register_forward_hook(lambda *call, name=name: look(*call, name=name)) for name, module in tower.items()]
    try:
        model.vision_projector(encoder(pixels, grids), grids)
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else "vision_projector"
