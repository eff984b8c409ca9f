"""VBench's agreement between a video and its prompt.

Formula: VBench (arXiv:2311.17982), as its code has it at commit 45e79ec.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from longtake.evaluation.metric import Meter, Score, VideoInfo
from longtake.evaluation.metrics.dimensions import OVERALL, Variant, metric_spec
from longtake.evaluation.metrics.spans import Span, clips_score, whole_score
from longtake.evaluation.metrics.vbench import SpanMeter, SpanMetric, Specs
from longtake.evaluation.sampling import middle
from longtake.evaluation.transforms import clip_transform

NUM_FRAMES = 8
"""Frames that ViCLIP looks at."""


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
        self._open = {span: sampled_frames(span) for span in wanted} if video.prompt else {}
        self._images: dict[int, Tensor] = {}
        self._values: dict[Span, float] = {}
        self._text: Tensor | None = None

    def take(self, start: int, frames: np.ndarray) -> None:
        """Keep the frames that are asked for; a span whose last one has come is scored and lets go of its frames."""
        end = start + len(frames)
        asked = sorted({index for indices in self._open.values() for index in indices if start <= index < end})
        if not asked:
            return
        images = clip_transform(frames[[index - start for index in asked]], loader="uint8")
        self._images.update(zip(asked, images, strict=True))
        for span, indices in list(self._open.items()):
            if indices[-1] < end:
                self._values[span] = self._score(torch.stack([self._images[index] for index in indices])[None])
                del self._open[span]
        needed = {index for indices in self._open.values() for index in indices}
        self._images = {index: image for index, image in self._images.items() if index in needed}

    def short(self) -> Score:
        """Of the whole video."""
        return whole_score(self._values.get(self.spans.whole.span), reason=self.reason)

    def long(self) -> Score:
        """Mean over the clips, each against the whole prompt."""
        return clips_score(self.clips, [self._values.get(clip) for clip in self.clips], reason=self.reason)

    def _score(self, clip: Tensor) -> float:
        if self._text is None:
            self._text = normalize(self._scorer.encode_text(self.video.prompt), dim=-1)
        features = normalize(self._scorer.encode_video(clip), dim=-1)
        return float((features @ self._text.T)[0, 0])


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
