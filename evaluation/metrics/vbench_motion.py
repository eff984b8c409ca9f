"""VBench's dimensions of motion: smoothness against an interpolating network, dynamic degree from optical flow.

Formulas: VBench (arXiv:2311.17982), as its code has them at commit 45e79ec.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.evaluation.metric import Meter, Score, VideoInfo
from longtake.evaluation.metrics.dimensions import (
    DYNAMIC,
    SMOOTHNESS,
    Span,
    Tally,
    Variant,
    clips_score,
    metric_spec,
    whole_score,
)
from longtake.evaluation.metrics.vbench import SpanMeter, SpanMetric, Specs
from longtake.evaluation.preprocessing import pad_to_multiple, stride_for_8fps, to_tensor, unpad

AMT_MULTIPLE, RAFT_MULTIPLE = 16, 8
"""Sides of the images that the two networks take, in pixels."""
MOVING_SHARE = 0.05
"""The flow of a pair is the mean over the fastest so many pixels."""
PIXELS_PER_256 = 6.0
"""A pair moves above this flow on a video whose shorter side has 256 pixels, and in proportion on others."""


class _SmoothnessMeter(SpanMeter):
    """``(255 - mean |I[2k+1] - middle(I[2k], I[2k+2])|) / 255``, frames counted from the start of the span.

    Args:
        video: To be measured.
        specs: One per variant.
        interpolator: Two images to the one in the middle.
    """

    reason = "needs at least 3 frames"

    def __init__(self, video: VideoInfo, specs: Specs, interpolator: Any) -> None:
        super().__init__(video, specs)
        self._interpolator = interpolator
        self._recent: list[np.ndarray] = []
        self._inputs: dict[int, Tensor] = {}

    def take(self, start: int, frames: np.ndarray) -> None:
        """Every three frames whose middle one some span leaves out."""
        for index, frame in enumerate(frames, start=start):
            self._recent = [*self._recent[-2:], frame]
            if index < 2:
                continue
            wanting = [
                tally for tally in self.spans.holding(index - 2, index) if (index - 1 - tally.span.start) % 2 == 1
            ]
            if wanting:
                error = self._error(index)
                for tally in wanting:
                    tally.add(error)
                if wanting[0] is self.spans.whole:
                    self.windows.add(index - 1, 1.0 - error / 255.0)
        self._recent = [frame.copy() for frame in self._recent[-2:]]

    def value(self, mean: float | None) -> float | None:
        """One less the error, in units of white."""
        return None if mean is None else (255.0 - mean) / 255.0

    def _error(self, index: int) -> float:
        """Mean absolute error of the frame before ``index``, interpolated from its neighbours."""
        before, frame, after = self._recent
        a, padding = self._input(index - 2, before)
        b, _ = self._input(index, after)
        self._inputs = {key: image for key, image in self._inputs.items() if key >= index - 1}
        image = unpad(self._interpolator.middle(a, b), padding)[0]
        # Cut to whole numbers, not rounded: as the official code turns tensors into images.
        predicted = (image * 255.0).clamp(0.0, 255.0).to(torch.uint8)
        truth = torch.from_numpy(frame).permute(2, 0, 1)
        difference = torch.maximum(predicted, truth) - torch.minimum(predicted, truth)
        return float(difference.sum(dtype=torch.int64)) / difference.numel()

    def _input(self, index: int, frame: np.ndarray) -> tuple[Tensor, tuple[int, int, int, int]]:
        """A frame as the network takes it, remembered for the next interpolation, and its padding."""
        if index not in self._inputs:
            self._inputs[index], self._padding = pad_to_multiple(to_tensor(frame[None]) / 255.0, AMT_MULTIPLE)
        return self._inputs[index], self._padding


class _DynamicMeter(SpanMeter):
    """Whether at least a quarter of the sampled frames' number of pairs moves more than a threshold.

    Frames are sampled from the start of each span, at about eight a second. The number of pairs needed is rounded
    half to even: two or three sampled frames need none, so one pair of any kind makes them dynamic.

    Args:
        video: To be measured.
        specs: One per variant.
        estimator: Two images to their flow.
    """

    reason = "needs at least 1 frame"

    def __init__(self, video: VideoInfo, specs: Specs, estimator: Any) -> None:
        super().__init__(video, specs)
        self._estimator = estimator
        self._flows: dict[int, list[float]] = {id(tally): [] for tally in self.spans}
        self._held: dict[int, np.ndarray] = {}
        wanted = list(self.spans) if "short" in specs else self.spans.clips
        self._pairs: dict[int, dict[int, list[Tally]]] = {}
        for tally in wanted:
            indices = sampled_frames(tally.span)
            for first, second in zip(indices, indices[1:], strict=False):
                self._pairs.setdefault(second, {}).setdefault(first, []).append(tally)
        self._needed = {first for pairs in self._pairs.values() for first in pairs}
        self._reach = max((b - a for b, pairs in self._pairs.items() for a in pairs), default=0)

    def take(self, start: int, frames: np.ndarray) -> None:
        """The flow of every pair that ends in the batch."""
        for index, frame in enumerate(frames, start=start):
            for first, tallies in self._pairs.pop(index, {}).items():
                flow = self._flow(self._held[first], frame)
                for tally in tallies:
                    self._flows[id(tally)].append(flow)
            if index in self._needed:
                self._held[index] = frame.copy()
            self._held.pop(index - self._reach, None)

    def short(self) -> Score:
        """Of the whole video: 1 or 0."""
        value, details = self._decide(self.spans.whole)
        return whole_score(value, reason=self.reason, details=details)

    def long(self) -> Score:
        """The share of clips that are dynamic."""
        decided = [self._decide(clip) for clip in self.spans.clips]
        return clips_score(
            self.clips,
            [value for value, _ in decided],
            reason=self.reason,
            per_clip=[details for _, details in decided],
        )

    def _flow(self, a: np.ndarray, b: np.ndarray) -> float:
        """Mean over the fastest pixels, those of the padding among them."""
        images = [pad_to_multiple(to_tensor(frame[None]), RAFT_MULTIPLE)[0] for frame in (a, b)]
        x, y = self._estimator.flow(*images).numpy()
        speeds = np.sqrt(np.square(x) + np.square(y)).ravel()
        count = int(speeds.size * MOVING_SHARE)
        fastest = np.partition(speeds, speeds.size - count)[speeds.size - count :] if count else speeds[:0]
        return float(np.mean(np.sort(fastest)[::-1])) if count else 0.0

    def _decide(self, tally: Tally) -> tuple[float, dict[str, Any]]:
        """1 or 0 with the counts behind it."""
        flows = self._flows[id(tally)]
        threshold = PIXELS_PER_256 * (min(self.video.height, self.video.width) / 256.0)
        needed = round(4 * (len(sampled_frames(tally.span)) / 16.0))
        above = sum(flow > threshold for flow in flows)
        is_dynamic = bool(flows) and above >= needed
        details: Mapping[str, Any] = {
            "is_dynamic": is_dynamic,
            "n_pairs": len(flows),
            "threshold": threshold,
            "count_needed": needed,
            "count_above": above,
            "pair_scores_first5": flows[:5],
            "pair_scores_mean": sum(flows) / len(flows) if flows else None,
            "pair_scores_max": max(flows, default=None),
        }
        return float(is_dynamic), dict(details)


def sampled_frames(span: Span) -> list[int]:
    """The frames of a span that dynamic degree looks at."""
    return list(range(span.start, span.end, stride_for_8fps(span.fps)))


def smoothness(variants: tuple[Variant, ...], interpolator: Any) -> SpanMetric:
    """``motion_smoothness``.

    Args:
        variants: To measure.
        interpolator: Two images (1, 3, H, W) in 0..1 to the one in the middle.
    """

    def meter(video: VideoInfo, specs: Specs) -> Meter:
        return _SmoothnessMeter(video, specs, interpolator)

    networks = [("interp", interpolator)]
    return SpanMetric({variant: metric_spec(SMOOTHNESS, variant, networks) for variant in variants}, meter)


def dynamics(variants: tuple[Variant, ...], estimator: Any) -> SpanMetric:
    """``dynamic_degree``.

    Args:
        variants: To measure.
        estimator: Two images (1, 3, H, W) in 0..255 to their flow (2, H, W) in pixels.
    """

    def meter(video: VideoInfo, specs: Specs) -> Meter:
        return _DynamicMeter(video, specs, estimator)

    networks = [("flow", estimator)]
    return SpanMetric({variant: metric_spec(DYNAMIC, variant, networks) for variant in variants}, meter)
