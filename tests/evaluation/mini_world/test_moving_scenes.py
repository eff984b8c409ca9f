"""The world is a pure, endless function whose captions, states and masks agree with its pixels."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.scenes import object_mask, object_state, revisit_pairs, training_scene, vocabulary
from longtake.evaluation.mini_world.scenes import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    FPS,
    _camera_offset,
    _is_held_back,
    describe,
    held_back_scenes,
    parse_caption,
    render,
    sample_scene,
)

seeds = st.integers(0, 10_000)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seeds)
def test_caption_carries_every_prompted_attribute(seed):
    scene = sample_scene(np.random.default_rng(seed))
    read = parse_caption(describe(scene))
    actor = scene.actor
    assert (read["shape"], read["colour"], read["motion"]) == (actor.shape, actor.colour, actor.motion)
    assert read["speed"] == (actor.speed if scene.says_speed else None)
    assert (read["background"], read["texture"]) == (scene.background, scene.texture)
    assert (read["camera"], read["event"]) == (scene.camera, scene.event)
    assert (read["second"] is None) == (scene.second is None)
    if scene.second is not None:
        assert read["second"]["colour"] == scene.second.colour
    assert set(describe(scene).split()) <= set(vocabulary())


@settings(deadline=None, derandomize=True, max_examples=20)
@given(seeds, st.integers(0, 10**7))
def test_frames_do_not_depend_on_their_neighbours(seed, start):
    scene = sample_scene(np.random.default_rng(seed))
    indices = np.array([start, start + 3, start + 1])
    together = render(scene, indices)
    assert together.shape == (3, 64, 64, 3)
    for frame, index in zip(together, indices, strict=True):
        assert np.array_equal(frame, render(scene, np.array([index]))[0])


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seeds)
def test_object_is_where_the_state_says_and_has_its_colour(seed):
    scene = sample_scene(np.random.default_rng(seed))
    frames = np.arange(0, 81, 9)
    video, mask, state = render(scene, frames), object_mask(scene, frames), object_state(scene, frames)
    for frame, alpha, center, seen in zip(video, mask, state.center, state.visibility, strict=True):
        if alpha.max() < 1.0 or seen < 0.95:
            continue
        inside = alpha == 1.0
        rows, columns = np.nonzero(inside)
        assert abs(columns.mean() + 0.5 - center[0]) < 2.0
        assert abs(rows.mean() + 0.5 - center[1]) < 2.0
        assert np.abs(frame[inside] - np.array(COLOURS[scene.actor.colour], dtype=float)).max() <= 1.0


def test_plain_background_has_its_colour():
    scene = replace(training_scene(0), texture="plain", camera="still", landmarks=(), event="none", second=None)
    outside = render(scene, np.arange(4))[object_mask(scene, np.arange(4)) == 0.0]
    assert np.abs(outside - np.array(BACKGROUNDS[scene.background], dtype=float)).max() <= 1


def test_training_and_held_back_prompts_are_disjoint():
    assert not any(_is_held_back(training_scene(index)) for index in range(200))
    held_back = held_back_scenes(50)
    assert all(_is_held_back(scene) for scene in held_back)
    assert training_scene(7) == training_scene(7)
    assert training_scene(7) != training_scene(7, seed=1)


def test_camera_returns_to_the_same_background():
    panning = [scene for scene in map(training_scene, range(100)) if scene.camera != "still"]
    for scene in panning[:6]:
        period = round(CAMERAS[scene.camera] * FPS)
        pairs = revisit_pairs(scene, period + 5)
        assert pairs == [(index, index + period) for index in range(5)]
        first, later = np.array(pairs).T
        assert np.allclose(_camera_offset(scene, first), _camera_offset(scene, later))
        clear = (object_mask(scene, first) == 0.0) & (object_mask(scene, later) == 0.0)
        difference = np.abs(render(scene, first).astype(int) - render(scene, later))[clear]
        assert difference.max() <= 1
        # Half a round trip away the view is another one, or the test above would prove nothing.
        far = render(scene, first + period // 4).astype(int)
        assert np.abs(far - render(scene, first)).mean() > 0.5
    assert revisit_pairs(replace(panning[0], camera="still"), 1000) == []


def test_object_is_gone_and_comes_back_in_events_and_is_always_seen_alone():
    for event in ("leaves", "hides"):
        scene = next(scene for scene in map(training_scene, range(500)) if scene.event == event)
        visibility = object_state(scene, np.arange(81)).visibility
        assert visibility[0] > 0.3 and visibility.min() == 0.0
        assert visibility[visibility.argmin() :].max() > 0.9
    scenes = [scene for scene in map(training_scene, range(200)) if scene.event == "none" and scene.second is None]
    for scene in scenes[:40]:
        assert object_state(scene, np.arange(0, 200, 5)).visibility.min() > 0.7


def test_larger_renderings_show_the_same_scene():
    scene = training_scene(3)
    small = render(scene, np.arange(3)).astype(float)
    large = render(scene, np.arange(3), size=128).astype(float)
    pooled = large.reshape(3, 64, 2, 64, 2, 3).mean(axis=(2, 4))
    assert np.abs(pooled - small).mean() < 2.0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="frame_indices"):
        render(training_scene(0), np.zeros((2, 2), dtype=int))
    with pytest.raises(ValueError, match="size=4"):
        render(training_scene(0), np.arange(2), size=4)
    with pytest.raises(ValueError, match="describe"):
        parse_caption("a red circle")
    with pytest.raises(ValueError, match="which"):
        object_mask(replace(training_scene(0), second=None), np.arange(2), which="second")
