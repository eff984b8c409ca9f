"""Where tokens lie: fixed places in every layer, and how a codec or another memory takes their place."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Stored(Protocol):
    """Tokens that can be read; a codec decodes when ``keys`` or ``values`` is asked for."""

    @property
    def num_tokens(self) -> int:
        """How many, per sample."""
        ...

    @property
    def keys(self) -> Tensor:
        """(batch, tokens, heads, head_dim), un-rotated."""
        ...

    @property
    def values(self) -> Tensor:
        """(batch, tokens, heads, head_dim)."""
        ...


@dataclass(frozen=True)
class KeysValues:
    """Tokens as they are."""

    keys: Tensor
    values: Tensor

    @property
    def num_tokens(self) -> int:
        """How many, per sample."""
        return self.keys.shape[1]


class TokenBuffer(ABC):
    """Keys and values in a fixed number of places, in every layer. A token is encoded once, when it is written.

    Args:
        geometry: Shapes of the rollout.
        num_tokens: Places per layer and sample.
        num_heads: Heads that are kept; None keeps all.

    Attributes:
        is_on_host: Whether places are kept in the host's memory wherever the rollout runs.
    """

    is_on_host: bool = False

    def __init__(self, geometry: "Geometry", num_tokens: int, *, num_heads: int | None = None) -> None:
        self.geometry = geometry
        self.num_tokens = num_tokens
        self.num_heads = geometry.num_heads if num_heads is None else num_heads

    @property
    @abstractmethod
    def bytes_per_token(self) -> int:
        """Bytes of one place over all layers and the batch."""

    @abstractmethod
    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Store (batch, tokens, heads, head_dim) keys and values from place ``start`` on."""

    @abstractmethod
    def read(self, layer: int, start: int, end: int) -> Stored:
        """Tokens of places ``start`` to ``end``."""

    @abstractmethod
    def move(self, layer: int, index: Tensor, start: int) -> None:
        """Copy places ``index``, (tokens,) or (batch, tokens), to ``start`` and on, exactly as they are encoded."""

    @abstractmethod
    def grow(self, num_tokens: int) -> None:
        """Make room for more places, keeping what is stored."""

    @abstractmethod
    def save(self, layer: int, start: int, end: int) -> dict[str, Tensor]:
        """Places ``start`` to ``end`` as they are encoded, by name."""

    @abstractmethod
    def load(self, layer: int, start: int, saved: Mapping[str, Tensor]) -> None:
        """Put saved places back, from ``start`` on.

        Raises:
            ValueError: If the saved shapes are not this rollout's.
        """


class Storage(Protocol):
    """Makes buffers."""

    def buffer(self, geometry: "Geometry", num_tokens: int, *, num_heads: int | None = None) -> TokenBuffer:
        """Make an empty buffer."""
        ...


class PlainStorage:
    """Keys and values in the rollout's dtype, on its device."""

    def buffer(self, geometry: "Geometry", num_tokens: int, *, num_heads: int | None = None) -> "PlainBuffer":
        """Make an empty buffer."""
        return PlainBuffer(geometry, num_tokens, num_heads=num_heads)


class PlainBuffer(TokenBuffer):
    """Two tensors per layer, allocated when the layer is first written."""

    def __init__(self, geometry: "Geometry", num_tokens: int, *, num_heads: int | None = None) -> None:
        super().__init__(geometry, num_tokens, num_heads=num_heads)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one place over all layers and the batch."""
        g = self.geometry
        return 2 * g.num_layers * g.batch_size * self.num_heads * g.head_dim * g.dtype.itemsize

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Store tokens from place ``start`` on."""
        for tensor, new in zip(self._of(layer), (k, v), strict=True):
            tensor[:, start : start + new.shape[1]] = new

    def read(self, layer: int, start: int, end: int) -> KeysValues:
        """Views of places ``start`` to ``end``."""
        keys, values = self._of(layer)
        return KeysValues(keys[:, start:end], values[:, start:end])

    def move(self, layer: int, index: Tensor, start: int) -> None:
        """Copy places ``index`` to ``start`` and on."""
        for tensor in self._of(layer):
            tensor[:, start : start + index.shape[-1]] = take_tokens(tensor, index)

    def grow(self, num_tokens: int) -> None:
        """Make room for more places, keeping what is stored."""
        self.num_tokens = num_tokens
        for layer, old in self._layers.items():
            self._layers[layer] = self._empty()
            for tensor, kept in zip(self._layers[layer], old, strict=True):
                tensor[:, : kept.shape[1]] = kept

    def save(self, layer: int, start: int, end: int) -> dict[str, Tensor]:
        """Places ``start`` to ``end``."""
        stored = self.read(layer, start, end)
        return {"keys": stored.keys.contiguous(), "values": stored.values.contiguous()}

    def load(self, layer: int, start: int, saved: Mapping[str, Tensor]) -> None:
        """Put saved places back, from ``start`` on.

        Raises:
            ValueError: If the saved shapes are not this rollout's.
        """
        k, v = (saved[name].to(self.geometry.device) for name in ("keys", "values"))
        g = self.geometry
        shape = (g.batch_size, k.shape[1], self.num_heads, g.head_dim)
        if tuple(k.shape) != shape or k.dtype != g.dtype:
            raise ValueError(
                f"saved keys have shape {tuple(k.shape)} and {k.dtype}, this rollout needs {shape} and {g.dtype}: "
                "resume with the model, size and batch it was saved with."
            )
        self.write(layer, start, k, v)

    def _of(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            self._layers[layer] = self._empty()
        return self._layers[layer]

    def _empty(self) -> tuple[Tensor, Tensor]:
        g = self.geometry
        shape = (g.batch_size, self.num_tokens, self.num_heads, g.head_dim)
        # Two calls, two tensors: zeros are handed out by the system only when they are written over.
        return tuple(torch.zeros(shape, dtype=g.dtype, device=g.device) for _ in range(2))


def take_tokens(tensor: Tensor, index: Tensor) -> Tensor:
    """Tokens of (batch, tokens, ...) by an index that is the same for all samples or has a row for each.

    Args:
        tensor: (batch, tokens, ...).
        index: (n,) or (batch, n), int64.

    Returns:
        (batch, n, ...), a copy.
    """
    if index.ndim == 1:
        return tensor.index_select(1, index)
    # Whole rows at a time: several times as fast as gathering single channels.
    rows = [one.index_select(0, places) for one, places in zip(tensor, index, strict=True)]
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


@dataclass(frozen=True)
class Geometry:
    """Shapes of one rollout.

    Attributes:
        num_layers: Self-attention layers of the transformer.
        num_heads: Heads per layer.
        head_dim: Channels per head.
        num_rows: Token rows per latent frame.
        num_columns: Token columns per latent frame.
        frames_per_block: Latent frames denoised together.
        batch_size: Videos rolled out together.
        max_frames: Length of the rollout, when it is known.
        dtype: Of the stored keys and values.
        device: Of the stored keys and values.
        storage: How a policy's tokens are kept: plain, quantised, in host memory.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    num_rows: int
    num_columns: int
    frames_per_block: int
    batch_size: int = 1
    max_frames: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    storage: Storage = field(default_factory=PlainStorage, compare=False)

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.num_rows * self.num_columns
