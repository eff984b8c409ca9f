"""Sinks, a slow memory of frames that brought something new, and a fast one of the last frames."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from longtake.cache.base import CacheStats, Context, Geometry, Number, Pass, Read, Traits, check_room
from longtake.cache.frames import FramePlan, FrameState, SinkWindow, ends
from longtake.cache.storage import KeysValues, saved_part


@dataclass(frozen=True, kw_only=True)
class SlowFast(SinkWindow):
    """Slow-fast memory of Context Forcing (arXiv:2602.06028; published: 3 sinks, 12 slow, 6 fast, threshold 0.95).

    The fast memory is a queue: the last ``num_recent_frames``, the block included. When a block whose keys resemble
    those before it less than ``threshold`` leaves the queue, its first frame enters the slow memory, and the oldest
    one there makes room. Only every ``num_blocks_per_update``-th block is looked at.

    The paper leaves open, and is chosen here: likeness of the first frame of a block and the one before it, as the
    mean cosine of raw keys at each place of the grid with all heads side by side, or the cosine of mean keys
    (``similarity``), in the first or each layer (``decided_by``), for every video by itself. Until the slow memory is
    full, everything that leaves the queue enters it.
    """

    name: ClassVar[str] = "slow_fast"
    source: ClassVar[str] = "Context Forcing, arXiv:2602.06028"
    traits: ClassVar[Traits] = Traits(breaks_frames=True)  # slow frames are read as one memory

    num_context_frames: int = 21  # everything attended: sinks, slow, fast and the block itself
    num_recent_frames: int = 6  # the fast memory, the block itself included
    threshold: float = 0.95  # cosine below which a block brings something new
    num_blocks_per_update: int = 2
    similarity: Literal["places", "means"] = "places"
    decided_by: Literal["first_layer", "each_layer"] = "first_layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "num_sink_frames", "num_blocks_per_update")
        content = (
            f"num_sink_frames={self.num_sink_frames}, num_recent_frames={self.num_recent_frames} and a slow frame"
        )
        check_room(self.num_context_frames, self.num_sink_frames + self.num_recent_frames + 1, content)

    @property
    def num_slow_frames(self) -> int:
        """Frames that sinks and fast memory leave of the context."""
        return self.num_context_frames - self.num_sink_frames - self.num_recent_frames

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        if self.num_recent_frames < 2 * frames_per_block:
            raise ValueError(
                f"num_recent_frames={self.num_recent_frames} does not hold a block of {frames_per_block} frames and "
                f"the one before it: use {2 * frames_per_block} or more."
            )

    def start(self, geometry: Geometry) -> "_SlowMemoryState":
        self.check(geometry.frames_per_block, geometry.max_frames)
        return _SlowMemoryState(self, geometry)

    def num_stored_frames(self, frames_per_block: int) -> int | None:
        return self.num_sink_frames + self.num_recent_frames - frames_per_block

    def num_extra_frames(self, frames_per_block: int) -> int:
        return self.num_slow_frames

    def num_slow(self, start_frame: int, num_frames: int) -> int:
        gone = start_frame - (self.num_recent_frames - num_frames) - self.num_sink_frames
        return min(max(gone, 0), self.num_slow_frames)

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        return ends(stored, self.num_sinks(stored), self.num_recent_frames - num_frames)

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Read all, with a gap behind the sinks for the slow memory."""
        gap = self.num_slow(start_frame, num_frames)
        return FramePlan.contiguous(kept, num_frames, first=self.num_sinks(kept), gap=gap)


class _SlowMemoryState(FrameState[SlowFast]):
    """Sinks and a queue of last frames, and behind their slots the slow memory, oldest first.

    Whether a frame enters the slow memory is a tensor on the device, one decision per sample: the memory moves up by
    one or stays, by an index, so that nothing waits for a decision and tokens are moved as they are encoded.
    """

    def __init__(self, policy: SlowFast, geometry: Geometry) -> None:
        super().__init__(policy, geometry)
        rows = geometry.num_layers if policy.decided_by == "each_layer" else 1
        self._is_shared = rows == 1
        shape = (rows, geometry.batch_size, policy.num_slow_frames)
        self._frames = torch.zeros(shape, dtype=torch.int64, device=geometry.device)
        self._alike: dict[int, Tensor] = {}  # first frame of a block -> (rows, batch), how like the frame before it is
        self._end = 0  # frame behind the last committed one

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        context = super().select(layer, pass_, q)
        count, first = self.policy.num_slow(pass_.start_frame, pass_.num_frames), self.policy.num_sink_frames
        if not count:
            return context
        start, size = self._first_place, self.store.frame_size
        stored = self.store.buffer.read(layer, start, start + count * size)
        positions = tuple(map(float, range(first, first + count)))
        # Elsewhere than on the CPU the device would have to be waited for, to know which frames are there now.
        frames = tuple(range(first, first + count))
        if self._frames.device.type == "cpu":
            frames = tuple(self._frames[0 if self._is_shared else layer, 0, :count].tolist())
        sinks = [read for read in context.reads if read.role == "sink"]
        slow = Read(stored, positions, frames=frames, role="memory")
        return replace(context, reads=(*sinks, slow, *context.reads[len(sinks) :]))

    def commit(self, layer: int, pass_: Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        if self._decides(layer) and self._is_looked_at(pass_.block_index) and pass_.start_frame:
            self._compare(layer, pass_, k)
        super().commit(layer, pass_, q, k, v)
        self._end = pass_.start_frame + pass_.num_frames

    def release(self, layer: int, pass_: Pass, frames: tuple[int, ...], own: KeysValues) -> None:
        """Take frames that leave the queue into the slow memory while it has room; then those with something new."""
        size, row = self.store.frame_size, 0 if self._is_shared else layer
        for frame in frames:
            slot, place = self._before[frame], frame - self.policy.num_sink_frames
            distance, rest = divmod(pass_.start_frame - frame, pass_.num_frames)
            if place < self.policy.num_slow_frames:
                index = torch.arange(slot * size, (slot + 1) * size, device=self._frames.device)
                self.store.buffer.move(layer, index, self._first_place + place * size)
                self._frames[row, :, place] = frame
            elif not rest and self._is_looked_at(pass_.block_index - distance):
                self._offer(layer, row, frame, slot)

    def stats(self) -> CacheStats:
        stats = super().stats()
        count = self.policy.num_slow(self._end, self.geometry.frames_per_block)
        if not count:
            return stats
        tokens = dict(stats.tokens) | {"memory": count * self.store.frame_size}
        return replace(stats, tokens=tokens, bytes=dict(stats.bytes) | {"memory": count * self.store.bytes_per_frame})

    def state_dict(self) -> dict[str, Tensor | Number]:
        """Sinks, queue and slow memory, and what has been found of blocks still in the queue."""
        state = super().state_dict() | {"end": self._end, "slow.frames": self._frames.clone()}
        start, count = self._first_place, self.policy.num_slow(self._end, self.geometry.frames_per_block)
        for layer in range(self.geometry.num_layers if count else 0):
            saved = self.store.buffer.save(layer, start, start + count * self.store.frame_size)
            state |= {f"slow.{layer}.{name}": tensor for name, tensor in saved.items()}
        return state | {f"alike.{frame}.": alike.clone() for frame, alike in self._alike.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["slow.frames"].shape != self._frames.shape:
            raise ValueError(
                f"the saved cache decided for {tuple(state['slow.frames'].shape)} (layers, videos, slow frames), this "
                f"rollout does for {tuple(self._frames.shape)}: resume with the settings and batch it was saved with."
            )
        super().load_state_dict(state)
        self._end = int(state["end"])
        self._frames.copy_(state["slow.frames"])
        alike = saved_part(state, "alike.", ".")
        self._alike = {int(frame): tensor.to(self._frames.device) for frame, tensor in alike.items()}
        for layer in range(self.geometry.num_layers):
            if saved := saved_part(state, f"slow.{layer}."):
                self.store.buffer.load(layer, self._first_place, saved)

    @property
    def _first_place(self) -> int:
        return self.store.num_slots * self.store.frame_size

    def _decides(self, layer: int) -> bool:
        return layer == 0 or not self._is_shared

    def _is_looked_at(self, block_index: int) -> bool:
        every = self.policy.num_blocks_per_update
        return block_index % every == every - 1

    def _compare(self, layer: int, pass_: Pass, k: Tensor) -> None:
        """Note how like the frame before it a block's first frame is, before that frame's slot can be written over."""
        if layer == 0:
            queued = [f for f in self._after if f >= self.policy.num_sink_frames]
            self._alike = {f: alike for f, alike in self._alike.items() if f >= min(queued, default=0)}
            self._alike[pass_.start_frame] = torch.ones(self._frames.shape[:2], device=self._frames.device)
        ((_, before),) = self.store.read(layer, [self.slots(pass_)[pass_.start_frame - 1]])
        pair = [x.float() for x in (k[:, : self.store.frame_size], before.keys)]
        if self.policy.similarity == "means":
            pair = [x.mean(dim=1, keepdim=True) for x in pair]
        alike = cosine_similarity(*(x.flatten(2) for x in pair), dim=-1).mean(dim=1)
        self._alike[pass_.start_frame][0 if self._is_shared else layer] = alike

    def _offer(self, layer: int, row: int, frame: int, slot: int) -> None:
        """Let a frame take the newest place of the slow memory and the others move up, where it brought something."""
        enters = (self._alike[frame][row] < self.policy.threshold).long()
        count, size, device = self.policy.num_slow_frames, self.store.frame_size, self._frames.device
        index = torch.arange(count, device=device) + enters[:, None]
        first = self.store.num_slots
        places = torch.tensor([*range(first, first + count), slot], device=device)[index]
        tokens = places[:, :, None] * size + torch.arange(size, device=device)
        self.store.buffer.move(layer, tokens.flatten(1), self._first_place)
        if self._decides(layer):
            newest = torch.full((index.shape[0], 1), frame, device=device)
            self._frames[row] = torch.cat([self._frames[row], newest], dim=1).gather(1, index)
