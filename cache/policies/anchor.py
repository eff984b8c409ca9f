"""Anchor Forcing: first frames, the frames just after the last change of prompt, and a window, in three regions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longtake.cache.base import BlockTrace, EncodeJob, Event, Geometry, Number, check_room
from longtake.cache.frames import FramePlan, SinkWindow
from longtake.cache.recache import RecacheState


@dataclass(frozen=True, kw_only=True)
class Anchor(SinkWindow):
    """Junction cache and tri-region RoPE (Anchor Forcing, arXiv:2603.13405, built on LongLive).

    The junction, the first frames after a change of prompt, is read from when it leaves the window until the next one
    does. In a long video the sinks stand at 0-2, the window at 12-20 with the block at 18-20, and the junction a
    window and its own length below that end (6-8). A re-cache puts the window at 9-20 and reads sinks and junction. As
    released, every ``num_refresh_blocks``-th block makes a junction while the prompt stays the same.

    Differs: the released junction has one block of three frames, comes one block late where a prompt changes between
    blocks, and the "previous" one is an earlier pass of the same block.
    """

    name: ClassVar[str] = "anchor"
    source: ClassVar[str] = "Anchor Forcing, arXiv:2603.13405"
    events: ClassVar[frozenset[Event]] = frozenset({"keep", "recache", "flush"})

    num_context_frames: int = 15  # everything attended: sinks, junction, history and the block itself
    num_junction_frames: int = 3
    num_position_frames: int = 21  # positions run from 0 to one less
    num_refresh_blocks: int = 6  # 0: none while the prompt stays the same

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "num_junction_frames", "num_refresh_blocks")
        needed = self.num_context_frames + self.num_sink_frames
        if self.num_position_frames < needed:
            raise ValueError(
                f"num_position_frames={self.num_position_frames} leaves no room between the sinks and the window for "
                f"the junction: use {needed} or more (num_context_frames and once more num_sink_frames)."
            )

    @property
    def num_window_frames(self) -> int:
        """Everything attended but the junction."""
        return self.num_context_frames - self.num_junction_frames

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        needed = self.num_sink_frames + self.num_junction_frames + frames_per_block + 1
        content = (
            f"num_sink_frames={self.num_sink_frames}, num_junction_frames={self.num_junction_frames}, a block of "
            f"{frames_per_block} frames and one before it"
        )
        check_room(self.num_context_frames, needed, content, remedy=", or fewer sinks")

    def start(self, geometry: Geometry) -> "_AnchorState":
        self.check(geometry.frames_per_block, geometry.max_frames)
        return _AnchorState(self, geometry)

    def oldest(self, start_frame: int, num_frames: int) -> int:
        """First frame of the window that a block sees."""
        return start_frame + num_frames - (self.num_window_frames - self.num_sink_frames)

    def junction(self, start_frame: int, num_frames: int, anchors: tuple[int, ...]) -> range:
        """Frames of the junction that a block reads: of the last one of which a frame has left the window."""
        anchor = max((a for a in anchors if a < self.oldest(start_frame, num_frames)), default=None)
        return range(0) if anchor is None else range(anchor, anchor + self.num_junction_frames)

    def keep(
        self, stored: tuple[int, ...], start_frame: int, num_frames: int, *, anchors: tuple[int, ...] = ()
    ) -> tuple[int, ...]:
        oldest, junction = self.oldest(start_frame, num_frames), self.junction(start_frame, num_frames, anchors)
        return tuple(f for f in stored if f < self.num_sink_frames or f >= oldest or f in junction)

    def read(
        self, kept: tuple[int, ...], start_frame: int, num_frames: int, *, anchors: tuple[int, ...] = ()
    ) -> FramePlan:
        oldest, junction = self.oldest(start_frame, num_frames), self.junction(start_frame, num_frames, anchors)
        junction_shift = self.num_position_frames - self.num_context_frames - junction.start
        query = min(self.num_position_frames - num_frames, start_frame)
        sinks = [frame for frame in kept if frame < self.num_sink_frames]
        recent = [frame for frame in kept[len(sinks) :] if frame >= oldest]
        middle = kept[len(sinks) : len(kept) - len(recent)]
        positions = [*sinks, *(f + junction_shift for f in middle), *(f - start_frame + query for f in recent)]
        roles = ("sink",) * len(sinks) + ("junction",) * len(middle) + ("recent",) * len(recent)
        queries = range(query, query + num_frames)
        return FramePlan(kept, tuple(map(float, positions)), tuple(map(float, queries)), roles)


class _AnchorState(RecacheState[Anchor]):
    """Whole frames, and where junctions start."""

    def __init__(self, policy: Anchor, geometry: Geometry) -> None:
        sinks, window = policy.num_sink_frames, policy.num_window_frames
        super().__init__(policy, geometry, num_frames=window, num_sink_frames=sinks)
        self._anchors: tuple[int, ...] = ()
        self._has_switched = False

    def end_block(self, trace: BlockTrace) -> list[EncodeJob]:
        """Remember where a new prompt, or a refresh, starts."""
        refresh, end = self.policy.num_refresh_blocks, trace.start_frame + trace.latents.shape[1]
        self._has_switched |= trace.event != "keep"
        is_due = refresh > 0 and not self._has_switched and (trace.block_index + 1) % refresh == 0
        if is_due or trace.event != "keep":
            oldest = self.policy.oldest(end, self.geometry.frames_per_block)
            first = max((a for a in self._anchors if a < oldest), default=0)
            self._anchors = (*(a for a in self._anchors if a >= first), end)
        return super().end_block(trace)

    def kept(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        return self.policy.keep(stored, start_frame, num_frames, anchors=self._anchors)

    def plan(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        kept = self.kept(stored, start_frame, num_frames)
        return self.policy.read(kept, start_frame, num_frames, anchors=self._anchors)

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        """Role of each frame that the next block reads."""
        return self.plan(frames, frames[-1] + 1, self.geometry.frames_per_block).roles if frames else ()

    def state_dict(self) -> dict[str, Tensor | Number]:
        junctions = {"anchors": torch.tensor(self._anchors).long(), "has_switched": self._has_switched}
        return super().state_dict() | junctions

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._anchors, self._has_switched = tuple(state["anchors"].tolist()), bool(state["has_switched"])
