"""Distances between two sets of videos: Frechet distance, precision and recall, density and coverage, STREAM."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from longtake.evaluation.backbones import Backbones, FrameEncoder
from longtake.evaluation.metric import MetricSpec, Score, VideoInfo
from longtake.evaluation.preprocessing import (
    clip_transform,
    dino_transform,
    dinov2_transform,
    dreamsim_transform,
    middle,
)
from longtake.evaluation.records import SCHEMA, write_json
from longtake.evaluation.running.plan import plan_videos, video_info
from longtake.evaluation.video import VideoSource, measure

SETS_FILE = "sets.json"
NUM_NEIGHBOURS = 5
NUM_FRAMES = 32  # frames kept of each video, evenly spaced: as many per video for all, and even, which STREAM needs
_NUM_BINS = 50
_FLOOR = 1e-6
_ROWS_AT_ONCE = 256
_FRAMES_AT_ONCE = 8
_TRANSFORMS: dict[str, Callable[[np.ndarray], torch.Tensor]] = {
    "dino": dino_transform,
    "clip": clip_transform,
    "dinov2": dinov2_transform,
    "dreamsim": dreamsim_transform,
}
"""Preprocessing of each role's encoder."""
_DESCRIPTIONS = {
    "frechet": "Frechet distance of the videos' mean features from the reference's.",
    "precision": "Share of the videos within reach of a reference video.",
    "recall": "Share of the reference videos within reach of a video.",
    "density": "Mean number of reference neighbourhoods a video lies in, over k; may exceed 1.",
    "coverage": "Share of the reference neighbourhoods that hold a video.",
    "stream_T": "Agreement of the histograms of the features' temporal skewness with the reference's.",
    "stream_F": "Precision of the videos' mean spectra.",
    "stream_D": "Recall of the videos' mean spectra.",
}


@dataclass(frozen=True, kw_only=True)
class _SetScores:
    """Measures of one set: ``{name: spec}`` and ``{name: score}``, the same names in the same order."""

    specs: Mapping[str, MetricSpec]
    scores: Mapping[str, Score]


@torch.inference_mode()
def measure_sets(
    run: Path, reference: Path, *, backbones: Backbones, role: str, num_frames: int, allow_small: bool = False
) -> _SetScores:
    """Measure a run's videos as a set against the videos of another folder, and write ``sets.json`` into its own."""
    if role not in _TRANSFORMS:
        raise ValueError(f"role {role!r} has no encoder of frames; known: {', '.join(_TRANSFORMS)}.")
    encoder = backbones.get(role)
    if encoder is None:
        raise ValueError(backbones.why_missing(role))
    features, others = (_features(folder, encoder, role, num_frames=num_frames) for folder in (run, reference))
    measured = set_scores(
        features,
        others,
        encoder=encoder.name,
        reference=reference.resolve().name,
        weights_sha256=encoder.weights_sha256,
        allow_small=allow_small,
    )
    values = {"schema": SCHEMA, "num_frames": num_frames}
    values |= {"specs": {name: asdict(spec) for name, spec in measured.specs.items()}}
    values |= {"scores": {name: asdict(score) for name, score in measured.scores.items()}}
    write_json(run / SETS_FILE, values)
    return measured


def _features(folder: Path, encoder: FrameEncoder, role: str, *, num_frames: int) -> dict[str, np.ndarray]:
    plans = plan_videos(folder, folder, mixed_rates=True)
    if len(plans) != 1:
        raise ValueError(f"{folder} holds {len(plans)} runs: give the folder of one")
    collector = FeatureCollector(encoder, _TRANSFORMS[role], num_frames=num_frames)
    for unit in plans[0].units:
        for line in unit.lines:
            source = VideoSource.open(unit.folder / line.file)
            measure(source, video_info(line, source), [collector])
    return collector.features


class FeatureCollector:
    """A metric without numbers of its own: keeps ``features``, {id: (frames, dimensions) float32} of each video.

    Args:
        encoder: Of frames.
        transform: From frames (F, H, W, 3) uint8 to what the encoder takes.
        num_frames: Per video, spread evenly over it; an even number, 4 or more.
    """

    specs: tuple[MetricSpec, ...] = ()

    def __init__(
        self,
        encoder: FrameEncoder,
        transform: Callable[[np.ndarray], torch.Tensor],
        *,
        num_frames: int = NUM_FRAMES,
    ) -> None:
        if num_frames < 4 or num_frames % 2:
            raise ValueError(f"num_frames={num_frames} features per video: use an even number, 4 or more.")
        self.encoder, self.transform, self.num_frames = encoder, transform, num_frames
        self.features: dict[str, np.ndarray] = {}

    def start(self, video: VideoInfo) -> "_FeatureMeter":
        if video.num_frames < self.num_frames:
            raise ValueError(
                f"video {video.id!r} has {video.num_frames} frames, and num_frames={self.num_frames} are to be kept: "
                "keep fewer."
            )
        return _FeatureMeter(self, video)


class _FeatureMeter:
    def __init__(self, collector: FeatureCollector, video: VideoInfo) -> None:
        self._collector, self._video = collector, video
        self._wanted = middle(collector.num_frames, video.num_frames)
        self._waiting: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._position = 0

    def push(self, frames: np.ndarray) -> None:
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
        self._encode()
        self._collector.features[self._video.id] = np.concatenate(self._rows)
        return {}

    def _encode(self) -> None:
        if self._waiting:
            with torch.no_grad():
                encoded = self._collector.encoder.encode(self._collector.transform(np.stack(self._waiting)))
            self._rows.append(encoded.float().cpu().numpy())
            self._waiting.clear()


def set_scores(
    features: Mapping[str, np.ndarray],
    reference_features: Mapping[str, np.ndarray],
    *,
    encoder: str,
    reference: str,
    weights_sha256: str | None = None,
    num_neighbours: int = NUM_NEIGHBOURS,
    allow_small: bool = False,
) -> _SetScores:
    """Measure a set of videos by the features of their frames; what cannot be computed has a reason and no value.

    Frechet distance, precision, recall, density and coverage are of each video's mean over frames.

    Args:
        features: {video: (frames, dimensions)}, as a :class:`FeatureCollector` keeps them.
        reference_features: The same, of real videos or of another run, e.g. the first five seconds of the same model.
        encoder: Name of the network behind the features.
        reference: Name of the reference, e.g. ``self_5s``.
        weights_sha256: Of the encoder.
        num_neighbours: k of precision, recall, density and coverage.
        allow_small: Give a Frechet distance even of fewer videos than dimensions; its details say so.
    """
    if not features or not reference_features:
        raise ValueError(f"sets of {len(features)} and {len(reference_features)} videos: neither may be empty.")
    own, other = (np.stack([group[name] for name in sorted(group)]) for group in (features, reference_features))
    means = own.mean(axis=1), other.mean(axis=1)
    counts = {"num_videos": len(own), "num_reference": len(other), "num_dimensions": own.shape[-1]}
    small = {"is_small": True} if min(len(own), len(other)) < own.shape[-1] else {}
    neighbours = {**counts, "num_neighbours": num_neighbours}
    scores: dict[str, Score] = {}
    specs: dict[str, MetricSpec] = {}
    for keys, compute, details in (
        (("frechet",), lambda: {"frechet": _frechet(*means, allow_small=allow_small)}, {**counts, **small}),
        (
            ("precision", "recall", "density", "coverage"),
            lambda: _prdc(*means, num_neighbours=num_neighbours),
            neighbours,
        ),
        (("stream_T", "stream_F", "stream_D"), lambda: _stream(own, other, num_neighbours=num_neighbours), neighbours),
    ):
        for key, score in _try(keys, compute, details).items():
            name = f"set/{key}[enc={encoder}][ref={reference}]"
            scores[name], specs[name] = score, _spec(key, name, encoder, weights_sha256)
    return _SetScores(specs=specs, scores=scores)


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
        description=_DESCRIPTIONS[key],
    )


def _frechet(features: NDArray, reference: NDArray, *, allow_small: bool = False) -> float:
    """Squared 2-Wasserstein distance between Gaussians fitted to (N, D) and (M, D) vectors, not below 0, in float64.

    Source: Dowson and Landau, J. Multivariate Analysis 12 (1982).
    """
    features, reference = _checked(features, reference)
    smallest, dimensions = min(len(features), len(reference)), features.shape[1]
    if smallest < 2 or (smallest < dimensions and not allow_small):
        raise ValueError(
            f"sets of {len(features)} and {len(reference)} videos are too small for {dimensions} dimensions: "
            f"use {max(2, dimensions)} or more, or allow_small=True and compare within one report only."
        )
    means = [x.mean(axis=0) for x in (features, reference)]
    # With X - mean = Q R, the covariance is R'R / (N - 1): its root without squaring, exact even where it is singular.
    root, other_root = (
        np.linalg.qr(x - m, mode="r") / np.sqrt(len(x) - 1) for x, m in zip((features, reference), means, strict=True)
    )
    # trace((S1 S2)^(1/2)) is the sum of the singular values of R1 R2': no root of rounding errors is taken.
    cross = np.linalg.svd(root @ other_root.T, compute_uv=False).sum()
    return max(0.0, float(((means[0] - means[1]) ** 2).sum() + (root**2).sum() + (other_root**2).sum() - 2 * cross))


def _checked(features: NDArray, reference: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    features, reference = (np.asarray(x, dtype=np.float64) for x in (features, reference))
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features of {features.shape} and {reference.shape} must be (videos, dimensions) with equal dimensions."
        )
    if not (np.isfinite(features).all() and np.isfinite(reference).all()):
        raise ValueError("features hold NaN or infinite values: look at the videos they come from.")
    return features, reference


def _prdc(features: NDArray, reference: NDArray, *, num_neighbours: int = NUM_NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage of (N, D) vectors against (M, D) others.

    A vector's ball reaches to its k-th neighbour in its own set, which is outside.

    Source: Kynkaanniemi et al., arXiv:1904.06991; Naeem et al., arXiv:2002.09797.
    """
    features, reference = _checked(features, reference)
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
    return {
        "precision": float((num_balls > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(num_balls.double().mean()) / num_neighbours,
        "coverage": float(covered.double().mean()),
    }


def _radii(points: torch.Tensor, num_neighbours: int) -> torch.Tensor:
    """Distance of each point to its k-th neighbour, itself not counted."""
    parts = points.split(_ROWS_AT_ONCE)
    return torch.cat([_distances(part, points).kthvalue(num_neighbours + 1, dim=1).values for part in parts])


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # From differences, not from products: equal vectors are at distance 0 and not at a root of rounding errors.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _stream(videos: NDArray, reference: NDArray, *, num_neighbours: int = NUM_NEIGHBOURS) -> dict[str, float]:
    """STREAM's temporal agreement, fidelity and diversity of (N, T, D) features of frames; each 0..1, more is better.

    Source: STREAM, arXiv:2403.09669.
    """
    if videos.ndim != 3 or reference.ndim != 3 or videos.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"features of {videos.shape} and {reference.shape} must be (videos, frames, dimensions) with equal "
            "frames and dimensions."
        )
    own, other = (list(zip(*map(_spectrum, group), strict=True)) for group in (videos, reference))
    spatial = _prdc(np.stack(own[0]), np.stack(other[0]), num_neighbours=num_neighbours)
    temporal = _histogram_agreement(np.stack(own[1]), np.stack(other[1]))
    return {"stream_T": temporal, "stream_F": spatial["precision"], "stream_D": spatial["recall"]}


def _spectrum(features: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and skewness per feature of one video's (T, D) spectrum, T even and 4 or more.

    The mean is twice the amplitude of frequency 0: what the frames look like on average. The skewness is that of a
    power law fitted to the other frequencies: how they change.
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
    y = np.log(amplitudes[1:] + _FLOOR)
    exponent = logs @ y / (logs @ logs)
    factor = np.exp(y.mean(axis=0) - exponent * np.log(frequencies).mean())
    powers = frequencies[:, None] ** exponent  # (T/2, D)
    share = factor / (factor * powers).sum(axis=0)
    third = (frequencies[:, None] ** 3 * powers).sum(axis=0)
    second = (frequencies[:, None] ** 2 * powers).sum(axis=0)
    return amplitudes[0], third / (np.sqrt(share) * np.sqrt(second))


def _histogram_agreement(values: NDArray, reference: NDArray) -> float:
    """Mean over columns of the squared correlation between two histograms of 50 bins over their common range; 0..1."""
    agreements = []
    for own, other in zip(values.T, reference.T, strict=True):
        low, high = min(own.min(), other.min()), max(own.max(), other.max())
        limits = (int(low) - 1, int(high) + 1)  # towards zero, as the published code has it
        counts = [np.histogram(x, bins=_NUM_BINS, range=limits)[0] / len(x) for x in (own, other)]
        own_part, other_part = (c - c.mean() for c in counts)
        agreements.append((own_part @ other_part) ** 2 / ((own_part @ own_part) * (other_part @ other_part)))
    return float(np.mean(agreements))
