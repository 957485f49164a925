"""Numbers that are not finite: an error that names the first stage they came from, before anybody reads them as results.

Every stage notes the sum of what it gives, which is not finite if any number of it is not. The sums are brought to the host
together, once a forward: steps inside a `finite_check` share that of the forward they belong to.
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
    """The sums of a forward's stages, on their devices until they are asked for."""

    def __init__(self) -> None:
        self.notes: list[tuple[Tensor, str | Callable[[], str], torch.dtype]] = []

    def note(self, x: Tensor, stage: str | Callable[[], str]) -> None:
        """Remembers whether x is finite.

        Args:
            stage: its name, or a function that finds it when it is needed.
        """
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.notes.append((x.detach().sum(dtype=wide), stage, x.dtype))

    def flags(self) -> Bool[Tensor, "stage"]:
        """Whether each stage's numbers are finite, on the first one's device."""
        if not self.notes:
            return torch.zeros(0, dtype=torch.bool)
        device = self.notes[0][0].device
        return torch.stack([total.to(device) for total, _, _ in self.notes]).isfinite()

    def ask(self) -> None:
        """Raises ValueError for the first stage whose numbers are not finite."""
        if self.notes:
            self.judge(self.flags().tolist())

    def judge(self, finite: Sequence[bool]) -> None:
        """The same, of flags that have been brought to the host; the notes are then done with.

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
    """The check of the forward that is under way; the outermost asks when it ends.

    Args:
        ask: False leaves that to the caller.

    Raises:
        ValueError: (on leaving) a stage gave numbers that are not finite.
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
    """x itself.

    Raises:
        ValueError: (at the end of the forward) it is not finite.
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
