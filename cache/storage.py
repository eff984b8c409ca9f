"""Storage of tokens: fixed places in every layer, under a codec, on the rollout's device or in the host's memory."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Stored(Protocol):
    """Tokens that can be read; a codec decodes when ``keys`` or ``values`` is asked for."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens, per sample."""
        ...

    @property
    def keys(self) -> Tensor:
        """(batch, tokens, heads, head_dim), un-rotated."""
        ...

    @property
    def values(self) -> Tensor: ...


@dataclass(frozen=True)
class KeysValues:
    """Tokens as they are."""

    keys: Tensor
    values: Tensor

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True)
class DerivedTokens(Stored, ABC):
    """Tokens made of ``stored`` ones, when they are asked for."""

    stored: Stored

    @property
    def num_tokens(self) -> int:
        return self.stored.num_tokens

    @property
    def keys(self) -> Tensor:
        return self.derive(self.stored.keys)

    @property
    def values(self) -> Tensor:
        return self.derive(self.stored.values)

    @abstractmethod
    def derive(self, tensor: Tensor) -> Tensor:
        """Make keys of stored keys, values of stored values."""


@dataclass(frozen=True)
class ChosenTokens(DerivedTokens):
    """Some of ``stored``, on the device of ``index``: (tokens,) or (batch, tokens), int64."""

    index: Tensor

    @property
    def num_tokens(self) -> int:
        return self.index.shape[-1]

    def derive(self, tensor: Tensor) -> Tensor:
        return take_tokens(tensor, self.index.to(tensor.device)).to(self.index.device, non_blocking=True)


class Codec(Protocol):
    """Encodes every token and head by itself, so that a token can be moved without touching its neighbours."""

    def planes(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        """Tensors kept per token and head: suffix to (channels, dtype)."""
        ...

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """(batch, tokens, heads, head_dim) to its planes."""
        ...

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Planes back to (batch, tokens, heads, head_dim)."""
        ...


@dataclass(frozen=True)
class Raw(Codec):
    """Tokens as they are."""

    def planes(self, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        return {"": (head_dim, dtype)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"": x}

    def decode(self, planes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return planes[""]


@dataclass(frozen=True)
class Storage:
    """Maker of buffers."""

    keys: Codec = Raw()  # codec of the keys
    values: Codec = Raw()  # codec of the values
    is_on_host: bool = False  # keep the codes in the host's memory; they are decoded on the rollout's device

    @property
    def is_encoded(self) -> bool:
        """True where a codec makes other numbers of keys or values."""
        return self.keys != Raw() or self.values != Raw()

    def buffer(self, geometry: "Geometry", num_tokens: int, *, num_heads: int | None = None) -> "TokenBuffer":
        return TokenBuffer(geometry, num_tokens, num_heads=num_heads, storage=self)


@dataclass(frozen=True)
class PlacedTokens(Stored):
    """Places of a buffer, decoded when they are asked for."""

    buffer: "TokenBuffer"
    layer: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def keys(self) -> Tensor:
        return self.buffer.decode("keys", self.layer, self.start, self.end)

    @property
    def values(self) -> Tensor:
        return self.buffer.decode("values", self.layer, self.start, self.end)


_Places = tuple[str, int, int, int]  # ``keys`` or ``values``, layer, first place, place behind the last


class TokenBuffer:
    """Keys and values in a fixed number of places, in every layer; a layer is allocated when it is first written.

    A token is encoded once, when it is written: ``move``, ``save`` and ``load`` handle codes. Where the codes lie in
    host memory and the rollout runs on CUDA, they are pinned, and reading some places of a layer starts the copy of
    the same places of the next layer on a stream of its own.

    Args:
        geometry: Shapes of the rollout.
        num_tokens: Places per layer and sample.
        num_heads: Heads that are kept; None keeps all.
        storage: Codecs and memory.
    """

    def __init__(
        self, geometry: "Geometry", num_tokens: int, *, num_heads: int | None = None, storage: Storage
    ) -> None:
        self.geometry, self.num_tokens = geometry, num_tokens
        self.num_heads = geometry.num_heads if num_heads is None else num_heads
        self._codecs: dict[str, Codec] = {"keys": storage.keys, "values": storage.values}
        self.is_encoded = storage.is_encoded
        self.is_on_host = storage.is_on_host
        is_far = storage.is_on_host and geometry.device.type == "cuda"
        self._stream = torch.cuda.Stream(geometry.device) if is_far else None
        self._staged: dict[_Places, tuple[dict[str, Tensor], torch.cuda.Event]] = {}
        self._layers: dict[int, dict[str, Tensor]] = {}

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one place over all layers and the batch."""
        g = self.geometry
        per_head = sum(channels * dtype.itemsize for channels, dtype in self._planes().values())
        return g.num_layers * g.batch_size * self.num_heads * per_head

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Store (batch, tokens, heads, head_dim) keys and values from place ``start`` on."""
        if self.geometry.device.type == "meta":
            return  # there is nothing to encode, and memory tables ask for thousands of blocks
        planes = self._of(layer)
        for side, x in (("keys", k), ("values", v)):
            for suffix, plane in self._codecs[side].encode(x).items():
                self._copy(plane, planes[side + suffix][:, start : start + x.shape[1]])
        self._forget(layer)

    def read(self, layer: int, start: int, end: int) -> PlacedTokens:
        return PlacedTokens(self, layer, start, end)

    def decode(self, side: str, layer: int, start: int, end: int) -> Tensor:
        """Keys or values of places ``start`` to ``end``, in the rollout's dtype and on its device."""
        places = (side, layer, start, end)
        planes = self._cut(*places) if self._stream is None else self._fetch(places, self._stream)
        return self._codecs[side].decode(planes, self.geometry.dtype)

    def move(self, layer: int, index: Tensor, start: int) -> None:
        """Copy places ``index``, (tokens,) or (batch, tokens), to ``start`` and on, exactly as they are encoded."""
        self._settle()
        for plane in self._of(layer).values():
            plane[:, start : start + index.shape[-1]] = take_tokens(plane, index.to(plane.device))
        self._forget(layer)

    def grow(self, num_tokens: int) -> None:
        self._settle()
        self.num_tokens = num_tokens
        for layer, old in self._layers.items():
            self._layers[layer] = self._empty()
            for name, plane in old.items():
                self._layers[layer][name][:, : plane.shape[1]] = plane
            self._forget(layer)

    def save(self, layer: int, start: int, end: int) -> dict[str, Tensor]:
        """Places ``start`` to ``end`` as they are encoded, by name."""
        self._settle()
        return {name: plane[:, start:end].clone() for name, plane in self._of(layer).items()}

    def load(self, layer: int, start: int, saved: Mapping[str, Tensor]) -> None:
        """Put saved places back, from ``start`` on."""
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
        where: dict[str, Any] = {"device": g.device} if self._stream is None else {"device": "cpu", "pin_memory": True}
        shape = (g.batch_size, self.num_tokens, self.num_heads)
        planes = self._planes().items()
        return {name: torch.zeros((*shape, channels), dtype=dtype, **where) for name, (channels, dtype) in planes}

    def _cut(self, side: str, layer: int, start: int, end: int) -> dict[str, Tensor]:
        planes = self._of(layer)
        suffixes = self._codecs[side].planes(self.geometry.head_dim, self.geometry.dtype)
        return {suffix: planes[side + suffix][:, start:end] for suffix in suffixes}

    def _copy(self, source: Tensor, target: Tensor) -> None:
        if self._stream is None:
            target.copy_(source)
            return
        for one, other in zip(source, target, strict=True):  # a sample's places are one piece: no staging copy
            other.copy_(one, non_blocking=True)

    def _fetch(self, wanted: _Places, stream: torch.cuda.Stream) -> dict[str, Tensor]:
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
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                arriving, arrived = self._arrive(following), torch.cuda.Event()
                arrived.record(stream)
            self._staged[following] = arriving, arrived
        return planes

    def _arrive(self, wanted: _Places) -> dict[str, Tensor]:
        cut = self._cut(*wanted)
        device = self.geometry.device
        planes = {suffix: torch.empty(t.shape, dtype=t.dtype, device=device) for suffix, t in cut.items()}
        for suffix, plane in planes.items():
            self._copy(cut[suffix], plane)
        return planes

    def _forget(self, layer: int) -> None:
        self._staged = {key: staged for key, staged in self._staged.items() if key[1] != layer}

    def _settle(self) -> None:
        """Before the processor touches the codes: copies under way have to arrive."""
        if self._stream is not None:
            torch.cuda.synchronize(self.geometry.device)


def take_tokens(tensor: Tensor, index: Tensor) -> Tensor:
    """Tokens of (batch, tokens, ...) by an int64 index, (n,) or (batch, n): (batch, n, ...), a copy."""
    if index.ndim == 1:
        return tensor.index_select(1, index)
    # Whole rows at a time: several times as fast as gathering single channels.
    rows = [one.index_select(0, places) for one, places in zip(tensor, index, strict=True)]
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


@dataclass(frozen=True)
class Geometry:
    """Shapes of one rollout."""

    num_layers: int  # self-attention layers of the transformer
    num_heads: int  # heads per layer
    head_dim: int  # channels per head
    num_rows: int  # token rows per latent frame
    num_columns: int  # token columns per latent frame
    frames_per_block: int  # latent frames denoised together
    batch_size: int = 1  # videos rolled out together
    max_frames: int | None = None  # length of the rollout, when it is known
    dtype: torch.dtype = torch.float32  # of the stored keys and values
    device: torch.device = torch.device("cpu")  # of the stored keys and values
    storage: Storage = field(default=Storage(), compare=False)  # codecs and memory of the stored tokens

    @property
    def tokens_per_frame(self) -> int:
        return self.num_rows * self.num_columns


def token_numbers(geometry: Geometry, start_frame: int, num_frames: int) -> Tensor:
    """Number the tokens of consecutive frames, from the video's first token on: (batch, tokens), int64."""
    size = geometry.tokens_per_frame
    numbers = torch.arange(start_frame * size, (start_frame + num_frames) * size, device=geometry.device)
    return numbers.expand(geometry.batch_size, -1)


def coordinates(numbers: Tensor, geometry: Geometry) -> Tensor:
    """Frame, row and column of tokens by their ``token_numbers``, (batch, tokens): (batch, tokens, 3), float64."""
    if numbers.device.type == "meta":
        # Played for sizes alone, where PyTorch's arithmetic is Python: milliseconds for each operation.
        return numbers.new_empty((*numbers.shape, 3), dtype=torch.float64)
    cells = numbers % geometry.tokens_per_frame
    axes = (numbers // geometry.tokens_per_frame, cells // geometry.num_columns, cells % geometry.num_columns)
    return torch.stack(axes, dim=-1).double()


def saved_part(state: Mapping[str, Any], prefix: str, suffix: str = "") -> dict[str, Any]:
    """Entries of a saved state with this prefix and suffix, by what stands between them."""
    keys = [key for key in state if key.startswith(prefix) and key.endswith(suffix)]
    return {key.removeprefix(prefix).removesuffix(suffix): state[key] for key in keys}
