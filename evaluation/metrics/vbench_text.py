"""VBench's agreement between a video and its prompt, and the like for prompts that change.

Formula: VBench (arXiv:2311.17982), as its code has it at commit 45e79ec.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from longtake.evaluation.metric import Meter, MetricSpec, Score, VideoInfo, Window
from longtake.evaluation.metrics.dimensions import OVERALL, Variant, metric_spec
from longtake.evaluation.metrics.spans import Batches, Span, clips_score, whole_score
from longtake.evaluation.metrics.vbench import BATCH, SpanMeter, SpanMetric, Specs
from longtake.evaluation.sampling import middle
from longtake.evaluation.transforms import clip_transform

NUM_FRAMES = 8
"""Frames that ViCLIP looks at."""


class SampledClips:
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


class AgreementMeter(SpanMeter):
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
        self._clips = SampledClips(wanted if video.prompt else [])
        self._values: dict[Span, float] = {}
        self._text: Tensor | None = None

    def take(self, start: int, frames: np.ndarray) -> None:
        """Score the spans whose last frame has come."""
        for span, clip in self._clips.take(start, frames):
            if self._text is None:
                self._text = encoded_text(self._scorer, self.video.prompt)
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
        self._clips = SampledClips(list(self._prompts))
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
            self._values[span] = cosine(self._scorer, clip, encoded_text(self._scorer, self._prompts[span]))


def encoded_text(scorer: Any, prompt: str) -> Tensor:
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
        return AgreementMeter(video, specs, scorer)

    networks = [("clip", scorer)]
    return SpanMetric({variant: metric_spec(OVERALL, variant, networks) for variant in variants}, meter)
