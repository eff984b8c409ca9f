"""The command line as a user meets it: as a program where that is cheap, in this process where a model is loaded."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli import PROMPT, assert_one_line, call, hashes
from PIL import Image

from longtake.pipelines import checkpoint
from longtake.pipelines.run_folder import RunFolder
from longtake.pipelines.video_file import count_frames
from longtake.scripts.fork import _parse_time
from longtake.scripts.generate import _folder_name, _slug, read_prompts

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-m", "longtake.scripts.main")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def start(*words, cwd=ROOT, program=PROGRAM):
    """Start the program without waiting."""
    command = [*program, *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def run(*words, **settings):
    """Run the program; returns (exit code, stdout, stderr)."""
    process = start(*words, **settings)
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def tiny(folder, *words, seconds=3):
    """Words that generate a short video with the random model."""
    settings = ("model.family=mini", "output.state_every_blocks=2")
    return ("generate", *words, "--model", folder, "--seconds", seconds, *settings)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """A finished 3 s run, made by the program itself, with a contact sheet and a named video."""
    folder = tmp_path_factory.mktemp("cli")
    result = run(*tiny(tiny_folder, PROMPT, "--out", folder / "take.mp4", "--contact-sheet", "output.scale=2"))
    assert result[0] == 0, result[2]
    return folder / "take", result


def test_help_teaches_with_examples_and_needs_no_model():
    for words in (("--help",), ("generate", "--help"), ("resume", "--help"), ("fork", "--help"), ("info", "--help")):
        code, stdout, stderr = run(*words)
        assert (code, stderr) == (0, "")
        assert "longtake" in stdout and "Usage" in stdout
    code, stdout, _ = run("generate", "--help")
    assert "--prompts prompts.txt" in stdout and "cache.num_context_frames=15" in stdout


def test_help_does_not_import_torch():
    check = "import sys; import longtake.scripts.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=ENVIRONMENT, check=False).returncode == 0


def test_the_script_is_the_same_program():
    script = run("--help", program=(sys.executable, "scripts/generate.py"))
    assert script == run("generate", "--help")
    assert_one_line(run("x", "--seconds", "0", program=(sys.executable, "scripts/generate.py")), "seconds=0")


def test_the_script_without_its_packages_says_what_to_run():
    bare = subprocess.run([sys.executable, "-S", "scripts/generate.py", "x"], cwd=ROOT, capture_output=True, text=True)
    assert bare.returncode == 1 and "make install" in bare.stderr and len(bare.stderr.splitlines()) == 1


LIGHT = {
    "unknown policy": (["x", "--cache", "atention_sink"], "Did you mean 'attention_sink'"),
    "unknown key": (["x", "secnds=3"], "Did you mean 'seconds'"),
    "unknown option": (["x", "--secnds", "3"], "--secnds"),
    "no seconds": (["x", "--seconds", "0"], "give a length above 0"),
    "negative seconds": (["x", "--seconds", "-3"], "give a length above 0"),
    "no number": (["x", "--seconds", "long"], "--seconds"),
    "size": (["x", "height=100"], "use 96"),
    "empty prompt": ([""], "prompt is empty"),
    "no prompt": (["--seconds", "3"], "prompt is empty"),
    "long prompt": (["word " * 10_000], "10000 words"),
    "two prompts": (["a red", "circle"], "put the prompt into quotes"),
    "no bundled weights": (["x", "--model", "self_forcing"], "model.path=FOLDER"),
    "no file": (["--config", "none.yaml"], "cannot read the configuration"),
    "no prompts": (["--prompts", "none.txt"], "cannot read the prompts"),
}


def test_bad_words_are_one_line_and_exit_code_2(tmp_path):
    processes = {name: start("generate", *words, cwd=tmp_path) for name, (words, _) in LIGHT.items()}
    for name, process in processes.items():
        stdout, stderr = process.communicate(timeout=300)
        assert_one_line((process.returncode, stdout, stderr), LIGHT[name][1])
        assert stdout == ""
    assert not list(tmp_path.iterdir()), "bad input must leave nothing behind"


def test_bad_settings_are_refused_before_a_model_is_loaded(tmp_path, capfd):
    out = tmp_path / "out"
    no_model = ("--model", tmp_path / "none", "--out", out)
    assert_one_line(
        call(capfd, "generate", "x", *no_model, "cache.num_sink_frams=3"), "Did you mean 'num_sink_frames'"
    )
    assert_one_line(
        call(capfd, "generate", "x", *no_model, "cache.num_context_frames=4"),
        "leaves no room for num_sink_frames=3 and a block of 3 frames: use 6 or more",
    )
    assert_one_line(call(capfd, "generate", "x", *no_model, "sampler.flow_shift=-1"), "flow_shift=-1")
    assert_one_line(call(capfd, "generate", "x", *no_model), "does not exist")
    assert_one_line(call(capfd, "generate", "x", "--out", out, "model.device=cuda:99"), "longtake: ")
    assert not out.exists()


def test_a_bad_model_folder_is_named(tiny_folder, tmp_path, capfd):
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_folder, pickled)
    weights = next((pickled / "transformer").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    assert_one_line(call(capfd, *tiny(pickled, PROMPT, "--out", tmp_path / "out")), "pickle", "convert it")
    shutil.copy(weights.with_suffix(".bin"), weights)
    weights.with_suffix(".bin").unlink()
    weights.write_bytes(b"\x80\x04}q\x00.")
    assert_one_line(call(capfd, *tiny(pickled, PROMPT, "--out", tmp_path / "out")), "no safetensors file")
    (pickled / "model_index.json").write_text("{")
    assert_one_line(call(capfd, *tiny(pickled, PROMPT, "--out", tmp_path / "out")), "no safetensors file")
    shutil.rmtree(pickled / "vae")
    assert_one_line(call(capfd, *tiny(pickled, PROMPT, "--out", tmp_path / "out")), "vae")
    assert not (tmp_path / "out").exists()


def test_generate_makes_a_whole_folder(finished):
    path, (_, stdout, stderr) = finished
    assert stdout.split() == [str(path.with_suffix(".mp4")), str(path / "contact_sheet.png")]
    assert "x real time" in stderr and "frames/s" in stderr and "tokens" in stderr
    record = json.loads((path / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["weights"]["method"] == "full" and len(record["weights"]["sha256"]) == 64
    assert record["versions"]["torch"] and record["machine"]["num_threads"] == 1
    assert count_frames(path / "video.mp4") == 49 == count_frames(path.with_suffix(".mp4"))
    with Image.open(path / "contact_sheet.png") as sheet:
        assert sheet.width > 6 * 128


def test_the_same_command_gives_the_same_frames(finished, tiny_folder, tmp_path, capfd):
    words = tiny(tiny_folder, "--config", finished[0] / "config.yaml", "--out", tmp_path / "again")
    assert call(capfd, *words)[0] == 0
    assert hashes(tmp_path / "again") == hashes(finished[0])


def test_existing_output_is_kept(finished, tiny_folder, tmp_path, capfd):
    path, _ = finished
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for out in (path, path.with_suffix(".mp4")):
        assert_one_line(call(capfd, *tiny(tiny_folder, PROMPT, "--out", out)), "nothing is overwritten")
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    (tmp_path / "file").write_text("precious")
    assert_one_line(call(capfd, *tiny(tiny_folder, PROMPT, "--out", tmp_path / "file")), "nothing is overwritten")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_finished_run_has_nothing_to_resume(finished, capfd):
    code, stdout, stderr = call(capfd, "resume", finished[0])
    assert code == 0 and "finished already" in stderr and "contact_sheet.png" in stdout
    assert_one_line(call(capfd, "resume", finished[0].parent), "has no config.yaml")
    assert_one_line(call(capfd, "resume", finished[0] / "none"), "there is no folder")


def test_ctrl_c_finishes_the_file_and_says_how_to_go_on(tiny_folder, tmp_path, capfd):
    path, whole = tmp_path / "take", tmp_path / "whole"
    process = start(*tiny(tiny_folder, PROMPT, "--out", path, seconds=40))
    while process.poll() is None and not list(RunFolder(path).blocks()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert f"longtake resume {path}" in stderr and "Traceback" not in stderr
    folder = RunFolder(path)
    done = folder.blocks()
    assert folder.status == "interrupted" and 0 < len(done) < 54
    assert count_frames(path / "video.mp4") == sum(entry["num_frames"] for entry in done)
    assert folder.checkpoints.blocks()[-1] == len(done)
    assert call(capfd, "resume", path)[0] == 0
    assert call(capfd, *tiny(tiny_folder, PROMPT, "--out", whole, seconds=40))[0] == 0
    assert hashes(path) == hashes(whole) and len(hashes(path)) == 54
    assert count_frames(path / "video.mp4") == 641


def test_other_weights_do_not_resume(tiny_folder, tmp_path, capfd):
    path, model = tmp_path / "take", tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    assert call(capfd, *tiny(model, PROMPT, "--out", path))[0] == 0
    RunFolder(path).update_record(status="running")
    weights = next((model / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert_one_line(call(capfd, "resume", path), "other weights")


def test_fork_branches_with_a_new_prompt(finished, tmp_path, capfd):
    path, _ = finished
    fork = tmp_path / "fork"
    text = "a blue square moving right"
    words = ("fork", path, "--at", "2s", "--prompt", text, "--event", "recache", "--out", fork)
    assert call(capfd, *words)[0] == 0
    ours, theirs = hashes(fork), hashes(path)
    branch = RunFolder(fork).record["parent"]["block"]
    change = {"block": 3, "start_frame": 9, "prompt": text, "event": "recache"}
    assert RunFolder(fork).record["prompt_changes"] == [change]
    assert branch == 3 and ours[:3] == theirs[:3] and ours[3] != theirs[3]
    assert count_frames(fork / "video.mp4") == 49
    assert_one_line(call(capfd, *words), "nothing is overwritten")
    assert_one_line(call(capfd, "fork", path, "--at", "2s"), "--prompt or --seconds")
    assert_one_line(call(capfd, "fork", path, "--at", "soon", "--prompt", "x"), "no time")
    assert_one_line(call(capfd, "fork", path, "--at", "9s", "--prompt", "x", "--seconds", "20"), "has 3.06 s")
    assert_one_line(call(capfd, "fork", path, "--at", "2s", "--prompt", " "), "empty")
    assert_one_line(call(capfd, "fork", path, "--at", "2s", "--seconds", "5", "--event", "cut"), "give --prompt too")
    assert_one_line(call(capfd, "fork", path, "--at", "2s", "--prompt", "x", "--event", "cut"), "does not support")
    assert_one_line(call(capfd, "fork", path, "--at", "2s", "--prompt", "x", "--event", "cat"), "unknown prompt event")


def test_many_prompts_skip_what_is_finished(tiny_folder, tmp_path, capfd):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "takes"
    prompts.write_text("# colours\na red circle\n\na blue square\na red circle\n")
    words = tiny(tiny_folder, "--prompts", prompts, "--out", out, seconds=1)
    code, _, stderr = call(capfd, *words)
    assert code == 0 and "3 to make" in stderr
    folders = sorted(out.iterdir())
    assert len(folders) == 3 and len({tuple(hashes(folder)) for folder in folders}) == 3
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.mp4")}
    prompts.write_text(prompts.read_text() + "a red square\n")
    RunFolder(folders[0]).update_record(status="interrupted")
    code, _, stderr = call(capfd, *words)
    assert code == 0 and "2 finished already, 2 to make" in stderr
    assert len(list(out.iterdir())) == 4
    assert all(RunFolder(folder).status == "finished" for folder in out.iterdir())
    unchanged = [file for file in before if file.stat().st_mtime_ns == before[file]]
    assert len(unchanged) >= 2
    assert_one_line(call(capfd, *words, "--seed", "5"), "with other settings")
    assert_one_line(call(capfd, *words, PROMPT), "give one of the two")


def test_a_full_disk_is_one_line_and_keeps_the_state(tiny_folder, tmp_path, capfd, monkeypatch):
    path = tmp_path / "take"
    saved = {"count": 0}
    original = checkpoint.save_file

    def save_file(*args, **kwargs):
        saved["count"] += 1
        if saved["count"] > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        code, _, stderr = call(capfd, *tiny(tiny_folder, PROMPT, "--out", path, seconds=6))
    assert code == 2 and "Traceback" not in stderr
    assert f"the disk is full; what was saved in {path} stays" in stderr.splitlines()[-1]
    assert RunFolder(path).checkpoints.blocks() == [2]
    assert call(capfd, "resume", path)[0] == 0
    assert count_frames(path / "video.mp4") == 97


def test_a_really_full_disk(tiny_folder, tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        path = disk / "take"
        code, _, stderr = call(capfd, *tiny(tiny_folder, PROMPT, "--out", path, "output.crf=0", seconds=60))
        assert code == 2 and "the disk is full" in stderr.splitlines()[-1] and "Traceback" not in stderr
        done = count_frames(path / "video.mp4")
        assert done > 0
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        RunFolder(path)
        assert call(capfd, "resume", path)[0] == 0
        assert count_frames(path / "video.mp4") == 961
    finally:
        subprocess.run(["umount", disk], check=True)


def test_policies_and_info(tiny_folder, capfd):
    code, stdout, _ = call(capfd, "policies", "attention_sink")
    assert code == 0 and "policy: attention_sink" in stdout and "num_sink_frames: 3" in stdout
    assert_one_line(call(capfd, "policies", "attention_sin"), "Did you mean 'attention_sink'")
    code, stdout, _ = call(capfd, "info", tiny_folder, "--family", "mini")
    assert code == 0 and "transformer" in stdout and "2 layers, 2 heads of 24" in stdout
    code, stdout, _ = call(capfd, "info", "self_forcing")
    assert code == 0 and "832x480" in stdout
    assert_one_line(call(capfd, "info", "self_forcin"), "Did you mean 'self_forcing'")
    assert_one_line(call(capfd, "info", tiny_folder / "vae"), "no diffusers folder")


def test_times_and_names():
    assert [_parse_time(text) for text in ("20s", "20", "1m30s", "1:30", "2m", "0.5")] == [20, 20, 90, 90, 120, 0.5]
    for text in ("", "s", "-3", "0", "1h", "soon"):
        with pytest.raises(ValueError):
            _parse_time(text)
    assert _slug("A Red Circle, bouncing!") == "a-red-circle-bouncing" and _slug("…") == "take"
    assert len({_folder_name(*named) for named in (("a", 0), ("b", 0), ("a", 1), ("a!", 0))}) == 4


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("  one \n#two\n\nthree\n")
    assert read_prompts(path) == ["one", "three"]
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot read"):
        read_prompts(path)
