"""Rotary position embeddings, as pure functions: 2-D for the tower, M-RoPE for the decoder.

Source: Qwen2-VL technical report, section 2.1; `modeling_qwen2_vl.py` and, for frequencies that are interleaved,
`modeling_qwen3_vl.py` of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rotation(NamedTuple):
    """Cosine and sine of every angle; the second half of d_head repeats the first."""

    cos: Float[Tensor, "... pos d_head"]
    sin: Float[Tensor, "... pos d_head"]


def _inverse_frequencies(base: float, dim: int, device: torch.device) -> Float[Tensor, "frequency"]:
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def _rotation(angles: Float[Tensor, "... pos half"], dtype: torch.dtype) -> Rotation:
    angles = torch.cat((angles, angles), dim=-1)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def vision_rotation(coordinates: Int[Tensor, "patch 2"], base: float, d_head: int, dtype: torch.dtype = torch.float32) -> Rotation:
    """2-D rotation of each patch: the first quarter of d_head uses the row, the second the column; then the same again.

    Args:
        coordinates: (row, col) of each patch.
        dtype: of the rotation; the reference rotates the tower in float32, whatever the dtype of the weights.
    Returns:
        cos and sin, each [patch d_head].
    """
    inverse = _inverse_frequencies(base, d_head // 2, coordinates.device)
    angles = coordinates[..., None].float() * inverse  # [patch 2 d_head/4]
    return _rotation(angles.flatten(-2), dtype)


def text_rotation(
    position_ids: Int[Tensor, "3 batch pos"],
    base: float,
    d_head: int,
    mrope_section: Sequence[int],
    dtype: torch.dtype,
    interleaved: bool = False,
) -> Rotation:
    """M-RoPE rotation: each frequency uses the time, row or column position.

    Args:
        position_ids: (t, row, col) position of every token; the three are equal for text.
        mrope_section: number of frequencies for time, row and column; sums to d_head / 2.
        dtype: of the decoder's activations; the reference rounds cos and sin to it.
        interleaved: whether frequencies alternate (t row col t row col …, the rest t) instead of coming in sections.
    Returns:
        cos and sin, each [batch pos d_head].
    """
    inverse = _inverse_frequencies(base, d_head, position_ids.device)
    angles = position_ids[..., None].float() * inverse  # [3 batch pos d_head/2]
    stream = frequency_streams(mrope_section, interleaved).to(angles.device)
    return _rotation(angles.gather(0, stream.expand(1, *angles.shape[1:]))[0], dtype)


def frequency_streams(mrope_section: Sequence[int], interleaved: bool) -> Int[Tensor, "frequency"]:
    """The position stream (0 time, 1 row, 2 column) that each of the d_head / 2 frequencies uses."""
    if not interleaved:
        return torch.repeat_interleave(torch.tensor(mrope_section))
    streams = torch.zeros(sum(mrope_section), dtype=torch.long)
    for stream in (1, 2):
        streams[stream : 3 * mrope_section[stream] : 3] = stream
    return streams


def rotate(x: Float[Tensor, "batch pos head d_head"], rotation: Rotation) -> Float[Tensor, "batch pos head d_head"]:
    """Rotates every head's vector; computed in the wider of the dtypes of x and rotation, returned in the dtype of x."""
    cos, sin = (part.unsqueeze(-2) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return ((x * cos) + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
