"""Radial attention: the farther away in time, the fewer tokens."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from longtake.attention.geometry import AttentionGeometry, Segment
from longtake.attention.plan import BlockPlan, split_runs, uniform_edges
from longtake.attention.policies.base import StaticPolicy, is_whole, own_segments
from longtake.attention.radial_mask import (
    THIN_BELOW,
    AdjacentWidth,
    band_blocks,
    band_width,
    is_kept,
    radial_block_mask,
)

Reach = int | None
"""Half the width of the band that a frame reads of a segment; WHOLE: all of it; None: nothing."""
WHOLE = -1


@dataclass(frozen=True, kw_only=True)
class Radial(StaticPolicy):
    """Bands that get narrower, then rarer, with the distance in time.

    Of a whole video it is the published mask, and every block keeps itself. In the cached form only the rows of the
    frames that ask are made, of blocks that end with their frame, and distance is that of rotated positions: it is
    what the model sees once a cache moves frames up. The first frame of the video and the cache's sinks are read
    whole, and so is what has no places in a frame: compressed memory, text.
    """

    name: ClassVar[str] = "radial"
    source: ClassVar[str] = "Radial Attention, arXiv:2506.19852"

    block_size: int = 128  # tokens on each side of a block
    decay_factor: float = 1.0  # scales the bands from distance 2 on; 0.2 to 1 are published
    thin_below: int = THIN_BELOW  # bands narrower than this skip frames; less for models with few tokens a frame
    adjacent_width: AdjacentWidth = "full"  # half: as in older versions of the source
    model: Literal["wan", "hunyuan"] = "wan"  # hunyuan: the first frame is no sink
    distance: Literal["position", "global"] = "position"  # of rotated positions, or of frames in the video
    dense_current: bool = True  # frames of the block in work read each other whole

    def __post_init__(self) -> None:
        super().__post_init__()
        radial_block_mask(1, 1, block_size=self.block_size, decay_factor=self.decay_factor, thin_below=self.thin_below)

    def rules(self, geometry: AttentionGeometry) -> Hashable:
        """How far each frame reads into each segment."""
        if _is_whole_video(geometry):
            return len(geometry.segments), geometry.frame_tokens
        lengths = tuple(segment.length for segment in geometry.segments)
        return geometry.frame_tokens, lengths, self._reaches(geometry)

    def layout_plan(self, geometry: AttentionGeometry) -> BlockPlan:
        """The published mask, or the rows of the frames that ask."""
        if _is_whole_video(geometry):
            return self._whole_video(len(geometry.segments), geometry.frame_tokens)
        own = own_segments(geometry)
        reaches = self._reaches(geometry)
        rows = []
        for row, reach in enumerate(reaches):
            parts = [
                self._pair(geometry, segment, reach[column], is_self=column == own[row])
                for column, segment in enumerate(geometry.segments)
            ]
            rows.append(torch.cat(parts, dim=1))
        return BlockPlan.from_dense_block_mask(
            torch.cat(rows),
            split_runs([geometry.frame_tokens] * len(reaches), self.block_size),
            split_runs([segment.length for segment in geometry.segments], self.block_size),
        )

    def _whole_video(self, num_frames: int, tokens_per_frame: int) -> BlockPlan:
        mask = radial_block_mask(
            num_frames,
            tokens_per_frame,
            block_size=self.block_size,
            decay_factor=self.decay_factor,
            model=self.model,
            adjacent_width=self.adjacent_width,
            thin_below=self.thin_below,
        )
        edges = uniform_edges(num_frames * tokens_per_frame, self.block_size)
        # Frames that begin late in a block may have lost it: no query may read nothing.
        return BlockPlan.from_dense_block_mask(mask.fill_diagonal_(True), edges, edges)

    def _pair(self, geometry: AttentionGeometry, segment: Segment, reach: Reach, *, is_self: bool) -> Tensor:
        """(blocks of a frame, blocks of a segment), bool."""
        rows = split_runs([geometry.frame_tokens], self.block_size)
        columns = split_runs([segment.length], self.block_size)
        shape = (len(rows) - 1, len(columns) - 1)
        if reach is None or reach == WHOLE:
            blocks = torch.full(shape, reach == WHOLE)
        else:
            blocks = band_blocks(reach, rows.long(), columns.long())
        return blocks.fill_diagonal_(True) if is_self else blocks

    def _reaches(self, geometry: AttentionGeometry) -> tuple[tuple[Reach, ...], ...]:
        return tuple(
            tuple(self._reach(geometry, segment, frame, position) for segment in geometry.segments)
            for frame, position in zip(geometry.query_frames, geometry.query_positions, strict=True)
        )

    def _reach(self, geometry: AttentionGeometry, segment: Segment, frame: int, position: float) -> Reach:
        is_first = segment.frame == 0 and self.model == "wan"
        if segment.role == "sink" or is_first or not is_whole(segment, geometry):
            return WHOLE
        if segment.role == "current" and self.dense_current:
            return WHOLE
        apart = segment.position - position if self.distance == "position" else segment.frame - frame
        distance, tokens = int(abs(apart) + 0.5), geometry.frame_tokens
        if not is_kept(distance, tokens, thin_below=self.thin_below):
            return None
        width = band_width(
            distance,
            tokens,
            block_size=self.block_size,
            decay_factor=self.decay_factor,
            adjacent_width=self.adjacent_width,
        )
        return min(int(width), tokens)


def _is_whole_video(geometry: AttentionGeometry) -> bool:
    """Whether all frames ask all frames, as the published mask has it."""
    frames = tuple(segment.frame for segment in geometry.segments)
    is_square = frames == geometry.query_frames and all(is_whole(s, geometry) for s in geometry.segments)
    return geometry.frames_per_block is None and is_square
