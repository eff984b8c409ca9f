"""Sinks that take in what leaves the window."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.averages import AveragingPolicy, FrameAverages
from longtake.cache.frames import FramePlan, SinkWindow, ends
from longtake.cache.storage import KeysValues


@dataclass(frozen=True, kw_only=True)
class EmaSink(SinkWindow, AveragingPolicy):
    """EMA sink of Reward-Forcing (arXiv:2512.04678; released settings: 9 frames, 3 of them sinks, alpha 0.999).

    The sinks begin as the first frames. What leaves the window is averaged into them, frame i of the leaving block
    into sink i, raw keys and values alike; positions are places in the reading order:

        sink = alpha * sink + (1 - alpha) * leaving

    Differs: averages are float32; in the released bfloat16, 0.999 of a number rounds back to it. Where other than
    ``num_sink_frames`` leave at once, frame f goes into sink f modulo ``num_sink_frames``; the released code writes
    the leaving frames over the first sinks (``uneven: replace``).
    """

    name: ClassVar[str] = "ema_sink"
    source: ClassVar[str] = "Reward-Forcing, arXiv:2512.04678"
    average_role: ClassVar[str] = "sink"

    num_context_frames: int = 9  # everything attended: sinks, window and the block itself
    alpha: float = 0.999  # share of a sink that survives a leaving frame
    uneven: Literal["average", "replace"] = "average"  # when other than num_sink_frames leave at once

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "num_sink_frames", note=": without sinks use sliding_window")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha} must lie between 0 (sinks are replaced) and 1 (sinks never change).")

    @property
    def num_averages(self) -> int:
        return self.num_sink_frames

    def num_read_frames(self, frames_per_block: int) -> int | None:
        return self.num_context_frames - frames_per_block - self.num_sink_frames

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        window = tuple(frame for frame in stored if frame >= self.num_sink_frames)
        return ends(window, 0, self.num_context_frames - num_frames - self.num_sink_frames)

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        return FramePlan.contiguous(kept, num_frames, gap=min(self.num_sink_frames, start_frame))

    def averages(self, start_frame: int, num_frames: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        sinks = tuple(range(min(self.num_sink_frames, start_frame)))
        return sinks, tuple(map(float, sinks))

    def update(self, averages: FrameAverages, layer: int, frames: tuple[int, ...], tokens: list[KeysValues]) -> None:
        """Let the first frames be the sinks, and average later ones into them."""
        leaving = [frame for frame in frames if frame >= self.num_sink_frames]
        is_even = len(leaving) == self.num_sink_frames
        for frame, new in zip(frames, tokens, strict=True):
            place = leaving.index(frame) if frame in leaving else frame
            if frame < self.num_sink_frames:
                averages.put(layer, place, new)
            elif is_even:
                averages.mix(layer, place, new, 1.0 - self.alpha)
            elif self.uneven == "average":
                averages.mix(layer, frame % self.num_sink_frames, new, 1.0 - self.alpha)
            elif place < self.num_sink_frames:
                averages.put(layer, place, new)
