"""Static and dynamic heads against a slow version, and head maps."""

import json
from pathlib import Path

import pytest
import torch
from forcing_kv import ForcingKVReference
from policy_driver import Player, make_geometry, random, spans

from longtake.cache import Pass, make_policy
from longtake.cache.policies.forcing_kv import HeadMap, _find_head_map, _shipped_maps, format_head_map

GRID = (3, 4)
HEADS = ((), (1,), ())


def both(block, *, first=None, num_blocks=7, grid=GRID, segments=6, heads=HEADS, **settings):
    """Outputs of all layers and passes of ours, and of the reference."""
    policy = {"policy": "forcing_kv", "heads": [list(row) for row in heads]} | settings
    player = Player(policy, make_geometry(block, grid=grid, layers=3), samples=(0, 1))
    given = {
        "sinks": settings.get("num_sink_frames", 1),
        "recent": settings.get("num_recent_frames", 1),
        "kept": settings.get("num_dynamic_frames", 1),
        "segments": segments,
        "grid": grid,
    }
    layers = [
        [ForcingKVReference(static, is_split=layer > 0, **given) for _ in (0, 1)] for layer, static in enumerate(heads)
    ]
    ours, theirs = [], []
    for span in spans(num_blocks, block, first=first):
        for pass_ in (
            Pass("denoise", span.index, span.start, span.count),
            Pass("commit", span.index, span.start, span.count),
        ):
            for layer, samples in enumerate(layers):
                q, k, v = random(layer, pass_, player.geometry, (0, 1))
                ours.append(player.cache.attend(layer, q, k, v, pass_))
                outputs = [r.attend(span.start, q[i], k[i], v[i]) for i, r in enumerate(samples)]
                theirs.append(torch.stack(outputs))
                if pass_.kind == "commit":
                    for i, r in enumerate(samples):
                        r.commit(span.start, k[i], v[i], leader=layers[1][i] if layer == 2 else None)
    return torch.cat(ours, dim=1), torch.cat(theirs, dim=1)


@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize(
    ("block", "settings"),
    [
        (3, {}),
        (1, {}),
        (4, {}),
        (3, {"num_recent_frames": 2, "num_sink_frames": 2}),
        (3, {"num_dynamic_frames": 2}),
        (2, {"num_recent_frames": 4}),
        (3, {"num_sink_frames": 0}),
        (3, {"num_segments": 5, "segments": 4}),
    ],
)
def test_equals_the_slow_version(block, settings, first):
    ours, theirs = both(block, first=first, **settings)
    assert (ours - theirs).abs().max() < 2e-5


def test_other_heads_or_segments_differ():
    _, theirs = both(3)
    for wrong in ({"heads": ((), (0,), ())}, {"num_segments": 3, "segments": 6}, {"num_plain_layers": 0}):
        ours, _ = both(3, **wrong)
        assert (ours - theirs).abs().max() > 1e-2, wrong


def test_static_heads_store_less():
    states = {}
    for name, heads in (("static", [[], [0, 1]]), ("dynamic", [[], []]), ("both", [[], [1]])):
        player = Player({"policy": "forcing_kv", "heads": heads}, make_geometry(3, grid=GRID))
        for span in spans(5, 3):
            player.block(span)
        states[name] = player.cache.state.stats()
    size, per_head = GRID[0] * GRID[1], 2 * 16 * 4
    assert states["static"].num_bytes == size * per_head * (2 * 2 + 2 * 2)
    assert states["both"].num_bytes == size * per_head * (2 * 2 + 2 + 3)
    assert states["dynamic"].num_bytes == size * per_head * (2 * 2 + 2 * 3)
    assert states["both"].num_tokens == 3 * size


def test_the_sink_moves_up_where_positions_are_contiguous():
    player = Player(
        {"policy": "forcing_kv", "heads": [[], [1]], "positions": "contiguous"}, make_geometry(3), attends=False
    )
    for span in spans(9, 3):
        player.block(span)
    context = player.cache.state.select(1, Pass("denoise", 9, 27, 3))
    by_role = {read.role: read for read in context.groups[1].reads}
    assert by_role["sink"].positions == (22.0,) and by_role["sink"].frames == (0,)
    assert by_role["mid"].frames == (23, 24, 25) and by_role["recent"].frames == (26,)
    assert player.cache.state.stats().positions[0] > 15


def test_shipped_maps_fit_their_models():
    maps = _shipped_maps()
    published = maps["self_forcing"]
    assert (published.num_layers, published.num_heads, published.num_static) == (30, 12, 134)
    assert _find_head_map("auto", 30, 12) == published
    config = json.loads((Path(__file__).parents[2] / "models/mini/transformer/config.json").read_text())
    mini = _find_head_map("auto", config["num_layers"], config["num_attention_heads"])
    assert mini == maps["mini"] and 0 < mini.num_static < mini.num_layers * mini.num_heads
    assert published.dynamic(13) == tuple(range(11)) and published.static[13] == (11,)


def test_maps_are_read_from_files(tmp_path):
    found = HeadMap(((0,), (), (1, 2)), 3)
    path = tmp_path / "heads.yaml"
    path.write_text(format_head_map(found, "a test\nof two lines"))
    assert _find_head_map(str(path), 3, 3) == found
    theirs = {
        "num_heads": 3,
        "layers": [{"layer_idx": i, "local_head": list(row)} for i, row in enumerate(found.static)],
    }
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(theirs))
    assert _find_head_map(str(path), 3, 3) == found


def test_errors_name_the_profiler(tmp_path):
    geometry = make_geometry(3, layers=3)
    for name, message in (
        ("auto", "no head map is shipped for a model of 3 layers of 2 heads.*profile-heads"),
        ("self_forcing", "is of 30 layers of 12 heads, this model has 3 layers of 2 heads.*profile-heads"),
        ("nowhere", "head_map='nowhere' is no file.*profile-heads"),
    ):
        with pytest.raises(ValueError, match=message):
            make_policy({"policy": "forcing_kv", "head_map": name}).start(geometry)
    with pytest.raises(ValueError, match="heads lists 1 layers, this model has 3"):
        make_policy({"policy": "forcing_kv", "heads": [[0]]}).start(geometry)
    with pytest.raises(ValueError, match=r"static heads \[2\] of layer 1 .* 0 to 1"):
        make_policy({"policy": "forcing_kv", "heads": [[], [2], []]}).start(geometry)
    path = tmp_path / "other.yaml"
    path.write_text("prompt: a cat")
    with pytest.raises(ValueError, match="is no head map"):
        _find_head_map(str(path), 3, 2)
