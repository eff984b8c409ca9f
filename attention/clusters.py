"""k-means over the tokens of every head."""

from typing import NamedTuple

import torch
from torch import Tensor

from longtake.attention.pooling import sum_by_group


class Clusters(NamedTuple):
    """Tokens by cluster.

    Attributes:
        labels: (heads, tokens), int64.
        centroids: (heads, clusters, head_dim), float32.
        sizes: (heads, clusters), int64; a cluster may be empty.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor


def kmeans(
    x: Tensor,
    num_clusters: int,
    *,
    num_iterations: int,
    centroids: Tensor | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> Clusters:
    """Group the tokens of every head by Euclidean distance (Lloyd's algorithm).

    Args:
        x: (tokens, heads, head_dim), any float dtype.
        num_clusters: How many; at most the tokens.
        num_iterations: Most rounds of assigning and averaging, 1 or more.
        centroids: (heads, clusters, head_dim) to begin with; None: tokens drawn by ``seed``, the same for all heads.
        seed: Of that draw.
        tolerance: It ends once no centroid moves by more than this.

    Returns:
        The clusters, with labels that belong to the centroids as they were before the last averaging.

    Raises:
        ValueError: If there are fewer tokens than clusters, or the centroids do not fit.
    """
    num_tokens, num_heads, head_dim = x.shape
    if not 1 <= num_clusters <= num_tokens or num_iterations < 1:
        raise ValueError(
            f"num_clusters={num_clusters} of {num_tokens} tokens in num_iterations={num_iterations}: "
            "use 1 to as many clusters as there are tokens, and at least one iteration."
        )
    tokens = x.float().transpose(0, 1)
    if centroids is None:
        drawn = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))[:num_clusters]
        centroids = tokens[:, drawn.to(x.device)]
    elif tuple(centroids.shape) != (num_heads, num_clusters, head_dim):
        raise ValueError(f"centroids are {tuple(centroids.shape)} but must be {(num_heads, num_clusters, head_dim)}.")
    results = [_kmeans(*pair, num_iterations, tolerance) for pair in zip(tokens, centroids, strict=True)]
    return Clusters(*(torch.stack(parts) for parts in zip(*results, strict=True)))


def _kmeans(tokens: Tensor, centroids: Tensor, num_iterations: int, tolerance: float) -> Clusters:
    """One head at a time, so that there is one table of distances."""
    for _ in range(num_iterations):
        # The squared distance without the token's own square, which is the same for all centroids.
        distances = torch.addmm(centroids.square().sum(1), tokens, centroids.T, alpha=-2)
        labels = distances.argmin(1)
        sizes = torch.bincount(labels, minlength=len(centroids))
        sums = sum_by_group(tokens, labels, len(centroids))
        # An empty cluster stays where it is.
        moved = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp(min=1), centroids)
        has_settled = bool((moved - centroids).abs().max() <= tolerance)
        centroids = moved
        if has_settled:
            break
    return Clusters(labels, centroids, sizes)
