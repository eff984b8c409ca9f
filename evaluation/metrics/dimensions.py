"""What VBench's dimensions are called here, and what a reader needs to know about each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from longtake.evaluation.metric import MetricSpec, Score
from longtake.evaluation.metrics.spans import CLIP_SECONDS

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


def metric_name(dimension: Dimension, variant: Variant, networks: Sequence[tuple[str, Any]]) -> str:
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
        name=metric_name(dimension, variant, networks),
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
