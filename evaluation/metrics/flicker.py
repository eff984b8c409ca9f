"""Flicker: the brightness of the whole picture goes up and down, which no motion explains."""

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score, WindowMeans
from longtake.evaluation.metrics.shots import shots
from longtake.evaluation.metrics.track import Track, TrackMeasure

REACH_SECONDS = 0.25
"""A frame is compared with the mean of this long on both sides: what swings twice a second or faster counts in full,
once a second by a third, and a scene that brightens and darkens more slowly does not."""

FLICKER_EXCESS = MetricSpec(
    name="proxy/flicker_excess",
    higher_is_better=False,
    unit="grey levels",
    range=(0.0, 255.0),
    description="Mean distance of the picture's brightness from its mean over half a second, as far as most of the "
    "picture shares it: motion makes some places lighter and others darker.",
)


def brightness_swings(track: Track) -> np.ndarray:
    """(T,) float64: by how many grey levels each frame is lighter than the half second around it.

    It is the mean or the median over the cells of a small picture, whichever is less, and 0 where they disagree
    about the direction: an object moves the mean, stripes that pass by move the median. NaN where there is no whole
    half second of one shot around the frame: at the ends of the video and beside cuts.
    """
    reach = track.frames_in(REACH_SECONDS)
    swings = np.full(track.num_frames, np.nan)
    for start, end in shots(track):
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


def measure_flicker(track: Track) -> dict[str, Score]:
    """Mean swing of the brightness, and its course."""
    swings = np.abs(brightness_swings(track))
    known = np.flatnonzero(~np.isnan(swings))
    if not len(known):
        return {FLICKER_EXCESS.name: Score.none(f"needs a shot of more than {2 * REACH_SECONDS:g} s")}
    means = WindowMeans(track.video)
    for index in known:
        means.add(int(index), float(swings[index]))
    windows = means.windows(track.num_frames)
    worst = max((window for window in windows if window.value is not None), key=lambda window: window.value or 0.0)
    details = {
        "largest": float(swings[known].max()),
        "worst_window": worst.value,
        "worst_start_s": worst.start_frame / track.fps,
        "worst_end_s": (worst.start_frame + worst.num_frames) / track.fps,
    }
    return {FLICKER_EXCESS.name: Score(value=float(swings[known].mean()), windows=windows, details=details)}


FLICKER = TrackMeasure((FLICKER_EXCESS,), measure_flicker)
