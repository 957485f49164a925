"""Where things are: patches in the tower, tokens in the decoder. Pure functions.

Frames: a grid is (t, h, w) in patches (14 pixels a side; 16 in Qwen3-VL). The tower's order is merge block by merge
block (2×2 patches), blocks in raster order, frame after frame. Image tokens are merge blocks, in raster order. Where the
tower has attention windows (Qwen2.5-VL), its merge blocks come window by window instead.

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
    """(row, col) of each patch, in the tower's order; a video repeats its frame's coordinates.

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
    """For each patch of a frame in raster order (row by row), its place in the tower's order.

    `packed[raster_order(h, w, merge)]` is the frame in raster order; `argsort` of it is the way back.

    Raises:
        ValueError: h or w is not a multiple of merge.
    """
    rows, cols = _frame_coordinates(h, w, merge).unbind(-1)
    return torch.argsort(rows * w + cols)


def interpolation(grid_thw: Int[Tensor, "image 3"], merge: int, side: int) -> tuple[Int[Tensor, "patch 4"], Float[Tensor, "patch 4"]]:
    """Bilinear interpolation of a square table of positions to each grid, whose corners are the table's corners.

    Args:
        grid_thw: patches along (t, h, w) of each image.
        side: rows (and columns) of the table.
    Returns:
        places in the table (row by row) of each patch's four neighbours, and their weights in float32; in the tower's order.
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
    """How many patches each image, or each frame of a video, has: attention stays inside them."""
    return (grid_thw[:, 1] * grid_thw[:, 2]).repeat_interleave(grid_thw[:, 0])


def window_order(grid_thw: Int[Tensor, "image 3"], merge: int, window: int) -> tuple[Int[Tensor, "image_token"], Int[Tensor, "window"]]:
    """Image tokens window by window, and how many each window has.

    A frame's windows come in raster order, and so do the tokens inside each; where the grid does not divide, the windows at
    its right and lower edge are smaller.

    Args:
        grid_thw: patches along (t, h, w) of each image.
        window: side of a window, in image tokens.
    Returns:
        order: `tokens[order]` puts tokens in raster order (frame after frame, image after image) window by window;
        `argsort` of it is the way back. lengths: image tokens of each window.
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
    """The places of these image tokens' patches, where patches lie merge block by merge block."""
    return (tokens[:, None] * merge**2 + torch.arange(merge**2, device=tokens.device)).flatten()


def tower_order(h: int, w: int, merge: int, window: int | None) -> Int[Tensor, "patch"]:
    """For each patch of a frame in raster order, its place in the tower's order; `raster_order` where there are no windows."""
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
    """(t, row, col) position of every token, and what decoding adds to the token count.

    Text advances all three streams by one; an image's tokens are (0, row, col) from where it starts, and what
    follows goes on from its largest position + 1. A video's tokens are (frame, row, col), and what follows goes on
    from the largest row or column + 1, as in transformers 5: the text after a video with more frames than rows and columns
    repeats time positions that its last frames have. Images with no token between them are told apart by their grids.
    Padding takes no position (it is given 0). Frame k of a video lies at time k, or at ⌊k · step⌋ where frames have a step. Of
    Qwen3-VL, whose frames stand apart in the text, the caller passes each frame as a grid of its own.

    Args:
        token_types: 0 text, 1 image, 2 video, for each token.
        image_grids, video_grids: grids in order of appearance in the batch, row by row.
        merge: side of a merge block, in patches.
        frame_steps: for each video, time positions from one frame (of the grid) to the next; None for 1.
    Returns:
        position_ids [3 batch pos], and delta [batch]: the next token's position is the row's number of
        tokens + delta. The delta of an image is negative or 0.
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
        times = (torch.arange(t) * torch.tensor(step, dtype=torch.float32)).long()  # in float32, as the reference
        axes = torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij")
        parts.append(torch.stack(axes).reshape(3, -1) + start)
        start, index = start + max(h, w), index + n
    return torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.long)
