"""Three-axis rotary positions: angles computed on the fly, from float coordinates without a limit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class AxisFrequencies:
    """Angular frequencies of the pairs of each axis, in radians per unit coordinate, slowest last.

    Source: RoFormer, arXiv:2104.09864; the split is Wan2.1's (44/42/42 real dimensions at head_dim 128).
    """

    temporal: tuple[float, ...]
    height: tuple[float, ...]
    width: tuple[float, ...]

    @property
    def num_pairs(self) -> int:
        return len(self.temporal) + len(self.height) + len(self.width)


def axis_frequencies(head_dim: int, *, theta: float = 10000.0) -> AxisFrequencies:
    """Split a head into temporal, row and column pairs as Wan does; ``theta`` is the base of the series.

    Raises:
        ValueError: If head_dim is odd or too small to give every axis a pair.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"head_dim={head_dim} cannot be split over three axes: use an even number of 6 or more.")
    spatial = 2 * (head_dim // 6)
    temporal = head_dim - 2 * spatial

    def series(dim: int) -> tuple[float, ...]:
        return tuple(theta ** (-2.0 * j / dim) for j in range(dim // 2))

    return AxisFrequencies(series(temporal), series(spatial), series(spatial))


def _turns(positions: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    """(..., n) positions to (..., n, pairs) complex128 unit phases."""
    angles = positions.double()[..., None] * torch.tensor(frequencies, dtype=torch.float64, device=positions.device)
    return torch.polar(torch.ones_like(angles), angles)


def token_phases(coordinates: Tensor, *, frequencies: AxisFrequencies, dtype: torch.dtype = torch.complex64) -> Tensor:
    """(..., tokens, head_dim / 2) unit phases of tokens at any float coordinates, computed in float64.

    Args:
        coordinates: (..., tokens, 3): frame, row, column; any may be fractional, none is bounded.
        frequencies: Frequencies of the three axes.
        dtype: complex64, or complex128 for products in float64.
    """
    frame, row, column = coordinates.unbind(-1)
    turns = _turns(frame, frequencies.temporal), _turns(row, frequencies.height), _turns(column, frequencies.width)
    return torch.cat(turns, dim=-1).to(dtype)


def rotate(x: Tensor, coordinates: Tensor, *, frequencies: AxisFrequencies) -> Tensor:
    """Rotate queries or keys to their (frame, row, column) coordinates.

    Args:
        x: (batch, tokens, heads, head_dim), un-rotated, any float dtype.
        coordinates: (tokens, 3); frame may be fractional and is unbounded.
        frequencies: Per-axis angular frequencies, radians per unit coordinate.

    Returns:
        Same shape and dtype as ``x``; angles in float64, products in float32.

    Raises:
        ValueError: If head_dim does not match ``frequencies``.

    Source: RoFormer, arXiv:2104.09864; interleaved pairs, temporal first, as Wan2.1.
    """
    if x.shape[-1] != 2 * frequencies.num_pairs:
        raise ValueError(f"head_dim={x.shape[-1]} does not match {frequencies.num_pairs} frequency pairs.")
    return apply_phases(x, token_phases(coordinates, frequencies=frequencies))


_CHUNK_TOKENS = 256  # of lower precision, rotated at a time on the CPU, so that the wide copies stay in its cache


def apply_phases(x: Tensor, phases: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Multiply every interleaved pair of ``x`` by its unit phase.

    Args:
        x: (batch, tokens, heads, head_dim).
        phases: (tokens, head_dim / 2) or (batch, tokens, head_dim / 2); products are float32 with complex64 phases,
            float64 with complex128.
        out: Written in place of a new tensor; shape and dtype of ``x``.
    """
    turns = phases.unsqueeze(-2)
    wide = torch.float64 if phases.dtype == torch.complex128 else torch.float32
    if x.dtype == wide:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        if out is None:
            return torch.view_as_real(pairs * turns).flatten(-2)
        torch.mul(pairs, turns, out=torch.view_as_complex(out.unflatten(-1, (-1, 2))))
        return out
    if out is None:
        out = torch.empty_like(x)
    step = _CHUNK_TOKENS if x.device.type == "cpu" else max(x.shape[1], 1)
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        pairs = torch.view_as_complex(x[:, part].to(wide).unflatten(-1, (-1, 2)))
        out[:, part] = torch.view_as_real(pairs.mul_(turns[..., part, :, :])).flatten(-2)
    return out


class GridRotary:
    """Phases of whole latent frames on a fixed token grid, kept while their positions stay the same.

    The spatial phases of a grid never change and are computed once; a frame adds its temporal phase. The phases of the
    last ``num_kept`` tuples of positions stay in memory (a block needs two or three).
    """

    def __init__(
        self,
        frequencies: AxisFrequencies,
        *,
        num_rows: int,
        num_columns: int,
        device: torch.device,
        num_kept: int = 8,
        dtype: torch.dtype = torch.complex64,
    ) -> None:
        self.frequencies = frequencies
        self.device = device
        self.dtype = dtype
        rows = torch.arange(num_rows).repeat_interleave(num_columns)
        columns = torch.arange(num_columns).repeat(num_rows)
        turns = torch.cat((_turns(rows, frequencies.height), _turns(columns, frequencies.width)), dim=-1)
        self._spatial = turns.to(dtype).to(device)
        self.frames = lru_cache(maxsize=num_kept)(self._frames)

    def phases(self, positions: tuple[float, ...] | Tensor) -> Tensor:
        """Phases of whole frames at temporal positions, or of tokens at (..., tokens, 3) coordinates."""
        if isinstance(positions, Tensor):
            return token_phases(positions.to(self.device), frequencies=self.frequencies, dtype=self.dtype)
        return self.frames(positions)

    def _frames(self, positions: tuple[float, ...]) -> Tensor:
        """Phases of frames at temporal ``positions``: (frames * rows * columns, head_dim / 2)."""
        if not all(map(math.isfinite, positions)):
            raise ValueError(f"temporal positions must be finite numbers, not {positions}.")
        temporal = _turns(torch.tensor(positions, dtype=torch.float64), self.frequencies.temporal)
        temporal = temporal.to(self.dtype).to(self.device)
        num_tokens, num_temporal = self._spatial.shape[0], temporal.shape[1]
        phases = self._spatial.new_empty(len(positions), num_tokens, self.frequencies.num_pairs)
        phases[..., :num_temporal] = temporal[:, None]
        phases[..., num_temporal:] = self._spatial
        return phases.flatten(0, 1)


def pack_backward(spans: Sequence[float], anchor: float) -> tuple[float, ...]:
    """First position of each entry, oldest first, laid end to end up to the first frame of a block (``anchor``).

    ``spans`` are their lengths in frames. Whatever lies directly before the block keeps its true position; everything
    before a gap moves forward.

    Source: PackForcing, arXiv:2603.25730 (temporal RoPE adjustment).
    """
    starts = [anchor]
    for span in reversed(spans):
        starts.append(starts[-1] - span)
    return tuple(reversed(starts[1:]))


def cell_centres(num_cells: int, size: float) -> tuple[float, ...]:
    """Centres of equal cells over positions 0 to ``size`` - 1: (i + 0.5) size / cells - 0.5."""
    return tuple((index + 0.5) * size / num_cells - 0.5 for index in range(num_cells))


def cell_coordinates(
    starts: Sequence[float] | Tensor, *, cells: tuple[int, int, int], size: tuple[float, float, float]
) -> Tensor:
    """(..., entries * cells, 3) float64 coordinates of the centres of cells that (..., entries) are pooled to.

    Args:
        starts: First position of each entry.
        cells: Cells of an entry: frames, rows, columns.
        size: Positions that they are spread over: frames, rows, columns.
    """
    starts = torch.as_tensor(starts, dtype=torch.float64)
    centres = [torch.tensor(cell_centres(*axis), dtype=torch.float64) for axis in zip(cells, size, strict=True)]
    grid = torch.cartesian_prod(*centres).to(starts.device)
    along_time = grid.new_tensor([1.0, 0.0, 0.0])
    return (grid + starts[..., None, None] * along_time).flatten(-3, -2)
