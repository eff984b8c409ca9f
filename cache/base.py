"""The contract of a cache policy: what a pass reads, what a commit keeps.

Counts are latent frames. Keys are stored un-rotated and get their temporal positions when they are read, so a policy
speaks of positions only in ``select``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Number = int | float | str | bool | None


@dataclass(frozen=True)
class Geometry:
    """Shapes of one rollout.

    Attributes:
        num_layers: Self-attention layers of the transformer.
        num_heads: Heads per layer.
        head_dim: Channels per head.
        num_rows: Token rows per latent frame.
        num_columns: Token columns per latent frame.
        frames_per_block: Latent frames denoised together.
        batch_size: Videos rolled out together.
        max_frames: Length of the rollout, when it is known.
        dtype: Of the stored keys and values.
        device: Of the stored keys and values.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    num_rows: int
    num_columns: int
    frames_per_block: int
    batch_size: int = 1
    max_frames: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.num_rows * self.num_columns

    @property
    def bytes_per_frame(self) -> int:
        """Bytes of one frame's keys and values over all layers and the batch."""
        channels = self.num_heads * self.head_dim
        return 2 * self.num_layers * self.batch_size * self.tokens_per_frame * channels * self.dtype.itemsize


@dataclass(frozen=True)
class Pass:
    """One forward of some frames through the transformer.

    Attributes:
        kind: ``denoise`` never changes storage; ``commit`` stores what it produced.
        block_index: Which block of the rollout, from 0.
        start_frame: First latent frame of the pass.
        num_frames: Latent frames of the pass.
        step_index: Denoising step, from 0; 0 in a commit.
    """

    kind: Literal["denoise", "commit"]
    block_index: int
    start_frame: int
    num_frames: int
    step_index: int = 0


@dataclass(frozen=True)
class Read:
    """Stored tokens that a pass attends to.

    Attributes:
        keys: (batch, frames * tokens_per_frame, heads, head_dim), un-rotated.
        values: Same shape.
        positions: Temporal position of each frame.
    """

    keys: Tensor
    values: Tensor
    positions: tuple[float, ...]


@dataclass(frozen=True)
class Context:
    """What a pass attends to beside itself.

    Attributes:
        reads: In the order in which they are laid out.
        query_positions: Temporal position of each frame of the pass itself.
        holds: ``block``: all passes of the block read the same; ``pass``: ask again at the next pass.
        capacity: Most tokens that ``reads`` can ever have, so that buffers are allocated once; 0: unbounded.
    """

    reads: tuple[Read, ...]
    query_positions: tuple[float, ...]
    holds: Literal["block", "pass"] = "block"
    capacity: int = 0


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds now.

    Attributes:
        tokens: Stored tokens per layer and sample, by role (sink, mid, recent, memory).
        bytes: Stored bytes over layers and batch, by role.
        positions: Lowest and highest temporal position of the last read, or None before the first.
    """

    tokens: Mapping[str, int]
    bytes: Mapping[str, int]
    positions: tuple[float, float] | None = None

    @property
    def num_tokens(self) -> int:
        """Stored tokens per layer and sample."""
        return sum(self.tokens.values())

    @property
    def num_bytes(self) -> int:
        """Stored bytes over layers and batch."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class BlockTrace:
    """A block that has been denoised and committed, as ``end_block`` sees it."""

    block_index: int
    start_frame: int
    latents: Tensor


@dataclass(frozen=True)
class EncodeJob:
    """A forward that only fills cache entries.

    Attributes:
        latents: (batch, frames, channels, height, width), fed at ``timestep``.
        start_frame: First latent frame of the job.
        timestep: Network timestep, 0 to 1000.
    """

    latents: Tensor
    start_frame: int
    timestep: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CachePolicy(ABC):
    """Validated settings of a policy; ``start`` makes the state of one rollout.

    Class attributes:
        name: Key in YAML and on the command line.
        source: Paper or repository.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    @abstractmethod
    def start(self, geometry: Geometry) -> "PolicyState":
        """Make the empty state of one rollout.

        Raises:
            ValueError: If the settings leave no room for ``geometry.frames_per_block``.
        """

    @abstractmethod
    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """Refuse a block size or a length that the settings leave no room for, before any work.

        Args:
            frames_per_block: Latent frames denoised together.
            num_frames: Latent frames of the whole rollout, when known.

        Raises:
            ValueError: With the value, the limit and the remedy.
        """

    def settings(self) -> dict[str, Any]:
        """The policy as its YAML mapping: name and fields."""
        return {"policy": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}


class PolicyState(ABC):
    """What one rollout keeps. Four methods, and a state that can be saved.

    Class attributes:
        merges_commit: Whether a block's commit may share one forward with the next block's first denoising pass.
            A policy that works on whole blocks in ``end_block`` sets it False.
    """

    merges_commit: ClassVar[bool] = True

    @abstractmethod
    def select(self, layer: int, pass_: Pass) -> Context:
        """Say which stored tokens a pass reads, at which positions. Changes nothing."""

    @abstractmethod
    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Store what a commit pass produced.

        Args:
            layer: Self-attention layer.
            pass_: The commit pass.
            q: (batch, frames * tokens_per_frame, heads, head_dim), un-rotated queries.
            k: Same shape, un-rotated keys.
            v: Same shape, values.
        """

    def end_block(self, trace: BlockTrace) -> list[EncodeJob]:
        """Move, merge, compress or evict once a block is committed in all layers."""
        return []

    @abstractmethod
    def stats(self) -> CacheStats:
        """Tokens and bytes by role and the position range in use."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor | Number]:
        """Everything a continuation needs; tensors and plain numbers only."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor | Number]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: If the saved shapes are not this rollout's.
        """
