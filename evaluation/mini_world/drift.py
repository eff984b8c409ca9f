"""How a long video changes: measures per five-second window, taken while the video streams by.

Every measure is defined so that a true scene scores the same in every window of an endless video:

* accuracies: does the judge see in this window what the prompt asks for;
* ``background_psnr``: median background of this window against that of the first, still cameras only;
* ``revisit_psnr``: each view against the same view one or more camera round trips before, panning cameras only;
* ``motion_magnitude``: share of pixels that change visibly within a quarter of a second, true scene = 1;
* ``object_present``: share of frames with something as bright as an object, unless the prompt lets it leave or hide.

Nothing here ever holds more than one window of frames plus one camera round trip per video.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from longtake.evaluation.mini_world.judge import (
    CLIP_FRAMES,
    CLIP_SECONDS,
    FRAME_STRIDE,
    ClipJudge,
    expected_verdict,
    is_right,
    load_judge,
    resize_frames,
    verdicts,
)
from longtake.evaluation.mini_world.scenes import (
    CAMERAS,
    FPS,
    Scene,
    describe,
    held_back_scenes,
    parse_caption,
    render,
    sample_scene,
)

WINDOW_FRAMES = CLIP_FRAMES * FRAME_STRIDE
ACCURACIES = ("shape", "colour", "background", "texture", "motion", "camera")
MEASURES = (
    *ACCURACIES,
    "one_object",
    "background_psnr",
    "revisit_psnr",
    "motion_magnitude",
    "object_present",
)
BRIGHT = 180 / 255  # every object colour has a channel above, no background and no landmark has
VISIBLE_CHANGE = 0.15  # of full scale, in some channel: above codec and model flicker, below any moving edge
MIN_BRIGHT_PIXELS = 40  # of 4096; the smallest whole object of the world covers 60
MAX_PSNR = 50.0  # dB; equal images would be infinite
REVISIT_SHIFT = 6  # pixels; a camera that is late by less has not forgotten the place
MIN_SEEN = 0.5  # share of the background that has to be seen for it to be compared without the object


def _bright_mask(frames: Tensor) -> Tensor:
    """Mark where an object may be: bright pixels and two pixels around them.

    Args:
        frames: (frames, 3, H, W) in [0, 1].

    Returns:
        (frames, 1, H, W) bool.
    """
    bright = (frames.amax(dim=1, keepdim=True) > BRIGHT).float()
    return F.max_pool2d(bright, 5, stride=1, padding=2) > 0.5


def _median_background(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Take the per-pixel median over the frames in which no object covers the pixel.

    Args:
        frames: (frames, 3, H, W) in [0, 1].

    Returns:
        (3, H, W) median, over all frames where an object always covers the pixel; and (H, W) bool, True where the
        background was seen.
    """
    covered = _bright_mask(frames)
    seen = ~covered.all(dim=0)[0]
    uncovered = torch.where(covered & seen, torch.nan, frames)
    return uncovered.nanmedian(dim=0).values, seen


def _masked_psnr(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Peak signal-to-noise ratio over the pixels of a mask.

    Args:
        first: (..., 3, H, W) in [0, 1].
        second: the same.
        mask: (..., H, W) bool.

    Returns:
        (...) dB, at most MAX_PSNR; NaN where the mask is empty.
    """
    error = (first - second).square().mean(dim=-3)
    mse = (error * mask).sum(dim=(-1, -2)) / mask.sum(dim=(-1, -2))
    return (-10.0 * mse.log10()).clamp(max=MAX_PSNR)


def background_psnr(reference: tuple[Tensor, Tensor], frames: Tensor) -> float:
    """Compare the background of a window with a reference of :func:`median_background`.

    The object's place is left out, unless more than half of the picture would be: a picture that has gone bright
    all over is no object.
    """
    median, seen = _median_background(frames)
    both = seen & reference[1]
    if both.float().mean() < MIN_SEEN:
        both = torch.ones_like(both)
    return _masked_psnr(median, reference[0], both).item()


def _motion_share(frames: Tensor) -> float:
    """Share of pixels that change visibly from one looked-at frame to the next, mean over the frames.

    Args:
        frames: (frames, 3, H, W) in [0, 1], a quarter of a second apart.
    """
    change = (frames[1:] - frames[:-1]).abs().amax(dim=1)
    return (change > VISIBLE_CHANGE).float().mean().item()


def _presence(frames: Tensor) -> float:
    """Share of the (frames, 3, H, W) frames that show at least a small bright object."""
    pixels = (frames.amax(dim=1) > BRIGHT).sum(dim=(1, 2))
    return (pixels >= MIN_BRIGHT_PIXELS).float().mean().item()


def revisit_psnr(earlier: Tensor, later: Tensor) -> float:
    """Compare views with their first visits, objects left out, at the best of a few horizontal shifts.

    Args:
        earlier: (frames, 3, H, W) in [0, 1], the first visits.
        later: the same views, whole camera round trips later.

    Returns:
        Mean over the frames, dB; NaN for no frames, or where objects leave no background to compare.
    """
    if len(later) == 0:
        return float("nan")
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
    return best.mean().item() if len(best) else float("nan")


def _sampled_scene(scene: Scene, num_frames: int, *, start: int = 0) -> Tensor:
    """Render the frames of a true scene that the measures look at: (frames, 3, 64, 64) float32 in [0, 1]."""
    pixels = render(scene, np.arange(start, num_frames, FRAME_STRIDE))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0


def _true_motion_share(scene: Scene, *, num_frames: int = 60 * FPS) -> float:
    """:func:`motion_share` of the true scene over its first minute."""
    return _motion_share(_sampled_scene(scene, num_frames))


@dataclass
class _Video:
    """What is kept of one video between chunks."""

    expected: Mapping[str, str]
    round_trip: int  # of the camera, in looked-at frames; 0: still
    true_motion: float
    background: tuple[Tensor, Tensor] | None
    first_visits: list[Tensor]


class WindowMeter:
    """Measures a batch of videos window by window as their frames arrive.

    Args:
        judge: from :func:`longtake.evaluation.mini_world.judge.load_judge`.
        scenes: one per video of the batch; the video was made from the scene's caption.
    """

    def __init__(self, judge: ClipJudge, scenes: Sequence[Scene]) -> None:
        self.judge = judge
        self.num_frames = 0
        self.num_windows = 0
        self._waiting: list[Tensor] = []
        self._videos = [
            _Video(
                expected=expected_verdict(parse_caption(describe(scene))),
                round_trip=round(CAMERAS[scene.camera] * FPS) // FRAME_STRIDE,
                true_motion=_true_motion_share(scene),
                background=None,
                first_visits=[],
            )
            for scene in scenes
        ]

    def push(self, frames: Tensor) -> list[list[dict[str, float]]]:
        """Take the next frames; return the measures of every window they complete.

        Args:
            frames: (batch, F, 3, H, W) in [0, 1], F >= 0, in order and without gaps, 16 per second.

        Returns:
            Per completed window, per video, {measure: value}; NaN where a measure does not apply.

        Raises:
            ValueError: If the batch size is not the number of scenes.
        """
        if frames.shape[0] != len(self._videos):
            raise ValueError(
                f"frames has batch size {frames.shape[0]}, must be {len(self._videos)}: pass one video per scene."
            )
        skipped = -self.num_frames % FRAME_STRIDE
        self.num_frames += frames.shape[1]
        looked_at = resize_frames(frames[:, skipped::FRAME_STRIDE]).clamp(0.0, 1.0)
        self._waiting.extend(looked_at.unbind(dim=1))
        complete = []
        while len(self._waiting) >= CLIP_FRAMES:
            clips = torch.stack(self._waiting[:CLIP_FRAMES], dim=1)
            del self._waiting[:CLIP_FRAMES]
            complete.append(self._measure(clips))
            self.num_windows += 1
        return complete

    def _measure(self, clips: Tensor) -> list[dict[str, float]]:
        found = verdicts(self.judge, clips)
        return [
            self._measure_video(video, clip, verdict)
            for video, clip, verdict in zip(self._videos, clips, found, strict=True)
        ]

    def _measure_video(self, video: _Video, clip: Tensor, verdict: Mapping[str, str]) -> dict[str, float]:
        row = {name: is_right(verdict, video.expected, name) for name in ACCURACIES}
        row["one_object"] = is_right(verdict, video.expected, "count") if video.expected["count"] == "one" else np.nan
        row["background_psnr"] = self._background(video, clip)
        row["revisit_psnr"] = self._revisit(video, clip)
        row["motion_magnitude"] = _motion_share(clip) / video.true_motion
        row["object_present"] = _presence(clip) if video.expected["event"] == "none" else np.nan
        return row

    def _background(self, video: _Video, clip: Tensor) -> float:
        if video.round_trip:
            return float("nan")
        if video.background is None:
            video.background = _median_background(clip)
            return float("nan")
        return background_psnr(video.background, clip)

    def _revisit(self, video: _Video, clip: Tensor) -> float:
        if not video.round_trip:
            return float("nan")
        start = self.num_windows * CLIP_FRAMES
        missing = max(0, video.round_trip - len(video.first_visits))
        video.first_visits.extend(clip[:missing].clone())
        visits = [video.first_visits[(start + index) % video.round_trip] for index in range(missing, len(clip))]
        return revisit_psnr(torch.stack(visits), clip[missing:]) if visits else float("nan")


SECONDS = 20.0
MEMORIES = ("background_psnr", "revisit_psnr")


def _repeat_frames(looked_at: Tensor) -> Tensor:
    """Make (1, F, 3, H, W) video of (f, 3, H, W) frames that are a quarter of a second apart, by holding each."""
    return looked_at.repeat_interleave(FRAME_STRIDE, dim=0)[None]


def forgotten(scene: Scene, *, seed: int) -> Scene:
    """Another scene with the same caption and the same camera: other texture phase, other landmarks."""
    rng = np.random.default_rng([seed, round(1000 * scene.texture_x)])
    other = sample_scene(rng)
    while bool(other.landmarks) != bool(scene.landmarks):
        other = sample_scene(rng)
    return replace(scene, texture_x=other.texture_x, texture_y=other.texture_y, landmarks=other.landmarks)


def _with_amnesia(scene: Scene, *, num_frames: int, seed: int = 0) -> tuple[Tensor, int]:
    """Render a video that turns into :func:`forgotten` once everything has been seen.

    Returns:
        (1, num_frames, 3, 64, 64), and the first window after the change.
    """
    change = max(CLIP_SECONDS, CAMERAS[scene.camera])
    window = int(-(-change // CLIP_SECONDS))
    before = _sampled_scene(scene, window * CLIP_FRAMES * FRAME_STRIDE)
    after = _sampled_scene(forgotten(scene, seed=seed), num_frames, start=window * CLIP_FRAMES * FRAME_STRIDE)
    return _repeat_frames(torch.cat([before, after])), window


def _truth_levels(judge: ClipJudge, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Measure the true scenes of a study's prompts.

    Args:
        judge: from :func:`longtake.evaluation.mini_world.judge.load_judge`.
        scenes: of the prompts.

    Returns:
        ``{"true scene": {measure: mean}, "forgotten": {memory measure: mean}}``; the second is the level that a
        video reaches when it keeps to its caption and remembers nothing else.
    """
    num_frames = round(SECONDS * FPS)
    true: dict[str, list[float]] = {name: [] for name in MEASURES}
    lost: dict[str, list[float]] = {name: [] for name in MEMORIES}
    for scene in scenes:
        for row in WindowMeter(judge, [scene]).push(_repeat_frames(_sampled_scene(scene, num_frames))):
            for name in MEASURES:
                true[name].append(row[0][name])
        video, change = _with_amnesia(scene, num_frames=num_frames)
        for row in WindowMeter(judge, [scene]).push(video)[change:]:
            for name in MEMORIES:
                lost[name].append(row[0][name])
    return {"true scene": _means(true), "forgotten": _means(lost)}


def _means(values: dict[str, list[float]]) -> dict[str, float]:
    known = {name: np.array(row)[~np.isnan(row)] for name, row in values.items()}
    return {name: float(row.mean()) for name, row in known.items() if len(row)}


def reference_levels(folder: Path, prompts: Sequence[int], *, prompt_seed: int) -> dict[str, dict[str, float]]:
    """Levels of the true scenes of some prompts; measured once, then read from ``levels.json`` in ``folder``."""
    judge = load_judge()
    settings = json.dumps({"prompts": list(prompts), "prompt_seed": prompt_seed}, sort_keys=True)
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(judge.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    key = digest.hexdigest()[:12]
    path = folder / "levels.json"
    known = json.loads(path.read_text()) if path.is_file() else {"key": None}
    if known["key"] != key:
        scenes = held_back_scenes(prompts[-1] + 1, seed=prompt_seed)
        known = {"key": key, "levels": _truth_levels(judge, [scenes[index] for index in prompts])}
        path.write_text(json.dumps(known, indent=1) + "\n")
    return known["levels"]
