"""Bytes that a policy's cache takes in a rollout, from what the policy keeps and reads.

Passes are simulated for their sizes alone: keys and values are meta tensors, which have a shape and no memory. The
buffers that ``KVCache`` would allocate for them are added up here, and a test compares them with a live cache.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longtake.cache.base import CachePolicy, Context, Geometry, HeadGroup, Pass, Read
from longtake.cache.simulation import SimulatedBlock, simulate
from longtake.cache.storage import PlacedTokens, TokenBuffer

MAX_BLOCKS = 600  # of a rollout of unknown length: at 4 frames a block ten minutes of video
STEADY_BLOCKS = 12  # without a change: the rest is alike
NUM_KEPT_PHASES = 8  # position tuples that ``GridRotary`` keeps
COMPLEX_BYTES = 8
HELD: tuple[str, ...] = ("stored", "allocated", "on_host", "read_sets", "phases")  # from block to block
SIZES: tuple[str, ...] = (*HELD, "layer_reads", "gathering", "budgeted")


@dataclass(frozen=True)
class Footprint:
    """Most bytes of one guidance branch's cache at any time, over layers and batch."""

    stored: int = 0  # kept tokens, as ``CacheStats`` counts them
    allocated: int = 0  # places on the rollout's device, taken or not, and whatever else the policy remembers
    on_host: int = 0  # places in host memory, where the rollout runs on another device
    read_sets: int = 0  # rotated keys and values that passes read: of all layers, or of one where they do not stay
    phases: int = 0  # rotations of keys and queries, and what was selected for read sets that do not stay
    layer_reads: int = 0  # of these the largest of one layer
    gathering: int = 0  # what exists for a moment while a layer's read set is assembled
    budgeted: int = 0  # kept tokens and the tokens that passes read, as a budget counts them
    num_blocks: int = 0  # blocks after which nothing grows; all blocks where something does to the end
    is_steady: bool = False  # whether nothing grew any more before the end

    @property
    def on_device(self) -> int:
        """Bytes that the rollout's device holds between passes."""
        return self.allocated + self.read_sets + self.phases


def footprint(
    policy: CachePolicy,
    geometry: Geometry,
    *,
    num_blocks: int | None = None,
    window_blocks: int = 1,
    latent_channels: int = 16,
) -> Footprint:
    """Add up what a rollout's cache takes at most.

    One and two layers are simulated, and every further layer takes what the second does; all layers where a policy
    splits heads, which it does differently in every layer.

    Args:
        policy: What to keep and read; of a budget what it chooses (``CachePolicy.chosen``).
        geometry: Of the rollout.
        num_blocks: Blocks of the whole video; None: of ``geometry.max_frames``.
        window_blocks: Blocks that a denoising pass spans.
        latent_channels: Of the latents that the policy is shown.
    """
    is_wide = geometry.device.type == "cuda" and geometry.dtype.itemsize < 4  # rotates float32 copies
    geometry = replace(geometry, device=torch.device("meta"))
    is_known = num_blocks is not None or geometry.max_frames is not None
    if num_blocks is None:
        longest = geometry.max_frames
        num_blocks = MAX_BLOCKS if longest is None else min(MAX_BLOCKS, -(-longest // geometry.frames_per_block))
    shown: dict[str, Any] = {"window_blocks": window_blocks, "latent_channels": latent_channels}

    def played(num_layers: int) -> tuple[dict[str, int], int, bool]:
        shapes = replace(geometry, num_layers=num_layers)
        buffers = _Buffers(shapes, stay=policy.start(shapes).keeps_read_sets, is_wide=is_wide)
        return buffers.most(simulate(policy, shapes, num_blocks, observe=buffers.observe, **shown))

    all_alone = policy.traits.splits_heads or geometry.num_layers < 3
    most, last_growth, is_steady = one = played(geometry.num_layers if all_alone else 1)
    two = one if all_alone else played(2)
    sizes = {key: size + (geometry.num_layers - 1) * (two[0][key] - size) for key, size in most.items()}
    if not (is_steady or is_known):
        raise ValueError(
            f"cache policy {policy.name!r} grows with the video: how much it takes depends on its length (max_frames)."
        )
    return Footprint(**sizes, num_blocks=last_growth if is_steady else num_blocks, is_steady=is_steady)


class _Buffers:
    def __init__(self, geometry: Geometry, *, stay: bool, is_wide: bool) -> None:
        self.geometry = geometry
        self.stay = stay
        self.is_wide = is_wide
        self.layer_reads = self.gathering = 0
        self.head_bytes = 2 * geometry.batch_size * geometry.head_dim * geometry.dtype.itemsize  # of one token
        # (tokens, heads) of every buffer by layer; those that all layers share at -1.
        self.read_sets: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        self.positions: dict[tuple[float, ...], None] = {}
        self.contexts: dict[int, Context] = {}  # what read sets that do not stay are assembled from

    def most(self, blocks: Iterable[SimulatedBlock]) -> tuple[dict[str, int], int, bool]:
        """Most bytes until the end, or until nothing grows; blocks until then, and whether that came."""
        most, steady, grown = dict.fromkeys(SIZES, 0), 0, 0
        for index, block in enumerate(blocks, 1):
            now = {key: max(most[key], size) for key, size in self.sizes(block).items()}
            grown = index if any(now[key] != most[key] for key in HELD) else grown
            most, steady = now, steady + 1 if now == most else 0
            if steady == STEADY_BLOCKS:
                return most, grown, True
        return most, grown, False

    def observe(self, layer: int, pass_: Pass, context: Context) -> None:
        """Allocate as ``KVCache`` does: the last buffers if they are large enough, else new ones."""
        g = self.geometry
        rows, columns = pass_.grid or (g.num_rows, g.num_columns)
        num_own, parts = pass_.num_frames * rows * columns, context.groups or (context,)
        key = layer if self.stay and pass_.kind != "encode" else -1
        if not self.stay and pass_.kind != "encode":
            self.contexts[layer] = context
        old = self.read_sets.get(key, [])
        old = old if len(old) == len(parts) else [(0, ())] * len(parts)
        self.read_sets[key] = [self._size(part, num_own, last) for part, last in zip(parts, old, strict=True)]
        self.layer_reads = max(
            self.layer_reads, sum(self._bytes(_num_tokens(part), self._heads(part)) for part in parts)
        )
        for part, last, new in zip(parts, old, self.read_sets[key], strict=True):
            replaced = 0 if new is last else self._bytes(*last)
            copied = max((self._copied(read) for read in part.reads), default=0) * len(self._heads(part))
            self.gathering = max(self.gathering, replaced + copied)
        for positions in (*(read.positions for part in parts for read in part.reads), context.query_positions):
            if not isinstance(positions, Tensor):  # phases of single tokens do not stay
                self.positions.pop(positions, None)
                self.positions[positions] = None
        self.positions = dict(list(self.positions.items())[-NUM_KEPT_PHASES:])

    def sizes(self, block: SimulatedBlock) -> dict[str, int]:
        """Bytes after a block, by field of ``Footprint``."""
        g = self.geometry
        seen: set[int] = set()
        near, far = held_bytes(block.state, seen)
        selected, _ = held_bytes(self.contexts, seen)
        read_sets = sum(self._bytes(*buffer) for parts in self.read_sets.values() for buffer in parts)
        pairs = sum(map(len, self.positions)) * (g.head_dim // 2) + 2 * (g.head_dim // 6)
        phases = COMPLEX_BYTES * g.tokens_per_frame * pairs + selected
        passes = [p for p in (block.denoise, block.commit) if p is not None]
        read = max(p.num_tokens for p in passes) + block.num_frames * g.tokens_per_frame
        token = self.head_bytes * g.num_heads * (g.num_layers if self.stay else 1)
        budgeted = block.stats.num_bytes + int(read * token)
        sizes = block.stats.num_bytes, near, far, read_sets, phases, self.layer_reads, self.gathering, budgeted
        return dict(zip(SIZES, sizes, strict=True))

    def _heads(self, part: Context | HeadGroup) -> tuple[int, ...]:
        return part.heads if isinstance(part, HeadGroup) else tuple(range(self.geometry.num_heads))

    def _bytes(self, num_tokens: int, heads: tuple[int, ...]) -> int:
        return self.head_bytes * num_tokens * len(heads)

    def _copied(self, read: Read) -> int:
        """Bytes of one head while a read is rotated: wide copies, and decoded numbers before they are rounded."""
        g, stored = self.geometry, read.stored
        is_decoded = isinstance(stored, PlacedTokens) and stored.buffer.is_encoded
        itemsize = (4 if self.is_wide else 0) + (2 * g.dtype.itemsize if is_decoded else 0)
        return stored.num_tokens * g.batch_size * g.head_dim * itemsize

    def _size(
        self, part: Context | HeadGroup, num_own: int, last: tuple[int, tuple[int, ...]]
    ) -> tuple[int, tuple[int, ...]]:
        heads, needed = self._heads(part), _num_tokens(part) + num_own
        if last[0] >= needed and last[1] == heads:
            return last
        longest = self.geometry.max_frames
        doubled = 2 * last[0] if longest is None else min(2 * last[0], longest * self.geometry.tokens_per_frame)
        return max(needed, part.capacity + num_own if part.capacity else doubled), heads


def _num_tokens(part: Context | HeadGroup) -> int:
    return sum(read.stored.num_tokens for read in part.reads)


def held_bytes(value: Any, seen: set[int] | None = None) -> tuple[int, int]:
    """Bytes of the buffers and tensors that a state holds: on its device, and in host memory; views count once.

    ``seen`` are objects and storages that are counted already, to which those found are added.
    """
    seen = set() if seen is None else seen
    key = value.untyped_storage()._cdata if isinstance(value, Tensor) else id(value)
    if isinstance(value, int | float | str) or key in seen:
        return 0, 0
    seen.add(key)
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes(), 0
    if isinstance(value, TokenBuffer):
        held_bytes(vars(value), seen)  # its tensors are counted here
        size = value.num_tokens * value.bytes_per_token
        return (0, size) if value.is_on_host else (size, 0)
    parts: Iterable[Any] = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list | tuple | set):
        parts = value
    elif type(value).__module__.startswith("longtake.") and hasattr(value, "__dict__"):
        parts = vars(value).values()
    held = [held_bytes(part, seen) for part in parts]
    return sum(near for near, _ in held), sum(far for _, far in held)
