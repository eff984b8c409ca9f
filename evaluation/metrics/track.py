"""What is kept of every frame: a small picture, how far it is from the frame before, whether it came before.

Measures of a video's course (does it stop, loop, cut, flicker, drift) look at this track once all frames have come.
It takes 2.5 kB a frame whatever the size of the video, and averaging over the cells of a small picture is what makes
those measures indifferent to grain and to the codec.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score, VideoInfo

LUMA_GRID = 32
MIN_CELL = 4
"""Pixels a side of a cell of brightness, at least: smaller ones hold mostly grain and the codec's errors."""
COLOUR_GRID = 8
LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""ITU-R BT.601."""


@dataclass(frozen=True)
class Track:
    """The course of a video.

    Attributes:
        video: What was announced.
        luma: (T, rows, columns) float32 in 0..255, area means over a grid of at most 32x32 cells of at
            least 4x4 pixels.
        colour: (T, rows, columns, 3) float32 in 0..255, RGB means over a grid of at most 8x8 cells.
        difference: (T,) float64, mean absolute difference of the full frames to the frame before; 0 for the first.
        is_duplicate: (T,) bool, whether some earlier frame is the same in every pixel.
    """

    video: VideoInfo
    luma: np.ndarray
    colour: np.ndarray
    difference: np.ndarray
    is_duplicate: np.ndarray

    @property
    def num_frames(self) -> int:
        """Frames that came."""
        return len(self.difference)

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.video.fps

    def frames_in(self, seconds: float) -> int:
        """Frames nearest to a time, at least 1."""
        return max(1, round(self.fps * seconds))


@dataclass(frozen=True)
class TrackMeasure:
    """Numbers that are read off a track.

    Attributes:
        specs: What they are.
        measure: Takes the track, gives a score for every spec.
    """

    specs: tuple[MetricSpec, ...]
    measure: Callable[[Track], Mapping[str, Score]]


class TrackMetric:
    """Records the track of a video and takes every measure that needs no more than that.

    Args:
        measures: To take once all frames have come.
    """

    def __init__(self, measures: Sequence[TrackMeasure]) -> None:
        self.measures = tuple(measures)
        self.specs = tuple(spec for measure in self.measures for spec in measure.specs)

    def start(self, video: VideoInfo) -> "TrackMeter":
        """A meter for one video."""
        return TrackMeter(video, self.measures)


class TrackMeter:
    """Shrinks frames to their entry in the track as they come.

    Args:
        video: What is announced.
        measures: To take at the end.
    """

    def __init__(self, video: VideoInfo, measures: Sequence[TrackMeasure] = ()) -> None:
        self._video, self._measures = video, measures
        grid = tuple(max(1, min(LUMA_GRID, side // MIN_CELL)) for side in (video.height, video.width))
        self._pool = Pooling(video.height, video.width, grid)
        rows, columns = self._pool.shape
        self._pool_colour = Pooling(rows, columns, COLOUR_GRID)
        self._luma: list[np.ndarray] = []
        self._colour: list[np.ndarray] = []
        self._difference: list[float] = []
        self._is_duplicate: list[bool] = []
        self._digests: set[bytes] = set()
        self._before: np.ndarray | None = None

    def push(self, frames: np.ndarray) -> None:
        """Take the next frames, (F, H, W, 3) uint8."""
        for frame in frames:
            small = self._pool(frame)
            # Half precision resolves an eighth of a grey level at worst, a tenth of what the measures look for.
            self._luma.append((small @ LUMA_WEIGHTS).astype(np.float16))
            self._colour.append(self._pool_colour(small).astype(np.float16))
            self._difference.append(mean_difference(self._before, frame) if self._before is not None else 0.0)
            digest = hashlib.sha1(np.ascontiguousarray(frame), usedforsecurity=False).digest()
            self._is_duplicate.append(digest in self._digests)
            self._digests.add(digest)
            self._before = frame
        if self._before is not None:
            # The piece may be a buffer that is filled again.
            self._before = self._before.copy()

    def track(self) -> Track:
        """Everything that came so far."""
        rows, columns = self._pool.shape
        colour_rows, colour_columns = self._pool_colour.shape
        num_frames = len(self._difference)
        return Track(
            video=self._video,
            luma=np.array(self._luma, dtype=np.float32).reshape(num_frames, rows, columns),
            colour=np.array(self._colour, dtype=np.float32).reshape(num_frames, colour_rows, colour_columns, 3),
            difference=np.array(self._difference),
            is_duplicate=np.array(self._is_duplicate, dtype=bool),
        )

    def finish(self) -> dict[str, Score]:
        """The scores of every measure."""
        track = self.track()
        return {name: score for measure in self._measures for name, score in measure.measure(track).items()}


class Pooling:
    """Area means over a grid of equal cells, for pictures of any size.

    Args:
        height: Of the pictures.
        width: Of the pictures.
        grid: Cells along each side, or down and across; fewer where there are fewer pixels.
    """

    def __init__(self, height: int, width: int, grid: int | tuple[int, int]) -> None:
        rows, columns = grid if isinstance(grid, tuple) else (grid, grid)
        self._rows = area_weights(height, min(rows, height))
        self._columns = area_weights(width, min(columns, width)).T.copy()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        return self._rows.shape[0], self._columns.shape[1]

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Pool (H, W, C) of any dtype to (rows, columns, C) float32."""
        height, width, channels = picture.shape
        rows = self._rows @ picture.reshape(height, width * channels).astype(np.float32)
        rows = rows.reshape(-1, width, channels).transpose(0, 2, 1)
        return (rows @ self._columns).transpose(0, 2, 1)


def area_weights(length: int, cells: int) -> np.ndarray:
    """(cells, length) float32: row i averages the i-th of so many equal parts; pixels on a border count in part."""
    edges = np.linspace(0.0, length, cells + 1)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (overlap.clip(min=0.0) * (cells / length)).astype(np.float32)


def mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of two uint8 arrays, exact."""
    # The difference of the greater and the lesser stays within uint8, which keeps this at memory speed.
    apart = np.maximum(first, second)
    apart -= np.minimum(first, second)
    return float(apart.sum(dtype=np.uint64)) / apart.size
