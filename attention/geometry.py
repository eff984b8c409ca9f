"""The frames of the queries and of the keys of one attention call."""

from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

Role = Literal["sink", "mid", "memory", "recent", "current", "text"]
"""Kind of a run of keys: first frames, history, compressed history, newest history, the asking block, or words."""

Kind = Literal["denoise", "commit"]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of keys that belong together, usually one frame."""

    frame: int  # index of the latent frame in the video; -1 where there is none (text)
    position: float  # temporal position at which the run was rotated; it need not be ``frame``
    start: int  # first key of the run
    length: int  # keys in the run; whole frames have ``AttentionGeometry.frame_tokens``
    role: str  # use of the run in the cache, one of ``Role``

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(f"role={self.role!r} of a segment is unknown; known: {', '.join(get_args(Role))}.")
        if self.start < 0 or self.length < 1:
            raise ValueError(f"a segment of length={self.length} at start={self.start} holds no keys: give it some.")

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, kw_only=True)
class AttentionGeometry:
    """Frames of the queries and of the keys of one attention call.

    Queries are whole frames in order, ``frame_tokens`` each, row by row. Keys are the segments in order. In the
    bidirectional form the two are the same frames; in the cached form the queries are the block in work, and the keys
    are what the cache gave, the block's own last.
    """

    frame_tokens: int
    grid: tuple[int, int]  # (rows, columns) of a frame; their product is ``frame_tokens``
    frames_per_block: int | None  # latent frames denoised together; None in the bidirectional form
    segments: tuple[Segment, ...]  # runs of keys, in the order of the keys, without gaps
    query_frames: tuple[int, ...]  # index in the video of every frame that asks
    query_positions: tuple[float, ...]  # temporal position of every frame that asks
    block_index: int = 0  # of the block in the rollout
    step_index: int = 0
    num_steps: int = 1  # denoising steps of a block
    layer: int = 0
    num_layers: int = 1
    kind: Kind = "denoise"  # ``commit``: the pass that fills the cache

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows < 1 or columns < 1 or rows * columns != self.frame_tokens:
            raise ValueError(f"grid={self.grid} has not the frame_tokens={self.frame_tokens} of a frame: correct one.")
        if not self.query_frames or len(self.query_frames) != len(self.query_positions):
            raise ValueError(
                f"{len(self.query_frames)} query_frames and {len(self.query_positions)} query_positions: "
                "give one position for every frame, and at least one frame."
            )
        end = 0
        for segment in self.segments:
            if segment.start != end:
                raise ValueError(f"a segment starts at {segment.start} but the keys before it end at {end}: close it.")
            end = segment.stop
        if not end:
            raise ValueError("segments is empty, so there are no keys: give at least one.")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} is unknown; known: {', '.join(get_args(Kind))}.")

    @classmethod
    def bidirectional(cls, num_frames: int, grid: tuple[int, int], **place: int) -> "AttentionGeometry":
        """Describe a call in which every frame of a video asks every frame; ``place``: its step and layer."""
        return replace(make_geometry(num_frames, grid), **place)

    @property
    def num_queries(self) -> int:
        return len(self.query_frames) * self.frame_tokens

    @property
    def num_keys(self) -> int:
        return self.segments[-1].stop

    @property
    def query_lengths(self) -> list[int]:
        return [self.frame_tokens] * len(self.query_frames)

    @property
    def key_lengths(self) -> list[int]:
        return [segment.length for segment in self.segments]

    def is_whole(self, segment: Segment) -> bool:
        """True if a segment has a frame's tokens, one at every place; of others a policy knows no places."""
        return segment.length == self.frame_tokens and segment.role not in ("memory", "text")

    def own_segments(self) -> list[int]:
        """Find the frames that ask among ``segments``, one after the other."""
        own = [index for index, segment in enumerate(self.segments) if segment.role == "current"]
        frames = tuple(self.segments[index].frame for index in own)
        if frames != self.query_frames or not all(self.is_whole(self.segments[index]) for index in own):
            raise ValueError(
                f"segments of role 'current' are frames {list(frames)} but the queries are frames "
                f"{list(self.query_frames)}: sparse attention needs the asking frames among the keys, whole."
            )
        return own

    @cached_property
    def layout(self) -> "_Layout":
        """Everything but step, layer and pass: all that a plan made without looking at q and k depends on."""
        frames = (self.frame_tokens, self.grid, self.frames_per_block, self.segments)
        return _Layout((*frames, self.query_frames, self.query_positions))

    def at(self, *, step_index: int, layer: int, kind: Kind) -> "AttentionGeometry":
        """The same frames in another step, layer or pass of the block, not checked anew."""
        other = copy(self)
        vars(other).update(step_index=step_index, layer=layer, kind=kind, layout=self.layout)
        return other


class _Layout(tuple):
    """A layout whose hash is computed once: every attention call of a block looks its plan up by the same one."""

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash


def make_geometry(
    num_frames: int, grid: tuple[int, int], *, block_frames: int | None = None, num_sinks: int = 1
) -> AttentionGeometry:
    """Describe a whole video, or the last block of a cache that holds a video from its first frame.

    Args:
        num_frames: Latent frames of the keys.
        grid: (rows, columns) of a frame.
        block_frames: Last frames that ask, at most ``num_frames``; None: all, in the bidirectional form.
        num_sinks: First frames that are sinks of the cache.
    """
    tokens, first = grid[0] * grid[1], 0 if block_frames is None else num_frames - block_frames
    roles = ["current" if frame >= first else "sink" if frame < num_sinks else "recent" for frame in range(num_frames)]
    return AttentionGeometry(
        frame_tokens=tokens,
        grid=grid,
        frames_per_block=block_frames,
        segments=tuple(
            Segment(frame=frame, position=float(frame), start=frame * tokens, length=tokens, role=role)
            for frame, role in enumerate(roles)
        ),
        query_frames=tuple(range(first, num_frames)),
        query_positions=tuple(map(float, range(first, num_frames))),
        block_index=first // (block_frames or 1),
    )
