"""VBench-Long: a long video as the mean over its two-second clips, and how its clips compare with each other.

By default the official tool scores the clips only. With ``--dev_flag`` the two consistencies are half the in-clip
value and half a clip-to-clip value: the consistency of the clips' first frames, mapped by a table of quantiles to
where in-clip values lie. The mapping is kind: a clip-to-clip consistency of 0.35 becomes 0.90.

Here clips are cut in memory; the official tool encodes them again with loss, which moves scores a little. The score
of a run is the mean over all its clips, so long videos weigh more; only where no video has a second clip does the
official subject consistency average over frames instead.

Source: VBench++ (arXiv:2411.13503), ``vbench2_beta_long`` at commit 45e79ec.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

TABLES = Path(__file__).with_name("vbench_long_tables.json")
WEIGHT_IN_CLIP, WEIGHT_CLIP_TO_CLIP = 0.5, 0.5
"""With the development flag; without it 1 and 0."""


@dataclass(frozen=True, kw_only=True)
class ClipScores:
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
def quantile_table(dimension: str) -> tuple[float, ...]:
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
    values = quantile_table(dimension)
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
) -> ClipScores:
    """Put a video's in-clip values and its clips' first frames together.

    Args:
        inclip: Consistency inside each clip; None where a clip has a single frame.
        first_features: (1, D) of each clip's first frame.
        dimension: ``subject_consistency`` or ``background_consistency``.
    """
    between = consistency(torch.cat(list(first_features))) or 0.0
    return ClipScores(
        inclip=tuple(inclip),
        clip_to_clip=between,
        mapped=mapped_clip_to_clip(between, dimension),
        fused=tuple(None if value is None else fused(value, between, dimension) for value in inclip),
    )


def official_clip_to_clip(clip_file: str, by_video: Mapping[str, float]) -> float:
    """The clip-to-clip value that the official tool finds for a clip, by the clip's file name.

    It takes the name up to the first underscore for the video's name. A video whose own name has an underscore is
    therefore never found, counts as 0, and its drift is not counted, without a word. Ours looks nothing up by name;
    this is here to explain official results, and to say why exported names have no underscore.

    Args:
        clip_file: Name of the clip's file, e.g. ``p0007-0_003.mp4``.
        by_video: {name of the video's file: clip-to-clip value}.
    """
    return by_video.get(f"{clip_file.split('_')[0]}.mp4", 0.0)
