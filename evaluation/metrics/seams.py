"""Seams: does a rollout jump where one block of frames ends and the next begins."""

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score
from longtake.evaluation.metrics.track import Track, TrackMeasure

LEAST_DIFFERENCE = 0.1
"""Grey levels, mean over the picture: anything less is none, so that standing still between jumps gives a number."""

CHUNK_SEAM_RATIO = MetricSpec(
    name="proxy/chunk_seam_ratio",
    higher_is_better=False,
    unit="ratio",
    range=(0.0, None),
    description="Mean difference of neighbouring frames where a block of the rollout begins, over that elsewhere; "
    "1 where seams do not show.",
)


def measure_seams(track: Track) -> dict[str, Score]:
    """Frame differences at the known starts of blocks against those elsewhere."""
    starts = sorted({start for start in track.video.chunk_starts if 0 < start < track.num_frames})
    if not track.video.chunk_starts:
        return {CHUNK_SEAM_RATIO.name: Score.none("the starts of the rollout's blocks (chunk_starts) are not known")}
    elsewhere = np.ones(track.num_frames, dtype=bool)
    elsewhere[[0, *starts]] = False
    if not starts or not elsewhere.any():
        return {CHUNK_SEAM_RATIO.name: Score.none("needs two blocks, one of more than a frame")}
    at_seams = track.difference[starts]
    usual = float(track.difference[elsewhere].mean())
    ratio = max(float(at_seams.mean()), LEAST_DIFFERENCE) / max(usual, LEAST_DIFFERENCE)
    details = {
        "at_seams": float(at_seams.mean()),
        "elsewhere": usual,
        "first_s": starts[0] / track.fps,
        "last_s": starts[-1] / track.fps,
        "seams": [[start, float(value)] for start, value in zip(starts, at_seams, strict=True)],
    }
    return {CHUNK_SEAM_RATIO.name: Score(value=ratio, details=details)}


SEAMS = TrackMeasure((CHUNK_SEAM_RATIO,), measure_seams)
