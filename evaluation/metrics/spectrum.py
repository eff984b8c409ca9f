"""Temporal spectrum: how fast the power of a video's changes falls with their frequency."""

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score, Window, WindowMeans
from longtake.evaluation.metrics.track import Track, TrackMeasure

MIN_FRAMES = 8
MIN_CHANGE = 0.05
"""Grey levels: a colour cell that changes less in a window has no spectrum."""
OFFSET = 1e-6
"""Added to amplitudes before the logarithm, as STREAM does."""

SPECTRAL_SLOPE = MetricSpec(
    name="proxy/temporal_spectral_slope",
    higher_is_better=None,
    unit="log amplitude per log frequency",
    formula="STREAM, per two-second window, on pooled colours",
    description="Power law of the changes over time: about -1 for smooth motion, towards 0 for flicker and grain; "
    "cells that do not change are left out.",
)


def spectral_slope(series: np.ndarray) -> float | None:
    """Slope of log amplitude over log frequency, mean over the series that change.

    Args:
        series: (T, D), T >= 4.

    Returns:
        The slope B of STREAM's fit ``log(amplitude_k + 1e-6) = B log k + log A`` for k = 1..T/2 by least squares; None
        if nothing changes.

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


def measure_spectrum(track: Track) -> dict[str, Score]:
    """The slope of every window, and their mean."""
    series = track.colour.reshape(track.num_frames, -1)
    windows = []
    for window in WindowMeans(track.video).windows(track.num_frames):
        part = series[window.start_frame : window.start_frame + window.num_frames]
        value = spectral_slope(part) if len(part) >= MIN_FRAMES else None
        windows.append(Window(start_frame=window.start_frame, num_frames=window.num_frames, value=value))
    values = [window.value for window in windows if window.value is not None]
    if not values:
        return {SPECTRAL_SLOPE.name: Score.none(f"nothing changes in any window of {MIN_FRAMES} frames or more")}
    return {SPECTRAL_SLOPE.name: Score(value=sum(values) / len(values), windows=tuple(windows))}


SPECTRUM = TrackMeasure((SPECTRAL_SLOPE,), measure_spectrum)
