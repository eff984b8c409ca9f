"""What every policy must keep to, crossed with block sizes; a new policy adds one row to POLICY_ROWS.

A stored frame is recognisable: frame f's key channels hold f, its value channels f + 0.5.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.attention import sdpa
from longtake.cache import POLICIES, FramePlan, Geometry, KVCache, Pass, make_policy
from longtake.cache.sliding_window import SlidingWindow

POLICY_ROWS = {
    "full": {"policy": "full"},
    "sliding_window": {"policy": "sliding_window", "num_context_frames": 12},
    "sliding_window.contiguous": {"policy": "sliding_window", "num_context_frames": 10, "positions": "contiguous"},
    "attention_sink": {"policy": "attention_sink", "num_context_frames": 12, "num_sink_frames": 3},
    "attention_sink.absolute": {
        "policy": "attention_sink",
        "num_context_frames": 11,
        "num_sink_frames": 4,
        "positions": "absolute",
    },
}
BLOCKS = (1, 3, 4)
TOKENS = 2


def geometry(block, *, batch=1, layers=2):
    return Geometry(
        num_layers=layers,
        num_heads=1,
        head_dim=6,
        num_rows=1,
        num_columns=TOKENS,
        frames_per_block=block,
        batch_size=batch,
    )


def marked(start, count, batch=1):
    frames = torch.arange(start, start + count, dtype=torch.float32).repeat_interleave(TOKENS)
    return frames[None, :, None, None].expand(batch, -1, 1, 6).contiguous()


def read_frames(context):
    """Frames, in order, that a context reads, checked token by token."""
    frames = []
    for read in context.reads:
        assert read.keys.shape[1] == TOKENS * len(read.positions)
        per_frame = read.keys.unflatten(1, (-1, TOKENS))
        assert torch.equal(read.values, read.keys + 0.5)
        assert (per_frame == per_frame[:1, :, :1]).all()
        frames += per_frame[0, :, 0, 0, 0].int().tolist()
    return frames


def run(state, block, starts, layers=2, merge=True):
    """Commit blocks and return what each read: [(frames, positions, query positions)]."""
    seen = []
    for index, start in enumerate(starts):
        pass_ = Pass("commit", index, start, block)
        k = marked(start, block)
        contexts = []
        for layer in range(layers):
            contexts.append(state.select(layer, pass_))
            frames = read_frames(contexts[-1])
            positions = [p for read in contexts[-1].reads for p in read.positions]
            state.commit(layer, pass_, k, k, k + 0.5)
            if layer == 0:
                seen.append((frames, positions, list(contexts[0].query_positions)))
            assert (frames, positions, list(contexts[-1].query_positions)) == seen[-1]
    return seen


matrix = pytest.mark.parametrize("name", POLICY_ROWS)
blocks = pytest.mark.parametrize("block", BLOCKS)


def test_every_policy_has_a_row():
    assert {row["policy"] for row in POLICY_ROWS.values()} == set(POLICIES)


@matrix
@blocks
def test_invariants_for_a_thousand_blocks(name, block):
    policy = make_policy(POLICY_ROWS[name])
    state = policy.start(geometry(block))
    num_blocks = 1000 if name != "full" else 60
    limit, sinks = POLICY_ROWS[name].get("num_context_frames"), POLICY_ROWS[name].get("num_sink_frames", 0)
    tokens = []
    for index, (frames, positions, queries) in enumerate(run(state, block, range(0, num_blocks * block, block))):
        start = index * block
        assert frames == sorted(set(frames)) and all(f < start for f in frames), "duplicated or unknown frame"
        assert len(positions) == len(frames) and len(queries) == block
        if limit is None or start + block <= limit:
            assert frames == list(range(start)), "lost a frame before anything had to go"
            assert positions + queries == list(range(start + block)), "positions differ from full attention"
        else:
            assert len(frames) + block == limit, "budget"
            assert frames[:sinks] == list(range(sinks)), "sink lost"
            assert frames[sinks:] == list(range(start - (limit - block - sinks), start)), "window"
        if limit and POLICY_ROWS[name].get("positions") == "contiguous":
            assert max(queries) < limit
        tokens.append(len(frames))
    if limit:
        assert len(set(tokens[limit:])) == 1
        assert state.stats().num_tokens == (limit - block) * TOKENS
        assert state.stats().num_bytes == state.stats().num_tokens * 6 * 4 * 2 * 2


@matrix
@pytest.mark.parametrize("start", [1023, 1024, 10_000])
def test_far_frames(name, start):
    state = make_policy(POLICY_ROWS[name]).start(geometry(3))
    seen = run(state, 3, range(start, start + 30, 3))
    assert all(torch.tensor(p + q).isfinite().all() for _, p, q in seen)
    assert seen[-1][0][-1] == start + 26


@matrix
@blocks
def test_state_round_trip_continues_alike(name, block):
    policy = make_policy(POLICY_ROWS[name])
    first, cut = policy.start(geometry(block)), 9 * block
    run(first, block, range(0, cut, block))
    saved = {k: v.clone() if torch.is_tensor(v) else v for k, v in first.state_dict().items()}
    assert all(torch.is_tensor(v) or isinstance(v, int | float | str | bool) for v in saved.values())
    second = policy.start(geometry(block))
    second.load_state_dict(saved)
    starts = range(cut, cut + 8 * block, block)
    assert run(first, block, starts) == run(second, block, starts)


@matrix
@blocks
def test_a_commit_and_the_next_block_in_one_forward(name, block):
    """Layer by layer, block i is committed and block i + 1 selected before the next layer sees block i."""
    policy = make_policy(POLICY_ROWS[name])
    apart, merged = policy.start(geometry(block)), policy.start(geometry(block))
    expected = run(apart, block, range(0, 12 * block, block))
    seen = [([], [], [float(p) for p in range(block)])]
    for index in range(11):
        commit = Pass("commit", index, index * block, block)
        following = Pass("denoise", index + 1, (index + 1) * block, block)
        k = marked(index * block, block)
        for layer in range(2):
            if index == 0:
                merged.select(layer, commit)
            merged.commit(layer, commit, k, k, k + 0.5)
            context = merged.select(layer, following)
            seen += [
                (read_frames(context), [p for r in context.reads for p in r.positions], list(context.query_positions))
            ]
    assert seen[1::2] == expected[1:] and seen[2::2] == expected[1:]


@matrix
def test_nothing_leaks_from_one_rollout_into_the_next(name):
    policy = make_policy(POLICY_ROWS[name])
    first = run(policy.start(geometry(3)), 3, range(0, 60, 3))
    assert run(policy.start(geometry(3)), 3, range(0, 60, 3)) == first


@matrix
@blocks
def test_attention_equals_full_until_something_is_evicted(name, block):
    outputs = {}
    for key in (name, "full"):
        generator = torch.Generator().manual_seed(5)
        cache = KVCache(make_policy(POLICY_ROWS[key]), geometry(block, batch=2), attention=sdpa)
        outputs[key] = []
        for index in range(10 // block):
            pass_ = Pass("commit", index, index * block, block)
            q, k, v = torch.randn(3, 2, block * TOKENS, 1, 6, generator=generator)
            outputs[key].append(cache.attend(0, q, k, v, pass_))
            cache.attend(1, q, k, v, pass_)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(outputs[name], outputs["full"], strict=True))


@matrix
def test_batch_order_does_not_matter(name):
    outputs = []
    for order in ([0, 1, 2], [2, 0, 1]):
        generator = torch.Generator().manual_seed(6)
        cache = KVCache(make_policy(POLICY_ROWS[name]), geometry(3, batch=3, layers=1), attention=sdpa)
        for index in range(8):
            q, k, v = torch.randn(3, 3, 3 * TOKENS, 1, 6, generator=generator)[:, order]
            out = cache.attend(0, q, k, v, Pass("commit", index, 3 * index, 3))
        outputs.append(out[[order.index(i) for i in range(3)]])
    assert torch.allclose(*outputs, atol=1e-6)


def trace(settings_, block, until):
    state = make_policy(settings_).start(geometry(block))
    seen = run(state, block, range(0, until + 1, block))
    return {i * block: (frames + list(range(i * block, i * block + block))) for i, (frames, _, _) in enumerate(seen)}


def test_published_index_traces():
    sink = {"policy": "attention_sink", "num_context_frames": 12, "num_sink_frames": 3}
    seen = trace(sink, 3, 18)
    assert seen[9] == [*range(12)] and seen[12] == [0, 1, 2, *range(6, 15)]
    assert seen[15] == [0, 1, 2, *range(9, 18)] and seen[18] == [0, 1, 2, *range(12, 21)]
    seen = trace({"policy": "attention_sink", "num_context_frames": 6, "num_sink_frames": 1}, 3, 12)
    assert seen[3] == [*range(6)] and seen[6] == [0, *range(4, 9)] and seen[12] == [0, *range(10, 15)]
    seen = trace({"policy": "sliding_window", "num_context_frames": 10}, 3, 12)
    assert seen[6] == [*range(9)] and seen[9] == [*range(2, 12)] and seen[12] == [*range(5, 15)]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(window=st.integers(1, 20), sinks=st.integers(0, 20), block=st.integers(1, 5))
def test_a_context_is_refused_exactly_when_it_has_no_room(window, sinks, block):
    policy = make_policy({"policy": "attention_sink", "num_context_frames": window, "num_sink_frames": sinks})
    if window >= sinks + block:
        policy.check(block)
    else:
        with pytest.raises(ValueError, match=f"use {sinks + block} or more"):
            policy.check(block)
        with pytest.raises(ValueError, match="no room"):
            policy.start(geometry(block))


@dataclass(frozen=True, kw_only=True)
class ForgetsTheNewest(SlidingWindow):
    """A policy with a mistake: it lets go of the frame just made."""

    name: ClassVar[str] = "broken"

    def plan(self, stored, start_frame, num_frames):
        plan = super().plan(stored, start_frame, num_frames)
        return FramePlan.absolute(plan.frames[:-1], start_frame, num_frames)


def test_a_broken_policy_fails_the_matrix():
    seen = run(ForgetsTheNewest(num_context_frames=12).start(geometry(3)), 3, range(0, 12, 3))
    assert seen[1][0] != [0, 1, 2]


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ValueError, match="unknown cache policy 'sink_windw'; known: full, sliding_window"):
        make_policy("sink_windw")
    with pytest.raises(ValueError, match="Did you mean 'num_context_frames'"):
        make_policy({"policy": "sliding_window", "num_contxt_frames": 3})
    with pytest.raises(ValueError, match="need a key 'policy'"):
        make_policy({"num_context_frames": 3})
    with pytest.raises(ValueError, match="positions"):
        make_policy({"policy": "attention_sink", "positions": "relative"})


def test_a_state_of_another_size_is_refused():
    state = make_policy(POLICY_ROWS["attention_sink"]).start(geometry(3))
    run(state, 3, range(0, 30, 3))
    other = make_policy({"policy": "attention_sink", "num_context_frames": 9}).start(geometry(3))
    with pytest.raises(ValueError, match="holds 9 frames, this policy stores 6"):
        other.load_state_dict(state.state_dict())
    with pytest.raises(ValueError, match="saved keys have shape"):
        make_policy(POLICY_ROWS["attention_sink"]).start(geometry(3, batch=2)).load_state_dict(state.state_dict())
