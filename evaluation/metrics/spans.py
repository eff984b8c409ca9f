"""Stretches of a video that a number is taken over, all at once: the whole video, and its two-second clips.

VBench scores whole videos, VBench-Long scores clips; both take the same terms (of one frame, or of a few neighbours).
A meter therefore computes each term once, as the frames stream by, and hands it to every span that holds its frames.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longtake.evaluation.metric import Score, VideoInfo, Window
from longtake.evaluation.sampling import clip_ranges

CLIP_SECONDS = 2
"""Length of VBench-Long's clips in its mode for custom videos."""


@dataclass(frozen=True)
class Span:
    """A stretch of frames.

    Attributes:
        start: First frame.
        length: Frames.
        fps: Rate that sampling inside the span goes by: clips have VBench-Long's whole number of frames per second.
    """

    start: int
    length: int
    fps: float

    @property
    def end(self) -> int:
        """One past the last frame."""
        return self.start + self.length

    def holds(self, first: int, last: int) -> bool:
        """Whether frames ``first`` to ``last``, both included, lie inside."""
        return self.start <= first and last < self.end


@dataclass
class Tally:
    """What a span has gathered: the sum and number of its terms."""

    span: Span
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """One more term."""
        self.total += value
        self.count += 1

    @property
    def mean(self) -> float | None:
        """Mean of the terms; None without any."""
        return self.total / self.count if self.count else None


class Spans:
    """The whole video and its clips, each with a tally.

    Args:
        video: Announces its number of frames and its rate.
        clips: Whether to cut it into clips too; below a frame per second there are none.
    """

    def __init__(self, video: VideoInfo, *, clips: bool) -> None:
        self.video = video
        self.whole = Tally(Span(0, video.num_frames, video.fps))
        ranges = clip_ranges(video.num_frames, video.fps, CLIP_SECONDS) if clips and video.fps >= 1 else []
        self.clips = [Tally(Span(start, length, float(int(video.fps)))) for start, length in ranges]
        self._first_open = 0

    def __iter__(self) -> Iterator[Tally]:
        yield self.whole
        yield from self.clips

    def holding(self, first: int, last: int) -> list[Tally]:
        """Tallies of the spans that hold frames ``first`` to ``last``; ``first`` must not fall between calls."""
        clips, index = self.clips, self._first_open
        while index < len(clips) and clips[index].span.end <= first:
            index += 1
        self._first_open = index
        found = [self.whole]
        while index < len(clips) and clips[index].span.start <= first:
            if last < clips[index].span.end:
                found.append(clips[index])
            index += 1
        return found

    def add(self, first: int, last: int, value: float) -> None:
        """Give a term made of frames ``first`` to ``last`` to every span that holds them."""
        for tally in self.holding(first, last):
            tally.add(value)


class Batches:
    """Cuts what is pushed into batches of a fixed number of frames, so that no result depends on how it was pushed.

    Args:
        video: Announces how many frames will come.
        size: Frames per batch; the last one may be shorter.
        take: Called with the index of a batch's first frame and its frames (F, H, W, 3).
    """

    def __init__(self, video: VideoInfo, size: int, take: Callable[[int, np.ndarray], None]) -> None:
        self._video, self._size, self._take = video, size, take
        self._held: list[np.ndarray] = []
        self._num_held = 0
        self._start = 0

    def push(self, frames: np.ndarray) -> None:
        """Take the next frames; they are copied where they have to wait."""
        position = 0
        while position < len(frames):
            part = frames[position : position + self._size - self._num_held]
            position += len(part)
            if not self._held and len(part) == self._size:
                self._emit(part)
                continue
            self._held.append(part.copy())
            self._num_held += len(part)
            if self._num_held == self._size:
                self._flush()

    def close(self) -> None:
        """All frames have come.

        Raises:
            ValueError: If there were more or fewer than announced.
        """
        if self._held:
            self._flush()
        if self._start != self._video.num_frames:
            raise ValueError(
                f"video {self._video.id!r}: {self._start} frames came and num_frames={self._video.num_frames} were "
                "announced: count the frames that decode, then measure again."
            )

    def _flush(self) -> None:
        frames = np.concatenate(self._held)
        self._held, self._num_held = [], 0
        self._emit(frames)

    def _emit(self, frames: np.ndarray) -> None:
        self._take(self._start, frames)
        self._start += len(frames)


def whole_score(
    value: float | None,
    *,
    reason: str,
    weight: float = 1.0,
    windows: tuple[Window, ...] = (),
    details: Mapping[str, Any] | None = None,
) -> Score:
    """The score of a whole video, or none with the reason."""
    if value is None:
        return Score.none(reason)
    return Score(value=value, weight=weight, windows=windows, details=dict(details or {}))


def clips_score(
    clips: Sequence[Span],
    values: Sequence[float | None],
    *,
    reason: str,
    per_clip: Sequence[Mapping[str, Any]] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Score:
    """The score of a video as the mean over its clips; it weighs as many clips as it has.

    Args:
        clips: Of the video.
        values: Of each clip; None where it has none.
        reason: Why there is no score, if no clip has a value.
        per_clip: What stands behind each clip's value.
        details: What else stands behind the score.

    Returns:
        The score; its windows are the clips, the last of which may overlap the one before.
    """
    kept = [value for value in values if value is not None]
    if not kept:
        return Score.none(reason)
    windows = tuple(
        Window(start_frame=clip.start, num_frames=clip.length, value=value)
        for clip, value in zip(clips, values, strict=True)
    )
    rows = [
        {"start_frame": clip.start, "num_frames": clip.length, "value": value, **behind}
        for clip, value, behind in zip(clips, values, per_clip or [{}] * len(clips), strict=True)
    ]
    return Score(
        value=sum(kept) / len(kept),
        weight=float(len(kept)),
        windows=windows,
        details={**(details or {}), "clips": rows},
    )
