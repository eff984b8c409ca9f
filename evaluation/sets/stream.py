"""STREAM: a set of videos against another by the spectra of their frames' features over time.

Source: Kim et al., STREAM: spatio-temporal evaluation and analysis metric for video generative models,
arXiv:2403.09669, with the published code's constants.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longtake.evaluation.sets.prdc import NUM_NEIGHBOURS, prdc

NUM_BINS = 50
FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """What STREAM keeps of one video.

    Attributes:
        mean: (D,), twice the amplitude of frequency 0: what the frames look like on average.
        skewness: (D,), of a power law fitted to the other frequencies: how they change.
    """

    mean: NDArray[np.float64]
    skewness: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """STREAM's three numbers, each 0..1, more is better."""

    temporal: float
    fidelity: float
    diversity: float


def spectrum(features: NDArray) -> Spectrum:
    """The spectrum of a video's frame features.

    Args:
        features: (T, D), T even and 4 or more.

    Returns:
        Its mean and its skewness per feature.

    Raises:
        ValueError: If T is odd or too small, or a value is not finite.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or features.shape[0] < 4 or features.shape[0] % 2:
        raise ValueError(
            f"features of {features.shape} must be (frames, dimensions) with an even number of frames, 4 up."
        )
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinite values: look at the video they come from.")
    half = len(features) // 2
    amplitudes = 2 * np.abs(np.fft.rfft(features, axis=0)) / (1 + half)
    frequencies = np.arange(1, half + 1, dtype=np.float64)
    logs = np.log(frequencies) - np.log(frequencies).mean()
    y = np.log(amplitudes[1:] + FLOOR)
    exponent = logs @ y / (logs @ logs)
    factor = np.exp(y.mean(axis=0) - exponent * np.log(frequencies).mean())
    powers = frequencies[:, None] ** exponent  # (T/2, D)
    share = factor / (factor * powers).sum(axis=0)
    third = (frequencies[:, None] ** 3 * powers).sum(axis=0)
    second = (frequencies[:, None] ** 2 * powers).sum(axis=0)
    return Spectrum(mean=amplitudes[0], skewness=third / (np.sqrt(share) * np.sqrt(second)))


def stream(videos: NDArray, reference: NDArray, *, num_neighbours: int = NUM_NEIGHBOURS) -> Stream:
    """Measure a set of videos against another.

    Args:
        videos: (N, T, D), features of the frames.
        reference: (M, T, D).
        num_neighbours: Of precision (fidelity) and recall (diversity) of the spectra's means.

    Returns:
        The three numbers.

    Raises:
        ValueError: If shapes disagree or a set is too small.
    """
    if videos.ndim != 3 or reference.ndim != 3 or videos.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"features of {videos.shape} and {reference.shape} must be (videos, frames, dimensions) with equal "
            "frames and dimensions."
        )
    own, other = ([spectrum(video) for video in group] for group in (videos, reference))
    spatial = prdc(np.stack([s.mean for s in own]), np.stack([s.mean for s in other]), num_neighbours=num_neighbours)
    temporal = histogram_agreement(np.stack([s.skewness for s in own]), np.stack([s.skewness for s in other]))
    return Stream(temporal=temporal, fidelity=spatial.precision, diversity=spatial.recall)


def histogram_agreement(values: NDArray, reference: NDArray) -> float:
    """Mean over columns of the squared correlation between two histograms of 50 bins over their common range.

    Args:
        values: (N, D).
        reference: (M, D).

    Returns:
        0..1.
    """
    agreements = []
    for own, other in zip(values.T, reference.T, strict=True):
        low, high = min(own.min(), other.min()), max(own.max(), other.max())
        limits = (int(low) - 1, int(high) + 1)  # towards zero, as the published code has it
        counts = [np.histogram(x, bins=NUM_BINS, range=limits)[0] / len(x) for x in (own, other)]
        own_part, other_part = (c - c.mean() for c in counts)
        agreements.append((own_part @ other_part) ** 2 / ((own_part @ own_part) * (other_part @ other_part)))
    return float(np.mean(agreements))
