"""The scorecard of a model: how often five-second clips show what their captions ask for, against pass lines."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from lab.judge.training import clip_indices
from longtake.evaluation.intervals import Interval
from longtake.evaluation.mini_world.judge import (
    ATTRIBUTES,
    CLIP_FRAMES,
    CLIP_SECONDS,
    FRAME_STRIDE,
    ClipJudge,
    expected_verdict,
    resize_frames,
    verdicts,
)
from longtake.evaluation.mini_world.scenes import Scene, describe, parse_caption, render

PASS_LINES = {
    "colour": 0.95,
    "background": 0.95,
    "shape": 0.80,
    "texture": 0.90,
    "motion": 0.75,
    "one_object": 0.90,
}
MakeClips = Callable[[list[str], list[int]], Tensor]
"""(prompts, seeds) -> (batch, F, 3, H, W) in [0, 1], 5 seconds or more."""


def clip_from_frames(frames: Tensor, *, start: int = 0) -> Tensor:
    """Pick and resize the frames the judge looks at.

    Args:
        frames: (batch, F, 3, H, W) in [0, 1], at 16 frames per second.
        start: index of the clip's first frame.

    Returns:
        (batch, CLIP_FRAMES, 3, 64, 64) float32.

    Raises:
        ValueError: If the clip does not fit into F.
    """
    last = start + (CLIP_FRAMES - 1) * FRAME_STRIDE
    if frames.shape[1] <= last:
        raise ValueError(
            f"frames has {frames.shape[1]} frames, a clip from frame {start} needs {last + 1}: "
            f"pass at least {CLIP_SECONDS:g} seconds."
        )
    return resize_frames(frames[:, start : last + 1 : FRAME_STRIDE])


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a scorecard.

    Attributes:
        attribute: what the judge was asked; ``one_object`` is the count on prompts of a single object.
        num_right: clips that show it.
        num_asked: clips whose caption asks for it.
        accuracy: share with its 95 % interval (Wilson).
        pass_line: the share to reach, or None.
        mistakes: {"asked -> seen": count}, most frequent first.
    """

    attribute: str
    num_right: int
    num_asked: int
    accuracy: Interval
    pass_line: float | None
    mistakes: dict[str, int]

    @property
    def is_reached(self) -> bool:
        """True where there is no pass line, or the observed share is at or above it."""
        return self.pass_line is None or self.accuracy.mean >= self.pass_line


def scorecard(found: Sequence[Mapping[str, str]], expected: Sequence[Mapping[str, str]]) -> list[Line]:
    """Compare verdicts with what the captions ask for.

    Args:
        found: of :func:`longtake.evaluation.mini_world.judge.verdicts`, one per clip.
        expected: of :func:`longtake.evaluation.mini_world.judge.expected_verdict`, one per clip.

    Returns:
        One line per attribute that any caption asks for, those with a pass line first.
    """
    pairs = {
        name: [(f[name], e[name]) for f, e in zip(found, expected, strict=True) if name in e] for name in ATTRIBUTES
    }
    pairs["one_object"] = [(seen, asked) for seen, asked in pairs["count"] if asked == "one"]
    order = [*PASS_LINES, *(name for name in pairs if name not in PASS_LINES)]
    lines = []
    for name in order:
        if not pairs[name]:
            continue
        wrong: dict[str, int] = {}
        for seen, asked in pairs[name]:
            if seen != asked:
                wrong[f"{asked} -> {seen}"] = wrong.get(f"{asked} -> {seen}", 0) + 1
        num_asked = len(pairs[name])
        num_right = num_asked - sum(wrong.values())
        lines.append(
            Line(
                attribute=name,
                num_right=num_right,
                num_asked=num_asked,
                accuracy=_accuracy(num_right, num_asked),
                pass_line=PASS_LINES.get(name),
                mistakes=dict(sorted(wrong.items(), key=lambda item: -item[1])),
            )
        )
    return lines


def _accuracy(num_right: int, num_asked: int) -> Interval:
    limits = binomtest(num_right, num_asked).proportion_ci(method="wilson")
    return Interval(mean=num_right / num_asked, low=float(limits.low), high=float(limits.high), num_prompts=num_asked)


def score_model(
    judge: ClipJudge,
    scenes: Sequence[Scene],
    make_clips: MakeClips,
    *,
    batch_size: int,
    report: Callable[[int], None] = lambda done: None,
) -> list[Line]:
    """Make one clip per scene's caption and judge it.

    Args:
        judge: from :func:`longtake.evaluation.mini_world.judge.load_judge`.
        scenes: their captions are the prompts; clip i takes seed i.
        make_clips: the model.
        batch_size: clips made together.
        report: called with the number of clips judged so far.
    """
    captions = [describe(scene) for scene in scenes]
    found: list[dict[str, str]] = []
    for start in range(0, len(scenes), batch_size):
        prompts = captions[start : start + batch_size]
        frames = make_clips(prompts, list(range(start, start + len(prompts))))
        found += verdicts(judge, clip_from_frames(frames))
        report(len(found))
    return scorecard(found, [expected_verdict(parse_caption(caption)) for caption in captions])


def score_true_scenes(
    judge: ClipJudge,
    scenes: Sequence[Scene],
    *,
    start: Callable[[int], int] = lambda index: 0,
    round_trip: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 20,
) -> list[Line]:
    """Judge the true renders of scenes: the judge's own accuracy, the ceiling of every score.

    Args:
        judge: the classifier.
        scenes: held-back scenes.
        start: first frame of scene ``index``'s clip.
        round_trip: a VAE's encode and decode of (batch, F, 3, H, W) in [0, 1]; without one, raw renders are judged.
        batch_size: clips judged together.
    """
    found: list[dict[str, str]] = []
    for first in range(0, len(scenes), batch_size):
        batch = list(enumerate(scenes))[first : first + batch_size]
        if round_trip is None:
            clips = _stack([render(scene, clip_indices(start(index))) for index, scene in batch])
        else:
            every = np.arange((CLIP_FRAMES * 4) + 1)
            clips = clip_from_frames(
                round_trip(_stack([render(scene, start(index) + every) for index, scene in batch]))
            )
        found += verdicts(judge, clips)
    return scorecard(found, [expected_verdict(parse_caption(describe(scene))) for scene in scenes])


def _stack(videos: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(list(videos))).permute(0, 1, 4, 2, 3).float() / 255.0


def write_scorecard(lines: Iterable[Line], path: Path, *, notes: Mapping[str, str | int | float]) -> None:
    """Write a scorecard with its notes as JSON."""
    document = {"notes": dict(notes), "lines": [{**asdict(line), "is_reached": line.is_reached} for line in lines]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
