"""Natural scene statistics, held against the video's own first seconds: does it still look as it did at first.

Features are of the kind NIQE uses: generalised Gaussians fitted to locally normalised brightness and to products of
its neighbours. NIQE compares them with photographs; this compares them with the first five seconds of the same video,
so it says nothing about quality, and needs no model.
"""

import math
from collections.abc import Mapping
from functools import cache

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score, VideoInfo, Window, WindowMeans
from longtake.evaluation.metrics.colour import reference_frames
from longtake.evaluation.metrics.stills import Still
from longtake.evaluation.metrics.track import Pooling

PATCH = 32
SMALL_PATCH = 16
"""Pixels a side, in pictures of less than four patches a side."""
EVERY = 2
"""Of the stills; the statistics of neighbouring frames hardly differ."""
REACH = 3
SIGMA = 7.0 / 6.0
"""Reach and width, in pixels, of the Gaussian that local means and deviations are taken with, as in NIQE."""
STABILISER = 1.0
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
SHRINKAGE = 0.1
"""Of the covariance towards its diagonal: five seconds of a small video have few patches for 18 features."""
LEAST_SPREAD = 0.01
"""Added to the deviation of each feature, so that a first five seconds without any change can be left by little."""

NSS_DRIFT_SELF = MetricSpec(
    name="proxy/nss_drift_self",
    higher_is_better=False,
    unit="deviations",
    range=(0.0, None),
    description="Mahalanobis distance of the last five seconds' mean patch statistics from the first five's (of the "
    "halves, in videos under ten seconds).",
)


class NaturalStatistics:
    """The drift of natural scene statistics."""

    specs = (NSS_DRIFT_SELF,)

    def start(self, video: VideoInfo) -> "NaturalStatisticsMeter":
        """A meter for one video."""
        return NaturalStatisticsMeter(video)


class NaturalStatisticsMeter:
    """Gathers patch features of one video: their distribution at first, means per frame later.

    Args:
        video: What is announced.
    """

    def __init__(self, video: VideoInfo) -> None:
        self._video = video
        self._length = reference_frames(video.num_frames, video.fps)
        self._num_taken = 0
        self._reference: list[np.ndarray] = []
        self._frames: list[int] = []
        self._means: list[np.ndarray] = []

    def take(self, still: Still) -> None:
        """The next still."""
        self._num_taken += 1
        if (self._num_taken - 1) % EVERY or min(still.luma.shape) < SMALL_PATCH:
            return
        rows = patch_features(still.luma)
        if still.index < self._length:
            self._reference.append(rows)
        self._frames.append(still.index)
        self._means.append(rows.mean(axis=0))

    def finish(self) -> Mapping[str, Score]:
        """The distance of the end, and of every window."""
        return {NSS_DRIFT_SELF.name: self._drift()}

    def _drift(self) -> Score:
        if len(self._means) < 2:
            return Score.none(f"needs half a second of video, {SMALL_PATCH} pixels or more a side")
        frames, means = np.array(self._frames), np.array(self._means)
        reference = np.concatenate(self._reference)
        whiten = whitening(reference)
        distances_from = (means - reference.mean(axis=0)) @ whiten
        late = frames >= min(self._video.num_frames - self._length, frames[-1])
        windows = []
        for window in WindowMeans(self._video).windows(self._video.num_frames):
            inside = (frames >= window.start_frame) & (frames < window.start_frame + window.num_frames)
            value = float(np.linalg.norm(distances_from[inside].mean(axis=0))) if inside.any() else None
            windows.append(Window(start_frame=window.start_frame, num_frames=window.num_frames, value=value))
        value = float(np.linalg.norm(distances_from[late].mean(axis=0)))
        details = {"compared_s": self._length / self._video.fps, "num_reference_patches": len(reference)}
        return Score(value=value, windows=tuple(windows), details=details)


def whitening(rows: np.ndarray) -> np.ndarray:
    """(D, D) matrix that turns differences of features into deviations of the rows (N, D)."""
    centred = rows - rows.mean(axis=0)
    covariance = centred.T @ centred / max(1, len(rows) - 1)
    spread = np.diag(np.diag(covariance))
    covariance = (1.0 - SHRINKAGE) * covariance + SHRINKAGE * spread + LEAST_SPREAD**2 * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    return vectors / np.sqrt(values)


def normalised(luma: np.ndarray) -> np.ndarray:
    """Brightness without its local mean, over its local deviation (MSCN): (h - 6, w - 6) float32."""
    middle = luma[REACH:-REACH, REACH:-REACH]
    mean = _blur(luma)
    variance = _blur(np.square(luma)) - np.square(mean)
    return (middle - mean) / (np.sqrt(np.maximum(variance, 0.0)) + np.float32(STABILISER))


def _blur(picture: np.ndarray) -> np.ndarray:
    weights = _gaussian()
    for axis in (0, 1):
        length = picture.shape[axis] - 2 * REACH
        parts = [_cut(picture, axis, start, length) for start in range(2 * REACH + 1)]
        picture = weights[REACH] * parts[REACH]
        for offset in range(REACH):
            picture += weights[offset] * (parts[offset] + parts[-1 - offset])
    return picture


def _cut(picture: np.ndarray, axis: int, start: int, length: int) -> np.ndarray:
    return picture[start : start + length] if axis == 0 else picture[:, start : start + length]


@cache
def _gaussian() -> np.ndarray:
    taps = np.exp(-0.5 * np.square(np.arange(-REACH, REACH + 1) / SIGMA))
    return (taps / taps.sum()).astype(np.float32)


def patch_features(luma: np.ndarray) -> np.ndarray:
    """Statistics of each patch of a picture.

    Args:
        luma: (h, w) float32, 16 pixels or more a side.

    Returns:
        (patches, 18) float64: shape and deviation of the generalised Gaussian of the normalised brightness; and, of
        its products with the neighbour to the right, below, and on both diagonals, the asymmetric one's shape, mean
        and two deviations.

    Source: Mittal, Soundararajan and Bovik, "Making a completely blind image quality analyzer", 2013.
    """
    mscn = normalised(luma)
    patch = PATCH if min(luma.shape) >= 4 * PATCH else SMALL_PATCH
    grid = (max(1, luma.shape[0] // patch), max(1, luma.shape[1] // patch))
    height, width = mscn.shape[0] - 1, mscn.shape[1] - 2
    here = mscn[:height, 1 : 1 + width]
    columns = [*_symmetric(here, grid)]
    for down, right in NEIGHBOURS:
        there = mscn[down : down + height, 1 + right : 1 + right + width]
        columns.extend(_asymmetric(here * there, grid))
    return np.stack([column.ravel() for column in columns], axis=1).astype(np.float64)


def _symmetric(values: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    size, power = _means((np.abs(values), np.square(values)), grid)
    return _shape(np.square(size) / np.maximum(power, 1e-6)), np.sqrt(power)


def _asymmetric(values: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, ...]:
    squares = np.square(values)
    is_left = values < 0
    size, power, left_power, left_share = _means((np.abs(values), squares, squares * is_left, is_left), grid)
    left = np.sqrt(left_power / np.maximum(left_share, 1e-3))
    right = np.sqrt(np.maximum(power - left_power, 0.0) / np.maximum(1.0 - left_share, 1e-3))
    skew = left / np.maximum(right, 1e-3)
    ratio = np.square(size) / np.maximum(power, 1e-6)
    ratio *= (skew**3 + 1.0) * (skew + 1.0) / np.square(skew**2 + 1.0)
    shape = _shape(ratio)
    grids, _, scales, leanings = _shape_table()
    scale = np.interp(shape, grids, scales)
    mean = (right - left) * scale * np.interp(shape, grids, leanings)
    return shape, mean, left * scale, right * scale


def _means(pictures: tuple[np.ndarray, ...], grid: tuple[int, int]) -> list[np.ndarray]:
    pool = _pooling(pictures[0].shape, grid)
    return [pool(picture[..., None])[..., 0] for picture in pictures]


@cache
def _pooling(shape: tuple[int, int], grid: tuple[int, int]) -> Pooling:
    return Pooling(*shape, grid)


def _shape(ratio: np.ndarray) -> np.ndarray:
    """Shape of the generalised Gaussian whose squared mean size over its mean square is ``ratio``."""
    grids, ratios, _, _ = _shape_table()
    return np.interp(ratio, ratios, grids)


@cache
def _shape_table() -> tuple[np.ndarray, ...]:
    """Shapes 0.2 to 10; their ratio, rising; scale over deviation; and mean over scale of the skewed halves."""
    shapes = np.exp(np.linspace(math.log(0.2), math.log(10.0), 400))
    one, two, three = (np.array([math.lgamma(k / shape) for shape in shapes]) for k in (1.0, 2.0, 3.0))
    return shapes, np.exp(2.0 * two - one - three), np.exp(0.5 * (one - three)), np.exp(two - one)
