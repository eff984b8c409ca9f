"""The judge's measures as metrics: the same numbers as the drift study's, and reasons where it does not apply."""

import numpy as np
import pytest
import torch
from vbench_stubs import scores

from longtake.evaluation.backbones import Backbones
from longtake.evaluation.metrics import make_metrics
from longtake.evaluation.metrics.judge import (
    MEASURES,
    SPECS,
    WINDOW_FRAMES,
    JudgeMetric,
    _is_caption,
    _middling_scene,
    _scene_periods,
    _suite_scenes,
    _WindowMeter,
)
from longtake.evaluation.mini_world.judge import load_judge
from longtake.evaluation.mini_world.scenes import describe, held_back_scenes, parse_caption, render
from longtake.evaluation.report.data import _find_flags
from longtake.evaluation.running.suites import _moving_scenes

SCENES = held_back_scenes(24, seed=64)
STILL = next(scene for scene in SCENES if scene.camera == "still" and scene.second is None)
PANNING = next(scene for scene in SCENES if scene.camera == "panning quickly")


def measured(video, metric=None, **facts):
    return scores([metric or JudgeMetric()], video, range(13, len(video), 13), **{"fps": 16.0, **facts})


def is_known(found):
    return found["judge/motion_magnitude"].details["true_scene"]


@pytest.mark.parametrize("scene", [STILL, PANNING], ids=["still", "panning"])
def test_equals_the_drift_study(scene):
    video = render(scene, np.arange(200))
    video[100:] //= 2
    found = measured(video, prompt=describe(scene))
    frames = torch.from_numpy(video).permute(0, 3, 1, 2).float() / 255
    rows = _WindowMeter(load_judge(), scene).push(frames)
    assert len(rows) == 2
    for measure in MEASURES:
        score = found[f"judge/{measure}"]
        expected = np.array([row[measure] for row in rows])
        got = np.array([np.nan if window.value is None else window.value for window in score.windows])
        if np.isnan(expected).all():
            assert score.value is None and score.skipped
        else:
            assert np.allclose(got, expected, equal_nan=True)
            assert score.value == pytest.approx(np.nanmean(expected))
            assert [window.start_frame for window in score.windows] == [0, WINDOW_FRAMES]
    six = ["shape", "colour", "background", "texture", "motion", "camera"]
    assert found["judge/mean_of_six"].value == pytest.approx(np.mean([[row[name] for name in six] for row in rows]))


def test_true_scene_is_all_right():
    found = measured(render(STILL, np.arange(160)), prompt=describe(STILL))
    assert found["judge/mean_of_six"].value > 0.9
    assert found["judge/background_psnr"].value > 40
    assert found["judge/motion_magnitude"].value == pytest.approx(1.0, abs=0.1)
    assert is_known(found) == "known"
    wrong = measured(render(STILL, np.arange(160)), prompt=describe(PANNING))
    assert wrong["judge/mean_of_six"].value < found["judge/mean_of_six"].value


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"prompt": "a cat on a mat"}, "no caption"),
        ({"prompt": ""}, "no caption"),
        ({"prompt": "a boat over a calm background"}, "no caption"),
        ({"prompt": describe(STILL), "fps": 24.0}, "16 frames per second"),
        ({"prompt": describe(STILL), "shape": (96, 64, 80)}, "80x64"),
        ({"prompt": describe(STILL), "shape": (79, 64, 64)}, "needs 5 s of video"),
    ],
)
def test_others_have_a_reason(facts, reason):
    shape = facts.get("shape", (96, 64, 64))
    found = measured(np.zeros((*shape, 3), dtype=np.uint8), **{k: v for k, v in facts.items() if k != "shape"})
    assert found.keys() == {spec.name for spec in SPECS}
    assert all(score.value is None and reason in score.skipped for score in found.values())


def test_suite_is_known_by_its_captions_and_others_get_a_middling_scene():
    known = _suite_scenes()
    for prompt in _moving_scenes(24):
        assert describe(known[prompt.text]) == prompt.text
    assert known[describe(SCENES[0])] == SCENES[0]
    other = next(s for s in held_back_scenes(40, seed=5) if s.camera == "still" and describe(s) not in known)
    found = measured(render(other, np.arange(80)), prompt=describe(other))
    assert is_known(found) == "middling" and 0.5 < found["judge/motion_magnitude"].value < 2.0
    for scene in SCENES[:12]:
        caption = describe(scene)
        assert _is_caption(caption)
        assert parse_caption(describe(_middling_scene(caption))) == parse_caption(caption)


def test_true_scenes_raise_no_flags():
    metrics, _ = make_metrics(Backbones(), groups=("weight_free", "judge"))
    course = metrics[0]
    for scene in SCENES[:10]:
        video, prompt = render(scene, np.arange(480)), describe(scene)
        found = {**measured(video, course, prompt=prompt), **measured(video[:80], prompt=prompt)}
        assert found["proxy/loop_share"].value > 0.5 or scene.camera == "panning quickly"
        assert _find_flags(found) == [], prompt


@pytest.mark.parametrize(
    ("caption", "periods"),
    [
        ("a red circle swaying quickly over a navy plain background", [2.0]),
        ("a red circle swaying over a navy plain background with the camera panning slowly", [2.0, 4.0, 12.0]),
        ("a red circle swaying out of the frame and back over a navy plain background", [2.0, 4.0, 5.0]),
    ],
)
def test_periods(caption, periods):
    assert _scene_periods(caption) == periods


def test_specs_name_the_weights():
    specs = JudgeMetric().specs
    assert len({spec.weights_sha256 for spec in specs}) == 1 and len(specs[0].weights_sha256) == 64
