"""First frames and a sliding window."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.base import Event, Geometry, Traits
from longtake.cache.frames import FramePlan, FramePolicy, check_positions
from longtake.cache.recache import RecacheState


@dataclass(frozen=True, kw_only=True)
class SinkWindow(FramePolicy):
    """First frames and the last ones: what is kept, without the positions."""

    num_context_frames: int = 12  # everything attended: sinks, history and the block itself
    num_sink_frames: int = 3

    def __post_init__(self) -> None:
        if self.num_sink_frames < 0:
            raise ValueError(f"num_sink_frames={self.num_sink_frames} must be 0 or more.")

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """Refuse a context without room for the sinks and a block."""
        needed = self.num_sink_frames + frames_per_block
        if self.num_context_frames < needed:
            raise ValueError(
                f"num_context_frames={self.num_context_frames} leaves no room for "
                f"num_sink_frames={self.num_sink_frames} and a block of {frames_per_block} frames: "
                f"use {needed} or more, or fewer sinks."
            )

    def num_stored_frames(self, frames_per_block: int) -> int | None:
        """What one block reads beside itself."""
        return self.num_context_frames - frames_per_block

    def num_sinks(self, stored: tuple[int, ...]) -> int:
        """How many of the stored frames are sinks: those before ``num_sink_frames``."""
        return sum(frame < self.num_sink_frames for frame in stored)

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        """Sinks, then the recent past."""
        num_sinks = self.num_sinks(frames)
        return ("sink",) * num_sinks + ("recent",) * (len(frames) - num_sinks)

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        """Keep the sinks and the last frames that fit beside them and the block."""
        num_sinks = self.num_sinks(stored)
        room = self.num_context_frames - num_frames - num_sinks
        return stored[:num_sinks] + stored[max(len(stored) - room, num_sinks) :]


@dataclass(frozen=True, kw_only=True)
class AttentionSink(SinkWindow):
    """First frames plus a sliding window (StreamingLLM, arXiv:2309.17453).

    ``positions: contiguous`` is StreamingLLM proper: every frame at its place among those attended, so nothing ever
    leaves the range 0 to ``num_context_frames`` - 1. ``absolute`` is what Self-Forcing's sink_size and LongLive do:
    every frame at its own index, with a gap behind the sink that grows.
    """

    name: ClassVar[str] = "attention_sink"
    source: ClassVar[str] = "StreamingLLM, arXiv:2309.17453"
    events: ClassVar[frozenset[Event]] = frozenset({"keep", "recache", "flush"})
    traits: ClassVar[Traits] = Traits(takes_windows=True)

    positions: Literal["absolute", "contiguous"] = "contiguous"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positions(self.positions)

    def start(self, geometry: Geometry) -> RecacheState:
        """Make the empty state of one rollout."""
        self.check(geometry.frames_per_block, geometry.max_frames)
        return RecacheState(self, geometry, num_frames=self.num_context_frames, num_sink_frames=self.num_sink_frames)

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Read all, where ``positions`` says."""
        if self.positions == "absolute":
            return FramePlan.absolute(kept, start_frame, num_frames)
        return FramePlan.contiguous(kept, num_frames)
