"""Policies that average, replay or choose frames, against slow versions of them."""

from dataclasses import replace

import frame_memories as reference
import pytest
import torch
from policy_checks import CHECKS
from policy_driver import Player, make_geometry, random, spans
from policy_rows import POLICY_ROWS

from longtake.cache import Pass, make_policy

SAMPLES = (0, 1, 2)
GRID = (2, 2)
SIZE = 4
blocks = pytest.mark.parametrize(("block", "first"), [(1, None), (3, None), (4, None), (3, 1), (4, 2)])


def bursts(layer, pass_, geometry, samples):
    """Keys of a scene that stands still in some blocks and changes in others, at different times in each video."""
    q, k, v = random(layer, pass_, geometry, samples)
    frames = torch.arange(pass_.start_frame, pass_.start_frame + pass_.num_frames)
    for row, sample in enumerate(samples):
        still = torch.randn(SIZE, *k.shape[2:], generator=torch.Generator().manual_seed(sample))
        noise = torch.where((frames // 5 + sample + layer) % 3 == 0, 1.5, 0.2)[:, None, None, None]
        per_frame = k[row].unflatten(0, (-1, SIZE))
        k[row] = (still + noise * per_frame).flatten(0, 1)
    return q, k, v


def play(settings, block, first=None, *, num_blocks=16, content=random, samples=SAMPLES, layer=0):
    """Reads of one layer in every block: [(positions by video, keys, values, own position)]."""
    geometry, seen = make_geometry(block, grid=GRID), []

    def watch(at, pass_, context):
        if at != layer or pass_.kind != "denoise" or pass_.step_index:
            return
        positions = [
            read.positions[..., ::SIZE, 0].expand(len(samples), -1)
            if torch.is_tensor(read.positions)
            else torch.tensor(read.positions, dtype=torch.float64).expand(len(samples), -1)
            for read in context.reads
        ]
        empty = torch.zeros(len(samples), 0)
        keys, values = (
            torch.cat([getattr(read.stored, side) for read in context.reads], dim=1).unflatten(1, (-1, SIZE))
            if context.reads
            else empty
            for side in ("keys", "values")
        )
        seen.append((torch.cat([empty, *positions], dim=1), keys, values, context.query_positions[0]))

    player = Player(settings, geometry, content=content, samples=samples, watch=watch, attends=False)
    for span in spans(num_blocks, block, first=first):
        player.block(span)
    return seen


def committed(name, num_blocks, geometry):
    """A state and, block by block, what it read in the last layer before it was handed random keys and values."""
    state, contexts = make_policy(name).start(geometry), []
    for index in range(num_blocks):
        pass_ = Pass("commit", index, 3 * index, 3)
        context = None
        for layer in range(geometry.num_layers):
            context = state.select(layer, pass_)
            state.commit(layer, pass_, *random(layer, pass_, geometry, (0,)))
        contexts.append(context)
    return state, contexts


def frames_of(sample, block, first=None, *, num_blocks=16, content=random, layer=0):
    """The video's committed frames and its blocks, for the slow version."""
    geometry, frames, parts = make_geometry(block, grid=GRID), [], []
    for span in spans(num_blocks, block, first=first):
        pass_ = Pass("commit", span.index, span.start, span.count)
        _, k, v = content(layer, pass_, geometry, SAMPLES)
        row = SAMPLES.index(sample)
        frames += list(zip(*(x[row].double().unflatten(0, (-1, SIZE)).unbind(0) for x in (k, v)), strict=True))
        parts.append((span.start, span.count))
    return frames, parts


def difference(seen, expected, row):
    """Largest difference of one video's reads from the slow version's; infinite where positions differ."""
    worst = 0.0
    for (positions, keys, values, own), (entries, first) in zip(seen, expected, strict=True):
        if positions[row].tolist() != [position for position, _ in entries] or own != first:
            return float("inf")
        for place, (_, (k, v)) in enumerate(entries):
            for ours, theirs in ((keys, k), (values, v)):
                worst = max(worst, (ours[row, place] - theirs).abs().max().item())
    return worst


def worst(seen, reference_of, block, first=None, *, content=random, layer=0, judged=False, **options):
    """Largest difference of all videos' reads from the slow version's."""
    found = []
    for row, sample in enumerate(SAMPLES):
        frames, parts = frames_of(sample, block, first, num_blocks=len(seen), content=content, layer=layer)
        if judged:
            judge, _ = frames_of(sample, block, first, num_blocks=len(seen), content=content)
            options = options | {"judge": judge}
        found.append(difference(seen, reference_of(frames, parts, **options), row))
    return max(found)


@blocks
@pytest.mark.parametrize(("window", "uneven"), [(9, "average"), (10, "average"), (10, "replace")])
def test_ema_sink(block, first, window, uneven):
    seen = play({"policy": "ema_sink", "num_context_frames": window, "alpha": 0.7, "uneven": uneven}, block, first)
    options = {"window": window, "sinks": 3, "uneven": uneven}
    assert worst(seen, reference.ema_sink, block, first, alpha=0.7, **options) < 1e-5
    if uneven == "average":
        assert worst(seen, reference.ema_sink, block, first, alpha=0.71, **options) > 1e-3


def test_an_ema_sink_moves_in_bfloat16():
    """A thousandth of a difference is less than half a step of bfloat16: averaged in it, a sink stands still."""
    geometry = make_geometry(3, grid=GRID, layers=1, dtype=torch.bfloat16)
    state = make_policy("ema_sink").start(geometry)
    start, naive = None, None
    for index in range(300):
        pass_ = Pass("commit", index, 3 * index, 3)
        _, k, v = (x.bfloat16() for x in random(0, pass_, geometry, (0,)))
        state.commit(0, pass_, k, k, v)
        if index == 0:
            start = naive = k[:, : 3 * SIZE]
        elif index > 1:
            naive = 0.999 * naive + 0.001 * k
    read = state.select(0, Pass("denoise", 300, 900, 3)).reads[0]
    assert read.role == "sink" and read.stored.keys.dtype == torch.bfloat16
    moved, stuck = ((x.float() - start.float()).pow(2).mean().sqrt() for x in (read.stored.keys, naive))
    assert 0.24 < moved < 0.30 and stuck < 0.1  # the exact average moves by 0.26


@blocks
def test_memrope(block, first):
    settings = {"policy": "memrope", "num_context_frames": 13, "long_rate": 0.1, "short_rate": 0.5}
    options = {"window": 13, "sinks": 3, "long_rate": 0.1}
    seen = play(settings, block, first, num_blocks=36 // block, layer=1)
    assert worst(seen, reference.memrope, block, first, layer=1, short_rate=0.5, **options) < 1e-5
    assert worst(seen, reference.memrope, block, first, layer=1, short_rate=0.52, **options) > 1e-3


def test_memrope_lays_out_as_published():
    _, (*_, context) = committed("memrope", 8, make_geometry(3, grid=GRID))
    layout = [(read.role, position) for read in context.reads for position in read.positions]
    roles = ["sink"] * 3 + ["memory"] * 2 + ["recent"] * 4
    assert layout == list(zip(roles, map(float, range(9)), strict=True))
    assert context.query_positions == (9.0, 10.0, 11.0)


@blocks
@pytest.mark.parametrize("window", [9, 12])
def test_rolling_sink(block, first, window):
    seen = play({"policy": "rolling_sink", "num_context_frames": window}, block, first, num_blocks=36 // block)
    assert worst(seen, reference.rolling_sink, block, first, window=window) == 0
    sliding = play({"policy": "sliding_window", "num_context_frames": window}, block, first, num_blocks=36 // block)
    assert worst(sliding, reference.rolling_sink, block, first, window=window) > 0.1


@blocks
@pytest.mark.parametrize(
    ("dilated", "dilation", "positions"), [(3, 2, "contiguous"), (4, 5, "absolute"), (3, 1, "absolute")]
)
def test_dilated_window(block, first, dilated, dilation, positions):
    settings = {"policy": "dilated_window", "num_context_frames": 12, "positions": positions}
    settings |= {"num_dilated_frames": dilated, "dilation": dilation}
    options = {"window": 12, "dilated": dilated, "absolute": positions == "absolute"}
    seen = play(settings, block, first, num_blocks=48 // block)
    assert worst(seen, reference.dilated_window, block, first, dilation=dilation, **options) == 0
    assert worst(seen, reference.dilated_window, block, first, dilation=dilation + 1, **options) > 0.1


def test_rolling_sink_traces():
    """As published: five replayed blocks and a real one, at the places of the recent past."""
    state, contexts = committed("rolling_sink", 14, make_geometry(3))
    seen = {3 * index: [f for read in context.reads for f in read.frames] for index, context in enumerate(contexts)}
    for index, context in enumerate(contexts):
        positions = [position for read in context.reads for position in read.positions]
        assert positions == list(range(max(0, 3 * index - 18), 3 * index))
    assert seen[18] == [*range(18)] and seen[21] == [*range(3, 21)]
    assert seen[24] == [*range(6, 18), 17, 16, 15, 21, 22, 23]
    assert seen[39] == [14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 36, 37, 38][-18:]
    assert state.stats().num_tokens == 21 * 2
    assert all(len(context.reads) <= 4 for context in contexts), "frames read backwards are one read"


def relax_by_first_layer(frames, parts, judge, **options):
    """History is chosen by the keys of the first layer, whatever the layer that reads it."""
    tagged = [(k, (v, frame)) for (k, v), frame in zip(judge, frames, strict=True)]
    read = reference.relax(tagged, parts, **options)
    return [([(position, entry[1][1]) for position, entry in entries], own) for entries, own in read]


@blocks
@pytest.mark.parametrize("positions", ["contiguous", "absolute"])
@pytest.mark.parametrize(("sinks", "tail", "history", "budget"), [(2, 1, 1, 20), (1, 2, 3, 20), (2, 1, 2, 120)])
def test_relax(block, first, positions, sinks, tail, history, budget):
    window = sinks + tail + history + block
    sizes = {"num_context_frames": window, "num_sink_frames": sinks, "num_recent_frames": tail}
    settings = {"policy": "relax", "num_budget_frames": budget, "positions": positions} | sizes
    options = {"sinks": sinks, "tail": tail, "window": window, "budget": budget, "num_candidates": 4, "judged": True}
    options |= {"content": bursts, "layer": 1, "absolute": positions == "absolute"}
    seen = play(settings, block, first, num_blocks=48 // block, content=bursts, layer=1)
    assert worst(seen, relax_by_first_layer, block, first, redundancy=2.0, **options) == 0
    assert worst(seen, relax_by_first_layer, block, first, redundancy=-2.0, **options) > 0.1


def test_relax_attends_and_keeps_as_published():
    state, (*_, context) = committed("relax", 60, make_geometry(3))
    assert [read.role for read in context.reads] == ["sink", "mid", "recent"]
    assert [len(read.positions) for read in context.reads] == [2, 1, 1]
    assert state.stats().num_tokens == 117 * 2
    (history,) = context.reads[1].frames
    assert 117 <= history < 176, "of the newer half of what lies between sinks and tail"


@blocks
@pytest.mark.parametrize(
    ("similarity", "decided_by", "layer", "every"),
    [("places", "first_layer", 1, 2), ("means", "each_layer", 1, 1), ("means", "each_layer", 0, 2)],
)
def test_slow_fast(block, first, similarity, decided_by, layer, every):
    settings = {
        "policy": "slow_fast",
        "num_context_frames": 14,
        "num_sink_frames": 2,
        "num_recent_frames": 8,
        "threshold": 0.8,
        "num_blocks_per_update": every,
        "similarity": similarity,
        "decided_by": decided_by,
    }
    options = {"sinks": 2, "slow": 4, "fast": 8, "every": every, "similarity": similarity, "content": bursts}
    options |= {"layer": layer, "judged": decided_by == "first_layer"}
    seen = play(settings, block, first, num_blocks=60 // block, content=bursts, layer=layer)
    assert worst(seen, reference.slow_fast, block, first, threshold=0.8, **options) == 0
    for wrong in (2.0, -2.0):  # everything is new, nothing is
        assert worst(seen, reference.slow_fast, block, first, threshold=wrong, **options) > 0.1


@pytest.mark.parametrize("check", ["frame_first", "state_round_trip", "merged_commit", "meta_device", "equal_to_full"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ema_sink", {"uneven": "replace"}),
        ("rolling_sink", {"positions": "contiguous"}),
        ("slow_fast", {"decided_by": "each_layer", "similarity": "means", "num_blocks_per_update": 1}),
    ],
)
def test_options_keep_to_the_matrix(name, changes, check):
    row = POLICY_ROWS[name]
    CHECKS[check](replace(row, settings={**row.settings, **changes}), 3)


@pytest.mark.parametrize("name", ["ema_sink", "memrope"])
def test_averages_of_another_size_are_refused(name):
    geometry = make_geometry(3)
    state, _ = committed({"policy": name, "num_context_frames": 13}, 9, geometry)
    saved = state.state_dict() | {f"averages.0.{side}": torch.zeros(1, 2, 2, 16) for side in ("keys", "values")}
    with pytest.raises(ValueError, match="resume with the cache settings"):
        make_policy({"policy": name, "num_context_frames": 13}).start(geometry).load_state_dict(saved)
