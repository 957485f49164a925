"""Where things are: patches in the tower, tokens in the decoder. Pure functions.

Frames: a grid is (t, h, w) in 14-pixel patches. The tower's order is merge block by merge block
(2×2 patches), blocks in raster order, frame after frame. Image tokens are merge blocks, in raster order.

Source: Qwen2-VL technical report, section 2.1; `get_rope_index` of transformers.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
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


def attention_segments(grid_thw: Int[Tensor, "image 3"]) -> Int[Tensor, "segment"]:
    """How many patches each image, or each frame of a video, has: attention stays inside them."""
    return (grid_thw[:, 1] * grid_thw[:, 2]).repeat_interleave(grid_thw[:, 0])


def mrope_positions(
    token_types: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    image_grids: Int[Tensor, "image 3"],
    video_grids: Int[Tensor, "video 3"],
    merge: int,
) -> tuple[Int[Tensor, "3 batch pos"], Int[Tensor, "batch"]]:
    """(t, row, col) position of every token, and what decoding adds to the token count.

    Text advances all three streams by one; an image's tokens are (0, row, col) from where it starts, and what
    follows goes on from its largest position + 1. A video's tokens are (frame, row, col), and what follows goes on
    from the largest row or column + 1, as in transformers 5: where a video has more frames than rows and columns
    that is less than the largest position + 1. Images with no token between them are told apart by their grids.
    Padding takes no position (it is given 0).

    Args:
        token_types: 0 text, 1 image, 2 video, for each token.
        image_grids, video_grids: grids in order of appearance in the batch, row by row.
        merge: side of a merge block, in patches.
    Returns:
        position_ids [3 batch pos], and delta [batch]: the next token's position is the row's number of
        tokens + delta. The delta of an image is negative or 0.
    Raises:
        ValueError: the placeholders do not match the grids.
    """
    grids = {IMAGE: iter(image_grids.tolist()), VIDEO: iter(video_grids.tolist())}
    position_ids = torch.zeros(3, *token_types.shape, dtype=torch.long)
    delta = torch.zeros(len(token_types), dtype=torch.long)
    for row, (types, mask) in enumerate(zip(token_types.cpu(), attention_mask.cpu().bool())):
        positions = _row_positions(types[mask].tolist(), grids, merge)
        position_ids[:, row, mask] = positions
        delta[row] = positions.max() + 1 - positions.shape[1] if positions.numel() else 0
    if any(next(rest, None) is not None for rest in grids.values()):
        raise ValueError("there are more image or video grids than runs of placeholders in the prompts.")
    return position_ids.to(token_types.device), delta.to(token_types.device)


def _row_positions(types: list[int], grids: dict[int, object], merge: int) -> Int[Tensor, "3 token"]:
    parts, start, index = [], 0, 0
    while index < len(types):
        kind = types[index]
        if kind == TEXT:
            end = next((i for i in range(index, len(types)) if types[i] != TEXT), len(types))
            parts.append(torch.arange(start, start + end - index).expand(3, -1))
            start, index = start + end - index, end
            continue
        grid = next(grids[kind], None)
        if grid is None:
            raise ValueError("there are more runs of placeholders in the prompts than image or video grids.")
        t, h, w = grid[0], grid[1] // merge, grid[2] // merge
        n = t * h * w
        if types[index : index + n] != [kind] * n:
            raise ValueError(
                f"an image of {grid[1]}×{grid[2]} patches needs {n} placeholders in a row, the prompt has "
                f"{sum(1 for k in types[index:] if k == kind)} left from its first."
            )
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        parts.append(torch.stack(axes).reshape(3, -1) + start)
        start, index = start + max(h, w), index + n
    return torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.long)
