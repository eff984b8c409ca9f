"""Sinks, one or a few chosen frames of a long past, and the last frame."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from longtake.cache.base import Geometry
from longtake.cache.frames import FramePlan, FramePolicy
from longtake.cache.history import HistoryState
from longtake.cache.sliding_window import check_positions


@dataclass(frozen=True, kw_only=True)
class Relax(FramePolicy):
    """Sink, selected history and tail (Relax Forcing, arXiv:2603.21366; released: 2 + 1 + 1 + 3 frames of 120 kept).

    A frame stands for the mean of its raw keys in the first layer, scaled to length 1. When a block starts,
    ``num_candidates`` frames, evenly spaced over the newer half of what lies between sinks and tail, are scored by

        cos(candidate, sinks) - redundancy * cos(candidate, tail)

    and the best are read, in all layers and steps of the block: like the beginning, unlike what was just seen.
    Of ``num_context_frames``, history is what sinks, tail and block leave. Until a video has outgrown
    ``num_context_frames``, all of it is read.

    ``positions: contiguous`` equals the released "hybrid" positions but for a shift that attention does not see: the
    block and the tail at their own places, history and sinks right before. ``absolute`` is its ablation, every frame
    at its own index.

    Differs: every video of a batch chooses for itself, where the released code asks the first one; where fewer
    candidates than history frames are left after rounding, the whole newer half stands for election.
    """

    name: ClassVar[str] = "relax"
    source: ClassVar[str] = "Relax Forcing, arXiv:2603.21366"

    num_context_frames: int = 7  # everything attended: sinks, history, tail and the block itself
    num_sink_frames: int = 2
    num_recent_frames: int = 1  # the tail: last frames before the block
    num_budget_frames: int = 120  # everything kept to choose from, the block itself included
    num_candidates: int = 4
    redundancy: float = 2.0  # how much likeness to the tail counts against a candidate
    positions: Literal["absolute", "contiguous"] = "contiguous"

    def __post_init__(self) -> None:
        for name in ("num_sink_frames", "num_recent_frames", "num_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more: history is chosen by comparison.")
        if self.num_budget_frames < self.num_context_frames:
            raise ValueError(
                f"num_budget_frames={self.num_budget_frames} is less than num_context_frames="
                f"{self.num_context_frames}: keep at least what is attended."
            )
        check_positions(self.positions)

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """Refuse a context without room for sinks, history, tail and a block."""
        needed = self.num_sink_frames + 1 + self.num_recent_frames + frames_per_block
        if self.num_context_frames < needed:
            raise ValueError(
                f"num_context_frames={self.num_context_frames} leaves no room for num_sink_frames="
                f"{self.num_sink_frames}, a frame of history, num_recent_frames={self.num_recent_frames} and a block "
                f"of {frames_per_block} frames: use {needed} or more."
            )

    def start(self, geometry: Geometry) -> "HistoryState":
        """Make the empty state of one rollout."""
        self.check(geometry.frames_per_block, geometry.max_frames)
        return HistoryState(self, geometry)

    def num_stored_frames(self, frames_per_block: int) -> int | None:
        """Everything to choose from."""
        return self.num_budget_frames - frames_per_block

    def num_read_frames(self, frames_per_block: int) -> int | None:
        """What one block reads beside itself."""
        return self.num_context_frames - frames_per_block

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        """Sinks come first, the tail last, and what may be chosen in between."""
        last = len(frames) - self.num_recent_frames
        roles = ("recent" if index >= last else "mid" for index in range(len(frames)))
        return tuple("sink" if f < self.num_sink_frames else role for f, role in zip(frames, roles, strict=True))

    def kept(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        """The sinks and the last frames that fit into the budget."""
        first = start_frame - (self.num_budget_frames - num_frames - self.num_sink_frames)
        return tuple(frame for frame in stored if frame < self.num_sink_frames or frame >= first)

    def num_history(self, start_frame: int, num_frames: int) -> int:
        """Frames that the block at ``start_frame`` chooses; 0 while all fit."""
        if start_frame + num_frames <= self.num_context_frames:
            return 0
        return self.num_context_frames - num_frames - self.num_sink_frames - self.num_recent_frames

    def plan(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Read all while all fits; then sinks and tail, with a gap for history."""
        gap = self.num_history(start_frame, num_frames)
        frames = stored[: self.num_sink_frames] + stored[-self.num_recent_frames :] if gap else stored
        if self.positions == "absolute":
            return replace(FramePlan.absolute(frames, start_frame, num_frames), roles=self.roles(frames))
        places = range(len(frames) + gap + num_frames)
        places = [p for p in places if not gap or not self.num_sink_frames <= p < self.num_sink_frames + gap]
        positions = tuple(map(float, places))
        return FramePlan(frames, positions[: len(frames)], positions[len(frames) :], self.roles(frames))

    def candidates(self, stored: tuple[int, ...], num_history: int) -> tuple[int, ...]:
        """Frames that stand for election, evenly spaced over the newer half of the middle."""
        middle = stored[self.num_sink_frames : len(stored) - self.num_recent_frames]
        first = len(middle) // 2
        count = min(self.num_candidates, len(middle) - first)
        if count > 1:
            places = torch.linspace(first, len(middle) - 1, count + 1).long().unique()[:-1].tolist()
        else:
            places = [first]
        if len(places) < num_history:
            places = range(min(first, len(middle) - num_history), len(middle))
        return tuple(middle[place] for place in places)
