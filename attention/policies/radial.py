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
from longtake.attention.policies.base import StaticPolicy, is_whole, own_segments

_AdjacentWidth = Literal["full", "half"]
_Model = Literal["wan", "hunyuan"]
_Reach = int | None
"""Half the width of the band that a frame reads of a segment; _WHOLE: all of it; None: nothing."""
_WHOLE = -1
_THIN_BELOW = 128  # tokens: the source's constant, whatever the block size


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
    thin_below: int = _THIN_BELOW  # bands narrower than this skip frames; less for models with few tokens a frame
    adjacent_width: _AdjacentWidth = "full"  # half: as in older versions of the source
    model: _Model = "wan"  # hunyuan: the first frame is no sink
    distance: Literal["position", "global"] = "position"  # of rotated positions, or of frames in the video
    dense_current: bool = True  # frames of the block in work read each other whole

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bands.check()

    @property
    def _bands(self) -> "_Bands":
        return _Bands(self.block_size, self.decay_factor, self.adjacent_width, self.thin_below)

    def rules(self, geometry: AttentionGeometry) -> Hashable:
        """Reach of each frame into each segment."""
        if _is_whole_video(geometry):
            return len(geometry.segments), geometry.frame_tokens
        lengths = tuple(segment.length for segment in geometry.segments)
        return geometry.frame_tokens, lengths, self._reaches(geometry)

    def layout_plan(self, geometry: AttentionGeometry) -> BlockPlan:
        """The published mask, or the rows of the frames that ask."""
        if _is_whole_video(geometry):
            mask = _whole_video_mask(self._bands, len(geometry.segments), geometry.frame_tokens, self.model)
            edges = uniform_edges(geometry.num_keys, self.block_size)
            # Frames that begin late in a block may have lost it: no query may read nothing.
            return BlockPlan.from_dense_block_mask(mask.fill_diagonal_(True), edges, edges)
        own = own_segments(geometry)
        reaches = self._reaches(geometry)
        rows = [
            torch.cat(
                [
                    self._pair(geometry, segment, reach[column], is_self=column == own[row])
                    for column, segment in enumerate(geometry.segments)
                ],
                dim=1,
            )
            for row, reach in enumerate(reaches)
        ]
        return BlockPlan.from_dense_block_mask(
            torch.cat(rows),
            split_runs([geometry.frame_tokens] * len(reaches), self.block_size),
            split_runs([segment.length for segment in geometry.segments], self.block_size),
        )

    def _pair(self, geometry: AttentionGeometry, segment: Segment, reach: _Reach, *, is_self: bool) -> Tensor:
        """(blocks of a frame, blocks of a segment), bool."""
        rows = split_runs([geometry.frame_tokens], self.block_size)
        columns = split_runs([segment.length], self.block_size)
        if reach is None or reach == _WHOLE:
            blocks = torch.full((len(rows) - 1, len(columns) - 1), reach == _WHOLE)
        else:
            blocks = _band_blocks(reach, rows.long(), columns.long())
        return blocks.fill_diagonal_(True) if is_self else blocks

    def _reaches(self, geometry: AttentionGeometry) -> tuple[tuple[_Reach, ...], ...]:
        return tuple(
            tuple(self._reach(geometry, segment, frame, position) for segment in geometry.segments)
            for frame, position in zip(geometry.query_frames, geometry.query_positions, strict=True)
        )

    def _reach(self, geometry: AttentionGeometry, segment: Segment, frame: int, position: float) -> _Reach:
        is_first = segment.frame == 0 and self.model == "wan"
        if segment.role == "sink" or is_first or not is_whole(segment, geometry):
            return _WHOLE
        if segment.role == "current" and self.dense_current:
            return _WHOLE
        apart = segment.position - position if self.distance == "position" else segment.frame - frame
        width = self._bands.width(int(abs(apart) + 0.5), geometry.frame_tokens)
        return None if width is None else min(int(width), geometry.frame_tokens)


def _is_whole_video(geometry: AttentionGeometry) -> bool:
    """True if all frames ask all frames, as the published mask has it."""
    frames = tuple(segment.frame for segment in geometry.segments)
    is_square = frames == geometry.query_frames and all(is_whole(s, geometry) for s in geometry.segments)
    return geometry.frames_per_block is None and is_square


def radial_block_mask(
    num_frames: int,
    tokens_per_frame: int,
    *,
    block_size: int = 128,
    decay_factor: float = 1.0,
    model: _Model = "wan",
    adjacent_width: _AdjacentWidth = "full",
    thin_below: int = _THIN_BELOW,
) -> Tensor:
    """The published mask of a whole video, one for all heads, layers and steps.

    Blocks are consecutive runs of ``block_size`` tokens and may straddle frames. Where the tokens are no multiple of
    it, the last row and column hold what is left, by the same rule over the tokens there are; the source leaves those
    tokens out. Everywhere else the mask is the source's bit for bit, even where frames begin so late in a block that
    the source drops it.

    Args:
        num_frames: Latent frames.
        tokens_per_frame: Tokens of one frame.
        block_size: Tokens on each side of a block.
        decay_factor: Scales the bands from distance 2 on; 1 and less change nothing where a frame has 256 tokens.
        model: ``wan``, where every query attends to all of frame 0, or ``hunyuan``, where it does not. Text tokens,
            which HunyuanVideo appends and attends to in full, are not part of the mask.
        adjacent_width: Width between neighbouring frames: ``full``, or ``half`` as in older versions of the source.
        thin_below: Bands narrower than this many tokens skip frames instead.

    Returns:
        (rows, columns), bool, on the CPU; both are the tokens divided by ``block_size``, rounded up.

    Raises:
        ValueError: If a number is out of range or the model unknown.
    """
    for name, value in (("num_frames", num_frames), ("tokens_per_frame", tokens_per_frame)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more.")
    if model not in ("wan", "hunyuan"):
        raise ValueError(f"model={model!r} has no radial mask; known: wan, hunyuan.")
    bands = _Bands(block_size, decay_factor, adjacent_width, thin_below)
    bands.check()
    return _whole_video_mask(bands, num_frames, tokens_per_frame, model)


@dataclass(frozen=True)
class _Bands:
    """The width of the bands by the distance of two frames."""

    block_size: int = 128
    decay_factor: float = 1.0
    adjacent_width: str = "full"
    thin_below: int = _THIN_BELOW

    def check(self) -> None:
        for name in ("block_size", "thin_below"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        if not 0 < self.decay_factor < float("inf"):
            raise ValueError(
                f"decay_factor={self.decay_factor} must be above 0 and finite: 1 is the published default."
            )

    def width(self, distance: int, tokens_per_frame: int) -> float | None:
        """Half the width of the band in tokens; None where frames so far apart do not attend to each other."""
        if distance == 1 and self.adjacent_width == "half":
            return tokens_per_frame // 2
        if distance <= 1:
            return tokens_per_frame
        length = 2 ** tokens_per_frame.bit_length() / 2 ** distance.bit_length()
        if length < self.thin_below and distance % int(self.thin_below / length):
            return None
        return max(self.block_size, length * self.decay_factor)


def _whole_video_mask(bands: _Bands, num_frames: int, tokens_per_frame: int, model: str) -> Tensor:
    grid = _Grid(num_frames, tokens_per_frame, bands.block_size)
    for i in range(num_frames):
        for j in range(num_frames):
            is_sink = j == 0 and model == "wan"
            width = tokens_per_frame if is_sink else bands.width(abs(i - j), tokens_per_frame)
            if width is not None:
                grid.add(i, j, int(width))
    return grid.mask


class _Grid:
    """A block mask that is put together from frame pairs."""

    def __init__(self, num_frames: int, tokens_per_frame: int, block_size: int) -> None:
        self.tokens, self.size = tokens_per_frame, block_size
        num_tokens = num_frames * tokens_per_frame
        self.num_whole, self.num_left = divmod(num_tokens, block_size)
        length = self.num_whole + bool(self.num_left)
        self.mask = torch.zeros(length, length, dtype=torch.bool)
        # Few pairs differ in width and in how far into a block their frames begin.
        self._blocks = cache(self._blocks_of)

    def add(self, i: int, j: int, width: int) -> None:
        """Keep what a band between the frames i (queries) and j (keys) keeps."""
        (row, row_offset), (column, column_offset) = (divmod(x * self.tokens, self.size) for x in (i, j))
        blocks = self._blocks(width, row_offset, column_offset)
        # The source looks at as many blocks as a frame would have if it began at a block's edge.
        per_frame = -(-self.tokens // self.size)
        num_rows = min(per_frame, self.num_whole - row)
        num_columns = min(per_frame, self.num_whole - column)
        whole = self.mask[row : row + max(0, num_rows), column : column + max(0, num_columns)]
        whole |= blocks[: whole.shape[0], : whole.shape[1]]
        if self.num_left:
            self._add_rest(row, column, width, row_offset, column_offset)

    def _add_rest(self, row: int, column: int, width: int, row_offset: int, column_offset: int) -> None:
        """Fill the last row and column, which are no whole blocks."""
        end = self.num_whole
        num_rows, num_columns = self._num_blocks(row_offset), self._num_blocks(column_offset)
        if row + num_rows > end:
            blocks = self._blocks(width, row_offset, column_offset, self.num_left)
            self.mask[end, column : column + num_columns] |= blocks[end - row]
        if column + num_columns > end:
            blocks = self._blocks(width, row_offset, column_offset)
            rows = min(num_rows, end - row)
            self.mask[row : row + rows, end] |= blocks[:rows, end - column]

    def _num_blocks(self, offset: int) -> int:
        return -(-(offset + self.tokens) // self.size)

    def _blocks_of(self, width: int, row_offset: int, column_offset: int, last_size: int | None = None) -> Tensor:
        """All blocks that the two frames reach into."""
        row_edges, column_edges = (
            (torch.arange(self._num_blocks(offset) + 1) * self.size - offset).clamp(0, self.tokens)
            for offset in (row_offset, column_offset)
        )
        sizes = torch.full((len(row_edges) - 1,), self.size)
        if last_size is not None:
            sizes[-1] = last_size
        return _band_blocks(width, row_edges, column_edges, sizes)


def _band_blocks(reach: int, row_edges: Tensor, column_edges: Tensor, row_sizes: Tensor | None = None) -> Tensor:
    """Blocks that a band around the diagonal of a frame pair keeps.

    A column of a block is touched if any of its tokens is in the band, and dense if more than a third of the block's
    rows are; a block is kept if more than 0.6 of its touched columns are dense. Clipped corners are therefore dropped.

    Args:
        reach: Tokens k and l are in the band if abs(k - l) <= reach.
        row_edges: (rows + 1,) whole numbers, ascending, in tokens of the query's frame.
        column_edges: (columns + 1,) whole numbers, ascending, in tokens of the key's frame.
        row_sizes: (rows,) tokens that count as a whole block, where a frame covers only part of it; None: what the
            edges say.

    Returns:
        (rows, columns), bool.
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
    """Add up the columns between edges."""
    total = torch.nn.functional.pad(values.long().cumsum(1), (1, 0))
    return total[:, edges - edges[0]].diff(dim=1)
