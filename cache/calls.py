"""What the cache says of an attention call to attention that leaves some of it out."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from longtake.cache.base import Pass, Read


@dataclass(frozen=True)
class Run:
    """Tokens of a read set that were read together.

    Attributes:
        num_tokens: How many.
        frames: Frames of the video that they come from; as of ``Read``.
        positions: Temporal position of each whole frame; empty where every token has coordinates of its own.
        role: sink, recent, mid, memory, ...
    """

    num_tokens: int
    frames: tuple[int, ...]
    positions: tuple[float, ...]
    role: str

    @classmethod
    def of(cls, read: Read) -> "Run":
        """The run of one read."""
        positions = () if isinstance(read.positions, Tensor) else read.positions
        return cls(read.stored.num_tokens, read.frames, positions, read.role)


@dataclass(frozen=True)
class Call:
    """One attention call: queries of a pass over ``runs`` and the pass's own tokens behind them.

    Attributes:
        layer: Self-attention layer, from 0.
        pass_: What the forward is.
        runs: What is read of the cache, in the order of the keys.
        query_positions: Temporal position of each frame of the pass.
        heads: The heads at hand, where heads read different things.
    """

    layer: int
    pass_: Pass
    runs: tuple[Run, ...]
    query_positions: tuple[float, ...]
    heads: tuple[int, ...] | None = None


class SparseAttention(Protocol):
    """Attention of one rollout's cache that may leave blocks of keys out."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call, bias: Tensor | None) -> Tensor:
        """Attend.

        Args:
            q: (batch, frames * tokens_per_frame, heads, head_dim), rotated.
            k: (batch, keys, heads, head_dim), rotated: the runs, then the pass's own tokens.
            v: As ``k``.
            call: What they are.
            bias: (batch, heads, 1, keys), added to the scores, or None.

        Returns:
            Same shape as ``q``.
        """
