"""Sparse VideoGen 2: tokens sorted by meaning, and of the clusters of keys those with most of the weight."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from longtake.attention.geometry import AttentionGeometry
from longtake.attention.plan import BlockPlan
from longtake.attention.policies.base import BlockPolicy, Memory, shared_heads, sum_by_group


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


def top_p_clusters(
    query_centroids: Tensor, key_centroids: Tensor, key_sizes: Tensor, *, top_p: float, min_share: float
) -> Tensor:
    """Choose for every cluster of queries the fewest clusters of keys whose weights exceed ``top_p``.

    Args:
        query_centroids: (heads, query clusters, head_dim).
        key_centroids: (heads, key clusters, head_dim).
        key_sizes: (heads, key clusters): a cluster weighs as much as its keys would if all were its centroid.
        top_p: 0 to 1; 1 takes all.
        min_share: At least this share of the clusters is taken.

    Returns:
        (heads, query clusters, key clusters), bool.
    """
    scores = query_centroids @ key_centroids.transpose(1, 2) / query_centroids.shape[-1] ** 0.5
    weights = (scores + key_sizes[:, None].to(scores).log()).softmax(-1)
    if top_p >= 1:
        return torch.ones_like(weights, dtype=torch.bool)
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    # The cluster that crosses the threshold is taken too: what counts is the weight before it.
    is_taken = ordered.cumsum(-1) - ordered <= top_p
    is_taken[..., : max(1, int(min_share * weights.shape[-1]))] = True
    return torch.zeros_like(is_taken).scatter_(-1, order, is_taken)


@dataclass(frozen=True, kw_only=True)
class Svg2(BlockPolicy):
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
        counts = (
            "num_query_clusters",
            "num_key_clusters",
            "min_cluster_tokens",
            "num_first_iterations",
            "num_iterations",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        for name in ("top_p", "min_key_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1.")

    @property
    def is_static(self) -> bool:
        """False: blocks are clusters of the tokens."""
        return False

    def make_plan(
        self,
        q: Tensor | None,
        k: Tensor | None,
        geometry: AttentionGeometry,
        *,
        v: Tensor | None = None,
        memory: Memory | None = None,
    ) -> BlockPlan | None:
        """Cluster, choose, and sort the tokens by cluster."""
        memory = {} if memory is None else memory
        queries = self._clusters(q[0], self.num_query_clusters, (self.name, geometry.layer, "q"), memory)
        keys = self._clusters(k[0], self.num_key_clusters, (self.name, geometry.layer, "k"), memory)
        # Key heads are clustered once, however many query heads share them.
        keys = Clusters(*(shared_heads(part[None], q.shape[2])[0] for part in keys))
        mask = top_p_clusters(
            queries.centroids, keys.centroids, keys.sizes, top_p=self.top_p, min_share=self.min_key_share
        )
        return BlockPlan.from_dense_block_mask(
            mask.cpu(),
            _edges(queries),
            _edges(keys),
            q_perm=queries.labels.argsort(dim=-1, stable=True).cpu(),
            k_perm=keys.labels.argsort(dim=-1, stable=True).cpu(),
        ).validate()

    def _clusters(self, x: Tensor, most: int, key: tuple[str, int, str], memory: Memory) -> Clusters:
        count = max(1, min(most, len(x) // self.min_cluster_tokens))
        last = memory.get(key)
        if last is not None and last.shape[1] != count:
            last = None
        num_iterations = self.num_first_iterations if last is None else self.num_iterations
        clusters = kmeans(x, count, num_iterations=num_iterations, centroids=last, seed=self.seed)
        memory[key] = clusters.centroids
        return clusters


def _edges(clusters: Clusters) -> Tensor:
    """(heads, clusters + 1), int32."""
    return torch.nn.functional.pad(clusters.sizes.cumsum(-1), (1, 0)).to("cpu", torch.int32)
