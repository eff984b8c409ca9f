"""Frames near in time, and the first ones."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from longtake.attention.geometry import AttentionGeometry, Segment
from longtake.attention.plan import BlockPlan, split_runs
from longtake.attention.policies.base import StaticPolicy


@dataclass(frozen=True, kw_only=True)
class Window(StaticPolicy):
    """Whole frames within a distance of the query's, and sinks: the plainest mask there is, to compare others with."""

    name: ClassVar[str] = "window"
    source: ClassVar[str] = "Longformer, arXiv:2004.05150; sinks: StreamingLLM, arXiv:2309.17453"

    num_window_frames: int = 6  # farthest distance at which a frame is read, in either direction
    num_sink_frames: int = 1  # first frames of the video, always read; what the cache calls a sink is too
    distance: Literal["position", "global"] = "position"  # of rotated positions, or of frames in the video

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(0, "num_window_frames", "num_sink_frames")

    def rules(self, geometry: AttentionGeometry) -> Hashable:
        return geometry.frame_tokens, tuple(geometry.key_lengths), self._reads(geometry)

    def layout_plan(self, geometry: AttentionGeometry) -> BlockPlan:
        return BlockPlan.from_dense_block_mask(
            torch.tensor(self._reads(geometry)),
            split_runs(geometry.query_lengths, geometry.frame_tokens),
            split_runs(geometry.key_lengths, max(geometry.key_lengths)),
        )

    def _reads(self, geometry: AttentionGeometry) -> tuple[tuple[bool, ...], ...]:
        return tuple(
            tuple(self._is_read(segment, frame, position) for segment in geometry.segments)
            for frame, position in zip(geometry.query_frames, geometry.query_positions, strict=True)
        )

    def _is_read(self, segment: Segment, frame: int, position: float) -> bool:
        if segment.role in ("sink", "memory", "text") or segment.frame == frame:
            return True
        if segment.frame < self.num_sink_frames:
            return True
        apart = segment.position - position if self.distance == "position" else segment.frame - frame
        return abs(apart) <= self.num_window_frames
