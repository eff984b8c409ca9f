"""Sliding tile attention: tiles of frames, rows and columns, each with the tiles around it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longtake.attention.geometry import AttentionGeometry
from longtake.attention.plan import BlockPlan, edges_of
from longtake.attention.policies.base import StaticPolicy


@dataclass(frozen=True, kw_only=True)
class SlidingTile(StaticPolicy):
    """Tiles in a window of tiles around the query's; at the border the window moves inwards and keeps its size.

    A tile is one block, so nothing is computed in vain. In the cached form frames are tiled in the order of the keys,
    from the last one backwards, and sinks, compressed memory and text are read by all.
    """

    name: ClassVar[str] = "sliding_tile"
    source: ClassVar[str] = "Sliding Tile Attention, arXiv:2502.04507"

    tile: tuple[int, ...] = (6, 8, 8)  # frames, rows, columns; 384 tokens, what the published kernel takes
    window: tuple[int, ...] = (3, 3, 3)  # tiles along frames, rows, columns; odd, or as many as there are
    head_windows: tuple[tuple[int, ...], ...] = ()  # one window for every head, in the place of window

    def __post_init__(self) -> None:
        super().__post_init__()
        windows = [("head_windows", window) for window in self.head_windows]
        for name, value in (("tile", self.tile), ("window", self.window), *windows):
            if len(value) != 3 or min(value) < 1:
                raise ValueError(f"{name}={list(value)} must be three numbers of 1 or more: frames, rows, columns.")

    def layout_plan(self, geometry: AttentionGeometry) -> BlockPlan:
        own = geometry.own_segments()
        whole = [index for index, segment in enumerate(geometry.segments) if geometry.is_whole(segment)]
        tiles = _Tiles(len(whole), geometry.grid, self.tile)
        # A segment that has no places in a frame is a tile of its own behind the others.
        tile_of = [torch.full((length,), tiles.count + index) for index, length in enumerate(geometry.key_lengths)]
        for number, index in enumerate(whole):
            tile_of[index] = tiles.of_frame(number)
        key_tile, query_tile = torch.cat(tile_of), torch.cat([tile_of[index] for index in own])
        key_tiles, key_sizes = key_tile.unique(return_counts=True)
        query_tiles, query_sizes = query_tile.unique(return_counts=True)
        windows = self.head_windows or (self.window,)
        masks = torch.stack([tiles.in_window(query_tiles, key_tiles, window) for window in windows])
        for segment, own_tiles in zip(geometry.segments, tile_of, strict=True):
            if segment.role == "sink":
                masks |= torch.isin(key_tiles, own_tiles)
        return BlockPlan.from_dense_block_mask(
            masks,
            edges_of(query_sizes),
            edges_of(key_sizes),
            q_perm=query_tile.argsort(stable=True)[None],
            k_perm=key_tile.argsort(stable=True)[None],
        )


class _Tiles:
    """The tiles of a video, frame by frame, row by row; the first in time and the last in space may be cut."""

    def __init__(self, num_frames: int, grid: tuple[int, int], tile: tuple[int, ...]) -> None:
        self.num_frames, self.grid, self.tile = num_frames, grid, tile
        self.shape = tuple(-(-size // step) for size, step in zip((num_frames, *grid), tile, strict=True))
        self.count = self.shape[0] * self.shape[1] * self.shape[2]

    def of_frame(self, frame: int) -> Tensor:
        """(tokens of a frame,), int64: the tile of each."""
        time = self.shape[0] - 1 - (self.num_frames - 1 - frame) // self.tile[0]
        rows, columns = (torch.arange(size) // step for size, step in zip(self.grid, self.tile[1:], strict=True))
        return ((time * self.shape[1] + rows[:, None]) * self.shape[2] + columns).flatten()

    def in_window(self, queries: Tensor, keys: Tensor, window: tuple[int, ...]) -> Tensor:
        """(query tiles, key tiles), bool; what is no tile is in every window."""
        is_read = torch.ones(len(queries), len(keys), dtype=torch.bool)
        parts = zip(self._places(queries), self._places(keys), self.shape, window, strict=True)
        for query, key, count, size in parts:
            reach = size // 2
            centre = query.clamp(max=count - 1 - reach).clamp(min=reach)
            is_read &= (key - centre[:, None]).abs() <= reach
        return is_read | (keys >= self.count)

    def _places(self, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, rows, columns = self.shape
        return tiles // (rows * columns), tiles // columns % rows, tiles % columns
