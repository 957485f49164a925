"""Positions of patches in the tower and of tokens in the decoder. Pure functions.

A grid is (t, h, w) in patches (14 pixels a side; 16 in Qwen3-VL). The tower orders patches by merge block (2×2 patches), merge
blocks in raster order, frame after frame. Image tokens are merge blocks, in raster order. In a tower with attention windows
(Qwen2.5-VL), merge blocks are ordered by window.

Source: Qwen2-VL technical report, section 2.1; Qwen2.5-VL technical report, section 2.1; `get_rope_index` and
`get_vision_window_index` of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

TEXT, IMAGE, VIDEO = 0, 1, 2  # token types, as HF's mm_token_type_ids


def patch_coordinates(grid_thw: Int[Tensor, "image 3"], merge: int) -> Int[Tensor, "patch 2"]:
    """(row, col) of each patch, in the tower's order (by merge block); the frames of a video have the same coordinates.

    Args:
        grid_thw: patches along (t, h, w) of each image.
        merge: side of a merge block, in patches.
    Raises:
        ValueError: h or w is not a multiple of merge.
    Source: Qwen2-VL technical report, section 2.1.
    """
    return torch.cat([_frame_coordinates(h, w, merge).repeat(t, 1) for t, h, w in grid_thw.tolist()])


def _frame_coordinates(h: int, w: int, merge: int) -> Int[Tensor, "patch 2"]:
    if h % merge or w % merge:
        raise ValueError(f"a grid of {h}×{w} patches does not divide into merge blocks of {merge}×{merge}.")
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    grid = torch.stack((rows, cols), dim=-1)
    blocks = grid.unflatten(0, (h // merge, merge)).unflatten(2, (w // merge, merge))
    return blocks.transpose(1, 2).reshape(-1, 2)


def raster_order(h: int, w: int, merge: int) -> Int[Tensor, "patch"]:
    """For each patch of a frame in raster order (row by row), its index in the tower's order.

    `packed[raster_order(h, w, merge)]` is the frame in raster order; the `argsort` of this order reverses it.

    Raises:
        ValueError: h or w is not a multiple of merge.
    """
    rows, cols = _frame_coordinates(h, w, merge).unbind(-1)
    return torch.argsort(rows * w + cols)


def interpolation(grid_thw: Int[Tensor, "image 3"], merge: int, side: int) -> tuple[Int[Tensor, "patch 4"], Float[Tensor, "patch 4"]]:
    """Bilinear interpolation of a square table of position embeddings to each grid; the corners of table and grid coincide.

    Args:
        grid_thw: patches along (t, h, w) of each image.
        side: number of rows (and columns) of the table.
    Returns:
        (indices into the table, row by row, of each patch's four neighbours, their weights in float32), in the tower's order.
    Source: Qwen3-VL; `get_vision_interpolation_indices_and_weights` of transformers.
    """
    coordinates = patch_coordinates(grid_thw, merge).float()  # [patch 2]
    sizes = grid_thw[:, 1:].repeat_interleave(grid_thw.prod(-1), dim=0).to(coordinates.device)
    exact = coordinates * (side - 1) / (sizes - 1).clamp(min=1)
    before = exact.floor()
    ends = torch.stack((before, (before + 1).clamp(max=side - 1)), dim=-1).long()  # [patch 2 (before, after)]
    shares = torch.stack((1 - (exact - before), exact - before), dim=-1)
    places = ends[:, 0, :, None] * side + ends[:, 1, None, :]
    weights = shares[:, 0, :, None] * shares[:, 1, None, :]
    return places.flatten(1), weights.flatten(1)


def attention_segments(grid_thw: Int[Tensor, "image 3"]) -> Int[Tensor, "segment"]:
    """Number of patches of each image, or of each frame of a video; attention does not go beyond these."""
    return (grid_thw[:, 1] * grid_thw[:, 2]).repeat_interleave(grid_thw[:, 0])


def window_order(grid_thw: Int[Tensor, "image 3"], merge: int, window: int) -> tuple[Int[Tensor, "image_token"], Int[Tensor, "window"]]:
    """The order of image tokens by attention window, and the number of tokens of each window.

    The windows of a frame are in raster order, and so are the tokens of a window. If the grid is not a multiple of the window, the
    windows at its right and lower edges are smaller.

    Args:
        grid_thw: patches along (t, h, w) of each image.
        window: side of a window, in image tokens.
    Returns:
        (order, lengths): `tokens[order]` sorts tokens in raster order (frame after frame, image after image) by window; the `argsort`
        of order reverses it. lengths: image tokens of each window.
    """
    keys, n_windows = [], 0
    for t, h, w in grid_thw.tolist():
        rows, cols = torch.meshgrid(torch.arange(h // merge), torch.arange(w // merge), indexing="ij")
        across = -(-(w // merge) // window)
        here = (rows // window * across + cols // window).flatten()
        for _ in range(t):
            keys.append(here + n_windows)
            n_windows += int(here.max()) + 1
    key = torch.cat(keys)
    return key.argsort(stable=True), key.bincount()


def patches_of(tokens: Int[Tensor, "image_token"], merge: int) -> Int[Tensor, "patch"]:
    """Indices of the patches of these image tokens, for patches that are ordered by merge block."""
    return (tokens[:, None] * merge**2 + torch.arange(merge**2, device=tokens.device)).flatten()


def tower_order(h: int, w: int, merge: int, window: int | None) -> Int[Tensor, "patch"]:
    """For each patch of a frame in raster order, its index in the tower's order; without windows the same as `raster_order`."""
    order = raster_order(h, w, merge)
    if window is None:
        return order
    tokens, _ = window_order(torch.tensor([[1, h, w]]), merge, window)
    return patches_of(tokens, merge).argsort()[order]


def mrope_positions(
    token_types: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    image_grids: Int[Tensor, "image 3"],
    video_grids: Int[Tensor, "video 3"],
    merge: int,
    frame_steps: Sequence[float] | None = None,
) -> tuple[Int[Tensor, "3 batch pos"], Int[Tensor, "batch"]]:
    """M-RoPE positions (t, row, col) of all tokens, and the difference between position and token count for generation.

    A text token advances all three streams by one. An image's tokens are at start + (0, row, col), and the next token is at the
    image's largest position + 1. A video's tokens are at start + (time, row, col), and the next token is at the largest row or
    column position + 1, as in transformers 5: if a video has more frames than rows and columns, the text after it repeats time
    positions of its last frames. The time of frame k is k, or ⌊k · step⌋ with frame steps. In Qwen3-VL there is text between
    frames; the caller passes each frame as a grid of its own. Images without a token between them are separated by their grids.
    Padding has position 0 and does not count.

    Args:
        token_types: 0 text, 1 image, 2 video, for each token.
        image_grids, video_grids: grids in order of appearance in the batch, row by row.
        merge: side of a merge block, in patches.
        frame_steps: for each video, time positions from one frame (of the grid) to the next; None: 1.
    Returns:
        (position_ids [3 batch pos], delta [batch]): the position of the next token is the row's number of tokens + delta. The delta
        from an image is negative or 0.
    Raises:
        ValueError: the placeholders do not match the grids.
    """
    steps = [1.0] * len(video_grids) if frame_steps is None else list(frame_steps)
    if len(steps) != len(video_grids):
        raise ValueError(f"expected a step for each of {len(video_grids)} videos, got {len(steps)}.")
    grids = {
        IMAGE: iter([(grid, 1.0) for grid in image_grids.tolist()]),
        VIDEO: iter(list(zip(video_grids.tolist(), steps))),
    }
    position_ids = torch.zeros(3, *token_types.shape, dtype=torch.long)
    delta = torch.zeros(len(token_types), dtype=torch.long)
    for row, (types, mask) in enumerate(zip(token_types.cpu(), attention_mask.cpu().bool())):
        positions = _row_positions(types[mask].tolist(), grids, merge)
        position_ids[:, row, mask] = positions
        delta[row] = positions.max() + 1 - positions.shape[1] if positions.numel() else 0
    if any(next(rest, None) is not None for rest in grids.values()):
        raise ValueError("there are more image or video grids than runs of placeholders in the prompts.")
    return position_ids.to(token_types.device), delta.to(token_types.device)


def _row_positions(types: list[int], grids: dict[int, Iterator[tuple[list[int], float]]], merge: int) -> Int[Tensor, "3 token"]:
    parts, start, index = [], 0, 0
    while index < len(types):
        kind = types[index]
        if kind == TEXT:
            end = next((i for i in range(index, len(types)) if types[i] != TEXT), len(types))
            parts.append(torch.arange(start, start + end - index).expand(3, -1))
            start, index = start + end - index, end
            continue
        grid, step = next(grids[kind], (None, 1.0))
        if grid is None:
            raise ValueError("there are more runs of placeholders in the prompts than image or video grids.")
        t, h, w = grid[0], grid[1] // merge, grid[2] // merge
        n = t * h * w
        if types[index : index + n] != [kind] * n:
            raise ValueError(
                f"an image of {grid[1]}×{grid[2]} patches needs {n} placeholders in a row, the prompt has "
                f"{sum(1 for k in types[index:] if k == kind)} left from its first."
            )
        times = (torch.arange(t) * torch.tensor(step, dtype=torch.float32)).long()  # in float32, as in the reference
        axes = torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij")
        parts.append(torch.stack(axes).reshape(3, -1) + start)
        start, index = start + max(h, w), index + n
    return torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.long)
