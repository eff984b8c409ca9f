"""Heads that look only at the near past get only that; the others also what moved most."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.base import CachePolicy, Geometry
from longtake.cache.head_groups import HeadGroupState
from longtake.cache.head_map import PROFILER, HeadMap, find_head_map


@dataclass(frozen=True, kw_only=True)
class ForcingKV(CachePolicy):
    """Static and dynamic heads, told apart by a head map (Forcing-KV, arXiv:2605.09681).

    A static head reads the sink and the last frame. A dynamic head also reads a frame's worth of the frames that have
    just become older: each is cut into segments of neighbouring tokens, and those stay whose keys are least like the
    same tokens' one frame later, since that is where something moves. The first layer with dynamic heads chooses, the
    others follow. The first layer of all is not split: its heads read the sink and the last frame.

    ``head_map`` says which heads are static: ``auto`` is the shipped map of a model of this shape (``mini``, and the
    published one of Self-Forcing, which also fits Causal-Forcing); ``longtake profile-heads`` makes one for any other.
    ``heads`` gives the static heads of each layer here, in place of a map.

    Different from the released code: a segment count that does not divide a frame's tokens is lowered to one that
    does; the sink is never a candidate; ``positions: contiguous`` moves the sink up to the oldest frame that can be
    read, where the release leaves it at its own. The release's sparse and quantised kernels are backends here.
    """

    name: ClassVar[str] = "forcing_kv"
    source: ClassVar[str] = "Forcing-KV, arXiv:2605.09681"
    breaks_frames: ClassVar[bool] = True  # dynamic heads keep segments of frames
    splits_heads: ClassVar[bool] = True  # static heads read other tokens than dynamic ones

    num_sink_frames: int = 1
    num_recent_frames: int = 1  # before the block
    num_dynamic_frames: int = 1  # frames' worth of segments that dynamic heads keep
    num_segments: int = 6  # of neighbouring tokens, per frame, at most
    num_plain_layers: int = 1  # first layers that are not split
    head_map: str = "auto"  # or a shipped map's name, or a file
    heads: tuple[tuple[int, ...], ...] = ()  # static heads of each layer, in place of head_map
    positions: Literal["absolute", "contiguous"] = "absolute"

    def __post_init__(self) -> None:
        for field, least in (("num_sink_frames", 0), ("num_dynamic_frames", 0), ("num_plain_layers", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}={getattr(self, field)} must be {least} or more.")
        for field in ("num_recent_frames", "num_segments"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be 1 or more.")
        if self.positions not in ("absolute", "contiguous"):
            raise ValueError(f"positions={self.positions!r} is unknown: use 'absolute' or 'contiguous'.")
        if not self.head_map and not self.heads:
            raise ValueError(f"forcing_kv needs a head_map or heads: {PROFILER}, or use head_map: auto.")

    @property
    def needs_weights(self) -> bool:
        """Whether it needs something measured for a model: a map of its heads, unless they are listed."""
        return not self.heads

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """Refuse blocks that give dynamic heads fewer frames to choose from than they are to keep."""
        if self.num_dynamic_frames > frames_per_block:
            raise ValueError(
                f"num_dynamic_frames={self.num_dynamic_frames} are chosen from as many frames as a block has, which "
                f"is {frames_per_block}: use {frames_per_block} or fewer."
            )

    def start(self, geometry: Geometry) -> HeadGroupState:
        """Make the empty state of one rollout."""
        self.check(geometry.frames_per_block, geometry.max_frames)
        return HeadGroupState(self, geometry, self.map_for(geometry))

    def map_for(self, geometry: Geometry) -> HeadMap:
        """The head map of a rollout's model.

        Raises:
            ValueError: If there is none, or it belongs to a model of another shape.
        """
        if not self.heads:
            return find_head_map(self.head_map, geometry.num_layers, geometry.num_heads)
        if len(self.heads) != geometry.num_layers:
            raise ValueError(
                f"heads lists {len(self.heads)} layers, this model has {geometry.num_layers}: give one list per layer."
            )
        return HeadMap(self.heads, geometry.num_heads)
