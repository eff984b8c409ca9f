"""Chunk-aware growth against published lists, and the selection against a loop over every query block."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse import EAGER, tokens, with_role

from longtake.attention import AttentionGeometry
from longtake.attention.geometry import make_geometry
from longtake.attention.policies.light_forcing import LightForcing, _growth_schedule

SHORT = {"sparsity": 0.88, "base_sparsity": 0.98, "num_frames": 21, "num_context_frames": None}
LONG = {"sparsity": 0.85, "base_sparsity": 0.95, "num_frames": 63, "num_context_frames": 12}
HOPPER = SHORT | {"sparsity": 0.80, "base_sparsity": 0.90}
PUBLISHED = [
    (SHORT, [0, 0.827, 0.855, 0.872, 0.883, 0.892, 0.898]),
    (LONG, [0, 0.734, 0.774, 0.798, 0.814, 0.826, 0.835, 0.842]),
    (HOPPER, [0, 0.747, 0.775, 0.792, 0.803, 0.812, 0.818]),
]


def schedule(frames_per_block=3, **options):
    return _growth_schedule(LightForcing(**options), frames_per_block)


@pytest.mark.parametrize(("options", "expected"), PUBLISHED)
def test_schedules_are_the_published_ones(options, expected):
    found = schedule(**options)
    assert len(found) == options["num_frames"] // 3
    assert found[: len(expected)] == pytest.approx(expected, abs=1e-3)
    if options is LONG:
        assert found[-1] == pytest.approx(0.883, abs=1e-3)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    num_blocks=st.integers(2, 40),
    frames_per_block=st.integers(1, 4),
    sparsity=st.floats(0.6, 0.95),
    more=st.floats(0.0, 0.04),
    window=st.one_of(st.none(), st.integers(4, 30)),
)
def test_the_budget_is_spent_exactly(num_blocks, frames_per_block, sparsity, more, window):
    """As much is read over the video as at a constant sparsity, the first block aside."""
    budget = {"sparsity": sparsity, "base_sparsity": sparsity + more, "num_context_frames": window}
    found = schedule(frames_per_block, num_frames=num_blocks * frames_per_block, **budget)
    lengths = [min((index + 1) * frames_per_block, window or 10**9) for index in range(1, num_blocks)]
    spent = sum((1 - s) * length for s, length in zip(found[1:], lengths, strict=True))
    assert spent == pytest.approx((1 - sparsity) * sum(lengths), rel=1e-9)
    assert found[0] == 0 and list(found) == sorted(found)


def test_schedules_have_ends():
    assert schedule(num_frames=3, sparsity=0.5, base_sparsity=0.6, num_context_frames=None) == (0.0,)
    policy = LightForcing(**LONG)
    assert policy.block_sparsity(10_000, 3) == policy.block_sparsity(20, 3) == schedule(**LONG)[-1]
    early = schedule(num_frames=300, sparsity=0.1, base_sparsity=0.9, num_context_frames=None)
    assert min(early) == 0.0 and max(early) < 1
    assert LightForcing(sparsity=0.95)._base == 0.99 and LightForcing(sparsity=0.995)._base == 0.995


def example(num_frames=12, *, block_index=3):
    geometry = replace(make_geometry(num_frames, (10, 20), block_frames=3), block_index=block_index)
    return geometry, *tokens(geometry)[:2]


def policy(**changes):
    return LightForcing(**EAGER | {"num_kept_frames": 4, "num_near_frames": 2} | changes)


def frame_blocks(num_frames, tokens, size):
    edges = [
        (f * tokens + a, min(f * tokens + a + size, (f + 1) * tokens))
        for f in range(num_frames)
        for a in range(0, tokens, size)
    ]
    return edges, [a // tokens for a, _ in edges]


def slow(policy, geometry, q, k):
    """The blocks of every query block, chosen one at a time; ties go to the first."""
    tokens, size = geometry.frame_tokens, policy.block_size
    num_frames, own = len(geometry.segments), len(geometry.query_frames)
    past = num_frames - own
    key_blocks, frame_of = frame_blocks(num_frames, tokens, size)
    query_blocks, _ = frame_blocks(own, tokens, policy.query_block_size or size)
    share = 1 - policy.block_sparsity(geometry.block_index, own)
    ratio = q.shape[2] // k.shape[2]
    mask = torch.zeros(q.shape[2], len(query_blocks), len(key_blocks), dtype=torch.bool)
    for head in range(q.shape[2]):
        for row, (start, stop) in enumerate(query_blocks):
            query = q[0, start:stop, head].double().mean(0)
            keys = k[0, :, head // ratio].double()
            score = [float(query @ keys[a:b].mean(0)) for a, b in key_blocks]
            eligible = set(range(num_frames))
            if past > policy.num_kept_frames:
                middle = range(policy.num_sink_frames, past - policy.num_near_frames)
                by_frame = {f: float(query @ keys[f * tokens : (f + 1) * tokens].mean(0)) for f in middle}
                room = policy.num_kept_frames - policy.num_sink_frames - policy.num_near_frames
                chosen = sorted(middle, key=lambda f: -by_frame[f])[:room]
                eligible -= set(middle) - set(chosen)
            candidates = [i for i, f in enumerate(frame_of) if f in eligible]
            count = min(max(1, int(share * len(key_blocks) + 1e-9)), len(candidates))
            for i in sorted(candidates, key=lambda i: -score[i])[:count]:
                mask[head, row, i] = True
    return mask


@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"block_size": 128}, {"query_block_size": 200}, {"num_kept_frames": 3}, {"num_kept_frames": 40}),
        *({"sparsity": sparsity, "num_kept_frames": 9} for sparsity in (0.3, 0.6, 0.97)),
    ],
    ids=str,
)
def test_selection_is_that_of_a_loop(changes):
    """200 tokens a frame in blocks of 64: the last block of a frame has 8."""
    geometry, q, k = example()
    found = policy(**changes).plan(q, k, geometry)
    assert torch.equal(found.block_mask, slow(policy(**changes), geometry, q, k))
    other = policy(**{"num_sink_frames": 2, "num_near_frames": 1} | changes).plan(q, k, geometry)
    assert changes.get("num_kept_frames", 0) >= 9 or not torch.equal(found.block_mask, other.block_mask)


def test_equal_scores_take_the_first_blocks():
    geometry, q, k = example()
    mask = policy(num_kept_frames=40).plan(q, torch.ones_like(k), geometry).block_mask
    count = int(mask[0, 0].sum())
    assert mask[..., :count].all() and not mask[..., count:].any()


@pytest.mark.parametrize("force", [("own",), ("sink",), ("near", "own"), ("current",)])
def test_forced_blocks_come_first_and_the_budget_stays(force):
    geometry, q, k = example(block_index=8)
    plain = policy(sparsity=0.6).plan(q, k, geometry)
    forced = policy(sparsity=0.6, force=force).plan(q, k, geometry)
    assert torch.equal(plain.counts, forced.counts)
    frames = {"sink": [0], "near": [7, 8], "current": [9, 10, 11]}
    for name in force:
        if name == "own":
            rows = torch.arange(12)
            assert forced.block_mask[:, rows, 36 + rows].all()
        else:
            assert forced.block_mask.unflatten(-1, (12, 4))[..., frames[name], :].all()
    assert not torch.equal(plain.block_mask, forced.block_mask)


def test_memory_and_text_may_always_be_chosen():
    """They are no whole frames, so none of the middle frames that have to be chosen first."""
    geometry, q, k = example()
    marked = with_role(geometry, 4, "memory")
    k[:, 4 * 200 : 5 * 200] = 0
    q[:] = 1.0
    k[:, : 4 * 200] -= 0.5
    k[:, 5 * 200 :] -= 0.5
    mask = policy(num_kept_frames=3, sparsity=0.6).plan(q, k, marked).block_mask.unflatten(-1, (12, 4))
    assert mask[..., 4, :].all()


def test_where_it_is_dense_and_where_it_is_refused():
    for geometry, q, k in (example(num_frames=3), example(block_index=0)):
        assert policy().plan(q, k, geometry) is None, "there is no past, or the schedule begins densely"
    whole = AttentionGeometry.bidirectional(4, (10, 20))
    with pytest.raises(ValueError, match="no bidirectional form: use radial"):
        policy().plan(*tokens(whole)[:2], whole)
