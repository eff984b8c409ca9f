"""Deep Forcing against a slow version of its release, and the published index traces."""

import pytest
import torch
from deep_forcing import DeepForcingReference
from policy_driver import Player, make_geometry, random, spans

from longtake.cache import Pass
from longtake.cache.policies.deep_forcing import _ParticipativeState

SMALL = {"num_context_frames": 9, "num_sink_frames": 2, "num_budget_frames": 7, "num_recent_frames": 4}
GRID = (2, 2)


def policy(**changes):
    return {"policy": "deep_forcing"} | SMALL | changes


def both(settings, block, num_blocks, *, first=None, samples=(0, 1), reuse=7, given=0):
    """Outputs of all passes of ours and of the reference, and the reference of the first sample."""
    geometry = make_geometry(block, grid=GRID, layers=1, dtype=torch.float32)
    player = Player(settings, geometry, samples=samples)
    references = [
        DeepForcingReference(
            window=settings["num_context_frames"],
            sinks=settings["num_sink_frames"],
            budget=settings["num_budget_frames"],
            recent=settings["num_recent_frames"],
            compress=settings.get("compression") != "none",
            fusion=settings.get("fusion", "sum"),
            max_reuse=reuse,
            grid=GRID,
            head_dim=geometry.head_dim,
        )
        for _ in samples
    ]
    ours, theirs = [], []
    for span in spans(num_blocks, block, first=first):
        steps = () if span.index < given else (0, 1)
        passes = [Pass("denoise", span.index, span.start, span.count, step) for step in steps]
        for pass_ in [*passes, Pass("commit", span.index, span.start, span.count)]:
            q, k, v = random(0, pass_, player.geometry, samples)
            ours.append(player.cache.attend(0, q, k, v, pass_))
            theirs.append([r.step(span.start, *(x[i] for x in (q, k, v))) for i, r in enumerate(references)])
    return (
        torch.cat(ours, dim=1),
        torch.stack([torch.cat(parts) for parts in zip(*theirs, strict=True)]),
        references[0],
    )


@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize(
    ("changes", "block"),
    [
        ({}, 3),
        ({}, 4),
        ({}, 2),
        ({"fusion": "max"}, 3),
        ({"num_context_frames": 8, "num_sink_frames": 1, "num_recent_frames": 3}, 3),
        ({"num_budget_frames": 6}, 3),
        ({"num_budget_frames": 4}, 3),
        ({"num_sink_frames": 4, "num_budget_frames": 5}, 1),
        ({"num_sink_frames": 0}, 3),
        ({"compression": "none"}, 3),
        ({"compression": "none", "num_context_frames": 8, "num_sink_frames": 3}, 3),
        ({"compression": "none"}, 1),
    ],
)
def test_equals_the_release(changes, block, first):
    ours, theirs, reference = both(policy(**changes), block, 24 // block, first=first)
    assert reference.sink_start is not None, "nothing was evicted"
    assert (ours - theirs).abs().max() < 2e-5


@pytest.mark.parametrize("given", [2, 6])
@pytest.mark.parametrize("compression", ["participative", "none"])
def test_given_latents_are_committed_alone(given, compression):
    ours, theirs, _ = both(policy(compression=compression), 3, 8, given=given)
    assert (ours - theirs).abs().max() < 2e-5


def test_reuse_is_limited_as_in_the_release():
    settings = policy(num_budget_frames=8, max_reuse=2)
    ours, theirs, reference = both(settings, 3, 14, reuse=2)
    assert max(uses for _, uses in reference.kept) == 2
    assert (ours - theirs).abs().max() < 2e-5
    unlimited, _, _ = both(settings | {"max_reuse": 0}, 3, 14, reuse=2)
    assert (unlimited - theirs).abs().max() > 1e-2, "the limit makes no difference here"


def test_another_method_differs():
    _, theirs, _ = both(policy(), 3, 8)
    wrong = {"num_recent_frames": 3, "fusion": "max", "positions": "contiguous", "unify_top": True}
    for name, value in (wrong | {"compression": "none"}).items():
        ours, _, _ = both(policy(**{name: value}), 3, 8)
        assert (ours - theirs).abs().max() > 1e-2, name


def watch(settings, num_blocks, block=3):
    """(frames' worth attended, reads by role, positions of whole frames) by the block's first frame."""
    seen = {}

    def note(layer, pass_, context):
        roles = {read.role: read for read in context.reads}
        total = sum(read.stored.num_tokens for read in context.reads) // 2 + pass_.num_frames
        whole = [p for read in context.reads if read.role != "mid" for p in read.positions]
        seen[pass_.start_frame] = total, roles, whole

    player = Player(settings, make_geometry(block, layers=1), watch=note, attends=False)
    for span in spans(num_blocks, block):
        player.block(span, steps=1)
    return seen


def test_published_trace_of_compression():
    seen = watch({"policy": "deep_forcing"}, 14)
    assert [seen[start][0] for start in range(18, 42, 3)] == [21, 16, 19, 16, 19, 16, 19, 16]
    sinks = {start: roles["sink"].positions for start, (_, roles, _) in seen.items() if roles}
    assert sinks[18] == tuple(map(float, range(10)))
    for start, first in ((21, 5), (24, 5), (27, 11), (30, 11), (33, 17), (36, 17), (39, 23)):
        assert sinks[start] == tuple(map(float, range(first, first + 10))), start
    assert seen[21][1]["recent"].frames == (20,) and seen[24][1]["recent"].frames == (20, 21, 22, 23)
    assert seen[27][1]["recent"].frames == (26,)
    assert seen[21][1]["mid"].stored.num_tokens == 2 * 2
    kept = seen[21][1]["mid"].positions[..., 0]
    assert kept.min() >= 10 and kept.max() < 20, "kept tokens stay at their own frames"


def test_published_trace_of_the_deep_sink():
    seen = watch({"policy": "deep_forcing", "compression": "none"}, 11)
    for start in (21, 24, 27, 30):
        total, _, positions = seen[start]
        assert total == 21
        # A gap of 3 behind the sink.
        assert sorted(positions) == [*map(float, range(start - 21, start - 11)), *map(float, range(start - 8, start))]


def test_contiguous_alignment_closes_the_gaps():
    seen = watch({"policy": "deep_forcing", "positions": "contiguous", "unify_top": True}, 12)
    for start in (21, 27, 33):
        roles = seen[start][1]
        top = roles["mid"].positions[0, :, 0].tolist()
        assert list(roles["sink"].positions) + top[::2] + list(roles["recent"].positions) == list(
            map(float, range(start + 3 - 16, start))
        )
    positions = watch({"policy": "deep_forcing", "positions": "contiguous", "compression": "none"}, 9)[24][2]
    assert sorted(positions) == [*map(float, range(24 + 3 - 21, 24))]


def test_every_layer_and_every_video_chooses_for_itself():
    geometry = make_geometry(3, grid=GRID, layers=3)
    player = Player(policy(), geometry, samples=(0, 1))
    for span in spans(8, 3):
        player.block(span)
    held = player.cache.state._layers
    numbers = [layer.numbers[sample] for layer in held for sample in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(numbers) for b in numbers[:i])


def test_a_choice_made_without_queries_does_not_stand_in_the_way():
    """A tool may ask what the next block would read; the block still asks by its queries."""
    outputs = []
    for is_asked in (False, True):
        player = Player(policy(), make_geometry(3, grid=GRID))
        for span in spans(9, 3):
            if is_asked:
                for layer in range(2):
                    player.cache.state.select(layer, Pass("denoise", span.index, span.start, 3))
            outputs.append(player.block(span))
    assert isinstance(player.cache.state, _ParticipativeState)
    assert all(
        torch.equal(x, y) for a, b in zip(outputs[:9], outputs[9:], strict=True) for x, y in zip(a, b, strict=True)
    )
