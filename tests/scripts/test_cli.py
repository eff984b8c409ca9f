"""The command line as a user meets it: as a program where that is cheap, in this process where a model is loaded."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from cli import ENVIRONMENT, PROMPT, ROOT, assert_one_line, hashes, run, start
from PIL import Image

from longtake.pipelines import checkpoint
from longtake.pipelines.run_folder import RunFolder
from longtake.pipelines.video_file import count_frames
from longtake.scripts.fork import _parse_time
from longtake.scripts.generate import _folder_name, _slug
from longtake.scripts.main import COMMANDS, _load_command


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


def test_help_teaches_with_examples_and_needs_no_model(call):
    for words in ((), ("generate",), ("resume",), ("fork",), ("info",)):
        code, stdout, stderr = call(*words, "--help")
        assert (code, stderr) == (0, "")
        assert "longtake" in stdout and "Usage" in stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_has_each_ones_headline(name):
    assert _load_command(name).help.splitlines()[0] == COMMANDS[name]


def test_help_does_not_import_torch():
    check = "import sys; import longtake.scripts.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=ENVIRONMENT, check=False).returncode == 0


def test_the_script_is_the_same_program():
    script = {"program": ("scripts/generate.py",)}
    help_text = run("--help", **script)
    assert help_text == run("generate", "--help")
    assert "--prompts prompts.txt" in help_text[1] and "cache.num_context_frames=15" in help_text[1]
    assert_one_line(run("x", "--seconds", "0", **script), "give a length above 0")


def test_the_script_without_its_packages_says_what_to_run():
    code, _, stderr = run("x", program=("-S", "scripts/generate.py"))
    assert code == 1 and "make install" in stderr and len(stderr.splitlines()) == 1


def test_a_bad_model_folder_is_named(tiny_folder, tmp_path, refused):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    words = tiny(folder, PROMPT, "--out", tmp_path / "out")
    weights = next((folder / "transformer").glob("*.safetensors"))
    pickled = weights.rename(weights.with_suffix(".bin"))
    refused(words, "pickle", "convert it")
    pickled.unlink()
    weights.write_bytes(b"\x80\x04}q\x00.")
    refused(words, "no safetensors file")
    shutil.rmtree(folder / "vae")
    refused(words, "vae")
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


def test_the_same_command_gives_the_same_frames(finished, tiny_folder, tmp_path, call):
    words = tiny(tiny_folder, "--config", finished[0] / "config.yaml", "--out", tmp_path / "again")
    assert call(*words)[0] == 0
    assert hashes(tmp_path / "again") == hashes(finished[0])


def test_existing_output_is_kept(finished, tiny_folder, tmp_path, refused):
    path, _ = finished
    (tmp_path / "file").write_text("precious")
    files = [tmp_path / "file", *(file for file in path.parent.rglob("*") if file.is_file())]
    before = [file.read_bytes() for file in files]
    for out in (path, path.with_suffix(".mp4"), tmp_path / "file"):
        refused(tiny(tiny_folder, PROMPT, "--out", out), "nothing is overwritten")
    assert before == [file.read_bytes() for file in files]


def test_a_finished_run_has_nothing_to_resume(finished, call, refused):
    code, stdout, stderr = call("resume", finished[0])
    assert code == 0 and "finished already" in stderr and "contact_sheet.png" in stdout
    refused(("resume", finished[0].parent), "has no config.yaml")
    refused(("resume", finished[0] / "none"), "there is no folder")


def test_ctrl_c_finishes_the_file_and_says_how_to_go_on(tiny_folder, tmp_path, call):
    path, whole = tmp_path / "take", tmp_path / "whole"
    process = start(*tiny(tiny_folder, PROMPT, "--out", path, seconds=20))
    while process.poll() is None and not hashes(path):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert f"longtake resume {path}" in stderr and "Traceback" not in stderr
    folder = RunFolder(path)
    done = folder.blocks()
    assert folder.status == "interrupted" and 0 < len(done) < 27
    assert count_frames(path / "video.mp4") == sum(entry["num_frames"] for entry in done)
    assert folder.checkpoints.blocks()[-1] == len(done)
    assert call("resume", path)[0] == 0
    assert call(*tiny(tiny_folder, PROMPT, "--out", whole, seconds=20))[0] == 0
    assert hashes(path) == hashes(whole) and len(hashes(path)) == 27
    assert count_frames(path / "video.mp4") == 321


def test_other_weights_do_not_resume(tiny_folder, tmp_path, call, refused):
    path, model = tmp_path / "take", tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    assert call(*tiny(model, PROMPT, "--out", path, seconds=1))[0] == 0
    RunFolder(path).update_record(status="running")
    weights = next((model / "vae").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(("resume", path), "other weights")


def test_fork_branches_with_a_new_prompt(finished, tmp_path, call, refused):
    path, fork = finished[0], tmp_path / "fork"
    text = "a blue square moving right"
    words = ("fork", path, "--at", "2s", "--prompt", text, "--event", "recache", "--out", fork)
    assert call(*words)[0] == 0
    ours, theirs = hashes(fork), hashes(path)
    change = {"block": 3, "start_frame": 9, "prompt": text, "event": "recache"}
    assert RunFolder(fork).record["prompt_changes"] == [change]
    assert RunFolder(fork).record["parent"]["block"] == 3 and ours[:3] == theirs[:3] and ours[3] != theirs[3]
    assert count_frames(fork / "video.mp4") == 49
    refused(words, "nothing is overwritten")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["2s"], "--prompt or --seconds"),
        (["soon", "--prompt", "x"], "no time"),
        (["9s", "--prompt", "x", "--seconds", "20"], "has 3.06 s"),
        (["2s", "--prompt", " "], "empty"),
        (["2s", "--seconds", "5", "--event", "cut"], "give --prompt too"),
        (["2s", "--prompt", "x", "--event", "cut"], "does not support"),
        (["2s", "--prompt", "x", "--event", "cat"], "unknown prompt event"),
    ],
)
def test_forks_that_cannot_be_are_one_line(finished, refused, words, message):
    refused(("fork", finished[0], "--at", *words), message)


def test_many_prompts_skip_what_is_finished(tiny_folder, tmp_path, call, refused):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "takes"
    prompts.write_text("# colours\na red circle\n\n  a blue square \na red circle\n")
    words = tiny(tiny_folder, "--prompts", prompts, "--out", out, seconds=1)
    code, _, stderr = call(*words)
    assert code == 0 and "3 to make" in stderr
    folders = sorted(out.iterdir())
    assert sorted(RunFolder(folder).config.prompt for folder in folders) == ["a blue square", *["a red circle"] * 2]
    assert len({tuple(hashes(folder)) for folder in folders}) == 3
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.mp4")}
    prompts.write_text(prompts.read_text() + "a red square\n")
    RunFolder(folders[0]).update_record(status="interrupted")
    code, _, stderr = call(*words)
    assert code == 0 and "2 finished already, 2 to make" in stderr
    assert [RunFolder(folder).status for folder in out.iterdir()] == ["finished"] * 4
    assert sum(file.stat().st_mtime_ns == before[file] for file in before) >= 2
    refused((*words, "--seed", "5"), "with other settings")
    refused((*words, PROMPT), "give one of the two")


def test_a_full_disk_is_one_line_and_keeps_the_state(tiny_folder, tmp_path, call, monkeypatch):
    path, saved, original = tmp_path / "take", [], checkpoint.save_file

    def save_file(*args, **kwargs):
        saved.append(args)
        if len(saved) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        code, _, stderr = call(*tiny(tiny_folder, PROMPT, "--out", path, seconds=6))
    assert code == 2 and "Traceback" not in stderr
    assert f"the disk is full; what was saved in {path} stays" in stderr.splitlines()[-1]
    assert RunFolder(path).checkpoints.blocks() == [2]
    assert call("resume", path)[0] == 0
    assert count_frames(path / "video.mp4") == 97


def test_a_really_full_disk(tiny_folder, tmp_path, call):
    path = tmp_path / "disk" / "take"
    path.parent.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", path.parent], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        code, _, stderr = call(*tiny(tiny_folder, PROMPT, "--out", path, "output.crf=0", seconds=60))
        assert code == 2 and "the disk is full" in stderr.splitlines()[-1] and "Traceback" not in stderr
        assert count_frames(path / "video.mp4") > 0
        subprocess.run(["mount", "-o", "remount,size=20m", path.parent], check=True)
        assert call("resume", path)[0] == 0
        assert count_frames(path / "video.mp4") == 961
    finally:
        subprocess.run(["umount", path.parent], check=True)


def test_policies_and_info(tiny_folder, call):
    code, stdout, _ = call("policies", "attention_sink")
    assert code == 0 and "policy: attention_sink" in stdout and "num_sink_frames: 3" in stdout
    code, stdout, _ = call("info", tiny_folder, "--family", "mini")
    assert code == 0 and "transformer" in stdout and "2 layers, 2 heads of 24" in stdout
    code, stdout, _ = call("info", "self_forcing")
    assert code == 0 and "832x480" in stdout


def test_times_and_names():
    assert [_parse_time(text) for text in ("20s", "20", "1m30s", "1:30", "2m", "0.5")] == [20, 20, 90, 90, 120, 0.5]
    for text in ("", "s", "-3", "0", "1h"):
        with pytest.raises(ValueError):
            _parse_time(text)
    assert _slug("A Red Circle, bouncing!") == "a-red-circle-bouncing" and _slug("…") == "take"
    assert len({_folder_name(*named) for named in (("a", 0), ("b", 0), ("a", 1), ("a!", 0))}) == 4
