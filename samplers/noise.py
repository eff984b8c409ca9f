"""Noise as a pure function of (seed, block, step): the same on any device, in any batch, after any resume."""

import hashlib
import struct
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """Where a rollout gets its Gaussian noise from, block by block.

    ``shape`` is (batch, frames, channels, height, width) and so is the answer. A source that ends (recorded noise)
    answers with zero frames, and the rollout ends there.
    """

    def initial(self, block_index: int, start_frame: int, shape: Sequence[int]) -> Tensor:
        """Noise that a block starts from."""
        ...

    def renoise(self, block_index: int, start_frame: int, step_index: int, shape: Sequence[int]) -> Tensor:
        """Fresh noise after denoising step ``step_index``."""
        ...


class SeededNoise:
    """Noise drawn on the CPU in float32, each sample of a batch from its own seed.

    Every draw has its own generator, keyed by a hash of (seed, block, step), so nothing depends on the order or the
    number of draws before it.

    Args:
        seeds: One seed per sample, any Python integers.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(int(seed) for seed in seeds)

    def initial(self, block_index: int, start_frame: int, shape: Sequence[int]) -> Tensor:
        """Noise that a block starts from: (batch, frames, channels, height, width), CPU float32."""
        return self._draw(block_index, -1, shape)

    def renoise(self, block_index: int, start_frame: int, step_index: int, shape: Sequence[int]) -> Tensor:
        """Fresh noise after denoising step ``step_index``: same shape and device."""
        return self._draw(block_index, step_index, shape)

    def _draw(self, block_index: int, step_index: int, shape: Sequence[int]) -> Tensor:
        if shape[0] != len(self.seeds):
            raise ValueError(f"{len(self.seeds)} seeds for a batch of {shape[0]}: give one seed per sample.")
        samples = [
            torch.randn(tuple(shape[1:]), generator=torch.Generator().manual_seed(_key(seed, block_index, step_index)))
            for seed in self.seeds
        ]
        return torch.stack(samples)


def _key(seed: int, block_index: int, step_index: int) -> int:
    """63 well mixed bits of (seed, block, step)."""
    data = str(seed).encode() + struct.pack("<qq", block_index, step_index)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
