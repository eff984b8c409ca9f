"""Noise sources, schedules and one-block samplers, as plain functions of tensors."""

from longtake.samplers.base import Denoise, Renoise, Sampler, shifted
from longtake.samplers.few_step import FewStep, few_step
from longtake.samplers.multi_step import MultiStep, multi_step
from longtake.samplers.noise import NoiseSource, SeededNoise
from longtake.samplers.registry import SAMPLERS, make_sampler

__all__ = [
    "SAMPLERS",
    "Denoise",
    "FewStep",
    "MultiStep",
    "NoiseSource",
    "Renoise",
    "Sampler",
    "SeededNoise",
    "few_step",
    "make_sampler",
    "multi_step",
    "shifted",
]
