"""VBench's dimensions: their names here, what they are measured with, and VBench-Long's fusion of clips."""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity

from longtake.evaluation.backbones import Backbone
from longtake.evaluation.metric import MetricSpec, Score
from longtake.evaluation.scores import FOLDERS, Variant

CLIP_SECONDS = 2  # length of VBench-Long's clips in its mode for custom videos
VBENCH = "vbench@45e79ec"


@dataclass(frozen=True)
class _Dimension:
    description: str
    roles: tuple[str, ...] = ()  # of the networks it is measured with
    label: str = ""  # what they are called in metrics' names
    dev_roles: tuple[str, ...] = ()  # of the networks for clips' first frames, with VBench-Long's development flag
    grouping: Literal["video", "frame"] = "video"  # what VBench's mean over whole videos is taken over
    transform: str | None = None  # before the network
    dev_transform: str | None = None  # before the networks of ``dev_roles``
    scale: float = 1.0  # from the mean over videos to VBench's score
    range: tuple[float, float] = (0.0, 1.0)  # least and greatest possible value of a video


DIMENSIONS: Mapping[str, _Dimension] = {
    "subject_consistency": _Dimension(
        "Likeness of each frame's DINO features to the frame before and to the first.",
        roles=("dino",),
        label="enc",
        dev_roles=("dinov2",),
        grouping="frame",
        transform="dino224",
        dev_transform="dinov2_256bicubic_antialias",
    ),
    "background_consistency": _Dimension(
        "Likeness of each frame's CLIP features to the frame before and to the first.",
        roles=("clip",),
        label="enc",
        dev_roles=("dreamsim",),
        grouping="frame",
        transform="clip224",
        dev_transform="dreamsim_224bicubic_antialias",
    ),
    "temporal_flickering": _Dimension(
        "One less the mean absolute difference of neighbouring frames; no static filter, so motion counts."
    ),
    "motion_smoothness": _Dimension(
        "One less the mean absolute error of every second frame, interpolated from its neighbours.",
        roles=("amt",),
        label="interp",
    ),
    "dynamic_degree": _Dimension(
        "Whether enough of the pairs of frames, an eighth of a second apart, move: 0 or 1 per video.",
        roles=("raft",),
        label="flow",
    ),
    "aesthetic_quality": _Dimension(
        "LAION's aesthetic score of each frame, over ten.",
        roles=("aesthetic_clip", "aesthetic_head"),
        label="aesthetic",
        transform="clip224",
    ),
    "imaging_quality": _Dimension(
        "MUSIQ's score of each frame, 0..100 per video; VBench divides the mean by 100.",
        roles=("musiq",),
        label="iqa",
        transform="musiq_longer512",
        scale=0.01,
        range=(0.0, 100.0),
    ),
    "overall_consistency": _Dimension(
        "Cosine between ViCLIP's features of eight frames and of the prompt.",
        roles=("viclip",),
        label="clip",
        transform="clip224_uint8",
        range=(-1.0, 1.0),
    ),
}
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


def metric_spec(
    name: str, variant: Variant, networks: Sequence[Backbone] = (), dev_networks: Sequence[Backbone] = ()
) -> MetricSpec:
    """The spec of a dimension, whose name says what its number may be compared with.

    ``vbench/...`` if every network is VBench's own, else ``vbench_form/...[label=name+name,c2c=name]``.
    """
    dimension, everything = DIMENSIONS[name], (*networks, *dev_networks)
    full_name = f"vbench/{FOLDERS[variant]}{name}"
    if not all(network.official for network in everything):
        labels = {dimension.label: networks, "c2c": dev_networks}
        inside = (f"{label}={'+'.join(one.name for one in group)}" for label, group in labels.items() if group)
        full_name = f"vbench_form/{FOLDERS[variant]}{name}[{','.join(inside)}]"
    hashes = [network.weights_sha256 for network in everything if network.weights_sha256]
    low, high = dimension.range
    transforms = (dimension.transform, dimension.dev_transform if variant == "long_dev" else None)
    return MetricSpec(
        name=full_name,
        higher_is_better=True,
        unit=f"{low:g}..{high:g}",
        range=dimension.range,
        formula=VBENCH if variant == "short" else f"{VBENCH} long, clips cut without encoding them again",
        backbone="+".join(network.name for network in everything) or None,
        weights_sha256="+".join(hashes) if hashes and len(hashes) == len(everything) else None,
        transform="+".join(name for name in transforms if name) or None,
        clip_seconds=None if variant == "short" else float(CLIP_SECONDS),
        grouping=dimension.grouping if variant == "short" else "clip",
        scale=dimension.scale,
        description=dimension.description,
    )


def of_own_prompts(scores: Mapping[str, Score], dimensions: Sequence[str]) -> dict[str, Score]:
    """A video's scores without those of dimensions that VBench's list, if its prompt is of it, has others for."""
    kept = dict(scores)
    for name in scores if dimensions else ():
        prefix, _, stem = name.partition("/")
        dimension = stem.removeprefix("long/").removeprefix("long_dev/").partition("[")[0]
        if prefix in ("vbench", "vbench_form") and dimension not in dimensions:
            kept[name] = Score.none(f"VBench has other prompts for {dimension}")
    return kept


@cache
def _quantile_table(dimension: str) -> tuple[float, ...]:
    """VBench-Long's values for clip-to-clip consistencies of 0.00, 0.01, ... 1.00; the two consistencies have one."""
    path = Path(__file__).with_name("vbench_long_tables.json")
    return tuple(json.loads(path.read_text(encoding="utf-8"))[dimension])


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
    """A clip's consistency with the development flag, of its own and that of the first frames of its video's clips.

    A clip-to-clip value of 0 counts as missing and costs nothing, as in the official tool: that is so for a video of
    a single clip, and also after a hard cut to something quite unlike.
    """
    mapped = mapped_clip_to_clip(clip_to_clip, dimension)
    return 0.5 * inclip + 0.5 * mapped if mapped != 0.0 else inclip


def consistency(features: Tensor) -> float | None:
    """Mean of ``(max(0, cos to the row before) + max(0, cos to the first row)) / 2`` over all rows but the first.

    ``features`` are (n, D), of any length but zero; fewer than two rows have none.
    """
    if len(features) < 2:
        return None
    pairs = zip(
        clamped_cosines(features[:-1], features[1:]),
        clamped_cosines(features[:1].expand_as(features[1:]), features[1:]),
        strict=True,
    )
    return sum((a + b) / 2 for a, b in pairs) / (len(features) - 1)


def clamped_cosines(a: Tensor, b: Tensor) -> list[float]:
    """Cosines of the rows of (n, D) and (n, D), negative ones as zero."""
    return [max(0.0, cosine) for cosine in cosine_similarity(a, b).tolist()]
