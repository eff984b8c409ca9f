"""Sinks in full, the middle compressed and chosen from, the last frames in full."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

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
from longtake.cache.frames import FrameStore, assign_places
from longtake.cache.storage import ChosenTokens, Stored, saved_part
from longtake.rope import cell_centres, cell_coordinates, pack_backward

Size = tuple[int, int, int]  # frames, rows, columns


@dataclass(frozen=True, kw_only=True)
class Pack(CachePolicy):
    """Sinks, a compressed middle and recent frames (PackForcing, arXiv:2603.25730).

    A block that is no sink is kept in full while recent, and compressed in a bank. Before a block's first step the
    ``num_selected_blocks`` best compressed blocks are chosen, per layer and sample. Read frames get packed positions:
    recent frames stand where they are, chosen blocks directly before them, sinks directly before those.

    ``compressor``: ``none`` stores the middle in full (retrieval); ``pool`` takes means of un-rotated keys and values
    over cells of 2 frames by 4x4 tokens; ``lr`` averages decoded pixels over these cells and runs the small clip
    through the transformer at timestep 0; ``hr`` runs tokens of a trained network, ``hr+lr`` their sum. ``selection``:
    ``query_score`` is the paper's sum of query-key products, exactly; ``softmax_mass`` the attention candidates would
    get; ``recency`` the newest.

    Published sizes are the defaults, for blocks of 4 frames (182 tokens each); counts of frames are rounded up to
    whole blocks.

    Differs (no code was released): compressed tokens do not see their own block in full; selection is per sample, by
    un-rotated queries and keys; the bank's cap and cell centres as coordinates are ours.
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
    mid_span: float | None = None  # most positions of a compressed block; None: its frames
    archive: Literal["device", "host"] = "device"  # where the bank lies
    is_count_biased: bool = False  # adds log(tokens per cell) to cells' scores

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "num_sink_frames", "num_recent_frames")
        self.at_least(1, "num_selected_blocks")
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
        return self.compressor in ("lr", "hr", "hr+lr")

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """Every block size fits: counts are rounded up to whole blocks."""

    def factors(self, size: Size) -> Size:
        return (1, 1, 1) if self.compressor == "none" else cell_factors(size, self.cell)

    def start(self, geometry: Geometry) -> "_PackState":
        network = None
        if self.compressor_weights is not None and self.traits.needs_weights:
            network = load_compressor(self.compressor_weights, self.compressor, geometry.device)
        return _PackState(self, geometry, network)


def _frames(blocks: Iterable[range]) -> list[int]:
    return [frame for block in blocks for frame in block]


@dataclass(frozen=True)
class _Partitions:
    """Blocks by what has become of them, each tuple in time order."""

    sinks: tuple[range, ...] = ()  # first blocks, in full for ever
    mids: tuple[range, ...] = ()  # archived blocks, which are kept in small only
    recents: tuple[range, ...] = ()  # last blocks, in full; their small versions are ready and wait

    def advance(self, block: range, policy: Pack, block_size: int) -> "_Partitions":
        """Take a new block in: a sink while sinks are wanted, else recent; the oldest recents move to the archive.

        Blocks stay whole, so that counts of frames are rounded up. The archive is first in, first out. Its places
        are equal, so a first block of another size than the rest is not archived.
        """
        if block.start < policy.num_sink_frames:
            return _Partitions((*self.sinks, block), self.mids, self.recents)
        mids, recents = self.mids, (*self.recents, block)
        while recents and sum(map(len, recents[1:])) >= policy.num_recent_frames:
            oldest, *rest = recents
            recents = tuple(rest)
            mids += (oldest,) if len(oldest) == block_size else ()
        return _Partitions(self.sinks, mids[max(len(mids) - policy.num_archive_blocks, 0) :], recents)

    def without(self, start: int) -> "_Partitions":
        kept = ([b for b in part if b.start != start] for part in (self.sinks, self.mids, self.recents))
        return _Partitions(*map(tuple, kept))

    def full_frames(self) -> list[int]:
        return _frames((*self.sinks, *self.recents))

    def small_blocks(self, block_size: int) -> list[int]:
        """First frames of the blocks that are kept in small: archived, or recent and to be archived."""
        return [b.start for b in (*self.mids, *self.recents) if len(b) == block_size]


_PARTS = ("sinks", "mids", "recents")
_Ranks = tuple[int, ...] | Tensor  # chosen candidates in time order: the same for all samples, or (batch, chosen)


class _PackState(PolicyState):
    """State of a ``Pack``: blocks by partition, their tokens, and the sums by which the bank is searched."""

    def __init__(self, policy: Pack, geometry: Geometry, network: "LatentCompressor | None") -> None:
        self.policy, self.geometry, self.network = policy, geometry, network
        self.merges_commit = not policy.is_encoded
        size = geometry.frames_per_block
        num_recents = math.ceil(policy.num_recent_frames / size)
        num_places = policy.num_archive_blocks + max(num_recents, 1)
        if geometry.max_frames is not None:
            num_places = min(num_places, math.ceil(geometry.max_frames / size) + 1)
        self.size = size, geometry.num_rows, geometry.num_columns
        self.factors = policy.factors(self.size)
        self.cells = num_cells(self.size, self.factors)
        self.store = FrameStore(geometry, (math.ceil(policy.num_sink_frames / size) + num_recents) * size)
        tokens, on_host = math.prod(self.cells), policy.archive == "host"
        self.bank = _Bank(geometry, num_places=num_places, block_tokens=tokens, on_host=on_host)
        self._mid_span = min(policy.mid_span or math.inf, float(size))
        self._slots: dict[int, int] = {}
        self._before, self._after, self._committed = _Partitions(), _Partitions(), -1
        self._query_sums: dict[int, dict[int, Tensor]] = {}
        self._chosen: dict[int, tuple[int, Tensor]] = {}
        self._coordinates: tuple[tuple, Tensor] | None = None
        self._span: tuple[float, float] | None = None

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        if pass_.kind == "encode":
            parts = self._after.without(pass_.start_frame)
        else:
            parts = self._before if pass_.start_frame <= self._committed else self._after
        ranks = self._choose(layer, pass_, parts, q)
        num_chosen = len(ranks) if isinstance(ranks, tuple) else ranks.shape[-1]
        sinks, recents = _frames(parts.sinks), _frames(parts.recents)
        starts: tuple[float, ...] = (*map(float, sinks), *[0.0] * num_chosen, *map(float, recents))
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
            placed = self._placed((float(pass_.start_frame),), span=self.size[0])
            return Context(reads, placed, capacity=self._capacity)
        own = tuple(map(float, range(pass_.start_frame, pass_.start_frame + pass_.num_frames)))
        self._note_span(parts, starts, own)
        return Context(reads, own, capacity=self._capacity)

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Store a block in full, and its compressed version if its keys and values are what that is made of."""
        start = pass_.start_frame
        if pass_.kind == "encode":
            self.bank.put(layer, start, k, v)
            return
        if start != self._committed:
            self._hand_over(range(start, start + pass_.num_frames))
        kept = set(self._after.full_frames())
        frames = range(start, start + pass_.num_frames)
        self.store.write(layer, [self._slots[f] if f in kept else -1 for f in frames], k, v)
        sums = self._query_sums.get(layer, {}) | {start: q.float().sum(1)}
        self._query_sums[layer] = {block.start: sums[block.start] for block in self._after.recents}
        if not self.policy.is_encoded and start in self._after.small_blocks(self.size[0]):
            if self.cells != self.size:
                k, v = (pool_tokens(x, self.size, self.cells) for x in (k, v))
            self.bank.put(layer, start, k, v)

    def end_block(self, trace: BlockTrace) -> list[EncodeJob]:
        if not self.policy.is_encoded or trace.start_frame not in self._after.small_blocks(self.size[0]):
            return []
        latents, tokens, pooling = trace.latents, None, None
        if self.network is not None:
            tokens = self.network(latents, self.cells)
        if self.policy.traits.needs_vae:
            pooling = self.factors
        else:
            patch = latents.shape[-2] // self.size[1]
            frames, rows, columns = self.cells
            latents = latents.new_zeros(*latents.shape[:1], frames, latents.shape[2], rows * patch, columns * patch)
        return [EncodeJob(latents, trace.start_frame, label="pack", pooling=pooling, tokens=tokens)]

    def stats(self) -> CacheStats:
        """Tokens by role: ``mid`` is what a block reads of the bank, ``archive`` the rest of it."""
        num_small = len(self._after.small_blocks(self.size[0]))
        num_chosen = min(len(self._after.mids), self.policy.num_selected_blocks)
        counts = {
            "sink": (self.store, len(_frames(self._after.sinks))),
            "mid": (self.bank, num_chosen),
            "recent": (self.store, len(_frames(self._after.recents))),
            "archive": (self.bank, num_small - num_chosen),
        }
        tokens = {role: count * store.frame_size for role, (store, count) in counts.items() if count}
        bytes_ = {role: count * store.bytes_per_frame for role, (store, count) in counts.items() if count}
        return CacheStats(tokens, bytes_, self._span)

    def state_dict(self) -> dict[str, Tensor | Number]:
        state: dict[str, Tensor | Number] = {"committed": self._committed, "chosen_for": -1}
        for name in _PARTS:
            rows = [(block.start, len(block)) for block in getattr(self._after, name)]
            state[name] = torch.tensor(rows).long().reshape(-1, 2)
        full, small = self._after.full_frames(), self._after.small_blocks(self.size[0])
        for layer in range(self.geometry.num_layers if self._committed >= 0 else 0):
            saved = {
                "full": self.store.save(layer, [self._slots[frame] for frame in full]) if full else {},
                "bank": self.bank.saved(layer, small) if small else {},
                "queries": {str(start): tensor for start, tensor in self._query_sums[layer].items()},
            }
            state |= {f"{g}.{name}.{layer}": x for g, part in saved.items() for name, x in part.items()}
        for layer, (start, ranks) in self._chosen.items():
            state |= {"chosen_for": start, f"chosen.{layer}": ranks}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parts = (tuple(range(start, start + n) for start, n in state[name].tolist()) for name in _PARTS)
        self._after, self._before, self._committed = _Partitions(*parts), _Partitions(), int(state["committed"])
        full, small = self._after.full_frames(), self._after.small_blocks(self.size[0])
        if len(small) > self.bank.num_slots:
            raise ValueError(
                f"the saved cache holds {len(small)} compressed blocks, this policy {self.bank.num_slots}: "
                "resume with the cache settings it was saved with."
            )
        self.store.grow(len(full))
        self._slots = {frame: slot for slot, frame in enumerate(full)}
        self.bank.places = {start: place for place, start in enumerate(small)}
        self._query_sums, self._chosen = {}, {}
        device = self.geometry.device
        for layer in range(self.geometry.num_layers if self._committed >= 0 else 0):
            if full:
                self.store.buffer.load(layer, 0, saved_part(state, "full.", f".{layer}"))
            if small:
                self.bank.load(layer, saved_part(state, "bank.", f".{layer}"))
            queries = saved_part(state, "queries.", f".{layer}")
            self._query_sums[layer] = {int(start): tensor.to(device) for start, tensor in queries.items()}
        for layer in range(self.geometry.num_layers):
            if f"chosen.{layer}" in state:
                self._chosen[layer] = int(state["chosen_for"]), state[f"chosen.{layer}"].to(device)

    @property
    def _capacity(self) -> int:
        chosen = self.policy.num_selected_blocks * self.bank.frame_size
        return self.store.num_slots * self.geometry.tokens_per_frame + chosen

    def _hand_over(self, block: range) -> None:
        size, before, after = self.size[0], self._after, self._after.advance(block, self.policy, self.size[0])
        self._before, self._after, self._committed = before, after, block.start
        self.store.grow(len(after.full_frames()))
        self._slots = _hand_over(self._slots, before.full_frames(), after.full_frames(), self.store.num_slots)
        small = before.small_blocks(size), after.small_blocks(size)
        self.bank.places = _hand_over(self.bank.places, *small, self.bank.num_slots)

    def _choose(self, layer: int, pass_: Pass, parts: _Partitions, q: Tensor | None) -> _Ranks:
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
        slots = [self._slots[frame] for frame in frames]
        return self.store.reads(layer, slots, frames, positions, role=role)

    def _middle(self, layer: int, mids: Sequence[range], ranks: _Ranks, starts: Sequence[float]) -> list[Read]:
        """Compressed blocks; where each sample has its own, ``frames`` are the first sample's, or all candidates'."""
        if isinstance(ranks, tuple):
            chosen = [mids[rank] for rank in ranks]
            if self.policy.positions == "absolute":
                starts = [float(block.start) for block in chosen]
            reads, end = [], 0
            for count, tokens in self.bank.take(layer, [block.start for block in chosen]):
                start, end = end, end + count
                reads.append(self._read(tokens, starts[start:end], chosen[start:end]))
            return reads
        names = [block.start for block in mids]
        own: Sequence[float] | Tensor = starts
        if self.policy.positions == "absolute":
            own = torch.tensor(names, dtype=torch.float64, device=ranks.device)[ranks]
        is_known = ranks.device.type == "cpu"  # asking another device would wait for it
        chosen = [mids[rank] for rank in ranks[0].tolist()] if is_known else mids
        return [self._read(self.bank.pick(layer, names, ranks), own, chosen)]

    def _read(self, stored: Stored, starts: Sequence[float] | Tensor, blocks: Sequence[range]) -> Read:
        frames = tuple(_frames(blocks))
        bias = None
        if self.policy.is_count_biased:
            share = math.log(math.prod(self.size) / self.bank.frame_size)
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
        _, rows, columns = self.size if self.policy.spatial == "scaled" else self.cells
        size = (self._mid_span if span is None else span, float(rows), float(columns))
        if not isinstance(starts, Tensor):
            starts = torch.tensor(starts, dtype=torch.float64, device=self.geometry.device)
        placed = cell_coordinates(starts, cells=self.cells, size=size)
        if key is not None:
            self._coordinates = key, placed
        return placed

    def _note_span(self, parts: _Partitions, starts: Sequence[float], own: tuple[float, ...]) -> None:
        low = min([*starts, own[0]])
        if self.policy.positions == "absolute":
            low = min([own[0], *(float(b.start) for p in (parts.sinks, parts.mids, parts.recents) for b in p)])
        first_centre = cell_centres(self.cells[0], self._mid_span)[0]
        self._span = (low + min(first_centre, 0.0), own[-1])


_MIN_SCORED_QUERIES = 32
_SCORED_QUERIES_IN = 8  # one query in so many is scored by softmax mass; PackForcing-Unofficial's share


class _Bank(FrameStore):
    """Compressed blocks of ``block_tokens``, one in a slot, first in first out, and the sums of their keys.

    ``on_host`` keeps the tokens, not the sums, in host memory, and brings what is chosen to the device once per block.
    """

    def __init__(self, geometry: Geometry, *, num_places: int, block_tokens: int, on_host: bool = False) -> None:
        device = torch.device("cpu") if on_host and geometry.device.type != "meta" else geometry.device
        super().__init__(replace(geometry, device=device), num_places, frame_size=block_tokens)
        self.buffer.is_on_host |= on_host
        self.geometry = geometry
        self.places: dict[int, int] = {}  # of blocks, by their first frame
        self._key_sums: dict[int, Tensor] = {}

    def put(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Store a block; refuse one that has not as many tokens as a place."""
        if k.shape[1] != self.frame_size:
            raise ValueError(
                f"a compressed block has {k.shape[1]} tokens, its place {self.frame_size}: the pixels were not "
                "pooled as the job asked."
            )
        self.write(layer, [self.places[start]], k, v)
        self._sums(layer)[:, self.places[start]] = k.float().sum(1)

    def take(self, layer: int, starts: Sequence[int]) -> list[tuple[int, Stored]]:
        """Tokens of blocks in order, neighbours joined: (number of blocks, tokens) each."""
        found, here = self.read(layer, [self.places[start] for start in starts]), self.geometry.device
        if self.buffer.geometry.device == here:
            return found
        return [(n, ChosenTokens(tokens, torch.arange(tokens.num_tokens, device=here))) for n, tokens in found]

    def pick(self, layer: int, starts: Sequence[int], ranks: Tensor) -> Stored:
        """Tokens of the blocks ``starts[ranks]``, ranks (batch, chosen), in that order."""
        first = torch.tensor([self.places[s] * self.frame_size for s in starts], device=ranks.device)[ranks]
        index = first[..., None] + torch.arange(self.frame_size, device=ranks.device)
        stored = self.buffer.read(layer, 0, self.num_slots * self.frame_size)
        return ChosenTokens(stored, index.flatten(1))

    def query_scores(self, layer: int, starts: Sequence[int], query_sum: Tensor, num_heads: int) -> Tensor:
        """Sum of the products of all queries with all keys of a block, by sums: exact, as products are bilinear.

        ``query_sum`` is (batch, heads, head_dim) float32, un-rotated. The result is (batch, candidates), the mean over
        the first ``num_heads`` heads; PackForcing's eq. 11 averages over the batch as well.
        """
        places = torch.tensor([self.places[start] for start in starts], device=query_sum.device)
        keys = self._sums(layer).index_select(1, places)[:, :, :num_heads]
        scale = num_heads * math.sqrt(self.geometry.head_dim)
        return torch.einsum("bhd,bnhd->bn", query_sum[:, :num_heads], keys) / scale

    def softmax_masses(self, layer: int, starts: Sequence[int], q: Tensor, num_heads: int) -> Tensor:
        """Share of attention that each candidate would get if all candidates and nothing else were read.

        An even eighth of the queries ``q``, un-rotated, 32 at least, is scored, in the first ``num_heads`` heads. The
        result is (batch, candidates), each sample's adding up to 1.
        """
        count = min(max(q.shape[1] // _SCORED_QUERIES_IN, _MIN_SCORED_QUERIES), q.shape[1])
        sampled = torch.arange(count, device=q.device) * q.shape[1] // count
        queries = q[:, sampled, :num_heads].float()
        ranks = torch.arange(len(starts), device=q.device).expand(q.shape[0], -1)
        keys = self.pick(layer, starts, ranks).keys[:, :, :num_heads].float()
        logits = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / math.sqrt(self.geometry.head_dim)
        return logits.softmax(dim=-1).unflatten(-1, (len(starts), -1)).sum(-1).mean(dim=(1, 2))

    def saved(self, layer: int, starts: Sequence[int]) -> dict[str, Tensor]:
        """Blocks in order, as they are encoded, and the sums of their keys."""
        places = [self.places[start] for start in starts]
        return self.save(layer, places) | {"key_sums": self._sums(layer)[:, places]}

    def load(self, layer: int, saved: Mapping[str, Any]) -> None:
        """Put saved blocks back, in the first places."""
        self.buffer.load(layer, 0, {name: value for name, value in saved.items() if name != "key_sums"})
        sums = saved["key_sums"].to(self.geometry.device)
        self._sums(layer)[:, : sums.shape[1]] = sums

    def _sums(self, layer: int) -> Tensor:
        if layer not in self._key_sums:
            g = self.geometry
            shape = (g.batch_size, self.num_slots, g.num_heads, g.head_dim)
            self._key_sums[layer] = torch.zeros(shape, dtype=torch.float32, device=g.device)
        return self._key_sums[layer]


def _hand_over(places: Mapping[int, int], before: Sequence[int], after: Sequence[int], num: int) -> dict[int, int]:
    """Places of all that is kept before and after; what is let go may share its place with what is new.

    Layers commit one after the other: those that have not yet still find everything of ``before``.
    """
    kept = {item: places[item] for item in before}
    return kept | assign_places(kept, after, num)


def cell_factors(size: Size, cell: Size) -> Size:
    """Frames, rows and columns of tokens that become one, of a block of ``size`` and wanted factors.

    A row or column factor is halved while fewer than two cells would fit, so that a small grid keeps a picture: 4x4
    tokens become 2x2, where 30x52 become 7x13.
    """

    def halved(extent: int, factor: int) -> int:
        while factor > 1 and extent // factor < 2:
            factor //= 2
        return max(factor, 1)

    return cell[0], halved(size[1], cell[1]), halved(size[2], cell[2])


def num_cells(size: Size, cell: Size) -> Size:
    """Frames, rows and columns of a compressed block, rounded down and at least 1: a block of 3 frames becomes 1."""
    frames, rows, columns = (max(1, n // factor) for n, factor in zip(size, cell_factors(size, cell), strict=True))
    return frames, rows, columns


def pool_tokens(x: Tensor, size: Size, cells: Size) -> Tensor:
    """Means of equal cells; where a size is no multiple, neighbouring cells share tokens, and none is left out.

    Args:
        x: (batch, frames * rows * columns, heads, head_dim), un-rotated: rotated keys would cancel.
        size: Of ``x``.
        cells: Size of the result, (batch, cells, heads, head_dim); the means are float32.
    """
    grid = x.flatten(2).transpose(1, 2).unflatten(2, size).float()
    pooled = functional.adaptive_avg_pool3d(grid, cells).flatten(2).transpose(1, 2)
    return pooled.to(x.dtype).unflatten(2, x.shape[2:])


_PUBLISHED_CHANNELS = (32, 128, 512, 2048)


class LatentCompressor(nn.Module):
    """The network of PackForcing's high-resolution branch: strided 3-D convolutions of a block's clean latents.

    Four stages with SiLU between them, a 1x1x1 projection to the transformer's width. The first stage halves time,
    the others rows and columns, each axis only while it stays as large as the grid wanted; what is then still too
    large is averaged (60 rows become 30, 15, 8, and 7). So one set of kernels serves any geometry. Kernels are 3x3x3,
    then 1x3x3: the published figure does not give them. The projection starts at zero.

    Source: PackForcing, arXiv:2603.25730.
    """

    def __init__(self, in_channels: int, width: int, channels: tuple[int, ...] = _PUBLISHED_CHANNELS) -> None:
        super().__init__()
        kernels = [(3, 3, 3), *[(1, 3, 3)] * (len(channels) - 1)]
        sizes = zip((in_channels, *channels), channels, kernels, strict=False)
        self.stages = nn.ModuleList(nn.Conv3d(before, after, kernel) for before, after, kernel in sizes)
        self.projection = nn.Conv3d(channels[-1], width, 1)
        for parameter in self.projection.parameters():
            nn.init.zeros_(parameter)

    def forward(self, latents: Tensor, cells: Size) -> Tensor:
        """Compress clean latents, (batch, frames, channels, height, width), to (batch, width, *cells)."""
        x = latents.transpose(1, 2).to(self.projection.weight)
        for index, stage in enumerate(cast(list[nn.Conv3d], self.stages)):
            axes = (0,) if index == 0 else (1, 2)
            stride = [2 if axis in axes and x.shape[2 + axis] >= 2 * cells[axis] else 1 for axis in range(3)]
            padding = [int(kernel) // 2 for kernel in stage.kernel_size]
            x = functional.silu(functional.conv3d(x, stage.weight, stage.bias, stride=stride, padding=padding))
        return self.projection(functional.adaptive_avg_pool3d(x, cells))


def load_compressor(weights: str, kind: str, device: torch.device) -> LatentCompressor:
    """Read trained weights, whose sizes are the network's: those of a kind of a bundled model, or of a file.

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
        kernels = [state[f"stages.{i}.weight"] for i in range(sum(name.startswith("stages.") for name in state) // 2)]
        channels = tuple(kernel.shape[0] for kernel in kernels)
        network = LatentCompressor(kernels[0].shape[1], state["projection.weight"].shape[0], channels)
        network.load_state_dict({name: value.float() for name, value in state.items()})
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"compressor_weights={weights!r}: {path} holds no compressor ({error}).") from error
    return network.eval().requires_grad_(False).to(device)
