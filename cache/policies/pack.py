"""Sinks in full, the middle compressed and chosen from, the last frames in full."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from longtake.cache.base import (
    BlockTrace,
    CachePolicy,
    CacheStats,
    Context,
    EncodeJob,
    Geometry,
    Number,
    Pass,
    PolicyState,
    Read,
    Traits,
)
from longtake.cache.frames import FrameStore
from longtake.cache.storage import Stored, take_tokens
from longtake.rope import cell_centres, cell_coordinates, pack_backward

T = TypeVar("T", bound=Hashable)


class Block(NamedTuple):
    """A committed block of the video."""

    start: int
    num_frames: int

    @property
    def frames(self) -> range:
        """Its latent frames."""
        return range(self.start, self.start + self.num_frames)


@dataclass(frozen=True)
class Partitions:
    """Blocks by what has become of them, each tuple in time order.

    Attributes:
        sinks: First blocks, in full for ever.
        mids: Archived blocks, which are kept in small only.
        recents: Last blocks, in full; their small versions are ready and wait.
    """

    sinks: tuple[Block, ...] = ()
    mids: tuple[Block, ...] = ()
    recents: tuple[Block, ...] = ()

    def advance(
        self, block: Block, *, num_sink_frames: int, num_recent_frames: int, num_archive_blocks: int, block_size: int
    ) -> "Partitions":
        """Take a new block in: a sink while sinks are wanted, else recent; the oldest recents move to the archive.

        Blocks stay whole, so that counts of frames are rounded up. The archive is first in, first out. Its places
        are equal, so a first block of another size than the rest is not archived.
        """
        if block.start < num_sink_frames:
            return Partitions((*self.sinks, block), self.mids, self.recents)
        mids, recents = self.mids, (*self.recents, block)
        while recents and sum(b.num_frames for b in recents[1:]) >= num_recent_frames:
            oldest, *rest = recents
            recents = tuple(rest)
            mids += (oldest,) if oldest.num_frames == block_size else ()
        return Partitions(self.sinks, mids[max(len(mids) - num_archive_blocks, 0) :], recents)

    def without(self, start: int) -> "Partitions":
        """The same but for the block that starts at ``start``."""
        kept = ([b for b in part if b.start != start] for part in (self.sinks, self.mids, self.recents))
        return Partitions(*map(tuple, kept))

    def full_frames(self) -> list[int]:
        """Frames that are kept in full."""
        return [frame for block in (*self.sinks, *self.recents) for frame in block.frames]

    def small_blocks(self, block_size: int) -> list[int]:
        """First frames of the blocks that are kept in small: archived, or recent and to be archived."""
        return [b.start for b in (*self.mids, *self.recents) if b.num_frames == block_size]


def hand_over(places: Mapping[T, int], before: Iterable[T], after: Iterable[T], num_places: int) -> dict[T, int]:
    """Give what is new a place that no one needs any more.

    Layers commit one after the other: those that have not yet still find everything of ``before``.

    Args:
        places: Of all in ``before``, and perhaps of others.
        before: Who is kept now.
        after: Who is to be kept.
        num_places: How many there are.

    Returns:
        Places of all in ``before`` and ``after``; one that is let go may share its place with one that is new.
    """
    kept = {item: places[item] for item in before}
    after = list(after)
    taken = {kept[item] for item in after if item in kept}
    free = iter([place for place in range(num_places) if place not in taken])
    return kept | {item: next(free) for item in after if item not in kept}


PUBLISHED_CHANNELS = (32, 128, 512, 2048)


def cell_factors(size: tuple[int, int, int], cell: tuple[int, int, int]) -> tuple[int, int, int]:
    """How many frames, rows and columns of tokens become one.

    A row or column factor is halved while fewer than two cells would fit, so that a small grid keeps a picture: 4x4
    tokens become 2x2, where 30x52 become 7x13.

    Args:
        size: Frames, rows and columns of a block's tokens.
        cell: Factors wanted.
    """
    factors = [cell[0]]
    for extent, factor in zip(size[1:], cell[1:], strict=True):
        while factor > 1 and extent // factor < 2:
            factor //= 2
        factors.append(max(factor, 1))
    return tuple(factors)


def num_cells(size: tuple[int, int, int], cell: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, rows and columns of a compressed block, rounded down and at least 1: a block of 3 frames becomes 1."""
    return tuple(max(1, extent // factor) for extent, factor in zip(size, cell_factors(size, cell), strict=True))


def pool_tokens(x: Tensor, size: tuple[int, int, int], cells: tuple[int, int, int]) -> Tensor:
    """Means of equal cells; where a size is no multiple, neighbouring cells share tokens, and none is left out.

    Args:
        x: (batch, frames * rows * columns, heads, head_dim), un-rotated: rotated keys would cancel.
        size: Frames, rows, columns.
        cells: Frames, rows, columns afterwards.

    Returns:
        (batch, cells, heads, head_dim), dtype of ``x``; the means are float32.
    """
    grid = x.flatten(2).transpose(1, 2).unflatten(2, size).float()
    pooled = functional.adaptive_avg_pool3d(grid, cells).flatten(2).transpose(1, 2)
    return pooled.to(x.dtype).unflatten(2, x.shape[2:])


class LatentCompressor(nn.Module):
    """The network of PackForcing's high-resolution branch: strided 3-D convolutions of a block's clean latents.

    Four stages with SiLU between them, a 1x1x1 projection to the transformer's width. The first stage halves time,
    the others rows and columns, each axis only while it stays as large as the grid wanted; what is then still too
    large is averaged (60 rows become 30, 15, 8, and 7). So one set of kernels serves any geometry. Kernels are 3x3x3,
    then 1x3x3: the published figure does not give them. The projection starts at zero.

    Args:
        in_channels: Of the latents.
        width: Of the transformer.
        channels: Of the stages; the published ones by default.

    Source: PackForcing, arXiv:2603.25730.
    """

    def __init__(self, in_channels: int, width: int, channels: tuple[int, ...] = PUBLISHED_CHANNELS) -> None:
        super().__init__()
        sizes = [in_channels, *channels]
        kernels = [(3, 3, 3), *[(1, 3, 3)] * (len(channels) - 1)]
        stages = (nn.Conv3d(*sizes[i : i + 2], kernel) for i, kernel in enumerate(kernels))
        self.stages = nn.ModuleList(stages)
        self.projection = nn.Conv3d(channels[-1], width, 1)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, latents: Tensor, cells: tuple[int, int, int]) -> Tensor:
        """Compress a block.

        Args:
            latents: (batch, frames, channels, height, width), clean.
            cells: Frames, rows and columns wanted.

        Returns:
            (batch, width, *cells).
        """
        x = latents.transpose(1, 2).to(self.projection.weight)
        for index, stage in enumerate(self.stages):
            axes = (0,) if index == 0 else (1, 2)
            stride = [2 if axis in axes and x.shape[2 + axis] >= 2 * cells[axis] else 1 for axis in range(3)]
            padding = [kernel // 2 for kernel in stage.kernel_size]
            x = functional.silu(functional.conv3d(x, stage.weight, stage.bias, stride=stride, padding=padding))
        return self.projection(functional.adaptive_avg_pool3d(x, cells))


def load_compressor(weights: str, kind: str, device: torch.device) -> LatentCompressor:
    """Read trained weights; the sizes of the network are theirs.

    Args:
        weights: Name of a bundled model, or a .safetensors file.
        kind: Which of a bundled model's: ``hr`` stands alone, ``hr+lr`` is added to the other branch; so far both
            are one file, trained as ``hr+lr``.
        device: Where it will run.

    Raises:
        ValueError: If there is no such model or file, or it holds something else.
    """
    path = Path(weights)
    if path.suffix != ".safetensors":
        path = Path(str(files("longtake.models"))) / weights / "compressor" / f"{kind}.safetensors"
    if not path.is_file():
        raise ValueError(
            f"compressor_weights={weights!r}: {path} does not exist; give the name of a bundled model that has a "
            "compressor (mini), or a .safetensors file of scripts/train_compressor.py."
        )
    try:
        state = load_file(path)
        network = _shaped_like(state)
        network.load_state_dict({name: value.float() for name, value in state.items()})
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"compressor_weights={weights!r}: {path} holds no compressor ({error}).") from error
    return network.eval().requires_grad_(False).to(device)


def _shaped_like(state: Mapping[str, Tensor]) -> LatentCompressor:
    num_stages = sum(name.startswith("stages.") and name.endswith(".weight") for name in state)
    kernels = [state[f"stages.{index}.weight"] for index in range(num_stages)]
    channels = tuple(kernel.shape[0] for kernel in kernels)
    return LatentCompressor(kernels[0].shape[1], state["projection.weight"].shape[0], channels)


MIN_SCORED_QUERIES = 32
SCORED_QUERIES_IN = 8  # one query in so many is scored by softmax mass; PackForcing-Unofficial's share


@dataclass(frozen=True)
class _PickedTokens:
    """Some tokens of others, a different choice for each sample, in the memory that reads them."""

    source: Stored
    index: Tensor
    device: torch.device

    @property
    def num_tokens(self) -> int:
        """How many, per sample."""
        return self.index.shape[-1]

    @property
    def keys(self) -> Tensor:
        """(batch, tokens, heads, head_dim), un-rotated."""
        return self._pick(self.source.keys)

    @property
    def values(self) -> Tensor:
        """(batch, tokens, heads, head_dim)."""
        return self._pick(self.source.values)

    def _pick(self, tensor: Tensor) -> Tensor:
        return take_tokens(tensor, self.index.to(tensor.device)).to(self.device, non_blocking=True)


class _Bank:
    """Un-rotated keys and values of blocks of ``block_tokens``, first in first out, and the sums of their keys.

    Args:
        geometry: Shapes of the rollout.
        num_places: Blocks to make room for.
        block_tokens: Tokens of a block, per sample.
        on_host: Keep them in host memory, and bring what is chosen to the device once per block. Their key sums
            stay on the device.
    """

    def __init__(self, geometry: Geometry, *, num_places: int, block_tokens: int, on_host: bool = False) -> None:
        self.geometry, self.num_places, self.block_tokens = geometry, num_places, block_tokens
        device = torch.device("cpu") if on_host and geometry.device.type != "meta" else geometry.device
        self.buffer = geometry.storage.buffer(replace(geometry, device=device), num_places * block_tokens)
        self.buffer.is_on_host |= on_host
        self.places: dict[int, int] = {}
        self._key_sums: dict[int, Tensor] = {}

    def hand_over(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Give places to blocks, named by their first frame."""
        self.places = hand_over(self.places, before, after, self.num_places)

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Store a block.

        Raises:
            ValueError: If it has not as many tokens as a place.
        """
        if k.shape[1] != self.block_tokens:
            raise ValueError(
                f"a compressed block has {k.shape[1]} tokens, its place {self.block_tokens}: the pixels were not "
                "pooled as the job asked."
            )
        place = self.places[start]
        self.buffer.write(layer, place * self.block_tokens, k, v)
        self._sums(layer)[:, place] = k.float().sum(1)

    def read(self, layer: int, starts: Sequence[int]) -> list[tuple[list[int], Stored]]:
        """Tokens of known blocks in order, neighbours joined: (first frames, tokens) each."""
        runs: list[list[int]] = []
        for start in starts:
            if runs and self.places[start] == self.places[runs[-1][-1]] + 1:
                runs[-1].append(start)
            else:
                runs.append([start])
        size, here = self.block_tokens, self.geometry.device
        found = []
        for run in runs:
            first = self.places[run[0]]
            stored = self.buffer.read(layer, first * size, (first + len(run)) * size)
            if self.buffer.geometry.device != here:
                stored = _PickedTokens(stored, torch.arange(len(run) * size), here)
            found.append((run, stored))
        return found

    def pick(self, layer: int, starts: Sequence[int], ranks: Tensor) -> Stored:
        """Tokens of the blocks ``starts[ranks]``, ranks (batch, chosen), in that order."""
        first = torch.tensor([self.places[s] * self.block_tokens for s in starts], device=ranks.device)[ranks]
        index = first[..., None] + torch.arange(self.block_tokens, device=ranks.device)
        stored = self.buffer.read(layer, 0, self.num_places * self.block_tokens)
        return _PickedTokens(stored, index.flatten(1), self.geometry.device)

    def query_scores(self, layer: int, starts: Sequence[int], query_sum: Tensor, num_heads: int) -> Tensor:
        """Sum of the products of all queries with all keys of a block, by sums: exact, as products are bilinear.

        Args:
            layer: Self-attention layer.
            starts: Candidates.
            query_sum: (batch, heads, head_dim) float32, un-rotated.
            num_heads: First heads that are scored.

        Returns:
            (batch, candidates), mean over heads. PackForcing's eq. 11 averages over the batch as well; here a video
            does not depend on its neighbours.
        """
        places = torch.tensor([self.places[start] for start in starts], device=query_sum.device)
        keys = self._sums(layer).index_select(1, places)[:, :, :num_heads]
        scale = num_heads * math.sqrt(self.geometry.head_dim)
        return torch.einsum("bhd,bnhd->bn", query_sum[:, :num_heads], keys) / scale

    def softmax_masses(self, layer: int, starts: Sequence[int], q: Tensor, num_heads: int) -> Tensor:
        """Share of attention that each candidate would get if all candidates and nothing else were read.

        Args:
            layer: Self-attention layer.
            starts: Candidates.
            q: (batch, queries, heads, head_dim), un-rotated; an even eighth of them, 32 at least, is scored.
            num_heads: First heads that are scored.

        Returns:
            (batch, candidates), each sample's adding up to 1.
        """
        count = min(max(q.shape[1] // SCORED_QUERIES_IN, MIN_SCORED_QUERIES), q.shape[1])
        sampled = torch.arange(count, device=q.device) * q.shape[1] // count
        queries = q[:, sampled, :num_heads].float()
        ranks = torch.arange(len(starts), device=q.device).expand(q.shape[0], -1)
        keys = self.pick(layer, starts, ranks).keys[:, :, :num_heads].float()
        logits = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / math.sqrt(self.geometry.head_dim)
        return logits.softmax(dim=-1).unflatten(-1, (len(starts), -1)).sum(-1).mean(dim=(1, 2))

    def save(self, layer: int, starts: Sequence[int]) -> dict[str, Tensor]:
        """Blocks in order, as they are encoded, and the sums of their keys."""
        size = self.block_tokens
        parts = [self.buffer.save(layer, self.places[s] * size, (self.places[s] + 1) * size) for s in starts]
        saved = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
        sums = self._sums(layer)
        return saved | {"key_sums": torch.stack([sums[:, self.places[s]] for s in starts], dim=1)}

    def load(self, layer: int, saved: Mapping[str, Any]) -> None:
        """Put saved blocks back, in the first places."""
        self.buffer.load(layer, 0, {name: value for name, value in saved.items() if name != "key_sums"})
        sums = saved["key_sums"].to(self.geometry.device)
        self._sums(layer)[:, : sums.shape[1]] = sums

    def _sums(self, layer: int) -> Tensor:
        if layer not in self._key_sums:
            g = self.geometry
            shape = (g.batch_size, self.num_places, g.num_heads, g.head_dim)
            self._key_sums[layer] = torch.zeros(shape, dtype=torch.float32, device=g.device)
        return self._key_sums[layer]


PARTS = ("sinks", "mids", "recents")
Ranks = tuple[int, ...] | Tensor
"""Chosen candidates in time order: the same for all samples, or (batch, chosen)."""


class _PackState(PolicyState):
    """State of a ``Pack``: blocks by partition, their tokens, and the sums by which the bank is searched.

    Args:
        policy: Settings.
        geometry: Shapes of the rollout.
        network: Of the compressors that have one.
    """

    def __init__(self, policy: "Pack", geometry: Geometry, network: LatentCompressor | None) -> None:
        self.policy, self.geometry, self.network = policy, geometry, network
        self.merges_commit = not policy.is_encoded
        size = geometry.frames_per_block
        num_recents = math.ceil(policy.num_recent_frames / size)
        num_places = policy.num_archive_blocks + max(num_recents, 1)
        if geometry.max_frames is not None:
            num_places = min(num_places, math.ceil(geometry.max_frames / size) + 1)
        self.size = size, geometry.num_rows, geometry.num_columns
        self.cells = policy.cells(geometry)
        self.store = FrameStore(geometry, (math.ceil(policy.num_sink_frames / size) + num_recents) * size)
        self.bank = _Bank(
            geometry,
            num_places=num_places,
            block_tokens=math.prod(self.cells),
            on_host=policy.archive == "host",
        )
        self._slots: dict[int, int] = {}
        self._before, self._after, self._committed = Partitions(), Partitions(), -1
        self._query_sums: dict[int, dict[int, Tensor]] = {}
        self._chosen: dict[int, tuple[int, Tensor]] = {}
        self._coordinates: tuple[tuple, Tensor] | None = None
        self._span: tuple[float, float] | None = None

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        """Read the sinks, the chosen compressed blocks and the recent frames, packed up to the block."""
        if pass_.kind == "encode":
            parts = self._after.without(pass_.start_frame)
        else:
            parts = self._before if pass_.start_frame <= self._committed else self._after
        ranks = self._choose(layer, pass_, parts, q)
        num_chosen = len(ranks) if isinstance(ranks, tuple) else ranks.shape[-1]
        sinks = [frame for block in parts.sinks for frame in block.frames]
        recents = [frame for block in parts.recents for frame in block.frames]
        starts: Sequence[float] = (*map(float, sinks), *[0.0] * num_chosen, *map(float, recents))
        if self.policy.positions == "packed":
            spans = (*[1.0] * len(sinks), *[self._mid_span] * num_chosen, *[1.0] * len(recents))
            starts = pack_backward(spans, float(pass_.start_frame))
        middle = slice(len(sinks), len(sinks) + num_chosen)
        reads = (
            *self._full(layer, sinks, starts[: middle.start], "sink"),
            *self._middle(layer, parts.mids, ranks, starts[middle]),
            *self._full(layer, recents, starts[middle.stop :], "recent"),
        )
        if pass_.kind == "encode":
            own = Block(pass_.start_frame, self.size[0])
            return Context(reads, self._placed((float(own.start),), span=own.num_frames), capacity=self._capacity)
        own = tuple(map(float, range(pass_.start_frame, pass_.start_frame + pass_.num_frames)))
        self._note_span(parts, starts, own)
        return Context(reads, own, capacity=self._capacity)

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Store a block in full, and its compressed version if its keys and values are what that is made of."""
        start = pass_.start_frame
        if pass_.kind == "encode":
            self.bank.write(layer, start, k, v)
            return
        if start != self._committed:
            self._hand_over(Block(start, pass_.num_frames))
        kept = set(self._after.full_frames())
        frames = range(start, start + pass_.num_frames)
        self.store.write(layer, [self._slots[f] if f in kept else -1 for f in frames], k, v)
        sums = self._query_sums.get(layer, {}) | {start: q.float().sum(1)}
        self._query_sums[layer] = {block.start: sums[block.start] for block in self._after.recents}
        if not self.policy.is_encoded and start in self._after.small_blocks(self.size[0]):
            if self.cells != self.size:
                k, v = (pool_tokens(x, self.size, self.cells) for x in (k, v))
            self.bank.write(layer, start, k, v)

    def end_block(self, trace: BlockTrace) -> list[EncodeJob]:
        """Ask for the forward that makes the compressed version of a block that is no sink."""
        if not self.policy.is_encoded or trace.start_frame not in self._after.small_blocks(self.size[0]):
            return []
        latents, tokens, pooling = trace.latents, None, None
        if self.network is not None:
            tokens = self.network(latents, self.cells)
        if self.policy.traits.needs_vae:
            pooling = self.policy.factors(self.geometry)
        else:
            patch = latents.shape[-2] // self.size[1]
            frames, rows, columns = self.cells
            latents = latents.new_zeros(*latents.shape[:1], frames, latents.shape[2], rows * patch, columns * patch)
        return [EncodeJob(latents, trace.start_frame, label="pack", pooling=pooling, tokens=tokens)]

    def stats(self) -> CacheStats:
        """Tokens by role: ``mid`` is what a block reads of the bank, ``archive`` the rest of it."""
        num_small = len(self._after.small_blocks(self.size[0]))
        num_chosen = min(len(self._after.mids), self.policy.num_selected_blocks)
        frame, block = self.geometry.tokens_per_frame, self.bank.block_tokens
        tokens = {
            "sink": sum(b.num_frames for b in self._after.sinks) * frame,
            "mid": num_chosen * block,
            "recent": sum(b.num_frames for b in self._after.recents) * frame,
            "archive": (num_small - num_chosen) * block,
        }
        costs = {role: self.bank.buffer if role in ("mid", "archive") else self.store.buffer for role in tokens}
        kept = {role: count for role, count in tokens.items() if count}
        return CacheStats(kept, {role: n * costs[role].bytes_per_token for role, n in kept.items()}, self._span)

    def state_dict(self) -> dict[str, Tensor | Number]:
        """Blocks by partition, their tokens in time order, sums, and the choice of the block under way."""
        state: dict[str, Tensor | Number] = {"committed": self._committed, "chosen_for": -1}
        for name in PARTS:
            state[name] = torch.tensor(getattr(self._after, name)).long().reshape(-1, 2)
        full, small = self._after.full_frames(), self._after.small_blocks(self.size[0])
        for layer in range(self.geometry.num_layers if self._committed >= 0 else 0):
            saved = {
                "full": self.store.save(layer, [self._slots[frame] for frame in full]) if full else {},
                "bank": self.bank.save(layer, small) if small else {},
                "queries": {str(start): tensor for start, tensor in self._query_sums[layer].items()},
            }
            state |= {f"{g}.{name}.{layer}": x for g, part in saved.items() for name, x in part.items()}
        for layer, (start, ranks) in self._chosen.items():
            state |= {"chosen_for": start, f"chosen.{layer}": ranks}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: If the saved shapes are not this rollout's.
        """
        parts = (tuple(Block(*row) for row in state[name].tolist()) for name in PARTS)
        self._after, self._before, self._committed = Partitions(*parts), Partitions(), int(state["committed"])
        full, small = self._after.full_frames(), self._after.small_blocks(self.size[0])
        if len(small) > self.bank.num_places:
            raise ValueError(
                f"the saved cache holds {len(small)} compressed blocks, this policy {self.bank.num_places}: "
                "resume with the cache settings it was saved with."
            )
        self.store.grow(len(full))
        self._slots = {frame: slot for slot, frame in enumerate(full)}
        self.bank.places = {start: place for place, start in enumerate(small)}
        self._query_sums, self._chosen = {}, {}
        device = self.geometry.device
        for layer in range(self.geometry.num_layers if self._committed >= 0 else 0):
            if full:
                self.store.buffer.load(layer, 0, _part(state, "full", layer))
            if small:
                self.bank.load(layer, _part(state, "bank", layer))
            queries = _part(state, "queries", layer)
            self._query_sums[layer] = {int(start): tensor.to(device) for start, tensor in queries.items()}
        for layer in range(self.geometry.num_layers):
            if f"chosen.{layer}" in state:
                self._chosen[layer] = int(state["chosen_for"]), state[f"chosen.{layer}"].to(device)

    @property
    def _mid_span(self) -> float:
        own = float(self.size[0])
        return own if self.policy.mid_span is None else min(self.policy.mid_span, own)

    @property
    def _capacity(self) -> int:
        chosen = self.policy.num_selected_blocks * self.bank.block_tokens
        return self.store.num_slots * self.geometry.tokens_per_frame + chosen

    def _hand_over(self, block: Block) -> None:
        policy, size = self.policy, self.size[0]
        before, self._committed = self._after, block.start
        self._before = before
        self._after = before.advance(
            block,
            num_sink_frames=policy.num_sink_frames,
            num_recent_frames=policy.num_recent_frames,
            num_archive_blocks=policy.num_archive_blocks,
            block_size=size,
        )
        self.store.grow(len(self._after.full_frames()))
        self._slots = hand_over(self._slots, before.full_frames(), self._after.full_frames(), self.store.num_slots)
        self.bank.hand_over(before.small_blocks(size), self._after.small_blocks(size))

    def _choose(self, layer: int, pass_: Pass, parts: Partitions, q: Tensor | None) -> Ranks:
        """Rank candidates by this block's first queries; later passes of the block keep the choice."""
        policy, starts = self.policy, [block.start for block in parts.mids]
        count = min(policy.num_selected_blocks, len(starts))
        if count == len(starts) or q is None or policy.selection == "recency":
            return tuple(range(len(starts) - count, len(starts)))
        known = self._chosen.get(layer)
        if pass_.kind != "encode" and known is not None and known[0] == pass_.start_frame:
            return known[1]
        num_heads = min(policy.num_scored_heads or q.shape[2], q.shape[2])
        if policy.selection == "softmax_mass":
            scores = self.bank.softmax_masses(layer, starts, q, num_heads)
        else:
            earlier = (self._query_sums[layer][block.start] for block in parts.recents)
            scores = self.bank.query_scores(layer, starts, sum(earlier, q.float().sum(1)), num_heads)
        ranks = scores.topk(count, dim=-1).indices.sort(dim=-1).values
        if pass_.kind != "encode":
            self._chosen[layer] = pass_.start_frame, ranks
        return ranks

    def _full(self, layer: int, frames: Sequence[int], positions: Sequence[float], role: str) -> list[Read]:
        reads, start = [], 0
        for count, stored in self.store.read(layer, [self._slots[frame] for frame in frames]):
            part = slice(start, start + count)
            reads.append(Read(stored, tuple(positions[part]), frames=tuple(frames[part]), role=role))
            start += count
        return reads

    def _middle(self, layer: int, mids: Sequence[Block], ranks: Ranks, starts: Sequence[float]) -> list[Read]:
        """Compressed blocks; where each sample has its own, ``frames`` are the first sample's, or all candidates'."""
        if isinstance(ranks, tuple):
            chosen = [mids[rank] for rank in ranks]
            stored, own = self.bank.read(layer, [block.start for block in chosen]), starts
            if self.policy.positions == "absolute":
                own = [float(block.start) for block in chosen]
            reads, end = [], 0
            for run, tokens in stored:
                start, end = end, end + len(run)
                reads.append(self._read(tokens, own[start:end], chosen[start:end]))
            return reads
        names = [block.start for block in mids]
        if self.policy.positions == "absolute":
            starts = torch.tensor(names, dtype=torch.float64, device=ranks.device)[ranks]
        is_known = ranks.device.type == "cpu"  # asking another device would wait for it
        chosen = [mids[rank] for rank in ranks[0].tolist()] if is_known else mids
        return [self._read(self.bank.pick(layer, names, ranks), starts, chosen)]

    def _read(self, stored: Stored, starts: Sequence[float] | Tensor, blocks: Sequence[Block]) -> Read:
        frames = tuple(frame for block in blocks for frame in block.frames)
        bias = None
        if self.policy.is_count_biased:
            share = math.log(math.prod(self.size) / self.bank.block_tokens)
            bias = torch.full((stored.num_tokens,), share, dtype=self.geometry.dtype, device=self.geometry.device)
        if self.cells == self.size and not isinstance(starts, Tensor):
            centres = cell_centres(self.size[0], self._mid_span)
            return Read(stored, tuple(s + c for s in starts for c in centres), frames=frames, role="mid", bias=bias)
        return Read(stored, self._placed(starts), frames=frames, role="mid", bias=bias)

    def _placed(self, starts: Sequence[float] | Tensor, *, span: float | None = None) -> Tensor:
        """Coordinates of the cells of blocks, kept for the other layers, which ask for the same."""
        key = None if isinstance(starts, Tensor) else (tuple(starts), span)
        if key is not None and self._coordinates is not None and self._coordinates[0] == key:
            return self._coordinates[1]
        grid = self.size[1:] if self.policy.spatial == "scaled" else self.cells[1:]
        size = (self._mid_span if span is None else span, *map(float, grid))
        if not isinstance(starts, Tensor):
            starts = torch.tensor(starts, dtype=torch.float64, device=self.geometry.device)
        placed = cell_coordinates(starts, cells=self.cells, size=size)
        if key is not None:
            self._coordinates = key, placed
        return placed

    def _note_span(self, parts: Partitions, starts: Sequence[float], own: tuple[float, ...]) -> None:
        low = min([*starts, own[0]])
        if self.policy.positions == "absolute":
            low = min([own[0], *(float(b.start) for p in (parts.sinks, parts.mids, parts.recents) for b in p)])
        first_centre = cell_centres(self.cells[0], self._mid_span)[0]
        self._span = (low + min(first_centre, 0.0), own[-1])


def _part(state: Mapping[str, Tensor | Number], group: str, layer: int) -> dict[str, Tensor]:
    """Entries ``group.NAME.layer`` of a saved state by name."""
    keys = [key for key in state if key.startswith(f"{group}.") and key.endswith(f".{layer}")]
    return {key.removeprefix(f"{group}.").removesuffix(f".{layer}"): state[key] for key in keys}


ENCODED = ("lr", "hr", "hr+lr")


@dataclass(frozen=True, kw_only=True)
class Pack(CachePolicy):
    """Sinks, a compressed middle and recent frames (PackForcing, arXiv:2603.25730).

    Each block that is no sink is stored twice when it is committed: in full, and compressed into a bank. When it is
    no longer recent the full version is dropped. Before a block's first step the ``num_selected_blocks`` best
    compressed blocks are chosen, per layer and sample, and every read frame gets a packed position: recent frames
    stand where they are, chosen blocks directly before them, sinks directly before those.

    ``compressor``: ``none`` stores the middle in full (retrieval); ``pool`` stores means of un-rotated keys and values
    over cells of 2 frames by 4x4 tokens; ``lr`` decodes the block, averages pixels over the same cells, encodes and
    runs the small clip through the transformer at timestep 0; ``hr`` does so with tokens of a trained network;
    ``hr+lr`` with their sum. ``none``, ``pool`` and ``lr`` need no training. ``selection``: ``query_score`` is the
    paper's sum of query-key products, exactly; ``softmax_mass`` the attention candidates would get; ``recency`` the
    newest.

    Published sizes are the defaults and suit blocks of 4 frames (182 tokens each). Counts of frames are rounded up to
    whole blocks. A block of 3 frames becomes 1 in time, one of 1 stays 1.

    What differs: no code was released. Compressed tokens run through the whole transformer and see the sinks, the bank
    and older recent frames, not their own block in full; the selection is per sample; products are of un-rotated
    queries and keys; the bank's cap and the coordinates inside a compressed block (centres of cells) are ours.
    """

    name: ClassVar[str] = "pack"
    source: ClassVar[str] = "PackForcing, arXiv:2603.25730"
    published_block: ClassVar[int] = 4

    num_sink_frames: int = 8  # first frames, in full for ever
    num_recent_frames: int = 4  # last frames before the block, in full
    num_selected_blocks: int = 16  # compressed blocks that a block reads
    num_archive_blocks: int = 128  # two minutes of blocks of 4; the oldest goes first
    compressor: Literal["none", "pool", "lr", "hr", "hr+lr"] = "pool"
    compressor_weights: str | None = None  # mini, or a file; for hr
    cell: tuple[int, int, int] = (2, 4, 4)  # frames, rows, columns of tokens that become one
    selection: Literal["query_score", "softmax_mass", "recency"] = "query_score"
    num_scored_heads: int | None = None  # None: all; the paper: half of them
    positions: Literal["packed", "absolute"] = "packed"
    spatial: Literal["scaled", "compact"] = "scaled"  # rows and columns of cells: centres in the full grid, or 0, 1, 2
    mid_span: float | None = None  # positions that a compressed block takes up at most; None: its frames
    archive: Literal["device", "host"] = "device"  # where the bank lies
    is_count_biased: bool = False  # adds log(tokens per cell) to the scores of cells

    def __post_init__(self) -> None:
        for name, least in (("num_sink_frames", 0), ("num_recent_frames", 0), ("num_selected_blocks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more.")
        if self.num_archive_blocks < self.num_selected_blocks:
            raise ValueError(
                f"num_archive_blocks={self.num_archive_blocks} holds fewer than num_selected_blocks="
                f"{self.num_selected_blocks}: use {self.num_selected_blocks} or more, or select fewer."
            )
        if min(self.cell) < 1:
            raise ValueError(f"cell={self.cell} (frames, rows, columns) must be 1 or more each.")
        if self.mid_span is not None and self.mid_span <= 0:
            raise ValueError(f"mid_span={self.mid_span} must be above 0, or null for the frames of a block.")
        if self.num_scored_heads is not None and self.num_scored_heads < 1:
            raise ValueError(f"num_scored_heads={self.num_scored_heads} must be 1 or more, or null for all.")
        if "hr" in self.compressor and not self.compressor_weights:
            raise ValueError(
                f"compressor={self.compressor!r} needs compressor_weights: 'mini' for the bundled model, or a file of "
                "scripts/train_compressor.py; without training use 'lr' or 'pool'."
            )

    @property
    def traits(self) -> Traits:
        """Pixels are pooled for ``lr``, the network of ``hr`` is trained, cells may count for their tokens."""
        return Traits(
            needs_vae="lr" in self.compressor,
            needs_weights="hr" in self.compressor,
            weighs_tokens=self.is_count_biased,
            breaks_frames=self.compressor != "none",
        )

    @property
    def is_encoded(self) -> bool:
        """Whether compressed blocks run through the transformer."""
        return self.compressor in ENCODED

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """Every block size fits: counts are rounded up to whole blocks."""

    def factors(self, geometry: Geometry) -> tuple[int, int, int]:
        """Frames, rows and columns that become one."""
        size = geometry.frames_per_block, geometry.num_rows, geometry.num_columns
        return (1, 1, 1) if self.compressor == "none" else cell_factors(size, self.cell)

    def cells(self, geometry: Geometry) -> tuple[int, int, int]:
        """Frames, rows and columns of a compressed block: 2, 7, 13 at 832x480 with blocks of 4."""
        size = geometry.frames_per_block, geometry.num_rows, geometry.num_columns
        return num_cells(size, self.factors(geometry))

    def start(self, geometry: Geometry) -> _PackState:
        """Make the empty state of one rollout.

        Raises:
            ValueError: If the compressor's weights are missing.
        """
        network = None
        if self.compressor_weights is not None and self.traits.needs_weights:
            network = load_compressor(self.compressor_weights, self.compressor, geometry.device)
        return _PackState(self, geometry, network)
