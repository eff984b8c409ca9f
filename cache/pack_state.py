"""What a pack keeps during a rollout: full frames, the bank, and this block's choice."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longtake.cache.base import (
    BlockTrace,
    CacheStats,
    Context,
    EncodeJob,
    Geometry,
    Number,
    Pass,
    PolicyState,
    Read,
)
from longtake.cache.compressors import LatentCompressor, pool_tokens
from longtake.cache.frames import FrameStore
from longtake.cache.pack_bank import Bank
from longtake.cache.pack_partitions import Block, Partitions, hand_over
from longtake.cache.storage import Stored
from longtake.rope import cell_centres, cell_coordinates, pack_backward

if TYPE_CHECKING:
    from longtake.cache.pack import Pack

PARTS = ("sinks", "mids", "recents")
Ranks = tuple[int, ...] | Tensor
"""Chosen candidates in time order: the same for all samples, or (batch, chosen)."""


class PackState(PolicyState):
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
        self.bank = Bank(
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
        if self.policy.needs_vae:
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

    def load_state_dict(self, state: Mapping[str, Tensor | Number]) -> None:
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
