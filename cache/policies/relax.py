"""Sinks, one or a few chosen frames of a long past, and the last frame."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from longtake.cache.base import Context, Geometry, Pass, Read, check_room
from longtake.cache.frames import FramePlan, FrameState, SinkWindow, ends
from longtake.cache.storage import Stored


@dataclass(frozen=True, kw_only=True)
class Relax(SinkWindow):
    """Sink, selected history and tail (Relax Forcing, arXiv:2603.21366; released: 2 + 1 + 1 + 3 frames of 120 kept).

    A frame stands for the mean of its raw keys in the first layer, scaled to length 1. When a block starts,
    ``num_candidates`` frames, evenly spaced over the newer half of what lies between sinks and tail, are scored by

        cos(candidate, sinks) - redundancy * cos(candidate, tail)

    and the best, as many as ``num_context_frames`` has room for, are read in all layers and steps of the block.

    ``positions: contiguous`` equals the released "hybrid" but for a shift that attention does not see; ``absolute`` is
    its ablation.

    Differs: every video chooses for itself; where rounding leaves fewer candidates than history frames, the whole
    newer half is scored.
    """

    name: ClassVar[str] = "relax"
    source: ClassVar[str] = "Relax Forcing, arXiv:2603.21366"

    num_context_frames: int = 7  # everything attended: sinks, history, tail and the block itself
    num_sink_frames: int = 2
    num_recent_frames: int = 1  # the tail: last frames before the block
    num_budget_frames: int = 120  # everything kept to choose from, the block itself included
    num_candidates: int = 4
    redundancy: float = 2.0  # weight of likeness to the tail
    positions: Literal["absolute", "contiguous"] = "contiguous"

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("num_sink_frames", "num_recent_frames", "num_candidates")
        self.at_least(1, *counts, note=": history is chosen by comparison")
        if self.num_budget_frames < self.num_context_frames:
            raise ValueError(
                f"num_budget_frames={self.num_budget_frames} is less than num_context_frames="
                f"{self.num_context_frames}: keep at least what is attended."
            )

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        content = (
            f"num_sink_frames={self.num_sink_frames}, a frame of history, num_recent_frames={self.num_recent_frames} "
            f"and a block of {frames_per_block} frames"
        )
        needed = self.num_sink_frames + 1 + self.num_recent_frames + frames_per_block
        check_room(self.num_context_frames, needed, content)

    def start(self, geometry: Geometry) -> "_HistoryState":
        self.check(geometry.frames_per_block, geometry.max_frames)
        return _HistoryState(self, geometry)

    def num_stored_frames(self, frames_per_block: int) -> int | None:
        return self.num_budget_frames - frames_per_block

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        last = len(frames) - self.num_recent_frames
        roles = ("recent" if index >= last else "mid" for index in range(len(frames)))
        return tuple("sink" if f < self.num_sink_frames else role for f, role in zip(frames, roles, strict=True))

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        first = start_frame - (self.num_budget_frames - num_frames - self.num_sink_frames)
        return tuple(frame for frame in stored if frame < self.num_sink_frames or frame >= first)

    def num_history(self, start_frame: int, num_frames: int) -> int:
        """Frames that the block at ``start_frame`` chooses; 0 while all fit."""
        if start_frame + num_frames <= self.num_context_frames:
            return 0
        return self.num_context_frames - num_frames - self.num_sink_frames - self.num_recent_frames

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Read all while all fits; then sinks and tail, with a gap for history."""
        gap = self.num_history(start_frame, num_frames)
        frames = ends(kept, self.num_sink_frames, self.num_recent_frames) if gap else kept
        if self.positions == "absolute":
            return replace(FramePlan.absolute(frames, start_frame, num_frames), roles=self.roles(frames))
        plan = FramePlan.contiguous(frames, num_frames, first=self.num_sink_frames if gap else 0, gap=gap)
        return replace(plan, roles=self.roles(frames))

    def candidates(self, stored: tuple[int, ...], num_history: int) -> tuple[int, ...]:
        """Frames that stand for election, evenly spaced over the newer half of the middle."""
        middle = stored[self.num_sink_frames : len(stored) - self.num_recent_frames]
        first = len(middle) // 2
        count = min(self.num_candidates, len(middle) - first)
        if count > 1:
            places = torch.linspace(first, len(middle) - 1, count + 1).long().unique()[:-1].tolist()
        else:
            places = [first]
        if len(places) < num_history:
            places = range(min(first, len(middle) - num_history), len(middle))
        return tuple(middle[place] for place in places)


@dataclass(frozen=True)
class _Chosen(Stored):
    """Some of several frames, each sample its own, gathered when they are read."""

    candidates: tuple[Stored, ...]  # one frame each
    index: Tensor  # (batch, chosen), int64, which candidates
    frame_size: int  # tokens of a frame

    @property
    def num_tokens(self) -> int:
        return self.index.shape[1] * self.frame_size

    @property
    def keys(self) -> Tensor:
        return self._gathered([candidate.keys for candidate in self.candidates])

    @property
    def values(self) -> Tensor:
        return self._gathered([candidate.values for candidate in self.candidates])

    def _gathered(self, frames: Sequence[Tensor]) -> Tensor:
        chosen = torch.take_along_dim(torch.stack(list(frames), dim=1), self.index[:, :, None, None, None], dim=1)
        return chosen.flatten(1, 2)


class _HistoryState(FrameState[Relax]):
    """Frames to choose from, and the choices of the block being made and the one before it.

    A choice is a tensor on the device: nothing waits for it. It follows from what is stored, so it is not saved.
    """

    def __init__(self, policy: Relax, geometry: Geometry) -> None:
        super().__init__(policy, geometry)
        self._choices: dict[int, tuple[tuple[int, ...], Tensor]] = {}

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        context = super().select(layer, pass_, q)
        if not self.policy.num_history(pass_.start_frame, pass_.num_frames):
            return context
        history = self._history(layer, pass_)
        sinks = [read for read in context.reads if read.role == "sink"]
        return replace(context, reads=(*sinks, history, *context.reads[len(sinks) :]))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._choices = {}

    def _history(self, layer: int, pass_: Pass) -> Read:
        if pass_.start_frame not in self._choices:
            # In a forward shared by a commit and the next block, passes of both still ask, layer by layer.
            newest = dict(sorted(self._choices.items())[-1:])
            self._choices = newest | {pass_.start_frame: self._choose(pass_)}
        frames, index = self._choices[pass_.start_frame]
        slots = self.slots(pass_)
        candidates = tuple(self._tokens(layer, [slots[frame]])[0] for frame in frames)
        chosen = _Chosen(candidates, index, self.store.frame_size)
        # Elsewhere than on the CPU the device would have to be waited for, to know which of them it is.
        known = index.device.type == "cpu"
        shown = tuple(frames[i] for i in index[0].tolist()) if known else frames[: index.shape[1]]
        return Read(chosen, self._positions(frames, index), frames=shown, role="mid")

    def _choose(self, pass_: Pass) -> tuple[tuple[int, ...], Tensor]:
        """Candidates, and which of them each sample takes: (batch, chosen), ascending."""
        policy, slots = self.policy, self.slots(pass_)
        stored = tuple(sorted(slots))
        count = policy.num_history(pass_.start_frame, pass_.num_frames)
        frames = policy.candidates(stored, count)
        if self.geometry.device.type == "meta":
            # Played for sizes alone: which they are cannot be known, and PyTorch would take its time not to know it.
            shape = (self.geometry.batch_size, count)
            return frames, torch.empty(shape, dtype=torch.long, device=self.geometry.device)
        sinks = self._direction([slots[frame] for frame in stored[: policy.num_sink_frames]])
        tail = self._direction([slots[frame] for frame in stored[-policy.num_recent_frames :]])
        candidates = torch.stack([self._direction([slots[frame]]) for frame in frames], dim=1)
        wanted = sinks - policy.redundancy * tail
        scores = (candidates * wanted[:, None]).sum(dim=-1)
        return frames, scores.topk(count, dim=1).indices.sort(dim=1).values

    def _direction(self, slots: Sequence[int]) -> Tensor:
        """Mean raw key of frames in the first layer, over tokens and heads, at length 1: (batch, head_dim)."""
        keys = torch.cat([stored.keys for stored in self._tokens(0, slots)], dim=1)
        return normalize(keys.float().mean(dim=(1, 2)), dim=-1)

    def _tokens(self, layer: int, slots: Sequence[int]) -> list[Stored]:
        return [stored for _, stored in self.store.read(layer, slots)]

    def _positions(self, frames: tuple[int, ...], index: Tensor) -> tuple[float, ...] | Tensor:
        """Right behind the sinks, or each sample's own: (batch, tokens, 3)."""
        count = index.shape[1]
        first = self.policy.num_sink_frames
        if self.policy.positions == "contiguous":
            return tuple(map(float, range(first, first + count)))
        g, kind = self.geometry, {"dtype": torch.float64, "device": index.device}
        temporal = torch.tensor(frames, **kind)[index]
        shape = (index.shape[0], count, g.num_rows, g.num_columns)
        rows = torch.arange(g.num_rows, **kind)[:, None].expand(shape)
        columns = torch.arange(g.num_columns, **kind).expand(shape)
        return torch.stack([temporal[:, :, None, None].expand(shape), rows, columns], dim=-1).flatten(1, 3)
