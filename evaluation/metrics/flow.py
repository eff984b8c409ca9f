"""Optical flow between frames an eighth of a second apart: how much moves, for how long, and what motion leaves over.

Frames are averaged down to a shorter side of about 160 pixels first. That costs a tenth of a pixel of the original and
saves nine tenths of the time at VBench's sizes; lengths are given in pixels of the original.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from longtake.evaluation.backbones import FlowEstimator
from longtake.evaluation.metric import MetricSpec, Score, VideoInfo, WindowMeans
from longtake.evaluation.metrics.colour import reference_frames
from longtake.evaluation.metrics.stills import reduction, shrink
from longtake.evaluation.sampling import stride_for_8fps
from longtake.evaluation.transforms import pad_to_multiple, unpad

SHORT_SIDE = 160
MIN_SIDE = 16
PADDING_MULTIPLE = 8
SECONDS = 1.0 / 8.0
TOP_SHARE = 0.05
WARP_EVERY = 2
"""Pairs. The way back doubles the cost of a pair, and four a second say as much as eight."""
LEAST_MOTION = 0.05
"""Pixels per eighth of a second: flow estimates of a still picture reach it."""
MISMATCH_SHARE, MISMATCH_FLOOR = 0.01, 0.5
"""There and back may miss by this share of both squared lengths plus this, squared pixels, before a point is taken for
occluded (Sundaram, Brox and Keutzer 2010)."""
LEAST_SEEN = 0.05
"""Share of the picture; where less finds its way back, the flow has found nothing and nothing is warped."""

FLOW_SPECS = (
    MetricSpec(
        name="proxy/flow_magnitude_mean",
        higher_is_better=None,
        unit="px per 1/8 s",
        range=(0.0, None),
        description="Mean length of the optical flow: how much moves.",
    ),
    MetricSpec(
        name="proxy/flow_magnitude_top5",
        higher_is_better=None,
        unit="px per 1/8 s",
        range=(0.0, None),
        description="Mean length of the longest 5 % of the optical flow: how fast the fastest moves.",
    ),
    MetricSpec(
        name="proxy/warp_error",
        higher_is_better=False,
        unit="grey levels",
        range=(0.0, 255.0),
        description="Mean difference of two frames after motion is taken out, where both show the same.",
    ),
    MetricSpec(
        name="proxy/motion_kept",
        higher_is_better=None,
        unit="ratio",
        range=(0.0, None),
        description="Mean flow of the last five seconds over that of the first five (of the halves, in videos under "
        "ten seconds); 1 where motion stays.",
    ),
)
"""Before the estimator's name is added to theirs."""


class FlowMetric:
    """Amount, loss and residue of motion.

    Args:
        estimator: Of the optical flow; its name goes into the names of the metrics.
    """

    def __init__(self, estimator: FlowEstimator) -> None:
        self.estimator = estimator
        self.specs = tuple(
            replace(
                spec,
                name=f"{spec.name}[flow={estimator.name}]",
                backbone=estimator.name,
                weights_sha256=estimator.weights_sha256,
                transform=f"area mean, shorter side about {SHORT_SIDE}",
            )
            for spec in FLOW_SPECS
        )

    def start(self, video: VideoInfo) -> "FlowMeter":
        """A meter for one video."""
        return FlowMeter(self.estimator, video, [spec.name for spec in self.specs])


class FlowMeter:
    """Measures the flow of one video.

    Args:
        estimator: Of the optical flow.
        video: What is announced.
        names: Of the metrics, in the order of FLOW_SPECS.
    """

    def __init__(self, estimator: FlowEstimator, video: VideoInfo, names: list[str]) -> None:
        self._estimator, self._video, self._names = estimator, video, names
        self._stride = stride_for_8fps(video.fps)
        self._factor = reduction(video.height, video.width, SHORT_SIDE)
        # Where the rate is no multiple of eight, the frames are not quite an eighth of a second apart.
        self._scale = self._factor * SECONDS * video.fps / self._stride
        self._is_too_small = min(video.height, video.width) // self._factor < MIN_SIDE
        self._num_frames = 0
        self._before: Tensor | None = None
        self._means, self._tops, self._errors = (WindowMeans(video) for _ in range(3))
        self._lengths: list[tuple[int, float]] = []

    def push(self, frames: np.ndarray) -> None:
        """Take the next frames, (F, H, W, 3) uint8."""
        if not self._is_too_small:
            for index in range(-self._num_frames % self._stride, len(frames), self._stride):
                image = torch.from_numpy(shrink(frames[index], self._factor))[None]
                if self._before is not None:
                    self._take(self._num_frames + index, self._before, image)
                self._before = image
        self._num_frames += len(frames)

    def _take(self, frame: int, first: Tensor, second: Tensor) -> None:
        there = estimate_flow(self._estimator, first, second)
        lengths = torch.hypot(there[0], there[1]).flatten() * self._scale
        mean = lengths.mean().item()
        top = lengths.topk(max(1, int(TOP_SHARE * len(lengths)))).values.mean().item()
        self._means.add(frame, mean)
        self._tops.add(frame, top)
        if len(self._lengths) % WARP_EVERY == 0:
            back = estimate_flow(self._estimator, second, first)
            self._errors.add(frame, warp_error(first, second, there, back))
        self._lengths.append((frame, mean))

    def finish(self) -> Mapping[str, Score]:
        """Means over the pairs, with their windows."""
        mean, top, error = self._means.mean(), self._tops.mean(), self._errors.mean()
        if mean is None or top is None or error is None:
            reason = (
                f"optical flow needs frames of {MIN_SIDE} pixels a side"
                if self._is_too_small
                else "needs two frames an eighth of a second apart"
            )
            return {name: Score.none(reason) for name in self._names}
        side, num_frames = min(self._video.height, self._video.width), self._video.num_frames
        scores = (
            Score(
                value=mean,
                windows=self._means.windows(num_frames),
                details={"percent_of_short_side": 100.0 * mean / side},
            ),
            Score(
                value=top,
                windows=self._tops.windows(num_frames),
                details={"percent_of_short_side": 100.0 * top / side},
            ),
            Score(value=error, windows=self._errors.windows(num_frames)),
            self._motion_kept(),
        )
        return dict(zip(self._names, scores, strict=True))

    def _motion_kept(self) -> Score:
        frames, lengths = (np.array(column) for column in zip(*self._lengths, strict=True))
        length = reference_frames(self._video.num_frames, self._video.fps)
        # A pair's motion belongs to the frame it ends with.
        is_first, is_last = frames < length, frames >= self._video.num_frames - length
        if not is_first.any() or not is_last.any():
            return Score.none("needs two pairs of frames an eighth of a second apart")
        first, last = float(lengths[is_first].mean()), float(lengths[is_last].mean())
        if first < LEAST_MOTION:
            return Score.none(f"nothing moves at first ({first:.3f} px per 1/8 s)")
        return Score(
            value=last / first, details={"first": first, "last": last, "compared_s": length / self._video.fps}
        )


def estimate_flow(estimator: FlowEstimator, first: Tensor, second: Tensor) -> Tensor:
    """Flow between two (1, 3, h, w) images in 0..255 of any size: (2, h, w), padded for the network and cut again."""
    padded, padding = pad_to_multiple(torch.cat([first, second]), PADDING_MULTIPLE)
    with torch.inference_mode():
        return unpad(estimator.flow(padded[:1], padded[1:]), padding).float()


def warp_error(first: Tensor, second: Tensor, there: Tensor, back: Tensor) -> float:
    """Mean absolute difference of a frame and the next one moved back onto it, occlusions left out.

    Args:
        first: (1, 3, h, w) in 0..255.
        second: Same.
        there: (2, h, w) flow from first to second, pixels, x then y.
        back: (2, h, w) flow from second to first.

    Returns:
        Grey levels. Where the flow finds next to nothing again on its way back, the plain difference of the frames.
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
