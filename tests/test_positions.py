"""Patch order and M-RoPE positions against loops and against the reference implementation."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2_vl import modeling_qwen2_vl

from hooked_qwen2vl.positions import (
    IMAGE,
    TEXT,
    VIDEO,
    attention_segments,
    mrope_positions,
    patch_coordinates,
    raster_order,
)

MERGE = 2
NONE = torch.zeros(0, 3, dtype=torch.long)
WIDE, TALL, SQUARE = (1, 6, 10), (1, 8, 4), (1, 4, 4)
SHORT_VIDEO, LONG_VIDEO = (3, 4, 6), (5, 4, 6)  # the long one has more frames than rows or columns


def grids(*thw: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(thw, dtype=torch.long).reshape(-1, 3)


# ---- the tower's order ------------------------------------------------------------------------


def loop_coordinates(t: int, h: int, w: int, merge: int) -> list[list[int]]:
    """The tower's order, spelt out."""
    found = []
    for _ in range(t):
        for block_row in range(0, h, merge):
            for block_col in range(0, w, merge):
                for row in range(merge):
                    for col in range(merge):
                        found.append([block_row + row, block_col + col])
    return found


@pytest.mark.parametrize("thw", [WIDE, TALL, SQUARE, SHORT_VIDEO, (1, 2, 2), (2, 2, 12)])
def test_patches_come_merge_block_by_merge_block(thw):
    ours = patch_coordinates(grids(thw), MERGE)
    assert ours.tolist() == loop_coordinates(*thw, MERGE)
    t, h, w = thw
    rows_first = [[row, col] for _ in range(t) for row in range(h) for col in range(w)]
    if w > MERGE:
        assert ours.tolist() != rows_first  # the raster order is the usual mistake


def test_images_are_packed_one_after_the_other():
    packed = patch_coordinates(grids(WIDE, SHORT_VIDEO, TALL), MERGE)
    assert packed.tolist() == [pair for thw in (WIDE, SHORT_VIDEO, TALL) for pair in loop_coordinates(*thw, MERGE)]


def test_coordinates_are_the_reference_towers():
    """The reference rotates by position ids that it makes from the grid."""
    thw = grids(WIDE, SHORT_VIDEO, TALL)
    theirs = modeling_qwen2_vl.get_vision_position_ids(thw, MERGE)
    assert torch.equal(patch_coordinates(thw, MERGE), theirs)


@pytest.mark.parametrize("thw", [(1, 3, 4), (1, 4, 6 + 1)])
def test_a_grid_that_does_not_divide_is_refused(thw):
    with pytest.raises(ValueError, match=f"{thw[1]}×{thw[2]} patches does not divide"):
        patch_coordinates(grids(thw), MERGE)


@pytest.mark.parametrize("thw", [WIDE, TALL, SQUARE])
def test_raster_order_reads_row_by_row(thw):
    _, h, w = thw
    coordinates = patch_coordinates(grids(thw), MERGE)
    order = raster_order(h, w, MERGE)
    raster = [[row, col] for row in range(h) for col in range(w)]
    assert coordinates[order].tolist() == raster
    assert torch.equal(coordinates[order][order.argsort()], coordinates)
    if w > 2 * MERGE:
        assert coordinates[order.argsort()].tolist() != raster  # the way back is another permutation


def test_attention_stays_in_an_image_and_in_a_frame():
    assert attention_segments(grids(WIDE, SHORT_VIDEO, TALL)).tolist() == [60, 24, 24, 24, 32]


# ---- M-RoPE -----------------------------------------------------------------------------------


def row_of(*parts: int | tuple[int, tuple[int, int, int]]) -> list[int]:
    """Token types: a number is that many text tokens, (kind, thw) an image or video."""
    types: list[int] = []
    for part in parts:
        if isinstance(part, int):
            types += [TEXT] * part
        else:
            kind, (t, h, w) = part
            types += [kind] * (t * h * w // MERGE**2)
    return types


def batch_of(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    pads = [width - len(row) for row in rows]
    left = side == "left"
    types = [[0] * pad + row if left else row + [0] * pad for row, pad in zip(rows, pads)]
    mask = [[0] * pad + [1] * len(row) if left else [1] * len(row) + [0] * pad for row, pad in zip(rows, pads)]
    return torch.tensor(types), torch.tensor(mask)


def reference(hf, types, mask, images, videos):
    ids = torch.zeros_like(types)
    positions, delta = hf.model.get_rope_index(ids, types, images if len(images) else None, videos if len(videos) else None, mask)
    return positions, delta.flatten()


IMAGE_ROW = [row_of(5, (IMAGE, WIDE), 4)]
CASES = {
    "text": ([row_of(7)], NONE, NONE),
    "image": (IMAGE_ROW, grids(WIDE), NONE),
    "image first and last": ([row_of((IMAGE, TALL))], grids(TALL), NONE),
    "several images": ([row_of(2, (IMAGE, WIDE), 1, (IMAGE, TALL), 3, (IMAGE, SQUARE), 2)], grids(WIDE, TALL, SQUARE), NONE),
    "video": ([row_of(3, (VIDEO, SHORT_VIDEO), 4)], NONE, grids(SHORT_VIDEO)),
    "long video": ([row_of(3, (VIDEO, LONG_VIDEO), 2)], NONE, grids(LONG_VIDEO)),
    "image and video": (
        [row_of(1, (VIDEO, SHORT_VIDEO), 2, (IMAGE, TALL), 3, (VIDEO, LONG_VIDEO), 9)],
        grids(TALL),
        grids(SHORT_VIDEO, LONG_VIDEO),
    ),
    "mixed batch": (
        [
            row_of(4, (IMAGE, TALL), 2),
            row_of(9),
            row_of(1, (IMAGE, SQUARE), 1, (IMAGE, WIDE), 5),
            row_of(2, (VIDEO, SHORT_VIDEO), 1, (IMAGE, SQUARE)),
        ],
        grids(TALL, SQUARE, WIDE, SQUARE),
        grids(SHORT_VIDEO),
    ),
}  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_positions_equal_the_reference(case, side, hf):
    rows, images, videos = CASES[case]
    types, mask = batch_of(rows, side)
    positions, delta = mrope_positions(types, mask, images, videos, MERGE)
    theirs, their_delta = reference(hf, types, mask, images, videos)
    assert torch.equal(positions, theirs)
    assert torch.equal(delta, their_delta)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_shifts_nobody(side):
    rows, images, videos = CASES["mixed batch"]
    types, mask = batch_of(rows, side)
    positions, delta = mrope_positions(types, mask, images, videos, MERGE)
    images_of, videos_of = images.split([1, 0, 2, 1]), videos.split([0, 0, 0, 1])
    for number, row in enumerate(rows):
        one, ones = torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)
        alone, delta_alone = mrope_positions(one, ones, images_of[number], videos_of[number], MERGE)
        assert torch.equal(positions[:, number, mask[number].bool()], alone[:, 0])
        assert delta[number] == delta_alone[0]


def test_neighbouring_images_are_told_apart_by_their_grids(hf):
    """The reference refuses them; it is asked with a text token between, which is then taken out again."""
    apart = row_of(3, (IMAGE, WIDE), 1, (IMAGE, TALL), 2)
    together = row_of(3, (IMAGE, WIDE), (IMAGE, TALL), 2)
    images = grids(WIDE, TALL)
    theirs, _ = reference(hf, torch.tensor([apart]), torch.ones(1, len(apart)), images, NONE)
    between = 3 + 15
    expected = torch.cat((theirs[..., :between], theirs[..., between + 1 :] - 1), dim=-1)
    ours, delta = mrope_positions(torch.tensor([together]), torch.ones(1, len(together), dtype=torch.long), images, NONE, MERGE)
    assert torch.equal(ours, expected)
    assert delta[0] == expected.max() + 1 - len(together)


def test_text_is_an_arange_and_an_image_is_not():
    """What a fault looks like: plain positions, no delta, height and width swapped."""
    rows, images, _ = CASES["image"]
    types, mask = batch_of(rows, "left")
    positions, delta = mrope_positions(types, mask, images, NONE, MERGE)
    assert not torch.equal(positions, torch.arange(types.shape[1]).expand(3, 1, -1))
    assert delta[0] == -10  # 15 image tokens in 3 rows and 5 columns advance the text by 5
    swapped, _ = mrope_positions(types, mask, images[:, [0, 2, 1]], NONE, MERGE)
    assert not torch.equal(positions, swapped)
    assert torch.equal(positions[:, 0, -1], torch.tensor([13, 13, 13]))  # 5 + 5 + 4 − 1

    text, no_delta = mrope_positions(*batch_of([row_of(7)], "left"), NONE, NONE, MERGE)
    assert torch.equal(text[:, 0], torch.arange(7).expand(3, -1)) and no_delta[0] == 0


@pytest.mark.parametrize("case", [case for case in CASES if case != "text"])
@pytest.mark.parametrize("fault", ["plain", "no delta", "swapped streams", "swapped grid"])
def test_each_fault_differs_from_the_reference(fault, case, hf):
    rows, images, videos = CASES[case]
    types, mask = batch_of(rows, "left")
    theirs, their_delta = reference(hf, types, mask, images, videos)
    positions, delta = mrope_positions(types, mask, images, videos, MERGE)
    if fault == "plain":
        positions = (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    elif fault == "no delta":
        delta = torch.zeros_like(delta)
    elif fault == "swapped streams":
        positions = positions[[0, 2, 1]]
    else:
        positions, delta = mrope_positions(types, mask, images[:, [0, 2, 1]], videos[:, [0, 2, 1]], MERGE)
    assert not (torch.equal(positions, theirs) and torch.equal(delta, their_delta))


def test_placeholders_and_grids_must_match():
    types, mask = batch_of(IMAGE_ROW, "left")
    with pytest.raises(ValueError, match="more runs of placeholders"):
        mrope_positions(types, mask, NONE, NONE, MERGE)
    with pytest.raises(ValueError, match="more image or video grids"):
        mrope_positions(types, mask, grids(WIDE, TALL), NONE, MERGE)
    with pytest.raises(ValueError, match="8×10 patches needs 20 placeholders in a row, the prompt has 15"):
        mrope_positions(types, mask, grids((1, 8, 10)), NONE, MERGE)
    broken = torch.tensor([row_of((IMAGE, SQUARE), 1, (IMAGE, SQUARE))])  # 4 + 4 placeholders, but grids of 6 and 2
    with pytest.raises(ValueError, match="in a row"):
        mrope_positions(broken, torch.ones_like(broken), grids((1, 4, 6), (1, 2, 4)), NONE, MERGE)
