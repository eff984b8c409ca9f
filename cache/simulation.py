"""Simulation of a policy without a model: a rollout's passes are played on made-up or meta tensors.

Made-up keys change slowly from frame to frame, as a scene does, so that policies that choose by similarity have
something to choose by. On the meta device only sizes are known, and nothing is computed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from longtake.cache.base import (
    BlockTrace,
    CachePolicy,
    CacheStats,
    Context,
    EncodeJob,
    Event,
    Geometry,
    Pass,
    PolicyState,
    Read,
)

_PATCH = 2  # latent rows and columns per token
_SIMILARITY = 0.9  # correlation of neighbouring frames' made-up keys
_Observer = Callable[[int, Pass, Context], None]


@dataclass(frozen=True)
class Span:
    """Stored tokens of one role that a pass reads."""

    role: str  # sink, recent, mid, memory, ...
    frames: tuple[int, ...]  # frames of the video that they come from
    # One temporal position per entry of ``frames``, or, where tokens do not stand at whole frames, the distinct
    # positions in use, ascending; empty on the meta device
    positions: tuple[float, ...]
    # Tokens of each entry of ``frames``, 1 for a whole frame; 0 where all its tokens are gone
    shares: tuple[float, ...]
    num_tokens: int = 0  # per sample, in heads that read them
    heads: tuple[int, ...] | None = None  # which heads read them; None: all

    @property
    def share(self) -> float:
        return sum(self.shares) / len(self.shares) if self.shares else 0.0


@dataclass(frozen=True)
class PassRecord:
    """Reads of one pass; spans and positions are those of one layer."""

    pass_: Pass
    spans: tuple[Span, ...]  # in the order in which they are laid out
    # Temporal positions of the pass's own frames; distinct ones where tokens have coordinates
    query_positions: tuple[float, ...]
    num_tokens: float  # stored tokens read, mean over layers and heads
    is_bounded: bool  # whether the policy says how many that can become


@dataclass(frozen=True)
class SimulatedBlock:
    """One block of a simulated rollout."""

    index: int  # from 0
    start_frame: int
    num_frames: int
    event: Event  # what the change of prompt before this block did to the cache; ``keep`` when there was none
    denoise: PassRecord  # its first denoising pass
    commit: PassRecord | None  # its commit pass, where that reads something else; else None
    jobs: tuple[PassRecord, ...]  # encode passes that followed the commit
    stats: CacheStats  # what is stored after the block
    # The policy's state, live: of the last block that was played
    state: PolicyState = field(repr=False, compare=False)


def simulate(
    policy: CachePolicy,
    geometry: Geometry,
    num_blocks: int,
    *,
    events: Mapping[int, Event] | None = None,
    window_blocks: int = 1,
    latent_channels: int = 16,
    layer: int = -1,
    observe: _Observer | None = None,
) -> Iterator[SimulatedBlock]:
    """Play a rollout block by block as the model would: select, commit, end of block, encode jobs.

    Args:
        policy: What to keep and read.
        geometry: Shapes; ``device`` meta for sizes alone.
        num_blocks: Blocks to play.
        events: What a change of prompt at the start of a block does, by block index, from 1.
        window_blocks: Blocks that a denoising pass spans, as samplers with a joint window have it.
        latent_channels: Of the latents that the policy is shown; Wan2.1's unless given.
        layer: Layer whose reads are noted; from the last one backwards if negative.
        observe: Called with every layer, pass and context that the policy selects.
    """
    events = dict(events or {})
    for index, event in events.items():
        if event not in policy.events:
            known = ", ".join(sorted(policy.events))
            raise ValueError(f"cache policy {policy.name!r} does not know the event {event!r}; known: {known}.")
        if not 1 <= index < num_blocks:
            raise ValueError(f"event {event!r} at block {index}: there are blocks 1 to {num_blocks - 1} to change at.")
    player = _Player(policy.start(geometry), geometry, layer, observe)
    size = geometry.frames_per_block
    for index in range(num_blocks):
        start = index * size
        qkv = player.made_up(start, size)
        window = [qkv[0].repeat(1, window_blocks, 1, 1)]
        denoise, holds = player.select(Pass("denoise", index, start, size * window_blocks), window)
        committing = Pass("commit", index, start, size)
        commit = None if holds == "block" else player.select(committing, qkv)[0]
        for at in range(geometry.num_layers):
            player.state.commit(at, committing, *qkv)
        trace = BlockTrace(index, start, player.latents(size, latent_channels), events.get(index + 1, "keep"))
        jobs = tuple(player.encode(job, index) for job in player.state.end_block(trace))
        event = events.get(index, "keep")
        yield SimulatedBlock(index, start, size, event, denoise, commit, jobs, player.state.stats(), player.state)


class _Player:
    """Made-up tensors, and passes played with them."""

    def __init__(self, state: PolicyState, geometry: Geometry, layer: int, observe: _Observer | None) -> None:
        self.state, self.geometry, self.layer, self.observe = state, geometry, layer, observe
        self._generator = torch.Generator().manual_seed(0)
        self._scene: Tensor | None = None

    def made_up(self, start_frame: int, num_frames: int, grid: tuple[int, int] | None = None) -> list[Tensor]:
        """Queries, keys and values, each (batch, frames * tokens, heads, head_dim), the same for all layers."""
        g = self.geometry
        rows, columns = grid or (g.num_rows, g.num_columns)
        shape = (3, g.batch_size, rows * columns, g.num_heads, g.head_dim)
        if g.device.type == "meta":
            return list(torch.empty((3, shape[1], num_frames * shape[2], *shape[3:]), dtype=g.dtype, device="meta"))
        frames = []
        for _ in range(num_frames):
            noise = torch.randn(shape, generator=self._generator)
            if self._scene is None or self._scene.shape != shape:
                self._scene = noise
            self._scene = _SIMILARITY * self._scene + (1 - _SIMILARITY**2) ** 0.5 * noise
            frames.append(self._scene)
        return list(torch.cat(frames, dim=2).to(g.device, g.dtype))

    def latents(self, num_frames: int, num_channels: int) -> Tensor:
        """(batch, frames, channels, height, width)."""
        g = self.geometry
        shape = (g.batch_size, num_frames, num_channels, _PATCH * g.num_rows, _PATCH * g.num_columns)
        return torch.zeros(shape, device=g.device)

    def select(self, pass_: Pass, qkv: list[Tensor]) -> tuple[PassRecord, str]:
        """Ask every layer; returns one layer's answer, and for how long it holds."""
        contexts = [self._select(layer, pass_, qkv[0]) for layer in range(self.geometry.num_layers)]
        return self._record(pass_, contexts), contexts[self.layer].holds

    def encode(self, job: EncodeJob, block_index: int) -> PassRecord:
        num_frames, grid = job_shape(job, self.geometry)
        pass_ = Pass("encode", block_index, job.start_frame, num_frames, label=job.label, grid=grid)
        qkv = self.made_up(job.start_frame, num_frames, grid)
        contexts = []
        for layer in range(self.geometry.num_layers):
            contexts.append(self._select(layer, pass_, qkv[0]))
            self.state.commit(layer, pass_, *qkv)
        return self._record(pass_, contexts)

    def _select(self, layer: int, pass_: Pass, q: Tensor) -> Context:
        context = self.state.select(layer, pass_, q)
        if self.observe is not None:
            self.observe(layer, pass_, context)
        return context

    def _record(self, pass_: Pass, contexts: Sequence[Context]) -> PassRecord:
        geometry = self.geometry
        noted = contexts[self.layer]
        spans = [span for span, _ in _spans(noted, geometry)]
        num_tokens = sum(span.num_tokens * part for context in contexts for span, part in _spans(context, geometry))
        capacities = [group.capacity for group in noted.groups] or [noted.capacity]
        return PassRecord(
            pass_,
            tuple(spans),
            _located(noted.query_positions)[0],
            num_tokens / len(contexts),
            is_bounded=all(capacities),
        )


def job_shape(job: EncodeJob, geometry: Geometry) -> tuple[int, tuple[int, int] | None]:
    """Frames of a job's pass, and its token grid where that is not the rollout's.

    Averaging over t pixel frames leaves one latent frame in t, at least one; rows and columns that do not fill a
    patch are cropped.
    """
    num_frames, height, width = job.latents.shape[1], *job.latents.shape[-2:]
    if job.tokens is not None:
        num_frames, rows, columns = job.tokens.shape[-3:]
    elif job.pooling is not None:
        num_frames = max(1, num_frames // job.pooling[0])
        rows, columns = (size // pool // _PATCH for size, pool in zip((height, width), job.pooling[1:], strict=True))
    else:
        rows, columns = height // _PATCH, width // _PATCH
    grid = (rows, columns)
    return num_frames, None if grid == (geometry.num_rows, geometry.num_columns) else grid


def _spans(context: Context, geometry: Geometry) -> Iterator[tuple[Span, float]]:
    """Spans that a layer reads, each with the share of the heads that read it."""
    for read in context.reads:
        yield _span(read, geometry.tokens_per_frame), 1.0
    for group in context.groups:
        for read in group.reads:
            span = replace(_span(read, geometry.tokens_per_frame), heads=group.heads)
            yield span, len(group.heads) / geometry.num_heads


def _span(read: Read, tokens_per_frame: int) -> Span:
    num_tokens, frames = read.stored.num_tokens, read.frames
    positions, counts = _located(read.positions)
    shares = (num_tokens / (tokens_per_frame * len(frames)),) * len(frames) if frames else ()
    if counts and len(counts) == len(frames):
        shares = tuple(count / tokens_per_frame for count in counts)
    elif counts and not _are_groups(frames, positions) and set(positions) <= set(map(float, frames)):
        own = dict(zip(positions, counts, strict=True))
        shares = tuple(own.get(float(frame), 0) / tokens_per_frame for frame in frames)
    return Span(read.role, frames, positions, shares, num_tokens)


def _are_groups(frames: tuple[int, ...], positions: tuple[float, ...]) -> bool:
    """Tell whether each position is the middle of several frames, as those of averages are."""
    size, rest = divmod(len(frames), len(positions))
    if size < 2 or rest:
        return False
    return positions == tuple(sum(frames[i : i + size]) / size for i in range(0, len(frames), size))


def _located(positions: tuple[float, ...] | Tensor) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Positions of whole frames as they are; of tokens the distinct ones of the first sample, and tokens at each.

    On the meta device tokens have none.
    """
    if not isinstance(positions, Tensor):
        return tuple(positions), ()
    if positions.device.type == "meta":
        return (), ()
    times, counts = (positions if positions.ndim == 2 else positions[0])[:, 0].unique(return_counts=True)
    return tuple(times.tolist()), tuple(counts.tolist())
