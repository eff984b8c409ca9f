"""Metrics of single pictures, eight a second: classical statistics, and the drift of natural scene statistics."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import ClassVar

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score, VideoInfo, WindowMeans, curve
from longtake.evaluation.metrics.course import LUMA_WEIGHTS, Pooling, mean_difference, reference_frames
from longtake.evaluation.preprocessing import stride_for_8fps


class StillMeter(ABC):
    """Takes about eight frames a second, averaged down by a whole factor to a shorter side near to ``short_side``."""

    short_side: ClassVar[int]  # pixels

    def __init__(self, video: VideoInfo) -> None:
        self.video = video
        self.stride = stride_for_8fps(video.fps)
        self.factor = max(1, round(min(video.height, video.width) / self.short_side))
        self._num_frames = 0

    def push(self, frames: np.ndarray) -> None:
        for index in range(-self._num_frames % self.stride, len(frames), self.stride):
            self.take(self._num_frames + index, frames[index], _shrink(frames[index], self.factor))
        self._num_frames += len(frames)

    @abstractmethod
    def take(self, index: int, frame: np.ndarray, colour: np.ndarray) -> None:
        """Take a frame as it came, (H, W, 3) uint8, and averaged down, (3, h, w) float32 in 0..255."""

    @abstractmethod
    def finish(self) -> Mapping[str, Score]:
        """All have come: a score for every spec."""


def _shrink(frame: np.ndarray, factor: int) -> np.ndarray:
    """Average (H, W, 3) uint8 over squares of ``factor`` pixels: (3, H // factor, W // factor) float32 in 0..255."""
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


BLOCK = 8  # pixels a side of the blocks that codecs and latents decode to
DARKEST, LIGHTEST = 1, 254  # values of a channel from which on it is clipped
LEAST_STEP = 0.25  # grey levels added to both sides of a ratio of steps, so that flat pictures give 1
LEAST_SHARPNESS = 1.0  # variance of the Laplacian of a picture of nothing but rounding
PATCH = 32
SMALL_PATCH = 16  # pixels a side, in pictures of less than four patches a side
EVERY = 2  # of the stills; the statistics of neighbouring frames hardly differ
REACH = 3
SIGMA = 7.0 / 6.0
"""Reach and width, in pixels, of the Gaussian that local means and deviations are taken with, as in NIQE."""
TAPS = np.exp(-0.5 * np.square(np.arange(-REACH, REACH + 1) / SIGMA))
TAPS = (TAPS / TAPS.sum()).astype(np.float32)
STABILISER = 1.0
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
SHRINKAGE = 0.1
"""Of the covariance towards its diagonal: five seconds of a small video have few patches for 18 features."""
LEAST_SPREAD = 0.01
"""Added to the deviation of each feature, so that a first five seconds without any change can be left by little."""

STATISTICS = tuple(
    MetricSpec.proxy(name, description, unit=unit, higher_is_better=None, top=top)
    for name, unit, top, description in (
        ("sharpness", "grey levels squared", None, "Variance of the Laplacian of the brightness."),
        ("contrast", "grey levels", 127.5, "Deviation of the brightness."),
        ("exposure", "grey levels", 255.0, "Mean brightness."),
        ("saturation", "share", 1.0, "Mean saturation (HSV)."),
        (
            "colorfulness",
            "grey levels",
            None,
            "Spread and strength of the opponent colours (Hasler and Suesstrunk 2003).",
        ),
        ("clipped_fraction", "share", 1.0, "Share of colour values at either end of the scale."),
        (
            "blockiness",
            "ratio",
            None,
            "Steps across the borders of 8x8 blocks over those in their middle; 1 for none.",
        ),
        ("noise_sigma", "grey levels", None, "Deviation of the grain (Immerkaer 1996); fine texture counts too."),
    )
)
SHARPNESS_DRIFT = MetricSpec.proxy(
    "sharpness_drift",
    "By how many factors of two the sharpness of the last five seconds is off that of the first five "
    "(of the halves, in videos under ten seconds).",
    unit="octaves",
)
NSS_DRIFT_SELF = MetricSpec.proxy(
    "nss_drift_self",
    "Mahalanobis distance of the last five seconds' mean patch statistics from the first five's (of the "
    "halves, in videos under ten seconds).",
    unit="deviations",
)


class StillsMetric:
    """The classical statistics, the drift of the sharpness, and that of natural scene statistics."""

    specs = (*STATISTICS, SHARPNESS_DRIFT, NSS_DRIFT_SELF)

    def start(self, video: VideoInfo) -> StillMeter:
        return _StatisticsMeter(video)


class _StatisticsMeter(StillMeter):
    short_side = 256

    def __init__(self, video: VideoInfo) -> None:
        super().__init__(video)
        self._length = reference_frames(video.num_frames, video.fps)
        self._means = [WindowMeans(video) for _ in STATISTICS]
        self._frames: list[int] = []
        self._sharpness: list[float] = []
        # Patch features: all of them at first, later their means, of every second still.
        self._reference: list[np.ndarray] = []
        self._patch_frames: list[int] = []
        self._patch_means: list[np.ndarray] = []

    def take(self, index: int, frame: np.ndarray, colour: np.ndarray) -> None:
        luma = np.tensordot(LUMA_WEIGHTS, colour, axes=1)
        values = _statistics(frame, colour, luma)
        for means, value in zip(self._means, values, strict=True):
            means.add(index, value)
        if len(self._frames) % EVERY == 0 and min(luma.shape) >= SMALL_PATCH:
            rows = _patch_features(luma)
            if index < self._length:
                self._reference.append(rows)
            self._patch_frames.append(index)
            self._patch_means.append(rows.mean(axis=0))
        self._frames.append(index)
        self._sharpness.append(values[0])

    def finish(self) -> Mapping[str, Score]:
        scores = {}
        for spec, means in zip(STATISTICS, self._means, strict=True):
            mean = means.mean()
            scores[spec.name] = Score.none("no frames") if mean is None else Score(value=mean, windows=means.windows())
        return {**scores, SHARPNESS_DRIFT.name: self._sharpness_drift(), NSS_DRIFT_SELF.name: self._nss_drift()}

    def _late(self, frames: np.ndarray) -> np.ndarray:
        """Those of some frames that are compared with the first; at least the last."""
        return frames >= min(self.video.num_frames - self._length, frames[-1])

    def _sharpness_drift(self) -> Score:
        frames, sharpness = np.array(self._frames), np.array(self._sharpness)
        if len(frames) < 2:
            return Score.none("needs 2 frames, an eighth of a second apart")
        first, last = _octaves(sharpness[frames < self._length]), _octaves(sharpness[self._late(frames)])
        windows = tuple(
            replace(window, value=abs(_octaves(np.array([window.value])) - first))
            if window.value is not None
            else window
            for window in self._means[0].windows()
        )
        details = {"compared_s": self._length / self.video.fps, "change": last - first}
        return Score(value=abs(last - first), windows=windows, details=details)

    def _nss_drift(self) -> Score:
        if len(self._patch_means) < 2:
            return Score.none(f"needs half a second of video, {SMALL_PATCH} pixels or more a side")
        frames, means = np.array(self._patch_frames), np.array(self._patch_means)
        reference = np.concatenate(self._reference)
        distances_from = (means - reference.mean(axis=0)) @ _whitening(reference)

        def distance(inside: np.ndarray) -> float | None:
            return float(np.linalg.norm(distances_from[inside].mean(axis=0))) if inside.any() else None

        windows = curve(self.video, lambda start, end: distance((frames >= start) & (frames < end)))
        details = {"compared_s": self._length / self.video.fps, "num_reference_patches": len(reference)}
        return Score(value=distance(self._late(frames)), windows=windows, details=details)


def _octaves(sharpness: np.ndarray) -> float:
    return math.log2(float(sharpness.mean()) + LEAST_SHARPNESS)


def _statistics(frame: np.ndarray, colour: np.ndarray, luma: np.ndarray) -> tuple[float, ...]:
    """The values of :data:`STATISTICS` for one frame, in that order; 0 for textures of pictures under 3 pixels."""
    sharpness, noise = _texture(luma)
    most, least = colour.max(axis=0), colour.min(axis=0)
    # Values below 2 and above 253 wrap around to the four lowest.
    wrapped = frame + np.uint8(256 - LIGHTEST)
    return (
        sharpness,
        float(luma.std()),
        float(luma.mean()),
        float(((most - least) / np.maximum(most, 1.0)).mean()),
        _colorfulness(colour),
        float(np.count_nonzero(wrapped <= DARKEST + 256 - LIGHTEST)) / frame.size,
        _blockiness(frame),
        noise,
    )


def _texture(luma: np.ndarray) -> tuple[float, float]:
    """Variance of the Laplacian of (h, w) float32, and Immerkaer's estimate of the deviation of the grain.

    Source: Immerkaer, "Fast noise variance estimation", 1996: the mean absolute response to the difference of two
    Laplacians, which smooth surfaces do not give.
    """
    if min(luma.shape) < 3:
        return 0.0, 0.0
    down = luma[:-2] - 2.0 * luma[1:-1] + luma[2:]
    across = luma[:, :-2] - 2.0 * luma[:, 1:-1] + luma[:, 2:]
    laplacian = down[:, 1:-1] + across[1:-1]
    response = down[:, :-2] - 2.0 * down[:, 1:-1] + down[:, 2:]
    return float(laplacian.var()), float(np.abs(response).mean()) * math.sqrt(math.pi / 2.0) / 6.0


def _colorfulness(colour: np.ndarray) -> float:
    """(3, h, w) RGB in 0..255: Hasler and Suesstrunk, "Measuring colourfulness in natural images", 2003."""
    red, green, blue = colour
    opponents = (red - green, 0.5 * (red + green) - blue)
    spread = math.sqrt(sum(float(values.var()) for values in opponents))
    strength = math.sqrt(sum(float(values.mean()) ** 2 for values in opponents))
    return spread + 0.3 * strength


def _blockiness(frame: np.ndarray) -> float:
    """Mean step across borders of 8x8 blocks of a frame of full size over that in their middle, both directions."""
    pictures = [picture for picture in (frame, frame.swapaxes(0, 1)) if len(picture) > BLOCK]
    borders, middles = (sum(_step(picture, first) for picture in pictures) for first in (BLOCK, BLOCK // 2))
    return (borders + LEAST_STEP) / (middles + LEAST_STEP)


def _step(picture: np.ndarray, first: int) -> float:
    after = picture[first::BLOCK]
    before = picture[first - 1 :: BLOCK][: len(after)]
    return mean_difference(before, after)


def _whitening(rows: np.ndarray) -> np.ndarray:
    """(D, D) matrix that turns differences of features into deviations of the rows (N, D)."""
    centred = rows - rows.mean(axis=0)
    covariance = centred.T @ centred / max(1, len(rows) - 1)
    spread = np.diag(np.diag(covariance))
    covariance = (1.0 - SHRINKAGE) * covariance + SHRINKAGE * spread + LEAST_SPREAD**2 * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    return vectors / np.sqrt(values)


def _normalised(luma: np.ndarray) -> np.ndarray:
    """Brightness without its local mean, over its local deviation (MSCN): (h - 6, w - 6) float32."""
    middle = luma[REACH:-REACH, REACH:-REACH]
    mean = _blur(luma)
    variance = _blur(np.square(luma)) - np.square(mean)
    return (middle - mean) / (np.sqrt(np.maximum(variance, 0.0)) + np.float32(STABILISER))


def _blur(picture: np.ndarray) -> np.ndarray:
    for axis in (0, 1):
        parts = np.moveaxis(np.lib.stride_tricks.sliding_window_view(picture, 2 * REACH + 1, axis=axis), -1, 0)
        picture = TAPS[REACH] * parts[REACH]
        for offset in range(REACH):
            picture += TAPS[offset] * (parts[offset] + parts[-1 - offset])
    return picture


def _patch_features(luma: np.ndarray) -> np.ndarray:
    """Statistics of each patch of a picture (h, w), 16 pixels or more a side.

    Returns:
        (patches, 18) float64: shape and deviation of the generalised Gaussian of the normalised brightness; and, of
        its products with the neighbour to the right, below, and on both diagonals, the asymmetric one's shape, mean
        and two deviations.

    Source: Mittal, Soundararajan and Bovik, "Making a completely blind image quality analyzer", 2013.
    """
    mscn = _normalised(luma)
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
    pool = _pooling(*pictures[0].shape, grid)
    return [pool(picture[..., None])[..., 0] for picture in pictures]


_pooling = cache(Pooling)


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
