"""The best rectangle of a grid of image tokens, found exactly with an integral image.

The sum over any rectangle takes four look-ups in the integral image (Crow 1984; Viola & Jones 2001), so all
H(H+1)/2 · W(W+1)/2 rectangles are compared. Everything is in float64, because differences of large sums lose precision.
Rectangles are (row0, col0, row1, col1) in cells of the grid, row1 and col1 excluded.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Cells = tuple[int, int, int, int]
TIE = 1e-9  # scores this close count as equal


def best_rectangle(vectors: Float[Tensor, "rows cols d"], target: Float[Tensor, "d"]) -> tuple[Cells, float]:
    """The rectangle whose mean vector has the largest cosine with the target, and that cosine.

    If several are equally good (within 1e-9, our choice), the largest is taken; of equally large ones the first by
    (row0, row1, col0, col1). A rectangle whose vectors sum to zero has cosine 0.

    Raises:
        ValueError: the grid is empty, or the target is the zero vector or has another size.
    """
    if vectors.ndim != 3 or 0 in vectors.shape or target.shape != vectors.shape[-1:]:
        raise ValueError(f"expected [rows cols d] and [d], got {tuple(vectors.shape)} and {tuple(target.shape)}.")
    direction = target.double()
    if not bool(direction.norm() > 0):
        raise ValueError("the target is the zero vector: it has no direction to compare with.")
    direction = direction / direction.norm()

    def cosine(sums: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:  # a mean and a sum have the same cosine
        lengths = sums.norm(dim=-1)
        return torch.where(lengths > 0, (sums @ direction) / lengths.clamp_min(1e-300), 0.0).clamp(-1.0, 1.0)

    return _search(vectors.double(), cosine)


def heaviest_rectangle(heat: Float[Tensor, "rows cols"]) -> Cells:
    """The rectangle with the largest sum of (heat − mean heat): a box for any heat map (our definition).

    Raises:
        ValueError: the grid is empty.
    """
    if heat.ndim != 2 or 0 in heat.shape:
        raise ValueError(f"expected a heat map [rows cols], got {tuple(heat.shape)}.")
    excess = heat.double() - heat.double().mean()
    return _search(excess[..., None], lambda sums: sums[:, 0])[0]


def integral_image(values: Float[Tensor, "rows cols d"]) -> Float[Tensor, "rows+1 cols+1 d"]:
    """Cumulative sums over rows and columns, preceded by a row and a column of zeros, in float64."""
    sums = values.double().cumsum(0).cumsum(1)
    return torch.nn.functional.pad(sums, (0, 0, 1, 0, 1, 0))


def _search(values: Float[Tensor, "rows cols d"], score) -> tuple[Cells, float]:
    """The rectangle with the best score; one pair of rows at a time, so that memory grows with the pairs of columns only."""
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
