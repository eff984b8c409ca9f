"""Going on from a clip or an image on the command line: recorded, resumed, forked, refused in one line."""

import json
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from cli import PROMPT, hashes
from PIL import Image

from longtake.configs.loader import load_run
from longtake.pipelines import checkpoint, video_file
from longtake.pipelines.run_folder import BlockLog, RunFolder
from longtake.pipelines.run_video import run_video
from longtake.pipelines.video_file import VideoFormat, VideoWriter, count_frames
from longtake.scripts.console import run_app
from longtake.scripts.main import app
from longtake.scripts.running import load_pipeline, start_rollout

# 2 s of the model's 16 frames a second, as 1 + 4 k frames, are 33: three blocks.
NUM_START, NUM_MADE = 33, 48


def write_clip(path, *, num_frames=75, fps=25, seed=0):
    """3 s of noise at 96x64."""
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, 64, 96, 3), dtype=np.uint8)
    with VideoWriter(path, video_format=VideoFormat(height=64, width=96, fps=fps)) as writer:
        writer.write(frames)
    return path


def words(folder, clip, out, *more):
    start = ("--init-video", clip, "--init-seconds", 2)
    settings = ("--seconds", 3, "model.family=mini", "output.state_every_blocks=2")
    return ("generate", PROMPT, "--model", folder, *start, "--out", out, *settings, *more)


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """A run that was not interrupted."""
    folder = tmp_path_factory.mktemp("start")
    path = folder / "whole"
    assert run_app(app, [str(w) for w in words(tiny_folder, write_clip(folder / "clip.mp4"), path)]) == 0
    return path


@pytest.fixture
def clip(whole, tmp_path):
    """The same file at a place of its own."""
    path = tmp_path / "clip.mp4"
    path.write_bytes((whole.parent / "clip.mp4").read_bytes())
    return path


def test_the_video_begins_with_its_start_and_the_run_says_so(whole):
    record = json.loads((whole / "run.json").read_text())
    start = record["start"]
    assert start["kind"] == "video" and start["file"] == str(whole.parent / "clip.mp4")
    assert (start["num_file_frames"], start["file_fps"], start["size"]) == (75, 25, [64, 96])
    assert (start["num_latent_frames"], start["num_frames"], start["num_left_out"]) == (9, NUM_START, 0)
    assert start["first_file_frame"] == 74 - 32 * 25 / 16 and start["seconds"] == NUM_START / 16
    assert len(start["sha256"]) == len(start["frames_sha256"]) == 64
    assert record["video"] == {"fps": 16, "num_frames": NUM_MADE, "num_blocks": 4, "seconds": 3.0}
    entries = RunFolder(whole).blocks()
    assert [(e["index"], e["start_frame"], e["num_frames"]) for e in entries] == [(i, 9 + 3 * i, 12) for i in range(4)]
    assert count_frames(whole / "video.mp4") == NUM_START + NUM_MADE
    facts = video_file.probe(whole / "video.mp4")
    assert (facts.num_frames, facts.height, facts.width) == (NUM_START + NUM_MADE, 64, 64)
    assert RunFolder(whole).checkpoints.blocks() == [0, 2]
    config = RunFolder(whole).config
    assert (config.start.video, config.start.seconds, config.seconds) == (start["file"], 2.0, 3.0)


def test_the_same_frames_without_the_start(whole, tiny_folder, clip, tmp_path, call):
    path = tmp_path / "alone"
    code, _, stderr = call(*words(tiny_folder, clip, path, "--continuation-only"))
    assert code == 0 and "its last 33 frames (2.06 s); the video does not show them" in stderr
    assert hashes(path) == hashes(whole)
    assert count_frames(path / "video.mp4") == NUM_MADE
    ours, theirs = RunFolder(path).record["start"], RunFolder(whole).record["start"]
    assert ours["frames_sha256"] == theirs["frames_sha256"] and ours["is_included"] is False
    clip.unlink()
    fork = ("fork", path, "--at", "0.1s", "--prompt", "a blue square", "--out", tmp_path / "fork")
    assert call(*fork)[0] == 0
    assert hashes(tmp_path / "fork")[0] == hashes(whole)[0]
    assert count_frames(tmp_path / "fork" / "video.mp4") == NUM_MADE


def test_killed_before_its_first_state_it_needs_its_file(
    whole, tiny_folder, clip, tmp_path, call, refused, monkeypatch
):
    path = tmp_path / "run"

    def kill(*arguments, **settings):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", kill)
        with pytest.raises(RuntimeError, match="killed"):
            call(*words(tiny_folder, clip, path))
    assert not RunFolder(path).checkpoints.blocks()
    contents = clip.read_bytes()
    write_clip(tmp_path / "other.mp4", seed=1).replace(clip)
    refused(("resume", path), "is not the file any more", "restore it")
    clip.unlink()
    refused(("resume", path), "there is no video")
    clip.write_bytes(contents)
    assert call("resume", path)[0] == 0
    assert hashes(path) == hashes(whole) and count_frames(path / "video.mp4") == NUM_START + NUM_MADE
    assert RunFolder(path).record["start"]["frames_sha256"] == RunFolder(whole).record["start"]["frames_sha256"]


@pytest.mark.parametrize("break_at", [0, 3])
def test_a_run_killed_later_goes_on_without_the_file(whole, tiny_folder, clip, tmp_path, call, monkeypatch, break_at):
    path = tmp_path / "run"
    append = BlockLog.append

    def killed(log, entry):
        if entry["index"] == break_at:
            raise RuntimeError("killed")
        append(log, entry)

    with monkeypatch.context() as patch:
        patch.setattr(BlockLog, "append", killed)
        with pytest.raises(RuntimeError, match="killed"):
            call(*words(tiny_folder, clip, path))
    clip.unlink()
    assert call("resume", path)[0] == 0
    assert hashes(path) == hashes(whole) and count_frames(path / "video.mp4") == NUM_START + NUM_MADE


def test_a_stop_while_the_start_is_taken_in_begins_anew(whole, tmp_path, call):
    path = tmp_path / "run"
    folder = RunFolder(whole)
    config, record = folder.config, {key: folder.record[key] for key in ("weights", "machine", "start")}
    asked = []
    with RunFolder.create(path, config=config, record=record) as new:
        session = start_rollout(load_pipeline(config.model), config)
        outcome = run_video(new, session, should_stop=lambda: len(asked) == 1 or asked.append(None))
    assert (outcome.status, outcome.num_done) == ("interrupted", 0)
    assert count_frames(path / "video.mp4") == 9 and not RunFolder(path).checkpoints.blocks()
    assert call("resume", path)[0] == 0
    assert hashes(path) == hashes(whole) and count_frames(path / "video.mp4") == NUM_START + NUM_MADE


@pytest.mark.parametrize(("at", "block"), [("0.5s", 1), ("2s", 3)])
def test_a_fork_shares_the_start_and_its_times_count_from_there(whole, tmp_path, call, at, block):
    path = tmp_path / "fork"
    change = ("--prompt", "a blue square moving right", "--seconds", 4)
    assert call("fork", whole, "--at", at, *change, "--out", path)[0] == 0
    record = RunFolder(path).record
    assert record["parent"]["block"] == record["prompt_changes"][0]["block"] == block
    assert record["parent"]["seconds"] == block * 12 / 16
    assert record["start"] == RunFolder(whole).record["start"]
    ours, theirs = hashes(path), hashes(whole)
    assert ours[:block] == theirs[:block] and ours[block] != theirs[block]
    assert count_frames(path / "video.mp4") == NUM_START + 64


def test_yaml_says_the_same(tiny_folder, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(whole.parent)
    config = tmp_path / "take.yaml"
    config.write_text(f"prompt: {PROMPT}\nseconds: 3\nstart: {{video: clip.mp4, seconds: 2}}\n")
    assert load_run(config).start == RunFolder(whole).config.start
    assert load_run(config, overrides=["start.seconds=1"]).start.seconds == 1
    assert load_run(whole / "config.yaml") == RunFolder(whole).config


def audio(path):
    """A second of a tone."""
    tone = ("-f", "lavfi", "-i", "sine=duration=1", str(path))
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *tone], check=True)
    return path


def test_bad_starts_are_one_line_before_a_model_is_loaded(whole, tmp_path, refused):
    good = whole.parent / "clip.mp4"
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    Image.new("RGB", (64, 64)).save(tmp_path / "still.png")
    flat = tmp_path / "flat.mp4"
    with VideoWriter(flat, video_format=VideoFormat(height=2, width=128)) as writer:
        writer.write(np.zeros((33, 2, 128, 3), np.uint8))
    out = tmp_path / "out"

    def bad(*more, messages):
        where = ("--model", tmp_path / "none", "--out", out)
        refused(("generate", PROMPT, *where, *more), *messages)

    bad("--init-video", good, "--init-image", tmp_path / "still.png", messages=["both an image and a video"])
    bad("--init-video", tmp_path / "none.mp4", messages=["there is no video"])
    bad("--init-video", empty, messages=["cannot read", "empty.mp4"])
    bad("--init-video", whole / "run.json", messages=["cannot read"])
    bad("--init-video", audio(tmp_path / "tone.wav"), messages=["no video stream"])
    bad("--init-video", flat, messages=["128x2", "crop it yourself"])
    bad("--init-video", good, "--init-seconds", "0.3", messages=["takes 9", "0.56 s"])
    bad("--init-video", good, "--init-seconds", "-1", messages=["seconds=-1"])
    bad("--init-seconds", "2", messages=["neither an image nor a video"])
    bad("--continuation-only", messages=["neither an image nor a video"])
    bad("--init-image", tmp_path / "still.png", messages=["first block takes 3", "9 frames"])
    bad("--init-image", tmp_path / "still.png", "--init-seconds", "2", messages=["an image has no length"])
    bad("--init-image", good, messages=["as an image"])
    bad("--init-image", tmp_path / "none.png", messages=["there is no image"])
    bad("start.vidio=x", messages=["Did you mean 'video'"])
    bad("--init-video", good, messages=["does not exist"])
    assert not out.exists()
