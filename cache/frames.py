"""Storage of whole frames, and the state shared by all policies that keep whole frames.

A frame-level policy is two pure functions of counters, ``FramePolicy.keep`` and ``FramePolicy.read``, so it can be
tested without a model.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

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
    check_room,
)
from longtake.cache.storage import DerivedTokens, KeysValues, Stored, saved_part

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class FramePlan:
    """Frames a block reads and the positions of everything in it."""

    frames: tuple[int, ...]  # stored frames, ascending
    positions: tuple[float, ...]  # one temporal position per frame of ``frames``
    query_positions: tuple[float, ...]  # one temporal position per frame of the block
    roles: tuple[str, ...] = ()  # role of each frame of ``frames``; empty: what ``FramePolicy.roles`` says

    @classmethod
    def absolute(cls, frames: tuple[int, ...], start_frame: int, num_frames: int) -> "FramePlan":
        """Every frame at its own index."""
        own = range(start_frame, start_frame + num_frames)
        return cls(frames, tuple(map(float, frames)), tuple(map(float, own)))

    @classmethod
    def contiguous(cls, frames: tuple[int, ...], num_frames: int, *, first: int = 0, gap: int = 0) -> "FramePlan":
        """Every frame at its place in the reading order, 0, 1, 2, ...; behind the first ones a gap may stay free."""
        places = [*range(first), *range(first + gap, len(frames) + gap + num_frames)]
        positions = tuple(map(float, places))
        return cls(frames, positions[: len(frames)], positions[len(frames) :])

    @classmethod
    def placed(cls, positions: str, frames: tuple[int, ...], start_frame: int, num_frames: int) -> "FramePlan":
        """One of the two by its name."""
        if positions == "absolute":
            return cls.absolute(frames, start_frame, num_frames)
        return cls.contiguous(frames, num_frames)


def ends(frames: tuple[int, ...], num_first: int, num_last: int) -> tuple[int, ...]:
    """The first and the last of some frames, each once."""
    return frames[:num_first] + frames[max(len(frames) - num_last, num_first) :]


@dataclass(frozen=True, kw_only=True)
class FramePolicy(CachePolicy):
    """A policy that keeps or drops whole frames, the same in every layer."""

    num_context_frames: int | None = None  # everything attended, the block itself included; null: no limit

    @abstractmethod
    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        """Choose the frames that stay stored for a block and later ones; the others are gone for good.

        Args:
            stored: Frames at hand, ascending, all before ``start_frame``.
            start_frame: First frame of the block.
            num_frames: Frames of the block.
        """

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Choose what a block reads of the kept frames, and its positions: all of them, side by side from 0.

        Args:
            kept: What ``keep`` returned.
            start_frame: First frame of the block.
            num_frames: Frames of the block.
        """
        return FramePlan.contiguous(kept, num_frames)

    def num_read_frames(self, frames_per_block: int) -> int | None:
        """Most stored frames that a block reads: what the context holds beside it; None when unbounded."""
        return None if self.num_context_frames is None else self.num_context_frames - frames_per_block

    def num_stored_frames(self, frames_per_block: int) -> int | None:
        """Most frames that are stored between blocks: as many as are read unless a policy says otherwise."""
        return self.num_read_frames(frames_per_block)

    def num_extra_frames(self, frames_per_block: int) -> int:
        """Places for whole frames that a state of its own fills, behind those of ``FrameState``."""
        return 0

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        """Name the role of each stored frame; all recent unless a policy says otherwise."""
        return ("recent",) * len(frames)

    def after_flush(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Frames that outlive the event ``flush``: the sinks and the newest one, unless a policy says otherwise."""
        roles = self.roles(stored)
        return tuple(f for f, role in zip(stored, roles, strict=True) if role == "sink" or f == stored[-1])

    def start(self, geometry: Geometry) -> "FrameState[Any]":
        self.check(geometry.frames_per_block, geometry.max_frames)
        return FrameState(self, geometry)


@dataclass(frozen=True, kw_only=True)
class SinkWindow(FramePolicy):
    """First frames and the last ones, side by side unless a policy says otherwise."""

    num_context_frames: int = 12  # everything attended: sinks, history and the block itself
    num_sink_frames: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "num_sink_frames")

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        content = f"num_sink_frames={self.num_sink_frames} and a block of {frames_per_block} frames"
        needed = self.num_sink_frames + frames_per_block
        check_room(self.num_context_frames, needed, content, remedy=", or fewer sinks")

    def num_sinks(self, stored: tuple[int, ...]) -> int:
        """Number of sinks among the stored frames: those before ``num_sink_frames``."""
        return sum(frame < self.num_sink_frames for frame in stored)

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        num_sinks = self.num_sinks(frames)
        return ("sink",) * num_sinks + ("recent",) * (len(frames) - num_sinks)

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        num_sinks = self.num_sinks(stored)
        return ends(stored, num_sinks, self.num_context_frames - num_frames - num_sinks)


P = TypeVar("P", bound=FramePolicy)


def assign_places(places: Mapping[T, int], wanted: Iterable[T], num_places: int) -> dict[T, int]:
    """Let whoever is wanted and has a place keep it, and give the others the first free ones."""
    wanted = list(wanted)
    kept = {item: places[item] for item in wanted if item in places}
    taken = set(kept.values())
    free = iter([place for place in range(num_places) if place not in taken])
    return kept | {item: next(free) for item in wanted if item not in kept}


class FrameStore:
    """Un-rotated keys and values of whole frames in fixed slots: a frame is written once and never moved.

    Args:
        geometry: Shapes of the rollout.
        num_slots: Frames to make room for; None grows by half again whenever it is full.
        num_extra: Frames' worth of places in ``buffer`` behind the slots, in bounded stores.
        frame_size: Tokens of a slot, where they are not a frame's.
    """

    def __init__(
        self, geometry: Geometry, num_slots: int | None, *, num_extra: int = 0, frame_size: int | None = None
    ) -> None:
        self.frame_size = frame_size or geometry.tokens_per_frame
        self.is_bounded = num_slots is not None
        self.num_slots = num_slots if num_slots is not None else geometry.max_frames or 4 * geometry.frames_per_block
        self.buffer = geometry.storage.buffer(geometry, (self.num_slots + num_extra) * self.frame_size)

    @property
    def bytes_per_frame(self) -> int:
        """Bytes of one frame over all layers and the batch."""
        return self.buffer.bytes_per_token * self.frame_size

    def grow(self, num_slots: int) -> None:
        if num_slots > self.num_slots:
            self.num_slots = max(num_slots, self.num_slots + self.num_slots // 2)
            self.buffer.grow(self.num_slots * self.frame_size)

    def write(self, layer: int, slots: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Store consecutive frames of ``k`` and ``v`` in ``slots``; a slot of -1 is skipped."""
        start = 0
        for count, slot in _runs(slots):
            part = slice(start * self.frame_size, (start + count) * self.frame_size)
            if slot >= 0:
                self.buffer.write(layer, slot * self.frame_size, k[:, part], v[:, part])
            start += count

    def read(self, layer: int, slots: Sequence[int]) -> list[tuple[int, Stored]]:
        """Tokens of ``slots`` in order, neighbours joined, also backwards: (number of frames, tokens) each."""
        size, parts = self.frame_size, []
        for count, slot, is_backwards in _walks(slots):
            stored = self.buffer.read(layer, slot * size, (slot + count) * size)
            parts.append((count, _Backwards(stored, size) if is_backwards else stored))
        return parts

    def reads(
        self, layer: int, slots: Sequence[int], frames: Sequence[int], positions: Sequence[float], *, role: str
    ) -> list[Read]:
        """Frames of ``slots`` at their positions, neighbours as one read."""
        reads, start = [], 0
        for count, stored in self.read(layer, slots):
            part = slice(start, start + count)
            reads.append(Read(stored, tuple(positions[part]), frames=tuple(frames[part]), role=role))
            start += count
        return reads

    def save(self, layer: int, slots: Sequence[int]) -> dict[str, Tensor]:
        """Frames of ``slots`` in order, as they are encoded."""
        size = self.frame_size
        parts = [self.buffer.save(layer, slot * size, (slot + n) * size) for n, slot in _runs(slots)]
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def _runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """(length, first slot) of neighbouring slots; a -1 stands alone."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and slot >= 0 and runs[-1][1] >= 0 and slot == sum(runs[-1]):
            runs[-1] = (runs[-1][0] + 1, runs[-1][1])
        else:
            runs.append((1, slot))
    return runs


def _walks(slots: Sequence[int]) -> list[tuple[int, int, bool]]:
    """(length, lowest slot, whether backwards) of neighbouring slots in either direction."""
    walks: list[tuple[int, int, bool]] = []
    for count, slot in _runs(slots):
        last, lowest, is_backwards = walks[-1] if walks else (0, 0, False)
        if count == 1 and slot == lowest - 1 and (is_backwards or last == 1):
            walks[-1] = (last + 1, slot, True)
        else:
            walks.append((count, slot, False))
    return walks


@dataclass(frozen=True)
class _Backwards(DerivedTokens):
    """Frames in the reverse of the order in which they are stored."""

    frame_size: int

    def derive(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (-1, self.frame_size)).flip(1).flatten(1, 2)


class FrameState(PolicyState, Generic[P]):
    """The state of any ``FramePolicy``: which frame lies in which slot.

    Slots are handed over once per block. Until the last layer has committed, passes of the committed block still
    see the map from before, and passes of the next block the map after.
    """

    def __init__(self, policy: P, geometry: Geometry) -> None:
        self.policy = policy
        self.geometry = geometry
        block = geometry.frames_per_block
        num_extra = policy.num_extra_frames(block)
        self.store = FrameStore(geometry, policy.num_stored_frames(block), num_extra=num_extra)
        self._before: dict[int, int] = {}
        self._after: dict[int, int] = {}
        self._committed = -1
        self._plan: tuple[tuple, FramePlan] | None = None

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        slots = self.slots(pass_)
        plan = self._planned(tuple(slots), pass_)
        capacity = (self.policy.num_read_frames(self.geometry.frames_per_block) or 0) * self.store.frame_size
        return Context(self._reads(layer, plan, slots), plan.query_positions, capacity=capacity)

    def slots(self, pass_: Pass) -> Mapping[int, int]:
        return self._before if pass_.start_frame <= self._committed else self._after

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        if pass_.start_frame != self._committed:
            self._hand_over(pass_)
        new = range(pass_.start_frame, pass_.start_frame + pass_.num_frames)
        gone = tuple(sorted({*self._before, *new} - self._after.keys()))
        if gone:
            self.release(layer, pass_, gone, KeysValues(k, v))
        self.store.write(layer, [self._after.get(f, -1) for f in new], k, v)

    def end_block(self, trace: BlockTrace) -> list[EncodeJob]:
        if trace.event in ("flush", "cut"):
            self.assign(self.policy.after_flush(tuple(sorted(self._after))))
        return []

    def kept(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        """Frames that stay; a state for which that depends on more than counters adds it here."""
        return self.policy.keep(stored, start_frame, num_frames)

    def plan(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Frames and positions that a block reads; likewise."""
        return self.policy.read(self.kept(stored, start_frame, num_frames), start_frame, num_frames)

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        return self.policy.roles(frames)

    def assign(self, frames: tuple[int, ...]) -> None:
        """Make these the frames at hand: stored ones stay where they are, others get a place to be written to."""
        self._after = assign_places(self._after, frames, self.store.num_slots)

    def release(self, layer: int, pass_: Pass, frames: tuple[int, ...], own: KeysValues) -> None:
        """Take leave of frames that no later block reads, before their slots are written over; here nothing.

        Called once per layer and block. ``frames`` ascend, and are still in the slots that ``self._before`` says, but
        for those of the pass, whose tokens are ``own``.
        """

    def stats(self) -> CacheStats:
        plan = self._plan[1] if self._plan else None
        roles = Counter(self.roles(tuple(sorted(self._after))))
        span = (*plan.positions, *plan.query_positions) if plan else ()
        return CacheStats(
            tokens={role: n * self.geometry.tokens_per_frame for role, n in roles.items()},
            bytes={role: n * self.store.bytes_per_frame for role, n in roles.items()},
            positions=(min(span), max(span)) if span else None,
        )

    def state_dict(self) -> dict[str, Tensor | Number]:
        """Frames at hand, in time order, so that slots may differ after a resume."""
        frames = tuple(sorted(self._after))
        state: dict[str, Tensor | Number] = {"committed": self._committed, "frames": torch.tensor(frames).long()}
        for layer in range(self.geometry.num_layers if frames else 0):
            saved = self.store.save(layer, [self._after[f] for f in frames])
            state |= {f"{name}.{layer}": tensor for name, tensor in saved.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        frames = state["frames"].tolist()
        if len(frames) > self.store.num_slots:
            if self.store.is_bounded:
                raise ValueError(
                    f"the saved cache holds {len(frames)} frames, this policy stores {self.store.num_slots}: "
                    "resume with the cache settings it was saved with."
                )
            self.store.grow(len(frames))
        self._committed = int(state["committed"])
        self._before, self._after, self._plan = {}, {frame: slot for slot, frame in enumerate(frames)}, None
        for layer in range(self.geometry.num_layers if frames else 0):
            self.store.buffer.load(layer, 0, saved_part(state, "", f".{layer}"))

    def _reads(self, layer: int, plan: FramePlan, slots: Mapping[int, int]) -> tuple[Read, ...]:
        """Neighbouring slots of one role are one read."""
        reads: list[Read] = []
        start = 0
        for role, group in groupby(plan.roles or self.roles(plan.frames)):
            end = start + len(list(group))
            frames, positions = plan.frames[start:end], plan.positions[start:end]
            reads += self.store.reads(layer, [slots[frame] for frame in frames], frames, positions, role=role)
            start = end
        return tuple(reads)

    def _planned(self, stored: tuple[int, ...], pass_: Pass) -> FramePlan:
        key = (pass_.start_frame, pass_.num_frames)
        if self._plan is None or self._plan[0] != key:
            self._plan = (key, self.plan(tuple(sorted(stored)), pass_.start_frame, pass_.num_frames))
        return self._plan[1]

    def _hand_over(self, pass_: Pass) -> None:
        end = pass_.start_frame + pass_.num_frames
        at_hand = (*sorted(self._after), *range(pass_.start_frame, end))
        kept = self.kept(at_hand, end, self.geometry.frames_per_block)
        if not self.store.is_bounded:
            self.store.grow(len(kept))
        self._before, self._committed = self._after, pass_.start_frame
        self.assign(kept)
