"""Promises of every policy, crossed with block sizes and storage wrappers; rows are in policy_rows.py.

A stored token is recognisable: its channels say which frame, place, video and head it belongs to.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_checks import CHECKS, WRAPPERS, check_far_frames, groups_of, verdict
from policy_driver import Player, make_geometry, marked, read_marks, spans
from policy_rows import POLICY_ROWS, Row

from longtake.cache import POLICIES, FramePlan, make_policy
from longtake.cache.frames import FrameState, ends
from longtake.cache.policies.attention_sink import AttentionSink
from longtake.cache.policies.sliding_window import SlidingWindow

BLOCKS = (1, 3, 4)
# Wrappers change how tokens are kept, not which: one row of each policy stands for its variants.
CASES = [
    (name, block, wrapper, check)
    for name in POLICY_ROWS
    for block in BLOCKS
    for wrapper in WRAPPERS
    if wrapper == "plain" or "." not in name
    for check in CHECKS
]
FEW = 100  # cases that are not worth another process

matrix = pytest.mark.parametrize("name", POLICY_ROWS)
blocks = pytest.mark.parametrize("block", BLOCKS)


def test_every_policy_has_a_row():
    assert {make_policy(row.settings).name for row in POLICY_ROWS.values()} == set(POLICIES) - set(WRAPPERS)


@pytest.fixture(scope="module")
def verdicts(request):
    """Verdicts of the selected cases, worked out by one process per core."""
    chosen = [i.callspec.params["case"] for i in request.session.items if "verdicts" in getattr(i, "fixturenames", ())]
    if len(chosen) < FEW:
        return {case: verdict(case) for case in chosen}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        os.cpu_count(), mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return dict(zip(chosen, pool.map(verdict, chosen, chunksize=10), strict=True))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_matrix(case, verdicts):
    assert verdicts[case] is None, verdicts[case]


def test_every_policy_meets_every_wrapper():
    wrapped = {make_policy(POLICY_ROWS[name].settings).name for name, _, wrapper, _ in CASES if wrapper != "plain"}
    assert wrapped == set(POLICIES) - set(WRAPPERS)


@matrix
def test_far_frames(name):
    check_far_frames(POLICY_ROWS[name], 4)


def trace(settings_, block, until):
    """Frames that each block attends to, by its first frame."""
    seen = {}

    def watch(layer, pass_, context):
        own = range(pass_.start_frame, pass_.start_frame + pass_.num_frames)
        (group,) = groups_of(context)
        frames = [frame for read in group.reads for frame in read_marks(read.stored.keys)[0, ::2, 0, 0].tolist()]
        assert frames == [frame for read in group.reads for frame in read.frames]
        seen[pass_.start_frame] = frames + list(own)

    player = Player(settings_, make_geometry(block), content=marked, watch=watch, attends=False)
    for span in spans(until // block + 1, block):
        player.block(span)
    return seen


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
            policy.start(make_geometry(block))


@dataclass(frozen=True, kw_only=True)
class ForgetsTheNewest(SlidingWindow):
    """Lets go of the frame just made."""

    def keep(self, stored, start_frame, num_frames):
        return super().keep(stored, start_frame, num_frames)[:-1]


@dataclass(frozen=True, kw_only=True)
class LosesItsSink(AttentionSink):
    """Lets go of the sink after a while."""

    def keep(self, stored, start_frame, num_frames):
        if start_frame > 700:
            stored = stored[1:]
        return super().keep(stored, start_frame, num_frames)


@dataclass(frozen=True, kw_only=True)
class Grows(SlidingWindow):
    """Its window gets a frame longer every hundred frames."""

    def num_read_frames(self, frames_per_block):
        return None

    def keep(self, stored, start_frame, num_frames):
        return ends(stored, 0, self.num_context_frames - num_frames + start_frame // 100)


@dataclass(frozen=True, kw_only=True)
class ReadsTwice(SlidingWindow):
    """Reads the oldest frame a second time in the place of the next."""

    def read(self, kept, start_frame, num_frames):
        plan = super().read(kept, start_frame, num_frames)
        return FramePlan((*plan.frames[:1], *plan.frames[:1], *plan.frames[2:]), plan.positions, plan.query_positions)


@dataclass(frozen=True, kw_only=True)
class Drifts(SlidingWindow):
    """Positions half a frame past the last one."""

    def read(self, kept, start_frame, num_frames):
        plan = super().read(kept, start_frame, num_frames)
        return FramePlan(plan.frames, plan.positions, tuple(p + 0.5 for p in plan.query_positions))


@dataclass(frozen=True, kw_only=True)
class WithState(SlidingWindow):
    """A window whose state is a faulty one."""

    state: type
    num_context_frames: int = 12

    def start(self, geometry):
        return self.state(self, geometry)


class StoresInDenoising(FrameState):
    """A denoising pass leaves its queries behind."""

    def select(self, layer, pass_, q=None):
        context = super().select(layer, pass_, q)
        if pass_.kind == "denoise" and q is not None and q.device.type != "meta":
            for read in context.reads:
                read.stored.keys[:, :1] += 0.01 * q[:, :1]
        return replace(context, holds="pass")


class MixesTheBatch(FrameState):
    """Every video gets the mean of all."""

    def commit(self, layer, pass_, q, k, v):
        super().commit(layer, pass_, q, k.mean(0, keepdim=True).expand_as(k), v)


class MixesHeads(FrameState):
    """Heads change places."""

    def commit(self, layer, pass_, q, k, v):
        super().commit(layer, pass_, q, k.flip(2), v.flip(2))


class Leaks(FrameState):
    """Remembers across rollouts."""

    count = 0

    def commit(self, layer, pass_, q, k, v):
        Leaks.count += 1
        super().commit(layer, pass_, q, k, v + 1e-3 * Leaks.count)


class SavesHalf(FrameState):
    """Forgets the values of a saved state."""

    def load_state_dict(self, state):
        super().load_state_dict({k: v * 0 if k.startswith("values") else v for k, v in state.items()})


class NeedsTheLastLayer(FrameState):
    """Reads depend on all layers having committed, and it does not say so."""

    done = True

    def select(self, layer, pass_, q=None):
        context = super().select(layer, pass_, q)
        positions = tuple(p - 0.25 * (not self.done) for p in context.query_positions)
        return replace(context, query_positions=positions)

    def commit(self, layer, pass_, q, k, v):
        super().commit(layer, pass_, q, k, v)
        self.done = layer == self.geometry.num_layers - 1


BROKEN = {
    "a_thousand_blocks": [
        ForgetsTheNewest(num_context_frames=12),
        LosesItsSink(num_context_frames=12, num_sink_frames=3, positions="absolute"),
        Grows(num_context_frames=12),
        ReadsTwice(num_context_frames=12),
        Drifts(num_context_frames=12),
        WithState(state=MixesHeads),
    ],
    "state_round_trip": [WithState(state=SavesHalf), WithState(state=Leaks)],
    "merged_commit": [WithState(state=NeedsTheLastLayer)],
    "second_rollout": [WithState(state=Leaks)],
    "denoising_changes_nothing": [WithState(state=StoresInDenoising)],
    "equal_to_full": [ForgetsTheNewest(num_context_frames=12), WithState(state=MixesHeads)],
    "batch_order": [WithState(state=MixesTheBatch)],
}


@blocks
@pytest.mark.parametrize(
    ("check", "policy"),
    [
        pytest.param(check, policy, id=f"{check}-{getattr(policy, 'state', type(policy)).__name__}")
        for check, policies in BROKEN.items()
        for policy in policies
    ],
)
def test_a_broken_policy_fails_the_matrix(check, policy, block):
    row = Row(settings=policy, limit=12, sinks=getattr(policy, "num_sink_frames", 0))
    with pytest.raises(AssertionError):
        CHECKS[check](row, block)


def test_a_state_of_another_size_is_refused():
    sink = POLICY_ROWS["attention_sink"].settings
    player = Player(sink, make_geometry(3))
    for span in spans(10, 3):
        player.block(span)
    state = player.cache.state.state_dict()
    other = make_policy({"policy": "attention_sink", "num_context_frames": 9}).start(make_geometry(3))
    with pytest.raises(ValueError, match="holds 9 frames, this policy stores 6"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="saved keys are"):
        make_policy(sink).start(make_geometry(3, batch=2)).load_state_dict(state)
    with pytest.raises(ValueError, match="holds 30 frames, this policy stores 21"):
        make_policy("deep_forcing").start(make_geometry(3)).load_state_dict({"num_frames": 30})
    one, two = (make_policy("slow_fast").start(make_geometry(3, batch=batch)) for batch in (1, 2))
    with pytest.raises(ValueError, match="resume with the settings and batch"):
        two.load_state_dict(one.state_dict())
