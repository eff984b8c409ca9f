"""Sparse VideoGen, both: planted heads and clusters are found, bands have their density, orders can be undone."""

import math
from dataclasses import replace

import pytest
import torch
from block_attention import attention, signature
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse import EAGER, tokens, with_role

from longtake.attention import AttentionGeometry, sparse_attention
from longtake.attention.geometry import make_geometry
from longtake.attention.policies.svg import Svg, _half_width, _layouts
from longtake.attention.policies.svg2 import Svg2, _Clusters, _kmeans

GRID = (10, 20)


def geometries():
    return [AttentionGeometry.bidirectional(6, GRID), make_geometry(9, GRID, block_frames=3)]


def planted(geometry, kinds, *, strength=9.0):
    """Heads that look at their own frame, or at their own place in all frames."""
    num_tokens, frames = geometry.frame_tokens, len(geometry.segments)
    generator = torch.Generator().manual_seed(1)
    by_frame = torch.nn.functional.normalize(torch.randn(frames, 16, generator=generator), dim=-1)
    by_place = torch.nn.functional.normalize(torch.randn(num_tokens, 16, generator=generator), dim=-1)
    index = torch.arange(geometry.num_keys)
    parts = [by_frame[index // num_tokens] if kind == "spatial" else by_place[index % num_tokens] for kind in kinds]
    k = strength * torch.stack(parts, dim=1)[None]
    v = torch.randn(k.shape, generator=generator)
    return k[:, -geometry.num_queries :], k, v


@settings(deadline=None, derandomize=True, max_examples=40)
@given(query_frames=st.integers(1, 4), past=st.integers(0, 4), num_tokens=st.integers(1, 12))
def test_layouts_are_permutations_and_know_each_querys_own_key(query_frames, past, num_tokens):
    frames = query_frames + past
    for layout in _layouts(query_frames, frames, num_tokens):
        for order in (layout.q_perm, layout.k_perm):
            assert torch.equal(order.sort().values, torch.arange(len(order)))
        assert torch.equal(layout.k_perm[layout.own], layout.q_perm + past * num_tokens)
    temporal = _layouts(query_frames, frames, num_tokens)[1]
    places = temporal.k_perm % num_tokens
    assert torch.equal(places, places.sort().values), "the same place of all frames stands together"


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.9, 1.0])
def test_the_width_of_a_square_is_the_published_one(density):
    width = _half_width(torch.arange(4096), 4096, density)
    assert width == pytest.approx(4096 * (1 - math.sqrt(1 - density)), abs=2)


@pytest.mark.parametrize("geometry", geometries(), ids=["bidirectional", "cached"])
@pytest.mark.parametrize("kind", ["spatial", "temporal"])
@pytest.mark.parametrize("density", [0.3, 0.5])
def test_the_density_of_the_band_is_the_setting_within_a_block(geometry, kind, density):
    """128 tokens to which the width is rounded up, 128 of a block on either side."""
    policy = Svg(density=density, temporal_sink=False, block_size=16, **EAGER)
    layout = _layouts(len(geometry.query_frames), len(geometry.segments), geometry.frame_tokens)[kind == "temporal"]
    band = policy._band(layout, geometry, False)
    plain = band.float().mean().item()
    slack = 2 * (128 + 16) / geometry.num_keys
    if kind == "temporal" and geometry.frames_per_block:
        slack += 16 * 3 / geometry.num_keys  # a block of queries is spread over three times as many keys
    assert density - 0.02 <= plain <= density + slack
    with_sink = policy._band(layout, geometry, True)
    assert with_sink[:, : math.ceil(200 / 16)].all() and not (band & ~with_sink).any()
    assert band.any(1).all()


@pytest.mark.parametrize("geometry", geometries(), ids=["bidirectional", "cached"])
def test_planted_heads_are_told_apart(geometry):
    kinds = ["spatial", "temporal", "temporal", "spatial"]
    q, k, v = planted(geometry, kinds)
    both = _layouts(len(geometry.query_frames), len(geometry.segments), geometry.frame_tokens)
    plan = Svg(density=0.3, **EAGER).plan(q, k, geometry, v=v)
    expected = torch.stack([both[kind == "temporal"].q_perm for kind in kinds])
    assert torch.equal(plan.q_perm, expected)
    exact, mask = attention(q, k, v)[0], plan.to_dense_mask()
    right, wrong = (
        (attention(q, k, v, heads[None])[0] - exact).square().mean((0, 1, 3)) for heads in (mask, mask[[1, 0, 3, 2]])
    )
    assert (right < wrong).all()


def test_svg_needs_values_and_whole_frames():
    geometry = make_geometry(6, GRID, block_frames=3)
    q, k, v = tokens(geometry)
    policy = Svg(**EAGER)
    with pytest.raises(ValueError, match="give it q, k and v"):
        policy.plan(q, k, geometry)
    with pytest.raises(ValueError, match="needs whole frames"):
        policy.plan(q, k, with_role(geometry, 0, "memory"), v=v)


def test_planted_clusters_are_recovered():
    """More clusters than there are groups: each has tokens of one group only, in every head."""
    generator = torch.Generator().manual_seed(0)
    centres = 8 * torch.randn(12, 3, 16, generator=generator)
    group = torch.randint(12, (900,), generator=generator)
    x = centres[group] + 0.1 * torch.randn(900, 3, 16, generator=generator)
    found = _kmeans(x, 60, num_iterations=50, seed=3)
    for labels in found.labels:
        for label in labels.unique():
            assert group[labels == label].unique().numel() == 1
    assert torch.equal(found.sizes.sum(1), torch.full((3,), 900))
    spread = (x.transpose(0, 1) - found.centroids.gather(1, found.labels[..., None].expand(-1, -1, 16))).norm(dim=-1)
    assert spread.max() < 2


def test_kmeans_settles_and_leaves_empty_clusters_where_they_are():
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])[:, None]
    start = torch.tensor([[[2.0], [9.0], [500.0]]])
    found = _kmeans(x, 3, num_iterations=50, centroids=start)
    assert found.centroids[0, :, 0].tolist() == [0.5, 10.5, 500.0] and found.sizes[0].tolist() == [2, 2, 0]
    assert found.labels[0].tolist() == [0, 0, 1, 1]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(seed=st.integers(0, 999), top_p=st.floats(0.05, 0.999), min_share=st.sampled_from([0.0, 0.1, 0.5]))
def test_top_p_is_the_shortest_prefix_that_exceeds_it(seed, top_p, min_share):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 20, 8, generator=generator)
    sizes = torch.randint(0, 9, (2, 20), generator=generator)
    sizes[:, 3] += 1
    keys = _Clusters(sizes, k, sizes)
    mask = Svg2(top_p=top_p, min_key_share=min_share)._top_p(q, keys)
    for head in range(2):
        for row in range(5):
            weight = [int(sizes[head, j]) * math.exp(q[head, row] @ k[head, j] / 8**0.5) for j in range(20)]
            total, order = sum(weight), sorted(range(20), key=lambda j: -weight[j])
            count = next(n for n in range(1, 21) if n == 20 or sum(weight[j] for j in order[:n]) / total > top_p)
            count = max(count, int(min_share * 20), 1)
            assert set(mask[head, row].nonzero()[:, 0].tolist()) >= {j for j in order[:count] if weight[j]}
            assert int(mask[head, row].sum()) == count
    assert Svg2(top_p=1.0, min_key_share=0.0)._top_p(q, keys).all()


@pytest.mark.parametrize("geometry", geometries(), ids=["bidirectional", "cached"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_svg2_equals_dense_attention_at_p_1(geometry, key_heads):
    q, k, v = tokens(geometry, key_heads=key_heads, batch=2)
    exact = sparse_attention(q, k, v, geometry, policy=Svg2(top_p=1.0, **EAGER))
    assert (exact - attention(q, k, v)[0]).abs().max() < 2e-6
    half = Svg2(top_p=0.5, **EAGER)
    assert all(0.3 < half.plan(q[i : i + 1], k[i : i + 1], geometry).density < 0.95 for i in range(2))


def test_svg2_does_not_mind_the_order_of_keys():
    """From the same centroids: clusters hold the same keys wherever these stand."""
    geometry = make_geometry(9, GRID, block_frames=3)
    q, k, v = tokens(geometry)
    policy = Svg2(top_p=0.5, **EAGER)
    memory = {}
    policy.plan(q, k, geometry, memory=memory)
    order = torch.randperm(geometry.num_keys, generator=torch.Generator().manual_seed(5))
    plain = sparse_attention(q, k, v, geometry, policy=policy, memory=dict(memory))
    turned = sparse_attention(q, k[:, order], v[:, order], geometry, policy=policy, memory=dict(memory))
    assert (plain - turned).abs().max() < 1e-5
    assert (plain - attention(q, k, v)[0]).abs().max() > 1e-2, "something is left out"


def test_svg2_goes_on_from_the_last_centroids_of_the_layer():
    geometry = make_geometry(9, GRID, block_frames=3)
    q, k, _ = tokens(geometry)
    memory = {}
    first = Svg2(**EAGER, num_iterations=1)
    one = first.plan(q, k, geometry, memory=memory)
    kept = dict(memory)
    again = first.plan(q, k, geometry, memory=memory)
    assert len(kept) == 2 and torch.equal(one.q_edges, again.q_edges) and torch.equal(one.k_perm, again.k_perm)
    other_layer = replace(geometry, layer=geometry.layer + 1)
    first.plan(q, k, other_layer, memory=memory)
    assert len(memory) == 4
    assert signature(first.plan(q, k, geometry)) == signature(first.plan(q, k, geometry)), "nothing is kept elsewhere"
