"""Packed positions: gaps in what is kept are closed by moving what is older forward."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_backward(spans: Sequence[float], anchor: float) -> tuple[float, ...]:
    """Lay entries end to end, the last one ending where the block to come starts.

    Whatever lies directly before the block keeps its true position; everything before a gap moves forward.

    Args:
        spans: Length in frames of each entry, oldest first.
        anchor: First frame of the block that reads them.

    Returns:
        First position of each entry, oldest first.

    Source: PackForcing, arXiv:2603.25730 (temporal RoPE adjustment).
    """
    starts, cursor = [], anchor
    for span in reversed(spans):
        cursor -= span
        starts.append(cursor)
    return tuple(reversed(starts))


def cell_centres(num_cells: int, size: float) -> tuple[float, ...]:
    """Centres of equal cells over positions 0 to ``size`` - 1: (i + 0.5) size / cells - 0.5."""
    return tuple((index + 0.5) * size / num_cells - 0.5 for index in range(num_cells))


def cell_coordinates(
    starts: Sequence[float] | Tensor, *, cells: tuple[int, int, int], size: tuple[float, float, float]
) -> Tensor:
    """Coordinates of entries that are pooled to a few cells.

    Args:
        starts: First position of each entry, or (..., entries) of them.
        cells: Cells of an entry: frames, rows, columns.
        size: What they are spread over, in positions: frames, rows, columns.

    Returns:
        (..., entries * cells, 3) float64: frame, row, column of every cell's centre.
    """
    starts = torch.as_tensor(starts, dtype=torch.float64)
    centres = [
        torch.tensor(cell_centres(n, s), dtype=torch.float64, device=starts.device)
        for n, s in zip(cells, size, strict=True)
    ]
    grid = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 2)
    moved = torch.zeros_like(grid)
    moved[:, 0] = 1.0
    return (grid + starts[..., None, None] * moved).flatten(-3, -2)
