"""Precision, recall, density and coverage of a set of videos' features, by nearest neighbours."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from longtake.evaluation.sets.frechet import check_features

NUM_NEIGHBOURS = 5
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Prdc:
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


def prdc(features: NDArray, reference: NDArray, *, num_neighbours: int = NUM_NEIGHBOURS) -> Prdc:
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
    check_features(features, reference)
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
    return Prdc(
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
