"""``longtake evaluate`` as a user meets it: the same numbers however the work is done, and errors in one line."""

import json
import os
import shutil
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from cli import PROGRAM, assert_one_line
from cli import run as run_program
from cli import start as start_program

from longtake.pipelines.video_file import VideoFormat, VideoWriter

EVALUATE = (*PROGRAM, "evaluate")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module", *EVALUATE[1:])
PROMPTS = "a red circle moving left\na blue square\na navy circle over\n"
CACHES = ("sliding_window", "attention_sink")
WEIGHT_FREE = ("--metrics", "weight_free", "--out", "out")


def start(*words, cwd):
    return start_program("run", *words, cwd=cwd, program=EVALUATE)


def run(*words, cwd, program=EVALUATE):
    """Run the program to a good end; returns what it wrote on standard error."""
    code, _, stderr = run_program("run", *words, cwd=cwd, program=program)
    assert code == 0, stderr
    return stderr


def read(*parts):
    """A JSON file."""
    return json.loads(Path(*parts).read_text())


def results(folder):
    """The bytes of a run's results, without the commit that the program was at."""
    text = (folder / "results.json").read_text()
    commit = json.loads(text)["tool"]["git"]
    return text.replace(json.dumps(commit), "null")


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def write_clip(path, *, shift, num_frames=24, fps=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    with VideoWriter(path, video_format=VideoFormat(height=32, width=32, fps=fps, crf=12, threads=1)) as writer:
        writer.write(np.stack([np.roll(picture, shift * index, axis=1) for index in range(num_frames)]))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two policies with two videos each."""
    folder = tmp_path_factory.mktemp("clips")
    for position, label in enumerate(("still", "moving")):
        for number, text in enumerate(("a cat", "a dog")):
            write_clip(folder / label / f"{text}-0.mp4", shift=position * (number + 1))
    return folder


@pytest.fixture(scope="module")
def measured(clips, tmp_path_factory):
    """Their results, by one worker."""
    folder = tmp_path_factory.mktemp("measured")
    run("--videos", clips, *WEIGHT_FREE, "--workers", 1, cwd=folder)
    return folder / "out"


@pytest.fixture(scope="module")
def study(tiny_folder, tmp_path_factory):
    """A folder with prompts, and words that generate and measure six videos of the random model in four units."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "prompts.txt").write_text(PROMPTS)
    protocol = {
        "model": str(tiny_folder),
        "family": "mini",
        "prompts": "prompts.txt",
        "caches": list(CACHES),
        "seconds": 1.5,
        "batch": 2,
        "metrics": ["weight_free"],
        "sampler": {"name": "few_step", "timesteps": [1000, 500]},
        "moments": [1],
    }
    (folder / "study.yaml").write_text(json.dumps(protocol))
    return folder, ("--protocol", "study.yaml")


@pytest.fixture(scope="module")
def generated(study):
    """The study's results, by one worker without interruption."""
    folder, words = study
    run(*words, "--workers", 1, "--out", "one", cwd=folder)
    return folder / "one"


def test_generated_videos_are_measured_and_described(generated, study):
    for name in CACHES:
        folder = generated / name
        values, text = read(folder, "results.json"), (folder / "results.json").read_text()
        assert values["schema"] == 1 and values["run"]["label"] == name and values["run"]["num_videos"] == 3
        assert values["run"]["settings"]["caches"][name]["policy"] == name
        metric = values["metrics"]["proxy/chunk_seam_ratio"]
        assert [video["id"] for video in metric["per_video"]] == ["p0000-0", "p0001-0", "p0002-0"]
        assert values["scores"]["quality7"] is None and "missing" in values["scores"]["reason"]
        lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == PROMPTS.splitlines()
        assert all(line["num_frames"] == 25 and line["chunk_starts"] == [0, 9, 21] for line in lines)
        assert all((folder / line["file"]).is_file() and line["encoder"]["crf"] == 12 for line in lines)
        costs, units = read(folder, "costs.json"), [read(path)["costs"] for path in (folder / "units").iterdir()]
        assert costs["ms_per_block"] > 0 and costs["kv_mb"] > 0 and costs["first_frame_s"] > 0
        assert costs == {key: median(unit[key] for unit in units) for key in units[0]} and len(units) == 2
        assert not any(place in text for place in (str(study[0]), "prompts.txt", "tmp"))
    comparison = read(generated, "comparison.json")
    assert comparison["baseline"] == "sliding_window" and comparison["labels"] == list(CACHES)
    assert "<html" in (generated / "report.html").read_text()


def test_measured_again_later_the_files_give_the_same_numbers(generated, tmp_path):
    run("--videos", generated, *WEIGHT_FREE, cwd=tmp_path)
    for name in CACHES:
        old, new = (read(folder, name, "results.json") for folder in (generated, tmp_path / "out"))
        assert json.dumps(old["metrics"]) == json.dumps(new["metrics"])


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(generated, study):
    folder, words = study
    out = folder / "killed"
    process = start(*words, "--workers", 1, "--out", "killed", cwd=folder)
    wait_for(lambda: list(out.glob("*/units/*.json")), process)
    # In the middle of a unit: its videos are whole, not all of them are measured.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / CACHES[0] / "results.json").exists()
    (out / CACHES[0] / "videos" / ".p0002-0.1.tmp.mp4").write_bytes(b"half a video")
    run(*words, "--workers", 2, "--out", "killed", cwd=folder)
    for name in CACHES:
        assert results(out / name) == results(generated / name)
        for video in (generated / name / "videos").iterdir():
            assert (out / name / "videos" / video.name).read_bytes() == video.read_bytes()
        assert not list((out / name).glob("*/.*"))


def test_finished_work_is_not_done_again_and_another_protocol_does_not_mix(generated, study, refused, monkeypatch):
    folder, words = study
    copy = folder / "again"
    shutil.copytree(generated, copy)
    files = {path: path.stat().st_mtime_ns for path in copy.glob("*/*/*")}
    gone = copy / CACHES[1] / "scores" / "p0002-0.json"
    gone.unlink()
    (copy / CACHES[1] / "results.json").unlink()
    # What a protocol is called decides nothing.
    (folder / "renamed.yaml").write_text(json.dumps(read(folder, "study.yaml") | {"name": "b"}))
    stderr = run("--protocol", "renamed.yaml", "--workers", 1, "--out", "again", cwd=folder)
    assert "6 videos in 2 runs" in stderr and "; 5 are finished" in stderr and "made again" not in stderr
    assert "100 %" in stderr
    assert {path for path, before in files.items() if path.stat().st_mtime_ns != before} == {gone}
    assert results(copy / CACHES[1]) == results(generated / CACHES[1])
    monkeypatch.chdir(folder)
    refused(("evaluate", "run", *words, "--seconds", 2, "--out", "again"), "seconds: 1.5 -> 2")


def test_of_videos_that_are_not_kept_those_that_the_report_shows_stay(study):
    folder, words = study
    words = (*words, "--cache", CACHES[0], "--samples", 2, "--workers", 1, "--out", "not_kept")
    run(*words, "--no-keep-videos", cwd=folder)
    videos = folder / "not_kept" / CACHES[0] / "videos"
    assert sorted(path.name for path in videos.iterdir()) == ["p0000-0.mp4", "p0001-0.mp4", "p0002-0.mp4"]
    assert "is not there any more" not in (folder / "not_kept" / "report.html").read_text()
    assert "made again" not in run(*words, "--no-keep-videos", cwd=folder)
    stderr = run(*words, cwd=folder)
    assert "4 were measured and not kept, and are made again: or use --no-keep-videos" in stderr
    assert len(list(videos.iterdir())) == 6


SLOW = """
import time
import torch

class SlowFlow:
    name, weights, official = "slow", None, False

    def flow(self, a, b):
        time.sleep(0.1)
        return torch.zeros(2, *a.shape[-2:])

def raft():
    return SlowFlow()
"""


def test_ctrl_c_finishes_the_unit_it_is_in(clips, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    words = ("--videos", clips, "--metrics", "vbench", "--backbones", "slow.py", "--workers", 1, "--out", "out")
    process = start(*words, cwd=tmp_path)

    def finished():
        return sorted(path.name for path in (tmp_path / "out").glob("*/scores/[!.]*.json"))

    wait_for(finished, process)
    # To the whole group, as a terminal does it; the next video takes two seconds.
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "stopping after this unit" in stderr and "run the same command again" in stderr and stdout == ""
    assert 2 <= len(finished()) < 4 and not list((tmp_path / "out").glob("*/results.json"))
    assert not list((tmp_path / "out").glob("*/scores/.*"))


@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
def test_other_launchers_give_the_same_bytes(measured, clips, tmp_path, launcher):
    if launcher == "torchrun":
        run("--videos", clips, *WEIGHT_FREE, cwd=tmp_path, program=TORCHRUN)
    elif find_spec("ray") is None:
        pytest.skip("the package ray is not installed: pip install 'longtake[cluster]'")
    else:
        run("--videos", clips, *WEIGHT_FREE, "--launcher", "ray", "--workers", 2, cwd=tmp_path)
    for label in ("still", "moving"):
        assert results(tmp_path / "out" / label) == results(measured / label)


def test_ray_that_is_missing_is_named(clips, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ("evaluate", "run", "--videos", clips, "--launcher", "ray", "--out", tmp_path / "out")
    refused(words, "pip install 'longtake[cluster]'")


def test_a_changed_video_is_measured_again_and_a_new_one_joins(measured, clips, tmp_path):
    copy, out = tmp_path / "clips", tmp_path / "out"
    shutil.copytree(clips, copy)
    shutil.copytree(measured, out)
    old = {path.name: path.stat().st_mtime_ns for path in (out / "still" / "scores").iterdir()}
    # Scores name their videos by the way from one folder to the other.
    relative = os.path.relpath(clips, measured)
    for path in [*out.glob("*/scores/*.json"), *out.glob("*/manifest.jsonl")]:
        path.write_text(path.read_text().replace(f"../{relative}", "../../clips"))
    (copy / "moving" / "a dog-0.mp4").unlink()
    write_clip(copy / "moving" / "a dog-0.mp4", shift=5)
    write_clip(copy / "still" / "a cow-0.mp4", shift=0)
    before = {path: path.read_text() for path in out.glob("*/scores/*.json")}
    run("--videos", "clips", *WEIGHT_FREE, cwd=tmp_path)
    changed = {path.relative_to(out).as_posix() for path, text in before.items() if path.read_text() != text}
    assert changed == {"moving/scores/a dog-0.json"}
    assert {path.name for path in (out / "still" / "scores").iterdir()} == {*old, "a cow-0.json"}
    assert read(out, "still", "results.json")["run"]["num_videos"] == 3


def test_runs_are_compared_and_reported_from_their_folders(measured, tmp_path, call, refused):
    both = (measured / "still", measured / "moving")
    assert read(measured, "comparison.json")["labels"] == ["moving", "still"]
    still, moving = (read(folder, "results.json")["metrics"] for folder in both)
    (name,) = (name for name in still if name.startswith("proxy/flow_magnitude_mean"))
    assert still[name]["value"] < moving[name]["value"]
    for name, runs in (("both", both), ("again", [folder / "results.json" for folder in both])):
        words = ("evaluate", "compare", *runs, "--baseline", "still", "--moments", "1,2", "--out", tmp_path / name)
        code, _, stderr = call(*words)
        assert code == 0, stderr
    comparison = read(tmp_path, "both", "comparison.json")
    assert comparison["baseline"] == "still" and comparison["moments"] == [1, 2]
    assert read(tmp_path, "again", "comparison.json") == comparison
    copy = tmp_path / "copy"
    shutil.copytree(measured, copy)
    before = (copy / "still" / "results.json").read_bytes()
    (copy / "report.html").unlink()
    assert call("evaluate", "report", copy)[0] == 0
    assert (copy / "report.html").is_file() and (copy / "still" / "results.json").read_bytes() == before
    out = ("--out", tmp_path / "x")
    refused(("evaluate", "compare", *both, "--baseline", "stil", *out), "baseline 'stil' is none of the runs")
    for words in (("report", tmp_path), ("compare", tmp_path, *out)):
        refused(("evaluate", *words), "holds no run of an evaluation")


# One of each place that refuses; its other messages stand with the tests of evaluations.
BAD = {
    "no folder": (["--videos", "none"], "no folder of videos at none"),
    "no video": (["--videos", "broken"], "broken/a.mp4"),
    "zero frames": (["--videos", "empty"], "empty/a.mp4"),
    "manifest": (["--videos", "good", "--manifest", "none.jsonl"], "cannot read the manifest none.jsonl"),
    "hash": (["--protocol", "hash.yaml", "--videos", "good", "--backbones", "mine.py"], "sha256 is"),
    "launcher": (["--launcher", "slurm"], "unknown launcher 'slurm'; known: local, torchrun, ray"),
    "metrics": (["--metrics", "vbnch"], "Did you mean 'vbench'"),
    "moments": (["--moments", "5,ten"], "'ten' is no number of seconds"),
    "workers": (["--workers", "0"], "--workers"),
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_clip(folder / "good" / "a.mp4", shift=1)
    for name in ("broken", "empty"):
        (folder / name).mkdir()
    (folder / "broken" / "a.mp4").write_bytes(b"nothing" * 99)
    (folder / "empty" / "a.mp4").write_bytes(b"")
    (folder / "mine.py").write_text("x = 1\n")
    (folder / "hash.yaml").write_text(f"backbones: mine.py\nbackbones_sha256: '{'0' * 64}'\n")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(bad_inputs, refused, monkeypatch, name):
    words, message = BAD[name]
    monkeypatch.chdir(bad_inputs)
    refused(("evaluate", "run", *words, "--out", "out"), message)
    assert not (bad_inputs / "out").exists()


def test_what_a_worker_refuses_is_one_line_too(bad_inputs, tmp_path):
    words = ("--videos", bad_inputs / "good", "--backbones", bad_inputs / "mine.py", "--out", "out", "--workers", 1)
    code, stdout, stderr = run_program("run", *words, cwd=tmp_path, program=EVALUATE)
    lines = [line for line in stderr.splitlines() if line.startswith("longtake: ")]
    assert_one_line((code, stdout, "\n".join(lines)), "mine.py")
    assert "Traceback" not in stderr and not list((tmp_path / "out").glob("scores/*"))


def test_one_process_at_a_time_works_in_a_folder(clips, tmp_path, refused):
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(("evaluate", "run", "--videos", clips, "--out", tmp_path / "out"), "another process works in")


def test_help_teaches_and_list_says_what_is_missing(call):
    code, text, _ = call("evaluate", "run", "--help")
    text = " ".join(text.split())
    assert code == 0 and "--videos clips --backbones vbench.py" in text and "torchrun" in text
    code, text, _ = call("evaluate", "list")
    assert code == 0 and "vbench/temporal_flickering" in text and "suite:moving_scenes" in text
    assert "musiq: no backbone for 'musiq'" in text and "not computed" in text
