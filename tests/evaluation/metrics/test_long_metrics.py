"""VBench-Long: clips score as videos of their own, and what the clip-to-clip branch does in every corner."""

import numpy as np
import pytest
import torch
import vbench_formulas as slow
from hypothesis import given, settings
from hypothesis import strategies as st
from vbench_stubs import Stub, moving_squares, scores, stubs

from longtake.evaluation.golden_check import _golden_scores
from longtake.evaluation.metrics import make_metrics
from longtake.evaluation.metrics.dimensions import _quantile_table, consistency, fused, mapped_clip_to_clip
from longtake.evaluation.preprocessing import dinov2_transform, dreamsim_transform

SUBJECT, BACKGROUND = "subject_consistency", "background_consistency"


def measure(frames, groups=("long",), **about):
    return scores(make_metrics(stubs(), groups=groups)[0], frames, **about)


@pytest.mark.parametrize(
    ("num_frames", "fps"),
    [
        (20, 4.0),  # two clips of 8 and one that borrows 4
        (16, 4.0),  # two clips, nothing left
        (17, 4.0),  # the borrowing clip starts on an odd frame: other frames are left out and interpolated
        (8, 4.0),  # exactly one
        (5, 4.0),  # shorter than one
        (45, 20.9),  # clips have 20 frames a second, so dynamic degree looks at every second, not every third
        (30, 5.9),
    ],
)
def test_every_clip_scores_as_a_video_of_its_own(num_frames, fps):
    frames = moving_squares(num_frames)
    long = _golden_scores(measure(frames, fps=fps), "long/")
    ranges = slow.clips(num_frames, fps)
    alone = [_golden_scores(measure(frames[start:end], ("vbench",), fps=float(int(fps)))) for start, end in ranges]
    assert len(long) == 8
    for name, score in long.items():
        rows = score.details["clips"]
        assert [(row["start_frame"], row["start_frame"] + row["num_frames"]) for row in rows] == ranges
        values = [clip[name].value for clip in alone]
        np.testing.assert_allclose([row["value"] for row in rows], values, atol=1e-6)
        assert score.value == pytest.approx(np.mean(values), abs=1e-6)
        assert score.weight == len(ranges)
        assert [window.value for window in score.windows] == [row["value"] for row in rows]
    for row, clip in zip(long["dynamic_degree"].details["clips"], alone, strict=True):
        assert row["n_pairs"] == clip["dynamic_degree"].details["n_pairs"]
        assert row["count_needed"] == clip["dynamic_degree"].details["count_needed"]


@pytest.mark.parametrize(
    ("name", "transform", "cells"), [(SUBJECT, dinov2_transform, 11), (BACKGROUND, dreamsim_transform, 12)]
)
def test_the_development_branch_compares_first_frames(name, transform, cells):
    frames = moving_squares(28)
    found = measure(frames, fps=4.0)
    long, dev = _golden_scores(found, "long/")[name], _golden_scores(found, "long_dev/")[name]
    firsts = frames[[start for start, _ in slow.clips(28, 4.0)]]
    between = slow.consistency(Stub("s", cells=cells).encode(transform(firsts)).double().numpy())
    assert len(firsts) == 4
    assert dev.details["clip2clip_score"] == pytest.approx(between, abs=1e-6)
    mapped = np.interp(between, np.arange(101) / 100, _quantile_table(name))
    assert dev.details["mapped_clip2clip_score"] == pytest.approx(mapped, abs=1e-6)
    for row, inclip in zip(dev.details["clips"], long.details["clips"], strict=True):
        assert row["inclip_score"] == inclip["value"]
        assert row["value"] == pytest.approx(0.5 * inclip["value"] + 0.5 * mapped, abs=1e-6)
    assert dev.value == pytest.approx(0.5 * long.value + 0.5 * mapped, abs=1e-6)
    assert long.details["clip2clip_score"] < 1.0, "told, and not used"


@pytest.mark.parametrize("num_frames", [5, 8])
def test_a_single_clip_has_no_clip_to_clip_term(num_frames):
    found = measure(moving_squares(num_frames))
    for name in (SUBJECT, BACKGROUND):
        dev = _golden_scores(found, "long_dev/")[name]
        assert dev.details["clip2clip_score"] == dev.details["mapped_clip2clip_score"] == 0.0
        assert dev.value == _golden_scores(found, "long/")[name].value


def test_clips_too_short_for_a_value_are_left_out_and_slow_videos_have_none():
    found = _golden_scores(measure(moving_squares(5), fps=1.0), "long/")
    # Clips of two frames: no frame is left out to be interpolated.
    assert found["motion_smoothness"].skipped == "needs at least 3 frames"
    assert found[SUBJECT].weight == 3
    for name, score in measure(moving_squares(5), ("vbench", "long"), fps=0.5).items():
        assert (score.skipped == "clips of VBench-Long need 1 frame per second, the video has 0.5") == ("long" in name)


def test_opposite_clips_count_as_missing_and_are_not_punished():
    first, *rest = (-1.0, 0.0), (0.005, 1.0), (0.6, 0.8)
    opposite, almost, two = (consistency(torch.tensor([[1.0, 0.0], other])) for other in (first, *rest))
    assert two == pytest.approx(0.6) and consistency(torch.ones(1, 2)) is None
    assert opposite == mapped_clip_to_clip(opposite, SUBJECT) == 0.0
    assert fused(0.9, opposite, SUBJECT) == 0.9
    assert fused(0.9, almost, SUBJECT) < 0.62


@settings(max_examples=50, deadline=None, derandomize=True)
@given(value=st.floats(-0.1, 1.1), dimension=st.sampled_from([SUBJECT, BACKGROUND]))
def test_the_table_is_read_linearly_and_flat_outside(value, dimension):
    table = _quantile_table(dimension)
    assert list(table) == sorted(table) and (len(table), table[0], table[100]) == (101, 0.0, 1.0)
    expected = np.interp(value, np.arange(101) / 100, table)
    assert mapped_clip_to_clip(value, dimension) == pytest.approx(expected, abs=1e-12)
    assert fused(0.8, value, dimension) == pytest.approx(0.4 + expected / 2 if expected else 0.8)
