"""The mini model goes on from true clips: what they show stays; from a wrong clip, or without one, it does not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from longtake.evaluation.mini_world.continuation import (
    CLIP_FRAMES,
    MEASURES,
    Arm,
    continued,
    markdown_tables,
    true_clips,
)
from longtake.evaluation.mini_world.drift import WindowMeter
from longtake.evaluation.mini_world.drift_study import VideoResult
from longtake.evaluation.mini_world.judge import load_judge
from longtake.evaluation.mini_world.moving_scenes import describe, held_back_scenes, render
from longtake.evaluation.running.suites import PROMPT_SEED
from longtake.pipelines import LongVideoPipeline
from longtake.scripts import continue_mini

CACHE = "attention_sink"


@pytest.fixture(scope="module")
def pipe():
    """The bundled model."""
    pipe = LongVideoPipeline.from_pretrained("mini")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scenes():
    """One object before a background whose phase the prompt does not say, seen by a camera that stands still."""
    found = held_back_scenes(64, seed=PROMPT_SEED)
    plain = (s for s in found if s.camera == "still" and s.event == "none" and s.second is None)
    return [scene for scene in plain if scene.texture in ("striped", "checkered")][:4]


def measured(pipe, scenes, arm, seconds):
    """{measure: (windows, scenes)} behind the true clip."""
    meter = WindowMeter(load_judge(), scenes)
    others = [*scenes[1:], scenes[0]]
    stream = continued(pipe, scenes, arm, seconds=seconds, seeds=range(len(scenes)), others=others)
    rows = [row for frames in stream for row in meter.push(frames)]
    assert len(rows) == 1 + seconds // 5
    return {name: np.array([[video[name] for video in row] for row in rows[1:]]) for name in rows[0][0]}


def test_object_and_background_stay_and_a_wrong_clip_loses_them(pipe, scenes):
    """Measured: all verdicts right, 33.3 and 30.6 dB on average, 26 at least; from the wrong clips 15 to 18 dB."""
    right = measured(pipe, scenes, Arm(cache=CACHE), 10)
    for name in ("colour", "background"):
        assert right[name].min() == 1.0, name
    assert right["shape"].mean() >= 0.75 and right["one_object"].mean() >= 0.75
    assert right["object_present"].mean() > 0.9 and right["motion_magnitude"].mean() > 0.5
    assert right["background_psnr"].min() > 23 and right["background_psnr"].mean() > 27
    wrong = measured(pipe, scenes, Arm(cache=CACHE, start="other clip"), 5)
    assert (right["background_psnr"][0] - wrong["background_psnr"][0]).min() > 4
    assert wrong["background_psnr"].mean() < 22


def test_a_clip_that_never_reached_the_cache_is_lost(pipe, scenes):
    clips = true_clips(scenes[:2])
    session = pipe.start([describe(scene) for scene in scenes[:2]], num_frames=84, cache=CACHE, video=clips)
    session.rollout._next_given_frame = session.rollout.num_given_frames
    meter = WindowMeter(load_judge(), scenes[:2])
    meter.push(torch.from_numpy(np.stack(clips)).movedim(-1, 2)[:, 1:] / 255)
    rows = [row for chunk in session for row in meter.push(chunk.frames)]
    assert max(video["background_psnr"] for video in rows[0]) < 24


def test_controls_show_what_they_say(pipe, scenes):
    clips = torch.from_numpy(np.stack(true_clips(scenes[:1], CLIP_FRAMES + 24))).movedim(-1, 2) / 255
    truth = torch.cat(
        list(continued(pipe, scenes[:1], Arm(cache=CACHE, start="true scene"), seconds=1.5, seeds=[0])), 1
    )
    assert torch.equal(truth[:, :80], clips[:, 1:81])
    assert truth.shape[1] == 80 + 24
    assert -10 * (truth[:, 80:] - clips[:, 81:]).square().mean().log10() > 28


def test_the_study_runs_goes_on_and_reports(tmp_path, monkeypatch):
    """Without the model: every arm shows the true scene."""
    made = []

    def truth(pipe, scenes, arm, *, seconds, seeds, others):
        made.append((arm.start, list(seeds)))
        for scene in scenes:
            yield torch.from_numpy(render(scene, np.arange(80 + round(16 * seconds)))).movedim(-1, 1)[None] / 255

    monkeypatch.setattr(continue_mini, "continued", truth)
    model = SimpleNamespace(**dict.fromkeys(("transformer", "vae", "text_encoder"), torch.nn.Linear(1, 1)))
    monkeypatch.setattr(continue_mini, "_pipe", lambda dtype: model)
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_text(f"before\n{continue_mini.BEGIN}\nold\n{continue_mini.END}\nafter\n")
    words = ["run", "--results", str(results), "--scenes", "2", "--seconds", "5", "--batch", "1"]
    assert CliRunner().invoke(continue_mini.app, words).exit_code == 0
    assert len(made) == 2 * len(continue_mini.ARMS)
    assert CliRunner().invoke(continue_mini.app, words).exit_code == 0 and len(made) == 2 * len(continue_mini.ARMS)
    assert (
        CliRunner().invoke(continue_mini.app, ["report", "--results", str(results), "--page", str(page)]).exit_code
        == 0
    )
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert f"| {continue_mini.CONTROL} | 2 | 1.00 [1.00, 1.00] |" in text


def test_tables_have_a_row_per_arm_and_differences_from_the_control():
    def row(policy, scene, psnr):
        window = dict.fromkeys(MEASURES, 1.0) | {"background_psnr": psnr, "revisit_psnr": float("nan")}
        return VideoResult(
            policy=policy, prompt_index=scene, seed_index=0, prompt="", fingerprint="", windows=(window,) * 3
        )

    rows = [row(policy, scene, psnr + scene) for policy, psnr in (("a", 30.0), ("b", 20.0)) for scene in range(4)]
    text = markdown_tables(rows, control="b")
    assert "| arm | videos | 0-5 s | 5-10 s |" in text
    assert "| a | 4 | **+10.0 [+10.0, +10.0]** | **+10.0 [+10.0, +10.0]** |" in text
    assert text.count("| b | ") == len(MEASURES)
