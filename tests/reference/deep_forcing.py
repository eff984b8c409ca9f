"""Deep Forcing as its release does it, slowly: keys are rotated when stored, and the sink is turned further in place.

Everything in float64, one layer, one video. Frames go in pass by pass, as the network would call; the first pass of a
block makes room.
"""

import torch

from longtake.rope import axis_frequencies, token_phases


class DeepForcingReference:
    """Cached tokens of one layer and one video; all tensors are (tokens, heads, head_dim)."""

    def __init__(self, *, window, sinks, budget, recent, grid, head_dim, max_reuse=7, compress=True, fusion="sum"):
        self.window, self.sinks, self.budget, self.recent = window, sinks, budget, recent
        self.grid, self.size = grid, grid[0] * grid[1]
        self.frequencies = axis_frequencies(head_dim)
        self.max_reuse, self.compress, self.fusion = max_reuse, compress, fusion
        self.keys, self.values, self.uses, self.frames = [], [], [], []  # one entry per cached token
        self.queries = []  # of the last frames of all passes
        self.end, self.sink_start, self.kept = 0, None, []

    def turned(self, x, frame, row, column):
        phases = token_phases(torch.tensor([[frame, row, column]], dtype=torch.float64), frequencies=self.frequencies)
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * phases[0].to(torch.complex128)).flatten(-2)

    def at_own_place(self, x, start):
        places = [(start + i // self.size, i % self.size // self.grid[1], i % self.grid[1]) for i in range(len(x))]
        return [self.turned(token, *place) for token, place in zip(x, places, strict=True)]

    def score(self, key):
        products = [(query * key).sum() for query in self.queries[-self.recent * self.size :]]
        return torch.stack(products).sum() if self.fusion == "sum" else torch.stack(products).max()

    def step(self, start, q, k, v):
        """One pass over the frames from ``start`` on; its attention's output."""
        new_keys, new_queries = self.at_own_place(k, start), self.at_own_place(q, start)
        count = len(k) // self.size
        self.queries = (self.queries + new_queries)[-self.recent * self.size :]
        cells = [start + i // self.size for i in range(len(k))]
        if start + count > self.end:
            is_full = len(self.keys) + len(k) > self.window * self.size
            self.keys, self.values = self.keys + new_keys, self.values + list(v.double())
            self.uses, self.frames = self.uses + [0] * len(k), self.frames + cells
            if is_full:
                self.make_room(start)
            self.end = start + count
        else:
            self.keys[-len(k) :], self.values[-len(k) :] = new_keys, list(v.double())
        keys, values = torch.stack(self.keys), torch.stack(self.values)
        weights = torch.einsum("qhd,khd->hqk", torch.stack(new_queries), keys) / keys.shape[-1] ** 0.5
        return torch.einsum("hqk,khd->qhd", weights.softmax(-1), values)

    def make_room(self, start):
        """Evict or compress, and turn the sink."""
        total, first = len(self.keys), self.sinks * self.size
        if not self.compress:
            stay = [*range(first), *range(total - (self.window - self.sinks) * self.size, total)]
            left, moved = self.window, 0
        else:
            last = total - self.recent * self.size
            allowed = [i for i in range(first, last) if not self.max_reuse or self.uses[i] < self.max_reuse]
            best = sorted(allowed, key=lambda i: -self.score(self.keys[i]).item())
            chosen = sorted(best[: max(self.budget - self.sinks - self.recent, 0) * self.size])
            for i in chosen:
                self.uses[i] += 1
            self.kept = [(self.frames[i], self.uses[i]) for i in chosen]
            stay = [*range(first), *chosen, *range(last, total)]
            left, moved = self.budget, self.window - self.budget
        self.keys, self.values, self.uses, self.frames = (
            [entries[i] for i in stay] for entries in (self.keys, self.values, self.uses, self.frames)
        )
        wanted = start - left
        delta = moved if self.sink_start is None else wanted - self.sink_start
        self.keys[:first] = [self.turned(key, delta, 0, 0) for key in self.keys[:first]]
        self.sink_start = wanted
