"""Storage of whole frames, and the state shared by all policies that keep whole frames.

A frame-level policy is a pure function of counters (``FramePolicy.plan``), so it can be tested without a model.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.cache.base import CachePolicy, CacheStats, Context, Geometry, Number, Pass, PolicyState, Read


@dataclass(frozen=True)
class FramePlan:
    """Frames a block reads and the positions of everything in it.

    Attributes:
        frames: Stored frames, ascending.
        positions: One temporal position per frame of ``frames``.
        query_positions: One temporal position per frame of the block.
    """

    frames: tuple[int, ...]
    positions: tuple[float, ...]
    query_positions: tuple[float, ...]

    @classmethod
    def absolute(cls, frames: tuple[int, ...], start_frame: int, num_frames: int) -> "FramePlan":
        """Every frame at its own index."""
        own = range(start_frame, start_frame + num_frames)
        return cls(frames, tuple(map(float, frames)), tuple(map(float, own)))

    @classmethod
    def contiguous(cls, frames: tuple[int, ...], num_frames: int) -> "FramePlan":
        """Every frame at its place in the reading order: 0, 1, 2, ..."""
        positions = tuple(map(float, range(len(frames) + num_frames)))
        return cls(frames, positions[: len(frames)], positions[len(frames) :])


@dataclass(frozen=True, kw_only=True)
class FramePolicy(CachePolicy):
    """A policy that keeps or drops whole frames, the same in every layer."""

    @abstractmethod
    def plan(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Say what the block at ``start_frame`` reads.

        What the next block does not read is dropped for good, so a plan may only ever let go of frames.

        Args:
            stored: Frames at hand, ascending, all before ``start_frame``.
            start_frame: First frame of the block.
            num_frames: Frames of the block.
        """

    @abstractmethod
    def num_stored_frames(self, frames_per_block: int) -> int | None:
        """Most frames that are stored between blocks; None when unbounded."""

    def roles(self, frames: tuple[int, ...]) -> dict[str, int]:
        """Count stored frames by role; all recent unless a policy says otherwise."""
        return {"recent": len(frames)}

    def start(self, geometry: Geometry) -> "FrameState":
        """Make the empty state of one rollout."""
        self.check(geometry.frames_per_block, geometry.max_frames)
        return FrameState(self, geometry)


class FrameStore:
    """Un-rotated keys and values of whole frames in fixed slots: a frame is written once and never moved.

    Args:
        geometry: Shapes of the rollout.
        num_slots: Frames to make room for; None grows by half again whenever it is full.
    """

    def __init__(self, geometry: Geometry, num_slots: int | None) -> None:
        self.geometry = geometry
        self.is_bounded = num_slots is not None
        self.num_slots = num_slots if num_slots is not None else geometry.max_frames or 4 * geometry.frames_per_block
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def allocate(self) -> None:
        """Allocate every layer's slots; free of cost when it has been done."""
        while len(self._keys) < self.geometry.num_layers:
            self._keys.append(self._empty(self.num_slots))
            self._values.append(self._empty(self.num_slots))

    def grow(self, num_slots: int) -> None:
        """Make room for ``num_slots`` frames, keeping what is stored."""
        if num_slots <= self.num_slots:
            return
        old, self.num_slots = self.num_slots, max(num_slots, self.num_slots + self.num_slots // 2)
        for tensors in (self._keys, self._values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = self._empty(self.num_slots)
                tensors[layer][:, : old * self.geometry.tokens_per_frame] = tensor

    def write(self, layer: int, slots: tuple[int, ...], k: Tensor, v: Tensor) -> None:
        """Store consecutive frames of ``k`` and ``v`` in ``slots``; a slot of -1 is skipped."""
        size = self.geometry.tokens_per_frame
        for frame, slot in enumerate(slots):
            if slot >= 0:
                source, target = slice(frame * size, (frame + 1) * size), slice(slot * size, (slot + 1) * size)
                self._keys[layer][:, target] = k[:, source]
                self._values[layer][:, target] = v[:, source]

    def runs(self, layer: int, slots: tuple[int, ...]) -> list[tuple[int, Tensor, Tensor]]:
        """Views of ``slots`` in order, neighbours joined: (number of frames, keys, values) each."""
        size = self.geometry.tokens_per_frame
        runs, start = [], 0
        for end in range(1, len(slots) + 1):
            if end == len(slots) or slots[end] != slots[end - 1] + 1:
                span = slice(slots[start] * size, (slots[end - 1] + 1) * size)
                runs.append((end - start, self._keys[layer][:, span], self._values[layer][:, span]))
                start = end
        return runs

    def _empty(self, num_slots: int) -> Tensor:
        g = self.geometry
        shape = (g.batch_size, num_slots * g.tokens_per_frame, g.num_heads, g.head_dim)
        return torch.zeros(shape, dtype=g.dtype, device=g.device)


class FrameState(PolicyState):
    """The state of any ``FramePolicy``: which frame lies in which slot.

    Slots are handed over once per block. Until the last layer has committed, passes of the committed block still
    see the map from before, and passes of the next block the map after.
    """

    def __init__(self, policy: FramePolicy, geometry: Geometry) -> None:
        self.policy = policy
        self.geometry = geometry
        self.store = FrameStore(geometry, policy.num_stored_frames(geometry.frames_per_block))
        self._before: dict[int, int] = {}
        self._after: dict[int, int] = {}
        self._committed = -1
        self._plan: tuple[int, FramePlan] | None = None

    def select(self, layer: int, pass_: Pass) -> Context:
        """Read the frames that the policy plans for this block."""
        slots = self._before if pass_.start_frame <= self._committed else self._after
        plan = self._planned(tuple(slots), pass_)
        reads, done = [], 0
        for count, keys, values in self.store.runs(layer, tuple(slots[f] for f in plan.frames)):
            reads.append(Read(keys, values, plan.positions[done : done + count]))
            done += count
        capacity = self.store.num_slots * self.geometry.tokens_per_frame if self.store.is_bounded else 0
        return Context(tuple(reads), plan.query_positions, capacity=capacity)

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep the block's frames in the slots of those that the next block no longer reads."""
        if pass_.start_frame != self._committed:
            self._hand_over(pass_)
        new = range(pass_.start_frame, pass_.start_frame + pass_.num_frames)
        self.store.write(layer, tuple(self._after.get(f, -1) for f in new), k, v)

    def stats(self) -> CacheStats:
        """Tokens and bytes of the frames at hand."""
        plan = self._plan[1] if self._plan else None
        roles = self.policy.roles(tuple(sorted(self._after)))
        span = (*plan.positions, *plan.query_positions) if plan else ()
        return CacheStats(
            tokens={role: n * self.geometry.tokens_per_frame for role, n in roles.items()},
            bytes={role: n * self.geometry.bytes_per_frame for role, n in roles.items()},
            positions=(min(span), max(span)) if span else None,
        )

    def state_dict(self) -> dict[str, Tensor | Number]:
        """Frames at hand, in time order, so that slots may differ after a resume."""
        state: dict[str, Tensor | Number] = {"committed": self._committed, "num_frames": len(self._after)}
        frames = tuple(sorted(self._after))
        state["frames"] = torch.tensor(frames, dtype=torch.int64)
        if frames:
            for layer in range(self.geometry.num_layers):
                runs = self.store.runs(layer, tuple(self._after[f] for f in frames))
                state[f"keys.{layer}"] = torch.cat([keys for _, keys, _ in runs], dim=1)
                state[f"values.{layer}"] = torch.cat([values for _, _, values in runs], dim=1)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | Number]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: If the saved shapes are not this rollout's.
        """
        frames = state["frames"].tolist()
        if len(frames) > self.store.num_slots:
            if self.store.is_bounded:
                raise ValueError(
                    f"the saved cache holds {len(frames)} frames, this policy stores {self.store.num_slots}: "
                    "resume with the cache settings it was saved with."
                )
            self.store.grow(len(frames))
        self.store.allocate()
        self._committed = int(state["committed"])
        self._before, self._after, self._plan = {}, {frame: slot for slot, frame in enumerate(frames)}, None
        slots = tuple(range(len(frames)))
        for layer in range(self.geometry.num_layers if frames else 0):
            k, v = state[f"keys.{layer}"], state[f"values.{layer}"]
            g = self.geometry
            shape = (g.batch_size, len(frames) * g.tokens_per_frame, g.num_heads, g.head_dim)
            if tuple(k.shape) != shape:
                raise ValueError(
                    f"saved keys have shape {tuple(k.shape)}, this rollout needs {shape}: "
                    "resume with the model, size and batch it was saved with."
                )
            self.store.write(layer, slots, k.to(g.device), v.to(g.device))

    def _planned(self, stored: tuple[int, ...], pass_: Pass) -> FramePlan:
        if self._plan is None or self._plan[0] != pass_.start_frame:
            plan = self.policy.plan(tuple(sorted(stored)), pass_.start_frame, pass_.num_frames)
            self._plan = (pass_.start_frame, plan)
        return self._plan[1]

    def _hand_over(self, pass_: Pass) -> None:
        end = pass_.start_frame + pass_.num_frames
        at_hand = (*sorted(self._after), *range(pass_.start_frame, end))
        kept = set(self.policy.plan(at_hand, end, self.geometry.frames_per_block).frames)
        if not self.store.is_bounded:
            self.store.grow(len(kept))
        self.store.allocate()
        after = {frame: slot for frame, slot in self._after.items() if frame in kept}
        taken = set(after.values())
        free = iter([slot for slot in range(self.store.num_slots) if slot not in taken])
        after |= {frame: next(free) for frame in range(pass_.start_frame, end) if frame in kept}
        self._before, self._after, self._committed = self._after, after, pass_.start_frame
