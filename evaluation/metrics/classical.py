"""Classical statistics of single frames; good for one thing: how they change from a video's first seconds.

None of them is quality. A sharp picture is not better than a soft one, but one that grows softer has drifted.
"""

import math
from collections.abc import Mapping

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score, VideoInfo, Window, WindowMeans
from longtake.evaluation.metrics.colour import reference_frames
from longtake.evaluation.metrics.stills import Still
from longtake.evaluation.metrics.track import mean_difference

BLOCK = 8
"""Pixels a side of the blocks that codecs and latents decode to."""
DARKEST, LIGHTEST = 1, 254
"""Values of a channel from which on it is clipped."""
LEAST_STEP = 0.25
"""Grey levels added to both sides of a ratio of steps, so that flat pictures give 1."""
LEAST_SHARPNESS = 1.0
"""Variance of the Laplacian of a picture of nothing but rounding."""


def _spec(name: str, unit: str, description: str, *, top: float | None = None) -> MetricSpec:
    return MetricSpec(
        name=f"proxy/{name}", higher_is_better=None, unit=unit, range=(0.0, top), description=description
    )


STATISTICS = (
    _spec("sharpness", "grey levels squared", "Variance of the Laplacian of the brightness."),
    _spec("contrast", "grey levels", "Deviation of the brightness.", top=127.5),
    _spec("exposure", "grey levels", "Mean brightness.", top=255.0),
    _spec("saturation", "share", "Mean saturation (HSV).", top=1.0),
    _spec("colorfulness", "grey levels", "Spread and strength of the opponent colours (Hasler and Suesstrunk 2003)."),
    _spec("clipped_fraction", "share", "Share of colour values at either end of the scale.", top=1.0),
    _spec("blockiness", "ratio", "Steps across the borders of 8x8 blocks over those in their middle; 1 for none."),
    _spec("noise_sigma", "grey levels", "Deviation of the grain (Immerkaer 1996); fine texture counts too."),
)
SHARPNESS_DRIFT = MetricSpec(
    name="proxy/sharpness_drift",
    higher_is_better=False,
    unit="octaves",
    range=(0.0, None),
    description="By how many factors of two the sharpness of the last five seconds is off that of the first five "
    "(of the halves, in videos under ten seconds).",
)


def statistics(still: Still) -> tuple[float, ...]:
    """The values of :data:`STATISTICS` for one frame, in that order; 0 for textures of pictures under 3 pixels."""
    luma, colour = still.luma, still.colour
    sharpness, noise = texture(luma)
    mean = float(luma.mean())
    red, green, blue = colour
    most, least = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    return (
        sharpness,
        float(luma.std()),
        mean,
        float(((most - least) / np.maximum(most, 1.0)).mean()),
        colorfulness(colour),
        clipped_fraction(still.frame),
        blockiness(still.frame),
        noise,
    )


def texture(luma: np.ndarray) -> tuple[float, float]:
    """Variance of the Laplacian, and Immerkaer's estimate of the deviation of the grain.

    Args:
        luma: (h, w) float32.

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


def colorfulness(colour: np.ndarray) -> float:
    """Colourfulness of (3, h, w) RGB in 0..255.

    Source: Hasler and Suesstrunk, "Measuring colourfulness in natural images", 2003.
    """
    red, green, blue = colour
    opponents = (red - green, 0.5 * (red + green) - blue)
    spread = math.sqrt(sum(float(values.var()) for values in opponents))
    strength = math.sqrt(sum(float(values.mean()) ** 2 for values in opponents))
    return spread + 0.3 * strength


def clipped_fraction(frame: np.ndarray) -> float:
    """Share of the values of a uint8 frame that are at 0..1 or 254..255."""
    # Values below 2 and above 253 wrap around to the four lowest.
    wrapped = frame + np.uint8(256 - LIGHTEST)
    return float(np.count_nonzero(wrapped <= DARKEST + 256 - LIGHTEST)) / frame.size


def blockiness(frame: np.ndarray) -> float:
    """Mean step across borders of 8x8 blocks over the mean step in the middle of blocks, both directions.

    Args:
        frame: (H, W, 3) uint8, full size: shrinking would move the borders.
    """
    borders, middles = [], []
    for picture in (frame, frame.swapaxes(0, 1)):
        if picture.shape[0] <= BLOCK:
            continue
        borders.append(_step(picture, BLOCK))
        middles.append(_step(picture, BLOCK // 2))
    if not borders:
        return 1.0
    return (sum(borders) + LEAST_STEP) / (sum(middles) + LEAST_STEP)


def _step(picture: np.ndarray, first: int) -> float:
    after = picture[first::BLOCK]
    before = picture[first - 1 :: BLOCK][: len(after)]
    return mean_difference(before, after)


class Classical:
    """The classical statistics and the drift of the sharpness."""

    specs = (*STATISTICS, SHARPNESS_DRIFT)

    def start(self, video: VideoInfo) -> "ClassicalMeter":
        """A meter for one video."""
        return ClassicalMeter(video)


class ClassicalMeter:
    """Gathers the statistics of one video.

    Args:
        video: What is announced.
    """

    def __init__(self, video: VideoInfo) -> None:
        self._video = video
        self._means = [WindowMeans(video) for _ in STATISTICS]
        self._frames: list[int] = []
        self._sharpness: list[float] = []

    def take(self, still: Still) -> None:
        """The next still."""
        values = statistics(still)
        for means, value in zip(self._means, values, strict=True):
            means.add(still.index, value)
        self._frames.append(still.index)
        self._sharpness.append(values[0])

    def finish(self) -> Mapping[str, Score]:
        """Means over the stills, with their windows."""
        scores = {}
        for spec, means in zip(STATISTICS, self._means, strict=True):
            mean = means.mean()
            windows = means.windows(self._video.num_frames)
            scores[spec.name] = Score.none("no frames") if mean is None else Score(value=mean, windows=windows)
        return {**scores, SHARPNESS_DRIFT.name: self._sharpness_drift()}

    def _sharpness_drift(self) -> Score:
        frames, sharpness = np.array(self._frames), np.array(self._sharpness)
        if len(frames) < 2:
            return Score.none("needs 2 frames, an eighth of a second apart")
        length = reference_frames(self._video.num_frames, self._video.fps)
        first = _octaves(sharpness[frames < length])
        last = _octaves(sharpness[frames >= min(self._video.num_frames - length, frames[-1])])
        windows = tuple(
            Window(
                start_frame=window.start_frame,
                num_frames=window.num_frames,
                value=None if window.value is None else abs(_octaves(np.array([window.value])) - first),
            )
            for window in self._means[0].windows(self._video.num_frames)
        )
        details = {"compared_s": length / self._video.fps, "change": last - first}
        return Score(value=abs(last - first), windows=windows, details=details)


def _octaves(sharpness: np.ndarray) -> float:
    return math.log2(float(sharpness.mean()) + LEAST_SHARPNESS)
