"""Block plans: every form of a plan against the plan written out token by token, and every mistake refused."""

from dataclasses import replace

import block_attention as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.attention import AttentionGeometry, BlockPlan, Segment
from longtake.attention.backends.pytorch import _flex_block_mask
from longtake.attention.plan import split_runs, uniform_edges

FRAME = 200


@st.composite
def plans(draw):
    """Plans of a few frames: shared or per-head maps, edges and orders, straddling or frame-aligned blocks."""
    heads, block = draw(st.integers(1, 3)), draw(st.integers(3, 40))
    lengths = [draw(st.lists(st.integers(1, 50), min_size=1, max_size=4)) for _ in range(2)]
    seed = draw(st.integers(0, 2**16))
    per_head = draw(st.fixed_dictionaries({name: st.booleans() for name in ("mask", "edges", "orders")}))
    torch.manual_seed(seed)
    edges = []
    for runs in lengths:
        own = split_runs(runs, block)
        if per_head["edges"]:
            inner = torch.stack([torch.randint(0, sum(runs) + 1, (len(own) - 2,)).sort().values for _ in range(heads)])
            own = torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=sum(runs)).int()
        edges.append(own)
    mask = torch.rand(heads if per_head["mask"] else 1, *(own.shape[-1] - 1 for own in edges)) < draw(st.floats(0, 1))
    mask |= torch.rand(mask.shape).argmax(-1, keepdim=True) == torch.arange(mask.shape[-1])
    orders = [None, None]
    if per_head["orders"]:
        orders = [torch.stack([torch.randperm(sum(runs)) for _ in range(heads)]) for runs in lengths]
    return BlockPlan.from_dense_block_mask(mask, *edges, q_perm=orders[0], k_perm=orders[1])


@given(plans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_form_says_the_same(plan):
    expected = reference.token_mask(plan, plan.num_heads)
    assert torch.equal(plan.to_dense_mask().expand_as(expected), expected)
    some = torch.arange(0, plan.num_queries, 3)
    assert torch.equal(plan.to_dense_mask(some).expand(plan.num_heads, -1, -1), expected[:, some])
    last = torch.tensor([plan.num_keys - 1])
    assert torch.equal(plan.to_dense_mask(some, last).expand(plan.num_heads, -1, -1), expected[:, some][..., last])
    assert plan.density == pytest.approx(expected.double().mean().item(), abs=1e-12)
    again = BlockPlan.from_dense_block_mask(plan.block_mask, plan.q_edges, plan.k_edges)
    assert torch.equal(again.counts, plan.counts) and torch.equal(again.index, plan.index)


@given(plans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_groups_cover_the_plan_once(plan):
    plan = plan.without_order()
    expected = reference.token_mask(plan, plan.num_heads)
    covered = torch.zeros_like(expected, dtype=torch.int32)
    rows = torch.zeros(plan.num_heads, plan.num_queries, dtype=torch.int32)
    for group in plan.row_groups:
        for head in range(plan.num_heads) if group.heads is None else group.heads:
            for first, stop in group.q_ranges:
                rows[head, first:stop] += 1
                for start, end in group.k_ranges:
                    covered[head, first:stop, start:end] += 1
    assert (rows == 1).all()
    assert torch.equal(covered, expected.int())


@given(plans(), st.integers(8, 64))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_flex_masks_carry_a_function_that_reads_the_plan(plan, block_size):
    plan = plan.without_order()
    expected = reference.token_mask(plan, plan.num_heads)
    mask = _flex_block_mask(plan, block_size)
    heads, queries, keys = (torch.arange(size) for size in expected.shape)
    found = mask.mask_mod(torch.tensor(0), heads[:, None, None], queries[None, :, None], keys[None, None, :])
    assert torch.equal(found.expand_as(expected), expected)
    # The lists of blocks: full ones hold nothing but kept pairs, and what is in no list is not kept.
    padding = (0, -len(keys) % block_size, 0, -len(queries) % block_size)
    some, every = (
        torch.nn.functional.pad(expected, padding, value=fill)
        .unflatten(2, (-1, block_size))
        .unflatten(1, (-1, block_size))
        for fill in (False, True)
    )
    some, every = some.any(4).any(2), every.all(4).all(2)

    def listed(counts, index):
        is_listed = torch.arange(index.shape[-1]) < counts[0, ..., None]
        return torch.zeros_like(is_listed).scatter_(-1, index[0].long(), is_listed).expand_as(some)

    assert torch.equal(listed(mask.full_kv_num_blocks, mask.full_kv_indices), every)
    assert torch.equal(listed(mask.kv_num_blocks, mask.kv_indices), some & ~every)


def test_blocks_are_aligned_with_frames():
    edges = split_runs([1560, 1560], 128)
    assert len(edges) == 27 and edges.diff()[12] == edges.diff()[25] == 24
    assert (edges == 1560).any()
    assert uniform_edges(300, 128).tolist() == [0, 128, 256, 300]
    with pytest.raises(ValueError, match="block_size=0"):
        split_runs([10], 0)


def _plan(**changes):
    mask = torch.tensor([[True, False, True], [True, True, False]])
    plan = BlockPlan.from_dense_block_mask(mask, uniform_edges(20, 10), uniform_edges(30, 10))
    return replace(plan, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": torch.tensor([[2, 0]], dtype=torch.int32), "index": [[0, 2], [-1, -1]]}, "reads no key"),
        ({"index": [[2, 0], [0, 1]]}, "must ascend"),
        ({"index": [[0, 0], [0, 1]]}, "must ascend"),
        ({"index": [[0, 3], [0, 1]]}, "below 3"),
        ({"counts": torch.tensor([[1, 2]], dtype=torch.int32)}, "filled up with -1"),
        ({"counts": torch.tensor([[3, 2]], dtype=torch.int32)}, "filled up with -1"),
        ({"q_edges": torch.tensor([0, 25, 20], dtype=torch.int32)}, "q_edges must ascend"),
        ({"k_edges": torch.tensor([1, 10, 20, 30], dtype=torch.int32)}, "k_edges must ascend"),
        ({"q_perm": torch.zeros(1, 20, dtype=torch.int64)}, "q_perm must hold every number"),
        ({"k_perm": torch.arange(29)[None]}, "k_perm must hold every number"),
    ],
)
def test_contents_are_validated(changes, message):
    if isinstance(changes.get("index"), list):
        changes["index"] = torch.tensor([changes["index"]], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        _plan(**changes).validate()
    assert _plan().validate().density == pytest.approx(4 / 6)


def test_empty_blocks_need_read_nothing():
    edges = torch.tensor([[0, 10, 10, 20], [0, 5, 12, 20]], dtype=torch.int32)
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    mask[0, 1] = False
    plan = BlockPlan.from_dense_block_mask(mask, edges, uniform_edges(20, 10))
    assert plan.validate().density == 1
    mask[1, 1] = False
    with pytest.raises(ValueError, match="query block 1 of head 1 reads no key"):
        BlockPlan.from_dense_block_mask(mask, edges, uniform_edges(20, 10)).validate()


def _segment(**changes):
    return Segment(**{"frame": 0, "position": 0.0, "start": 0, "length": 6, "role": "sink", **changes})


def _geometry(**changes):
    frames = {
        "frame_tokens": 6,
        "grid": (2, 3),
        "frames_per_block": 1,
        "query_frames": (1,),
        "query_positions": (1.0,),
    }
    segments = (_segment(), _segment(frame=1, position=1.0, start=6, role="current"))
    return AttentionGeometry(**frames | {"segments": segments} | changes)


def test_geometry():
    geometry = _geometry()
    assert (geometry.num_queries, geometry.num_keys) == (6, 12)
    assert geometry.layout == replace(geometry, layer=3, step_index=1, kind="commit").layout
    square = AttentionGeometry.bidirectional(4, (2, 3), layer=1, num_layers=2)
    assert square.num_queries == square.num_keys == 24 and square.frames_per_block is None


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (_plan, {"q_edges": torch.tensor([0, 10, 20])}, "q_edges is int64"),
        (_plan, {"counts": torch.tensor([[2, 2, 2]], dtype=torch.int32)}, r"counts is int32 \(1, 3\)"),
        (_plan, {"index": torch.zeros(1, 3, 2, dtype=torch.int32)}, "index is int32"),
        (_plan, {"q_perm": torch.arange(20)}, "q_perm is int64"),
        (_plan, {"q_perm": torch.zeros(2, 20).long(), "k_perm": torch.zeros(3, 30).long()}, "2, 3"),
        (_geometry, {"grid": (2, 4)}, "frame_tokens=6"),
        (_geometry, {"query_positions": ()}, "query_positions"),
        (_geometry, {"segments": ()}, "no keys"),
        (_geometry, {"segments": (_segment(start=1),)}, "starts at 1"),
        (_geometry, {"kind": "dream"}, "kind='dream'"),
        (_segment, {"role": "near"}, "role='near'"),
        (_segment, {"length": 0}, "length=0"),
    ],
)
def test_shapes_are_refused_at_once(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
