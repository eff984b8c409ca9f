"""Sinks, a long and a short memory of everything between, and the last frames."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from longtake.cache.averages import AveragingPolicy, FrameAverages
from longtake.cache.base import Traits, check_room
from longtake.cache.frames import FramePlan, SinkWindow, ends
from longtake.cache.storage import KeysValues

LONG, SHORT = 0, 1


@dataclass(frozen=True, kw_only=True)
class MemRoPE(SinkWindow, AveragingPolicy):
    """Evolving memory frames and positions given at reading (MemRoPE, arXiv:2603.12513; 3 + 1 + 1 + 4 + 3 frames).

    Reads, from position 0: sinks, a long and a short memory frame, the last frames, the block. The mean m of a leaving
    block's frames, at each place of the grid, moves both memories, raw keys and values alike, and begins them the
    first time; until something leaves there are none:

        long = long + long_rate * (m - long)        short = short + short_rate * (m - short)

    Differs: the released plain mode averages over the grid too, so that a memory is one token many times; here it
    keeps its picture, as in the released "adaptive" mode. The two frames that first make room for the memories are
    averaged with the others, not dropped. Memories are float32.
    """

    name: ClassVar[str] = "memrope"
    source: ClassVar[str] = "MemRoPE, arXiv:2603.12513"
    average_role: ClassVar[str] = "memory"
    traits: ClassVar[Traits] = Traits(breaks_frames=True)  # averages have a place in the picture, and none in time

    num_context_frames: int = 12  # everything attended: sinks, two memories, last frames and the block itself
    long_rate: float = 0.01  # share that a leaving block replaces
    short_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("long_rate", "short_rate"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1 (only the last counts).")

    @property
    def num_averages(self) -> int:
        return 2

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        content = f"num_sink_frames={self.num_sink_frames}, two memories and a block of {frames_per_block} frames"
        needed = self.num_sink_frames + self.num_averages + frames_per_block
        check_room(self.num_context_frames, needed, content, remedy=", or fewer sinks")

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        if start_frame + num_frames <= self.num_context_frames:
            return stored
        return ends(stored, self.num_sinks(stored), self._room(num_frames))

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Read all, with a gap behind the sinks for the memories that there are."""
        gap = len(self.averages(start_frame, num_frames)[0])
        return FramePlan.contiguous(kept, num_frames, first=self.num_sinks(kept), gap=gap)

    def averages(self, start_frame: int, num_frames: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Both memories behind the sinks, once something has left; each stands for its mean age."""
        if start_frame + num_frames <= self.num_context_frames:
            return (), ()
        newest, oldest = start_frame - self._room(num_frames) - 1, self.num_sink_frames
        ages = [round((1.0 / rate - 1.0) * num_frames) for rate in (self.long_rate, self.short_rate)]
        first = float(self.num_sink_frames)
        return tuple(max(newest - age, oldest) for age in ages), (first, first + 1.0)

    def update(self, averages: FrameAverages, layer: int, frames: tuple[int, ...], tokens: list[KeysValues]) -> None:
        keys = torch.stack([frame.keys.float() for frame in tokens]).mean(dim=0)
        values = torch.stack([frame.values.float() for frame in tokens]).mean(dim=0)
        is_first = frames[0] == self.num_sink_frames
        for place, rate in ((LONG, self.long_rate), (SHORT, self.short_rate)):
            if is_first:
                averages.put(layer, place, KeysValues(keys, values))
            else:
                averages.mix(layer, place, KeysValues(keys, values), rate)

    def _room(self, num_frames: int) -> int:
        """Last frames that are read beside the sinks, the memories and the block."""
        return self.num_context_frames - self.num_sink_frames - self.num_averages - num_frames
