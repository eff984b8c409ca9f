"""Every example runs as it stands, only shorter."""

import re
from pathlib import Path

import imageio.v3 as iio

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MAX_LINES = 40
SHORT = {"SECONDS": "1.5", "NUM_FRAMES": "12"}


def _run(name: str, folder: Path, monkeypatch, **lengths: str) -> dict[str, object]:
    """Run an example in an empty folder with its length constants shortened."""
    monkeypatch.chdir(folder)
    code = (EXAMPLES / name).read_text(encoding="utf-8")
    for constant, value in (SHORT | lengths).items():
        code = re.sub(rf"^{constant} = .*$", f"{constant} = {value}", code, flags=re.MULTILINE)
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(compile(code, name, "exec"), namespace)
    return namespace


def test_generate(tmp_path, monkeypatch, capsys):
    _run("generate.py", tmp_path, monkeypatch)
    assert iio.improps(tmp_path / "generate.mp4", plugin="FFMPEG").shape[1:] == (64, 64, 3)
    assert "25 frames of 64x64" in capsys.readouterr().out


def test_stream(tmp_path, monkeypatch):
    namespace = _run("stream.py", tmp_path, monkeypatch)
    frames = iio.imread(tmp_path / "stream.mp4", plugin="FFMPEG")
    assert frames.shape == (25, 256, 256, 3)  # four times as large, so that it can be watched
    assert namespace["session"].num_emitted_frames == 25
    assert namespace["chunk"].is_last and namespace["chunk"].prompt[0].startswith("a blue")


def test_compare_policies(tmp_path, monkeypatch, capsys):
    _run("compare_policies.py", tmp_path, monkeypatch, SECONDS="3.0")
    *rows, last = capsys.readouterr().out.splitlines()
    assert last == "first blocks equal: True"
    tokens = [int(row.split("cache")[1].split()[0]) for row in rows]
    assert len(rows) == 3 and tokens[0] > tokens[1] == tokens[2]  # full holds all, the others their six frames


def test_rollout_latents(tmp_path, monkeypatch, capsys):
    _run("rollout_latents.py", tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["frames 0-2", "frames 3-5", "frames 6-8", "frames 9-11"]


def test_sparse_wan(tmp_path, monkeypatch, capsys):
    namespace = _run("sparse_wan.py", tmp_path, monkeypatch, NUM_FRAMES="29")
    density, psnr = capsys.readouterr().out.splitlines()
    assert density.startswith("attention 'radial': density 0.") and "36 of 96 calls dense" in density
    assert psnr.startswith("PSNR to dense attention: ") and namespace["video"].shape[1] == 29
    assert not namespace["video"].equal(namespace["dense"])


def test_examples_are_short_and_all_tested():
    files_ = sorted(EXAMPLES.glob("*.py"))
    own = Path(__file__).read_text(encoding="utf-8")
    assert files_
    for path in files_:
        assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES, path.name
        assert f'"{path.name}"' in own, f"{path.name} is run by no test"
