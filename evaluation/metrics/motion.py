"""Metrics of motion: stillness and frozen tails, repetition and loops, optical flow."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from longtake.evaluation.metric import MetricSpec, Score, VideoInfo, WindowMeans
from longtake.evaluation.metrics.course import Pooling, Track, reference_frames
from longtake.evaluation.metrics.stills import StillMeter
from longtake.evaluation.preprocessing import pad_to_multiple, unpad

STEP_SECONDS = 0.25
"""Frames are averaged over this long before they are compared, which halves the grain at 16 frames a second."""
LOOK_BACK = 8  # steps: slow motion shows within two seconds
QUANTILE = 0.99
"""Of the cells. Motion shows in the cells it touches: in one of a hundred at least, a tenth of the width squared."""
FLOOR = 3.0  # grey levels that a few cells of a still picture may change by where the rest does not
NUM_SIGMAS = 4.5
"""Grain and the codec's errors are everywhere and leave no cell behind: 99 in 100 stay within 2.9 to 3.6 deviations.
A moving object reaches 12 and more."""
MAX_GRAIN = 4.0  # grey levels (deviation): cells that change more than this are not grainy, they move
EXPLAINED = 0.12
"""Share of the change that a shift, zoom or turn of the whole picture explains, from which on it moves. It explains a
hundredth of grain, up to 0.07 of a coarse codec's errors, and half of a pan by a pixel a second under grain."""
NO_CHANGE = 0.1  # grey levels (deviation): a picture that changes less does not move, whatever its slopes say
MIN_MOVING_SECONDS = 0.5  # a tail is frozen only if something moved before it, for so long


@dataclass(frozen=True)
class _Stillness:
    step: int  # frames per step
    is_still: np.ndarray  # (steps,) bool, nothing moved in the two seconds before; False for the first step
    tail_frames: int  # frames at the end that show one picture; all of them for a static video
    rest_frames: int  # frames of the longest stretch before the tail that shows one picture


def _find_stillness(track: Track) -> _Stillness | None:
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
        is_still[index] = not any(_moves(earlier, pictures[index]) for earlier in before)
    tail = 1
    while tail < num_steps and not _moves(pictures[-1 - tail], pictures[-1]):
        tail += 1
    tail_frames = tail * step
    while tail_frames < track.num_frames and not _moves(track.luma[-1 - tail_frames], pictures[-1]):
        tail_frames += 1
    rest = _longest_rest(pictures[: max(0, num_steps - tail)])
    return _Stillness(step=step, is_still=is_still, tail_frames=tail_frames, rest_frames=rest * step)


def _longest_rest(pictures: np.ndarray) -> int:
    """Steps of the longest stretch in which nothing moves from its first step; 0 if every step moves."""
    longest = start = 0
    for index in range(1, len(pictures)):
        if _moves(pictures[start], pictures[index]):
            start = index
        longest = max(longest, index - start)
    return longest + 1 if longest else 0


def _moves(first: np.ndarray, second: np.ndarray) -> bool:
    """Find that something moved between two pictures (rows, columns) of cells: a part of them, or all of it.

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
    return bool(deviation > NO_CHANGE) and _explained_by_camera(first, second) > EXPLAINED


def _explained_by_camera(first: np.ndarray, second: np.ndarray) -> float:
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


def _stillness(track: Track) -> list[Score]:
    stillness = _find_stillness(track)
    if stillness is None:
        return [*2 * [Score.none(f"needs {2 * STEP_SECONDS:g} s of video")], _duplicates(track)]
    return [_static_share(track, stillness), _frozen_tail(track, stillness), _duplicates(track)]


def _static_share(track: Track, stillness: _Stillness) -> Score:
    means = WindowMeans(track.video)
    # The first step has nothing before it to be compared with.
    for index, still in enumerate(stillness.is_still[1:], start=1):
        means.add(index * stillness.step, float(still))
    is_one_picture = stillness.tail_frames == track.num_frames
    details = {"seconds": track.num_frames / track.fps, "is_one_picture": is_one_picture}
    return Score(value=float(stillness.is_still[1:].mean()), windows=means.windows(), details=details)


def _frozen_tail(track: Track, stillness: _Stillness) -> Score:
    start = track.num_frames - stillness.tail_frames
    moved = start >= MIN_MOVING_SECONDS * track.fps
    # Frames of the last step are alike in slow motion too.
    frozen = moved and stillness.tail_frames >= 2 * stillness.step
    details = {
        "start_s": start / track.fps if frozen else None,
        "end_s": track.num_frames / track.fps,
        "longest_rest_before_s": stillness.rest_frames / track.fps,
    }
    return Score(value=stillness.tail_frames / track.fps if frozen else 0.0, details=details)


def _duplicates(track: Track) -> Score:
    if track.num_frames < 2:
        return Score.none("needs 2 frames")
    means = WindowMeans(track.video)
    for index, is_duplicate in enumerate(track.is_duplicate[1:], start=1):
        means.add(index, float(is_duplicate))
    return Score(
        value=float(track.is_duplicate[1:].mean()),
        windows=means.windows(),
        details={"num_duplicates": int(track.is_duplicate.sum())},
    )


STILLNESS = (
    _stillness,
    MetricSpec.proxy(
        "static_share",
        "Share of the video's quarter seconds in which nothing has moved for two seconds.",
        unit="share",
        top=1.0,
    ),
    MetricSpec.proxy(
        "frozen_tail_s", "How long the picture has stood still when the video ends, if it moved before.", unit="s"
    ),
    MetricSpec.proxy(
        "duplicate_frames",
        "Share of the frames that equal an earlier frame in every pixel.",
        unit="share",
        top=1.0,
    ),
)


GRID = 16
MIN_PERIOD_SECONDS = 1.0
MAX_PERIOD_SECONDS = 120.0
PERIOD_MARGIN_SECONDS = 0.25
MIN_RUN_SECONDS = 1.5  # a loop has to be followed for this long, and for a whole period, before it counts
MOTION_SECONDS = 2.0
"""How far the picture gets within this time is the motion that a repeated frame has to have undone."""
MIN_MOTION = 1.0
"""Squared grey levels of that motion (mean over the cells) below which nothing moves and nothing can repeat."""
SAME = 0.05  # share of the motion (squared) that may be left between a frame and its repetition
MAX_GRAIN_SHARE = 0.3  # of the motion: more change between neighbouring frames is fast motion, not grain

BLOCK = 512  # frames that are compared with all others at a time
FEATURE_SECONDS = 0.25
COLOUR_CELLS = 8
FAR_SECONDS = 5.0


@dataclass(frozen=True)
class _Loop:
    period: int  # frames after which it repeats
    start: int  # first frame of its first play
    end: int  # one past the last frame


def _find_loop(track: Track) -> _Loop | None:
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
    best: _Loop | None = None
    for period, repeats in zip(periods, _repeats(pictures, limits, periods), strict=True):
        start, length = _longest_run(repeats)
        start -= period
        if length < max(period, least_run):
            continue
        # A longer period (a multiple of the first) has to cover more to be preferred: it never does by much.
        if best is None or length + period > 1.1 * (best.end - best.start):
            best = _Loop(period, start, start + length + period)
    return best and _exactly(best, pictures, track.frames_in(PERIOD_MARGIN_SECONDS))


def _exactly(loop: _Loop, pictures: np.ndarray, margin: int) -> _Loop:
    """The loop with the period, of those little longer, at which it repeats best: slow motion repeats early."""
    periods = range(loop.period, min(loop.period + margin, (loop.end - loop.start) // 2) + 1)
    part = pictures[loop.start : loop.end]
    errors = [float(np.square(part[period:] - part[:-period]).mean()) for period in periods]
    return replace(loop, period=periods[int(np.argmin(errors))])


def _pictures(track: Track) -> np.ndarray:
    """(T, cells) float32: brightness without its mean, brought to the video's usual contrast."""
    rows, columns = track.luma.shape[1:]
    pool = Pooling(rows, columns, (GRID, GRID))
    cells = np.array([pool(picture[..., None]).ravel() for picture in track.luma])
    cells -= cells.mean(axis=1, keepdims=True)
    contrast = cells.std(axis=1, keepdims=True)
    return cells * (np.median(contrast) / np.maximum(contrast, 1.0))


def _repeats(pictures: np.ndarray, limits: np.ndarray, periods: range) -> np.ndarray:
    """(periods, T) bool: the frame so many frames before it is the same, to within the limits of both."""
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
    """(T,) how far the picture gets from each frame in the past or the coming ones, the less: a cut is no motion."""
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
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    longest = int((ends - starts).argmax())
    return int(starts[longest]), int(ends[longest] - starts[longest])


def _features(track: Track) -> np.ndarray:
    """(moments, D) float32 of length 1: layout of colours and of gradients, four moments a second."""
    step = track.frames_in(FEATURE_SECONDS)
    colour = track.colour[::step]
    colour = (colour - colour.mean(axis=(1, 2), keepdims=True)).reshape(len(colour), -1)
    luma = track.luma[::step]
    down, across = np.gradient(luma, axis=1), np.gradient(luma, axis=2)
    strength = np.hypot(down, across)
    _, rows, columns = strength.shape
    pool = Pooling(rows, columns, (COLOUR_CELLS, COLOUR_CELLS))
    edges = np.array([pool(picture[..., None]).ravel() for picture in strength])
    return np.concatenate([_unit(colour), _unit(edges - edges.mean(axis=1, keepdims=True))], axis=1) / np.sqrt(2.0)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1.0)


def _similarity(track: Track) -> list[Score]:
    step = track.frames_in(FEATURE_SECONDS)
    far = round(FAR_SECONDS * track.fps / step)
    if track.num_frames <= (far + 1) * step:
        return 2 * [Score.none(f"needs more than {FAR_SECONDS:g} s of video")]
    moments = _features(track)
    cosines = moments @ moments.T
    earlier, later = np.triu_indices(len(moments), k=far)
    pairs = cosines[earlier, later]
    peak = int(pairs.argmax())
    returns = cosines[0, far:]
    closest = int(returns.argmax())
    seconds = step / track.fps
    return [
        Score(
            value=float(pairs[peak] - np.median(pairs)),
            details={
                "median": float(np.median(pairs)),
                "peak": float(pairs[peak]),
                "peak_s": [earlier[peak] * seconds, later[peak] * seconds],
            },
        ),
        Score(
            value=float(returns[closest] - returns[0]),
            details={"closest": float(returns[closest]), "closest_s": (far + closest) * seconds},
        ),
    ]


def _loop_share(track: Track) -> Score:
    if track.num_frames < 2 * track.frames_in(MIN_PERIOD_SECONDS):
        return Score.none(f"needs {2 * MIN_PERIOD_SECONDS:g} s of video")
    loop = _find_loop(track)
    if loop is None:
        return Score(value=0.0, details={"period_s": None})
    seconds = {"period_s": loop.period, "start_s": loop.start, "end_s": loop.end}
    details = {name: frames / track.fps for name, frames in seconds.items()}
    return Score(value=(loop.end - loop.start) / track.num_frames, details=details)


REPETITION = (
    lambda track: [*_similarity(track), _loop_share(track)],
    MetricSpec.proxy(
        "self_similarity_peak",
        "Greatest cosine of two moments five seconds or more apart, above their median.",
        unit="cosine",
        bottom=-2.0,
        top=2.0,
    ),
    MetricSpec.proxy(
        "return_to_start",
        "Greatest cosine of a moment after five seconds with the first one, above that at five seconds.",
        unit="cosine",
        bottom=-2.0,
        top=2.0,
    ),
    MetricSpec.proxy(
        "loop_share",
        "Share of the video that plays one stretch of a second or more at least twice in a row.",
        unit="share",
        top=1.0,
    ),
)


MIN_SIDE = 16
PADDING_MULTIPLE = 8
SECONDS = 1.0 / 8.0
TOP_SHARE = 0.05
WARP_EVERY = 2  # pairs. The way back doubles the cost of a pair, and four a second say as much as eight.
LEAST_MOTION = 0.05  # pixels per eighth of a second: flow estimates of a still picture reach it
MISMATCH_SHARE, MISMATCH_FLOOR = 0.01, 0.5
"""There and back may miss by this share of both squared lengths plus this, squared pixels, before a point is taken for
occluded (Sundaram, Brox and Keutzer 2010)."""
LEAST_SEEN = 0.05
"""Share of the picture; where less finds its way back, the flow has found nothing and nothing is warped."""

# Before the estimator's name is added to theirs.
FLOW_SPECS = (
    MetricSpec.proxy(
        "flow_magnitude_mean",
        "Mean length of the optical flow: how much moves.",
        unit="px per 1/8 s",
        higher_is_better=None,
    ),
    MetricSpec.proxy(
        "flow_magnitude_top5",
        "Mean length of the longest 5 % of the optical flow: how fast the fastest moves.",
        unit="px per 1/8 s",
        higher_is_better=None,
    ),
    MetricSpec.proxy(
        "warp_error",
        "Mean difference of two frames after motion is taken out, where both show the same.",
        unit="grey levels",
        top=255.0,
    ),
    MetricSpec.proxy(
        "motion_kept",
        "Mean flow of the last five seconds over that of the first five (of the halves, in videos under "
        "ten seconds); 1 where motion stays.",
        unit="ratio",
        higher_is_better=None,
    ),
)


class FlowMetric:
    """Amount, loss and residue of motion; the estimator's name goes into the names of the metrics."""

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator
        self.specs = tuple(
            replace(
                spec,
                name=f"{spec.name}[flow={estimator.name}]",
                backbone=estimator.name,
                weights_sha256=estimator.weights_sha256,
                transform=f"area mean, shorter side about {_FlowMeter.short_side}",
            )
            for spec in FLOW_SPECS
        )

    def start(self, video: VideoInfo) -> "_FlowMeter":
        return _FlowMeter(video, self)


class _FlowMeter(StillMeter):
    short_side = 160

    def __init__(self, video: VideoInfo, metric: FlowMetric) -> None:
        super().__init__(video)
        self._estimator, self._names = metric.estimator, [spec.name for spec in metric.specs]
        # Where the rate is no multiple of eight, the frames are not quite an eighth of a second apart.
        self._scale = self.factor * SECONDS * video.fps / self.stride
        self._is_too_small = min(video.height, video.width) // self.factor < MIN_SIDE
        self._before: Tensor | None = None
        self._means, self._tops, self._errors = (WindowMeans(video) for _ in range(3))
        self._lengths: list[tuple[int, float]] = []

    def take(self, index: int, frame: np.ndarray, colour: np.ndarray) -> None:
        image = torch.from_numpy(colour)[None]
        if self._before is not None and not self._is_too_small:
            self._compare(index, self._before, image)
        self._before = image

    def _compare(self, index: int, first: Tensor, second: Tensor) -> None:
        there = _estimate_flow(self._estimator, first, second)
        lengths = torch.hypot(there[0], there[1]).flatten() * self._scale
        mean = lengths.mean().item()
        top = lengths.topk(max(1, int(TOP_SHARE * len(lengths)))).values.mean().item()
        self._means.add(index, mean)
        self._tops.add(index, top)
        if len(self._lengths) % WARP_EVERY == 0:
            back = _estimate_flow(self._estimator, second, first)
            self._errors.add(index, _warp_error(first, second, there, back))
        self._lengths.append((index, mean))

    def finish(self) -> Mapping[str, Score]:
        mean, top, error = self._means.mean(), self._tops.mean(), self._errors.mean()
        if mean is None or top is None or error is None:
            small = f"optical flow needs frames of {MIN_SIDE} pixels a side"
            reason = small if self._is_too_small else "needs two frames an eighth of a second apart"
            return {name: Score.none(reason) for name in self._names}
        side = min(self.video.height, self.video.width)
        scores = (
            Score(value=mean, windows=self._means.windows(), details={"percent_of_short_side": 100.0 * mean / side}),
            Score(value=top, windows=self._tops.windows(), details={"percent_of_short_side": 100.0 * top / side}),
            Score(value=error, windows=self._errors.windows()),
            self._motion_kept(),
        )
        return dict(zip(self._names, scores, strict=True))

    def _motion_kept(self) -> Score:
        frames, lengths = (np.array(column) for column in zip(*self._lengths, strict=True))
        length = reference_frames(self.video.num_frames, self.video.fps)
        # A pair's motion belongs to the frame it ends with.
        is_first, is_last = frames < length, frames >= self.video.num_frames - length
        if not is_first.any() or not is_last.any():
            return Score.none("needs two pairs of frames an eighth of a second apart")
        first, last = float(lengths[is_first].mean()), float(lengths[is_last].mean())
        if first < LEAST_MOTION:
            return Score.none(f"nothing moves at first ({first:.3f} px per 1/8 s)")
        return Score(value=last / first, details={"first": first, "last": last, "compared_s": length / self.video.fps})


def _estimate_flow(estimator: Any, first: Tensor, second: Tensor) -> Tensor:
    """Flow between two (1, 3, h, w) images in 0..255 of any size: (2, h, w), padded for the network and cut again."""
    padded, padding = pad_to_multiple(torch.cat([first, second]), PADDING_MULTIPLE)
    with torch.inference_mode():
        return unpad(estimator.flow(padded[:1], padded[1:]), padding).float()


def _warp_error(first: Tensor, second: Tensor, there: Tensor, back: Tensor) -> float:
    """Mean absolute difference of a frame and the next one moved back onto it, occlusions left out, grey levels.

    Where the flow finds next to nothing again on its way back, it is the plain difference of the frames.

    Args:
        first: (1, 3, h, w) in 0..255, as the second.
        second: The next frame.
        there: (2, h, w) flow from first to second, pixels, x then y.
        back: The flow from second to first.
    """
    height, width = first.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = columns + there[0], rows + there[1]
    is_inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    places = torch.stack([2.0 * x / max(width - 1, 1) - 1.0, 2.0 * y / max(height - 1, 1) - 1.0], dim=-1)[None]
    stacked = torch.cat([second, back[None]], dim=1)
    moved = F.grid_sample(stacked, places, mode="bilinear", padding_mode="border", align_corners=True)
    warped, returned = moved[:, :3], moved[0, 3:]
    miss = (there + returned).square().sum(dim=0)
    allowed = MISMATCH_SHARE * (there.square().sum(dim=0) + returned.square().sum(dim=0)) + MISMATCH_FLOOR
    is_seen = is_inside & (miss <= allowed)
    if is_seen.float().mean() < LEAST_SEEN:
        return (first - second).abs().mean().item()
    return (first - warped).abs().mean(dim=1)[0][is_seen].mean().item()
