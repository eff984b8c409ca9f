"""A deep sink that moves along with the video, and compression of what lies between sink and present."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.base import CachePolicy, Geometry, PolicyState
from longtake.cache.frames import FramePlan, FramePolicy, FrameState
from longtake.cache.participative import ParticipativeState


@dataclass(frozen=True, kw_only=True)
class DeepForcing(CachePolicy):
    """Deep sink with temporal re-alignment and participative compression (Deep Forcing, arXiv:2512.05081).

    About half of the window is sink, and the sink moves along in time, so that its distance to the block stays what
    it was. When a block no longer fits into the window, the tokens between the sink and the recent frames are scored
    by the recent queries, in every layer and for every video by itself, and only the best stay: as many as
    ``num_budget_frames`` leaves room for. A token counts for the whole layer: all its heads are summed.

    The defaults do what the released code does, which differs from the paper. The sink moves only when something is
    compressed (every second block at the published sizes) and stays a block's length short of what follows it; kept
    tokens stay at their own frames; a token is kept seven times at most. ``positions: contiguous`` closes the gap,
    ``unify_top`` lays the kept tokens out between the sink and the recent frames, as the paper describes.
    Where the budget has no room beside sink and recent frames, nothing is chosen and both are kept all the same.
    ``compression: none`` is the deep sink alone: the window slides, and the sink moves with every block.

    Different from the released code: positions are given when keys are read, so nothing is rotated twice; nothing
    is left over from an earlier video; a token that was kept too often stays where its place would be left empty; a
    window other than the release's fixed 21 frames moves the sink by what compression takes of it. Where more than
    two blocks are recent, their queries come from commits alone (the release counts the last block's passes again).
    """

    name: ClassVar[str] = "deep_forcing"
    source: ClassVar[str] = "Deep Forcing, arXiv:2512.05081"

    compression: Literal["participative", "none"] = "participative"
    num_context_frames: int = 21  # most frames attended: sink, kept tokens, history and the block itself
    num_sink_frames: int = 10
    num_budget_frames: int = 16  # what a compression leaves of them, the block included
    num_recent_frames: int = 4  # never compressed, and asked for the scores; the block included
    positions: Literal["released", "contiguous"] = "released"
    unify_top: bool = False
    fusion: Literal["sum", "max"] = "sum"  # of the scores that the recent queries give a token
    max_reuse: int = 7  # compressions that a token can survive; 0: any number

    def __post_init__(self) -> None:
        known = {"compression": "participative none", "positions": "released contiguous", "fusion": "sum max"}
        for field, words in known.items():
            if getattr(self, field) not in (values := words.split()):
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown: use {values[0]!r} or {values[1]!r}.")
        for field in ("num_sink_frames", "max_reuse"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must be 0 or more.")
        if self.compression == "none":
            return
        if self.num_budget_frames > self.num_context_frames:
            raise ValueError(
                f"num_budget_frames={self.num_budget_frames} is what compression leaves of "
                f"num_context_frames={self.num_context_frames}: use {self.num_context_frames} or fewer."
            )
        needed = self.num_sink_frames + self.num_recent_frames
        if self.num_context_frames < needed:
            raise ValueError(
                f"num_context_frames={self.num_context_frames} leaves no room for num_sink_frames="
                f"{self.num_sink_frames} and num_recent_frames={self.num_recent_frames}: use {needed} or more."
            )

    @property
    def num_kept_frames(self) -> int:
        """Frames' worth of tokens that a compression chooses: what the budget has beside sink and recent frames."""
        return max(self.num_budget_frames - self.num_sink_frames - self.num_recent_frames, 0)

    @property
    def breaks_frames(self) -> bool:
        """Tokens are chosen one by one."""
        return self.compression == "participative"

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """Refuse blocks that do not fit behind the sink, or are longer than what is recent."""
        if self.compression == "participative" and self.num_recent_frames < frames_per_block:
            raise ValueError(
                f"num_recent_frames={self.num_recent_frames} counts the block itself, which has {frames_per_block} "
                f"frames: use {frames_per_block} or more."
            )
        needed = self.num_sink_frames + frames_per_block
        if self.num_context_frames < needed:
            raise ValueError(
                f"num_context_frames={self.num_context_frames} leaves no room for num_sink_frames="
                f"{self.num_sink_frames} and a block of {frames_per_block} frames: use {needed} or more."
            )

    def start(self, geometry: Geometry) -> PolicyState:
        """Make the empty state of one rollout."""
        self.check(geometry.frames_per_block, geometry.max_frames)
        if self.compression == "none":
            return FrameState(_DeepSink(own=self), geometry)
        return ParticipativeState(self, geometry)

    def sink_shift(self, elapsed: int, num_frames: int) -> int:
        """How far the sink moves for a block that does not fit any more.

        Args:
            elapsed: Frames of the video before the block.
            num_frames: Frames of the block.

        Returns:
            Frames to add to the sink's own.
        """
        left = self.num_context_frames if self.compression == "none" else self.num_budget_frames
        if self.positions == "contiguous":
            least = 0 if self.compression == "none" else self.num_sink_frames + self.num_recent_frames
            return elapsed + num_frames - max(left, least)
        # The released code starts to count at the first block that did not fit, wherever that was.
        since = (elapsed + num_frames - self.num_context_frames - 1) // num_frames * num_frames
        return self.num_context_frames - left + since


@dataclass(frozen=True, kw_only=True)
class _DeepSink(FramePolicy):
    """The deep sink alone: whole frames, a window that slides and a sink that follows it."""

    name: ClassVar[str] = DeepForcing.name
    source: ClassVar[str] = DeepForcing.source
    own: DeepForcing

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """As the whole policy."""
        self.own.check(frames_per_block, num_frames)

    def num_stored_frames(self, frames_per_block: int) -> int | None:
        """What one block reads beside itself."""
        return self.own.num_context_frames - frames_per_block

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        """The first stored frames are the sink."""
        num_sinks = min(self.own.num_sink_frames, len(frames))
        return ("sink",) * num_sinks + ("recent",) * (len(frames) - num_sinks)

    def plan(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Everything while it fits; then the sink and the last frames, the sink behind them."""
        elapsed = start_frame - stored[0] if stored else 0
        if elapsed + num_frames <= self.own.num_context_frames:
            return FramePlan.absolute(stored, start_frame, num_frames)
        sinks, window = stored[: self.own.num_sink_frames], stored[self.own.num_sink_frames :]
        room = self.own.num_context_frames - num_frames - len(sinks)
        recent = window[max(len(window) - room, 0) :]
        shift = self.own.sink_shift(elapsed, num_frames)
        positions = (*(frame + shift for frame in sinks), *recent)
        own = range(start_frame, start_frame + num_frames)
        return FramePlan(sinks + recent, tuple(map(float, positions)), tuple(map(float, own)))
