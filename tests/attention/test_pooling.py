"""Means of blocks of any sizes, sums by group and the best of a row, against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.attention.policies import base as pooling
from longtake.attention.policies import light_forcing


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_block_means_of_any_sizes(sizes):
    """The way of other devices, which sums in a fixed order, gives the same."""
    edges = torch.tensor([0, *sizes]).cumsum(0)
    x = random(int(edges[-1]), 2, 4)
    expected = torch.stack([x[a:b].double().mean(0) for a, b in zip(edges, edges[1:], strict=False)])
    assert torch.allclose(pooling.block_means(x, edges.int()).double(), expected, atol=1e-6)
    assert torch.allclose(pooling._padded_means(x, edges, edges.diff()).double(), expected, atol=1e-6)
    half = pooling.block_means(x.bfloat16(), edges)
    assert half.dtype == torch.float32 and torch.allclose(half, expected.float(), atol=2e-2)


def test_sums_by_group_both_ways():
    values, group = random(50, 3, 2), torch.randint(7, (50,), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([values[group == number].sum(0) for number in range(8)])
    assert torch.allclose(pooling.sum_by_group(values, group, 8), expected, atol=1e-6)
    assert torch.allclose(pooling._product_sums(values, group, 8), expected, atol=1e-6)


def test_merged_means_weigh_blocks_by_their_size():
    x = random(30, 2, 4)
    edges = torch.tensor([0, 4, 8, 9, 20, 30])
    merged = light_forcing._merged_means(pooling.block_means(x, edges), edges.diff(), torch.tensor([0, 0, 0, 1, 1]), 2)
    assert torch.allclose(merged, torch.stack([x[:9].mean(0), x[9:].mean(0)]), atol=1e-6)


@pytest.mark.parametrize(
    ("count", "tiers", "expected"),
    [
        (2, None, [1, 3]),
        (3, None, [0, 1, 3]),
        (2, [0, 1, 0, 1, 0], [0, 2]),
        (4, [0, 1, 0, 1, 0], [0, 1, 2, 4]),
        (0, None, []),
    ],
)
def test_the_best_of_a_row(count, tiers, expected):
    """Of the three equal ones the first are taken."""
    scores = torch.tensor([[1.0, 5.0, 1.0, 3.0, 1.0]])
    tiers = None if tiers is None else torch.tensor(tiers)
    assert light_forcing._best(scores, count, tiers=tiers)[0].nonzero()[:, 0].tolist() == expected


def test_rows_may_have_counts_of_their_own():
    taken = light_forcing._best(random(4, 6, 9), torch.arange(24).view(4, 6) % 10)
    assert torch.equal(taken.sum(-1), torch.arange(24).view(4, 6) % 10)
