"""A scene: things on a grid of 28-pixel cells, its geometry, and which split it belongs to.

Cells are (row, col), origin top left; boxes are (x0, y0, x1, y1) in original pixels.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool

from .folder import CELL
from .words import COLORS, DIGITS, LETTERS, PATTERNS, SHAPES

Cell = tuple[int, int]
Box = tuple[int, int, int, int]
BACKGROUND = "background"
_PLACED = frozenset(SHAPES) | frozenset(LETTERS) | frozenset(DIGITS) | frozenset(PATTERNS)


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        kind: a shape, letter, digit or pattern, "bar", "arrow", "path", or "background".
        color: its colour word.
        row, col: its top left cell.
        rows, cols: its extent in cells.
        facing: an arrow's direction or the orientation of stripes, else "".
        path: a path's cells from start to end, else ().
    """

    kind: str
    color: str
    row: int
    col: int
    rows: int = 1
    cols: int = 1
    facing: str = ""
    path: tuple[Cell, ...] = ()

    @property
    def size(self) -> str:
        """One of "small" (one cell) and "big" (2×2 cells)."""
        return "big" if self.rows * self.cols > 1 else "small"

    @property
    def cells(self) -> frozenset[Cell]:
        """The cells it covers."""
        if self.path:
            return frozenset(self.path)
        return frozenset((r, c) for r in range(self.row, self.row + self.rows) for c in range(self.col, self.col + self.cols))

    @property
    def box(self) -> Box:
        """(x0, y0, x1, y1) in original pixels, aligned to cells."""
        return self.col * CELL, self.row * CELL, (self.col + self.cols) * CELL, (self.row + self.rows) * CELL

    @property
    def turns(self) -> int:
        """How often a path changes direction."""
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self.path, self.path[1:])]
        return sum(a != b for a, b in zip(steps, steps[1:]))

    def mask(self, rows: int, cols: int) -> Bool[np.ndarray, "rows cols"]:
        """Cells it covers, on a grid of `rows` × `cols` cells (raster order: that of the image tokens)."""
        mask = np.zeros((rows, cols), dtype=bool)
        for cell in self.cells:
            mask[cell] = True
        return mask

    def pixel_mask(self, rows: int, cols: int) -> Bool[np.ndarray, "height width"]:
        """The same mask in original pixels."""
        return np.kron(self.mask(rows, cols), np.ones((CELL, CELL), dtype=bool))


@dataclass(frozen=True)
class Scene:
    """Things on a background.

    Attributes:
        domain: one of `words.DOMAINS`.
        rows, cols: the grid, in cells.
        background: its colour word.
        things: in raster order of their top left cells.
        noise: seed of the pixel noise; two scenes of one seed and grid have the same noise.
    """

    domain: str
    rows: int
    cols: int
    background: str
    things: tuple[Thing, ...]
    noise: int = 0

    @cached_property
    def key(self) -> int:
        """A hash of what is seen: everything but the noise."""
        return zlib.crc32(repr(replace(self, noise=0)).encode())

    @property
    def split(self) -> str:
        """The split a scene belongs to by its content: 1 in 10 validation, 1 in 10 test."""
        return {0: "validation", 1: "test"}.get(self.key % 10, "train")

    @property
    def backdrop(self) -> Thing:
        """The background as a thing that covers every cell."""
        return Thing(BACKGROUND, self.background, 0, 0, self.rows, self.cols)

    def is_unseen(self, thing: Thing) -> bool:
        """Whether the thing's combination of kind, colour and quadrant is kept out of training."""
        if thing.kind not in _PLACED:
            return False
        below = 2 * thing.row + thing.rows > self.rows
        right = 2 * thing.col + thing.cols > self.cols
        return zlib.crc32(f"{thing.kind} {thing.color} {below} {right}".encode()) % 12 == 0

    def has_unseen(self) -> bool:
        """Whether any thing wears a combination kept out of training."""
        return any(self.is_unseen(thing) for thing in self.things)

    def fits(self) -> bool:
        """Whether every thing lies on the grid and no two overlap."""
        taken: set[Cell] = set()
        for thing in self.things:
            if thing.row < 0 or thing.col < 0:
                return False
            if thing.row + thing.rows > self.rows or thing.col + thing.cols > self.cols or taken & thing.cells:
                return False
            taken |= thing.cells
        return True

    def exchange(self, old: Thing, new: Thing) -> Scene:
        """The same scene with one thing (or the background) exchanged."""
        if old.kind == BACKGROUND:
            return replace(self, background=new.color)
        return replace(self, things=tuple(new if thing == old else thing for thing in self.things))


def typical_color(kind: str) -> str | None:
    """The colour a shape wears in most scenes; None for other things."""
    return COLORS[SHAPES.index(kind)] if kind in SHAPES else None
