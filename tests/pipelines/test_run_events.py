"""Run folders with real sessions: changes of prompt with events, and blocks that are denoised together."""

import pytest
from rollouts import OTHER, PROMPT, SINK
from run_fakes import hashes

from longtake.configs.loader import load_run
from longtake.pipelines.run_folder import RunFolder
from longtake.pipelines.run_video import run_video

SETTINGS = {
    "recache": {"cache": SINK},
    "keep": {
        "cache": {"policy": "rolling_forcing", "num_context_frames": 9},
        "sampler": {"name": "rolling_window", "timesteps": [1000, 500]},
    },
}


def config(*changes):
    overrides = ["output.state_every_blocks=1", "output.num_kept_states=8", f"prompt_changes=[{', '.join(changes)}]"]
    return load_run(options={"prompt": PROMPT, "seconds": 4.5}, overrides=overrides)


@pytest.mark.parametrize("event", SETTINGS)
def test_a_fork_with_a_new_prompt_equals_a_run_that_had_it(tiny_pipe, tmp_path, event):
    """Blocks start at pixel frames 0, 9, 21, 33, 45 and 57."""

    def start(run):
        return tiny_pipe.start(run.prompt, seconds=run.seconds, seed=3, **SETTINGS[event])

    def make(name, run):
        with RunFolder.create(tmp_path / name, config=run, record={}) as folder:
            run_video(folder, start(run))
        return RunFolder(tmp_path / name)

    changed = config(f"{{at: 2.5, prompt: {OTHER}, event: {event}}}")
    direct, source = make("direct", changed), make("source", config())
    session = start(changed)
    with source.fork(tmp_path / "fork", config=changed, at=2.5, record={}, num_ahead=session.num_ahead) as folder:
        run_video(folder, session)
    assert hashes(tmp_path / "fork") == hashes(tmp_path / "direct")
    assert hashes(tmp_path / "source")[4:] != hashes(tmp_path / "direct")[4:]
    change = {"block": 4, "start_frame": 12, "prompt": OTHER, "event": event}
    assert direct.record["prompt_changes"] == RunFolder(tmp_path / "fork").record["prompt_changes"] == [change]
    assert source.record["prompt_changes"] == []
    assert direct.record["positions"]["trained_distance"] == 20
