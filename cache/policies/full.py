"""Everything ever generated."""

from dataclasses import dataclass
from typing import ClassVar

from longtake.cache.base import Traits
from longtake.cache.frames import FramePlan, FramePolicy


@dataclass(frozen=True, kw_only=True)
class Full(FramePolicy):
    """Every frame so far, at its own position (CausVid, arXiv:2412.07772; Self-Forcing, arXiv:2506.08009).

    Self-Forcing's released code stops at 21 frames; here a rollout longer than ``num_context_frames`` is refused.
    """

    name: ClassVar[str] = "full"
    source: ClassVar[str] = "CausVid, arXiv:2412.07772"
    traits: ClassVar[Traits] = Traits(takes_windows=True)

    num_context_frames: int | None = None  # longest rollout allowed; null: no limit

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_context_frames is not None and self.num_context_frames < 1:
            raise ValueError(f"num_context_frames={self.num_context_frames} must be 1 or more, or null for no limit.")

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        needed = max(frames_per_block, num_frames or 0)
        if self.num_context_frames is not None and needed > self.num_context_frames:
            raise ValueError(
                f"num_context_frames={self.num_context_frames} cannot hold a rollout of {needed} frames in full: "
                "use a shorter video, null for no limit, or a bounded policy such as attention_sink."
            )

    def num_read_frames(self, frames_per_block: int) -> int | None:
        return None  # places grow with the video, up to the limit

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        return stored

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        return FramePlan.absolute(kept, start_frame, num_frames)
