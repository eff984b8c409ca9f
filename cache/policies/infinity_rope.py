"""Infinity-RoPE: positions relative to the newest block, a flush and a cut between scenes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from longtake.cache.base import BlockTrace, EncodeJob, Event, Geometry, Number
from longtake.cache.frames import FramePlan, FrameState, SinkWindow, ends


@dataclass(frozen=True, kw_only=True)
class InfinityRope(SinkWindow):
    """Block-relativistic RoPE, KV flush and RoPE cut (Infinity-RoPE, arXiv:2511.20649).

    ``placement: released`` puts every frame at its place among those attended, 0 to ``num_context_frames`` - 1.
    ``paper`` lets the newest block start at its own index, ``onset`` at most; older frames keep their distance, down
    to 0.

    The event ``flush`` keeps the sinks and the last ``num_flush_frames`` frames (released: 2, paper: 1). ``cut``
    flushes too, and the next block alone stands at ``cut`` and up.

    Differs: the release fixes a sink of one frame, blocks of three and a full window; its cut moves the last three
    frames attended, not the block, and belongs to the scene before the one marked; without sinks it attends to one
    un-rotated frame.
    """

    name: ClassVar[str] = "infinity_rope"
    source: ClassVar[str] = "Infinity-RoPE, arXiv:2511.20649"
    events: ClassVar[frozenset[Event]] = frozenset({"keep", "flush", "cut"})

    num_context_frames: int = 6  # everything attended: sinks, history and the block itself
    num_sink_frames: int = 1
    num_flush_frames: int = 2  # newest frames that outlive a flush, beside the sinks
    placement: Literal["released", "paper"] = "released"
    onset: int = 21  # placement paper: where the newest block starts
    cut: int = 45  # where the first block of a new scene starts

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "num_flush_frames", "onset", "cut")

    def start(self, geometry: Geometry) -> "_InfinityRopeState":
        self.check(geometry.frames_per_block, geometry.max_frames)
        return _InfinityRopeState(self, geometry)

    def after_flush(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return ends(stored, self.num_sinks(stored), self.num_flush_frames)

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        if self.placement == "released":
            return FramePlan.contiguous(kept, num_frames)
        first = min(start_frame, self.onset)
        positions = tuple(float(max(first - (start_frame - frame), 0)) for frame in kept)
        return FramePlan(kept, positions, tuple(map(float, range(first, first + num_frames))))


class _InfinityRopeState(FrameState[InfinityRope]):
    """Whole frames, and which block a cut has moved."""

    def __init__(self, policy: InfinityRope, geometry: Geometry) -> None:
        super().__init__(policy, geometry)
        self._cut_frame = -1

    def end_block(self, trace: BlockTrace) -> list[EncodeJob]:
        """Flush if the next prompt asks for it; remember a cut."""
        if trace.event == "cut":
            self._cut_frame = trace.start_frame + trace.latents.shape[1]
        return super().end_block(trace)

    def plan(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Read what the policy does; the first block after a cut stands apart from what it reads."""
        plan = super().plan(stored, start_frame, num_frames)
        if start_frame != self._cut_frame:
            return plan
        cut = range(self.policy.cut, self.policy.cut + num_frames)
        return replace(plan, query_positions=tuple(map(float, cut)))

    def state_dict(self) -> dict[str, Tensor | Number]:
        return super().state_dict() | {"cut_frame": self._cut_frame}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._cut_frame = int(state["cut_frame"])
