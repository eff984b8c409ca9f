"""Metrics: each takes a video as it streams by, in pieces of any length, and gives numbers under honest names.

The prefix of a name says what a number may be compared with:

* ``vbench/``: VBench's formula and the backbone VBench uses, or none needed; may stand beside published numbers.
* ``vbench_form/...[role=backbone]``: VBench's formula with another backbone; to compare within one report.
* ``proxy/``: our own measure. ``drift/``: how another measure changes over the video. ``set/``: of a set of videos.
* ``judge/``: the bundled judge of the mini model's world.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PREFIXES = ("vbench/", "vbench_form/", "proxy/", "drift/", "set/", "judge/")
WINDOW_SECONDS = 2.0  # length of the windows that curves over time are made of


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of video with a prompt of its own, in seconds."""

    start_s: float
    end_s: float
    prompt: str


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """A video before its frames come; sizes in pixels."""

    id: str  # unique within a run, and the stem of its file's name
    num_frames: int
    fps: float
    height: int
    width: int
    prompt: str = ""
    segments: tuple[Segment, ...] = ()  # prompts over time, where there was more than one
    chunk_starts: tuple[int, ...] = ()  # first frame of each block of the rollout, where known
    path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """A number's name and everything a reader needs to know about it."""

    name: str  # with its prefix, e.g. ``vbench_form/subject_consistency[enc=StubDino]``
    higher_is_better: bool | None  # None where more is neither better nor worse
    unit: str = ""  # e.g. ``px``, ``dB``, ``0..1``
    # least and greatest possible value; None where there is no bound
    range: tuple[float | None, float | None] = (None, None)
    formula: str = "ours"  # ``vbench@45e79ec`` or ``ours``, or a paper
    backbone: str | None = None
    weights_sha256: str | None = None  # of its weights file
    transform: str | None = None  # name of the transform before the backbone
    clip_seconds: float | None = None  # length of the clips the video is cut into; None for whole videos
    # what a mean is taken over, ``video``, ``clip`` or ``frame``: a video's weight in the mean of the run
    grouping: str = "video"
    scale: float = 1.0  # the mean over videos is multiplied by it (VBench's imaging quality: 0.01)
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name.startswith(PREFIXES):
            raise ValueError(f"metric {self.name!r} needs one of the prefixes {', '.join(PREFIXES)}")
        if self.grouping not in ("video", "clip", "frame"):
            raise ValueError(f"metric {self.name!r}: grouping={self.grouping!r}: use video, clip or frame")

    @classmethod
    def proxy(
        cls,
        name: str,
        description: str,
        *,
        unit: str,
        higher_is_better: bool | None = False,
        bottom: float = 0.0,
        top: float | None = None,
    ) -> "MetricSpec":
        """A measure of our own, ``proxy/NAME``, whose values range from ``bottom`` to ``top``."""
        return cls(
            name=f"proxy/{name}",
            higher_is_better=higher_is_better,
            unit=unit,
            range=(bottom, top),
            description=description,
        )

    @property
    def comparable_to_published(self) -> bool:
        return self.name.startswith("vbench/")


@dataclass(frozen=True, kw_only=True)
class Window:
    """A measure's mean over a stretch of frames; None where it does not apply there."""

    start_frame: int
    num_frames: int
    value: float | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric on one video."""

    value: float | None  # None where the metric does not apply to this video; then ``skipped`` says why
    weight: float = 1.0  # of this video in the mean of the run: 1, or its number of frames or clips
    windows: tuple[Window, ...] = ()  # the curve over time, if the metric has one, in order
    # numbers behind the value that JSON can hold: thresholds, counts, indices, values per clip
    details: Mapping[str, Any] = field(default_factory=dict)
    skipped: str | None = None  # why there is no value

    def __post_init__(self) -> None:
        if (self.value is None) != (self.skipped is not None):
            raise ValueError(f"a score has either a value or a reason why not: {self.value=}, {self.skipped=}")

    @classmethod
    def none(cls, reason: str) -> "Score":
        return cls(value=None, skipped=reason)


class Meter(Protocol):
    """Measures one video; keeps no more than a window of frames."""

    def push(self, frames: np.ndarray) -> None:
        """Take the next frames: (F, H, W, 3) uint8 RGB, F >= 1; pieces may be cut anywhere."""

    def finish(self) -> Mapping[str, Score]:
        """All frames have come: the scores, one for every spec of the metric."""
        ...


class Metric(Protocol):
    """One or more numbers that are measured together because they share work."""

    specs: tuple[MetricSpec, ...]

    def start(self, video: VideoInfo) -> Meter: ...


def curve(video: VideoInfo, value: Callable[[int, int], float | None]) -> tuple[Window, ...]:
    """A video's windows with the values of ``value(first frame, one past the last)``.

    A last one under half the length joins the one before.
    """
    length = max(1, round(video.fps * WINDOW_SECONDS))
    starts = list(range(0, max(video.num_frames, 1), length))
    if len(starts) > 1 and video.num_frames - starts[-1] < length / 2:
        starts.pop()
    ranges = pairwise([*starts, video.num_frames])
    return tuple(Window(start_frame=start, num_frames=end - start, value=value(start, end)) for start, end in ranges)


class WindowMeans:
    """Collects values per frame into means over a video's windows."""

    def __init__(self, video: VideoInfo) -> None:
        self._video = video
        self._length = max(1, round(video.fps * WINDOW_SECONDS))
        self._sums: list[float] = []
        self._counts: list[int] = []

    def add(self, frame: int, value: float) -> None:
        """Note a frame's value; frames come in order, and some may be left out."""
        index = frame // self._length
        missing = index + 1 - len(self._sums)
        self._sums += [0.0] * missing
        self._counts += [0] * missing
        self._sums[index] += value
        self._counts[index] += 1

    def mean(self) -> float | None:
        count = sum(self._counts)
        return sum(self._sums) / count if count else None

    def windows(self) -> tuple[Window, ...]:
        def mean(start: int, end: int) -> float | None:
            own = slice(start // self._length, -(-end // self._length))
            count = sum(self._counts[own])
            return sum(self._sums[own]) / count if count else None

        return curve(self._video, mean)
