"""The best rectangle of a grid of image tokens, found exactly, by integral image.

The sum over any rectangle is four look-ups in the table of cumulated sums (Crow 1984; Viola & Jones 2001), so all
H(H+1)/2 · W(W+1)/2 rectangles are compared. Float64 throughout: sums over large areas cancel.
Rectangles are in cells, (row0, col0, row1, col1), the ends excluded.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Cells = tuple[int, int, int, int]
TIE = 1e-9  # scores this close count as equal


def best_rectangle(vectors: Float[Tensor, "rows cols d"], target: Float[Tensor, "d"]) -> tuple[Cells, float]:
    """The rectangle whose mean vector has the largest cosine with the target, and that cosine.

    Of rectangles that are equally good (ours: within 1e-9) the largest is taken, then the first in raster order. A
    rectangle whose vectors cancel out has cosine 0.

    Raises:
        ValueError: the grid is empty, or the target is zero or has another width.
    """
    if vectors.ndim != 3 or 0 in vectors.shape or target.shape != vectors.shape[-1:]:
        raise ValueError(f"expected [rows cols d] and [d], got {tuple(vectors.shape)} and {tuple(target.shape)}.")
    direction = target.double()
    if not bool(direction.norm() > 0):
        raise ValueError("the target is the zero vector: it has no direction to compare with.")
    direction = direction / direction.norm()

    def cosine(sums: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:  # of sums: the cosine of a mean is that of the sum
        lengths = sums.norm(dim=-1)
        return torch.where(lengths > 0, (sums @ direction) / lengths.clamp_min(1e-300), 0.0).clamp(-1.0, 1.0)

    return _search(vectors.double(), cosine)


def heaviest_rectangle(heat: Float[Tensor, "rows cols"]) -> Cells:
    """The rectangle with the largest sum of (heat − mean heat): a box for any heat map (ours).

    Raises:
        ValueError: the grid is empty.
    """
    if heat.ndim != 2 or 0 in heat.shape:
        raise ValueError(f"expected a heat map [rows cols], got {tuple(heat.shape)}.")
    excess = heat.double() - heat.double().mean()
    return _search(excess[..., None], lambda sums: sums[:, 0])[0]


def integral_image(values: Float[Tensor, "rows cols d"]) -> Float[Tensor, "rows+1 cols+1 d"]:
    """Cumulated sums, with a row and a column of zeros before them, in float64."""
    sums = values.double().cumsum(0).cumsum(1)
    return torch.nn.functional.pad(sums, (0, 0, 1, 0, 1, 0))


def _search(values: Float[Tensor, "rows cols d"], score) -> tuple[Cells, float]:
    """Every rectangle's score; a pair of rows at a time, so that memory stays that of all pairs of columns."""
    rows, cols, _ = values.shape
    table = integral_image(values)
    left, right = torch.triu_indices(cols + 1, cols + 1, 1, device=values.device)
    pairs = [(top, bottom) for top in range(rows) for bottom in range(top + 1, rows + 1)]
    scores = torch.stack([score((strip := table[bottom] - table[top])[right] - strip[left]) for top, bottom in pairs])
    heights = torch.tensor([bottom - top for top, bottom in pairs], device=values.device)
    areas = (heights[:, None] * (right - left)).masked_fill(scores < scores.max() - TIE, 0)
    row, col = divmod(int(areas.argmax()), scores.shape[1])
    (top, bottom), sides = pairs[row], (int(left[col]), int(right[col]))
    return (top, sides[0], bottom, sides[1]), float(scores[row, col])
