"""Sliding tile attention: tiles of frames, rows and columns, each with the tiles around it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longtake.attention.geometry import AttentionGeometry
from longtake.attention.plan import BlockPlan
from longtake.attention.policies.base import StaticPolicy, is_whole, own_segments


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
        for name, value in (
            ("tile", self.tile),
            ("window", self.window),
            *(("head_windows", w) for w in self.head_windows),
        ):
            if len(value) != 3 or min(value) < 1:
                raise ValueError(f"{name}={list(value)} must be three numbers of 1 or more: frames, rows, columns.")

    def layout_plan(self, geometry: AttentionGeometry) -> BlockPlan:
        """Sort the tokens by tile, and give every tile its window."""
        own = own_segments(geometry)
        whole = [index for index, segment in enumerate(geometry.segments) if is_whole(segment, geometry)]
        tiles = _Tiles(len(whole), geometry.grid, self.tile)
        key_tile, token = [], []
        for index, segment in enumerate(geometry.segments):
            # What has no places in a frame is a tile of its own behind the others.
            frame_tiles = tiles.of_frame(whole.index(index)) if index in whole else None
            length = segment.length
            key_tile.append(torch.full((length,), tiles.count + index) if frame_tiles is None else frame_tiles)
            token.append(torch.arange(segment.start, segment.stop))
        key_tile, token = torch.cat(key_tile), torch.cat(token)
        k_perm = token[key_tile.argsort(stable=True)]
        key_tiles, key_sizes = key_tile.unique(return_counts=True)
        query_tile = torch.cat([tiles.of_frame(whole.index(index)) for index in own])
        query_tiles, query_sizes = query_tile.unique(return_counts=True)
        windows = self.head_windows or (self.window,)
        masks = torch.stack([tiles.in_window(query_tiles, key_tiles, window) for window in windows])
        is_sink = torch.cat([torch.full((s.length,), s.role == "sink") for s in geometry.segments])
        masks |= torch.isin(key_tiles, key_tile[is_sink])
        return BlockPlan.from_dense_block_mask(
            masks,
            _edges(query_sizes),
            _edges(key_sizes),
            q_perm=query_tile.argsort(stable=True)[None],
            k_perm=k_perm[None],
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


def _edges(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
