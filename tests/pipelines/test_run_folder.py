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
import yaml
from run_fakes import PROMPT, FakeSession, generate, make_config, resume

from longtake.configs.families import load_family
from longtake.configs.loader import load_run
from longtake.pipelines import checkpoint
from longtake.pipelines.checkpoint import _crowded
from longtake.pipelines.run_folder import BlockLog, RunFolder, branch_point, fork_run
from longtake.pipelines.run_video import run_video
from longtake.pipelines.video_file import count_frames


def hashes(path):
    return [entry["sha256"] for entry in RunFolder(path).blocks()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: 145 frames in 13 blocks."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert generate(path).status == "finished"
    return path


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


@pytest.mark.parametrize("stop_after", [1, 2, 3, 8, 12])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, whole, stop_after):
    path = tmp_path / "run"
    done = []
    config = make_config()
    with RunFolder.create(path, config=config, record={}) as folder:
        outcome = run_video(
            folder, FakeSession(config), on_block=done.append, should_stop=lambda: len(done) + 1 == stop_after
        )
    assert (outcome.status, outcome.progress.num_done) == ("interrupted", stop_after)
    assert RunFolder(path).status == "interrupted"
    assert count_frames(path / "video.mp4") == 9 + 12 * (stop_after - 1)
    first = []
    assert resume(path, on_block=first.append).status == "finished"
    assert first[0].num_done == stop_after + 1, "a saved state is where the run goes on"
    assert_same(path, whole)


@pytest.mark.parametrize("break_at", [0, 1, 2, 5, 12])
def test_a_broken_run_goes_on_from_its_newest_state(tmp_path, whole, break_at):
    path = tmp_path / "run"
    with pytest.raises(RuntimeError):
        generate(path, break_at=break_at)
    with pytest.raises(RuntimeError):
        resume(path, break_at=break_at)
    assert resume(path).status == "finished"
    assert_same(path, whole)


def test_a_resume_without_its_state_would_differ(tmp_path, whole):
    path = tmp_path / "run"
    with pytest.raises(RuntimeError):
        generate(path, break_at=7)
    newest = RunFolder(path).checkpoints.path(6)
    state = checkpoint.Checkpoint.load(newest)
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
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        known = BlockLog.read(path / "blocks.jsonl")
        before = sum(1 for _ in known)
        while process.poll() is None and sum(1 for _ in BlockLog.read(path / "blocks.jsonl")) <= before:
            time.sleep(0.005)
        time.sleep(chooser.uniform(0, 0.12))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert hashes(path) == hashes(whole)[: len(hashes(path))]
    assert resume(path).status == "finished"
    assert_same(path, whole)


@pytest.mark.parametrize("damage", ["torn log", "stale part", "longer video", "torn video"])
def test_leftovers_of_a_kill_do_no_harm(tmp_path, whole, damage):
    path = tmp_path / "run"
    with pytest.raises(RuntimeError):
        generate(path, break_at=5)
    if damage == "torn log":
        with (path / "blocks.jsonl").open("ab") as file:
            file.write(b'{"index": 5, "sha2')
    elif damage == "stale part":
        (path / ".state.safetensors.part").write_bytes(b"half")
        (path / "states" / ".000006.safetensors.part").write_bytes(b"half")
    elif damage == "longer video":
        data = (whole / "video.mp4").read_bytes()
        with (path / "video.mp4").open("ab") as file:
            file.write(data[data.index(b"moof") - 4 :])
    else:
        with (path / "video.mp4").open("ab") as file:
            file.write(b"\x00\x00\x10\x00moofhalf")
    assert resume(path).status == "finished"
    assert_same(path, whole)


@pytest.mark.parametrize("place", ["state", "log", "rename"])
def test_a_full_disk_keeps_the_last_state(tmp_path, whole, monkeypatch, place):
    path = tmp_path / "run"
    config = make_config()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    calls = {"count": 0}

    def failing(original, after):
        def wrapper(*args, **kwargs):
            calls["count"] += 1
            if calls["count"] > after:
                raise full
            return original(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        if place == "state":
            patch.setattr(checkpoint, "save_file", failing(checkpoint.save_file, 2))
        elif place == "log":
            patch.setattr(BlockLog, "append", failing(BlockLog.append, 7))
        else:
            patch.setattr(checkpoint, "_sync", failing(checkpoint._sync, 12))
        with pytest.raises(OSError) as error, RunFolder.create(path, config=config, record={}) as folder:
            run_video(folder, FakeSession(config))
        assert error.value.errno == errno.ENOSPC
    kept = RunFolder(path).checkpoints.blocks()
    assert kept
    for block in kept:
        RunFolder(path).checkpoints.load(block)
    assert resume(path).status == "finished"
    assert_same(path, whole)


def test_states_are_bounded_and_spread(tmp_path):
    path = tmp_path / "run"
    config = make_config("output.state_every_blocks=1", "output.num_kept_states=4", seconds=30)
    generate(path, config=config)
    blocks = RunFolder(path).checkpoints.blocks()
    assert len(blocks) == 4
    assert blocks[-1] == RunFolder(path).record["video"]["num_blocks"] - 1
    assert (path / "state.safetensors").samefile(RunFolder(path).checkpoints.path(blocks[-1]))


def test_dropped_states_leave_even_gaps():
    kept = []
    for block in range(10, 2010, 10):
        kept.append(block)
        for drop in _crowded(kept, num_kept=8):
            kept.remove(drop)
    gaps = [after - before for before, after in zip([0, *kept], kept, strict=False)]
    assert len(kept) == 8 and kept[-1] == 2000
    assert max(gaps) <= 600


def test_prompt_changes_survive_a_stop(tmp_path):
    changes = "prompt_changes=[{at: 2, prompt: a blue ring}, {at: 5, prompt: two squares, event: recache}]"
    config = make_config(changes)
    generate(tmp_path / "whole", config=config)
    generate(tmp_path / "plain", config=make_config())
    with pytest.raises(RuntimeError):
        generate(tmp_path / "run", config=config, break_at=9)
    resume(tmp_path / "run")
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")
    for name in ("run", "whole"):
        assert RunFolder(tmp_path / name).record["prompt_changes"] == [
            {"block": 3, "prompt": "a blue ring", "event": "keep"},
            {"block": 7, "prompt": "two squares", "event": "recache"},
        ]
    same = [a == b for a, b in zip(hashes(tmp_path / "whole"), hashes(tmp_path / "plain"), strict=True)]
    # The first block that starts at or after 2 s, frame 32, is the one at frame 33: block 3.
    assert same == [True] * 3 + [False] * 10


@pytest.mark.parametrize("at", [0.3, 2.0, 3.0, 7.9])
def test_a_fork_shares_its_beginning(tmp_path, whole, at):
    source = RunFolder(whole)
    block, frame = branch_point(source, at=at)
    config = make_config(f"prompt_changes=[{{at: {at}, prompt: a blue ring}}]")
    with fork_run(source, tmp_path / "fork", config=config, at=at, record={}) as folder:
        states = folder.checkpoints.blocks()
        started = []
        run_video(folder, FakeSession(config), on_block=started.append)
        assert folder.record["parent"]["block"] == block
    assert states == ([max(number for number in source.checkpoints.blocks() if number <= block)] if block > 1 else [])
    assert started[0].num_done == (states[0] if states else 0) + 1, "only what the state lacks is made again"
    ours, theirs = hashes(tmp_path / "fork"), hashes(whole)
    assert ours[:block] == theirs[:block]
    assert not set(ours[block:]) & set(theirs[block:])
    assert count_frames(tmp_path / "fork" / "video.mp4") == 145
    assert frame == 9 + 12 * (block - 1)
    # The fork equals a run that had the change from the beginning.
    generate(tmp_path / "direct", config=config)
    assert ours == hashes(tmp_path / "direct")


def test_a_fork_may_be_longer(tmp_path, whole):
    config = make_config(seconds=12)
    with fork_run(RunFolder(whole), tmp_path / "fork", config=config, at=8, record={}) as folder:
        run_video(folder, FakeSession(config))
    generate(tmp_path / "direct", config=config)
    assert hashes(tmp_path / "fork") == hashes(tmp_path / "direct")
    assert count_frames(tmp_path / "fork" / "video.mp4") == 193


def test_a_fork_needs_a_place_in_the_video(tmp_path, whole):
    for at in (9.1, 1000):
        with pytest.raises(ValueError, match="has 9.06 s"):
            fork_run(RunFolder(whole), tmp_path / "fork", config=make_config(), at=at, record={})
    assert not (tmp_path / "fork").exists()


def test_nothing_is_overwritten(tmp_path, whole):
    with pytest.raises(ValueError, match="exists and nothing is overwritten: choose another --out"):
        generate(whole)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="exists"):
        generate(tmp_path / "file")
    with pytest.raises(RuntimeError):
        generate(tmp_path / "run", break_at=3)
    with pytest.raises(ValueError, match="longtake resume"):
        generate(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert generate(tmp_path / "empty").status == "finished"


def test_one_process_at_a_time(tmp_path):
    config = make_config()
    holder = RunFolder.create(tmp_path / "run", config=config, record={})
    with pytest.raises(ValueError, match="another process works in"):
        RunFolder.open(tmp_path / "run")
    holder.close()
    RunFolder.open(tmp_path / "run").close()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(ValueError, match="has no config.yaml"):
        RunFolder.open(tmp_path)


def test_damage_is_named(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(RuntimeError):
        generate(path, break_at=5)
    log = path / "blocks.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:1] + lines[2:]))
    with pytest.raises(ValueError, match="line 2 is block 2: the log is damaged"):
        resume(path)
    log.write_text("".join(lines[:2]))
    with pytest.raises(ValueError, match="the log was cut"):
        resume(path)
    log.write_text("".join(lines))
    newest = RunFolder(path).checkpoints.path(4)
    newest.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="delete it to go on from the state before it"):
        resume(path)
    newest.unlink()
    assert resume(path).status == "finished"


def test_the_configuration_is_the_runs_own(whole):
    saved = yaml.safe_load((whole / "config.yaml").read_text())
    assert saved["cache"]["policy"] == "attention_sink"
    assert saved["sampler"]["name"] == load_family("mini").sampler["name"]
    assert saved["output"]["folder"] is None
