"""Videos that go on from a true clip: does what comes then still show the clip's object before the clip's background?

Every video is measured behind five seconds of the true scene, so the first window of
:class:`~longtake.evaluation.mini_world.drift.WindowMeter` is the true clip, and all later backgrounds are held against
it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longtake.evaluation.intervals import paired_by_prompt
from longtake.evaluation.mini_world.drift import WINDOW_FRAMES
from longtake.evaluation.mini_world.drift_report import TITLES, by_policy, cell, curve
from longtake.evaluation.mini_world.drift_study import VideoResult, window_values
from longtake.evaluation.mini_world.judge import CLIP_SECONDS
from longtake.evaluation.mini_world.moving_scenes import FPS, Scene, describe, render
from longtake.pipelines.long_video import LongVideoPipeline

CLIP_FRAMES = WINDOW_FRAMES + 1  # five seconds as the VAE counts them: 1 + 4 k frames, 21 latent frames
MEASURES = (
    *("shape", "colour", "background", "texture", "motion", "one_object"),
    *("background_psnr", "revisit_psnr", "motion_magnitude", "object_present"),
)
_TITLES = TITLES | {
    "background_psnr": "background PSNR to the true five seconds, dB",
    "revisit_psnr": "revisit PSNR (moving cameras), dB",
}

Start = Literal["clip", "prompt", "other clip", "true scene"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make a scene's continuation.

    Attributes:
        cache: As the pipeline takes it.
        start: ``clip``: the scene's own first five seconds. Controls: ``prompt``: nothing but the prompt;
            ``other clip``: another scene's clip with this scene's prompt; ``true scene``: nothing is made, the true
            scene goes through the VAE, which no continuation can better.
    """

    cache: Any
    start: Start = "clip"


def true_clips(scenes: Sequence[Scene], num_frames: int = CLIP_FRAMES) -> list[np.ndarray]:
    """The scenes' first frames: (frames, 64, 64, 3) uint8 each."""
    return [render(scene, np.arange(num_frames)) for scene in scenes]


@torch.no_grad()
def continued(
    pipe: LongVideoPipeline,
    scenes: Sequence[Scene],
    arm: Arm,
    *,
    seconds: float,
    seeds: Sequence[int],
    others: Sequence[Scene] = (),
) -> Iterator[Tensor]:
    """Make the scenes' continuations, each behind five true seconds.

    Args:
        pipe: The model.
        scenes: Prompts are their captions.
        arm: How.
        seconds: Length of the continuation; a multiple of a quarter.
        seeds: Of the noise, one per scene.
        others: As many other scenes, for the arm ``other clip``.

    Yields:
        (batch, F, 3, 64, 64) in [0, 1], as ``WindowMeter`` takes them: the true clip without its first frame, then
        what was made.
    """
    clips = true_clips(scenes)
    pixels = torch.from_numpy(np.stack(clips)).movedim(-1, 2)
    yield pixels[:, 1:].float() / 255.0
    captions = [describe(scene) for scene in scenes]
    settings = {"cache": arm.cache, "seed": list(seeds)}
    num_frames = round(seconds * FPS)
    if arm.start == "true scene":
        whole = true_clips(scenes, CLIP_FRAMES + num_frames)
        session = pipe.start(captions, num_frames=4, video=whole, **settings)
        decoded = torch.cat([chunk.frames for chunk in session.observe()], dim=1)
        yield decoded[:, -num_frames:]
        return
    if arm.start != "prompt":
        settings["video"] = true_clips(others) if arm.start == "other clip" else clips
        settings["include_start"] = False
    for chunk in pipe.stream(captions, num_frames=num_frames, **settings):
        yield chunk.frames


def markdown_tables(results: Sequence[VideoResult], *, control: str) -> str:
    """Means per five seconds with 95 % intervals, and paired differences of background PSNR from a control.

    Args:
        results: Of any number of arms.
        control: Label of the arm to compare with.

    Returns:
        One table per measure, then the differences.
    """
    grouped = by_policy(results)
    num_windows = max(len(row.windows) for row in results)
    spans = [f"{CLIP_SECONDS * (w - 1):g}-{CLIP_SECONDS * w:g} s" for w in range(1, num_windows)]
    head = f"| arm | videos | {' | '.join(spans)} |\n|---|---|{'---|' * len(spans)}"
    parts = []
    for measure in MEASURES:
        lines = [f"**{_TITLES[measure]}**\n", head]
        for label, own in grouped.items():
            intervals = curve(own, measure)[1:]
            count = max(interval.num_prompts for interval in intervals)
            lines.append(f"| {label} | {count} | {' | '.join(cell(interval) for interval in intervals)} |")
        parts.append("\n".join(lines))
    lines = [f"**background PSNR minus that of {control}, same scenes and seeds, dB**\n", head]
    for label, own in grouped.items():
        if label == control:
            continue
        intervals = [
            paired_by_prompt(
                window_values(own, "background_psnr", window),
                window_values(grouped[control], "background_psnr", window),
            )
            for window in range(1, num_windows)
        ]
        cells = " | ".join(cell(interval, signed=True) for interval in intervals)
        lines.append(f"| {label} | {intervals[0].num_prompts} | {cells} |")
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"
