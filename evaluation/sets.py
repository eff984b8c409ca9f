"""Distances between two sets of videos: Frechet distance, precision and recall, density and coverage, STREAM."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from longtake.evaluation.backbones.base import FrameEncoder
from longtake.evaluation.metric import MetricSpec, Score, VideoInfo
from longtake.evaluation.preprocessing import middle


def frechet(mean: NDArray, covariance: NDArray, other_mean: NDArray, other_covariance: NDArray) -> float:
    """Squared 2-Wasserstein distance between two Gaussians, in float64.

    Args:
        mean: (D,).
        covariance: (D, D), symmetric, no negative eigenvalues beyond rounding.
        other_mean: (D,).
        other_covariance: (D, D).

    Returns:
        |m1 - m2|^2 + trace(S1 + S2 - 2 (S1 S2)^(1/2)), not below 0.

    Raises:
        ValueError: If shapes disagree or a covariance is not symmetric and positive semi-definite.

    Source: Dowson and Landau, J. Multivariate Analysis 12 (1982).
    """
    mean, other_mean = (np.asarray(m, dtype=np.float64) for m in (mean, other_mean))
    if mean.shape != other_mean.shape or mean.ndim != 1:
        raise ValueError(f"means of {mean.shape} and {other_mean.shape} must be two vectors of one length.")
    roots = [_root(np.asarray(s, dtype=np.float64), len(mean)) for s in (covariance, other_covariance)]
    return _distance(mean, roots[0], other_mean, roots[1])


def _frechet_of_features(features: NDArray, reference: NDArray, *, allow_small: bool = False) -> float:
    """Frechet distance between two sets of feature vectors.

    Args:
        features: (N, D), any float dtype.
        reference: (M, D).
        allow_small: Compute even where a set has fewer vectors than dimensions; its covariance is then singular and
            the distance biased upwards by much more than policies differ.

    Returns:
        The distance, from covariances over N - 1 and M - 1.

    Raises:
        ValueError: If shapes disagree, a value is not finite, or a set is too small.
    """
    features, reference = (np.asarray(x, dtype=np.float64) for x in (features, reference))
    _check_features(features, reference)
    smallest, dimensions = min(len(features), len(reference)), features.shape[1]
    if smallest < 2 or (smallest < dimensions and not allow_small):
        raise ValueError(
            f"sets of {len(features)} and {len(reference)} videos are too small for {dimensions} dimensions: "
            f"use {max(2, dimensions)} or more, or allow_small=True and compare within one report only."
        )
    means = [x.mean(axis=0) for x in (features, reference)]
    # With X - mean = Q R, the covariance is R'R / (N - 1): its root without squaring, exact even where it is singular.
    roots = [
        np.linalg.qr(x - m, mode="r") / np.sqrt(len(x) - 1) for x, m in zip((features, reference), means, strict=True)
    ]
    return _distance(means[0], roots[0], means[1], roots[1])


def _frechet_name(encoder: str, reference: str, *, is_standard_i3d: bool = False) -> str:
    """The metric's name: FVD only for the I3D network of the original, trained on Kinetics-400."""
    return f"set/fvd[ref={reference}]" if is_standard_i3d else f"set/frechet[enc={encoder}][ref={reference}]"


def _check_features(features: NDArray, reference: NDArray) -> None:
    """Refuse what are no two sets of vectors of one length.

    Raises:
        ValueError: If shapes disagree or a value is not finite.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features of {features.shape} and {reference.shape} must be (videos, dimensions) with equal dimensions."
        )
    if not (np.isfinite(features).all() and np.isfinite(reference).all()):
        raise ValueError("features hold NaN or infinite values: look at the videos they come from.")


def _root(covariance: NDArray, dimensions: int) -> NDArray[np.float64]:
    """R with R'R the covariance."""
    if covariance.shape != (dimensions, dimensions) or not np.allclose(covariance, covariance.T):
        raise ValueError(f"a covariance of {covariance.shape} must be symmetric and ({dimensions}, {dimensions}).")
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    if values[0] < -1e-6 * max(abs(values[-1]), 1e-300):
        raise ValueError(f"a covariance has the eigenvalue {values[0]:g}: it must have none below 0.")
    return np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T


def _distance(mean: NDArray, root: NDArray, other_mean: NDArray, other_root: NDArray) -> float:
    # trace((S1 S2)^(1/2)) is the sum of the singular values of R1 R2': no root of rounding errors is taken.
    cross = np.linalg.svd(root @ other_root.T, compute_uv=False).sum()
    return max(0.0, float(((mean - other_mean) ** 2).sum() + (root**2).sum() + (other_root**2).sum() - 2 * cross))


NUM_NEIGHBOURS = 5
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class _Prdc:
    """How two sets of vectors cover each other.

    Attributes:
        precision: Share of the videos that lie in the ball of some reference video: how real they look.
        recall: Share of the reference videos that lie in the ball of some video: how varied they are.
        density: Mean number of reference balls a video lies in, over k; may exceed 1.
        coverage: Share of the reference balls that hold a video.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def _prdc(features: NDArray, reference: NDArray, *, num_neighbours: int = NUM_NEIGHBOURS) -> _Prdc:
    """Measure a set against another; a vector's ball reaches to its k-th neighbour in its own set, which is outside.

    Args:
        features: (N, D).
        reference: (M, D).
        num_neighbours: k.

    Returns:
        The four numbers.

    Raises:
        ValueError: If shapes disagree, a value is not finite, or a set has no k neighbours.

    Source: Kynkaanniemi et al., arXiv:1904.06991; Naeem et al., arXiv:2002.09797.
    """
    features, reference = (np.asarray(x, dtype=np.float64) for x in (features, reference))
    _check_features(features, reference)
    smallest = min(len(features), len(reference))
    if not 1 <= num_neighbours < smallest:
        raise ValueError(
            f"num_neighbours={num_neighbours} in a set of {smallest} videos: use 1 to {smallest - 1}, or more videos."
        )
    own, other = torch.from_numpy(features), torch.from_numpy(reference)
    own_radii, other_radii = _radii(own, num_neighbours), _radii(other, num_neighbours)
    num_balls = torch.zeros(len(own))
    recalled, covered = torch.zeros(len(other), dtype=torch.bool), torch.zeros(len(other), dtype=torch.bool)
    for start in range(0, len(other), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        distances = _distances(other[part], own)
        inside = distances < other_radii[part, None]
        num_balls += inside.sum(dim=0)
        recalled[part] = (distances < own_radii[None]).any(dim=1)
        covered[part] = inside.any(dim=1)
    return _Prdc(
        precision=float((num_balls > 0).double().mean()),
        recall=float(recalled.double().mean()),
        density=float(num_balls.double().mean()) / num_neighbours,
        coverage=float(covered.double().mean()),
    )


def _radii(points: torch.Tensor, num_neighbours: int) -> torch.Tensor:
    """Distance of each point to its k-th neighbour, itself not counted."""
    rows = [
        _distances(part, points).kthvalue(num_neighbours + 1, dim=1).values for part in points.split(_ROWS_AT_ONCE)
    ]
    return torch.cat(rows)


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # From differences, not from products: equal vectors are at distance 0 and not at a root of rounding errors.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


NUM_BINS = 50
FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class _Spectrum:
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


def _spectrum(features: NDArray) -> _Spectrum:
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
    return _Spectrum(mean=amplitudes[0], skewness=third / (np.sqrt(share) * np.sqrt(second)))


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
    own, other = ([_spectrum(video) for video in group] for group in (videos, reference))
    spatial = _prdc(np.stack([s.mean for s in own]), np.stack([s.mean for s in other]), num_neighbours=num_neighbours)
    temporal = _histogram_agreement(np.stack([s.skewness for s in own]), np.stack([s.skewness for s in other]))
    return Stream(temporal=temporal, fidelity=spatial.precision, diversity=spatial.recall)


def _histogram_agreement(values: NDArray, reference: NDArray) -> float:
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


NUM_FRAMES = 32
"""Of each video, evenly spaced: as many per video for all, and even, which STREAM needs."""
_FRAMES_AT_ONCE = 8


class FeatureCollector:
    """A metric without numbers of its own: writes ``FOLDER/ID.npy``, (frames, dimensions) float32, for each video.

    Args:
        encoder: Of frames.
        transform: From frames (F, H, W, 3) uint8 to what the encoder takes.
        folder: Made if it is missing.
        num_frames: Per video, spread evenly over it.
    """

    specs: tuple[MetricSpec, ...] = ()

    def __init__(
        self,
        encoder: FrameEncoder,
        transform: Callable[[np.ndarray], torch.Tensor],
        folder: Path,
        *,
        num_frames: int = NUM_FRAMES,
    ) -> None:
        if num_frames < 4 or num_frames % 2:
            raise ValueError(f"num_frames={num_frames} features per video: use an even number, 4 or more.")
        self.encoder, self.transform, self.folder, self.num_frames = encoder, transform, folder, num_frames

    def start(self, video: VideoInfo) -> "FeatureMeter":
        """A meter for one video.

        Raises:
            ValueError: If the video has fewer frames than are kept.
        """
        if video.num_frames < self.num_frames:
            raise ValueError(
                f"video {video.id!r} has {video.num_frames} frames, and num_frames={self.num_frames} are to be kept: "
                "keep fewer."
            )
        return FeatureMeter(self, video)


class FeatureMeter:
    """Encodes the wanted frames of one video and writes them when it ends."""

    def __init__(self, collector: FeatureCollector, video: VideoInfo) -> None:
        self._collector, self._video = collector, video
        self._wanted = middle(collector.num_frames, video.num_frames)
        self._waiting: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._position = 0

    def push(self, frames: np.ndarray) -> None:
        """Take the next frames: (F, H, W, 3) uint8 RGB."""
        end = self._position + len(frames)
        taken = len(self._waiting) + sum(map(len, self._rows))
        for index in self._wanted[taken:]:
            if index >= end:
                break
            self._waiting.append(frames[index - self._position].copy())
            if len(self._waiting) == _FRAMES_AT_ONCE:
                self._encode()
        self._position = end

    def finish(self) -> Mapping[str, Score]:
        """Write the features; no scores."""
        self._encode()
        _write_features(self._collector.folder, self._video.id, np.concatenate(self._rows))
        return {}

    def _encode(self) -> None:
        if self._waiting:
            with torch.no_grad():
                encoded = self._collector.encoder.encode(self._collector.transform(np.stack(self._waiting)))
            self._rows.append(encoded.float().cpu().numpy())
            self._waiting.clear()


def _write_features(folder: Path, video_id: str, features: np.ndarray) -> Path:
    """Write one video's features, all of them or nothing: (frames, dimensions) float32."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{video_id}.npy"
    temporary = folder / f".{video_id}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            np.save(file, features.astype(np.float32), allow_pickle=False)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_features(folder: Path) -> dict[str, np.ndarray]:
    """Read what a collector wrote.

    Args:
        folder: Of ``ID.npy`` files.

    Returns:
        {id: (frames, dimensions) float32}, sorted by id; all of one shape.

    Raises:
        ValueError: If there are none, one cannot be read, or shapes differ.
    """
    features: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.npy")):
        try:
            features[path.stem] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the features {path}: {error}") from error
    if not features:
        raise ValueError(f"{folder} holds no features (*.npy): collect them first, with a FeatureCollector.")
    shapes = {array.shape for array in features.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ValueError(
            f"features in {folder} have shapes {sorted(shapes)}: all videos need (frames, dimensions), the same."
        )
    return features


_DESCRIPTIONS = {
    "precision": "Share of the videos within reach of a reference video.",
    "recall": "Share of the reference videos within reach of a video.",
    "density": "Mean number of reference neighbourhoods a video lies in, over k; may exceed 1.",
    "coverage": "Share of the reference neighbourhoods that hold a video.",
    "stream_T": "Agreement of the histograms of the features' temporal skewness with the reference's.",
    "stream_F": "Precision of the videos' mean spectra.",
    "stream_D": "Recall of the videos' mean spectra.",
}


@dataclass(frozen=True, kw_only=True)
class SetScores:
    """Measures of one set: ``{name: spec}`` and ``{name: score}``, the same names in the same order."""

    specs: Mapping[str, MetricSpec]
    scores: Mapping[str, Score]


def set_scores(
    features: Mapping[str, np.ndarray],
    reference_features: Mapping[str, np.ndarray],
    *,
    encoder: str,
    reference: str,
    weights_sha256: str | None = None,
    num_neighbours: int = NUM_NEIGHBOURS,
    allow_small: bool = False,
) -> SetScores:
    """Measure a set of videos by the features of their frames.

    Frechet distance, precision, recall, density and coverage are of each video's mean over frames.

    Args:
        features: {video: (frames, dimensions)}.
        reference_features: The same, of real videos or of another run, e.g. the first five seconds of the same model.
        encoder: Name of the network behind the features.
        reference: What the reference is, e.g. ``self_5s``.
        weights_sha256: Of the encoder.
        num_neighbours: k of precision, recall, density and coverage.
        allow_small: Give a Frechet distance even of fewer videos than dimensions; its details say so.

    Returns:
        All of them; one that cannot be computed has no value but the reason.

    Raises:
        ValueError: If one of the sets is empty.
    """
    if not features or not reference_features:
        raise ValueError(f"sets of {len(features)} and {len(reference_features)} videos: neither may be empty.")
    own, other = (np.stack([group[name] for name in sorted(group)]) for group in (features, reference_features))
    tag = f"[enc={encoder}][ref={reference}]"
    counts = {"num_videos": len(own), "num_reference": len(other), "num_dimensions": own.shape[-1]}
    small = {"is_small": True} if min(len(own), len(other)) < own.shape[-1] else {}

    def near() -> dict[str, float]:
        return vars(_prdc(own.mean(axis=1), other.mean(axis=1), num_neighbours=num_neighbours))

    def spectra() -> dict[str, float]:
        result = stream(own, other, num_neighbours=num_neighbours)
        return {"stream_T": result.temporal, "stream_F": result.fidelity, "stream_D": result.diversity}

    def distance() -> dict[str, float]:
        value = _frechet_of_features(own.mean(axis=1), other.mean(axis=1), allow_small=allow_small)
        return {"frechet": value}

    scores: dict[str, Score] = {}
    specs: dict[str, MetricSpec] = {}
    neighbours = {**counts, "num_neighbours": num_neighbours}
    for keys, compute, details in (
        (("frechet",), distance, {**counts, **small}),
        (("precision", "recall", "density", "coverage"), near, neighbours),
        (("stream_T", "stream_F", "stream_D"), spectra, neighbours),
    ):
        for key, score in _try(keys, compute, details).items():
            name = _frechet_name(encoder, reference) if key == "frechet" else f"set/{key}{tag}"
            scores[name], specs[name] = score, _spec(key, name, encoder, weights_sha256)
    return SetScores(specs=specs, scores=scores)


def _try(keys: tuple[str, ...], compute: Callable[[], Mapping[str, float]], details: Mapping) -> dict[str, Score]:
    try:
        values = compute()
    except ValueError as error:
        return {key: Score.none(str(error)) for key in keys}
    return {key: Score(value=float(values[key]), details=details) for key in keys}


def _spec(key: str, name: str, encoder: str, weights_sha256: str | None) -> MetricSpec:
    is_distance = key == "frechet"
    return MetricSpec(
        name=name,
        higher_is_better=not is_distance,
        range=(0.0, None if is_distance or key == "density" else 1.0),
        formula={"f": "arXiv:1706.08500", "s": "arXiv:2403.09669"}.get(key[0], "arXiv:2002.09797"),
        backbone=encoder,
        weights_sha256=weights_sha256,
        description=_DESCRIPTIONS.get(key, "Frechet distance of the videos' mean features from the reference's."),
    )
