"""VBench's dimensions that look at single frames or at neighbours: flickering, consistency, aesthetic and imaging.

Formulas: VBench (arXiv:2311.17982) and VBench++ (arXiv:2411.13503), as its code has them at commit 45e79ec. Each meter
gives up to three numbers from one pass: of the whole video, of VBench-Long's clips, and of its development branch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from longtake.evaluation.metric import Meter, MetricSpec, Score, VideoInfo, Window, WindowMeans
from longtake.evaluation.metrics.dimensions import (
    AESTHETIC,
    BACKGROUND,
    DYNAMIC,
    FLICKERING,
    IMAGING,
    OVERALL,
    SMOOTHNESS,
    SUBJECT,
    Batches,
    Dimension,
    Span,
    Spans,
    Tally,
    Variant,
    clip_to_clip_scores,
    clips_score,
    metric_spec,
    whole_score,
)
from longtake.evaluation.preprocessing import (
    MusiqMode,
    clip_transform,
    dino_transform,
    middle,
    musiq_transform,
    pad_to_multiple,
    stride_for_8fps,
    to_tensor,
    unpad,
)

Specs = Mapping[Variant, MetricSpec]
Features = Callable[[np.ndarray], Tensor]
"""(F, H, W, 3) uint8 frames to (F, D) float32 features."""

BATCH = 8
"""Frames per call of a network. Fixed, so that a number does not depend on how the frames were read."""


class SpanMetric:
    """A dimension of VBench, on whole videos, on clips, or on both.

    Args:
        specs: One per variant to be measured.
        meter: Makes the meter of one video.
    """

    def __init__(self, specs: Specs, meter: Callable[[VideoInfo, Specs], Meter]) -> None:
        self._by_variant = dict(specs)
        self.specs = tuple(specs.values())
        self._meter = meter

    def start(self, video: VideoInfo) -> Meter:
        """A meter for one video."""
        return self._meter(video, self._by_variant)


class SpanMeter(ABC):
    """Takes a video in batches and gathers terms over its spans.

    Args:
        video: To be measured.
        specs: One per variant to be measured.
        batch: Frames per batch.
    """

    reason = "needs at least 2 frames"

    def __init__(self, video: VideoInfo, specs: Specs, *, batch: int = BATCH) -> None:
        self.video, self.specs = video, specs
        self.spans = Spans(video, clips="long" in specs or "long_dev" in specs)
        self.windows = WindowMeans(video)
        self._batches = Batches(video, batch, self.take)

    def push(self, frames: np.ndarray) -> None:
        """Take the next frames: (F, H, W, 3) uint8."""
        with torch.no_grad():
            self._batches.push(frames)

    @abstractmethod
    def take(self, start: int, frames: np.ndarray) -> None:
        """Take the batch whose first frame has index ``start``."""

    def finish(self) -> Mapping[str, Score]:
        """The score of every variant."""
        with torch.no_grad():
            self._batches.close()
        return {spec.name: self.score(variant) for variant, spec in self.specs.items()}

    def score(self, variant: Variant) -> Score:
        """Of one variant."""
        if variant == "short":
            return self.short()
        if not self.spans.clips:
            return Score.none(f"clips of VBench-Long need 1 frame per second, the video has {self.video.fps:g}")
        return self.long()

    def value(self, mean: float | None) -> float | None:
        """From the mean of a span's terms to its value."""
        return mean

    def short(self) -> Score:
        """On the whole video."""
        whole = self.spans.whole
        return whole_score(
            self.value(whole.mean),
            reason=self.reason,
            weight=float(whole.count) if self.specs["short"].grouping == "frame" else 1.0,
            windows=self.windows.windows(),
        )

    def long(self) -> Score:
        """On the clips."""
        values = [self.value(clip.mean) for clip in self.spans.clips]
        return clips_score(self.clips, values, reason=self.reason)

    @property
    def clips(self) -> list[Span]:
        """The clips of the video."""
        return [tally.span for tally in self.spans.clips]


class _FlickeringMeter(SpanMeter):
    """``(255 - mean |I[t+1] - I[t]|) / 255``."""

    def __init__(self, video: VideoInfo, specs: Specs) -> None:
        super().__init__(video, specs)
        self._last: np.ndarray | None = None

    def take(self, start: int, frames: np.ndarray) -> None:
        """Differences of each frame from the one before."""
        for index, frame in enumerate(frames, start=start):
            if self._last is not None:
                difference = _mean_absolute_difference(self._last, frame)
                self.spans.add(index - 1, index, difference)
                self.windows.add(index, 1.0 - difference / 255.0)
            self._last = frame
        self._last = frames[-1].copy()

    def value(self, mean: float | None) -> float | None:
        """One less the difference, in units of white."""
        return None if mean is None else (255.0 - mean) / 255.0


def _mean_absolute_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean of ``|a - b|`` over two uint8 arrays of one shape, exactly."""
    return float(np.sum(np.maximum(a, b) - np.minimum(a, b), dtype=np.uint64)) / a.size


class _ConsistencyMeter(SpanMeter):
    """Mean over frames of ``(max(0, cos to the frame before) + max(0, cos to the span's first)) / 2``.

    Args:
        video: To be measured.
        specs: One per variant.
        features: Of the frames.
        first_features: Of each clip's first frame for the development branch; needed where it is measured.
        dimension: Which of the two consistencies: each has a quantile table of its own.
    """

    def __init__(
        self,
        video: VideoInfo,
        specs: Specs,
        *,
        features: Features,
        first_features: Features | None,
        dimension: str,
    ) -> None:
        super().__init__(video, specs)
        self._features, self._first_features, self._dimension = features, first_features, dimension
        self._last: Tensor | None = None
        self._firsts: dict[Span, Tensor] = {}
        self._dev_firsts: list[Tensor] = []

    def take(self, start: int, frames: np.ndarray) -> None:
        """Terms of every frame but the first of a span."""
        features = normalize(self._features(frames), dim=-1)
        before = features[:1] if self._last is None else self._last
        to_previous = _clamped_cosines(torch.cat([before, features[:-1]]), features)
        self._last = features[-1:].clone()
        end = start + len(frames)
        for tally in self.spans:
            span = tally.span
            begin = max(start, span.start)
            if begin >= min(end, span.end):
                continue
            if begin == span.start:
                self._firsts[span] = features[begin - start : begin - start + 1].clone()
                if tally is not self.spans.whole and self._first_features is not None:
                    first = self._first_features(frames[begin - start : begin - start + 1])
                    self._dev_firsts.append(normalize(first, dim=-1))
                begin += 1
            rows = features[begin - start : span.end - start]
            to_first = _clamped_cosines(self._firsts[span].expand_as(rows), rows)
            for index, cosine in enumerate(to_first, start=begin):
                term = (to_previous[index - start] + cosine) / 2
                tally.add(term)
                if tally is self.spans.whole:
                    self.windows.add(index, term)

    def long(self) -> Score:
        """Mean over clips; what the clip-to-clip branch would have said is in the details."""
        firsts = [self._firsts[clip] for clip in self.clips]
        return self._fused(firsts, fuse=False)

    def score(self, variant: Variant) -> Score:
        """Of one variant; VBench-Long's development branch is of the consistencies alone."""
        return self.long_dev() if variant == "long_dev" and self.spans.clips else super().score(variant)

    def long_dev(self) -> Score:
        """Mean over clips of half the clip's value and half the mapped clip-to-clip value."""
        return self._fused(self._dev_firsts, fuse=True)

    def _fused(self, first_features: list[Tensor], *, fuse: bool) -> Score:
        inclip = [tally.mean for tally in self.spans.clips]
        scores = clip_to_clip_scores(inclip, first_features, self._dimension)
        return clips_score(
            self.clips,
            scores.fused if fuse else scores.inclip,
            reason=self.reason,
            per_clip=[{"inclip_score": value} for value in inclip],
            details={"clip2clip_score": scores.clip_to_clip, "mapped_clip2clip_score": scores.mapped},
        )


def _clamped_cosines(a: Tensor, b: Tensor) -> list[float]:
    """Cosines of the rows of (n, D) and (n, D), negative ones as zero."""
    return [max(0.0, cosine) for cosine in cosine_similarity(a, b).tolist()]


class _FrameQualityMeter(SpanMeter):
    """Mean over frames of a value that each frame has by itself.

    Args:
        video: To be measured.
        specs: One per variant.
        quality: (F, H, W, 3) uint8 frames to their F values.
    """

    reason = "the video has no frames"

    def __init__(self, video: VideoInfo, specs: Specs, quality: Callable[[np.ndarray], list[float]]) -> None:
        super().__init__(video, specs)
        self._quality = quality

    def take(self, start: int, frames: np.ndarray) -> None:
        """One term per frame."""
        for index, value in enumerate(self._quality(frames), start=start):
            self.spans.add(index, index, value)
            self.windows.add(index, value)


def flickering(variants: tuple[Variant, ...]) -> SpanMetric:
    """``temporal_flickering``: needs no network; identical to VBench's, without its static filter."""
    return SpanMetric({variant: metric_spec(FLICKERING, variant) for variant in variants}, _FlickeringMeter)


def consistency(
    dimension: Dimension, variants: tuple[Variant, ...], encoder: Any, first_encoder: Any, first_transform: Any
) -> SpanMetric:
    """``subject_consistency`` or ``background_consistency``.

    Args:
        dimension: :data:`SUBJECT` or :data:`BACKGROUND`.
        variants: To measure; ``long_dev`` needs the last two arguments.
        encoder: A frame encoder: DINO or CLIP.
        first_encoder: Of the clips' first frames in the development branch: DINOv2 or DreamSim; may be None.
        first_transform: Its transform.
    """
    transform = {SUBJECT: dino_transform, BACKGROUND: clip_transform}[dimension]

    def features(frames: np.ndarray) -> Tensor:
        return encoder.encode(transform(frames))

    def first_features(frames: np.ndarray) -> Tensor:
        return first_encoder.encode(first_transform(frames))

    def meter(video: VideoInfo, specs: Specs) -> Meter:
        second = first_features if "long_dev" in specs else None
        return _ConsistencyMeter(video, specs, features=features, first_features=second, dimension=dimension.name)

    def networks(variant: Variant) -> list[tuple[str, Any]]:
        return [("enc", encoder), ("c2c", first_encoder)] if variant == "long_dev" else [("enc", encoder)]

    specs = {variant: metric_spec(dimension, variant, networks(variant)) for variant in variants}
    return SpanMetric(specs, meter)


def aesthetic(variants: tuple[Variant, ...], encoder: Any, head: Any) -> SpanMetric:
    """``aesthetic_quality``: a head on normalised CLIP features, over ten.

    Args:
        variants: To measure.
        encoder: CLIP ViT-L/14, (B, 3, 224, 224) to (B, 768).
        head: of length 1, to (B, 1).
    """

    def quality(frames: np.ndarray) -> list[float]:
        features = normalize(encoder.encode(clip_transform(frames)), dim=-1)
        return (head.rate(features).reshape(-1) / 10).tolist()

    def meter(video: VideoInfo, specs: Specs) -> Meter:
        return _FrameQualityMeter(video, specs, quality)

    networks = [("aesthetic", encoder), ("aesthetic", head)]
    return SpanMetric({variant: metric_spec(AESTHETIC, variant, networks) for variant in variants}, meter)


def imaging(variants: tuple[Variant, ...], scorer: Any, *, mode: MusiqMode = "longer") -> SpanMetric:
    """``imaging_quality``: MUSIQ on each frame, 0..100.

    Args:
        variants: To measure.
        scorer: A frame scorer, (1, 3, h, w) in 0..1 to a number.
        mode: VBench's ``imaging_quality_preprocessing_mode``; published numbers have its default.
    """

    def quality(frames: np.ndarray) -> list[float]:
        return [scorer.score(musiq_transform(frame[None], mode=mode)) for frame in frames]

    def meter(video: VideoInfo, specs: Specs) -> Meter:
        return _FrameQualityMeter(video, specs, quality)

    return SpanMetric({variant: metric_spec(IMAGING, variant, [("iqa", scorer)]) for variant in variants}, meter)


NUM_FRAMES = 8
"""Frames that ViCLIP looks at."""


class _SampledClips:
    """Eight frames of each of some spans, gathered as a video streams by; a span that has all lets go of its frames.

    Args:
        spans: They may overlap.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self._open = {span: sampled_frames(span) for span in spans}
        self._images: dict[int, Tensor] = {}

    def take(self, start: int, frames: np.ndarray) -> Iterator[tuple[Span, Tensor]]:
        """The spans that are complete with the batch whose first frame is ``start``, with (1, 8, 3, 224, 224)."""
        end = start + len(frames)
        asked = sorted({index for indices in self._open.values() for index in indices if start <= index < end})
        if not asked:
            return
        images = clip_transform(frames[[index - start for index in asked]], loader="uint8")
        self._images.update(zip(asked, images, strict=True))
        for span, indices in list(self._open.items()):
            if indices[-1] < end:
                yield span, torch.stack([self._images[index] for index in indices])[None]
                del self._open[span]
        needed = {index for indices in self._open.values() for index in indices}
        self._images = {index: image for index, image in self._images.items() if index in needed}


class _AgreementMeter(SpanMeter):
    """Cosine between the features of the middle frames of eight equal stretches and those of the prompt.

    Args:
        video: To be measured; without a prompt there is no score.
        specs: One per variant.
        scorer: Encodes eight frames, and a text.
    """

    reason = "the video has no prompt"

    def __init__(self, video: VideoInfo, specs: Specs, scorer: Any) -> None:
        super().__init__(video, specs)
        self._scorer = scorer
        wanted = [self.spans.whole.span] if "short" in specs else []
        wanted += [clip for clip in self.clips if clip not in wanted]
        self._clips = _SampledClips(wanted if video.prompt else [])
        self._values: dict[Span, float] = {}
        self._text: Tensor | None = None

    def take(self, start: int, frames: np.ndarray) -> None:
        """Score the spans whose last frame has come."""
        for span, clip in self._clips.take(start, frames):
            if self._text is None:
                self._text = _encoded_text(self._scorer, self.video.prompt)
            self._values[span] = cosine(self._scorer, clip, self._text)

    def short(self) -> Score:
        """Of the whole video."""
        return whole_score(self._values.get(self.spans.whole.span), reason=self.reason)

    def long(self) -> Score:
        """Mean over the clips, each against the whole prompt."""
        return clips_score(self.clips, [self._values.get(clip) for clip in self.clips], reason=self.reason)


class SegmentAlignment:
    """``proxy/segment_alignment``: where the prompt changes, each prompt against the frames while it held.

    One window per segment, so that the curve shows which prompts a rollout followed; the value is their mean. The
    layout of "CLIP score per 10 s" (LongLive) with the network and the sampling of VBench's ``overall_consistency``.

    Args:
        scorer: As for :func:`agreement`.
    """

    def __init__(self, scorer: Any) -> None:
        self._scorer = scorer
        spec = MetricSpec(
            name=f"proxy/segment_alignment[clip={scorer.name}]",
            higher_is_better=True,
            unit="-1..1",
            range=(-1.0, 1.0),
            backbone=scorer.name,
            weights_sha256=scorer.weights_sha256,
            transform=OVERALL.transform,
            description="Cosine between features of eight frames of a segment and of its prompt, mean over segments.",
        )
        self.specs = (spec,)

    def start(self, video: VideoInfo) -> Meter:
        """A meter for one video."""
        return _SegmentMeter(video, self.specs[0].name, self._scorer)


class _SegmentMeter:
    def __init__(self, video: VideoInfo, name: str, scorer: Any) -> None:
        self._name, self._scorer = name, scorer
        self._prompts: dict[Span, str] = {}
        for segment in video.segments:
            start, end = (min(round(s * video.fps), video.num_frames) for s in (segment.start_s, segment.end_s))
            if start < end:
                self._prompts[Span(start, end - start, video.fps)] = segment.prompt
        self._clips = _SampledClips(list(self._prompts))
        self._batches = Batches(video, BATCH, self._take)
        self._values: dict[Span, float] = {}

    def push(self, frames: np.ndarray) -> None:
        """Take the next frames: (F, H, W, 3) uint8."""
        with torch.no_grad():
            self._batches.push(frames)

    def finish(self) -> Mapping[str, Score]:
        """Mean over the segments, and a window for each."""
        with torch.no_grad():
            self._batches.close()
        if not self._values:
            return {self._name: Score.none("the video has one prompt")}
        windows = tuple(Window(start_frame=s.start, num_frames=s.length, value=v) for s, v in self._values.items())
        return {self._name: Score(value=sum(self._values.values()) / len(self._values), windows=windows)}

    def _take(self, start: int, frames: np.ndarray) -> None:
        for span, clip in self._clips.take(start, frames):
            self._values[span] = cosine(self._scorer, clip, _encoded_text(self._scorer, self._prompts[span]))


def _encoded_text(scorer: Any, prompt: str) -> Tensor:
    """(1, D), of length 1."""
    return normalize(scorer.encode_text(prompt), dim=-1)


def cosine(scorer: Any, clip: Tensor, text: Tensor) -> float:
    """Between the features of (1, 8, 3, 224, 224) and a text's."""
    return float((normalize(scorer.encode_video(clip), dim=-1) @ text.T)[0, 0])


def sampled_frames(span: Span) -> list[int]:
    """The frames of a span that are looked at; the last is repeated in spans that are too short."""
    return [span.start + index for index in middle(NUM_FRAMES, span.length)]


def agreement(variants: tuple[Variant, ...], scorer: Any) -> SpanMetric:
    """``overall_consistency``.

    Args:
        variants: To measure.
        scorer: ``encode_video`` of (1, 8, 3, 224, 224) and ``encode_text``, both to (1, D).
    """

    def meter(video: VideoInfo, specs: Specs) -> Meter:
        return _AgreementMeter(video, specs, scorer)

    networks = [("clip", scorer)]
    return SpanMetric({variant: metric_spec(OVERALL, variant, networks) for variant in variants}, meter)


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
            indices = _motion_frames(tally.span)
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
        needed = round(4 * (len(_motion_frames(tally.span)) / 16.0))
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


def _motion_frames(span: Span) -> list[int]:
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
