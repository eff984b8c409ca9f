"""PAROAttention: six orders, a planted one is found, masks keep the heaviest blocks, calibrations are files."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from sparse import EAGER, tokens

from longtake.attention import AttentionGeometry
from longtake.attention.geometry import make_geometry
from longtake.attention.policies.paro import (
    ORDERS,
    Calibration,
    Paro,
    _mask_from_sums,
    calibrate,
    mask_from_map,
    permutation,
)

SHAPE = (6, 8, 16)


def planted(order, *, shape=SHAPE, block=64):
    """A map whose queries look evenly at the block of keys they are in, once tokens stand in an order."""
    count = shape[0] * shape[1] * shape[2]
    tokens = permutation(order, *shape)
    place = torch.empty_like(tokens)
    place[tokens] = torch.arange(count)
    near = (place[:, None] // block) == (place // block)
    return near / near.sum(1, keepdim=True)


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 2, 7), (2, 1, 1)])
def test_orders_are_bijections_in_the_order_of_their_letters(shape):
    assert len(ORDERS) == len(set(ORDERS)) == 6
    sizes = dict(zip("fhw", shape, strict=True))
    for order in ORDERS:
        found = permutation(order, *shape)
        expected = []
        for places in product(*(range(sizes[axis]) for axis in order)):
            at = dict(zip(order, places, strict=True))
            expected.append((at["f"] * shape[1] + at["h"]) * shape[2] + at["w"])
        assert found.tolist() == expected and sorted(expected) == list(range(len(expected)))


@pytest.mark.parametrize("order", ORDERS)
def test_a_planted_order_is_found(order):
    noise = torch.rand(768, 768, generator=torch.Generator().manual_seed(0))
    weights = planted(order) + 1e-5 * noise
    assert {calibrate(weights, SHAPE, alpha=alpha) for alpha in (0.2, 0.4, 0.5)} == {order}


def test_emptiness_alone_is_misled_by_maps_that_are_spread_thin():
    """A twelfth of every block filled: all blocks count as nearly empty, and only their unevenness tells."""
    weights = planted("whf")
    assert calibrate(weights, SHAPE, alpha=1.0) != "whf"
    assert calibrate(weights, SHAPE, alpha=1.0, empty_share=0.95) == "whf"
    assert calibrate(weights, SHAPE) == "whf"


def test_masks_keep_the_heaviest_blocks():
    weights = planted("whf")
    tokens = permutation("whf", *SHAPE)
    turned = weights[tokens][:, tokens]
    assert torch.equal(mask_from_map(turned, 1 / 12), torch.eye(12, dtype=torch.bool))
    assert mask_from_map(weights, 1 / 12).float().mean() >= 1 / 12
    noisy = turned + 0.01 * torch.rand(768, 768, generator=torch.Generator().manual_seed(2))
    for density in (0.2, 0.3, 0.5, 1.0):
        mask = mask_from_map(noisy, density)
        assert mask.float().mean().item() == pytest.approx(density, abs=0.5 / 144)
        assert mask.diagonal().all()
    ragged = mask_from_map(turned[:700, :700], 0.2)
    assert ragged.shape == (11, 11) and ragged.any(1).all()
    sums = torch.tensor([[9.0, 8.0, 7.0], [0.1, 0.3, 0.2]])
    assert _mask_from_sums(sums, 0.5).tolist() == [[True] * 3, [False, True, False]], "no row is left empty"


def tokens_for(geometry, heads=3):
    return tokens(geometry, heads=heads, key_heads=heads)[:2]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    "geometry", [AttentionGeometry.bidirectional(4, (8, 16)), make_geometry(7, (8, 16), block_frames=3)], ids=str
)
def test_without_calibration_blocks_are_estimated_at_the_density(geometry, density):
    plan = Paro(density=density, **EAGER).plan(*tokens_for(geometry), geometry)
    assert plan.density == pytest.approx(density, abs=0.03)
    assert torch.equal(plan.q_perm, torch.arange(geometry.num_queries).expand(3, -1)), "the order given, by default"
    assert plan.num_heads == 3


def test_the_estimate_finds_where_a_query_looks():
    """Queries of a frame that are nearly the keys of one other frame."""
    geometry = AttentionGeometry.bidirectional(4, (8, 16))
    q, k = tokens_for(geometry, heads=1)
    directions = 3 * torch.nn.functional.normalize(
        torch.randn(4, 16, generator=torch.Generator().manual_seed(3)), dim=1
    )
    k = 0.1 * k + directions.repeat_interleave(128, 0)[None, :, None]
    q = 0.1 * q + 2 * directions[[2, 3, 0, 1]].repeat_interleave(128, 0)[None, :, None]
    mask = Paro(density=0.25, **EAGER).plan(q, k, geometry).block_mask[0]
    expected = torch.eye(4, dtype=torch.bool)[[2, 3, 0, 1]].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(mask, expected)


def test_only_frames_that_ask_are_interleaved_in_the_cached_form():
    geometry = make_geometry(5, (4, 6), block_frames=2)
    plan = Paro(order="wfh", block_size=8, **EAGER).plan(*tokens_for(geometry), geometry)
    keys = plan.k_perm[0]
    for frame in range(3):
        assert torch.equal(keys[frame * 24 : (frame + 1) * 24], frame * 24 + permutation("fwh", 1, 4, 6))
    assert torch.equal(keys[72:], 72 + permutation("wfh", 2, 4, 6))
    assert torch.equal(plan.q_perm[0], permutation("wfh", 2, 4, 6))
    assert plan.k_edges.tolist() == list(range(0, 121, 8))


def test_a_calibration_is_a_file(tmp_path):
    path = str(tmp_path / "model.safetensors")
    orders = torch.tensor([[0, 1, 2], [3, 4, 5]])
    masks = torch.rand(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    masks |= torch.eye(8, dtype=torch.bool)
    Calibration(orders, masks).save(path)
    policy = Paro(calibration=path, **EAGER)
    geometry = AttentionGeometry.bidirectional(4, (8, 16), layer=1, num_layers=2, step_index=1)
    q, k = tokens_for(geometry)
    for step, number in ((0, 0), (1, 1), (30, 1)):
        plan = policy.plan(q, k, replace(geometry, step_index=step))
        assert torch.equal(plan.block_mask, masks[number, 1]), "the last set serves the rest of the steps"
    for head, order in enumerate([3, 4, 5]):
        assert torch.equal(plan.q_perm[head], permutation(ORDERS[order], 4, 8, 16))
        assert torch.equal(plan.q_perm[head], plan.k_perm[head])
    with pytest.raises(ValueError, match="nothing for layer 2"):
        policy.plan(q, k, replace(geometry, layer=2))
    longer = AttentionGeometry.bidirectional(5, (8, 16), layer=1)
    with pytest.raises(ValueError, match="masks of 8 blocks"):
        policy.plan(*tokens_for(longer), longer)


def test_orders_alone_serve_every_length(tmp_path):
    path = str(tmp_path / "orders.safetensors")
    Calibration(torch.tensor([[5, 0, 2]])).save(path)
    policy = Paro(calibration=path, density=0.5, **EAGER)
    for geometry in (AttentionGeometry.bidirectional(5, (8, 16)), make_geometry(7, (8, 16), block_frames=3)):
        plan = policy.plan(*tokens_for(geometry), replace(geometry, layer=0))
        assert torch.equal(plan.q_perm[1], torch.arange(geometry.num_queries))
        assert not torch.equal(plan.q_perm[0], plan.q_perm[1])


def test_files_that_are_no_calibration_are_named(tmp_path):
    wrong = tmp_path / "wrong.safetensors"
    with pytest.raises(ValueError, match="cannot read the calibration"):
        Calibration.load(str(wrong))
    wrong.write_text("nothing")
    with pytest.raises(ValueError, match="cannot read the calibration"):
        Paro(calibration=str(wrong))
    for parts, match in (
        ({"order": torch.zeros(1, 1)}, "holds no calibration"),
        ({"orders": torch.full((1, 1), 6)}, "numbers from 0 to 5"),
        ({"orders": torch.zeros(1, 2, dtype=torch.long), "masks": torch.ones(1, 1, 2, 4, 4)}, "they must be bool"),
    ):
        save_file(parts, wrong)
        with pytest.raises(ValueError, match=match):
            Calibration.load(str(wrong))


def test_a_map_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"attention_map is \(4, 4\) but must be \(768, 768\)"):
        calibrate(torch.zeros(4, 4), SHAPE)
