"""The first frames over and over, forwards and backwards, as if they were the recent past."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.base import check_room
from longtake.cache.frames import FramePlan, FramePolicy


@dataclass(frozen=True, kw_only=True)
class RollingSink(FramePolicy):
    """Replayed first frames and the last block (Rolling Sink, arXiv:2602.07775), written from its description.

    The first N = ``num_context_frames`` - block frames are kept for good. In a full window only the last block is the
    recent past; at every place p before it stands a first frame, forwards and backwards in turn, so that neighbours
    stay neighbours:

        frame shown at p = m if (p div N) is even else N - 1 - m,  m = p mod N

    With 21 frames and blocks of 3 the window shows 17, 16, 15 at p = 18, 14, 13, 12 at p = 21, and 0, 1, 2 at p = 36.

    Differs: any block size and window work; the description speaks of 18 first frames and blocks of 3.
    """

    name: ClassVar[str] = "rolling_sink"
    source: ClassVar[str] = "Rolling Sink, arXiv:2602.07775"

    num_context_frames: int = 21  # everything attended: replayed frames, last block and the block itself
    positions: Literal["absolute", "contiguous"] = "absolute"  # contiguous: the same distances, from 0

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        content = f"a block of {frames_per_block} frames and the one before it"
        check_room(self.num_context_frames, 2 * frames_per_block, content)

    def num_stored_frames(self, frames_per_block: int) -> int | None:
        return self.num_context_frames

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        return tuple("sink" if frame == index else "recent" for index, frame in enumerate(frames))

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        """Keep the first frames and the last block, whether or not the next block reads them all."""
        num_first = self.num_context_frames - num_frames
        return tuple(frame for frame in stored if frame < num_first or frame >= start_frame - num_frames)

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        """Fill the window before the block with what is shown at each of its places."""
        num_first = self.num_context_frames - num_frames
        places = range(max(start_frame - num_first, 0), start_frame)
        last = start_frame - num_frames
        frames = tuple(place if place >= last else _shown(place, num_first) for place in places)
        roles = tuple("recent" if place >= last else "sink" for place in places)
        shift = places.start if self.positions == "contiguous" else 0
        positions = tuple(float(place - shift) for place in range(places.start, start_frame + num_frames))
        return FramePlan(frames, positions[: len(frames)], positions[len(frames) :], roles)


def _shown(place: int, num_first: int) -> int:
    """The one of the first ``num_first`` frames at a place: 0, 1, ..., then back, and forth again."""
    cycle, frame = divmod(place, num_first)
    return num_first - 1 - frame if cycle % 2 else frame
