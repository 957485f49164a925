"""The prompt positions of the queries and keys in the current run of the blocks, for hooks that act at positions.

Index 0 of an activation is not position 0 of the prompt in generation with a key-value cache, in sweeps that start at a later
position, and after tokens were dropped from the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class RunningPositions:
    """The positions of one pass through blocks.

    Attributes:
        queries: [n] positions that the residual stream has now. keys: [m] positions of the keys; the queries' positions come last.
        hidden: [rows pos] positions, counted from the start of the prompts, that no other position of the row sees; None: none.
        n_layers: number of layers of the model.
        left: (positions, their residual stream) of positions that were dropped.
    """

    def __init__(self, start: int, stop: int, n_layers: int, hidden: Bool[Tensor, "rows pos"] | None = None):
        self.start, self.stop, self.n_layers, self.hidden = start, stop, n_layers, hidden
        self.queries, self.keys = torch.arange(start, stop), torch.arange(stop)
        self.left: list[tuple[Tensor, Tensor]] = []

    def narrow(self, residual: Float[Tensor, "rows pos d_model"], leaving: Bool[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        """Drops positions from the run, and returns the residual stream without them.

        A position is dropped if it leaves in every row; otherwise its keys are hidden in the rows in which it leaves.

        Args:
            leaving: whether each position leaves, counted from the start of the prompts.
        Raises:
            ValueError: no position would be left.
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
        """The part of a tensor over all positions of this run that belongs to the remaining positions."""
        return x.index_select(axis, (self.queries - self.start).to(x.device)) if self.left else x

    def add_to_left(self, term: Float[Tensor, "rows pos d_model"], first: int) -> None:
        """Adds a term to the positions that were dropped at the end of the block (`left[first:]`), as to the remaining ones."""
        self.left[first:] = [
            (at, stream + term[:, (at - self.start).to(term.device)].to(stream.device)) for at, stream in self.left[first:]
        ]

    def restored(self, residual: Float[Tensor, "rows kept d_model"]) -> Float[Tensor, "rows pos d_model"]:
        """The residual stream at all positions; dropped positions have the stream from when they were dropped."""
        if not self.left:
            return residual
        whole = residual.new_empty(len(residual), self.stop - self.start, residual.shape[-1])
        for positions, stream in [*self.left, (self.queries, residual)]:
            whole[:, positions - self.start] = stream.to(whole.device)
        return whole

    def at_all_positions(self, activation: Tensor, axis: int, key_axis: int | None = None) -> Tensor:
        """An activation over all positions of the run, with NaN at dropped positions."""
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
    """Context in which hooks find these positions in `running_positions`."""
    token = running_positions.set(positions)
    try:
        yield positions
    finally:
        running_positions.reset(token)


def query_positions(n: int) -> Int[Tensor, "n"]:
    """The prompt positions of an activation with n positions; outside a run of this model's blocks, 0..n−1."""
    running = running_positions.get()
    return torch.arange(n) if running is None else running.queries


def attention_positions(n_queries: int, n_keys: int) -> tuple[Int[Tensor, "n_queries"], Int[Tensor, "n_keys"]]:
    """The prompt positions of a pattern's queries and keys; outside a run of this model's blocks, the queries are the last keys."""
    running = running_positions.get()
    if running is None:
        return torch.arange(n_keys - n_queries, n_keys), torch.arange(n_keys)
    return running.queries, running.keys
