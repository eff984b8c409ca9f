"""A run that is stopped in any way goes on as if nothing had happened; forks share their beginning."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_fakes
from run_fakes import PROMPT, FakeSession, generate, hashes, make_config, resume

from longtake.configs.loader import load_run
from longtake.pipelines import checkpoint, run_folder
from longtake.pipelines.run_folder import BlockLog, RunFolder
from longtake.pipelines.run_video import run_video
from longtake.pipelines.video_file import count_frames


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: 145 frames in 13 blocks."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert generate(path).status == "finished"
    return path


@pytest.fixture
def broken(tmp_path):
    """Makes a run that breaks at a block."""

    def make(break_at, **settings):
        with pytest.raises(RuntimeError, match="broken on purpose"):
            generate(tmp_path / "run", break_at=break_at, **settings)
        return tmp_path / "run"

    return make


def assert_same(path, whole):
    assert hashes(path) == hashes(whole)
    assert count_frames(path / "video.mp4") == count_frames(whole / "video.mp4") == 145
    assert RunFolder(path).status == "finished"


def test_a_finished_run_has_everything(whole):
    record = json.loads((whole / "run.json").read_text())
    assert (record["status"], record["prompt"], record["seed"]) == ("finished", PROMPT, 0)
    assert record["video"] == {"fps": 16, "num_frames": 145, "num_blocks": 13, "seconds": 145 / 16}
    assert [block["index"] for block in record["blocks"]] == list(range(13))
    assert sum(block["num_frames"] for block in record["blocks"]) == 145
    assert len(set(hashes(whole))) == 13
    assert load_run(whole / "config.yaml") == make_config()
    assert not list(whole.rglob("*.part"))


def test_the_hash_is_of_the_pixels(whole):
    session = FakeSession(make_config())
    expected = [hashlib.sha256(session.next_block().uint8().tobytes()).hexdigest() for _ in range(13)]
    assert hashes(whole) == expected


@pytest.mark.parametrize("stop_after", [1, 2, 7])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, whole, stop_after):
    path, config = tmp_path / "run", make_config()
    done, first = [], []
    with RunFolder.create(path, config=config, record={}) as folder:
        outcome = run_video(
            folder, FakeSession(config), on_block=done.append, should_stop=lambda: len(done) + 1 == stop_after
        )
    assert (outcome.status, outcome.num_done) == ("interrupted", stop_after)
    assert RunFolder(path).status == "interrupted"
    assert count_frames(path / "video.mp4") == 9 + 12 * (stop_after - 1)
    assert resume(path, on_block=first.append).status == "finished"
    assert first[0].num_done == stop_after + 1, "a saved state is where the run goes on"
    assert_same(path, whole)


@pytest.mark.parametrize("break_at", [0, 5, 12])
def test_a_run_that_breaks_twice_goes_on_from_its_newest_state(broken, whole, break_at):
    path = broken(break_at)
    with pytest.raises(RuntimeError):
        resume(path, break_at=break_at)
    assert resume(path).status == "finished"
    assert_same(path, whole)


def test_a_resume_without_its_state_would_differ(broken, whole):
    path = broken(7)
    state = RunFolder(path).checkpoints.load(6)
    wrong = dict(vars(state), tensors={"memory": state.tensors["memory"] + 1e-9})
    RunFolder(path).checkpoints.save(checkpoint.Checkpoint(**wrong))
    with pytest.raises(ValueError, match="block 6 came out different"):
        resume(path)
    assert resume(path, allow_changes=True).status == "finished"
    assert hashes(path)[:6] == hashes(whole)[:6]
    assert not set(hashes(path)[6:]) & set(hashes(whole)[6:])


KILLED = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
import run_fakes
path = Path({path!r})
(run_fakes.resume if path.exists() else run_fakes.generate)(path, delay=0.02)
"""


def test_kills_at_random_moments(tmp_path, whole):
    """Kill the process group, the encoder included, until a run gets through."""
    path = tmp_path / "run"
    script = KILLED.format(here=str(Path(run_fakes.__file__).parent), path=str(path))
    chooser = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        before = len(hashes(path))
        while process.poll() is None and len(hashes(path)) <= before:
            time.sleep(0.005)
        time.sleep(chooser.uniform(0, 0.12))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert hashes(path) == hashes(whole)[: len(hashes(path))]
    assert resume(path).status == "finished"
    assert_same(path, whole)


@pytest.mark.parametrize("damage", ["torn log", "stale parts", "longer video", "torn video"])
def test_leftovers_of_a_kill_do_no_harm(broken, whole, damage):
    path = broken(5)
    video = (whole / "video.mp4").read_bytes()
    leftovers = {
        "torn log": {"blocks.jsonl": b'{"index": 5, "sha2'},
        "stale parts": {".state.safetensors.part": b"half", "states/.000006.safetensors.part": b"half"},
        "longer video": {"video.mp4": video[video.index(b"moof") - 4 :]},
        "torn video": {"video.mp4": b"\x00\x00\x10\x00moofhalf"},
    }
    for name, data in leftovers[damage].items():
        with (path / name).open("ab") as file:
            file.write(data)
    assert resume(path).status == "finished"
    assert_same(path, whole)


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [(checkpoint, "save_file", 2), (BlockLog, "append", 7), (checkpoint, "_sync", 12)],
    ids=["state", "log", "rename"],
)
def test_a_full_disk_keeps_the_last_state(tmp_path, whole, monkeypatch, owner, name, after):
    path, calls, original = tmp_path / "run", [], getattr(owner, name)

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(OSError) as error:
            generate(path)
        assert error.value.errno == errno.ENOSPC
    kept = RunFolder(path).checkpoints
    assert kept.blocks() and all(kept.load(block) for block in kept.blocks())
    assert resume(path).status == "finished"
    assert_same(path, whole)


def test_states_are_bounded_and_spread(tmp_path):
    path = tmp_path / "run"
    config = make_config("output.state_every_blocks=1", "output.num_kept_states=4", seconds=30)
    generate(path, config=config)
    blocks = RunFolder(path).checkpoints.blocks()
    gaps = [after - before for before, after in zip([0, *blocks], blocks, strict=False)]
    assert len(blocks) == 4 and max(gaps) <= 16, "an even gap is 10"
    assert blocks[-1] == RunFolder(path).record["video"]["num_blocks"] - 1 == 40
    assert (path / "state.safetensors").samefile(RunFolder(path).checkpoints.path(blocks[-1]))


def test_prompt_changes_survive_a_stop(broken, tmp_path, whole):
    changes = "prompt_changes=[{at: 2, prompt: a blue ring}, {at: 5, prompt: two squares, event: recache}]"
    config = make_config(changes)
    generate(tmp_path / "changed", config=config)
    resume(broken(9, config=config))
    assert hashes(tmp_path / "run") == hashes(tmp_path / "changed")
    for name in ("run", "changed"):
        assert RunFolder(tmp_path / name).record["prompt_changes"] == [
            {"block": 3, "prompt": "a blue ring", "event": "keep"},
            {"block": 7, "prompt": "two squares", "event": "recache"},
        ]
    same = [a == b for a, b in zip(hashes(tmp_path / "changed"), hashes(whole), strict=True)]
    # The first block that starts at or after 2 s, frame 32, is the one at frame 33: block 3.
    assert same == [True] * 3 + [False] * 10


@pytest.mark.parametrize(("at", "seconds", "num_frames"), [(0.3, 9, 145), (2.0, 9, 145), (7.9, 12, 193)])
def test_a_fork_shares_its_beginning_and_equals_a_run_that_had_its_change(tmp_path, whole, at, seconds, num_frames):
    source = RunFolder(whole)
    block, frame = source.branch_point(at=at)
    config = make_config(f"prompt_changes=[{{at: {at}, prompt: a blue ring}}]", seconds=seconds)
    with source.fork(tmp_path / "fork", config=config, at=at, record={}) as folder:
        states = folder.checkpoints.blocks()
        started = []
        run_video(folder, FakeSession(config), on_block=started.append)
        assert folder.record["parent"]["block"] == block
    assert states == ([max(number for number in source.checkpoints.blocks() if number <= block)] if block > 1 else [])
    assert started[0].num_done == (states[0] if states else 0) + 1, "only what the state lacks is made again"
    ours, theirs = hashes(tmp_path / "fork"), hashes(whole)
    assert ours[:block] == theirs[:block]
    assert not set(ours[block:]) & set(theirs[block:])
    assert count_frames(tmp_path / "fork" / "video.mp4") == num_frames
    assert frame == 9 + 12 * (block - 1)
    generate(tmp_path / "direct", config=config)
    assert ours == hashes(tmp_path / "direct")


def test_a_fork_needs_a_place_in_the_video(tmp_path, whole):
    for at in (9.1, 1000):
        with pytest.raises(ValueError, match="has 9.06 s"):
            RunFolder(whole).fork(tmp_path / "fork", config=make_config(), at=at, record={})
    assert not (tmp_path / "fork").exists()


def test_nothing_is_overwritten(broken, tmp_path, whole):
    (tmp_path / "file").write_text("precious")
    for place, message in (
        (whole, "exists and nothing is overwritten: choose another --out"),
        (tmp_path / "file", "exists"),
        (broken(3), "longtake resume"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(place)
    (tmp_path / "empty").mkdir()
    assert generate(tmp_path / "empty").status == "finished"


def test_what_is_no_run_or_another_processs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(ValueError, match="has no config.yaml"):
        RunFolder.open(tmp_path)
    holder = RunFolder.create(tmp_path / "run", config=make_config(), record={})
    with pytest.raises(ValueError, match="another process works in"):
        RunFolder.open(tmp_path / "run")
    holder.close()
    RunFolder.open(tmp_path / "run").close()


def test_damage_is_named(broken):
    path = broken(5)
    log, newest = path / "blocks.jsonl", RunFolder(path).checkpoints.path(4)
    lines = log.read_text().splitlines(keepends=True)
    for kept, message in ((lines[:1] + lines[2:], "line 2 is block 2: the log is damaged"), (lines[:2], "was cut")):
        log.write_text("".join(kept))
        with pytest.raises(ValueError, match=message):
            resume(path)
    log.write_text("".join(lines))
    newest.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="delete it to go on from the state before it"):
        resume(path)
    newest.unlink()
    assert resume(path).status == "finished"


@pytest.mark.parametrize("limit", [1 << 28, 10])
def test_the_weights_hash_sees_every_kind_of_change(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(run_folder, "_FULL_HASH_BYTES", limit)
    monkeypatch.setattr(run_folder, "_SAMPLE_BYTES", 8)
    path, data = tmp_path / "transformer" / "weights.safetensors", b"0123456789" * 100
    path.parent.mkdir()
    path.write_bytes(data)
    before = run_folder.weights_hash(tmp_path)
    assert before["method"] == ("full" if limit > 1000 else "sampled")
    assert (before["num_files"], before["num_bytes"]) == (1, 1000)
    (tmp_path / "notes.txt").write_text("not a weight")
    assert run_folder.weights_hash(tmp_path) == before
    changes = {path: [b"1" + data[1:], data[:-1] + b"x", data + b"0"], path.with_stem("renamed"): [data]}
    for file, contents in changes.items():
        path.unlink()
        for changed in contents:
            file.write_bytes(changed)
            assert run_folder.weights_hash(tmp_path)["sha256"] != before["sha256"]
