"""Sinks, a slow memory of frames that brought something new, and a fast one of the last frames."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.base import Geometry
from longtake.cache.frames import FramePlan, FramePolicy
from longtake.cache.slow_memory import SlowMemoryState


@dataclass(frozen=True, kw_only=True)
class SlowFast(FramePolicy):
    """Slow-fast memory of Context Forcing (arXiv:2602.06028; published: 3 sinks, 12 slow, 6 fast, threshold 0.95).

    The fast memory is a queue: the last ``num_recent_frames``, the block included. A block whose keys resemble those
    before it less than ``threshold`` brings something new: when it leaves the queue its first frame enters the slow
    memory, and the oldest one there makes room. Only every ``num_blocks_per_update``-th block is looked at. Positions
    are sinks, slow, fast and block one after the other, so none ever leaves 0 to ``num_context_frames`` - 1.

    The paper leaves open, and here is an option or a choice: how alike two frames are (``similarity``: mean cosine of
    the raw keys at each place of the grid with all heads side by side, or cosine of the frames' mean keys), and which
    layers say so (``decided_by``). Compared are the first frame of a block and the one before it. A frame enters the
    slow memory when it leaves the fast one, not while it is in both. Until the slow memory is full, everything that
    leaves the queue enters it, so that a short video is read whole and the number of tokens does not depend on what
    is in them. Every video of a batch decides for itself.
    """

    name: ClassVar[str] = "slow_fast"
    source: ClassVar[str] = "Context Forcing, arXiv:2602.06028"
    breaks_frames: ClassVar[bool] = True  # slow frames are read as one memory

    num_context_frames: int = 21  # everything attended: sinks, slow, fast and the block itself
    num_sink_frames: int = 3
    num_recent_frames: int = 6  # the fast memory, the block itself included
    threshold: float = 0.95  # a block that is less alike than this brings something new
    num_blocks_per_update: int = 2
    similarity: Literal["places", "means"] = "places"
    decided_by: Literal["first_layer", "each_layer"] = "first_layer"

    def __post_init__(self) -> None:
        for name in ("num_sink_frames", "num_blocks_per_update"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        if self.num_slow_frames < 1:
            raise ValueError(
                f"num_context_frames={self.num_context_frames} leaves no room for num_sink_frames="
                f"{self.num_sink_frames}, num_recent_frames={self.num_recent_frames} and a slow frame: "
                f"use {self.num_sink_frames + self.num_recent_frames + 1} or more."
            )
        options = {"similarity": ("places", "means"), "decided_by": ("first_layer", "each_layer")}
        for name, known in options.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use {known[0]!r} or {known[1]!r}.")

    @property
    def num_slow_frames(self) -> int:
        """What sinks and fast memory leave."""
        return self.num_context_frames - self.num_sink_frames - self.num_recent_frames

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """Refuse a fast memory that does not hold a block and the one before it."""
        if self.num_recent_frames < 2 * frames_per_block:
            raise ValueError(
                f"num_recent_frames={self.num_recent_frames} does not hold a block of {frames_per_block} frames and "
                f"the one before it: use {2 * frames_per_block} or more."
            )

    def start(self, geometry: Geometry) -> SlowMemoryState:
        """Make the empty state of one rollout."""
        self.check(geometry.frames_per_block, geometry.max_frames)
        return SlowMemoryState(self, geometry)

    def num_stored_frames(self, frames_per_block: int) -> int | None:
        """Sinks and the fast memory without the block."""
        return self.num_sink_frames + self.num_recent_frames - frames_per_block

    def num_extra_frames(self, frames_per_block: int) -> int:
        """The slow memory."""
        return self.num_slow_frames

    def num_read_frames(self, frames_per_block: int) -> int | None:
        """What one block reads beside itself."""
        return self.num_context_frames - frames_per_block

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        """Sinks are the frames before ``num_sink_frames``."""
        return tuple("sink" if frame < self.num_sink_frames else "recent" for frame in frames)

    def num_slow(self, start_frame: int, num_frames: int) -> int:
        """Frames in the slow memory for the block at ``start_frame``."""
        gone = start_frame - (self.num_recent_frames - num_frames) - self.num_sink_frames
        return min(max(gone, 0), self.num_slow_frames)

    def plan(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Read the sinks and the fast memory, with a gap for the slow one."""
        sinks = tuple(frame for frame in stored if frame < self.num_sink_frames)
        window = stored[len(sinks) :]
        frames = sinks + window[max(len(window) - (self.num_recent_frames - num_frames), 0) :]
        gap = self.num_slow(start_frame, num_frames)
        places = [*range(len(sinks)), *range(len(sinks) + gap, len(frames) + gap + num_frames)]
        positions = tuple(map(float, places))
        return FramePlan(frames, positions[: len(frames)], positions[len(frames) :])
