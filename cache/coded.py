"""Tokens under a codec, on the rollout's device or in the host's memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longtake.cache.base import Geometry
from longtake.cache.storage import TokenBuffer, take_tokens

SMALLEST_SCALE = 2.0**-14  # the smallest normal float16


class _Codec(Protocol):
    """Encodes every token and head by itself, so that a token can be moved without touching its neighbours."""

    def planes(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        """What is kept per token and head: suffix to (channels, dtype)."""
        ...

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """(batch, tokens, heads, head_dim) to its planes."""
        ...

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Planes back to (batch, tokens, heads, head_dim)."""
        ...


@dataclass(frozen=True)
class Raw:
    """As they are."""

    def planes(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        """One plane in the rollout's dtype."""
        return {"": (head_dim, dtype)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """No change."""
        return {"": x}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """No change."""
        return planes[""]


@dataclass(frozen=True)
class _Int8:
    """Eight bits per channel and one float16 scale per token and head, symmetric around 0.

    At 128 channels 1.016 bytes per number; half a percent of error for a Gaussian.
    """

    def planes(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        """Codes and a scale."""
        return {"_codes": (head_dim, torch.int8), "_scales": (1, torch.float16)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Round to the nearest of 255 levels."""
        x = x.float()
        scales = _scales(x, 127)
        return {"_codes": (x / scales.float()).round_().clamp_(-127, 127).to(torch.int8), "_scales": scales}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Levels times the scale, computed in float32."""
        return planes["_codes"].float().mul_(planes["_scales"].float()).to(dtype)


@dataclass(frozen=True)
class _Int4:
    """Four bits per channel, two channels to a byte, and one float16 scale per group of neighbouring channels.

    Attributes:
        group_size: Channels that share a scale; where it does not divide head_dim, the next smaller divisor does.
    """

    group_size: int = 16

    def planes(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        """Pairs of codes, and scales."""
        return {"_codes": (head_dim // 2, torch.uint8), "_scales": (head_dim // self._group(head_dim), torch.float16)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Round to the nearest of 15 levels."""
        groups = x.float().unflatten(-1, (-1, self._group(x.shape[-1])))
        scales = _scales(groups, 7)
        levels = (groups / scales.float()).round_().clamp_(-7, 7).add_(8).to(torch.uint8).flatten(-2)
        return {"_codes": levels[..., 0::2] | levels[..., 1::2] << 4, "_scales": scales.squeeze(-1)}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Levels times their group's scale, computed in float32."""
        codes, scales = planes["_codes"], planes["_scales"].float()
        levels = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).float().sub_(8)
        return levels.unflatten(-1, (scales.shape[-1], -1)).mul_(scales[..., None]).flatten(-2).to(dtype)

    def _group(self, head_dim: int) -> int:
        return next(size for size in range(min(self.group_size, head_dim), 0, -1) if head_dim % size == 0)


def _scales(x: Tensor, levels: int) -> Tensor:
    """Step between levels for the largest of the last axis, float16, never 0."""
    return (x.abs().amax(dim=-1, keepdim=True) / levels).clamp_(min=SMALLEST_SCALE).half()


def codec_of(bits: int, *, group_size: int = 16) -> _Codec:
    """The codec of a number of bits.

    Args:
        bits: 16 (as they are), 8 or 4.
        group_size: Of four bits.
    """
    return {16: Raw(), 8: _Int8(), 4: _Int4(group_size)}[bits]


@dataclass(frozen=True)
class CodedStorage:
    """Makes buffers of encoded tokens.

    Attributes:
        keys: Codec of the keys.
        values: Codec of the values.
        is_on_host: Keep the codes in the host's memory; they are decoded on the rollout's device.
    """

    keys: _Codec = Raw()
    values: _Codec = Raw()
    is_on_host: bool = False

    def buffer(self, geometry: Geometry, num_tokens: int, *, num_heads: int | None = None) -> "CodedBuffer":
        """Make an empty buffer."""
        return CodedBuffer(geometry, num_tokens, num_heads=num_heads, storage=self)


@dataclass(frozen=True)
class CodedTokens:
    """Places of a buffer, decoded when they are asked for."""

    buffer: "CodedBuffer"
    layer: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """How many, per sample."""
        return self.end - self.start

    @property
    def keys(self) -> Tensor:
        """(batch, tokens, heads, head_dim), un-rotated."""
        return self.buffer.decode("keys", self.layer, self.start, self.end)

    @property
    def values(self) -> Tensor:
        """(batch, tokens, heads, head_dim)."""
        return self.buffer.decode("values", self.layer, self.start, self.end)


class CodedBuffer(TokenBuffer):
    """Planes of codes and scales per layer, allocated when the layer is first written.

    A token is encoded once, when it is written: ``move``, ``save`` and ``load`` handle codes. Where the codes lie in
    host memory and the rollout runs on CUDA, they are pinned, and reading some places of a layer starts the copy of
    the same places of the next layer on a stream of its own.
    """

    def __init__(
        self, geometry: Geometry, num_tokens: int, *, num_heads: int | None = None, storage: CodedStorage
    ) -> None:
        super().__init__(geometry, num_tokens, num_heads=num_heads)
        self._codecs: dict[str, _Codec] = {"keys": storage.keys, "values": storage.values}
        self.is_on_host = storage.is_on_host
        self._is_far = storage.is_on_host and geometry.device.type == "cuda"
        self._stream = torch.cuda.Stream(geometry.device) if self._is_far else None
        self._staged: dict[tuple[str, int, int, int], tuple[dict[str, Tensor], torch.cuda.Event]] = {}
        self._layers: dict[int, dict[str, Tensor]] = {}

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one place over all layers and the batch."""
        g = self.geometry
        per_head = sum(channels * dtype.itemsize for channels, dtype in self._planes().values())
        return g.num_layers * g.batch_size * self.num_heads * per_head

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Encode and store tokens from place ``start`` on."""
        if self.geometry.device.type == "meta":
            return  # there is nothing to encode, and memory tables ask for thousands of blocks
        planes = self._of(layer)
        for side, x in (("keys", k), ("values", v)):
            for suffix, plane in self._codecs[side].encode(x).items():
                self._copy(plane, planes[side + suffix][:, start : start + x.shape[1]])
        self._forget(layer)

    def read(self, layer: int, start: int, end: int) -> CodedTokens:
        """Tokens of places ``start`` to ``end``."""
        return CodedTokens(self, layer, start, end)

    def decode(self, side: str, layer: int, start: int, end: int) -> Tensor:
        """Keys or values of places ``start`` to ``end``, in the rollout's dtype and on its device."""
        codec = self._codecs[side]
        places = (side, layer, start, end)
        planes = self._fetch(places) if self._is_far else self._cut(*places)
        return codec.decode(planes, self.geometry.dtype)

    def move(self, layer: int, index: Tensor, start: int) -> None:
        """Copy places ``index`` to ``start`` and on, as they are encoded."""
        self._settle()
        for plane in self._of(layer).values():
            plane[:, start : start + index.shape[-1]] = take_tokens(plane, index.to(plane.device))
        self._forget(layer)

    def grow(self, num_tokens: int) -> None:
        """Make room for more places, keeping what is stored."""
        self._settle()
        self.num_tokens = num_tokens
        for layer, old in self._layers.items():
            self._layers[layer] = self._empty()
            for name, plane in old.items():
                self._layers[layer][name][:, : plane.shape[1]] = plane
            self._forget(layer)

    def save(self, layer: int, start: int, end: int) -> dict[str, Tensor]:
        """Places ``start`` to ``end`` as they are encoded."""
        self._settle()
        return {name: plane[:, start:end].clone() for name, plane in self._of(layer).items()}

    def load(self, layer: int, start: int, saved: Mapping[str, Tensor]) -> None:
        """Put saved places back, from ``start`` on.

        Raises:
            ValueError: If the saved shapes are not this rollout's.
        """
        self._settle()
        g = self.geometry
        for name, (channels, dtype) in self._planes().items():
            shape = (g.batch_size, *saved[name].shape[1:2], self.num_heads, channels) if name in saved else ()
            if not shape or tuple(saved[name].shape) != shape or saved[name].dtype != dtype:
                found = f"{tuple(saved[name].shape)} and {saved[name].dtype}" if name in saved else "missing"
                raise ValueError(
                    f"saved {name} are {found}, this rollout needs {shape} and {dtype}: resume with the model, size, "
                    "batch and storage it was saved with."
                )
            plane = self._of(layer)[name]
            plane[:, start : start + saved[name].shape[1]] = saved[name].to(plane.device)
        self._forget(layer)

    def _planes(self) -> dict[str, tuple[int, torch.dtype]]:
        g = self.geometry
        return {
            side + suffix: plane
            for side, codec in self._codecs.items()
            for suffix, plane in codec.planes(g.head_dim, g.dtype).items()
        }

    def _of(self, layer: int) -> dict[str, Tensor]:
        if layer not in self._layers:
            self._layers[layer] = self._empty()
        return self._layers[layer]

    def _empty(self) -> dict[str, Tensor]:
        g = self.geometry
        device = torch.device("cpu") if self._is_far else g.device
        return {
            name: torch.zeros(
                (g.batch_size, self.num_tokens, self.num_heads, channels),
                dtype=dtype,
                device=device,
                pin_memory=self._is_far,
            )
            for name, (channels, dtype) in self._planes().items()
        }

    def _cut(self, side: str, layer: int, start: int, end: int) -> dict[str, Tensor]:
        planes = self._of(layer)
        suffixes = self._codecs[side].planes(self.geometry.head_dim, self.geometry.dtype)
        return {suffix: planes[side + suffix][:, start:end] for suffix in suffixes}

    def _copy(self, source: Tensor, target: Tensor) -> None:
        if not self._is_far:
            target.copy_(source)
            return
        for one, other in zip(source, target, strict=True):  # a sample's places are one piece: no staging copy
            other.copy_(one, non_blocking=True)

    def _fetch(self, wanted: tuple[str, int, int, int]) -> dict[str, Tensor]:
        """Codes on the device, and the next layer's on their way."""
        side, layer, start, end = wanted
        current = torch.cuda.current_stream(self.geometry.device)
        following = (side, (layer + 1) % self.geometry.num_layers, start, end)
        if wanted in self._staged:
            planes, arrived = self._staged.pop(wanted)
            current.wait_event(arrived)
            for plane in planes.values():
                plane.record_stream(current)
        else:
            planes = self._arrive(wanted)
        near = (layer, following[1])
        self._staged = {key: staged for key, staged in self._staged.items() if key[1] in near}
        if following not in self._staged and following[1] in self._layers:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                arriving = self._arrive(following)
                self._staged[following] = arriving, self._stream.record_event()
        return planes

    def _arrive(self, wanted: tuple[str, int, int, int]) -> dict[str, Tensor]:
        cut = self._cut(*wanted)
        planes = {
            suffix: torch.empty(t.shape, dtype=t.dtype, device=self.geometry.device) for suffix, t in cut.items()
        }
        for suffix, plane in planes.items():
            self._copy(cut[suffix], plane)
        return planes

    def _forget(self, layer: int) -> None:
        self._staged = {key: staged for key, staged in self._staged.items() if key[1] != layer}

    def _settle(self) -> None:
        """Before the processor touches the codes: copies under way have to arrive."""
        if self._is_far:
            torch.cuda.synchronize(self.geometry.device)
