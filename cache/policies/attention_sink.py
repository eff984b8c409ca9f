"""First frames and a sliding window."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.base import Event, Geometry, Traits
from longtake.cache.frames import FramePlan, SinkWindow
from longtake.cache.recache import RecacheState


@dataclass(frozen=True, kw_only=True)
class AttentionSink(SinkWindow):
    """First frames plus a sliding window (StreamingLLM, arXiv:2309.17453).

    ``positions: contiguous`` is StreamingLLM: every frame at its place among those attended, 0 to
    ``num_context_frames`` - 1. ``absolute``, every frame at its own index, is Self-Forcing's sink_size and LongLive.
    """

    name: ClassVar[str] = "attention_sink"
    source: ClassVar[str] = "StreamingLLM, arXiv:2309.17453"
    events: ClassVar[frozenset[Event]] = frozenset({"keep", "recache", "flush"})
    traits: ClassVar[Traits] = Traits(takes_windows=True)

    positions: Literal["absolute", "contiguous"] = "contiguous"

    def start(self, geometry: Geometry) -> "RecacheState[AttentionSink]":
        self.check(geometry.frames_per_block, geometry.max_frames)
        return RecacheState(self, geometry, num_frames=self.num_context_frames, num_sink_frames=self.num_sink_frames)

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        return FramePlan.placed(self.positions, kept, start_frame, num_frames)
