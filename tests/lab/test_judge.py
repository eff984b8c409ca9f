"""The judge names true scenes rightly, refuses what it cannot judge, and its labels follow the scene."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lab.judge.scorecard import (
    PASS_LINES,
    clip_from_frames,
    score_model,
    score_true_scenes,
    scorecard,
    write_scorecard,
)
from lab.judge.training import (
    IGNORE,
    clip_indices,
    collate,
    disturb,
    doubled,
    judge_loss,
    label_scene,
    round_trip_examples,
    save_judge,
    train_judge,
    training_example,
    without_object,
)
from lab.scenes import training_scene
from longtake.evaluation.mini_world.judge import (
    ATTRIBUTES,
    CLIP_FRAMES,
    FRAME_STRIDE,
    WEIGHTS,
    ClipJudge,
    expected_verdict,
    load_judge,
    verdicts,
)
from longtake.evaluation.mini_world.scenes import describe, held_back_scenes, parse_caption, render

NUM_SCENES = 80


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def scenes():
    return held_back_scenes(NUM_SCENES, seed=77)


@pytest.fixture(scope="module")
def own_score(judge, scenes):
    return score_true_scenes(judge, scenes, start=lambda index: 80 * (index % 12))


def test_judge_names_true_scenes_it_was_never_trained_on(own_score):
    accuracy = {line.attribute: line.accuracy.mean for line in own_score}
    assert set(accuracy) >= {*PASS_LINES, *ATTRIBUTES}
    assert min(accuracy.values()) >= 0.93, accuracy
    assert np.mean(list(accuracy.values())) > 0.97


def test_verdict_survives_mild_disturbance(judge, scenes):
    clips = torch.stack([_video(scene, clip_indices(40)) for scene in scenes[:40]])
    disturbed = disturb(clips, torch.Generator().manual_seed(3))
    pairs = zip(verdicts(judge, clips), verdicts(judge, disturbed), strict=True)
    same = [clean[name] == rough[name] for clean, rough in pairs for name in PASS_LINES.keys() & clean.keys()]
    assert np.mean(same) > 0.95


def test_a_swapped_prompt_scores_low(judge, scenes, own_score):
    swapped = score_model(
        judge,
        scenes,
        lambda prompts, seeds: torch.stack([_video(scenes[(seed + 1) % NUM_SCENES]) for seed in seeds]),
        batch_size=20,
    )
    right = {line.attribute: line.accuracy.mean for line in own_score}
    for line in swapped:
        if line.attribute in ("shape", "colour", "background", "texture", "motion"):
            assert line.accuracy.mean < 0.45 < right[line.attribute]
            assert not line.is_reached


def test_the_count_sees_no_object_and_a_twin(judge, scenes):
    rng = np.random.default_rng(5)
    still = [scene for scene in scenes if scene.event == "none" and scene.second is None][:30]
    for change, count in ((lambda s: s, "one"), (without_object, "none"), (lambda s: doubled(s, rng), "two")):
        changed = [change(scene) for scene in still]
        kept = [scene for scene in changed if "count" in label_scene(scene, clip_indices(0))[0]]
        clips = torch.stack([_video(scene, clip_indices(0)) for scene in kept])
        seen = [verdict["count"] for verdict in verdicts(judge, clips)]
        assert np.mean([name == count for name in seen]) >= 0.85, count


def test_labels_follow_the_caption_and_what_can_be_seen():
    for index in range(40):
        scene = training_scene(index, 3)
        names, state = label_scene(scene, clip_indices(0))
        wished = expected_verdict(parse_caption(describe(scene)))
        assert {key: names[key] for key in wished if key in names} == {k: v for k, v in wished.items() if k in names}
        assert state.shape == (CLIP_FRAMES, 4)
    empty, _ = label_scene(without_object(scene), clip_indices(0))
    assert empty["count"] == "none" and not empty.keys() & {"shape", "colour", "motion", "speed"}
    silent = replace(training_scene(0, 1), says_speed=False, second=None, event="none")
    wished = expected_verdict(parse_caption(describe(silent)))
    assert "speed" not in wished and (wished["count"], wished["shape"]) == ("one", silent.actor.shape)


def test_round_trip_examples_are_the_same_clips_seen_through_the_vae():
    through = list(round_trip_examples(lambda videos: videos, first=5, count=3))
    for index, (clip, names, state) in zip(range(5, 8), through, strict=True):
        expected, expected_names, expected_state = training_example(index)
        assert np.array_equal(clip, expected)
        assert names == expected_names
        assert np.array_equal(state, expected_state, equal_nan=True)
    dark = next(round_trip_examples(lambda videos: videos * 0.5, first=5, count=1))[0]
    assert np.abs(dark.astype(int) * 2 - through[0][0]).max() <= 2


def test_training_lowers_the_loss_and_ignores_undefined_labels():
    torch.manual_seed(0)
    batch = collate([training_example(index) for index in range(16)])
    assert any((labels == IGNORE).any() for labels in batch.labels.values())
    judge = ClipJudge()
    before = judge_loss(judge.train(), batch).item()
    train_judge(judge, num_clips=96, batch_size=16, learning_rate=2e-3)
    assert judge_loss(judge.train(), batch).item() < 0.9 * before < np.inf


def test_weights_survive_a_round_trip_and_others_are_refused(tmp_path, judge, scenes):
    path = tmp_path / "judge.safetensors"
    save_judge(judge, path, notes={"clips": "1"})
    clip = clip_from_frames(_video(scenes[0])[None])
    assert verdicts(load_judge(path), clip) == verdicts(judge, clip)
    assert WEIGHTS.stat().st_size < 1_500_000
    with pytest.raises(ValueError, match="do not exist"):
        load_judge(tmp_path / "missing.safetensors")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not a judge of this version"):
        load_judge(path)


def test_clip_from_frames_picks_quarters_of_a_second_and_resizes():
    frames = torch.arange(100.0)[None, :, None, None, None].expand(1, 100, 3, 128, 96) / 100.0
    clip = clip_from_frames(frames, start=3)
    assert clip.shape == (1, CLIP_FRAMES, 3, 64, 64)
    assert torch.allclose(clip[0, :, 0, 0, 0], (3.0 + FRAME_STRIDE * torch.arange(CLIP_FRAMES)) / 100.0)
    with pytest.raises(ValueError, match="pass at least 5 seconds"):
        clip_from_frames(frames[:, :60])


def test_scorecard_counts_and_names_mistakes(tmp_path):
    wished = [{"shape": "circle", "count": "one"}, {"shape": "circle", "count": "two"}, {"shape": "star"}]
    seen = [{"shape": shape, "count": "one"} for shape in ("square", "square", "star")]
    lines = {line.attribute: line for line in scorecard(seen, wished)}
    counts = {name: (line.num_right, line.num_asked) for name, line in lines.items()}
    assert counts == {"shape": (1, 3), "one_object": (1, 1), "count": (1, 2)}
    assert lines["shape"].mistakes == {"circle -> square": 2} and not lines["shape"].is_reached
    write_scorecard(lines.values(), tmp_path / "score.json", notes={"prompts": 3})
    assert '"is_reached": false' in (tmp_path / "score.json").read_text()


def _video(scene, frames=range(81)):
    return torch.from_numpy(render(scene, np.asarray(frames))).permute(0, 3, 1, 2).float() / 255.0
