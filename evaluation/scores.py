"""VBench's Quality, Semantic and Total: weighted means of normalised dimensions, or the reason why there is none.

The official script counts a dimension that is missing as 0, which makes motion smoothness negative. Here a score
exists only if all its members do, and only numbers under ``vbench/`` count: the same formula with another network
behind it has another scale.

Source: VBench, ``scripts/constant.py`` and ``cal_final_score.py`` (commit 45e79ec); the six-dimensional variant for
long videos: Forcing-KV's evaluation.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal

Variant = Literal["short", "long", "long_dev"]
"""Whole videos, or VBench-Long's clips without and with its ``--dev_flag``."""
FOLDERS: Mapping[Variant, str] = {"short": "", "long": "long/", "long_dev": "long_dev/"}
Values = Mapping[str, float | None]
"""{name of a metric: its value over the run, 0..1}, that is the mean times ``MetricSpec.scale``; None if missing."""
Value = tuple[float | None, str | None]  # a score in 0..1 and None, or None and the members that are missing
Norms = Mapping[str, tuple[float, float]]
"""{dimension: (low, high)}; a dimension enters a score as ``weight * (value - low) / (high - low)``."""

QUALITY: Norms = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "dynamic_degree": (0.0, 1.0),
    "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
}
SEMANTIC: Norms = {
    "object_class": (0.0, 1.0),
    "multiple_objects": (0.0, 1.0),
    "human_action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
DEV_DIMENSIONS = ("subject_consistency", "background_consistency")
"""The dimensions that VBench-Long's development flag changes."""
_WEIGHTS = {"dynamic_degree": 0.5}
_QUALITY_WEIGHT, _SEMANTIC_WEIGHT = 4.0, 1.0
_QUALITY_LONG = {name: norm for name, norm in QUALITY.items() if name != "temporal_flickering"}


def member_name(dimension: str, variant: Variant) -> str:
    """The metric that stands for a dimension in a score."""
    is_without_dev = variant == "long_dev" and dimension not in DEV_DIMENSIONS
    return f"vbench/{FOLDERS['long' if is_without_dev else variant]}{dimension}"


def _weighted(values: Values, *, norms: Norms, variant: Variant) -> Value:
    if (reason := _missing(values, norms, variant)) is not None:
        return None, reason
    parts = weights = 0.0
    for dimension, (low, high) in norms.items():
        name, weight = member_name(dimension, variant), _WEIGHTS.get(dimension, 1.0)
        value = float(values[name] or 0.0)
        # Cosines of equal features may pass 1 by rounding.
        if not -1.001 <= value <= 1.001:
            raise ValueError(
                f"{name}={value:g} is outside -1..1: scores take means times MetricSpec.scale "
                "(imaging_quality is 0..100 per video, scale 0.01)."
            )
        parts, weights = parts + weight * (value - low) / (high - low), weights + weight
    return parts / weights, None


def _total(values: Values) -> Value:
    (quality, _), (meaning, _) = TOTALS["quality7"](values), TOTALS["semantic"](values)
    if quality is None or meaning is None:
        return None, _missing(values, [*QUALITY, *SEMANTIC], "short")
    return (_QUALITY_WEIGHT * quality + _SEMANTIC_WEIGHT * meaning) / (_QUALITY_WEIGHT + _SEMANTIC_WEIGHT), None


def _missing(values: Values, dimensions: Iterable[str], variant: Variant) -> str | None:
    names = [member_name(dimension, variant) for dimension in dimensions]
    absent = [name for name in names if values.get(name) is None]
    return f"missing: {', '.join(absent)}" if absent else None


# Raise ValueError if a value is on another scale, for example imaging quality out of 100.
TOTALS: Mapping[str, Callable[[Values], Value]] = {
    # Over seven dimensions: what papers mean that print it next to a flickering column.
    "quality7": partial(_weighted, norms=QUALITY, variant="short"),
    "quality7_long": partial(_weighted, norms=QUALITY, variant="long"),
    "quality7_long_dev": partial(_weighted, norms=QUALITY, variant="long_dev"),
    # Of long videos without temporal flickering: about two points from the other on the same videos.
    "quality6_long": partial(_weighted, norms=_QUALITY_LONG, variant="long"),
    "quality6_long_dev": partial(_weighted, norms=_QUALITY_LONG, variant="long_dev"),
    # Over nine dimensions, most of which come from the official tool's results.
    "semantic": partial(_weighted, norms=SEMANTIC, variant="short"),
    "total": _total,
}
"""All of them; what papers print as 60-second Quality is one of the five qualities, and they seldom say which."""
