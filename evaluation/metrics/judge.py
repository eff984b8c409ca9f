"""The bundled judge as metrics: does a video of the mini model's world show what its caption asks for, to the end."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from math import isnan
from typing import Any

import numpy as np
import torch

from longtake.evaluation.metric import MetricSpec, Score, VideoInfo, Window
from longtake.evaluation.mini_world.drift import ACCURACIES, MAX_PSNR, WINDOW_FRAMES, WindowMeter
from longtake.evaluation.mini_world.judge import WEIGHTS, ClipJudge, load_judge
from longtake.evaluation.mini_world.scenes import (
    CAMERAS,
    EVENT_PERIOD,
    FPS,
    SIZE,
    SPEEDS,
    Actor,
    Scene,
    describe,
    held_back_scenes,
    parse_caption,
)
from longtake.evaluation.running.suites import PROMPT_SEED

MEAN_OF_SIX = "mean_of_six"
NUM_KNOWN = 256
"""Scenes of the suite that are known by their captions."""
BACKBONE = "longtake judge"


def _accuracy(name: str, what: str) -> MetricSpec:
    return _spec(
        name, unit="share", range=(0.0, 1.0), description=f"Share of the windows in which the judge sees {what}."
    )


def _spec(name: str, **values: Any) -> MetricSpec:
    return MetricSpec(
        name=f"judge/{name}", higher_is_better=values.pop("higher_is_better", True), backbone=BACKBONE, **values
    )


SPECS = (
    *(_accuracy(name, f"the caption's {name}") for name in ACCURACIES),
    _accuracy(MEAN_OF_SIX, "what the caption says, mean over " + ", ".join(ACCURACIES)),
    _accuracy("one_object", "one object, as the caption says"),
    _spec(
        "background_psnr",
        unit="dB",
        range=(0.0, MAX_PSNR),
        description="Background of each window against that of the first, still cameras only.",
    ),
    _spec(
        "revisit_psnr",
        unit="dB",
        range=(0.0, MAX_PSNR),
        description="Each view against the same view a camera round trip or more before, panning cameras only.",
    ),
    _spec(
        "motion_magnitude",
        unit="ratio",
        range=(0.0, None),
        higher_is_better=None,
        description="Pixels that change visibly within a quarter of a second, over those of the true scene.",
    ),
    _spec(
        "object_present",
        unit="share",
        range=(0.0, 1.0),
        description="Share of the frames that show an object, unless the caption lets it leave or hide.",
    ),
)


class JudgeMetric:
    """Measures of the bundled world, on five-second windows.

    A caption does not say how large an object is or where a texture begins, and the amount of true motion depends on
    it. Captions of the suite ``moving_scenes`` have a known scene; for others a middling one stands in.

    Args:
        scenes: {caption: scene} that are known; those of the suite when None.
    """

    def __init__(self, scenes: Mapping[str, Scene] | None = None) -> None:
        self._scenes = scenes
        sha256 = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
        self.specs = tuple(replace(spec, weights_sha256=sha256) for spec in SPECS)

    def start(self, video: VideoInfo) -> "JudgeMeter":
        """A meter for one video; one that is not of the bundled world gets scores without values."""
        reason = _why_not(video)
        if reason is not None:
            return JudgeMeter(video, None, reason=reason)
        given = (_suite_scenes() if self._scenes is None else self._scenes).get(video.prompt)
        return JudgeMeter(video, given or _middling_scene(video.prompt), is_given=given is not None)


@cache
def _judge() -> ClipJudge:
    return load_judge()


@cache
def _suite_scenes() -> Mapping[str, Scene]:
    """{caption: scene} of the suite's first scenes; where two share a caption, the first."""
    scenes = held_back_scenes(NUM_KNOWN, seed=PROMPT_SEED)
    return {describe(scene): scene for scene in reversed(scenes)}


def _why_not(video: VideoInfo) -> str | None:
    """Why the judge cannot see a video, in one clause; None if it can."""
    if not _is_caption(video.prompt):
        return "its prompt is no caption of the bundled world of moving scenes"
    if len(video.segments) > 1:
        return "its prompt changes over time"
    if abs(video.fps - FPS) > 0.01 or video.height != video.width or video.height < SIZE:
        return (
            f"the judge sees square videos of {SIZE} pixels or more at {FPS} frames per second, this one is "
            f"{video.width}x{video.height} at {video.fps:g}"
        )
    if video.num_frames < WINDOW_FRAMES:
        return f"needs {WINDOW_FRAMES / FPS:g} s of video"
    return None


def _is_caption(prompt: str) -> bool:
    """Whether a prompt is in the words of the bundled world and says all that its captions say."""
    try:
        found = parse_caption(prompt)
    except ValueError:
        return False
    actors = [found, *([found["second"]] if found["second"] is not None else [])]
    needed = ("shape", "colour", "motion")
    is_complete = all(actor[name] is not None for actor in actors for name in needed)
    return is_complete and found["background"] is not None and found["texture"] is not None


def _middling_scene(caption: str) -> Scene:
    """A scene with the caption, the rest of it in the middle of what scenes have; no landmarks.

    Raises:
        ValueError: If it is no caption of the bundled world.
    """
    if not _is_caption(caption):
        raise ValueError(f"caption={caption!r} is no caption of the moving scenes: write it like describe() does.")
    found = parse_caption(caption)
    second = found["second"]
    return Scene(
        actor=_middling_actor(found, row=None if second is None else 0),
        second=None if second is None else _middling_actor(second, row=1),
        background=found["background"],
        texture=found["texture"],
        texture_x=0.0,
        texture_y=0.0,
        camera=found["camera"],
        camera_phase=0.0,
        event=found["event"],
        landmarks=(),
        says_speed=found["speed"] is not None,
    )


def _middling_actor(found: Mapping[str, Any], *, row: int | None) -> Actor:
    return Actor(
        shape=found["shape"],
        colour=found["colour"],
        motion=found["motion"],
        speed=found["speed"] or "slowly",
        radius=11.25 if row is None else 8.25,
        phase=0.0,
        anchor_x=SIZE / 2,
        anchor_y=SIZE / 2 if row is None else (19.0, 45.0)[row],
        reach=14.5 if row is None else 8.0,
    )


def _scene_periods(caption: str) -> list[float]:
    """Seconds after which something in a true scene of the caption repeats, each once, shortest first.

    What repeats after a multiple of all of them repeats as it should.
    """
    found = parse_caption(caption)
    periods = {CAMERAS[found["camera"]]} - {0.0}
    for actor in (found, found["second"]):
        if actor is not None:
            periods |= {SPEEDS[actor["speed"]]} if actor["speed"] is not None else set(SPEEDS.values())
    if found["event"] != "none":
        periods.add(EVENT_PERIOD)
    return sorted(periods)


class JudgeMeter:
    """Judges one video.

    Args:
        video: What is announced.
        scene: It was made from, or one that stands in; None where the judge sees nothing.
        is_given: Whether the scene is the true one.
        reason: Why the judge sees nothing.
    """

    def __init__(self, video: VideoInfo, scene: Scene | None, *, is_given: bool = False, reason: str = "") -> None:
        self._video, self._is_given, self._reason = video, is_given, reason
        self._meter = WindowMeter(_judge(), [scene]) if scene is not None else None
        self._rows: list[dict[str, float]] = []

    def push(self, frames: np.ndarray) -> None:
        """Take the next frames, (F, H, W, 3) uint8."""
        if self._meter is not None:
            pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)[None].float() / 255.0
            self._rows.extend(row[0] for row in self._meter.push(pixels))

    def finish(self) -> dict[str, Score]:
        """Means over the whole windows, with their curves."""
        if self._meter is None:
            return {spec.name: Score.none(self._reason) for spec in SPECS}
        for row in self._rows:
            row[MEAN_OF_SIX] = sum(row[name] for name in ACCURACIES) / len(ACCURACIES)
        return {spec.name: self._score(spec.name.removeprefix("judge/")) for spec in SPECS}

    def _score(self, measure: str) -> Score:
        windows = tuple(
            Window(
                start_frame=index * WINDOW_FRAMES,
                num_frames=WINDOW_FRAMES,
                value=None if isnan(row[measure]) else float(row[measure]),
            )
            for index, row in enumerate(self._rows)
        )
        values = [window.value for window in windows if window.value is not None]
        if not values:
            return Score.none("does not apply to this caption, or needs a longer video")
        details: dict[str, Any] = {}
        if measure == "motion_magnitude":
            details = {
                "true_scene": "known" if self._is_given else "middling",
                "scene_periods_s": _scene_periods(self._video.prompt),
            }
        return Score(value=sum(values) / len(values), windows=windows, details=details)
