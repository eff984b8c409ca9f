"""First frames and a sliding window."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.frames import FramePlan, FramePolicy
from longtake.cache.sliding_window import check_positions


@dataclass(frozen=True, kw_only=True)
class AttentionSink(FramePolicy):
    """First frames plus a sliding window (StreamingLLM, arXiv:2309.17453).

    ``positions: contiguous`` is StreamingLLM proper: every frame at its place among those attended, so nothing ever
    leaves the range 0 to ``num_context_frames`` - 1. ``absolute`` is what Self-Forcing's sink_size and LongLive do:
    every frame at its own index, with a gap behind the sink that grows.
    """

    name: ClassVar[str] = "attention_sink"
    source: ClassVar[str] = "StreamingLLM, arXiv:2309.17453"

    num_context_frames: int = 12  # everything attended: sinks, history and the block itself
    num_sink_frames: int = 3
    positions: Literal["absolute", "contiguous"] = "contiguous"

    def __post_init__(self) -> None:
        if self.num_sink_frames < 0:
            raise ValueError(f"num_sink_frames={self.num_sink_frames} must be 0 or more.")
        check_positions(self.positions)

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

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        """Sinks are the frames before ``num_sink_frames``."""
        return tuple("sink" if frame < self.num_sink_frames else "recent" for frame in frames)

    def plan(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Read the sinks and the last frames that fit beside them and the block."""
        sinks = tuple(frame for frame in stored if frame < self.num_sink_frames)
        window = stored[len(sinks) :]
        room = self.num_context_frames - num_frames - len(sinks)
        frames = sinks + window[max(len(window) - room, 0) :]
        if self.positions == "absolute":
            return FramePlan.absolute(frames, start_frame, num_frames)
        return FramePlan.contiguous(frames, num_frames)
