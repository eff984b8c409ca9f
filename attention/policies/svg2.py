"""Sparse VideoGen 2: tokens clustered by k-means, and of the clusters of keys those with most of the weight."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from longtake.attention.geometry import AttentionGeometry
from longtake.attention.plan import BlockPlan, edges_of
from longtake.attention.policies.base import Memory, TokenPolicy, Tokens, shared_heads, sum_by_group

_SETTLED = 1e-4  # farthest that a centroid still moves


@dataclass(frozen=True, kw_only=True)
class Svg2(TokenPolicy):
    """k-means of queries and of keys, blocks of one cluster each, top-p over their centroids.

    Clusters have any size, so blocks do, and they differ by head. With a ``memory``, every call begins with the
    centroids of the last one of its layer. It looks at tokens only, so it is the same in the cached form.
    """

    name: ClassVar[str] = "svg2"
    source: ClassVar[str] = "Sparse VideoGen2, arXiv:2505.18875"

    num_query_clusters: int = 300  # of 75,600 tokens; fewer tokens have fewer, see min_cluster_tokens
    num_key_clusters: int = 1000
    min_cluster_tokens: int = 16  # no more clusters than leave this many tokens to each on average
    top_p: float = 0.9  # share of the weight that the clusters read have
    min_key_share: float = 0.1  # share of the key clusters that is read in any case
    num_first_iterations: int = 50  # of k-means, from tokens drawn at random
    num_iterations: int = 2  # of k-means, from the centroids of the call before
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least(1, "num_query_clusters", "num_key_clusters", "min_cluster_tokens")
        self._check_least(1, "num_first_iterations", "num_iterations")
        for name in ("top_p", "min_key_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1.")

    def token_plan(self, tokens: Tokens, geometry: AttentionGeometry, memory: Memory) -> BlockPlan:
        queries = self._clusters(tokens.q, self.num_query_clusters, (self.name, geometry.layer, "q"), memory)
        keys = self._clusters(tokens.k, self.num_key_clusters, (self.name, geometry.layer, "k"), memory)
        # Key heads are clustered once, however many query heads share them.
        keys = _Clusters(*(shared_heads(part[None], tokens.q.shape[1])[0] for part in keys))
        return BlockPlan.from_dense_block_mask(
            self._top_p(queries.centroids, keys).cpu(),
            edges_of(queries.sizes).cpu(),
            edges_of(keys.sizes).cpu(),
            q_perm=queries.labels.argsort(dim=-1, stable=True).cpu(),
            k_perm=keys.labels.argsort(dim=-1, stable=True).cpu(),
        )

    def _clusters(self, x: Tensor, most: int, key: tuple[str, int, str], memory: Memory) -> "_Clusters":
        count = max(1, min(most, len(x) // self.min_cluster_tokens))
        last = memory.get(key)
        if last is not None and last.shape[1] != count:
            last = None
        num_iterations = self.num_first_iterations if last is None else self.num_iterations
        clusters = _kmeans(x, count, num_iterations=num_iterations, centroids=last, seed=self.seed)
        memory[key] = clusters.centroids
        return clusters

    def _top_p(self, query_centroids: Tensor, keys: "_Clusters") -> Tensor:
        """(heads, query clusters, key clusters), bool: for each cluster of queries the fewest that exceed top_p.

        A cluster of keys weighs as much as its keys would if all were its centroid.
        """
        scores = query_centroids @ keys.centroids.transpose(1, 2) / query_centroids.shape[-1] ** 0.5
        weights = (scores + keys.sizes[:, None].to(scores).log()).softmax(-1)
        if self.top_p >= 1:
            return torch.ones_like(weights, dtype=torch.bool)
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        # The cluster that crosses the threshold is taken too: what counts is the weight before it.
        is_taken = ordered.cumsum(-1) - ordered <= self.top_p
        is_taken[..., : max(1, int(self.min_key_share * weights.shape[-1]))] = True
        return torch.zeros_like(is_taken).scatter_(-1, order, is_taken)


class _Clusters(NamedTuple):
    labels: Tensor  # (heads, tokens), int64
    centroids: Tensor  # (heads, clusters, head_dim), float32
    sizes: Tensor  # (heads, clusters), int64; a cluster may be empty


def _kmeans(
    x: Tensor, num_clusters: int, *, num_iterations: int, centroids: Tensor | None = None, seed: int = 0
) -> _Clusters:
    """Group (tokens, heads, head_dim) by Euclidean distance, head by head (Lloyd's algorithm).

    It begins with ``centroids``, or with tokens drawn by ``seed``, the same for all heads, and ends once no centroid
    moves any more. Labels belong to the centroids as they were before the last averaging.
    """
    tokens = x.float().transpose(0, 1)
    if centroids is None:
        drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:num_clusters]
        centroids = tokens[:, drawn.to(x.device)]
    # One head at a time, so that there is one table of distances.
    results = [_kmeans_of_head(*pair, num_iterations) for pair in zip(tokens, centroids, strict=True)]
    return _Clusters(*(torch.stack(parts) for parts in zip(*results, strict=True)))


def _kmeans_of_head(tokens: Tensor, centroids: Tensor, num_iterations: int) -> _Clusters:
    labels = sizes = torch.empty(0)
    for _ in range(num_iterations):
        # The squared distance without the token's own square, which is the same for all centroids.
        distances = torch.addmm(centroids.square().sum(1), tokens, centroids.T, alpha=-2)
        labels = distances.argmin(1)
        sizes = torch.bincount(labels, minlength=len(centroids))
        sums = sum_by_group(tokens, labels, len(centroids))
        # An empty cluster stays where it is.
        moved = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp(min=1), centroids)
        has_settled = bool((moved - centroids).abs().max() <= _SETTLED)
        centroids = moved
        if has_settled:
            break
    return _Clusters(labels, centroids, sizes)
