"""What a cache allocates in a rollout: the real cache, played on the meta device, where nothing takes memory.

``CacheStats`` counts the tokens that are kept. A device has to hold more: the places that a policy reserves, the
rotated read sets, and the phases they are rotated by.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longtake.cache.base import BlockTrace, CachePolicy, Geometry, Pass
from longtake.cache.kv_cache import KVCache
from longtake.cache.live_bytes import LiveBytes
from longtake.cache.simulation import PATCH, job_shape
from longtake.cache.storage import TokenBuffer
from longtake.cache.wrappers.budget import Budget
from longtake.cache.wrappers.wrapper import Wrapper

STEADY_BLOCKS = 12  # without a change: the rest is alike
PLAYED_LAYERS = (1, 2)


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one guidance branch's cache, over layers and batch.

    Attributes:
        stored: Tokens that are kept, as ``CacheStats`` counts them.
        allocated: Places on the rollout's device, taken or not, and whatever else the policy remembers.
        on_host: Places in the host's memory, where the rollout runs on another device.
        read_sets: Rotated keys and values that passes read: of all layers, or of one where they do not stay.
        phases: What keys and queries are rotated by.
    """

    stored: int = 0
    allocated: int = 0
    on_host: int = 0
    read_sets: int = 0
    phases: int = 0

    @property
    def on_device(self) -> int:
        """Everything that the rollout's device holds."""
        return self.allocated + self.read_sets + self.phases

    def largest(self, other: "CacheBytes") -> "CacheBytes":
        """The larger of two, field by field."""
        return CacheBytes(*(max(a, b) for a, b in zip(_values(self), _values(other), strict=True)))

    def extended(self, other: "CacheBytes", num_more: int) -> "CacheBytes":
        """Bytes of ``num_more`` more layers, when ``other`` has one more: every further layer takes the same."""
        pairs = zip(_values(self), _values(other), strict=True)
        return CacheBytes(*(one + num_more * (two - one) for one, two in pairs))


@dataclass(frozen=True)
class CachePlay:
    """What came of playing a cache.

    Attributes:
        end: At the end of the video.
        most: The most of every part at any time.
        is_steady: Whether nothing changed any more before the end.
        num_blocks: Blocks after which that was so; else all blocks.
        assembling: Most that existed for a moment beside all that: gathering, scoring, moving; one layer at a time.
    """

    end: CacheBytes
    most: CacheBytes
    is_steady: bool
    num_blocks: int
    assembling: int


class PlayedCache:
    """A cache whose passes are played, each layer attending and committing as in a forward.

    Args:
        policy: What to keep and read.
        geometry: Shapes; the device is replaced by meta.
        window_blocks: Blocks that a denoising pass spans.
        latent_channels: Of the latents that the policy is shown.
    """

    def __init__(
        self, policy: CachePolicy, geometry: Geometry, *, window_blocks: int = 1, latent_channels: int = 16
    ) -> None:
        self.geometry = replace(geometry, device=torch.device("meta"))
        self.cache = KVCache(policy, self.geometry, attention=attend_nothing)
        self.num_blocks = 0
        self._window_blocks = window_blocks
        self._latent_channels = latent_channels

    def next_block(self) -> None:
        """Play a block: a denoising pass, the commit, the end of the block, its jobs."""
        size, index = self.geometry.frames_per_block, self.num_blocks
        start = index * size
        self.play(Pass("denoise", index, start, size * self._window_blocks))
        self.play(Pass("commit", index, start, size))
        for job in self.cache.end_block(BlockTrace(index, start, self.latents())):
            num_frames, grid = job_shape(job, self.geometry)
            self.play(Pass("encode", index, job.start_frame, num_frames, label=job.label, grid=grid))
        self.num_blocks += 1

    def latents(self) -> Tensor:
        """(batch, frames, channels, height, width) of a block."""
        g = self.geometry
        size = (PATCH * g.num_rows, PATCH * g.num_columns)
        return torch.empty((g.batch_size, g.frames_per_block, self._latent_channels, *size), device="meta")

    def bytes(self, live: int) -> CacheBytes:
        """What is held now.

        Args:
            live: Bytes of all tensors that were made since before the cache.
        """
        allocated, on_host = held_bytes(self.cache.state)
        read_sets = self.cache.num_scratch_bytes
        stored = self.cache.stats().num_bytes
        return CacheBytes(stored, allocated, on_host, read_sets, live - allocated - on_host - read_sets)

    def play(self, pass_: Pass) -> None:
        """Let all layers attend, and commit if that is what the pass does."""
        g = self.geometry
        rows, columns = pass_.grid or (g.num_rows, g.num_columns)
        shape = (g.batch_size, pass_.num_frames * rows * columns, g.num_heads, g.head_dim)
        qkv = [torch.empty(shape, dtype=g.dtype, device="meta") for _ in range(3)]
        for layer in range(g.num_layers):
            self.cache.attend(layer, *qkv, pass_)


def attend_nothing(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """What fused attention allocates: its result, and the logarithm of every query's sum."""
    q.new_empty(q.shape[:-1], dtype=torch.float32)
    return q.new_empty(q.shape)


def play_cache(policy: CachePolicy, geometry: Geometry, *, num_blocks: int, **settings: Any) -> CachePlay:
    """Play a rollout's cache to its end, or until nothing changes any more.

    One layer is played, then two: every further layer takes what the second did. Policies that refuse so few layers,
    because what they need is made for a model, are played in all.

    Args:
        policy: What to keep and read.
        geometry: Of the rollout.
        num_blocks: Blocks of the whole video.
        settings: Of ``PlayedCache``.

    Raises:
        ValueError: If the policy refuses the geometry, or nothing fits its budget.
    """
    policy = chosen_policy(policy, geometry)
    if geometry.num_layers <= PLAYED_LAYERS[1]:
        return _play(policy, geometry, num_blocks, settings)
    try:
        one, two = (_play(policy, replace(geometry, num_layers=n), num_blocks, settings) for n in PLAYED_LAYERS)
    except (ValueError, RuntimeError, IndexError):
        return _play(policy, geometry, num_blocks, settings)
    num_more = geometry.num_layers - 1
    return replace(one, end=one.end.extended(two.end, num_more), most=one.most.extended(two.most, num_more))


def chosen_policy(policy: CachePolicy, geometry: Geometry) -> CachePolicy:
    """The policy that a rollout of all layers runs, where a budget chooses one.

    Raises:
        ValueError: If nothing fits the budget.
    """
    if isinstance(policy, Budget):
        return chosen_policy(policy.choose(geometry), geometry)
    if isinstance(policy, Wrapper):
        return replace(policy, inner=chosen_policy(policy.inner, geometry))
    return policy


def held_bytes(state: Any) -> tuple[int, int]:
    """Bytes of all tensors that an object holds, on its device and in the host's memory; views count once.

    Args:
        state: A policy's state: plain objects, containers and tensors.
    """
    places: dict[int, tuple[int, bool]] = {}
    for tensor, is_on_host in _held(state, False, set()):
        storage = tensor.untyped_storage()
        places[storage._cdata] = (storage.nbytes(), is_on_host)
    host = sum(size for size, is_on_host in places.values() if is_on_host)
    return sum(size for size, _ in places.values()) - host, host


def _held(value: Any, is_on_host: bool, seen: set[int]) -> Iterator[tuple[Tensor, bool]]:
    if isinstance(value, Tensor):
        yield value, is_on_host
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set):
        parts = list(value)
    elif is_dataclass(value):
        parts = [getattr(value, field.name) for field in fields(value)]
    elif type(value).__module__.startswith("longtake.") and not isinstance(value, type):
        is_on_host = value.is_on_host if isinstance(value, TokenBuffer) else is_on_host
        parts = list(vars(value).values())
    else:
        return
    for part in parts:
        yield from _held(part, is_on_host, seen)


def _values(size: CacheBytes) -> tuple[int, ...]:
    return size.stored, size.allocated, size.on_host, size.read_sets, size.phases


def _play(policy: CachePolicy, geometry: Geometry, num_blocks: int, settings: Mapping[str, Any]) -> CachePlay:
    with LiveBytes() as live:
        played = PlayedCache(policy, geometry, **settings)
        most, steady, assembling = CacheBytes(), 0, 0
        while played.num_blocks < num_blocks and steady < STEADY_BLOCKS:
            before = live.now
            live.restart()
            played.next_block()
            now = played.bytes(live.now)
            grown = most.largest(now)
            steady = steady + 1 if grown == most else 0
            most = grown
            assembling = max(assembling, live.peak - max(before, live.now))
    is_steady = steady == STEADY_BLOCKS
    return CachePlay(now, most, is_steady, played.num_blocks - steady if is_steady else num_blocks, assembling)
