"""Numbers that VBench's own code gave with stand-in networks: all of them come out here."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from vbench_formulas import official_clip_to_clip
from vbench_stubs import scores

from longtake.evaluation.backbones import Backbones, load_backbones
from longtake.evaluation.golden_check import TOLERANCE, _golden_scores, check_golden
from longtake.evaluation.metrics import make_metrics
from longtake.evaluation.metrics.dimensions import fused

FOLDER = Path(__file__).resolve().parents[2] / "golden" / "vbench"


@pytest.fixture(scope="module")
def golden():
    return json.loads((FOLDER / "golden.json").read_text())


@pytest.fixture(scope="module")
def backbones():
    return load_backbones(FOLDER / "stubs.py")


@pytest.fixture(scope="module")
def checks(backbones):
    return check_golden(FOLDER, backbones)


def test_every_number_comes_out(checks):
    wrong = [check for check in checks if not check.ok]
    assert not wrong
    assert len(checks) > 200


def test_every_kind_of_number_is_checked(checks, golden):
    of_videos = (
        "decoded bytes",
        "temporal_flickering",
        "subject_consistency",
        "background_consistency",
        "motion_smoothness",
        "aesthetic_quality",
        "imaging_quality, longer",
        "imaging_quality, shorter_centercrop",
        "overall_consistency",
        "dynamic_degree, is_dynamic",
        "dynamic_degree, count_above",
    )
    counts = {part: sum(check.name.endswith(part) for check in checks) for part in of_videos}
    assert counts == dict.fromkeys(of_videos, 8) and len(golden["videos"]) == 8
    for part in ("middle frames", "clips of", "prompt of", "score: ", "fusion of"):
        assert sum(check.name.startswith(part) for check in checks) >= 3, part


@pytest.fixture
def one_video(tmp_path, golden):
    """A folder with the golden numbers of the shortest video."""
    name = "short20"
    (tmp_path / "golden.json").write_text(json.dumps({"videos": {name: golden["videos"][name]}}))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / f"{name}.mp4").symlink_to(FOLDER / "videos" / f"{name}.mp4")
    return tmp_path


def test_another_network_and_a_missing_one_are_found_out(one_video, backbones):
    assert check_golden(one_video, backbones)[0].ok
    swapped = Backbones({**backbones.found, "dino": backbones.get("dinov2")})
    wrong = [check for check in check_golden(one_video, swapped) if check.error > TOLERANCE]
    assert [check.name for check in wrong] == ["short20: subject_consistency"]
    without = Backbones({role: backbone for role, backbone in backbones.found.items() if role != "amt"})
    (wrong,) = (check for check in check_golden(one_video, without) if not check.ok)
    assert wrong.name == "short20: motion_smoothness" and wrong.got is None


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"fuse_examples": [{}]}'])
def test_a_folder_without_numbers_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "golden.json").write_text(text)
    with pytest.raises(ValueError, match="golden numbers"):
        check_golden(tmp_path, Backbones())


def test_a_run_of_vbench_long_whose_names_had_underscores(golden, backbones):
    """Its clip-to-clip values were all lost; what is left are the clips' own, without a fixed order."""
    score, rows = golden["long_PITFALL_underscore_names_dev_flag"]["subject_consistency"]
    metrics = [m for m in make_metrics(backbones, groups=("long",))[0] if "subject" in m.specs[0].name]
    ours, drifted = [], []
    for number, name in enumerate(("moving_squares", "drift")):
        frames, fps = runpy.run_path(str(FOLDER / "make_videos.py"))["build"](name)
        dev = _golden_scores(scores(metrics, frames, fps=fps), "long_dev/")["subject_consistency"]
        by_video = {f"vid_{number}.mp4": dev.details["clip2clip_score"]}
        for index, clip in enumerate(dev.details["clips"]):
            lost = official_clip_to_clip(f"vid_{number}_{index:03d}.mp4", by_video)
            ours.append(fused(clip["inclip_score"], lost, "subject_consistency"))
        drifted.append(dev)
    np.testing.assert_allclose(sorted(ours), sorted(row["video_results"] for row in rows), atol=TOLERANCE, rtol=0)
    assert np.mean(ours) == pytest.approx(score, abs=TOLERANCE)
    assert {row["clip2clip_score"] for row in rows} == {0}
    # What the names had hidden: the first frames of the clips drift apart.
    assert drifted[1].details["clip2clip_score"] == pytest.approx(0.35, abs=0.01)
    assert drifted[1].details["mapped_clip2clip_score"] == pytest.approx(0.90, abs=0.005)
