"""Recent frames, and every n-th of the frames before them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from longtake.cache.base import check_room
from longtake.cache.frames import FramePlan, FramePolicy, ends


@dataclass(frozen=True, kw_only=True)
class DilatedWindow(FramePolicy):
    """A window whose far part is dilated (Longformer, arXiv:2004.05150), over frames instead of tokens.

    Before the window stand the newest ``num_dilated_frames`` frames whose index is a multiple of ``dilation``.
    ``positions: contiguous`` closes the gaps and stays in the trained range.

    Differs: Longformer dilates some heads only, and its grid moves with the query; here all heads read the same frames
    and the grid stands still.
    """

    name: ClassVar[str] = "dilated_window"
    source: ClassVar[str] = "Longformer, arXiv:2004.05150"

    num_context_frames: int = 21  # everything attended: dilated part, window and the block itself
    num_dilated_frames: int = 6
    dilation: int = 8  # latent frames: twice a second
    positions: Literal["absolute", "contiguous"] = "contiguous"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "num_dilated_frames")
        self.at_least(1, "dilation")

    def check(self, frames_per_block: int, num_frames: int | None = None) -> None:
        content = f"num_dilated_frames={self.num_dilated_frames} and a block of {frames_per_block} frames"
        check_room(self.num_context_frames, self.num_dilated_frames + frames_per_block, content)

    def roles(self, frames: tuple[int, ...]) -> tuple[str, ...]:
        """Everything before the last gap is the dilated part."""
        gaps = (index for index in range(len(frames) - 1, 0, -1) if frames[index] - frames[index - 1] > 1)
        num_dilated = next(gaps, 0)
        return ("mid",) * num_dilated + ("recent",) * (len(frames) - num_dilated)

    def keep(self, stored: tuple[int, ...], start_frame: int, num_frames: int) -> tuple[int, ...]:
        """Keep all while all fits; then the window and the newest frames of the grid before it."""
        if start_frame + num_frames <= self.num_context_frames:
            return stored
        oldest = start_frame - (self.num_context_frames - num_frames - self.num_dilated_frames)
        grid = tuple(frame for frame in stored if frame < oldest and frame % self.dilation == 0)
        window = tuple(frame for frame in stored if frame >= oldest)
        return ends(grid, 0, self.num_dilated_frames) + window

    def read(self, kept: tuple[int, ...], start_frame: int, num_frames: int) -> FramePlan:
        return FramePlan.placed(self.positions, kept, start_frame, num_frames)
