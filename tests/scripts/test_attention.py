"""`longtake attention`: every backend's answer, a picture of a mask and its density; the benchmark, never a time."""

import pytest
import torch
from PIL import Image

from benchmarks import attention as measure_attention
from longtake.attention import BACKENDS
from longtake.attention.geometry import make_geometry
from longtake.attention.policies import make_attention_policy
from longtake.scripts.attention import WIDTH, _codes, _roles

EXPLAIN, SHOW = ("attention", "explain"), ("attention", "show")


def test_every_backend_has_a_line_and_one_is_taken(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, stdout, stderr = call(*EXPLAIN, "--shape", "1,768,5376,4,64", "--density", "0.4")
    assert code == 0, stderr
    assert "768 queries, 5376 keys, 4 heads x 64, float32, cpu: block plan, density 0.40" in stdout
    lines = {line.split()[0]: line for line in stdout.splitlines()[2:] if line.split()}
    assert set(BACKENDS) <= set(lines)
    assert "taken by auto" in lines["gather_sdpa"] and stdout.count("taken by auto") == 1
    assert "auto takes gather_sdpa" in stdout
    stdout = call(*EXPLAIN, "--shape", "1x768x5376x4x64")[1]
    assert ": dense" in stdout and "auto takes sdpa" in stdout
    assert "only when asked for by name" in lines["flex"] or "compiler" in lines["flex"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_here(call):
    args = ["--device", "cuda", "--capability", "12.0", "--dtype", "bfloat16", "--density", "0.3", "--per-head"]
    code, stdout, _ = call(*EXPLAIN, *args)
    assert code == 0
    assert "no CUDA device" in stdout and "not verified on cuda" in stdout
    assert "where there is cuda, it takes gather_sdpa" in stdout


def test_the_benchmark_measures_the_plans_that_are_promised(monkeypatch):
    """Densities and sizes, on small tokens; the times are whatever they are."""
    densities = {name: case.plan().density for name, case in measure_attention.CASES.items()}
    assert densities["radial, whole video"] == pytest.approx(0.601, abs=1e-3)
    assert densities["radial, whole video, long"] == pytest.approx(0.245, abs=1e-3)
    assert densities["radial, cached"] == pytest.approx(0.52, abs=0.01)
    assert densities["radial, cached, long"] == pytest.approx(0.18, abs=0.01)
    monkeypatch.setattr(measure_attention, "GRID", (4, 4))
    small = measure_attention.Case(6, True, 1.0, 1, density=0.5)
    monkeypatch.setattr(measure_attention, "CASES", {"small": small})
    before = torch.get_num_threads()
    record = measure_attention.measure_attention()
    assert torch.get_num_threads() == before
    row = record["small"]
    assert (row["queries"], row["keys"]) == (48, 96)
    assert all(figures["speedup"] > 0 for figures in row["threads"].values()) and 1 in row["threads"]


def test_radial_is_drawn_with_its_density(call, tmp_path):
    png = tmp_path / "deep" / "mask.png"
    code, stdout, stderr = call(*SHOW, "radial", "--frames", 21, "--tokens", 1560, "--out", png)
    assert code == 0, stderr
    assert "density 0.444" in stdout and str(png) in stdout
    picture = Image.open(png)
    assert picture.format == "PNG" and picture.width > WIDTH and picture.height > 500


def test_the_last_block_of_a_cache_is_a_strip(call, tmp_path):
    png = tmp_path / "strip.png"
    args = ["--frames", 21, "--tokens", 1536, "--block-frames", 3, "--out", png]
    code, stdout, _ = call(*SHOW, "radial", *args, "--set", "decay_factor=0.2")
    assert code == 0 and "density 0.379" in stdout and "the last 3 frames ask" in stdout
    assert Image.open(png).height < 300


def test_pixels_are_what_is_read():
    geometry = make_geometry(10, (8, 11), block_frames=2)
    settings = {"policy": "window", "num_window_frames": 1, "dense_blocks": 0, "dense_layers": 0, "dense_steps": 0}
    plan = make_attention_policy(settings).plan(None, None, geometry)
    codes = _codes(plan, geometry, height=176, head=0)
    roles = [0, *_roles(geometry)]
    expected = {0: "sink", 5: 0, 7: "recent", 8: "current"}
    assert {frame: roles[codes[8, round((frame + 0.5) * WIDTH / 10)]] for frame in expected} == expected


def test_tiles_and_everything_can_be_drawn(call, tmp_path):
    args = ["--frames", 6, "--tokens", 64, "--grid", "8x8", "--out", tmp_path / "tiles.png"]
    code, stdout, _ = call(*SHOW, "sliding_tile", *args, "--set", "tile=[2, 4, 4]", "--set", "window=[1, 1, 1]")
    assert code == 0 and "density 0.083" in stdout
    code, stdout, _ = call(*SHOW, "dense", *args)
    assert code == 0 and "density 1.000" in stdout


def test_nothing_is_written_unless_told_where(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = call(*SHOW, "radial", "--frames", 6, "--tokens", 64)
    assert code == 0 and "density" in stdout and not list(tmp_path.iterdir())
