"""Running averages of frames, for policies that let go of frames but not of what was in them."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from longtake.cache.base import CacheStats, Context, Geometry, Number, Pass, Read
from longtake.cache.frames import FramePolicy, FrameState
from longtake.cache.storage import KeysValues, Storage, Stored


@dataclass(frozen=True, kw_only=True)
class AveragingPolicy(FramePolicy):
    """A policy that reads averages beside frames. Its ``plan`` leaves their positions free."""

    average_role: ClassVar[str]  # role under which averages are read

    @property
    @abstractmethod
    def num_averages(self) -> int:
        """Most frames' worth of averages."""

    @abstractmethod
    def averages(self, start_frame: int, num_frames: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The frames that the averages of a block stand for most, in order, and their positions."""

    @abstractmethod
    def update(self, averages: "FrameAverages", layer: int, frames: tuple[int, ...], tokens: list[KeysValues]) -> None:
        """Take released frames, ascending, and their tokens into the averages of one layer."""

    def start(self, geometry: Geometry) -> "_AveragingState":
        self.check(geometry.frames_per_block, geometry.max_frames)
        return _AveragingState(self, geometry)


class FrameAverages:
    """Averages in float32, whatever the rollout's dtype and storage.

    An average moves by a thousandth of a difference, which bfloat16 and eight bits round away: kept in the rollout's
    own storage it would never move.
    """

    def __init__(self, geometry: Geometry, num_frames: int) -> None:
        self.dtype = geometry.dtype
        self.size = geometry.tokens_per_frame
        self.buffer = Storage().buffer(replace(geometry, dtype=torch.float32), num_frames * self.size)

    def put(self, layer: int, place: int, new: Stored) -> None:
        """Begin an average with a frame."""
        self.buffer.write(layer, place * self.size, new.keys, new.values)

    def mix(self, layer: int, place: int, new: Stored, weight: float) -> None:
        """Move an average towards a frame by ``weight`` of the difference."""
        old = self.buffer.read(layer, place * self.size, (place + 1) * self.size)
        old.keys.lerp_(new.keys.float(), weight)
        old.values.lerp_(new.values.float(), weight)

    def read(self, layer: int, num_frames: int) -> KeysValues:
        """The first averages, in the rollout's dtype."""
        stored = self.buffer.read(layer, 0, num_frames * self.size)
        return KeysValues(stored.keys.to(self.dtype), stored.values.to(self.dtype))


class _AveragingState(FrameState[AveragingPolicy]):
    """Frames, and averages of those that were let go of. Averages of a layer change when that layer commits."""

    def __init__(self, policy: AveragingPolicy, geometry: Geometry) -> None:
        super().__init__(policy, geometry)
        self.averages = FrameAverages(geometry, policy.num_averages)
        self._end = 0  # frame behind the last committed one
        self._seen: tuple[int, int] | None = None  # first frame and size of the block that was last selected for

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        """Read frames and averages, in the order of their positions."""
        context = super().select(layer, pass_, q)
        self._seen = pass_.start_frame, pass_.num_frames
        frames, positions = self.policy.averages(*self._seen)
        reads = context.reads
        if frames:
            stored = self.averages.read(layer, len(frames))
            average = Read(stored, positions, frames=frames, role=self.policy.average_role)
            reads = tuple(sorted((*reads, average), key=lambda read: read.positions[0]))
        capacity = context.capacity + self.policy.num_averages * self.averages.size
        return replace(context, reads=reads, capacity=capacity)

    def release(self, layer: int, pass_: Pass, frames: tuple[int, ...], own: KeysValues) -> None:
        """Take the frames into the averages."""
        slots = [self._before[frame] for frame in frames if frame in self._before]
        starts = [frame - pass_.start_frame for frame in frames if frame not in self._before]
        parts = [stored for _, stored in self.store.read(layer, slots)]
        tokens = [one for stored in parts for one in self._frames_of(stored)]
        new = self._frames_of(own)
        self.policy.update(self.averages, layer, frames, [*tokens, *(new[start] for start in starts)])

    def _frames_of(self, stored: Stored) -> list[KeysValues]:
        size = self.averages.size
        return [
            KeysValues(k, v) for k, v in zip(stored.keys.split(size, 1), stored.values.split(size, 1), strict=True)
        ]

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().commit(layer, pass_, q, k, v)
        self._end = pass_.start_frame + pass_.num_frames

    def stats(self) -> CacheStats:
        stats, role = super().stats(), self.policy.average_role
        tokens, bytes_, positions = dict(stats.tokens), dict(stats.bytes), stats.positions
        num_tokens = len(self.policy.averages(self._end, self.geometry.frames_per_block)[0]) * self.averages.size
        if num_tokens:
            tokens[role] = tokens.get(role, 0) + num_tokens
            bytes_[role] = bytes_.get(role, 0) + num_tokens * self.averages.buffer.bytes_per_token
        if positions is not None and self._seen is not None:
            span = (*positions, *self.policy.averages(*self._seen)[1])
            positions = min(span), max(span)
        return CacheStats(tokens, bytes_, positions)

    def state_dict(self) -> dict[str, Tensor | Number]:
        state = super().state_dict() | {"end": self._end}
        buffer = self.averages.buffer
        for layer in range(self.geometry.num_layers if self._end else 0):
            saved = buffer.save(layer, 0, buffer.num_tokens)
            state |= {f"averages.{layer}.{name}": tensor for name, tensor in saved.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._end, self._seen = int(state["end"]), None
        for layer in range(self.geometry.num_layers if self._end else 0):
            saved = {name: state[f"averages.{layer}.{name}"] for name in ("keys", "values")}
            if saved["keys"].shape[1] != self.averages.buffer.num_tokens:
                raise ValueError(
                    f"the saved cache holds averages of {saved['keys'].shape[1]} tokens, this policy of "
                    f"{self.averages.buffer.num_tokens}: resume with the cache settings it was saved with."
                )
            self.averages.buffer.load(layer, 0, saved)
