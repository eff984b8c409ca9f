"""All measures of a set of videos against another, under names that say which features and which reference."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score
from longtake.evaluation.sets.frechet import frechet_name, frechet_of_features
from longtake.evaluation.sets.prdc import NUM_NEIGHBOURS, prdc
from longtake.evaluation.sets.stream import stream

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
        return vars(prdc(own.mean(axis=1), other.mean(axis=1), num_neighbours=num_neighbours))

    def spectra() -> dict[str, float]:
        result = stream(own, other, num_neighbours=num_neighbours)
        return {"stream_T": result.temporal, "stream_F": result.fidelity, "stream_D": result.diversity}

    def distance() -> dict[str, float]:
        value = frechet_of_features(own.mean(axis=1), other.mean(axis=1), allow_small=allow_small)
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
            name = frechet_name(encoder, reference) if key == "frechet" else f"set/{key}{tag}"
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
