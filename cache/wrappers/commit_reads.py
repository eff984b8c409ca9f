"""Any policy, with commit passes that read recent frames only."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from longtake.cache.base import BlockTrace, CacheStats, Context, EncodeJob, Geometry, Number, Pass, PolicyState, Read
from longtake.cache.storage import DerivedTokens
from longtake.cache.wrappers.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class CommitReads(Wrapper):
    """Any policy, with commit passes that read the block and recent frames alone: what is stored echoes no sinks.

    As in Rolling Forcing's released code once its sink drops out of the commit's window (arXiv:2509.25161), but from
    the first block on. Reads of whole frames are cut to the last ``num_recent_frames``; reads of single tokens stay if
    their role is ``recent``.
    """

    name: ClassVar[str] = "commit_reads"
    source: ClassVar[str] = "after Rolling Forcing, arXiv:2509.25161"

    num_recent_frames: int = 3  # before the block; 0: the block alone

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "num_recent_frames")

    def start(self, geometry: Geometry) -> PolicyState:
        return _CommitReadsState(self, self.inner.start(geometry))


@dataclass(frozen=True)
class _Part(DerivedTokens):
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    def derive(self, tensor: Tensor) -> Tensor:
        return tensor[:, self.start : self.end]


class _CommitReadsState(PolicyState):
    def __init__(self, policy: CommitReads, inner: PolicyState) -> None:
        self.policy = policy
        self.inner = inner
        self.merges_commit = inner.merges_commit
        self.keeps_read_sets = inner.keeps_read_sets

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        """Read what the inner policy reads, in a commit the recent frames of it."""
        context = self.inner.select(layer, pass_, q)
        if context.holds == "block":
            context = replace(context, holds="kind")
        if pass_.kind != "commit":
            return context
        groups = tuple(replace(group, reads=self._recent(group.reads, pass_)) for group in context.groups)
        return replace(context, reads=self._recent(context.reads, pass_), groups=groups)

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.inner.commit(layer, pass_, q, k, v)

    def end_block(self, trace: BlockTrace) -> list[EncodeJob]:
        return self.inner.end_block(trace)

    def stats(self) -> CacheStats:
        return self.inner.stats()

    def state_dict(self) -> dict[str, Tensor | Number]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def _recent(self, reads: tuple[Read, ...], pass_: Pass) -> tuple[Read, ...]:
        oldest = pass_.start_frame - self.policy.num_recent_frames
        kept: list[Read] = []
        for read in reads:
            if isinstance(read.positions, Tensor) or len(read.frames) != len(read.positions):
                kept += [read] if read.role == "recent" and self.policy.num_recent_frames else []
                continue
            size = read.stored.num_tokens // len(read.frames)
            wanted = [index for index, frame in enumerate(read.frames) if frame >= oldest]
            if len(wanted) == len(read.frames):
                kept.append(read)
                continue
            kept += [_frame_of(read, index, size) for index in wanted]
        return tuple(kept)


def _frame_of(read: Read, index: int, size: int) -> Read:
    """One whole frame of a read."""
    places = slice(index * size, (index + 1) * size)
    return replace(
        read,
        stored=_Part(read.stored, places.start, places.stop),
        positions=read.positions[index : index + 1],
        frames=read.frames[index : index + 1],
        bias=None if read.bias is None else read.bias[..., places],
    )
