"""Reference levels of the drift measures: what true scenes score, and what a scene that forgot everything scores."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from longtake.evaluation.mini_world.drift import MEASURES, WindowMeter, sampled_scene
from longtake.evaluation.mini_world.judge import CLIP_FRAMES, CLIP_SECONDS, FRAME_STRIDE, ClipJudge
from longtake.evaluation.mini_world.moving_scenes import CAMERAS, FPS, Scene, sample_scene

SECONDS = 20.0
MEMORIES = ("background_psnr", "revisit_psnr")


def repeat_frames(looked_at: Tensor) -> Tensor:
    """Make (1, F, 3, H, W) video of (f, 3, H, W) frames that are a quarter of a second apart, by holding each."""
    return looked_at.repeat_interleave(FRAME_STRIDE, dim=0)[None]


def forgotten(scene: Scene, *, seed: int) -> Scene:
    """Another scene with the same caption and the same camera: other texture phase, other landmarks."""
    rng = np.random.default_rng([seed, round(1000 * scene.texture_x)])
    other = sample_scene(rng)
    while bool(other.landmarks) != bool(scene.landmarks):
        other = sample_scene(rng)
    return replace(scene, texture_x=other.texture_x, texture_y=other.texture_y, landmarks=other.landmarks)


def with_amnesia(scene: Scene, *, num_frames: int, seed: int = 0) -> tuple[Tensor, int]:
    """Render a video that turns into :func:`forgotten` once everything has been seen.

    Returns:
        (1, num_frames, 3, 64, 64), and the first window after the change.
    """
    change = max(CLIP_SECONDS, CAMERAS[scene.camera])
    window = int(-(-change // CLIP_SECONDS))
    before = sampled_scene(scene, window * CLIP_FRAMES * FRAME_STRIDE)
    after = sampled_scene(forgotten(scene, seed=seed), num_frames, start=window * CLIP_FRAMES * FRAME_STRIDE)
    return repeat_frames(torch.cat([before, after])), window


def truth_levels(judge: ClipJudge, scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
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
        for row in WindowMeter(judge, [scene]).push(repeat_frames(sampled_scene(scene, num_frames))):
            for name in MEASURES:
                true[name].append(row[0][name])
        video, change = with_amnesia(scene, num_frames=num_frames)
        for row in WindowMeter(judge, [scene]).push(video)[change:]:
            for name in MEMORIES:
                lost[name].append(row[0][name])
    return {"true scene": _means(true), "forgotten": _means(lost)}


def _means(values: dict[str, list[float]]) -> dict[str, float]:
    known = {name: np.array(row)[~np.isnan(row)] for name, row in values.items()}
    return {name: float(row.mean()) for name, row in known.items() if len(row)}
