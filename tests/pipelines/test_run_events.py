"""Run folders with real sessions: changes of prompt with events, and blocks that are denoised together."""

import json

import pytest

from longtake.configs.loader import load_run
from longtake.pipelines.run_folder import RunFolder, fork_run
from longtake.pipelines.run_video import run_video

PROMPT, OTHER = "a red circle moving left", "a blue square moving right"
SETTINGS = {
    "event": {"cache": {"policy": "attention_sink", "num_context_frames": 9, "num_sink_frames": 3}},
    "window": {
        "cache": {"policy": "rolling_forcing", "num_context_frames": 9},
        "sampler": {"name": "rolling_window", "timesteps": [1000, 500]},
    },
}


def config(*changes, seconds=4.5):
    listed = ", ".join("{" + f"at: {at}, prompt: {text}, event: {event}" + "}" for at, text, event in changes)
    overrides = ["output.state_every_blocks=1", "output.num_kept_states=8", f"prompt_changes=[{listed}]"]
    return load_run(options={"prompt": PROMPT, "seconds": seconds}, overrides=overrides)


def start(pipe, run, settings):
    return pipe.start(run.prompt, seconds=run.seconds, seed=3, **settings)


def make(pipe, path, run, settings):
    with RunFolder.create(path, config=run, record={}) as folder:
        run_video(folder, start(pipe, run, settings))
    return RunFolder(path)


def hashes(folder):
    return [json.loads(line)["sha256"] for line in folder.log_path.read_text().splitlines()]


@pytest.mark.parametrize(("name", "event"), [("event", "recache"), ("window", "keep")])
def test_a_fork_with_a_new_prompt_equals_a_run_that_had_it(tiny_pipe, tmp_path, name, event):
    """Blocks start at pixel frames 0, 9, 21, 33, 45 and 57."""
    settings = SETTINGS[name]
    changed = config((2.5, OTHER, event))
    direct = make(tiny_pipe, tmp_path / "direct", changed, settings)
    source = make(tiny_pipe, tmp_path / "source", config(), settings)
    session = start(tiny_pipe, changed, settings)
    with fork_run(source, tmp_path / "fork", config=changed, at=2.5, record={}, num_ahead=session.num_ahead) as folder:
        run_video(folder, session)
    assert hashes(RunFolder(tmp_path / "fork")) == hashes(direct)
    assert hashes(source)[4:] != hashes(direct)[4:]
    change = {"block": 4, "start_frame": 12, "prompt": OTHER, "event": event}
    assert direct.record["prompt_changes"] == RunFolder(tmp_path / "fork").record["prompt_changes"] == [change]
    assert source.record["prompt_changes"] == []
    assert direct.record["positions"]["trained_distance"] == 20
