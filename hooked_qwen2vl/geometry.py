"""Positions in a prompt: grids of images and videos, named segments, boxes, and places.

A *place* is what all analyses accept for positions (see `Geometry.resolve`). A box is (x0, y0, x1, y1) in original pixels, origin
top left. A grid is (t, h, w) in patches, or (rows, cols) in image tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities import Slice, SliceInput

from .moved import renamed_attributes
from .positions import IMAGE, VIDEO, tower_order
from .segments import KINDS, PADDING


class Box(NamedTuple):
    """A rectangle in an image, in original pixels, origin top left; a tuple of four numbers is also read as a box."""

    x0: float
    y0: float
    x1: float
    y1: float


_FRAME = re.compile(r"video\[(\d+)\]\.frame\[(\d+)\]")
_ONE = {word: re.compile(rf"{word}\[\d+\]") for word in KINDS.values()}
Place = str | Box | tuple[float, float, float, float] | int | slice | Sequence[int] | Tensor | np.ndarray


@dataclass(frozen=True)
class Visual:
    """One image or video of a batch.

    Attributes:
        row: index of its prompt.
        kind: IMAGE or VIDEO.
        grid: (t, h, w) in patches.
        size: (width, height) in original pixels.
        merge: side of a merge block, in patches.
        window: side of the tower's attention windows, in image tokens; None without windows.
        seconds_per_frame: duration of a frame of the grid, for videos of models whose positions depend on time; else None.
    """

    row: int
    kind: int
    grid: tuple[int, int, int]
    size: tuple[float, float]
    merge: int
    window: int | None = None
    seconds_per_frame: float | None = None

    @property
    def n_patches(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def n_tokens(self) -> int:
        return self.n_patches // self.merge**2

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """(t, rows, cols) in image tokens."""
        t, h, w = self.grid
        return t, h // self.merge, w // self.merge

    @property
    def token_size(self) -> tuple[float, float]:
        """(width, height) of an image token, in original pixels."""
        _, rows, cols = self.token_grid
        return self.size[0] / cols, self.size[1] / rows


@dataclass(frozen=True)
class PromptShape:
    """Layout of a batch of prompts: padding, and grids and places of the images. Positions correspond only in equal layouts.

    Attributes:
        position_ids: [3 batch pos] M-RoPE positions. attention_mask: [batch pos].
        sliced: True for activations that were cached at some positions only.
    """

    position_ids: Int[Tensor, "3 batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    sliced: bool = False

    def rows(self, batch_slice: Slice | SliceInput) -> PromptShape:
        """The layout of some rows; `batch_slice` as in TransformerLens."""
        batch_slice = Slice.unwrap(batch_slice)
        kept = batch_slice.apply(torch.arange(len(self.attention_mask)), dim=0).reshape(-1)
        return PromptShape(self.position_ids[:, kept], self.attention_mask[kept], self.sliced)

    def beginning(self, n: int) -> PromptShape:
        """The layout of the first n positions, to compare a prompt with its continuation."""
        return PromptShape(self.position_ids[..., :n], self.attention_mask[:, :n], self.sliced)

    def difference(self, other: PromptShape) -> str | None:
        """Why positions of the two do not correspond; None if they do. A batch of one is compared with every row of the other."""
        ours, theirs = self.attention_mask, other.attention_mask.to(self.attention_mask.device)
        if self.sliced or other.sliced:
            return "only some positions were kept of one of them (pos_slice)"
        if ours.shape[1] != theirs.shape[1]:
            return f"they have {ours.shape[1]} and {theirs.shape[1]} positions"
        if len(ours) != len(theirs) and 1 not in (len(ours), len(theirs)):
            return f"they have {len(ours)} and {len(theirs)} rows"
        if not bool((ours == theirs).all()):
            return "their padding differs"
        if not bool((self.position_ids == other.position_ids.to(self.position_ids.device)).all()):
            return "their images differ in grid or place"
        return None


def refuse_unaligned(first: Any, second: Any, what: str) -> None:
    """Raises ValueError if the positions of two batches do not correspond.

    Args:
        first, second: `Inputs`, or caches; caches from old files have no `prompt_shape` and are not checked.
        what: subject of the message, such as "the clean and the corrupted prompts".
    """
    ours, theirs = getattr(first, "prompt_shape", None), getattr(second, "prompt_shape", None)
    if ours is not None and theirs is not None and (why := ours.difference(theirs)):
        raise ValueError(f"{what} do not correspond position by position: {why}.")


@renamed_attributes
class Geometry:
    """Mixin of `Inputs`; uses its `tokens`, `attention_mask`, `segments` and `visuals`."""

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "3 batch pos"]
    segments: tuple[tuple[str, ...], ...]
    visuals: tuple[Visual, ...]
    pixels: Float[Tensor, "patch d_patch"] | None

    if TYPE_CHECKING:  # of `Inputs`

        @property
        def shape(self) -> torch.Size: ...
        @property
        def device(self) -> torch.device: ...
        def __len__(self) -> int: ...

    @property
    def prompt_shape(self) -> PromptShape:
        """The layout of the batch, to check whether positions of other prompts correspond."""
        return PromptShape(self.position_ids, self.attention_mask)

    def has_segment(self, name: str, row: int = 0) -> bool:
        """Whether the row has a segment of this name; every row has `last`."""
        names = self.segment_names(row)
        return name == "last" or name in names or (name in _ONE and any(_ONE[name].fullmatch(own) for own in names))

    def resolve(self, where: Place, row: int = 0, image: int = 0) -> Int[Tensor, "n"]:
        """Positions of a place in one row; all analyses use this function.

        Args:
            where: one of
                - the name of a segment. These partition a row: `system`, `vision_start`, `image[k]`, `video[k]`, `vision_end`,
                  `question`, `history`, `template`, `answer`, `padding`. Further names: `image` or `video` for all of them;
                  `video[k].frame[t]`, a frame of the grid (two frames of the video); in Qwen3-VL `video[k].time[t]`, the
                  timestamp before that frame; and `last`, the position that predicts the first answer token or, without an
                  answer, the next token;
                - a box: `Box(x0, y0, x1, y1)` or a tuple of four numbers, in original pixels of image `image`; it gives all
                  image tokens that it overlaps;
                - a position (an int), or several (a list, a range, an integer tensor or array); negative ones count from the end;
                - a slice of the row (without padding), or a mask [pos] (or [batch pos], of which this row is used).
            image: which image of the row a box is in.
        Raises:
            ValueError: no such row, segment, image or position; a position in the padding; a box that overlaps no token, extends
                outside the image, or is in fractions of the image; or no position at all.
        """
        row = self._row(row)
        if isinstance(where, str):
            return self._positions_of_segment(where, row)
        if isinstance(where, tuple):
            return self._positions_of_box(where, row, image)
        if isinstance(where, (Tensor, np.ndarray)) and where.ndim == 2 and tuple(where.shape) == tuple(self.shape):
            where = where[row]
        return resolve_positions(where, self.attention_mask[row], row)

    def positions(self, name: Place, row: int = 0, image: int = 0) -> Int[Tensor, "n"]:
        """The same as `resolve`."""
        return self.resolve(name, row, image)

    def span(self, name: Place, row: int = 0, image: int = 0) -> slice:
        """`resolve` as a slice.

        Raises:
            ValueError: as `resolve`, or the place is not contiguous.
        """
        found = self.resolve(name, row, image).tolist()
        if found != list(range(found[0], found[-1] + 1)):
            raise ValueError(f"{name!r} is not contiguous in row {row}: use positions({name!r}, row={row}).")
        return slice(found[0], found[-1] + 1)

    def position(self, where: Place, row: int = 0) -> int:
        """The position of a place that covers exactly one.

        Raises:
            ValueError: as `resolve`, or the place does not cover one position.
        """
        found = self.resolve(where, row)
        if len(found) != 1:
            raise ValueError(f"expected one position, but {_shown(where)} covers {len(found)} of row {row}.")
        return int(found[0])

    @property
    def image_grids(self) -> Int[Tensor, "image 3"]:
        """(t, h, w) in patches of each image of the batch."""
        grids = [visual.grid for visual in self.visuals if visual.kind == IMAGE]
        return torch.tensor(grids, dtype=torch.long).reshape(-1, 3)

    @property
    def video_grids(self) -> Int[Tensor, "video 3"]:
        """(t, h, w) in patches of each video of the batch."""
        grids = [visual.grid for visual in self.visuals if visual.kind == VIDEO]
        return torch.tensor(grids, dtype=torch.long).reshape(-1, 3)

    @property
    def grids(self) -> Int[Tensor, "visual 3"]:
        """(t, h, w) in patches of each image and video, in the order of `pixels`."""
        return torch.tensor([visual.grid for visual in self.visuals], dtype=torch.long).reshape(-1, 3)

    @property
    def labels(self) -> Int[Tensor, "batch pos"] | None:
        """The tokens of the answers, -100 elsewhere; None if no row has an answer."""
        answer = torch.tensor([[name == "answer" for name in row] for row in self.segments], device=self.device)
        return self.tokens.masked_fill(~answer, -100) if answer.any() else None

    def segment_names(self, row: int = 0) -> list[str]:
        """The names of the segments that partition this row, without padding, in order of appearance."""
        return list(dict.fromkeys(name for name in self.segments[self._row(row)] if name != PADDING))

    def grid(self, row: int = 0, image: int = 0, video: int | None = None) -> tuple[int, int]:
        """(rows, cols) of an image, or of a video's frame, in image tokens.

        Raises:
            ValueError: no such row or image.
        """
        return self._image_or_video(row, image, video)[1].token_grid[1:]

    def boxes(self, row: int = 0, image: int = 0, video: int | None = None) -> Float[Tensor, "image_token 4"]:
        """Box (x0, y0, x1, y1) of each token of an image, or of a video's frame, in original pixels, origin top left, raster order.

        The processor resizes images to multiples of a token's side, so the tokens tile the image exactly.

        Raises:
            ValueError: no such row or image.
        """
        _, visual = self._image_or_video(row, image, video)
        (_, rows, cols), (width, height) = visual.token_grid, visual.size
        row_index, col_index = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
        corners = torch.stack((col_index, row_index, col_index + 1, row_index + 1), dim=-1).reshape(-1, 4)
        return corners.double() * torch.tensor([width / cols, height / rows] * 2, dtype=torch.float64)

    def unpack_image(
        self, packed: Float[Tensor, "packed ..."], row: int = 0, image: int = 0, video: int | None = None
    ) -> Float[Tensor, "rows cols ..."]:
        """The part of a packed activation that belongs to one image, in raster order; for a video [t rows cols …].

        Args:
            packed: an activation of the tower over all patches of the batch, one over all its image tokens, or `pixels` (which are
                ordered by merge block, also in models with attention windows).
        Raises:
            ValueError: `packed` has another length.
        """
        number, visual = self._image_or_video(row, image, video)
        n_patches = sum(v.n_patches for v in self.visuals)
        n_tokens = sum(v.n_tokens for v in self.visuals)
        if len(packed) == n_tokens:
            cut = packed[self._slice(number, tokens=True)].unflatten(0, visual.token_grid)
        elif len(packed) == n_patches:
            t, h, w = visual.grid
            cut = packed[self._slice(number, tokens=False)].unflatten(0, (t, h * w))
            window = None if self.pixels is not None and packed.shape == self.pixels.shape else visual.window
            cut = cut[:, tower_order(h, w, visual.merge, window).to(packed.device)].unflatten(1, (h, w))
        else:
            raise ValueError(f"expected an activation over {n_patches} patches or {n_tokens} image tokens, got {len(packed)} rows.")
        return cut if video is not None else cut[0]

    def _positions_of_segment(self, name: str, row: int) -> Int[Tensor, "n"]:
        names = self.segments[row]
        if name == "last":
            answer = [i for i, own in enumerate(names) if own == "answer"]
            last = answer[0] - 1 if answer else max(i for i, own in enumerate(names) if own != PADDING)
            if last < 0 or names[last] == PADDING:
                raise ValueError(f"nothing predicts the answer of row {row}: it begins with its first token.")
            return torch.tensor([last])
        if frame := _FRAME.fullmatch(name):
            number, t = int(frame[2]), self._visual(row, int(frame[1]), VIDEO)[1].token_grid[0]
            if number >= t:
                raise ValueError(f"video[{frame[1]}] has frames 0..{t - 1} (two video frames each), not {number}.")
            return self._positions_of_segment(f"video[{frame[1]}]", row).reshape(t, -1)[number]
        found = [i for i, own in enumerate(names) if own == name or (name in _ONE and _ONE[name].fullmatch(own))]
        if not found:
            raise ValueError(f"row {row} has no segment called {name!r}; it has {', '.join(self.segment_names(row))}.")
        return torch.tensor(found)

    def _positions_of_box(self, box: tuple, row: int, image: int) -> Int[Tensor, "n"]:
        visual = self._visual(row, image, IMAGE)[1]
        x0, y0, x1, y1 = checked_box(box, visual.size, slack=visual.token_size)
        boxes = self.boxes(row, image)
        touched = (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
        if not touched.any():
            raise ValueError(f"the box {box} lies outside the image of {_size(visual.size)} pixels.")
        return self._positions_of_segment(f"image[{image}]", row)[touched]

    def _visual(self, row: int, index: int, kind: int) -> tuple[int, Visual]:
        """(index in `visuals`, visual) of the index-th image or video of a row."""
        row = self._row(row)
        found = [(n, v) for n, v in enumerate(self.visuals) if v.row == row and v.kind == kind]
        if not 0 <= index < len(found):
            raise ValueError(f"row {row} has {len(found)} {KINDS[kind]}s, there is no {KINDS[kind]} {index}.")
        return found[index]

    def _image_or_video(self, row: int, image: int, video: int | None) -> tuple[int, Visual]:
        return self._visual(row, image, IMAGE) if video is None else self._visual(row, video, VIDEO)

    def _row(self, row: int) -> int:
        if isinstance(row, bool) or not hasattr(row, "__index__"):
            raise ValueError(f"expected the number of a row, got {row!r}.")
        if not -len(self) <= row < len(self):
            raise ValueError(f"there is no row {row}: the batch has {len(self)}.")
        return row % len(self)

    def _slice(self, number: int, tokens: bool) -> slice:
        """The slice of `pixels` (or with `tokens`, of `image_embeds`) that belongs to the number-th visual."""
        sizes = [visual.n_tokens if tokens else visual.n_patches for visual in self.visuals]
        start = sum(sizes[:number])
        return slice(start, start + sizes[number])


def resolve_positions(where: Any, attention_mask: Int[Tensor, "pos"], row: int = 0) -> Int[Tensor, "n"]:
    """The part of `Geometry.resolve` for places that are given as numbers.

    Args:
        where: a position, a list, a range, a slice (padding is left out), an integer tensor or array, or a mask [pos].
        attention_mask: of the row, 0 for padding. row: its index, for error messages.
    Raises:
        ValueError: another type, a position out of range or in the padding, or no position at all.
    """
    seen = attention_mask.cpu().bool()
    found = _numbers(where, len(seen), f"row {row}")
    if isinstance(where, slice):
        found = found[seen[found]]
    if not len(found):
        raise ValueError(f"{_shown(where)} selects no token of row {row}, which has {int(seen.sum())}.")
    if padded := found[~seen[found]].tolist():
        first, last = seen.nonzero().flatten()[[0, -1]].tolist()
        raise ValueError(f"position {padded[0]} of row {row} is padding: its tokens are at {first}..{last}.")
    return found


def _numbers(where: Any, length: int, owner: str) -> Int[Tensor, "n"]:
    """The positions as a tensor; negative ones count from the end."""
    if isinstance(where, slice):
        try:
            return torch.arange(length)[where]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} is no slice of positions ({error}).") from error
    try:
        array = np.asarray(where.detach().cpu() if isinstance(where, Tensor) else where)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged, or not numbers
        raise _no_place(where, owner) from error
    if array.dtype == bool and array.ndim == 1:
        if len(array) != length:
            raise ValueError(f"a mask of {len(array)} positions does not fit {owner}, which has {length}.")
        return torch.from_numpy(array.nonzero()[0])
    if array.ndim > 1 or array.dtype.kind not in "iu":
        raise _no_place(where, owner)
    chosen = array.reshape(-1).astype(np.int64)
    wrong = chosen[(chosen < -length) | (chosen >= length)]
    if len(wrong):
        raise ValueError(f"there is no position {wrong[0]} in {owner}: it has {length}, 0..{length - 1} or {-length}..-1.")
    return torch.from_numpy(chosen % length)


def checked_box(box: Any, size: tuple[float, float], slack: tuple[float, float] = (1.0, 1.0)) -> Box:
    """Checks a box and returns it.

    Args:
        size: (width, height) of its image in pixels. slack: how far the box may extend over the edges, in pixels.
    Raises:
        ValueError: not four finite numbers, no area, in fractions of the image, or outside the image.
    """
    numbers = isinstance(box, tuple) and len(box) == 4 and all(isinstance(v, Real) and not isinstance(v, bool) for v in box)
    if not numbers or not np.isfinite(box).all():
        raise ValueError(
            f"a tuple is a box (x0, y0, x1, y1) of four numbers in original pixels, got {_shown(box)}; give positions as a list."
        )
    x0, y0, x1, y1 = map(float, box)
    (width, height), (across, down) = size, slack
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"expected a box (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {box}.")
    if min(box) >= 0 and max(box) <= 1 and max(size) > 1:
        raise ValueError(
            f"the box {box} seems to be in fractions of the image; expected original pixels, here of {_size(size)}: multiply "
            f"by width and height."
        )
    if x0 < -across or y0 < -down or x1 > width + across or y1 > height + down:
        raise ValueError(f"the box {box} reaches far outside the image of {_size(size)} original pixels.")
    return Box(x0, y0, x1, y1)


def _no_place(where: Any, owner: str) -> ValueError:
    return ValueError(
        f"expected a place in {owner}: the name of a segment, a box (a tuple of four numbers), a position, a list or tensor of "
        f"positions, a slice, or a mask; got {_shown(where)}."
    )


def _shown(where: Any) -> str:
    text = f"a tensor {tuple(where.shape)} of {where.dtype}" if isinstance(where, (Tensor, np.ndarray)) else repr(where)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _size(size: tuple[float, float]) -> str:
    return f"{size[0]:g}×{size[1]:g}"
