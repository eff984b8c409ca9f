"""Metrics of a video's course: cuts, flicker, colour drift, seams, spectrum; from one small picture per frame."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score, VideoInfo, WindowMeans, curve

LUMA_GRID = 32
MIN_CELL = 4  # pixels a side of a cell of brightness, at least: smaller ones hold mostly grain and the codec's errors
COLOUR_GRID = 8
LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


@dataclass(frozen=True, eq=False)
class Track:
    """The course of a video."""

    video: VideoInfo
    # (T, rows, columns) float32 in 0..255, area means over a grid of at most 32x32 cells of at least 4x4 pixels
    luma: np.ndarray
    colour: np.ndarray  # (T, rows, columns, 3) float32 in 0..255, RGB means over a grid of at most 8x8 cells
    # (T,) float64, mean absolute difference of the full frames to the frame before; 0 for the first
    difference: np.ndarray
    is_duplicate: np.ndarray  # (T,) bool, some earlier frame is the same in every pixel

    @property
    def num_frames(self) -> int:
        return len(self.difference)

    @property
    def fps(self) -> float:
        return self.video.fps

    def frames_in(self, seconds: float) -> int:
        return max(1, round(self.fps * seconds))

    @cached_property
    def cuts(self) -> list[int]:
        """First frames after a cut, in order."""
        return _find_cuts(self)

    @property
    def shots(self) -> list[tuple[int, int]]:
        """Stretches between cuts, as (first frame, one past the last)."""
        return list(pairwise([0, *self.cuts, self.num_frames]))


Measure = tuple[Callable[[Track], Sequence[Score]], *tuple[MetricSpec, ...]]
"""Numbers that are read off a track: a function that gives a score for every spec, in order."""


class TrackMetric:
    """Records the track of a video and takes every measure that needs no more than that."""

    def __init__(self, measures: Sequence[Measure]) -> None:
        self.measures = tuple(measures)
        self.specs = tuple(spec for _, *specs in self.measures for spec in specs)

    def start(self, video: VideoInfo) -> "_TrackMeter":
        return _TrackMeter(video, self.measures)


class _TrackMeter:
    """Shrinks frames to their entry in the track as they come; takes the measures at the end."""

    def __init__(self, video: VideoInfo, measures: Sequence[Measure]) -> None:
        self._video, self._measures = video, measures
        grid = tuple(max(1, min(LUMA_GRID, side // MIN_CELL)) for side in (video.height, video.width))
        self._pool = Pooling(video.height, video.width, grid)
        self._pool_colour = Pooling(*self._pool.shape, (COLOUR_GRID, COLOUR_GRID))
        self._luma: list[np.ndarray] = []
        self._colour: list[np.ndarray] = []
        self._difference: list[float] = []
        self._is_duplicate: list[bool] = []
        self._digests: set[bytes] = set()
        self._before: np.ndarray | None = None

    def push(self, frames: np.ndarray) -> None:
        for frame in frames:
            small = self._pool(frame)
            # Half precision resolves an eighth of a grey level at worst, a tenth of what the measures look for.
            self._luma.append((small @ LUMA_WEIGHTS).astype(np.float16))
            self._colour.append(self._pool_colour(small).astype(np.float16))
            self._difference.append(mean_difference(self._before, frame) if self._before is not None else 0.0)
            digest = hashlib.sha1(np.ascontiguousarray(frame).data, usedforsecurity=False).digest()
            self._is_duplicate.append(digest in self._digests)
            self._digests.add(digest)
            self._before = frame
        if self._before is not None:
            # The piece may be a buffer that is filled again.
            self._before = self._before.copy()

    def track(self) -> Track:
        num_frames = len(self._difference)
        return Track(
            video=self._video,
            luma=np.array(self._luma, dtype=np.float32).reshape(num_frames, *self._pool.shape),
            colour=np.array(self._colour, dtype=np.float32).reshape(num_frames, *self._pool_colour.shape, 3),
            difference=np.array(self._difference),
            is_duplicate=np.array(self._is_duplicate, dtype=bool),
        )

    def finish(self) -> dict[str, Score]:
        track = self.track()
        return {
            spec.name: score
            for measure, *specs in self._measures
            for spec, score in zip(specs, measure(track), strict=True)
        }


class Pooling:
    """Area means over a grid of equal cells, fewer where there are fewer pixels, for pictures of any size."""

    def __init__(self, height: int, width: int, grid: tuple[int, ...]) -> None:
        rows, columns = grid
        self._rows = _area_weights(height, min(rows, height))
        self._columns = _area_weights(width, min(columns, width)).T.copy()

    @property
    def shape(self) -> tuple[int, int]:
        return self._rows.shape[0], self._columns.shape[1]

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Pool (H, W, C) of any dtype to (rows, columns, C) float32."""
        height, width, channels = picture.shape
        rows = self._rows @ picture.reshape(height, width * channels).astype(np.float32)
        rows = rows.reshape(-1, width, channels).transpose(0, 2, 1)
        return (rows @ self._columns).transpose(0, 2, 1)


def _area_weights(length: int, cells: int) -> np.ndarray:
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


UNLIKE = 0.35
"""Of a scale on which equal layouts are 0 and unrelated ones about 1. Motion between two frames stays below 0.1."""
JUMP = 30.0  # grey levels (root mean square over the cells) that count as a cut where the layout stays: another light
MOST = 6.0
"""Grey levels that at least half of the cells change by: things that jump about in front of a scene are no cut."""
ISOLATION = 3.0  # a cut stands out from every other change nearby by this factor: fast motion and flicker come in rows
NEARBY_SECONDS = 0.5
NEARBY_SECONDS_OF_JUMPS = 1.0  # slow flicker jumps twice a second
LASTING_SECONDS = 0.25  # means over this long before and after have to differ as well: a single bad frame is no cut
FLAT = 3.0
"""Grey levels of layout (root mean square) below which a picture is taken for empty, and its layout for grain."""


def _find_cuts(track: Track) -> list[int]:
    if track.num_frames < 3:
        return []
    cells = track.colour.reshape(track.num_frames, -1, 3)
    layout = cells - cells.mean(axis=1, keepdims=True)
    unlike = _unlikeness(layout[:-1], layout[1:])
    jumps = _apart(cells[:-1], cells[1:])
    most = np.median(np.abs(cells[1:] - cells[:-1]).max(axis=2), axis=1)
    lasting = track.frames_in(LASTING_SECONDS)
    # Another layout, or another light: (change, its measure, of what, its least, reach in which it stands out).
    kinds = (
        (unlike, _unlikeness, layout, UNLIKE, track.frames_in(NEARBY_SECONDS)),
        (jumps, _apart, cells, JUMP, track.frames_in(NEARBY_SECONDS_OF_JUMPS)),
    )

    def lasts(index: int) -> bool:
        before, after = slice(max(0, index + 1 - lasting), index + 1), slice(index + 1, index + 1 + lasting)
        return any(
            change[index] >= least
            and _stands_out(change, index, reach)
            and measure(values[before].mean(axis=0), values[after].mean(axis=0)) >= least
            for change, measure, values, least, reach in kinds
        )

    sudden = np.flatnonzero((most >= MOST) & ((unlike >= UNLIKE) | (jumps >= JUMP)))
    return [index + 1 for index in sudden.tolist() if lasts(index)]


def _unlikeness(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared distance of two layouts (..., cells, 3) over the sum of their squares."""
    power = np.square(first).mean(axis=(-1, -2)) + np.square(second).mean(axis=(-1, -2))
    return np.square(first - second).mean(axis=(-1, -2)) / (power + FLAT**2)


def _apart(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(first - second).mean(axis=(-1, -2)))


def _stands_out(values: np.ndarray, index: int, reach: int) -> bool:
    others = np.concatenate([values[max(0, index - reach) : index], values[index + 1 : index + 1 + reach]])
    return bool(others.size == 0 or values[index] >= ISOLATION * others.max())


def _cuts(track: Track) -> list[Score]:
    if track.num_frames < 3:
        return [Score.none("needs 3 frames")]
    details = {"frames": track.cuts, "times_s": [index / track.fps for index in track.cuts]}
    return [Score(value=float(len(track.cuts)), details=details)]


REACH_SECONDS = 0.25
"""A frame is compared with the mean of this long on both sides: what swings twice a second or faster counts in full,
once a second by a third, and a scene that brightens and darkens more slowly does not."""


def _brightness_swings(track: Track) -> np.ndarray:
    """(T,) float64: by how many grey levels each frame is lighter than the half second around it.

    It is the mean or the median over the cells of a small picture, whichever is less, and 0 where they disagree
    about the direction: an object moves the mean, stripes that pass by move the median. NaN where there is no whole
    half second of one shot around the frame: at the ends of the video and beside cuts.
    """
    reach = track.frames_in(REACH_SECONDS)
    swings = np.full(track.num_frames, np.nan)
    for start, end in track.shots:
        if end - start <= 2 * reach:
            continue
        cells = track.luma[start:end].reshape(end - start, -1)
        sums = np.concatenate([np.zeros((1, cells.shape[1])), np.cumsum(cells, axis=0, dtype=np.float64)])
        means = (sums[2 * reach + 1 :] - sums[: -2 * reach - 1]) / (2 * reach + 1)
        excess = cells[reach : end - start - reach] - means
        mean, median = excess.mean(axis=1), np.median(excess, axis=1)
        least = np.where(np.abs(mean) < np.abs(median), mean, median)
        swings[start + reach : end - reach] = np.where(mean * median > 0, least, 0.0)
    return swings


def _flicker(track: Track) -> list[Score]:
    swings = np.abs(_brightness_swings(track))
    known = np.flatnonzero(~np.isnan(swings))
    if not len(known):
        return [Score.none(f"needs a shot of more than {2 * REACH_SECONDS:g} s")]
    means = WindowMeans(track.video)
    for index in known:
        means.add(int(index), float(swings[index]))
    windows = means.windows()
    worst = max((window for window in windows if window.value is not None), key=lambda window: window.value or 0.0)
    start, end = worst.start_frame / track.fps, (worst.start_frame + worst.num_frames) / track.fps
    details = {"largest": float(swings[known].max()), "worst_window": worst.value}
    details |= {"worst_start_s": start, "worst_end_s": end}
    return [Score(value=float(swings[known].mean()), windows=windows, details=details)]


REFERENCE_SECONDS = 5.0  # reference of drifts: what the model makes within its training length
STEP_SECONDS = 0.25
MIN_SHOT_SECONDS = 2.0
FEATURES = ("red", "green", "blue", "saturation", "contrast")


def reference_frames(num_frames: int, fps: float) -> int:
    """Frames at either end that are compared: five seconds, or half of a video of less than ten; at least 1."""
    return max(1, min(round(REFERENCE_SECONDS * fps), num_frames // 2))


def _colours(track: Track) -> np.ndarray:
    """(T, 5) float64 of each frame: mean red, green and blue, mean distance from grey, deviation of the brightness."""
    cells = track.colour.reshape(track.num_frames, -1, 3)
    luma = cells @ LUMA_WEIGHTS
    saturation = np.sqrt(np.square(cells - luma[..., None]).mean(axis=2)).mean(axis=1)
    return np.column_stack([cells.mean(axis=1), saturation, luma.std(axis=1)]).astype(np.float64)


def _trend(track: Track) -> dict[str, float | str]:
    """Distance and steadiness of the colours' move within the longest shot.

    Returns:
        ``feature``: which of the five moves furthest; ``change``: by how many grey levels, from the first to the last
        fifth of the shot; ``steadiness``: the share of its variance that the best rising (or falling) curve explains,
        1 for a drift, near 0 for what comes and goes; ``start_s`` and ``end_s`` of the shot. Empty if no shot lasts
        two seconds.
    """
    start, end = max(track.shots, key=lambda shot: shot[1] - shot[0])
    if end - start < MIN_SHOT_SECONDS * track.fps:
        return {}
    step = track.frames_in(STEP_SECONDS)
    rows = _colours(track)[start:end]
    num_steps = len(rows) // step
    rows = rows[: num_steps * step].reshape(num_steps, step, -1).mean(axis=1)
    fifth = max(1, num_steps // 5)
    changes = rows[-fifth:].mean(axis=0) - rows[:fifth].mean(axis=0)
    most = int(np.abs(changes).argmax())
    return {
        "feature": FEATURES[most],
        "change": float(changes[most]),
        "steadiness": _monotone_share(rows[:, most] * np.sign(changes[most])),
        "start_s": start / track.fps,
        "end_s": end / track.fps,
    }


def _monotone_share(values: np.ndarray) -> float:
    """Share of a series' variance that its best non-decreasing fit (pooled violators) explains; 0 for a constant."""
    spread = float(np.square(values - values.mean()).sum())
    if spread <= 1e-9 * len(values):
        return 0.0
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            other, number = blocks.pop()
            mean = (mean * count + other * number) / (count + number)
            count += number
        blocks.append((mean, count))
    fit = np.concatenate([np.full(count, mean) for mean, count in blocks])
    return 1.0 - float(np.square(values - fit).sum()) / spread


def _colour_drift(track: Track) -> list[Score]:
    if track.num_frames < 2:
        return [Score.none("needs 2 frames")]
    rows = _colours(track)
    length = reference_frames(track.num_frames, track.fps)
    first, last = rows[:length].mean(axis=0), rows[-length:].mean(axis=0)
    windows = curve(track.video, lambda start, end: float(np.linalg.norm(rows[start:end].mean(axis=0) - first)))
    details = {
        "compared_s": length / track.fps,
        "changes": {name: float(change) for name, change in zip(FEATURES, last - first, strict=True)},
        "trend": _trend(track),
    }
    return [Score(value=float(np.linalg.norm(last - first)), windows=windows, details=details)]


LEAST_DIFFERENCE = 0.1
"""Grey levels, mean over the picture: anything less is none, so that standing still between jumps gives a number."""


def _seams(track: Track) -> list[Score]:
    starts = sorted({start for start in track.video.chunk_starts if 0 < start < track.num_frames})
    if not track.video.chunk_starts:
        return [Score.none("the starts of the rollout's blocks (chunk_starts) are not known")]
    elsewhere = np.ones(track.num_frames, dtype=bool)
    elsewhere[[0, *starts]] = False
    if not starts or not elsewhere.any():
        return [Score.none("needs two blocks, one of more than a frame")]
    at_seams = track.difference[starts]
    usual = float(track.difference[elsewhere].mean())
    ratio = max(float(at_seams.mean()), LEAST_DIFFERENCE) / max(usual, LEAST_DIFFERENCE)
    details = {
        "at_seams": float(at_seams.mean()),
        "elsewhere": usual,
        "first_s": starts[0] / track.fps,
        "last_s": starts[-1] / track.fps,
        "seams": [[start, float(value)] for start, value in zip(starts, at_seams, strict=True)],
    }
    return [Score(value=ratio, details=details)]


MIN_FRAMES = 8
MIN_CHANGE = 0.05  # grey levels: a colour cell that changes less in a window has no spectrum
OFFSET = 1e-6  # added to amplitudes before the logarithm, as STREAM does


def _spectral_slope(series: np.ndarray) -> float | None:
    """Slope of log amplitude over log frequency, mean over those of the series (T, D) that change, T >= 4.

    It is B of STREAM's fit ``log(amplitude_k + 1e-6) = B log k + log A`` for k = 1..T/2 by least squares; None if
    nothing changes.

    Source: STREAM, arXiv:2403.09669.
    """
    num_frames = len(series)
    changing = series[:, series.std(axis=0) >= MIN_CHANGE].astype(np.float64)
    if not changing.shape[1]:
        return None
    amplitudes = 2.0 * np.abs(np.fft.rfft(changing, axis=0)) / (1.0 + num_frames / 2.0)
    logs = np.log(amplitudes[1 : num_frames // 2 + 1] + OFFSET)
    frequencies = np.log(np.arange(1, len(logs) + 1))
    frequencies -= frequencies.mean()
    slopes = frequencies @ logs / np.square(frequencies).sum()
    return float(slopes.mean())


def _spectrum(track: Track) -> list[Score]:
    series = track.colour.reshape(track.num_frames, -1)
    windows = curve(
        track.video, lambda start, end: _spectral_slope(series[start:end]) if end - start >= MIN_FRAMES else None
    )
    values = [window.value for window in windows if window.value is not None]
    if not values:
        return [Score.none(f"nothing changes in any window of {MIN_FRAMES} frames or more")]
    return [Score(value=sum(values) / len(values), windows=windows)]


SHOTS = (
    _cuts,
    MetricSpec.proxy(
        "cuts",
        "Hard cuts; a long take has none. Changes of brightness alone do not count, unless they last.",
        unit="cuts",
    ),
)
FLICKER = (
    _flicker,
    MetricSpec.proxy(
        "flicker_excess",
        "Mean distance of the picture's brightness from its mean over half a second, as far as most of the "
        "picture shares it: motion makes some places lighter and others darker.",
        unit="grey levels",
        top=255.0,
    ),
)
COLOUR = (
    _colour_drift,
    MetricSpec.proxy(
        "colour_drift",
        "Distance of the last five seconds' mean colour, saturation and contrast from those of the first five "
        "(of the halves, in videos under ten seconds).",
        unit="grey levels",
    ),
)
SEAMS = (
    _seams,
    MetricSpec.proxy(
        "chunk_seam_ratio",
        "Mean difference of neighbouring frames where a block of the rollout begins, over that elsewhere; "
        "1 where seams do not show.",
        unit="ratio",
    ),
)
SPECTRUM = (
    _spectrum,
    MetricSpec(
        name="proxy/temporal_spectral_slope",
        higher_is_better=None,
        unit="log amplitude per log frequency",
        formula="STREAM, per two-second window, on pooled colours",
        description="Power law of the changes over time: about -1 for smooth motion, towards 0 for flicker and "
        "grain; cells that do not change are left out.",
    ),
)
