"""Colour drift: the picture slowly gets lighter, greyer, more garish or of another hue."""

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score, Window, WindowMeans
from longtake.evaluation.metrics.shots import shots
from longtake.evaluation.metrics.track import LUMA_WEIGHTS, Track, TrackMeasure

REFERENCE_SECONDS = 5.0
"""What came out of the model's training length is what the rest is held against."""
STEP_SECONDS = 0.25
MIN_SHOT_SECONDS = 2.0
FEATURES = ("red", "green", "blue", "saturation", "contrast")

COLOUR_DRIFT = MetricSpec(
    name="proxy/colour_drift",
    higher_is_better=False,
    unit="grey levels",
    range=(0.0, None),
    description="Distance of the last five seconds' mean colour, saturation and contrast from those of the first five "
    "(of the halves, in videos under ten seconds).",
)


def reference_frames(num_frames: int, fps: float) -> int:
    """Frames at either end that are compared: five seconds, or half of a video of less than ten; at least 1."""
    return max(1, min(round(REFERENCE_SECONDS * fps), num_frames // 2))


def colours(track: Track) -> np.ndarray:
    """(T, 5) float64 of each frame: mean red, green and blue, mean distance from grey, deviation of the brightness."""
    cells = track.colour.reshape(track.num_frames, -1, 3)
    luma = cells @ LUMA_WEIGHTS
    saturation = np.sqrt(np.square(cells - luma[..., None]).mean(axis=2)).mean(axis=1)
    return np.column_stack([cells.mean(axis=1), saturation, luma.std(axis=1)]).astype(np.float64)


def trend(track: Track) -> dict[str, float | str]:
    """How far, and how steadily, colours move within the longest shot.

    Returns:
        ``feature``: which of the five moves furthest; ``change``: by how many grey levels, from the first to the last
        fifth of the shot; ``steadiness``: the share of its variance that the best rising (or falling) curve explains,
        1 for a drift, near 0 for what comes and goes; ``start_s`` and ``end_s`` of the shot. Empty if no shot lasts
        two seconds.
    """
    start, end = max(shots(track), key=lambda shot: shot[1] - shot[0])
    if end - start < MIN_SHOT_SECONDS * track.fps:
        return {}
    step = track.frames_in(STEP_SECONDS)
    rows = colours(track)[start:end]
    num_steps = len(rows) // step
    rows = rows[: num_steps * step].reshape(num_steps, step, -1).mean(axis=1)
    fifth = max(1, num_steps // 5)
    changes = rows[-fifth:].mean(axis=0) - rows[:fifth].mean(axis=0)
    most = int(np.abs(changes).argmax())
    return {
        "feature": FEATURES[most],
        "change": float(changes[most]),
        "steadiness": monotone_share(rows[:, most] * np.sign(changes[most])),
        "start_s": start / track.fps,
        "end_s": end / track.fps,
    }


def monotone_share(values: np.ndarray) -> float:
    """Share of the variance of a series that its best non-decreasing fit explains; 0 for a constant.

    The fit is found by pooling adjacent violators.
    """
    spread = float(np.square(values - values.mean()).sum())
    if spread <= 1e-9 * len(values):
        return 0.0
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            other, number = blocks.pop()
            mean = (mean * count + other * number) / (count + number)
            count += number
        blocks.append((mean, count))
    fit = np.concatenate([np.full(count, mean) for mean, count in blocks])
    return 1.0 - float(np.square(values - fit).sum()) / spread


def measure_colour(track: Track) -> dict[str, Score]:
    """Distance of windows from the first five seconds, and the trend within the longest shot."""
    if track.num_frames < 2:
        return {COLOUR_DRIFT.name: Score.none("needs 2 frames")}
    rows = colours(track)
    length = reference_frames(track.num_frames, track.fps)
    first, last = rows[:length].mean(axis=0), rows[-length:].mean(axis=0)
    windows = tuple(
        Window(
            start_frame=window.start_frame,
            num_frames=window.num_frames,
            value=float(np.linalg.norm(rows[window.start_frame :][: window.num_frames].mean(axis=0) - first)),
        )
        for window in WindowMeans(track.video).windows(track.num_frames)
    )
    details = {
        "compared_s": length / track.fps,
        "changes": {name: float(change) for name, change in zip(FEATURES, last - first, strict=True)},
        "trend": trend(track),
    }
    return {COLOUR_DRIFT.name: Score(value=float(np.linalg.norm(last - first)), windows=windows, details=details)}


COLOUR = TrackMeasure((COLOUR_DRIFT,), measure_colour)
