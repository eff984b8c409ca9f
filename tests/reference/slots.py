"""Slot caches as the releases of LongLive, Infinity-RoPE and Anchor Forcing keep them, slowly: one layer, float64.

A slot holds one frame's un-rotated keys and values. Every pass writes its slots before it attends, also the noisy
ones; a pass that goes beyond what has been seen makes room first. Positions are counters of slots or of frames.
"""

import torch

from longtake.rope import axis_frequencies, token_phases


class Slots:
    """Sink and window by slot arithmetic; ``by_slot``: positions are slot indices, not frame indices."""

    protects = True  # passes that run again leave the sinks as they are, even where these are still being filled

    def __init__(self, *, window, sinks, grid, head_dim, by_slot):
        self.window, self.sinks, self.grid, self.by_slot = window, sinks, grid, by_slot
        self.size = grid[0] * grid[1]
        self.frequencies = axis_frequencies(head_dim)
        self.slots = []  # (frame, keys, values), each (batch, size, heads, head_dim)
        self.end = 0

    def turned(self, x, positions):
        """(batch, frames * size, heads, head_dim) turned to a temporal position per frame, in float64."""
        rows, columns = torch.arange(self.grid[0]), torch.arange(self.grid[1])
        cells = torch.cartesian_prod(torch.tensor(positions, dtype=torch.float64), rows.double(), columns.double())
        phases = token_phases(cells.reshape(-1, 3), frequencies=self.frequencies).to(torch.complex128)
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * phases[:, None]).flatten(-2)

    def attend(self, q, query_positions, read, key_positions):
        queries = self.turned(q, query_positions)
        keys = self.turned(torch.cat([k for _, k, _ in read], dim=1), key_positions)
        values = torch.cat([v for _, _, v in read], dim=1).double()
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)

    def write(self, start, k, v, *, over_sinks=False):
        new = list(zip(*(x.split(self.size, dim=1) for x in (k, v)), strict=True))
        new = [(start + i, *kv) for i, kv in enumerate(new)]
        count = len(new)
        if start + count > self.end:
            evicted = max(0, len(self.slots) + count - self.window)
            self.slots = self.slots[: self.sinks] + self.slots[self.sinks + evicted :] + new
            self.end = start + count
        else:
            again = self.protects and start > 0 and not over_sinks
            first = len(self.slots) - count
            for i, entry in enumerate(new, first):
                if i >= self.sinks or not again:
                    self.slots[i] = entry
        return count

    def step(self, start, q, k, v, *, over_sinks=False):
        """One pass over the frames from ``start`` on; its attention's output."""
        count = self.write(start, k, v, over_sinks=over_sinks)
        places = [*range(len(self.slots))]
        if over_sinks or start == 0:
            seen = places[-self.window :]
        else:
            seen = places[: self.sinks] + places[self.sinks :][-(self.window - self.sinks) :]
        own = places[-count:]
        where = (lambda i: i) if self.by_slot else (lambda i: self.slots[i][0])
        queries = own if self.by_slot else [*range(start, start + count)]
        return self.attend(q, queries, [self.slots[i] for i in seen], [where(i) for i in seen])


class CutSlots(Slots):
    """Infinity-RoPE: slot positions, a flush, and a block that a cut moves away."""

    protects, cut = False, False

    def flush(self, num_last=2):
        self.slots = self.slots[: self.sinks] + self.slots[self.sinks :][-num_last:]

    def step(self, start, q, k, v):
        count = self.write(start, k, v)
        positions = [float(i) for i in range(len(self.slots))]
        if self.cut:
            positions[-count:] = [45.0 + i for i in range(count)]
        return self.attend(q, positions[-count:], self.slots, positions)


class Regions(Slots):
    """Anchor Forcing with blocks that the window is a multiple of; the junction's condition is put right."""

    switch, junction, earlier = None, None, None

    def keep_junction(self, start, k, v):
        """Call with the committed block after a change of prompt."""
        self.earlier = (self.switch, self.junction)
        self.switch = start
        parts = zip(*(x.split(self.size, dim=1) for x in (k, v)), strict=True)
        self.junction = [(start + i, *kv) for i, kv in enumerate(parts)]

    def step(self, start, q, k, v, *, now=None):
        """``now`` is the first frame of the next block, in a re-cache."""
        count = self.write(start, k, v)
        query = min(21 - count, start)
        local = [s for s in self.slots[self.sinks :]][-(self.window - self.sinks) :]
        local_start = max(query - (self.window - self.sinks) + count, self.sinks)
        read, positions = self.slots[: self.sinks], [*range(len(self.slots[: self.sinks]))]
        for switch, junction in ((self.switch, self.junction), self.earlier or (None, None)):
            if switch is not None and switch + self.window - self.sinks <= (start if now is None else now):
                read, positions = read + junction, positions + [21 - self.window - 3 + i for i in range(len(junction))]
                break
        read, positions = read + local, positions + [local_start + i for i in range(len(local))]
        return self.attend(q, [query + i for i in range(count)], read, positions)
