"""Merging of repeated tokens: exact where keys are equal, and a slow version of it."""

import pytest
import torch
from policy_driver import Player, make_geometry, spans
from torch.nn.functional import cosine_similarity

from longtake.cache import Pass
from longtake.cache.policies import tempcache
from longtake.cache.policies.tempcache import _directions, _merge_repeats, _random_projection
from longtake.cache.storage import KeysValues

GRID = (2, 2)
SIZE = 4
NUM_TEMPORAL = 8  # channels of a head of 16 that turn with time


def scene(*, moving=0):
    """Keys that repeat in every frame and do not turn with time, but for ``moving`` tokens that are always new."""
    generator = torch.Generator().manual_seed(3)
    still = torch.randn(1, SIZE, 2, 16, generator=generator)
    still[..., :NUM_TEMPORAL] = 0

    def content(layer, pass_, geometry, samples):
        generator = torch.Generator().manual_seed(pass_.start_frame)
        shape = (len(samples), pass_.num_frames * SIZE, 2, 16)
        q, v, new = (torch.randn(shape, generator=generator) for _ in range(3))
        keys = still.repeat(len(samples), pass_.num_frames, 1, 1)
        is_new = torch.arange(pass_.num_frames * SIZE) % SIZE < moving
        return q, torch.where(is_new[:, None, None], new, keys), v

    return content


def outputs(settings, content, *, block=3, num_blocks=6):
    player = Player(settings, make_geometry(block, grid=GRID, layers=1), content=content, samples=(0, 1))
    return [player.block(span) for span in spans(num_blocks, block)], player.cache.state


@pytest.mark.parametrize("block", [1, 3, 4])
@pytest.mark.parametrize("moving", [0, 1, 2])
def test_merging_equal_keys_is_exact(block, moving):
    """The lemma: representatives with a bias of log(count) and mean values give what all tokens give."""
    # What moves needs a place in every frame, what stands still does not.
    frames = 12 + block if moving else 2 * block
    settings = {"policy": "tempcache", "num_context_frames": frames, "positions": "absolute"}
    ours, state = outputs(settings, scene(moving=moving), block=block)
    exact, _ = outputs("full", scene(moving=moving), block=block)
    for a, b in zip(ours, exact, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x - y).abs().max() < 1e-5
    counts = state._counts[0]
    if not moving:
        assert (counts.sort(dim=1).values[:, -SIZE:] == 6 * block).all(), "a token counts as often as it came"
        assert (counts > 0).sum() == 2 * SIZE, "one representative per token of the frame"


def test_without_its_count_a_representative_is_worth_too_little(monkeypatch):
    exact, _ = outputs("full", scene())

    def uncounted(*args, **settings):
        values, counts = _merge_repeats(*args, **settings)
        return values, counts.clamp(max=1)

    monkeypatch.setattr(tempcache, "_merge_repeats", uncounted)
    ours, _ = outputs({"policy": "tempcache", "num_context_frames": 9}, scene())
    assert (ours[-1][0] - exact[-1][0]).abs().max() > 1e-2


def slow_merge(keys, values, counts, cells, least):
    """One sample, token by token: the same in lists."""
    values, counts, cells = list(values.double()), list(counts), list(cells)
    for start in range(len(counts), len(keys), SIZE):
        table = {}
        for i in range(SIZE):
            for j in range(start):
                if counts[j] > 0:
                    heads = cosine_similarity(keys[start + i], keys[j], dim=-1)
                    table[i, j] = heads.mean().item() + (1e-4 if cells[j] == i else 0)
        pairs = []
        for (i, j), similarity in table.items():
            best_of_new = max(s for (a, _), s in table.items() if a == i)
            best_of_old = max(s for (_, b), s in table.items() if b == j)
            if similarity == best_of_new == best_of_old and similarity >= least:
                pairs.append((i, j))
        new = [1.0] * SIZE
        for i, j in pairs:
            values[start + i] = (values[start + i] + counts[j] * values[j]) / (1 + counts[j])
            new[i], counts[j] = 1 + counts[j], 0.0
        counts, cells = counts + new, cells + list(range(SIZE))
    return values, counts


def merge(keys, values, counts, cells, projection=None, **settings):
    """Merge tokens, the last of which are new."""
    num_old = counts.shape[1]
    old = KeysValues(keys[:, :num_old], values[:, :num_old])
    new = keys[:, num_old:], values[:, num_old:]
    return _merge_repeats(old, *new, _directions(keys, projection), counts, cells, **settings)


@pytest.mark.parametrize("least", [0.9, 0.3])
@pytest.mark.parametrize("num_old", [0, 3, 10])
def test_equals_the_slow_version(num_old, least):
    generator = torch.Generator().manual_seed(num_old)
    base = torch.randn(SIZE, 2, 16, generator=generator)
    cells = torch.randint(SIZE, (2, num_old), generator=generator)
    noise = torch.randn(2, num_old + 3 * SIZE, 2, 16, generator=generator)
    content = torch.cat((cells, torch.arange(SIZE).repeat(2, 3)), dim=1)
    keys = base[content] + 0.3 * noise
    values = torch.randn(keys.shape, generator=generator)
    counts = torch.randint(0, 4, (2, num_old), generator=generator).float()
    ours, ours_counts = merge(keys, values, counts, cells, tokens_per_frame=SIZE, min_similarity=least)
    num_merged = 0
    for sample in range(2):
        theirs, their_counts = slow_merge(
            keys[sample], values[sample], counts[sample].tolist(), cells[sample].tolist(), least
        )
        assert (ours[sample] - torch.stack(theirs)[num_old:]).abs().max() < 1e-5
        assert ours_counts[sample].tolist() == pytest.approx(their_counts)
        num_merged += sum(count > 1 for count in their_counts[num_old:])
    assert num_merged, "nothing was merged, so nothing was compared"
    assert ours_counts.sum() == counts.sum() + 2 * 3 * SIZE, "every token counts once"


def test_neighbours_are_found_in_random_directions_too():
    """Equal keys are always found, and nearly all that are similar; nothing is merged that is not similar."""
    size = 128
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(1, size, 4, 64, generator=generator)
    values = torch.randn(1, 2 * size, 4, 64, generator=generator)
    cells = torch.arange(size)[None]
    projection = _random_projection(4 * 64, 64, base)
    assert projection.shape == (256, 64) and _random_projection(64, 64, base) is None
    merged = {}
    for noise in (0.0, 0.3, 3.0):
        order = torch.randperm(size, generator=generator)
        new = base[:, order] + noise * torch.randn(base.shape, generator=generator)
        settings = {"tokens_per_frame": size, "min_similarity": 0.9, "projection": projection}
        _, counts = merge(torch.cat((base, new), 1), values, torch.ones(1, size), cells, **settings)
        merged[noise] = (counts[0, size:] == 2).sum().item()
    assert merged[0.0] == size and merged[0.3] > 0.95 * size and merged[3.0] == 0


def test_the_most_recent_key_stays_and_the_oldest_token_goes():
    _, state = outputs({"policy": "tempcache", "num_context_frames": 6}, scene(moving=1), num_blocks=8)
    frames, alive = state._numbers[0] // SIZE, state._counts[0] > 0
    cells = state._numbers[0] % SIZE
    for sample in range(2):
        rows = (tensor[sample].tolist() for tensor in (frames, cells, alive))
        kept = [(f, c) for f, c, a in zip(*rows, strict=True) if a]
        assert {(f, c) for f, c in kept if c > 0} == {(23, c) for c in range(1, SIZE)}, "one of each, the last"
        assert sorted(f for f, c in kept if c == 0) == list(range(15, 24)), "what never repeats, as far as it fits"


def test_positions_are_clamped_to_the_window():
    content = scene(moving=1)
    for positions, lowest in (("clamped", 21), ("absolute", 15)):
        settings = {"policy": "tempcache", "num_context_frames": 6, "positions": positions}
        _, state = outputs(settings, content, num_blocks=8)
        (read,) = state.select(0, Pass("denoise", 8, 24, 3)).reads
        alive = read.bias[0, 0] > -torch.inf
        assert read.positions[0, alive, 0].min() == lowest
