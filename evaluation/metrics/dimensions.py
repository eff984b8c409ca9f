"""What VBench's dimensions are called here, and what a reader needs to know about each."""

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from longtake.evaluation.metric import MetricSpec, Score, VideoInfo, Window
from longtake.evaluation.preprocessing import clip_ranges

CLIP_SECONDS = 2
"""Length of VBench-Long's clips in its mode for custom videos."""


@dataclass(frozen=True)
class Span:
    """A stretch of frames.

    Attributes:
        start: First frame.
        length: Frames.
        fps: Rate that sampling inside the span goes by: clips have VBench-Long's whole number of frames per second.
    """

    start: int
    length: int
    fps: float

    @property
    def end(self) -> int:
        """One past the last frame."""
        return self.start + self.length

    def holds(self, first: int, last: int) -> bool:
        """Whether frames ``first`` to ``last``, both included, lie inside."""
        return self.start <= first and last < self.end


@dataclass
class Tally:
    """What a span has gathered: the sum and number of its terms."""

    span: Span
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """One more term."""
        self.total += value
        self.count += 1

    @property
    def mean(self) -> float | None:
        """Mean of the terms; None without any."""
        return self.total / self.count if self.count else None


class Spans:
    """The whole video and its clips, each with a tally.

    Args:
        video: Announces its number of frames and its rate.
        clips: Whether to cut it into clips too; below a frame per second there are none.
    """

    def __init__(self, video: VideoInfo, *, clips: bool) -> None:
        self.video = video
        self.whole = Tally(Span(0, video.num_frames, video.fps))
        ranges = clip_ranges(video.num_frames, video.fps, CLIP_SECONDS) if clips and video.fps >= 1 else []
        self.clips = [Tally(Span(start, length, float(int(video.fps)))) for start, length in ranges]
        self._first_open = 0

    def __iter__(self) -> Iterator[Tally]:
        yield self.whole
        yield from self.clips

    def holding(self, first: int, last: int) -> list[Tally]:
        """Tallies of the spans that hold frames ``first`` to ``last``; ``first`` must not fall between calls."""
        clips, index = self.clips, self._first_open
        while index < len(clips) and clips[index].span.end <= first:
            index += 1
        self._first_open = index
        found = [self.whole]
        while index < len(clips) and clips[index].span.start <= first:
            if last < clips[index].span.end:
                found.append(clips[index])
            index += 1
        return found

    def add(self, first: int, last: int, value: float) -> None:
        """Give a term made of frames ``first`` to ``last`` to every span that holds them."""
        for tally in self.holding(first, last):
            tally.add(value)


class Batches:
    """Cuts what is pushed into batches of a fixed number of frames, so that no result depends on how it was pushed.

    Args:
        video: Announces how many frames will come.
        size: Frames per batch; the last one may be shorter.
        take: Called with the index of a batch's first frame and its frames (F, H, W, 3).
    """

    def __init__(self, video: VideoInfo, size: int, take: Callable[[int, np.ndarray], None]) -> None:
        self._video, self._size, self._take = video, size, take
        self._held: list[np.ndarray] = []
        self._num_held = 0
        self._start = 0

    def push(self, frames: np.ndarray) -> None:
        """Take the next frames; they are copied where they have to wait."""
        position = 0
        while position < len(frames):
            part = frames[position : position + self._size - self._num_held]
            position += len(part)
            if not self._held and len(part) == self._size:
                self._emit(part)
                continue
            self._held.append(part.copy())
            self._num_held += len(part)
            if self._num_held == self._size:
                self._flush()

    def close(self) -> None:
        """All frames have come.

        Raises:
            ValueError: If there were more or fewer than announced.
        """
        if self._held:
            self._flush()
        if self._start != self._video.num_frames:
            raise ValueError(
                f"video {self._video.id!r}: {self._start} frames came and num_frames={self._video.num_frames} were "
                "announced: count the frames that decode, then measure again."
            )

    def _flush(self) -> None:
        frames = np.concatenate(self._held)
        self._held, self._num_held = [], 0
        self._emit(frames)

    def _emit(self, frames: np.ndarray) -> None:
        self._take(self._start, frames)
        self._start += len(frames)


def whole_score(
    value: float | None,
    *,
    reason: str,
    weight: float = 1.0,
    windows: tuple[Window, ...] = (),
    details: Mapping[str, Any] | None = None,
) -> Score:
    """The score of a whole video, or none with the reason."""
    if value is None:
        return Score.none(reason)
    return Score(value=value, weight=weight, windows=windows, details=dict(details or {}))


def clips_score(
    clips: Sequence[Span],
    values: Sequence[float | None],
    *,
    reason: str,
    per_clip: Sequence[Mapping[str, Any]] | None = None,
    details: Mapping[str, Any] | None = None,
) -> Score:
    """The score of a video as the mean over its clips; it weighs as many clips as it has.

    Args:
        clips: Of the video.
        values: Of each clip; None where it has none.
        reason: Why there is no score, if no clip has a value.
        per_clip: What stands behind each clip's value.
        details: What else stands behind the score.

    Returns:
        The score; its windows are the clips, the last of which may overlap the one before.
    """
    kept = [value for value in values if value is not None]
    if not kept:
        return Score.none(reason)
    windows = tuple(
        Window(start_frame=clip.start, num_frames=clip.length, value=value)
        for clip, value in zip(clips, values, strict=True)
    )
    rows = [
        {"start_frame": clip.start, "num_frames": clip.length, "value": value, **behind}
        for clip, value, behind in zip(clips, values, per_clip or [{}] * len(clips), strict=True)
    ]
    return Score(
        value=sum(kept) / len(kept),
        weight=float(len(kept)),
        windows=windows,
        details={**(details or {}), "clips": rows},
    )


VBENCH = "vbench@45e79ec"
Variant = Literal["short", "long", "long_dev"]
"""Of a dimension: on the whole video; on VBench-Long's clips; the same with its ``--dev_flag``."""
FOLDERS: Mapping[Variant, str] = {"short": "", "long": "long/", "long_dev": "long_dev/"}


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One dimension of VBench.

    Attributes:
        name: As VBench spells it.
        description: One sentence.
        grouping: What VBench's mean over whole videos is taken over.
        transform: Before the network.
        dev_transform: Before the network for clips' first frames, with VBench-Long's development flag.
        scale: From the mean over videos to VBench's score.
        highest: Greatest possible value of a video.
    """

    name: str
    description: str
    grouping: Literal["video", "frame"] = "video"
    transform: str | None = None
    dev_transform: str | None = None
    scale: float = 1.0
    highest: float = 1.0


SUBJECT = Dimension(
    name="subject_consistency",
    description="Likeness of each frame's DINO features to the frame before and to the first.",
    grouping="frame",
    transform="dino224",
    dev_transform="dinov2_256bicubic_antialias",
)
BACKGROUND = Dimension(
    name="background_consistency",
    description="Likeness of each frame's CLIP features to the frame before and to the first.",
    grouping="frame",
    transform="clip224",
    dev_transform="dreamsim_224bicubic_antialias",
)
FLICKERING = Dimension(
    name="temporal_flickering",
    description="One less the mean absolute difference of neighbouring frames; no static filter, so motion counts.",
)
SMOOTHNESS = Dimension(
    name="motion_smoothness",
    description="One less the mean absolute error of every second frame, interpolated from its neighbours.",
)
DYNAMIC = Dimension(
    name="dynamic_degree",
    description="Whether enough of the pairs of frames, an eighth of a second apart, move: 0 or 1 per video.",
)
AESTHETIC = Dimension(
    name="aesthetic_quality",
    description="LAION's aesthetic score of each frame, over ten.",
    transform="clip224",
)
IMAGING = Dimension(
    name="imaging_quality",
    description="MUSIQ's score of each frame, 0..100 per video; VBench divides the mean by 100.",
    transform="musiq_longer512",
    scale=0.01,
    highest=100.0,
)
OVERALL = Dimension(
    name="overall_consistency",
    description="Cosine between ViCLIP's features of eight frames and of the prompt.",
    transform="clip224_uint8",
)
DIMENSIONS = (SUBJECT, BACKGROUND, FLICKERING, SMOOTHNESS, DYNAMIC, AESTHETIC, IMAGING, OVERALL)
"""Those measured here, in VBench's order of its quality score, then the semantic one."""
LEFT_TO_VBENCH: Mapping[str, str] = {
    "object_class": "GRiT, which needs detectron2",
    "multiple_objects": "GRiT, which needs detectron2",
    "human_action": "UMT, and labels in the file names",
    "color": "GRiT, which needs detectron2",
    "spatial_relationship": "GRiT, which needs detectron2",
    "scene": "Tag2Text",
    "appearance_style": "CLIP, and VBench's own style prompts",
    "temporal_style": "ViCLIP, and VBench's own style prompts",
}
"""Semantic dimensions that are only imported from the official tool's results, and what it takes for each."""


def _metric_name(dimension: Dimension, variant: Variant, networks: Sequence[tuple[str, Any]]) -> str:
    """The name that says what a dimension's number may be compared with.

    Args:
        dimension: Of VBench.
        variant: Of the dimension.
        networks: (label, backbone) of every network behind it, with ``name`` and ``official``.

    Returns:
        ``vbench/...`` if every network is VBench's own, else ``vbench_form/...[label=name,...]``; networks of the
        same label are joined by a plus.
    """
    stem = f"{FOLDERS[variant]}{dimension.name}"
    if all(network.official for _, network in networks):
        return f"vbench/{stem}"
    labels: dict[str, list[str]] = {}
    for label, network in networks:
        labels.setdefault(label, []).append(network.name)
    inside = ",".join(f"{label}={'+'.join(names)}" for label, names in labels.items())
    return f"vbench_form/{stem}[{inside}]"


def of_own_prompts(scores: Mapping[str, Score], dimensions: Sequence[str]) -> dict[str, Score]:
    """A video's scores without those of dimensions that VBench's list does not have its prompt for.

    Args:
        scores: By metric name.
        dimensions: Of the prompt; none: it is of no such list, and nothing is left out.
    """
    kept = dict(scores)
    for name in scores if dimensions else ():
        prefix, _, stem = name.partition("/")
        dimension = stem.removeprefix("long/").removeprefix("long_dev/").partition("[")[0]
        if prefix in ("vbench", "vbench_form") and dimension not in dimensions:
            kept[name] = Score.none(f"VBench has other prompts for {dimension}")
    return kept


def metric_spec(dimension: Dimension, variant: Variant, networks: Sequence[tuple[str, Any]] = ()) -> MetricSpec:
    """The spec of a dimension measured with some networks (arguments as in :func:`metric_name`)."""
    hashes = [network.weights_sha256 for _, network in networks]
    grouping = dimension.grouping if variant == "short" else "clip"
    low = -1.0 if dimension is OVERALL else 0.0
    transforms = (dimension.transform, dimension.dev_transform if variant == "long_dev" else None)
    return MetricSpec(
        name=_metric_name(dimension, variant, networks),
        higher_is_better=True,
        unit=f"{low:g}..{dimension.highest:g}",
        range=(low, dimension.highest),
        formula=VBENCH if variant == "short" else f"{VBENCH} long, clips cut without encoding them again",
        backbone="+".join(network.name for _, network in networks) or None,
        weights_sha256="+".join(hashes) if hashes and all(hashes) else None,
        transform="+".join(name for name in transforms if name) or None,
        clip_seconds=None if variant == "short" else float(CLIP_SECONDS),
        grouping=grouping,
        scale=dimension.scale,
        description=dimension.description,
    )


TABLES = Path(__file__).with_name("vbench_long_tables.json")
WEIGHT_IN_CLIP, WEIGHT_CLIP_TO_CLIP = 0.5, 0.5
"""With the development flag; without it 1 and 0."""


@dataclass(frozen=True, kw_only=True)
class _ClipScores:
    """A video's consistency, clip by clip.

    Attributes:
        inclip: Of each clip; None where a clip has none.
        clip_to_clip: Of the clips' first frames; 0 where the official tool finds none: a single clip.
        mapped: ``clip_to_clip`` by the table of quantiles.
        fused: Of each clip with the development flag.
    """

    inclip: tuple[float | None, ...]
    clip_to_clip: float
    mapped: float
    fused: tuple[float | None, ...]


@cache
def _quantile_table(dimension: str) -> tuple[float, ...]:
    """What clip-to-clip values of 0.00, 0.01, ... 1.00 become: 101 figures of VBench-Long.

    Args:
        dimension: ``subject_consistency`` or ``background_consistency``.

    Raises:
        ValueError: If the dimension has no table.
    """
    tables = json.loads(TABLES.read_text(encoding="utf-8"))
    known = ("subject_consistency", "background_consistency")
    if dimension not in known:
        raise ValueError(f"dimension={dimension!r} has no clip-to-clip table: use {' or '.join(known)}.")
    return tuple(tables[dimension])


def mapped_clip_to_clip(clip_to_clip: float, dimension: str) -> float:
    """A clip-to-clip consistency on the scale of in-clip ones: linear between the table's points, flat outside."""
    values = _quantile_table(dimension)
    keys = [step / 100 for step in range(101)]
    index = bisect_left(keys, clip_to_clip)
    if index == 0:
        return values[0]
    if index == len(keys):
        return values[-1]
    share = (clip_to_clip - keys[index - 1]) / (keys[index] - keys[index - 1])
    return values[index - 1] + (values[index] - values[index - 1]) * share


def fused(inclip: float, clip_to_clip: float, dimension: str) -> float:
    """A clip's consistency with the development flag.

    A clip-to-clip value of 0 counts as missing and costs nothing, as in the official tool: that is so for a video of
    a single clip, and also after a hard cut to something quite unlike.

    Args:
        inclip: Consistency inside the clip.
        clip_to_clip: Of the first frames of its video's clips.
        dimension: ``subject_consistency`` or ``background_consistency``.
    """
    mapped = mapped_clip_to_clip(clip_to_clip, dimension)
    return WEIGHT_IN_CLIP * inclip + WEIGHT_CLIP_TO_CLIP * mapped if mapped != 0.0 else inclip


def consistency(features: Tensor) -> float | None:
    """Mean of ``(max(0, cos to the row before) + max(0, cos to the first row)) / 2`` over all rows but the first.

    Args:
        features: (n, D), rows of any length but zero.

    Returns:
        None for fewer than two rows.
    """
    if len(features) < 2:
        return None
    to_previous = cosine_similarity(features[:-1], features[1:]).tolist()
    to_first = cosine_similarity(features[:1].expand_as(features[1:]), features[1:]).tolist()
    terms = [(max(0.0, a) + max(0.0, b)) / 2 for a, b in zip(to_previous, to_first, strict=True)]
    return sum(terms) / len(terms)


def clip_to_clip_scores(
    inclip: Sequence[float | None], first_features: Sequence[Tensor], dimension: str
) -> _ClipScores:
    """Put a video's in-clip values and its clips' first frames together.

    Args:
        inclip: Consistency inside each clip; None where a clip has a single frame.
        first_features: (1, D) of each clip's first frame.
        dimension: ``subject_consistency`` or ``background_consistency``.
    """
    between = consistency(torch.cat(list(first_features))) or 0.0
    return _ClipScores(
        inclip=tuple(inclip),
        clip_to_clip=between,
        mapped=mapped_clip_to_clip(between, dimension),
        fused=tuple(None if value is None else fused(value, between, dimension) for value in inclip),
    )


def _official_clip_to_clip(clip_file: str, by_video: Mapping[str, float]) -> float:
    """The clip-to-clip value that the official tool finds for a clip, by the clip's file name.

    It takes the name up to the first underscore for the video's name. A video whose own name has an underscore is
    therefore never found, counts as 0, and its drift is not counted, without a word. Ours looks nothing up by name;
    this is here to explain official results, and to say why exported names have no underscore.

    Args:
        clip_file: Name of the clip's file, e.g. ``p0007-0_003.mp4``.
        by_video: {name of the video's file: clip-to-clip value}.
    """
    return by_video.get(f"{clip_file.split('_')[0]}.mp4", 0.0)
