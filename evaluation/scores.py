"""VBench's Quality, Semantic and Total: weighted means of normalised dimensions, or the reason why there is none.

The official script counts a dimension that is missing as 0, which makes motion smoothness negative. Here a score
exists only if all its members do, and only numbers under ``vbench/`` count: the same formula with another network
behind it has another scale.

Source: VBench, ``scripts/constant.py`` and ``cal_final_score.py`` (commit 45e79ec); the six-dimensional variant for
long videos: Forcing-KV's evaluation.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

Variant = Literal["short", "long", "long_dev"]
Value = tuple[float | None, str | None]
"""A score and None, or None and the reason."""


@dataclass(frozen=True)
class _Norm:
    """How a dimension enters a score: ``weight * (value - low) / (high - low)``."""

    low: float
    high: float
    weight: float = 1.0


QUALITY: Mapping[str, _Norm] = {
    "subject_consistency": _Norm(0.1462, 1.0),
    "background_consistency": _Norm(0.2615, 1.0),
    "temporal_flickering": _Norm(0.6293, 1.0),
    "motion_smoothness": _Norm(0.706, 0.9975),
    "dynamic_degree": _Norm(0.0, 1.0, weight=0.5),
    "aesthetic_quality": _Norm(0.0, 1.0),
    "imaging_quality": _Norm(0.0, 1.0),
}
SEMANTIC: Mapping[str, _Norm] = {
    "object_class": _Norm(0.0, 1.0),
    "multiple_objects": _Norm(0.0, 1.0),
    "human_action": _Norm(0.0, 1.0),
    "color": _Norm(0.0, 1.0),
    "spatial_relationship": _Norm(0.0, 1.0),
    "scene": _Norm(0.0, 0.8222),
    "appearance_style": _Norm(0.0009, 0.2855),
    "temporal_style": _Norm(0.0, 0.364),
    "overall_consistency": _Norm(0.0, 0.364),
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0
NOT_IN_LONG = ("temporal_flickering",)
"""What the six-dimensional variant leaves out."""
DEV_DIMENSIONS = ("subject_consistency", "background_consistency")
"""The dimensions that VBench-Long's development flag changes."""


def quality7(values: Mapping[str, float | None], *, variant: Variant = "short") -> Value:
    """VBench's Quality over seven dimensions.

    Args:
        values: {name of a metric: its value over the run, 0..1}, that is the mean times ``MetricSpec.scale``. Others
            than those needed may be among them, and None stands for a missing one.
        variant: Of whole videos, or VBench-Long's without and with its development flag. Papers that print a
            VBench-Long Quality next to a flickering column mean these seven.

    Returns:
        The score in 0..1, or None and which members are missing.

    Raises:
        ValueError: If a value is on another scale, for example imaging quality out of 100.
    """
    return _weighted(values, QUALITY, variant)


def quality6_long(values: Mapping[str, float | None], *, variant: Variant = "long") -> Value:
    """The Quality of long videos without temporal flickering: about two points from the other on the same videos.

    Arguments, return value and errors as for :func:`quality7`.
    """
    return _weighted(values, {name: QUALITY[name] for name in QUALITY if name not in NOT_IN_LONG}, variant)


def semantic(values: Mapping[str, float | None]) -> Value:
    """VBench's Semantic, the mean over nine dimensions, most of which come from the official tool's results.

    Arguments, return value and errors as for :func:`quality7`.
    """
    return _weighted(values, SEMANTIC, "short")


def total(values: Mapping[str, float | None]) -> Value:
    """VBench's Total: four parts Quality over seven dimensions, one part Semantic.

    Arguments, return value and errors as for :func:`quality7`.
    """
    reason = _missing(values, [*QUALITY, *SEMANTIC], "short")
    if reason is not None:
        return None, reason
    (quality, _), (meaning, _) = quality7(values), semantic(values)
    return (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * meaning) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT), None


TOTALS: Mapping[str, Callable[[Mapping[str, float | None]], Value]] = {
    "quality7": quality7,
    "quality7_long": partial(quality7, variant="long"),
    "quality7_long_dev": partial(quality7, variant="long_dev"),
    "quality6_long": quality6_long,
    "quality6_long_dev": partial(quality6_long, variant="long_dev"),
    "semantic": semantic,
    "total": total,
}
"""All of them; what papers print as 60-second Quality is one of the five qualities, and they seldom say which."""


def member_name(dimension: str, variant: Variant) -> str:
    """The metric that stands for a dimension in a score."""
    folder = {"short": "", "long": "long/", "long_dev": "long_dev/" if dimension in DEV_DIMENSIONS else "long/"}
    return f"vbench/{folder[variant]}{dimension}"


def _weighted(values: Mapping[str, float | None], norms: Mapping[str, _Norm], variant: Variant) -> Value:
    reason = _missing(values, norms, variant)
    if reason is not None:
        return None, reason
    parts = 0.0
    for dimension, norm in norms.items():
        name = member_name(dimension, variant)
        value = float(values[name])
        # Cosines of equal features may pass 1 by rounding.
        if not -1.001 <= value <= 1.001:
            raise ValueError(
                f"{name}={value:g} is outside -1..1: scores take means times MetricSpec.scale "
                "(imaging_quality is 0..100 per video, scale 0.01)."
            )
        parts += norm.weight * (value - norm.low) / (norm.high - norm.low)
    return parts / sum(norm.weight for norm in norms.values()), None


def _missing(values: Mapping[str, float | None], dimensions: Iterable[str], variant: Variant) -> str | None:
    names = [member_name(dimension, variant) for dimension in dimensions]
    absent = [name for name in names if values.get(name) is None]
    return f"missing: {', '.join(absent)}" if absent else None
