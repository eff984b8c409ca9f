"""Measures of a run's videos as a set against another set, and the file they are written to."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from longtake.evaluation.backbones import Backbones, FrameEncoder
from longtake.evaluation.metric import VideoInfo
from longtake.evaluation.preprocessing import clip_transform, dino_transform, dinov2_transform, dreamsim_transform
from longtake.evaluation.records import SCHEMA, write_json
from longtake.evaluation.running.video_folder import plan_videos
from longtake.evaluation.sets import FeatureCollector, SetScores, read_features, set_scores
from longtake.evaluation.video import VideoSource, measure

SETS_FILE = "sets.json"
TRANSFORMS: dict[str, Callable[[np.ndarray], torch.Tensor]] = {
    "dino": dino_transform,
    "clip": clip_transform,
    "dinov2": dinov2_transform,
    "dreamsim": dreamsim_transform,
}
"""Preprocessing of each role's encoder."""


@torch.inference_mode()
def measure_sets(
    run: Path, reference: Path, *, backbones: Backbones, role: str, num_frames: int, allow_small: bool = False
) -> SetScores:
    """Measure a run's videos as a set and write ``sets.json`` into its folder.

    Args:
        run: Folder of the run, or of videos.
        reference: Folder of real videos, or of another run.
        backbones: With an encoder of frames in the role.
        role: One of :data:`TRANSFORMS`.
        num_frames: Of each video, spread evenly over it; an even number.
        allow_small: Give a Frechet distance even of fewer videos than dimensions.

    Raises:
        ValueError: If there is no encoder, a folder holds no videos, or a video is too short.
    """
    if role not in TRANSFORMS:
        raise ValueError(f"role {role!r} has no encoder of frames; known: {', '.join(TRANSFORMS)}.")
    encoder = backbones.get(role)
    if encoder is None:
        raise ValueError(backbones.why_missing(role))
    features, others = (_features(folder, encoder, role, num_frames=num_frames) for folder in (run, reference))
    measured = set_scores(
        features,
        others,
        encoder=encoder.name,
        reference=reference.resolve().name,
        weights_sha256=encoder.weights_sha256,
        allow_small=allow_small,
    )
    write_json(
        run / SETS_FILE,
        {
            "schema": SCHEMA,
            "num_frames": num_frames,
            "specs": {name: asdict(spec) for name, spec in measured.specs.items()},
            "scores": {name: asdict(score) for name, score in measured.scores.items()},
        },
    )
    return measured


def _features(folder: Path, encoder: FrameEncoder, role: str, *, num_frames: int) -> dict[str, np.ndarray]:
    """Features of all videos of a folder, {id: (frames, dimensions)}."""
    plans = plan_videos(folder, folder, mixed_rates=True)
    if len(plans) != 1:
        raise ValueError(f"{folder} holds {len(plans)} runs: give the folder of one")
    with tempfile.TemporaryDirectory() as place:
        collector = FeatureCollector(encoder, TRANSFORMS[role], Path(place), num_frames=num_frames)
        for unit in plans[0].units:
            for line in unit.lines:
                source = VideoSource.open(unit.folder / line.file)
                info = VideoInfo(
                    id=line.id,
                    num_frames=source.num_frames,
                    fps=source.fps,
                    height=source.height,
                    width=source.width,
                )
                measure(source, info, [collector])
        return read_features(Path(place))
