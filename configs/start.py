"""What a video goes on from, as YAML says it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """An image or a clip that the video continues; all times and lengths of a run count from its end.

    Attributes:
        image: Image file; for models that start from one.
        video: Video file.
        seconds: Go on from the last so many seconds of the video; None: from all of it.
        include: Whether the file begins with what it goes on from, as the VAE decodes it.
    """

    image: str | None = None
    video: str | None = None
    seconds: float | None = None
    include: bool = True

    def __post_init__(self) -> None:
        if (self.image is None) == (self.video is None):
            given = "both an image and a video" if self.image is not None else "neither an image nor a video"
            raise ValueError(f"start: {given} to go on from: give one of image and video")
        if self.seconds is not None and self.image is not None:
            raise ValueError(f"start: seconds={self.seconds:g} is for videos: an image has no length")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"start: seconds={self.seconds}: give a length above 0")

    @property
    def kind(self) -> str:
        """``image`` or ``video``."""
        return "video" if self.image is None else "image"

    @property
    def path(self) -> str:
        """The file."""
        return self.video if self.image is None else self.image
