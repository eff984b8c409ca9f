"""Frechet distance between two sets of features; FVD is this distance on the features of one particular network."""

import numpy as np
from numpy.typing import NDArray


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


def frechet_of_features(features: NDArray, reference: NDArray, *, allow_small: bool = False) -> float:
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
    check_features(features, reference)
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


def frechet_name(encoder: str, reference: str, *, is_standard_i3d: bool = False) -> str:
    """The metric's name: FVD only for the I3D network of the original, trained on Kinetics-400."""
    return f"set/fvd[ref={reference}]" if is_standard_i3d else f"set/frechet[enc={encoder}][ref={reference}]"


def check_features(features: NDArray, reference: NDArray) -> None:
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
