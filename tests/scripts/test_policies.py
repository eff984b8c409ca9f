"""`longtake policies`: text, table and picture of a policy."""

import re

import pytest
from PIL import Image

from longtake.cache import POLICIES, make_policy
from longtake.scripts.policies import (
    _MOST_BLOCKS,
    _changed,
    _lines,
    _numbers,
    _parse_events,
    _wan_1_3b,
    draw,
    facts,
    play,
)


def test_table_has_a_line_per_policy(call):
    code, stdout, _ = call("policies")
    assert code == 0
    for name in POLICIES:
        assert re.search(rf"^{name} ", stdout, re.MULTILINE), name
    row = next(line.split() for line in stdout.splitlines() if line.startswith("attention_sink "))
    assert row[1:6] == ["3", "12", "2.59", "2.59", "yes"]
    row = next(line.split() for line in stdout.splitlines() if line.startswith("pack "))
    assert row[1] == "4" and float(row[3]) <= 4.0 and row[5] == "yes"  # published sizes; the archive has a cap
    row = next(line.split() for line in stdout.splitlines() if line.startswith("full "))
    assert row[2] == "240" and row[5].startswith("+")


def test_facts_are_those_of_the_published_sizes():
    """184,320 bytes per token over 30 layers in bfloat16; 1,560 tokens a frame."""
    row = facts(make_policy({"policy": "sliding_window", "num_context_frames": 21}))
    assert (row.context_frames, row.context_tokens) == (21, 32760)
    assert row.attended_bytes == row.stored_bytes == 18 * 1560 * 184_320 and not row.grows
    row = facts(make_policy("full"))
    assert row.grows and row.context_tokens == 240 * 1560
    assert row.grows == pytest.approx(240 * 1560 * 184_320)
    assert _wan_1_3b().device.type == "meta" and _MOST_BLOCKS > 240


def test_explain_prints_a_line_per_block_and_draws(call, tmp_path):
    png = tmp_path / "deep" / "sink.png"
    code, stdout, _ = call(
        "policies", "attention_sink", "--explain", "--blocks", 6, "--set", "num_sink_frames=4", "--png", png
    )
    assert code == 0
    assert "SSSS···RRRRR###···  sink 0-3 @ 0-3; recent 7-11 @ 4-8; block 12-14 @ 9-11" in stdout
    assert sum(bool(re.match(r" +\d+  ", line)) for line in stdout.splitlines()) == 6
    assert "attends to 12 frames (18,720 tokens)" in stdout and str(png) in stdout
    with Image.open(png) as image:
        assert image.width > 800
    assert png.stat().st_size < 60_000


def test_explain_writes_nothing_unless_told_where(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("policies", "full", "--explain", "--blocks", 2)[0] == 0
    assert not list(tmp_path.iterdir())


def test_weights_of_the_bundled_model_can_be_explained_and_fit_no_other(call, tmp_path):
    changes = [word for change in ("compressor=hr+lr", "compressor_weights=mini") for word in ("--set", change)]
    code, stdout, _ = call("policies", "pack", "--explain", "--blocks", 5, *changes, "--png", tmp_path / "pack.png")
    assert code == 0 and " job " in stdout and "mid 8-11" in stdout
    assert "made for a model of other shapes" in stdout and "needs: VAE, weights" in stdout


def test_settings_reach_into_mappings():
    assert _changed("attention_sink", ["num_sink_frames=5"])["num_sink_frames"] == 5
    assert _changed("attention_sink", ["inner.policy=full", "inner.deep.x=[1, 2]"])["inner"] == {
        "policy": "full",
        "deep": {"x": [1, 2]},
    }
    assert _parse_events(["6:recache", "9:cut"]) == {6: "recache", 9: "cut"}


def test_numbers_are_ranges():
    assert _numbers((0, 1, 2, 6, 8, 9)) == "0-2, 6, 8-9"
    assert _numbers((0.5, 2.5)) == "0.5, 2.5"
    assert _numbers((0, 2, 4, 6, 8)) == "0..8"
    assert _numbers((3, 3, 4)) == "3-4" and _numbers(()) == ""


def test_long_runs_share_letters():
    policy = make_policy({"policy": "attention_sink", "num_context_frames": 12, "num_sink_frames": 3})
    text = [line.plain for line in _lines(play(policy, num_blocks=60))]
    assert "frames, 3 to a letter" in text[0]
    assert text[-1].startswith("   59  S" + "·" * 56 + "RR#  ")


def test_a_picture_of_many_blocks_is_small(tmp_path):
    policy = make_policy("full")
    draw(policy, play(policy, num_blocks=30), tmp_path / "full.png")
    assert (tmp_path / "full.png").stat().st_size < 60_000
