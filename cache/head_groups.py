"""Sink, recent frames and chosen segments, in buffers of the heads that read them.

Every group of heads has a buffer of its own: [sink | chosen segments | recent frames], with room behind for a block.
A new block is stored behind the recent frames; then what stays is moved up as it is encoded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from longtake.cache.base import CacheStats, Context, Geometry, HeadGroup, Number, Pass, PolicyState, Read
from longtake.cache.head_map import HeadMap
from longtake.cache.storage import TokenBuffer
from longtake.cache.tokens import coordinates, token_numbers


class Settings(Protocol):
    """What the state has to know of its policy; as the fields of ``ForcingKV``."""

    num_sink_frames: int
    num_recent_frames: int
    num_dynamic_frames: int
    num_segments: int
    num_plain_layers: int
    positions: str


@dataclass
class _Group:
    """Heads of one layer that read the same.

    Attributes:
        heads: Which ones; None: all of them.
        is_dynamic: Whether they keep chosen segments.
        buffer: Of these heads and this layer alone.
        num_seen: Frames of the video that have been stored.
        num_chosen: Frames' worth of chosen segments at hand.
        numbers: (batch, chosen tokens), which tokens they are.
    """

    heads: tuple[int, ...] | None
    is_dynamic: bool
    buffer: TokenBuffer
    num_seen: int = 0
    num_chosen: int = 0
    numbers: Tensor | None = None


class HeadGroupState(PolicyState):
    """What one rollout keeps."""

    def __init__(self, settings: Settings, geometry: Geometry, head_map: HeadMap) -> None:
        self.settings, self.geometry, self.size = settings, geometry, geometry.tokens_per_frame
        self.num_segments = max(n for n in range(1, settings.num_segments + 1) if self.size % n == 0)
        self._layers = [self._groups(layer, head_map) for layer in range(geometry.num_layers)]
        self._origin = -1
        self._chosen: tuple[int, Tensor] | None = None
        self._span: tuple[float, float] | None = None

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        """Read what each group of heads has."""
        start = pass_.start_frame
        own = tuple(float(frame) for frame in range(start, start + pass_.num_frames))
        groups = [
            HeadGroup(group.heads or (), self._reads(group, start), self._capacity(group))
            for group in self._layers[layer]
        ]
        self._span = (float(self._sink_position(start)), own[-1])
        if len(groups) == 1:
            return Context(groups[0].reads, own, capacity=groups[0].capacity)
        return Context((), own, groups=tuple(groups))

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Store the block and let go of what is neither recent nor chosen."""
        self._origin = pass_.start_frame if self._origin < 0 else self._origin
        for group in self._layers[layer]:
            own_k, own_v = (k, v) if group.heads is None else (k[:, :, list(group.heads)], v[:, :, list(group.heads)])
            self._store(group, pass_, own_k, own_v)

    def stats(self) -> CacheStats:
        """Tokens of a dynamic head where there is one, else of any; bytes of all heads."""
        counts = [{"sink": self._num_sinks(g), "mid": g.num_chosen, "recent": self._num_recent(g)} for g in self._all]
        tokens = {role: self.size * max(count[role] for count in counts) for role in counts[0]}
        bytes_ = {
            role: sum(
                self.size * count[role] * group.buffer.bytes_per_token
                for group, count in zip(self._all, counts, strict=True)
            )
            for role in tokens
        }
        held = {role for role, count in tokens.items() if count}
        return CacheStats(
            {role: n for role, n in tokens.items() if role in held},
            {role: n for role, n in bytes_.items() if role in held},
            self._span,
        )

    def state_dict(self) -> dict[str, Tensor | Number]:
        """Tokens of every group, and which ones the chosen are."""
        state: dict[str, Tensor | Number] = {"origin": self._origin}
        for index, group in enumerate(self._all):
            state |= {f"num_seen.{index}": group.num_seen, f"num_chosen.{index}": group.num_chosen}
            if group.numbers is not None:
                state[f"numbers.{index}"] = group.numbers
            saved = group.buffer.save(0, 0, self._num_held(group) * self.size)
            state |= {f"stored.{name}.{index}": tensor for name, tensor in saved.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | Number]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: If the saved shapes are not this rollout's.
        """
        self._origin, self._chosen = int(state["origin"]), None
        for index, group in enumerate(self._all):
            if f"num_seen.{index}" not in state:
                raise ValueError(
                    "the saved cache has other groups of heads: resume with the head map it was saved with."
                )
            group.num_seen, group.num_chosen = int(state[f"num_seen.{index}"]), int(state[f"num_chosen.{index}"])
            numbers = state.get(f"numbers.{index}")
            group.numbers = None if numbers is None else numbers.to(self.geometry.device)
            ending = f".{index}"
            saved = {k.split(".")[1]: x for k, x in state.items() if k.startswith("stored.") and k.endswith(ending)}
            group.buffer.load(0, 0, saved)

    @property
    def _all(self) -> list[_Group]:
        return [group for layer in self._layers for group in layer]

    def _groups(self, layer: int, head_map: HeadMap) -> tuple[_Group, ...]:
        static, dynamic = head_map.static[layer], head_map.dynamic(layer)
        parts = [(heads, is_dynamic) for heads, is_dynamic in ((static, False), (dynamic, True)) if heads]
        if layer < self.settings.num_plain_layers or not self.settings.num_dynamic_frames:
            parts = [(None, False)]
        elif len(parts) == 1:
            parts = [(None, parts[0][1])]
        num_frames = self.settings.num_sink_frames + self.settings.num_recent_frames
        single, groups = replace(self.geometry, num_layers=1), []
        for heads, is_dynamic in parts:
            # Only where something is chosen from it the whole block has to be stored for a moment.
            places = (num_frames + (self.geometry.frames_per_block if is_dynamic else 0)) * self.size
            num_heads = None if heads is None else len(heads)
            groups.append(_Group(heads, is_dynamic, self.geometry.storage.buffer(single, places, num_heads=num_heads)))
        return tuple(groups)

    def _num_sinks(self, group: _Group) -> int:
        return min(self.settings.num_sink_frames, group.num_seen)

    def _num_recent(self, group: _Group) -> int:
        return min(self.settings.num_recent_frames, group.num_seen - self._num_sinks(group))

    def _num_held(self, group: _Group) -> int:
        return self._num_sinks(group) + group.num_chosen + self._num_recent(group)

    def _capacity(self, group: _Group) -> int:
        num_frames = self.settings.num_sink_frames + self.settings.num_recent_frames
        return (num_frames + group.is_dynamic * self.settings.num_dynamic_frames) * self.size

    def _oldest(self, start: int) -> int:
        """First frame that the chosen segments of a block at ``start`` can come from."""
        oldest = start - self.geometry.frames_per_block - self.settings.num_recent_frames
        return max(oldest, self._origin + self.settings.num_sink_frames)

    def _sink_position(self, start: int) -> int:
        if self._origin < 0:
            return start
        if self.settings.positions == "absolute":
            return self._origin
        return self._oldest(start) - self.settings.num_sink_frames

    def _reads(self, group: _Group, start: int) -> tuple[Read, ...]:
        size, reads = self.size, []
        num_sinks, num_recent = self._num_sinks(group), self._num_recent(group)
        first = num_sinks + group.num_chosen
        if num_sinks:
            frames = tuple(range(self._origin, self._origin + num_sinks))
            moved = self._sink_position(start) - self._origin
            positions = tuple(float(frame + moved) for frame in frames)
            reads.append(Read(group.buffer.read(0, 0, num_sinks * size), positions, frames=frames, role="sink"))
        if group.num_chosen:
            stored = group.buffer.read(0, num_sinks * size, first * size)
            frames = tuple(range(self._oldest(start), start - num_recent))
            reads.append(Read(stored, coordinates(group.numbers, self.geometry), frames=frames, role="mid"))
        if num_recent:
            frames = tuple(range(start - num_recent, start))
            stored = group.buffer.read(0, first * size, (first + num_recent) * size)
            reads.append(Read(stored, tuple(map(float, frames)), frames=frames, role="recent"))
        return tuple(reads)

    def _store(self, group: _Group, pass_: Pass, k: Tensor, v: Tensor) -> None:
        size, buffer = self.size, group.buffer
        num_old, num_sinks = self._num_recent(group), self.settings.num_sink_frames
        num_new_sinks = min(num_sinks - self._num_sinks(group), pass_.num_frames)
        if num_new_sinks:
            part = slice(0, num_new_sinks * size)
            buffer.write(0, self._num_sinks(group) * size, k[:, part], v[:, part])
        group.num_seen += pass_.num_frames
        num_left = num_old + pass_.num_frames - num_new_sinks  # recent frames and new ones
        num_recent = self._num_recent(group)
        num_older = num_left - num_recent  # of these the ones that are recent no more
        if not group.is_dynamic:
            num_staying = max(num_old - num_older, 0)
            self._move(buffer, num_sinks + num_old - num_staying, num_staying, num_sinks)
            part = slice((pass_.num_frames - num_recent + num_staying) * size, None)
            buffer.write(0, (num_sinks + num_staying) * size, k[:, part], v[:, part])
            return
        # A first block that is longer than the others may be more than there is room for: its oldest frames go.
        num_dropped = max(num_left - self.settings.num_recent_frames - self.geometry.frames_per_block, 0)
        num_left, num_older = num_left - num_dropped, num_older - num_dropped
        self._move(buffer, num_sinks + group.num_chosen, num_old, num_sinks)
        part = slice((num_new_sinks + num_dropped) * size, None)
        buffer.write(0, (num_sinks + num_old) * size, k[:, part], v[:, part])
        if num_older:
            first = pass_.start_frame + pass_.num_frames - num_left
            index = self._choice(group, first, num_left, num_older)
            group.num_chosen = index.shape[1] // size
            buffer.move(0, index + num_sinks * size, num_sinks * size)
            self._move(buffer, num_sinks + num_older, num_recent, num_sinks + group.num_chosen)
            group.numbers = token_numbers(self.geometry, first, num_older).gather(1, index)

    def _move(self, buffer: TokenBuffer, source: int, num_frames: int, target: int) -> None:
        """Move whole frames to another place."""
        if num_frames and source != target:
            places = torch.arange(source * self.size, (source + num_frames) * self.size, device=self.geometry.device)
            buffer.move(0, places, target * self.size)

    def _choice(self, group: _Group, first: int, num_left: int, num_older: int) -> Tensor:
        """Tokens of the segments that stay, among those of the older frames: (batch, tokens), ascending.

        The first group that commits a block chooses for all.
        """
        if self._chosen is not None and self._chosen[0] == first:
            return self._chosen[1]
        start = self.settings.num_sink_frames * self.size
        keys = group.buffer.read(0, start, start + num_left * self.size).keys.float().flatten(2)
        keys = keys.unflatten(1, (num_left, self.size))[:, : num_older + 1]
        likeness = cosine_similarity(keys[:, :-1], keys[:, 1:], dim=-1).flatten(1)
        length = self.size // self.num_segments
        segments = likeness.unflatten(1, (-1, length)).mean(dim=2)
        num_kept = min(self.settings.num_dynamic_frames, num_older) * self.num_segments
        kept = segments.topk(num_kept, dim=1, largest=False).indices.sort(dim=1).values
        within = torch.arange(length, device=kept.device)
        self._chosen = (first, (kept[..., None] * length + within).flatten(1))
        return self._chosen[1]
