"""LongLive: first frames, a window, and a re-cache when the prompt changes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.base import Geometry
from longtake.cache.policies.attention_sink import AttentionSink
from longtake.cache.recache import RecacheState


@dataclass(frozen=True, kw_only=True)
class LongLive(AttentionSink):
    """Frame sink, short window and KV re-cache (LongLive, arXiv:2509.22622, release 1.0).

    ``positions: absolute`` is the released default, ``contiguous`` its "infinity" mode, all below
    ``num_context_frames``. The event ``recache`` encodes the last ``num_context_frames`` clean frames again under the
    new prompt. As released, a video no longer than the window is encoded anew whole, sinks included.

    Differs: the released infinity mode positions the first video of a batch only. Where a block is smaller than
    ``num_sink_frames`` the released code attends to empty sinks, and keeps those of a block's later passes as they
    were at the first, noisy one; here a sink is a committed frame. ``recache: causal`` is not in the release.
    """

    name: ClassVar[str] = "longlive"
    source: ClassVar[str] = "LongLive, arXiv:2509.22622"

    positions: Literal["absolute", "contiguous"] = "absolute"
    global_sink: bool = True  # sinks outlive a re-cache; false: the oldest frames encoded anew are the sinks
    recache: Literal["bidirectional", "causal"] = "bidirectional"  # frames of a re-cache see all, or earlier ones

    def start(self, geometry: Geometry) -> RecacheState[AttentionSink]:
        self.check(geometry.frames_per_block, geometry.max_frames)
        return RecacheState(
            self,
            geometry,
            num_frames=self.num_context_frames,
            num_sink_frames=self.num_sink_frames,
            protects_sinks=self.global_sink,
            is_causal=self.recache == "causal",
        )

    def num_sinks(self, stored: tuple[int, ...]) -> int:
        """The oldest stored frames are the sinks: the first of the video, unless a re-cache moved them."""
        return min(len(stored), self.num_sink_frames)
