"""Does anything move, did it stop moving, do frames come twice."""

from dataclasses import dataclass

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score, WindowMeans
from longtake.evaluation.metrics.track import Track, TrackMeasure

STEP_SECONDS = 0.25
"""Frames are averaged over this long before they are compared, which halves the grain at 16 frames a second."""
LOOK_BACK = 8
"""Steps: slow motion shows within two seconds."""
QUANTILE = 0.99
"""Of the cells. Motion shows in the cells it touches: in one of a hundred at least, a tenth of the width squared."""
FLOOR = 3.0
"""Grey levels that a few cells of a still picture may change by where the rest does not."""
NUM_SIGMAS = 4.5
"""Grain and the codec's errors are everywhere and leave no cell behind: 99 in 100 stay within 2.9 to 3.6 deviations.
A moving object reaches 12 and more."""
MAX_GRAIN = 4.0
"""Grey levels (deviation): cells that change more than this are not grainy, they move."""
EXPLAINED = 0.12
"""Share of the change that a shift, zoom or turn of the whole picture explains, from which on it moves. It explains a
hundredth of grain, up to 0.07 of a coarse codec's errors, and half of a pan by a pixel a second under grain."""
NO_CHANGE = 0.1
"""Grey levels (deviation): a picture that changes less does not move, whatever its slopes say."""
MIN_MOVING_SECONDS = 0.5
"""A tail is frozen only if something moved before it, for so long."""

STATIC_SHARE = MetricSpec(
    name="proxy/static_share",
    higher_is_better=False,
    unit="share",
    range=(0.0, 1.0),
    description="Share of the video's quarter seconds in which nothing has moved for two seconds.",
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
        is_still: (steps,) bool, whether nothing moved in the two seconds before; False for the first step.
        tail_frames: Frames at the end that show one picture; all of them for a static video.
        rest_frames: Frames of the longest stretch before the tail that shows one picture.
    """

    step: int
    is_still: np.ndarray
    tail_frames: int
    rest_frames: int


def find_stillness(track: Track) -> Stillness | None:
    """Compare the pictures of quarter seconds; None for a video of less than two of them."""
    step = track.frames_in(STEP_SECONDS)
    num_steps = track.num_frames // step
    if num_steps < 2:
        return None
    first = track.num_frames - num_steps * step
    pictures = track.luma[first:].reshape(num_steps, step, *track.luma.shape[1:]).mean(axis=1)
    is_still = np.zeros(num_steps, dtype=bool)
    for index in range(1, num_steps):
        before = pictures[max(0, index - LOOK_BACK) : index]
        is_still[index] = not any(moves(earlier, pictures[index]) for earlier in before)
    tail = 1
    while tail < num_steps and not moves(pictures[-1 - tail], pictures[-1]):
        tail += 1
    tail_frames = tail * step
    while tail_frames < track.num_frames and not moves(track.luma[-1 - tail_frames], pictures[-1]):
        tail_frames += 1
    rest = _longest_rest(pictures[: max(0, num_steps - tail)])
    return Stillness(step=step, is_still=is_still, tail_frames=tail_frames, rest_frames=rest * step)


def _longest_rest(pictures: np.ndarray) -> int:
    """Steps of the longest stretch in which nothing moves from its first step; 0 if every step moves."""
    longest = start = 0
    for index in range(1, len(pictures)):
        if moves(pictures[start], pictures[index]):
            start = index
        longest = max(longest, index - start)
    return longest + 1 if longest else 0


def moves(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether something moved between two pictures (rows, columns) of cells: a part of them, or all of it.

    A change that all cells share is light, not motion. Grain and the codec's errors change all cells alike; a moving
    object changes some far more than the rest. A moving camera also changes them alike, but as the slopes of the
    picture foretell.
    """
    change = second - first
    change = change - np.median(change)
    size = np.abs(change)
    deviation = min(float(np.median(size)) / 0.6745, MAX_GRAIN)
    index = min(int(QUANTILE * size.size), size.size - 1)
    largest = np.partition(size, index, axis=None)[index]
    if largest > FLOOR + NUM_SIGMAS * deviation:
        return True
    return bool(deviation > NO_CHANGE) and explained_by_camera(first, second) > EXPLAINED


def explained_by_camera(first: np.ndarray, second: np.ndarray) -> float:
    """Share of the change between two pictures (rows, columns) that a shift, zoom and turn of the whole explain.

    To first order a picture that moves by (u, v) changes by the product with its slopes. The four motions are fitted
    to the change by least squares.
    """
    if min(first.shape) < 3:
        return 0.0
    middle = 0.5 * (first + second)
    down, across = np.gradient(middle)
    rows, columns = (np.linspace(-1.0, 1.0, length) for length in first.shape)
    y, x = rows[:, None], columns[None, :]
    fields = np.stack([down, across, y * down + x * across, x * down - y * across]).reshape(4, -1).astype(np.float64)
    change = (second - first).ravel().astype(np.float64)
    change -= change.mean()
    power = float(change @ change)
    gram = fields @ fields.T + 1e-6 * np.eye(4)
    along = fields @ change
    return float(along @ np.linalg.solve(gram, along)) / power if power > 0 else 0.0


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
        details={
            "seconds": track.num_frames / track.fps,
            "is_one_picture": stillness.tail_frames == track.num_frames,
        },
    )


def _frozen_tail(track: Track, stillness: Stillness) -> Score:
    start = track.num_frames - stillness.tail_frames
    moved = start >= MIN_MOVING_SECONDS * track.fps
    # Frames of the last step are alike in slow motion too.
    frozen = moved and stillness.tail_frames >= 2 * stillness.step
    return Score(
        value=stillness.tail_frames / track.fps if frozen else 0.0,
        details={
            "start_s": start / track.fps if frozen else None,
            "end_s": track.num_frames / track.fps,
            "longest_rest_before_s": stillness.rest_frames / track.fps,
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


STILLNESS = TrackMeasure((STATIC_SHARE, FROZEN_TAIL, DUPLICATE_FRAMES), measure_stillness)
