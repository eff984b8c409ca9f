"""Any policy, its tokens kept in eight or four bits."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longtake.cache.base import Geometry, PolicyState
from longtake.cache.storage import Codec, Raw
from longtake.cache.wrappers.wrapper import Wrapper

BITS = (4, 8, 16)
_SMALLEST_SCALE = 2.0**-14  # the smallest normal float16


@dataclass(frozen=True, kw_only=True)
class Quantized(Wrapper):
    """Keys and values of any policy in eight bits per number, or four (KV-cache quantisation study, arXiv:2603.27469).

    Eight bits: one scale per token and head. Four: one per group of channels. A token is encoded once, at its commit,
    un-rotated, and decoded when it is read. Groups never span tokens, as the study's do, so a moving window encodes
    nothing again.

    Read sets are built anew for every pass in one buffer for all layers: decoded copies would take more than codes
    save.
    """

    name: ClassVar[str] = "quantized"
    source: ClassVar[str] = "round to nearest, after arXiv:2603.27469 and Quant VideoGen, arXiv:2602.02958"

    bits: int = 8  # of keys
    value_bits: int | None = None  # null: as the keys; keys never have fewer than values
    group_size: int = 16  # channels per scale in four bits

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, bits in (("bits", self.bits), ("value_bits", self.value_bits)):
            if bits is not None and bits not in BITS:
                raise ValueError(f"{name}={bits} has no codec: use 4, 8 or 16 (as they are).")
        if self.value_bits is not None and self.value_bits > self.bits:
            raise ValueError(
                f"value_bits={self.value_bits} is more than bits={self.bits}: errors of keys do more harm than errors "
                f"of values, so give keys {self.value_bits} bits or values {self.bits}."
            )
        self.at_least(2, "group_size", note=" channels")

    def start(self, geometry: Geometry) -> PolicyState:
        if geometry.storage.is_encoded:
            raise ValueError("a quantized policy is inside another one: keep one of the two.")
        bits = (self.bits, self.bits if self.value_bits is None else self.value_bits)
        keys, values = (_codec_of(number, group_size=self.group_size) for number in bits)
        return self._start_coded(geometry, replace(geometry.storage, keys=keys, values=values))


@dataclass(frozen=True)
class _Int8(Codec):
    """Eight bits per channel and one float16 scale per token and head, symmetric around 0.

    At 128 channels 1.016 bytes per number; half a percent of error for a Gaussian.
    """

    def planes(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        return {"_codes": (head_dim, torch.int8), "_scales": (1, torch.float16)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        x = x.float()
        scales = _scales(x, 127)
        return {"_codes": (x / scales.float()).round_().clamp_(-127, 127).to(torch.int8), "_scales": scales}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return planes["_codes"].float().mul_(planes["_scales"].float()).to(dtype)


@dataclass(frozen=True)
class _Int4(Codec):
    """Four bits per channel, two channels to a byte, and one float16 scale per group of neighbouring channels."""

    # Channels that share a scale; where it does not divide head_dim, the next smaller divisor does
    group_size: int = 16

    def planes(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        return {"_codes": (head_dim // 2, torch.uint8), "_scales": (head_dim // self._group(head_dim), torch.float16)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        groups = x.float().unflatten(-1, (-1, self._group(x.shape[-1])))
        scales = _scales(groups, 7)
        levels = (groups / scales.float()).round_().clamp_(-7, 7).add_(8).to(torch.uint8).flatten(-2)
        return {"_codes": levels[..., 0::2] | levels[..., 1::2] << 4, "_scales": scales.squeeze(-1)}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes, scales = planes["_codes"], planes["_scales"].float()
        levels = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).float().sub_(8)
        return levels.unflatten(-1, (scales.shape[-1], -1)).mul_(scales[..., None]).flatten(-2).to(dtype)

    def _group(self, head_dim: int) -> int:
        return next(size for size in range(min(self.group_size, head_dim), 0, -1) if head_dim % size == 0)


def _scales(x: Tensor, levels: int) -> Tensor:
    """Step between levels for the largest of the last axis, float16, never 0."""
    return (x.abs().amax(dim=-1, keepdim=True) / levels).clamp_(min=_SMALLEST_SCALE).half()


def _codec_of(bits: int, *, group_size: int = 16) -> Codec:
    """The codec of 16 (as they are), 8 or 4 bits; the last has groups of channels."""
    return {16: Raw(), 8: _Int8(), 4: _Int4(group_size)}[bits]
