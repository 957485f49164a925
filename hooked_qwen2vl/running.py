"""Where in the prompts a run of the blocks is: the positions that its queries and keys stand for, for hooks that act at places.

In cached generation, in a sweep that starts halfway, and after tokens have left the stream, the first of an activation's
positions is not the prompt's first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class RunningPositions:
    """Of one pass through blocks.

    Attributes:
        queries: [n] the positions that the residual stream holds now. keys: [m] those whose keys may be seen; the queries come last.
        hidden: [rows pos] positions, from the prompts' first, that nobody else in the row sees; None: none.
        n_layers: of the model.
    """

    def __init__(self, start: int, stop: int, n_layers: int, hidden: Bool[Tensor, "rows pos"] | None = None):
        self.start, self.stop, self.n_layers, self.hidden = start, stop, n_layers, hidden
        self.queries, self.keys = torch.arange(start, stop), torch.arange(stop)
        self.left: list[tuple[Tensor, Tensor]] = []

    def narrow(self, residual: Float[Tensor, "rows pos d_model"], leaving: Bool[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        """The stream without the positions that leave it, from here on.

        A position leaves the stream where it leaves in every row; in a row that is alone with it, its keys are hidden.

        Args:
            leaving: of the prompts' first positions.
        """
        hidden = torch.zeros(len(residual), self.stop, dtype=torch.bool)
        n = min(leaving.shape[1], self.stop)
        hidden[:, :n] = leaving[:, :n].cpu()
        self.hidden = hidden if self.hidden is None else hidden | self.hidden.cpu()
        gone = hidden.all(0)
        stay = ~gone[self.queries]
        if not bool(stay.any()):
            raise ValueError("every position of this run would leave the stream: keep at least the one that is read.")
        if not bool(stay.all()):
            self.left.append((self.queries[~stay], residual[:, ~stay]))
        self.queries, self.keys = self.queries[stay], self.keys[~gone[self.keys]]
        return residual[:, stay.to(residual.device)]

    def kept(self, x: Tensor, axis: int = 1) -> Tensor:
        """Of something that is at all positions of this run, what is where the stream still is."""
        return x.index_select(axis, (self.queries - self.start).to(x.device)) if self.left else x

    def add_to_left(self, term: Float[Tensor, "rows pos d_model"], first: int) -> None:
        """What is added after a block is also added to the positions that have left the stream at its end (`left[first:]`)."""
        self.left[first:] = [
            (at, stream + term[:, (at - self.start).to(term.device)].to(stream.device)) for at, stream in self.left[first:]
        ]

    def restored(self, residual: Float[Tensor, "rows kept d_model"]) -> Float[Tensor, "rows pos d_model"]:
        """The stream at all positions: those that left it as they were then."""
        if not self.left:
            return residual
        whole = residual.new_empty(len(residual), self.stop - self.start, residual.shape[-1])
        for positions, stream in [*self.left, (self.queries, residual)]:
            whole[:, positions - self.start] = stream.to(whole.device)
        return whole

    def at_all_positions(self, activation: Tensor, axis: int, key_axis: int | None = None) -> Tensor:
        """An activation with NaN at the positions that have left the stream, so that positions mean the same as before."""
        n_queries = self.stop - self.start
        axes = [(axis, self.queries - self.start, n_queries)] + ([] if key_axis is None else [(key_axis, self.keys, self.stop)])
        for at, places, n in axes:
            if activation.shape[at] == len(places) != n:
                shape = list(activation.shape)
                shape[at] = n
                whole = activation.new_full(shape, float("nan"))
                activation = whole.index_copy_(at % activation.ndim, places.to(activation.device), activation)
        return activation


running_positions: ContextVar[RunningPositions | None] = ContextVar("running_positions", default=None)


@contextmanager
def running_at(positions: RunningPositions) -> Iterator[RunningPositions]:
    """Within this context hooks find these positions in `running_positions`."""
    token = running_positions.set(positions)
    try:
        yield positions
    finally:
        running_positions.reset(token)


def query_positions(n: int) -> Int[Tensor, "n"]:
    """The positions that an activation of n positions holds; outside a run of this model's blocks, the first n."""
    running = running_positions.get()
    return torch.arange(n) if running is None else running.queries


def attention_positions(n_queries: int, n_keys: int) -> tuple[Int[Tensor, "n_queries"], Int[Tensor, "n_keys"]]:
    """The positions of a pattern's queries and keys; outside a run of this model's blocks, the queries are the last of the keys."""
    running = running_positions.get()
    if running is None:
        return torch.arange(n_keys - n_queries, n_keys), torch.arange(n_keys)
    return running.queries, running.keys
