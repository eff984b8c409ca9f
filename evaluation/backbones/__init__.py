"""Backbones of the metrics: networks the user brings, and classical methods that need no weights."""

from longtake.evaluation.backbones.base import ROLES, Backbone, Backbones, FrameEncoder
from longtake.evaluation.backbones.classical import classical_backbones
from longtake.evaluation.backbones.loading import load_backbones

__all__ = ["ROLES", "Backbone", "Backbones", "FrameEncoder", "classical_backbones", "load_backbones"]
