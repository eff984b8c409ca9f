"""The bank of a pack: small versions of blocks in equal places, and how a reader chooses among them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longtake.cache.base import Geometry, Number
from longtake.cache.pack_partitions import hand_over
from longtake.cache.storage import Stored, take_tokens

MIN_SCORED_QUERIES = 32
SCORED_QUERIES_IN = 8  # one query in so many is scored by softmax mass; PackForcing-Unofficial's share


@dataclass(frozen=True)
class PickedTokens:
    """Some tokens of others, a different choice for each sample, in the memory that reads them."""

    source: Stored
    index: Tensor
    device: torch.device

    @property
    def num_tokens(self) -> int:
        """How many, per sample."""
        return self.index.shape[-1]

    @property
    def keys(self) -> Tensor:
        """(batch, tokens, heads, head_dim), un-rotated."""
        return self._pick(self.source.keys)

    @property
    def values(self) -> Tensor:
        """(batch, tokens, heads, head_dim)."""
        return self._pick(self.source.values)

    def _pick(self, tensor: Tensor) -> Tensor:
        return take_tokens(tensor, self.index.to(tensor.device)).to(self.device, non_blocking=True)


class Bank:
    """Un-rotated keys and values of blocks of ``block_tokens``, first in first out, and the sums of their keys.

    Args:
        geometry: Shapes of the rollout.
        num_places: Blocks to make room for.
        block_tokens: Tokens of a block, per sample.
        on_host: Keep them in host memory, and bring what is chosen to the device once per block. Their key sums
            stay on the device.
    """

    def __init__(self, geometry: Geometry, *, num_places: int, block_tokens: int, on_host: bool = False) -> None:
        self.geometry, self.num_places, self.block_tokens = geometry, num_places, block_tokens
        device = torch.device("cpu") if on_host and geometry.device.type != "meta" else geometry.device
        self.buffer = geometry.storage.buffer(replace(geometry, device=device), num_places * block_tokens)
        self.places: dict[int, int] = {}
        self._key_sums: dict[int, Tensor] = {}

    def hand_over(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Give places to blocks, named by their first frame."""
        self.places = hand_over(self.places, before, after, self.num_places)

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Store a block.

        Raises:
            ValueError: If it has not as many tokens as a place.
        """
        if k.shape[1] != self.block_tokens:
            raise ValueError(
                f"a compressed block has {k.shape[1]} tokens, its place {self.block_tokens}: the pixels were not "
                "pooled as the job asked."
            )
        place = self.places[start]
        self.buffer.write(layer, place * self.block_tokens, k, v)
        self._sums(layer)[:, place] = k.float().sum(1)

    def read(self, layer: int, starts: Sequence[int]) -> list[tuple[list[int], Stored]]:
        """Tokens of known blocks in order, neighbours joined: (first frames, tokens) each."""
        runs: list[list[int]] = []
        for start in starts:
            if runs and self.places[start] == self.places[runs[-1][-1]] + 1:
                runs[-1].append(start)
            else:
                runs.append([start])
        size, here = self.block_tokens, self.geometry.device
        found = []
        for run in runs:
            first = self.places[run[0]]
            stored = self.buffer.read(layer, first * size, (first + len(run)) * size)
            if self.buffer.geometry.device != here:
                stored = PickedTokens(stored, torch.arange(len(run) * size), here)
            found.append((run, stored))
        return found

    def pick(self, layer: int, starts: Sequence[int], ranks: Tensor) -> Stored:
        """Tokens of the blocks ``starts[ranks]``, ranks (batch, chosen), in that order."""
        first = torch.tensor([self.places[s] * self.block_tokens for s in starts], device=ranks.device)[ranks]
        index = first[..., None] + torch.arange(self.block_tokens, device=ranks.device)
        stored = self.buffer.read(layer, 0, self.num_places * self.block_tokens)
        return PickedTokens(stored, index.flatten(1), self.geometry.device)

    def query_scores(self, layer: int, starts: Sequence[int], query_sum: Tensor, num_heads: int) -> Tensor:
        """Sum of the products of all queries with all keys of a block, by sums: exact, as products are bilinear.

        Args:
            layer: Self-attention layer.
            starts: Candidates.
            query_sum: (batch, heads, head_dim) float32, un-rotated.
            num_heads: First heads that are scored.

        Returns:
            (batch, candidates), mean over heads. PackForcing's eq. 11 averages over the batch as well; here a video
            does not depend on its neighbours.
        """
        places = torch.tensor([self.places[start] for start in starts], device=query_sum.device)
        keys = self._sums(layer).index_select(1, places)[:, :, :num_heads]
        scale = num_heads * math.sqrt(self.geometry.head_dim)
        return torch.einsum("bhd,bnhd->bn", query_sum[:, :num_heads], keys) / scale

    def softmax_masses(self, layer: int, starts: Sequence[int], q: Tensor, num_heads: int) -> Tensor:
        """Share of attention that each candidate would get if all candidates and nothing else were read.

        Args:
            layer: Self-attention layer.
            starts: Candidates.
            q: (batch, queries, heads, head_dim), un-rotated; an even eighth of them, 32 at least, is scored.
            num_heads: First heads that are scored.

        Returns:
            (batch, candidates), each sample's adding up to 1.
        """
        count = min(max(q.shape[1] // SCORED_QUERIES_IN, MIN_SCORED_QUERIES), q.shape[1])
        sampled = torch.arange(count, device=q.device) * q.shape[1] // count
        queries = q[:, sampled, :num_heads].float()
        ranks = torch.arange(len(starts), device=q.device).expand(q.shape[0], -1)
        keys = self.pick(layer, starts, ranks).keys[:, :, :num_heads].float()
        logits = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / math.sqrt(self.geometry.head_dim)
        return logits.softmax(dim=-1).unflatten(-1, (len(starts), -1)).sum(-1).mean(dim=(1, 2))

    def save(self, layer: int, starts: Sequence[int]) -> dict[str, Tensor]:
        """Blocks in order, as they are encoded, and the sums of their keys."""
        size = self.block_tokens
        parts = [self.buffer.save(layer, self.places[s] * size, (self.places[s] + 1) * size) for s in starts]
        saved = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
        sums = self._sums(layer)
        return saved | {"key_sums": torch.stack([sums[:, self.places[s]] for s in starts], dim=1)}

    def load(self, layer: int, saved: Mapping[str, Tensor | Number]) -> None:
        """Put saved blocks back, in the first places."""
        self.buffer.load(layer, 0, {name: value for name, value in saved.items() if name != "key_sums"})
        sums = saved["key_sums"].to(self.geometry.device)
        self._sums(layer)[:, : sums.shape[1]] = sums

    def _sums(self, layer: int) -> Tensor:
        if layer not in self._key_sums:
            g = self.geometry
            shape = (g.batch_size, self.num_places, g.num_heads, g.head_dim)
            self._key_sums[layer] = torch.zeros(shape, dtype=torch.float32, device=g.device)
        return self._key_sums[layer]
