"""True scenes do not drift; frozen, faded, forgetful and wrong videos do, each in the measure made for it."""

import numpy as np
import pytest
import torch

from lab.judge.training import without_object
from longtake.evaluation.metrics.judge import (
    MAX_PSNR,
    _masked_psnr,
    _sampled_scene,
    _WindowMeter,
    _with_amnesia,
    reference_levels,
)
from longtake.evaluation.mini_world.judge import load_judge
from longtake.evaluation.mini_world.scenes import held_back_scenes, render

SECONDS = 20
NUM_FRAMES = 16 * SECONDS
FLAT = ("background_psnr", "revisit_psnr", "object_present")


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def scenes():
    return held_back_scenes(20, seed=64)


@pytest.fixture(scope="module")
def still(scenes):
    return [s for s in scenes if s.camera == "still" and s.event == "none" and s.second is None][:6]


@pytest.fixture(scope="module")
def true_rows(judge, scenes):
    return [_measure(judge, scene, _video(scene)) for scene in scenes]


def test_true_scenes_are_flat_and_rightly_judged_in_every_window(true_rows):
    for name in FLAT:
        values = _values(true_rows, name)
        assert len(values) > 10
        assert values.min() == values.max() == (MAX_PSNR if name.endswith("psnr") else 1.0)
    motion = np.array([[row["motion_magnitude"] for row in rows] for rows in true_rows])
    assert np.abs(motion.mean(axis=0) - 1.0).max() < 0.03
    assert motion.min() > 0.8
    for name in ("shape", "colour", "background", "texture", "motion", "camera", "one_object"):
        by_window = np.array([[row[name] for row in rows] for rows in true_rows], dtype=float)
        assert np.nanmean(by_window, axis=0).min() >= 0.85, name


def test_a_frozen_video_does_not_move_and_one_of_twice_the_speed_moves_more(judge, still):
    frozen = _video(still[0])[:1].expand(NUM_FRAMES, -1, -1, -1)
    assert all(row["motion_magnitude"] == 0.0 for row in _measure(judge, still[0], frozen))
    noisy = frozen + 0.02 * torch.randn(frozen.shape, generator=torch.Generator().manual_seed(0))
    assert max(row["motion_magnitude"] for row in _measure(judge, still[0], noisy)) < 0.01
    fast = next(scene for scene in still if scene.actor.speed == "slowly")
    rows = _measure(judge, fast, _pixels(render(fast, 2 * np.arange(NUM_FRAMES))))
    assert min(row["motion_magnitude"] for row in rows) > 1.2


def test_a_background_that_changes_colour_loses_psnr_and_keeps_falling(judge, still):
    ramp = torch.linspace(0.0, 0.2, NUM_FRAMES)[:, None, None, None]
    for scene in still:
        rows = _measure(judge, scene, (_video(scene) + ramp).clamp(0.0, 1.0))
        psnr = [row["background_psnr"] for row in rows[1:]]
        assert psnr == sorted(psnr, reverse=True)
        assert psnr[-1] < 20.0
        assert np.isnan(rows[0]["background_psnr"])


def test_an_object_that_fades_is_gone_and_a_bright_picture_is_not_excused_as_one(judge, still):
    video = _video(still[0])
    video[NUM_FRAMES // 2 :] = _video(without_object(still[0]))[NUM_FRAMES // 2 :]
    rows = _measure(judge, still[0], video)
    assert [row["object_present"] for row in rows] == [1.0, 1.0, 0.0, 0.0]
    assert [row["one_object"] for row in rows] == [1.0, 1.0, 0.0, 0.0]
    video[NUM_FRAMES // 2 :] = 0.9
    rows = _measure(judge, still[0], video)
    assert rows[1]["background_psnr"] == MAX_PSNR
    assert rows[-1]["background_psnr"] < 10.0


def test_forgetting_what_the_caption_does_not_say_costs_revisits_and_nothing_else(judge, scenes):
    panned = [scene for scene in scenes if scene.camera != "still"][:4]
    for scene in panned:
        video, change = _with_amnesia(scene, num_frames=NUM_FRAMES)
        rows, true = _WindowMeter(judge, scene).look_at(video), _measure(judge, scene, _video(scene))
        for row, before in list(zip(rows, true, strict=True))[change:]:
            assert row["revisit_psnr"] < 30.0 < before["revisit_psnr"] == MAX_PSNR
            assert (row["background"], row["colour"]) == (before["background"], before["colour"])


def test_a_camera_a_few_pixels_late_has_not_forgotten(judge, scenes):
    scene = next(s for s in scenes if s.camera == "panning slowly")
    late = np.concatenate([render(scene, np.arange(192)), render(scene, np.arange(192, NUM_FRAMES) - 3)])
    rows = _measure(judge, scene, _pixels(late))
    assert rows[-1]["revisit_psnr"] > 25.0


def test_a_swapped_prompt_scores_low(judge, scenes, true_rows):
    swapped = [
        _measure(judge, scene, _video(scenes[index - 1]))
        for index, scene in enumerate(scenes)
        if scene.background != scenes[index - 1].background
    ]
    assert _values(swapped, "background").mean() < 0.1
    assert _values(swapped, "shape").mean() < 0.6
    assert _values(true_rows, "background").mean() > 0.95


def test_uneven_chunks_and_larger_frames_measure_the_same(judge, scenes, true_rows):
    large = torch.nn.functional.interpolate(_video(scenes[0]), scale_factor=2)
    meter = _WindowMeter(judge, scenes[0])
    cuts = [0, 1, 10, 10, 99, 250, NUM_FRAMES]
    rows = [row for a, b in zip(cuts, cuts[1:], strict=False) for row in meter.push(large[a:b])]
    for row, expected in zip(rows, true_rows[0], strict=True):
        assert row == pytest.approx(expected, nan_ok=True, rel=1e-4)


def test_meter_holds_one_window_and_one_round_trip_at_most(judge, scenes):
    scene = next(s for s in scenes if s.camera == "panning slowly")
    meter = _WindowMeter(judge, scene)
    for start in range(0, 16 * 60, 12):
        meter.look_at(_sampled_scene(scene, start + 12, start=start))
    assert len(meter._waiting) < 20
    assert len(meter._first_visits) == 48


def test_masked_psnr_matches_the_definition_and_is_capped():
    first, second = torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.1)
    second[:, 0] = 0.9
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0] = False
    assert _masked_psnr(first, second, mask).item() == pytest.approx(20.0, abs=1e-3)
    assert _masked_psnr(first, first, mask).item() == MAX_PSNR
    assert _masked_psnr(first, second, torch.zeros_like(mask)).isnan()


def test_truth_levels_separate_memory_from_forgetting(tmp_path, scenes):
    levels = reference_levels(tmp_path, range(12), prompt_seed=64)
    for name in ("background_psnr", "revisit_psnr"):
        assert levels["forgotten"][name] < levels["true scene"][name] == MAX_PSNR
    assert levels["true scene"]["background"] > 0.95
    (tmp_path / "levels.json").write_text((tmp_path / "levels.json").read_text().replace("50.0", "49.0"))
    assert reference_levels(tmp_path, range(12), prompt_seed=64)["true scene"]["revisit_psnr"] == 49.0, "read again"
    assert reference_levels(tmp_path, [1], prompt_seed=64)["true scene"] != levels["true scene"]


def _pixels(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255.0


def _video(scene):
    return _pixels(render(scene, np.arange(NUM_FRAMES)))


def _measure(judge, scene, video):
    meter = _WindowMeter(judge, scene)
    return [row for piece in video.split(50) for row in meter.push(piece)]


def _values(rows, name):
    values = np.array([row[name] for video in rows for row in video], dtype=float)
    return values[~np.isnan(values)]
