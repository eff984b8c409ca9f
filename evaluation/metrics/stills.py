"""Looks at a few frames a second one by one: what measures of single pictures share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score, VideoInfo
from longtake.evaluation.metrics.track import LUMA_WEIGHTS
from longtake.evaluation.sampling import stride_for_8fps

SHORT_SIDE = 256
"""Pixels, about: larger pictures are averaged down to it by a whole factor."""


@dataclass(frozen=True)
class Still:
    """One frame.

    Attributes:
        index: Of the frame within its video.
        frame: (H, W, 3) uint8, as it came.
        colour: (3, h, w) float32 in 0..255, averaged down to a shorter side of about 256.
        luma: (h, w) float32 of ``colour``.
    """

    index: int
    frame: np.ndarray
    colour: np.ndarray
    luma: np.ndarray


class StillMeter(Protocol):
    """Measures the stills of one video."""

    def take(self, still: Still) -> None:
        """The next still."""

    def finish(self) -> Mapping[str, Score]:
        """All have come: a score for every spec."""


class StillMeasure(Protocol):
    """Numbers that are taken from single frames."""

    specs: tuple[MetricSpec, ...]

    def start(self, video: VideoInfo) -> StillMeter:
        """A meter for one video."""


class StillsMetric:
    """Hands every still, about eight a second, to every measure.

    Args:
        measures: Of single frames.
    """

    def __init__(self, measures: Sequence[StillMeasure]) -> None:
        self.measures = tuple(measures)
        self.specs = tuple(spec for measure in self.measures for spec in measure.specs)

    def start(self, video: VideoInfo) -> "StillsMeter":
        """A meter for one video."""
        return StillsMeter(video, [measure.start(video) for measure in self.measures])


class StillsMeter:
    """Picks the stills from what is pushed.

    Args:
        video: What is announced.
        meters: Of the measures.
    """

    def __init__(self, video: VideoInfo, meters: Sequence[StillMeter]) -> None:
        self._stride = stride_for_8fps(video.fps)
        self._meters = meters
        self._num_frames = 0

    def push(self, frames: np.ndarray) -> None:
        """Take the next frames, (F, H, W, 3) uint8."""
        for index in range(-self._num_frames % self._stride, len(frames), self._stride):
            colour = shrink(frames[index], reduction(*frames.shape[1:3], SHORT_SIDE))
            still = Still(self._num_frames + index, frames[index], colour, np.tensordot(LUMA_WEIGHTS, colour, axes=1))
            for meter in self._meters:
                meter.take(still)
        self._num_frames += len(frames)

    def finish(self) -> dict[str, Score]:
        """The scores of every measure."""
        return {name: score for meter in self._meters for name, score in meter.finish().items()}


def reduction(height: int, width: int, short_side: int) -> int:
    """Whole factor that brings the shorter side near to a length; 1 for small pictures."""
    return max(1, round(min(height, width) / short_side))


def shrink(frame: np.ndarray, factor: int) -> np.ndarray:
    """Average (H, W, 3) uint8 over squares of ``factor`` pixels, one plane per colour.

    Returns:
        (3, H // factor, W // factor) float32 in 0..255; what is left at the edges is cut off.
    """
    planes = frame.transpose(2, 0, 1)
    if factor == 1:
        return np.ascontiguousarray(planes, dtype=np.float32)
    planes = np.ascontiguousarray(planes)
    height, width = frame.shape[0] // factor, frame.shape[1] // factor
    total = np.zeros((3, height, width), dtype=np.uint16 if factor <= 16 else np.uint32)
    for row in range(factor):
        for column in range(factor):
            total += planes[:, row : height * factor : factor, column : width * factor : factor]
    return total.astype(np.float32) * np.float32(1.0 / factor**2)
