"""Heads that look only at the near past get only that; the others also what moved most."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import yaml
from torch import Tensor
from torch.nn.functional import cosine_similarity

from longtake.cache.base import (
    CachePolicy,
    CacheStats,
    Context,
    Geometry,
    HeadGroup,
    Number,
    Pass,
    PolicyState,
    Read,
    Traits,
)
from longtake.cache.storage import TokenBuffer, coordinates, saved_part, token_numbers
from longtake.configs.fields import preset_names, read_bundled

_PROFILER = "make one with 'longtake profile-heads MODEL'"


@dataclass(frozen=True, kw_only=True)
class ForcingKV(CachePolicy):
    """Static and dynamic heads, told apart by a head map (Forcing-KV, arXiv:2605.09681).

    A static head reads the sink and the last frame. A dynamic head also reads a frame's worth of the frames that have
    just become older: of their segments of neighbouring tokens, those whose keys are least like the same tokens' one
    frame later, where something moves. The first layer with dynamic heads chooses for all; layer 0 is not split, and
    reads as static heads do.

    ``head_map: auto`` is the shipped map of a model of this shape (``mini``, or the published one of Self-Forcing,
    which also fits Causal-Forcing); ``longtake profile-heads`` makes others.

    Differs from the release: a segment count that does not divide a frame's tokens is lowered; the sink is never a
    candidate; ``positions: contiguous`` moves the sink up to the oldest frame that can be read.
    """

    name: ClassVar[str] = "forcing_kv"
    source: ClassVar[str] = "Forcing-KV, arXiv:2605.09681"

    num_sink_frames: int = 1
    num_recent_frames: int = 1  # before the block
    num_dynamic_frames: int = 1  # frames' worth of segments of dynamic heads
    num_segments: int = 6  # of neighbouring tokens, per frame, at most
    num_plain_layers: int = 1  # first layers that are not split
    head_map: str = "auto"  # or a shipped map's name, or a file
    heads: tuple[tuple[int, ...], ...] = ()  # static heads of each layer, in place of head_map
    positions: Literal["absolute", "contiguous"] = "absolute"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "num_sink_frames", "num_dynamic_frames", "num_plain_layers")
        self.at_least(1, "num_recent_frames", "num_segments")
        if not self.head_map and not self.heads:
            raise ValueError(f"forcing_kv needs a head_map or heads: {_PROFILER}, or use head_map: auto.")

    @property
    def traits(self) -> Traits:
        """Dynamic heads keep segments of frames, static ones do not; a map is measured unless heads are listed."""
        return Traits(breaks_frames=True, splits_heads=True, needs_weights=not self.heads)

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        if self.num_dynamic_frames > frames_per_block:
            raise ValueError(
                f"num_dynamic_frames={self.num_dynamic_frames} are chosen from as many frames as a block has, which "
                f"is {frames_per_block}: use {frames_per_block} or fewer."
            )

    def start(self, geometry: Geometry) -> "_HeadGroupState":
        self.check(geometry.frames_per_block, geometry.max_frames)
        return _HeadGroupState(self, geometry, self.map_for(geometry))

    def map_for(self, geometry: Geometry) -> "HeadMap":
        """The head map of a rollout's model; ``ValueError`` if there is none of its shape."""
        if not self.heads:
            return _find_head_map(self.head_map, geometry.num_layers, geometry.num_heads)
        if len(self.heads) != geometry.num_layers:
            raise ValueError(
                f"heads lists {len(self.heads)} layers, this model has {geometry.num_layers}: give one list per layer."
            )
        return HeadMap(self.heads, geometry.num_heads)


@dataclass
class _Group:
    heads: tuple[int, ...] | None  # which ones; None: all of them
    is_dynamic: bool  # whether they keep chosen segments
    buffer: TokenBuffer  # of these heads and this layer alone
    num_seen: int = 0  # frames of the video that have been stored
    num_chosen: int = 0  # frames' worth of chosen segments at hand
    numbers: Tensor | None = None  # (batch, chosen tokens), which tokens they are


class _HeadGroupState(PolicyState):
    """Groups of heads of every layer, each with a buffer of its own."""

    def __init__(self, policy: ForcingKV, geometry: Geometry, head_map: "HeadMap") -> None:
        self.policy, self.geometry, self.size = policy, geometry, geometry.tokens_per_frame
        self.num_segments = max(n for n in range(1, policy.num_segments + 1) if self.size % n == 0)
        self._layers = [self._groups(layer, head_map) for layer in range(geometry.num_layers)]
        self._origin = -1
        self._chosen: tuple[int, Tensor] | None = None
        self._span: tuple[float, float] | None = None

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        start = pass_.start_frame
        own = tuple(float(frame) for frame in range(start, start + pass_.num_frames))
        parts = self._layers[layer]
        groups = [HeadGroup(part.heads or (), self._reads(part, start), self._capacity(part)) for part in parts]
        self._span = (float(self._sink_position(start)), own[-1])
        if len(groups) == 1:
            return Context(groups[0].reads, own, capacity=groups[0].capacity)
        return Context((), own, groups=tuple(groups))

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._origin = pass_.start_frame if self._origin < 0 else self._origin
        for group in self._layers[layer]:
            own_k, own_v = (k, v) if group.heads is None else (k[:, :, list(group.heads)], v[:, :, list(group.heads)])
            self._store(group, pass_, own_k, own_v)

    def stats(self) -> CacheStats:
        """Tokens of a dynamic head where there is one, else of any; bytes of all heads."""
        tokens: dict[str, int] = {}
        bytes_: dict[str, int] = {}
        for group in self._all:
            counts = {"sink": self._num_sinks(group), "mid": group.num_chosen, "recent": self._num_recent(group)}
            for role, count in counts.items():
                if count:
                    tokens[role] = max(tokens.get(role, 0), self.size * count)
                    bytes_[role] = bytes_.get(role, 0) + self.size * count * group.buffer.bytes_per_token
        return CacheStats(tokens, bytes_, self._span)

    def state_dict(self) -> dict[str, Tensor | Number]:
        state: dict[str, Tensor | Number] = {"origin": self._origin}
        for index, group in enumerate(self._all):
            state |= {f"num_seen.{index}": group.num_seen, f"num_chosen.{index}": group.num_chosen}
            if group.numbers is not None:
                state[f"numbers.{index}"] = group.numbers
            saved = group.buffer.save(0, 0, self._num_held(group) * self.size)
            state |= {f"stored.{name}.{index}": tensor for name, tensor in saved.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._origin, self._chosen = int(state["origin"]), None
        for index, group in enumerate(self._all):
            if f"num_seen.{index}" not in state:
                raise ValueError(
                    "the saved cache has other groups of heads: resume with the head map it was saved with."
                )
            group.num_seen, group.num_chosen = int(state[f"num_seen.{index}"]), int(state[f"num_chosen.{index}"])
            numbers = state.get(f"numbers.{index}")
            group.numbers = None if numbers is None else numbers.to(self.geometry.device)
            group.buffer.load(0, 0, saved_part(state, "stored.", f".{index}"))

    @property
    def _all(self) -> list[_Group]:
        return [group for layer in self._layers for group in layer]

    def _groups(self, layer: int, head_map: "HeadMap") -> tuple[_Group, ...]:
        static, dynamic = head_map.static[layer], head_map.dynamic(layer)
        parts = [(heads, is_dynamic) for heads, is_dynamic in ((static, False), (dynamic, True)) if heads]
        if layer < self.policy.num_plain_layers or not self.policy.num_dynamic_frames:
            parts = [(None, False)]
        elif len(parts) == 1:
            parts = [(None, parts[0][1])]
        num_frames = self.policy.num_sink_frames + self.policy.num_recent_frames
        single, groups = replace(self.geometry, num_layers=1), []
        for heads, is_dynamic in parts:
            # Only where something is chosen from it the whole block has to be stored for a moment.
            places = (num_frames + (self.geometry.frames_per_block if is_dynamic else 0)) * self.size
            num_heads = None if heads is None else len(heads)
            groups.append(_Group(heads, is_dynamic, self.geometry.storage.buffer(single, places, num_heads=num_heads)))
        return tuple(groups)

    def _num_sinks(self, group: _Group) -> int:
        return min(self.policy.num_sink_frames, group.num_seen)

    def _num_recent(self, group: _Group) -> int:
        return min(self.policy.num_recent_frames, group.num_seen - self._num_sinks(group))

    def _num_held(self, group: _Group) -> int:
        return self._num_sinks(group) + group.num_chosen + self._num_recent(group)

    def _capacity(self, group: _Group) -> int:
        num_frames = self.policy.num_sink_frames + self.policy.num_recent_frames
        return (num_frames + group.is_dynamic * self.policy.num_dynamic_frames) * self.size

    def _oldest(self, start: int) -> int:
        """First frame that the chosen segments of a block at ``start`` can come from."""
        oldest = start - self.geometry.frames_per_block - self.policy.num_recent_frames
        return max(oldest, self._origin + self.policy.num_sink_frames)

    def _sink_position(self, start: int) -> int:
        if self._origin < 0:
            return start
        if self.policy.positions == "absolute":
            return self._origin
        return self._oldest(start) - self.policy.num_sink_frames

    def _reads(self, group: _Group, start: int) -> tuple[Read, ...]:
        size, reads = self.size, []
        num_sinks, num_recent = self._num_sinks(group), self._num_recent(group)
        first = num_sinks + group.num_chosen
        if num_sinks:
            frames = range(self._origin, self._origin + num_sinks)
            shift = self._sink_position(start) - self._origin
            reads.append(Read.of_frames(group.buffer.read(0, 0, num_sinks * size), frames, "sink", shift=shift))
        if group.numbers is not None and group.num_chosen:
            stored = group.buffer.read(0, num_sinks * size, first * size)
            frames = tuple(range(self._oldest(start), start - num_recent))
            reads.append(Read(stored, coordinates(group.numbers, self.geometry), frames=frames, role="mid"))
        if num_recent:
            stored = group.buffer.read(0, first * size, (first + num_recent) * size)
            reads.append(Read.of_frames(stored, range(start - num_recent, start), "recent"))
        return tuple(reads)

    def _store(self, group: _Group, pass_: Pass, k: Tensor, v: Tensor) -> None:
        size, buffer = self.size, group.buffer
        num_old, num_sinks = self._num_recent(group), self.policy.num_sink_frames
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
        num_dropped = max(num_left - self.policy.num_recent_frames - self.geometry.frames_per_block, 0)
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
        if num_frames and source != target:
            places = torch.arange(source * self.size, (source + num_frames) * self.size, device=self.geometry.device)
            buffer.move(0, places, target * self.size)

    def _choice(self, group: _Group, first: int, num_left: int, num_older: int) -> Tensor:
        """Tokens of the segments that stay, among those of the older frames: (batch, tokens), ascending.

        The first group that commits a block chooses for all.
        """
        if self._chosen is not None and self._chosen[0] == first:
            return self._chosen[1]
        start = self.policy.num_sink_frames * self.size
        keys = group.buffer.read(0, start, start + num_left * self.size).keys.float().flatten(2)
        keys = keys.unflatten(1, (num_left, self.size))[:, : num_older + 1]
        likeness = cosine_similarity(keys[:, :-1], keys[:, 1:], dim=-1).flatten(1)
        length = self.size // self.num_segments
        segments = likeness.unflatten(1, (-1, length)).mean(dim=2)
        num_kept = min(self.policy.num_dynamic_frames, num_older) * self.num_segments
        kept = segments.topk(num_kept, dim=1, largest=False).indices.sort(dim=1).values
        within = torch.arange(length, device=kept.device)
        self._chosen = (first, (kept[..., None] * length + within).flatten(1))
        return self._chosen[1]


@dataclass(frozen=True)
class HeadMap:
    """Heads by what they need."""

    static: tuple[tuple[int, ...], ...]  # per layer the heads to which the near past is enough; all others are dynamic
    num_heads: int  # heads per layer

    @property
    def num_layers(self) -> int:
        return len(self.static)

    @property
    def shape(self) -> str:
        return f"{self.num_layers} layers of {self.num_heads} heads"

    @property
    def num_static(self) -> int:
        return sum(map(len, self.static))

    def __post_init__(self) -> None:
        for layer, heads in enumerate(self.static):
            if len(set(heads)) != len(heads) or not all(0 <= head < self.num_heads for head in heads):
                raise ValueError(
                    f"static heads {list(heads)} of layer {layer} have to differ and lie in 0 to {self.num_heads - 1}."
                )

    def dynamic(self, layer: int) -> tuple[int, ...]:
        return tuple(head for head in range(self.num_heads) if head not in self.static[layer])


def _shipped_maps() -> dict[str, HeadMap]:
    return {name: _parse_head_map(read_bundled("heads", f"{name}.yaml"), name) for name in preset_names("heads")}


def _find_head_map(name: str, num_layers: int, num_heads: int) -> HeadMap:
    """Find ``auto``, the shipped map of a model of this shape; a shipped map; or a YAML or JSON file."""
    shape = f"{num_layers} layers of {num_heads} heads"
    shipped = _shipped_maps()
    if name == "auto":
        for known in shipped.values():
            if known.shape == shape:
                return known
        raise ValueError(f"no head map is shipped for a model of {shape}: {_PROFILER} and set head_map to the file.")
    if name in shipped:
        found = shipped[name]
    elif Path(name).is_file():
        found = _parse_head_map(yaml.safe_load(Path(name).read_text(encoding="utf-8")), name)
    else:
        raise ValueError(f"head_map={name!r} is no file and none of: auto, {', '.join(shipped)}; {_PROFILER}.")
    if found.shape != shape:
        raise ValueError(f"head_map={name!r} is of {found.shape}, this model has {shape}: {_PROFILER}.")
    return found


def _parse_head_map(content: Any, name: str) -> HeadMap:
    """Read ``num_heads`` and ``static_heads`` (a list per layer), or the file format of the Forcing-KV repository."""
    given = content if isinstance(content, Mapping) and "num_heads" in content else {}
    if isinstance(given.get("static_heads"), list):
        return HeadMap(tuple(map(tuple, given["static_heads"])), int(given["num_heads"]))
    if isinstance(given.get("layers"), list):
        layers = sorted(given["layers"], key=lambda layer: layer["layer_idx"])
        return HeadMap(tuple(tuple(layer["local_head"]) for layer in layers), int(given["num_heads"]))
    raise ValueError(f"{name} is no head map: it needs num_heads and static_heads, a list of heads per layer.")


def format_head_map(found: HeadMap, comment: str) -> str:
    """A map as YAML, under a comment."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"num_heads: {found.num_heads}", "static_heads:"]
    return "\n".join([*lines, *(f"  - {list(heads)}" for heads in found.static)]) + "\n"
