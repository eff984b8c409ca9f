"""Who is who in a pack: sinks, archived and recent blocks, as a pure function of counters."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)


class Block(NamedTuple):
    """A committed block of the video."""

    start: int
    num_frames: int

    @property
    def frames(self) -> range:
        """Its latent frames."""
        return range(self.start, self.start + self.num_frames)


@dataclass(frozen=True)
class Partitions:
    """Blocks by what has become of them, each tuple in time order.

    Attributes:
        sinks: First blocks, in full for ever.
        mids: Archived blocks, which are kept in small only.
        recents: Last blocks, in full; their small versions are ready and wait.
    """

    sinks: tuple[Block, ...] = ()
    mids: tuple[Block, ...] = ()
    recents: tuple[Block, ...] = ()

    def advance(
        self, block: Block, *, num_sink_frames: int, num_recent_frames: int, num_archive_blocks: int, block_size: int
    ) -> "Partitions":
        """Take a new block in: a sink while sinks are wanted, else recent; the oldest recents move to the archive.

        Blocks stay whole, so that counts of frames are rounded up. The archive is first in, first out. Its places
        are equal, so a first block of another size than the rest is not archived.
        """
        if block.start < num_sink_frames:
            return Partitions((*self.sinks, block), self.mids, self.recents)
        mids, recents = self.mids, (*self.recents, block)
        while recents and sum(b.num_frames for b in recents[1:]) >= num_recent_frames:
            oldest, *rest = recents
            recents = tuple(rest)
            mids += (oldest,) if oldest.num_frames == block_size else ()
        return Partitions(self.sinks, mids[max(len(mids) - num_archive_blocks, 0) :], recents)

    def without(self, start: int) -> "Partitions":
        """The same but for the block that starts at ``start``."""
        kept = ([b for b in part if b.start != start] for part in (self.sinks, self.mids, self.recents))
        return Partitions(*map(tuple, kept))

    def full_frames(self) -> list[int]:
        """Frames that are kept in full."""
        return [frame for block in (*self.sinks, *self.recents) for frame in block.frames]

    def small_blocks(self, block_size: int) -> list[int]:
        """First frames of the blocks that are kept in small: archived, or recent and to be archived."""
        return [b.start for b in (*self.mids, *self.recents) if b.num_frames == block_size]


def hand_over(places: Mapping[T, int], before: Iterable[T], after: Iterable[T], num_places: int) -> dict[T, int]:
    """Give what is new a place that no one needs any more.

    Layers commit one after the other: those that have not yet still find everything of ``before``.

    Args:
        places: Of all in ``before``, and perhaps of others.
        before: Who is kept now.
        after: Who is to be kept.
        num_places: How many there are.

    Returns:
        Places of all in ``before`` and ``after``; one that is let go may share its place with one that is new.
    """
    kept = {item: places[item] for item in before}
    after = list(after)
    taken = {kept[item] for item in after if item in kept}
    free = iter([place for place in range(num_places) if place not in taken])
    return kept | {item: next(free) for item in after if item not in kept}
