"""The most recent frames only."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.base import Event, Geometry, Traits, check_room
from longtake.cache.frames import FramePlan, FramePolicy, ends
from longtake.cache.recache import RecacheState


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(FramePolicy):
    """The last frames, the block itself included (Self-Forcing's local_attn_size, arXiv:2506.08009).

    Equal to the released code with ``positions: absolute``; ``contiguous`` has the same distances, from 0.
    """

    name: ClassVar[str] = "sliding_window"
    source: ClassVar[str] = "Self-Forcing, arXiv:2506.08009"
    events: ClassVar[frozenset[Event]] = frozenset({"keep", "recache", "flush"})
    traits: ClassVar[Traits] = Traits(takes_windows=True)

    num_context_frames: int = 21  # everything attended: history and the block itself
    positions: Literal["absolute", "contiguous"] = "absolute"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "num_context_frames")

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        check_room(self.num_context_frames, frames_per_block, f"a block of {frames_per_block} frames")

    def start(self, geometry: Geometry) -> "RecacheState[SlidingWindow]":
        self.check(geometry.frames_per_block, geometry.max_frames)
        return RecacheState(self, geometry, num_frames=self.num_context_frames)

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        return ends(stored, 0, self.num_context_frames - num_frames)

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        return FramePlan.placed(self.positions, kept, start_frame, num_frames)
