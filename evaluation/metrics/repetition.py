"""Repetition: a video that returns to its start, resembles itself, or plays the same stretch again and again."""

from dataclasses import dataclass, replace

import numpy as np

from longtake.evaluation.metric import MetricSpec, Score
from longtake.evaluation.metrics.track import Pooling, Track, TrackMeasure

GRID = 16
MIN_PERIOD_SECONDS = 1.0
MAX_PERIOD_SECONDS = 120.0
PERIOD_MARGIN_SECONDS = 0.25
MIN_RUN_SECONDS = 1.5
"""A loop has to be followed for this long, and for a whole period, before it counts."""
MOTION_SECONDS = 2.0
"""How far the picture gets within this time is the motion that a repeated frame has to have undone."""
MIN_MOTION = 1.0
"""Squared grey levels of that motion (mean over the cells) below which nothing moves and nothing can repeat."""
SAME = 0.05
"""Share of the motion (squared) that may be left between a frame and its repetition."""
MAX_GRAIN_SHARE = 0.3
"""Of the motion: more change between neighbouring frames is fast motion, not grain."""

BLOCK = 512
"""Frames that are compared with all others at a time."""

FEATURE_SECONDS = 0.25
FAR_SECONDS = 5.0

SELF_SIMILARITY = MetricSpec(
    name="proxy/self_similarity_peak",
    higher_is_better=False,
    unit="cosine",
    range=(-2.0, 2.0),
    description="Greatest cosine of two moments five seconds or more apart, above their median.",
)
RETURN_TO_START = MetricSpec(
    name="proxy/return_to_start",
    higher_is_better=False,
    unit="cosine",
    range=(-2.0, 2.0),
    description="Greatest cosine of a moment after five seconds with the first one, above that at five seconds.",
)
LOOP_SHARE = MetricSpec(
    name="proxy/loop_share",
    higher_is_better=False,
    unit="share",
    range=(0.0, 1.0),
    description="Share of the video that plays one stretch of a second or more at least twice in a row.",
)


@dataclass(frozen=True)
class Loop:
    """A stretch that repeats.

    Attributes:
        period: Frames after which it repeats.
        start: First frame of its first play.
        end: One past the last frame.
    """

    period: int
    start: int
    end: int


def find_loop(track: Track) -> Loop | None:
    """The loop that covers most of the video, of the shortest period; None if there is none.

    A frame repeats another if what is left between them is small beside how far the picture gets within two seconds.
    Overall brightness and contrast do not count. A loop is a period at which frame after frame repeats, for as long as
    the period: passing the same place twice is none.
    """
    pictures = _pictures(track)
    motion = _motion(pictures, track.frames_in(MOTION_SECONDS))
    steps = np.square(pictures[1:] - pictures[:-1]).mean(axis=1)
    grain = float(np.median(steps)) if len(steps) else 0.0
    allowed = np.minimum(grain, MAX_GRAIN_SHARE * motion)
    moves = motion - allowed >= MIN_MOTION
    limits = np.where(moves, allowed + SAME * (motion - allowed), -1.0)
    least_run = track.frames_in(MIN_RUN_SECONDS)
    last = min(track.frames_in(MAX_PERIOD_SECONDS), track.num_frames // 2)
    periods = range(track.frames_in(MIN_PERIOD_SECONDS), last + 1)
    best: Loop | None = None
    for period, repeats in zip(periods, _repeats(pictures, limits, periods), strict=True):
        start, length = _longest_run(repeats)
        start -= period
        if length < max(period, least_run):
            continue
        # A longer period (a multiple of the first) has to cover more to be preferred: it never does by much.
        if best is None or length + period > 1.1 * (best.end - best.start):
            best = Loop(period, start, start + length + period)
    return best and _exactly(best, pictures, track.frames_in(PERIOD_MARGIN_SECONDS))


def _exactly(loop: Loop, pictures: np.ndarray, margin: int) -> Loop:
    """The loop with the period, of those little longer, at which it repeats best: slow motion repeats early."""
    periods = range(loop.period, min(loop.period + margin, (loop.end - loop.start) // 2) + 1)
    part = pictures[loop.start : loop.end]
    errors = [float(np.square(part[period:] - part[:-period]).mean()) for period in periods]
    return replace(loop, period=periods[int(np.argmin(errors))])


def _pictures(track: Track) -> np.ndarray:
    """(T, cells) float32: brightness without its mean, brought to the video's usual contrast."""
    rows, columns = track.luma.shape[1:]
    pool = Pooling(rows, columns, GRID)
    cells = np.array([pool(picture[..., None]).ravel() for picture in track.luma])
    cells -= cells.mean(axis=1, keepdims=True)
    contrast = cells.std(axis=1, keepdims=True)
    return cells * (np.median(contrast) / np.maximum(contrast, 1.0))


def _repeats(pictures: np.ndarray, limits: np.ndarray, periods: range) -> np.ndarray:
    """(periods, T) bool: is the frame so many frames before it the same, to within the limits of both."""
    found = np.zeros((len(periods), len(pictures)), dtype=bool)
    power = np.square(pictures).mean(axis=1)
    for start in range(0, len(pictures) if periods else 0, BLOCK):
        rows = slice(start, start + BLOCK)
        first = max(0, start - periods[-1])
        columns = slice(first, start + BLOCK)
        products = pictures[rows] @ pictures[columns].T / pictures.shape[1]
        apart = power[rows, None] + power[None, columns] - 2.0 * products
        same = apart <= np.minimum(limits[rows, None], limits[None, columns])
        for index, period in enumerate(periods):
            # Row r of the block stands at column r + (start - first) - period.
            offset = start - first - period
            diagonal = np.diagonal(same, offset)
            begin = start + max(0, -offset)
            found[index, begin : begin + len(diagonal)] = diagonal
    return found


def _motion(pictures: np.ndarray, reach: int) -> np.ndarray:
    """(T,) how far the picture gets from each frame, within the past or the coming frames, whichever is less.

    After a cut only what comes counts, before it only what was: a cut is no motion.
    """
    num_frames = len(pictures)
    past, coming = np.zeros(num_frames), np.zeros(num_frames)
    for lag in range(1, min(reach, num_frames - 1) + 1):
        apart = np.square(pictures[lag:] - pictures[:-lag]).mean(axis=1)
        past[lag:] = np.maximum(past[lag:], apart)
        coming[:-lag] = np.maximum(coming[:-lag], apart)
    # Near the ends one side has too few frames to tell.
    index = np.arange(num_frames)
    short_past, short_coming = index < reach // 2, index >= num_frames - reach // 2
    return np.where(short_past, coming, np.where(short_coming, past, np.minimum(past, coming)))


def _longest_run(flags: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    longest = int((ends - starts).argmax())
    return int(starts[longest]), int(ends[longest] - starts[longest])


def features(track: Track) -> np.ndarray:
    """(moments, D) float32 of length 1: layout of colours and of gradients, four moments a second."""
    step = track.frames_in(FEATURE_SECONDS)
    colour = track.colour[::step]
    colour = (colour - colour.mean(axis=(1, 2), keepdims=True)).reshape(len(colour), -1)
    luma = track.luma[::step]
    down, across = np.gradient(luma, axis=1), np.gradient(luma, axis=2)
    strength = np.hypot(down, across)
    pool = Pooling(*strength.shape[1:], COLOUR_CELLS)
    edges = np.array([pool(picture[..., None]).ravel() for picture in strength])
    return np.concatenate([_unit(colour), _unit(edges - edges.mean(axis=1, keepdims=True))], axis=1) / np.sqrt(2.0)


COLOUR_CELLS = 8


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1.0)


def measure_repetition(track: Track) -> dict[str, Score]:
    """Self-similarity, return to the start, and loops."""
    return {
        **_similarity(track),
        LOOP_SHARE.name: _loop_share(track),
    }


def _similarity(track: Track) -> dict[str, Score]:
    step = track.frames_in(FEATURE_SECONDS)
    far = round(FAR_SECONDS * track.fps / step)
    if track.num_frames <= (far + 1) * step:
        reason = f"needs more than {FAR_SECONDS:g} s of video"
        return {SELF_SIMILARITY.name: Score.none(reason), RETURN_TO_START.name: Score.none(reason)}
    moments = features(track)
    cosines = moments @ moments.T
    earlier, later = np.triu_indices(len(moments), k=far)
    pairs = cosines[earlier, later]
    peak = int(pairs.argmax())
    returns = cosines[0, far:]
    closest = int(returns.argmax())
    seconds = step / track.fps
    loop_details = {
        "median": float(np.median(pairs)),
        "peak": float(pairs[peak]),
        "peak_s": [earlier[peak] * seconds, later[peak] * seconds],
    }
    start_details = {"closest": float(returns[closest]), "closest_s": (far + closest) * seconds}
    return {
        SELF_SIMILARITY.name: Score(value=float(pairs[peak] - np.median(pairs)), details=loop_details),
        RETURN_TO_START.name: Score(value=float(returns[closest] - returns[0]), details=start_details),
    }


def _loop_share(track: Track) -> Score:
    if track.num_frames < 2 * track.frames_in(MIN_PERIOD_SECONDS):
        return Score.none(f"needs {2 * MIN_PERIOD_SECONDS:g} s of video")
    loop = find_loop(track)
    if loop is None:
        return Score(value=0.0, details={"period_s": None})
    details = {
        "period_s": loop.period / track.fps,
        "start_s": loop.start / track.fps,
        "end_s": loop.end / track.fps,
    }
    return Score(value=(loop.end - loop.start) / track.num_frames, details=details)


REPETITION = TrackMeasure((SELF_SIMILARITY, RETURN_TO_START, LOOP_SHARE), measure_repetition)
