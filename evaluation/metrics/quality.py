"""VBench's dimensions, made for the backbones at hand."""

from collections.abc import Callable
from typing import Any

from longtake.evaluation.backbones import Backbones
from longtake.evaluation.metric import Metric
from longtake.evaluation.metrics.dimensions import (
    AESTHETIC,
    BACKGROUND,
    DYNAMIC,
    FOLDERS,
    IMAGING,
    LEFT_TO_VBENCH,
    OVERALL,
    SMOOTHNESS,
    SUBJECT,
    Dimension,
    Variant,
)
from longtake.evaluation.metrics.vbench import (
    SegmentAlignment,
    aesthetic,
    agreement,
    consistency,
    dynamics,
    flickering,
    imaging,
    smoothness,
)
from longtake.evaluation.preprocessing import dinov2_transform, dreamsim_transform

Maker = Callable[..., Metric]
ONE_PASS: tuple[tuple[Dimension, Maker, tuple[str, ...]], ...] = (
    (SMOOTHNESS, smoothness, ("amt",)),
    (DYNAMIC, dynamics, ("raft",)),
    (AESTHETIC, aesthetic, ("aesthetic_clip", "aesthetic_head")),
    (IMAGING, imaging, ("musiq",)),
    (OVERALL, agreement, ("viclip",)),
)
"""Dimension, what makes it, and the roles of the networks it is made with."""
CONSISTENCIES: tuple[tuple[Dimension, str, str, Any], ...] = (
    (SUBJECT, "dino", "dinov2", dinov2_transform),
    (BACKGROUND, "clip", "dreamsim", dreamsim_transform),
)
"""Dimension, role of its network, and role and transform of the network between clips."""


def vbench_metrics(backbones: Backbones, *, short: bool, long: bool) -> tuple[list[Metric], dict[str, str]]:
    """VBench's dimensions on whole videos, on two-second clips, or on both from one pass.

    Args:
        backbones: By role.
        short: Measure whole videos.
        long: Measure clips, without and with the development flag.

    Returns:
        The metrics, and {name: why it is not computed}, under the name it would have with VBench's own networks.
    """
    variants: tuple[Variant, ...] = (("short",) if short else ()) + (("long",) if long else ())
    if not variants:
        return [], {}
    metrics: list[Metric] = []
    skipped: dict[str, str] = {}

    def missing(dimension: Dimension, roles: tuple[str, ...], variants: tuple[Variant, ...]) -> bool:
        """Whether a role is empty; then the dimension is noted as skipped."""
        empty = [role for role in roles if backbones.get(role) is None]
        if empty:
            reason = "; ".join(backbones.why_missing(role) for role in empty)
            skipped.update({f"vbench/{FOLDERS[variant]}{dimension.name}": reason for variant in variants})
        return bool(empty)

    for dimension, role, first_role, first_transform in CONSISTENCIES:
        all_variants: tuple[Variant, ...] = (*variants, "long_dev") if long else variants
        if missing(dimension, (role,), all_variants):
            continue
        if long and missing(dimension, (first_role,), ("long_dev",)):
            all_variants = variants
        encoders = backbones.get(role), backbones.get(first_role)
        metrics.append(consistency(dimension, all_variants, *encoders, first_transform))
    metrics.append(flickering(variants))
    for dimension, make, roles in ONE_PASS:
        if not missing(dimension, roles, variants):
            metrics.append(make(variants, *(backbones.get(role) for role in roles)))
    if short:
        text = backbones.get("viclip")
        if text is None:
            skipped["proxy/segment_alignment"] = backbones.why_missing("viclip")
        else:
            metrics.append(SegmentAlignment(text))
        skipped.update(
            {
                f"vbench/{name}": f"left to the official tool ({needs}): see evaluate export-vbench and import-vbench"
                for name, needs in LEFT_TO_VBENCH.items()
            }
        )
    return metrics, skipped
