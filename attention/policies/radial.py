"""Radial attention: bands around the diagonal that get narrower, then rarer, with the distance of two frames.

With P the power of two above the tokens of a frame and n(d) the bit length of the distance d of two frames, tokens
attend to those within P / 2^n(d) places of their own; where that is less than 128 tokens, to every so many frames.
Constants and block rule are those of the source's code at 72788d4 (Apache-2.0).
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from longtake.attention.geometry import AttentionGeometry, Segment
from longtake.attention.plan import BlockPlan, split_runs, uniform_edges
from longtake.attention.policies.base import StaticPolicy

_Reach = int | None  # half the width of the band that a frame reads of a segment; _WHOLE: all of it; None: nothing
_WHOLE = -1


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
    thin_below: int = 128  # bands narrower than this skip frames; less for models with few tokens a frame
    adjacent_width: Literal["full", "half"] = "full"  # half: as in older versions of the source
    model: Literal["wan", "hunyuan"] = "wan"  # hunyuan: the first frame is no sink
    distance: Literal["position", "global"] = "position"  # of rotated positions, or of frames in the video
    dense_current: bool = True  # frames of the block in work read each other whole

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "block_size", "thin_below")
        if not 0 < self.decay_factor < float("inf"):
            raise ValueError(
                f"decay_factor={self.decay_factor} must be above 0 and finite: 1 is the published default."
            )

    def rules(self, geometry: AttentionGeometry) -> Hashable:
        if _is_whole_video(geometry):
            return len(geometry.segments), geometry.frame_tokens
        return geometry.frame_tokens, tuple(geometry.key_lengths), self._reaches(geometry)

    def layout_plan(self, geometry: AttentionGeometry) -> BlockPlan:
        if _is_whole_video(geometry):
            mask = self.video_mask(len(geometry.segments), geometry.frame_tokens)
            edges = uniform_edges(geometry.num_keys, self.block_size)
            # Frames that begin late in a block may have lost it: no query may read nothing.
            return BlockPlan.from_dense_block_mask(mask.fill_diagonal_(True), edges, edges)
        rows = []
        for own, reaches in zip(geometry.own_segments(), self._reaches(geometry), strict=True):
            pairs = zip(reaches, geometry.key_lengths, strict=True)
            blocks = [self._pair_blocks(reach, geometry.frame_tokens, length) for reach, length in pairs]
            blocks[own] = blocks[own].fill_diagonal_(True)
            rows.append(torch.cat(blocks, dim=1))
        return BlockPlan.from_dense_block_mask(
            torch.cat(rows),
            split_runs(geometry.query_lengths, self.block_size),
            split_runs(geometry.key_lengths, self.block_size),
        )

    def _pair_blocks(self, reach: _Reach, frame_tokens: int, length: int) -> Tensor:
        """(blocks of a frame, blocks of a segment), bool."""
        rows, columns = uniform_edges(frame_tokens, self.block_size), uniform_edges(length, self.block_size)
        if reach is None or reach == _WHOLE:
            return torch.full((len(rows) - 1, len(columns) - 1), reach == _WHOLE)
        return _band_blocks(reach, rows.long(), columns.long())

    def _reaches(self, geometry: AttentionGeometry) -> tuple[tuple[_Reach, ...], ...]:
        return tuple(
            tuple(self._reach(geometry, segment, frame, position) for segment in geometry.segments)
            for frame, position in zip(geometry.query_frames, geometry.query_positions, strict=True)
        )

    def _reach(self, geometry: AttentionGeometry, segment: Segment, frame: int, position: float) -> _Reach:
        is_first = segment.frame == 0 and self.model == "wan"
        if segment.role == "sink" or is_first or not geometry.is_whole(segment):
            return _WHOLE
        if segment.role == "current" and self.dense_current:
            return _WHOLE
        apart = segment.position - position if self.distance == "position" else segment.frame - frame
        width = self.band_width(int(abs(apart) + 0.5), geometry.frame_tokens)
        return None if width is None else min(int(width), geometry.frame_tokens)

    def band_width(self, distance: int, frame_tokens: int) -> float | None:
        """Half the width of the band in tokens; None where frames so far apart do not attend to each other."""
        if distance == 1 and self.adjacent_width == "half":
            return frame_tokens // 2
        if distance <= 1:
            return frame_tokens
        length = 2 ** frame_tokens.bit_length() / 2 ** distance.bit_length()
        if length < self.thin_below and distance % int(self.thin_below / length):
            return None
        return max(self.block_size, length * self.decay_factor)

    def video_mask(self, num_frames: int, frame_tokens: int) -> Tensor:
        """The published mask of a whole video, one for all heads, layers and steps.

        Blocks are consecutive runs of ``block_size`` tokens and may straddle frames. Where the tokens are no multiple
        of it, the last row and column hold what is left, by the same rule over the tokens there are; the source leaves
        those tokens out. Everywhere else the mask is the source's bit for bit, even where frames begin so late in a
        block that the source drops it. Text tokens, which HunyuanVideo appends, are not part of it. The result is
        (blocks, blocks), bool, on the CPU, the tokens divided by ``block_size``, rounded up.
        """
        size = self.block_size
        num_whole, num_left = divmod(num_frames * frame_tokens, size)
        mask = torch.zeros(num_whole + bool(num_left), num_whole + bool(num_left), dtype=torch.bool)
        # The source looks at as many blocks as a frame would have if it began at a block's edge.
        per_frame = -(-frame_tokens // size)

        @cache  # few pairs differ in width and in how far into a block their frames begin
        def blocks_of(width: int, row_offset: int, column_offset: int, last_size: int = size) -> Tensor:
            """All blocks that the two frames reach into."""
            rows, columns = (
                (torch.arange(-(-(offset + frame_tokens) // size) + 1) * size - offset).clamp(0, frame_tokens)
                for offset in (row_offset, column_offset)
            )
            sizes = torch.full((len(rows) - 1,), size)
            sizes[-1] = last_size
            return _band_blocks(width, rows, columns, sizes)

        for i in range(num_frames):
            for j in range(num_frames):
                is_sink = j == 0 and self.model == "wan"
                width = frame_tokens if is_sink else self.band_width(abs(i - j), frame_tokens)
                if width is None:
                    continue
                (row, row_offset), (column, column_offset) = (divmod(x * frame_tokens, size) for x in (i, j))
                pair = int(width), row_offset, column_offset
                blocks = blocks_of(*pair)
                whole = mask[row : min(row + per_frame, num_whole), column : min(column + per_frame, num_whole)]
                whole |= blocks[: whole.shape[0], : whole.shape[1]]
                if num_left and row + len(blocks) > num_whole:
                    mask[-1, column : column + blocks.shape[1]] |= blocks_of(*pair, num_left)[-1]
                if num_left and column + blocks.shape[1] > num_whole:
                    rows = mask[row : min(row + len(blocks), num_whole), -1]
                    rows |= blocks[: len(rows), -1]
        return mask


def _is_whole_video(geometry: AttentionGeometry) -> bool:
    """True if all frames ask all frames, as the published mask has it."""
    frames = tuple(segment.frame for segment in geometry.segments)
    is_square = frames == geometry.query_frames and all(map(geometry.is_whole, geometry.segments))
    return geometry.frames_per_block is None and is_square


def _band_blocks(reach: int, row_edges: Tensor, column_edges: Tensor, row_sizes: Tensor | None = None) -> Tensor:
    """Blocks that a band around the diagonal of a frame pair keeps.

    A column of a block is touched if any of its tokens is in the band, and dense if more than a third of the block's
    rows are; a block is kept if more than 0.6 of its touched columns are dense. Clipped corners are therefore dropped.

    Tokens k and l are in the band if abs(k - l) <= ``reach``. Edges are whole numbers, ascending, in tokens of the
    query's and of the key's frame; ``row_sizes`` are the tokens that count as a whole block, where a frame covers only
    part of it, (rows,). The result is (rows, columns), bool.
    """
    row_sizes = row_edges.diff() if row_sizes is None else row_sizes
    first, last = row_edges[:-1, None], row_edges[1:, None]
    keys = torch.arange(int(column_edges[0]), int(column_edges[-1]))
    counts = torch.minimum(last, keys + reach + 1) - torch.maximum(first, keys - reach)
    # 1/3 and 0.6 as whole numbers: no rounding decides.
    touched = _sums(counts > 0, column_edges)
    dense = _sums(counts.clamp(min=0) * 3 > row_sizes[:, None], column_edges)
    return dense * 5 > touched * 3


def _sums(values: Tensor, edges: Tensor) -> Tensor:
    total = torch.nn.functional.pad(values.long().cumsum(1), (1, 0))
    return total[:, edges - edges[0]].diff(dim=1)
