"""Forcing-KV slowly: everything is kept, and every head attends to the list of tokens that it is said to read."""

import torch

from longtake.rope import axis_frequencies, rotate


class ForcingKVReference:
    """One layer and one video; keys and values are lists of (tokens of a frame, heads, head_dim)."""

    def __init__(self, static, *, is_split, grid, sinks=1, recent=1, kept=1, segments=6):
        self.static, self.is_split, self.grid, self.size = static, is_split, grid, grid[0] * grid[1]
        self.sinks, self.recent, self.kept, self.segments = sinks, recent, kept, segments
        self.keys, self.values, self.chosen = [], [], []

    def rotated(self, x, numbers):
        cells = [(n // self.size, n % self.size // self.grid[1], n % self.size % self.grid[1]) for n in numbers]
        coordinates = torch.tensor(cells, dtype=torch.float64)
        return rotate(x[None].float(), coordinates, frequencies=axis_frequencies(x.shape[-1]))[0].double()

    def read_by(self, head, start):
        """Numbers of the stored tokens that a head reads in the block at ``start``."""
        frames = {*range(min(self.sinks, start)), *range(max(start - self.recent, 0), start)}
        numbers = [f * self.size + i for f in sorted(frames) for i in range(self.size)]
        return numbers + (self.chosen if self.is_split and head not in self.static else [])

    def attend(self, start, q, k, v):
        own = [start * self.size + i for i in range(len(q))]
        all_keys, all_values = torch.cat([*self.keys, k]), torch.cat([*self.values, v])
        out = torch.zeros(q.shape, dtype=torch.float64)
        for head in range(q.shape[1]):
            numbers = self.read_by(head, start) + own
            keys = self.rotated(all_keys[numbers][:, head : head + 1], numbers)
            queries = self.rotated(q[:, head : head + 1], own)
            weights = torch.einsum("qhd,khd->qk", queries, keys) / q.shape[-1] ** 0.5
            out[:, head] = weights.softmax(-1) @ all_values[numbers][:, head].double()
        return out

    def commit(self, start, k, v, leader=None):
        """Store a block and choose segments, or take what the ``leader`` has chosen."""
        self.keys += list(k.split(self.size))
        self.values += list(v.split(self.size))
        end = len(self.keys)
        if leader is not None:
            self.chosen = leader.chosen
            return
        older = range(max(start - self.recent, self.sinks), end - self.recent)
        heads = [head for head in range(k.shape[1]) if head not in self.static]
        length, found = self.size // self.segments, []
        for frame in older:
            for segment in range(self.segments):
                tokens = range(segment * length, (segment + 1) * length)
                now, later = (
                    torch.stack([self.keys[f][t, heads].flatten() for t in tokens]) for f in (frame, frame + 1)
                )
                likeness = torch.nn.functional.cosine_similarity(now, later, dim=-1).mean().item()
                found.append((likeness, [frame * self.size + t for t in tokens]))
        number = min(self.kept, len(older)) * self.segments
        if number:
            self.chosen = sorted(n for _, numbers in sorted(found)[:number] for n in numbers)
