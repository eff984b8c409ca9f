"""`longtake attention show`: a picture of a mask and its density."""

import numpy as np
import pytest
from PIL import Image

from longtake.attention.geometry import make_geometry
from longtake.attention.policies import make_attention_policy
from longtake.scripts import main
from longtake.scripts.attention import COLOURS, MARGIN, WIDTH, _draw
from longtake.scripts.console import run_app


def call(capfd, *args):
    code = run_app(main.app, ["attention", "show", *map(str, args)])
    return code, *capfd.readouterr()


def test_radial_is_drawn_with_its_density(capfd, tmp_path):
    png = tmp_path / "deep" / "mask.png"
    code, stdout, stderr = call(capfd, "radial", "--frames", 21, "--tokens", 1560, "--out", png)
    assert code == 0, stderr
    assert "density 0.444" in stdout and str(png) in stdout
    picture = Image.open(png)
    assert picture.format == "PNG" and picture.width == WIDTH + MARGIN + 14


def test_the_last_block_of_a_cache_is_a_strip(capfd, tmp_path):
    png = tmp_path / "strip.png"
    args = ["--frames", 21, "--tokens", 1536, "--block-frames", 3, "--out", png]
    code, stdout, _ = call(capfd, "radial", *args, "--set", "decay_factor=0.2")
    assert code == 0 and "density 0.379" in stdout and "the last 3 frames ask" in stdout
    assert Image.open(png).height < 300


def test_pixels_are_what_is_read():
    geometry = make_geometry(10, (8, 11), block_frames=2)
    settings = {"policy": "window", "num_window_frames": 1, "dense_blocks": 0, "dense_layers": 0, "dense_steps": 0}
    plan = make_attention_policy(settings).plan(None, None, geometry)
    pixels = np.asarray(_draw(plan, geometry, title="").convert("RGB")).astype(int)
    top, step = MARGIN + 20, WIDTH / 10
    expected = {0: "sink", 5: None, 7: "recent", 8: "current"}
    for frame, role in expected.items():
        colour = pixels[top + 8, MARGIN + round((frame + 0.5) * step)]
        wanted = COLOURS[role] if role else "#f1f3f7"
        assert abs(colour - [int(wanted[i : i + 2], 16) for i in (1, 3, 5)]).max() < 12, frame


def test_tiles_and_everything_can_be_drawn(capfd, tmp_path):
    args = ["--frames", 6, "--tokens", 64, "--grid", "8x8", "--out", tmp_path / "tiles.png"]
    code, stdout, _ = call(capfd, "sliding_tile", *args, "--set", "tile=[2, 4, 4]", "--set", "window=[1, 1, 1]")
    assert code == 0 and "density 0.083" in stdout
    code, stdout, _ = call(capfd, "dense", *args)
    assert code == 0 and "density 1.000" in stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["light_forcing"], "chooses blocks by the tokens"),
        (["radail"], "Did you mean 'radial'"),
        (["radial", "--grid", "3x5"], "ROWSxCOLUMNS with a product of 1560"),
        (["radial", "--set", "decay"], "write key=value"),
        (["radial", "--frames", "2", "--block-frames", "3"], "--block-frames 3 is more than --frames 2"),
        (["radial", "--head", "2", "--frames", "2"], "--head 2 does not exist"),
    ],
)
def test_bad_input_is_one_line(capfd, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = call(capfd, *args)
    assert code == 2 and message in " ".join(stderr.split())
    assert not list(tmp_path.iterdir())
