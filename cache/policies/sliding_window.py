"""The most recent frames only."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.base import Event, Geometry, Traits
from longtake.cache.frames import FramePlan, FramePolicy, check_positions
from longtake.cache.recache import RecacheState


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(FramePolicy):
    """The last frames, the block itself included (Self-Forcing's local_attn_size, arXiv:2506.08009).

    Equal to the released code with ``positions: absolute``; ``contiguous`` gives the same distances between frames
    and keeps every position below ``num_context_frames``.
    """

    name: ClassVar[str] = "sliding_window"
    source: ClassVar[str] = "Self-Forcing, arXiv:2506.08009"
    events: ClassVar[frozenset[Event]] = frozenset({"keep", "recache", "flush"})
    traits: ClassVar[Traits] = Traits(takes_windows=True)

    num_context_frames: int = 21  # everything attended: history and the block itself
    positions: Literal["absolute", "contiguous"] = "absolute"

    def __post_init__(self) -> None:
        if self.num_context_frames < 1:
            raise ValueError(f"num_context_frames={self.num_context_frames} must be 1 or more.")
        check_positions(self.positions)

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """Refuse a window smaller than a block."""
        if self.num_context_frames < frames_per_block:
            raise ValueError(
                f"num_context_frames={self.num_context_frames} leaves no room for a block of {frames_per_block} "
                f"frames: use {frames_per_block} or more."
            )

    def start(self, geometry: Geometry) -> RecacheState:
        """Make the empty state of one rollout."""
        self.check(geometry.frames_per_block, geometry.max_frames)
        return RecacheState(self, geometry, num_frames=self.num_context_frames)

    def num_stored_frames(self, frames_per_block: int) -> int | None:
        """What one block reads beside itself."""
        return self.num_context_frames - frames_per_block

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        """Keep the last frames that fit beside the block."""
        room = self.num_context_frames - num_frames
        return stored[max(len(stored) - room, 0) :]

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Read all, where ``positions`` says."""
        if self.positions == "absolute":
            return FramePlan.absolute(kept, start_frame, num_frames)
        return FramePlan.contiguous(kept, num_frames)
