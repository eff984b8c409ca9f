"""Policies that keep frames or averages of frames, slowly: one video, one layer, lists of frames and plain loops.

A frame is a pair (keys, values) of float64 (tokens, heads, channels). Every function takes the frames of a video and
its blocks as (first frame, count) and gives, for each block, what it reads: [(position, frame)], and the position of
its own first frame.
"""

from itertools import chain, islice, repeat

import torch
from torch.nn.functional import cosine_similarity


def _in_a_row(entries):
    return [(float(place), entry) for place, entry in enumerate(entries)], float(len(entries))


def _mixed(old, new, weight):
    return tuple((1 - weight) * a + weight * b for a, b in zip(old, new, strict=True))


def ema_sink(frames, blocks, *, window, sinks, alpha, uneven="average"):
    """Whatever leaves the window when a block starts is averaged into the sinks."""
    cache, numbers, read = [], [], []
    for start, count in blocks:
        over = max(len(cache) + count - window, 0)
        leaving = cache[sinks : sinks + over]
        for i, frame in enumerate(leaving):
            if over == sinks:
                cache[i] = _mixed(cache[i], frame, 1 - alpha)
            elif uneven == "average":
                place = numbers[sinks + i] % sinks
                cache[place] = _mixed(cache[place], frame, 1 - alpha)
            elif i < sinks:
                cache[i] = frame
        del cache[sinks : sinks + over], numbers[sinks : sinks + over]
        read.append(_in_a_row(list(cache)))
        cache += frames[start : start + count]
        numbers += range(start, start + count)
    return read


def memrope(frames, blocks, *, window, sinks, long_rate, short_rate):
    """Two averages of all that lies between the sinks and the last frames."""
    memories, gone, read = None, sinks, []
    for start, count in blocks:
        if start + count <= window:
            read.append(_in_a_row(frames[:start]))
            continue
        first = start - (window - sinks - 2 - count)
        leaving = frames[gone:first]
        mean = tuple(sum(part) / len(leaving) for part in zip(*leaving, strict=True))
        rates = (long_rate, short_rate)
        memories = [mean, mean] if memories is None else list(map(_mixed, memories, (mean, mean), rates))
        gone = first
        read.append(_in_a_row([*frames[:sinks], *memories, *frames[first:start]]))
    return read


def to_and_fro(num_first):
    """0, 1, ..., num_first - 1, num_first - 1, ..., 1, 0, 0, 1, ..."""
    forth = range(num_first)
    return chain.from_iterable(repeat([*forth, *reversed(forth)]))


def rolling_sink(frames, blocks, *, window):
    """The last block as it was; at every place before it, what a walk to and fro over the first frames shows."""
    read = []
    for start, count in blocks:
        num_first = window - count
        walk = list(islice(to_and_fro(num_first), start))
        places = range(max(0, start - num_first), start)
        shown = [place if place >= start - count else walk[place] for place in places]
        read.append(([(float(p), frames[f]) for p, f in zip(places, shown, strict=True)], float(start)))
    return read


def dilated_window(frames, blocks, *, window, dilated, dilation, absolute=False):
    """The last frames, and before them the last frames of the grid, looked up among all frames of the video."""
    read = []
    for start, count in blocks:
        chosen = list(range(start))
        if start + count > window:
            oldest = start - (window - count - dilated)
            grid = [f for f in range(0, oldest, dilation)]
            chosen = grid[len(grid) - min(dilated, len(grid)) :] + list(range(oldest, start))
        entries, own = _in_a_row([frames[f] for f in chosen])
        if absolute:
            entries, own = [(float(f), frames[f]) for f in chosen], float(start)
        read.append((entries, own))
    return read


def _direction(keys):
    mean = torch.stack(keys).mean(dim=(0, 1, 2))
    return mean / mean.norm()


def relax(frames, blocks, *, window, sinks, tail, budget, num_candidates, redundancy, absolute=False):
    """Sinks, the candidates that are most like them and least like the tail, and the tail."""
    read = []
    for start, count in blocks:
        if start + count <= window:
            entries, own = _in_a_row(frames[:start])
            read.append((entries, own))
            continue
        history = window - count - sinks - tail
        middle = list(range(max(sinks, start - (budget - count - sinks)), start - tail))
        half = len(middle) // 2
        wanted = min(num_candidates, len(middle) - half)
        if wanted == 1:
            candidates = [half]
        else:
            candidates = []
            for place in torch.linspace(half, len(middle) - 1, wanted + 1).long().tolist():
                if place not in candidates:
                    candidates.append(place)
            candidates = candidates[:-1]
        if len(candidates) < history:
            candidates = list(range(len(middle) - max(history, len(middle) - half), len(middle)))
        first, last = (_direction([f[0] for f in part]) for part in (frames[:sinks], frames[start - tail : start]))
        scores = []
        for candidate in candidates:
            own = _direction([frames[middle[candidate]][0]])
            scores.append((float(own @ first) - redundancy * float(own @ last), candidate))
        chosen = sorted(middle[candidate] for _, candidate in sorted(scores, reverse=True)[:history])
        numbers = [*range(sinks), *chosen, *range(start - tail, start)]
        entries, own = _in_a_row([frames[f] for f in numbers])
        if absolute:
            entries, own = [(float(f), frames[f]) for f in numbers], float(start)
        read.append((entries, own))
    return read


def slow_fast(frames, blocks, *, sinks, slow, fast, threshold, every, similarity="places", judge=None):
    """A queue of the last frames, and a memory for the first frames of blocks that brought something new.

    ``judge`` is the frames of the layer that decides, where that is another.
    """
    judge = judge or frames
    memory, brought, queued, read = [], {}, [], []
    starts = [start for start, _ in blocks]
    for index, (start, count) in enumerate(blocks):
        while len(queued) > fast - count:
            frame = queued.pop(0)
            if len(memory) < slow:
                memory.append(frame)
            elif frame in starts and brought[frame]:
                memory = [*memory[1:], frame]
        read.append(_in_a_row([frames[f] for f in [*range(min(sinks, start)), *memory, *queued]]))
        if start:
            pair = [judge[f][0].flatten(1) for f in (start, start - 1)]
            if similarity == "means":
                pair = [x.mean(dim=0, keepdim=True) for x in pair]
            alike = float(cosine_similarity(*pair, dim=-1).mean())
            brought[start] = (index + 1) % every == 0 and alike < threshold
        queued += [f for f in range(start, start + count) if f >= sinks]
    return read
