"""longlive, infinity_rope and anchor: against slow versions of their releases, published traces, changes of prompt."""

from dataclasses import dataclass

import pytest
import torch
from policy_driver import Player, make_geometry, marked, random, read_marks, spans
from slots import CutSlots, Regions, Slots

from longtake.cache import Pass, make_policy
from longtake.cache.policies.infinity_rope import InfinityRope
from longtake.cache.policies.longlive import LongLive
from longtake.cache.recache import RecacheState

GRID = (2, 2)
SAMPLES = (0, 1)
TOLERANCE = 1e-5


class Played(Player):
    """Compares every pass with a reference, which is told of every event."""

    def __init__(self, settings, block, reference, **changes):
        super().__init__(settings, make_geometry(block, grid=GRID, layers=1), samples=SAMPLES)
        self.reference, self.error, self.encoded = reference, 0.0, []

    def one(self, layer, pass_):
        q, k, v = random(layer, pass_, self.geometry, self.samples)
        ours = self.cache.attend(layer, q, k, v, pass_)
        theirs = self.reference(pass_, q, k, v)
        self.error = max(self.error, (ours - theirs).abs().max().item())
        if pass_.kind == "encode":
            self.encoded.append((pass_.start_frame, pass_.num_frames))
        return ours


def slots_of(kind, settings, **changes):
    policy = make_policy(settings)
    shape = {"sinks": policy.num_sink_frames, "grid": GRID, "head_dim": 16}
    return kind(**{"window": policy.num_context_frames} | shape | changes)


def play(settings, block, reference, *, events=None, num_blocks=14, first=None, on_event=None):
    """Largest difference to a reference, and the frames that were encoded anew."""
    player = Played(settings, block, reference)
    for span in spans(num_blocks, block, first=first):
        event = (events or {}).get(span.index, "keep")
        player.denoise(span)
        pass_ = Pass("commit", span.index, span.start, span.count)
        player.one(0, pass_)
        if on_event is not None:
            on_event(event, span)
        player.end(span, event)
    return player.error, player.encoded


def longlive(**changes):
    return {"policy": "longlive", "num_context_frames": 9, "num_sink_frames": 3} | changes


def compare_longlive(settings, block, *, actual=None, **how):
    policy = make_policy(settings)
    slots = slots_of(Slots, settings, by_slot=policy.positions == "contiguous")

    def reference(pass_, q, k, v):
        over_sinks = pass_.kind == "encode" and not policy.global_sink
        return slots.step(pass_.start_frame, q, k, v, over_sinks=over_sinks)

    return play(actual or settings, block, reference, **how)


@pytest.mark.parametrize("positions", ["absolute", "contiguous"])
@pytest.mark.parametrize("global_sink", [True, False])
@pytest.mark.parametrize(
    ("window", "sinks", "block", "first"),
    [(9, 3, 3, None), (10, 2, 3, None), (6, 1, 1, None), (12, 4, 4, None), (11, 1, 4, 1), (7, 0, 3, None)],
)
def test_longlive_equals_its_release(positions, global_sink, window, sinks, block, first):
    settings = longlive(num_context_frames=window, num_sink_frames=sinks, positions=positions, global_sink=global_sink)
    for events in ({1: "recache", 8: "recache"}, {2: "recache", 5: "recache", 6: "recache", 11: "recache"}):
        error, encoded = compare_longlive(settings, block, first=first, events=events)
        assert error <= TOLERANCE, events
        ends = [span.start + span.count for span in spans(14, block, first=first) if span.index in events]
        assert encoded == [(end - min(window, end), min(window, end)) for end in ends]


@dataclass(frozen=True, kw_only=True)
class SeesAll(LongLive):
    """A re-cache in which frames also see those that the sinks stand for."""

    name = "sees_all"

    def start(self, geometry):
        return SeesAllState(self, geometry, num_frames=self.num_context_frames, num_sink_frames=self.num_sink_frames)


class SeesAllState(RecacheState):
    def select(self, layer, pass_, q=None):
        self._num_encoded = pass_.num_frames if pass_.kind == "encode" else self._num_encoded
        return super().select(layer, pass_, q)


@pytest.mark.parametrize(
    "wrong",
    [
        longlive(global_sink=False),
        longlive(positions="contiguous"),
        longlive(num_sink_frames=2),
        longlive(num_context_frames=10),
        SeesAll(num_context_frames=9),
    ],
)
def test_a_wrong_recache_differs(wrong):
    events = {5: "recache"}
    assert compare_longlive(longlive(), 3, events=events)[0] <= TOLERANCE
    assert compare_longlive(longlive(), 3, events=events, actual=wrong)[0] > 1e-2


def reads(settings, block, events, num_blocks, *, marks=True):
    """By first frame of a block, and of a job as ``("job", frame)``: [(frames, positions)] read, own positions."""
    seen = {}

    def watch(layer, pass_, context):
        key = ("job", pass_.start_frame) if pass_.kind == "encode" else pass_.start_frame
        frames = [frame for read in context.reads for frame in read.frames]
        if marks:
            size = read_marks(context.reads[0].stored.keys).shape[1] // len(context.reads[0].frames) if frames else 1
            found = [f for read in context.reads for f in read_marks(read.stored.keys)[0, ::size, 0, 0].tolist()]
            assert found == frames
        seen[key] = frames, [p for read in context.reads for p in read.positions], list(context.query_positions)

    player = Player(settings, make_geometry(block), content=marked, watch=watch, attends=False)
    for span in spans(num_blocks, block):
        player.block(span, event=events.get(span.index, "keep"))
    return seen, player


def test_frames_of_a_recache():
    seen, player = reads(longlive(num_context_frames=12), 3, {4: "recache"}, 7)
    assert seen["job", 3] == ([0, 1, 2], [0, 1, 2], [*range(3, 15)])
    assert seen[15] == ([0, 1, 2, *range(9, 15)], [0, 1, 2, *range(9, 15)], [15, 16, 17])
    assert player.cache.stats().tokens == {"sink": 6, "recent": 12}
    seen, _ = reads(longlive(num_context_frames=12, global_sink=False, positions="contiguous"), 3, {4: "recache"}, 9)
    assert seen["job", 3] == ([], [], [*range(12)])
    assert seen[15] == ([3, 4, 5, *range(9, 15)], [*range(9)], [9, 10, 11])
    assert seen[24] == ([3, 4, 5, *range(18, 24)], [*range(9)], [9, 10, 11])
    seen, _ = reads(longlive(num_context_frames=12), 3, {3: "recache"}, 7)
    assert seen["job", 0] == ([], [], [*range(12)]), "a video no longer than the window is encoded anew whole"
    assert seen[12][0] == [0, 1, 2, *range(6, 12)]


@pytest.mark.parametrize("block", [1, 3, 4])
def test_a_causal_recache_is_the_rollout_again(block):
    """Block by block, each seeing what the rollout would let it see of what is left."""
    settings = longlive(num_context_frames=12, recache="causal")
    seen, _ = reads(settings, block, {5: "recache"}, 8)
    end, first = 6 * block, max(6 * block - 9, 0)
    jobs = sorted(key[1] for key in seen if isinstance(key, tuple))
    if end <= 12:
        first = 0
    assert jobs[0] == first and jobs[1:] == [*range(end - block * (len(jobs) - 1), end, block)]
    for start in jobs:
        frames, positions, own = seen["job", start]
        assert frames == positions and own[0] == start
        assert frames == [*range(3 if first else 0), *range(max(first, start - 9 + block), start)][-12 + block :]
    assert seen[end][0] == [0, 1, 2, *range(end - 9 + block, end)] or end + block <= 12


def infinity(**changes):
    return {"policy": "infinity_rope", "num_context_frames": 6} | changes


def compare_infinity(settings, block, *, actual=None, **how):
    slots = slots_of(CutSlots, settings, by_slot=True)

    def on_event(event, span):
        slots.cut = event == "cut"
        if event in ("flush", "cut"):
            slots.flush()

    def reference(pass_, q, k, v):
        return slots.step(pass_.start_frame, q, k, v)

    return play(actual or settings, block, reference, on_event=on_event, **how)[0]


EVENTS = {1: "flush", 4: "cut", 6: "flush", 7: "cut", 10: "cut"}


@pytest.mark.parametrize(
    ("window", "sinks", "block", "first"),
    [(6, 1, 3, None), (9, 1, 3, None), (12, 3, 4, None), (5, 2, 1, None), (10, 1, 4, 1)],
)
def test_infinity_rope_equals_its_release(window, sinks, block, first):
    settings = infinity(num_context_frames=window, num_sink_frames=sinks)
    for events in ({}, EVENTS):
        assert compare_infinity(settings, block, events=events, first=first) <= TOLERANCE, events


@dataclass(frozen=True, kw_only=True)
class CutsForEver(InfinityRope):
    """Does not go back to slot positions after the first block of a scene."""

    name = "cuts_for_ever"

    def read(self, kept, start_frame, num_frames):
        plan = super().read(kept, start_frame, num_frames)
        if start_frame < 18:
            return plan
        return type(plan)(plan.frames, plan.positions, tuple(45.0 + i for i in range(num_frames)))


@pytest.mark.parametrize(
    "wrong", [infinity(num_flush_frames=1), infinity(cut=44), infinity(placement="paper"), CutsForEver()]
)
def test_a_wrong_cut_differs(wrong):
    assert compare_infinity(infinity(), 3, events={5: "cut"}, actual=wrong) > 1e-2


def test_published_traces_of_infinity_rope():
    seen, _ = reads(infinity(), 3, {4: "flush", 7: "cut"}, 11)
    assert seen[6] == ([0, 4, 5], [0, 1, 2], [3, 4, 5]), "the first block that does not fit"
    assert seen[15] == ([0, 13, 14], [0, 1, 2], [3, 4, 5]), "after a flush"
    assert seen[24] == ([0, 22, 23], [0, 1, 2], [45, 46, 47]), "after a cut"
    assert seen[27] == ([0, 25, 26], [0, 1, 2], [3, 4, 5])
    seen, _ = reads(infinity(num_context_frames=12), 3, {2: "flush"}, 5)
    assert seen[9] == ([0, 7, 8], [0, 1, 2], [3, 4, 5]) and seen[12][0] == [0, 7, 8, 9, 10, 11]
    seen, _ = reads(infinity(num_context_frames=12, num_sink_frames=4), 3, {0: "cut"}, 3)
    assert seen[3] == ([0, 1, 2], [0, 1, 2], [45, 46, 47]), "fewer frames than sinks"
    assert seen[6] == ([*range(6)], [*range(6)], [6, 7, 8])


def test_placement_of_the_paper():
    settings = infinity(num_context_frames=9, placement="paper", num_flush_frames=1)
    seen, _ = reads(settings, 3, {19: "flush"}, 22)
    assert seen[18] == ([0, *range(13, 18)], [0, *range(13, 18)], [18, 19, 20])
    assert seen[21] == ([0, *range(16, 21)], [0, *range(16, 21)], [21, 22, 23])
    assert seen[24] == ([0, *range(19, 24)], [0, *range(16, 21)], [21, 22, 23])
    assert seen[60] == ([0, 59], [0, 20], [21, 22, 23])
    seen, _ = reads(infinity(num_context_frames=30, placement="paper"), 3, {}, 12)
    assert seen[33][1] == [0] + [max(f - 12, 0) for f in range(7, 33)], "what is too old stands at 0"


def anchor(**changes):
    return {"policy": "anchor"} | changes


def compare_anchor(settings, *, events, actual=None, **how):
    slots = slots_of(Regions, settings, by_slot=False, window=make_policy(settings).num_window_frames)
    after = {index + 1 for index, event in events.items() if event == "recache"}

    def reference(pass_, q, k, v):
        if pass_.kind == "encode":
            return slots.step(pass_.start_frame, q, k, v, now=pass_.start_frame + pass_.num_frames)
        out = slots.step(pass_.start_frame, q, k, v)
        if pass_.kind == "commit" and pass_.block_index in after:
            slots.keep_junction(pass_.start_frame, k, v)
        return out

    return play(actual or settings, 3, reference, events=events, num_blocks=26, **how)


@pytest.mark.parametrize("window", [12, 15])
@pytest.mark.parametrize("events", [{}, {7: "recache"}, {4: "recache", 15: "recache"}, {2: "recache", 11: "recache"}])
def test_anchor_equals_its_release(window, events):
    settings = anchor(num_context_frames=window, num_refresh_blocks=0)
    error, encoded = compare_anchor(settings, events=events)
    num_frames = window - 3
    ends = [3 * (index + 1) for index in events]
    assert error <= TOLERANCE and encoded == [(end - min(num_frames, end), min(num_frames, end)) for end in ends]


@pytest.mark.parametrize(
    "wrong", [longlive(num_context_frames=12), anchor(num_position_frames=22), anchor(num_sink_frames=2)]
)
def test_a_wrong_anchor_differs(wrong):
    settings = anchor(num_refresh_blocks=0)
    assert compare_anchor(settings, events={7: "recache"}, actual=wrong)[0] > 1e-2


def test_regions_of_anchor():
    seen, player = reads(anchor(num_refresh_blocks=0), 3, {13: "recache", 33: "recache"}, 60)
    local = [*range(12, 18)]
    assert seen[39] == ([0, 1, 2, *range(33, 39)], [0, 1, 2, *local], [18, 19, 20])
    assert seen["job", 30] == ([0, 1, 2], [0, 1, 2], [*range(9, 21)])
    assert seen[48] == ([0, 1, 2, *range(42, 48)], [0, 1, 2, *local], [18, 19, 20]), "the junction is in the window"
    steady = [0, 1, 2, 6, 7, 8, *local]
    assert seen[51] == ([0, 1, 2, 42, 43, 44, *range(45, 51)], steady, [18, 19, 20])
    assert seen["job", 90] == ([0, 1, 2, 42, 43, 44], [0, 1, 2, 6, 7, 8], [*range(9, 21)])
    assert seen[108][0] == [0, 1, 2, 42, 43, 44, *range(102, 108)], "the junction before, until the next has left"
    assert seen[111] == ([0, 1, 2, 102, 103, 104, *range(105, 111)], steady, [18, 19, 20])
    assert player.cache.stats().tokens == {"sink": 6, "junction": 6, "recent": 12}


def test_a_single_prompt_refreshes_its_junction():
    seen, _ = reads(anchor(), 3, {}, 40)
    assert seen[24][0] == [0, 1, 2, *range(18, 24)]
    for start in range(27, 120, 3):
        frames, positions, own = seen[start]
        junction = 18 * ((start - 9) // 18)
        assert frames == [0, 1, 2, *range(junction, junction + 3), *range(start - 6, start)]
        assert positions == [0, 1, 2, 6, 7, 8, *range(12, 18)] and own == [18, 19, 20]
    seen, _ = reads(anchor(), 3, {1: "recache"}, 40)
    assert seen[117][0][3:6] == [6, 7, 8], "a prompt that changed is not refreshed"


@pytest.mark.parametrize("block", [1, 3, 4])
def test_a_junction_leaves_the_window_frame_by_frame(block):
    """Whatever the block, every frame of the window and of the junction is read once it has left."""
    settings = anchor(num_context_frames=14, num_refresh_blocks=0)
    seen, _ = reads(settings, block, {4: "recache"}, 20)
    anchor_frame = 5 * block
    for start in range(anchor_frame, 20 * block, block):
        oldest = start + block - 8
        window = [*range(max(3, oldest), start)]
        junction = [f for f in range(anchor_frame, anchor_frame + 3) if f < oldest]
        assert seen[start][0] == [*range(min(3, start)), *junction, *window]
        assert max(seen[start][1]) <= 20 and max(seen[start][2]) <= 20


CASES = {
    "longlive": (longlive(), "recache"),
    "longlive.moved": (longlive(global_sink=False, positions="contiguous"), "recache"),
    "longlive.causal": (longlive(recache="causal"), "recache"),
    "longlive.flush": (longlive(), "flush"),
    "sliding_window": ({"policy": "sliding_window", "num_context_frames": 9}, "recache"),
    "attention_sink": ({"policy": "attention_sink", "num_context_frames": 9}, "flush"),
    "infinity_rope.flush": (infinity(num_context_frames=9), "flush"),
    "infinity_rope.cut": (infinity(num_context_frames=9), "cut"),
    "anchor": (anchor(num_context_frames=12), "recache"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [4, 5, 6])
def test_a_save_around_an_event_continues_alike(name, cut):
    """Saved between a block and its commit, before, at and after the change of prompt."""
    settings, event = CASES[name]
    geometry = make_geometry(3, grid=GRID)
    one, two = (Player(settings, geometry, samples=SAMPLES) for _ in range(2))
    blocks = spans(16, 3)
    for span in blocks[:cut]:
        one.block(span, event=event if span.index == 5 else "keep")
    one.denoise(blocks[cut])
    two.cache.load_state_dict(one.cache.state_dict())
    for span, following in zip(blocks[cut:], blocks[cut + 1 :], strict=False):
        now = event if span.index == 5 else "keep"
        assert all(map(torch.equal, one.commit(span, now), two.commit(span, now)))
        assert all(map(torch.equal, one.denoise(following), two.denoise(following)))


@pytest.mark.parametrize("name", CASES)
def test_an_event_treats_every_video_alike(name):
    settings, event = CASES[name]
    outputs = []
    for samples in ((0, 1, 2), (1,)):
        player = Player(settings, make_geometry(3, grid=GRID), samples=samples)
        outputs.append([out for s in spans(12, 3) for out in player.block(s, event=event if s.index == 6 else "keep")])
    assert all(torch.allclose(a[1:2], b, atol=1e-6) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_an_event_changes_what_follows(name):
    settings, event = CASES[name]
    outputs = []
    for at in (6, None):
        player = Player(settings, make_geometry(3, grid=GRID), samples=(0,))
        outputs.append([player.block(s, event=event if s.index == at else "keep") for s in spans(9, 3)])
    same = [all(map(torch.equal, a, b)) for a, b in zip(*outputs, strict=True)]
    assert all(same[:7]) and not same[7]
