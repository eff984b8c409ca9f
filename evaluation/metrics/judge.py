"""The bundled judge as metrics: does a video of the mini model's world show what its caption asks for, to the end.

Measures of five-second windows, each defined so that a true scene scores the same in every window of an endless video:

* accuracies: does the judge see in this window what the caption asks for;
* ``background_psnr``: median background of this window against that of the first, still cameras only;
* ``revisit_psnr``: each view against the same view one or more camera round trips before, panning cameras only;
* ``motion_magnitude``: share of pixels that change visibly within a quarter of a second, true scene = 1;
* ``object_present``: share of frames with something as bright as an object, unless the caption lets it leave or hide.

Nothing here ever holds more than one window of frames plus one camera round trip per video.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from longtake.evaluation.metric import MetricSpec, Score, VideoInfo, Window
from longtake.evaluation.mini_world.judge import (
    CLIP_FRAMES,
    CLIP_SECONDS,
    FRAME_STRIDE,
    WEIGHTS,
    ClipJudge,
    expected_verdict,
    load_judge,
    resize_frames,
    verdicts,
)
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
    render,
    sample_scene,
)
from longtake.evaluation.running.suites import PROMPT_SEED

WINDOW_FRAMES = CLIP_FRAMES * FRAME_STRIDE
ACCURACIES = ("shape", "colour", "background", "texture", "motion", "camera")
MEMORIES = ("background_psnr", "revisit_psnr")
MEASURES = (*ACCURACIES, "one_object", *MEMORIES, "motion_magnitude", "object_present")
MEAN_OF_SIX = "mean_of_six"
BRIGHT = 180 / 255  # every object colour has a channel above, no background and no landmark has
VISIBLE_CHANGE = 0.15  # of full scale, in some channel: above codec and model flicker, below any moving edge
MIN_BRIGHT_PIXELS = 40  # of 4096; the smallest whole object of the world covers 60
MAX_PSNR = 50.0  # dB; equal images would be infinite
REVISIT_SHIFT = 6  # pixels; a camera that is late by less has not forgotten the place
MIN_SEEN = 0.5  # share of the background that has to be seen for it to be compared without the object
NUM_KNOWN = 256  # scenes of the suite that are known by their captions


def _spec(name: str, description: str, **changes: Any) -> MetricSpec:
    facts: dict[str, Any] = {"higher_is_better": True, "unit": "share", "range": (0.0, 1.0)}
    return MetricSpec(name=f"judge/{name}", backbone="longtake judge", description=description, **{**facts, **changes})


SPECS = (
    *(_spec(name, f"Share of the windows in which the judge sees the caption's {name}.") for name in ACCURACIES),
    _spec(
        MEAN_OF_SIX,
        f"Share of the windows in which the judge sees what the caption says, mean over {', '.join(ACCURACIES)}.",
    ),
    _spec("one_object", "Share of the windows in which the judge sees one object, as the caption says."),
    _spec(
        "background_psnr",
        "Background of each window against that of the first, still cameras only.",
        unit="dB",
        range=(0.0, MAX_PSNR),
    ),
    _spec(
        "revisit_psnr",
        "Each view against the same view a camera round trip or more before, panning cameras only.",
        unit="dB",
        range=(0.0, MAX_PSNR),
    ),
    _spec(
        "motion_magnitude",
        "Pixels that change visibly within a quarter of a second, over those of the true scene.",
        unit="ratio",
        range=(0.0, None),
        higher_is_better=None,
    ),
    _spec("object_present", "Share of the frames that show an object, unless the caption lets it leave or hide."),
)


def _bright_mask(frames: Tensor) -> Tensor:
    """Bright pixels, where an object may be, and two pixels around them: (frames, 1, H, W) bool."""
    bright = (frames.amax(dim=1, keepdim=True) > BRIGHT).float()
    return F.max_pool2d(bright, 5, stride=1, padding=2) > 0.5


def _median_background(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Per-pixel median of (frames, 3, H, W) over the frames that show its background, and (H, W) bool: any did."""
    covered = _bright_mask(frames)
    seen = ~covered.all(dim=0)[0]
    uncovered = torch.where(covered & seen, torch.nan, frames)
    return uncovered.nanmedian(dim=0).values, seen


def _masked_psnr(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of (..., 3, H, W) in dB over a (..., H, W) mask; NaN where the mask is empty."""
    error = (first - second).square().mean(dim=-3)
    mse = (error * mask).sum(dim=(-1, -2)) / mask.sum(dim=(-1, -2))
    return (-10.0 * mse.log10()).clamp(max=MAX_PSNR)


def _background_psnr(reference: tuple[Tensor, Tensor], frames: Tensor) -> float:
    """Compare the background of a window with a reference of :func:`_median_background`.

    The object's place is left out, unless more than half of the picture would be: a picture that has gone bright
    all over is no object.
    """
    median, seen = _median_background(frames)
    both = seen & reference[1]
    if both.float().mean() < MIN_SEEN:
        both = torch.ones_like(both)
    return _masked_psnr(median, reference[0], both).item()


def _motion_share(frames: Tensor) -> float:
    """Share of pixels that change visibly between (frames, 3, H, W) a quarter of a second apart, mean over them."""
    change = (frames[1:] - frames[:-1]).abs().amax(dim=1)
    return (change > VISIBLE_CHANGE).float().mean().item()


def _presence(frames: Tensor) -> float:
    pixels = (frames.amax(dim=1) > BRIGHT).sum(dim=(1, 2))
    return (pixels >= MIN_BRIGHT_PIXELS).float().mean().item()


def _revisit_psnr(earlier: Tensor, later: Tensor) -> float:
    """Mean dB of (frames, 3, H, W) views against their first visits, objects left out, each at its best shift."""
    width = later.shape[-1]
    free_earlier, free_later = ~_bright_mask(earlier)[:, 0], ~_bright_mask(later)[:, 0]
    best = torch.full((len(later),), -torch.inf)
    for shift in range(-REVISIT_SHIFT, REVISIT_SHIFT + 1):
        here = slice(max(0, shift), width + min(0, shift))
        there = slice(max(0, -shift), width + min(0, -shift))
        free = free_later[..., here] & free_earlier[..., there]
        psnr = _masked_psnr(later[..., here], earlier[..., there], free)
        best = torch.fmax(best, psnr)
    best = best[best.isfinite()]
    return best.mean().item() if len(best) else nan


def _sampled_scene(scene: Scene, num_frames: int, *, start: int = 0) -> Tensor:
    """Render the frames of a true scene that the measures look at: (frames, 3, 64, 64) float32 in [0, 1]."""
    pixels = render(scene, np.arange(start, num_frames, FRAME_STRIDE))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0


class _WindowMeter:
    """Measures a video made from a scene's caption; the scene's motion in the first minute is the unit of motion."""

    def __init__(self, judge: ClipJudge, scene: Scene) -> None:
        self._judge = judge
        self._expected = expected_verdict(parse_caption(describe(scene)))
        self._round_trip = round(CAMERAS[scene.camera] * FPS) // FRAME_STRIDE  # in looked-at frames; 0: still
        self._true_motion = _motion_share(_sampled_scene(scene, 60 * FPS))
        self._background: tuple[Tensor, Tensor] | None = None
        self._first_visits: list[Tensor] = []
        self._num_frames = self._num_windows = 0
        self._waiting: list[Tensor] = []

    def push(self, frames: Tensor) -> list[dict[str, float]]:
        """Take (F, 3, H, W) in [0, 1], 16 a second; return {measure: value or NaN} of every window they complete."""
        skipped = -self._num_frames % FRAME_STRIDE
        self._num_frames += len(frames)
        return self.look_at(resize_frames(frames[skipped::FRAME_STRIDE]).clamp(0.0, 1.0))

    def look_at(self, frames: Tensor) -> list[dict[str, float]]:
        """Do the same with (F, 3, 64, 64) frames a quarter of a second apart."""
        self._waiting.extend(frames)
        rows = []
        while len(self._waiting) >= CLIP_FRAMES:
            rows.append(self._measure(torch.stack(self._waiting[:CLIP_FRAMES])))
            del self._waiting[:CLIP_FRAMES]
            self._num_windows += 1
        return rows

    def _measure(self, clip: Tensor) -> dict[str, float]:
        (verdict,) = verdicts(self._judge, clip[None])
        expected = self._expected
        is_right = {name: float(verdict[name] == wanted) for name, wanted in expected.items()}
        return {
            **{name: is_right.get(name, nan) for name in ACCURACIES},
            "one_object": is_right["count"] if expected["count"] == "one" else nan,
            "background_psnr": nan if self._round_trip else self._background_measure(clip),
            "revisit_psnr": self._revisit_measure(clip) if self._round_trip else nan,
            "motion_magnitude": _motion_share(clip) / self._true_motion,
            "object_present": _presence(clip) if expected["event"] == "none" else nan,
        }

    def _background_measure(self, clip: Tensor) -> float:
        if self._background is None:
            self._background = _median_background(clip)
            return nan
        return _background_psnr(self._background, clip)

    def _revisit_measure(self, clip: Tensor) -> float:
        start = self._num_windows * CLIP_FRAMES
        missing = max(0, self._round_trip - len(self._first_visits))
        self._first_visits.extend(clip[:missing].clone())
        visits = [self._first_visits[(start + index) % self._round_trip] for index in range(missing, len(clip))]
        return _revisit_psnr(torch.stack(visits), clip[missing:]) if visits else nan


class JudgeMetric:
    """Measures of the bundled world, on five-second windows.

    A caption does not say how large an object is or where a texture begins, and the amount of true motion depends on
    it. Captions of the suite ``moving_scenes`` have a known scene; for others a middling one stands in.
    """

    def __init__(self) -> None:
        sha256 = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
        self.specs = tuple(replace(spec, weights_sha256=sha256) for spec in SPECS)

    def start(self, video: VideoInfo) -> "_JudgeMeter":
        return _JudgeMeter(video)


_judge = cache(load_judge)


@cache
def _suite_scenes() -> Mapping[str, Scene]:
    """{caption: scene} of the suite's first scenes; where two share a caption, the first."""
    scenes = held_back_scenes(NUM_KNOWN, seed=PROMPT_SEED)
    return {describe(scene): scene for scene in reversed(scenes)}


def _why_not(video: VideoInfo) -> str | None:
    """Reason, in one clause, for which the judge cannot see a video; None if it can."""
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
    """A prompt is in the words of the bundled world and says all that its captions say."""
    try:
        found = parse_caption(prompt)
    except ValueError:
        return False
    actors = [found] if found["second"] is None else [found, found["second"]]
    said = [actor[name] for actor in actors for name in ("shape", "colour", "motion")]
    return None not in (found["background"], found["texture"], *said)


def _middling_scene(caption: str) -> Scene:
    """A scene with the caption, the rest of it in the middle of what scenes have; no landmarks."""
    found = parse_caption(caption)
    second = found["second"]
    return Scene(
        actor=_middling_actor(found, row=None if second is None else 0),
        second=None if second is None else _middling_actor(second, row=1),
        **{name: found[name] for name in ("background", "texture", "camera", "event")},
        texture_x=0.0,
        texture_y=0.0,
        camera_phase=0.0,
        landmarks=(),
        says_speed=found["speed"] is not None,
    )


def _middling_actor(found: Mapping[str, Any], *, row: int | None) -> Actor:
    return Actor(
        **{name: found[name] for name in ("shape", "colour", "motion")},
        speed=found["speed"] or "slowly",
        radius=11.25 if row is None else 8.25,
        phase=0.0,
        anchor_x=SIZE / 2,
        anchor_y=SIZE / 2 if row is None else (19.0, 45.0)[row],
        reach=14.5 if row is None else 8.0,
    )


def _scene_periods(caption: str) -> list[float]:
    """Seconds after which something in a true scene of the caption repeats, each once, shortest first."""
    found = parse_caption(caption)
    periods = {CAMERAS[found["camera"]]} - {0.0}
    for actor in (found, found["second"]):
        if actor is not None:
            periods |= {SPEEDS[actor["speed"]]} if actor["speed"] is not None else set(SPEEDS.values())
    if found["event"] != "none":
        periods.add(EVENT_PERIOD)
    return sorted(periods)


class _JudgeMeter:
    def __init__(self, video: VideoInfo) -> None:
        self._prompt, self._reason = video.prompt, _why_not(video)
        self._rows: list[dict[str, float]] = []
        if self._reason is None:
            known = _suite_scenes().get(video.prompt)
            self._is_known = known is not None
            self._meter = _WindowMeter(_judge(), known or _middling_scene(video.prompt))

    def push(self, frames: np.ndarray) -> None:
        if self._reason is None:
            pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255.0
            self._rows.extend(self._meter.push(pixels))

    def finish(self) -> dict[str, Score]:
        if self._reason is not None:
            return {spec.name: Score.none(self._reason) for spec in SPECS}
        for row in self._rows:
            row[MEAN_OF_SIX] = sum(row[name] for name in ACCURACIES) / len(ACCURACIES)
        return {spec.name: self._score(spec.name.removeprefix("judge/")) for spec in SPECS}

    def _score(self, measure: str) -> Score:
        found = [None if isnan(row[measure]) else float(row[measure]) for row in self._rows]
        values = [value for value in found if value is not None]
        windows = tuple(
            Window(start_frame=index * WINDOW_FRAMES, num_frames=WINDOW_FRAMES, value=value)
            for index, value in enumerate(found)
        )
        if not values:
            return Score.none("does not apply to this caption, or needs a longer video")
        details: dict[str, Any] = {}
        if measure == "motion_magnitude":
            scene = "known" if self._is_known else "middling"
            details = {"true_scene": scene, "scene_periods_s": _scene_periods(self._prompt)}
        return Score(value=sum(values) / len(values), windows=windows, details=details)


def _with_amnesia(scene: Scene, *, num_frames: int) -> tuple[Tensor, int]:
    """Looked-at frames (frames, 3, 64, 64) of a scene that turns into another, and the first window after that.

    It does so once everything has been seen. The other has the same caption and the same camera, but another texture
    phase and other landmarks.
    """
    rng = np.random.default_rng([0, round(1000 * scene.texture_x)])
    other = sample_scene(rng)
    while bool(other.landmarks) != bool(scene.landmarks):
        other = sample_scene(rng)
    forgotten = replace(scene, texture_x=other.texture_x, texture_y=other.texture_y, landmarks=other.landmarks)
    window = int(-(-max(CLIP_SECONDS, CAMERAS[scene.camera]) // CLIP_SECONDS))
    change = window * WINDOW_FRAMES
    after = _sampled_scene(forgotten, num_frames, start=change)
    return torch.cat([_sampled_scene(scene, change), after]), window


def reference_levels(folder: Path, prompts: Sequence[int], *, prompt_seed: int) -> dict[str, dict[str, float]]:
    """Levels of the true scenes of some prompts; measured once, then read from ``levels.json`` in ``folder``.

    ``forgotten`` is the level that a video reaches when it keeps to its caption and remembers nothing else.
    """
    settings = json.dumps({"prompts": list(prompts), "prompt_seed": prompt_seed}, sort_keys=True)
    key = hashlib.sha256(settings.encode() + WEIGHTS.read_bytes()).hexdigest()[:12]
    path = folder / "levels.json"
    if path.is_file() and (known := json.loads(path.read_text()))["key"] == key:
        return known["levels"]
    true: list[dict[str, float]] = []
    lost: list[dict[str, float]] = []
    scenes, num_frames = held_back_scenes(prompts[-1] + 1, seed=prompt_seed), 20 * FPS
    for scene in (scenes[index] for index in prompts):
        true += _WindowMeter(_judge(), scene).look_at(_sampled_scene(scene, num_frames))
        video, change = _with_amnesia(scene, num_frames=num_frames)
        lost += _WindowMeter(_judge(), scene).look_at(video)[change:]
    levels = {"true scene": _means(true, MEASURES), "forgotten": _means(lost, MEMORIES)}
    path.write_text(json.dumps({"key": key, "levels": levels}, indent=1) + "\n")
    return levels


def _means(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    known = {name: np.array([row[name] for row in rows if not isnan(row[name])]) for name in names}
    return {name: float(values.mean()) for name, values in known.items() if len(values)}
