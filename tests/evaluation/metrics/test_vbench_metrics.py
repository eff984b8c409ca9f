"""VBench's dimensions: against slow versions, however the frames come, and under honest names."""

import tracemalloc

import numpy as np
import pytest
import vbench_formulas as slow
from hypothesis import given, settings
from hypothesis import strategies as st
from vbench_stubs import ROLES, Stub, info, moving_squares, scores, stubs

from longtake.evaluation.golden_check import _golden_scores
from longtake.evaluation.metric import Score, Segment
from longtake.evaluation.metrics import make_metrics
from longtake.evaluation.metrics.dimensions import of_own_prompts
from longtake.evaluation.metrics.vbench import SEGMENTS, SpanMetric
from longtake.evaluation.preprocessing import clip_transform, dino_transform, musiq_transform

BOTH = ("vbench", "long")


def all_metrics(**kwargs):
    """VBench's own."""
    return [m for m in make_metrics(stubs(**kwargs), groups=BOTH)[0] if SEGMENTS not in m.specs[0].name]


def short_scores(frames, **about):
    return _golden_scores(scores(make_metrics(stubs(), groups=("vbench",))[0], frames, **about))


def dynamic_score(frames, fps):
    (score,) = scores([SpanMetric("dynamic_degree", networks=[Stub("s")])], frames, fps=fps).values()
    return score


@pytest.fixture(scope="module")
def video():
    return moving_squares(23)


@pytest.fixture(scope="module")
def measured(video):
    return short_scores(video, fps=16.0)


@pytest.mark.parametrize(
    ("dimension", "cells", "transform"),
    [("subject_consistency", 3, dino_transform), ("background_consistency", 4, clip_transform)],
)
def test_consistencies_equal_the_slow_version(video, measured, dimension, cells, transform):
    features = Stub("s", cells=cells).encode(transform(video)).double().numpy()
    score = measured[dimension]
    assert score.value == pytest.approx(slow.consistency(features), abs=1e-6)
    assert score.weight == len(video) - 1


def test_flickering_and_smoothness_equal_the_slow_versions(video, measured):
    assert measured["temporal_flickering"].value == pytest.approx(slow.flickering(video), abs=1e-12)
    expected = slow.smoothness(video, lambda a, b: np.float32(0.5) * (a + b))
    assert measured["motion_smoothness"].value == pytest.approx(expected, abs=1e-12)
    # The neighbours decide, not the left-out frames: starting one frame later gives another number.
    assert slow.smoothness(video[1:], lambda a, b: np.float32(0.5) * (a + b)) != pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("fps", [8.0, 12.0, 16.0, 20.0, 28.0, 30.0])
@pytest.mark.parametrize("num_frames", [1, 2, 9, 23])
def test_dynamic_degree_equals_the_slow_version(fps, num_frames):
    video = moving_squares(num_frames, height=21, width=30)

    def flow(a, b):
        difference = (b - a).mean(axis=-1)
        return difference / 8, difference / 16

    is_dynamic, pairs = slow.dynamic(video, fps, flow)
    score = dynamic_score(video, fps)
    assert score.value == float(is_dynamic)
    assert score.details["n_pairs"] == len(pairs)
    np.testing.assert_allclose(score.details["pair_scores_first5"], pairs[:5], atol=1e-5)
    if pairs:
        assert score.details["pair_scores_max"] == pytest.approx(max(pairs), abs=1e-5)
    # Two sampled frames are dynamic even if nothing moves.
    still = dynamic_score(np.repeat(video[:1], 3, axis=0), 16.0)
    assert (still.value, still.details["n_pairs"], still.details["count_needed"]) == (1.0, 1, 0)


def test_frame_scores_are_means_over_frames(video, measured):
    stub = Stub("s", cells=5)
    features = stub.encode(clip_transform(video)).double()
    features /= features.norm(dim=-1, keepdim=True)
    assert measured["aesthetic_quality"].value == pytest.approx(float(stub.rate(features).mean()) / 10, abs=1e-6)
    values = [stub.score(musiq_transform(frame[None])) for frame in video]
    assert measured["imaging_quality"].value == pytest.approx(np.mean(values), abs=1e-6)


def test_agreement_looks_at_eight_middle_frames(video, measured):
    stub = Stub("s")
    clip = clip_transform(video[slow.middle_of_eight(len(video))], loader="uint8")[None]
    expected = slow.cosine(stub.encode_video(clip)[0].double(), stub.encode_text("a red square")[0].double())
    assert measured["overall_consistency"].value == pytest.approx(expected, abs=1e-6)
    # The other loader's overshoot is another number.
    other = stub.encode_video(clip_transform(video[slow.middle_of_eight(len(video))])[None])
    assert slow.cosine(other[0].double(), stub.encode_text("a red square")[0].double()) != expected


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    num_frames=st.integers(1, 40),
    fps=st.sampled_from([1.0, 3.5, 4.0, 8.0, 20.9]),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
def test_pieces_of_any_length_give_the_same_scores(num_frames, fps, cuts):
    video = moving_squares(num_frames)
    metrics = all_metrics()
    assert scores(metrics, video, cuts, fps=fps) == scores(metrics, video, fps=fps)


def test_a_static_video_scores_1_and_curves_show_where_it_changes():
    video = np.repeat(moving_squares(1), 40, axis=0)
    measured = short_scores(video, fps=8.0)
    for name in ("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness"):
        assert [w.value for w in measured[name].windows] == pytest.approx([1.0] * 3, abs=1e-6)
        assert measured[name].value == pytest.approx(1.0, abs=1e-6)
    assert measured["dynamic_degree"].value == 0.0
    video[36:] = 255 - video[36:]
    measured = short_scores(video, fps=8.0)
    for name in ("subject_consistency", "temporal_flickering", "motion_smoothness"):
        starts, values = zip(*((w.start_frame, w.value) for w in measured[name].windows), strict=True)
        assert starts == (0, 16, 32)
        assert values[0] == values[1] > values[2] + 0.01


@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_what_a_short_video_cannot_have_is_skipped_with_the_reason(num_frames):
    needs = {"smoothness": 3, "flickering": 2, "subject_consistency": 2, "background": 2}
    for name, score in scores(all_metrics(), moving_squares(num_frames)).items():
        need = next((number for part, number in needs.items() if part in name), 1)
        assert score.skipped == (f"needs at least {need} frames" if num_frames < need else None), name


def test_without_a_prompt_there_is_no_agreement(video):
    measured = scores(all_metrics(), video, prompt="")
    skipped = {name.partition("[")[0]: score.skipped for name, score in measured.items() if score.value is None}
    names = ("vbench_form/overall_consistency", "vbench_form/long/overall_consistency")
    assert skipped == dict.fromkeys(names, "the video has no prompt")


@pytest.mark.parametrize("num_pushed", [22, 24])
def test_a_video_of_another_length_than_announced_is_refused(num_pushed, video):
    for metric in all_metrics():
        meter = metric.start(info(video))
        with pytest.raises(ValueError, match=f"{num_pushed} frames came and num_frames=23"):
            meter.push(moving_squares(num_pushed))
            meter.finish()


def test_memory_does_not_grow_with_the_video():
    def peak(num_frames):
        variants = ("short", "long")
        metrics = [
            SpanMetric("temporal_flickering", variants),
            SpanMetric("dynamic_degree", variants, [Stub("s")]),
        ]
        piece = moving_squares(16, height=96, width=128)
        about = info(np.broadcast_to(piece[:1], (num_frames, *piece.shape[1:])), fps=16.0)
        meters = [metric.start(about) for metric in metrics]
        tracemalloc.start()
        for _ in range(num_frames // len(piece)):
            for meter in meters:
                meter.push(piece)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(640) < peak(64) + 100_000


def test_names_say_what_is_behind_a_number(video):
    names = {spec.name for metric in all_metrics() for spec in metric.specs}
    assert {name for name in names if name.startswith("vbench/")} == {
        "vbench/temporal_flickering",
        "vbench/long/temporal_flickering",
    }
    assert "vbench_form/subject_consistency[enc=stub_dino]" in names
    assert "vbench_form/long_dev/subject_consistency[enc=stub_dino,c2c=stub_dinov2]" in names
    assert "vbench_form/long/dynamic_degree[flow=stub_raft]" in names
    assert "vbench_form/aesthetic_quality[aesthetic=stub_aesthetic_clip+stub_aesthetic_head]" in names
    assert names == set(scores(all_metrics(), video))
    names = {spec.name for metric in all_metrics(official=True) for spec in metric.specs}
    assert len(names) == 8 + 8 + 2
    assert all(name.startswith("vbench/") and "[" not in name for name in names)


@pytest.mark.parametrize("role", ROLES)
def test_a_missing_network_skips_its_dimension_only_and_says_what_it_needs(role):
    backbones = stubs(official=True, without=(role,))
    metrics, skipped = make_metrics(backbones, groups=BOTH)
    assert (skipped.pop(SEGMENTS, None) is not None) == (role == "viclip")
    made = {spec.name for metric in metrics for spec in metric.specs}
    everything = {spec.name for metric in all_metrics(official=True) for spec in metric.specs}
    lost = {name for name in everything - made if f"vbench_form/{name.partition('/')[2]}" not in str(made)}
    measured_here = {name for name in skipped if "official tool" not in skipped[name]}
    assert measured_here == lost
    assert all(repr(role) in skipped[name] for name in lost)
    assert len(lost) == {"dino": 3, "clip": 3, "dinov2": 1, "dreamsim": 1, "aesthetic_clip": 0}.get(role, 2)


def test_dimensions_left_to_the_official_tool_are_listed_and_unknown_groups_refused():
    _, skipped = make_metrics(stubs(), groups=("vbench",))
    left = {"object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene"}
    assert left < {name.removeprefix("vbench/") for name in skipped}
    assert "detectron2" in skipped["vbench/color"] and "Tag2Text" in skipped["vbench/scene"]
    assert make_metrics(stubs(), groups=("long",))[1] == {}
    with pytest.raises(ValueError, match="unknown group of metrics 'short'; known: vbench, long"):
        make_metrics(stubs(), groups=("short",))


def test_scale_and_weight_say_how_a_run_is_averaged():
    specs = {spec.name.partition("[")[0]: spec for metric in all_metrics() for spec in metric.specs}
    assert specs["vbench_form/imaging_quality"].scale == specs["vbench_form/long/imaging_quality"].scale == 0.01
    assert specs["vbench_form/subject_consistency"].grouping == "frame"
    assert specs["vbench_form/motion_smoothness"].grouping == "video"
    assert specs["vbench_form/long/motion_smoothness"].grouping == "clip"
    assert specs["vbench_form/long_dev/subject_consistency"].clip_seconds == 2.0


def test_a_prompt_counts_for_its_own_dimensions_alone():
    names = (
        "vbench/long_dev/subject_consistency",
        "vbench_form/long/scene[x=Y]",
        "vbench/temporal_flickering",
        "proxy/sharpness",
    )
    scores = {name: Score(value=0.5) for name in names}
    assert of_own_prompts(scores, ()) == scores
    own = of_own_prompts(scores, ("subject_consistency", "dynamic_degree"))
    assert [own[name].value for name in names] == [0.5, None, None, 0.5]
    assert own["vbench/temporal_flickering"].skipped == "VBench has other prompts for temporal_flickering"


def test_prompts_that_change_are_each_held_against_their_own_frames():
    frames = np.concatenate([moving_squares(9, seed=seed) for seed in range(3)])
    texts = ("a red square", "a green square", "a blue square")
    segments = tuple(Segment(start_s=9 * i / 4, end_s=9 * (i + 1) / 4, prompt=text) for i, text in enumerate(texts))
    metrics = [m for m in make_metrics(stubs(), groups=("vbench",))[0] if SEGMENTS in m.specs[0].name]
    (score,) = scores(metrics, frames, segments=segments).values()
    # Each stretch as a video of its own, with its own prompt.
    alone = [
        short_scores(frames[9 * i : 9 * i + 9], prompt=text)["overall_consistency"].value
        for i, text in enumerate(texts)
    ]
    assert [window.value for window in score.windows] == pytest.approx(alone)
    assert [(window.start_frame, window.num_frames) for window in score.windows] == [(0, 9), (9, 9), (18, 9)]
    assert score.value == pytest.approx(sum(alone) / 3) and len({round(value, 4) for value in alone}) == 3
    late = (*segments[:2], Segment(start_s=90.0, end_s=99.0, prompt="never"))
    assert len(next(iter(scores(metrics, frames, segments=late).values())).windows) == 2
    assert next(iter(scores(metrics, frames).values())).skipped == "the video has one prompt"
