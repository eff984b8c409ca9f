"""Rolling Forcing's cache: sinks that move up to the working frames before the window."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from longtake.cache.base import Context, Geometry, Pass, Traits
from longtake.cache.frames import FramePlan, FrameState, SinkWindow, ends


@dataclass(frozen=True, kw_only=True)
class RollingForcing(SinkWindow):
    """Sinks right before the working frames, working frames right before the window (arXiv:2509.25161).

    Made for the sampler ``rolling_window``: sinks, the last committed frames and the window of blocks denoised
    together make ``num_context_frames``; all but the sinks stand at their own frames.

    ``commit: released`` reads the last ``num_context_frames`` of what is stored, the block included, all at their own
    frames: once the store is full, clean keys are made without the sinks. ``keep_sinks`` commits with what a denoising
    pass of the block would read.

    Differs: the released store has room for its window and one block, here for ``num_context_frames``; given first
    latents count as committed frames, which the released code mishandles.
    """

    name: ClassVar[str] = "rolling_forcing"
    source: ClassVar[str] = "Rolling Forcing, arXiv:2509.25161"
    traits: ClassVar[Traits] = Traits(takes_windows=True)
    published_window: ClassVar[int] = 5

    num_context_frames: int = 21  # everything attended: sinks, working frames and the window
    num_sink_frames: int = 3
    commit: Literal["released", "keep_sinks"] = "released"

    def num_stored_frames(self, frames_per_block: int) -> int | None:
        """Sinks and working frames of a commit, which has no window to make room for."""
        return self.num_context_frames

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        return super().keep(stored, start_frame, 0)

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        frames = super().keep(kept, start_frame, num_frames)
        num_sinks = self.num_sinks(frames)
        first = start_frame - (len(frames) - num_sinks) - num_sinks
        plan = FramePlan.absolute(frames, start_frame, num_frames)
        moved = tuple(float(first + place) for place in range(num_sinks))
        return replace(plan, positions=moved + plan.positions[num_sinks:])

    def commit_plan(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Read what the released code commits with, or what the block itself would read."""
        if self.commit == "keep_sinks":
            return self.read(stored, start_frame, num_frames)
        recent = ends(stored, 0, self.num_context_frames - num_frames)
        return FramePlan.absolute(recent, start_frame, num_frames)

    def start(self, geometry: Geometry) -> "_RollingForcingState":
        self.check(geometry.frames_per_block, geometry.max_frames)
        return _RollingForcingState(self, geometry)


class _RollingForcingState(FrameState[RollingForcing]):
    """Whole frames; commits read by a plan of their own."""

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        """Read what the policy plans for a window, or for a commit."""
        if pass_.kind != "commit":
            return replace(super().select(layer, pass_, q), holds="kind")
        slots = self.slots(pass_)
        plan = self.policy.commit_plan(tuple(sorted(slots)), pass_.start_frame, pass_.num_frames)
        reads = self._reads(layer, plan, slots)
        return replace(
            super().select(layer, pass_, q), reads=reads, query_positions=plan.query_positions, holds="kind"
        )
