"""The two commands, as a user types them, with a model that answers every prompt with its true scene."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from longtake.evaluation.mini_world.moving_scenes import describe, held_back_scenes, render
from longtake.scripts import drift_mini, judge_mini

RUNNER = CliRunner()
SCENES = {
    describe(scene): scene
    for seed in (0, drift_mini.PROMPT_SEED)
    for scene in held_back_scenes(4 if seed == 0 else 2, seed=seed)
}


class TrueScenes:
    """Stands in for the pipeline: its videos are renders."""

    family = SimpleNamespace(sampler={"name": "few_step"}, frames_per_block=3)
    transformer = vae = text_encoder = torch.nn.Linear(1, 1)

    @classmethod
    def from_pretrained(cls, name):
        assert name == "mini"
        return cls()

    def stream(self, prompt, *, cache, seed, sampler, seconds=None, num_frames=None):
        assert len(seed) == len(prompt)
        total = num_frames or round(seconds * 16) + 1
        for start in range(0, total, 100):
            indices = np.arange(start, min(start + 100, total))
            clips = torch.from_numpy(np.stack([render(SCENES[text], indices) for text in prompt]))
            frames = clips.permute(0, 1, 4, 2, 3).float() / 255.0
            yield SimpleNamespace(frames=frames, seconds={"denoise": 0.5, "decode": 1.5}, num_cache_bytes=2_000_000)


@pytest.fixture(autouse=True)
def true_scenes(monkeypatch):
    for script in (drift_mini, judge_mini):
        monkeypatch.setattr(script, "LongVideoPipeline", TrueScenes)


def test_drift_runs_resumes_and_reports(tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "drift.md"
    base = ["--results", str(results)]
    study = ["run", *base, "--prompts", "2", "--seeds", "1", "--seconds", "15", "--batch", "2"]
    caches = ["--cache", "sliding_window", "--cache", "deep={policy: attention_sink, num_sink_frames: 6}"]
    first = RUNNER.invoke(drift_mini.app, [*study, *caches, "--stop-after", "0"])
    assert first.exit_code == 0, first.output
    assert "run the same command again" in first.output
    assert len(results.read_text().splitlines()) == 2
    second = RUNNER.invoke(drift_mini.app, [*study, *caches])
    assert second.exit_code == 0, second.output
    assert "4/4 videos" in second.output
    assert {json.loads(line)["policy"] for line in results.read_text().splitlines()} == {"sliding_window", "deep"}

    page.write_text(f"before\n{drift_mini.BEGIN}\nold\n{drift_mini.END}\nafter\n")
    report = ["report", *base, "--out", str(tmp_path / "out"), "--page", str(page)]
    for _ in range(2):
        written = RUNNER.invoke(drift_mini.app, report)
        assert written.exit_code == 0, written.output
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("| shape right | deep |") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "drift.csv",
        "drift.json",
        "drift.png",
        "levels.json",
    }


def test_drift_refuses_what_it_cannot_read(tmp_path):
    empty = RUNNER.invoke(drift_mini.app, ["report", "--results", str(tmp_path / "none.jsonl")])
    assert empty.exit_code == 2
    wrong = RUNNER.invoke(drift_mini.app, ["run", "--cache", "x={num_sink_frames: 3}"])
    assert wrong.exit_code == 2


def test_score_prints_every_pass_line_and_writes_json(tmp_path):
    out = tmp_path / "score.json"
    scored = RUNNER.invoke(judge_mini.app, ["score", "--prompts", "4", "--batch", "3", "--out", str(out)])
    assert scored.exit_code == 0, scored.output
    lines = {line["attribute"]: line for line in json.loads(out.read_text())["lines"]}
    for name in ("colour", "background", "shape", "texture", "motion", "one_object"):
        assert name in lines
        assert name in scored.output
    assert lines["background"]["accuracy"]["mean"] == 1.0
