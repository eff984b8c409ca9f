"""The contract of a cache policy: what a pass reads, what a commit keeps.

Counts are latent frames. Keys are stored un-rotated and get their temporal positions when they are read, so a policy
speaks of positions only in ``select``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin

from torch import Tensor

from longtake.cache.storage import Geometry, Stored

Number = int | float | str | bool | None
Event = Literal["keep", "recache", "flush", "cut"]  # effect of a change of prompt on the cache


@dataclass(frozen=True)
class Pass:
    """One forward of some frames through the transformer."""

    # ``denoise`` never changes storage; ``commit`` stores what it produced; ``encode`` is a forward that a policy
    # asked for with an ``EncodeJob``, and stores it too
    kind: Literal["denoise", "commit", "encode"]
    block_index: int  # which block of the rollout, from 0; the block before it for an ``encode``
    start_frame: int  # first latent frame of the pass
    num_frames: int
    step_index: int = 0  # denoising step, from 0; 0 in a commit
    label: str = ""  # the ``EncodeJob``'s
    grid: tuple[int, int] | None = None  # (rows, columns) of tokens per frame, where they differ from the rollout's


@dataclass(frozen=True)
class Read:
    """Stored tokens that a pass attends to."""

    stored: Stored  # ``keys`` and ``values``, both (batch, tokens, heads, head_dim), keys un-rotated
    # Temporal position of each whole frame, or (tokens, 3) or (batch, tokens, 3) float64 coordinates (frame, row,
    # column) of every token
    positions: tuple[float, ...] | Tensor
    frames: tuple[int, ...] = ()  # frames of the video that the tokens come from, for tools that show what is read
    role: str = "recent"  # sink, recent, mid, memory, ...
    # Added to the tokens' scores: (tokens,) or (batch, heads, tokens). The logarithm of how many tokens one stands
    # for, say.
    bias: Tensor | None = None

    @classmethod
    def of_frames(cls, stored: Stored, frames: range, role: str, *, shift: int = 0) -> "Read":
        """Consecutive whole frames, at their own positions or so many behind them."""
        return cls(stored, tuple(float(frame + shift) for frame in frames), tuple(frames), role)


@dataclass(frozen=True)
class HeadGroup:
    """Reads of some heads of a layer, where heads differ."""

    heads: tuple[int, ...]
    reads: tuple[Read, ...]  # of these heads alone: (batch, tokens, len(heads), head_dim)
    capacity: int = 0  # as of ``Context``


@dataclass(frozen=True)
class Context:
    """Everything that a pass attends to beside itself."""

    reads: tuple[Read, ...]  # in the order in which they are laid out
    # Temporal position of each frame of the pass itself, or its tokens' coordinates as in ``Read``
    query_positions: tuple[float, ...] | Tensor
    # ``block``: all passes of the block read the same; ``kind``: all its denoising passes do, and its commit reads
    # something else; ``pass``: ask again at the next pass
    holds: Literal["block", "kind", "pass"] = "block"
    capacity: int = 0  # most tokens that ``reads`` can ever have, so that buffers are allocated once; 0: unbounded
    # The pass attends to this many of its own last frames only; None: to all of them
    num_own_frames: int | None = None
    groups: tuple[HeadGroup, ...] = ()  # reads by heads, in the place of ``reads``; every head is in exactly one group


@dataclass(frozen=True)
class CacheStats:
    """Contents of a cache."""

    tokens: Mapping[str, int]  # stored tokens per layer and sample, by role (sink, mid, recent, memory)
    bytes: Mapping[str, int]  # stored bytes over layers and batch, by role
    # Lowest and highest temporal position of the last read, or None before the first
    positions: tuple[float, float] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens.values())

    @property
    def num_bytes(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class BlockTrace:
    """A block that has been denoised and committed, as ``end_block`` sees it."""

    block_index: int
    start_frame: int
    latents: Tensor  # (batch, frames, channels, height, width), clean
    # What the next block's prompt does to the cache: ``keep`` unless it is a new prompt that asks for more
    event: Event = "keep"


@dataclass(frozen=True)
class EncodeJob:
    """A forward that only fills cache entries: its passes have the kind ``encode``, and ``commit`` stores them.

    It runs under the prompt of the next block, sees what ``select`` says, and its output is dropped.
    """

    latents: Tensor  # (batch, frames, channels, height, width), fed at ``timestep``
    start_frame: int  # first latent frame of the job
    timestep: float | None = 0.0  # network timestep, 0 to 1000; None: that of the rollout's commit passes
    label: str = ""  # comes back in the pass, so that a policy knows its jobs
    # Decode the latents, average over (frames, rows, columns) of pixels, and encode the smaller clip again before it
    # is fed. Needs a VAE.
    pooling: tuple[int, int, int] | None = None
    # (batch, channels, frames, rows, columns) added to the patch embedding of the latents
    tokens: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Properties of a policy that decide what it can be combined with."""

    # Denoising passes may span several blocks that are committed one by one, as samplers with a joint window make them
    takes_windows: bool = False
    needs_vae: bool = False  # a rollout has to have a VAE, for jobs with ``pooling``
    # It works with something trained or measured for a model: a compressor, a map of heads
    needs_weights: bool = False
    weighs_tokens: bool = False  # reads have a bias, which sparse attention does not take
    # Heads of a layer read different tokens, which sparse attention over all heads does not take
    splits_heads: bool = False
    breaks_frames: bool = False  # reads hold tokens that are no frame's: chosen, averaged or compressed ones


@dataclass(frozen=True, kw_only=True)
class CachePolicy(ABC):
    """Validated settings of a policy; ``start`` makes the state of one rollout."""

    name: ClassVar[str]  # key in YAML and on the command line
    source: ClassVar[str]  # paper or repository
    events: ClassVar[frozenset[Event]] = frozenset({"keep"})  # what a change of prompt may do to its cache
    traits: ClassVar[Traits] = Traits()  # what it can be combined with; a property where that depends on settings
    published_block: ClassVar[int] = 3  # latent frames per block that the source's sizes are meant for
    published_window: ClassVar[int] = 1  # blocks that the source denoises together

    def __post_init__(self) -> None:
        for field in fields(self):
            value, known = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in known:
                raise ValueError(f"{field.name}={value!r} is unknown: use {' or '.join(map(repr, known))}.")

    def at_least(self, least: int, *names: str, note: str = "") -> None:
        """Refuse fields below a limit; the error ends with the note."""
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more{note}.")

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

    def chosen(self, geometry: "Geometry") -> "CachePolicy":
        """The policy that a rollout runs: itself, unless it is a budget, which chooses one or refuses."""
        return self

    def settings(self) -> dict[str, Any]:
        return {"policy": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}


def check_room(num_context_frames: int, needed: int, what: str, *, remedy: str = "") -> None:
    """Refuse a context of fewer frames than ``needed``; the error says what has to fit into it, and the remedies."""
    if num_context_frames < needed:
        raise ValueError(
            f"num_context_frames={num_context_frames} leaves no room for {what}: use {needed} or more{remedy}."
        )


class PolicyState(ABC):
    """State of one rollout: four methods, and a state that can be saved."""

    # Whether a block's commit may share one forward with the next block's first denoising pass. A policy that works on
    # whole blocks in ``end_block`` sets it False.
    merges_commit: bool = True
    # Whether the assembled read sets of all layers stay in memory over a block's passes. Where tokens are encoded or
    # far away, that would undo what it saves, and their wrapper sets it False.
    keeps_read_sets: bool = True

    @abstractmethod
    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        """Say which stored tokens a pass reads, at which positions. Changes nothing that is stored.

        Args:
            layer: Self-attention layer.
            pass_: The pass that asks.
            q: Its un-rotated queries, (batch, frames * tokens_per_frame, heads, head_dim); None when a tool asks.
        """

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
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: If the saved shapes are not this rollout's.
        """
