"""Does anything move, did it stop moving, do frames come twice."""

from dataclasses import dataclass

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score, WindowMeans
from longtake.evaluation.metrics.track import Track, TrackMeasure

STEP_SECONDS = 0.25
"""Frames are averaged over this long before they are compared, which halves the grain at 16 frames a second."""
LOOK_BACK = 4
"""Steps. Slow motion shows within a second; motion that returns to its place within one step of the four does not."""
QUANTILE = 0.99
"""Of the cells. Motion shows in the cells it touches: in one of a hundred at least, a tenth of the width squared."""
FLOOR = 1.5
"""Grey levels that a cell of a still picture may change by: a codec's keyframes do."""
NUM_SIGMAS = 4.0
MAX_GRAIN = 4.0
"""Grey levels. A cell that changes more than this from frame to frame is not grainy, it moves."""
MIN_MOVING_SECONDS = 0.5
"""A tail is frozen only if something moved before it, for so long."""

STATIC_SHARE = MetricSpec(
    name="proxy/static_share",
    higher_is_better=False,
    unit="share",
    range=(0.0, 1.0),
    description="Share of the video's quarter seconds in which nothing has moved for a second.",
)
FROZEN_TAIL = MetricSpec(
    name="proxy/frozen_tail_s",
    higher_is_better=False,
    unit="s",
    range=(0.0, None),
    description="How long the picture has stood still when the video ends, if it moved before.",
)
DUPLICATE_FRAMES = MetricSpec(
    name="proxy/duplicate_frames",
    higher_is_better=False,
    unit="share",
    range=(0.0, 1.0),
    description="Share of the frames that equal an earlier frame in every pixel.",
)


@dataclass(frozen=True)
class Stillness:
    """Where a video stands still.

    Attributes:
        step: Frames per step.
        is_still: (steps,) bool, whether nothing moved in the second before; False for the first step.
        grain: Grey levels by which a cell changes from frame to frame without motion.
        tail_frames: Frames at the end that show one picture; all of them for a static video.
    """

    step: int
    is_still: np.ndarray
    grain: float
    tail_frames: int


def find_stillness(track: Track) -> Stillness | None:
    """Compare the pictures of quarter seconds; None for a video of less than two of them."""
    step = track.frames_in(STEP_SECONDS)
    num_steps = track.num_frames // step
    if num_steps < 2:
        return None
    cells = track.luma.reshape(track.num_frames, -1)
    steps = cells[: num_steps * step].reshape(num_steps, step, -1)
    pictures = steps.mean(axis=1)
    # Most cells of most pictures hold still, so their median tells the grain from the motion; what they share is
    # flicker.
    own = steps - steps.mean(axis=2, keepdims=True)
    grains = np.median(own.std(axis=1, ddof=1), axis=1) if step > 1 else np.zeros(num_steps)
    grain = float(np.median(grains))
    is_still = np.zeros(num_steps, dtype=bool)
    for index in range(1, num_steps):
        before = pictures[max(0, index - LOOK_BACK) : index]
        change = np.quantile(np.abs(pictures[index] - before), QUANTILE, axis=1).max()
        is_still[index] = change <= _limit(grains[index], np.sqrt(2.0 / step))
    last = pictures[-1] if num_steps * step == track.num_frames else cells[-step:].mean(axis=0)
    limit = _limit(float(grains[-1]), np.sqrt(1.0 + 1.0 / step))
    tail = 0
    while tail < track.num_frames:
        change = np.quantile(np.abs(cells[track.num_frames - 1 - tail] - last), QUANTILE)
        if change > limit:
            break
        tail += 1
    return Stillness(step=step, is_still=is_still, grain=grain, tail_frames=tail)


def _limit(grain: float, share: float) -> float:
    """What a cell may change by; ``share`` of the grain is left in the difference."""
    return FLOOR + NUM_SIGMAS * min(grain, MAX_GRAIN) * float(share)


def measure_stillness(track: Track) -> dict[str, Score]:
    """Static share, frozen tail and duplicate frames of a video."""
    stillness = find_stillness(track)
    duplicates = _duplicates(track)
    if stillness is None:
        reason = f"needs {2 * STEP_SECONDS:g} s of video"
        return {
            STATIC_SHARE.name: Score.none(reason),
            FROZEN_TAIL.name: Score.none(reason),
            DUPLICATE_FRAMES.name: duplicates,
        }
    return {
        STATIC_SHARE.name: _static_share(track, stillness),
        FROZEN_TAIL.name: _frozen_tail(track, stillness),
        DUPLICATE_FRAMES.name: duplicates,
    }


def _static_share(track: Track, stillness: Stillness) -> Score:
    # The first step has nothing before it to be compared with.
    judged = stillness.is_still[1:]
    means = WindowMeans(track.video)
    for index, still in enumerate(judged, start=1):
        means.add(index * stillness.step, float(still))
    return Score(
        value=float(judged.mean()),
        windows=means.windows(track.num_frames),
        details={"grain": stillness.grain, "seconds": track.num_frames / track.fps},
    )


def _frozen_tail(track: Track, stillness: Stillness) -> Score:
    start = track.num_frames - stillness.tail_frames
    moved = start >= MIN_MOVING_SECONDS * track.fps
    # Frames of the last step are alike in slow motion too.
    frozen = moved and stillness.tail_frames >= 2 * stillness.step
    rest = _longest_run(stillness.is_still[: start // stillness.step])
    return Score(
        value=stillness.tail_frames / track.fps if frozen else 0.0,
        details={
            "start_s": start / track.fps if frozen else None,
            "end_s": track.num_frames / track.fps,
            "longest_rest_before_s": (rest + LOOK_BACK) * stillness.step / track.fps if rest else 0.0,
        },
    )


def _duplicates(track: Track) -> Score:
    if track.num_frames < 2:
        return Score.none("needs 2 frames")
    means = WindowMeans(track.video)
    means.extend(1, track.is_duplicate[1:].astype(float))
    return Score(
        value=float(track.is_duplicate[1:].mean()),
        windows=means.windows(track.num_frames),
        details={"num_duplicates": int(track.is_duplicate.sum())},
    )


def _longest_run(flags: np.ndarray) -> int:
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest


STILLNESS = TrackMeasure((STATIC_SHARE, FROZEN_TAIL, DUPLICATE_FRAMES), measure_stillness)
