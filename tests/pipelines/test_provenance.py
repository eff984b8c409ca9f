"""A run's record tells weights apart, and a contact sheet shows what was at the times it names."""

import numpy as np
import pytest
import torch
from PIL import Image

from longtake.pipelines import provenance
from longtake.pipelines.contact_sheet import even_frames, read_frames, write_contact_sheet
from longtake.pipelines.video_writer import VideoFormat, VideoWriter


def write_weights(folder, name="transformer/weights.safetensors", data=b"0123456789" * 100):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("limit", [1 << 28, 10])
def test_the_weights_hash_sees_every_kind_of_change(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(provenance, "FULL_HASH_BYTES", limit)
    monkeypatch.setattr(provenance, "SAMPLE_BYTES", 8)
    path = write_weights(tmp_path)
    (tmp_path / "notes.txt").write_text("not a weight")
    before = provenance.weights_hash(tmp_path)
    assert before["method"] == ("full" if limit > 1000 else "sampled")
    assert (before["num_files"], before["num_bytes"]) == (1, 1000)
    (tmp_path / "notes.txt").write_text("changed")
    assert provenance.weights_hash(tmp_path) == before
    for data in (b"1" + path.read_bytes()[1:], path.read_bytes()[:-1] + b"x", path.read_bytes() + b"0"):
        write_weights(tmp_path, data=data)
        assert provenance.weights_hash(tmp_path)["sha256"] != before["sha256"]
    path.unlink()
    write_weights(tmp_path, "transformer/renamed.safetensors")
    assert provenance.weights_hash(tmp_path)["sha256"] != before["sha256"]


def test_versions_and_machine_are_named():
    assert {"python", "longtake", "torch", "diffusers"} <= set(provenance.versions())
    machine = provenance.machine(torch.device("cpu"))
    assert machine["device"] == "cpu" and machine["num_threads"] == torch.get_num_threads()


def test_even_frames_reach_both_ends():
    assert even_frames(961, num_tiles=13) == list(range(0, 961, 80))
    assert even_frames(3, num_tiles=12) == [0, 1, 2]
    assert even_frames(1, num_tiles=12) == [0]


def test_a_contact_sheet_shows_the_frames_of_its_times(tmp_path):
    video, sheet = tmp_path / "video.mp4", tmp_path / "sheet.png"
    frames = np.zeros((61, 32, 32, 3), np.uint8) + np.arange(61, dtype=np.uint8)[:, None, None, None] * 4
    with VideoWriter(video, video_format=VideoFormat(height=32, width=32, crf=4)) as writer:
        writer.write(frames)
    shown = [frame.mean() for frame in read_frames(video, [0, 20, 40, 60])]
    assert np.abs(np.array(shown) - [0, 80, 160, 240]).max() < 3
    write_contact_sheet(video, sheet, fps=16, num_tiles=4, num_columns=2)
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    height, width = pixels.shape
    # Two rows of two: first and second above, third and fourth below; the middle of each picture tells its time.
    centres = [pixels[int(height * y), int(width * x)] for y in (0.2, 0.7) for x in (0.25, 0.75)]
    assert np.abs(np.array(centres) - [0, 80, 160, 240]).max() < 4
