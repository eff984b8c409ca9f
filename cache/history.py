"""A state that chooses whole frames by what is in them, for every video of a batch by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from longtake.cache.base import Context, Geometry, Number, Pass, Read
from longtake.cache.frames import FrameState
from longtake.cache.storage import Stored


class HistoryPolicy(Protocol):
    """What a ``FramePolicy`` has to say beside, to have history chosen."""

    num_sink_frames: int
    num_recent_frames: int
    redundancy: float
    positions: str

    def num_history(self, start_frame: int, num_frames: int) -> int:
        """Frames that the block at ``start_frame`` chooses."""

    def candidates(self, stored: tuple[int, ...], num_history: int) -> tuple[int, ...]:
        """Frames that stand for election, ascending, at least ``num_history``."""


@dataclass(frozen=True)
class Chosen:
    """Some of several frames, each sample its own; gathered when it is read.

    Attributes:
        candidates: One frame each.
        index: (batch, chosen), int64, which candidates.
        frame_size: Tokens of a frame.
    """

    candidates: tuple[Stored, ...]
    index: Tensor
    frame_size: int

    @property
    def num_tokens(self) -> int:
        """How many, per sample."""
        return self.index.shape[1] * self.frame_size

    @property
    def keys(self) -> Tensor:
        """(batch, chosen * frame_size, heads, head_dim), un-rotated."""
        return self._gathered([candidate.keys for candidate in self.candidates])

    @property
    def values(self) -> Tensor:
        """Same shape."""
        return self._gathered([candidate.values for candidate in self.candidates])

    def _gathered(self, frames: Sequence[Tensor]) -> Tensor:
        return torch.take_along_dim(torch.stack(frames, dim=1), self.index[:, :, None, None, None], dim=1).flatten(
            1, 2
        )


class HistoryState(FrameState):
    """Frames to choose from, and the choices of the block being made and the one before it.

    A choice is a tensor on the device: nothing waits for it. It follows from what is stored, so it is not saved.
    """

    def __init__(self, policy: HistoryPolicy, geometry: Geometry) -> None:
        super().__init__(policy, geometry)
        self._choices: dict[int, tuple[tuple[int, ...], Tensor]] = {}

    def select(self, layer: int, pass_: Pass, q: Tensor | None = None) -> Context:
        """Read what the policy plans and, behind the sinks, the chosen history."""
        context = super().select(layer, pass_, q)
        if not self.policy.num_history(pass_.start_frame, pass_.num_frames):
            return context
        history = self._history(layer, pass_)
        sinks = [read for read in context.reads if read.role == "sink"]
        return replace(context, reads=(*sinks, history, *context.reads[len(sinks) :]))

    def load_state_dict(self, state: Mapping[str, Tensor | Number]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: If the saved shapes are not this rollout's.
        """
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
        chosen = Chosen(candidates, index, self.store.frame_size)
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
