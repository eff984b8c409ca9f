"""Noise sources, schedules and one-block samplers, as plain functions of tensors."""

from longtake.samplers.base import SAMPLERS, Denoise, Renoise, Sampler, make_sampler, shifted
from longtake.samplers.few_step import FewStep, few_step
from longtake.samplers.multi_step import MultiStep, multi_step
from longtake.samplers.noise import NoiseSource, SeededNoise
from longtake.samplers.rolling_window import DenoiseTogether, RollingWindow, rolling_window

__all__ = [
    "SAMPLERS",
    "Denoise",
    "DenoiseTogether",
    "FewStep",
    "MultiStep",
    "NoiseSource",
    "Renoise",
    "RollingWindow",
    "Sampler",
    "SeededNoise",
    "few_step",
    "make_sampler",
    "multi_step",
    "rolling_window",
    "shifted",
]
