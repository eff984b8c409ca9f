"""What stands behind a metric: networks the user brings, and classical methods that need no weights."""

from longtake.evaluation.backbones.base import (
    ROLES,
    AestheticHead,
    Backbone,
    Backbones,
    FlowEstimator,
    FrameEncoder,
    FrameScorer,
    Interpolator,
    VideoTextScorer,
)
from longtake.evaluation.backbones.classical import classical_backbones
from longtake.evaluation.backbones.loading import load_backbones

__all__ = [
    "ROLES",
    "AestheticHead",
    "Backbone",
    "Backbones",
    "FlowEstimator",
    "FrameEncoder",
    "FrameScorer",
    "Interpolator",
    "VideoTextScorer",
    "classical_backbones",
    "load_backbones",
]
