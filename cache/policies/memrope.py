"""Sinks, a long and a short memory of everything between, and the last frames."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from longtake.cache.averages import AveragingPolicy, FrameAverages
from longtake.cache.base import Traits
from longtake.cache.frames import FramePlan
from longtake.cache.storage import KeysValues, Stored

LONG, SHORT = 0, 1


@dataclass(frozen=True, kw_only=True)
class MemRoPE(AveragingPolicy):
    """Evolving memory frames and positions given at reading (MemRoPE, arXiv:2603.12513; 3 + 1 + 1 + 4 + 3 frames).

    Reads, at positions 0 to ``num_context_frames`` - 1: the first frames, one long and one short memory frame, the
    last frames, the block. When a block's worth of frames leaves, their mean m at each place of the grid moves both
    memories, raw keys and values alike:

        long = long + long_rate * (m - long)        short = short + short_rate * (m - short)

    and begins them the first time. Averages of rotated keys would be no rotation of any key, so keys have to be raw.
    Until a video has outgrown ``num_context_frames`` all of it is read, and there are no memories.

    Differs: the released code's plain mode averages over the places of the grid too, so that a memory is one token
    many times; here it keeps its picture, as in the released "adaptive" mode, whose rate per token is not offered.
    The first time, two frames make room for the memories: the released code drops them, here they are averaged with
    the others. Memories are float32.
    """

    name: ClassVar[str] = "memrope"
    source: ClassVar[str] = "MemRoPE, arXiv:2603.12513"
    traits: ClassVar[Traits] = Traits(breaks_frames=True)  # averages have a place in the picture, and none in time

    num_context_frames: int = 12  # everything attended: sinks, two memories, last frames and the block itself
    num_sink_frames: int = 3
    long_rate: float = 0.01  # share of the long memory that a leaving block replaces
    short_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.num_sink_frames < 0:
            raise ValueError(f"num_sink_frames={self.num_sink_frames} must be 0 or more.")
        for name in ("long_rate", "short_rate"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1 (only the last counts).")

    @property
    def num_averages(self) -> int:
        """A long memory and a short one."""
        return 2

    @property
    def average_role(self) -> str:
        """Averages stand for everything that has left."""
        return "memory"

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        """Refuse a context without room for the sinks, the memories and a block."""
        needed = self.num_sink_frames + self.num_averages + frames_per_block
        if self.num_context_frames < needed:
            raise ValueError(
                f"num_context_frames={self.num_context_frames} leaves no room for "
                f"num_sink_frames={self.num_sink_frames}, two memories and a block of {frames_per_block} frames: "
                f"use {needed} or more, or fewer sinks."
            )

    def num_stored_frames(self, frames_per_block: int) -> int | None:
        """What one block reads beside itself, before there are memories."""
        return self.num_context_frames - frames_per_block

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        """Sinks are the frames before ``num_sink_frames``."""
        return tuple("sink" if frame < self.num_sink_frames else "recent" for frame in frames)

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        """Keep all while all fits; then the sinks and the last frames."""
        if start_frame + num_frames <= self.num_context_frames:
            return stored
        sinks = tuple(frame for frame in stored if frame < self.num_sink_frames)
        window = stored[len(sinks) :]
        return sinks + window[max(len(window) - self._room(num_frames), 0) :]

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Read all, with a gap behind the sinks for the memories that there are."""
        first = sum(frame < self.num_sink_frames for frame in kept)
        gap = len(self.averages(start_frame, num_frames)[0])
        return FramePlan.with_gap(kept, num_frames, first=first, gap=gap)

    def averages(self, start_frame: int, num_frames: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Both memories behind the sinks, once something has left; each stands for its mean age."""
        if start_frame + num_frames <= self.num_context_frames:
            return (), ()
        newest, oldest = start_frame - self._room(num_frames) - 1, self.num_sink_frames
        ages = [round((1.0 / rate - 1.0) * num_frames) for rate in (self.long_rate, self.short_rate)]
        first = float(self.num_sink_frames)
        return tuple(max(newest - age, oldest) for age in ages), (first, first + 1.0)

    def update(self, averages: FrameAverages, layer: int, frames: tuple[int, ...], tokens: list[Stored]) -> None:
        """Move both memories towards the mean of the leaving frames."""
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
