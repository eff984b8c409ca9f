"""Sliding tiles against a loop over tokens, and windows that keep their size at the border."""

import pytest
import torch
from sparse import EAGER, with_role

from longtake.attention import AttentionGeometry
from longtake.attention.geometry import make_geometry
from longtake.attention.policies.sliding_tile import SlidingTile


def policy(tile, window, **changes):
    return SlidingTile(tile=tile, window=window, **(EAGER | changes))


def slow(num_frames, grid, tile, window, num_query_frames):
    """(queries, keys): tile by tile, time counted from the last frame backwards."""
    sizes = (num_frames, *grid)
    counts = [-(-size // step) for size, step in zip(sizes, tile, strict=True)]
    tokens = [(f, r, c) for f in range(num_frames) for r in range(grid[0]) for c in range(grid[1])]

    def tile_of(token):
        frame, row, column = token
        return counts[0] - 1 - (num_frames - 1 - frame) // tile[0], row // tile[1], column // tile[2]

    def is_read(query, key):
        for at, other, count, size in zip(tile_of(query), tile_of(key), counts, window, strict=True):
            half = size // 2
            centre = max(half, min(at, count - 1 - half))
            if abs(other - centre) > half:
                return False
        return True

    queries = tokens[(num_frames - num_query_frames) * grid[0] * grid[1] :]
    return torch.tensor([[is_read(query, key) for key in tokens] for query in queries])


@pytest.mark.parametrize("block_frames", [None, 2, 3])
@pytest.mark.parametrize(
    ("num_frames", "grid", "tile", "window"),
    [
        (6, (6, 8), (2, 3, 4), (3, 1, 1)),
        (6, (6, 8), (2, 2, 2), (1, 3, 3)),
        (7, (5, 7), (3, 2, 3), (3, 3, 1)),
        (5, (4, 4), (1, 4, 4), (3, 1, 1)),
        (4, (4, 6), (6, 8, 8), (3, 3, 3)),
    ],
)
def test_equal_to_a_loop_over_tokens(num_frames, grid, tile, window, block_frames):
    geometry = make_geometry(num_frames, grid, block_frames=block_frames, num_sinks=0)
    plan = policy(tile, window).plan(None, None, geometry)
    expected = slow(num_frames, grid, tile, window, block_frames or num_frames)
    assert torch.equal(plan.to_dense_mask()[0], expected)
    assert plan.density == pytest.approx(expected.float().mean().item())


def test_windows_keep_their_size_at_the_border():
    geometry = AttentionGeometry.bidirectional(10, (12, 12))
    plan = policy((2, 4, 4), (3, 3, 3)).plan(None, None, geometry)
    assert (plan.counts == 27).all() and plan.density == pytest.approx(27 / 45)
    published = AttentionGeometry.bidirectional(30, (48, 80))
    plan = policy((6, 8, 8), (3, 3, 3)).plan(None, None, published)
    assert plan.uniform_block_sizes == (384, 384) and plan.density == pytest.approx(27 / 300)


def test_heads_may_have_windows_of_their_own():
    geometry = AttentionGeometry.bidirectional(6, (4, 4))
    windows = ((1, 1, 1), (3, 1, 1), (3, 3, 3))
    plan = policy((2, 2, 2), (1, 1, 1), head_windows=windows).plan(None, None, geometry)
    for head, window in enumerate(windows):
        assert torch.equal(plan.to_dense_mask()[head], slow(6, (4, 4), (2, 2, 2), window, 6))


def test_sinks_memory_and_text_are_read_by_all():
    geometry = make_geometry(8, (4, 4), block_frames=2, num_sinks=1)
    plain = policy((2, 2, 2), (1, 1, 1)).plan(None, None, with_role(geometry, 0, "recent")).to_dense_mask()[0]
    sunk = policy((2, 2, 2), (1, 1, 1)).plan(None, None, geometry).to_dense_mask()[0]
    assert sunk[:, :16].all() and not plain[:, :16].any()
    assert torch.equal(sunk[:, 32:], plain[:, 32:])
    memory = policy((2, 2, 2), (1, 1, 1)).plan(None, None, with_role(geometry, 3, "memory")).to_dense_mask()[0]
    assert memory[:, 48:64].all() and not sunk[:, 48:64].any()
