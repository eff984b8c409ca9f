"""VBench's dimensions, made for the backbones at hand.

Formulas: VBench (arXiv:2311.17982) and VBench++ (arXiv:2411.13503), as its code has them at commit 45e79ec. Each meter
gives up to three numbers from one pass: of the whole video, of VBench-Long's clips, and of its development branch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from longtake.evaluation.backbones import Backbone, Backbones
from longtake.evaluation.metric import Meter, Metric, MetricSpec, Score, VideoInfo, Window, WindowMeans
from longtake.evaluation.metrics.course import mean_difference
from longtake.evaluation.metrics.dimensions import (
    CLIP_SECONDS,
    DIMENSIONS,
    LEFT_TO_VBENCH,
    clamped_cosines,
    consistency,
    fused,
    mapped_clip_to_clip,
    metric_spec,
)
from longtake.evaluation.preprocessing import (
    MusiqMode,
    clip_ranges,
    clip_transform,
    dino_transform,
    dinov2_transform,
    dreamsim_transform,
    middle,
    musiq_transform,
    pad_to_multiple,
    stride_for_8fps,
    to_tensor,
    unpad,
)
from longtake.evaluation.scores import FOLDERS, Variant

Specs = Mapping[Variant, MetricSpec]
Transform = Callable[[np.ndarray], Tensor]
SEGMENTS = "proxy/segment_alignment"
BATCH = 8  # frames per call of a network. Fixed, so that a number does not depend on how the frames were read.


@dataclass(eq=False)
class _Span:
    start: int
    length: int
    fps: float  # rate that sampling inside goes by: clips have VBench-Long's whole number of frames per second
    total: float = 0.0
    count: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None


class _SpanMeter(ABC):
    """Gathers terms over the whole video and, for the long variants, over its clips; batches have one size."""

    reason = "needs at least 2 frames"
    is_difference = False

    def __init__(self, video: VideoInfo, specs: Specs) -> None:
        self.video, self.specs = video, specs
        self.whole = _Span(0, video.num_frames, video.fps)
        has_clips = ("long" in specs or "long_dev" in specs) and video.fps >= 1
        ranges = clip_ranges(video.num_frames, video.fps, CLIP_SECONDS) if has_clips else []
        self.clips = [_Span(start, length, float(int(video.fps))) for start, length in ranges]
        self.windows = WindowMeans(video)
        self._waiting: np.ndarray | None = None
        self._num_taken = 0

    @property
    def wanted(self) -> list[_Span]:
        """Spans that some variant has a score of."""
        return [self.whole, *self.clips] if "short" in self.specs else self.clips

    def holding(self, first: int, last: int) -> list[_Span]:
        """Spans that hold frames ``first`` to ``last``: of the clips, one and perhaps the last, which may overlap."""
        index = first // self.clips[0].length if self.clips else 0
        near = {*self.clips[index : index + 1], *self.clips[-1:]}
        return [self.whole, *(clip for clip in near if clip.start <= first and last < clip.end)]

    def push(self, frames: np.ndarray) -> None:
        frames = frames if self._waiting is None else np.concatenate([self._waiting, frames])
        whole = len(frames) - len(frames) % BATCH
        for start in range(0, whole, BATCH):
            self._emit(frames[start : start + BATCH])
        self._waiting = frames[whole:].copy() if whole < len(frames) else None

    @torch.no_grad()
    def _emit(self, frames: np.ndarray) -> None:
        self.take(self._num_taken, frames)
        self._num_taken += len(frames)

    @abstractmethod
    def take(self, start: int, frames: np.ndarray) -> None:
        """Take the batch whose first frame has index ``start``; it is overwritten later."""

    def finish(self) -> Mapping[str, Score]:
        if self._waiting is not None:
            self._emit(self._waiting)
        if self._num_taken != self.video.num_frames:
            raise ValueError(
                f"video {self.video.id!r}: {self._num_taken} frames came and num_frames={self.video.num_frames} were "
                "announced: count the frames that decode, then measure again."
            )
        return {spec.name: self._score(variant) for variant, spec in self.specs.items()}

    def _score(self, variant: Variant) -> Score:
        if variant == "short":
            return self.short()
        if not self.clips:
            return Score.none(f"clips of VBench-Long need 1 frame per second, the video has {self.video.fps:g}")
        return self.long(is_dev=variant == "long_dev")

    def value(self, mean: float | None) -> float | None:
        """From the mean of a span's terms to its value; of differences: one less them, in units of white."""
        return None if mean is None else (255.0 - mean) / 255.0 if self.is_difference else mean

    def short(self) -> Score:
        weight = float(self.whole.count) if self.specs["short"].grouping == "frame" else 1.0
        return self.whole_score(self.value(self.whole.mean), weight=weight, windows=self.windows.windows())

    def long(self, *, is_dev: bool) -> Score:
        """On the clips; only the consistencies have a development branch."""
        return self.clips_score([self.value(clip.mean) for clip in self.clips])

    def whole_score(self, value: float | None, **facts: Any) -> Score:
        return Score.none(self.reason) if value is None else Score(value=value, **facts)

    def clips_score(
        self,
        values: Sequence[float | None],
        *,
        per_clip: Sequence[Mapping[str, Any]] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Score:
        """The score of a video as the mean over its clips; it weighs as many clips as have a value.

        Its windows are the clips, the last of which may overlap the one before; ``per_clip`` stands behind each.
        """
        kept = [value for value in values if value is not None]
        if not kept:
            return Score.none(self.reason)
        windows = tuple(
            Window(start_frame=clip.start, num_frames=clip.length, value=value)
            for clip, value in zip(self.clips, values, strict=True)
        )
        rows = [vars(w) | dict(own) for w, own in zip(windows, per_clip or [{}] * len(windows), strict=True)]
        return Score(
            value=sum(kept) / len(kept),
            weight=float(len(kept)),
            windows=windows,
            details={**(details or {}), "clips": rows},
        )


class _ConsistencyMeter(_SpanMeter):
    """Mean over frames of ``(max(0, cos to the frame before) + max(0, cos to the span's first)) / 2``.

    The first encoder is DINOv2 or DreamSim, for each clip's first frame in the development branch.
    """

    def __init__(
        self,
        video: VideoInfo,
        specs: Specs,
        encoder: Any,
        first_encoder: Any = None,
        *,
        dimension: str,
        transform: Transform,
        first_transform: Transform,
    ) -> None:
        super().__init__(video, specs)
        self._encoder, self._first_encoder = encoder, first_encoder
        self._dimension, self._transform, self._first_transform = dimension, transform, first_transform
        self._last: Tensor | None = None
        self._firsts: dict[_Span, Tensor] = {}
        self._dev_firsts: list[Tensor] = []

    def take(self, start: int, frames: np.ndarray) -> None:
        features = normalize(self._encoder.encode(self._transform(frames)), dim=-1)
        before = features[:1] if self._last is None else self._last
        to_previous = clamped_cosines(torch.cat([before, features[:-1]]), features)
        self._last = features[-1:].clone()
        end = start + len(frames)
        for span in (self.whole, *self.clips):
            begin = max(start, span.start)
            if begin >= min(end, span.end):
                continue
            if begin == span.start:
                self._firsts[span] = features[begin - start : begin - start + 1].clone()
                if span is not self.whole and self._first_encoder is not None:
                    first = self._first_transform(frames[begin - start : begin - start + 1])
                    self._dev_firsts.append(normalize(self._first_encoder.encode(first), dim=-1))
                begin += 1
            rows = features[begin - start : span.end - start]
            to_first = clamped_cosines(self._firsts[span].expand_as(rows), rows)
            for index, cosine in enumerate(to_first, start=begin):
                term = (to_previous[index - start] + cosine) / 2
                span.add(term)
                if span is self.whole:
                    self.windows.add(index, term)

    def long(self, *, is_dev: bool) -> Score:
        """Mean over clips; with the development flag of half the clip's value and half the mapped clip-to-clip value.

        Without the flag the details tell what the clip-to-clip branch would have said.
        """
        firsts = self._dev_firsts if is_dev else [self._firsts[clip] for clip in self.clips]
        between = consistency(torch.cat(firsts)) or 0.0
        inclip = [clip.mean for clip in self.clips]
        values = [None if v is None else fused(v, between, self._dimension) for v in inclip] if is_dev else inclip
        mapped = mapped_clip_to_clip(between, self._dimension)
        return self.clips_score(
            values,
            per_clip=[{"inclip_score": value} for value in inclip],
            details={"clip2clip_score": between, "mapped_clip2clip_score": mapped},
        )


class _FlickeringMeter(_SpanMeter):
    """``(255 - mean |I[t+1] - I[t]|) / 255``; identical to VBench's, without its static filter."""

    is_difference = True

    def __init__(self, video: VideoInfo, specs: Specs) -> None:
        super().__init__(video, specs)
        self._last: np.ndarray | None = None

    def take(self, start: int, frames: np.ndarray) -> None:
        for index, frame in enumerate(frames, start=start):
            if self._last is not None:
                difference = mean_difference(self._last, frame)
                for span in self.holding(index - 1, index):
                    span.add(difference)
                self.windows.add(index, 1.0 - difference / 255.0)
            self._last = frame
        self._last = frames[-1].copy()


AMT_MULTIPLE, RAFT_MULTIPLE = 16, 8  # sides of the images that the two networks take, in pixels


class _SmoothnessMeter(_SpanMeter):
    """``(255 - mean |I[2k+1] - middle(I[2k], I[2k+2])|) / 255``, frames counted from the start of the span."""

    reason = "needs at least 3 frames"
    is_difference = True

    def __init__(self, video: VideoInfo, specs: Specs, interpolator: Any) -> None:
        super().__init__(video, specs)
        self._interpolator = interpolator
        self._recent: list[np.ndarray] = []

    def take(self, start: int, frames: np.ndarray) -> None:
        for index, frame in enumerate(frames, start=start):
            self._recent = [*self._recent[-2:], frame]
            if index < 2:
                continue
            # The spans that leave the middle one of the three frames out.
            wanting = [span for span in self.holding(index - 2, index) if (index - 1 - span.start) % 2 == 1]
            if wanting:
                error = self._error(*self._recent)
                for span in wanting:
                    span.add(error)
                if wanting[0] is self.whole:
                    self.windows.add(index - 1, 1.0 - error / 255.0)
        self._recent = [frame.copy() for frame in self._recent[-2:]]

    def _error(self, before: np.ndarray, frame: np.ndarray, after: np.ndarray) -> float:
        pair, padding = pad_to_multiple(to_tensor(np.stack([before, after])) / 255.0, AMT_MULTIPLE)
        image = unpad(self._interpolator.middle(pair[:1], pair[1:]), padding)[0]
        # Cut to whole numbers, not rounded: as the official code turns tensors into images.
        predicted = (image * 255.0).clamp(0.0, 255.0).to(torch.uint8)
        truth = torch.from_numpy(frame).permute(2, 0, 1)
        difference = torch.maximum(predicted, truth) - torch.minimum(predicted, truth)
        return float(difference.sum(dtype=torch.int64)) / difference.numel()


MOVING_SHARE = 0.05  # the flow of a pair is the mean over the fastest so many pixels
PIXELS_PER_256 = 6.0
"""A pair moves above this flow on a video whose shorter side has 256 pixels, and in proportion on others."""


class _DynamicMeter(_SpanMeter):
    """1 if at least a quarter as many pairs as there are sampled frames move more than a threshold, else 0.

    Frames are sampled from the start of each span, at about eight a second. The number of pairs needed is rounded
    half to even: two or three sampled frames need none, so one pair of any kind makes them dynamic.
    """

    reason = "needs at least 1 frame"

    def __init__(self, video: VideoInfo, specs: Specs, estimator: Any) -> None:
        super().__init__(video, specs)
        self._estimator = estimator
        self._flows: dict[_Span, list[float]] = {span: [] for span in self.wanted}
        self._held: dict[int, np.ndarray] = {}
        self._pairs: dict[int, dict[int, list[_Span]]] = {}
        for span in self.wanted:
            for first, second in pairwise(_motion_frames(span)):
                self._pairs.setdefault(second, {}).setdefault(first, []).append(span)
        self._needed = {first for pairs in self._pairs.values() for first in pairs}
        self._reach = max((b - a for b, pairs in self._pairs.items() for a in pairs), default=0)

    def take(self, start: int, frames: np.ndarray) -> None:
        for index, frame in enumerate(frames, start=start):
            for first, spans in self._pairs.pop(index, {}).items():
                flow = self._flow(self._held[first], frame)
                for span in spans:
                    self._flows[span].append(flow)
            if index in self._needed:
                self._held[index] = frame.copy()
            self._held.pop(index - self._reach, None)

    def short(self) -> Score:
        value, details = self._decide(self.whole)
        return self.whole_score(value, details=details)

    def long(self, *, is_dev: bool) -> Score:
        values, details = zip(*(self._decide(clip) for clip in self.clips), strict=True)
        return self.clips_score(values, per_clip=details)

    def _flow(self, a: np.ndarray, b: np.ndarray) -> float:
        """Mean over the fastest pixels, those of the padding among them."""
        images = [pad_to_multiple(to_tensor(frame[None]), RAFT_MULTIPLE)[0] for frame in (a, b)]
        x, y = self._estimator.flow(*images).numpy()
        speeds = np.sqrt(np.square(x) + np.square(y)).ravel()
        count = int(speeds.size * MOVING_SHARE)
        fastest = np.partition(speeds, speeds.size - count)[speeds.size - count :] if count else speeds[:0]
        return float(np.mean(np.sort(fastest)[::-1])) if count else 0.0

    def _decide(self, span: _Span) -> tuple[float, dict[str, Any]]:
        flows = self._flows[span]
        threshold = PIXELS_PER_256 * (min(self.video.height, self.video.width) / 256.0)
        needed = round(4 * (len(_motion_frames(span)) / 16.0))
        above = sum(flow > threshold for flow in flows)
        is_dynamic = bool(flows) and above >= needed
        return float(is_dynamic), {
            "is_dynamic": is_dynamic,
            "n_pairs": len(flows),
            "threshold": threshold,
            "count_needed": needed,
            "count_above": above,
            "pair_scores_first5": flows[:5],
            "pair_scores_mean": sum(flows) / len(flows) if flows else None,
            "pair_scores_max": max(flows, default=None),
        }


def _motion_frames(span: _Span) -> range:
    return range(span.start, span.end, stride_for_8fps(span.fps))


class _FrameQualityMeter(_SpanMeter):
    reason = "the video has no frames"

    def take(self, start: int, frames: np.ndarray) -> None:
        for index, value in enumerate(self.quality(frames), start=start):
            for span in self.holding(index, index):
                span.add(value)
            self.windows.add(index, value)

    @abstractmethod
    def quality(self, frames: np.ndarray) -> list[float]:
        """Values of (F, H, W, 3) uint8 frames."""


class _AestheticMeter(_FrameQualityMeter):
    """A head on normalised features of CLIP ViT-L/14, over ten."""

    def __init__(self, video: VideoInfo, specs: Specs, encoder: Any, head: Any) -> None:
        super().__init__(video, specs)
        self._encoder, self._head = encoder, head

    def quality(self, frames: np.ndarray) -> list[float]:
        features = normalize(self._encoder.encode(clip_transform(frames)), dim=-1)
        return (self._head.rate(features).reshape(-1) / 10).tolist()


class _ImagingMeter(_FrameQualityMeter):
    """MUSIQ on each frame, 0..100; published numbers have VBench's default preprocessing mode, ``longer``."""

    def __init__(self, video: VideoInfo, specs: Specs, scorer: Any, *, mode: MusiqMode = "longer") -> None:
        super().__init__(video, specs)
        self._scorer = scorer
        self._mode: MusiqMode = mode

    def quality(self, frames: np.ndarray) -> list[float]:
        return [self._scorer.score(musiq_transform(frame[None], mode=self._mode)) for frame in frames]


NUM_FRAMES = 8  # frames that ViCLIP looks at


class _AgreementMeter(_SpanMeter):
    """Cosine between the features of the middle frames of eight equal stretches and those of the prompt."""

    reason = "the video has no prompt"

    def __init__(self, video: VideoInfo, specs: Specs, scorer: Any) -> None:
        super().__init__(video, specs)
        self._scorer = scorer
        self._texts = self._find_texts()
        self._open = {span: [span.start + index for index in middle(NUM_FRAMES, span.length)] for span in self._texts}
        self._images: dict[int, Tensor] = {}
        self._encoded: dict[str, Tensor] = {}
        self._values: dict[_Span, float] = {}

    def _find_texts(self) -> dict[_Span, str]:
        """The text of each span; spans may overlap."""
        return {span: self.video.prompt for span in self.wanted if self.video.prompt}

    def take(self, start: int, frames: np.ndarray) -> None:
        end = start + len(frames)
        asked = sorted({index for indices in self._open.values() for index in indices if start <= index < end})
        if not asked:
            return
        images = clip_transform(frames[[index - start for index in asked]], loader="uint8")
        self._images.update(zip(asked, images, strict=True))
        for span, indices in list(self._open.items()):
            if indices[-1] < end:
                clip = torch.stack([self._images[index] for index in indices])[None]
                self._values[span] = self._cosine(clip, self._texts[span])
                del self._open[span]
        # A span that has all its frames lets go of them.
        needed = {index for indices in self._open.values() for index in indices}
        self._images = {index: image for index, image in self._images.items() if index in needed}

    def _cosine(self, clip: Tensor, text: str) -> float:
        if text not in self._encoded:
            self._encoded[text] = normalize(self._scorer.encode_text(text), dim=-1)
        return float((normalize(self._scorer.encode_video(clip), dim=-1) @ self._encoded[text].T)[0, 0])

    def short(self) -> Score:
        return self.whole_score(self._values.get(self.whole))

    def long(self, *, is_dev: bool) -> Score:
        """Mean over the clips, each against the whole prompt."""
        return self.clips_score([self._values.get(clip) for clip in self.clips])


class _SegmentMeter(_AgreementMeter):
    """Each prompt of a video against the frames while it held: their mean, and a window for each.

    The layout of "CLIP score per 10 s" (LongLive) with the network and the sampling of ``overall_consistency``.
    """

    def _find_texts(self) -> dict[_Span, str]:
        texts: dict[_Span, str] = {}
        for segment in self.video.segments:
            times = (segment.start_s, segment.end_s)
            start, end = (min(round(second * self.video.fps), self.video.num_frames) for second in times)
            if start < end:
                texts[_Span(start, end - start, self.video.fps)] = segment.prompt
        return texts

    def short(self) -> Score:
        if not self._values:
            return Score.none("the video has one prompt")
        windows = tuple(Window(start_frame=s.start, num_frames=s.length, value=v) for s, v in self._values.items())
        return Score(value=sum(self._values.values()) / len(self._values), windows=windows)


def _segment_spec(scorer: Backbone) -> MetricSpec:
    return MetricSpec(
        name=f"{SEGMENTS}[clip={scorer.name}]",
        higher_is_better=True,
        unit="-1..1",
        range=(-1.0, 1.0),
        backbone=scorer.name,
        weights_sha256=scorer.weights_sha256,
        transform=DIMENSIONS["overall_consistency"].transform,
        description="Cosine between features of eight frames of a segment and of its prompt, mean over segments.",
    )


_METERS: Mapping[str, Any] = {
    "subject_consistency": partial(
        _ConsistencyMeter,
        dimension="subject_consistency",
        transform=dino_transform,
        first_transform=dinov2_transform,
    ),
    "background_consistency": partial(
        _ConsistencyMeter,
        dimension="background_consistency",
        transform=clip_transform,
        first_transform=dreamsim_transform,
    ),
    "temporal_flickering": _FlickeringMeter,
    "motion_smoothness": _SmoothnessMeter,
    "dynamic_degree": _DynamicMeter,
    "aesthetic_quality": _AestheticMeter,
    "imaging_quality": _ImagingMeter,
    "overall_consistency": _AgreementMeter,
    SEGMENTS: _SegmentMeter,
}


class SpanMetric:
    """A dimension of VBench, on whole videos, on clips, or on both.

    Args:
        name: A key of :data:`DIMENSIONS`, or :data:`SEGMENTS`.
        variants: To measure.
        networks: One for each of the dimension's roles.
        dev_networks: One for each of its roles in the development branch; needed for ``long_dev``.
        options: Of the dimension's meter: ``mode`` of imaging quality's preprocessing.
    """

    def __init__(
        self,
        name: str,
        variants: Sequence[Variant] = ("short",),
        networks: Sequence[Any] = (),
        dev_networks: Sequence[Any] = (),
        **options: Any,
    ) -> None:
        self._specs: Specs = {
            variant: _segment_spec(*networks)
            if name == SEGMENTS
            else metric_spec(name, variant, networks, dev_networks if variant == "long_dev" else ())
            for variant in variants
        }
        self.specs = tuple(self._specs.values())
        self._meter, self._networks, self._options = _METERS[name], (*networks, *dev_networks), options

    def start(self, video: VideoInfo) -> Meter:
        return self._meter(video, self._specs, *self._networks, **self._options)


def vbench_metrics(backbones: Backbones, *, short: bool, long: bool) -> tuple[list[Metric], dict[str, str]]:
    """VBench's dimensions on whole videos, on two-second clips, or on both from one pass.

    Returns:
        The metrics, and {name: why it is not computed}, under the name it would have with VBench's own networks.
    """
    metrics: list[Metric] = []
    skipped: dict[str, str] = {}
    for name, dimension in DIMENSIONS.items() if short or long else ():
        networks, lack = _networks(backbones, dimension.roles)
        dev_networks, dev_lack = _networks(backbones, dimension.dev_roles)
        reasons: dict[Variant, str] = {"short": lack} if short else {}
        reasons |= {"long": lack} if long else {}
        reasons |= {"long_dev": lack or dev_lack} if long and dimension.dev_roles else {}
        skipped.update({f"vbench/{FOLDERS[variant]}{name}": why for variant, why in reasons.items() if why})
        variants: list[Variant] = [variant for variant, why in reasons.items() if not why]
        if variants:
            metrics.append(SpanMetric(name, variants, networks, dev_networks if "long_dev" in variants else ()))
    if short:
        networks, why = _networks(backbones, DIMENSIONS["overall_consistency"].roles)
        if why:
            skipped[SEGMENTS] = why
        else:
            metrics.append(SpanMetric(SEGMENTS, networks=networks))
        for name, needs in LEFT_TO_VBENCH.items():
            skipped[f"vbench/{name}"] = (
                f"left to the official tool ({needs}): see evaluate export-vbench and import-vbench"
            )
    return metrics, skipped


def _networks(backbones: Backbones, roles: Sequence[str]) -> tuple[list[Any], str]:
    networks = [backbones.get(role) for role in roles]
    return networks, "; ".join(
        backbones.why_missing(role) for role, network in zip(roles, networks, strict=True) if network is None
    )
